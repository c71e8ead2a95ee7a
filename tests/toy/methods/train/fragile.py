"""Fails until the file that cures it is there; then it is the parent. Source: none, invented for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from methods.stage import How, Stage

SEEDED = False
USES = ("methods.checkpoint",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What it waits for."""

    # path of the file that has to be there
    cure: Annotated[str, How]


def run(stage: Stage) -> None:
    """Fail, or write the parent's model again."""
    from methods.checkpoint import load_model, save_model

    if not Path(stage.config.cure).is_file():
        raise RuntimeError("the toy is broken")
    save_model(load_model(stage.parents["model"]), stage.folder / "model", stage.parents["model"])
