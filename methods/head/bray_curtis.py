"""Bray-Curtis distance head: harmonic loss on the sum of differences relative to the sum of sizes.

Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers", eps = 1e-3:

    standard     D = sum_k |x_k - w_k| / max(|sum_k x_k + sum_k w_k| + eps, 10 eps)
    abs          D = sum_k |x_k - w_k| / max(sum_k |x_k| + sum_k |w_k| + eps, 10 eps)
    normalized   standard on x and w replaced by (|.| + eps) / max(sum_k (|.| + eps), m),
                 m = max(1e-3, 10 eps)

    p_ij ~ (D_ij + eps)^-n

The three code bases agree in D; the language models divide it by the row's smallest before they add eps.
Official n is 1, and d in the language models, on D: ``exponent_on="plain"``.

The standard form, the official default, is a trap unless all entries are positive: where the sum of x is
minus the sum of w its denominator is next to nothing, D is huge however near the two are, and the gradient
jumps with the sign of the sum. On the digits it was the least accurate of all heads (0.78 to 0.88; "abs"
0.97), which is why "abs" is the default here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

import methods.head
from methods.head import SMALLEST_UNIT, Layer, bounded_ratio, plain_scores, unused

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head", "methods.head._blocks")
# m of the official layers.
MINIMUM_SUM = 1e-3


@dataclass(frozen=True, kw_only=True)
class Config(Layer):
    """Options of the Bray-Curtis head: the variant and what only one of them reads."""

    # Added to the denominator and, at last, to D.
    epsilon: Annotated[float, Ge(0)] = 1e-3
    # The image models and the toy sets agree in this distance.
    impl: Literal["vision", "language"] = "vision"
    # See above.
    variant: Literal["standard", "abs", "normalized"] = "abs"
    # The smallest sum that "normalized" divides by, where 10 epsilon is not larger. None: 1e-3.
    minimum_sum: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        """Only one variant divides its inputs."""
        super().__post_init__()
        if self.variant != "normalized":
            unused(self, "bray_curtis", ["minimum_sum"], "variant='normalized'")


def scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log D``."""
    return plain_scores(config, hidden, weight, lambda x, w: distance(config, x, w))


def ceiling(config: Config, width: int, classes: int) -> float:
    """The best probability: D is at most 1, but for the standard form, which has no bound."""
    if config.variant == "standard":
        return methods.head.ceiling(config, width, classes)
    return methods.head.ceiling(config, width, classes, bounded_ratio(config, width, 1.0))


def distance(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """The distances [N,V]: a sum of differences in blocks over a denominator that is a sum of row sums."""
    from methods.head._blocks import by_rows, manhattan

    if config.variant == "normalized":
        hidden, weight = normalized(config, hidden), normalized(config, weight)
    least = max(10 * config.epsilon, SMALLEST_UNIT)

    def divided(numerators: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        sums = (rows + columns).abs()
        return numerators / (sums + config.epsilon).clamp(min=least)

    sides = (part.abs() if config.variant == "abs" else part for part in (hidden, weight))
    rows, columns = (part.sum(dim=1) for part in sides)
    return by_rows(divided, manhattan(hidden, weight), rows[:, None], columns)


def normalized(config: Config, vectors: Tensor) -> Tensor:
    """Vectors [M,d] of positive entries that sum to 1."""
    positive = vectors.abs() + config.epsilon
    usual = MINIMUM_SUM if config.minimum_sum is None else config.minimum_sum
    return positive / positive.sum(dim=1, keepdim=True).clamp(min=max(usual, 10 * config.epsilon))
