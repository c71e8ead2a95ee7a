"""The comp-sum family, from the sum-exponential through the logistic loss to the mean absolute error.

Mao, Mohri, Zhong 2023, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", section 3. With the
scores o, the label y and u = sum_{v != y} exp(o_v - o_y), so that 1 + u = 1 / p_y:

    l = ((1 + u)^(1 - tau) - 1) / (1 - tau)        tau = 1: log(1 + u)

tau = 0 is the sum-exponential loss u, 1 the logistic loss (cross entropy), between 1 and 2 the generalised cross
entropy with q = tau - 1, and 2 the mean absolute error 1 - p_y. Below 1 the loss grows like a power of 1 / p_y and
leaves float32 when the right class is exp(88) times less probable than the rest (tau = 0): the loop then says so and
stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from methods.loss._pieces import deformed, surprise

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the comp-sum family."""

    # 0: sum-exponential, 1: logistic, 2: mean absolute error
    tau: Annotated[float, Ge(0), Le(2)] = 1.0


def token_losses(config: Config, scores: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N] from its scores [N,V] and target [N]."""
    odds, nll = surprise(scores, targets)
    # exp(log u) itself is exact where u is so small that it vanishes in 1 + u.
    return odds.exp() if config.tau == 0 else deformed(nll, config.tau - 1)
