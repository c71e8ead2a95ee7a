"""Rows with the smallest and the largest losses weigh most.

Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", with h and the
softmax of ``methods.weighting``:

    f(h) = |h|
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
    return softmax(config, scaled(losses, config.delta).abs(), step)
