"""GPTQ: quantisation column by column, the error of each mended in the columns that follow.

Frantar, Ashkboos, Hoefler, Alistarh 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (ICLR 2023, arXiv 2210.17323). Layer by layer, with inputs X, the weights on the grid that solve

    argmin_Q || W X - Q X ||^2

greedily: with H = 2 X X^T + lambda I and U the upper Cholesky factor of H^-1, for every column j of W

    Q_j = quant(W_j)      W[:, j+1:] -= (W_j - Q_j) / U_jj  U[j, j+1:]

The official code (IST-DASLab/gptq, ``gptq.py``, ``quant.py``) takes 0.01 of the mean diagonal of H for lambda, divides
H by the number of sequences (which changes nothing), zeroes columns whose input was never anything but 0, and fits a
group's scale when its first column comes up, from the weights as they were when that column's block of 128 began.
``act_order`` settles columns by decreasing H_jj; the result is put back in order. Its groups are then of columns in
*that* order, so that every input needs the number of its group, unless ``static_groups`` fits consecutive inputs before
anything moves. ``grid="evopress"`` is the variant in which EvoPress builds its levels; ``methods/prune/_grids.py`` says
how the two differ and where the official symmetric grid is not followed.

Here group None means one scale for each row. A last, shorter group has a scale of its own, as in the official code.

Blocks are quantised in order and run again afterwards, so that each sees the inputs its quantised predecessors give;
within a block all layers see those of the unquantised block. Weights that are 0 in the parent stay 0: what earlier
columns would have made of them is passed on as their error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from methods.prune import Calibrated
from methods.prune._gptq import Settings, invert, solve
from methods.prune._grids import Gridded, sizes
from methods.prune._hessian import block_grams, sharing
from methods.prune._walk import Block, prune_blocks
from methods.stage import AssayError, Claim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.prune._grids",
    "methods.prune._gptq",
    "methods.prune._hessian",
    "methods.prune._obs",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Calibrated, Gridded):
    """The grid, and how the error that it costs is mended."""

    # Bits of a code; the paper reports 3 and 4.
    bits: Annotated[int, Ge(2), Le(8)] = 4
    # Whether columns with large inputs come first.
    act_order: bool = False
    # Whether groups are of consecutive inputs and fitted before anything moves, whatever the order.
    static_groups: bool = False
    # Columns between two updates of the rest of the matrix; 128 in the official code.
    block: Annotated[int, Gt(0)] = 128
    # Added to the diagonal of H, times its mean; 0.01 in the official code.
    relative_damping: Annotated[float, Gt(0)] = 0.01
    # Whether weights that are 0 in the parent stay 0.
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        if self.static_groups and self.group is None:
            raise AssayError(
                "prune.gptq: static_groups says when groups are fitted, and there are none: give group=128, or leave "
                "static_groups out."
            )

    @property
    def settings(self) -> Settings:
        """What the solver is told."""
        return Settings(
            self.numbers, self.group, self.block, self.act_order, self.static_groups, self.keep_zeros
        )


def prune(config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress) -> None:
    """Put the weights of every decoder layer on their grid, block after block, in place."""
    sequences = calibration.sequences(config.data, config.sequences, config.context_tokens)
    shuffled = config.act_order and not config.static_groups
    calibration.stage.notes |= sizes(model, config.numbers, config.bits, config.group, shuffled)
    prune_blocks(model, sequences, progress, lambda block: prune_block(config, block), weights=True)


def prune_block(config: Config, block: Block) -> None:
    """Quantise the linear layers of one block from the inputs they have now; layers that share these share U."""
    linears = block.linears()
    for gram, names in sharing(block_grams(block)):
        inverse = invert(gram.hessian(), config.relative_damping, config.act_order)
        for name in names:
            weight = linears[name].weight.data
            weight.copy_(solve(weight, inverse, config.settings, [config.bits])[config.bits].weight())
