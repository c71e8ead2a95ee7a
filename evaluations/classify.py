"""How well a classifier tells classes apart: the share it gets right, its loss, and the metrics that are asked for.

``accuracy`` is the share of cases whose own class has the highest score (of equal ones the first), ``nll`` the mean of
-log softmax(scores) at that class, whatever loss the model was trained with. With recall_c and precision_c of class c:

* ``balanced_accuracy``: mean recall of the classes that occur; ``g_mean``: their geometric mean (Kubat and Matwin 1997,
  "Addressing the Curse of Imbalanced Training Sets").
* ``f1_macro`` and ``f_beta_macro``: mean over the classes that occur or are predicted of
  (1 + beta^2) precision_c recall_c / (beta^2 precision_c + recall_c), where f1 has beta = 1.
* for two classes, of which class 1 is the positive one: ``f_beta``, and ``auc``, the probability that a case of class 1
  has a higher score difference than one of class 0.

With ``radius``, of images: ``robust_accuracy``, the share that stays right under every step of projected gradient
ascent on the loss within that distance of each pixel (Madry et al. 2018, "Towards Deep Learning Models Resistant to
Adversarial Attacks"), begun at the image itself, each step 2.5 radius / ``attack_steps`` in the direction of the
gradient's sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt, Le

from evaluations import _statistics
from methods.find import nearest
from methods.stage import AssayError, Dataset, Row, Scoring

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from methods.data import Cases, CaseTable, Locator

TASKS = ("classification",)
USES = (
    "methods.data",
    "methods.terms",
    "methods.checkpoint",
    "methods.architectures",
    "methods.head",
    "evaluations._statistics",
)

METRICS = ("accuracy", "nll", "balanced_accuracy", "g_mean", "f1_macro", "f_beta_macro", "f_beta", "auc")
# Those for two classes, and what is there for more.
TWO_CLASSES = {"f_beta": "f_beta_macro", "auc": "balanced_accuracy"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which cases, and what is made of the scores."""

    # Cases: images or tokens with a label, of the kind that the model was made for.
    data: Dataset = "digits/test"
    # What is measured beside accuracy and nll, which are always given.
    metrics: tuple[str, ...] = ("accuracy",)
    # How many times as much recall counts as precision, in f_beta and f_beta_macro.
    beta: Annotated[float, Gt(0)] = 1.0
    # Furthest that an attack moves a pixel, whose values go from 0 to 1; None for no attack.
    radius: Annotated[float, Gt(0), Le(1)] | None = None
    # Steps of the attack (Madry et al.: 40 on MNIST, 7 on CIFAR-10).
    attack_steps: Annotated[int, Gt(0)] = 10
    # Cases scored at once.
    batch: Annotated[int, Gt(0)] = 512
    # First cases that are used; None for all.
    limit: Annotated[int, Gt(0)] | None = None


@dataclass(frozen=True)
class Answers:
    """Of N cases: their labels, the classes they were put in, -log p of the label in nats, and all scores [N,V]."""

    labels: ndarray
    chosen: ndarray
    losses: ndarray
    scores: ndarray


def check(config: Config, data: Locator) -> None:
    """Refuse unknown metrics, those for two classes where there are more, and an attack on anything but images."""
    for metric in config.metrics:
        if metric not in METRICS:
            raise AssayError(f"classify: there is no metric {metric!r}{nearest(metric, METRICS)}")
    row = next(iter(data.rows(config.data)), {})
    asked = [metric for metric in config.metrics if metric in TWO_CLASSES]
    if asked and row.get("classes") != 2:
        raise AssayError(
            f"classify: the metric {asked[0]!r} is for two classes, and {config.data!r} has {row.get('classes')}; "
            f"ask for {TWO_CLASSES[asked[0]]!r} instead."
        )
    if config.radius is not None and "image" not in row:
        raise AssayError(f"classify: radius={config.radius} moves pixels, and {config.data!r} has no images.")


def evaluate(scoring: Scoring) -> list[Row]:
    """Rows ``accuracy`` and ``nll``, one for each further metric, and ``robust_accuracy``; n is the number of cases.

    Raises:
        AssayError: the rows are no cases of the kind that the model was made for.
    """
    config, model = scoring.config, scoring.model()
    check(config, scoring.data)
    batches = _batches(config, model, _table(scoring, model))
    found = answers(model, batches)
    correct = _statistics.mean(found.chosen == found.labels)
    rows = [
        _row(config, "accuracy", correct),
        _row(config, "nll", _statistics.mean(found.losses), unit="nats", better="lower"),
    ]
    further = [name for name in dict.fromkeys(config.metrics) if name not in ("accuracy", "nll")]
    rows += [_row(config, name, _estimate(found, name, config.beta)) for name in further]
    if config.radius is not None:
        right = [case for cases in batches for case in withstood(model, cases, config)]
        rows.append(_row(config, "robust_accuracy", _statistics.mean(right)))
    return rows


# --- scores ----------------------------------------------------------------------------------------------------


def _table(scoring: Scoring, model: Any) -> CaseTable:
    from methods.data import read_cases

    name = scoring.config.data
    table = read_cases(scoring.data.rows(name), name)
    table.check_model(model, name)
    return table[: scoring.config.limit]


def _batches(config: Config, model: Any, table: CaseTable) -> list[Cases]:
    return [cases.to(model.device) for cases in table.batches(config.batch, "cases")]


def answers(model: Any, batches: Sequence[Cases]) -> Answers:
    """What the model makes of the cases, in their order."""
    import numpy
    import torch

    from methods.terms import case_scores

    with torch.no_grad():
        scores = torch.cat([case_scores(model, cases).double().cpu() for cases in batches])
    labels = torch.cat([cases.labels.cpu() for cases in batches])
    losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    # numpy takes the first of equal scores everywhere; torch does not say which.
    chosen = numpy.argmax(scores.numpy(), axis=1)
    return Answers(labels.numpy(), chosen, losses.numpy(), scores.numpy())


def withstood(model: Any, cases: Cases, config: Config) -> list[bool]:
    """Whether each of the images stays right wherever the attack leads it."""
    import torch

    assert config.radius is not None
    clean, step = cases.inputs, 2.5 * config.radius / config.attack_steps
    lowest, highest = (clean - config.radius).clamp(min=0), (clean + config.radius).clamp(max=1)
    moved, right = clean, torch.ones_like(cases.labels, dtype=torch.bool)
    for _ in range(config.attack_steps):
        correct, uphill = _attacked(model, cases, moved)
        right &= correct
        moved = (moved + step * uphill.sign()).clamp(lowest, highest)
    correct, _ = _attacked(model, cases, moved)
    found: list[bool] = (right & correct).tolist()
    return found


def _attacked(model: Any, cases: Cases, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Whether moved cases are right [B], and the gradient of their losses by the inputs."""
    import torch

    from methods.terms import case_scores

    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        scores = case_scores(model, replace(cases, inputs=inputs))
        loss = torch.nn.functional.cross_entropy(scores, cases.labels, reduction="sum")
        (uphill,) = torch.autograd.grad(loss, inputs)
    return scores.argmax(-1) == cases.labels, uphill


# --- metrics ---------------------------------------------------------------------------------------------------


def measure(found: Answers, metric: str, beta: float = 1.0) -> float:
    """One of the metrics that need all cases at once, between 0 and 1."""
    from sklearn import metrics

    labels, chosen = found.labels, found.chosen
    if metric == "auc":
        return float(metrics.roc_auc_score(labels, found.scores[:, 1] - found.scores[:, 0]))
    if metric in ("balanced_accuracy", "g_mean"):
        return _mean_recall(labels, chosen, geometric=metric == "g_mean")
    average = "binary" if metric == "f_beta" else "macro"
    beta = 1.0 if metric == "f1_macro" else beta
    return float(metrics.fbeta_score(labels, chosen, beta=beta, average=average, zero_division=0))


def _mean_recall(labels: ndarray, chosen: ndarray, geometric: bool) -> float:
    """The mean over the classes that occur; a class that is never found makes the geometric one 0."""
    import numpy
    from sklearn.metrics import recall_score

    recalls = recall_score(labels, chosen, labels=numpy.unique(labels), average=None)
    if not geometric:
        return float(recalls.mean())
    return float(numpy.exp(numpy.log(recalls).mean())) if recalls.all() else 0.0


def _estimate(found: Answers, metric: str, beta: float) -> _statistics.Estimate:
    """A metric of all cases together has no standard error of their mean."""
    if metric == "auc" and len(set(found.labels.tolist())) < 2:
        raise AssayError("classify: auc compares two classes, and only one occurs: raise limit.")
    return _statistics.Estimate(measure(found, metric, beta), None, len(found.labels))


def _row(
    config: Config, metric: str, found: _statistics.Estimate, unit: str = "", better: Any = "higher"
) -> Row:
    """The task names what the number depends on."""
    task = config.data if config.limit is None else f"{config.data} limit={config.limit}"
    if metric.startswith("f_beta"):
        task += f" beta={config.beta:g}"
    if metric == "robust_accuracy":
        task += f" radius={config.radius:g} attack_steps={config.attack_steps}"
    return Row(task, metric, found.value, found.stderr, found.n, unit, better)
