"""The way to a chain's end: its parent at step 0, the models its last stage kept, and the end.

Every quantity is a line over the steps, so that any one can be read where another first passes a level: scores
at the models that were scored, terms where they were logged, costs as far as they had been spent. Between two
known points everything is taken as linear in the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from workflows.columns import Column, Row, is_lost
from workflows.curves import Line, first_passing, value_at_step
from workflows.specs import COSTS, STEP

NOT_REACHED = "level not reached"
NOT_SCORED = "not scored there"
NO_START = "start not scored"
# what a stage has spent so far, beside what the whole chain has
SPENT = {
    ("energy", "stage_kwh"): ("energy", "chain_kwh"),
    ("time", "stage_seconds"): ("time", "chain_seconds"),
}

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Trajectory:
    """One distinct result with everything measured on the way to it.

    ``lines`` holds (step, value) by entry, task and metric; ``kept`` the steps between start and end;
    ``lost`` the rows on the way that say why a number is not there.
    """

    seed: str
    id: str
    kept: tuple[int, ...]
    end: int
    lines: Mapping[Key, Line]
    units: Mapping[Key, str]
    lost: Sequence[Row]

    def line(self, column: Column) -> Line:
        """The column over the steps; empty where nothing was measured."""
        return self.lines.get((column.entry, column.task, column.metric), ())

    def follows(self, column: Column) -> bool:
        """Whether anything behind the start is known of the column."""
        line = self.line(column)
        return bool(line) and (column.is_curve or line[-1][0] > 0)

    def unit(self, column: Column) -> str:
        """The unit as the rows give it, for an energy with how it was obtained."""
        return self.units.get((column.entry, column.task, column.metric), "")

    def read(self, column: Column) -> float | str:
        """The column where ``column.at`` first passes ``column.level``, or in words why it has no value there.

        A term of a curve passes upwards. Everything else passes away from its value at the start: a forget NLL
        rises to a level above, a forget accuracy falls to one below. Where the start was not scored, the direction
        is that from the first to the last scored model, and a level behind the first one may have been passed
        before it.
        """
        assert column.at is not None
        along = self.line(column.at)
        upwards = True if column.at.is_curve else _direction(along, column.level)
        if upwards is None:
            return NO_START
        step = first_passing(along, column.level, upwards=upwards)
        if step is None:
            return self._end_lost(column.at) or NOT_REACHED
        value = value_at_step(self.line(column), step)
        return NOT_SCORED if value is None else value

    def _end_lost(self, column: Column) -> str:
        """Why the end, which might have passed a level, has no number."""
        return next((str(row["status"]) for row in self.lost if is_lost(row, column) and not row[STEP]), "")

    def gaps(self, column: Column) -> int:
        """How many models before the end should have the column's number and have not."""
        known = {"", *(str(int(step)) for step, _ in self.line(column))}
        return len({row[STEP] for row in self.lost if is_lost(row, column)} - known)


def _direction(along: Line, level: float) -> bool | None:
    """Whether the level is passed upwards; None where the line may have passed it before it is known."""
    (step, start), (_, end) = along[0], along[-1]
    if step == 0 or level == start:
        return level > start
    upwards = end > start
    return upwards if end != start and upwards == (level > start) else None


# --- from rows --------------------------------------------------------------------------------------------


def trajectories(
    ends: Iterable[Row], kept: Iterable[Row], logged: Mapping[str, tuple[str, Mapping[str, Line]]],
    parent_of: Callable[[str], Sequence[Row]],
) -> list[Trajectory]:  # fmt: skip
    """One trajectory for every distinct result of a chain.

    ``ends`` and ``kept`` are its rows without and with a step; ``logged`` gives for a seed the model's id and its
    curve; ``parent_of`` the rows of the model that the last stage of a model's id started from.
    """
    by_seed: dict[str, tuple[list[Row], list[Row]]] = {seed: ([], []) for seed in logged}
    for place, rows in enumerate((ends, kept)):
        for row in rows:
            by_seed.setdefault(row["seed"], ([], []))[place].append(row)
    found: dict[str, Trajectory] = {}
    for seed, (own, between) in by_seed.items():
        model, curve = logged.get(seed, ("", {}))
        each = _trajectory(seed, own, between, model, curve, parent_of)
        found.setdefault(each.id, each)
    return list(found.values())


def _trajectory(seed: str, ends: Sequence[Row], kept: Sequence[Row], model: str, curve: Mapping[str, Line],
                parent_of: Callable[[str], Sequence[Row]]) -> Trajectory:  # fmt: skip
    named = next(
        (str(row["model_id"]) for row in [*ends, *kept] if row["model_id"] and row[STEP] != "0"), model
    )
    name = named.partition("@step")[0]
    points: dict[int, list[Row]] = {}
    for row in kept:
        points.setdefault(int(row[STEP]), []).append(row)
    points.setdefault(0, []).extend(row for row in parent_of(name) if row["status"] == "ok")
    between = tuple(sorted(set(points) - {0}))
    end, counted = _end(ends, between, curve)
    points[end] = [*ends, *points.get(end, ())]  # the end itself may have been kept, too
    lines, units = _measured(points)
    steps = sorted({*points, 0} if counted else {*points, 0} - {end})
    lines |= {("curve", "", term): line for term, line in curve.items()}
    lines[STEP, "", STEP] = [(float(step), float(step)) for step in steps]
    lost = [row for rows in points.values() for row in rows if row["status"] != "ok"]
    return Trajectory(
        seed, name or f"seed {seed}", tuple(s for s in between if s < end), end, lines, units, lost
    )


def _end(ends: Sequence[Row], kept: Sequence[int], curve: Mapping[str, Line]) -> tuple[int, bool]:
    """The step number of the end, and whether it is one: else only its place after everything kept is known."""
    latest = max(kept, default=0)
    for number in _numbers(ends, curve):
        if number >= max(latest, 1):
            return number, True
    return latest + 1, False


def _numbers(ends: Sequence[Row], curve: Mapping[str, Line]) -> Iterator[int]:
    """What says how many steps were made: the option, a probe of the end, the loss before the last update."""
    steps = json.loads(ends[0]["options"] or "{}").get("steps") if ends else None
    if isinstance(steps, int):
        yield steps
    for last, terms in ((0, [term for term in curve if term.startswith("probe.")]), (1, list(curve))):
        if terms:
            yield last + int(max(curve[term][-1][0] for term in terms))


def _measured(points: Mapping[int, Sequence[Row]]) -> tuple[dict[Key, Line], dict[Key, str]]:
    """Lines and units of everything in the rows; of several rows for one number the first counts."""
    values: dict[Key, dict[int, float]] = {}
    units: dict[Key, str] = {}
    for step, rows in sorted(points.items(), reverse=True):
        for row in rows:
            if row["status"] == "ok" and row["metric"] and not math.isnan(row["value"]):
                key = (row["entry"], row["task"], row["metric"])
                values.setdefault(key, {}).setdefault(step, row["value"])
                units.setdefault(key, row["unit"])
    _spend(values, max(points))
    return {key: sorted((float(s), v) for s, v in line.items()) for key, line in values.items()}, units


def _spend(values: dict[Key, dict[int, float]], end: int) -> None:
    """Costs begin with the stage: at step 0 it has spent nothing, and the chain what it had spent before."""
    so_far = {key: values[key] for key in [key for key in values if key[0] in COSTS]}
    for key in so_far:
        del values[key]
    for (entry, stage), (_, chain) in SPENT.items():
        own, whole = so_far.get((entry, "", stage), {}), so_far.get((entry, "", chain), {})
        if end in own:
            values[entry, "", stage] = own | {0: 0.0}
        if end in own and end in whole:
            values[entry, "", chain] = whole | {0: max(0.0, whole[end] - own[end])}
