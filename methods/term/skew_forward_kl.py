"""Skew forward KL: the teacher is compared with a mixture of itself and the student.

Ko et al. 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models"; with p the teacher and
q the student at one temperature,

    l = D(p ‖ skew * p + (1 - skew) * q)         0 <= l <= -log skew

The official code (jongwooko/distillm, ``skewed_forward_kl``, lam = skew) returns the cross-entropy with the mixture,
which is higher by the teacher's entropy and not 0 for equal models; the gradient is the same. At skew 0 it is the
forward KL. With the teacher's top-k and one bucket for the rest the value is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

from methods.term import Softened
from methods.term._divergences import skewed

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.term", "methods.terms")
TOP_K = True


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """Weight, temperature and skew."""

    # share of the teacher in the mixture (the paper and its code: 0.1)
    skew: Annotated[float, Ge(0), Lt(1)] = 0.1


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(teacher ‖ mixture) of each token [n], in nats, from log-probabilities [n,V]."""
    return skewed(log_p, log_q, config.skew)
