"""Minkowski distance head: harmonic loss on the p-norm of the difference, for any p.

Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers". The image models
and toy sets keep every power away from zero, and the root too (p = 1.5 and 3, n = 1, eps = 1e-4):

    D_ij = (sum_k min(|x_ik - w_jk| + eps, 1e6)^p + eps)^(1/p)        p_ij ~ (D_ij + eps)^-n

The language models (``impl="language"``, with smoothing=0.01, floor=1e-8 and epsilon=1e-8) divide D by the
row's smallest distance and have no eps after that: p_ij ~ (D_ij / min_m D_im)^-n, where

    whole p, but 2    D = (sum a^p)^(1/p)                   a = |x - w|
    p = 2             D = (sum a^2 + eps)^(1/2)
    any other p       D = (sum (a + eps)^p + eps)^(1/p)

Official n is on D: ``exponent_on="plain"``. For p below 1, D is no metric: it favours differences in few
coordinates. Powers of p = 1, 1.5, 2, 2.5, 3 are products and square roots; any other p costs several times
as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Le

from methods.head import Layer, plain_scores, safe_log

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head", "methods.head._blocks")
# Beyond it the official layers cut a difference off.
LARGEST_DIFFERENCE = 1e6


@dataclass(frozen=True, kw_only=True)
class Config(Layer):
    """Options of the Minkowski head."""

    # The image models and the toy sets agree in this distance.
    impl: Literal["vision", "language"] = "vision"
    # Power p of the norm (official: 1.5 and 3; language models also 0.5, 1 and 2). float32 holds no larger
    # powers than 10 of distances that occur; "chebyshev" is the limit.
    p: Annotated[float, Gt(0), Le(10)] = 1.5


def scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log D``."""
    last = 0.0 if config.impl == "language" else None
    return plain_scores(config, hidden, weight, lambda x, w: distance(config, x, w), epsilon=last)


def distance(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """The p-norms [N,V], with epsilon where the definition has it inside the root."""
    from methods.head._blocks import by_rows

    added, inside = epsilons(config)

    def root(sums: Tensor) -> Tensor:
        return sums + inside if config.p == 1 else (safe_log(sums + inside) / config.p).exp()

    return by_rows(root, power_sums(hidden, weight, config.p, added))


def epsilons(config: Config) -> tuple[float, float]:
    """What is added to every difference, and to the sum of powers."""
    if config.impl == "language" and config.p == int(config.p):
        return 0.0, config.epsilon if config.p == 2 else 0.0
    return config.epsilon, config.epsilon


def power_sums(hidden: Tensor, weight: Tensor, p: float, added: float) -> Tensor:
    """``sum_k min(|x_ik - w_jk| + added, 1e6)^p`` [N,V]."""
    import torch

    from methods.head._blocks import blocked, differences, spread

    # Looked at once: it is next to never so large, and a pass over all differences costs a sixth of the rest.
    cut = any(
        bool(vectors.numel() and vectors.detach().abs().amax() > LARGEST_DIFFERENCE / 2 - added)
        for vectors in (hidden, weight)
    )

    def base(difference: Tensor) -> Tensor:
        shifted = difference.abs_().add_(added) if added else difference.abs_()
        return shifted.clamp_(max=LARGEST_DIFFERENCE) if cut else shifted

    def sums(x: Tensor, w: Tensor) -> Tensor:
        return raised(base(differences(x, w)), p).sum(dim=-1)

    def pull(x: Tensor, w: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        difference = differences(x, w)
        shifted = base(difference.clone())
        if p < 1 and not added:
            shifted.clamp_(min=torch.finfo(shifted.dtype).tiny)
        slope = raised(shifted, p - 1)
        if cut:
            slope.masked_fill_(difference.abs() + added > LARGEST_DIFFERENCE, 0.0)
        return spread(slope.mul_(difference.sign_()).mul_(gradient.mul(p)[..., None]))

    return blocked(sums, hidden, weight, pull=pull)


def raised(base: Tensor, p: float) -> Tensor:
    """``base ** p`` for a base that is not negative, by products and roots where they do."""
    if p < 0 or p * 2 != int(p * 2) or p > 4:
        return base.pow(p)
    whole, half = int(p), p != int(p)
    result = base.sqrt() if half else None
    for _ in range(whole):
        result = base if result is None else result * base
    return result if result is not None else base.new_ones(()).expand_as(base).clone()
