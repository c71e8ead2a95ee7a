"""The Z-loss: a margin on the standardised score of the right class, blind to shift and scale.

de Brebisson, Vincent 2016, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
Family", section 3. With the scores o of V classes:

    z = (o - mean o) / std o          l = 1/a softplus(a (b - z_y))

a and b are tuned for each data set in the paper. The official example (pascal20100/factored_output_layer,
``example/timing_example.py``) has a = 1, b = 0, the population's standard deviation plus 1e-12, and *sums* over the
batch, where this is a mean. z_y is at most sqrt(V - 1), so the loss of a large vocabulary can be made smaller than that
of a small one. Equal scores have no direction: there the gradient is as large as 1/epsilon. No probabilities come out
of it: the perplexity of a model trained so says little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from methods.loss._pieces import softplus

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the Z-loss."""

    # how hard the margin is (the official example: 1)
    a: Annotated[float, Gt(0)] = 1.0
    # the standardised score that the right class has to pass (the official example: 0)
    b: float = 0.0
    # keeps equal scores from a division by 0
    epsilon: Annotated[float, Gt(0)] = 1e-12


def token_losses(config: Config, scores: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N] from its scores [N,V] and target [N]."""
    right = standardised(config, scores).gather(1, targets[:, None]).squeeze(1)
    return softplus(config.a * (config.b - right)) / config.a


def standardised(config: Config, scores: Tensor) -> Tensor:
    """Scores [N,V] with mean 0 and population standard deviation 1 in each row."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    # Under the root, where it also keeps the slope of the root finite: std + epsilon up to epsilon^2 / std.
    deviation = (centred.square().mean(dim=-1, keepdim=True) + config.epsilon**2).sqrt()
    return centred / deviation
