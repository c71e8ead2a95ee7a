"""Generalised cross entropy: between cross entropy and the mean absolute error, for labels that may be wrong.

Zhang, Sabuncu 2018, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", equation 6:

    l = (1 - p_y^q) / q          q -> 0: -log p_y          q = 1: 1 - p_y

Its gradient is that of cross entropy times p_y^q: what the model finds impossible is left alone, and so a model that
knows nothing yet learns slowly. (Equal to ``comp_sum(tau=1+q)`` and to ``tsallis(q=1-q)``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Le

from methods.loss._pieces import deformed

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of generalised cross entropy."""

    # 0.7 in all of the paper's experiments
    q: Annotated[float, Gt(0), Le(1)] = 0.7


def token_losses(config: Config, scores: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N] from its scores [N,V] and target [N]."""
    from torch.nn.functional import cross_entropy

    return deformed(cross_entropy(scores, targets, reduction="none"), config.q)
