"""A divergence where only the teacher's k likeliest entries are known: what becomes of all the others.

With p the teacher's probabilities, K its k likeliest entries and q the student's, softmax over the *whole* vocabulary:

    tail         sum_K p (log p - log q) + p_rest (log p_rest - log q_rest),    p_rest = 1 - sum_K p, q_rest alike
    renormalised sum_K r (log r - log q),   r = p / sum_K p
    raw          sum_K p (log p - log q)

``tail`` puts everything outside K into one bucket, on both sides. Merging entries can only bring two distributions
closer (the data processing inequality), so its value is at most that of the whole divergence; for any divergence, not
only this one. ``renormalised`` takes the teacher for surer than it is. ``raw`` may be negative, and says nothing about
the mass outside K. torch is imported at the top: this module is only loaded by a running job. ``methods.term``'s
REVISION covers this file.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Rest = Literal["tail", "renormalised", "raw"]

# Up to here log(1 - exp(x)) is better taken from expm1, below from log1p (Maechler 2012).
_LOG_HALF = -0.6931471805599453


def buckets(log_p: Tensor, indices: Tensor, log_q: Tensor, rest: Rest = "tail") -> tuple[Tensor, Tensor]:
    """What a divergence is computed from: log-probabilities of teacher and student, [n,k] or with the tail [n,k+1].

    Args:
        log_p: the teacher's log-probabilities [n,k] of its likeliest entries, normalised over its whole vocabulary.
        indices: which entries they are [n,k], each at most once in a row.
        log_q: the student's log-probabilities [n,V] of all entries.
    Returns:
        The teacher's and the student's; -inf where there is no mass, which must then add nothing.
    """
    assert rest in get_args(Rest), rest
    indices = indices.long()
    log_p = log_p.to(log_q.dtype)
    found = log_q.gather(-1, indices)
    if rest == "renormalised":
        return log_p - log_p.logsumexp(-1, keepdim=True), found
    if rest == "raw" or indices.shape[-1] == log_q.shape[-1]:
        return log_p, found
    tail_p, tail_q = log_one_less(log_p.logsumexp(-1)), log_rest(log_q, indices)
    return torch.cat([log_p, tail_p[:, None]], -1), torch.cat([found, tail_q[:, None]], -1)


def log_one_less(log_mass: Tensor) -> Tensor:
    """log(1 - exp(x)) of log masses x; -inf where the mass is 1, or by rounding a little more."""
    log_mass = log_mass.clamp(max=0.0)
    near_one = torch.log(-torch.expm1(log_mass))
    return torch.where(log_mass > _LOG_HALF, near_one, torch.log1p(-log_mass.exp()))


def log_rest(log_q: Tensor, indices: Tensor) -> Tensor:
    """log of the mass [n] outside the entries ``indices`` [n,k], added up entry by entry.

    1 - sum_K q would be 0 in float32 long before the mass is, and its gradient lost; -inf where nothing is left.
    """
    others = log_q.scatter(-1, indices, -torch.inf)
    nothing = others.detach().isneginf().all(-1)
    # The gradient of logsumexp over nothing but -inf is not a number, even where nobody asks for it.
    total = others.masked_fill(nothing[:, None], 0.0).logsumexp(-1)
    return total.masked_fill(nothing, -torch.inf)
