"""How far a model's outputs are from those of the retrained gold, a model that never saw the forget set.

Unlearning is meant to give the model that training without the forget set would have given (Maini et al., "TOFU: A Task
of Fictitious Unlearning for LLMs" (2024), section 3): neither a loss as high as can be, nor an answer that the gold
would not give. Here the two are compared as distributions over the vocabulary, p the gold's and q the model's, at
every token of the true answers (the prompt is not counted), a mean over tokens:

* ``*_js``: Jensen-Shannon divergence (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; nats, at most ln 2.
* ``*_tv``: total variation, sum |p - q| / 2, at most 1.
* ``*_kl``: KL(p || q), nats; one token that the model thinks impossible can decide it.
* ``*_top1_agreement``: share of tokens where both have the same first choice.

``forget_*`` on the forget set, ``retain_*`` on a sample of what was to be kept. Two golds of different seeds have a
distance, too: score one against the other to see which differences mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

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
# Each measure, its unit, and what the scored model should have.
MEASURES = {
    "js": (_distance.jensen_shannon, "nats/token", "lower"),
    "tv": (_distance.total_variation, "", "lower"),
    "kl": (_distance.kl, "nats/token", "lower"),
    "top1_agreement": (_distance.top1_agreement, "", "higher"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model is the gold, and on what it is compared."""

    # The gold: a model trained in the same way without the forget set.
    reference: Model
    # Rows that were to be forgotten.
    forget: Dataset = "authors/forget10_perturbed"
    # Rows whose answers should not have changed.
    retain: Dataset = "authors/retain_perturbed"
    # Sequences scored at once.
    batch: Annotated[int, Gt(0)] = 64
    # First rows of each set that are used; None for all.
    limit: Annotated[int, Gt(0)] | None = None
    # Longer sequences are cut.
    context_tokens: Annotated[int, Gt(0)] = 512


def evaluate(scoring: Scoring) -> list[Row]:
    """Four rows for each of the two sets; n is the number of questions."""
    config = scoring.config
    return [row for name in ("forget", "retain") for row in _rows(scoring, name, getattr(config, name))]


def _rows(scoring: Scoring, name: str, data: str) -> Iterator[Row]:
    measures: dict[str, Any] = {measure: parts[0] for measure, parts in MEASURES.items()}
    found = _distance.compare(scoring, "reference", data, measures)
    task = data if scoring.config.limit is None else f"{data} limit={scoring.config.limit}"
    for measure, (value, stderr, n) in found.items():
        _, unit, better = MEASURES[measure]
        way: Any = better
        yield Row(task, f"{name}_{measure}", value, stderr, n, unit, way)
