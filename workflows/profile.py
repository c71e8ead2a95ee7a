"""Profiles: what every layer of a model got, decoder block by decoder block, whoever chose it.

``levels: {kind: profile, metric: sparsity, of: [searched, uniform]}``
A panel for each layer of a block compares chains, and a chain that gives all blocks the same is a dashed line. A panel
for each chain is a grid of its layers and blocks. Attentions and MLPs that are removed whole are always shown as one:
in how many of the chain's results each of them is gone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain as joined
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows import chance, draw
from workflows.axes import Spec
from workflows.columns import identity
from workflows.lines import BANDS, band
from workflows.measured import ChainRun, Measured
from workflows.specs import PROFILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

_UNIT = re.compile(r"(?:.*?\.)?(?P<block>\d+)\.(?P<layer>.+)")
STRUCTURE = {"self_attn.o_proj": "heads", "mlp.down_proj": "neurons"}
"""What is meant by the inputs of these layers where whole ones are removed."""
LAYERS = {
    "self_attn": "attention", "self_attn.q_proj": "attention q", "self_attn.k_proj": "attention k",
    "self_attn.v_proj": "attention v", "self_attn.o_proj": "attention o", "mlp": "MLP", "mlp.gate_proj": "MLP gate",
    "mlp.up_proj": "MLP up", "mlp.down_proj": "MLP down",
}  # fmt: skip
ORDER = [*STRUCTURE.values(), *LAYERS.values()]
SUB_BLOCKS = {"attention", "MLP"}
NAMES = {"sparsity": "sparsity (share of weights)", "bits": "bits per weight", "removed": "removed share"}
SAME = 0.01
"""Values that differ by less than this share of themselves are the same."""
CHAINS_IN_A_PANEL, PANELS_AT_MOST = 8, 24
"""More chains than this get a panel each, and of those so many are shown."""
DOTS_UP_TO_BLOCKS = 12
"""With more blocks the single results are only a band."""
CELLS_ACROSS, ROW_INCHES, AROUND_INCHES = 26, 0.22, 0.5
"""How many cells of a grid stand side by side in a figure; the height of a row, and of what surrounds a panel."""
LETTERS_OF_A_TITLE, TICKS = (80, 40, 26, 20), (16, 8, 6, 4)
"""How much fits above and below a panel, by how many stand side by side."""
SHADES = ("#F2F2F2", "#12395F")
"""What is kept, and what is gone."""

Values = Mapping[str, Mapping[int, Sequence[float]]]
"""By layer and block the value of every distinct result."""


@dataclass(frozen=True)
class Profile:
    """One chain's profile over ``n`` distinct results."""

    run: ChainRun
    name: str
    n: int
    values: Values

    @property
    def means(self) -> list[float]:
        return [chance.mean(list(values)) for own in self.values.values() for values in own.values()]

    def level(self, layer: str) -> float:
        """The mean over all blocks and results."""
        return chance.mean([*joined.from_iterable(self.values[layer].values())])

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks are given the same."""
        return all(_is_same([*joined.from_iterable(own.values())]) for own in self.values.values())


def profile(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> tuple[Figure, str]:
    """Draw ``metric`` over the blocks; ``panels`` says what shares a panel."""
    every = [each for run in runs if (each := _profile(measured, run, spec["metric"], name))]
    if not every:
        raise AssayError(f"figures.{name}: {_nothing(runs, spec['metric'])}")
    whole = {layer for each in every for layer in each.values} <= SUB_BLOCKS
    by = spec.get("panels", "chain" if whole or len(every) > CHAINS_IN_A_PANEL else "layer")
    shown = every if by == "layer" else every[:PANELS_AT_MOST]
    image, words = _lines(shown, spec) if by == "layer" else _grids(shown, spec, whole)
    left = len(every) - len(shown)
    words += [f"{left} further chains are not shown."] if left else []
    return image, " ".join([*words, _counts(shown), *_without(measured, runs, every, spec)])


# --- what is drawn ----------------------------------------------------------------------------------------


def _profile(measured: Measured, run: ChainRun, metric: str, name: str) -> Profile | None:
    """A chain's profile; None where it has none in this metric."""
    models: dict[str, dict[str, float]] = {}
    for row in run.records:
        if row["entry"] == PROFILE and row["metric"] == metric and row["status"] == "ok":
            models.setdefault(identity(row), {})[row["task"]] = row["value"]
    values: dict[str, dict[int, list[float]]] = {}
    for unit, value in joined.from_iterable(model.items() for model in models.values()):
        layer, block = _placed(unit, metric, name)
        values.setdefault(layer, {}).setdefault(block, []).append(value)
    layers = sorted(values, key=lambda layer: ORDER.index(layer) if layer in ORDER else len(ORDER))
    ordered = {layer: dict(sorted(values[layer].items())) for layer in layers}
    return Profile(run, measured.shown_name(run), len(models), ordered) if models else None


def _placed(unit: str, metric: str, name: str) -> tuple[str, int]:
    """What a module is called, and the number of its block."""
    match = _UNIT.fullmatch(unit)
    if match is None:
        raise AssayError(f"figures.{name}: {unit!r} is in no numbered block; its profile cannot be drawn.")
    names = LAYERS | STRUCTURE if metric == "removed" else LAYERS
    return names.get(match["layer"], match["layer"]), int(match["block"])


def _is_same(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= SAME * max(map(abs, values))


def _nothing(runs: Sequence[ChainRun], metric: str) -> str:
    """Why there is nothing to draw, and what there is instead."""
    there = dict.fromkeys(row["metric"] for run in runs for row in run.records if row["entry"] == PROFILE)
    if there:
        return f"no chain here has a profile of {metric}; there are profiles of {' and '.join(there)}."
    return (
        f"no chain here has a profile of {metric}; those that end in prune.assigned or a shorthand for it do."
    )


# --- a panel for each layer -------------------------------------------------------------------------------


def _lines(every: Sequence[Profile], spec: Spec) -> tuple[Figure, list[str]]:
    """Lines over the blocks; chains that give all blocks the same, where another does not, and budgets are dashed."""
    curved = [each for each in every if not each.is_uniform] or list(every)
    level = [each for each in every if each not in curved]
    budgets = _budgets(every, level, spec["metric"])
    layers = sorted({layer for each in curved for layer in each.values}, key=_order(curved))
    image, panels = draw.new() if len(layers) == 1 else draw.small(len(layers))
    for axes, layer in zip(panels, layers, strict=True):
        for place, each in enumerate(curved):
            _line(axes, each.name, place, each.values.get(layer, {}))
        uniform = [(each.name, each.level(layer)) for each in level if layer in each.values]
        for place, (name, height) in enumerate([*uniform, *((f"budget {each:g}", each) for each in budgets)]):
            _level(axes, name, place, height)
        _named(axes, layer)
    _labelled(image, panels, spec, NAMES[spec["metric"]])
    cut = draw.shared_legend(image, panels, grow=True)
    return image, [cut + _explained(curved)]


def _order(every: Sequence[Profile]) -> Any:
    """The order of layers: that in which the chains have them."""
    layers = list(dict.fromkeys(layer for each in every for layer in each.values))
    return lambda layer: ORDER.index(layer) if layer in ORDER else len(ORDER) + layers.index(layer)


def _line(axes: Axes, name: str, place: int, blocks: Mapping[int, Sequence[float]]) -> None:
    """The mean with the range of the results; these themselves as faint dots where there is room."""
    if not blocks:
        return
    look = draw.look(place)
    band(axes, list(blocks.items()), place, name, look)
    dots = [(block, value) for block, values in blocks.items() if len(values) > 1 for value in values]
    if len(blocks) <= DOTS_UP_TO_BLOCKS:
        axes.plot([x for x, _ in dots], [y for _, y in dots], linestyle="", marker=look["marker"], markersize=2.6,
                  color=look["color"], alpha=0.4, markeredgewidth=0, zorder=2)  # fmt: skip


def _budgets(every: Sequence[Profile], level: Sequence[Profile], metric: str) -> list[float]:
    """What chains were asked to reach on average, where no uniform chain stands for it. Bits count scales, too."""
    asked = {each.run.options.get("sparsity") for each in every if metric != "bits"}
    shown = [mean for each in level for mean in each.means]
    wanted = sorted(float(value) for value in asked if isinstance(value, (int, float)))
    return [value for value in wanted if not any(_is_same([value, mean]) for mean in shown)]


def _level(axes: Axes, name: str, place: int, height: float) -> None:
    """A line across; each has dashes of its own."""
    dashes: Any = draw.LINES[1:][place % (len(draw.LINES) - 1)]
    axes.axhline(height, color="#333333", linestyle=dashes, linewidth=1.1, zorder=1, label=name)


def _explained(every: Sequence[Profile]) -> str:
    if max(each.n for each in every) == 1:
        return "Lines: single results."
    blocks = max(len(own) for each in every for own in each.values.values())
    return BANDS + (" Dots: single results." if blocks <= DOTS_UP_TO_BLOCKS else "")


# --- a panel for each chain -------------------------------------------------------------------------------


def _grids(every: Sequence[Profile], spec: Spec, whole: bool) -> tuple[Figure, list[str]]:
    """A row for each layer and a cell for each block, shaded by the mean; of what is removed whole, with counts."""
    layers = sorted({layer for each in every for layer in each.values}, key=_order(every))
    blocks = 1 + max(block for each in every for own in each.values.values() for block in own)
    means = [mean for each in every for mean in each.means]
    low, high = (0.0, 1.0) if whole else (min(means), max(means))
    image, panels = _canvas(len(every), blocks, len(layers))
    for axes, each in zip(panels, every, strict=True):
        _cells(axes, each, layers, (low, high), with_counts=whole)
        axes.set(xlim=(-0.5, blocks - 0.5), ylim=(len(layers) - 0.5, -0.5))
        axes.set_yticks(range(len(layers)), layers)
        _named(axes, each.name)
    _labelled(image, panels, spec, "")
    several = any(each.n > 1 for each in every)
    if whole:
        _shades(image, several)
        return image, ["Numbers: how many of a chain's results remove it."] if several else []
    _bar(image, panels, low, high, NAMES[spec["metric"]])
    return image, ["Colours: means over distinct results."]


def _canvas(panels: int, blocks: int, rows: int) -> tuple[Figure, list[Axes]]:
    """As many panels side by side as their cells leave room for, as high as they need."""
    from matplotlib.figure import Figure

    across = max(1, min(panels, 4, CELLS_ACROSS // (blocks + 2)))
    down = math.ceil(panels / across)
    height = 0.7 + (AROUND_INCHES + ROW_INCHES * rows) * down
    image = Figure((draw.SIZE_INCHES[0], height), dpi=draw.DOTS_PER_INCH, layout="constrained")
    every = image.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    for unused in every[panels:]:
        unused.set_visible(False)
    return image, list(every[:panels])


def _cells(
    axes: Axes, own: Profile, layers: Sequence[str], ends: tuple[float, float], *, with_counts: bool
) -> None:
    from matplotlib.patches import Rectangle

    for row, layer in enumerate(layers):
        for block, values in own.values.get(layer, {}).items():
            share = (chance.mean(list(values)) - ends[0]) / ((ends[1] - ends[0]) or 1.0)
            corner, count = (block - 0.5, row - 0.5), sum(value > 0 for value in values)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=_shade(share), edgecolor="white", linewidth=0.8))
            if with_counts and count and own.n > 1:
                color = "white" if share > 0.45 else "#222222"
                axes.text(block, row, str(count), ha="center", va="center", fontsize=6.5, color=color)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _colors() -> LinearSegmentedColormap:
    """From what is kept to what is gone."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("profile", SHADES)


def _shade(share: float) -> str:
    from matplotlib.colors import to_hex

    return to_hex(_colors()(share))


def _shades(image: Figure, several: bool) -> None:
    """What the shades of a grid of whole sub-blocks mean."""
    from matplotlib.patches import Patch

    words = {"kept": 0.0, "removed in some results": 0.5, "removed in all": 1.0} if several else {
        "kept": 0.0, "removed": 1.0}  # fmt: skip
    look: dict[str, Any] = {"edgecolor": "#999999", "linewidth": 0.5}
    handles = [Patch(facecolor=_shade(share), label=word, **look) for word, share in words.items()]
    draw.legend_below(image, handles, list(words))


def _bar(image: Figure, panels: Sequence[Axes], low: float, high: float, label: str) -> None:
    """The scale of the shades; a level with itself has no scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    look: dict[str, Any] = {"fraction": 0.03, "pad": 0.02, "aspect": 9 * image.get_figheight()}
    image.colorbar(ScalarMappable(Normalize(low, high), _colors()), ax=list(panels), label=label, **look)


# --- names and words --------------------------------------------------------------------------------------


def _named(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    across = _across(axes)
    draw.title(axes, title, LETTERS_OF_A_TITLE[across - 1], 9.0)
    axes.xaxis.set_major_locator(
        MaxNLocator(TICKS[across - 1], integer=True, steps=[1, 2, 4, 5, 10], min_n_ticks=1)
    )


def _across(axes: Axes) -> int:
    """How many panels stand side by side."""
    place = axes.get_subplotspec()
    return 1 if place is None else place.get_gridspec().ncols


def _labelled(image: Figure, panels: Sequence[Axes], spec: Spec, y_label: str) -> None:
    """Panels share their axes: one name for all of them at the left, and one below every column."""
    image.supylabel(spec.get("y_label", y_label), fontsize=9)
    for axes in panels[-_across(panels[0]) :]:
        axes.set_xlabel(spec.get("x_label", "decoder block"))
        axes.tick_params(labelbottom=True)


def _counts(every: Sequence[Profile]) -> str:
    """How many results stand behind each chain: once where it is the same everywhere."""
    if len({each.n for each in every}) == 1:
        return f"n = {every[0].n} distinct results."
    return f"Distinct results: {', '.join(f'{each.n} for {each.name}' for each in every)}."


def _without(measured: Measured, runs: Sequence[ChainRun], every: Sequence[Profile], spec: Spec) -> list[str]:
    """Chains that were asked for by name and have no profile."""
    drawn = {each.run.key for each in every}
    names = [measured.shown_name(run) for run in runs if run.key not in drawn] if "of" in spec else []
    return [f"Without a profile of {spec['metric']}: {', '.join(names)}."] if names else []
