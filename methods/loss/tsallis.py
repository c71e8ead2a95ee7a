"""Tsallis loss: from the likelihood (q = 1) to the probability of being right (q = 0).

The Tsallis loss continuum between supervised finetuning and reinforcement from verifiable rewards (GARL, PAFT), after
Tsallis 1988, "Possible Generalization of Boltzmann-Gibbs Statistics". With P the probability of a correct output:

    J_q = -ln_q P = -(P^(1-q) - 1) / (1 - q)       dJ_q = -P^(-q) dP       q = 1: -log P      q = 0: 1 - P

Here P is the probability p_y of the right token or class; the paper's P sums over all rationales that lead to a correct
answer and is estimated by sampling, which this is not. (Equal to ``gce(q=1-q)``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from methods.loss._pieces import deformed

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the Tsallis loss."""

    # 0.75 has the best result that the paper's abstract names
    q: Annotated[float, Ge(0), Le(1)] = 0.75


def token_losses(config: Config, scores: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N] from its scores [N,V] and target [N]."""
    from torch.nn.functional import cross_entropy

    return deformed(cross_entropy(scores, targets, reduction="none"), 1 - config.q)
