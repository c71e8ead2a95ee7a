"""KL minimisation: raise the loss on the forget rows while staying close to the starting model on the retain rows.

"KL minimization" in Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs".

    L = gamma * ( - 1/M sum l )  +  alpha * 1/P sum_{b,t} KL( p_start || p )[b,t]     every position of the retain rows

Both codes (locuslab/tofu, ``dataloader.py``, and locuslab/open-unlearning, ``grad_diff.py``) average the divergence
over every position, prompt and padding included; so does this. It is ``unlearn.grad_diff`` with ``retain_loss="kl"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from methods.stage import Claim, Terms
from methods.terms import answer_nll, forward
from methods.unlearn import Retaining, UnlearnBatch, keeps_to_start, retain_term

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe with gamma and alpha; both are 1 in TOFU's code."""

    # the divergence is what the method is
    retain_loss: Literal["kl"] = "kl"


def needs_reference(config: Config) -> bool:
    """For the divergence."""
    return keeps_to_start(config)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the answer NLL of the forget rows, weighted -gamma; ``retain``: the divergence."""
    forget = answer_nll(batch.forget, forward(model, batch.forget), weight=-config.gamma)
    return {"forget": forget} | retain_term(config, model, batch, reference)
