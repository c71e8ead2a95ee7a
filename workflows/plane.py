"""Planes: what was measured for every class in its first two principal components, a panel for each chain.

``circles: {kind: plane, entry: geometry}`` reads the rows of metric ``pc1`` and ``pc2`` whose task is ``class 3``; with
``what: embedding`` those of ``embedding class 3``. Where the entry has the explained variance of the two, it stands in
the title.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.stage import AssayError
from workflows import draw
from workflows.axes import Spec
from workflows.columns import CLASS_TASK, Row
from workflows.measured import ChainRun, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPONENTS, EXPLAINED = ("pc1", "pc2"), "explained_variance_2"
UNNAMED = "class_vectors"
"""What a task ``class 3`` without further words is about."""
PANELS_AT_MOST = 24
FEW_CLASSES = 20
LETTERS_OF_A_TITLE = 30
LIGHTEST = 0.9
"""How far the colours of the classes go towards the light end."""

Spot = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One chain: its points by class, the seed they are of, the variance they explain, or why there are none."""

    name: str
    seed: str
    spots: Mapping[int, Spot]
    explained: float = math.nan
    instead: str = ""


def plane(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> tuple[Figure, str]:
    """Draw the classes of the chains that ``entry`` scored; ``seed`` is the seed, by default the first."""
    what = _what(runs, spec, name)
    panels = [panel for run in runs if (panel := _panel(measured, run, spec, what))]
    if not any(panel.spots for panel in panels):
        raise AssayError(
            f"figures.{name}: no chain here has pc1 and pc2 of {what or 'classes'} in {spec['entry']}."
        )
    shown = panels[:PANELS_AT_MOST]
    image, every = draw.squares(len(shown))
    for axes, panel in zip(every, shown, strict=True):
        _titled(axes, panel, several_seeds=len({each.seed for each in shown if each.seed}) > 1)
        _framed(axes, panel, spec)
    image.draw_without_rendering()
    for axes, panel in zip(every, shown, strict=True):
        _points(image, axes, panel)
    return image, _caption(what, shown, len(panels) - len(shown))


# --- what is drawn ----------------------------------------------------------------------------------------


def _what(runs: Sequence[ChainRun], spec: Spec, name: str) -> str:
    """What the points are of: the words before ``class N`` in the tasks of the entry, empty where there are none."""
    rows = [row for run in runs for row in run.records if row["entry"] == spec["entry"]]
    there = dict.fromkeys(found[1] or "" for row in rows if row["metric"] in COMPONENTS
                          and (found := CLASS_TASK.fullmatch(row["task"])))  # fmt: skip
    if "what" not in spec:
        return next(iter(there), "")
    by_word = {word or UNNAMED: word for word in there}
    if there and spec["what"] not in by_word:
        raise AssayError(
            f"figures.{name}: {spec['entry']} has no points of {spec['what']}; there are: {', '.join(by_word)}."
        )
    return by_word.get(spec["what"], "")


def _panel(measured: Measured, run: ChainRun, spec: Spec, what: str) -> Panel | None:
    """The chain's points under the seed asked for; None for a chain that the entry does not score."""
    rows = [row for row in run.records if row["entry"] == spec["entry"]]
    if not rows:
        return None
    spots = _spots(rows, what)
    seeds = sorted(spots, key=lambda seed: int(seed or -1))
    name, seed = measured.shown_name(run), str(spec.get("seed", seeds[0] if seeds else ""))
    seed = "" if "" in spots else seed  # the same result under every seed
    if seed not in spots:
        lost = dict.fromkeys(
            row["status"] for row in rows if row["status"] != "ok" and seed in ("", row["seed"])
        )
        return Panel(name, seed, {}, instead=", ".join(lost) or "not measured")
    return Panel(name, seed, spots[seed], _explained([row for row in rows if row["seed"] == seed], what))


def _spots(rows: Sequence[Row], what: str) -> dict[str, dict[int, Spot]]:
    """(first, second component) by seed and class, of the classes that have both."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        task = CLASS_TASK.fullmatch(row["task"])
        if task and (task[1] or "") == what and row["metric"] in COMPONENTS and row["status"] == "ok":
            found.setdefault((row["seed"], int(task[2])), {})[row["metric"]] = row["value"]
    seeds: dict[str, dict[int, Spot]] = {}
    for (seed, number), values in sorted(found.items()):
        if len(values) == len(COMPONENTS):
            seeds.setdefault(seed, {})[number] = (values["pc1"], values["pc2"])
    return seeds


def _explained(rows: Sequence[Row], what: str) -> float:
    """The share of the variance in the first two components, as the entry gives it; nan where it does not."""
    for row in rows:
        about = row["task"].partition(" ")[0] == (what or UNNAMED)
        if about and row["metric"] == EXPLAINED and row["status"] == "ok":
            return float(row["value"])
    return math.nan


# --- how it is drawn --------------------------------------------------------------------------------------


def _titled(axes: Axes, panel: Panel, *, several_seeds: bool) -> None:
    name = panel.name + (f" (seed {panel.seed})" if several_seeds and panel.seed else "")
    explained = "" if math.isnan(panel.explained) else f"{panel.explained:.0%} of the variance"
    draw.title(axes, name, LETTERS_OF_A_TITLE, 8.5, explained)


def _framed(axes: Axes, panel: Panel, spec: Spec) -> None:
    """The same scale on both axes, so that a circle is one; every panel has its own."""
    axes.set_xlabel(spec.get("x_label", "component 1"), fontsize=8, labelpad=2)
    axes.set_ylabel(spec.get("y_label", "component 2"), fontsize=8, labelpad=1)
    axes.tick_params(labelsize=6.5, pad=2)
    axes.locator_params(nbins=5)
    if not panel.spots:
        axes.text(0.5, 0.5, panel.instead, transform=axes.transAxes, ha="center", va="center", fontsize=9,
                  color="#7A1F1F", style="italic")  # fmt: skip
        axes.set(xticks=[], yticks=[])
        return
    sides = list(zip(*panel.spots.values(), strict=True))
    middles = [(min(side) + max(side)) / 2 for side in sides]
    half = max(max(side) - min(side) for side in sides) / 2 * 1.22 or 1.0
    axes.set_xlim(middles[0] - half, middles[0] + half)
    axes.set_ylim(middles[1] - half, middles[1] + half)


def _points(image: Figure, axes: Axes, panel: Panel) -> None:
    """A dot for every class, coloured by its number, and the number outside of it where it covers no other."""
    if not panel.spots:
        return
    from matplotlib import colormaps

    few, most = len(panel.spots) <= FEW_CLASSES, max(1, *panel.spots)
    colors = {number: colormaps["viridis"](LIGHTEST * number / most) for number in panel.spots}
    xs, ys = zip(*panel.spots.values(), strict=True)
    axes.scatter(
        xs, ys, s=22 if few else 11, c=list(colors.values()), edgecolor="black", linewidth=0.35, zorder=3
    )
    middle = (math.fsum(xs) / len(xs), math.fsum(ys) / len(ys))
    labels = [draw.Label(x, y, str(number), 2.6 if few else 1.8) for number, (x, y) in panel.spots.items()]
    draw.place_numbers(image, axes, labels, middle, 7.5 if few else 5.0)


def _caption(what: str, panels: Sequence[Panel], left_out: int) -> str:
    seeds = sorted({panel.seed for panel in panels if panel.spots and panel.seed}, key=int)
    which = f" of seed {', '.join(seeds)}" if seeds else ""
    about = (what or UNNAMED).replace("_", " ").capitalize()
    parts = [f"{about}: every class in the first two principal components{which}."]
    parts += ["Numbers: classes, where they cover no other; the same scale on both axes of a panel."]
    parts += ["The sign of a component means nothing."]
    return " ".join(parts + ([f"{left_out} further chains are not shown."] if left_out else []))
