"""What divergences are made of: mixtures of log-probabilities, and sums over the vocabulary.

``n`` are tokens, ``V`` entries of the vocabulary, p the teacher and q the student. Everything stays in log space and in
the type of its arguments, and an entry that is -inf (a padded vocabulary) leaves neither value nor gradient behind.
``methods.term``'s REVISION covers this file.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from methods.terms import relative_entropy

if TYPE_CHECKING:
    from torch import Tensor


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q) [n,V], for 0 < share < 1; -inf where either is."""
    absent = log_p.isneginf() | log_q.isneginf()
    if not bool(absent.any()):
        return _mixture(log_p, log_q, share)
    # The slope of logaddexp at (-inf, -inf) is NaN even where nothing is asked of it, so 0 stands there meanwhile.
    mixed = _mixture(log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0), share)
    return mixed.masked_fill(absent, -math.inf)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    import torch

    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta * D(p‖M) + (1 - beta) * D(q‖M) [n], M = beta * p + (1 - beta) * q; at 0 D(p‖q), and at 1 D(q‖p)."""
    if beta == 0:
        return relative_entropy(log_p, log_q)
    if beta == 1:
        return relative_entropy(log_q, log_p)
    middle = mixture(log_p, log_q, beta)
    return beta * relative_entropy(log_p, middle) + (1 - beta) * relative_entropy(log_q, middle)


def skewed(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """D(p‖skew * p + (1 - skew) * q) [n]; at 0 D(p‖q)."""
    return relative_entropy(log_p, mixture(log_p, log_q, skew) if skew else log_q)


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-sum_v p log q [n]; entries that are -inf in either add nothing."""
    absent = log_p.isneginf() | log_q.isneginf()
    return -(log_p.exp() * log_q.masked_fill(absent, 0.0)).sum(-1)


def of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability [n] of each target, from logits [n,V]."""
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def conditional(log_values: Tensor, log_mass: Tensor) -> Tensor:
    """Log-probabilities [n,V] brought to a sum of 1, from the log of their sum [n]; a sum of 0 leaves them absent."""
    return log_values - log_mass.masked_fill(log_mass.isneginf(), 0.0)[:, None]
