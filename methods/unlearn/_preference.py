"""The preference loss of ``idk_dpo`` and ``alt_po``: rather the answer w than the forgotten answer l.

Direct preference optimisation (Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a
Reward Model") as open-unlearning scales it:

    L = - (2 / beta) * mean_b log sigmoid( beta * [ (s_l - s_l^start) - (s_w - s_w^start) ] )

``s`` is the negative log-likelihood of a whole answer, a sum that is *not* divided by its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from methods.stage import Term
from methods.terms import forward, sequence_nll
from methods.unlearn import Retaining, start_nll

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Part

REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Preferring(Retaining):
    """The shared recipe, gamma and alpha (1 and 1 in open-unlearning's ``DPO.yaml``), and beta."""

    # inverse temperature: small keeps pushing, large stops early (open-unlearning's DPO.yaml; its class default is 1)
    beta: Annotated[float, Gt(0)] = 0.1


def preference(config: Preferring, model: Any, wanted: Part, forgotten: Part, reference: Any) -> Term:
    """The loss of preferring ``wanted`` to ``forgotten``, row by row; its mean is over sequences."""
    from torch.nn.functional import logsigmoid

    margin = _lost(model, forgotten, reference) - _lost(model, wanted, reference)
    losses = -(2 / config.beta) * logsigmoid(config.beta * margin)
    return Term(losses.sum(), forgotten.sequences, config.gamma)


def _lost(model: Any, part: Part, reference: Any) -> Tensor:
    """By how many nats each answer [B] has become less likely than it was at the start."""
    return sequence_nll(forward(model, part)) - start_nll(part, reference).sum(-1)
