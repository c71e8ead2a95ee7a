"""Chains at equal levels: what each keeps, and what it has cost, where a quantity first passes each level.

End points compare methods at whatever forgetting their last step happened to reach; here every run is read at the
same one, on its own way there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from methods.stage import AssayError
from workflows.columns import Cell, Column
from workflows.grid import Table, Text, column_numbers, explanation, header, marks, names, shown
from workflows.measured import ChainRun, Measured
from workflows.trajectory import NOT_REACHED


@dataclass(frozen=True)
class Plot:
    """What is compared. ``reach[level][run]`` says who passes a level, ``cells[level][run][column]`` with what."""

    at: Column
    levels: Sequence[float]
    columns: Sequence[Column]
    runs: Sequence[ChainRun]
    reach: Sequence[Sequence[Cell]]
    cells: Sequence[Sequence[Sequence[Cell]]]

    def column(self, place: int) -> list[Cell]:
        """All cells of one column, level by level."""
        return [row[place] for rows in self.cells for row in rows]


def table(measured: Measured, name: str, spec: Mapping[str, Any]) -> Table:
    """Draw one table of kind ``matched``: rows are levels × chains, the best of each level bold."""
    plot, missing = _collected(measured, name, spec)
    by = spec.get("rows", "chain")
    called = names(measured, plot.runs, by)
    marked = marks(measured, plot.runs, [_all_of(plot, place) for place in range(len(plot.runs))])
    rows = _rows(plot, [text + mark for text, (mark, _) in zip(called, marked, strict=True)])
    headers = [by, f"at {header(replace(plot.at, better=''), [])}", "reached"]
    headers += [header(column, plot.column(place)) for place, column in enumerate(plot.columns)]
    about = [
        explanation(rows),
        _reading(plot),
        *missing,
        *measured.coarse(plot.runs, (plot.at, *plot.columns)),
        *_gaps(measured, plot),
    ]
    about += dict.fromkeys(note for _, each in marked for note in each)
    breaks = range(len(plot.runs), len(rows), len(plot.runs))
    return Table(
        name, spec.get("title", ""), tuple(headers), rows, tuple(about), _numbers(plot, called), tuple(breaks)
    )


# --- what is compared -------------------------------------------------------------------------------------


def _collected(measured: Measured, name: str, spec: Mapping[str, Any]) -> tuple[Plot, list[str]]:
    at, levels = measured.one(spec["at"]), [float(level) for level in spec["levels"]]
    columns, missing = _columns(measured, spec)
    wanted = [[measured.at(column, at, level) for column in columns] for level in levels]
    reaching = [measured.at(at, at, level) for level in levels]
    runs = [run for run in compared(measured, at, spec.get("of")) if measured.cell(run, reaching[0]).known]
    if not runs:
        raise AssayError(_nobody(name, at))
    reach = [[measured.cell(run, column) for run in runs] for column in reaching]
    cells = [[[measured.cell(run, column) for column in row] for run in runs] for row in wanted]
    return Plot(at, levels, columns, runs, reach, cells), missing


def _columns(measured: Measured, spec: Mapping[str, Any]) -> tuple[list[Column], list[str]]:
    """The columns with their direction, and a sentence for every one that nothing was measured for."""
    columns, missing = [], []
    for reference in spec["columns"]:
        better = spec.get("better", {}).get(reference)
        try:
            found = measured.along(reference)
        except AssayError as error:
            missing.append(f"Missing: {error}")
        else:
            columns += [replace(column, better=better or column.better) for column in found]
    return columns, missing


def compared(measured: Measured, at: Column, of: Sequence[str] | None) -> list[ChainRun]:
    """The chains that ``of`` names; without it those that logged ``at`` or whose kept models are scored for it."""
    if of is not None:
        return measured.chosen(of)
    if at.is_curve:
        return [run for run in measured.chains if at.metric in run.terms]
    return [
        run
        for run in measured.chains
        if measured.is_scored_between(run, at) or _is_lost_between(measured, run, at)
    ]


def _is_lost_between(measured: Measured, run: ChainRun, column: Column) -> bool:
    return any(way.gaps(column) for way in measured.trajectories(run))


def _nobody(name: str, at: Column) -> str:
    if at.is_curve:
        return f"tables.{name}: no chain here logged {at.metric}; give the last stage probe=[…] and probe_every=…"
    return (
        f"tables.{name}: no chain here was scored for {at.name} on the way; write of: [direct@steps] in the entry "
        f"{at.entry} under evaluate and give the last stage of direct checkpoints=[20, 40]."
    )


# --- how it is shown --------------------------------------------------------------------------------------


def _all_of(plot: Plot, run: int) -> list[Cell]:
    return [cell for rows in plot.cells for cell in rows[run]]


def _rows(plot: Plot, called: Sequence[str]) -> tuple[tuple[Text, ...], ...]:
    rows: list[tuple[Text, ...]] = []
    for level, reach, cells in zip(plot.levels, plot.reach, plot.cells, strict=True):
        texts = [
            shown(
                column,
                [_said_once(row[place], reach[run]) for run, row in enumerate(cells)],
                plot.column(place),
            )
            for place, column in enumerate(plot.columns)
        ]
        for run, text in enumerate(called):
            start = (Text(text), Text(f"{level:g}", value=level), _reached(reach[run]))
            rows.append((*start, *(column[run] for column in texts)))
    return tuple(rows)


def _said_once(cell: Cell, reach: Cell) -> Cell:
    """A cell with numbers without the runs that did not get there: these are counted under ``reached``."""
    if not cell.samples:
        return cell
    return replace(cell, statuses=Counter(cell.statuses) - Counter(reach.statuses))


def _reached(reach: Cell) -> Text:
    """``2 of 3``, and what happened to the others if it is not that they stayed before the level."""
    others = [f"{count} {status}" for status, count in reach.statuses.items() if status != NOT_REACHED]
    text = f"{reach.n} of {reach.n + sum(reach.statuses.values())}"
    return Text(", ".join([text, *others]), value=float(reach.n))


# --- notes ------------------------------------------------------------------------------------------------


def _reading(plot: Plot) -> str:
    how = "from below, linear between logged steps" if plot.at.is_curve else (
        "away from where it started, linear between the models that were scored (start, kept steps, end)"
    )  # fmt: skip
    costs = " Costs are those up to there." if any(column.is_cost for column in plot.columns) else ""
    return (
        f"Each run is read where {plot.at.name} first passes the level, {how}. Reached: runs that pass it; "
        f"the other columns are over these.{costs}"
    )


def _gaps(measured: Measured, plot: Plot) -> Iterator[str]:
    """Scores on the way that failed or are missing, where values reach across the gap."""
    for run in plot.runs:
        ways = measured.trajectories(run)
        count = max(
            sum(way.gaps(column) for way in ways if way.follows(column))
            for column in [plot.at, *(each for each in plot.columns if each.is_score)]
        )
        if count:
            which = (
                "one of the models on the way has" if count == 1 else f"{count} of the models on the way have"
            )
            yield f"{run.name}: {which} no score; values are interpolated across."


def _numbers(plot: Plot, called: Sequence[str]) -> pd.DataFrame:
    reach = [cell for row in plot.reach for cell in row]
    frame: dict[str, list[Any]] = {
        "row": [text for _ in plot.levels for text in called],
        f"at {plot.at.name}": [level for level in plot.levels for _ in called],
        "reached": [cell.n for cell in reach],
        "runs": [cell.n + sum(cell.statuses.values()) for cell in reach],
    }
    for place, column in enumerate(plot.columns):
        frame |= column_numbers(column, plot.column(place))
    return pd.DataFrame(frame)
