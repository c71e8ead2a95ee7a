"""Integer grids for weights: which numbers a group of weights may take, and what storing them costs.

A weight w becomes an integer code c in 0 .. 2^b - 1 and comes back as s (c - z), with one scale s and one zero point z
for each row of a matrix, or for each group of consecutive inputs of a row. Two grids are in use:

    official (GPTQ)   lo = min(0, min w), hi = max(0, max w)     c = clip(round(w / s) + z)
    evopress          lo = min w,         hi = max w             c = clip(round(w / s + z))

with s = (hi - lo) / (2^b - 1) and z = round(-lo / s). Symmetric grids take lo = -hi = -max|w| and z = 2^(b-1). Sources:
Frantar et al. 2023, "GPTQ" (IST-DASLab/gptq, ``quant.py``) and Sieberling et al. 2025, "EvoPress" (IST-DASLab/EvoPress,
``src/quant_utils.py``).

* The symmetric range is two-sided here even for rows whose weights all have one sign; GPTQ's code leaves one end of
  these at 0 and then cuts the upper half of the weights off.
* Where all weights of a group are equal, the evopress range would be empty: it is then reached out to 0, so that the
  one value there is comes back. A group of zeros keeps scale 2 / (2^b - 1).
* A symmetric grid has its largest |w| exactly between two codes: which one it gets depends on the last bit.
* 0 is a code of every official and symmetric grid, and of every evopress group that holds a weight that is 0 or weights
  of both signs. An evopress group of one sign has no 0, and its zero point may be no code.
* Scales (and zero points) are rounded to the precision they are stored in *before* weights are put on the grid.

A pruner's result is the chain form: dequantised weights in the model's own class. What they would take in storage is
noted, see ``sizes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

REVISION = 1

Kind = Literal["official", "evopress"]
Precision = Literal["float32", "float16", "bfloat16"]
# Bits of a number of each precision.
WIDTHS: dict[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16}
# The smallest scale of each: a subnormal number in float16, whose range is short.
SMALLEST: dict[str, float] = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
# Bits of the group number that every input needs where groups are not of consecutive inputs: int32 in GPTQ's format.
INDEX_BITS = 32


@dataclass(frozen=True)
class Grid:
    """How ranges are chosen and weights rounded; ``scales`` is the precision that scales are stored in."""

    kind: Kind = "official"
    symmetric: bool = False
    scales: Precision = "float32"

    def fit(self, weight: Tensor, most: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
        """Scale and zero point [n] for each of n groups of weights, from codes 0 .. ``most`` [n].

        Args:
            weight: [n,columns], or [columns,n] with ``dim=0``.
            most: the largest code of each group, 2^bits - 1.
        """
        import torch

        low, high = self._range(*torch.aminmax(weight, dim=dim))
        scale = self._stored((high - low) / most)
        if self.symmetric:
            return scale, (most + 1) / 2
        zero = torch.round(-low / scale)
        # A coarsely rounded scale may push the zero point of a range with 0 in it one beyond the last code.
        inside = (low <= 0) & (high >= 0)
        return scale, torch.where(inside, zero.clamp(min=0).minimum(most), self._rounded(zero))

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the range [n] for smallest and largest weights [n]; never empty."""
        import torch

        if self.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        reached = torch.ones_like(low, dtype=torch.bool) if self.kind == "official" else low == high
        low, high = torch.where(reached, low.clamp(max=0), low), torch.where(reached, high.clamp(min=0), high)
        empty = low == high
        return low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)

    def _stored(self, scale: Tensor) -> Tensor:
        """The scale [n] as it comes back from storage; never 0."""
        return self._rounded(scale.clamp(min=SMALLEST[self.scales]))

    def _rounded(self, values: Tensor) -> Tensor:
        """The values [n] as the precision that scales are stored in holds them."""
        import torch

        return values.to(getattr(torch, self.scales)).to(values.dtype)

    def steps_(self, scaled: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Turn w / s [n] into the integers c - z that the weights w become, in place.

        ``low`` is -z and ``high`` is most - z: clip(c, 0, most) - z, written for integers c - z, rounds nothing.
        """
        if self.kind == "evopress":
            scaled.add_(zero).round_().sub_(zero)
        else:
            scaled.round_()
        return scaled.clamp_(low, high)

    def stored_bits(
        self, rows: int, columns: int, bits: int, group: int | None, indices: bool = False
    ) -> int:
        """Bits that a matrix on this grid takes in storage; see ``stored_bits``."""
        width = WIDTHS[self.scales]
        # The zero point of an evopress range may be no code, so that it is stored like a scale.
        zero = width if self.kind == "evopress" else None
        return stored_bits(
            rows, columns, bits, group, self.symmetric, scale_bits=width, zero_bits=zero, indices=indices
        )


@dataclass(frozen=True, kw_only=True)
class Gridded:
    """Options of every method that puts weights on a grid; a ``Config`` inherits them."""

    # Inputs that share a scale, None for all of a row; 128 is usual. A last, shorter group has a scale of its own.
    group: Annotated[int, Gt(0)] | None = None
    # Whether the range is as long below 0 as above it.
    symmetric: bool = False
    # "official": 0 always has a code. "evopress": the range is that of the weights.
    grid: Kind = "official"
    # What scales (and evopress zero points) are stored in; weights are put on the grid of the rounded scale.
    scales: Precision = "float16"

    @property
    def numbers(self) -> Grid:
        """The grid that the options ask for."""
        return Grid(self.grid, self.symmetric, self.scales)


@dataclass(frozen=True)
class Quantised:
    """A matrix on a grid: codes [out,in] uint8; scale and zero [out,groups]; the group of every input [in]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of: Tensor

    def weight(self) -> Tensor:
        """The weights [out,in] that the codes stand for, s (c - z)."""
        codes = self.codes.to(self.scale.dtype)
        return self.scale[:, self.group_of] * (codes - self.zero[:, self.group_of])

    def checked(self, scales: str) -> Quantised:
        """Itself; raises an AssayError where a scale is not a finite number."""
        import torch

        if not bool(torch.isfinite(self.scale).all()):
            raise AssayError(
                f"a matrix of {self.codes.shape[0]} x {self.codes.shape[1]} weights has a scale that is not finite in "
                f"{scales}: its weights are not finite, or too large for that precision (float32 holds any)."
            )
        return self


def largest_code(bits: int, like: Tensor, rows: int) -> Tensor:
    """2^bits - 1, once for each row, in the precision and place of ``like``."""
    return like.new_full((rows,), float(2**bits - 1))


def groups_of(columns: int, group: int | None, like: Tensor) -> Tensor:
    """The group of every input [in]: all in one without a group size; the last group may be shorter."""
    import torch

    return torch.arange(columns, device=like.device) // (group or columns)


def fit_groups(grid: Grid, weight: Tensor, most: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out,groups] of all groups of a matrix [out,in] as it is."""
    import torch

    pieces = weight.split(group or weight.shape[1], dim=1)
    scale, zero = zip(*(grid.fit(piece, most) for piece in pieces), strict=True)
    return torch.stack(scale, dim=1), torch.stack(zero, dim=1)


def nearest(weight: Tensor, grid: Grid, bits: int, group: int | None) -> Quantised:
    """Every weight of a matrix [out,in] at the nearest number of its group's grid: no weight looks at another."""
    import torch

    most = largest_code(bits, weight, weight.shape[0])
    scale, zero = fit_groups(grid, weight, most, group)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for index, piece in enumerate(weight.split(group or weight.shape[1], dim=1)):
        s, z = scale[:, index, None], zero[:, index, None]
        start = index * (group or 0)
        codes[:, start : start + piece.shape[1]] = grid.steps_(piece / s, z, -z, most[:, None] - z) + z
    return Quantised(codes, scale, zero, groups_of(weight.shape[1], group, weight)).checked(grid.scales)


# --- sizes ------------------------------------------------------------------------------------------------


def stored_bits(
    rows: int,
    columns: int,
    bits: int,
    group: int | None,
    symmetric: bool,
    *,
    scale_bits: int = 16,
    zero_bits: int | None = None,
    indices: bool = False,
) -> int:
    """Bits that a matrix [rows,columns] takes in storage: codes, scales, zero points, and group numbers of inputs.

    For each weight b + 16 / g with groups of g, a symmetric grid and 16-bit scales, b + (16 + b) / g otherwise.

    Args:
        group: inputs that share a scale, None for all of a row; a last, shorter group has a scale, too.
        zero_bits: of a zero point; None: as many as a code has. A symmetric grid stores none.
        indices: whether every input needs its group's number, as after act-order without static groups.
    """
    groups = -(-columns // (group or columns))
    zero = 0 if symmetric else bits if zero_bits is None else zero_bits
    numbers = columns * INDEX_BITS if indices and groups > 1 else 0
    return rows * (columns * bits + groups * (scale_bits + zero)) + numbers


def sizes(
    model: PreTrainedModel, grid: Grid, bits: int, group: int | None, indices: bool = False
) -> dict[str, Any]:
    """What a model takes once every linear layer of its decoder is on a grid.

    ``bits_per_weight`` is over these layers, ``bits_per_weight_layers`` of each; ``bits_per_weight_model`` counts
    embeddings, norms, biases and output head, too, at 16 bits.
    """
    from methods.prune._walk import linear_weights

    weights = {name: model.get_parameter(name) for name in linear_weights(model)}
    stored = {
        name: grid.stored_bits(len(weight), weight.shape[1], bits, group, indices)
        for name, weight in weights.items()
    }
    numbers, bits_of_all = sum(weight.numel() for weight in weights.values()), sum(stored.values())
    everything = sum(parameter.numel() for parameter in model.parameters())
    return {
        "bits_per_weight": bits_of_all / numbers,
        "bits_per_weight_model": (bits_of_all + 16 * (everything - numbers)) / everything,
        "bits_per_weight_layers": {
            name.removesuffix(".weight"): stored[name] / weights[name].numel() for name in weights
        },
    }
