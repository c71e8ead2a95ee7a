"""Recovery without a teacher: plain cross-entropy on the answers, the control of every distillation.

Kurtic et al., "Sparse Finetuning for Inference Acceleration of Large Language Models" compares its SquareHead
loss with this one.

    L = 1/M sum_{b,t} - log q(y[b,t] | y[b,<t], x[b])        M = answer tokens of the batch

It is ``train.sft`` under the same recipe as the other members of this family, so that a difference between them
is a difference of losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods.distill import DistillBatch, Recovering
from methods.stage import Claim, Terms
from methods.terms import answer_nll, forward

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Recovering):
    """The shared recipe; there is no teacher."""


CLAIMS: tuple[Claim, ...] = ()


def loss(config: Config, student: Any, teacher: None, batch: DistillBatch) -> Terms:
    """``cross_entropy``: the answer NLL of the training rows."""
    return {"cross_entropy": answer_nll(batch.train, forward(student, batch.train))}
