"""Groups of inputs removed from a linear layer, the rest refitted: the structured optimal brain surgeon of Týr.

Li et al. 2025, "Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization" (NeurIPS 2025;
AMD-AGI/Tyr-the-Pruner, ``src/local_pruner.py``; ancestor: OSSCAR, mazumder-lab/OSSCAR). With ``B0 = W^T`` [in,out], the
Gram matrix ``H = sum x x^T + 0.01 mean(diag H) I`` of the inputs, ``G = H B0``, ``V = B0`` and ``R = H^-1``, each of
the rounds

    score_g = sum_out sum_{j in g} V_j (1/2 [R_gg^-1 V_g]_j + G_j)
    V <- V - R_i R_ii^-1 V_i,    R <- R - R_i R_ii^-1 R_i^T       for the groups i with the lowest scores

and at the end ``V_S = H_SS^-1 G_S``: the least-squares refit of the groups S that stay. The first half of the
score is the increase of the layer's squared error (OSSCAR's score); the second is Týr's energy term, no
gradient but the projection of the dense output on that input.

The official code keeps groups that are zero from the start (inputs that are always 0) in the problem, in a branch that
leaves its inverse out of date; here they are the first to go and the rest is solved without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

REVISION = 1

Score = Literal["tyr", "osscar"]
# The released code's share of the mean diagonal that is added to the Gram matrix.
DAMPING = 0.01


def refit(
    weight: Tensor,
    gram: Tensor,
    groups: int,
    kept: Sequence[int],
    rounds: int,
    *,
    score: Score = "tyr",
    damping: float = DAMPING,
    keep_zeros: bool = True,
) -> dict[int, Tensor]:
    """The matrix with fewer groups of inputs, and the rest refitted, for every number of groups that stay.

    All of them share the inverse, and rounds as long as these remove the same groups.

    Args:
        weight: [out,in]; ``groups`` groups of as many consecutive inputs each.
        gram: [in,in], sum of x x^T over all calibration tokens.
        kept: numbers of groups that stay; ``groups`` gives the matrix as it is, 0 gives zeros.
        rounds: groups are removed in at most that many steps, the scores renewed in between.
        damping: share of the mean diagonal that is added to the diagonal.
        keep_zeros: entries that are 0 stay 0; otherwise only whole inputs without weight do.
    Returns:
        [out,in] of the dtype of ``weight`` by number of groups. Computed in float64 on a processor, and in float32
        on an accelerator, unless the matrix turns out too badly conditioned for that.
    """
    import torch

    if weight.shape[1] % groups:
        raise AssayError(
            f"{weight.shape[1]} inputs do not divide into {groups} groups: this matrix has no such units."
        )
    wide = torch.float64 if weight.device.type == "cpu" or weight.dtype == torch.float64 else torch.float32
    for dtype in dict.fromkeys((wide, torch.float64)):
        try:
            problem = _problem(weight, gram.to(dtype), groups, damping, keep_zeros)
            found = _levels(problem, weight, kept, rounds, score)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        return {count: matrix.to(weight.dtype) for count, matrix in found.items()}
    raise AssayError(
        "the Gram matrix of a layer's inputs is not positive definite, in float64 and with its diagonal "
        "damped: are the calibration data's activations finite?"
    )


def _levels(
    problem: _Problem, weight: Tensor, kept: Sequence[int], rounds: int, score: Score
) -> dict[int, Tensor]:
    """``refit`` in the dtype of the problem."""
    alive, groups = len(problem.alive), weight.shape[1] // problem.width
    found = {count: problem.start.T for count in kept if alive <= count < groups}
    found |= {count: weight for count in kept if count == groups}
    found |= {count: weight.new_zeros(weight.shape) for count in kept if count == 0}
    plans = {count: split_evenly(alive - count, rounds) for count in kept if 0 < count < min(alive, groups)}
    if plans:
        _descend(problem, problem.first_state(), plans, score, found)
    return found


def split_evenly(count: int, rounds: int) -> tuple[int, ...]:
    """Sizes of at most ``rounds`` rounds that remove ``count`` groups; the first ones take the remainder."""
    rounds = min(rounds, count)
    return tuple(count // rounds + (number < count % rounds) for number in range(rounds))


@dataclass(frozen=True)
class _State:
    """Between two rounds: the groups that are left, their weights [left * width,out] and inverse [.., ..]."""

    left: Tensor
    weights: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class _Problem:
    """What all levels of one matrix share."""

    hessian: Tensor  # [in,in], damped
    start: Tensor  # [in,out], rows of inputs that never are other than 0 are zero
    target: Tensor  # hessian times start
    alive: Tensor  # groups that contribute something
    free: Tensor | None  # [in,out]: which entries may be other than 0; None: all
    width: int  # inputs of a group

    def inputs(self, groups: Tensor) -> Tensor:
        """The input indices of these groups, in order."""
        offsets = _range(self.width, groups)
        return (groups[:, None] * self.width + offsets).flatten()

    def first_state(self) -> _State:
        rows = self.inputs(self.alive)
        inverse = _inverse(self.hessian[rows][:, rows])
        return _State(self.alive, self.start[rows], inverse)

    def masked(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Weights [rows,out] with what must stay zero put back to zero."""
        return weights if self.free is None else weights * self.free[rows]

    def scores(self, state: _State, score: Score) -> Tensor:
        """What it costs to remove each of the groups that are left."""
        import torch

        width, rows = self.width, self.inputs(state.left)
        weights = state.weights.unflatten(0, (-1, width))
        blocks = state.inverse.unflatten(0, (-1, width)).unflatten(2, (-1, width))
        diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        rise = 0.5 * torch.cholesky_solve(weights, torch.linalg.cholesky(diagonal))
        if score == "tyr":
            rise = rise + self.target[rows].unflatten(0, (-1, width))
        return (weights * rise).sum(dim=(1, 2))

    def without(self, state: _State, gone: Tensor) -> _State:
        """The state after removing the groups at these places of ``state.left``."""
        import torch

        stays = torch.ones_like(state.left, dtype=torch.bool)
        stays[gone] = False
        keep, drop = self.inputs(stays.nonzero().flatten()), self.inputs(gone.sort().values)
        factor = torch.linalg.cholesky(state.inverse[drop][:, drop])
        across = state.inverse[keep][:, drop]
        step = torch.cholesky_solve(torch.cat([state.weights[drop], across.T], dim=1), factor)
        outputs = state.weights.shape[1]
        left = state.left[stays]
        weights = self.masked(state.weights[keep] - across @ step[:, :outputs], self.inputs(left))
        return _State(left, weights, state.inverse[keep][:, keep] - across @ step[:, outputs:])

    def solution(self, left: Tensor) -> Tensor:
        """The least-squares weights [out,in] with only these groups, zero elsewhere."""
        import torch

        rows = self.inputs(left)
        hessian, target = self.hessian[rows][:, rows], self.target[rows]
        weights = torch.zeros_like(self.start)
        if self.free is None:
            weights[rows] = torch.cholesky_solve(target, torch.linalg.cholesky(hessian))
        else:
            weights[rows] = _masked_solution(hessian, target, self.free[rows])
        return weights.T


def _problem(weight: Tensor, gram: Tensor, groups: int, damping: float, keep_zeros: bool) -> _Problem:
    import torch

    start = weight.T.to(gram.dtype).masked_fill((gram.diagonal() == 0)[:, None], 0.0)
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )
    used = (start != 0).unflatten(0, (groups, -1)).flatten(1).any(dim=1)
    # An input without any weight has no part in the problem; only zeros inside the others need looking after.
    free = start != 0
    needed = keep_zeros and bool((~free & _rows_of(used, free)).any())
    return _Problem(
        hessian=hessian,
        start=start,
        target=hessian @ start,
        alive=used.nonzero().flatten(),
        free=free if needed else None,
        width=weight.shape[1] // groups,
    )


def _rows_of(used: Tensor, free: Tensor) -> Tensor:
    return used.repeat_interleave(len(free) // len(used))[:, None]


def _range(count: int, like: Tensor) -> Tensor:
    import torch

    return torch.arange(count, device=like.device)


def _inverse(matrix: Tensor) -> Tensor:
    import torch

    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _masked_solution(hessian: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """Least squares [rows,out] where each output has entries that stay zero; outputs with the same ones together."""
    import torch

    found = torch.zeros_like(target)
    patterns, of = torch.unique(free.T, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows, outputs = pattern.nonzero().flatten(), (of == number).nonzero().flatten()
        if len(rows):
            factor = torch.linalg.cholesky(hessian[rows][:, rows])
            found[rows[:, None], outputs] = torch.cholesky_solve(target[rows][:, outputs], factor)
    return found


def _descend(
    problem: _Problem,
    state: _State,
    plans: Mapping[int, tuple[int, ...]],
    score: Score,
    found: dict[int, Tensor],
) -> None:
    """Follow the rounds of all levels from a state they share; at most as deep as there are rounds."""
    found |= {count: problem.solution(state.left) for count, sizes in plans.items() if not sizes}
    waiting = {count: sizes for count, sizes in plans.items() if sizes}
    if not waiting:
        return
    order = problem.scores(state, score).argsort(stable=True)
    for size in sorted({sizes[0] for sizes in waiting.values()}):
        after = problem.without(state, order[:size])
        _descend(
            problem, after, {c: sizes[1:] for c, sizes in waiting.items() if sizes[0] == size}, score, found
        )
