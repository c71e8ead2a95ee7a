"""Notes the length of each row's answer, and beside it how many weights a model has. Source: none, for tests."""

from __future__ import annotations

from dataclasses import dataclass

from methods.stage import Dataset, Stage

SEEDED = False
USES = ("methods.checkpoint", "methods.data")
RESULT = "data"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which rows."""

    # question-answer rows
    data: Dataset = "authors/forget01[0:3]"


def run(stage: Stage) -> None:
    """``data/``: a row for each row. Without a model before it, that has 0 weights."""
    from methods.checkpoint import load_model
    from methods.data import write_rows

    parameters = load_model(stage.parents["model"]).parameters() if "model" in stage.parents else ()
    weights = sum(weight.numel() for weight in parameters)
    rows = [{"letters": len(row["answer"]), "weights": weights} for row in stage.data.rows(stage.config.data)]
    write_rows(stage.folder / "data", rows)
