"""The matched figure: what is kept over how much is forgotten, a line for every chain on its own way.

Scored quantities are drawn as the way itself: from the start through the kept models to the end. Where one side is
a logged term, it is drawn over levels of ``x``: ``y`` where ``x`` first has the level, densely, as curves allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows import chance, draw
from workflows.axes import Spec, finish, plain_logarithms, quantity_label, sd_or_zero, term_label
from workflows.columns import Cell, Column, term
from workflows.grid import scale
from workflows.lines import BANDS, band
from workflows.matched_table import compared
from workflows.measured import ChainRun, Measured
from workflows.specs import CURVE, STEP
from workflows.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = 60
TOGETHER_AT_MOST = 8
"""More chains than this are shown in small panels, where the specification does not say otherwise ..."""
IN_A_PANEL_AT_MOST = 3
"""... by method, or more finely where a panel would hold more than this."""
BEYOND_LEVELS = 0.08
LETTERS_OF_A_TITLE = 24
GREY = "#D2D2D2"

Spots = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Traced:
    """One chain in the figure: the mean of its distinct results and each of them, as (x, y); ``begun`` at step 0."""

    run: ChainRun
    mean: Spots
    single: Sequence[Spots]
    begun: bool = False


@dataclass(frozen=True)
class Plot:
    """What is drawn: the two quantities, the chains, and the factors that bring small energies to watt-hours."""

    x: Column
    y: Column
    traced: Sequence[Traced]
    ends: Mapping[str, Sequence[Cell]]
    names: Callable[[ChainRun], str]

    @property
    def is_path(self) -> bool:
        return not (self.x.is_curve or self.y.is_curve)

    def factor(self, side: str) -> float:
        return scale(getattr(self, side), self.ends[side])

    def label(self, side: str) -> str:
        column: Column = getattr(self, side)
        if column.is_curve:
            return term_label(column.metric)
        return "optimizer step" if column.entry == STEP else quantity_label(column, self.ends[side])


def matched(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> tuple[Figure, str]:
    """Draw ``y`` over ``x`` for every chain; ``reference`` names a chain whose end is marked, the gold model."""
    plot = _collected(measured, runs, spec, name)
    groups = _groups(plot, spec)
    image, panels = draw.new() if groups is None else draw.small(len(groups))
    for axes, (group, own) in zip(panels, (groups or {"": plot.traced}).items(), strict=True):
        _draw(axes, plot, own, [each for each in plot.traced if each not in own])
        _surroundings(measured, axes, plot, spec, name)
        _named(axes, plot, spec, group, own)
    _framed(panels, plot, spec, measured)
    for axes in panels:
        plain_logarithms(axes, spec)
    _labelled(image, panels, plot, spec, alone=groups is None)
    return image, _caption(plot, spec, groups)


# --- what is drawn ----------------------------------------------------------------------------------------


def _collected(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> Plot:
    x, y = (_side(measured, spec[side]) for side in "xy")
    runs = runs if "of" in spec else compared(measured, y if x.entry == STEP else x, None)
    trace = _over_levels if x.is_curve or y.is_curve else _on_the_way
    traced = [each for run in runs if (each := trace(measured, run, x, y, spec))]
    if not traced:
        how = "logged both" if x.is_curve and y.is_curve else "was followed along both"
        raise AssayError(f"figures.{name}: no chain here {how} {spec['x']} and {spec['y']}.")
    ends = {
        side: [measured.cell(each.run, column) for each in traced] for side, column in (("x", x), ("y", y))
    }
    plot = Plot(x, y, traced, ends, measured.shown_name)
    across, up = plot.factor("x"), plot.factor("y")
    return Plot(x, y, [_scaled(each, across, up) for each in traced], ends, measured.shown_name)


def _side(measured: Measured, word: str) -> Column:
    """A logged term, with or without ``curve.`` before it, or a measured quantity."""
    plain = word.removeprefix(CURVE)
    if plain != word or plain in set(measured.curves["term"]):
        return term(plain)
    head = word.partition(".")[0]
    known = {STEP, *measured.results["entry"], *measured.results["evaluation"]}
    return measured.one(word) if head in known else term(word)


def _scaled(traced: Traced, across: float, up: float) -> Traced:
    def scaled(spots: Spots) -> Spots:
        return [(x * across, y * up) for x, y in spots]

    return Traced(traced.run, scaled(traced.mean), [scaled(each) for each in traced.single], traced.begun)


def _on_the_way(measured: Measured, run: ChainRun, x: Column, y: Column, spec: Spec) -> Traced | None:
    """A chain's ways, and the mean over them at the steps that all of them have."""
    found = [each for way in measured.trajectories(run) if len(each := _spots(way, x, y)) > 1]
    common = sorted(set.intersection(*map(set, found))) if found else []
    if len(common) < 2:
        return None
    mean = [tuple(chance.mean([each[step][side] for each in found]) for side in (0, 1)) for step in common]
    single = [[each[step] for step in sorted(each)] for each in found]
    return Traced(run, [(a, b) for a, b in mean], single, begun=common[0] == 0)


def _spots(way: Trajectory, x: Column, y: Column) -> dict[float, tuple[float, float]]:
    xs, ys = dict(way.line(x)), dict(way.line(y))
    return {step: (value, ys[step]) for step, value in xs.items() if step in ys}


def _over_levels(measured: Measured, run: ChainRun, x: Column, y: Column, spec: Spec) -> Traced | None:
    """y of every result where x first has a level, over the levels that all results of the chain pass."""
    ways = measured.trajectories(run)
    along = [[value for _, value in way.line(x)] for way in ways if way.line(x) and way.line(y)]
    if not along or any(len(values) < 2 for values in along):
        return None
    low, high = max(values[0] for values in along), min(max(values) for values in along)
    levels = spec.get("levels") or [low + (high - low) * index / LEVELS for index in range(1, LEVELS + 1)]
    cells = [(level, measured.cell(run, measured.at(y, x, level))) for level in levels]
    whole = [(level, cell) for level, cell in cells if cell.n == len(along)]
    if not whole:
        return None
    single = [[(level, cell.values[place]) for level, cell in whole] for place in range(len(along))]
    return Traced(run, [(level, cell.mean) for level, cell in whole], single)


def _groups(plot: Plot, spec: Spec) -> dict[str, Sequence[Traced]] | None:
    """Which chains share a panel; None for all of them in one."""
    if "panels" not in spec and len(plot.traced) > TOGETHER_AT_MOST:
        tried = [_grouped(plot, by) for by in ("method", "group", "chain")]
        return next(
            (found for found in tried if max(map(len, found.values())) <= IN_A_PANEL_AT_MOST), tried[-1]
        )
    by = spec.get("panels", "one")
    return None if by == "one" else _grouped(plot, by)


def _grouped(plot: Plot, by: str) -> dict[str, Sequence[Traced]]:
    found: dict[str, list[Traced]] = {}
    for each in plot.traced:
        word = plot.names(each.run) if by == "chain" else getattr(each.run, by)
        found.setdefault(word or "model", []).append(each)
    return dict(found)


# --- drawing ----------------------------------------------------------------------------------------------


def _draw(axes: Axes, plot: Plot, own: Sequence[Traced], others: Sequence[Traced]) -> None:
    for each in others:
        axes.plot(*zip(*each.mean, strict=True), color=GREY, linewidth=0.9, zorder=1, label="other chains")
    for place, each in enumerate(own):
        label = plot.names(each.run)
        if plot.is_path:
            _way(axes, each, place, label, light=len(own) <= TOGETHER_AT_MOST)
        else:
            levels = [
                (level, [spots[index][1] for spots in each.single])
                for index, (level, _) in enumerate(each.mean)
            ]
            band(axes, levels, place, label)


def _way(axes: Axes, traced: Traced, place: int, label: str, *, light: bool) -> None:
    """The mean with a marker at every scored model, its start white, and with ``light`` every single result, too."""
    look = draw.look(place)
    for spots in traced.single if light and len(traced.single) > 1 else ():
        axes.plot(*zip(*spots, strict=True), color=look["color"], linewidth=0.7, alpha=0.4, zorder=2)
    places = list(range(int(traced.begun), len(traced.mean)))
    axes.plot(*zip(*traced.mean, strict=True), label=label, markevery=places, markersize=4.8, zorder=3,
              markeredgecolor="white", markeredgewidth=0.4, **look)  # fmt: skip
    if traced.begun:
        axes.plot(*traced.mean[0], label="start", marker="o", linestyle="", markersize=6, color="white", zorder=4,
                  markeredgecolor="black", markeredgewidth=1.0)  # fmt: skip


def _surroundings(measured: Measured, axes: Axes, plot: Plot, spec: Spec, name: str) -> None:
    """The levels that are compared, and the reference."""
    for level in spec.get("levels", ()) if plot.is_path else ():
        axes.axvline(
            level * plot.factor("x"), color="#555555", linestyle=(0, (3, 3)), linewidth=0.8, zorder=0.8
        )
    for run in measured.chosen([spec["reference"]]) if spec.get("reference") else []:
        x, y = (_reference(measured, run, plot, side) for side in "xy")
        if y is None:
            raise AssayError(
                f"figures.{name}: {run.name} was not scored for {plot.y.name}; leave reference out."
            )
        _mark(axes, f"{measured.shown_name(run)} (reference)", x, y)


def _reference(measured: Measured, run: ChainRun, plot: Plot, side: str) -> tuple[float, float] | None:
    """Mean and sd of the reference's end; None where there is none, as for terms and steps."""
    cell = measured.cell(run, getattr(plot, side))
    factor = plot.factor(side)
    return (cell.mean * factor, sd_or_zero(cell) * factor) if cell.samples else None


def _mark(axes: Axes, label: str, x: tuple[float, float] | None, y: tuple[float, float]) -> None:
    """A star with its spread where both sides are known, and a line at its height."""
    line: dict[str, Any] = {"color": "#6B5200", "linestyle": (0, (1, 2)), "linewidth": 1.0, "zorder": 1.5}
    axes.axhline(y[0], label=None if x else label, **line)
    if x:
        axes.errorbar(
            [x[0]], [y[0]], xerr=[x[1]], yerr=[y[1]], fmt="none", ecolor="#222222", elinewidth=0.8, zorder=5
        )
        axes.plot([x[0]], [y[0]], marker="*", linestyle="", color="#F0B800", markersize=12, zorder=6, label=label,
                  markeredgecolor="black", markeredgewidth=0.7)  # fmt: skip


# --- frame and words --------------------------------------------------------------------------------------


def _framed(panels: Sequence[Axes], plot: Plot, spec: Spec, measured: Measured) -> None:
    """Cut a way that runs far beyond the highest level, where nothing is compared any more."""
    if not (plot.is_path and spec.get("levels")):
        return
    references = measured.chosen([spec["reference"]]) if spec.get("reference") else []
    gold = [spot for run in references if (spot := _spot(measured, run, plot))]
    starts = [each.mean[0][0] for each in plot.traced]
    inside = [*starts, *(level * plot.factor("x") for level in spec["levels"]), *(x for x, _ in gold)]
    low, high = min(inside), max(inside)
    margin = (high - low) * BEYOND_LEVELS
    few = len(plot.traced) <= TOGETHER_AT_MOST
    every = [spots for each in plot.traced for spots in (each.mean, *(each.single if few else ()))]
    heights = [y for spots in every for y in _visible(spots, low - margin, high + margin)]
    low, high = _within(every, low, high, margin)
    bottom, top = _padded([*heights, *(y for _, y in gold)], log="y" in spec.get("log", ()))
    for axes in panels:
        axes.set_xlim(low, high)
        axes.set_ylim(bottom, top)


def _spot(measured: Measured, run: ChainRun, plot: Plot) -> tuple[float, float] | None:
    x, y = (_reference(measured, run, plot, side) for side in "xy")
    return (x[0], y[0]) if x and y else None


def _within(every: Iterable[Spots], low: float, high: float, margin: float) -> tuple[float, float]:
    """The frame from left to right; no wider than what is drawn."""
    xs = [x for spots in every for x, _ in spots]
    return max(low - margin, min(*xs, low) - margin / 2), min(high + margin, max(*xs, high) + margin / 2)


def _visible(spots: Spots, low: float, high: float) -> list[float]:
    """The heights of a line inside of [low, high], with those at which it crosses the borders."""
    heights = [y for x, y in spots if low <= x <= high]
    for (x, y), (next_x, next_y) in pairwise(spots):
        for border in (low, high):
            if min(x, next_x) < border < max(x, next_x):
                heights.append(y + (border - x) / (next_x - x) * (next_y - y))
    return heights


def _padded(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    if log:
        low, high = _padded([math.log(value) for value in values if value > 0] or [0.0], log=False)
        return math.exp(low), math.exp(high)
    margin = (max(values) - min(values)) * 0.06 or 0.1
    return min(values) - margin, max(values) + margin


def _named(axes: Axes, plot: Plot, spec: Spec, group: str, own: Sequence[Traced]) -> None:
    """Scales and, in a small panel, its title and what its lines are."""
    first = "" if plot.is_path else ", first reached"
    finish(axes, spec, plot.label("x") + first, plot.label("y"))
    if not group:
        return
    names = [plot.names(each.run) for each in own]
    title = names[0] if len(own) == 1 else group.rpartition(".")[2]
    axes.set_title(title, fontsize=max(5.0, 8.0 * min(1.0, LETTERS_OF_A_TITLE / len(title))))
    axes.tick_params(labelsize=7)
    if len(own) > 1:
        handles = [line for line in axes.lines if line.get_label() in names]
        look: dict[str, Any] = {
            "frameon": True,
            "framealpha": 0.75,
            "edgecolor": "none",
            "borderaxespad": 0.2,
        }
        axes.legend(handles, names, fontsize=6, handlelength=2.6, labelspacing=0.25, **look)


def _labelled(image: Figure, panels: Sequence[Axes], plot: Plot, spec: Spec, *, alone: bool) -> None:
    """One legend outside; small panels share one pair of axis labels."""
    found = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = {plot.names(each.run) for each in plot.traced}
    last = [word for word in ("start", "other chains") if word in found] + [
        w for w in found if "(reference)" in w
    ]
    words = [*(word for word in found if word in names), *last] if alone else last
    handles = [found[word] for word in words]
    if alone:
        draw.legend_below(image, handles, words, grow=True)
    else:
        draw.legend_above(image, handles, words)
        image.supxlabel(panels[0].get_xlabel(), fontsize=9)
        image.supylabel(panels[0].get_ylabel(), fontsize=9)
        for axes in panels:
            axes.set(xlabel="", ylabel="")


def _caption(plot: Plot, spec: Spec, groups: Mapping[str, object] | None) -> str:
    parts = ["A panel for each; grey: the other chains."] if groups else []
    if not plot.is_path:
        way = f"Interpolated along each run's curve. {BANDS} A line ends where not all of its runs reach the level."
        return " ".join([*parts, way])
    parts.append(
        "From the start through the kept models to the end: means over distinct results; light: each of them."
    )
    if spec.get("levels"):
        parts.append("Dashed: the levels compared; what lies far beyond them is cut.")
    return " ".join(parts)
