"""Importance of tokens as people annotated it: phrases of an answer, turned into a weight for each token.

A forget row may have a column that names what matters in its answer, such as ``"important": ["Alvora", "1951"]``; with
weights from 0 upwards it is an object, ``{"Alvora": 1.0, "was born": 0.2}``. A token has the weight of the phrase that
it is a part of (the largest one where phrases overlap), and 0 outside of any; so has what ends the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError

if TYPE_CHECKING:
    from methods.data import Example

REVISION = 1
# The name of the weights in ``Part.extra``.
IMPORTANCE = "importance"

Span = tuple[int, int]


def annotated(
    rows: Sequence[Mapping[str, Any]], examples: Sequence[Example], tokenizer: Any, column: str
) -> list[Example]:
    """The examples with ``extra["importance"]``, a weight for each target, from a column of their rows.

    Raises:
        AssayError: rows of text; a row without the column, or with a phrase that its answer does not contain.
    """
    if not all(isinstance(row.get("answer"), str) for row in rows):
        raise AssayError(
            f"annotations={column!r} names phrases of answers: give rows with a question and an answer."
        )
    found = [
        _with_weights(example, row["answer"], _phrases(row, column, number), tokenizer, number)
        for number, (row, example) in enumerate(zip(rows, examples, strict=True))
    ]
    if not any(weight > 0 for example in found for weight in example.extra[IMPORTANCE]):
        raise AssayError(
            f"annotations={column!r} leaves no token of any row that counts: nothing is forgotten."
        )
    return found


def _phrases(row: Mapping[str, Any], column: str, number: int) -> dict[str, float]:
    """The phrases that a row names, with their weights."""
    named = row.get(column)
    if isinstance(named, str):
        named = [named]
    if isinstance(named, list):
        named = dict.fromkeys(named, 1.0)
    if not isinstance(named, dict) or not all(_is_weighted(*item) for item in named.items()):
        raise AssayError(
            f"row {number}: column {column!r} must name phrases of the answer as a text, a list of texts or an object "
            f"of texts and weights from 0 upwards, but it is {row.get(column)!r}."
        )
    for phrase in named:
        if phrase not in row["answer"]:
            raise AssayError(
                f"row {number}: column {column!r} names {phrase!r}, which its answer does not contain: "
                f"{row['answer'][:80]!r}."
            )
    return {phrase: float(weight) for phrase, weight in named.items()}


def _is_weighted(phrase: Any, weight: Any) -> bool:
    return isinstance(phrase, str) and phrase != "" and isinstance(weight, int | float) and weight >= 0


def _with_weights(
    example: Example, answer: str, phrases: Mapping[str, float], tokenizer: Any, number: int
) -> Example:
    from methods.data import IGNORED

    first = next(place for place, label in enumerate(example.labels) if label != IGNORED)
    named = [
        (match.span(), weight)
        for phrase, weight in phrases.items()
        for match in re.finditer(re.escape(phrase), answer)
    ]
    weights = [0.0] * len(example.input_ids)
    for place, token in enumerate(_places(answer, example.input_ids[first:], tokenizer, number), first):
        weights[place] = max((weight for span, weight in named if _overlap(span, token)), default=0.0)
    # The value at t belongs to the target that position t predicts, the token at t + 1.
    return replace(example, extra={**example.extra, IMPORTANCE: tuple(weights[1:])})


def _places(answer: str, tokens: Sequence[int], tokenizer: Any, number: int) -> Iterator[Span]:
    """Where in the answer each token comes from, from the first one on.

    An answer is encoded with a blank before it or without one, as its prompt asks for; the tokens tell which.
    """
    for blank in (" ", ""):
        encoded = tokenizer(
            blank + answer, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        count = min(len(tokens), len(encoded["input_ids"]))
        if list(tokens[:count]) == encoded["input_ids"][:count]:
            for start, end in encoded["offset_mapping"][:count]:
                yield start - len(blank), end - len(blank)
            return
    raise AssayError(f"row {number}: the tokens of its answer cannot be found again in {answer[:80]!r}.")


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
