"""Recovery without a teacher: plain cross-entropy on the answers, the control of every distillation.

Kurtic et al., "Sparse Finetuning for Inference Acceleration of Large Language Models" compares its SquareHead
loss with this one.

    L = 1/M sum_{b,t} - log q(y[b,t] | y[b,<t], x[b])        M = answer tokens of the batch

It is ``train.sft`` under the same recipe as the other members of this family, so that a difference between them
is a difference of losses.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.distill import Recovering
from methods.stage import Claim, Component
from methods.term import of

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.term")


@dataclass(frozen=True, kw_only=True)
class Config(Recovering):
    """The shared recipe; there is no teacher."""


CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="After magnitude pruning to 70 %, training on the answers for 100 steps wins back "
        "most of what was lost: the retain NLL is at least 0.3 nats below the pruned model's.",
        source="pilot in the embedded world: 0.59-0.75 before, 0.03-0.05 after (3 of 3 seeds)",
        metric="tofu.retain_nll",
        subject="*prune.magnitude(*sparsity=0.7*) > distill.cross_entropy*",
        relation="lower",
        other="parent",
        margin=0.3,
    ),
)


def terms(config: Config) -> tuple[Component, ...]:
    """``cross_entropy``: the answer NLL of the training rows."""
    return (of("cross_entropy"),)
