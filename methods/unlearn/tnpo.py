"""TNPO: negative preference optimisation token by token, and its weighted form W-TNPO.

Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond".

    L = gamma * ( - 1/M sum_{b,t} w[b,t] l[b,t] )  +  alpha * L_retain
    w = stopgrad( 2 p ** (beta + extra) / (p ** beta + p_start ** beta) ),      p = exp(-l)

The weight is the factor that the gradient of NPO has, with a token in the place of the whole answer: 1 at the start,
and smaller the less likely the token is than it was. ``extra`` makes it W-TNPO. The weight carries no gradient. The
likelihoods at the start are computed once.

Where paper and code disagree. The code (tmlr-group/G-effect, ``dataloader.py``) adds 1e-5 to the denominator, which for
beta = 4 switches off every token that was less likely than 0.05 at the start, too; here ``epsilon`` does that. Its only
retain term is the KL divergence with weight 1 (``tnpo_kl``), the default here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.stage import Claim, Term, Terms
from methods.terms import forward, token_nll
from methods.unlearn import Retaining, UnlearnBatch, keeps_to_start, retain_term, start_nll

if TYPE_CHECKING:
    from torch import Tensor

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe, gamma and alpha, and what the weight is made of."""

    # divergence from the starting model, as in the code's tnpo_kl
    retain_loss: Literal["nll", "kl"] = "kl"
    # inverse temperature; the code takes it from the command line and states none
    beta: Annotated[float, Gt(0)] = 1.0
    # further exponent of the current probability: 0 is TNPO, above 0 W-TNPO (1.5 where the code states one)
    extra: Annotated[float, Ge(0)] = 0.0
    # added to the denominator of the weight (the code: 1e-5)
    epsilon: Annotated[float, Ge(0)] = 0.0


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term: the likelihoods at the start are remembered."""
    return keeps_to_start(config)


def remembers(config: Config) -> tuple[str, ...]:
    """A token is compared with what it was."""
    return ("forget",)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the weighted answer NLL, weighted -gamma; ``retain`` as ``retain_loss`` says."""
    losses = token_nll(forward(model, batch.forget))
    weights = reweight(config, losses.detach(), start_nll(batch.forget, reference))
    forget = Term((weights * losses).sum(), batch.forget.tokens, -config.gamma)
    return {"forget": forget} | retain_term(config, model, batch, reference)


def reweight(config: Config, now: Tensor, start: Tensor) -> Tensor:
    """The weight of each token from its loss now and at the start; both fractions divided by p ** beta.

    A ratio that overflows makes the weight 0, which is its limit.
    """
    others = (config.beta * (now - start)).exp()
    if config.epsilon > 0:
        others = others + config.epsilon * (config.beta * now).exp()
    return 2 * (-config.extra * now).exp() / (1 + others)
