"""Rows with middling losses weigh most: neither what is learnt already nor outliers.

Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", with h and the
softmax of ``methods.weighting``:

    f(h) = 1 - h^2 / delta^2

The official code calls it ``mid``. delta drops out of it, so there is no such option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.weighting import Reweighting, scaled, softmax

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.weighting",)


@dataclass(frozen=True, kw_only=True)
class Config(Reweighting):
    """Temperature, warm-up and form."""


def weights(config: Config, losses: Tensor, step: int) -> Tensor:
    """Weights [B] of the rows of a global batch from their losses [B]."""
    return softmax(config, 1 - scaled(losses).square(), step)
