"""The gradient of one global batch, exact for any number of micro-batches and processes.

With the named terms k of a loss, ``sum_k`` and ``count_k`` taken over the *whole* batch, the objective is

    L = sum_k weight_k * sum_k / count_k        or, for a loss that is no sum over items,
    L = outer(mean_1, mean_2, ...),  mean_k = sum_k / count_k

and both have the gradient  sum_k slope_k / count_k * d sum_k,  where slope_k is weight_k or d outer / d mean_k.
``d sum_k`` is a plain sum over micro-batches, so all that has to be known before the first backward pass are the
counts (read off the whole batch where they are ``Count``s) and, for ``outer``, the means: a first pass without gradients
gathers what is not known. Averaging the micro-batches' own losses instead weighs tokens by the lengths of their neighbours.
``methods.loop``'s REVISION covers this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from methods.progress import derive_seed
from methods.stage import AssayError, Count, NotFinite, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Part

Loss = Callable[[Any, Any], Terms]
Outer = Callable[[Mapping[str, "Tensor"]], "Tensor"]

# The source of a count that belongs to the batch as a whole and is not added up: a sum that nothing divides.
WHOLE = "batch"


class Batch:
    """What a loss sees of one step: a ``Part`` per name, how many updates were done, and how many there will be."""

    def __init__(self, parts: Mapping[str, Part], step: int, steps: int) -> None:
        self.parts, self.step, self.steps = parts, step, steps

    def __getattr__(self, name: str) -> Part:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(f"this batch has no part {name!r}; it has: {', '.join(self.parts)}.") from None


@dataclass(frozen=True)
class Workers:
    """The processes that share a batch: this one's number, how many there are, and how tensors are added up."""

    rank: int = 0
    count: int = 1
    add: Callable[[Any], Any] = lambda tensor: tensor


@dataclass(frozen=True)
class _Known:
    """What is known of the whole batch before the first backward pass."""

    counts: Mapping[str, float]
    sums: Mapping[str, Tensor]


class Gradient:
    """Computes the gradient of a global batch into ``parameter.grad``.

    Args:
        loss: named terms of a batch. ``outer``: scalar of their global means, for losses that are no sums.
        micro_batch: most sequences of a part in one forward pass; None: a process's whole share.
        seed: what dropout is seeded from, anew for every step and micro-batch.
    """

    def __init__(
        self,
        model: Any,
        loss: Loss,
        *,
        outer: Outer | None = None,
        micro_batch: int | None = None,
        seed: int = 0,
        device: Any = "cpu",
        workers: Workers | None = None,
    ) -> None:
        self.model, self.loss, self.outer = model, loss, outer
        self.micro_batch, self.seed, self.device = micro_batch, seed, device
        self.workers = workers or Workers()
        self._plain = False

    def __call__(self, parts: Mapping[str, Part], step: int, steps: int) -> dict[str, float]:
        """The unweighted mean of every term; gradients are left in the parameters.

        Raises:
            NotFinite: a term is not a finite number.
        """
        pieces = cut(parts, pieces_of(parts, self.micro_batch, self.workers.count))
        share = len(pieces) // self.workers.count
        mine = [(index, pieces[index]) for index in range(self.workers.rank * share, (self.workers.rank + 1) * share)]
        several = len(pieces) > 1
        known = self._first_pass(mine, parts, step, steps) if several and (self.outer or self._plain) else None
        self.model.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for terms in self._terms(mine, step, steps):
            if several and known is None and not all(isinstance(term.count, Count) for term in terms.values()):
                self._plain = True
                return self(parts, step, steps)
            counts, slopes = self._slopes(terms, parts, known)
            self._backward(terms, counts, slopes, step)
            _accumulate(sums, terms)
        self._share()
        return self._means(self._add(sums), counts, step)

    def _terms(self, pieces: Sequence[tuple[int, Mapping[str, Part]]], step: int, steps: int) -> Iterator[Terms]:
        """The terms of each piece. Both passes over a piece draw the same random numbers."""
        import torch

        for index, piece in pieces:
            torch.manual_seed(derive_seed(self.seed, step, index))
            on_device = {name: part.to(self.device) for name, part in piece.items()}
            yield self.loss(self.model, Batch(on_device, step, steps))

    def _first_pass(
        self, pieces: Sequence[tuple[int, Mapping[str, Part]]], parts: Mapping[str, Part], step: int, steps: int
    ) -> _Known:
        """Counts and sums of the whole batch, without gradients."""
        import torch

        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        whole: dict[str, float] = {}
        with torch.no_grad():
            for terms in self._terms(pieces, step, steps):
                _accumulate(sums, terms)
                for name, term in terms.items():
                    if isinstance(term.count, Count):
                        whole[name] = total_of(term.count, parts)
                    else:
                        number = torch.as_tensor(term.count, dtype=torch.float64, device=self.device)
                        counts[name] = counts[name] + number if name in counts else number
        added = {name: float(value) for name, value in self._add(counts).items()}
        return _Known(whole | added, self._add(sums))

    def _slopes(
        self, terms: Terms, parts: Mapping[str, Part], known: _Known | None
    ) -> tuple[Mapping[str, float], Mapping[str, Any]]:
        """Each term's count over the whole batch and the derivative of the objective by its mean."""
        if known is not None:
            counts, sums = known.counts, known.sums
        elif self.workers.count == 1 and self._is_whole(terms, parts):
            counts, sums = {name: float(term.count) for name, term in terms.items()}, _detached(terms)
        else:
            counts, sums = {name: total_of(term.count, parts) for name, term in terms.items()}, {}
        if self.outer is None:
            return counts, {name: term.weight for name, term in terms.items()}
        return counts, derivatives(self.outer, _divide(sums, counts))

    def _is_whole(self, terms: Terms, parts: Mapping[str, Part]) -> bool:
        return pieces_of(parts, self.micro_batch, 1) == 1

    def _backward(self, terms: Terms, counts: Mapping[str, float], slopes: Mapping[str, Any], step: int) -> None:
        wanted = [name for name, term in terms.items() if term.sum.requires_grad]
        if not wanted:
            raise AssayError(f"step {step}: no term of the loss depends on a weight that is trained.")
        parts = [terms[name].sum * (slopes[name] / counts[name] if counts[name] else 0.0) for name in wanted]
        sum(parts[1:], start=parts[0]).backward()

    def _share(self) -> None:
        """Add the gradients of all processes."""
        if self.workers.count > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.workers.add(parameter.grad)

    def _add(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each value added up over the processes, in one message."""
        import torch

        if not values:
            return {}
        added = self.workers.add(torch.stack(list(values.values())))
        return dict(zip(values, added.unbind(), strict=True))

    def _means(self, sums: Mapping[str, Tensor], counts: Mapping[str, float], step: int) -> dict[str, float]:
        means = {name: float(mean) for name, mean in _divide(sums, counts).items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise NotFinite(f"step {step}: the term {name!r} of the loss is {mean}; try a smaller learning rate.")
        return means


# --- pieces -------------------------------------------------------------------------------------------------


def pieces_of(parts: Mapping[str, Part], micro_batch: int | None, processes: int) -> int:
    """How many pieces a global batch is cut into: as many for each process, none of them empty."""
    sizes = [part.labels.shape[0] for part in parts.values()]
    wanted = 1 if micro_batch is None else math.ceil(max(sizes) / (processes * micro_batch))
    each = min(wanted, min(sizes) // processes)
    if each < 1:
        raise AssayError(f"a batch of {min(sizes)} sequences cannot be shared by {processes} processes: raise batch.")
    return each * processes


def cut(parts: Mapping[str, Part], count: int) -> list[dict[str, Part]]:
    """Every part in the same proportion. Rows keep the padding of the whole batch, so counts of positions add up."""
    return [{name: _rows(part, index, count) for name, part in parts.items()} for index in range(count)]


def _rows(part: Part, index: int, count: int) -> Part:
    if count == 1:
        return part
    size = part.labels.shape[0]
    rows = slice(index * size // count, (index + 1) * size // count)
    return replace(
        part,
        input_ids=part.input_ids[rows],
        attention_mask=part.attention_mask[rows],
        labels=part.labels[rows],
    )


# --- sums, counts, slopes -----------------------------------------------------------------------------------


def total_of(count: float, parts: Mapping[str, Part]) -> float:
    """The count over the whole batch, from where it says it comes from."""
    source = getattr(count, "source", WHOLE)
    if source == WHOLE:
        return float(count)
    name, _, what = source.partition(".")
    return float(getattr(parts[name], what))


def derivatives(outer: Outer, means: Mapping[str, Tensor]) -> dict[str, Any]:
    """d outer / d mean for each mean; 0 for one that ``outer`` does not use."""
    import torch

    leaves = {name: mean.detach().clone().requires_grad_() for name, mean in means.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(outer(leaves), list(leaves.values()), allow_unused=True)
    return {name: 0.0 if slope is None else slope for name, slope in zip(leaves, found, strict=True)}


def _accumulate(sums: dict[str, Tensor], terms: Terms) -> None:
    for name, value in _detached(terms).items():
        sums[name] = sums[name] + value if name in sums else value


def _detached(terms: Terms) -> dict[str, Tensor]:
    return {name: term.sum.detach().double() for name, term in terms.items()}


def _divide(sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: value / counts[name] if counts[name] else value * 0.0 for name, value in sums.items()}
