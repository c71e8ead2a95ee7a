"""Lines over steps, and where one of them first passes a level: learning curves and trajectories alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

Line = Sequence[tuple[float, float]]
"""(step, value) of one quantity, in order of steps."""


def lines(rows: Iterable[Mapping[str, float | str]]) -> dict[str, Line]:
    """The terms of one run from its rows of curves.csv; a step logged twice counts once, its last time."""
    terms: dict[str, dict[float, float]] = {}
    for row in rows:
        if math.isfinite(float(row["value"])):
            terms.setdefault(str(row["term"]), {})[float(row["step"])] = float(row["value"])
    return {name: sorted(points.items()) for name, points in terms.items()}


def first_passing(line: Line, level: float, *, upwards: bool = True) -> float | None:
    """The step, linear between known ones, at which the line first reaches ``level`` from the other side.

    ``upwards`` means from below. A line that starts exactly at the level passes it at its start; one that starts
    beyond it passes only after it has come back.
    """
    sign = 1.0 if upwards else -1.0
    if line and line[0][1] == level:
        return line[0][0]
    for (step, before), (next_step, after) in pairwise(line):
        if sign * before < sign * level <= sign * after:
            return step + (level - before) / (after - before) * (next_step - step)
    return None


def value_at_step(line: Line, step: float) -> float | None:
    """The line's value at a step, linear between known ones; None outside of them."""
    if line and line[0][0] == step:
        return line[0][1]
    for (earlier, value), (later, next_value) in pairwise(line):
        if earlier < step <= later:
            return value + (step - earlier) / (later - earlier) * (next_value - value)
    return None
