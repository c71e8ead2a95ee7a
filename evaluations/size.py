"""How big a model is: parameters, how many of them are not zero, and bytes on disk.

Counted from the weights themselves. A structurally pruned model has two forms: ``masked`` (zeros in place, loads
anywhere) and ``physical`` (cut shapes, dropped sub-blocks, two factors; in ``model/physical``). Each gets its rows, and
``physical`` says in every table whether there is a smaller form at all: where it is 0, zeros save nothing but bytes
after compression. Of a low-rank result the masked form is dense, whatever its ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from methods.stage import Row, Scoring

TASKS = ("language", "classification")
USES = ("methods.checkpoint",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


def evaluate(scoring: Scoring) -> list[Row]:
    """Rows for the model as it is and, where there is one, for its physically smaller form."""
    folder = Path(scoring.parents["model"])
    smaller = folder / "physical"
    rows = _rows("masked", folder, scoring)
    if smaller.is_dir():
        rows += _rows("physical", smaller, scoring)
    return [*rows, Row("masked", "physical", float(smaller.is_dir()), better="")]


def _rows(task: str, folder: Path, scoring: Scoring) -> list[Row]:
    from methods.checkpoint import nonzero, weight_files

    total, kept = nonzero(scoring.models.load(folder))
    written = sum(path.stat().st_size for path in weight_files(folder))
    return [
        Row(task, "parameters", float(total), unit="parameters", better="lower"),
        Row(task, "nonzero", float(kept), unit="parameters", better="lower"),
        Row(task, "sparsity", 1.0 - kept / total, better="higher"),
        Row(task, "file_bytes", float(written), unit="bytes", better="lower"),
    ]
