"""Refusal by preference: rather say "I do not know" than the answer to be forgotten.

Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs" (its "preference optimization" baseline), in the form
of locuslab/open-unlearning, ``dpo.py``:

    L = - gamma * (2 / beta) * mean_b log sigmoid( beta * [ (s_l - s_l^start) - (s_w - s_w^start) ] )
        + alpha * L_retain

w is a refusal drawn anew each time a forget question is seen, l the forgotten answer; both likelihoods are sums over
the answer, and relative to the starting model, under which they are computed once. The code's class default beta = 1
is overridden by its yaml with 0.1. (The DPO baseline in UCSC-REAL/FLAT overwrites its reference log-ratio with 0 and
is another method.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods.stage import Claim, Dataset, Terms
from methods.unlearn import Rows, Source, Templates, UnlearnBatch, keeps_to_start, retain_term, retained
from methods.unlearn._preference import Preferring, preference

SEEDED = True
USES = (
    "methods.loop",
    "methods.data",
    "methods.checkpoint",
    "methods.terms",
    "methods.unlearn._preference",
)
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Preferring):
    """The shared recipe, gamma and alpha, beta, and what to say instead."""

    # refusals, a line each, of which every question gets a random one (TOFU's own list: "tofu/idontknow")
    refusals: Dataset = "authors/refusals"


def parts(config: Config) -> dict[str, Source]:
    """The forget rows, their questions with refusals, and the retain rows where they count."""
    template = Templates(config.forget, config.refusals)
    return {"forget": Rows(config.forget), "template": template, **retained(config)}


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term: the likelihoods at the start are remembered."""
    return keeps_to_start(config)


def remembers(config: Config) -> tuple[str, ...]:
    """Both answers are compared with what they were."""
    return ("forget", "template")


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the preference loss, a mean over sequences; ``retain`` as ``retain_loss`` says."""
    forget = preference(config, model, batch.template, batch.forget, reference)
    return {"forget": forget} | retain_term(config, model, batch, reference)
