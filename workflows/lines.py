"""Line figures: a line with the range of its seeds, and a score over a swept option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows import chance, draw
from workflows.axes import Spec, finish, quantity, quantity_label, sd_or_zero
from workflows.columns import Cell, Column
from workflows.grid import scale
from workflows.measured import ChainRun, Measured
from workflows.specs import several

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BANDS = "Lines: means over distinct results; bands: smallest to largest."

Series = Sequence[tuple[float, Sequence[float]]]


def band(axes: Axes, series: Series, place: int, label: str, look: Mapping[str, Any] | None = None) -> None:
    """A line through the means with the range of the seeds behind it."""
    look = look or draw.look(place)
    mean_line(axes, series, place, label, look)
    if any(len(ys) > 1 for _, ys in series):
        axes.fill_between([x for x, _ in series], [min(ys) for _, ys in series], [max(ys) for _, ys in series],
                          color=look["color"], alpha=0.18, linewidth=0)  # fmt: skip


def mean_line(axes: Axes, series: Series, place: int, label: str, look: Mapping[str, Any]) -> None:
    """A line through the means with about eight markers, elsewhere for every place."""
    every = max(1, len(series) // 8)
    axes.plot([x for x, _ in series], [chance.mean(list(ys)) for _, ys in series], label=label, markersize=4.5,
              markevery=(place % every, every), **look)  # fmt: skip


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
    return image, draw.shared_legend(image, panels) + "Means; bars: ± sd over distinct results."


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
