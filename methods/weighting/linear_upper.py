"""Rows with small losses weigh less, all others the same: what is learnt already is left alone.

Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", with h and the
softmax of ``methods.weighting``:

    f(h) = min(h + delta, delta)

The strategy that the paper recommends; the official code calls it ``linupper``. From the middle of the range of losses
on f is flat, so that a row with an extreme loss, an outlier perhaps, gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.weighting import Scaled, scaled, softmax

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.weighting",)


@dataclass(frozen=True, kw_only=True)
class Config(Scaled):
    """Temperature, warm-up, form, and the scale of the losses."""


def weights(config: Config, losses: Tensor, step: int) -> Tensor:
    """Weights [B] of the rows of a global batch from their losses [B]."""
    return softmax(config, (scaled(losses, config.delta) + config.delta).clamp_max(config.delta), step)
