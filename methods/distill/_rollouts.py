"""What is written while a student is trained: prompts of a batch, answers that are drawn, and parts made of them.

An answer's labels are the written tokens up to and including the first end mark. They are never masked by the id of the
padding: that is often the end mark's, and then no student would learn to stop.

Randomness comes from (seed, step, row) alone, and each row's draws are its own: a resumed run writes the same, and it
does not matter which rows are written together. Several processes write a share each and then exchange them, so that
all see the same parts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Gt, Le

from methods.distill import Taught
from methods.stage import How

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from methods.data import Example, Part
    from methods.term import Setting

REVISION = 1

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Written(Taught):
    """The options of methods whose student writes."""

    # longest answer, in tokens; with its prompt never longer than context_tokens (trl's GKD: 128)
    max_new_tokens: Annotated[int, Gt(0)] = 128
    # of rows that are text and have no question: so many tokens are the prompt
    prompt_tokens: Annotated[int, Gt(0)] = 32
    # sequences that are written at once in a process; None: as many as go through the model in training
    written_at_once: Annotated[Annotated[int, Gt(0)] | None, How] = None


@dataclass(frozen=True, kw_only=True)
class Drawn(Written):
    """The options of methods whose student draws what it writes."""

    # draw among the likeliest tokens alone that together reach this mass; 1: among all
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0


@dataclass(frozen=True)
class Rollout:
    """A prompt with what was written after it, the end mark included, and further numbers of each written token.

    ``number`` is the row of the data that the prompt comes from.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    number: int
    extra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def example(self) -> Example:
        """The sequence to learn from: every written token is a target."""
        from methods.data import IGNORED, Example

        before = [0.0] * (len(self.prompt) - 1)
        return Example(
            (*self.prompt, *self.answer),
            (*[IGNORED] * len(self.prompt), *self.answer),
            {name: (*before, *values) for name, values in self.extra.items()},
            self.number,
        )

    def saved(self) -> list[Any]:
        """As JSON; ``Rollout.of`` reads it."""
        return [self.prompt, self.answer, self.number, dict(self.extra)]

    @classmethod
    def of(cls, saved: Sequence[Any]) -> Rollout:
        prompt, answer, number, extra = saved
        numbers = {name: tuple(values) for name, values in extra.items()}
        return cls(tuple(prompt), tuple(answer), number, numbers)


@dataclass(frozen=True)
class Prompt:
    """What an answer is written to, and the row of the data it comes from."""

    tokens: tuple[int, ...]
    number: int


def prompt_of(tokens: Sequence[int], labels: Sequence[int], number: int, prompt_tokens: int) -> Prompt:
    """Everything before the first label; of a text, where every token is one, the first ``prompt_tokens``."""
    from methods.data import IGNORED

    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    # A text of one token has no prompt that would leave something to be written; it stays whole.
    return Prompt(tuple(tokens[: first or max(1, min(prompt_tokens, len(tokens) - 1))]), number)


def prompts_of(part: Part, prompt_tokens: int) -> list[Prompt]:
    """The prompts of a batch, in its order."""
    lengths = part.attention_mask.sum(1).tolist()
    numbers = [-1] * len(lengths) if part.numbers is None else part.numbers.tolist()
    rows = zip(part.input_ids.tolist(), part.labels.tolist(), lengths, numbers, strict=True)
    return [
        prompt_of(ids[:length], labels[:length], number, prompt_tokens)
        for ids, labels, length, number in rows
    ]


def part_of(rollouts: Sequence[Rollout], padding: int, name: str) -> Part:
    """A padded batch of rollouts."""
    from methods.data import collate

    return collate([rollout.example() for rollout in rollouts], padding, name)


# --- writing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """How answers are written: drawn at ``temperature`` until an end mark, by one model or a mixture of several."""

    seed: int
    ends: frozenset[int]
    padding: int
    context_tokens: int
    new_tokens: int
    prompt_tokens: int
    temperature: float
    at_once: int
    top_p: float = 1.0
    entries: int | None = None

    @classmethod
    def of(cls, setting: Setting, temperature: float, top_p: float = 1.0) -> Writer:
        """As the options of a recipe that writes (``Written``) say."""
        from methods.data import padding_id

        config: Written = setting.config
        return cls(
            seed=setting.seed,
            ends=ends_of(setting),
            padding=padding_id(setting.tokenizer),
            context_tokens=config.context_tokens,
            new_tokens=config.max_new_tokens,
            prompt_tokens=config.prompt_tokens,
            temperature=temperature,
            top_p=top_p,
            at_once=config.written_at_once or config.micro_batch or config.batch,
            entries=setting.mixture.vocabulary,
        )

    def part(self, part: Part, model: Any, step: int) -> Part:
        """The same prompts with answers of the model's own."""
        rollouts = self.rollouts(prompts_of(part, self.prompt_tokens), [model], [1.0], step)
        return part_of(rollouts, self.padding, part.name)

    def rollouts(
        self, prompts: Sequence[Prompt], models: Sequence[Any], shares: Sequence[float], step: int
    ) -> list[Rollout]:
        """An answer to each prompt, drawn from the mixture of the models; the models are left as they came."""
        import torch

        from methods.generate import Mixed

        mixed = Mixed(models, shares, self.temperature or 1.0, self.entries)

        def write(mine: Sequence[int]) -> list[tuple[int, ...]]:
            with evaluating(models), torch.no_grad():
                return self._answers(mixed, device_of(models[0]), prompts, mine, step)

        answers = shared(len(prompts), write)
        return [
            Rollout(prompt.tokens, answer, prompt.number)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _answers(
        self, mixed: Any, device: torch.device, prompts: Sequence[Prompt], mine: Sequence[int], step: int
    ) -> list[tuple[int, ...]]:
        """Answers to the prompts ``mine``, in their order; those of similar length are written together."""
        from methods.generate import batches

        found: dict[int, tuple[int, ...]] = {}
        lengths = [len(prompts[row].tokens) for row in mine]
        for chosen in batches(lengths, self.at_once):
            rows = [mine[place] for place in chosen]
            written = self._written(mixed, device, [prompts[row].tokens for row in rows], rows, step)
            found |= dict(zip(rows, written, strict=True))
        return [found[row] for row in mine]

    def _written(
        self,
        mixed: Any,
        device: torch.device,
        prompts: Sequence[tuple[int, ...]],
        rows: Sequence[int],
        step: int,
    ) -> list[tuple[int, ...]]:
        from methods.generate import continued, drawn, left_padded

        limits = [min(self.new_tokens, self.context_tokens - len(prompt)) for prompt in prompts]
        # The mixture is at its temperature already; greedily means the likeliest token of the mixture.
        choose = drawn(
            [f"{self.seed}/written/{step}/{row}" for row in rows],
            1.0 if self.temperature else 0.0,
            self.top_p,
        )
        inputs, mask = (tensor.to(device) for tensor in left_padded(prompts, self.padding))
        answers = continued(mixed, inputs, mask, max(limits), set(self.ends), choose, with_end=True)
        return [tuple(answer[:limit]) for answer, limit in zip(answers, limits, strict=True)]


def ends_of(setting: Setting) -> frozenset[int]:
    """Ids that end an answer. A student of texts whose tokenizer ends nothing writes until its length is reached."""
    from methods import generate
    from methods.data import Style

    style = Style.read(setting.student_folder)
    if style.prompt != "chat" and setting.tokenizer.eos_token_id is None:
        return frozenset()
    return frozenset(generate.ends_of(setting.student, setting.tokenizer, style))


def log_chances(
    model: Any, part: Part, temperature: float = 1.0, entries: int | None = None, block: int | None = None
) -> Tensor:
    """Log-probabilities [n] of a part's answer tokens, without gradient and in evaluation mode.

    ``block`` tokens have their logits at a time; None: as many as in training.
    """
    import torch

    from methods.distill._sources import places
    from methods.term._blocks import blocks, look
    from methods.term._divergences import of_targets

    with evaluating([model]), torch.no_grad():
        part = part.to(device_of(model))
        where, seen = places(part), look(model, part, entries=entries)
        found = [
            of_targets(seen.at(where.index[rows]) / temperature, where.targets[rows])
            for rows in blocks(seen, len(where), block)
        ]
    return torch.cat(found)


# --- models and processes -----------------------------------------------------------------------------------------


@contextmanager
def evaluating(models: Sequence[Any]) -> Iterator[None]:
    """Within it the models are in evaluation mode; every module of them goes back to the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: Any) -> torch.device:
    """Where the model is."""
    device: torch.device = next(model.parameters()).device
    return device


def shared(count: int, work: Callable[[Sequence[int]], list[Item]]) -> list[Item]:
    """The results of ``work`` on all of 0..count-1, in order: each process does its share and gets the others'."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return work(range(count))
    processes = distributed.get_world_size()
    found: list[Any] = [None] * processes
    distributed.all_gather_object(found, work(range(distributed.get_rank(), count, processes)))
    whole: list[Any] = [None] * count
    for rank, results in enumerate(found):
        whole[rank::processes] = results
    return whole


def chance(*what: Any) -> float:
    """A random number in [0, 1) that depends on the arguments alone."""
    return random.Random("/".join(map(str, what))).random()
