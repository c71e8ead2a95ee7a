"""Layers at several bit-widths: how they are written to a level database, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from methods.prune._grids import Grid, Gridded, Kind, Quantised
from methods.stage import AssayError

if TYPE_CHECKING:
    from methods.levels._database import Writer
    from methods.levels._encodings import Encoded


@dataclass(frozen=True, kw_only=True)
class Widths(Gridded):
    """Options of every database of bit-widths."""

    # Bit-widths of every layer; the shipped scripts of EvoPress take 2 to 6.
    bits: tuple[Annotated[int, Ge(2), Le(8)], ...] = (2, 3, 4, 5, 6)
    # Inputs that share a scale, None for all of a row; 128 in EvoPress. A last, shorter group has its own scale.
    group: Annotated[int, Gt(0)] | None = 128
    # "evopress": the range is that of the weights. "official" (GPTQ): 0 always has a code.
    grid: Kind = "evopress"


def check_bits(method: str, bits: Sequence[int]) -> None:
    """Raise an AssayError unless there is a bit-width, and each is named once."""
    if not bits or len(set(bits)) < len(bits):
        raise AssayError(
            f"{method}: bits={list(bits)} must name bit-widths, each of them once, such as [2,3,4]."
        )


def write_layer(
    writer: Writer, name: str, block: int, levels: Mapping[int, Quantised], grid: Grid, group: int | None
) -> None:
    """Write a layer at all its bit-widths.

    A level's name is its bits; its cost counts the codes alone, its share the scales and zero points, too.
    """
    ordered = {bits: levels[bits] for bits in sorted(levels)}
    rows, columns = next(iter(ordered.values())).codes.shape
    writer.write(
        name,
        block,
        "weights",
        {str(bits): encoded(level, bits, grid) for bits, level in ordered.items()},
        {str(bits): bits * rows * columns for bits in ordered},
        {str(bits): grid.stored_bits(rows, columns, bits, group) / (rows * columns) for bits in ordered},
    )


def encoded(level: Quantised, bits: int, grid: Grid) -> Encoded:
    """A layer's codes, and its scales and zero points in the precision they were rounded to."""
    import torch

    from methods.levels._encodings import encode_codes

    precision = getattr(torch, grid.scales)
    # Groups of equal size need no table of which input is in which.
    columns, groups = level.codes.shape[1], level.scale.shape[1]
    even = columns % groups == 0 and level.group_of.equal(level.group_of.sort().values)
    even = even and int(level.group_of.bincount().max()) * groups == columns
    scale, zero = level.scale.to(precision), level.zero.to(precision)
    return encode_codes(level.codes, scale, zero, bits, None if even else level.group_of)
