"""Gradient difference: raise the loss on the forget rows, lower it on the retain rows.

Liu et al., "Continual Learning and Private Unlearning"; as "gradient difference" and, with the KL retain
term, "KL minimisation" in Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs".

    L = gamma * ( - 1/M sum l )  +  alpha * L_retain
    L_retain = 1/M_r sum l_retain                         retain_loss="nll"
             = 1/P   sum_{b,t} KL( p_start || p )[b,t]    retain_loss="kl", every position of the retain rows

The code (locuslab/open-unlearning, ``grad_diff.py``) averages the KL over every position, padding included;
so does this. Published weights are (1, 1). What decides between this method and its rivals is mostly
``alpha``: see the claim in ``unlearn.satimp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods.stage import Claim, Terms
from methods.terms import answer_nll, forward
from methods.unlearn import Retaining, UnlearnBatch, keeps_to_start, retain_term

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe with gamma and alpha; both are 1 in open-unlearning's ``GradDiff.yaml``."""


CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="GradDiff keeps a lower retain NLL than gradient ascent at forget NLL 2, already at weights (1, 1).",
        source="pilot in the embedded world: 0.22 +- 0.02 against 0.85 +- 0.12, every one of three seeds",
        metric="curve.probe.retain@probe.forget=2",
        subject="*unlearn.grad_diff*",
        relation="lower",
        other="*unlearn.grad_ascent*",
        subject_options={"gamma": 1.0, "alpha": 1.0},
    ),
)


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term."""
    return keeps_to_start(config)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the answer NLL of the forget rows, weighted -gamma; ``retain`` as ``retain_loss`` says."""
    forget = answer_nll(batch.forget, forward(model, batch.forget), weight=-config.gamma)
    return {"forget": forget} | retain_term(config, model, batch, reference)
