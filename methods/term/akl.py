"""Adaptive KL: forward and reverse KL, mixed token by token by where the student is wrong.

Wu, Tao, Wang, Zhao, Wong 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
Models". With p the teacher and q the student at one temperature, and the entries sorted by p from the largest down, the
head are the entries up to a cumulative p of mu, and always the first:

    g_head = sum over the head of |p - q|,   g_tail = that over all others
    l = g_head / (g_head + g_tail) * D(p ‖ q)  +  g_tail / (g_head + g_tail) * D(q ‖ p)

The shares are constants for the gradient, and 1/2 each where p = q. The published code (wutaiqiang/LLM_KD_AKL,
``AKL.py``) is a fragment that neither runs nor returns; its two functions are what is done here, except that it gives a
padded entry a logit of 0 when it takes the shares.

``variant="taid"`` repeats SakanaAI/TAID's ``AdaptiveKL`` for comparison only, which computes something else: it sorts
upwards, applies the mask of the sorted entries to gaps in the order of the vocabulary, lets the gradient through the
shares, and has the cross-entropy -sum p log q in the place of D(p ‖ q). With a top-k of the teacher the gap of the tail
is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Lt

from methods.term import Softened
from methods.term._divergences import cross_entropy
from methods.terms import relative_entropy

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.term", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """Weight, temperature and what belongs to the head."""

    # cumulative probability of the teacher up to which entries belong to the head (the code: 0.5)
    mu: Annotated[float, Gt(0), Lt(1)] = 0.5
    # "taid" repeats the TAID repository's re-implementation, with its slips
    variant: Literal["published", "taid"] = "published"


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The mixture of both divergences of each token [n], in nats, from log-probabilities [n,V]."""
    reverse = relative_entropy(log_q, log_p)
    if config.variant == "taid":
        share = _share((log_p.exp() - log_q.exp()).abs(), _upward_mask(log_p.exp(), config.mu))
        return share * cross_entropy(log_p, log_q) + (1 - share) * reverse
    share = head_share(log_p, log_q.detach(), config.mu)
    return share * relative_entropy(log_p, log_q) + (1 - share) * reverse


def head_share(log_p: Tensor, log_q: Tensor, mu: float) -> Tensor:
    """The forward KL's share [n]: of the gap |p - q|, what lies in the head."""
    p, order = log_p.exp().sort(dim=-1, descending=True)
    tail = p.cumsum(-1) > mu
    tail[:, 0] = False
    return _share((p - log_q.exp().gather(-1, order)).abs(), ~tail)


def _upward_mask(p: Tensor, mu: float) -> Tensor:
    return p.sort(dim=-1).values.cumsum(-1) >= mu


def _share(gap: Tensor, head: Tensor) -> Tensor:
    """What part of a gap [n,V] lies in the head; 1/2 where there is no gap."""
    import torch

    inside, whole = (gap * head).sum(-1), gap.sum(-1)
    none = whole == 0
    return torch.where(none, 0.5, inside / whole.masked_fill(none, 1.0))
