"""Reads the four files of a result folder: results.csv, jobs.csv, curves.csv and experiment.json.

A published folder may have the large tables as ``.csv.gz``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from methods.stage import AssayError

_CURVES = ("chain", "label", "model_id", "seed", "method", "step", "term", "value")
_JOBS = (
    "id", "kind", "label", "method", "status", "energy_kwh", "energy_source", "update_lost_in_saving", "stale",
    "chains", "parents",
)  # fmt: skip
_RESULTS = ("chain", "label", "seed", "evaluation", "entry", "task", "metric", "value", "status")
_RESULTS_EMPTY_WHERE_ABSENT = (
    "experiment", "model_id", "score_id", "base", "family", "method", "options", "swept", "step", "unit", "better",
    "stderr",
)  # fmt: skip


def stored(path: Path) -> Path:
    """The table, or its compressed form where only that is there."""
    compressed = path.with_name(f"{path.name}.gz")
    return compressed if compressed.is_file() and not path.is_file() else path


def read_rows(path: Path) -> pd.DataFrame:
    """A results table: text columns as text, ``value`` and ``stderr`` as numbers (nan where empty).

    ``step`` is empty for the end of a chain and a whole number, as text, for a model that its last stage kept; a
    table from before there were kept models has ends only.
    """
    path = stored(path)
    if not path.is_file():
        raise AssayError(f"{path}: there is no such results table; draw a report from a folder that has one.")
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    lacking = [name for name in _RESULTS if name not in frame]
    if lacking:
        raise AssayError(f"{path}: this is no results table; it has no column {', '.join(lacking)}.")
    for name in _RESULTS_EMPTY_WHERE_ABSENT:
        if name not in frame:
            frame[name] = ""
    for name in ("value", "stderr"):
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    wrong = [step for step in frame["step"] if step and not step.isdecimal()]
    if wrong:
        raise AssayError(f"{path}: step {wrong[0]!r} is no whole number; it is empty for the end of a chain.")
    return frame


def _optional(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    """A table that an interrupted experiment may not have yet."""
    path = stored(path)
    empty = not path.is_file() or path.stat().st_size < 2
    frame = pd.DataFrame() if empty else pd.read_csv(path, dtype=str, keep_default_na=False)
    for name in needed:
        if name not in frame:
            frame[name] = pd.Series([""] * len(frame), dtype=object)
    return frame


def read_jobs(path: Path) -> pd.DataFrame:
    """Every job; empty where the table is not there."""
    return _optional(path, _JOBS)


def read_curves(path: Path) -> pd.DataFrame:
    """Every logged term; empty where nothing was logged yet."""
    frame = _optional(path, _CURVES)
    for name in ("step", "value"):
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    return frame


def read_experiment(folder: Path) -> dict[str, Any]:
    """The resolved experiment file."""
    path = folder / "experiment.json"
    try:
        experiment = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssayError(
            f"{path}: there is no such file; a report needs the resolved experiment beside results.csv."
        ) from None
    except json.JSONDecodeError as error:
        raise AssayError(f"{path}: this is no JSON (line {error.lineno}).") from None
    return dict(experiment)


def source_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with their parents' where two are called the same."""
    paths = [Path(folder).resolve() for folder in folders]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    if len(set(paths)) < len(paths):
        raise AssayError("The same results folder is given twice.")
    return ["/".join(path.parts[-depth:]) for path in paths]
