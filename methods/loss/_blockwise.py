"""Cross entropy by blocks of tokens and classes: neither pass ever holds the scores [N,V].

Forward: a running log-sum-exp and the score of the right class. Backward: each block of scores is computed again, its
gradient is (p - onehot) times the incoming one, and autograd takes that through the block alone. Kept between the
passes: hidden states [N,d], the layer's parameters and log Z [N]. torch is imported at the top: this module is only
loaded by a running job. ``methods.loss``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

# Scores in a block: 4 MiB of float32 on the processor, which its caches still hold; 64 MiB on a card.
ENTRIES = {"cpu": 2**20}
ENTRIES_ON_CARD = 2**24
TOKENS = 512

# Parameters of an output layer with a row for each class.
ROWS = ("weight", "bias")


def cross_entropy(
    layer: Any, hidden: Tensor, targets: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Losses and log Z [N] of hidden states [N,d] and targets [N], both with gradients."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    head = _Head(layer, names, softcap)
    found: tuple[Tensor, Tensor] = _Cut.apply(head, targets, hidden, *parameters)
    return found


@dataclass(frozen=True)
class _Head:
    """An output layer as a function of its parameters, for slices of its classes."""

    layer: Any
    names: Sequence[str]
    softcap: float | None

    @property
    def classes(self) -> int:
        return int(getattr(self.layer, "classes", self.layer.out_features))

    @property
    def sliced(self) -> Sequence[str]:
        """The parameters of which a slice of classes needs the same slice alone.

        A head that has its own way to a slice of classes (tokens that share vectors) gets them whole.
        """
        own = getattr(self.layer, "slice_scores", None) is not None
        return () if own or len(self.layer.weight) != self.classes else ROWS

    def cut(self, parameters: Sequence[Tensor], classes: slice) -> dict[str, Tensor]:
        """The parameters by name, cut to the classes; leaves of a graph of their own where they are trained."""
        pairs = zip(self.names, parameters, strict=True)
        pieces = {name: value[classes] if name in self.sliced else value for name, value in pairs}
        trained = torch.is_grad_enabled()
        wanted = {name: value.requires_grad for name, value in zip(self.names, parameters, strict=True)}
        return {
            name: piece.detach().requires_grad_(trained and wanted[name]) for name, piece in pieces.items()
        }

    def scores(self, hidden: Tensor, pieces: Mapping[str, Tensor], classes: slice) -> Tensor:
        """Scores [n,v] in float32 or wider. ``pieces`` come from ``cut``."""
        within = slice(None) if self.sliced else classes
        named = {f"layer.{name}": piece for name, piece in pieces.items()}
        raw: Tensor = functional_call(_Block(self.layer, within), named, (hidden,))
        raw = raw if raw.element_size() == 8 else raw.float()
        return raw if self.softcap is None else self.softcap * (raw / self.softcap).tanh()


class _Block(nn.Module):
    """A slice of an output layer's classes as a module, whose parameters can be exchanged for one call."""

    def __init__(self, layer: nn.Module, classes: slice) -> None:
        super().__init__()
        self.layer, self.classes = layer, classes

    def forward(self, hidden: Tensor) -> Tensor:
        from methods.architectures import block_scores

        return block_scores(self.layer, hidden, self.classes)


class _Cut(torch.autograd.Function):
    """(head, targets [N], hidden [N,d], parameters) -> losses [N], log Z [N]."""

    @staticmethod
    def forward(
        ctx: Any, head: _Head, targets: Tensor, hidden: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.head, ctx.autocast = head, _autocast(hidden)
        pieces = [_log_sum(head, targets[rows], hidden[rows], parameters) for rows in _token_blocks(hidden)]
        normaliser = torch.cat([piece[0] for piece in pieces]) if pieces else _empty(hidden)
        right = torch.cat([piece[1] for piece in pieces]) if pieces else _empty(hidden)
        ctx.save_for_backward(targets, hidden, normaliser, *parameters)
        return normaliser - right, normaliser.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, slope_of_normaliser: Tensor) -> tuple[Tensor | None, ...]:
        targets, hidden, normaliser, *parameters = ctx.saved_tensors
        sums = _Sums(ctx.head, hidden, parameters, ctx.needs_input_grad[2])
        every = slope + slope_of_normaliser
        with ctx.autocast():
            for rows in _token_blocks(hidden):
                sums.add(rows, targets[rows], normaliser[rows], slope[rows], every[rows])
        return None, None, *sums.gradients()


class _Sums:
    """The gradients of hidden states and parameters, added up block by block."""

    def __init__(
        self, head: _Head, hidden: Tensor, parameters: Sequence[Tensor], hidden_is_trained: bool
    ) -> None:
        self.head, self.hidden, self.parameters = head, hidden, parameters
        self.of_hidden = _zeros(hidden) if hidden_is_trained else None
        self.of_parameters = {
            name: _zeros(value)
            for name, value in zip(head.names, parameters, strict=True)
            if value.requires_grad
        }

    def add(self, rows: slice, targets: Tensor, normaliser: Tensor, right: Tensor, every: Tensor) -> None:
        """One block of tokens: ``every`` [n] times p, less ``right`` [n] at the right class."""
        for classes in _class_blocks(self.head.classes, self.hidden):
            with torch.enable_grad():
                hidden = self.hidden[rows].detach().requires_grad_(self.of_hidden is not None)
                pieces = self.head.cut(self.parameters, classes)
                scores = self.head.scores(hidden, pieces, classes)
            with torch.no_grad():
                slopes = (scores - normaliser[:, None]).exp_().mul_(every[:, None])
                inside = _inside(targets, classes).nonzero().squeeze(1)
                slopes[inside, targets[inside] - classes.start] -= right[inside]
            self._collect(rows, classes, hidden, pieces, scores, slopes)

    def _collect(
        self,
        rows: slice,
        classes: slice,
        hidden: Tensor,
        pieces: Mapping[str, Tensor],
        scores: Tensor,
        slopes: Tensor,
    ) -> None:
        """Take the slopes of a block's scores [n,v] to what it was computed from."""
        leaves = ([hidden] if self.of_hidden is not None else []) + [
            pieces[name] for name in self.of_parameters
        ]
        found = list(torch.autograd.grad(scores, leaves, slopes, allow_unused=True))
        if self.of_hidden is not None:
            self.of_hidden[rows] += found.pop(0)
        for (name, total), gradient in zip(self.of_parameters.items(), found, strict=True):
            if gradient is not None:
                (total[classes] if name in self.head.sliced else total).add_(gradient)

    def gradients(self) -> Iterator[Tensor | None]:
        """Of the hidden states and of each parameter, in their types."""
        yield None if self.of_hidden is None else self.of_hidden.to(self.hidden.dtype)
        for name, value in zip(self.head.names, self.parameters, strict=True):
            total = self.of_parameters.get(name)
            yield None if total is None else total.to(value.dtype)


def _log_sum(
    head: _Head, targets: Tensor, hidden: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """log Z and the score of the right class [n] for a block of tokens."""
    total = right = None
    for classes in _class_blocks(head.classes, hidden):
        scores = head.scores(hidden, head.cut(parameters, classes), classes)
        part, found = scores.logsumexp(-1), _own(scores, targets, classes)
        total = part if total is None else torch.logaddexp(total, part)
        right = found if right is None else right + found
    assert total is not None and right is not None  # there is one class at least
    return total, right


def _own(scores: Tensor, targets: Tensor, classes: slice) -> Tensor:
    """The score of each target [n], 0 where it is none of these classes."""
    places = (targets - classes.start).clamp(0, scores.shape[1] - 1)
    found = scores.gather(1, places[:, None]).squeeze(1)
    return torch.where(_inside(targets, classes), found, found.new_zeros(()))


def _inside(targets: Tensor, classes: slice) -> Tensor:
    return (targets >= classes.start) & (targets < classes.stop)


def _token_blocks(hidden: Tensor) -> Iterator[slice]:
    for start in range(0, len(hidden), TOKENS):
        yield slice(start, min(start + TOKENS, len(hidden)))


def _class_blocks(classes: int, hidden: Tensor) -> Iterator[slice]:
    width = ENTRIES.get(hidden.device.type, ENTRIES_ON_CARD) // TOKENS
    for start in range(0, classes, width):
        yield slice(start, min(start + width, classes))


def _zeros(like: Tensor) -> Tensor:
    """Where a gradient is added up: float32 at least."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _empty(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _autocast(hidden: Tensor) -> Callable[[], Any]:
    """The autocast of the forward pass, for the scores that are computed again."""
    device = hidden.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # Without a cache: it would keep a copy of every slice of the weights.
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
