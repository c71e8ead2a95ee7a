"""Manhattan distance head: harmonic loss on sums of absolute differences.

Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers":

    D_ij = sum_k |x_ik - w_jk| + eps          p_ij = D_ij^-n / sum_m D_im^-n

The vision and toy layers are this with eps = 1e-4 and n = 1 on D (``exponent_on="plain"``). Two of the
language models' three "Manhattan" heads are distances: "long" and Minkowski's p = 1 have no eps
(``epsilon=0, smoothing=0.01, floor=1e-8``), and "intermediate" scores ``1 / (1 + D / min D)`` instead of a
power: ``form="reciprocal", exponent=1, exponent_on="plain"``. With 50,304 classes ten times as far as the
right one its loss is still 9.1 nats, which ``ceiling`` reports. The third, "fast", is a sigmoid of an inner
product and no distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

import methods.head
from methods.head import SMALLEST_UNIT, Harmonic, conventions, nearest, plain_scores, power, widen

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head", "methods.head._blocks")


@dataclass(frozen=True, kw_only=True)
class Config(Harmonic):
    """Options of the Manhattan head: those of every distance head and what is done with the distance."""

    # Added to D.
    epsilon: Annotated[float, Ge(0)] = 1e-4
    # "power": D^-n. "reciprocal": (1 + D / min D)^-n, with n = 1 the official "intermediate" head.
    form: Literal["power", "reciprocal"] = "power"


def scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log D``."""
    if config.form == "power":
        return plain_scores(config, hidden, weight, distance)
    return reciprocal_scores(config, hidden, weight)


def distance(hidden: Tensor, weight: Tensor) -> Tensor:
    """Sums of absolute differences [N,V]."""
    from methods.head._blocks import manhattan

    return manhattan(hidden, weight)


def reciprocal_scores(config: Config, hidden: Tensor, weight: Tensor) -> Tensor:
    """``-n log(1 + r)`` [N,V] with r the distance relative to the row's smallest."""
    import torch

    from methods.head._blocks import by_rows

    n = 2 * power(config, hidden.shape[-1])

    def finished(distances: Tensor) -> Tensor:
        shifted = distances + config.epsilon
        ratios = shifted / nearest(shifted).clamp(min=SMALLEST_UNIT)
        return conventions(config, -n * ratios.log1p(), absolute=True)

    with torch.autocast(hidden.device.type, enabled=False):
        return by_rows(finished, distance(widen(hidden), widen(weight)))


def separable(config: Config) -> bool:
    """A ratio to the row's smallest distance depends on all classes."""
    return config.form == "power" and methods.head.separable(config)


def ceiling(config: Config, width: int, classes: int) -> float:
    """The best probability; for the reciprocal form with all other classes ten times as far as the right one."""
    ratio = 0.0 if config.form == "power" else (2 / 11) ** (2 * power(config, width))
    return methods.head.ceiling(config, width, classes, ratio)
