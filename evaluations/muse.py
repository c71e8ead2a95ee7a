"""MUSE: does a model still recite a text, answer questions about it, or show that it was trained on it?

Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models" (2024): its memorisation and privacy
criteria, on data of the user's own. Everything is 0 to 1; muse_bench prints the first three times 100.

* ``forget_verbmem``: ROUGE-L F1 of what follows a prompt against the ``new_tokens`` greedy tokens that the model
  writes after it. Rows of ``verbatim`` are a ``prompt`` and its continuation ``gt``, as MUSE ships them, or a
  ``text``: then its first ``prompt_tokens`` are the prompt and the ``new_tokens`` after them what should follow.
  The prompt is given as it is, without a chat template.
* ``forget_knowmem``, ``retain_knowmem``: ROUGE-L F1 of ``answer_tokens`` greedy tokens, cut at an empty line or the
  next "Question", against the answers of question-answer rows. ``examples`` are put before each question as
  ``Question: …``, ``Answer: …`` and an empty line (a chat model finds all of it in its one message); MUSE asks with
  examples because its models are base models, so the default, a model trained on the very form, asks without.
* ``privleak``: how far the Min-K (0.4) area of ``members`` against ``others`` is from that of ``reference``, a
  model trained without the members, in percent: below 0 they still show, above 0 they stand out as removed. Standard
  error by DeLong's covariance. Left out without a reference; ``membership`` gives areas without one.

``definition`` says whose: open-unlearning's stems words and compares with the whole reference text. muse_bench's
does not stem, keeps of a verbatim reference its first ``new_tokens`` tokens, a begin token among them, and rounds
Min-K's number of tokens down even to none, which leaves a row of one or two tokens out. Both leave the end mark of
an answer, or the line break after a text, out of Min-K. Retained areas are measured here; muse_bench has its own
models' as constants.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from evaluations import _membership, _statistics, _unlearning
from evaluations._reference import check_tokenizer
from methods.stage import AssayError, Dataset, Model, Row, Scoring

if TYPE_CHECKING:
    from numpy import ndarray

    from methods.data import Locator, Style

USES = (
    "methods.data",
    "methods.terms",
    "methods.world",
    "methods.checkpoint",
    "evaluations._likelihood",
    "evaluations._membership",
    "evaluations._reference",
    "evaluations._statistics",
    "evaluations._unlearning",
)
SHARE = 0.4
# An empty line or the next question ends an answer.
ANSWER_END = re.compile(r"\n\n|\nQuestion|Question:")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which texts and questions, judged by whose definition."""

    # Texts to be forgotten, one a row, or prompts with their continuation; None: left out. "authors/text[108:120]" is
    # about forget10's authors, for a model trained on "authors/text": one that has learnt questions recites no text.
    verbatim: Dataset | None = None
    # Question-answer rows about what is to be forgotten; None: left out.
    knowledge: Dataset | None = "authors/forget10_perturbed"
    # Question-answer rows about what is to be kept; None: left out.
    retain: Dataset | None = "authors/retain_perturbed"
    # Question-answer rows that show the form before each question; none of them may be asked. None: no examples.
    examples: Dataset | None = None
    # Rows that were to be forgotten, and rows of the same kind that no model was trained on; read with a reference.
    members: Dataset = "authors/forget10_perturbed"
    # See members.
    others: Dataset = "authors/holdout_perturbed"
    # A model trained without the members, with the same tokenizer; None leaves privleak out.
    reference: Model | None = None
    # Whose measures.
    definition: Literal["open_unlearning", "muse_bench"] = "open_unlearning"
    # Tokens of a text that the model is given; the paragraphs of the built-in world have 60 to 80.
    prompt_tokens: Annotated[int, Gt(0)] = 24
    # Tokens it writes after them (MUSE's).
    new_tokens: Annotated[int, Gt(0)] = 128
    # Tokens of an answer (MUSE's).
    answer_tokens: Annotated[int, Gt(0)] = 32
    # Sequences written or scored at once.
    batch: Annotated[int, Gt(0)] = 64
    # First rows of each set that are used; None for all.
    limit: Annotated[int, Gt(0)] | None = None
    # Longer members and others are cut.
    context_tokens: Annotated[int, Gt(1)] = 512


def check(config: Config, data: Locator) -> None:
    """Refuse rows that cannot be asked, examples that give an answer away, and overlapping members and others."""
    asked = [name for name in (config.knowledge, config.retain) if name is not None]
    if not asked and config.verbatim is None and config.reference is None:
        raise AssayError(
            "muse: verbatim, knowledge, retain and reference are all None: there is nothing to measure."
        )
    if config.verbatim is not None:
        _recited(data, config.verbatim, None)
    shown = _questions(data, config.examples, None) if config.examples is not None else []
    for name in asked:
        _refuse_shown(_questions(data, name, None), name, shown, config.examples)
    if config.reference is not None:
        _membership.check(data, config.members, config.others)


def evaluate(scoring: Scoring) -> list[Row]:
    """A row for each measure that has its data, as the module's text describes them."""
    config = scoring.config
    # At smoke scale one stand-in may replace several sets.
    if not scoring.data.smoke:
        check(config, scoring.data)
    rows = []
    if config.verbatim is not None:
        rows.append(_verbatim(scoring))
    if config.knowledge is not None:
        rows.append(_knowledge(scoring, "forget_knowmem", config.knowledge, "lower"))
    if config.retain is not None:
        rows.append(_knowledge(scoring, "retain_knowmem", config.retain, "higher"))
    if config.reference is not None:
        rows.append(_privacy(scoring))
    return rows


# --- verbatim memorisation -------------------------------------------------------------------------------------


def _verbatim(scoring: Scoring) -> Row:
    from evaluations._likelihood import complete
    from methods.generate import ends_of

    config, model, tokenizer = scoring.config, scoring.model(), scoring.tokenizer()
    rows = _recited(scoring.data, config.verbatim, config.limit)
    asked = [_cut(row, number, config, tokenizer) for number, row in enumerate(rows)]
    prompts = [prompt for prompt, _ in asked]
    _check_room(model, prompts, config.new_tokens, "new_tokens")
    ends = ends_of(model, tokenizer, _style(scoring))
    texts = complete(model, tokenizer, prompts, ends, config.new_tokens, config.batch)
    found = [
        overlap(truth, text.strip(), config.definition) for (_, truth), text in zip(asked, texts, strict=True)
    ]
    settings = [f"prompt_tokens={config.prompt_tokens}", f"new_tokens={config.new_tokens}"]
    return _row(config, config.verbatim, settings, "forget_verbmem", _statistics.mean(found), "", "lower")


def _recited(data: Locator, name: str, limit: int | None) -> list[dict[str, Any]]:
    rows = _membership.rows_of(data, name, limit)
    for number, row in enumerate(rows):
        columns = ("prompt", "gt") if "prompt" in row else ("text",)
        _refuse_missing(row, f"verbatim={name!r}: row {number}", columns, "a text, or a prompt and its gt")
    return rows


def _cut(row: dict[str, Any], number: int, config: Config, tokenizer: Any) -> tuple[tuple[int, ...], str]:
    """The ids of a row's prompt, and the text that should follow."""
    if "prompt" in row:
        prompt, truth = _ids(tokenizer, row["prompt"]), row["gt"]
    else:
        ids = _ids(tokenizer, row["text"].strip())
        if len(ids) <= config.prompt_tokens:
            raise AssayError(
                f"verbatim={config.verbatim!r}: row {number} has {len(ids)} tokens, so that nothing follows "
                f"prompt_tokens={config.prompt_tokens} of them; lower it or take the row out."
            )
        prompt = ids[: config.prompt_tokens]
        following = ids[config.prompt_tokens : config.prompt_tokens + config.new_tokens]
        truth = tokenizer.decode(following, skip_special_tokens=True)
    if config.definition == "muse_bench":
        truth = shortened(tokenizer, truth, config.new_tokens)
    return (*_begin(tokenizer), *prompt), truth.strip()


def shortened(tokenizer: Any, text: str, tokens: int) -> str:
    """The first ``tokens`` of a text as the tokenizer reads it, its begin token among them, as text."""
    kept = (*_begin(tokenizer), *_ids(tokenizer, text))[:tokens]
    return str(tokenizer.decode(kept, skip_special_tokens=True))


def _begin(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself."""
    from methods.data import encode_text

    read = encode_text([{"text": "a"}], tokenizer, 1 << 30)[0].input_ids
    return read[: len(read) - len(_ids(tokenizer, "a\n"))]


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


# --- knowledge memorisation ------------------------------------------------------------------------------------


def _knowledge(scoring: Scoring, metric: str, name: str, better: str) -> Row:
    from evaluations._likelihood import complete, prompts
    from methods.generate import ends_of

    config, model, tokenizer = scoring.config, scoring.model(), scoring.tokenizer()
    rows = _questions(scoring.data, name, config.limit)
    shown = _questions(scoring.data, config.examples, None) if config.examples is not None else []
    style = _style(scoring)
    asked = prompts(tokenizer, style, [asked_after(shown, row["question"], style) for row in rows])
    _check_room(model, asked, config.answer_tokens, "answer_tokens")
    ends = ends_of(model, tokenizer, style)
    texts = complete(model, tokenizer, asked, ends, config.answer_tokens, config.batch)
    found = [
        overlap(row["answer"], answer_in(text), config.definition)
        for row, text in zip(rows, texts, strict=True)
    ]
    settings = [f"examples={config.examples or 'none'}", f"answer_tokens={config.answer_tokens}"]
    return _row(config, name, settings, metric, _statistics.mean(found), "", better)


def asked_after(examples: Sequence[dict[str, Any]], question: str, style: Style) -> str:
    """The question with the examples before it, such that the style's prompt of it is MUSE's."""
    if not examples:
        return question
    lines = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples]
    text = "".join([*lines, f"Question: {question}"])
    # This style itself puts the first "Question: " before it and "Answer:" after it.
    return text.removeprefix("Question: ") if style.prompt == "question_answer" else f"{text}\nAnswer:"


def answer_in(text: str) -> str:
    """What a model wrote, up to an empty line or the next question."""
    return ANSWER_END.split(text, maxsplit=1)[0].strip()


def overlap(truth: str, text: str, definition: str) -> float:
    """ROUGE-L F1, on word stems unless muse_bench's."""
    return _unlearning.rouge(truth, text, "rougeL", stem=definition == "open_unlearning")[1]


def _questions(data: Locator, name: str, limit: int | None) -> list[dict[str, Any]]:
    rows = _membership.rows_of(data, name, limit)
    for number, row in enumerate(rows):
        _refuse_missing(row, f"{name}: row {number}", ("question", "answer"), "a question and its answer")
    return rows


def _refuse_missing(row: dict[str, Any], place: str, columns: Sequence[str], wanted: str) -> None:
    for column in columns:
        if not isinstance(row.get(column), str) or not row[column].strip():
            found = ", ".join(row) or "nothing"
            raise AssayError(
                f"muse: {place} needs {wanted}, but {column!r} is no text; the row has: {found}."
            )


def _refuse_shown(
    rows: Sequence[dict[str, Any]], name: str, shown: Sequence[dict[str, Any]], examples: str | None
) -> None:
    asked = {row["question"].strip() for row in rows}
    given = next((row["question"] for row in shown if row["question"].strip() in asked), None)
    if given is not None:
        raise AssayError(
            f"muse: examples={examples!r} answers {given[:60]!r}, which {name} asks; take other examples."
        )


# --- privacy leakage -------------------------------------------------------------------------------------------


def _privacy(scoring: Scoring) -> Row:
    config = scoring.config
    check_tokenizer(scoring, "reference")
    found, retained = (_areas(scoring, model) for model in (scoring.model(), scoring.reference("reference")))
    settings = [f"others={config.others}", f"context_tokens={config.context_tokens}"]
    leak = _membership.privacy_leak(found, retained)
    return _row(config, config.members, settings, "privleak", leak, "%", "closer_to_0")


def _areas(scoring: Scoring, model: Any) -> tuple[ndarray, ndarray]:
    """Min-K scores of the members and of the others."""
    from evaluations._likelihood import score
    from methods.data import padding_id

    config, tokenizer = scoring.config, scoring.tokenizer()
    least = 1 if config.definition == "open_unlearning" else 0

    def scores(name: str) -> ndarray:
        rows = _membership.rows_of(scoring.data, name, config.limit)
        examples = _membership.encoded(rows, name, tokenizer, _style(scoring), config.context_tokens)
        return _membership.min_k(score(model, examples, padding_id(tokenizer), config.batch), SHARE, least)

    return scores(config.members), scores(config.others)


# --- rows ------------------------------------------------------------------------------------------------------


def _style(scoring: Scoring) -> Style:
    from methods.data import Style

    return Style.read(scoring.parents["model"])


def _check_room(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, option: str) -> None:
    places = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(prompt) for prompt in prompts)
    if places is not None and longest + new_tokens > places:
        raise AssayError(
            f"muse: the longest prompt has {longest} tokens, which with {option}={new_tokens} do not fit this model's "
            f"{places}; lower {option} or give shorter prompts."
        )


def _row(
    config: Config,
    name: str | None,
    settings: Sequence[str],
    metric: str,
    estimate: _statistics.Estimate,
    unit: str,
    better: Any,
) -> Row:
    limit = [f"limit={config.limit}"] if config.limit is not None else []
    task = " ".join([str(name), f"definition={config.definition}", *settings, *limit])
    return Row(task, metric, estimate.value, estimate.stderr, estimate.n, unit, better)
