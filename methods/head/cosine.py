"""Cosine distance head: harmonic loss on directions.

Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers", cosine layer:

    D_ij = 1 - cos(x_i, w_j)          p_ij = D_ij^-n / sum_k D_ik^-n

Because 1 - cos = |x/|x| - w/|w||^2 / 2, D is a *squared* distance on the unit sphere: n means the same as
in the Euclidean head with ``exponent_on="squared"``, and ``"plain"`` halves it.

The three official implementations differ. Vision and toy add 1e-4 to D and come "stable" (norms are
floored at 1e-12) and "unstable" (``cos = x.w / (|x||w| + 1e-4)``, ``stable=False``), with n = 1. The
language models add nothing (``epsilon=0, smoothing=0.01, floor=1e-8``) and use n = d, which is the
default here; on a hidden width of 64 n = 16 learnt faster than 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.head import Harmonic, log_scores

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head",)
# Norm below which a vector counts as having no direction; as in the official stable layer.
SMALLEST_NORM = 1e-12


@dataclass(frozen=True, kw_only=True)
class Config(Harmonic):
    """Options of the cosine head: those of every distance head and where its divisions are guarded."""

    # True: norms are floored at 1e-12. False: epsilon is also added to the product of the norms, which
    # shortens every cosine a little, as in the official "unstable" layer.
    stable: bool = True


def scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log(1 - cos)``."""
    return log_scores(config, hidden, weight, squared_distance)


def squared_distance(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """``1 - cos + epsilon`` [N,V]: half the squared distance of the directions."""
    return (1 - cosine(config, hidden, weight)).clamp(min=0) + config.epsilon


def cosine(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Cosines [N,V], guarded against vectors without a direction."""
    from torch.nn.functional import normalize

    if config.stable:
        return normalize(hidden, dim=1, eps=SMALLEST_NORM) @ normalize(weight, dim=1, eps=SMALLEST_NORM).T
    lengths: Tensor = hidden.norm(dim=1, keepdim=True) * weight.norm(dim=1)
    return hidden @ weight.T / (lengths + config.epsilon)
