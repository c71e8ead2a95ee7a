"""Cross entropy with the logit z-loss, which keeps the normaliser of the softmax near 1.

Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", section 5; Wortsman et al., "Small-scale Proxies for
Large-scale Transformer Training Instabilities", section 3.1.2. With the scores o and Z = sum_v exp(o_v):

    l = -log p_y + c log^2 Z,    c = 1e-4          dl/do = (1 + 2 c log Z) p - onehot_y

It is not the "Z-loss" of de Brebisson and Vincent, which is ``spherical_z``. The scores have to be the head's own: a
head that returns normalised log-probabilities has Z = 1, and the second term is 0. google-research/t5x
(``t5x/losses.py``) adds it to its own label smoothing: ``convention="t5x"`` (see ``cross_entropy``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Lt

from methods.loss._pieces import smoothed_nll

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the logit z-loss."""

    # the weight c of log^2 Z (both papers: 1e-4)
    coefficient: Annotated[float, Ge(0)] = 1e-4
    # share of the target spread over the entries (both papers: 0)
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    # torch: over all entries; t5x: over the other entries, less the entropy
    convention: Literal["torch", "t5x"] = "torch"


def token_losses(config: Config, scores: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N], in nats, from its scores [N,V] and target [N]."""
    nll = smoothed_nll(scores, targets, config.label_smoothing, config.convention)
    return nll + penalty(config, scores)


def penalty(config: Config, scores: Tensor) -> Tensor:
    """``c log^2 Z`` [N]."""
    return config.coefficient * scores.logsumexp(-1).square()
