"""Optimal brain surgeon, the part that its descendants share: damping, the inverse's factor, and pruning with it.

Hassibi, Stork 1993, "Optimal Brain Surgeon and General Network Pruning"; in the form of Frantar, Alistarh 2023
("SparseGPT") and Frantar et al. 2023 ("GPTQ"): with H^-1 = U^T U, U upper triangular, row i of U holds what removing
input i does to the inputs behind it once those before it are settled, and U_ii^2 is the inverse's diagonal by then.

``solve`` is SparseGPT's solver. Column by column, with w_i as it is by then and m_i = 1 where a weight goes,

    e_i = m_i w_i / U_ii,        w_j -= e_i U_ij  for all j > i.

The published code subtracts e_i U_i at once from everything behind column i in the block: for each column it reads and
writes all that is left of it. Here w_j is brought up to date when it is needed (the same sums), from one
matrix-vector product for each column inside a strip of columns and one matrix product for each strip; columns
lie in memory one after another, and several budgets of one layer are solved side by side as further rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from methods.prune._masks import smallest
from methods.prune._shares import spread
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

REVISION = 1
# Columns that are settled one by one before the ones behind them in their block are brought up to date.
STRIP = 32
# Groups up to this size are ordered by comparing all pairs, which is faster than sorting columns this short.
PAIRWISE = 4
Threshold = Literal["exact", "block", "official"]


def dead_columns(hessian: Tensor) -> Tensor:
    """Which inputs [in] were zero in all of the calibration data."""
    return hessian.diagonal() == 0


def damped(hessian: Tensor, relative: float) -> Tensor:
    """``hessian`` [in,in] made safe to invert, a new tensor.

    The diagonal of a dead input becomes 1; then ``relative`` times the mean of the diagonal, those ones included, is
    added to all of it.
    """
    import torch

    ready = hessian.clone()
    diagonal = ready.diagonal()
    diagonal.copy_(torch.where(dead_columns(hessian), 1.0, diagonal))
    diagonal += relative * diagonal.mean()
    return ready


def inverse_factor(hessian: Tensor, relative_damping: float) -> Tensor:
    """U [in,in], upper triangular with positive diagonal: the inverse of the damped Hessian is U^T U.

    Tried in the Hessian's precision, then in float64; the result has the Hessian's.

    Raises:
        AssayError: it is not positive definite even so.
    """
    import torch

    for precise in (hessian, hessian.double()):
        factor = _factor(damped(precise, relative_damping))
        if factor is not None:
            return factor.to(hessian.dtype)
    finite = bool(torch.isfinite(hessian).all())
    raise AssayError(
        f"the Hessian of a layer with {len(hessian)} inputs is not positive definite with "
        f"relative_damping={relative_damping}: raise relative_damping (0.01 is usual) or calibrate on more tokens."
        if finite
        else "the Hessian of a layer is not finite: the calibration data overflow the model's activations."
    )


def _factor(hessian: Tensor) -> Tensor | None:
    """One Cholesky and one triangular inverse; None where the matrix is not positive definite.

    With rows and columns in reverse order H = L L^T, so that H = R R^T for the upper R = L reversed. The inverse is
    then R^-T R^-1, and its upper factor U = R^-1: the inverse itself, and the error of making it, are never formed.
    """
    import torch

    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(failed) != 0:
        return None
    upper = lower.flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return factor if bool(torch.isfinite(factor).all()) else None


# --- budgets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How many weights go in each block of columns. ``ties``: so do all others with the score of the last one."""

    counts: tuple[int, ...]
    ties: bool = False


@dataclass(frozen=True)
class Pattern:
    """``removed`` of every ``group`` consecutive inputs of an output go."""

    removed: int
    group: int


def column_blocks(columns: int, block: int) -> list[tuple[int, int]]:
    """First column and end of every block of ``block`` columns; the last one may be narrower."""
    return [(start, min(start + block, columns)) for start in range(0, columns, block)]


def budget(threshold: Threshold, share: float, total: int, zeros: Tensor, block: int, where: str) -> Budget:
    """A matrix's budget by blocks of columns.

    Args:
        threshold: "exact": ``total`` weights in all, shared out over the blocks. "block": round(count * share) in every
            block of ``count`` weights. "official": int(count * share) + 1.
        zeros: the weights [out,in] that are zero from the start: they are part of the budget, block by block, whether
            they stay zero or, where they may be filled again, compete with the others.
        where: the layer, for the sentence.
    Raises:
        AssayError: more weights are zero from the start than "exact" allows.
    """
    rows, columns = zeros.shape
    blocks = column_blocks(columns, block)
    sizes = [rows * (end - start) for start, end in blocks]
    least = [int(zeros[:, start:end].sum()) for start, end in blocks]
    if threshold == "exact":
        if sum(least) > total:
            raise AssayError(
                f"{where}: {sum(least)} of its {rows * columns} weights are zero already, more than the {total} that "
                "the sparsity asks for, so that it cannot be met exactly: raise the sparsity."
            )
        return Budget(tuple(spread(total, sizes, least)))
    more = 1 if threshold == "official" else 0
    wanted = [int(size * share) + 1 if more else round(size * share) for size in sizes]
    return Budget(tuple(max(count, low) for count, low in zip(wanted, least, strict=True)), ties=True)


def always_pruned(zeros: Tensor, dead: Tensor, keep_zeros: bool, exact: bool) -> Tensor:
    """Which weights [out,in] go in any case: the parent's zeros and, as in the published code, those of dead inputs.

    An exact budget may be too small for the latter: there they go first of all, as ``idle`` ones.
    """
    import torch

    first = zeros if keep_zeros else torch.zeros_like(zeros)
    return first if exact else first | dead


# --- the solver -----------------------------------------------------------------------------------------------


def solve(
    weight: Tensor,
    factor: Tensor,
    budgets: Sequence[Budget | Pattern],
    block: int = 128,
    pruned: Tensor | None = None,
    idle: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune a weight [out,in] to every one of the budgets, each by itself; the weights that stay make up for it.

    Args:
        factor: U [in,in] of ``inverse_factor``.
        budgets: numbers by block of columns, or patterns that all have the same group, which divides ``block``.
        block: columns whose scores w_ij^2 / U_jj^2 are compared with each other, once those before them are settled. A
            pattern compares when its group is reached.
        pruned: which weights [out,in] go in any case; the budgets include them.
        idle: which inputs [in] cost nothing to lose: their weights go first.
    Returns:
        The pruned weights and what was pruned, both [budgets,out,in].
    """
    import torch

    state = weight.T.repeat(1, len(budgets))
    removed = torch.empty_like(state, dtype=torch.bool)
    choice = _Choice(budgets, len(weight), pruned, idle)
    for number, (start, end) in enumerate(column_blocks(len(state), block)):
        choice.enter(number, start)
        inside = factor[start:end, start:end]
        errors = _settle_block(state[start:end], removed[start:end], inside, choice)
        if end < len(state):
            state[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return _by_budget(state, len(weight)), _by_budget(removed, len(weight))


def _by_budget(state: Tensor, rows: int) -> Tensor:
    """[in, budgets * out] as [budgets,out,in]."""
    return state.unflatten(1, (-1, rows)).permute(1, 2, 0).contiguous()


def _settle_block(values: Tensor, removed: Tensor, inside: Tensor, choice: _Choice) -> Tensor:
    """Prune the columns of a block, values [columns,rows], in place; returns their errors [columns,rows].

    ``removed`` [columns,rows] is filled in; ``inside`` [columns,columns] is the block's part of U.
    """
    import torch

    errors, diagonal = torch.empty_like(values), inside.diagonal()[:, None]
    squares = diagonal.square()
    if not choice.late:
        removed.copy_(choice.smallest(values, squares, 0))
    for start, end in column_blocks(len(values), choice.strip):
        if start:
            values[start:end].addmm_(inside[:start, start:end].T, errors[:start], alpha=-1)
        if choice.late:
            removed[start:end] = choice.smallest(values[start:end], squares[start:end], start)
        # A weight that stays is divided by infinity: its error is 0.
        divisors = torch.where(removed[start:end], diagonal[start:end], torch.inf)
        _settle_strip(values[start:end], errors[start:end], inside[start:end, start:end], divisors)
    values.masked_fill_(removed, 0.0)
    return errors


def _settle_strip(values: Tensor, errors: Tensor, inside: Tensor, divisors: Tensor) -> None:
    """One column of a strip after another: bring it up to date, in place, and note its error."""
    import torch

    columns = zip(values.unbind(), errors.unbind(), divisors.unbind(), strict=True)
    for at, (column, error, divisor) in enumerate(columns):
        if at:
            column.addmv_(errors[:at].T, inside[:at, at], alpha=-1)
        torch.div(column, divisor, out=error)


class _Choice:
    """Which weights go, block by block or, for patterns, group by group."""

    def __init__(
        self,
        budgets: Sequence[Budget | Pattern],
        rows: int,
        pruned: Tensor | None,
        idle: Tensor | None,
    ) -> None:
        self.budgets, self.rows = budgets, rows
        self.pruned = None if pruned is None or not bool(pruned.any()) else pruned.T
        self.idle = None if idle is None or not bool(idle.any()) else idle
        groups = {budget.group for budget in budgets if isinstance(budget, Pattern)}
        self.late = bool(groups)
        self.strip = groups.pop() if groups else STRIP
        self.number = self.start = 0

    def enter(self, number: int, start: int) -> None:
        """The block that begins with this column is next."""
        self.number, self.start = number, start

    def smallest(self, values: Tensor, squares: Tensor, offset: int) -> Tensor:
        """What goes of values [columns,rows of all budgets] as they are now, from the block's column ``offset`` on.

        Args:
            squares: U_jj^2 [columns,1].
        """
        import torch

        scores = self._scores(values, squares, self.start + offset)
        if len(self.budgets) == 1:
            return self._pick(self.budgets[0], scores)
        removed = [
            self._pick(one, part)
            for one, part in zip(self.budgets, scores.split(self.rows, dim=1), strict=True)
        ]
        return torch.cat(removed, dim=1)

    def _scores(self, values: Tensor, squares: Tensor, start: int) -> Tensor:
        """w^2 / U_jj^2; below all others where a weight goes in any case."""
        scores = values.square().div_(squares)
        end = start + len(values)
        if self.idle is not None:
            scores.masked_fill_(self.idle[start:end, None], 0.0)
        if self.pruned is not None:
            scores.masked_fill_(self.pruned[start:end].repeat(1, len(self.budgets)), -1.0)
        return scores

    def _pick(self, budget: Budget | Pattern, scores: Tensor) -> Tensor:
        """The entries of scores [columns,rows] that one budget removes."""
        if isinstance(budget, Pattern):
            removed = smallest_of_group(scores, budget.removed)
            return removed if self.pruned is None else removed | (scores < 0)
        return lowest(scores, budget.counts[self.number], budget.ties)


def smallest_of_group(scores: Tensor, count: int) -> Tensor:
    """The ``count`` smallest of every column of scores [group,rows]; of equal ones the earlier."""
    import torch

    group = len(scores)
    if group > PAIRWISE:
        return smallest(scores.T, count).T
    # How many come before an entry: the smaller ones, and the equal ones before it.
    earlier = torch.ones(group, group, dtype=torch.bool, device=scores.device).triu(1)[:, :, None]
    one, other = scores[:, None], scores[None]
    return torch.where(earlier, one <= other, one < other).sum(dim=0) < count


def lowest(scores: Tensor, count: int, ties: bool = False) -> Tensor:
    """The ``count`` smallest entries of scores [columns,rows], of equal ones those of earlier columns, then rows.

    With ``ties`` all that equal the last of them go as well, as in the published code.
    """
    import torch

    flat = scores.flatten()
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # On a card selection has no deterministic form, and sorting is fast.
    last = flat.sort().values[count - 1] if flat.is_cuda else flat.kthvalue(count).values
    removed = flat <= last
    if not ties and int(removed.sum()) > count:
        removed = flat < last
        equal = (flat == last).nonzero().flatten()
        removed[equal[: count - int(removed.sum())]] = True
    return removed.view_as(scores)
