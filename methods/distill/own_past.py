"""Self-distillation from the student's own past: cross-entropy, and the divergence from what it said epochs ago.

Du, Zhou, Feng, Tan, Zhou 2022 (NeurIPS), "Sharpness-Aware Training for Free" (AngusDujw/SAF, ``SAF_train.py``).

    L = CE + lambda T**2 * 1/M sum_{b,t} D( p_{e-E,T} || p_{e,T} )[b,t],     e > start_epoch,  E = past_epochs,  T = 5

The teacher is a history: for every answer token the ``top_k`` likeliest entries of the last E + 1 epochs, resumed with
the run and no part of the written model (see ``methods/term/own_past.py``). Until there is a past the second term is
not there. Another history is a running mean of the weights: ``train.saf(variant="mesa")``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from methods.distill import Recovering
from methods.stage import Claim, Component, How
from methods.term import of

SEEDED = True
USES = (
    "methods.loop",
    "methods.data",
    "methods.checkpoint",
    "methods.terms",
    "methods.term",
    "methods.teacher",
)
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Recovering):
    """The shared recipe without a teacher, and the past."""

    # passes over the rows: more than start_epoch and past_epochs, or the past never comes
    epochs: Annotated[float, Gt(0)] | None = 10.0
    # the paper's lambda, the weight of the past (the official README: 0.3; its parser: 0.16)
    strength: Annotated[float, Ge(0)] = 0.3
    # both distributions are softened by it (official code: 5)
    temperature: Annotated[float, Gt(0)] = 5.0
    # how many epochs earlier the past is (official code: 3; its README: 2 or 3)
    past_epochs: Annotated[int, Gt(0)] = 3
    # the last epoch without it, counted from 0 (official code: 5)
    start_epoch: Annotated[int, Ge(-1)] = 5
    # how many of the likeliest entries are kept of each token; a vocabulary no larger is kept whole
    top_k: Annotated[int, Gt(0)] = 64
    # a past that would take more than this, in gigabytes, is refused before training
    history_gigabytes: Annotated[float, Gt(0), How] = 2.0


def terms(config: Config) -> tuple[Component, ...]:
    """The labels, and the past."""
    return (
        of("cross_entropy"),
        of(
            "own_past",
            weight=config.strength,
            temperature=config.temperature,
            past_epochs=config.past_epochs,
            start_epoch=config.start_epoch,
            top_k=config.top_k,
            history_gigabytes=config.history_gigabytes,
        ),
    )
