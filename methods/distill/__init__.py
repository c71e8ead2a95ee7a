"""Distillation: train a student on a teacher's outputs, usually to mend what compression broke.

A method file holds ``loss(config, student, teacher, batch)`` and returns named terms; ``batch.train`` is a
``methods.data.Part``. The teacher is live: a second model in evaluation mode that gets no gradient, is never part of
the student's module tree and is never saved. A method without a ``teacher`` option gets None.

Before any weight is loaded, student and teacher are compared: the same tokens under the same ids, and, where the
method says ``HIDDEN = True``, the same number of layers and the same width. Two models with one tokenizer may still
differ in how far the vocabulary is *padded* (Qwen2.5: 151,936 rows in the small, 152,064 in the large); then
both are cut to the tokenizer's size and the softmax renormalises.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from annotated_types import Gt

from methods.loop import Training
from methods.stage import AssayError, Component, Dataset, Model, Optimizer, Schedule, Stage, Term, Terms
from methods.terms import Outputs, kl_divergence

if TYPE_CHECKING:
    from methods.data import Part

REVISION = 1


class DistillBatch(Protocol):
    """What a loss is given."""

    @property
    def train(self) -> Part: ...


@dataclass(frozen=True, kw_only=True)
class Recovering(Training):
    """The recipe shared by this family, of Sparse Finetuning's one-shot-pruned student where nothing else is said."""

    # rows to train on
    data: Dataset = "authors/full+authors/facts"
    # passes over the rows (2 at 40-60 % sparsity, 4 beyond)
    epochs: Annotated[float, Gt(0)] | None = 2.0
    # no weight decay; 3e-5 at 40-50 % sparsity, 1e-4 at 60 % and beyond
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-4, "weight_decay": 0.0})
    # linear to 0
    schedule: Schedule = Component("linear")


@dataclass(frozen=True, kw_only=True)
class Distilling(Recovering):
    """The shared recipe of methods with a teacher."""

    # the chain whose model is imitated; after ``unlearn`` mind that the original model teaches back what was forgotten
    teacher: Model
    # both distributions are softened by it: softmax(logits / temperature)
    temperature: Annotated[float, Gt(0)] = 1.0


def answer_kl(part: Part, wanted: Outputs, outputs: Outputs, temperature: float, weight: float) -> Term:
    """Mean forward KL D(teacher ‖ student) over the answer tokens of the global batch."""
    mask = outputs.mask
    values = kl_divergence(wanted.logits[mask], outputs.logits[mask], temperature)
    return Term(values.sum(), part.tokens, weight)


def run(stage: Stage, method: ModuleType) -> None:
    """Compare the two models on paper, load them, train the student with the method's loss."""
    from methods import loop
    from methods.checkpoint import load_tokenizer
    from methods.data import Style, encode

    config: Recovering = stage.config
    source, taught_by = stage.parents["model"], stage.parents.get("teacher")
    entries = check_teacher(source, taught_by, hidden=getattr(method, "HIDDEN", False)) if taught_by else None
    examples = encode(
        stage.data.rows(config.data), load_tokenizer(source), Style.read(source), config.context_tokens
    )
    student = loop.prepare(stage, config)
    teacher = cut(loop.frozen_model(taught_by, config), entries) if taught_by else None

    def loss(model: Any, batch: DistillBatch) -> Terms:
        terms: Terms = method.loss(config, cut(model, entries), teacher, batch)
        return terms

    batches = loop.Batches({"train": examples}, size=config.batch, seed=stage.seed)
    loop.train(stage, student, config, batches, loss)


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
            f"the teacher's tokenizer {difference}. "
            f"A loss on logits needs one vocabulary: take a teacher of the same model family."
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
    entries = max(ours.get_vocab().values()) + 1
    if min(mine["vocab_size"], its["vocab_size"]) < entries:
        raise AssayError(
            f"the tokenizer has ids up to {entries - 1}, but student and teacher predict {mine['vocab_size']} and "
            f"{its['vocab_size']} entries: only a vocabulary padded beyond the tokenizer's can be cut."
        )
    return entries


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
