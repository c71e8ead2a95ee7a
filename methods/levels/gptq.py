"""Bit-width levels by GPTQ: every linear layer at every bit-width, for a search over who gets how many.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025, arXiv 2410.14649), its quantisation database (IST-DASLab/EvoPress, ``src/quantizer.py``,
``src/fast_obq.py``); the solver is that of Frantar et al. 2023, "GPTQ": see ``prune.gptq``.

Block after block, all linear layers are solved for all bit-widths from one pass, from the inputs of the unquantised
block. Then the block's layers are set to ``loaded`` bits and the block is run again, so that the next one sees inputs
that quantised blocks give. All bit-widths of a layer are solved side by side: they share U, and rows are independent.

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

from annotated_types import Ge, Gt, Le

from methods.levels._bits import check_bits, layers_of, write_layer
from methods.prune._gptq import Settings, invert, solve
from methods.prune._grids import Grid, Kind, Precision
from methods.prune._hessian import block_grams, sharing
from methods.prune._walk import Block, walk
from methods.stage import AssayError, Claim, Dataset

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune import Calibration

KIND = "bits"
# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.levels._bits",
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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which bit-widths there are, their grid, and what they are calibrated on."""

    # Named data set the layers' inputs are measured on; FineWeb-Edu in EvoPress.
    data: Dataset
    # Bit-widths of every layer; the shipped scripts take 2 to 6.
    bits: tuple[Annotated[int, Ge(2), Le(8)], ...] = (2, 3, 4, 5, 6)
    # The bit-width whose errors later blocks see; 3 in the shipped scripts.
    loaded: int = 3
    # Inputs that share a scale, None for all of a row; 128 in EvoPress. A last, shorter group has its own scale.
    group: Annotated[int, Gt(0)] | None = 128
    # Whether the range is as long below 0 as above it.
    symmetric: bool = False
    # "evopress": the range is that of the weights. "official" (GPTQ): 0 always has a code.
    grid: Kind = "evopress"
    # Columns between two updates of the rest of the matrix; 128 in EvoPress.
    block: Annotated[int, Gt(0)] = 128
    # Added to the diagonal of H, times its mean; 0.01 in EvoPress.
    relative_damping: Annotated[float, Gt(0)] = 0.01
    # Tokens that inputs are measured on, at least; 2^23 in EvoPress, for models of billions of weights.
    calibration_tokens: Annotated[int, Gt(0)] = 4096
    # Longest calibration sequence; the model's context or 8,192 in EvoPress.
    context_tokens: Annotated[int, Gt(0)] = 2048
    # What scales and evopress zero points are stored in; EvoPress stores float16.
    saved: Precision = "float16"
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
        grid = Grid(self.grid, self.symmetric, self.saved)
        return Settings(grid, self.group, self.block, keep_zeros=self.keep_zeros)


def build(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress, writer: Writer
) -> None:
    """Write every linear layer at every bit-width; the model ends up at ``loaded`` bits."""
    sequences = calibration.windows(config.data, config.calibration_tokens, config.context_tokens)
    build_on(config, model, sequences, progress, writer)


def build_on(
    config: Config, model: PreTrainedModel, sequences: list[Tensor], progress: Progress, writer: Writer
) -> None:
    """The same from token sequences [1,T]."""
    import torch

    layers = list(layers_of(model))
    with torch.no_grad():
        bar = progress.bar(layers[-1][0] + 1, "blocks at every bit-width")
        for _, block in zip(bar, walk(model, sequences), strict=False):
            names = {inner: name for index, name, inner in layers if index == block.index}
            build_block(config, block, names, writer)
            if progress.due(block.index + 1):
                progress.save(block.index + 1, {}, {})


def build_block(config: Config, block: Block, names: dict[str, str], writer: Writer) -> None:
    """Write the levels of one block's layers, named in the block and in the model; then load ``loaded`` bits."""
    linears = block.linears()
    missing = [inner for inner, name in names.items() if not writer.finished(name)]
    for gram, sharers in sharing(block_grams(block, missing)) if missing else ():
        inverse = invert(gram.hessian(), config.relative_damping)
        for inner in sharers:
            levels = solve(linears[inner].weight.data, inverse, config.settings, config.bits)
            write_layer(writer, names[inner], block.index, levels, config.settings.grid, config.group)
    load(block, names, writer, str(config.loaded))


def load(block: Block, names: dict[str, str], writer: Writer, level: str) -> None:
    """Set a block's layers to what was written of them at a level."""
    for inner, linear in block.linears().items():
        linear.weight.data.copy_(writer.weight(names[inner], level))
