"""Chebyshev distance head: harmonic loss on the largest coordinate of the difference, or a soft version of it.

Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers". With
a_k = |x_k - w_k|, only the toy sets' and the language models' layers are Chebyshev's distance:

    D = max_k a_k            smooth: D = 1/alpha log sum_k exp(alpha a_k)        alpha = 10

The image models' layer first divides the differences by their own spread over the coordinates, and its
"maximum" is their average weighted by a softmax:

    t_k = a_k / (std_k(a) + eps)      D = sum_k softmax(t)_k t_k
    smooth:                           D = 1/alpha log sum_k exp(min(alpha t_k, 50))

That is no distance: it does not change when x - w is multiplied by anything, and with a spread that small
is largest where all coordinates differ alike. It is the official definition and so the default here;
``impl="toy"`` is the true maximum. eps = 1e-4 everywhere, n = 1 (n = d in the language models, which
divide D by the row's smallest first) on D: ``exponent_on="plain"``.

The true maximum sends its gradient to one coordinate of each pair: the first of the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from methods.head import SMALLEST_UNIT, Layer, plain_scores, unused

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head", "methods.head._blocks")
# alpha of the official layers.
ALPHA = 10.0
# Beyond it the image models cut alpha t off.
LARGEST_EXPONENT = 50.0


@dataclass(frozen=True, kw_only=True)
class Config(Layer):
    """Options of the Chebyshev head."""

    # A log-sum-exp in place of the maximum.
    smooth: bool = False
    # Sharpness of the log-sum-exp, in the official layers 10 and at most 20. None: 10.
    alpha: Annotated[float, Ge(1), Le(20)] | None = None

    def __post_init__(self) -> None:
        """Only the log-sum-exp has a sharpness."""
        super().__post_init__()
        if not self.smooth:
            unused(self, "chebyshev", ["alpha"], "smooth=true")


def scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log D``."""
    return plain_scores(config, hidden, weight, lambda x, w: distance(config, x, w))


def distance(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """The (soft) largest difference [N,V]."""
    from methods.head._blocks import blocked

    alpha = ALPHA if config.alpha is None else config.alpha
    if config.impl == "vision":
        options = (config.epsilon, alpha if config.smooth else None)
        return blocked(
            lambda x, w: standardized(x, w, *options),
            hidden,
            weight,
            pull=lambda x, w, gradient: pull_standardized(x, w, gradient, *options),
        )
    if not config.smooth:
        return blocked(largest, hidden, weight, pull=pull_largest)
    return blocked(
        lambda x, w: smooth_maximum(x, w, alpha)[0],
        hidden,
        weight,
        pull=lambda x, w, gradient: pull_smooth(x, w, gradient, alpha),
    )


# --- the maximum ------------------------------------------------------------------------------------------


def largest(hidden: Tensor, weight: Tensor) -> Tensor:
    """``max_k |x_k - w_k|`` of one block [n,v]."""
    from methods.head._blocks import differences

    return differences(hidden, weight).abs_().amax(dim=-1)


def pull_largest(hidden: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Derivative of ``largest``: the pair's gradient goes to the coordinate where they differ most."""
    from methods.head._blocks import differences

    difference = differences(hidden, weight)
    where = difference.abs().argmax(dim=-1)
    signed = gradient * difference.gather(-1, where[..., None])[..., 0].sign()
    to_hidden = hidden.new_zeros(hidden.shape).scatter_add_(1, where, signed)
    return to_hidden, weight.new_zeros(weight.shape).scatter_add_(1, where.T, -signed.T)


def smooth_maximum(hidden: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``1/alpha log sum_k exp(alpha a_k)`` of one block [n,v], and the terms of the sum [n,v,d] over the largest."""
    from methods.head._blocks import differences

    values = differences(hidden, weight).abs_()
    top = values.amax(dim=-1, keepdim=True)
    # As powers of 2: a third of the time that exp takes.
    terms = values.sub_(top).mul_(alpha / math.log(2)).exp2_()
    return terms.sum(dim=-1).log_().div_(alpha).add_(top[..., 0]), terms


def pull_smooth(hidden: Tensor, weight: Tensor, gradient: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Derivative of ``smooth_maximum``: a softmax over the coordinates."""
    from methods.head._blocks import differences, spread

    terms = smooth_maximum(hidden, weight, alpha)[1]
    shares = gradient / terms.sum(dim=-1)
    return spread(differences(hidden, weight).sign_().mul_(terms).mul_(shares[..., None]))


# --- the image models' form -------------------------------------------------------------------------------


def standardized(hidden: Tensor, weight: Tensor, epsilon: float, alpha: float | None) -> Tensor:
    """The image models' soft maximum of one block [n,v]; with ``alpha`` the log-sum-exp."""
    values = standard_differences(hidden, weight, epsilon)[0]
    if alpha is None:
        return values.softmax(dim=-1).mul_(values).sum(dim=-1)
    return powers(values, alpha).sum(dim=-1).log_().div_(alpha)


def pull_standardized(
    hidden: Tensor, weight: Tensor, gradient: Tensor, epsilon: float, alpha: float | None
) -> tuple[Tensor, Tensor]:
    """Derivative of ``standardized``: with G = dD/dt and s = std + eps, that of D by a_k is

    (G_k - (t_k - mean t) s sum(G t) / ((d - 1) std)) / s           the second term is 0 where std is.
    """
    from methods.head._blocks import differences, spread

    values, deviation = standard_differences(hidden, weight, epsilon)
    slope = by_standardized(values, alpha)
    total = slope.mul(values).sum(dim=-1, keepdim=True)
    scale = total * (deviation + epsilon) / (deviation * max(hidden.shape[1] - 1, 1))
    values.sub_(values.mean(dim=-1, keepdim=True)).mul_(scale.masked_fill_(deviation == 0, 0.0))
    slope.sub_(values).mul_(gradient[..., None] / (deviation + epsilon).clamp_(min=SMALLEST_UNIT))
    return spread(slope.mul_(differences(hidden, weight).sign_()))


def by_standardized(values: Tensor, alpha: float | None) -> Tensor:
    """Derivative of D by the standardized differences ``values`` [n,v,d]."""
    from methods.head._blocks import above

    if alpha is None:
        shares = values.softmax(dim=-1)
        centre = shares.mul(values).sum(dim=-1, keepdim=True)
        return shares.mul_(values + (1 - centre))
    terms = powers(values, alpha)
    terms.div_(terms.sum(dim=-1, keepdim=True))
    return terms.mul_(above(-values, -LARGEST_EXPONENT / alpha))


def powers(values: Tensor, alpha: float) -> Tensor:
    """``exp(min(alpha values, 50))`` as powers of 2, which take a third of the time."""
    return values.mul(alpha).clamp_(max=LARGEST_EXPONENT).mul_(1 / math.log(2)).exp2_()


def standard_differences(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``t`` of one block [n,v,d], and the standard deviations [n,v,1] without epsilon.

    Not ``torch.std``, which takes as long as fifty passes over the block.
    """
    from methods.head._blocks import differences

    values = differences(hidden, weight).abs_()
    squares = (values - values.mean(dim=-1, keepdim=True)).square_()
    deviation = squares.sum(dim=-1, keepdim=True).div_(max(hidden.shape[1] - 1, 1)).sqrt_()
    return values.div_((deviation + epsilon).clamp_(min=SMALLEST_UNIT)), deviation
