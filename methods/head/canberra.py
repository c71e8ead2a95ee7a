"""Canberra distance head: harmonic loss on differences relative to the size of what differs.

Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers", with
a_k = |x_k - w_k|, q_k = |x_k| + |w_k| and eps = 1e-4:

    standard   D = sum_k a_k / max(q_k, eps)       image models; the others: sum_k a_k / (q_k + eps)
    robust     D = sum_k a_k / max(q_k, m)         m = 1e-2, in the toy sets and language models 1e-3
    weighted   D = sum_k f_k a_k / (q_k + eps)     f_k = (q_k + eps)^s / sum_m (q_m + eps)^s
                                                   s = 0.5, in the toy sets and language models 1

    p_ij ~ (D_ij + eps)^-n

Official n is 1, and d in the language models (which divide D by the row's smallest first), on D:
``exponent_on="plain"``. The distance knows no scale, coordinate by coordinate: a coordinate that is 0 on
one side (after a ReLU) adds exactly 1 whatever the other side is, and passes on no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

import methods.head
from methods.head import SMALLEST_UNIT, Layer, bounded_ratio, plain_scores, unused

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head", "methods.head._blocks")


@dataclass(frozen=True, kw_only=True)
class Config(Layer):
    """Options of the Canberra head: the variant and what only one of them reads."""

    # See above.
    variant: Literal["standard", "robust", "weighted"] = "standard"
    # m of "robust". None: the official 1e-2 or 1e-3.
    minimum_denominator: Annotated[float, Gt(0)] | None = None
    # s of "weighted". None: the official 0.5 or 1.
    weight_power: float | None = None
    # Whether the weights of "weighted" are divided by their sum. None: they are.
    normalize_weights: bool | None = None

    def __post_init__(self) -> None:
        """What belongs to one variant has no meaning in another."""
        super().__post_init__()
        if self.variant != "robust":
            unused(self, "canberra", ["minimum_denominator"], "variant='robust'")
        if self.variant != "weighted":
            unused(self, "canberra", ["weight_power", "normalize_weights"], "variant='weighted'")


def scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log D``."""
    return plain_scores(config, hidden, weight, lambda x, w: distance(config, x, w))


def ceiling(config: Config, width: int, classes: int) -> float:
    """The best probability: D is at most d, or 1 where its weights sum to 1."""
    if config.normalize_weights is False:
        return methods.head.ceiling(config, width, classes)
    largest = 1.0 if config.variant == "weighted" else float(width)
    return methods.head.ceiling(config, width, classes, bounded_ratio(config, width, largest))


def distance(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """The distances [N,V] of the variant."""
    from methods.head._blocks import blocked

    if config.variant == "weighted":
        s = config.weight_power
        if s is None:
            s = 0.5 if config.impl == "vision" else 1.0
        weighing = (max(config.epsilon, SMALLEST_UNIT), s, config.normalize_weights is not False)
        return blocked(
            lambda x, w: weighted(x, w, *weighing),
            hidden,
            weight,
            pull=lambda x, w, gradient: pull_weighted(x, w, gradient, *weighing),
        )
    added, least = guards(config)
    return blocked(
        lambda x, w: fractions(x, w, added, least),
        hidden,
        weight,
        pull=lambda x, w, gradient: pull_fractions(x, w, gradient, added, least),
    )


def guards(config: Config) -> tuple[float, float]:
    """What is added to the denominator, and what it is at least."""
    if config.variant == "robust":
        usual = 1e-2 if config.impl == "vision" else 1e-3
        return 0.0, config.minimum_denominator or usual
    if config.impl == "vision":
        return 0.0, max(config.epsilon, SMALLEST_UNIT)
    return max(config.epsilon, SMALLEST_UNIT), 0.0


def sizes(hidden: Tensor, weight: Tensor, added: float) -> Tensor:
    """``q + added`` of one block [n,v,d]."""
    return (hidden.abs() + added)[:, None] + weight.abs()


def spread_sizes(
    hidden: Tensor, weight: Tensor, by_difference: Tensor, by_size: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients [n,d] and [v,d] of a block from those of its differences and of its sizes [n,v,d]."""
    from methods.head._blocks import spread

    to_hidden, to_weight = spread(by_difference)
    to_hidden.addcmul_(hidden.sign(), by_size.sum(dim=1))
    return to_hidden, to_weight.addcmul_(weight.sign(), by_size.sum(dim=0))


# --- standard and robust ----------------------------------------------------------------------------------


def fractions(hidden: Tensor, weight: Tensor, added: float, least: float) -> Tensor:
    """``sum_k a_k / max(q_k + added, least)`` of one block [n,v]."""
    from methods.head._blocks import differences

    divisors = sizes(hidden, weight, added)
    if least:
        divisors.clamp_(min=least)
    return differences(hidden, weight).abs_().div_(divisors).sum(dim=-1)


def pull_fractions(
    hidden: Tensor, weight: Tensor, gradient: Tensor, added: float, least: float
) -> tuple[Tensor, Tensor]:
    """Derivative of ``fractions``: 1 / m by the difference and -a / m^2 by the size, m the denominator."""
    from methods.head._blocks import above, differences

    divisors = sizes(hidden, weight, added)
    # Most blocks have no denominator so small, and looking for one is cheaper than masking.
    keep = above(divisors, least) if least and bool(divisors.amin() < least) else None
    inverse = divisors.clamp_(min=least).reciprocal_()
    difference = differences(hidden, weight)
    by_difference = difference.sign().mul_(inverse).mul_(gradient[..., None])
    by_size = difference.mul_(by_difference).mul_(inverse).neg_()
    if keep is not None:
        by_size.mul_(keep)
    return spread_sizes(hidden, weight, by_difference, by_size)


# --- weighted ---------------------------------------------------------------------------------------------


def weighted(hidden: Tensor, weight: Tensor, epsilon: float, s: float, normalize: bool) -> Tensor:
    """``sum_k a_k u_k^(s-1)`` of one block [n,v] with u = q + eps, divided by ``sum_k u_k^s`` if asked to."""
    from methods.head._blocks import differences

    size = sizes(hidden, weight, epsilon)
    factors = raised(size, s)
    total = differences(hidden, weight).abs_().mul_(factors).sum(dim=-1)
    return total / size.mul_(factors).sum(dim=-1) if normalize else total


def pull_weighted(
    hidden: Tensor, weight: Tensor, gradient: Tensor, epsilon: float, s: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Derivative of ``weighted`` with B the sum of weights, or 1 and D = 0 below where they are not divided:

    u^(s-1) / B by the difference and u^(s-1) ((s-1) a / u - s D) / B by the size.
    """
    from methods.head._blocks import differences

    size, difference = sizes(hidden, weight, epsilon), differences(hidden, weight)
    factors = raised(size, s)
    share = gradient[..., None]
    inner = difference.abs().div_(size).mul_(s - 1)
    if normalize:
        total = size.mul_(factors).sum(dim=-1, keepdim=True)
        distance = difference.abs().mul_(factors).sum(dim=-1, keepdim=True) / total
        inner.sub_(s * distance)
        share = share / total
    factors.mul_(share)
    return spread_sizes(hidden, weight, difference.sign_().mul_(factors), inner.mul_(factors))


def raised(size: Tensor, s: float) -> Tensor:
    """``size ** (s - 1)`` in new memory; reciprocal roots are faster than powers."""
    if s == 0.5:
        return size.rsqrt()
    return size.pow(s - 1)
