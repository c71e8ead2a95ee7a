"""AnyLoss: a metric of the confusion matrix as a loss.

Han, Moniz, Chawla 2024, "AnyLoss: Transforming Classification Metrics into Loss Functions". With the probability p of
class 1 of each of N cases, the label y (0 or 1) and L = 73, an amplifier pushes p towards 0 or 1,

    A(p) = 1 / (1 + exp(-L (p - 0.5))),    TP = sum y A,    S = sum A,    n1 = sum y

and the metrics follow:

    accuracy             1 - (N - n1 - S + 2 TP) / N
    f_beta               1 - (1 + b^2) TP / (b^2 n1 + S)
    g_mean               1 - sqrt(TP (N - S - n1 + TP) / (n1 (N - n1)))
    balanced_accuracy    1 - (N (TP + n1) - n1 (S + n1)) / (2 n1 (N - n1))

None of them is a sum over cases: TP, S and n1 are means over the *global* batch, whatever the micro-batches. Every
batch needs both classes. Defects of the official code (doheonhan/anyloss): its hand-written gradient of the G-mean is
exactly 4 times too large, and its Keras losses put the size of the training set for the N of a mini-batch, which is
wrong for all but f_beta. The slope of the root is infinite where TP or TN is 0: ``epsilon`` under it keeps it finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)
TASKS = ("classification",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of AnyLoss."""

    # what is maximised
    metric: Literal["accuracy", "f_beta", "g_mean", "balanced_accuracy"] = "accuracy"
    # how much recall counts against precision in f_beta (the paper: 1)
    beta: Annotated[float, Gt(0)] = 1.0
    # L, the slope of the amplifier at p = 0.5 (the paper, section 3: 73)
    slope: Annotated[float, Gt(0)] = 73.0
    # under the root of the G-mean
    epsilon: Annotated[float, Ge(0)] = 1e-12


def statistics(config: Config, scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """``true_positive``, ``predicted`` and ``positive`` of each case [N], from scores [N,2] and labels [N].

    Raises:
        AssayError: there are more or fewer than two classes.
    """
    refuse_other_than_two(scores.shape[-1])
    amplified = (config.slope * (scores.softmax(dim=-1)[:, 1] - 0.5)).sigmoid()
    positive = targets.to(scores.dtype)
    return {"true_positive": positive * amplified, "predicted": amplified, "positive": positive}


def outer(config: Config, means: Mapping[str, Tensor]) -> Tensor:
    """The loss, from the means of the statistics over the global batch: every formula with N = 1."""
    right, predicted, positive = means["true_positive"], means["predicted"], means["positive"]
    if config.metric == "accuracy":
        return positive + predicted - 2 * right
    if config.metric == "f_beta":
        square = config.beta**2
        return 1 - (1 + square) * right / (square * positive + predicted)
    if config.metric == "g_mean":
        # Rounding may take the share of true negatives below 0.
        product = (right * (1 - predicted - positive + right)).clamp(min=0) / (positive * (1 - positive))
        return 1 - (product + config.epsilon).sqrt()
    return 1 - (right + positive - positive * (predicted + positive)) / (2 * positive * (1 - positive))


def check_batch(config: Config, targets: Tensor, classes: int) -> None:
    """AssayError for a batch without two classes."""
    refuse_other_than_two(classes)
    if len(targets.unique()) < 2:
        raise AssayError(
            f"all {len(targets)} cases are of class {int(targets[0])}, and AnyLoss needs both classes in every batch: "
            "raise batch, or train on data in which neither class is rare."
        )


def refuse_other_than_two(classes: int) -> None:
    """AssayError unless there are two classes."""
    if classes != 2:
        raise AssayError(
            f"AnyLoss is made for two classes and these data have {classes}: choose another loss, such as "
            "cross_entropy(), or data with two classes."
        )
