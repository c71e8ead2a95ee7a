"""Bars: the mean of one or several quantities for every chain, with its error and every single run as a dot.

``quality: {kind: bars, metrics: [digits.accuracy, energy.stage_kwh relative to control], group: base}``
A panel for each quantity. What failed or was not measured keeps its place and says so.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows import chance, draw, recovered, relative
from workflows.axes import Spec, plain_logarithms, quantity, quantity_label
from workflows.columns import Cell, Column
from workflows.grid import scale
from workflows.measured import ChainRun, Measured
from workflows.specs import several

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LETTERS_ACROSS = 84
"""Names and blanks that fit side by side below a figure; more make its bars lie down."""
LABEL_LETTERS = 100
"""The same for the larger letters of axis labels, which may stand closer."""
BAR_INCHES, GAP = 0.23, 0.6
"""The height that a lying bar takes, and the room between two groups in bars."""
BAR_WIDTH, DOT_STEP = 0.72, 0.13
"""In bars: how wide each is, and how far the dots on it are apart."""


@dataclass(frozen=True)
class Plot:
    """What is drawn: a bar for each run at ``places``, coloured by ``groups``; ``cells[column][run]``."""

    columns: Sequence[Column]
    runs: Sequence[ChainRun]
    names: Sequence[str]
    groups: Sequence[str]
    places: Sequence[float]
    cells: Sequence[Sequence[Cell]]
    lying: bool

    @property
    def colors(self) -> dict[str, str]:
        return {group: draw.look(place)["color"] for place, group in enumerate(dict.fromkeys(self.groups))}


def bars(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> tuple[Figure, str]:
    """Draw the quantities ``metrics`` by chain; ``group`` says which bars stand together in one colour."""
    plot = _collected(measured, runs, spec, name)
    image, panels = _canvas(plot)
    for axes, column, cells in zip(panels, plot.columns, plot.cells, strict=True):
        _check_log(spec, name, column, cells)
        _bars(axes, plot, column, cells, spec)
        _baseline(measured, axes, plot, column, spec)
        _frame(axes, plot, column, cells, spec)
    if plot.lying:
        _shared_names(panels)
    _legend(image, panels, plot, spec)
    return image, _caption(measured, plot, spec)


# --- what is drawn ----------------------------------------------------------------------------------------


def _collected(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> Plot:
    columns = [quantity(measured, name, each) for each in several(spec["metrics"])]
    if "of" not in spec:
        runs = [run for run in runs if any(measured.cell(run, column).known for column in columns)]
    by = spec.get("group", "family")
    named = [(getattr(run, "name" if by == "chain" else by) or "model", run) for run in runs]
    order = list(dict.fromkeys(group for group, _ in named))
    named.sort(key=lambda pair: order.index(pair[0]))
    runs = [run for _, run in named]
    cells = [[measured.cell(run, column) for run in runs] for column in columns]
    if not any(cell.samples for row in cells for cell in row):
        raise AssayError(
            f"figures.{name}: no chain here has {' or '.join(column.name for column in columns)}."
        )
    names = [measured.shown_name(run) for run in runs]
    groups = [group for group, _ in named]
    room = LETTERS_ACROSS / min(3, len(columns))
    lying = spec.get("horizontal", (max(map(len, names)) + 2) * len(names) > room)
    return Plot(columns, runs, names, groups, _places(groups), cells, bool(lying))


def _places(groups: Sequence[str]) -> list[float]:
    """One behind the other, with a gap where a new group of several bars begins."""
    gap = GAP if len(set(groups)) < len(groups) else 0.0
    places: list[float] = []
    for place, group in enumerate(groups):
        new = place > 0 and group != groups[place - 1]
        places.append(places[-1] + 1.0 + (gap if new else 0.0) if places else 0.0)
    return places


def _canvas(plot: Plot) -> tuple[Figure, list[Axes]]:
    """Panels of the standard size; lying bars share their names and make the figure as high as they need."""
    image, panels = draw.new(len(plot.columns))
    if plot.lying:
        across = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
        need = 1.3 + BAR_INCHES * (plot.places[-1] + 2)
        image.set_figheight(max(3.2, need) if len(panels) == across else max(4.5, 2 * need))
    return image, panels


def _check_log(spec: Spec, name: str, column: Column, cells: Sequence[Cell]) -> None:
    if spec.get("log") and any(value <= 0 for cell in cells for value in cell.values):
        raise AssayError(
            f"figures.{name}: {column.name} is not above 0 everywhere and has no logarithm; leave log out."
        )


# --- bars -------------------------------------------------------------------------------------------------


def _bars(axes: Axes, plot: Plot, column: Column, cells: Sequence[Cell], spec: Spec) -> None:
    factor, start = scale(column, cells), _start(column, cells, spec)
    shown = [place for place, cell in enumerate(cells) if cell.samples]
    where, means = [plot.places[place] for place in shown], [cells[place].mean * factor for place in shown]
    errors = [[_error(cells[place], spec) * factor for place in shown]] * 2
    colors = [plot.colors[plot.groups[place]] for place in shown]
    sizes = [mean - start for mean in means]
    look: dict[str, Any] = {
        "color": colors,
        "alpha": 0.5,
        "edgecolor": "#222222",
        "linewidth": 0.7,
        "zorder": 2,
    }
    line: dict[str, Any] = {"fmt": "none", "ecolor": "#111111", "elinewidth": 1.1, "capsize": 3, "zorder": 4}
    if plot.lying:
        axes.barh(where, sizes, left=start, height=BAR_WIDTH, **look)
        axes.errorbar(means, where, xerr=errors, **line)
    else:
        axes.bar(where, sizes, bottom=start, width=BAR_WIDTH, **look)
        axes.errorbar(where, means, yerr=errors, **line)
    for place in shown:
        _dots(axes, plot, plot.places[place], [value * factor for value in cells[place].values])


def _start(column: Column, cells: Sequence[Cell], spec: Spec) -> float:
    """Where the bars begin: at 0 unless the specification says otherwise, or at a power of ten where 0 is far away."""
    if "start" in spec or not spec.get("log"):
        return float(spec.get("start", 0.0))
    least = min(value for cell in cells for value in cell.values) * scale(column, cells)
    return float(10.0 ** math.floor(math.log10(least) - 0.1))


def _error(cell: Cell, spec: Spec) -> float:
    """Half the length of the error bar: the sample sd, or the t interval of the mean; none for a single result."""
    if cell.n < 2:
        return 0.0
    if spec.get("spread", "sd") == "sd":
        return cell.sd
    low, high = chance.interval(cell.values)
    return (high - low) / 2


def _dots(axes: Axes, plot: Plot, place: float, values: Sequence[float]) -> None:
    """Every single result, beside each other across the bar so that equal ones can be told apart."""
    middle = (len(values) - 1) / 2
    step = min(DOT_STEP, BAR_WIDTH * 0.7 / max(1, len(values) - 1))
    across = [place + (index - middle) * step for index in range(len(values))]
    xs, ys = (values, across) if plot.lying else (across, values)
    axes.plot(xs, ys, linestyle="", marker="o", markersize=3.0, color="white", markeredgecolor="#111111",
              markeredgewidth=0.7, zorder=5, clip_on=False)  # fmt: skip


def _baseline(measured: Measured, axes: Axes, plot: Plot, column: Column, spec: Spec) -> None:
    """The mean of the chain that all others are to be compared with, drawn across."""
    for run in measured.chosen([spec["baseline"]]) if spec.get("baseline") else []:
        cell = measured.cell(run, column)
        if cell.samples:
            value = cell.mean * scale(column, [cell, *plot.cells[plot.columns.index(column)]])
            across = axes.axvline if plot.lying else axes.axhline
            across(value, color="#333333", linestyle=(0, (4, 3)), linewidth=1.0, zorder=3,
                   label=measured.shown_name(run))  # fmt: skip


# --- frame and words --------------------------------------------------------------------------------------


def _frame(axes: Axes, plot: Plot, column: Column, cells: Sequence[Cell], spec: Spec) -> None:
    """Names at one side, the quantity with its unit at the other, and words where there is no bar."""
    values, names = ("x", "y") if plot.lying else ("y", "x")
    getattr(axes, f"set_{names}lim")(plot.places[0] - 0.7, plot.places[-1] + 0.7)
    getattr(axes, f"set_{names}ticks")(plot.places, plot.names)
    axes.grid(visible=False, axis=names)  # type: ignore[arg-type]
    axes.tick_params(axis=names, length=0)  # type: ignore[arg-type]
    if plot.lying:
        axes.invert_yaxis()
    else:
        _turned(axes, plot)
    if spec.get("log"):
        getattr(axes, f"set_{values}scale")("log")
    _ends(axes, values, column, cells, spec)
    plain_logarithms(axes, {"log": [values] if spec.get("log") else []})
    label = spec.get(f"{values}_label", quantity_label(column, cells))
    getattr(axes, f"set_{values}label")("\n".join(textwrap.wrap(label, _letters(axes, plot))))
    for place, cell in zip(plot.places, cells, strict=True):
        if not cell.samples:
            _instead(axes, plot, place, cell)


def _turned(axes: Axes, plot: Plot) -> None:
    """Names that do not fit beside each other are turned."""
    if (max(map(len, plot.names)) + 2) * len(plot.names) > LETTERS_ACROSS / min(3, len(plot.columns)):
        axes.tick_params(axis="x", rotation=40)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")


def _letters(axes: Axes, plot: Plot) -> int:
    """How many letters of a label fit along the axis of values."""
    place = axes.get_subplotspec()
    across, down = (1, 1) if place is None else (place.get_gridspec().ncols, place.get_gridspec().nrows)
    if not plot.lying:
        return 48 // down
    return max(18, (LABEL_LETTERS - max(map(len, plot.names))) // across)


def _ends(axes: Axes, values: str, column: Column, cells: Sequence[Cell], spec: Spec) -> None:
    """The axis begins where the bars do and leaves room behind the longest one."""
    factor, start = scale(column, cells), _start(column, cells, spec)
    reach = [cell.mean + side * _error(cell, spec) for cell in cells if cell.samples for side in (-1, 1)]
    every = [value * factor for value in (*reach, *(each for cell in cells for each in cell.values))]
    low, high = getattr(axes, f"get_{values}lim")()
    if spec.get("log"):
        getattr(axes, f"set_{values}lim")(start, max(every) * 1.15)
        return
    low, high = (
        min(start, low if min(every) < start else start),
        max(start, high if max(every) > start else start),
    )
    getattr(axes, f"set_{values}lim")(low, high)
    if low < start < high:
        across = axes.axvline if values == "x" else axes.axhline
        across(start, color="#222222", linewidth=0.8, zorder=3)


def _instead(axes: Axes, plot: Plot, place: float, cell: Cell) -> None:
    """Why a chain has no bar."""
    words = list(cell.statuses) or ["not measured"]
    look: dict[str, Any] = {"fontsize": 7, "color": "#7A1F1F", "style": "italic", "zorder": 6}
    look["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
    if plot.lying:
        axes.text(
            0.015,
            place,
            ", ".join(words),
            transform=axes.get_yaxis_transform(),
            va="center",
            ha="left",
            **look,
        )
    else:
        axes.text(place, 0.02, ",\n".join(words), transform=axes.get_xaxis_transform(), va="bottom", ha="center",
                  **look)  # fmt: skip


def _shared_names(panels: Sequence[Axes]) -> None:
    """Lying bars side by side: their names stand at the left only."""
    for axes in panels:
        place = axes.get_subplotspec()
        if place is not None and not place.is_first_col():
            axes.tick_params(axis="y", labelleft=False)


def _legend(image: Figure, panels: Sequence[Axes], plot: Plot, spec: Spec) -> None:
    """The groups, where there are several and each has a colour of its own, and the baseline."""
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if 1 < len(plot.colors) <= len(draw.COLORS) and list(plot.groups) != [run.name for run in plot.runs]:
        handles = [Patch(facecolor=color, alpha=0.5, edgecolor="#222222", label=group)
                   for group, color in plot.colors.items()]  # fmt: skip
    handles += [line for axes in panels for line in axes.get_legend_handles_labels()[0]][:1]
    draw.legend_below(image, handles, [str(handle.get_label()) for handle in handles], grow=True)


def _caption(measured: Measured, plot: Plot, spec: Spec) -> str:
    spread = {"sd": "± sample sd", "interval": f"{chance.LEVEL:.0%} t intervals of the means"}
    parts = [f"Bars: means; error bars: {spread[spec.get('spread', 'sd')]}; dots: single results."]
    parts += [f"Grouped by {spec.get('group', 'family')}."] if len(plot.colors) > len(draw.COLORS) else []
    parts += [_counts(plot), *relative.explained(plot.columns), *recovered.explained(plot.columns)]
    for column in plot.columns:
        parts += [*measured.unrelated(plot.runs, column), *measured.straight(plot.runs, column)]
    if spec.get("start"):
        parts.append(f"The bars begin at {spec['start']:g}, not at 0.")
    parts += ["Logarithmic: the length of a bar means nothing."] if spec.get("log") else []
    return " ".join(dict.fromkeys(parts))


def _counts(plot: Plot) -> str:
    """How many results stand behind each bar: once where it is the same everywhere."""
    counts: dict[int, list[str]] = {}
    for place, name in enumerate(plot.names):
        for count in dict.fromkeys(row[place].n for row in plot.cells if row[place].samples):
            counts.setdefault(count, []).append(name)
    if len(counts) == 1:
        return f"n = {next(iter(counts))} distinct results."
    said = sorted(counts.items(), key=lambda item: -len(item[1]))
    rare = "; ".join(f"{count} for {', '.join(dict.fromkeys(names))}" for count, names in said[1:])
    return f"n = {said[0][0]} distinct results; {rare}."
