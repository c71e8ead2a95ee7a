"""Terms that are sums over tokens, computed block by block: logits are never held for more than a block.

All such terms of a part run together. The forward pass makes each block's logits of student and teacher once, the
terms of its tokens, and by autograd on the block alone the gradient of their weighted sum for the states that entered
the head, the head's parameters and what is trained beside it; the backward pass only scales it. So the result is exact
for any block size, and what is kept is O(n d), not O(n V). torch is imported at the top: this module is only loaded by
a running job. ``methods.term``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from methods.stage import AssayError, Term
from methods.term import Entry, Look, Tokens
from methods.term._top import Rest, buckets
from methods.terms import widen

if TYPE_CHECKING:
    from methods.data import Part
    from methods.distill._sources import Layers, Places, Said

# Logits in a block: 64 MiB of float32.
ENTRIES = 2**24


# --- a model without its head -----------------------------------------------------------------------------------


def look(
    model: Any, part: Part, hidden: bool = False, attention: Layers = False, entries: int | None = None
) -> Look:
    """Run a model on a part and stop before its output layer.

    Args:
        entries: how many of its logits there are, where it has more than student and teacher have in common.
    """
    with _recording(model, attention) as attended:
        found = _headless(model, part, hidden) if _has_head(model) else _whole(model, part, hidden)
    states, head, parameters, hidden_states = found
    return Look(states, _cut(head, entries), parameters, hidden_states, attended)


_Found = tuple[Tensor, Callable[[Tensor], Tensor], Sequence[Tensor], "Sequence[Tensor] | None"]


def _headless(model: Any, part: Part, hidden: bool) -> _Found:
    from methods.architectures import output_layer, without_head

    with without_head(model, behind=True) as head:
        answer = _run(model, part, hidden)
    parameters = [*output_layer(model).parameters()]
    return head.entering(answer.logits), head, parameters, answer.hidden_states if hidden else None


def _whole(model: Any, part: Part, hidden: bool) -> _Found:
    """Of what has no output layer, such as a lookup table, the logits are the states."""
    answer = _run(model, part, hidden)
    return answer.logits, widen, (), answer.hidden_states if hidden else None


def _run(model: Any, part: Part, hidden: bool) -> Any:
    wanted = {"output_hidden_states": True} if hidden else {}
    return model(input_ids=part.input_ids, attention_mask=part.attention_mask, **wanted)


def _has_head(model: Any) -> bool:
    from methods.architectures import unwrapped

    return hasattr(unwrapped(model), "get_output_embeddings")


def _recording(model: Any, attention: Layers) -> Any:
    if not attention:
        return nullcontext()
    from methods.term._attention import recorded

    return recorded(model, None if attention is True else attention)


def _cut(head: Callable[[Tensor], Tensor], entries: int | None) -> Callable[[Tensor], Tensor]:
    return head if entries is None else lambda block: head(block)[..., :entries]


# --- blocks -------------------------------------------------------------------------------------------------------


def blocks(look: Look, count: int, size: int | None = None) -> Iterator[slice]:
    """``count`` places of a look in blocks of ``size``; None: as many as have ``ENTRIES`` logits together.

    Without a place there is one empty block, so that what is made of it has its names and sums of 0.
    """
    if size is None:
        with torch.no_grad():
            size = max(1, ENTRIES // look.head(look.states.flatten(0, 1)[:0]).shape[-1])
    for start in range(0, max(1, count), size):
        yield slice(start, min(start + size, count))


# --- terms that are sums over tokens ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pull:
    """One term at work: its entry in the mixture, and what belongs to it in this step."""

    entry: Entry
    values: Mapping[str, float] = field(default_factory=dict)
    memory: Any = None
    companion: nn.Module | None = None


@dataclass(frozen=True)
class Moment:
    """Where in a run a batch is."""

    step: int = 0
    steps: int = 1


def separable(
    pulls: Sequence[Pull],
    student: Look,
    said: Said | None,
    places: Places,
    moment: Moment,
    block_tokens: int | None = None,
) -> dict[str, Term]:
    """The terms of all ``pulls`` over the same places, each a sum over them with its weight.

    Their gradients come together: whoever calls ``backward`` does so on a combination in which the slope of each sum
    is its weight times one common factor, as ``methods.gradient`` does.

    Args:
        block_tokens: tokens in a block; None: as many as make 64 MiB of float32 logits.
    """
    hidden = student.states.flatten(0, 1)[places.index]
    work = _Work(pulls, student, said, places, moment, block_tokens)
    parameters = work.trained() if torch.is_grad_enabled() else []
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters)) and any(work.weights())
    if wanted:
        sums = _Summed.apply(work, hidden, *parameters)
    else:
        with torch.no_grad():
            sums = work.run(hidden, (), wanted=False)[0]
    weights = work.weight_of()
    return {
        name: Term(sums[number], places.count, weights.get(name, 0.0))
        for number, name in enumerate(work.names)
    }


class _Summed(torch.autograd.Function):
    """(work, states [n,d], parameters) -> sums [terms], with the gradient of their weighted sum made on the way."""

    @staticmethod
    def forward(ctx: Any, work: _Work, hidden: Tensor, *parameters: Tensor) -> Tensor:
        sums, ctx.gradients = work.run(hidden, parameters, wanted=True)
        ctx.weights = sums.new_tensor(work.weights())
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        first = int(ctx.weights.nonzero()[0])
        factor = slopes[first] / ctx.weights[first]
        assert torch.allclose(slopes, factor * ctx.weights, rtol=1e-5, atol=0.0), (
            "slopes are no multiple of weights"
        )
        return None, *(None if gradient is None else gradient * factor for gradient in ctx.gradients)


class _Work:
    """All blocks of a group of terms."""

    def __init__(
        self,
        pulls: Sequence[Pull],
        student: Look,
        said: Said | None,
        places: Places,
        moment: Moment,
        block_tokens: int | None,
    ) -> None:
        self.pulls, self.student, self.said, self.places = pulls, student, said, places
        self.moment, self.block_tokens = moment, block_tokens
        self.names: list[str] = []

    def weight_of(self) -> dict[str, float]:
        """The weight of each term; what is only logged is not in it."""
        return {pull.entry.name: pull.entry.weight for pull in self.pulls}

    def weights(self) -> list[float]:
        """The weights in the order of the sums; before a first block in that of the terms."""
        weights = self.weight_of()
        return [weights.get(name, 0.0) for name in self.names or weights]

    def trained(self) -> list[Tensor]:
        """What a gradient is wanted for beside the states: the head's parameters, and those of companions."""
        beside = [list(pull.companion.parameters()) for pull in self.pulls if pull.companion is not None]
        every = [*self.student.parameters, *(parameter for group in beside for parameter in group)]
        return list({id(parameter): parameter for parameter in every if parameter.requires_grad}.values())

    def run(
        self, hidden: Tensor, parameters: Sequence[Tensor], wanted: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The sums, and where ``wanted`` the gradients of their weighted sum for the states and parameters."""
        gradients = _Gradients(hidden, parameters, wanted)
        parts = [
            self._block(hidden, rows, gradients)
            for rows in blocks(self.student, len(hidden), self.block_tokens)
        ]
        # Added up once over all tokens: then the size of a block does not even change the rounding.
        return torch.cat(parts, 1).sum(1), gradients.found()

    def _block(self, hidden: Tensor, rows: slice, gradients: _Gradients) -> Tensor:
        """The terms of a block's tokens [terms, c]."""
        with torch.set_grad_enabled(gradients.wanted):
            leaf = hidden[rows].detach().requires_grad_(gradients.of_hidden is not None)
            values = self._values(self.student.head(leaf), rows)
            self.names = self.names or list(values)
            weights = self.weight_of()
            weighted = [value.sum() * weights[name] for name, value in values.items() if weights.get(name)]
            if gradients.wanted:
                gradients.add(rows, leaf, sum(weighted[1:], start=weighted[0]))
        return torch.stack([value.detach() for value in values.values()])

    def _values(self, logits: Tensor, rows: slice) -> dict[str, Tensor]:
        """Each term of each token [c], from the student's logits [c,V]."""
        block = _Block(logits, self.said, rows)
        found: dict[str, Tensor] = {}
        for pull in self.pulls:
            with torch.set_grad_enabled(torch.is_grad_enabled() and pull.entry.weight > 0):
                values = self._of(pull, block)
            _refuse_other_shapes(pull.entry, values, len(logits))
            found |= values
        return found

    def _of(self, pull: Pull, block: _Block) -> dict[str, Tensor]:
        entry = pull.entry
        if entry.flags.form == "divergence":
            pair = block.pair(entry.config.temperature, getattr(entry.config, "rest", "tail"))
            return {entry.name: entry.module.divergence(entry.config, *pair)}
        found = entry.module.token_losses(entry.config, self._tokens(pull, block))
        if isinstance(found, Tensor):
            return {entry.name: found}
        if "loss" not in found:
            raise AssayError(f"{entry.name}: token_losses must return the term itself under the name loss.")
        return {entry.name if key == "loss" else f"{entry.name}.{key}": value for key, value in found.items()}

    def _tokens(self, pull: Pull, block: _Block) -> Tokens:
        rows = block.rows
        return Tokens(
            student=block.student,
            targets=self.places.targets[rows],
            teacher=block.teacher() if pull.entry.flags.teacher else None,
            step=self.moment.step,
            steps=self.moment.steps,
            values=pull.values,
            memory=pull.memory,
            companion=pull.companion,
            extra={name: values[rows] for name, values in self.places.extra.items()},
        )


def _refuse_other_shapes(entry: Entry, values: Mapping[str, Tensor], tokens: int) -> None:
    """AssayError unless a term's file returns a number for each token."""
    for name, value in values.items():
        if value.shape != (tokens,):
            raise AssayError(
                f"{name}: {entry.flags.form} must return one number for each of {tokens} tokens, [{tokens}]; it "
                f"returned {list(value.shape)}."
            )


class _Block:
    """A block's distributions, each made once, when it is first asked for."""

    def __init__(self, student: Tensor, said: Said | None, rows: slice) -> None:
        self.student, self.rows = student, rows
        self._said = said
        self._teacher: Tensor | None = None
        self._softened: dict[tuple[str, float], Tensor] = {}

    def teacher(self) -> Tensor:
        """The teacher's logits [c,V]."""
        assert (
            self._said is not None
        )  # the family refuses a term without its teacher before anything is loaded
        if self._teacher is None:
            self._teacher = self._said.logits(self.rows)
        return self._teacher

    def pair(self, temperature: float, rest: Rest = "tail") -> tuple[Tensor, Tensor]:
        """Log-probabilities of teacher and student [c,V]; of a teacher's largest entries alone as in ``buckets``."""
        assert self._said is not None
        log_q = self._student(temperature)
        top = self._said.top(self.rows, temperature)
        if top is not None:
            return buckets(top[1], top[0], log_q, rest)
        key = ("teacher", temperature)
        if key not in self._softened:
            self._softened[key] = self._said.log_probs(self.rows, temperature)
        return self._softened[key], log_q

    def _student(self, temperature: float) -> Tensor:
        from methods.distill._sources import softened

        # A term that is only logged runs without a gradient: what it makes is of no use to the others.
        key = ("student" if torch.is_grad_enabled() else "logged", temperature)
        if key not in self._softened:
            self._softened[key] = softened(self.student, temperature)
        return self._softened[key]


class _Gradients:
    """The gradients of states [n,d] and parameters, added up block by block in float32 or wider."""

    def __init__(self, hidden: Tensor, parameters: Sequence[Tensor], wanted: bool) -> None:
        self.parameters, self.wanted = list(parameters), wanted
        self.of_hidden = torch.zeros_like(hidden) if wanted and hidden.requires_grad else None
        self._sums: list[Tensor | None] = [None] * len(self.parameters)

    def add(self, rows: slice, leaf: Tensor, value: Tensor) -> None:
        """One block: ``value`` is its weighted sum, ``leaf`` the states [c,d] it was made of."""
        leaves = [leaf] if self.of_hidden is not None else []
        found = list(torch.autograd.grad(value, leaves + self.parameters, allow_unused=True))
        if self.of_hidden is not None:
            own = found.pop(0)
            if own is not None:
                self.of_hidden[rows] = own
        for number, gradient in enumerate(found):
            if gradient is not None:
                total = self._sums[number]
                self._sums[number] = widen(gradient) if total is None else total.add_(gradient)

    def found(self) -> list[Tensor | None]:
        """Of the states and of each parameter, in their types."""
        of_parameters = [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(self._sums, self.parameters, strict=True)
        ]
        return [self.of_hidden, *of_parameters]
