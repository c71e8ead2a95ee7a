"""AdamW: Adam with weight decay apart from the gradient.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization". With g the gradient, t the step from 1:

    m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
    w = w - rate * decay * w - rate * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)

Paper and PyTorch agree, except that the paper's decay is multiplied by the schedule's factor and not by the learning
rate. The fused kernel is used: one pass over the weights instead of a dozen.
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
    """Options of AdamW; PyTorch's defaults but for the learning rate."""

    # step size; 1e-5 is TOFU's for finetuning a large model, one that starts from nothing wants 1e-3 and more
    learning_rate: Annotated[float, Gt(0)] = 1e-5
    # memory of the mean gradient
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    # memory of the mean squared gradient
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    # keeps the step finite where gradients are tiny
    epsilon: Annotated[float, Gt(0)] = 1e-8
    # share of each weight taken away at each step, times the learning rate
    weight_decay: Annotated[float, Ge(0)] = 0.01


def build(config: Config, parameters: Sequence[tuple[str, Parameter]]) -> Optimizer:
    """The optimizer for these named weights."""
    from torch.optim import AdamW

    return AdamW(
        [weight for _, weight in parameters],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
