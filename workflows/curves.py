"""Learning curves: one term of a run, and its value where another term first has a level.

A curve is a table of ``step``, ``term``, ``value`` rows, as curves.csv has them for one run.
"""

from __future__ import annotations

import pandas as pd


def term(curves: pd.DataFrame, name: str) -> pd.DataFrame:
    """One term of one run: finite ``step`` and ``value``, in order; a step logged twice counts once."""
    rows = curves[(curves["term"] == name) & curves["value"].notna()]
    return rows.drop_duplicates("step", keep="last").sort_values("step")[["step", "value"]]


def value_at_level(curves: pd.DataFrame, name: str, at: str, level: float) -> float | None:
    """Term ``name`` where term ``at`` first passes ``level`` upwards, both linear between logged steps."""
    step = _first_passing(term(curves, at), level)
    wanted = term(curves, name)
    if step is None or wanted.empty or not wanted["step"].iloc[0] <= step <= wanted["step"].iloc[-1]:
        return None
    steps, values = wanted["step"].tolist(), wanted["value"].tolist()
    for index in range(1, len(steps)):
        if step <= steps[index]:
            share = (step - steps[index - 1]) / (steps[index] - steps[index - 1])
            return float(values[index - 1] + share * (values[index] - values[index - 1]))
    return float(values[-1])


def _first_passing(curve: pd.DataFrame, level: float) -> float | None:
    steps, values = curve["step"].tolist(), curve["value"].tolist()
    if values and values[0] == level:
        return float(steps[0])
    for index in range(1, len(steps)):
        below, above = values[index - 1], values[index]
        if below < level <= above:
            return float(
                steps[index - 1] + (level - below) / (above - below) * (steps[index] - steps[index - 1])
            )
    return None
