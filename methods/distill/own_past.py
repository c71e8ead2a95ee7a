"""Self-distillation from the student's own past: cross-entropy, and the divergence from what it said epochs ago.

Du, Zhou, Feng, Tan, Zhou 2022 (NeurIPS), "Sharpness-Aware Training for Free" (AngusDujw/SAF, ``SAF_train.py``).

    L = CE + lambda T**2 * 1/M sum_{b,t} D( p_{e-E,T} || p_{e,T} )[b,t],     e > start_epoch,  E = past_epochs,  T = 5

The teacher is a history: for every answer token the ``top_k`` likeliest entries of the last E + 1 epochs, resumed with
the run and no part of the written model (see ``methods/term/own_past.py``). Until there is a past the second term is
not there. Another history is a running mean of the weights: ``train.saf(variant="mesa")``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from annotated_types import Ge, Gt

from methods.distill import Recovering
from methods.stage import Claim, Component
from methods.term import of
from methods.term.own_past import STRENGTH, Remembering

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
class Config(Remembering, Recovering):
    """The shared recipe without a teacher, and the past."""

    # passes over the rows: more than start_epoch and past_epochs, or the past never comes
    epochs: Annotated[float, Gt(0)] | None = 10.0
    # the paper's lambda, the weight of the past (the official README: 0.3; its parser: 0.16)
    strength: Annotated[float, Ge(0)] = STRENGTH


def terms(config: Config) -> tuple[Component, ...]:
    """The labels, and the past."""
    past = {item.name: getattr(config, item.name) for item in fields(Remembering)}
    return of("cross_entropy"), of("own_past", weight=config.strength, **past)
