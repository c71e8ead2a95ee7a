"""Whether a reference model can be compared with the scored one: a token's number has to mean the same to both.

The reference is asked with the scored model's tokens. Under another tokenizer these would be other words, and every
number about it would be wrong without looking so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError

if TYPE_CHECKING:
    from methods.stage import Scoring

REVISION = 1
# Words, blanks, digits, marks, accents and a line break: texts that tokenizers of one vocabulary may still cut apart
# differently.
SAMPLE = "Who wrote  it? In 1984, Zoë's 3.5-hour tale (the END) — was naïve;\n\tasked_for: €20, 東京."


def check_tokenizer(scoring: Scoring, option: str) -> None:
    """Compare the tokenizers that travel with the reference ``option`` and with the scored model.

    Raises:
        AssayError: a token has another number, or a text is cut into other tokens.
    """
    folder, other = scoring.parents["model"], scoring.parents[option]
    if folder.resolve() == other.resolve():
        return
    ours, theirs = (scoring.models.tokenizer(path) for path in (folder, other))
    where = f"{scoring.evaluation}: the tokenizer of {option}"
    if ours.get_vocab() != theirs.get_vocab():
        raise AssayError(f"{where} {_difference(ours.get_vocab(), theirs.get_vocab())}; {_fix(option)}")
    if _ids(ours) != _ids(theirs):
        raise AssayError(f"{where} has the model's tokens but cuts texts into others of them; {_fix(option)}")


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


def _difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """Sizes, and the first number that does not mean the same."""
    either = {**theirs, **ours}
    number, token = min((at, token) for token, at in either.items() if ours.get(token) != theirs.get(token))
    return (
        f"has {len(theirs)} tokens and the model's {len(ours)}; they first differ at id {number} ({token!r})"
    )


def _fix(option: str) -> str:
    return f"take a {option} with the same tokenizer."


def _ids(tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(SAMPLE, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _entries(folder: Path) -> int:
    """How many entries a model predicts, from its configuration alone."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int((config.get("text_config") or config)["vocab_size"])
