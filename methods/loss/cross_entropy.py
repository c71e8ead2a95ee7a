"""Cross entropy, with label smoothing where asked for.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", section 7. With p = softmax(z) over V
entries, target y and smoothing e:   l = -(1 - e) log p[y] - (e / V) sum_v log p[v].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of cross entropy."""

    # share of the target spread over all entries (the paper: 0.1; language models: 0)
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0


def token_losses(config: Config, logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N], in nats, from its scores [N,V] and target [N]."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, targets, reduction="none", label_smoothing=config.label_smoothing)
