"""A loss that is no number from its third step on. Source: none, invented for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.loop import Training
from methods.stage import Dataset, Term, Terms
from methods.terms import answer_nll, forward

if TYPE_CHECKING:
    from methods.gradient import Batch

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """The shared recipe and the rows."""

    # rows to train on
    data: Dataset = "authors/forget01"


def loss(config: Config, model: Any, batch: Batch) -> Terms:
    """``train``: the answer NLL, then not a number."""
    term = answer_nll(batch.train, forward(model, batch.train))
    return {"train": term if batch.step < 2 else Term(term.sum * float("nan"), term.count)}
