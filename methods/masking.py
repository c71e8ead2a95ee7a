"""Masks that change while a model is trained: how many weights are hidden when, and what becomes of them.

A gradient method gives the loop a ``Masking``. Weights are hidden in one of two ways. *Removed*: a hidden weight is 0,
gets no gradient and does not come back, except that a later mask may choose anew among the weights that are left.
*Straight through*: the forward pass sees zeros, the gradient at them goes to the dense weights behind, and any of them
may return when the mask is drawn again; the dense weights are gone in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

REVISION = 2
# What the masks are called among the buffers of a model's layers: saved and resumed with a run, not with the model.
BUFFER = "hidden_weights"


class Masking(Protocol):
    """What a training loop asks of masks."""

    def hiding(self, step: int) -> Any:
        """A context in which the model is as its masks of this step show it."""

    def mask_gradients(self) -> None:
        """Before gradients are measured, clipped and used."""

    def after(self) -> None:
        """After an update: what is removed stays removed."""

    def hide(self, named: Mapping[str, Parameter]) -> None:
        """Hide weights for good in a model that is about to be written: this one or a copy."""

    def numbers(self) -> dict[str, float]:
        """What the curve shows of the last step."""


@dataclass(frozen=True)
class Schedule:
    """From ``start`` to ``end``, as shares of the weights, between two points of the training.

    Zhu and Gupta 2017, "To prune, or not to prune", section 3:  s(t) = end + (start - end) (1 - progress)^3; or a
    straight line. ``begin`` and ``finish`` are shares of all ``steps``; before and after them nothing changes.
    """

    start: float
    end: float
    begin: float
    finish: float
    steps: int
    shape: Literal["cubic", "linear"] = "cubic"

    def progress(self, step: int) -> float:
        """From 0 to 1, after ``step`` of the steps; 1 in the last one, behind which no mask is drawn any more."""
        first, last = self.begin * self.steps, self.finish * self.steps
        if step >= min(last, self.steps - 1):
            return 1.0
        return max(0.0, (step - first) / (last - first))

    def share(self, step: int) -> float:
        """The share of the weights that is hidden after ``step`` of the steps."""
        left = 1.0 - self.progress(step)
        return self.end + (self.start - self.end) * (left**3 if self.shape == "cubic" else left)


class ScheduledMasks:
    """Hides the smallest weights of every matrix, more and more of them.

    Args:
        layers: the linear layers that take part, by the name of their weight.
        pattern: (n, m): of every m consecutive inputs up to n are hidden, the schedule's share of ``end`` times n.
        every: steps between two masks; the last one is always drawn.
        straight_through: whether hidden weights can return (see above).
        decay: what is added to the gradient of a hidden weight, times the weight (Zhou et al. 2021, "Learning N:M
            Fine-grained Structured Sparse Neural Networks From Scratch", equation 8).
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        schedule: Schedule,
        *,
        pattern: tuple[int, int] | None = None,
        every: int = 1,
        straight_through: bool = False,
        decay: float = 0.0,
    ) -> None:
        import torch

        self.layers, self.schedule, self.pattern, self.every = layers, schedule, pattern, every
        self.straight_through, self.decay = straight_through, decay
        self.flipped, self._step = 0.0, -1
        for layer in layers.values():
            layer.register_buffer(BUFFER, torch.zeros_like(layer.weight, dtype=torch.bool), persistent=False)

    # - what the loop asks

    @contextmanager
    def hiding(self, step: int) -> Iterator[None]:
        """Draw the masks where it is time; within, hidden weights are 0."""
        if step != self._step:
            self._step, self.flipped = step, self._draw(step) if self.is_drawn(step) else 0.0
        if not self.straight_through:
            yield
            return
        dense = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self._zero({name: layer.weight for name, layer in self.layers.items()})
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.weight.data.copy_(dense[name])

    def mask_gradients(self) -> None:
        """None for what is removed; for what is hidden the pull of its decay."""
        for name, layer in self.layers.items():
            gradient = layer.weight.grad
            if gradient is not None and not self.straight_through:
                gradient.masked_fill_(self.mask(name), 0.0)
            elif gradient is not None and self.decay:
                gradient.add_(layer.weight.detach() * self.mask(name), alpha=self.decay)

    def after(self) -> None:
        """Decay and momentum may have moved what was removed."""
        if not self.straight_through:
            self._zero({name: layer.weight for name, layer in self.layers.items()})

    def hide(self, named: Mapping[str, Parameter]) -> None:
        """Zero the hidden weights of a model by name."""
        self._zero({name: named[name] for name in self.layers})

    def numbers(self) -> dict[str, float]:
        """``hidden``: the share of the weights; ``flipped``: the share whose mask this step changed."""
        hidden = sum(int(self.mask(name).sum()) for name in self.layers)
        return {"hidden": hidden / self._count, "flipped": self.flipped}

    # - masks

    def is_drawn(self, step: int) -> bool:
        """Whether step ``step`` begins with a new mask: every few steps from the first to the last of the schedule."""
        schedule = self.schedule
        begins = schedule.begin * schedule.steps <= step
        just_finished = schedule.progress(step) == 1.0 and schedule.progress(step - 1) < 1.0
        changes = self.straight_through or schedule.progress(step) < 1.0
        return just_finished or (begins and changes and step % self.every == 0)

    def mask(self, name: str) -> Tensor:
        """Which entries of a weight [out,in] are hidden."""
        found: Tensor = getattr(self.layers[name], BUFFER)
        return found

    def average_hidden(self) -> float:
        """Hidden weights, a mean over the steps of the schedule."""
        total, now = 0.0, 0.0
        for step in range(self.schedule.steps):
            if self.is_drawn(step):
                now = float(sum(self._hidden_count(layer.weight, step) for layer in self.layers.values()))
            total += now
        return total / self.schedule.steps

    @property
    def _count(self) -> int:
        return sum(layer.weight.numel() for layer in self.layers.values())

    def _hidden_count(self, weight: Tensor, step: int) -> int:
        if self.pattern is None:
            return round(weight.numel() * self.schedule.share(step))
        return weight.numel() // self.pattern[1] * self._of_each_group(step)

    def _of_each_group(self, step: int) -> int:
        assert self.pattern is not None
        share = self.schedule.share(step)
        return round(self.pattern[0] * share / self.schedule.end) if self.schedule.end else 0

    def _draw(self, step: int) -> float:
        """Masks of this step; the share of the entries that they change."""
        flips = 0
        for name, layer in self.layers.items():
            new = self._smallest(layer.weight.detach().abs(), step)
            flips += int((new != self.mask(name)).sum())
            self.mask(name).copy_(new)
        self.after()
        return flips / self._count

    def _smallest(self, size: Tensor, step: int) -> Tensor:
        from methods.prune._masks import smallest

        if self.pattern is None:
            return smallest(size.flatten()[None], self._hidden_count(size, step)).view_as(size)
        groups = size.reshape(-1, self.pattern[1])
        return smallest(groups, self._of_each_group(step)).view_as(size)

    # - weights

    def _zero(self, named: Mapping[str, Tensor]) -> None:
        for name, weight in named.items():
            weight.data.masked_fill_(self.mask(name).to(weight.device), 0.0)
