"""What tables share: what a cell says, which cell is bold, how rows are called and marked.

A cell is ``mean ± sd (n)`` over n distinct results. The best of a column is bold only where its lead over the
runner-up is beyond chance. What failed says so instead of a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from workflows import chance
from workflows.columns import Cell, Column
from workflows.measured import ChainRun, Measured
from workflows.relative import obtained
from workflows.specs import PER_KILOJOULE, RECOVERED, RELATIVE

NOTHING = "–"
LOST_SHARE = 0.05
ARROWS = {"higher": "↑", "lower": "↓", "closer_to_0": "→0", "closer_to_1": "→1"}
DECIMALS_AT_MOST = 6
WATT_HOURS_BELOW_KWH = 0.1
MILLIONS_FROM = 1e6
"""Tokens of a column in which there are so many are counted in millions."""


@dataclass(frozen=True)
class Text:
    """A cell as it is shown; ``value`` is what sorting goes by."""

    text: str
    bold: bool = False
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A drawn table. ``numbers`` is the same as plain columns, in the units of results.csv.

    ``breaks`` are the places of rows that begin a new group.
    """

    name: str
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    notes: tuple[str, ...]
    numbers: pd.DataFrame
    breaks: tuple[int, ...] = ()


# --- rows -------------------------------------------------------------------------------------------------


def names(measured: Measured, runs: Sequence[ChainRun], by: str) -> list[str]:
    """What each row is called; chains of the same method or label are told apart by their own name."""
    if by == "chain":
        return [measured.shown_name(run) for run in runs]
    plain = [getattr(run, by) or run.label for run in runs]
    return [name if plain.count(name) == 1 else f"{name} [{measured.shown_name(run)}]"
            for name, run in zip(plain, runs, strict=True)]  # fmt: skip


def marks(
    measured: Measured, runs: Sequence[ChainRun], grid: Sequence[Sequence[Cell]]
) -> list[tuple[str, list[str]]]:
    """For every row its marks and what they mean: updates lost in saving, results of older code."""
    return [_mark(measured.jobs, run, cells) for run, cells in zip(runs, grid, strict=True)]


def _mark(jobs: pd.DataFrame, run: ChainRun, cells: Sequence[Cell]) -> tuple[str, list[str]]:
    shown = {sample.id for cell in cells for sample in cell.samples}
    within = jobs["chains"].str.split(";").map(lambda names: run.chain in [name.strip() for name in names])
    own = jobs[(jobs["source"] == run.source) & (within | jobs["id"].isin(shown))]
    lost = pd.to_numeric(own["update_lost_in_saving"], errors="coerce").max()
    marks, notes = "", []
    if lost > LOST_SHARE:
        marks, notes = (
            " †",
            [
                f"† {run.name}: saving lost {lost:.0%} of a stage's update (its weights are stored too coarsely)."
            ],
        )
    if own["stale"].str.lower().isin(["true", "1"]).any():
        marks, notes = marks + " ‡", [*notes, "‡ made by older code of the same recipe (keep_stale=true)."]
    return marks, notes


def explanation(rows: Sequence[Sequence[Text]]) -> str:
    """What a cell and its bold face mean."""
    bold = any(cell.bold for row in rows for cell in row)
    lead = "Bold: ahead of the runner-up" if bold else "Bold (nowhere here): ahead of the runner-up"
    return f"A cell is mean ± sd (n distinct results). {lead} beyond chance, {chance.TEST}. {NOTHING}: not measured."


# --- cells ------------------------------------------------------------------------------------------------


def shown(column: Column, cells: Sequence[Cell], among: Sequence[Cell] = ()) -> list[Text]:
    """A column's cells, the leader bold; ``among`` is the whole column where these are compared by themselves."""
    factor = scale(column, among or cells)
    means = [abs(cell.mean) * factor for cell in cells if cell.samples]
    decimals = _decimals(max(means, default=0.0))
    best, mixed = leader(column, cells), len(_kinds(among or cells)) > 1
    return [_text(column, cell, factor, decimals, place == best, mixed) for place, cell in enumerate(cells)]


def _sign(column: Column, mean: float) -> str:
    """A change that is an increase says so."""
    return "+" if column.relative_to and mean > 0 else ""


def _text(column: Column, cell: Cell, factor: float, decimals: int, bold: bool, mixed: bool) -> Text:
    lost = ", ".join(
        status if count == 1 and not cell.samples else f"{count} {status}"
        for status, count in cell.statuses.items()
    )
    if not cell.samples:
        only = next(iter(cell.statuses)) if len(cell.statuses) == 1 else lost
        return Text(only or NOTHING)
    text = _sign(column, cell.mean) + number(cell.mean * factor, cell.sd * factor, decimals) + f" ({cell.n})"
    kind = f" {'/'.join(_kinds([cell]))}" if mixed and _kinds([cell]) else ""
    return Text(text + kind + (f", {lost}" if lost else ""), bold, cell.mean)


def number(mean: float, sd: float, decimals: int) -> str:
    """``0.223 ± 0.019``; ``2.1e-20`` where the column's decimals would hide the number."""
    small = mean != 0 and abs(mean) < 10**-decimals / 2
    if decimals > DECIMALS_AT_MOST or small or abs(mean) >= 1e7:
        return f"{mean:.1e}" if math.isnan(sd) else f"{mean:.1e} ± {sd:.0e}"
    if abs(mean) >= 1:  # three digits, also beside much larger numbers
        decimals = max(decimals, 2 - math.floor(math.log10(abs(mean))))
    if math.isnan(sd):
        return f"{mean:.{decimals}f}"
    if sd > 0:  # a spread is never rounded away
        decimals = max(decimals, min(DECIMALS_AT_MOST, -math.floor(math.log10(sd))))
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}" if sd else f"{mean:.{decimals}f} ± 0"


def _decimals(largest: float) -> int:
    """About three digits after the first for numbers above one, three significant ones below."""
    if largest == 0:
        return 3
    magnitude = math.floor(math.log10(largest))
    return max(0, 3 - magnitude) if magnitude >= 0 else 2 - magnitude


def scale(column: Column, cells: Sequence[Cell]) -> float:
    """1,000 where energies are so small that watt-hours read better than kWh; a millionth where tokens are many."""
    if column.absolute is not None:
        return 1.0
    largest = max((abs(cell.mean) for cell in cells if cell.samples), default=0.0)
    if column.unit == "tokens":
        return 1e-6 if largest >= MILLIONS_FROM else 1.0
    return (
        1000.0
        if column.entry == "energy" and column.metric.endswith("_kwh") and largest < WATT_HOURS_BELOW_KWH
        else 1.0
    )


def unit(column: Column, cells: Sequence[Cell]) -> str:
    """The unit as shown, with how energy was obtained where that is the same everywhere."""
    if column.unit == "tokens" and scale(column, cells) < 1:
        return "M tokens"
    if not column.per_kilojoule and (column.entry != "energy" or not column.metric.endswith("_kwh")):
        return column.unit
    kinds = _kinds(cells)
    plain = column.unit if column.absolute else "Wh" if scale(column, cells) > 1 else "kWh"
    return plain + (f", {kinds[0]}" if len(kinds) == 1 else "")


def _kinds(cells: Sequence[Cell]) -> list[str]:
    """``measured``, ``estimated, shared`` …: what stands after kWh."""
    words = [obtained(word) for cell in cells for word in cell.units]
    return sorted(dict.fromkeys(word for word in words if word))


def header(column: Column, cells: Sequence[Cell]) -> str:
    """``forget10.forget_nll (nats/token) ↑``."""
    said = unit(column, cells)
    return " ".join(
        filter(None, [plain_name(column), f"({said})" if said else "", ARROWS.get(column.better, "")])
    )


def plain_name(column: Column) -> str:
    """The column's name without the unit of an energy: ``energy.stage relative to control``."""
    name = (column.absolute or column).name
    name = name.removesuffix("_kwh") if column.entry == "energy" else name
    if column.towards:
        return f"{name}{RECOVERED}{column.towards}" + (PER_KILOJOULE if column.per_kilojoule else "")
    return name + (f"{RELATIVE}{column.relative_to}" if column.relative_to else "")


# --- the best of a column ---------------------------------------------------------------------------------


def badness(value: float, better: str) -> float:
    """Smaller is better, whatever the metric's own direction is."""
    aim = {"closer_to_0": 0.0, "closer_to_1": 1.0}.get(better)
    return -value if better == "higher" else value if aim is None else abs(value - aim)


def leader(column: Column, cells: Sequence[Cell]) -> int | None:
    """The place of the best cell if its lead over the runner-up is beyond chance, else None."""
    if not column.better or column.is_cost:
        return None
    values = {place: {seed: badness(value, column.better) for seed, value in cell.by_seed.items()}
              for place, cell in enumerate(cells) if cell.samples}  # fmt: skip
    order = sorted(values, key=lambda place: chance.mean(list(values[place].values())))
    if len(order) < 2 or not chance.beyond_chance(values[order[0]], values[order[1]]):
        return None
    return order[0]


def column_numbers(column: Column, cells: Sequence[Cell]) -> dict[str, list[Any]]:
    """A column as plain numbers: means, sds, counts, units and statuses."""
    return {
        column.name: [cell.mean for cell in cells],
        f"{column.name} sd": [cell.sd for cell in cells],
        f"{column.name} n": [cell.n for cell in cells],
        f"{column.name} unit": ["; ".join(cell.units) for cell in cells],
        f"{column.name} status": [_status(cell) for cell in cells],
    }


def _status(cell: Cell) -> str:
    lost = [f"{count} {status}" for status, count in cell.statuses.items()]
    return ", ".join((["ok"] if cell.samples else []) + lost) or "not measured"
