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

import methods.head
from methods.head import Harmonic, conventions, power, safe_log, widen

if TYPE_CHECKING:
    from torch import Tensor

    from methods.head._products import Curve

USES = ("methods.head", "methods.head._products")


@dataclass(frozen=True, kw_only=True)
class Config(Harmonic):
    """Options of the cosine head: those of every distance head and where its divisions are guarded."""

    # True: norms are floored at 1e-12. False: epsilon is also added to the product of the norms, which
    # shortens every cosine a little, as in the official "unstable" layer.
    stable: bool = True


def scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log(1 - cos)``."""
    from methods.head._products import Curve, full_precision

    exponent = power(config, hidden.shape[-1])
    with full_precision(hidden.device.type):
        if config.stable:
            found = one_minus_cosine(widen(hidden), widen(weight), Curve(config.epsilon, exponent))
        else:
            found = -exponent * safe_log(squared_distance(config, hidden, weight))
        return conventions(config, found)


def ceiling(config: Config, width: int, classes: int) -> float:
    """The best probability: 1 - cos is never more than 2."""
    ratio = (config.epsilon / (2 + config.epsilon)) ** power(config, width)
    return methods.head.ceiling(config, width, classes, ratio)


def squared_distance(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """``1 - cos + epsilon`` [N,V]: half the squared distance of the directions."""
    from methods.head._products import SMALLEST_NORM, Curve, full_precision

    with full_precision(hidden.device.type):
        hidden, weight = widen(hidden), widen(weight)
        if config.stable:
            return one_minus_cosine(hidden, weight, Curve(config.epsilon, logarithm=False))
        lengths = hidden.norm(dim=1, keepdim=True) * weight.norm(dim=1)
        # With epsilon = 0 a vector of length 0 still has cosine 0 with all others.
        guard = config.epsilon or SMALLEST_NORM
        gaps = lengths_minus_product(hidden, weight)
        return (gaps + guard) / (lengths + guard) + config.epsilon


def one_minus_cosine(hidden: Tensor, weight: Tensor, curve: Curve) -> Tensor:
    """``f(1 - cos)`` [N,V] of vectors whose norms are floored at 1e-12."""
    from methods.head._products import directions, product

    return product(directions(hidden), directions(weight), 1.0, -1.0, curve)


def lengths_minus_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """``|x||w| - x.w`` [N,V] as one matrix product of vectors with their length as a further coordinate."""
    import torch

    from methods.head._products import Curve, product

    left = torch.cat([hidden, -hidden.norm(dim=1, keepdim=True)], dim=1)
    right = torch.cat([weight, weight.norm(dim=1, keepdim=True)], dim=1)
    return product(left, right, 0.0, -1.0, Curve(0.0, logarithm=False))
