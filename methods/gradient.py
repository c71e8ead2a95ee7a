"""The gradient of one global batch, exact for any number of micro-batches and processes.

With the named terms k of a loss, ``sum_k`` and ``count_k`` taken over the *whole* batch, the objective is

    L = sum_k weight_k * sum_k / count_k        or, for a loss that is no sum over items,
    L = outer(mean_1, mean_2, ...),  mean_k = sum_k / count_k

and both have the gradient  sum_k slope_k / count_k * d sum_k,  where slope_k is weight_k or d outer / d mean_k.
``d sum_k`` is a plain sum over micro-batches, so all that has to be known before the first backward pass are the
counts (read off the whole batch where they are ``Count``s) and, for ``outer``, the means; a first pass without
gradients gathers what is not known. Averaging the losses of micro-batches instead would weigh a token by the
lengths of its neighbours.
``methods.loop``'s REVISION covers this file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from methods.progress import derive_seed
from methods.stage import AssayError, Count, NotFinite, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Part

Loss = Callable[[Any, Any], Terms]
Outer = Callable[[Mapping[str, "Tensor"]], "Tensor"]
# From the losses [B] of all rows of a global batch, and the step, the weight [B] of each.
Weigh = Callable[["Tensor", int], "Tensor"]

# The source of a count that belongs to the batch as a whole and is not added up: a sum that nothing divides.
WHOLE = "batch"


class Batch:
    """What a loss sees of one step: a ``Part`` per name, how many updates were done, and how many there will be.

    ``values`` are numbers that change from step to step, such as a dual variable (``methods.loop.Adaptive``).
    ``weigh`` turns the losses [b] of these rows, detached, into their weights [b] among all rows of the global batch.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        step: int,
        steps: int,
        values: Mapping[str, float] | None = None,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.parts, self.step, self.steps, self.values = parts, step, steps, values or {}
        if weigh is not None:
            self.weigh = weigh

    def __getattr__(self, name: str) -> Part:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(
                f"this batch has no part {name!r}; it has: {', '.join(self.parts)}."
            ) from None


@dataclass(frozen=True)
class Workers:
    """The processes that share a batch: this one's number, how many there are, and how tensors are added up."""

    rank: int = 0
    count: int = 1
    add: Callable[[Any], Any] = lambda tensor: tensor


@dataclass(frozen=True)
class _Moment:
    """Where in a run a batch is, the numbers that go with it, and how its rows are weighed (as yet: None)."""

    step: int
    steps: int
    values: Mapping[str, float]
    weigh: Callable[[int, Tensor], Tensor] | None = None

    def batch(self, index: int, parts: Mapping[str, Part]) -> Batch:
        """Piece ``index`` of the batch, on the device."""
        weigh = partial(self.weigh, index) if self.weigh is not None else None
        return Batch(parts, self.step, self.steps, self.values, weigh)


@dataclass(frozen=True)
class _Known:
    """What is known of the whole batch before the first backward pass."""

    counts: Mapping[str, float]
    sums: Mapping[str, Tensor]


class Gradient:
    """Computes the gradient of a global batch into ``parameter.grad``.

    Args:
        loss: named terms of a batch. ``outer``: scalar of their global means, for losses that are no sums.
        weigh: weights of the global batch's rows from their losses, which ``loss`` reads with ``batch.weigh``.
        micro_batch: most sequences of a part in one forward pass; None: a process's whole share.
        seed: what dropout is seeded from, anew for every step and micro-batch.
        companions: what is trained with the model and is no part of it.
    """

    def __init__(
        self,
        model: Any,
        loss: Loss,
        *,
        outer: Outer | None = None,
        weigh: Weigh | None = None,
        micro_batch: int | None = None,
        seed: int = 0,
        device: Any = "cpu",
        workers: Workers | None = None,
        companions: Sequence[Any] = (),
    ) -> None:
        self.companions = companions
        self.model, self.loss, self.outer, self.weigh = model, loss, outer, weigh
        self.micro_batch, self.seed, self.device = micro_batch, seed, device
        self.workers = workers or Workers()
        self._plain = False

    def __call__(
        self, parts: Mapping[str, Part], step: int, steps: int, values: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """The unweighted mean of every term; gradients are left in the parameters.

        Raises:
            NotFinite: a term is not a finite number.
        """
        pieces = cut(parts, pieces_of(parts, self.micro_batch, self.workers.count))
        share = len(pieces) // self.workers.count
        mine = [
            (index, pieces[index])
            for index in range(self.workers.rank * share, (self.workers.rank + 1) * share)
        ]
        several = len(pieces) > 1
        at = _Moment(step, steps, values or {})
        if self.weigh is not None:
            at = replace(at, weigh=self._weights(pieces, mine, at))
        known = self._first_pass(mine, parts, at) if several and (self.outer or self._plain) else None
        for module in (self.model, *self.companions):
            module.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        whole = known
        for terms in self._terms(mine, at):
            if (
                several
                and known is None
                and not all(isinstance(term.count, Count) for term in terms.values())
            ):
                self._plain = True
                del terms
                return self(parts, step, steps, values)
            whole = known or _whole(terms, parts, several)
            self._backward(terms, whole, step)
            _accumulate(sums, terms)
        self._share()
        assert whole is not None  # a process has one piece at least
        return self._checked(_divide(self._add(sums), whole.counts), step)

    def _terms(self, pieces: Sequence[tuple[int, Mapping[str, Part]]], at: _Moment) -> Iterator[Terms]:
        """The terms of each piece. Every pass over a piece draws the same random numbers."""
        import torch

        for index, piece in pieces:
            torch.manual_seed(derive_seed(self.seed, at.step, index))
            on_device = {name: part.to(self.device) for name, part in piece.items()}
            yield self.loss(self.model, at.batch(index, on_device))

    def _weights(
        self,
        pieces: Sequence[Mapping[str, Part]],
        mine: Sequence[tuple[int, Mapping[str, Part]]],
        at: _Moment,
    ) -> Callable[[int, Tensor], Tensor]:
        """How a piece is weighed: the only one at once, several after a pass that asks for all losses."""
        weigh = self.weigh
        assert weigh is not None
        if len(pieces) == 1:
            return lambda _, losses: weigh(losses, at.step)
        sizes = [next(iter(piece.values())).labels.shape[0] for piece in pieces]
        starts = list(itertools.accumulate(sizes, initial=0))
        weights = weigh(self._losses(mine, at, starts), at.step)
        return lambda index, _: weights[starts[index] : starts[index + 1]]

    def _losses(
        self, mine: Sequence[tuple[int, Mapping[str, Part]]], at: _Moment, starts: Sequence[int]
    ) -> Tensor:
        """The losses of all rows of the global batch [B], in their order, from a pass without gradients."""
        import torch

        found: dict[int, Tensor] = {}

        def note(index: int, losses: Tensor) -> Tensor:
            found[index] = losses.detach()
            return torch.ones_like(losses)

        with torch.no_grad():
            for _ in self._terms(mine, replace(at, weigh=note)):
                pass
        whole = next(iter(found.values())).new_zeros(starts[-1])
        for index, losses in found.items():
            whole[starts[index] : starts[index + 1]] = losses
        gathered: Tensor = self.workers.add(whole)
        return gathered

    def _first_pass(
        self, pieces: Sequence[tuple[int, Mapping[str, Part]]], parts: Mapping[str, Part], at: _Moment
    ) -> _Known:
        """Counts and sums of the whole batch, without gradients."""
        import torch

        sums: dict[str, Tensor] = {}
        counted: dict[str, float] = {}
        added: dict[str, Tensor] = {}
        with torch.no_grad():
            for terms in self._terms(pieces, at):
                _accumulate(sums, terms)
                plain = {name: term for name, term in terms.items() if not isinstance(term.count, Count)}
                counted |= {
                    name: total_of(term.count, parts) for name, term in terms.items() if name not in plain
                }
                for name, term in plain.items():
                    added[name] = added.get(name, 0.0) + sums[name].new_tensor(float(term.count))
        counted |= {name: float(count) for name, count in self._add(added).items()}
        return _Known(counted, self._add(sums))

    def _backward(self, terms: Terms, whole: _Known, step: int) -> None:
        slopes = self._slopes(terms, whole)
        wanted = [name for name, term in terms.items() if term.sum.requires_grad]
        if not wanted:
            raise AssayError(f"step {step}: no term of the loss depends on a weight that is trained.")
        shares = [terms[name].sum * (slopes[name] / (whole.counts[name] or math.inf)) for name in wanted]
        sum(shares[1:], start=shares[0]).backward()

    def _slopes(self, terms: Terms, whole: _Known) -> Mapping[str, float]:
        """The derivative of the objective by each term's mean."""
        if self.outer is None:
            return {name: term.weight for name, term in terms.items()}
        return derivatives(self.outer, _divide(whole.sums, whole.counts))

    def _share(self) -> None:
        """Add the gradients of all processes."""
        if self.workers.count > 1:
            for parameter in itertools.chain(*(each.parameters() for each in (self.model, *self.companions))):
                if parameter.grad is not None:
                    parameter.grad = self.workers.add(parameter.grad)

    def _add(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each value added up over the processes, in one message."""
        import torch

        if not values:
            return {}
        added = self.workers.add(torch.stack(list(values.values())))
        return dict(zip(values, added.unbind(), strict=True))

    def _checked(self, means: Mapping[str, Tensor], step: int) -> dict[str, float]:
        values = {name: float(mean) for name, mean in means.items()}
        if self.outer is not None:
            values.setdefault("loss", float(self.outer(means)))
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(
                    f"step {step}: the term {name!r} of the loss is {value}; try a smaller learning rate."
                )
        return values


# --- pieces -------------------------------------------------------------------------------------------------


def pieces_of(parts: Mapping[str, Part], micro_batch: int | None, processes: int) -> int:
    """How many pieces a global batch is cut into: as many for each process, none of them empty."""
    sizes = [part.labels.shape[0] for part in parts.values()]
    wanted = 1 if micro_batch is None else math.ceil(max(sizes) / (processes * micro_batch))
    each = min(wanted, min(sizes) // processes)
    if each < 1:
        raise AssayError(
            f"a batch of {min(sizes)} sequences cannot be shared by {processes} processes: raise batch."
        )
    return each * processes


def cut(parts: Mapping[str, Part], count: int) -> list[dict[str, Part]]:
    """Every part in the same proportion. Rows keep the padding of the whole batch, so counts of positions add up."""
    return [{name: _rows(part, index, count) for name, part in parts.items()} for index in range(count)]


def _rows(part: Part, index: int, count: int) -> Part:
    if count == 1:
        return part
    size = part.labels.shape[0]
    return part.rows(slice(index * size // count, (index + 1) * size // count))


# --- sums, counts, slopes -----------------------------------------------------------------------------------


def total_of(count: float, parts: Mapping[str, Part]) -> float:
    """The count over the whole batch, from where it says it comes from."""
    source = getattr(count, "source", WHOLE)
    if source == WHOLE:
        return float(count)
    name, _, what = source.partition(".")
    return float(getattr(parts[name], what))


def derivatives(outer: Outer, means: Mapping[str, Tensor]) -> dict[str, float]:
    """d outer / d mean for each mean; 0 for one that ``outer`` does not use."""
    import torch

    leaves = {name: mean.detach().clone().requires_grad_() for name, mean in means.items()}
    with torch.enable_grad():
        found: Sequence[Tensor | None] = torch.autograd.grad(
            outer(leaves), list(leaves.values()), allow_unused=True
        )
    return {name: 0.0 if slope is None else float(slope) for name, slope in zip(leaves, found, strict=True)}


def _whole(terms: Terms, parts: Mapping[str, Part], several: bool) -> _Known:
    """From the terms of one piece: of the only piece, or with counts that say where they come from."""
    if several:
        return _Known({name: total_of(term.count, parts) for name, term in terms.items()}, {})
    return _Known({name: float(term.count) for name, term in terms.items()}, _detached(terms))


def _accumulate(sums: dict[str, Tensor], terms: Terms) -> None:
    for name, value in _detached(terms).items():
        sums[name] = sums[name] + value if name in sums else value


def _detached(terms: Terms) -> dict[str, Tensor]:
    return {name: term.sum.detach().double() for name, term in terms.items()}


def _divide(sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> dict[str, Tensor]:
    """Means; that of an empty term (count 0) is 0."""
    return {name: value / (counts[name] or math.inf) for name, value in sums.items()}
