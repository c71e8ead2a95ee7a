"""How a level's weight is stored, in as few bits as the kind of level allows, and decoded bit for bit.

==========  ===========================================  ====================================================
encoding    parts                                        decoded, as float32
==========  ===========================================  ====================================================
sparse      mask (a bit for each weight), values         the values where the mask is set
codes       planes (bits of the codes), scale, zero      scale * (code - zero), 0 where a pruned mask says so
columns     kept (input columns), values                 the values in the kept columns
==========  ===========================================  ====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device


@dataclass(frozen=True)
class Encoded:
    """A weight [rows,columns] as it is stored: the name of its encoding, and its parts."""

    encoding: str
    rows: int
    columns: int
    parts: Mapping[str, Tensor]

    def decode(self) -> Tensor:
        """The weight [rows,columns] in float32, on the device its parts are on."""
        return _DECODERS[self.encoding](self)

    def to(self, where: device) -> Encoded:
        """The same with its parts on a device: they are small, and a card decodes them many times as fast."""
        return replace(self, parts={name: part.to(where) for name, part in self.parts.items()})


def encode_sparse(weight: Tensor) -> Encoded:
    """A weight [out,in] by the places and the values of what is not 0, in its own dtype."""
    kept = weight != 0
    parts = {"mask": _packed(kept), "values": weight[kept]}
    return _encoded("sparse", weight, parts)


def encode_codes(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_of: Tensor | None = None,
    pruned: Tensor | None = None,
) -> Encoded:
    """Codes [out,in] of 0 to 2^bits - 1 with scale and zero [out,groups]: scale * (code - zero) in float32.

    Args:
        group_of: the group [in] of each input column; default: as many consecutive columns for each group.
        pruned: which weights [out,in] are 0 whatever their code; left out where none is.
    """
    if not 1 <= bits <= 8 or int(codes.max()) >= 2**bits:
        raise ValueError(f"codes up to {int(codes.max())} do not fit into {bits} bits (1 to 8)")
    if group_of is None and codes.shape[1] % scale.shape[1]:
        raise ValueError(
            f"{codes.shape[1]} columns do not divide into {scale.shape[1]} groups; give group_of"
        )
    parts = {"planes": _planes(codes, bits), "scale": scale, "zero": zero}
    if group_of is not None:
        parts["group_of"] = group_of.int()
    if pruned is not None and bool(pruned.any()):
        parts["pruned"] = _packed(pruned)
    return _encoded("codes", codes, parts)


def encode_columns(weight: Tensor) -> Encoded:
    """A weight [out,in] by its input columns that are not all 0, in its own dtype."""
    kept = (weight != 0).any(dim=0).nonzero().flatten()
    return _encoded("columns", weight, {"kept": kept.int(), "values": weight[:, kept]})


def _encoded(encoding: str, weight: Tensor, parts: Mapping[str, Tensor]) -> Encoded:
    rows, columns = weight.shape
    return Encoded(encoding, rows, columns, parts)


def _decode_sparse(encoded: Encoded) -> Tensor:
    import torch

    kept = _unpacked(encoded.parts["mask"], encoded.rows * encoded.columns)
    values = encoded.parts["values"]
    if int(kept.sum()) != len(values):
        raise ValueError(f"a mask of {int(kept.sum())} weights has {len(values)} values")
    weight = torch.zeros(encoded.rows * encoded.columns, device=values.device)
    return weight.masked_scatter_(kept, values.float()).view(encoded.rows, encoded.columns)


def _decode_codes(encoded: Encoded) -> Tensor:
    parts, size = encoded.parts, encoded.rows * encoded.columns
    codes = _codes(parts["planes"], size).view(encoded.rows, encoded.columns).float()
    scale, zero = parts["scale"].float(), parts["zero"].float()
    if "group_of" in parts:
        columns = parts["group_of"].long()
        weight = scale[:, columns] * (codes - zero[:, columns])
    else:
        grouped = codes.unflatten(1, (scale.shape[1], -1))
        weight = (scale[:, :, None] * (grouped - zero[:, :, None])).flatten(1)
    if "pruned" in parts:
        weight.masked_fill_(_unpacked(parts["pruned"], size).view_as(weight), 0.0)
    return weight


def _decode_columns(encoded: Encoded) -> Tensor:
    import torch

    values = encoded.parts["values"].float()
    weight = torch.zeros(encoded.rows, encoded.columns, device=values.device)
    return weight.index_copy_(1, encoded.parts["kept"].long(), values)


_DECODERS: dict[str, Callable[[Encoded], Tensor]] = {
    "sparse": _decode_sparse,
    "codes": _decode_codes,
    "columns": _decode_columns,
}


def _packed(mask: Tensor) -> Tensor:
    """Eight entries of a boolean tensor to a byte, first ones first: uint8 [ceil(n/8)]."""
    import numpy
    import torch

    return torch.from_numpy(numpy.packbits(mask.detach().cpu().numpy().ravel()))


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` entries of what ``_packed`` packed: bool [count]."""
    import torch

    return _bits(packed, count).view(torch.bool)


def _bits(packed: Tensor, count: int) -> Tensor:
    """0 or 1 for each of the first ``count`` bits: uint8 [count]; numpy would fill up too short a tensor with zeros."""
    import numpy
    import torch

    if packed.numel() != -(-count // 8):
        raise ValueError(f"{packed.numel()} bytes are not those of {count} bits")
    if packed.device.type != "cpu":
        return _bits_by_shifts(packed)[:count]
    return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=count))


def _bits_by_shifts(packed: Tensor) -> Tensor:
    """What numpy does on a processor, on any device: 0 or 1 for every bit, uint8 [8 n] for n bytes."""
    import torch

    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).flatten()


def _planes(codes: Tensor, bits: int) -> Tensor:
    """Bit after bit of all codes: uint8 [bits, ceil(n/8)]. Every width from 1 to 8 takes exactly its bits."""
    import torch

    flat = codes.detach().cpu().to(torch.uint8).flatten()
    return torch.stack([_packed((flat >> bit & 1).bool()) for bit in range(bits)])


def _codes(planes: Tensor, count: int) -> Tensor:
    """The codes uint8 [count] behind their bit planes."""
    codes = _bits(planes[0], count)
    for bit in range(1, len(planes)):
        codes |= _bits(planes[bit], count) << bit
    return codes
