"""Figures of an experiment: scatter (Pareto), curve, sweep and matched, from a few words of specification.

``frontier: {kind: scatter, x: forget10.forget_nll, y: tasks.acc, size: energy.chain_kwh, color: family}``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows import chance, draw
from workflows.curves import term, value_at_level
from workflows.measured import Cell, ChainRun, Column, Measured, distinct_curves
from workflows.tables import badness, scale, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMMON = ("kind", "of", "title", "caption", "log", "x_label", "y_label")
KEYS = {
    "scatter": ("x", "y", "color", "size", "front"),
    "curve": ("terms",),
    "sweep": ("x", "y", "baseline"),
    "matched": ("x", "y", "levels"),
}
SMALLEST_AREA, LARGEST_AREA = 25.0, 260.0
LEVELS = 60
LEGEND_LINES_AT_MOST = 24


@dataclass(frozen=True)
class Drawn:
    """A finished figure: its files, and what a reader must know to read it."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes


def figure(measured: Measured, name: str, spec: Mapping[str, Any], origin: str) -> Drawn:
    """Draw one figure. Raises ``AssayError`` on a specification that cannot be drawn."""
    kind = spec.get("kind", "scatter")
    _check(name, kind, spec)
    runs = measured.chosen(spec.get("of"))
    with draw.style():
        image, caption = _KINDS[kind](measured, runs, spec, name)
        if spec.get("title"):
            image.suptitle(spec["title"], fontsize=10)
        files = draw.files(image, f"{name}: {origin}")
    caption = " ".join(filter(None, [spec.get("caption", ""), caption]))
    return Drawn(name, spec.get("title", ""), caption, files["png"], files["svg"])


def default_specs(measured: Measured) -> dict[str, dict[str, Any]]:
    """Learning curves for an experiment that asks for no figure, where anything was logged."""
    terms = [name for name in dict.fromkeys(measured.curves["term"]) if name not in ("learning_rate", "gradient_norm")]
    return {"learning": {"kind": "curve", "terms": terms[:3]}} if terms else {}


def _check(name: str, kind: str, spec: Mapping[str, Any]) -> None:
    if kind not in KEYS:
        raise AssayError(f"figures.{name}: kind {kind!r} is none of {', '.join(KEYS)}.")
    unknown = sorted(set(spec) - {*COMMON, *KEYS[kind]})
    if unknown:
        raise AssayError(f"figures.{name}: there is no key {unknown[0]!r}; a {kind} has {', '.join((*KEYS[kind], *COMMON))}.")
    for key in ("x", "y") if kind != "curve" else ("terms",):
        if not spec.get(key):
            raise AssayError(f"figures.{name}: a {kind} needs {key}.")


def _one(measured: Measured, name: str, reference: str) -> Column:
    columns = measured.columns(reference)
    if len(columns) > 1:
        there = ", ".join(column.name for column in columns)
        raise AssayError(f"figures.{name}: {reference} is measured on several tasks; name one: {there}.")
    return columns[0]


def _finish_axes(axes: Axes, spec: Mapping[str, Any], x_label: str, y_label: str) -> None:
    axes.set_xlabel(spec.get("x_label", x_label))
    axes.set_ylabel(spec.get("y_label", y_label))
    for axis in spec.get("log", ()):
        getattr(axes, f"set_{axis}scale")("log")


def axis_label(column: Column, cells: Sequence[Cell]) -> str:
    """``forget10 forget nll (nats/token), lower is better``."""
    words = {"higher": "higher is better", "lower": "lower is better",
             "closer_to_0": "closer to 0 is better", "closer_to_1": "closer to 1 is better"}  # fmt: skip
    name = column.name.removesuffix("_kwh") if column.entry == "energy" else column.name
    said = unit(column, cells)
    text = name.replace("_", " ").replace(".", " ", 1) + (f" ({said})" if said else "")
    return ", ".join(filter(None, [text, words.get(column.better, "")]))


# --- scatter ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One chain in a scatter."""

    name: str
    group: str
    x: Cell
    y: Cell
    size: Cell | None


def _scatter(measured: Measured, runs: Sequence[ChainRun], spec: Mapping[str, Any], name: str) -> tuple[Figure, str]:
    x, y = (_one(measured, name, spec[key]) for key in ("x", "y"))
    size = _one(measured, name, spec["size"]) if spec.get("size") else None
    points = _points(measured, runs, x, y, size, spec.get("color", "family"))
    if not points:
        raise AssayError(f"figures.{name}: no chain has both {x.name} and {y.name}.")
    image, (axes,) = draw.new()
    factors = [scale(column, [getattr(point, side) for point in points]) for column, side in ((x, "x"), (y, "y"))]
    _finish_axes(axes, spec, axis_label(x, [p.x for p in points]), axis_label(y, [p.y for p in points]))
    areas = _areas([point.size for point in points])
    _dots(axes, points, areas, factors)
    front = _front(points, x, y) if spec.get("front", True) else []
    _front_line(axes, front, factors)
    handles, labels = axes.get_legend_handles_labels()
    if size is not None:
        handles, labels = _with_sizes(axes, points, areas, size, handles, labels)
    draw.legend_below(image, handles, labels)
    axes.margins(0.12)
    draw.place_labels(image, axes, {(p.x.mean * factors[0], p.y.mean * factors[1]): p.name for p in points})
    return image, _scatter_caption(size, bool(front))


def _points(measured: Measured, runs: Sequence[ChainRun], x: Column, y: Column, size: Column | None, color: str) -> list[Point]:
    points = []
    for run in runs:
        across, up = measured.cell(run, x), measured.cell(run, y)
        if across.samples and up.samples:
            weight = measured.cell(run, size) if size else None
            points.append(Point(measured.shown_name(run), _group(run, color), across, up, weight))
    return points


def _group(run: ChainRun, by: str) -> str:
    if by not in ("family", "method", "chain", "base", "source"):
        raise AssayError(f"color: {by} is none of family, method, chain, base and source.")
    return {"chain": run.group, "source": run.source}.get(by) or getattr(run, by, "") or "model"


def _dots(axes: Axes, points: Sequence[Point], areas: Sequence[float], factors: Sequence[float]) -> None:
    """Means with the sd over distinct results as bars; colour and marker say the group."""
    for place, group in enumerate(dict.fromkeys(point.group for point in points)):
        look = draw.look(place)
        own = [(point, area) for point, area in zip(points, areas, strict=True) if point.group == group]
        xs, ys = ([getattr(p, side).mean * f for p, _ in own] for side, f in zip("xy", factors, strict=True))
        bars = [[_sd(getattr(p, side)) * f for p, _ in own] for side, f in zip("xy", factors, strict=True)]
        axes.errorbar(xs, ys, xerr=bars[0], yerr=bars[1], fmt="none", ecolor="#777777", elinewidth=0.8, capsize=2, zorder=2)
        axes.scatter(xs, ys, s=[area for _, area in own], color=look["color"], marker=look["marker"],
                     edgecolor="black", linewidth=0.6, alpha=0.85, zorder=3, label=group)  # fmt: skip


def _sd(cell: Cell) -> float:
    return 0.0 if math.isnan(cell.sd) else cell.sd


def _areas(sizes: Sequence[Cell | None]) -> list[float]:
    """Marker areas in proportion to the third quantity, within what can still be seen and told apart."""
    largest = max((cell.mean for cell in sizes if cell and cell.samples), default=0.0)
    if largest <= 0:
        return [45.0] * len(sizes)
    return [max(SMALLEST_AREA, LARGEST_AREA * cell.mean / largest) if cell and cell.samples else SMALLEST_AREA for cell in sizes]


def _with_sizes(axes: Axes, points: Sequence[Point], areas: Sequence[float], size: Column,
                handles: list[Any], labels: list[str]) -> tuple[list[Any], list[str]]:  # fmt: skip
    """The legend with the smallest and the largest marker and what they stand for."""
    cells = [point.size for point in points if point.size and point.size.samples]
    known = [(p.size.mean, area) for p, area in zip(points, areas, strict=True) if p.size and p.size.samples]
    for value, area in sorted({min(known), max(known)}) if known else []:
        handle = axes.scatter([], [], s=area, color="white", edgecolor="black", linewidth=0.8)
        said = f"{value * scale(size, cells):.2g} {unit(size, cells)}".strip()
        handles, labels = [*handles, handle], [*labels, said]
    return handles, labels


def _front(points: Sequence[Point], x: Column, y: Column) -> list[Point]:
    """The points that no other point beats in both directions, by their means; none without directions."""
    if not (x.better and y.better):
        return []
    cost = {id(point): (badness(point.x.mean, x.better), badness(point.y.mean, y.better)) for point in points}
    best = [p for p in points if not any(_dominates(cost[id(other)], cost[id(p)]) for other in points)]
    return sorted(best, key=lambda point: cost[id(point)])


def _dominates(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return first != second and first[0] <= second[0] and first[1] <= second[1]


def _front_line(axes: Axes, front: Sequence[Point], factors: Sequence[float]) -> None:
    if len(front) > 1:
        xs, ys = ([getattr(p, side).mean * f for p in front] for side, f in zip("xy", factors, strict=True))
        axes.plot(xs, ys, color="#444444", linestyle="--", linewidth=1.0, zorder=1, label="Pareto front of the means")


def _scatter_caption(size: Column | None, front: bool) -> str:
    parts = ["Means; bars: ± sd over distinct results."]
    parts += [f"Marker area: {size.name}."] if size else []
    return " ".join(parts + (["Dashed: chains that no other beats in both directions."] if front else []))


# --- lines over something ---------------------------------------------------------------------------------


Series = Sequence[tuple[float, Sequence[float]]]


def _band(axes: Axes, series: Series, place: int, label: str, *, many: bool, spread: bool = True) -> None:
    """A line through the means with the range of the seeds behind it."""
    look, xs = draw.look(place), [x for x, _ in series]
    every = max(1, len(xs) // 8)
    axes.plot(xs, [chance.mean(list(ys)) for _, ys in series], label=label, markevery=(place % every, every) if many else None,
              markersize=4.5, **look)  # fmt: skip
    if spread and any(len(ys) > 1 for _, ys in series):
        axes.fill_between(xs, [min(ys) for _, ys in series], [max(ys) for _, ys in series],
                          color=look["color"], alpha=0.18, linewidth=0)  # fmt: skip


def _shared_legend(image: Figure, panels: Sequence[Axes]) -> None:
    found = dict(pair for axes in panels for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    draw.legend_below(image, list(found.values())[:LEGEND_LINES_AT_MOST], list(found)[:LEGEND_LINES_AT_MOST])


def _curve(measured: Measured, runs: Sequence[ChainRun], spec: Mapping[str, Any], name: str) -> tuple[Figure, str]:
    terms = [spec["terms"]] if isinstance(spec["terms"], str) else list(spec["terms"])
    image, panels = draw.new(len(terms))
    places = _places(measured, [run for run in runs if set(run.curves["term"]) & set(terms)])
    for axes, wanted in zip(panels, terms, strict=True):
        for run in runs:
            series = _over_steps([term(rows, wanted) for _, _, rows in distinct_curves(run)])
            if series:
                _band(axes, series, places[run.key], measured.shown_name(run), many=True)
        _finish_axes(axes, spec, "optimizer step", wanted.replace("_", " "))
    if not any(axes.lines for axes in panels):
        raise AssayError(f"figures.{name}: no chain here logged {' or '.join(terms)}.")
    _shared_legend(image, panels)
    return image, "Lines: means over distinct results; bands: smallest to largest."


def _places(measured: Measured, runs: Sequence[ChainRun]) -> dict[tuple[str, str], int]:
    return {run.key: place for place, run in enumerate(runs)}


def _over_steps(curves: Sequence[Any]) -> list[tuple[float, list[float]]]:
    """Values by step, over the steps that every run logged."""
    tables = [dict(zip(curve["step"], curve["value"], strict=True)) for curve in curves if len(curve)]
    steps = sorted(set.intersection(*(set(each) for each in tables))) if tables else []
    return [(step, [each[step] for each in tables]) for step in steps]


def _sweep(measured: Measured, runs: Sequence[ChainRun], spec: Mapping[str, Any], name: str) -> tuple[Figure, str]:
    columns = [_one(measured, name, each) for each in ([spec["y"]] if isinstance(spec["y"], str) else spec["y"])]
    image, panels = draw.new(len(columns))
    for axes, column in zip(panels, columns, strict=True):
        cells = [measured.cell(run, column) for run in runs]
        lines = _swept(measured, runs, column, spec["x"])
        for place, (label, series) in enumerate(lines.items()):
            _error_line(axes, sorted(series), place, label, scale(column, cells))
        _finish_axes(axes, spec, str(spec["x"]).replace("_", " "), axis_label(column, cells))
        _baseline(measured, axes, column, spec, scale(column, cells))
    if not any(axes.lines for axes in panels):
        raise AssayError(f"figures.{name}: no chain here sweeps {spec['x']} and has {spec['y']}.")
    _shared_legend(image, panels)
    return image, "Means; bars: ± sd over distinct results."


def _swept(measured: Measured, runs: Sequence[ChainRun], column: Column, option: str) -> dict[str, list[tuple[float, Cell]]]:
    """Points of every family, one line for each setting of whatever else is swept."""
    lines: dict[str, list[tuple[float, Cell]]] = {}
    for run in runs:
        cell, at = measured.cell(run, column), run.swept.get(option, run.options.get(option))
        if cell.samples and isinstance(at, (int, float)) and not isinstance(at, bool):
            rest = ", ".join(f"{key}={value}" for key, value in run.swept.items() if key != option)
            prefix = "" if len(measured.experiments) == 1 else f"{run.source}: "
            lines.setdefault(prefix + run.group + (f" [{rest}]" if rest else ""), []).append((float(at), cell))
    return lines


def _error_line(axes: Axes, series: Sequence[tuple[float, Cell]], place: int, label: str, factor: float) -> None:
    xs, ys = [x for x, _ in series], [cell.mean * factor for _, cell in series]
    axes.errorbar(xs, ys, yerr=[_sd(cell) * factor for _, cell in series], capsize=3, elinewidth=0.9, label=label, **draw.look(place))


def _baseline(measured: Measured, axes: Axes, column: Column, spec: Mapping[str, Any], factor: float) -> None:
    for run in measured.chosen([spec["baseline"]]) if spec.get("baseline") else []:
        cell = measured.cell(run, column)
        if cell.samples:
            axes.axhline(cell.mean * factor, color="#555555", linestyle=(0, (1, 2)), linewidth=1.2, label=measured.shown_name(run))


def _matched(measured: Measured, runs: Sequence[ChainRun], spec: Mapping[str, Any], name: str) -> tuple[Figure, str]:
    image, (axes,) = draw.new()
    place = 0
    for run in runs:
        series = list(_at_levels(run, spec))
        if series:
            _band(axes, series, place, measured.shown_name(run), many=True)
            place += 1
    if not place:
        raise AssayError(f"figures.{name}: no chain here logged both {spec['x']} and {spec['y']}.")
    _finish_axes(axes, spec, f"level of {spec['x']} first reached", f"{spec['y']} at that level")
    _shared_legend(image, [axes])
    return image, "Interpolated along each run's curve; lines: means over distinct results, bands: smallest to largest. " \
                  "A line ends where the first of its runs no longer reaches the level."  # fmt: skip


def _at_levels(run: ChainRun, spec: Mapping[str, Any]) -> Iterator[tuple[float, list[float]]]:
    """(level, y of every run at it) over the levels that all runs of the chain pass."""
    runs = [rows for _, _, rows in distinct_curves(run)]
    along = [term(rows, spec["x"])["value"] for rows in runs]
    if not runs or any(len(values) < 2 for values in along):
        return
    low, high = max(values.iloc[0] for values in along), min(values.max() for values in along)
    levels = spec.get("levels") or [low + (high - low) * index / LEVELS for index in range(1, LEVELS + 1)]
    for level in levels:
        values = [value_at_level(rows, spec["y"], spec["x"], level) for rows in runs]
        if all(value is not None for value in values):
            yield level, [value for value in values if value is not None]


_KINDS: dict[str, Callable[[Measured, Sequence[ChainRun], Mapping[str, Any], str], tuple[Figure, str]]] = {
    "scatter": _scatter, "curve": _curve, "sweep": _sweep, "matched": _matched,
}  # fmt: skip
