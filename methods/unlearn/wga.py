"""WGA: gradient ascent that weighs a token by its own probability, and so lets go of what is forgotten.

Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond".

    L = gamma * ( - 1/M sum_{b,t} w[b,t] l[b,t] )  +  alpha * L_retain,      w = stopgrad( p ** beta ),  p = exp(-l)

Plain gradient ascent pushes hardest where nothing is left to forget (its gradient has the factor 1/p); the weight takes
that away. It carries no gradient itself. Paper and codes (tmlr-group/G-effect, ``dataloader.py``, and
locuslab/open-unlearning, ``wga.py``) agree; the first has no retain term. ``unlearn.satimp`` with ``beta2=0`` is the
same loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge

from methods.stage import Claim, Term, Terms
from methods.terms import forward, token_nll
from methods.unlearn import Retaining, UnlearnBatch, keeps_to_start, retain_term

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe, gamma and alpha (1 and 1 in open-unlearning's ``WGA.yaml``), and beta."""

    # exponent of the probability; 0 is gradient ascent (open-unlearning's WGA.yaml)
    beta: Annotated[float, Ge(0)] = 1.0


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term."""
    return keeps_to_start(config)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the weighted answer NLL, weighted -gamma; ``retain`` as ``retain_loss`` says."""
    losses = token_nll(forward(model, batch.forget))
    weights = (-config.beta * losses.detach()).exp()
    forget = Term((weights * losses).sum(), batch.forget.tokens, -config.gamma)
    return {"forget": forget} | retain_term(config, model, batch, reference)
