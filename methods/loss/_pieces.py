"""What several losses are made of: smoothed cross entropies and powers of the right class's probability.

``N`` are answer tokens or cases, ``V`` classes. Everything is in log space, in the type of the scores.
``methods.loss``'s REVISION covers this file.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Convention = Literal["torch", "t5x"]


def smoothed_nll(scores: Tensor, targets: Tensor, smoothing: float, convention: Convention) -> Tensor:
    """Cross entropy [N] with the target's mass spread by one of two conventions.

    torch: (1 - a) on the target and a/V on every class, the target included.
    t5x: 1 - a on the target, a/(V-1) on every other class, less the entropy of that distribution, so that 0 is the
    least loss.
    """
    from torch.nn.functional import cross_entropy

    if convention == "torch" or not smoothing:
        return cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)
    others = scores.shape[-1] - 1
    low = smoothing / others
    entropy = -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(low)
    nll = cross_entropy(scores, targets, reduction="none")
    every = scores.shape[-1] * scores.logsumexp(-1) - scores.sum(-1)
    return (1 - smoothing - low) * nll + low * every - entropy


def surprise(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log u and log(1 + u) [N], where u = (1 - p) / p of the right class: both exact for u near 0 and far above 1."""
    import torch

    right = scores.gather(1, targets[:, None])
    odds = (scores.scatter(1, targets[:, None], -math.inf) - right).logsumexp(-1)
    return odds, torch.logaddexp(odds, torch.zeros_like(odds))


def deformed(nll: Tensor, power: float) -> Tensor:
    """``(1 - p^power) / power`` [N] from ``-log p`` [N]; at power 0 that is ``-log p``."""
    import torch

    return nll if power == 0 else -torch.expm1(-power * nll) / power


def softplus(values: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's own returns x from 20 on, which is 1e-10 off."""
    import torch

    return torch.logaddexp(values, torch.zeros_like(values))
