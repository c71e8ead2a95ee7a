"""Cross entropy, with label smoothing where asked for.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", section 7. With p = softmax(z) over V
entries, target y and smoothing e:   l = -(1 - e) log p[y] - (e / V) sum_v log p[v].

google-research/t5x (``t5x/losses.py``) means something else by the same number: (1 - e) on the target, e / (V - 1) on
each *other* entry, and the entropy of that distribution is subtracted, so that a perfect model has loss 0 and not the
entropy. ``convention="t5x"``.
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
    """Options of cross entropy."""

    # share of the target spread over the entries (the paper: 0.1; language models: 0)
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    # torch: over all entries; t5x: over the other entries, less the entropy
    convention: Literal["torch", "t5x"] = "torch"


def token_losses(config: Config, scores: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N], in nats, from its scores [N,V] and target [N]."""
    return smoothed_nll(scores, targets, config.label_smoothing, config.convention)
