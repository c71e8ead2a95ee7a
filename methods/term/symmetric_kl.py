"""A mixture of forward and reverse KL with a fixed share.

Ko et al. 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", compares with it; with p the
teacher and q the student at one temperature,

    l = (1 - share) * D(p ‖ q) + share * D(q ‖ p)

jongwooko/distillm (``symmetric_kl``, lam = share) has the cross-entropy -sum p log q in the place of D(p ‖ q): the
value is higher by (1 - share) times the teacher's entropy, the gradient the same. With the teacher's top-k and one
bucket for the rest the value is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from methods.term import Softened
from methods.terms import relative_entropy

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.term", "methods.terms")
TOP_K = True


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """Weight, temperature and the share of the reverse KL."""

    # of the reverse KL; the rest is the forward KL (lam of the code: 0.9)
    share: Annotated[float, Ge(0), Le(1)] = 0.9


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The mixture of both divergences of each token [n], in nats, from log-probabilities [n,V]."""
    forward, reverse = relative_entropy(log_p, log_q), relative_entropy(log_q, log_p)
    return (1 - config.share) * forward + config.share * reverse
