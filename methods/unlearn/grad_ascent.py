"""Gradient ascent: raise the loss on what is to be forgotten, and do nothing else.

Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models"; the baseline of Maini et
al., "TOFU: A Task of Fictitious Unlearning for LLMs".

    L = - 1/M  sum_{b,t} l[b,t]          l = -log p(y[b,t] | y[b,<t], x[b]),  M = answer tokens of the batch

Paper and code (locuslab/open-unlearning, ``grad_ascent.py``) agree. No retain rows are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods.stage import Claim, Terms
from methods.terms import answer_nll, forward
from methods.unlearn import UnlearnBatch, Unlearning

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Unlearning):
    """The shared recipe; gradient ascent has no option of its own."""


CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="Gradient ascent wrecks what should be kept: at forget NLL 2 the retain NLL is at least 0.5, "
        "with authors' default-sized model, lr 3e-4, batch 16, clip 1.",
        source="pilot in the embedded world: retain NLL 0.85 +- 0.12 at forget NLL 2 (n = 3), 0.005 before",
        metric="curve.probe.retain@probe.forget=2",
        subject="*unlearn.grad_ascent*",
        relation="at_least",
        value=0.5,
    ),
)


def needs_reference(config: Config) -> bool:
    """Never."""
    return False


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the answer NLL of the forget rows, weighted -1."""
    return {"forget": answer_nll(batch.forget, forward(model, batch.forget), weight=-1.0)}
