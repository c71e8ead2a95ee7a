"""Losses: what is made of a head's scores and the targets. "A head gives scores, a loss consumes them."

A loss file holds ``Config`` and exactly one of

    token_losses(config, scores [N,V], targets [N]) -> [N]
    statistics(config, scores [N,V], targets [N]) -> {name: [N]}      with  outer(config, means) -> scalar
    sequence_losses(config, scores [B,T,V], targets [B,T], mask [B,T]) -> [B]
    hidden_losses(config, layer, hidden [N,d], targets [N]) -> [N]

where N are the answer tokens of the sequences of a batch, or its cases. What is no sum over items gives statistics,
and ``outer`` makes the objective of their means over the *global* batch. ``hidden_losses`` gets the hidden states
that enter the output ``layer`` (``methods.architectures.block_scores`` applies it). ``TASKS`` says what a loss can
train, by default language models and classifiers alike, and ``check_batch(config, targets [N], classes)`` raises an
AssayError for a batch that it cannot work on. Scores are float32 or wider; noise comes from torch's global generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, Component, Count, Term, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Cases, CaseTable, Part
    from methods.gradient import Batch, Outer
    from methods.loop import Batches

REVISION = 1
TASKS = ("language", "classification")


@dataclass(frozen=True)
class Items:
    """The losses [N] of answer tokens or cases, or [B] of whole sequences, and how many there are."""

    losses: Tensor
    count: Count


def terms(
    chosen: Component | None,
    model: Any,
    part: Part | Cases,
    weighting: Component | None = None,
    batch: Batch | None = None,
) -> Terms:
    """``train``: the mean loss of a part's items; of a loss that gives statistics, one term for each.

    Args:
        chosen: the loss; None: cross entropy.
        weighting: how rows are weighed by their losses; it reads ``batch.weigh``.
    """
    from methods.terms import answer_nll, forward, is_cases

    if weighting is not None:
        from methods.weighting import weighted_terms

        return weighted_terms(weighting, part, row_losses(chosen, model, part), _given(batch))
    if chosen is None and not is_cases(part):
        return {"train": answer_nll(part, forward(model, part))}
    module, options = load(chosen)
    if hasattr(module, "statistics"):
        return _statistics(module, options, model, part)
    found = items(chosen, model, part)
    return {"train": Term(found.losses.sum(), found.count)}


def outer(chosen: Component | None) -> Outer | None:
    """How the means of a loss's statistics make up the objective; None for a sum over items."""
    if chosen is None:
        return None
    module, options = load(chosen)
    return partial(module.outer, options) if hasattr(module, "outer") else None


def check_batches(chosen: Component | None, batches: Batches, steps: int) -> None:
    """AssayError for a loss that does not fit the task, or one of the batches of ``steps`` that it cannot work on."""
    from methods.data import CaseTable

    if chosen is None:
        return
    module, options = load(chosen)
    rows: Any = batches.parts["train"]
    task = "classification" if isinstance(rows, CaseTable) else "language"
    allowed = getattr(module, "TASKS", TASKS)
    if task not in allowed:
        raise AssayError(
            f"loss={chosen.name}() is a loss for {' and '.join(allowed)} and cannot train here, where the task is "
            f"{task}: choose another loss, such as cross_entropy()."
        )
    if hasattr(module, "check_batch"):
        _check_labels(chosen.name, module, options, batches, steps)


def load(chosen: Component | None) -> tuple[Any, Any]:
    """A loss's module and its typed options; cross entropy for None."""
    from methods.loop import component

    return component("loss", chosen or Component("cross_entropy"))


# --- losses of items ------------------------------------------------------------------------------------------


def items(chosen: Component | None, model: Any, part: Part | Cases) -> Items:
    """The loss of every item of a part.

    Raises:
        AssayError: the loss is no sum over items, or is one of whole sequences and this part is cases.
    """
    from methods.terms import entering, scored

    module, options = load(chosen)
    if hasattr(module, "token_losses"):
        found = scored(model, part)
        return Items(module.token_losses(options, found.scores, found.targets), found.count)
    if hasattr(module, "hidden_losses"):
        inside = entering(model, part)
        return Items(module.hidden_losses(options, inside.layer, inside.hidden, inside.targets), inside.count)
    if hasattr(module, "sequence_losses"):
        return _of_sequences(module, options, model, part)
    raise AssayError(
        f"{module.__name__.rpartition('.')[2]} is no sum over tokens or cases, so there is no loss of each: leave out "
        "weighting, or choose another loss."
    )


def row_losses(chosen: Component | None, model: Any, part: Part | Cases) -> Tensor:
    """The loss [B] of each row: the mean over a sequence's answer tokens, or that of a case."""
    from methods.terms import is_cases
    from methods.weighting import sequence_means

    losses = items(chosen, model, part).losses
    if is_cases(part) or hasattr(load(chosen)[0], "sequence_losses"):
        return losses
    return sequence_means(part, losses)


def _of_sequences(module: Any, options: Any, model: Any, part: Part | Cases) -> Items:
    from methods.terms import forward, is_cases

    if is_cases(part):
        raise AssayError(f"{module.__name__.rpartition('.')[2]} is a loss of sequences and not of cases.")
    outputs = forward(model, part)
    losses = module.sequence_losses(options, outputs.logits, outputs.targets, outputs.mask)
    return Items(losses, part.sequences)


def _statistics(module: Any, options: Any, model: Any, part: Part | Cases) -> Terms:
    """A term for each statistic; its mean over the global batch is what ``outer`` is given."""
    from methods.terms import scored

    found = scored(model, part)
    values = module.statistics(options, found.scores, found.targets)
    return {name: Term(value.sum(), found.count) for name, value in values.items()}


def _given(batch: Batch | None) -> Batch:
    if batch is None:
        raise AssayError("weights of a batch's rows need the batch: call terms(..., weighting, batch).")
    return batch


# --- checks before training -----------------------------------------------------------------------------------


def _check_labels(name: str, module: Any, options: Any, batches: Batches, steps: int) -> None:
    """Show the loss the labels of every batch to come."""
    table: Any = batches.parts["train"]
    whole = batches.size == len(table) and "train" not in batches.drawn
    # A batch of all cases has the same labels in every step.
    for step in range(1 if whole else steps):
        labels = table.labels if whole else _labels(table, batches.rows("train", step))
        try:
            module.check_batch(options, labels, table.classes)
        except AssayError as error:
            raise AssayError(f"loss={name}(), batch of step {step}: {error}") from None


def _labels(table: CaseTable, rows: list[int]) -> Tensor:
    import torch

    return table.labels.index_select(0, torch.tensor(rows, dtype=torch.int64))
