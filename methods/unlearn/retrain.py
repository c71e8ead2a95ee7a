"""Retraining: train a model that has never seen the forget set, on what is to be kept.

The gold standard of exact unlearning (Bourtoule et al., "Machine Unlearning"; the retain model of Maini et al.,
"TOFU: A Task of Fictitious Unlearning for LLMs"):    base > unlearn.retrain(retain="authors/retain90+authors/facts")

    L = 1/M sum_{b,t} l[b,t]          over the answer tokens of the retain rows: ``train.sft``'s loss, and its recipe

The chain's parent is the model from before the forget set was learnt, not the one that knows it; nothing in the
stage can tell the two apart. Give it the options that the model to be unlearned was trained with: then the two differ
in the forget set alone. What it costs is the point: other methods are worth their approximation only where they are
cheaper, and every table shows the energy of both. With the same options it gives the same model as ``train.sft``,
bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.loop import Training
from methods.stage import Claim, Dataset, Terms
from methods.terms import answer_nll, forward
from methods.unlearn import Rows, Source

if TYPE_CHECKING:
    from methods.gradient import Batch

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """``train.sft``'s recipe and the rows to be kept."""

    # everything the model was trained on but the forget set; several sets joined by +
    retain: Dataset = "authors/retain90+authors/facts"


CLAIMS: tuple[Claim, ...] = ()


def parts(config: Config) -> dict[str, Source]:
    """The retain rows alone, in the order in which ``train.sft`` would see them."""
    return {"train": Rows(config.retain)}


def needs_reference(config: Config) -> bool:
    """Never."""
    return False


def loss(config: Config, model: Any, batch: Batch, reference: Any) -> Terms:
    """``train``: the mean loss over the answer tokens."""
    return {"train": answer_nll(batch.train, forward(model, batch.train))}
