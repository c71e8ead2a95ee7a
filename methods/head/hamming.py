"""Hamming distance head: harmonic loss on the number of coordinates in which two bit strings differ.

Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers":

    soft     D = sum_k |sigmoid(x_k / T) - sigmoid(w_k / T)|                                      T = 1
    gumbel   soft on x and w with Gumbel noise added to each, in training only                    T = 0.5
    hard     D = sum_k |b(x_k) - b(w_k)|, b(z) = 1 where z > 0.5, else 0; in the gradient b'(z) is that of
             sigmoid(z / T)                                                                       T = 0.1

    p_ij ~ (D_ij + eps)^-n                                                                     eps = 1e-4

What the toy sets and the language models call hard has no bits: it is sigmoid((z - 0.5) / 0.1) in place of
b, with its own gradient. Under ``scale`` the image models' soft form divides by the row's *largest*
distance, all others by the smallest. Official n is 1, and d in the language models (which always divide by
the row's smallest), on D: ``exponent_on="plain"``.

The number of differing bits is one matrix product, since (a - b)^2 = |a - b| for bits; the derivative of
the square is twice that of the absolute value, which is 0 where bits agree.

The official gradient is not that. Its bits are ``b + soft - soft``, with the gradient of the middle term: a 1
comes out as 1 or as 1 minus a rounding error, and two ones that differ in it get the gradient, of either
sign, of two bits that differ. ``straight_through="official"`` replicates it (in float64, bit by bit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

import methods.head
from methods.head import (
    Layer,
    absolute,
    bounded_ratio,
    conventions,
    plain_scores,
    power,
    relative,
    unused,
    widen,
)
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

    from methods.head._products import Curve

USES = ("methods.head", "methods.head._blocks", "methods.head._products")
# The official temperatures of the variants.
TEMPERATURES = {"soft": 1.0, "gumbel": 0.5, "hard": 0.1}
# Where a coordinate turns from 0 to 1.
THRESHOLD = 0.5
# What uniform numbers are kept from 0 and 1 by, and the noise made of them within.
MARGIN, LARGEST_NOISE = 1e-7, 10.0
NOISE = True


@dataclass(frozen=True, kw_only=True)
class Config(Layer):
    """Options of the Hamming head: the variant and what it reads."""

    # See above.
    variant: Literal["soft", "gumbel", "hard"] = "soft"
    # T. None: the official 1, 0.5 and 0.1.
    temperature: Annotated[float, Gt(0)] | None = None
    # Where a coordinate counts as 1; "hard" only. None: 0.5.
    threshold: float | None = None
    # Bits without rounding errors, or as the image models' "hard" has them (see above).
    straight_through: Literal["exact", "official"] = "exact"

    def __post_init__(self) -> None:
        """A sigmoid without bits has no threshold."""
        super().__post_init__()
        if self.variant != "hard":
            unused(self, "hamming", ["threshold"], "variant='hard'")
        if self.straight_through != "exact" and (self.variant, self.impl) != ("hard", "vision"):
            raise AssayError(
                "head hamming: straight_through='official' is about the bits of variant='hard' with "
                "impl='vision'; leave it out or choose those."
            )


def scores(config: Config, hidden: Tensor, weight: Tensor, training: bool = False) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log D``."""
    if counted(config) and not relative(config):
        return counted_scores(config, hidden, weight)
    divisor = farthest if config.impl == "vision" and config.variant == "soft" else None
    return plain_scores(
        config, hidden, weight, lambda x, w: distance(config, x, w, training=training), unit=divisor
    )


def counted_scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """``scores`` with the logarithm taken where the product is: no slower than a linear head."""
    import torch

    from methods.head._products import Curve

    curve = Curve(config.epsilon, 2 * power(config, hidden.shape[-1]))
    with torch.autocast(hidden.device.type, enabled=False):
        values = differing(config, widen(hidden), widen(weight), curve)
        return conventions(config, values, absolute=absolute(config))


def separable(config: Config) -> bool:
    """Slices of classes would each draw their own noise for the hidden states."""
    return config.variant != "gumbel" and methods.head.separable(config)


def ceiling(config: Config, width: int, classes: int) -> float:
    """The best probability: at most d coordinates differ."""
    return methods.head.ceiling(config, width, classes, bounded_ratio(config, width, float(width)))


def farthest(distances: Tensor) -> Tensor:
    """The largest distance of each row [N,1]."""
    return distances.amax(dim=-1, keepdim=True)


def distance(config: Config, hidden: Tensor, weight: Tensor, *, training: bool = False) -> Tensor:
    """The numbers of differing coordinates [N,V], or what stands for them."""
    from methods.head._blocks import manhattan
    from methods.head._products import Curve

    if counted(config):
        return differing(config, hidden, weight, Curve(0.0, logarithm=False))
    if config.variant == "hard" and config.impl == "vision":
        return manhattan(rounded_bits(config, hidden), rounded_bits(config, weight))
    if config.variant == "gumbel" and training:
        hidden, weight = hidden + gumbel(hidden), weight + gumbel(weight)
    return manhattan(soft(config, hidden), soft(config, weight))


def soft(config: Config, vectors: Tensor) -> Tensor:
    """Vectors [M,d] of entries between 0 and 1."""
    if config.variant == "hard":
        vectors = vectors - threshold(config)
    return (vectors / temperature(config)).sigmoid()


def temperature(config: Config) -> float:
    """T, the variant's own where none was chosen."""
    return TEMPERATURES[config.variant] if config.temperature is None else config.temperature


def threshold(config: Config) -> float:
    """Where a coordinate counts as 1."""
    return THRESHOLD if config.threshold is None else config.threshold


def counted(config: Config) -> bool:
    """Whether there are exact bits to be counted."""
    return config.variant == "hard" and config.impl == "vision" and config.straight_through == "exact"


def differing(config: Config, hidden: Tensor, weight: Tensor, curve: Curve) -> Tensor:
    """``f(sum_k |a_k - b_k|)`` [N,V] for the bits a of x and b of w.

    As the sum of squares, which is the same number, with half the gradient at the bits: that of the absolute
    value, (a - b) and so 0 where bits agree.
    """
    from methods.head._blocks import bits
    from methods.head._products import quadratic

    settings = threshold(config), temperature(config)
    first, second = (bits(part, *settings, share=0.5) for part in (hidden, weight))
    return quadratic(first, second, curve, move=False)


def rounded_bits(config: Config, vectors: Tensor) -> Tensor:
    """The official code's bits [M,d], rounding errors and all."""
    smooth = (vectors / temperature(config)).sigmoid()
    return (vectors > threshold(config)).to(vectors.dtype) + smooth - smooth.detach()


def gumbel(vectors: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of ``vectors``, cut off at +-10; torch's global generator."""
    import torch

    uniform = torch.rand_like(vectors.detach()).clamp_(MARGIN, 1 - MARGIN)
    return -(-uniform.log()).log().clamp(-LARGEST_NOISE, LARGEST_NOISE)
