"""Tables of an experiment: a row for every chain and a column for every quantity, or chains at equal levels.

``trade_off: {rows: chain, columns: [forget10.forget_quality, forget10.model_utility, energy.chain_kwh]}``
``matched: {kind: matched, at: forget10.forget_nll, levels: [1, 2, 3], columns: [forget10.model_utility, step]}``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from methods.stage import AssayError
from workflows import matched_table, recovered, relative, specs
from workflows.columns import CLASS_TASK, Cell, Column
from workflows.grid import Table, Text, column_numbers, explanation, header, marks, names, shown
from workflows.measured import Measured

DEFAULT_COLUMNS = 16
"""How many columns a table gets that nobody asked for."""


def table(measured: Measured, name: str, spec: Mapping[str, Any]) -> Table:
    """Draw one table. Raises ``AssayError`` on a specification that cannot be drawn."""
    specs.check(f"tables.{name}", spec, "tables")
    draw = matched_table.table if specs.kind_of(spec, "tables") == "matched" else _plain
    return draw(measured, name, spec)


def _plain(measured: Measured, name: str, spec: Mapping[str, Any]) -> Table:
    runs = measured.chosen(spec.get("of"))
    columns, notes = _columns(measured, spec["columns"])
    cells = {run.key: [measured.cell(run, column) for column in columns] for run in runs}
    runs = [run for run in runs if any(cell.known for cell in cells[run.key])]
    grid = [cells[run.key] for run in runs]
    by = spec.get("rows", "chain")
    called, marked = names(measured, runs, by), marks(measured, runs, grid)
    texts = [shown(column, [row[place] for row in grid]) for place, column in enumerate(columns)]
    rows = tuple(
        (Text(called[place] + marked[place][0]), *(each[place] for each in texts))
        for place in range(len(runs))
    )
    headers = (by, *(header(column, [row[place] for row in grid]) for place, column in enumerate(columns)))
    notes += [*relative.explained(columns), *recovered.explained(columns)]
    notes += dict.fromkeys(note for column in columns for note in measured.unrelated(runs, column))
    notes += dict.fromkeys(note for column in columns for note in measured.straight(runs, column))
    about = [explanation(rows), *notes, *dict.fromkeys(note for _, each in marked for note in each)]
    return Table(name, spec.get("title", ""), headers, rows, tuple(about), _numbers(called, columns, grid))


def default_specs(measured: Measured) -> dict[str, dict[str, Any]]:
    """One table for every entry and one of costs, for an experiment that asks for none.

    Numbers about single classes or layers, of which there may be a hundred, are left to figures and to results.csv.
    """
    rows = measured.results[(measured.results["metric"] != "") & (measured.results["entry"] != specs.PROFILE)]
    rows = rows[[CLASS_TASK.fullmatch(task) is None for task in rows["task"]]]
    entries = {entry: [(f"{entry}.{metric}", len(dict.fromkeys(own["task"])))
                       for metric, own in part.groupby("metric", sort=False)]
               for entry, part in rows.groupby("entry", sort=False)}  # fmt: skip
    costs = [name for entry in specs.COSTS for name, _ in entries.pop(entry, [])]
    wanted = {entry: _first(entry, counted) for entry, counted in entries.items()}
    return wanted | ({"cost": {"columns": costs}} if costs else {})


def _first(entry: str, counted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """A table of the first metrics of an entry, as many as can be read beside each other."""
    columns, wide = [counted[0][0]], counted[0][1]
    for name, count in counted[1:]:
        if wide + count <= DEFAULT_COLUMNS:
            columns, wide = [*columns, name], wide + count
    left = len(counted) - len(columns)
    more = f"{entry}: {len(columns)} of its {len(counted)} metrics; name others under tables in the experiment file"
    return {"columns": columns} | ({"title": more} if left else {})


def _columns(measured: Measured, references: Sequence[str]) -> tuple[list[Column], list[str]]:
    """All columns, and a sentence for every reference that nothing was measured for."""
    columns, notes = [], []
    for reference in references:
        try:
            columns += measured.columns(reference)
        except AssayError as error:
            notes.append(f"Missing: {error}")
    return columns, notes


def _numbers(
    called: Sequence[str], columns: Sequence[Column], grid: Sequence[Sequence[Cell]]
) -> pd.DataFrame:
    frame: dict[str, list[Any]] = {"row": list(called)}
    for place, column in enumerate(columns):
        frame |= column_numbers(column, [row[place] for row in grid])
    return pd.DataFrame(frame)
