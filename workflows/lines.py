"""Line figures: learning curves, a score over a swept option, and what is kept at a matched level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from methods.stage import AssayError
from workflows import chance, draw
from workflows.axes import Spec, finish, quantity, quantity_label, sd_or_zero, several, term_label
from workflows.curves import Line, value_at_level
from workflows.measured import Cell, ChainRun, Column, Measured
from workflows.tables import scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = 60
BANDS = "Lines: means over distinct results; bands: smallest to largest."
LEGEND_LINES_AT_MOST = 24

Series = Sequence[tuple[float, Sequence[float]]]


def _band(axes: Axes, series: Series, place: int, label: str) -> None:
    """A line through the means with the range of the seeds behind it."""
    look, xs = draw.look(place), [x for x, _ in series]
    every = max(1, len(xs) // 8)
    axes.plot(xs, [chance.mean(list(ys)) for _, ys in series], label=label, markevery=(place % every, every),
              markersize=4.5, **look)  # fmt: skip
    if any(len(ys) > 1 for _, ys in series):
        axes.fill_between(xs, [min(ys) for _, ys in series], [max(ys) for _, ys in series],
                          color=look["color"], alpha=0.18, linewidth=0)  # fmt: skip


def _shared_legend(image: Figure, panels: Sequence[Axes]) -> None:
    found = dict(
        pair for axes in panels for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    )
    draw.legend_below(image, list(found.values())[:LEGEND_LINES_AT_MOST], list(found)[:LEGEND_LINES_AT_MOST])


def curve(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> tuple[Figure, str]:
    """Logged terms over the optimizer step, a panel for each term and a line for each chain."""
    from matplotlib.ticker import MaxNLocator

    terms = several(spec["terms"])
    image, panels = draw.new(len(terms))
    runs = [run for run in runs if run.terms & set(terms)]
    for axes, wanted in zip(panels, terms, strict=True):
        for place, run in enumerate(runs):
            series = _over_steps([each.lines.get(wanted, ()) for each in run.distinct_curves])
            if series:
                _band(axes, series, place, measured.shown_name(run))
        finish(axes, spec, "optimizer step", term_label(wanted))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not any(axes.lines for axes in panels):
        raise AssayError(f"figures.{name}: no chain here logged {' or '.join(terms)}.")
    _shared_legend(image, panels)
    return image, BANDS


def _over_steps(curves: Sequence[Line]) -> list[tuple[float, list[float]]]:
    """Values by step, over the steps that every run logged."""
    tables = [dict(line) for line in curves if line]
    steps = sorted(set.intersection(*(set(each) for each in tables))) if tables else []
    return [(step, [each[step] for each in tables]) for step in steps]


def sweep(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> tuple[Figure, str]:
    """Quantities over a swept option, a line for each family; ``baseline`` names a chain drawn across."""
    columns = [quantity(measured, name, each) for each in several(spec["y"])]
    image, panels = draw.new(len(columns))
    for axes, column in zip(panels, columns, strict=True):
        cells = [measured.cell(run, column) for run in runs]
        lines = _swept(measured, runs, column, spec["x"])
        for place, (label, series) in enumerate(lines.items()):
            _error_line(axes, sorted(series), place, label, scale(column, cells))
        finish(axes, spec, str(spec["x"]).replace("_", " "), quantity_label(column, cells))
        _baseline(measured, axes, column, spec, scale(column, cells))
    if not any(axes.lines for axes in panels):
        raise AssayError(f"figures.{name}: no chain here sweeps {spec['x']} and has {spec['y']}.")
    _shared_legend(image, panels)
    return image, "Means; bars: ± sd over distinct results."


def _swept(
    measured: Measured, runs: Sequence[ChainRun], column: Column, option: str
) -> dict[str, list[tuple[float, Cell]]]:
    """Points of every family, one line for each setting of whatever else is swept."""
    lines: dict[str, list[tuple[float, Cell]]] = {}
    for run in runs:
        cell, at = measured.cell(run, column), run.swept.get(option, run.options.get(option))
        if cell.samples and isinstance(at, (int, float)) and not isinstance(at, bool):
            rest = ", ".join(f"{key}={value}" for key, value in run.swept.items() if key != option)
            prefix = "" if len(measured.experiments) == 1 else f"{run.source}: "
            lines.setdefault(prefix + run.group + (f" [{rest}]" if rest else ""), []).append(
                (float(at), cell)
            )
    return lines


def _error_line(
    axes: Axes, series: Sequence[tuple[float, Cell]], place: int, label: str, factor: float
) -> None:
    xs, ys = [x for x, _ in series], [cell.mean * factor for _, cell in series]
    axes.errorbar(
        xs,
        ys,
        yerr=[sd_or_zero(cell) * factor for _, cell in series],
        capsize=3,
        elinewidth=0.9,
        label=label,
        **draw.look(place),
    )


def _baseline(measured: Measured, axes: Axes, column: Column, spec: Spec, factor: float) -> None:
    for run in measured.chosen([spec["baseline"]]) if spec.get("baseline") else []:
        cell = measured.cell(run, column)
        if cell.samples:
            axes.axhline(
                cell.mean * factor,
                color="#555555",
                linestyle=(0, (1, 2)),
                linewidth=1.2,
                label=measured.shown_name(run),
            )


def matched(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> tuple[Figure, str]:
    """One term where another first has a level, over that level: how much is kept at equal forgetting."""
    image, (axes,) = draw.new()
    place = 0
    for run in runs:
        series = list(_at_levels(run, spec))
        if series:
            _band(axes, series, place, measured.shown_name(run))
            place += 1
    if not place:
        raise AssayError(f"figures.{name}: no chain here logged both {spec['x']} and {spec['y']}.")
    finish(axes, spec, f"{term_label(spec['x'])}, first reached", term_label(spec["y"]))
    _shared_legend(image, [axes])
    return (
        image,
        f"Interpolated along each run's curve. {BANDS} A line ends where not all of its runs reach the level.",
    )


def _at_levels(run: ChainRun, spec: Spec) -> Iterator[tuple[float, list[float]]]:
    """(level, y of every run at it) over the levels that all runs of the chain pass."""
    runs = [each.lines for each in run.distinct_curves]
    along = [[value for _, value in run_lines.get(spec["x"], ())] for run_lines in runs]
    if not runs or any(len(values) < 2 for values in along):
        return
    low, high = max(values[0] for values in along), min(max(values) for values in along)
    levels = spec.get("levels") or [low + (high - low) * index / LEVELS for index in range(1, LEVELS + 1)]
    for level in levels:
        values = [value_at_level(run_lines, spec["y"], spec["x"], level) for run_lines in runs]
        if all(value is not None for value in values):
            yield level, [value for value in values if value is not None]
