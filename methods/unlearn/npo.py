"""Negative preference optimisation: gradient ascent that lets go of answers already less likely than before.

Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning".

    L = gamma * (2 / beta) * mean_b log( 1 + (p(y_b|x_b) / p_start(y_b|x_b)) ** beta )  +  alpha * L_retain
      = - gamma * (2 / beta) * mean_b log sigmoid( beta * (s_b - s_b^start) )  + ...

``s_b`` is the negative log-likelihood of the whole answer, *not* divided by its length. Paper and code
(locuslab/open-unlearning, ``npo.py``) agree; the code's class default beta = 1 is overridden by its yaml with 0.1.
(muse_bench's "NPO" compares raw logits over the whole vocabulary and is another method.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt

from methods.stage import Claim, Term, Terms
from methods.terms import forward, frozen, sequence_nll
from methods.unlearn import Retaining, UnlearnBatch, retain_term

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe, gamma and alpha (1 and 1 in open-unlearning's ``NPO.yaml``), and beta."""

    # inverse temperature: small is close to gradient ascent, large stops earlier (open-unlearning's NPO.yaml)
    beta: Annotated[float, Gt(0)] = 0.1


CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="NPO (beta 0.1, weights (1, 1)) keeps a lower retain NLL than gradient ascent at forget NLL 2.",
        source="pilot in the embedded world: 0.57 +- 0.08 against 0.85 +- 0.12, every one of three seeds",
        metric="curve.probe.retain@probe.forget=2",
        subject="*unlearn.npo*",
        relation="lower",
        other="*unlearn.grad_ascent*",
    ),
    Claim(
        sentence="NPO (beta 0.1) has a higher retain NLL than GradDiff at forget NLL 2, both at weights (1, 1): "
        "on a small memorised world NPO lies between gradient ascent and GradDiff.",
        source="pilot in the embedded world: 0.57 +- 0.08 against 0.22 +- 0.02, every one of three seeds",
        metric="curve.probe.retain@probe.forget=2",
        subject="*unlearn.npo*",
        relation="higher",
        other="*unlearn.grad_diff*",
    ),
)


def needs_reference(config: Config) -> bool:
    """Always: the preference is relative to the starting model."""
    return True


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the preference loss, a mean over sequences; ``retain`` as ``retain_loss`` says."""
    from torch.nn.functional import logsigmoid

    part = batch.forget
    margin = sequence_nll(forward(model, part)) - sequence_nll(frozen(reference, part))
    losses = -(2 / config.beta) * logsigmoid(config.beta * margin)
    forget = Term(losses.sum(), part.sequences, config.gamma)
    return {"forget": forget} | retain_term(config, model, batch, reference)
