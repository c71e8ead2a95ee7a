"""Log-Taylor softmax: the exponential is replaced by the first terms of its series.

de Brebisson, Vincent 2016, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family", section 3.
With the scores o:

    t_v = 1 + o_v + o_v^2 / 2          l = -log t_y / sum_v t_v

t is positive everywhere and has its minimum, 1/2, at o = -1: a score pushed below that becomes *more* probable again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The log-Taylor softmax has no options."""


def token_losses(config: Config, scores: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N], in nats, from its scores [N,V] and target [N]."""
    # (1 + (1 + o)^2) / 2, the same without cancellation.
    series = (1 + (1 + scores).square()) / 2
    right = series.gather(1, targets[:, None]).squeeze(1)
    return series.sum(dim=-1).log() - right.log()
