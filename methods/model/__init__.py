"""Models made on the spot: a method of this family builds one from nothing and writes it to ``model/``."""

from __future__ import annotations

from types import ModuleType

from methods.stage import Stage

REVISION = 1


def run(stage: Stage, method: ModuleType) -> None:
    """Let the method build the model; it writes ``stage.folder / "model"`` itself."""
    method.build(stage.config, stage)
