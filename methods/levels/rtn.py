"""Bit-width levels by rounding to nearest: every linear layer at every bit-width, without calibration.

The baseline of ``levels.gptq``, with the same levels, costs and storage; ``prune.rtn`` says what becomes of a weight.
The grid is that of Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via
Evolutionary Search" (ICML 2025, arXiv 2410.14649). A level's cost is its bits times the number of weights, what
EvoPress conserves; its share is bits per weight with scales and zero points counted.

Weights that are 0 in the parent are 0 at every level. The method draws no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.levels._bits import Widths, check_bits, write_layer
from methods.levels._blocks import build_layers
from methods.prune._grids import nearest
from methods.stage import Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune import Calibration

KIND = "bits"
SEEDED = False
USES = ("methods.prune._grids", "methods.prune._walk", "methods.checkpoint")
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
SMOKE = {"group": None, "calibration_tokens": 256}


@dataclass(frozen=True, kw_only=True)
class Config(Widths):
    """Which bit-widths there are, and their grid."""

    def __post_init__(self) -> None:
        check_bits("levels.rtn", self.bits)


def build(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress, writer: Writer
) -> None:
    """Write every linear layer at every bit-width; the model stays as it is."""

    def build_layer(block: int, name: str, weight: Tensor) -> None:
        levels = {bits: nearest(weight, config.numbers, bits, config.group) for bits in config.bits}
        write_layer(writer, name, block, levels, config.numbers, config.group)

    build_layers(model, progress, writer, build_layer)
