"""Euclidean distance head: the original harmonic loss.

Baek, Liu, Tyagi, Tegmark 2025, "Harmonic Loss Trains Interpretable AI Models" (arXiv 2502.01628),
equation 2, with d the distance between hidden state and class vector:

    p_i = d_i^-n / sum_j d_j^-n          loss = -log p_y

Paper and code disagree on n. The paper applies it to the distance; its code forms the squared distance

    s_ij = |w_j|^2 + |x_i|^2 - 2 x_i.w_j + 1e-4

and raises that to -n, so the code's n is half of the paper's (``exponent_on``). The published settings,
in the code's convention: 1 for the algorithmic tasks, 28 for MNIST, n = d = 768 for GPT-2. On the
built-in world n = hidden trains as well as a linear head while n = sqrt(hidden) does not get there in the
same steps.

The GPT-2 script (``model_l2loss.py``) has no epsilon and adds 0.01/50304 to every probability:
``epsilon=0, smoothing=0.01``. The vision, toy and language-model layers of Miller-Golub et al. 2026,
"Rethinking the Harmonic Loss via Non-Euclidean Distance Layers", are ``epsilon=1e-4`` (vision, toy) and
``epsilon=0, smoothing=0.01, floor=1e-8`` (language models).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.head import Harmonic, conventions, power, widen

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head", "methods.head._products")


@dataclass(frozen=True, kw_only=True)
class Config(Harmonic):
    """Options of the Euclidean head: those of every distance head."""


def scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log s``."""
    from methods.head._products import Curve, full_precision, quadratic

    curve = Curve(config.epsilon, power(config, hidden.shape[-1]))
    with full_precision(hidden.device.type):
        return conventions(config, quadratic(widen(hidden), widen(weight), curve))


def squared_distance(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """``s`` [N,V] as one matrix product.

    What is left of its cancellation may be below zero, where a power of n is not a number: there s is epsilon.
    """
    from methods.head._products import Curve, full_precision, quadratic

    with full_precision(hidden.device.type):
        return quadratic(widen(hidden), widen(weight), Curve(config.epsilon, logarithm=False))
