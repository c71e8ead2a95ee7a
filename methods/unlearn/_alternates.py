"""Alternate answers of a data stage (``data.alternates``) as examples beside the forget rows.

``methods.unlearn``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError

if TYPE_CHECKING:
    from methods.data import Style, Variants


def examples(
    folder: Path, questions: Sequence[str], tokenizer: Any, style: Style, context_tokens: int
) -> Variants:
    """For each question its alternate answers, in the order of the questions.

    Args:
        folder: the ``data/`` folder of a stage whose rows hold ``question`` and ``alternates``, a list of texts.
    Raises:
        AssayError: a question has no row there, or its row no answers.
    """
    from methods.data import Variants, encode_pairs, read_rows

    answers = {str(row.get("question")): row.get("alternates") for row in read_rows(folder)}
    for number, question in enumerate(questions):
        if not answers.get(question):
            raise AssayError(
                f"the alternates have no answer to row {number} of the forget set ({question[:60]!r}): "
                "make them from the same questions."
            )
    pairs = [
        [{"question": question, "answer": text} for text in answers[question] or ()] for question in questions
    ]
    return Variants([encode_pairs(rows, tokenizer, style, context_tokens) for rows in pairs])
