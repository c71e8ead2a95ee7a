"""Log-spherical softmax: probabilities in proportion to squared scores.

Vincent, de Brebisson, Bouthillier 2015, "Efficient Exact Gradient Update for Training Deep Networks with Very Large
Sparse Targets"; de Brebisson, Vincent 2016, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
Family", section 3. With the scores o:

    l = -log (o_y^2 + e) / sum_v (o_v^2 + e)

It is blind to signs: o and -o have the same loss, so the prediction (the largest score) and the most probable class
may differ. KindXiaoming/grow-crystals (``CustomLosses.spherical_loss``) first divides o by its Euclidean norm, so
that e acts on numbers of size 1/V and bounds the probability that can be reached by (1 + e) / (1 + V e):
``normalise=True``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the log-spherical softmax."""

    # the paper's e: keeps the logarithm of a score of 0 finite (grow-crystals: 1e-4)
    epsilon: Annotated[float, Gt(0)] = 1e-4
    # divide the scores by their Euclidean norm first, as grow-crystals does
    normalise: bool = False


def token_losses(config: Config, scores: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N], in nats, from its scores [N,V] and target [N]."""
    from torch.nn.functional import normalize

    if config.normalise:
        scores = normalize(scores, dim=-1)
    squares = scores.square() + config.epsilon
    right = squares.gather(1, targets[:, None]).squeeze(1)
    return squares.sum(dim=-1).log() - right.log()
