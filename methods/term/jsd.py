"""Generalised Jensen-Shannon divergence, between forward and reverse KL.

Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD); with
p the teacher and q the student at one temperature,

    M = beta * p + (1 - beta) * q,      l = beta * D(p ‖ M) + (1 - beta) * D(q ‖ M)

At beta 0 and 1 it is defined as D(p ‖ q) and D(q ‖ p), as huggingface/trl has it. That is a jump: the formula goes to
0 there, and only l / beta goes to D(p ‖ q) as beta does to 0. In between it is at most the entropy of (beta, 1 - beta).

One loss, three names of its parameter: ``js_distance(lam)`` of jongwooko/distillm (lam 0.9) is beta = 1 - lam, and
``teacher_weight`` of SakanaAI/TAID's ``JS`` is beta. trl's ``temperature`` (0.9) is that of the sampling and does not
enter the loss. With the teacher's top-k and one bucket for the rest the value is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from methods.term import Softened
from methods.term._divergences import jensen_shannon

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.term", "methods.terms")
TOP_K = True


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """Weight, temperature and the teacher's share of the mixture."""

    # share of the teacher in M; 0: forward KL, 1: reverse KL (GKD: 0.5)
    beta: Annotated[float, Ge(0), Le(1)] = 0.5


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence of each token [n], in nats, from log-probabilities [n,V]."""
    return jensen_shannon(log_p, log_q, config.beta)
