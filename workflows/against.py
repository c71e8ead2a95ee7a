"""Compares a fresh results table with a published one: same rows, same values within a tolerance.

Rows of cost and speed differ from machine to machine and are left out; everything else is deterministic on a
CPU of the same kind, so the default tolerance only allows for another processor's rounding. The tokens that a search
put through the model are counted and differ nowhere, so they are compared.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from workflows.reading import read_rows

KEYS = ("experiment", "chain", "seed", "step", "evaluation", "entry", "task", "metric")
NOT_COMPARED = ("energy", "time", "memory", "speed")
TOLERANCE = 1e-6
SMALLEST = 1e-12
"""Differences below this are rounding whatever the size of the numbers: a p-value of 1e-20 has no exact digits."""


def results_file(path: Path) -> Path:
    """A results table given as itself or as its folder."""
    return path / "results.csv" if path.is_dir() else path


def differences(fresh: Path, published: Path, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """Rows that only one side has, whose status differs, or whose values differ by more than ``tolerance``.

    Columns: the key, ``published``, ``fresh``, ``relative`` (the relative difference) and ``problem``.
    """
    both = _keyed(published).merge(
        _keyed(fresh), how="outer", on=[*KEYS, "copy"], suffixes=("_published", "_fresh"), indicator=True
    )
    rows = [found for row in both.to_dict("records") if (found := _difference(row, tolerance))]
    return pd.DataFrame(rows, columns=[*KEYS, "published", "fresh", "relative", "problem"])


def sentence(found: pd.DataFrame, compared: int, tolerance: float) -> str:
    """What the comparison came to, in words."""
    if found.empty:
        return f"All {compared} rows agree within {tolerance:g} (cost and speed rows are not compared)."
    return (
        f"{len(found)} rows differ by more than {tolerance:g} or are on one side only ({compared} compared)."
    )


def compared_rows(path: Path) -> int:
    """How many rows of a table are compared."""
    return len(_keyed(path))


def _keyed(path: Path) -> pd.DataFrame:
    frame = read_rows(results_file(path))
    frame = frame[~frame["evaluation"].isin(NOT_COMPARED)]
    copy = frame.groupby(list(KEYS), sort=False).cumcount()
    return frame[[*KEYS, "value", "status"]].assign(copy=copy)


def _difference(row: dict[str, Any], tolerance: float) -> dict[str, Any] | None:
    old, new = row["value_published"], row["value_fresh"]
    relative = _relative(old, new)
    problem = _problem(row, relative, tolerance)
    if not problem:
        return None
    return {key: row[key] for key in KEYS} | {
        "published": old,
        "fresh": new,
        "relative": relative,
        "problem": problem,
    }


def _problem(row: dict[str, Any], relative: float, tolerance: float) -> str:
    if row["_merge"] != "both":
        return "only published" if row["_merge"] == "left_only" else "only fresh"
    if row["status_published"] != row["status_fresh"]:
        return f"was {row['status_published']}, is {row['status_fresh']}"
    return "value differs" if relative > tolerance else ""


def _relative(old: float, new: float) -> float:
    """The relative difference; 0 where both are missing or differ by rounding only, inf where one is missing."""
    if math.isnan(old) or math.isnan(new):
        return 0.0 if math.isnan(old) and math.isnan(new) else math.inf
    distance = abs(old - new)
    return 0.0 if distance <= SMALLEST else distance / max(abs(old), abs(new))
