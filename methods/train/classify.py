"""Training a classifier: cases, a head that gives each class a score, a loss that consumes the scores.

The recipe of Baek, Liu, Tyagi, Tegmark 2025, "Harmonic Loss Trains Interpretable AI Models" (section 3; KindXiaoming/
grow-crystals, ``src/utils/driver.py``): over the cases of a batch, N in all,

    L = 1/N sum_i loss(scores(x_i), y_i) + embedding_penalty * mean_c sqrt(mean_v E[v,c]^2)

with AdamW at learning rate 2e-3 and weight decay 0.01. The penalty is the mean over the columns c of the token
embedding E of their root mean square; it is no L2 penalty, and the text of the paper leaves it out. The official code
draws its cases with replacement *before* it divides them into training and test cases, so that more than half of the
test cases have been trained on; the data sets of this project are divided by unique cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from methods import loss as losses
from methods.loop import Training
from methods.stage import (
    AssayError,
    Claim,
    Component,
    Dataset,
    Head,
    Loss,
    Optimizer,
    Schedule,
    Term,
    Terms,
    Weighting,
)

if TYPE_CHECKING:
    from torch import Tensor

    from methods.gradient import Batch, Outer

SEEDED = True
TASKS = ("classification",)
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.loss")
CLAIMS: tuple[Claim, ...] = ()
# Enough cases in a batch of a smoke run for a loss that needs all classes of them.
SMOKE = {"batch": 64}


@dataclass(frozen=True, kw_only=True)
class Classifying(Training):
    """The shared recipe, the cases, and what may stand in the place of softmax and cross entropy."""

    # cases to train on; several sets joined by +
    data: Dataset
    # output head to give the model before training; None keeps its own
    head: Head | None = None
    # loss of each case; None: cross entropy
    loss: Loss | None = None
    # weights of the cases of a batch from their losses; None: all the same
    weighting: Weighting | None = None
    # passes over the cases
    epochs: Annotated[float, Gt(0)] | None = 100.0
    # cases in a step; where there are fewer, all of them (the official code: 32)
    batch: Annotated[int, Gt(0)] = 32
    # the official code's AdamW for the algorithmic tasks
    optimizer: Optimizer = Component("adamw", {"learning_rate": 2e-3, "weight_decay": 0.01})
    # the learning rate stays as it is
    schedule: Schedule = Component("constant")
    # the norm of the gradient is left as it is
    clip: Annotated[float, Ge(0)] = 0.0


@dataclass(frozen=True, kw_only=True)
class Config(Classifying):
    """Cases and what is learnt of them, and the penalty of the algorithmic tasks."""

    # factor of the mean column norm of the token embedding (the official code: 0.01; its notebook: 0.1)
    embedding_penalty: Annotated[float, Ge(0)] = 0.0


def loss(config: Config, model: Any, batch: Batch) -> Terms:
    """``train``: the mean loss of the cases; ``embedding``: the penalty, where it has a weight."""
    terms = dict(losses.terms(config.loss, model, batch.train, config.weighting, batch))
    if config.embedding_penalty:
        part: Any = batch.train
        cases = part.examples
        # As a mean over cases, so that micro-batches add up to it once.
        value = embedding_penalty(embedding_of(model)) * cases
        terms["embedding"] = Term(value, cases, config.embedding_penalty)
    return terms


def outer(config: Config) -> Outer | None:
    """How the means of a loss that is no sum over cases make up the objective."""
    found = losses.outer(config.loss)
    if found is None or not config.embedding_penalty:
        return found
    return lambda means: found(means) + config.embedding_penalty * means["embedding"]


def embedding_penalty(weight: Tensor) -> Tensor:
    """Mean over the columns of the embedding [V,d] of each column's root mean square."""
    return weight.square().mean(dim=0).sqrt().mean()


def embedding_of(model: Any) -> Tensor:
    """The token embedding [V,d]; AssayError for a classifier of images, which has none."""
    module = model.get_input_embeddings() if model.main_input_name == "input_ids" else None
    if module is None:
        raise AssayError(
            "embedding_penalty needs a model that embeds tokens; a classifier of images has no embedding: set it to 0."
        )
    weight: Tensor = module.weight
    return weight
