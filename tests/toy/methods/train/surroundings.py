"""Writes down the names of the environment's variables. Source: none, invented for tests."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from methods.stage import Stage

SEEDED = False
USES: tuple[str, ...] = ()
RESULT = "files"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


def run(stage: Stage) -> None:
    """``files/environment.json``: a list of names."""
    (stage.folder / "files").mkdir()
    (stage.folder / "files" / "environment.json").write_text(json.dumps(sorted(os.environ)))
