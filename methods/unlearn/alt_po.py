"""Alternate preference optimisation: rather another plausible answer than the one to be forgotten.

Mekala et al., "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models"
(arXiv 2409.13474).

    L = - gamma * (2 / beta) * mean_b log sigmoid( beta * [ (s_l - s_l^start) - (s_w - s_w^start) ] )
        + alpha * L_retain

The loss is that of ``unlearn.idk_dpo``; w is not a refusal but one of several answers that the starting model made up
itself, which a stage of its own writes first:

    others: start > data.alternates(data="authors/forget10")
    forgot: start > unlearn.alt_po(forget="authors/forget10", alternates=others)

Paper and code (molereddy/Alternate-Preference-Optimization, and ``community/methods/AltPO`` of
locuslab/open-unlearning) agree. open-unlearning suggests to search beta in 0.05, 0.1, 0.5, the learning rate in 1e-5,
2e-5, 5e-5 and alpha in 1, 2, 5; the authors' yaml has a learning rate of 5e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods.stage import Claim, Data, Terms
from methods.unlearn import Alternates, Rows, Source, UnlearnBatch, keeps_to_start, retain_term, retained
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
    """The shared recipe, gamma and alpha, beta, and the other answers."""

    # chain that ends in data.alternates, made from the same questions; a question gets a random one of its answers
    alternates: Data


def parts(config: Config) -> dict[str, Source]:
    """The forget rows, their questions with other answers, and the retain rows where they count."""
    alternate = Alternates(config.forget, "alternates")
    return {"forget": Rows(config.forget), "alternate": alternate, **retained(config)}


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term: the likelihoods at the start are remembered."""
    return keeps_to_start(config)


def remembers(config: Config) -> tuple[str, ...]:
    """Both answers are compared with what they were."""
    return ("forget", "alternate")


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the preference loss, a mean over sequences; ``retain`` as ``retain_loss`` says."""
    forget = preference(config, model, batch.alternate, batch.forget, reference)
    return {"forget": forget} | retain_term(config, model, batch, reference)
