"""A database of sparsities by SparseGPT: every linear layer at every level, as EvoPress builds it.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025); official code IST-DASLab/EvoPress, ``src/pruner.py`` and ``src/fast_obc.py``. The solver is that of
Frantar, Alistarh 2023, "SparseGPT" (see ``prune.sparsegpt``): all levels of a layer come from one factor of its inverse
Hessian and are solved side by side, each by itself. Level l has

    zeros(l) = round(s numel) + l weights_step

All linear layers of a block share one pass of the dense block. The weights of finished blocks are not put in place, so
that all levels see dense activations; ``error_propagation="uniform"`` puts level 0 there before the next block is
measured.

Where this differs from the official code: it prunes round(count (s + l weights_step / numel)) weights in each block of
columns, whose sum may miss zeros(l) by a few; ``threshold="exact"`` shares the rounding out over the blocks so that it
does not. ``"block"`` does as the official code, and is refused where its levels come out at unequal distances. A level
of no zeros is the dense layer; there the official code ends with an error. Rows of text are joined and cut into windows
of ``context_tokens``; there every document is a sequence of its own length. Inputs that are dead in the calibration
data lose all their weights with "block", with "exact" first of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from methods.levels import _sparsity
from methods.levels._sparsity import Ladder, Made, MeasuredSparsities
from methods.prune._hessian import block_grams, checked_hessian, sharing
from methods.prune._obs import Budget, always_pruned, budget, dead_columns, inverse_factor, solve
from methods.stage import Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._walk import Block

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.prune",
    "methods.prune._hessian",
    "methods.prune._masks",
    "methods.prune._obs",
    "methods.prune._shares",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
KIND = "sparsity"
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
SMOKE = {"levels": 2, "weights_step": None, "calibration_tokens": 256}

# As many levels of a layer are solved side by side as fit here: it bounds memory, and past it nothing is gained.
SIDE_BY_SIDE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Config(MeasuredSparsities):
    """Options of ``levels.sparsegpt``."""

    # Columns whose weights are compared with each other; 128 in the official code.
    block: Annotated[int, Gt(0)] = 128
    # Added to the Hessian's diagonal, as a share of its mean; 0.01 in the official code.
    relative_damping: Annotated[float, Ge(0)] = 0.01
    # "exact": the stated zeros in the whole matrix. "block": rounded in every block of columns (see above).
    threshold: Literal["exact", "block"] = "exact"
    # Weights that are zero in the parent stay zero at every level; otherwise they may be filled again.
    keep_zeros: bool = True

    @property
    def total_is_exact(self) -> bool:
        """Blocks of columns that are rounded one by one may miss the total, yet have equal steps."""
        return self.threshold == "exact"


def build(
    config: Config,
    model: PreTrainedModel,
    calibration: Calibration,
    progress: Progress,
    writer: Writer,
) -> None:
    """Write the levels of every layer of the decoder, block after block."""

    def solver(block: Block, ladders: Mapping[str, Ladder]) -> Iterator[tuple[str, Iterable[Made]]]:
        return solve_block(config, block, ladders)

    _sparsity.build(config, model, calibration, progress, writer, "levels.sparsegpt", solver)


def solve_block(
    config: Config, block: Block, ladders: Mapping[str, Ladder]
) -> Iterator[tuple[str, Iterable[Made]]]:
    """The levels of those layers of a block that have a ladder."""
    linears = block.linears()
    for gram, names in sharing(block_grams(block, list(ladders))):
        where = f"levels.sparsegpt: {ladders[names[0]].unit}"
        hessian = checked_hessian(gram, config.relative_damping, where)
        factor, dead = inverse_factor(hessian, config.relative_damping), dead_columns(hessian)
        for name in names:
            yield name, levels(config, linears[name].weight.detach(), factor, dead, ladders[name])


def levels(config: Config, weight: Tensor, factor: Tensor, dead: Tensor, ladder: Ladder) -> Iterator[Made]:
    """Every level of a weight [out,in], for U [in,in] and the dead inputs [in]."""
    zeros = weight == 0
    given = zeros if config.total_is_exact else zeros | dead
    first = always_pruned(zeros, dead, config.keep_zeros, config.total_is_exact)
    many = max(1, SIDE_BY_SIDE_BYTES // (weight.numel() * weight.element_size()))
    offsets = list(ladder.zeros)
    for start in range(0, len(offsets), many):
        part = offsets[start : start + many]
        budgets = [budget_of(config, ladder, offset, given) for offset in part]
        found, removed = solve(weight, factor, budgets, config.block, first, dead)
        yield from levels_or_dense(part, ladder, weight, found, removed)


def levels_or_dense(
    offsets: Sequence[int], ladder: Ladder, weight: Tensor, found: Tensor, removed: Tensor
) -> Iterator[Made]:
    """The levels as solved; one that is to have no zeros is the dense weight."""
    for offset, level, mask in zip(offsets, found, removed, strict=True):
        dense = ladder.zeros[offset] == 0
        yield offset, (weight if dense else level), (weight == 0 if dense else mask)


def budget_of(config: Config, ladder: Ladder, offset: int, zeros: Tensor) -> Budget:
    """What one level removes by blocks of columns, where these weights [out,in] are zero from the start."""
    total = ladder.zeros[offset]
    where = f"levels.sparsegpt: {ladder.unit}"
    share = config.sparsity + offset * ladder.step / ladder.numel
    return budget(config.threshold, share, total, zeros, config.block, where)
