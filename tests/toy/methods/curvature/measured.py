"""Writes the sum of every weight to ``files/``. Source: none, invented for tests."""

from __future__ import annotations

import json
from dataclasses import dataclass

from methods.stage import Stage

SEEDED = False
USES = ("methods.checkpoint",)
RESULT = "files"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


def run(stage: Stage) -> None:
    """``files/sums.json``: a number by the name of each weight."""
    from methods.checkpoint import load_model

    weights = load_model(stage.parents["model"]).named_parameters()
    sums = {name: float(weight.detach().sum()) for name, weight in weights}
    (stage.folder / "files").mkdir()
    (stage.folder / "files" / "sums.json").write_text(json.dumps(sums))
