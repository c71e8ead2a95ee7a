"""Supervised finetuning: maximum likelihood of the answers, prompts masked.

Ouyang et al., "Training language models to follow instructions with human feedback", section 3.5; the recipe of
Maini et al., "TOFU", section 3 (AdamW, learning rate 1e-5, weight decay 0.01, batch 32, 5 epochs). Over the answer
tokens of the batch, M in all:    L = 1/M sum_t -log p(y_t | x, y_<t).

TOFU's code warms up over the first epoch; here the schedule says so where it is wanted. On rows of plain text
every token counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from methods import loss as losses
from methods.loop import Training
from methods.stage import Claim, Dataset, Head, Loss, Terms, Weighting

if TYPE_CHECKING:
    from methods.gradient import Batch, Outer

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.loss")


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """The shared recipe, the rows, and what may stand in the place of softmax and cross entropy."""

    # rows to train on; several sets joined by +
    data: Dataset = "authors/retain90+authors/facts"
    # the parent's weights, or new ones of its shapes, drawn from the seed: pretraining with a known model's tokenizer
    start: Literal["parent", "random"] = "parent"
    # output head to give the model before training; None keeps its own
    head: Head | None = None
    # loss of each answer token; None: cross entropy
    loss: Loss | None = None
    # weights of the sequences of a batch from their losses; None: every answer token counts the same
    weighting: Weighting | None = None


CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="A model that never saw the forget set is as useful as one that did: utilities within 0.05.",
        source="pilot in the embedded world: 0.84 and 0.82 (n=2) against 0.83 +- 0.04 (n=3)",
        metric="tofu.model_utility",
        subject="retained",
        relation="within",
        other="target",
        margin=0.05,
    ),
)


def loss(config: Config, model: Any, batch: Batch) -> Terms:
    """``train``: the mean loss over the answer tokens."""
    return losses.terms(config.loss, model, batch.train, config.weighting, batch)


def outer(config: Config) -> Outer | None:
    """How the means of a loss that is no sum over tokens make up the objective."""
    return losses.outer(config.loss)
