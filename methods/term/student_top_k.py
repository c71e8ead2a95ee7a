"""Jensen-Shannon divergence on the entries that the *student* thinks most probable.

Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" for the
divergence (``jsd``), restricted as in huggingface/trl, ``trl/experimental/sdft/loss_utils.py``
(``compute_topk_self_distillation_loss``), made for self-distillation (SDFT). With S the k entries of the largest q, p
the teacher and q the student,

    rest="tail":          p' = (p[S], 1 - sum p[S]),   q' likewise
    rest="renormalised":  p' = p[S] / sum p[S],        q' likewise
    l = JSD_beta(p', q')                               (see ``jsd``; trl's alpha is beta)

With the tail in one bucket the value is at most the divergence over the whole vocabulary. Renormalised, it compares two
conditional distributions and does not see how much mass either puts outside S. The choice of S has no gradient. A
teacher's recorded top-k cannot serve: its entries are not the student's.

trl takes log(1 - sum) for the bucket, with the sum held below 1 - 1e-7; here the other entries are added up, which
keeps the digits of a small tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from methods.term import Softened
from methods.term._divergences import conditional, jensen_shannon

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.term", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """Weight, temperature, how many entries are compared, and how."""

    # k, the entries that are compared (trl: distillation_topk, 100); a vocabulary no larger is taken whole
    entries: Annotated[int, Ge(1)] = 100
    # the others as one bucket, or left out and the k brought to a sum of 1 (trl: distillation_add_tail)
    rest: Literal["tail", "renormalised"] = "tail"
    # share of the teacher in the mixture; 0: forward KL, 1: reverse KL (trl: distillation_alpha)
    beta: Annotated[float, Ge(0), Le(1)] = 0.5


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence of each token [n], in nats, from log-probabilities [n,V]."""
    if config.entries >= log_q.shape[-1]:
        return jensen_shannon(log_p, log_q, config.beta)
    chosen = log_q.detach().topk(config.entries, dim=-1).indices
    p, q = (_kept(config, values, chosen) for values in (log_p, log_q))
    return jensen_shannon(p, q, config.beta)


def _kept(config: Config, log_values: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities of the chosen entries [n,k], or of them and of the tail [n,k+1]."""
    import torch

    from methods.term._top import log_rest

    found = log_values.gather(-1, chosen)
    if config.rest == "renormalised":
        return conditional(found, found.logsumexp(-1))
    return torch.cat([found, log_rest(log_values, chosen)[:, None]], dim=-1)
