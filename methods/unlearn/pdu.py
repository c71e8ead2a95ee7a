"""PDU: flatten the logits on the forget rows, under a constraint on the retain loss that a dual variable enforces.

Entesari et al., "Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models"
(arXiv 2506.05314).

    L = gamma * 1/N sum_{b,t} ( max_v z[b,t,v] - mean_v z[b,t,v] ) ** 2  +  multiplier * ( L_retain - epsilon )
    after each step:   multiplier <- max( 0, multiplier + step_size * ( L_retain - epsilon ) )

The N positions of the first sum are those whose own label counts, *not* those that predict one: an answer's tokens and
its end, each one place later than in a cross-entropy. The distribution that predicts the first token is not flattened.
That is how the code (locuslab/open-unlearning, ``pdu.py``) defines the loss, and its published numbers with it.

``alpha`` is the multiplier at the start; it stays for the warm-up and then rises while the constraint is violated and
falls while it holds. ``epsilon`` has to be above the retain loss of the starting model, otherwise the multiplier only
ever rises. The code changes it after each micro-batch; here it is once a step, with the mean over the global batch, so
that it does not depend on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le

from methods.loop import Adaptive
from methods.stage import Claim, Term, Terms
from methods.terms import forward
from methods.unlearn import Retaining, keeps_to_start, retain_term

if TYPE_CHECKING:
    from methods.data import Part
    from methods.gradient import Batch

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe, gamma, and how the weight of the retain term is found."""

    # the multiplier at the start (50 to 100 in the published recipes)
    alpha: Annotated[float, Gt(0)] = 50.0
    # the retain loss that is allowed, in nats; it has to be above that of the starting model (0.3 for TOFU)
    epsilon: Annotated[float, Ge(0)] = 0.3
    # how fast the multiplier follows the violation (open-unlearning's class default)
    step_size: Annotated[float, Ge(0)] = 1.0
    # share of the steps before it first changes (5 of the 10 epochs)
    dual_warmup_share: Annotated[float, Ge(0), Le(1)] = 0.5


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term."""
    return keeps_to_start(config)


def adaptive(config: Config) -> Adaptive:
    """The multiplier; ``violation`` is 0 during the warm-up."""

    def after(values: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        return {"multiplier": max(0.0, values["multiplier"] + config.step_size * means["violation"])}

    return Adaptive({"multiplier": config.alpha}, after)


def loss(config: Config, model: Any, batch: Batch, reference: Any) -> Terms:
    """``forget``: squared height of the largest logit; ``constraint``: retain loss minus epsilon, times the multiplier.

    ``violation`` is the same without a gradient, once the multiplier may change.
    """
    retain = retain_term(config, model, batch, reference)["retain"]
    excess = retain.sum - config.epsilon * retain.count
    begun = batch.step >= config.dual_warmup_share * batch.steps
    return {
        "forget": flatness(model, batch.forget, config.gamma),
        "constraint": Term(excess, retain.count, batch.values["multiplier"]),
        "violation": Term(excess.detach() * begun, retain.count, 0.0),
    }


def flatness(model: Any, part: Part, weight: float) -> Term:
    """(largest logit - mean logit) ** 2, a mean over the positions whose own label counts."""
    logits = forward(model, part).all_logits[part.labels != -100]
    return Term((logits.amax(-1) - logits.mean(-1)).square().sum(), part.labelled, weight)
