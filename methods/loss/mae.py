"""Mean absolute error of the probabilities: robust against wrong labels, and slow.

Ghosh, Kumar, Sastry 2017, "Robust Loss Functions under Label Noise for Deep Neural Networks", section 3:

    ||onehot_y - p||_1 = 2 (1 - p_y)          here  l = 1 - p_y

Half of the paper's, which is how the comp-sum paper (Mao, Mohri, Zhong 2023) and that of generalised cross entropy take
it. Its gradient is p_y times that of cross entropy: what a model finds impossible it does not learn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.loss._pieces import deformed

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The mean absolute error has no options."""


def token_losses(config: Config, scores: Tensor, targets: Tensor) -> Tensor:
    """``1 - p_y`` of each token [N] from its scores [N,V] and target [N]."""
    from torch.nn.functional import cross_entropy

    return deformed(cross_entropy(scores, targets, reduction="none"), 1.0)
