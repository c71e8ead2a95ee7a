"""Bit-width levels by GPTQ: every linear layer at every bit-width, for a search over who gets how many.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025, arXiv 2410.14649), its quantisation database (IST-DASLab/EvoPress, ``src/quantizer.py``,
``src/fast_obq.py``); the solver is that of Frantar et al. 2023, "GPTQ": see ``prune.gptq``.

Block after block, all linear layers are solved for all bit-widths from one pass, from the inputs of the unquantised
block. Then the block is run again with its layers at ``loaded`` bits, so that the next one sees inputs that quantised
blocks give. All bit-widths of a layer are solved side by side: they share U, and rows are independent.

A level's cost is its bits times the number of weights, which is what EvoPress conserves; its share is bits per weight
with scales and zero points counted (EvoPress' 16-bit scale and zero point for every 128 inputs are 0.25 bits more).

Where the released code is not followed: ``group=None`` means one scale for each row (there it leaves scales
uninitialised); there is no act-order (there columns are stored in permuted order, which is silently wrong in a model);
codes and scales are stored, not dequantised matrices; weights that are 0 in the parent are 0 at every level, and what
earlier columns would have made of them is passed on as their error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from methods.levels._bits import Widths, check_bits, write_layer
from methods.levels._blocks import Measured, build_blocks
from methods.prune._gptq import Settings, invert, solve
from methods.prune._hessian import block_grams, sharing
from methods.stage import AssayError, Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._walk import Block

KIND = "bits"
# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.prune",
    "methods.prune._grids",
    "methods.prune._gptq",
    "methods.prune._hessian",
    "methods.prune._obs",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
SMOKE = {"group": None, "calibration_tokens": 256}


@dataclass(frozen=True, kw_only=True)
class Config(Widths, Measured):
    """Which bit-widths there are, their grid, and what they are calibrated on."""

    # The bit-width whose errors later blocks see; 3 in the shipped scripts.
    loaded: int = 3
    # Columns between two updates of the rest of the matrix; 128 in EvoPress.
    block: Annotated[int, Gt(0)] = 128
    # Added to the diagonal of H, times its mean; 0.01 in EvoPress.
    relative_damping: Annotated[float, Gt(0)] = 0.01
    # Whether weights that are 0 in the parent are 0 at every level.
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        check_bits("levels.gptq", self.bits)
        if self.loaded not in self.bits:
            raise AssayError(
                f"levels.gptq: loaded={self.loaded} is the bit-width whose errors later blocks see, and must be one "
                f"of bits={list(self.bits)}."
            )

    @property
    def settings(self) -> Settings:
        """What the solver is told."""
        return Settings(self.numbers, self.group, self.block, keep_zeros=self.keep_zeros)


def build(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress, writer: Writer
) -> None:
    """Write every linear layer at every bit-width; the model stays as it is."""
    sequences = calibration.windows(config.data, config.calibration_tokens, config.context_tokens)
    build_on(config, model, sequences, progress, writer)


def build_on(
    config: Config, model: PreTrainedModel, sequences: list[Tensor], progress: Progress, writer: Writer
) -> None:
    """The same from token sequences [1,T]."""
    build_blocks(model, sequences, progress, lambda block: build_block(config, block, writer))


def build_block(config: Config, block: Block, writer: Writer) -> dict[str, Tensor]:
    """Write the levels of one block's layers; returns them at ``loaded`` bits, by their names in the block."""
    linears = block.linears()
    missing = [name for name in linears if not writer.finished(block.full(name))]
    for gram, names in sharing(block_grams(block, missing)) if missing else ():
        inverse = invert(gram.hessian(), config.relative_damping)
        for name in names:
            levels = solve(linears[name].weight.data, inverse, config.settings, config.bits)
            write_layer(writer, block.full(name), block.index, levels, config.numbers, config.group)
    return {name: writer.weight(block.full(name), str(config.loaded)) for name in linears}
