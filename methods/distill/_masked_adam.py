"""How weights under an n:m mask are trained when the mask may still change: optimizers and masks of AST and CAST.

AST adds the pull on hidden weights *after* the average of the gradients and divides by the root of the mean square of
what comes out (thu-ml/Adaptive-Sparse-Trainer, ``adamw.py``). An AdamW whose gradient contains the pull is another
optimizer: there the pull is averaged with the gradients, goes on after a weight has left the mask, and is divided by
the gradients' own size. CAST's decay is one of the absolute value, and every hidden weight shrinks at the same speed.

``numbers`` of an optimizer and of masks go into the learning curve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from methods.masking import Schedule, ScheduledMasks
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

REVISION = 1
# What the factors of a layer's outputs are called among its buffers: saved and resumed with a run, not with the model.
SCALES = "row_scales"


# --- layers and masks -----------------------------------------------------------------------------------------


def masked_layers(method: str, model: Any, pattern: tuple[int, int]) -> dict[str, Any]:
    """The decoder's linear layers by the name of their weight.

    Raises:
        AssayError: the pattern's m does not divide the inputs of one of them.
    """
    from methods.prune._walk import linear_weights

    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in linear_weights(model)}
    for name, layer in layers.items():
        if layer.in_features % pattern[1]:
            raise AssayError(
                f"{method}: pattern {pattern[0]}:{pattern[1]} does not fit {name} with {layer.in_features} inputs; "
                "choose one whose m divides them."
            )
    return layers


def straight_through(
    layers: Mapping[str, Any], pattern: tuple[int, int], every: int, steps: int
) -> ScheduledMasks:
    """The whole pattern from the first step on, drawn anew every few steps; the dense weights stay behind it."""
    return ScheduledMasks(layers, _whole(steps), pattern=pattern, every=every, straight_through=True)


def _whole(steps: int) -> Schedule:
    return Schedule(1.0, 1.0, 0.0, 1.0, steps)


class SoftMasks(ScheduledMasks):
    """Masks that hide nothing until the model is written: they say which weights are to shrink.

    With ``scaling`` every output of a layer has a factor, at first 1, that is trained with the weights and multiplied
    into them when the model is written. A factor of a row keeps the order of the sizes in it, and so the mask.

        y = diag(s) W x,    dL/ds_i = sum_j dL/d(s W)_ij W_ij,    dL/dW = diag(s) dL/d(s W)
    """

    def __init__(
        self, layers: Mapping[str, Any], pattern: tuple[int, int], *, every: int, steps: int, scaling: bool
    ) -> None:
        super().__init__(layers, _whole(steps), pattern=pattern, every=every, straight_through=True)
        self.scales: dict[str, Tensor] = {}
        for name, layer in layers.items() if scaling else ():
            layer.register_buffer(SCALES, torch.ones_like(layer.weight[:, 0].detach()), persistent=False)
            self.scales[name] = getattr(layer, SCALES)

    @contextmanager
    def hiding(self, step: int) -> Iterator[None]:
        """Draw the masks where it is time; within, the rows have their factors."""
        if step != self._step:
            self._step, self.flipped = step, self._draw(step) if self.is_drawn(step) else 0.0
        kept = {name: self.layers[name].weight.detach().clone() for name in self.scales}
        self._scale({name: self.layers[name].weight for name in self.scales})
        try:
            yield
        finally:
            for name, weight in kept.items():
                self.layers[name].weight.data.copy_(weight)

    def mask_gradients(self) -> None:
        """From the gradient of the scaled weights those of factors and weights."""
        for name, scale in self.scales.items():
            weight = self.layers[name].weight
            if weight.grad is not None:
                scale.grad = (weight.grad * weight.detach()).sum(1)
                weight.grad.mul_(scale[:, None])

    def hide(self, named: Mapping[str, Parameter]) -> None:
        """Multiply the factors in and zero the masked weights: once for each model that is written."""
        self._scale({name: named[name] for name in self.scales})
        super().hide(named)

    def numbers(self) -> dict[str, float]:
        """Beside the others ``largest_masked``: the largest size of a weight that the mask would zero now."""
        sizes = [self._largest(name) for name in self.layers]
        return super().numbers() | {"largest_masked": max(sizes, default=0.0)}

    def _largest(self, name: str) -> float:
        return float(self.layers[name].weight.detach().abs().masked_fill(~self.mask(name), 0.0).max())

    def _scale(self, named: Mapping[str, Parameter]) -> None:
        for name, weight in named.items():
            weight.data.mul_(self.scales[name].to(weight.device)[:, None])


# --- AST ------------------------------------------------------------------------------------------------------


class MaskedAdam(Optimizer):
    """AdamW that pulls the weights under a mask to 0. With g the gradient of the loss and t the step from 1:

        m = beta1 m + (1 - beta1) g
        u = m + decay_t W (1 - M)                       v = beta2 v + (1 - beta2) u^2      for weights with a mask M
        u = m                                           v = beta2 v + (1 - beta2) g^2      for the others
        W = (1 - rate * weight_decay) W - rate u / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)

    The average m is of the gradients of the loss alone. Weight decay comes first and spares vectors, as upstream.

    Args:
        named: what is trained, by name. ``masks``: True where a weight is hidden, by the same names, kept up to date.
        options: those of ``adamw``. ``decay``: of a step, from 0.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        masks: Mapping[str, Tensor],
        options: Any,
        decay: Callable[[int], float],
    ) -> None:
        groups = [
            {
                "params": [weight for _, weight in named if weight.ndim >= 2],
                "weight_decay": options.weight_decay,
            },
            {"params": [weight for _, weight in named if weight.ndim < 2], "weight_decay": 0.0},
        ]
        usual = {
            "lr": options.learning_rate,
            "betas": (options.beta1, options.beta2),
            "eps": options.epsilon,
            "weight_decay": options.weight_decay,
        }
        super().__init__([group for group in groups if group["params"]], usual)
        self.masks = {id(weight): masks[name] for name, weight in named if name in masks}
        self.decay, self._last = decay, 0.0

    @property
    def numbers(self) -> dict[str, float]:
        """``masked_decay``: the pull of the last step."""
        return {"masked_decay": self._last}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients as they are; a ``closure`` is not asked for a loss."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state.update(step=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        self._last = self.decay(state["step"])
        state["step"] += 1
        (beta1, beta2), time = group["betas"], state["step"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        state["mean"].lerp_(weight.grad, 1 - beta1)
        hidden = self.masks.get(id(weight))
        wanted, squared = state["mean"], weight.grad
        if hidden is not None:
            wanted = squared = wanted + weight * hidden * self._last
        state["square"].mul_(beta2).addcmul_(squared, squared, value=1 - beta2)
        size = (state["square"] / (1 - beta2**time)).sqrt_().add_(group["eps"])
        weight.addcdiv_(wanted, size, value=-group["lr"] / (1 - beta1**time))


class _Wrapped(ABC):
    """An optimizer with something done to the masked weights after each of its steps."""

    def __init__(
        self,
        inner: Optimizer,
        named: Sequence[tuple[str, Tensor]],
        masks: Mapping[str, Tensor],
        decay: Callable[[int], float],
    ) -> None:
        self.inner, self.decay, self.steps, self._last = inner, decay, 0, 0.0
        self.masked = [(weight, masks[name]) for name, weight in named if name in masks]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def numbers(self) -> dict[str, float]:
        """``masked_decay``: that of the last step."""
        return dict(getattr(self.inner, "numbers", {})) | {"masked_decay": self._last}

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, and how many steps were made."""
        return {"inner": self.inner.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.steps = state["steps"]

    @torch.no_grad()
    def step(self) -> None:
        """The inner optimizer's step, and what comes after it."""
        before = self._before()
        self.inner.step()
        self._last = self.decay(self.steps)
        self.steps += 1
        self._after(before, self._last * float(self.param_groups[0]["lr"]))

    def _before(self) -> list[Tensor]:
        return []

    @abstractmethod
    def _after(self, before: list[Tensor], amount: float) -> None:
        """What is done to the masked weights, ``amount`` being the decay times the learning rate."""


class Pulled(_Wrapped):
    """AST's pull beside another optimizer than Adam: W = W - rate * decay_t * W (1 - M), of the weights before it."""

    def _before(self) -> list[Tensor]:
        return [weight * hidden for weight, hidden in self.masked]

    def _after(self, before: list[Tensor], amount: float) -> None:
        for (weight, _), held in zip(self.masked, before, strict=True):
            weight.sub_(held, alpha=amount)


# --- CAST -----------------------------------------------------------------------------------------------------


class Shrinking(_Wrapped):
    """An L1 decay of the masked weights, apart from the gradient, that stops at 0:

        W = sign(W) max(|W| - rate * decay_t, 0)    where M = 0

    Inside Adam's fraction the pull would be divided by the size of each weight's gradient; here all shrink alike.
    """

    def _after(self, before: list[Tensor], amount: float) -> None:
        for weight, hidden in self.masked:
            shrunk = weight.sign() * (weight.abs() - amount).clamp_(min=0.0)
            weight.copy_(torch.where(hidden, shrunk, weight))


def rising(strength: float, over: int) -> Callable[[int], float]:
    """From 0 in the first step, in a straight line to ``strength`` after ``over`` steps; at once for 0."""
    return lambda step: strength * min(1.0, step / over) if over else strength
