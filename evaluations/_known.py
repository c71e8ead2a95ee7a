"""What a model knows of the rows of a data set: the loss of the true answers, and a choice among wrong ones.

For evaluations that ask the same rows again and again while something is done to the model. ``N`` is items: question-
answer rows, or windows of a text. Both numbers are those of ``evaluations/tofu.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError

if TYPE_CHECKING:
    from numpy import ndarray

    from methods.data import Example
    from methods.stage import Scoring

REVISION = 1
WRONG_OPTIONS = 3


@dataclass(frozen=True)
class Asked:
    """N items as a model is asked them. ``options`` has each row's answers to choose from, the right one first.

    It is empty where rows have no wrong answers. ``end`` is how many tokens close an answer, ``padding`` an id to pad
    with.
    """

    true: Sequence[Example]
    options: Sequence[Sequence[Example]]
    end: int
    padding: int


@dataclass(frozen=True)
class Known:
    """Of each item [N] the summed loss of its true answer in nats, its tokens, and whether the choice was right.

    ``right`` is None where there was nothing to choose from; a tie is shared out.
    """

    losses: ndarray
    tokens: ndarray
    right: ndarray | None

    def of(self, items: Sequence[int]) -> Known:
        """Some of the items."""
        chosen = list(items)
        return Known(
            self.losses[chosen], self.tokens[chosen], None if self.right is None else self.right[chosen]
        )


def ask(scoring: Scoring, data: str, limit: int | None = None, choices: bool = True) -> Asked:
    """Encode a data set as the scored model is spoken to, cut at the config's ``context_tokens``.

    Rows are asked for their choice in an unseen phrasing where they have one, as in TOFU.

    Raises:
        AssayError: no rows, an empty answer, or rows that are neither question-answer nor text.
    """
    from methods.data import Style, encode, encode_pairs, padding_id

    rows = scoring.data.rows(data)[:limit]
    _refuse_empty(rows, data)
    tokenizer, style = scoring.tokenizer(), Style.read(scoring.parents["model"])
    cut = scoring.config.context_tokens
    several = choices and all(row.get("perturbed_answer") for row in rows)
    asked = [list(_options(row)) for row in rows] if several else []
    encoded = iter(encode_pairs([pair for row in asked for pair in row], tokenizer, style, cut))
    options = [[next(encoded) for _ in row] for row in asked]
    end = len(style.answer_end(tokenizer))
    return Asked(encode(rows, tokenizer, style, cut), options, end, padding_id(tokenizer))


def _refuse_empty(rows: Sequence[dict[str, Any]], data: str) -> None:
    if not rows:
        raise AssayError(f"the data set {data} has no rows.")
    for number, row in enumerate(rows):
        if isinstance(row.get("answer"), str) and not row["answer"].strip():
            raise AssayError(f"row {number} of {data} has an empty answer: leave the row out.")


def _options(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The right answer and the first wrong ones, as question-answer rows."""
    question = row.get("paraphrased_question") or row["question"]
    right = row.get("paraphrased_answer", row["answer"])
    for answer in (right, *row["perturbed_answer"][:WRONG_OPTIONS]):
        yield {"question": question, "answer": answer}


def choice(likelihoods: Sequence[float]) -> float:
    """1 if the first option is the most likely; a tie is shared out, so a collapsed model sits at chance."""
    best = max(likelihoods)
    return (likelihoods[0] == best) / likelihoods.count(best)


def measure(model: Any, asked: Asked, batch: int) -> Known:
    """Ask the model, ``batch`` sequences at once."""
    import numpy as np

    from evaluations._likelihood import score

    flat = [example for row in asked.options for example in row]
    answers = score(model, [*asked.true, *flat], asked.padding, batch)
    true, rest = answers[: len(asked.true)], iter(answers[len(asked.true) :])
    likelihoods = [[next(rest).text_log_likelihood(asked.end) for _ in row] for row in asked.options]
    return Known(
        np.array([float(answer.losses.sum()) for answer in true]),
        np.array([len(answer.losses) for answer in true]),
        np.array([choice(row) for row in likelihoods]) if likelihoods else None,
    )
