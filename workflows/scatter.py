"""Scatter figures: one quantity against another, the Pareto front, and a third as marker area or colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows import draw, recovered
from workflows.axes import Spec, finish, plain_logarithms, quantity, quantity_label, sd_or_zero
from workflows.columns import Cell, Column
from workflows.draw import Label
from workflows.grid import badness, scale, unit
from workflows.measured import ChainRun, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = ("family", "method", "chain", "base", "source")
NAMES_AT_MOST = 12
"""With more points than this, members of a sweep that has a colour of its own are called by what is swept alone."""
PLAIN_AREA, SMALLEST_AREA, LARGEST_AREA = 45.0, 16.0, 170.0
LARGE = 1e5


@dataclass(frozen=True)
class Point:
    """One chain in a scatter."""

    name: str
    group: str
    x: Cell
    y: Cell
    size: Cell
    tint: Cell


@dataclass(frozen=True)
class Scatter:
    """What is plotted, and the factors that bring small energies to watt-hours.

    ``swept`` says what the points of groups in ``families``, which are sweeps, are called by.
    """

    points: list[Point]
    x: Column
    y: Column
    size: Column | None
    tint: Column | None
    families: Sequence[str] = ()
    swept: str = ""

    def factor(self, side: str) -> float:
        return scale(getattr(self, side), self.cells(side))

    def cells(self, side: str) -> list[Cell]:
        return [getattr(point, side) for point in self.points]

    def means(self, side: str, points: Sequence[Point] | None = None) -> list[float]:
        chosen = self.points if points is None else points
        return [getattr(point, side).mean * self.factor(side) for point in chosen]


def scatter(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> tuple[Figure, str]:
    """Draw ``y`` over ``x``; ``size`` is a quantity, ``color`` a grouping or a quantity."""
    plot = _collected(measured, runs, spec, name)
    image, (axes,) = draw.new()
    finish(axes, spec, quantity_label(plot.x, plot.cells("x")), quantity_label(plot.y, plot.cells("y")))
    areas = _areas(plot)
    _family_lines(axes, plot)
    handles = _dots(image, axes, plot, areas)
    best = front(plot) if spec.get("front", True) else []
    handles += _front_line(axes, plot, best) + _sizes(plot)
    draw.legend_below(image, handles, [handle.get_label() for handle in handles])
    axes.margins(0.12)
    plain_logarithms(axes, spec)
    _large_numbers(axes, plot)
    line = list(zip(plot.means("x", best), plot.means("y", best), strict=True))
    draw.place_labels(image, axes, _labels(plot, areas), line)
    return image, _caption(plot, best)


def _labels(plot: Scatter, areas: Sequence[float]) -> list[Label]:
    across, up = plot.factor("x"), plot.factor("y")
    return [
        Label(point.x.mean * across, point.y.mean * up, point.name, math.sqrt(area) / 2,
              sd_or_zero(point.x) * across, sd_or_zero(point.y) * up)
        for point, area in zip(plot.points, areas, strict=True)
    ]  # fmt: skip


def _collected(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> Scatter:
    color = spec.get("color", "family")
    if "." not in color and color not in GROUPS:
        raise AssayError(
            f"figures.{name}: color is one of {', '.join(GROUPS)}, or a quantity such as energy.chain_kwh."
        )
    x, y, size, tint = (
        quantity(measured, name, reference) if reference and "." in reference else None
        for reference in (spec["x"], spec["y"], spec.get("size"), color)
    )
    if x is None or y is None:
        raise AssayError(f"figures.{name}: x and y are quantities such as forget10.model_utility.")
    sides = (x, y, size, tint)
    found = [
        (run, Point(measured.shown_name(run), _group(run, color),
                    *(measured.cell(run, column) if column else Cell() for column in sides))) for run in runs
    ]  # fmt: skip
    found = [(run, point) for run, point in found if point.x.samples and point.y.samples]
    if not found:
        raise AssayError(f"figures.{name}: no chain has both {x.name} and {y.name}.")
    plot = Scatter([point for _, point in found], x, y, size, tint)
    return plot if len(found) <= NAMES_AT_MOST else _called_by_sweep(plot, [run for run, _ in found])


def _called_by_sweep(plot: Scatter, runs: Sequence[ChainRun]) -> Scatter:
    """Short names for the members of sweeps whose colour says which sweep they are of."""
    members: dict[str, list[ChainRun]] = {}
    for run, point in zip(runs, plot.points, strict=True):
        members.setdefault(point.group, []).append(run)
    families = [
        group for group, own in members.items() if len(own) > 1 and len({run.group for run in own}) == 1
    ]
    options = list(
        dict.fromkeys(option for group in families for run in members[group] for option in run.swept)
    )
    points = [replace(point, name=_swept(run, options)) if point.group in families else point
              for run, point in zip(runs, plot.points, strict=True)]  # fmt: skip
    return replace(plot, points=points, families=families, swept=" and ".join(options))


def _swept(run: ChainRun, options: Sequence[str]) -> str:
    """``0.5`` where one option is swept, else ``sparsity=0.5,levels=3``."""
    if len(options) == 1:
        return str(run.swept[options[0]])
    return ",".join(f"{option}={value}" for option, value in run.swept.items())


def _group(run: ChainRun, by: str) -> str:
    words = {"chain": run.group, "source": run.source, "method": run.method, "base": run.base}
    return words.get(by, run.family) or "model"


def _family_lines(axes: Axes, plot: Scatter) -> None:
    """A faint line through the points of every sweep that is called by its option."""
    groups = list(dict.fromkeys(point.group for point in plot.points))
    for family in plot.families:
        own = sorted(
            (point for point in plot.points if point.group == family), key=lambda point: point.x.mean
        )
        axes.plot(plot.means("x", own), plot.means("y", own), color=draw.look(groups.index(family))["color"],
                  linewidth=1.0, alpha=0.45, zorder=1.5)  # fmt: skip


def _large_numbers(axes: Axes, plot: Scatter) -> None:
    """Ticks such as 1.2 M where numbers are too large to be written out."""
    from matplotlib.ticker import EngFormatter

    for side in "xy":
        if max(map(abs, plot.means(side))) >= LARGE:
            getattr(axes, f"{side}axis").set_major_formatter(EngFormatter(sep=" "))


def _dots(image: Figure, axes: Axes, plot: Scatter, areas: Sequence[float]) -> list[Any]:
    """Means with the sd over distinct results as bars; marker (and colour) say the group. Returns the legend."""
    handles = []
    shades = _shades(image, axes, plot)
    for place, group in enumerate(dict.fromkeys(point.group for point in plot.points)):
        look = draw.look(place)
        own = [index for index, point in enumerate(plot.points) if point.group == group]
        points = [plot.points[index] for index in own]
        fill: Any = [shades[index] for index in own] if shades else look["color"]
        axes.scatter(plot.means("x", points), plot.means("y", points), s=[areas[index] for index in own], c=fill,
                     marker=look["marker"], edgecolor="black", linewidth=0.6, alpha=0.85, zorder=3)  # fmt: skip
        bars = [[sd_or_zero(getattr(point, side)) * plot.factor(side) for point in points] for side in "xy"]
        axes.errorbar(plot.means("x", points), plot.means("y", points), xerr=bars[0], yerr=bars[1], fmt="none",
                      ecolor="#222222", elinewidth=0.8, capsize=2, zorder=4)  # fmt: skip
        handles.append(_handle(group, look["marker"], "white" if shades else look["color"]))
    return handles


def _handle(label: str, marker: str, color: str) -> Any:
    from matplotlib.lines import Line2D

    edge: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.6, "markersize": 6.5}
    return Line2D([], [], linestyle="", marker=marker, color=color, label=label, **edge)


def _shades(image: Figure, axes: Axes, plot: Scatter) -> list[Any]:
    """A colour for every point where colour is a quantity, with its bar; else none."""
    if plot.tint is None:
        return []
    import numpy
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = plot.means("tint")
    known = [value for value in values if not math.isnan(value)]
    mapping = ScalarMappable(
        Normalize(min(known, default=0.0), max(known, default=1.0)), colormaps["cividis"]
    )
    image.colorbar(mapping, ax=axes, label=quantity_label(plot.tint, plot.cells("tint")))
    return [mapping.to_rgba(numpy.asarray(value)) for value in values]


def _areas(plot: Scatter) -> list[float]:
    """Marker areas in proportion to ``size``, within what can still be seen and told apart."""
    largest = max((cell.mean for cell in plot.cells("size") if cell.samples), default=0.0)
    if plot.size is None or largest <= 0:
        return [PLAIN_AREA] * len(plot.points)
    shares = [cell.mean / largest if cell.samples else 0.0 for cell in plot.cells("size")]
    return [max(SMALLEST_AREA, LARGEST_AREA * share) for share in shares]


def _sizes(plot: Scatter) -> list[Any]:
    """Legend entries for marker areas: the largest and a third of it."""
    from matplotlib.lines import Line2D

    largest = max((cell.mean for cell in plot.cells("size") if cell.samples), default=0.0)
    if plot.size is None or largest <= 0:
        return []
    look: dict[str, Any] = {
        "linestyle": "",
        "marker": "o",
        "color": "white",
        "markeredgecolor": "black",
        "markeredgewidth": 0.8,
    }
    said, top = unit(plot.size, plot.cells("size")), largest * plot.factor("size")
    return [
        Line2D(
            [],
            [],
            markersize=math.sqrt(LARGEST_AREA * share),
            label=f"{top * share:.2g} {said}".strip(),
            **look,
        )
        for share in (1 / 3, 1.0)
    ]


def front(plot: Scatter) -> list[Point]:
    """The points that no other point beats in both directions, by their means; none without directions."""
    if not (plot.x.better and plot.y.better):
        return []
    cost = {id(p): (badness(p.x.mean, plot.x.better), badness(p.y.mean, plot.y.better)) for p in plot.points}
    best = [
        p for p in plot.points if not any(_dominates(cost[id(other)], cost[id(p)]) for other in plot.points)
    ]
    return sorted(best, key=lambda point: cost[id(point)])


def _dominates(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return first != second and first[0] <= second[0] and first[1] <= second[1]


def _front_line(axes: Axes, plot: Scatter, best: Sequence[Point]) -> list[Any]:
    if len(best) < 2:
        return []
    look: dict[str, Any] = {
        "color": "#444444",
        "linestyle": "--",
        "linewidth": 1.0,
        "zorder": 1,
        "label": "Pareto front",
    }
    return list(axes.plot(plot.means("x", best), plot.means("y", best), **look))


def _caption(plot: Scatter, best: Sequence[Point]) -> str:
    parts = ["Means; bars: ± sd over distinct results."]
    parts += [f"Labels: {plot.swept}; lines join what was swept."] if plot.families else []
    parts += [f"Marker area: {plot.size.name}."] if plot.size else []
    parts += [f"Colour: {plot.tint.name}."] if plot.tint else []
    parts += recovered.explained([each for each in (plot.x, plot.y, plot.size, plot.tint) if each])
    return " ".join(
        parts
        + (
            ["Dashed: chains that no other beats in both directions, by their means."]
            if len(best) > 1
            else []
        )
    )
