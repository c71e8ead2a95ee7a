"""How far a model has moved from a reference on what it should have kept.

``KL(reference || model)`` over the vocabulary, at every token of the true answers of a retain set (the prompt is
not counted): nats, a mean over tokens. 0 means that nothing changed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from evaluations import _distance
from methods.stage import Dataset, Model, Row, Scoring

USES = (
    "methods.data",
    "methods.terms",
    "methods.world",
    "methods.checkpoint",
    "evaluations._distance",
    "evaluations._likelihood",
    "evaluations._reference",
    "evaluations._statistics",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model is compared with, and on what."""

    # The model before, usually the one that was unlearned or compressed.
    reference: Model
    # Question-answer rows whose answers should not have changed.
    data: Dataset = "authors/retain_perturbed"
    # Sequences scored at once.
    batch: Annotated[int, Gt(0)] = 64
    # First rows that are used; None for all.
    limit: Annotated[int, Gt(0)] | None = None
    # Longer sequences are cut.
    context_tokens: Annotated[int, Gt(0)] = 512


def evaluate(scoring: Scoring) -> list[Row]:
    """One row, ``kl``; n is the number of questions."""
    config = scoring.config
    estimate = _distance.compare(scoring, "reference", config.data, {"kl": _distance.kl})["kl"]
    task = config.data if config.limit is None else f"{config.data} limit={config.limit}"
    return [Row(task, "kl", estimate.value, estimate.stderr, estimate.n, "nats/token", "lower")]
