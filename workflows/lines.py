"""Line figures: learning curves, and a score over a swept option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from methods.stage import AssayError
from workflows import chance, draw
from workflows.axes import Spec, finish, quantity, quantity_label, sd_or_zero, several, term_label
from workflows.columns import Cell, Column
from workflows.curves import Line
from workflows.grid import scale
from workflows.measured import ChainRun, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BANDS = "Lines: means over distinct results; bands: smallest to largest."
LEGEND_LINES_AT_MOST = 24

Series = Sequence[tuple[float, Sequence[float]]]


def band(axes: Axes, series: Series, place: int, label: str) -> None:
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
                band(axes, series, place, measured.shown_name(run))
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
