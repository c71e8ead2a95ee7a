"""Bit-width levels by rounding to nearest: every linear layer at every bit-width, without calibration.

The baseline of ``levels.gptq``, with the same levels, costs and storage; ``prune.rtn`` says what becomes of a weight.
The grid is that of Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via
Evolutionary Search" (ICML 2025, arXiv 2410.14649). A level's cost is its bits times the number of weights, what
EvoPress conserves; its share is bits per weight with scales and zero points counted.

Weights that are 0 in the parent are 0 at every level. The method draws no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from methods.levels._bits import check_bits, layers_of, write_layer
from methods.prune._grids import Grid, Kind, Precision, nearest
from methods.stage import Claim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune import Calibration

KIND = "bits"
SEEDED = False
USES = ("methods.levels._bits", "methods.prune._grids", "methods.prune._walk", "methods.checkpoint")
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which bit-widths there are, and their grid."""

    # Bit-widths of every layer; the shipped scripts of EvoPress take 2 to 6.
    bits: tuple[Annotated[int, Ge(2), Le(8)], ...] = (2, 3, 4, 5, 6)
    # Inputs that share a scale, None for all of a row; 128 in EvoPress. A last, shorter group has its own scale.
    group: Annotated[int, Gt(0)] | None = 128
    # Whether the range is as long below 0 as above it.
    symmetric: bool = False
    # "evopress": the range is that of the weights. "official" (GPTQ): 0 always has a code.
    grid: Kind = "evopress"
    # What scales and evopress zero points are stored in; EvoPress stores float16.
    saved: Precision = "float16"

    def __post_init__(self) -> None:
        check_bits("levels.rtn", self.bits)


def build(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress, writer: Writer
) -> None:
    """Write every linear layer at every bit-width; the model stays as it is."""
    grid = Grid(config.grid, config.symmetric, config.saved)
    layers = list(layers_of(model))
    bar = progress.bar(len(layers), "layers at every bit-width")
    for number, (block, name, _) in zip(bar, layers, strict=True):
        if not writer.finished(name):
            weight = model.get_parameter(f"{name}.weight").data
            levels = {bits: nearest(weight, grid, bits, config.group) for bits in config.bits}
            write_layer(writer, name, block, levels, grid, config.group)
        if progress.due(number + 1):
            progress.save(number + 1, {}, {})
