"""TAID: the target moves from the student's own distribution to the teacher's while training goes on.

Shing et al. 2025, "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language
Models". With logits z, q = softmax(z_student) and sg for "no gradient",

    p_t = softmax((1 - t) * sg(z_student) + t * z_teacher),      l = - sum_v p_t log q

and after step n of N, with the mean loss J of its batch,

    d = (J_before - J) / (J_before + 1e-15),     m = beta * m + (1 - beta) * d
    t = min(t_end, max(t_start + (t_end - t_start) * n / N,  t + alpha * sigmoid(m) * (1 - t)))

The first step only leaves its loss behind. t is never below the straight line from t_start to t_end, which with the
default alpha is what mostly moves it. The value is a cross-entropy, as in the official code (SakanaAI/TAID,
``src/distil_losses/taid.py``): the schedule follows its *relative* change, so the entropy of p_t must stay in; the
gradient q - p_t is that of the KL.

The official code moves t after each micro-batch; here it moves once an optimizer step, by the mean over the global
batch, so that micro-batches change nothing. The state goes into the stage's resume file. t needs the teacher's logits
of the whole vocabulary, and a recorded top-k does not have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le, Lt

from methods.stage import AssayError
from methods.term import Weighted
from methods.term._divergences import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import Tokens

USES = ("methods.term", "methods.terms")
# the code's guard against a loss of 0
EPSILON = 1e-15


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """Weight, and how the target moves."""

    # share of the teacher's logits in the first step (the code: 0.4; its StableLM script: 0.2)
    t_start: Annotated[float, Ge(0), Lt(1)] = 0.4
    # share at the end of training
    t_end: Annotated[float, Gt(0), Le(1)] = 1.0
    # largest share of the way to 1 that one step may add to the straight line (the code: 5e-4)
    alpha: Annotated[float, Ge(0), Le(1)] = 5e-4
    # how slowly the momentum of the loss changes (the code: 0.99)
    beta: Annotated[float, Ge(0), Le(1)] = 0.99

    def __post_init__(self) -> None:
        """The target moves towards the teacher."""
        if self.t_start > self.t_end:
            raise AssayError(
                f"taid: t_start ({self.t_start}) is above t_end ({self.t_end}), and the target only moves towards the "
                "teacher: lower t_start or raise t_end."
            )


def start(config: Config) -> dict[str, float]:
    """t, the momentum, and the loss of the step before; -1 stands for no step yet."""
    return {"t": config.t_start, "momentum": 0.0, "previous": -1.0}


def after(
    config: Config, values: Mapping[str, float], mean: float, step: int, steps: int
) -> dict[str, float]:
    """The values for the next step, from the mean loss of the 0-based ``step`` just done."""
    if values["previous"] < 0:
        return {**values, "previous": mean}
    change = (values["previous"] - mean) / (values["previous"] + EPSILON)
    momentum = config.beta * values["momentum"] + (1 - config.beta) * change
    moved = values["t"] + config.alpha * _sigmoid(momentum) * (1 - values["t"])
    line = config.t_start + (config.t_end - config.t_start) * step / steps
    return {"t": min(config.t_end, max(line, moved)), "momentum": momentum, "previous": mean}


def token_losses(config: Config, tokens: Tokens) -> Tensor:
    """The cross-entropy with the interpolated target of each token [n], in nats."""
    assert tokens.teacher is not None
    return cross_entropy(
        target(tokens.student, tokens.teacher, tokens.values["t"]), tokens.student.log_softmax(-1)
    )


def target(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """log p_t [n,V] from logits [n,V]; -inf where either is. The student's side has no gradient."""
    student = student.detach()
    absent = student.isneginf() | teacher.isneginf()
    mixed = (1 - share) * student.masked_fill(absent, 0.0) + share * teacher.masked_fill(absent, 0.0)
    return mixed.masked_fill(absent, -math.inf).log_softmax(-1)


def _sigmoid(value: float) -> float:
    """1 / (1 + exp(-x)), without an exponential that overflows."""
    return 0.5 * (1 + math.tanh(value / 2))
