"""SparseGPT: prune a layer's weights and let those that stay make up for it.

Frantar, Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (ICML 2023, arXiv
2301.00774); official code IST-DASLab/sparsegpt, ``sparsegpt.py``. For a layer with weights W [out,in] and inputs x:

    H = 2/n sum x x^T  over n calibration sequences,      U = upper Cholesky factor of (H + damping)^-1

    in blocks of 128 columns: remove the weights with the smallest  w_ij^2 / U_jj^2;
    column by column:  e = (w_j - what is kept of it) / U_jj,   W[:, j+1:] -= e U[j, j+1:]

The damping is ``relative_damping`` times the mean of H's diagonal. The scores of a block are those of the weights as
its predecessors left them, and are compared over all rows of the block. ``pattern="2:4"`` chooses the 2 smallest of
every 4 consecutive inputs of an output when the first of them is reached.

The paper removes a share of each block; the official code one weight more: its threshold is the score at place
int(count * s), and that goes, too. EvoPress (IST-DASLab/EvoPress, ``src/fast_obc.py``) removes round(count * s) of
each block. ``threshold`` offers both, and "exact": round(numel * s) of the matrix, shared out over the blocks.

Inputs that are zero in all calibration data ("dead") lose all their weights, as in the official code; with "exact" they
lose them first, but no more than the budget. A weight that is zero in the parent is pruned from the start.

Blocks of the decoder are pruned in order; each sees the inputs that its pruned predecessors give, and the layers inside
a block those of the block before it was pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Lt

from methods.prune import Calibrated
from methods.prune._hessian import block_grams, checked_hessian, sharing
from methods.prune._masks import check_budget, fitting_pattern, read_pattern
from methods.prune._obs import (
    Budget,
    Pattern,
    always_pruned,
    budget,
    dead_columns,
    inverse_factor,
    solve,
)
from methods.prune._walk import Block, prune_blocks
from methods.stage import AssayError, Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.prune._hessian",
    "methods.prune._masks",
    "methods.prune._obs",
    "methods.prune._shares",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Calibrated):
    """Options of ``prune.sparsegpt``: either ``sparsity`` or ``pattern``."""

    # Share of the weights of every matrix that is zero afterwards.
    sparsity: Annotated[float, Ge(0), Lt(1)] | None = None
    # "n:m" removes n of every m consecutive inputs ("2:4"); m must divide the inputs and ``block``.
    pattern: str | None = None
    # "exact": round(numel * sparsity) of the matrix. "block": round(count * sparsity) of every block of columns, as
    # EvoPress does. "official": int(count * sparsity) + 1 of every block.
    threshold: Literal["exact", "block", "official"] = "exact"
    # Columns whose weights are compared with each other; 128 in the official code. A block as wide as the layer chooses
    # all that goes before anything has been made up for: narrow layers lose less with narrower blocks.
    block: Annotated[int, Gt(0)] = 128
    # Added to the Hessian's diagonal, as a share of its mean; 0.01 in the official code.
    relative_damping: Annotated[float, Ge(0)] = 0.01
    # Weights that are zero in the parent stay zero; otherwise they may be filled again.
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        check_budget("prune.sparsegpt", self.sparsity, self.pattern)
        if self.pattern is None:
            return
        if self.threshold != "exact":
            raise AssayError("prune.sparsegpt: a pattern has no threshold; leave threshold out.")
        if self.block % read_pattern(self.pattern)[1]:
            raise AssayError(
                f"prune.sparsegpt: block={self.block} would cut the groups of pattern {self.pattern}: take a multiple "
                f"of {read_pattern(self.pattern)[1]}."
            )


def prune(config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress) -> None:
    """Prune every linear layer of the decoder, block after block, in place."""
    sequences = calibration.sequences(config.data, config.sequences, config.context_tokens)
    prune_blocks(model, sequences, progress, lambda block: prune_block(config, block), weights=True)


def prune_block(config: Config, block: Block) -> None:
    """Prune the linear layers of one block from the inputs they have now."""
    linears = block.linears()
    for gram, names in sharing(block_grams(block)):
        where = f"prune.sparsegpt: block {block.index}: {names[0]}"
        hessian = checked_hessian(gram, config.relative_damping, where)
        factor, dead = inverse_factor(hessian, config.relative_damping), dead_columns(hessian)
        for name in names:
            where = f"prune.sparsegpt: block {block.index}: {name}"
            linears[name].weight.data = pruned(config, linears[name].weight.data, factor, dead, where)


def pruned(config: Config, weight: Tensor, factor: Tensor, dead: Tensor, where: str) -> Tensor:
    """A pruned copy of a weight [out,in], for U [in,in] and the dead inputs [in]."""
    exact = config.pattern is None and config.threshold == "exact"
    zeros = weight == 0
    # Only an exact budget can leave weights of dead inputs as they are.
    budgets = [budget_of(config, zeros if exact else zeros | dead, where)]
    first = always_pruned(zeros, dead, config.keep_zeros, exact)
    return solve(weight, factor, budgets, config.block, first, dead)[0][0]


def budget_of(config: Config, zeros: Tensor, where: str) -> Budget | Pattern:
    """What the options ask for in a matrix of which these weights [out,in] are zero from the start."""
    if config.pattern is not None:
        return Pattern(*fitting_pattern(config.pattern, zeros.shape[1]))
    assert config.sparsity is not None  # checked by Config
    total = round(zeros.numel() * config.sparsity)
    return budget(config.threshold, config.sparsity, total, zeros, config.block, where)
