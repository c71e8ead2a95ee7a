"""Heads on a similarity that is no distance, with the low confidence they allow.

The language models of Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers", come
with three heads that raise nothing to a power:

    half           s_ij = (1 + cos(x_i, w_j)) / 2                       "cosine_simple"
    softmax        s_ij = softmax_j(cos(x_i, w_j) / T)                  "cosine_temp_scale_T", T = 0.1 to 2
    sigmoid        s_ij = sigmoid(x_i.w_j / (|x_i|_1 |w_j|_1 + eps))    "manhattan_fast", eps = 1e-8

    p_ij = s_ij / sum_k s_ik

None of these is easily confident about a vocabulary. Where the other V - 1 classes are orthogonal to the hidden state,
the right one gets at most 2 / (V + 1), e^(1/T) / (e^(1/T) + V - 1) and about 1.46 / (V + 0.46): with 50,304 tokens that
is a loss of 10.1, 9.8 (T = 1; 1.2 for T = 0.1) and 10.4 nats, while a guess costs 10.8. Below that gets only a model
that turns the hidden state *away* from all other class vectors (a small one does); with all of them opposite, which
is the bound, the right class gets 1, 1 / (1 + (V - 1) e^(-2/T)) and about 2.72 / (V + 1.72). Gradients of such a head
are small and steady for that reason alone.

The official models clamp s at 1e-8 and spread 0.01 over the classes (``floor=1e-8, smoothing=0.01``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from methods.head import smoothed, unused, widen

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head", "methods.head._products")
# Keeps the quotient of "sigmoid" finite; as in the official code.
SMALLEST_LENGTHS = 1e-8
# T where none was chosen: no scaling.
TEMPERATURE = 1.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the similarity heads."""

    # See above.
    variant: Literal["half", "softmax", "sigmoid"] = "softmax"
    # T; "softmax" only. None: 1.
    temperature: Annotated[float, Gt(0)] | None = None
    # Probability mass spread over all V classes, p + smoothing / V, before the logarithm.
    smoothing: Annotated[float, Ge(0)] = 0.0
    # s, and p after smoothing, are clamped from below here.
    floor: Annotated[float, Ge(0), Lt(1)] = 0.0

    def __post_init__(self) -> None:
        """Only the softmax has a temperature."""
        if self.variant != "softmax":
            unused(self, "cosine_similarity", ["temperature"], "variant='softmax'")


def scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``log s``, but for a constant of a row."""
    from methods.head._products import full_precision

    with full_precision(hidden.device.type):
        found = logarithms(config, widen(hidden), widen(weight))
        if config.floor:
            found = found.log_softmax(dim=-1) if config.variant == "softmax" else found
            found = found.clamp(min=math.log(config.floor))
        settings: Any = config
        return smoothed(settings, found) if config.smoothing else found


def logarithms(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """log s [N,V], and of a softmax what stands in its exponent."""
    from torch.nn.functional import logsigmoid

    from methods.head._products import Curve, directions, product

    if config.variant == "sigmoid":
        lengths = hidden.abs().sum(dim=1, keepdim=True) * weight.abs().sum(dim=1)
        return logsigmoid(hidden @ weight.T / (lengths + SMALLEST_LENGTHS))
    hidden, weight = directions(hidden), directions(weight)
    if config.variant == "softmax":
        return (hidden / temperature(config)) @ weight.T
    return product(hidden, weight, 0.5, 0.5, Curve(0.0, power=-1.0))


def separable(config: Config) -> bool:
    """Smoothing and a clamp behind a softmax mix the classes."""
    return not config.smoothing and not (config.floor and config.variant == "softmax")


def ceiling(config: Config, width: int, classes: int) -> float:
    """The best probability: all other classes opposite to the hidden state, at similarity -1."""
    return _probability(config, classes, -1.0)


def usual(config: Config, classes: int) -> float:
    """The best probability where all other classes are orthogonal to the hidden state, as directions mostly are."""
    return _probability(config, classes, 0.0)


def _probability(config: Config, classes: int, others: float) -> float:
    """That of a class at similarity 1, the others at similarity ``others``."""
    own, other = _score(config, 1.0), max(_score(config, others), config.floor)
    probability = own / (own + (classes - 1) * other)
    return (probability + config.smoothing / classes) / (1 + config.smoothing)


def _score(config: Config, similarity: float) -> float:
    """s, but for a factor of a row, at a cosine or (``sigmoid``) the quotient that stands for one."""
    if config.variant == "half":
        return (1 + similarity) / 2
    if config.variant == "softmax":
        # Relative to similarity 1: a small temperature would leave the range of numbers.
        return math.exp((similarity - 1) / temperature(config))
    return 1 / (1 + math.exp(-similarity))


def temperature(config: Config) -> float:
    """T."""
    return TEMPERATURE if config.temperature is None else config.temperature
