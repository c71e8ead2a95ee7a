"""LinguDistill: a language model teaches what was made of it, looking at the text through the other's keys and values.

Irawan et al., "LinguDistill: Recovering Linguistic Ability in Vision-Language Models via Selective Cross-Modal
Distillation". In every layer l the frozen original model attends to the student's keys and values, after the rotary
embedding and without their gradient; its queries come from its own residual stream:

    attention_l = softmax( q_l(teacher) k_l(student)' / sqrt(d) ) v_l(student)
    L = 1/M sum over rows that are distilled of kl T**2 D( p_T || q_T ) + over the others of cross_entropy (- log q(y))

with M the answer tokens of all rows. A teacher that sees no images gets to know them by what the student has made of
them. Where student and teacher are the same model on a text, sharing changes nothing.

No code was found, and of the paper only its abstract: weights, temperature and the list of data are not verified; those
here are ours, 1 everywhere. Student and teacher need the same layers, key-value heads, head size, rotary embedding and
tokenizer. The rows of this project are text, so that keys and queries have the same positions; a student with an eye
would have its images' positions among the keys alone, and no rows for that are built in.

``curve.csv``: ``selective`` and its two sums over M, ``selective.forward_kl`` and ``selective.cross_entropy``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from methods import distill, term
from methods.stage import AssayError, Claim, Component, Stage
from methods.term.selective import MARK

if TYPE_CHECKING:
    from methods.data import Example
    from methods.distill._shared_keys import Kept, SharedKeys
    from methods.term import Setting

SEEDED = True
USES = (
    "methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.term",
    "methods.distill._shared_keys",
)  # fmt: skip
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(distill.Taught):
    """The shared recipe, the weights, and which rows are distilled."""

    # weight of the divergence on rows that are distilled (not verified)
    kl: Annotated[float, Ge(0)] = 1.0
    # weight of the cross-entropy on the others (not verified)
    cross_entropy: Annotated[float, Ge(0)] = 1.0
    # both distributions are softened by it (not verified)
    temperature: Annotated[float, Gt(0)] = 1.0
    # the column that says of each row whether it is distilled (true or false); None: all are
    distilled: str | None = None

    def __post_init__(self) -> None:
        """Keys and values are those of the model's own weights."""
        if self.kl == 0:
            raise AssayError(
                "distill.lingu_distill: kl is 0, so the teacher teaches nothing; use distill.cross_entropy."
            )


def terms(config: Config) -> tuple[Component, ...]:
    """One term that is the divergence or the cross-entropy, row by row."""
    return (
        term.of(
            "selective", kl=config.kl, cross_entropy=config.cross_entropy, temperature=config.temperature
        ),
    )


def source(config: Config, setting: Setting) -> SharedKeys:
    """The teacher, behind what the student attends to."""
    from methods.distill._shared_keys import Kept, SharedKeys

    live: Any = setting.source
    return SharedKeys(live.model, live.entries, Kept(setting.student))


def masking(config: Config, setting: Setting) -> Kept:
    """What keeps the student's keys and values of every pass."""
    teacher: Any = setting.source
    kept: Kept = teacher.kept
    return kept


def parts(config: Config, setting: Setting) -> Mapping[str, Sequence[Example]]:
    """The rows with a mark on those that are distilled."""
    from methods.likelihood import with_extra

    if config.distilled is None:
        return {}
    marks = marks_of(setting.stage.rows("data"), config.distilled)
    lengths = [len(example.input_ids) - 1 for example in setting.examples]
    values = [[float(mark)] * length for mark, length in zip(marks, lengths, strict=True)]
    return {"train": with_extra(setting.examples, MARK, values)}


def marks_of(rows: Sequence[Mapping[str, Any]], column: str) -> list[bool]:
    """What a column says of each row.

    Raises:
        AssayError: the rows are text without borders, or one of them says neither true nor false.
    """
    for number, row in enumerate(rows):
        if "question" not in row:
            raise AssayError(
                f"distilled={column!r} marks rows, and text is cut into windows across them: give rows with the "
                "columns question and answer."
            )
        if not isinstance(row.get(column), bool):
            found = "it is missing" if column not in row else f"it is {row[column]!r}"
            raise AssayError(
                f"row {number} of the data needs true or false in the column {column!r} ({found}); distilled names it."
            )
    return [bool(row[column]) for row in rows]


def run(stage: Stage) -> None:
    """Compare the two models' shapes and look at the marks before anything is loaded; then train."""
    from methods.distill._shared_keys import refuse_unshareable

    refuse_unshareable(stage.parents["model"], stage.parents["teacher"])
    if stage.config.distilled is not None:
        marks_of(stage.rows("data"), stage.config.distilled)
    distill.run(stage, sys.modules[__name__])
