"""Stochastic gradient descent with momentum.

Sutskever et al., "On the importance of initialization and momentum in deep learning". With g the gradient plus
``weight_decay`` times the weight:

    v = momentum * v + g,    w = w - rate * v        (Nesterov: w - rate * (g + momentum * v))

The paper multiplies g by the rate inside v; PyTorch, followed here, outside: the two differ while the rate changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Lt

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of SGD."""

    # step size (the middle of the paper's range)
    learning_rate: Annotated[float, Gt(0)] = 1e-2
    # share of the last step that is repeated (the least of the paper's range)
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    # look ahead before the gradient is added; needs momentum
    nesterov: bool = False
    # times the weight, added to the gradient
    weight_decay: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs a momentum above 0.")


def build(config: Config, parameters: Sequence[tuple[str, Parameter]]) -> Optimizer:
    """The optimizer for these named weights."""
    from torch.optim import SGD

    return SGD(
        [weight for _, weight in parameters],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
