"""Linear head: the inner product of every other model, and the control that distance heads are compared with.

    o_ij = x_i . w_j + b_j        p_ij = softmax_j(o_ij)        loss = cross-entropy

What the published controls add to it: a clamp of the scores to [-c, c] (c = 30 in the language models of Miller-Golub
et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers"), or a soft cap c tanh(o / c) (Gemma Team
2024, "Gemma 2", section 2). Beyond a clamp the gradient is 0, and either bounds the probability of the right class.

The product follows the autocast as the linear layer of any model does; the scores are float32 or wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from methods.head import widen
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the linear head."""

    # A learnt number for each class, added to its score; 0 at the start. Language models have none.
    bias: bool = False
    # c of the soft cap; None: no cap.
    softcap: Annotated[float, Gt(0)] | None = None
    # Scores are cut off at plus and minus this; None: they are not.
    clamp: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        """A capped score never reaches a wider clamp."""
        if self.softcap is not None and self.clamp is not None:
            raise AssayError("head linear: softcap and clamp both bound the scores; choose one of them.")


def parameters(config: Config, weight: Tensor) -> dict[str, Tensor]:
    """The bias [V], where there is one."""
    return {"bias": weight.new_zeros(len(weight))} if config.bias else {}


def scores(config: Config, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scores [N,V] of hidden states [N,d] for class vectors [V,d]."""
    import torch
    from torch.nn.functional import linear

    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    product = linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return bounded(config, widen(product))


def block(
    config: Config, hidden: Tensor, weight: Tensor, classes: slice, bias: Tensor | None = None
) -> Tensor:
    """The scores [N,v] of a slice of the classes."""
    return scores(config, hidden, weight[classes], None if bias is None else bias[classes])


def bounded(config: Config, products: Tensor) -> Tensor:
    """The scores within their cap or clamp."""
    if config.softcap is not None:
        return config.softcap * (products / config.softcap).tanh()
    return products if config.clamp is None else products.clamp(-config.clamp, config.clamp)


def separable(config: Config) -> bool:
    """No score depends on another class."""
    return True


def ceiling(config: Config, width: int, classes: int) -> float:
    """The best probability: the right class at the upper bound, all others at the lower one."""
    bound = config.softcap if config.softcap is not None else config.clamp
    return 1.0 if bound is None else 1 / (1 + (classes - 1) * math.exp(-2 * bound))
