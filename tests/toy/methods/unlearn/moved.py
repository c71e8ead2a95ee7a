"""Moves a model's last norm by what other stages wrote, and writes down by how much. Source: none, for tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Gt

from methods.data import Locator
from methods.stage import AssayError, Data, Dataset, Files, Stage

SEEDED = False
USES = ("methods.checkpoint", "methods.data")
RESULT = ("model", "files")


@dataclass(frozen=True, kw_only=True)
class Config:
    """By how much."""

    # what the rest is multiplied by
    times: Annotated[float, Gt(0)] = 0.001
    # the weights' sums
    sums: Files | None = None
    # how many rows there are
    rows: Data | None = None
    # rows that must all have an answer
    data: Dataset | None = None


def check(config: Config, data: Locator) -> None:
    """Refuse a factor beyond 1, and rows without an answer."""
    if config.times > 1:
        raise AssayError(f"times={config.times} moves too far; give at most 1.")
    if config.data is not None and not all("answer" in row for row in data.rows(config.data)):
        raise AssayError(f"data={config.data!r} has rows without an answer.")


def run(stage: Stage) -> None:
    """``model/`` and ``files/moved.json``."""
    from methods.checkpoint import load_model, save_model

    far = stage.config.times * (1 + _read(stage.parents.get("sums"), stage.parents.get("rows")))
    model = load_model(stage.parents["model"])
    weight = model.get_parameter("model.norm.weight")
    weight.data += far
    save_model(model, stage.folder / "model", stage.parents["model"])
    (stage.folder / "files").mkdir()
    (stage.folder / "files" / "moved.json").write_text(json.dumps({"far": far}))


def _read(sums: Path | None, rows: Path | None) -> float:
    from methods.data import read_rows

    found = 0.0
    if sums is not None:
        found += json.loads((sums / "sums.json").read_text())["model.norm.weight"]
    if rows is not None:
        found += len(read_rows(rows))
    return found
