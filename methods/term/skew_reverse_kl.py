"""Skew reverse KL: the student is compared with a mixture of itself and the teacher.

Ko et al. 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models"; with p the teacher and
q the student at one temperature,

    l = D(q ‖ (1 - skew) * p + skew * q)         0 <= l <= -log skew

The student's gradient goes through the mixture too, as in the official code (jongwooko/distillm,
``skewed_reverse_kl``, lam = skew). At skew 0 it is the reverse KL. With the teacher's top-k and one bucket for the rest
the value is a lower bound.
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

    # share of the student in the mixture (the paper and its code: 0.1)
    skew: Annotated[float, Ge(0), Lt(1)] = 0.1


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(student ‖ mixture) of each token [n], in nats, from log-probabilities [n,V]."""
    return skewed(log_q, log_p, config.skew)
