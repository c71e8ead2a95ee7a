"""Sets the weights of the model it scores to zero, on purpose: no other score may notice. Invented for tests."""

from __future__ import annotations

from dataclasses import dataclass

from methods.stage import Row, Scoring

USES = ("methods.checkpoint",)
CHANGES_WEIGHTS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


def evaluate(scoring: Scoring) -> list[Row]:
    """The number of weights that were not zero before, and one number that is none."""
    import torch

    model, before = scoring.model(), 0
    with torch.no_grad():
        for weight in model.parameters():
            before += int(weight.count_nonzero())
            weight.zero_()
    return [
        Row("all", "nonzero_before", float(before), unit="parameters"),
        Row("all", "not_a_number", float("nan")),
    ]
