"""Unlearning: make a model forget some rows and keep the rest.

A method file holds ``loss(config, model, batch, reference)`` and returns named terms. What it needs beside a batch of
``forget`` and ``retain`` rows it says in functions of its own, each of which may be left out:

* ``parts(config)``: the data that make up a batch, by part: ``Rows``, ``Templates`` or ``Alternates``. The first part
  sets the length of an epoch; templates and alternates belong to the forget rows of the batch.
* ``needs_reference(config)``: whether the loss gets ``reference``, the model as it was before the stage, frozen and in
  evaluation mode. It costs a second model's memory, so only whole distributions and hidden states are a reason.
* ``remembers(config)``: the parts whose likelihoods under the starting model the loss reads with ``start_nll``.
  They are computed once before training, for every example that will be seen, and no second model is kept for them.
* ``annotate(config, part, rows, examples, tokenizer)``: the examples of a part with further numbers per target.
* ``prepare(config, model, stage, parts)``: what happens to the model before training, such as freezing weights.
* ``outer(config)``: for a loss that is no sum over items, the objective as a function of the terms' means.
* ``adaptive(config)``: numbers that change after each step, such as a dual variable.

Pairing follows locuslab/open-unlearning: an epoch is a pass over the *forget* rows, and each is accompanied by one
retain row drawn uniformly at random, with replacement. The draw depends on (seed, step) only, so a resumed run
sees the same rows. How much of the retain set is ever seen therefore grows with the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from annotated_types import Ge, Gt

from methods.loop import Training
from methods.stage import AssayError, Component, Dataset, Optimizer, Schedule, Stage, Term, Terms
from methods.terms import answer_nll, forward, frozen, kl_divergence, token_nll

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Locator, Part, Style

REVISION = 1


class UnlearnBatch(Protocol):
    """What a loss is given: as many rows of each part that the method names."""

    @property
    def forget(self) -> Part: ...
    @property
    def retain(self) -> Part: ...
    @property
    def template(self) -> Part: ...
    @property
    def alternate(self) -> Part: ...


@dataclass(frozen=True, kw_only=True)
class Unlearning(Training):
    """The recipe shared by unlearning methods; open-unlearning's for TOFU where nothing else is said."""

    # rows to be forgotten
    forget: Dataset = "authors/forget10"
    # passes over the forget rows (open-unlearning's TOFU experiment)
    epochs: Annotated[float, Gt(0)] | None = 10.0
    # decoupled weight decay 0.01 as in that experiment; its base trainer has 0
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-5, "weight_decay": 0.01})
    # linear to 0 after a warm-up of one epoch, as in that experiment: a tenth of ten epochs
    schedule: Schedule = Component("linear", {"warmup_share": 0.1})


@dataclass(frozen=True, kw_only=True)
class Retaining(Unlearning):
    """The options of methods with a retain term: L = gamma * L_forget + alpha * L_retain."""

    # rows to be kept, from which each forget row gets a random companion
    retain: Dataset = "authors/retain90"
    # weight of the forget term
    gamma: Annotated[float, Ge(0)] = 1.0
    # weight of the retain term; 0 leaves the retain rows unread
    alpha: Annotated[float, Ge(0)] = 1.0
    # answer NLL of the retain rows, or their divergence from the starting model
    retain_loss: Literal["nll", "kl"] = "nll"


def retain_term(config: Retaining, model: Any, batch: UnlearnBatch, reference: Any) -> dict[str, Term]:
    """``retain``: the answer NLL, or KL(start ‖ current) averaged over *every* position, padding included.

    open-unlearning averages the KL over all B*T positions of the padded batch; padding is that of the
    global batch, so micro-batches do not change it. Nothing at all where alpha is 0.
    """
    if config.alpha == 0:
        return {}
    part = batch.retain
    outputs = forward(model, part)
    if config.retain_loss == "nll":
        return {"retain": answer_nll(part, outputs, config.alpha)}
    start = frozen(reference, part)
    return {
        "retain": Term(
            kl_divergence(start.all_logits, outputs.all_logits).sum(), part.positions, config.alpha
        )
    }


def keeps_to_start(config: Retaining) -> bool:
    """Whether the retain term is a divergence from the starting model, which then has to be kept."""
    return config.retain_loss == "kl" and config.alpha > 0


# --- what a batch is made of ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Question-answer rows, or text."""

    data: str


@dataclass(frozen=True)
class Templates:
    """Each question of one set with an answer drawn from the lines of another, such as a list of refusals."""

    questions: str
    answers: str


@dataclass(frozen=True)
class Alternates:
    """Each question of a set with one of its alternate answers, from the data stage that an option names."""

    questions: str
    option: str


Source = Rows | Templates | Alternates


def forget_and_retain(config: Unlearning) -> dict[str, Source]:
    """The parts of most methods; the retain rows only where they count."""
    wanted: dict[str, Source] = {"forget": Rows(config.forget)}
    return wanted | retained(config)


def retained(config: Unlearning) -> dict[str, Source]:
    """The retain rows, where they count."""
    counts = isinstance(config, Retaining) and config.alpha > 0
    return {"retain": Rows(config.retain)} if counts and isinstance(config, Retaining) else {}


def sources(method: ModuleType, config: Unlearning) -> dict[str, Source]:
    """The parts of a method's batch."""
    found: dict[str, Source] = method.parts(config) if hasattr(method, "parts") else forget_and_retain(config)
    return found


def start_nll(part: Part, reference: Any) -> Tensor:
    """Token NLL [B,T-1] under the starting model: remembered from before training, or asked of ``reference``."""
    known = part.extra.get("start_nll")
    return token_nll(frozen(reference, part)) if known is None else known


# --- a run ----------------------------------------------------------------------------------------------------


def run(stage: Stage, method: ModuleType) -> None:
    """Encode what the loss reads, remember the start, and train."""
    from methods import loop
    from methods.unlearn import _start

    config: Unlearning = stage.config
    check(config, stage.data)
    settings = replace(config, probe=tuple(probe_of(config, text) for text in config.probe))
    parts = _encoded(stage, method, config)
    model = loop.prepare(stage, settings)
    reference = loop.reference_of(stage, model, settings) if asks(method, config) else None
    batches = loop.Batches(
        parts, size=config.batch, seed=stage.seed, follows=_following(method, config), drawn=("retain",)
    )
    remembered = method.remembers(config) if hasattr(method, "remembers") else ()
    batches = _start.remember(stage, model, settings, batches, remembered)
    start = loop.remember(stage, model, settings)
    if hasattr(method, "prepare"):
        method.prepare(config, model, stage, batches.parts)

    def loss(model: Any, batch: UnlearnBatch) -> Terms:
        terms: Terms = method.loss(config, model, batch, reference)
        return terms

    outer = method.outer(config) if hasattr(method, "outer") else None
    adaptive = method.adaptive(config) if hasattr(method, "adaptive") else None
    loop.train(stage, model, settings, batches, loss, outer=outer, adaptive=adaptive, start=start)


def _following(method: ModuleType, config: Unlearning) -> dict[str, str]:
    """Templates and alternates stand beside the batch's own forget rows."""
    found = sources(method, config)
    return {
        name: "forget" for name, source in found.items() if not isinstance(source, Rows) and "forget" in found
    }


def _encoded(stage: Stage, method: ModuleType, config: Unlearning) -> dict[str, Any]:
    """The examples of every part."""
    from methods.checkpoint import load_tokenizer
    from methods.data import Style

    folder = stage.parents["model"]
    tokenizer, style = load_tokenizer(folder), Style.read(folder)
    found = {}
    for name, source in sources(method, config).items():
        examples = _examples(stage, source, tokenizer, style, config.context_tokens)
        if hasattr(method, "annotate") and isinstance(source, Rows):
            rows = stage.data.rows(source.data)
            examples = method.annotate(config, name, rows, examples, tokenizer)
        found[name] = examples
    return found


def _examples(stage: Stage, source: Source, tokenizer: Any, style: Style, context_tokens: int) -> Any:
    from methods.data import crossed, encode
    from methods.unlearn import _alternates

    if isinstance(source, Rows):
        return encode(stage.data.rows(source.data), tokenizer, style, context_tokens)
    questions = _questions(stage.data.rows(source.questions), source.questions)
    if isinstance(source, Templates):
        answers = [str(row["text"]) for row in stage.data.rows(source.answers)]
        return crossed(questions, answers, tokenizer, style, context_tokens)
    folder = stage.parents[source.option]
    return _alternates.examples(folder, questions, tokenizer, style, context_tokens)


def _questions(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    if not all(isinstance(row.get("question"), str) for row in rows):
        raise AssayError(f"{name} has rows without a question, which no other answer can be given to.")
    return [row["question"] for row in rows]


# --- what is refused before anything runs -------------------------------------------------------------------------


def check(config: Any, data: Locator) -> None:
    """Refuse sets with empty answers, a retain set that overlaps the forget set, and lists with nothing in them.

    Raises:
        AssayError: names the sets and the first row in question.
    """
    named = [field.name for field in fields(config) if field.name in SETS]
    rows = {name: data.rows(getattr(config, name)) for name in named if getattr(config, name) is not None}
    for name, found in rows.items():
        _refuse_empty(name, getattr(config, name), found)
    if "forget" in rows and "retain" in rows and getattr(config, "alpha", 1.0) > 0:
        _refuse_overlap(config, rows["forget"], rows["retain"])


# The options that name data sets, wherever a method has them.
SETS = ("forget", "retain", "refusals")


def _refuse_empty(name: str, data: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Blank lines are part of a text, but no answer."""
    column = "text" if name == "refusals" else "answer"
    if not rows:
        raise AssayError(f"{name}={data!r} has no lines: there is nothing in it.")
    for number, row in enumerate(rows):
        if (column in row or name == "refusals") and not str(row.get(column) or "").strip():
            raise AssayError(
                f"{name}={data!r}: the {column} of row {number} is empty; fill it in or take the row out."
            )


def _refuse_overlap(config: Any, forget: Sequence[Any], retain: Sequence[Any]) -> None:
    """A row is the same where its question (its text, where it has no question) is the same."""
    kept = {_identity(row): number for number, row in enumerate(retain)}
    shared = [(number, kept[_identity(row)]) for number, row in enumerate(forget) if _identity(row) in kept]
    if shared:
        first, other = shared[0]
        raise AssayError(
            f"retain={config.retain!r} holds {len(shared)} of {len(forget)} rows of forget={config.forget!r}; "
            f"{_identity(forget[first])[:60]!r} is row {first} there and row {other} here: take it out of one."
        )


def _identity(row: Mapping[str, Any]) -> str:
    return str(row.get("question") or row.get("text") or "").strip()


def asks(method: ModuleType, config: Unlearning) -> bool:
    """Whether the method needs the starting model; one that does not say gets it."""
    return bool(method.needs_reference(config)) if hasattr(method, "needs_reference") else True


def probe_of(config: Any, text: str) -> str:
    """``forget`` and ``retain`` alone mean the method's own sets; ``name=data set`` means itself."""
    return (
        f"{text}={getattr(config, text)}" if text in ("forget", "retain") and hasattr(config, text) else text
    )
