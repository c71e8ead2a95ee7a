"""A preconditioned step uphill with a trust region: what ``unlearn.kfade`` gives the training loop as its optimizer.

The loop leaves the gradient of the mean forget NLL in the parameters, as it does for any method, and calls ``step``.
``methods.unlearn``'s REVISION covers this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from methods.curvature import _factors
from methods.curvature._kronecker import (
    Basis,
    Inverse,
    Labels,
    damping_of,
    kl_slopes,
    largest_step,
    precondition,
)
from methods.terms import forward, kl_divergence, token_nll, widen

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.data import Part

# A candidate that fails is followed by one of at least and at most these shares of its length.
SHORTEST, LONGEST = 0.1, 0.7


class Control(Protocol):
    """The options of a step, as ``unlearn.kfade`` explains them."""

    @property
    def curvature(self) -> str: ...
    @property
    def inverse(self) -> Inverse: ...
    @property
    def damping(self) -> float: ...
    @property
    def damping_floor(self) -> float: ...
    @property
    def kl_budget(self) -> float: ...
    @property
    def tries(self) -> int: ...
    @property
    def refresh(self) -> bool: ...


@dataclass(frozen=True)
class Measured:
    """The model at some weights: KL(start || model) per retain answer token, NLL per forget answer token, in nats."""

    retain_kl: float
    forget: float

    @property
    def finite(self) -> bool:
        """Whether both are numbers."""
        return math.isfinite(self.retain_kl) and math.isfinite(self.forget)


def direction_of(
    control: Control, gradient: Mapping[str, Tensor], bases: Mapping[str, Basis]
) -> tuple[dict[str, Tensor], float]:
    """The damped inverse curvature times the gradient [out,in], layer by layer, and the mean damping.

    With ``curvature="identity"`` the gradient itself.
    """
    if control.curvature == "identity":
        return dict(gradient), 0.0
    corrected, found, dampings = control.curvature == "ekfac", {}, []
    for name, matrix in gradient.items():
        damping = damping_of(bases[name].values(corrected), control.damping, control.damping_floor)
        found[name] = precondition(matrix, bases[name], damping, corrected, control.inverse)
        dampings.append(damping)
    return found, sum(dampings) / len(dampings)


@dataclass
class Uphill:
    """The optimizer. ``param_groups``, ``state_dict`` and ``load_state_dict`` are what the loop asks of any.

    Args:
        layers: what is moved, by name. ``zeros``: the masks of parameters whose zeros have to stay, by name.
        forget: the forget rows in batches. ``sample``: the retain rows. ``start``: the frozen starting model.
        labels: for the curvature at a step, counted from 0.
        bases: curvature that was measured elsewhere, on the starting model.
    """

    control: Control
    model: Any
    layers: Mapping[str, nn.Linear]
    zeros: Mapping[str, Tensor]
    forget: Sequence[Part]
    sample: _factors.Sample
    start: Any
    labels: Callable[[int], Labels]
    bases: Mapping[str, Basis] = field(default_factory=dict)
    done: int = 0
    at: Measured | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.param_groups: list[dict[str, Any]] = [{"params": list(self.parameters().values()), "lr": 1.0}]
        self.given = bool(self.bases)

    def parameters(self) -> dict[str, Any]:
        """What is moved, by name."""
        return {
            f"{name}.{part}": parameter
            for name, layer in self.layers.items()
            for part, parameter in layer.named_parameters()
        }

    # --- a step -------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Move uphill as far as the retain set allows; ``numbers`` says what came of it."""
        self.model.eval()  # dropout would make every measurement another one
        before = self.at or self.measure()
        # The loop's loss is minus the forget NLL.
        gradient = {
            name: _factors.matrix_of(layer, lambda weight: -widen(weight.grad))
            for name, layer in self.layers.items()
        }
        matrices, damping = direction_of(self.control, gradient, self._curvature())
        direction = self._by_parameter(matrices)
        slope, curvature = self._slopes(direction)
        allowed = self.control.kl_budget * (self.done + 1)
        size = min(largest_step(allowed - before.retain_kl, slope, curvature), self._longest(direction))
        self.numbers = {
            "damping": damping,
            "predicted_kl": before.retain_kl + slope * size + curvature * size * size / 2,
        }
        self._climb(direction, size, allowed, before)
        self.done += 1

    def _curvature(self) -> Mapping[str, Basis]:
        """As it was kept, or measured at the current weights."""
        if self.control.curvature == "identity":
            return {}
        if not self.bases or (self.control.refresh and self.done > 0):
            self.given = False
            self.bases = {}
            self.bases = _factors.Measurement(
                self._logits,
                self.layers,
                self.sample,
                self.labels(self.done),
                corrected=self.control.curvature == "ekfac",
            ).finished()
        return self.bases

    def _logits(self, part: Part) -> Tensor:
        logits: Tensor = self.model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
        return logits

    def _by_parameter(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The direction of each parameter, 0 where a zero has to stay."""
        found: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            found |= _factors.weights_of(name, self.layers[name], matrix)
        for name, mask in self.zeros.items():
            found[name] = found[name].masked_fill(mask, 0.0)
        return found

    def _longest(self, direction: Mapping[str, Tensor]) -> float:
        """No step is longer than the weights (unless all are 0), whatever the curvature says; 0 without a direction."""
        weights, moves = (
            sum(float(value.detach().double().square().sum()) for value in values)
            for values in (self.parameters().values(), direction.values())
        )
        if not moves:
            return 0.0
        return math.sqrt(weights / moves) if weights else math.inf

    def _climb(self, direction: Mapping[str, Tensor], size: float, allowed: float, before: Measured) -> None:
        """Shorten the step until the measured KL is allowed and the forget NLL has risen; else stay."""
        kept = {name: weight.detach().clone() for name, weight in self.parameters().items()}
        for number in range(1, self.control.tries + 1):
            self._move(kept, direction, size)
            after = self.measure()
            if after.finite and after.retain_kl <= allowed and after.forget > before.forget:
                self._record(after, size, number)
                return
            size *= _shrink(after, allowed)
        self._move(kept, direction, 0.0)
        self._record(before, 0.0, self.control.tries)

    def _move(self, kept: Mapping[str, Tensor], direction: Mapping[str, Tensor], size: float) -> None:
        import torch

        with torch.no_grad():
            for name, weight in self.parameters().items():
                weight.copy_(kept[name] + size * direction[name] if size else kept[name])

    def _record(self, after: Measured, size: float, tries: int) -> None:
        self.at = after
        self.param_groups[0]["lr"] = size
        self.numbers |= {"tries": float(tries), "accepted": float(size > 0)}

    # --- measuring ----------------------------------------------------------------------------------------------

    def measure(self) -> Measured:
        """Forward passes alone: over the retain sample with both models, over the forget rows with one."""
        import torch

        with torch.no_grad():
            divergences = [self._divergence(part.to(self.device)) for part in self.sample.parts]
            losses = [
                float(token_nll(forward(self.model, part.to(self.device))).double().sum())
                for part in self.forget
            ]
        tokens = sum(int(part.tokens) for part in self.forget)
        return Measured(sum(divergences) / self.sample.tokens, sum(losses) / tokens)

    def _divergence(self, part: Part) -> float:
        now, then = forward(self.model, part).logits[part.mask], forward(self.start, part).logits[part.mask]
        return float(kl_divergence(then, now).double().sum())

    def _slopes(self, direction: Mapping[str, Tensor]) -> tuple[float, float]:
        """First and second derivative of the retain KL per token along the direction."""
        import torch

        slope = curvature = 0.0
        with torch.no_grad():
            for part in self.sample.parts:
                part = part.to(self.device)
                logits, tangents = self._tangents(part, direction)
                then = forward(self.start, part).logits[part.mask]
                first, second = kl_slopes(logits[part.mask], tangents[part.mask], then)
                slope, curvature = slope + float(first), curvature + float(second)
        return slope / self.sample.tokens, curvature / self.sample.tokens

    def _tangents(self, part: Part, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits [B,T-1,V] and their derivatives along the direction, by forward-mode differentiation."""
        from torch.autograd import forward_ad
        from torch.func import functional_call
        from torch.nn.attention import SDPBackend, sdpa_kernel

        inputs = {"input_ids": part.input_ids, "attention_mask": part.attention_mask}
        # The fused attention kernels have no forward derivative.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            weights = {
                name: forward_ad.make_dual(weight.detach(), direction[name].to(weight.dtype))
                for name, weight in self.parameters().items()
            }
            logits = functional_call(self.model, weights, kwargs=inputs).logits
            primal, tangent = forward_ad.unpack_dual(logits)
        return widen(primal)[:, :-1], widen(tangent)[:, :-1]

    # --- what the loop asks for -----------------------------------------------------------------------------------

    def observed(self, last: bool) -> dict[str, float]:
        """What is known of the weights as they are, for the curve; the loop itself logs ``forget`` before a step."""
        if self.at is None:
            self.model.eval()
            self.at = self.measure()
        known = {"retain_kl": self.at.retain_kl}
        return known | {"forget": self.at.forget} if last else known

    def state_dict(self) -> dict[str, Any]:
        """How many steps are done, what was measured, and curvature that is kept but lies in no file."""
        keeps = not self.control.refresh and not self.given
        measured = None if self.at is None else [self.at.retain_kl, self.at.forget]
        return {
            "done": self.done,
            "measured": measured,
            "bases": _factors.tensors_of(self.bases) if keeps else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.done = state["done"]
        self.at = None if state["measured"] is None else Measured(*state["measured"])
        if state["bases"]:
            tensors = {name: tensor.to(self.device) for name, tensor in state["bases"].items()}
            self.bases = _factors.bases_of(tensors, list(self.layers))


def _shrink(after: Measured, allowed: float) -> float:
    """The factor for the next candidate: a divergence grows about with the square of the step."""
    if not after.finite:
        return SHORTEST
    wanted = 0.9 * math.sqrt(allowed / after.retain_kl) if after.retain_kl > 0 else LONGEST
    return min(max(wanted, SHORTEST), LONGEST)
