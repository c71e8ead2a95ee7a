"""Multiplies every weight by a factor. Source: none, invented for tests, which edit this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from methods.stage import Stage

SEEDED = False
USES = ("methods.checkpoint",)
# what the tests change, to have other code
TIMES = 1.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """By how much."""

    # what every weight is multiplied by
    factor: Annotated[float, Gt(0)] = 0.5


def run(stage: Stage) -> None:
    """The parent's model, scaled."""
    import torch

    from methods.checkpoint import load_model, save_model

    model = load_model(stage.parents["model"])
    with torch.no_grad():
        for weight in model.parameters():
            weight *= stage.config.factor * TIMES
    save_model(model, stage.folder / "model", stage.parents["model"])
