"""Distillation: train a student on a teacher's outputs, usually to mend what compression broke.

The loss is a mixture of *terms* (``methods/term``), each named, weighted and logged on its own. A method file of this
family is a recipe: it names its terms and adds what no term can.

    terms = an option of that name, or terms(config) -> components in a row or by name
    loss(config, student, teacher, batch) -> Terms      in the place of terms, for a live teacher alone; batch.train is
                                                        a ``methods.data.Part``, the models answer with .logits, and
                                                        with HIDDEN = True they have layers and widths in common

and, where it needs them,

    term_parts(config) -> {term: part}                  the part of the batch a term is about; default: train
    parts(config, setting) -> {name: examples}          further parts of the batch
    source(config, setting) -> Source                   a teacher of its own, or what it makes of ``setting.source``
    writing(config, setting) -> methods.loop.Writing    what the student writes to learn from
    masking(config, setting) -> Masking                 masks that move while it learns
    optimizer(config, setting, masking) -> optimizer    its own, in the place of the one in the options
    prepare(config, setting), companions(config, setting) -> {name: Module}, adaptive(config, setting) -> Adaptive

The teacher is one concept (``methods/distill/_sources.py``): a model that runs beside the student, several of them, or
what one has written down. A model as a teacher is in evaluation mode, gets no gradient, is never part of the student's
module tree and never saved.

Before any weight is loaded, terms, teacher and student are compared: what the terms need against what the teacher can
give, the same tokens under the same ids, the shapes that hidden states need, and the rows against those of a record.
Two models with one tokenizer may still differ in how far the vocabulary is *padded* (Qwen2.5: 151,936 rows in the
small, 152,064 in the large); then both are cut to the tokenizer's size and the softmax renormalises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from annotated_types import Gt

from methods.loop import Training
from methods.stage import (
    AssayError,
    Component,
    How,
    Model,
    Optimizer,
    Rows,
    Schedule,
    Stage,
    TeacherOutputs,
)
from methods.term import Entry

if TYPE_CHECKING:
    from methods.data import Part

REVISION = 1
PRECISION = Literal["auto", "float32", "bfloat16"]


class DistillBatch(Protocol):
    """What a loss is given."""

    @property
    def train(self) -> Part: ...


# --- options --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recovering(Training):
    """The recipe shared by this family, of Sparse Finetuning's one-shot-pruned student where nothing else is said."""

    # rows to train on: data sets, or a chain that writes rows
    data: Rows = "authors/full+authors/facts"
    # passes over the rows (2 at 40-60 % sparsity, 4 beyond)
    epochs: Annotated[float, Gt(0)] | None = 2.0
    # no weight decay; 3e-5 at 40-50 % sparsity, 1e-4 at 60 % and beyond
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-4, "weight_decay": 0.0})
    # linear to 0
    schedule: Schedule = Component("linear")
    # tokens whose logits are held at once; None: as many as make 64 MiB in float32
    block_tokens: Annotated[Annotated[int, Gt(0)] | None, How] = None


@dataclass(frozen=True, kw_only=True)
class Taught(Recovering):
    """The shared recipe of methods whose teacher has to answer while the student is trained."""

    # the chain whose model is imitated; after ``unlearn`` mind that the original model teaches back what was forgotten
    teacher: Model
    # of the teacher's weights; auto: as the forward pass
    teacher_precision: PRECISION = "auto"


@dataclass(frozen=True, kw_only=True)
class Distilling(Recovering):
    """The shared recipe of methods with a teacher of any kind: exactly one of teacher, ensemble and recorded."""

    # the chain whose model is imitated; after ``unlearn`` mind that the original model teaches back what was forgotten
    teacher: Model | None = None
    # several chains, whose models teach as one
    ensemble: tuple[Model, ...] | None = None
    # what is averaged over them (at each temperature that is asked for)
    ensemble_mean: Literal["probabilities", "logits"] = "probabilities"
    # a chain that ends in teacher.logits: what it wrote of these very rows
    recorded: TeacherOutputs | None = None
    # of the teacher's weights; auto: as the forward pass
    teacher_precision: PRECISION = "auto"

    def __post_init__(self) -> None:
        """One teacher."""
        given = given_sources(self)
        if len(given) != 1:
            found = " and ".join(f"{name}=" for name in given) or "none of them"
            raise AssayError(
                f"give one teacher: teacher=CHAIN, ensemble=[CHAIN, CHAIN] or recorded=CHAIN; there is {found}."
            )
        if self.ensemble is not None and len(self.ensemble) < 2:
            raise AssayError("an ensemble is of two chains or more: with one alone write teacher=CHAIN.")
        if self.ensemble is None and self.ensemble_mean != "probabilities":
            raise AssayError("ensemble_mean is for an ensemble, and there is none: leave it out.")


@dataclass(frozen=True, kw_only=True)
class Softening(Distilling):
    """The temperature of methods that have one for all their terms."""

    # both distributions are softened by it: softmax(logits / temperature)
    temperature: Annotated[float, Gt(0)] = 1.0


# --- what terms need, and what a teacher gives ------------------------------------------------------------------

SOURCES = ("teacher", "ensemble", "recorded")


def given_sources(config: Any) -> list[str]:
    """The options that name a teacher and are given."""
    return [name for name in SOURCES if getattr(config, name, None) is not None]


def refuse_terms(
    method: str, config: Any, found: Sequence[Entry], writes: bool = False, own: bool = False
) -> None:
    """Whether these terms can be had from the teacher that the options name, from their constants alone.

    Args:
        writes: the student writes the text that it learns from.
        own: the method has a teacher of its own.
    Raises:
        AssayError: a term needs what this teacher cannot give, or there is a teacher and nobody asks it.
    """
    given = given_sources(config) or ["teacher"] * own
    for entry in found:
        problem = _problem(entry, given[0] if given else None, writes)
        if problem:
            raise AssayError(f"{method}: the term {entry.name} {problem}.")
    if given and not any(entry.flags.teacher for entry in found):
        names = ", ".join(entry.name for entry in found)
        raise AssayError(
            f"{method}: no term asks a teacher ({names}): leave out {given[0]}, or add forward_kl()."
        )
    if all(entry.weight == 0 for entry in found):
        raise AssayError(f"{method}: the weights of all terms are 0; set one of them above 0.")
    for entry in found:
        if entry.flags.whole_batch and config.micro_batch is not None and config.micro_batch < config.batch:
            raise AssayError(
                f"{method}: the term {entry.name} compares all rows of a batch with each other: leave out micro_batch, "
                f"or make batch={config.batch} no larger than micro_batch={config.micro_batch}."
            )


def _problem(entry: Entry, source: str | None, writes: bool) -> str:
    """What a term misses, as a clause; empty where there is nothing."""
    flags = entry.flags
    if flags.sampled and not writes:
        return "works only on text that the student wrote, and here it writes none: use distill.minillm or distill.gkd"
    if flags.sample_id and writes:
        return "knows each row by its place in the data, which text that the student writes has not: leave the term out"
    if not flags.teacher:
        return ""
    if source is None:
        return "needs a teacher: give teacher=CHAIN"
    if flags.cross_tokenizer and writes:
        return (
            "compares two tokenisations of the same rows, and the student writes its own: leave the term out"
        )
    inside = "hidden states" if flags.hidden else "attention" if flags.attention else ""
    if source == "ensemble" and not flags.ensemble:
        return f"needs {inside or 'one model'}, and several models together have none: give teacher= instead"
    if source == "recorded" and not flags.recorded:
        wanted = (
            f"looks at {inside}" if inside else "needs a teacher that answers while the student is trained"
        )
        return f"{wanted}, and a record has logits alone: give teacher= instead"
    if source == "recorded" and entry.positions != "answers":
        return (
            f"has positions={entry.positions!r}, and a record has those that predict an answer token alone: use "
            'positions="answers", or give teacher= instead'
        )
    return ""


# --- a stage ----------------------------------------------------------------------------------------------------


def run(stage: Stage, method: ModuleType) -> None:
    """Compare the models on paper, load them, train the student with the method's terms or loss."""
    from methods.distill._running import run_loss, run_terms

    if hasattr(method, "loss"):
        run_loss(stage, method)
    else:
        run_terms(stage, method)


def check_teacher(student: Path, teacher: Path, hidden: bool = False) -> int | None:
    """Whether the teacher can teach the student, from their tokenizers and configurations alone.

    Returns the number of vocabulary entries to cut both to, or None where they agree as they are.

    Raises:
        AssayError: different tokens, or with ``hidden`` different layers or widths.
    """
    from methods.checkpoint import load_tokenizer, tokenizer_difference

    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    difference = tokenizer_difference(ours, theirs, "student")
    if difference:
        raise AssayError(
            f"the teacher's tokenizer {difference}. A loss on logits needs one vocabulary: take a teacher of the same "
            "model family, or with another one the term uld() beside a cross_entropy()."
        )
    mine, its = text_config(student), text_config(teacher)
    for name in ("num_hidden_layers", "hidden_size") if hidden else ():
        if mine[name] != its[name]:
            raise AssayError(
                f"the teacher's {name} is {its[name]} and the student's {mine[name]}: a loss on hidden states needs "
                f"them equal; use distill.forward_kl, or a teacher of the student's shape."
            )
    if mine["vocab_size"] == its["vocab_size"]:
        return None
    known_ids = max(ours.get_vocab().values()) + 1
    if min(mine["vocab_size"], its["vocab_size"]) < known_ids:
        raise AssayError(
            f"the tokenizer has ids up to {known_ids - 1}, but student and teacher predict {mine['vocab_size']} and "
            f"{its['vocab_size']} entries: only a vocabulary padded beyond the tokenizer's can be cut."
        )
    return known_ids


def text_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder, with a nested text model's entries on top where there is one."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config | (config.get("text_config") or {})


def cut(model: Callable[..., Any], entries: int | None) -> Callable[..., Any]:
    """The model with its logits cut to the first ``entries`` of the vocabulary; itself for None."""
    if entries is None:
        return model

    def cut_model(**inputs: Any) -> Any:
        answer = model(**inputs)
        return SimpleNamespace(logits=answer.logits[..., :entries], hidden_states=answer.hidden_states)

    return cut_model
