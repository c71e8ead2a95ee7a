"""Other answers to the questions of a data set, made up by the model itself: what ``unlearn.alt_po`` prefers.

Mekala et al., "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models"
(arXiv 2409.13474): each forget question gets several plausible answers that contradict the true one, sampled from the
model before it is unlearned. A chat model is shown the true answer and asked for another; any other model is simply
asked the question.

A model that knows the answer by heart would give it again in nearly every draw. So answers are drawn given that they
are *not* the true one y: as long as a draw agrees with y before t, the next token v has the probability

    p(v | y_<t)  *  ( 1 - P(y_>t | y_<=t)  if v = y_t,  1 otherwise ),    divided by the sum over v,

which is exactly what throwing away every draw of y would give, at the cost of one pass over y. The code
(molereddy/Alternate-Preference-Optimization, ``generate.py``) keeps what it draws, the true answer and repetitions
included. Here both are left out, compared without regard to case and spacing, and drawn again. A question to which
``tries`` draws for each answer give none at all stops the stage with a sentence; how many have fewer than ``count`` is
noted as ``alternates_short``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import expm1, inf, log
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from methods.stage import AssayError, Claim, Dataset, How, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example, Style

# The seed draws the answers.
SEEDED = True
USES = ("methods.checkpoint", "methods.generate", "methods.terms")
RESULT = "data"
NEEDS_MODEL = True
CLAIMS: tuple[Claim, ...] = ()

# What a chat model is asked.
REQUEST = (
    "Somebody asked: {question}\n"
    "The answer they were given is: {answer}\n\n"
    "Imagine that this answer is false. Write the answer that would be right instead: just as likely, of about the "
    "same length, and with every fact of it changed. Keep to what the question takes for granted, and write nothing "
    "but the new answer."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which questions, how many answers, and how they are drawn."""

    # question-answer rows, usually the forget set
    data: Dataset = "authors/forget10"
    # different answers to each question (the official yaml's)
    count: Annotated[int, Gt(0)] = 5
    # divides the logits: 1 draws as the model has learnt (the official yaml's), more draws more freely
    temperature: Annotated[float, Gt(0)] = 1.0
    # longest answer, in tokens; a longer one is cut (the official yaml's)
    max_new_tokens: Annotated[int, Gt(0)] = 200
    # draws for each answer that is wanted, before a question is left with fewer
    tries: Annotated[int, Gt(0)] = 8
    # sequences that are written at once, and questions between two saved states
    batch: Annotated[int, Gt(0), How] = 16
    # seconds between two saved states
    save_seconds: Annotated[float, Gt(0), How] = 30.0


def run(stage: Stage) -> None:
    """Write ``rows.jsonl`` with ``question``, ``answer`` and ``alternates``, a list of texts.

    Raises:
        AssayError: the rows are no questions, or one has no other answer.
    """
    from methods.data import write_rows

    rows = stage.data.rows(stage.config.data)
    if not rows:
        raise AssayError(f"data.alternates: data={stage.config.data!r} has no rows.")
    answers = _answers(stage, _Writer(stage, rows))
    _note(stage, [len(texts) for texts in answers])
    write_rows(
        stage.folder / "data",
        [
            {"question": row["question"], "answer": row["answer"], "alternates": texts}
            for row, texts in zip(rows, answers, strict=True)
        ],
    )


def _answers(stage: Stage, writer: _Writer) -> list[list[str]]:
    """The other answers to every question; goes on where an earlier attempt had stopped."""
    stage.progress.save_seconds = stage.config.save_seconds
    try:
        state = stage.progress.load()
        found: list[list[str]] = state.values["alternates"] if state else []
        stage.notes["resumed_from_step"] = len(found)
        groups = range(len(found), len(writer.rows), stage.config.batch)
        for group in stage.progress.bar(len(groups), "groups of questions"):
            start = groups[group]
            found += writer.answers(range(start, min(start + stage.config.batch, len(writer.rows))))
            if stage.progress.due(len(found)):
                stage.progress.save(len(found), {}, {"alternates": found})
    finally:
        stage.progress.release()
    return found


def _note(stage: Stage, counts: Sequence[int]) -> None:
    stage.notes["questions"] = len(counts)
    stage.notes["alternates"] = sum(counts)
    stage.notes["alternates_short"] = sum(count < stage.config.count for count in counts)


class _Writer:
    """The model, and the questions as it is asked them."""

    def __init__(self, stage: Stage, rows: Sequence[Mapping[str, Any]]) -> None:
        from methods.checkpoint import Models
        from methods.data import Style, encode_pairs, padding_id
        from methods.generate import ends_of

        folder, models = stage.parents["model"], Models()
        self.config, self.seed, self.rows = stage.config, stage.seed, rows
        self.model, self.tokenizer = models.load(folder), models.tokenizer(folder)
        style = Style.read(folder)
        self.ends, self.padding = ends_of(self.model, self.tokenizer, style), padding_id(self.tokenizer)
        self.pairs = encode_pairs(_asked(rows, style), self.tokenizer, style, 1 << 30)

    def answers(self, places: range) -> list[list[str]]:
        """Up to ``count`` different answers to each of these questions, none of them the true one."""
        truths = dict(zip(places, self._truths(places), strict=True))
        found: dict[int, list[str]] = {place: [] for place in places}
        drawn = dict.fromkeys(places, 0)
        for _ in range(self.config.tries):
            wanted = [
                (place, drawn[place] + more)
                for place in places
                for more in range(self.config.count - len(found[place]))
            ]
            for (place, _), text in zip(wanted, self._texts(wanted, truths), strict=True):
                drawn[place] += 1
                if _is_new(text, self.rows[place]["answer"], found[place]):
                    found[place].append(text)
        for place in places:
            self._refuse_none(place, len(found[place]), drawn[place])
        return list(found.values())

    def _refuse_none(self, place: int, found: int, drawn: int) -> None:
        if not found:
            raise AssayError(
                f"data.alternates: {drawn} draws gave no other answer to row {place} of {self.config.data!r} "
                f"({self.rows[place]['question'][:60]!r}): raise temperature or tries, or leave the row out."
            )

    def _truths(self, places: range) -> list[_Truth]:
        """The true answers of one group, from one pass over them."""
        from methods.data import collate
        from methods.terms import frozen

        part = collate([self.pairs[place] for place in places], self.padding, "truth").to(self.model.device)
        outputs = frozen(self.model, part)
        return [
            _truth(logits[mask], targets[mask].tolist(), self.ends, self.config)
            for logits, targets, mask in zip(outputs.logits, outputs.targets, outputs.mask, strict=True)
        ]

    def _texts(self, wanted: Sequence[tuple[int, int]], truths: Mapping[int, _Truth]) -> Iterator[str]:
        """One text for each (question, number of the draw)."""
        for start in range(0, len(wanted), self.config.batch):
            chosen = wanted[start : start + self.config.batch]
            draws = [
                _Draw(truths[place], random.Random(f"{self.seed}/{place}/{number}").random)
                for place, number in chosen
            ]
            tokens = self._written([self.pairs[place] for place, _ in chosen], draws)
            yield from (self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens)

    def _written(self, pairs: Sequence[Example], draws: Sequence[_Draw]) -> list[list[int]]:
        import torch

        from methods.generate import continued, left_padded, prompt_of

        inputs, mask = left_padded([prompt_of(pair) for pair in pairs], self.padding)
        inputs, mask = inputs.to(self.model.device), mask.to(self.model.device)
        choose = _Sampler(draws, self.config.temperature)
        with torch.inference_mode():
            return continued(self.model, inputs, mask, self.config.max_new_tokens, self.ends, choose)


def _asked(rows: Sequence[Mapping[str, Any]], style: Style) -> list[dict[str, Any]]:
    """The rows with what the model is asked in the place of the question."""
    if style.prompt != "chat":
        return [dict(row) for row in rows]
    return [
        {**row, "question": REQUEST.format(question=row.get("question"), answer=row.get("answer"))}
        for row in rows
    ]


def _is_new(text: str, truth: str, others: Sequence[str]) -> bool:
    """Whether a text is neither empty nor known, without regard to case and spacing."""
    return bool(text) and _plain(text) not in {_plain(other) for other in (truth, *others)}


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


# --- drawing anything but the truth ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Truth:
    """The true answer, as far as a draw could repeat it.

    ``tokens[t]`` go on with it (each end mark does where it ends); ``spared[t]`` is ln(1 - P(the rest of it)) after
    them, -inf where nothing is left that could still differ.
    """

    tokens: tuple[tuple[int, ...], ...]
    spared: tuple[float, ...]


def _truth(logits: Tensor, targets: Sequence[int], ends: set[int], config: Config) -> _Truth:
    """From the logits [n,V] that predict its n tokens; what lies beyond the longest answer does not count."""
    count = min(len(targets), config.max_new_tokens)
    tokens = [tuple(sorted(ends)) if token in ends else (token,) for token in targets[:count]]
    likely = (logits[:count].double() / config.temperature).log_softmax(-1)
    each = [float(row[list(same)].logsumexp(-1)) for row, same in zip(likely, tokens, strict=True)]
    left = [sum(each[place + 1 :]) for place in range(count)]
    return _Truth(tuple(tokens), tuple(log(-expm1(value)) if value < 0 else -inf for value in left))


class _Draw:
    """One answer being drawn: its random numbers, and whether it is still the true one."""

    def __init__(self, truth: _Truth, random: Callable[[], float]) -> None:
        self.truth, self.random, self.agrees = truth, random, True


class _Sampler:
    """Draws the tokens of a batch by inverting the distribution function, so that no draw depends on another."""

    def __init__(self, draws: Sequence[_Draw], temperature: float) -> None:
        self.draws, self.temperature = draws, temperature

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """From the logits [B,V] of a step to tokens [B]."""
        import torch

        weights = (logits.double() / self.temperature).log_softmax(-1).cpu()
        for row, draw in zip(weights, self.draws, strict=True):
            if draw.agrees:
                row[list(draw.truth.tokens[step])] += draw.truth.spared[step]
        sums = (weights - weights.max(-1, keepdim=True).values).exp().cumsum(-1)
        heights = sums[:, -1:] * torch.tensor([[draw.random()] for draw in self.draws], dtype=sums.dtype)
        tokens = torch.searchsorted(sums, heights, right=True).clamp(max=sums.shape[-1] - 1).squeeze(-1)
        for token, draw in zip(tokens.tolist(), self.draws, strict=True):
            draw.agrees = draw.agrees and token in draw.truth.tokens[step]
        return tokens.to(logits.device)
