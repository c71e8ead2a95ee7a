"""What the distance heads share: from squared distances to log-space scores.

A distance head gives class ``j`` the probability ``p_ij = D_ij^-n / sum_k D_ik^-n`` and therefore the
score ``l_ij = -n log D_ij`` (Baek, Liu, Tyagi, Tegmark 2025, "Harmonic Loss Trains Interpretable AI
Models", section 2). The power is never formed: with n = 768 it leaves float32 as soon as a class is 12 %
farther away than the nearest one. Dividing by the row's smallest distance, as the official code does,
changes neither probabilities nor gradients, and is left out.

The published code bases disagree in what they do after the power. ``Harmonic`` has an option for each of
these habits; the defaults are the plain definition. ``Layer`` adds what the layers of Miller-Golub et al.
2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers", disagree in: they come from three
code bases with three placements of epsilon.

A head is a module with ``Config``, ``scores(config, hidden [N,d], weight [V,d], **parameters) -> [N,V]``
and, where it needs them,

    parameters(config, weight) -> dict   further parameters, and constants as integer tensors
    rows(config, classes) -> int         rows of the weight matrix where they are not the classes
    NOISE = True                         scores(..., training: bool) draws from torch's global generator
    separable(config) -> bool            here: False once smoothing, a clamp or a row minimum mixes classes
    ceiling(config, width, classes)      here: 1 but for smoothing, floor and legacy_sign
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

REVISION = 1
# The official language models divide by no distance smaller than this.
SMALLEST_UNIT = 1e-8


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


@dataclass(frozen=True, kw_only=True)
class Layer(Harmonic):
    """Options of the heads whose distance is none of the squared ones: ``p ~ (D + epsilon)^-n``.

    The official layers raise D itself to -n: theirs is ``exponent_on="plain"``. The default remains the
    squared distance for every head, so that the same exponent means the same p ~ D^-2n in all of them.
    """

    # Keeps divisions, roots and powers finite; added to D at last. (1e-4 in the official models.)
    epsilon: Annotated[float, Ge(0)] = 1e-4
    # Whose definition it is: the image models', the toy sets' or the language models'. The last one divides
    # D by the row's smallest before it adds epsilon, so that the score of a class depends on all classes.
    impl: Literal["vision", "toy", "language"] = "vision"
    # The flag of the official image models. True: (D / min D + epsilon)^-n. False and None are the same
    # probabilities, but False makes floor and legacy_sign act on (D + epsilon)^-n itself, as those models do
    # as shipped, and not on its ratio to the nearest class.
    scale: bool | None = None

    def __post_init__(self) -> None:
        """The language models know no such flag."""
        if self.impl == "language" and self.scale is not None:
            raise AssayError(
                f"a head with impl='language' always divides by the row's smallest distance; leave scale="
                f"{self.scale} out."
            )


def unused(config: Any, head: str, names: Iterable[str], owner: str) -> None:
    """Refuse options that were given (are not None) though the chosen variant does not read them."""
    given = [name for name in names if getattr(config, name) is not None]
    if given:
        raise AssayError(
            f"head {head}: {given[0]}={getattr(config, given[0])!r} is read only with {owner}; "
            f"leave it out or choose that."
        )


def plain_scores(
    config: Harmonic,
    hidden: Tensor,
    weight: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
    *,
    epsilon: float | None = None,
    unit: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scores [N,V] from distances that are no squares, ``distance(hidden, weight)`` [N,V] without epsilon.

    In float32 or wider. Autocast is switched off: an error of the distance is multiplied by n, and a bf16
    difference would cost whole nats.

    Args:
        epsilon: what is added at last, where that is not ``config.epsilon``.
        unit: the divisor [N,1] of a row where the definition has one; default: its smallest distance.
    """
    import torch

    from methods.head._blocks import by_rows

    n = 2 * power(config, hidden.shape[-1])
    last = config.epsilon if epsilon is None else epsilon

    def finished(distances: Tensor) -> Tensor:
        if relative(config):
            distances = distances / (unit or nearest)(distances).clamp(min=SMALLEST_UNIT)
        scores = -n * safe_log(distances + last if last else distances)
        return conventions(config, scores, absolute=absolute(config))

    with torch.autocast(hidden.device.type, enabled=False):
        return by_rows(finished, distance(widen(hidden), widen(weight)))


def relative(config: Harmonic) -> bool:
    """Whether distances are divided by the row's smallest before epsilon is added."""
    return isinstance(config, Layer) and (config.impl == "language" or config.scale is True)


def absolute(config: Harmonic) -> bool:
    """Whether floor and sign act on D^-n as the definition gives it, and not relative to the nearest class."""
    return isinstance(config, Layer) and (config.impl == "language" or config.scale is not None)


def nearest(distances: Tensor) -> Tensor:
    """The smallest distance of each row [N,1]."""
    return distances.amin(dim=-1, keepdim=True)


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


def conventions(config: Harmonic, scores: Tensor, absolute: bool = False) -> Tensor:
    """The scores [N,V] after the clamps, smoothing or sign that a code base applies to them.

    ``absolute``: clamps and sign act on D^-n as it is, and not relative to the nearest class.
    """
    if (config.floor or config.legacy_sign) and not absolute:
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


def separable(config: Harmonic) -> bool:
    """Whether the score of a class depends on x and w_j alone, so that classes may be computed in slices."""
    mixed = config.smoothing or config.floor or config.legacy_sign
    return not mixed and not relative(config)


def ceiling(config: Harmonic, width: int, classes: int, ratio: float = 0.0) -> float:
    """The largest probability that the right one of ``classes`` can get.

    ``ratio`` is the smallest D^-n that any other class can have relative to the right one: 0 where the
    ratio of two distances is unbounded. What remains is what floor, smoothing or sign take away.
    """
    others = classes - 1
    farthest = max(ratio, config.floor)
    if config.legacy_sign:
        # The right class is the farthest one, and at best every other has the largest D^-n there is: 1.
        return 1 / (1 + others * math.exp(farthest - 1))
    best = 1 / (1 + others * farthest)
    return (best + config.smoothing / classes) / (1 + config.smoothing)


def bounded_ratio(config: Harmonic, width: int, largest: float) -> float:
    """The smallest ratio of D^-n where D is a distance (no square) between 0 and ``largest``."""
    if relative(config):
        return 0.0
    return float((config.epsilon / (largest + config.epsilon)) ** (2 * power(config, width)))
