"""What the distance heads share: from squared distances to log-space scores.

A distance head gives class ``j`` the probability ``p_ij = D_ij^-n / sum_k D_ik^-n`` and therefore the
score ``l_ij = -n log D_ij`` (Baek, Liu, Tyagi, Tegmark 2025, "Harmonic Loss Trains Interpretable AI
Models", section 2). The power is never formed: with n = 768 it leaves float32 as soon as a class is 12 %
farther away than the nearest one. Dividing by the row's smallest distance, as the official code does,
changes neither probabilities nor gradients, and is left out.

The published code bases disagree in what they do after the power. ``Harmonic`` has an option for each of
these habits; the defaults are the plain definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

if TYPE_CHECKING:
    from torch import Tensor

REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Harmonic:
    """Options of every distance head."""

    # The exponent n of p ~ D^-n. None: the width of the hidden state, as in the official GPT-2 script.
    exponent: Annotated[float, Gt(0)] | None = None
    # Whether n applies to D^2, as in all official code, or to D, as in the paper (n there is twice as large).
    exponent_on: Literal["squared", "plain"] = "squared"
    # Added to D^2: a hidden state that meets its class vector keeps a finite score and gradient.
    epsilon: Annotated[float, Ge(0)] = 1e-4
    # Probability mass spread over all V classes, p + smoothing / V, before the logarithm. The official
    # language-model code spreads 0.01; the plain definition has none.
    smoothing: Annotated[float, Ge(0)] = 0.0
    # D^-n relative to the nearest class is clamped from below here, and p after smoothing to [floor, 1].
    # The official code clamps at 1e-8, which stops the gradient of every farther class; 0: no clamp.
    floor: Annotated[float, Ge(0), Lt(1)] = 0.0
    # Use -D^-n itself as the logit: the inverted wiring of four of the official vision models, whose
    # prediction is the *farthest* class. Only for replicating those.
    legacy_sign: bool = False


def log_scores(
    config: Harmonic, hidden: Tensor, weight: Tensor, squared: Callable[[Any, Tensor, Tensor], Tensor]
) -> Tensor:
    """Scores [N,V] of hidden states [N,d] for class vectors [V,d], in float32 or wider.

    ``squared(config, hidden, weight)`` gives the squared distances [N,V] with epsilon in them. Autocast is
    switched off: an error of the distance is multiplied by n, and a bf16 product would cost whole nats.
    """
    import torch

    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight = widen(hidden), widen(weight)
        distances = squared(config, hidden, weight)
        return conventions(config, -power(config, hidden.shape[-1]) * safe_log(distances))


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def power(config: Harmonic, width: int) -> float:
    """The exponent on the squared distance."""
    exponent = float(width) if config.exponent is None else config.exponent
    return exponent if config.exponent_on == "squared" else exponent / 2


def safe_log(distances: Tensor) -> Tensor:
    """Logarithm that stays finite at distance 0, which only epsilon = 0 lets through."""
    import torch

    return distances.clamp(min=torch.finfo(distances.dtype).tiny).log()


def conventions(config: Harmonic, scores: Tensor) -> Tensor:
    """The scores [N,V] after the clamps, smoothing or sign that a code base applies to them."""
    if config.floor or config.legacy_sign:
        scores = scores - scores.amax(dim=-1, keepdim=True)
    if config.floor:
        scores = scores.clamp(min=math.log(config.floor))
    if config.legacy_sign:
        return -scores.exp()
    return smoothed(config, scores) if config.smoothing else scores


def smoothed(config: Harmonic, scores: Tensor) -> Tensor:
    """``log(p + smoothing / V)``; its sum over the classes is 1 + smoothing until a softmax renormalises."""
    import torch

    mass = scores.new_tensor(math.log(config.smoothing / scores.shape[-1]))
    logarithms = torch.logaddexp(torch.log_softmax(scores, dim=-1), mass)
    return logarithms.clamp(min=math.log(config.floor), max=0.0) if config.floor else logarithms
