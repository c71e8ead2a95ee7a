"""Smooth adversarial comp-sum losses: fit the cases, and keep the margins where they are within a ball around each.

Mao, Mohri, Zhong 2023 (ICML), "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", the section on
adversarial comp-sum losses and its algorithm ADV-COMP-SUM. With the margins m(x, y) = (h(x, y) - h(x, y'))_y' and a
comp-sum function Phi of tau (``loss=comp_sum(tau=...)``; tau = 1 is the logistic loss),

    L = Phi( sum_{y' != y} exp(-m(x, y)_y' / rho) ) + nu sup_{|x' - x|_p <= radius} | m(x', y) - m(x, y) |_2

as the mean over cases. From the paper: the two terms, rho, nu and the ball. Ours, as no official code was found: how
the supremum is looked for, and the defaults. It is looked for by projected gradient steps (Madry, Makelov, Schmidt,
Tsipras, Vladu 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks"), in evaluation mode and within
inputs from 0 to 1; as the norm has no gradient at x' = x, the first step follows that of the cross entropy, so nothing
is drawn. The step found is held fixed while the gradient of L is taken. Any loss on scores may stand for Phi: it is
given the scores divided by rho.

Inputs have to be images: the neighbours of a token are no tokens. A step costs ``attack_steps`` + 2 further forward and
``attack_steps`` + 1 further backward passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods import loss as losses
from methods.stage import AssayError, Claim, Component, Loss, Stage, Term, Terms
from methods.terms import case_scores
from methods.train._recording import Recording, refuse_hidden
from methods.train.classify import Classifying

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Cases
    from methods.gradient import Batch, Outer

SEEDED = True
TASKS = ("classification",)
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.loss")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Classifying):
    """Cases and what is learnt of them, the two weights of the loss and the ball."""

    # the comp-sum loss Phi; None: cross entropy, which is tau = 1
    loss: Loss | None = Component("comp_sum")
    # the paper's rho: margins are divided by it
    rho: Annotated[float, Gt(0)] = 1.0
    # the paper's nu: weight of the change of the margins
    nu: Annotated[float, Ge(0)] = 1.0
    # of the ball, with inputs from 0 to 1 (usual for CIFAR-10: 8/255)
    radius: Annotated[float, Gt(0)] = 8 / 255
    # the ball's norm: the largest change of an input, or the Euclidean length of all changes
    norm: Literal["inf", "2"] = "inf"
    # projected gradient steps in search of the supremum (usual in training: 10)
    attack_steps: Annotated[int, Gt(0)] = 10
    # length of such a step in the ball's norm (usual for CIFAR-10: 2/255)
    attack_step_size: Annotated[float, Gt(0)] = 2 / 255


def prepare(config: Config, model: Any, stage: Stage, parts: Mapping[str, Any]) -> None:
    """AssayError for inputs that are no real numbers, and for a loss that has no scores."""
    refuse_hidden("train.smooth_adversarial", config.loss)
    if not parts["train"].inputs.is_floating_point():
        raise AssayError(
            f"train.smooth_adversarial moves inputs a little, but those of {config.data} are tokens, between which "
            f"there is nothing: take a data set of images, or train.classify."
        )


def loss(config: Config, model: Any, batch: Batch) -> Terms:
    """``train``, Phi of the scores divided by rho, and ``margins``, how much they can change."""
    cases: Any = batch.train
    recording = Recording(model, config.rho)
    terms = dict(losses.terms(config.loss, recording, cases, config.weighting, batch))
    before = margins(recording.scores(cases), cases.labels)
    after = margins(case_scores(model, worst(config, model, cases)), cases.labels)
    terms["margins"] = Term(_length(after - before).sum(), cases.examples, config.nu)
    return terms


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """m [N,V]: the score of each case's own class minus that of every class, from scores [N,V]."""
    return scores.gather(-1, labels[:, None]) - scores


def outer(config: Config) -> Outer | None:
    """How the means make up the objective where Phi's stand-in is no sum over cases."""
    base = losses.outer(config.loss)
    return None if base is None else lambda means: base(means) + config.nu * means["margins"]


# --- the supremum -----------------------------------------------------------------------------------------------------


def worst(config: Config, model: Any, cases: Cases) -> Cases:
    """The cases moved within their balls to where their margins change most, as far as the steps find."""
    import torch
    from torch.nn.functional import cross_entropy

    training = model.training
    model.eval()
    with torch.no_grad():
        here = margins(case_scores(model, cases), cases.labels)
    moved = cases
    for step in range(config.attack_steps + 1):
        with torch.enable_grad():
            moved = replace(moved, inputs=moved.inputs.detach().requires_grad_())
            scores = case_scores(model, moved)
            # At the start the margins have not changed, and the length of nothing has no gradient.
            change = (
                _length(margins(scores, cases.labels) - here).sum()
                if step
                else cross_entropy(scores, cases.labels, reduction="sum")
            )
        (slope,) = torch.autograd.grad(change, moved.inputs)
        moved = replace(moved, inputs=_step(config, cases.inputs, moved.inputs.detach(), slope))
    model.train(training)
    return moved


def _step(config: Config, center: Tensor, inputs: Tensor, slope: Tensor) -> Tensor:
    """One step up the slope [B,...], back into the ball around ``center`` and into [0, 1]."""
    if config.norm == "inf":
        change = inputs + config.attack_step_size * slope.sign() - center
        change = change.clamp(-config.radius, config.radius)
    else:
        change = inputs + config.attack_step_size * slope / _lengths(slope) - center
        change = change * (config.radius / _lengths(change)).clamp_max(1.0)
    return (center + change).clamp(0.0, 1.0)


def _length(values: Tensor) -> Tensor:
    """The Euclidean length [N] of each row [N,...]; its gradient at 0 is 0."""
    from torch.linalg import vector_norm

    return vector_norm(values.flatten(1), dim=-1)


def _lengths(values: Tensor) -> Tensor:
    """The same as [N,1,...], never 0, to divide by."""
    import torch

    shape = (-1, *[1] * (values.ndim - 1))
    return _length(values).clamp_min(torch.finfo(values.dtype).tiny).view(shape)
