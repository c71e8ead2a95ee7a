"""Structured pruning's shared part: which units a layer has, which of them go, and what the rest becomes.

A unit is an attention head (or a whole key-value group) or a neuron of the MLP. What a unit gives to the
residual stream passes through its columns of ``o_proj`` or ``down_proj``: with these zero the unit is
removed, and its other matrices can be cut away.

``refit`` is the structured optimal brain surgeon of Týr-the-Pruner (AMD-AGI/Tyr-the-Pruner,
``src/local_pruner.py``; ancestor: OSSCAR, mazumder-lab/OSSCAR). With ``B0 = W^T`` [in,out], the Gram matrix
``H = sum x x^T + 0.01 mean(diag H) I`` of the inputs, ``G = H B0``, ``V = B0`` and ``R = H^-1``, each of the rounds

    score_g = sum_out sum_{j in g} V_j (1/2 [R_gg^-1 V_g]_j + G_j)
    V <- V - R_i R_ii^-1 V_i,    R <- R - R_i R_ii^-1 R_i^T       for the groups i with the lowest scores

and at the end ``V_S = H_SS^-1 G_S``: the least-squares refit of the groups S that stay. The first half of the
score is the increase of the layer's squared error (OSSCAR's score); the second is Týr's energy term, no
gradient but the projection of the dense output on that input.

Where the official code and this one differ: it keeps groups that are zero from the start (inputs that are
always 0) in the problem, in a branch that leaves its inverse out of date; here they are the first to go and
the rest is solved without them. It counts the groups that stay as int(groups * (1 - s)), which for 10 groups
at s = 0.9 is 0 (binary floats); ``kept_units`` says what is done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

REVISION = 1

Budget = Literal["heads", "neurons"]
Heads = Literal["group", "query"]
Rounding = Literal["exact", "nearest", "official"]
Score = Literal["tyr", "osscar"]
# The projection out of the units, and those into them.
LOCAL: dict[Budget, str] = {"heads": "self_attn.o_proj", "neurons": "mlp.down_proj"}
INTO = {"heads": ("q_proj", "k_proj", "v_proj"), "neurons": ("gate_proj", "up_proj")}
# The released code's share of the mean diagonal that is added to the Gram matrix.
DAMPING = 0.01
# A sparsity counts as met when rounding to whole units changes the share by no more than this.
WHOLE = 1e-3


# --- counts -----------------------------------------------------------------------------------------------


def kept_units(count: int, sparsity: float, rounding: Rounding, what: str) -> int:
    """How many of ``count`` units stay at a sparsity.

    "exact" and "nearest": count - round(count * s); "exact" is refused where that is another share than s.
    "official": int(count * (1 - s)), with its binary floats.
    """
    if rounding == "official":
        return int(count * (1 - sparsity))
    removed = round(count * sparsity)
    if rounding == "exact" and abs(removed / count - sparsity) > WHOLE:
        raise AssayError(
            f"sparsity={sparsity:g} cannot be met: of the {count} {what} that would be {count * sparsity:g}, no whole "
            f"number; {nearest_shares(count, sparsity)} can be met exactly."
        )
    return count - removed


def nearest_shares(count: int, sparsity: float) -> str:
    """The shares of ``count`` units beside a sparsity: "0.25 and 0.5"."""
    below = math.floor(count * sparsity)
    return f"{below / count:.6g} and {(below + 1) / count:.6g}"


def split_evenly(count: int, rounds: int) -> tuple[int, ...]:
    """Sizes of at most ``rounds`` rounds that remove ``count`` groups; the first ones take the remainder."""
    rounds = min(rounds, count)
    return tuple(count // rounds + (number < count % rounds) for number in range(rounds))


# --- the units of a Llama ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One of the two matrices of a block whose input columns belong to units: ``o_proj`` or ``down_proj``."""

    name: str  # full module name
    local: str  # name inside its block
    block: int
    budget: Budget
    linear: nn.Linear
    count: int  # units: groups of as many consecutive input columns each

    def columns(self) -> Tensor:
        """The weight by unit: a view [units, columns of a unit, out]."""
        return self.linear.weight.data.T.unflatten(0, (self.count, -1))

    def contributing(self) -> Tensor:
        """Which of the units [units] have any weight that is not 0."""
        return (self.columns() != 0).flatten(1).any(dim=1)


def parts(model: PreTrainedModel, heads: Heads, purpose: str) -> list[Part]:
    """Every ``o_proj`` and ``down_proj`` of a Llama with its units, in the order of the blocks.

    Raises an AssayError for a model that is built otherwise, and for query heads that do not divide among groups.
    """
    from methods.architectures import require_llama
    from methods.prune._walk import decoder_layers

    require_llama(model, purpose)
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        for budget, local in LOCAL.items():
            owner, _, last = local.partition(".")
            linear = getattr(getattr(layer, owner), last)
            name = f"{names[id(layer)]}.{local}"
            count = linear.in_features
            if budget == "heads":
                count = head_units(getattr(layer, owner), heads, f"{purpose}: {name}")
            found.append(Part(name, local, index, budget, linear, count))
    return found


def head_units(attention: Any, heads: Heads, place: str) -> int:
    """How many query heads, or key-value groups with all their query heads, an attention has."""
    width = attention.head_dim
    queries, groups = attention.o_proj.in_features // width, attention.k_proj.out_features // width
    if heads == "query":
        return int(queries)
    if queries % groups:
        raise AssayError(
            f"{place} has {queries} query heads on {groups} key-value heads, which are no groups of equal size; "
            'levels.tyr(heads="query") prunes query heads one by one.'
        )
    return int(groups)


def unit_views(layer: Any, part: Part, read: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Everything that a block's units have in its matrices and biases, each [units, vectors of a unit, entries].

    A vector is a row of a projection into the unit, or a column of the one out of it.

    Args:
        read: makes of a parameter what is looked at, of the same shape. With its data the results are views.
    """
    owner = getattr(layer, part.local.partition(".")[0])
    found = [read(part.linear.weight).T.unflatten(0, (part.count, -1))]
    for name in INTO[part.budget]:
        linear = getattr(owner, name)
        found.append(read(linear.weight).unflatten(0, (part.count, -1)))
        if linear.bias is not None:
            found.append(read(linear.bias).unflatten(0, (part.count, -1))[..., None])
    return found


def lowest(found: Sequence[Part], scores: Sequence[Tensor], number: int) -> dict[str, Tensor]:
    """The ``number`` units with the lowest scores among all of these parts; of equal ones the earlier.

    Args:
        scores: [units] of each part.
    Returns:
        A boolean tensor [units] for each part, by its name.
    """
    import torch

    ranking = torch.cat(list(scores))
    chosen = torch.zeros_like(ranking, dtype=torch.bool)
    chosen[ranking.argsort(stable=True)[:number]] = True
    masks = chosen.split([part.count for part in found])
    return {part.name: mask for part, mask in zip(found, masks, strict=True)}


def zero_units(layer: Any, part: Part, gone: Tensor) -> None:
    """Zero everything that the units [units] that are true in ``gone`` have, in place."""
    for view in unit_views(layer, part, lambda parameter: parameter.data):
        view[gone] = 0.0


# --- the refit ---------------------------------------------------------------------------------------------


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
    try:
        found = _refit(weight, gram.to(wide), groups, kept, rounds, score, damping, keep_zeros)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if wide == torch.float64:
            raise AssayError(
                "the Gram matrix of a layer's inputs is not positive definite, in float64 and with its diagonal "
                "damped: are the calibration data's activations finite?"
            ) from None
        found = _refit(weight, gram.double(), groups, kept, rounds, score, damping, keep_zeros)
    return {count: matrix.to(weight.dtype) for count, matrix in found.items()}


def _refit(
    weight: Tensor,
    gram: Tensor,
    groups: int,
    kept: Sequence[int],
    rounds: int,
    score: Score,
    damping: float,
    keep_zeros: bool,
) -> dict[int, Tensor]:
    """``refit`` in the dtype of ``gram``."""
    problem = _problem(weight, gram, groups, damping, keep_zeros)
    alive = len(problem.alive)
    found = {count: problem.start.T for count in kept if alive <= count < groups}
    found |= {count: weight for count in kept if count == groups}
    found |= {count: weight.new_zeros(weight.shape) for count in kept if count == 0}
    plans = {count: split_evenly(alive - count, rounds) for count in kept if 0 < count < min(alive, groups)}
    if plans:
        _descend(problem, problem.first_state(), plans, score, found)
    return found


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
