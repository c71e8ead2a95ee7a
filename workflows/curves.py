"""Learning curves: the terms of one run, and a term's value where another one first has a level."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

Line = Sequence[tuple[float, float]]
"""(step, value) of one term, in order of steps."""


def lines(rows: Iterable[Mapping[str, float | str]]) -> dict[str, Line]:
    """The terms of one run from its rows of curves.csv; a step logged twice counts once, its last time."""
    terms: dict[str, dict[float, float]] = {}
    for row in rows:
        if math.isfinite(float(row["value"])):
            terms.setdefault(str(row["term"]), {})[float(row["step"])] = float(row["value"])
    return {name: sorted(points.items()) for name, points in terms.items()}


def value_at_level(run: Mapping[str, Line], name: str, at: str, level: float) -> float | None:
    """Term ``name`` where term ``at`` first passes ``level`` upwards, both linear between logged steps."""
    step = _first_passing(run.get(at, ()), level)
    return None if step is None else _value_at_step(run.get(name, ()), step)


def _first_passing(line: Line, level: float) -> float | None:
    """The step, between logged ones, at which the line first reaches the level from below."""
    if line and line[0][1] == level:
        return line[0][0]
    for (step, below), (next_step, above) in pairwise(line):
        if below < level <= above:
            return step + (level - below) / (above - below) * (next_step - step)
    return None


def _value_at_step(line: Line, step: float) -> float | None:
    if line and line[0][0] == step:
        return line[0][1]
    for (earlier, value), (later, next_value) in pairwise(line):
        if earlier < step <= later:
            return value + (step - earlier) / (later - earlier) * (next_value - value)
    return None
