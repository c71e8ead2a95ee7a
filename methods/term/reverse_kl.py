"""Reverse KL: the student is pulled to where the teacher puts most of its mass, and gives up the rest.

Gu, Dong, Wei, Huang 2024, "MiniLLM: Knowledge Distillation of Large Language Models", token by token; with p
the teacher and q the student at one temperature,

    l = D(q ‖ p) = sum_v q (log q - log p)

It is DistiLLM's ``reverse_kl``, the single-step term of MiniLLM (microsoft/LMOps, huggingface/trl) and trl's GKD at
beta 1. The gradient goes through q, also where it weighs the sum; nothing is multiplied by T**2 unless asked for. With
the teacher's top-k and one bucket for the rest the value is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.term import Softened
from methods.terms import relative_entropy

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.term", "methods.terms")
TOP_K = True


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """Weight and temperature."""


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(student ‖ teacher) of each token [n], in nats, from log-probabilities [n,V]."""
    return relative_entropy(log_q, log_p)
