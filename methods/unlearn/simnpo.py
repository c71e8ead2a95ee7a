"""SimNPO: negative preference optimisation without a starting model, on the likelihood per token.

Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning".

    L = - gamma * (2 / beta) * mean_b log sigmoid( beta * (s_b / n_b - delta) )  +  alpha * L_retain

``s_b`` is the negative log-likelihood of an answer and ``n_b`` the number of its tokens, so that a long answer is not
forgotten faster than a short one.

Where paper and code disagree. The paper writes sigmoid( beta * s/n - gamma' ), both codes (locuslab/open-unlearning,
``simnpo.py``, and OPTML-Group/Unlearn-Simple) subtract ``delta`` before they multiply: gamma' = beta * delta. This file
has the codes' ``delta``; ``gamma`` is the weight of the forget term as everywhere here. open-unlearning counts n_b on
the labels as they stand, with a label at the first position, which nothing predicts and s_b does not have: a text row
has one, an answer to a question has none. ``length="labels"`` does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.stage import Claim, Term, Terms
from methods.terms import forward, sequence_nll
from methods.unlearn import Retaining, UnlearnBatch, keeps_to_start, retain_term

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe, gamma and alpha, and the shape of the preference."""

    # weight of the forget term (open-unlearning's SimNPO.yaml; the authors' own TOFU yaml has 0.1375)
    gamma: Annotated[float, Ge(0)] = 0.125
    # inverse temperature (open-unlearning's SimNPO.yaml; the authors' own TOFU yaml has 2.5)
    beta: Annotated[float, Gt(0)] = 4.5
    # nats per token that are subtracted first, beta * delta being the paper's gamma (both yamls have 0)
    delta: float = 0.0
    # what an answer's loss is divided by: its predicted tokens, or its labels with an unpredicted first one (code)
    length: Literal["targets", "labels"] = "targets"


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term."""
    return keeps_to_start(config)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the preference loss, a mean over sequences; ``retain`` as ``retain_loss`` says."""
    from torch.nn.functional import logsigmoid

    part = batch.forget
    lengths = part.mask.sum(-1) if config.length == "targets" else part.answer_lengths
    margin = sequence_nll(forward(model, part)) / lengths - config.delta
    losses = -(2 / config.beta) * logsigmoid(config.beta * margin)
    forget = Term(losses.sum(), part.sequences, config.gamma)
    return {"forget": forget} | retain_term(config, model, batch, reference)
