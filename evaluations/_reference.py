"""Whether a reference model can be compared with the scored one: a token's number has to mean the same to both.

The reference is asked with the scored model's tokens. Under another tokenizer these would be other words, and every
number about it would be wrong without looking so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from methods.stage import AssayError

if TYPE_CHECKING:
    from methods.stage import Scoring

REVISION = 1


def check_tokenizer(scoring: Scoring, option: str) -> None:
    """Compare the tokenizers that travel with the reference ``option`` and with the scored model.

    Raises:
        AssayError: a token has another number, or a text is cut into other tokens.
    """
    folder, other = scoring.parents["model"], scoring.parents[option]
    if folder.resolve() == other.resolve():
        return
    from methods.checkpoint import tokenizer_difference

    ours, theirs = (scoring.models.tokenizer(path) for path in (folder, other))
    difference = tokenizer_difference(ours, theirs, "model")
    if difference:
        raise AssayError(f"{scoring.evaluation}: the tokenizer of {option} {difference}; {_fix(option)}")


def check_vocabulary(scoring: Scoring, option: str) -> None:
    """As ``check_tokenizer``, and both models must give a probability to as many entries.

    Raises:
        AssayError: one predicts more entries than the other, or the tokenizers differ.
    """
    model, reference = (_entries(scoring.parents[name]) for name in ("model", option))
    if model != reference:
        raise AssayError(
            f"{scoring.evaluation} compares distributions over one vocabulary, but the {option} has {reference} "
            f"entries and the model {model}; {_fix(option)}"
        )
    check_tokenizer(scoring, option)


def _fix(option: str) -> str:
    return f"take a {option} with the same tokenizer."


def _entries(folder: Path) -> int:
    """How many entries a model predicts, from its configuration alone."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int((config.get("text_config") or config)["vocab_size"])
