"""How figures look: a style readable in grey, labels that keep out of each other's way, reproducible files.

Uses matplotlib's objects directly and never its global state, so that drawing twice gives the same bytes.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from numpy import float64
    from numpy.typing import NDArray

SIZE_INCHES = (7.0, 4.5)
DOTS_PER_INCH = 200
# Okabe and Ito's colours, ordered so that neighbours differ in lightness as well
COLORS = ("#0072B2", "#E69F00", "#4B1F6F", "#56B4E9", "#D55E00", "#8C8C8C", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))
SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.5,
    "lines.markersize": 5, "legend.frameon": False, "figure.facecolor": "white", "axes.facecolor": "white",
    "svg.hashsalt": "assay", "svg.fonttype": "path", "savefig.dpi": DOTS_PER_INCH, "axes.formatter.useoffset": False,
}  # fmt: skip
LEGEND_LINE_INCHES = 0.165
LEGEND_LINES_AT_MOST = 24
SMALLEST_TITLE = 5.0
LABEL_DISTANCES = (3, 7, 13, 21, 31, 43, 57, 73, 91, 111, 133)
LABEL_ANGLES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8),
                (0.95, 0.35), (-0.95, 0.35), (0.95, -0.35), (-0.95, -0.35),
                (0.45, 0.9), (-0.45, 0.9), (0.45, -0.9), (-0.45, -0.9))  # fmt: skip
LINE_FROM_POINTS = 9
LINE_BOX_PIXELS = 8
CLEARANCE_POINTS = 4
NUMBER_HEIGHT, INSIDE = 0.85, 0.99
"""Of the height of a line, what digits take; of a number, what has to be inside of its panel."""


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with this project's settings, whatever the user's own file says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for key, value in SETTINGS.items():
            matplotlib.rcParams[key] = value  # type: ignore[index]
        yield


def new(panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of the standard size with some panels, at most three side by side."""
    from matplotlib.figure import Figure

    across = panels if panels <= 3 else math.ceil(panels / 2)
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    every = figure.subplots(math.ceil(panels / across), across, squeeze=False).flatten()
    for unused in every[panels:]:
        unused.set_visible(False)
    return figure, list(every[:panels])


def small(panels: int) -> tuple[Figure, list[Axes]]:
    """An empty figure of many small panels with the same axes, up to four side by side, as high as they need."""
    from matplotlib.figure import Figure

    across = panels if panels <= 3 else 3 if panels <= 6 else 4
    down = math.ceil(panels / across)
    figure = Figure((SIZE_INCHES[0], 1.2 + 1.6 * down), dpi=DOTS_PER_INCH, layout="constrained")
    every = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    for unused in every[panels:]:
        unused.set_visible(False)
    for last in every[max(0, panels - across) : panels]:
        last.tick_params(labelbottom=True)  # also where the panel below is unused
    return figure, list(every[:panels])


def squares(panels: int) -> tuple[Figure, list[Axes]]:
    """An empty figure of square panels, up to three side by side, as high as they need."""
    from matplotlib.figure import Figure

    across = min(panels, 3)
    down = math.ceil(panels / across)
    side = SIZE_INCHES[0] / max(2, across)
    figure = Figure((side * across, (side + 0.2) * down), dpi=DOTS_PER_INCH, layout="constrained")
    every = figure.subplots(down, across, squeeze=False).flatten()
    for axes in every:
        axes.set_box_aspect(1)
    for unused in every[panels:]:
        unused.set_visible(False)
    return figure, list(every[:panels])


def title(axes: Axes, name: str, letters: int, size: float, below: str = "") -> None:
    """A panel's name in at most so many letters: a long one is broken before its options, then made smaller.

    ``below`` is a line of its own under the name.
    """
    lines = [name] if len(name) <= letters or "[" not in name else list(name.partition("["))
    lines = lines if len(lines) == 1 else [lines[0], "".join(lines[1:])]
    smaller = min(1.0, letters / max(map(len, lines)))
    text = "\n".join([*lines, *([below] if below else [])])
    axes.set_title(text, fontsize=max(SMALLEST_TITLE, size * smaller), linespacing=1.3)


def look(place: int) -> dict[str, Any]:
    """Colour, marker and line of the n-th series; sixteen differ also in grey, and none of 24 is like another."""
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)],
            "linestyle": LINES[(place + place // len(COLORS)) % len(LINES)]}  # fmt: skip


def files(figure: Figure, description: str) -> dict[str, bytes]:
    """PNG and SVG of a figure, without dates; the description travels in their metadata."""
    written = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={**metadata, "Description": description})
        written[kind] = buffer.getvalue()
    return written


def legend_below(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], *, grow: bool = False
) -> None:
    """One legend under all panels, in as many columns as its longest text allows.

    With ``grow`` the figure becomes higher by what a legend of more than four lines takes.
    """
    if labels:
        columns = max(1, min(4, len(labels), 108 // (max(map(len, labels)) + 7)))
        if grow:
            lines = math.ceil(len(labels) / columns)
            figure.set_figheight(figure.get_figheight() + LEGEND_LINE_INCHES * max(0, lines - 4))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)


def shared_legend(
    figure: Figure, panels: Sequence[Axes], *, also: Sequence[Any] = (), grow: bool = False
) -> str:
    """One legend for the lines of all panels, each label once, and ``also`` behind them.

    Returns a sentence for the caption where the legend had to be cut.
    """
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    handles = [*list(found.values())[:LEGEND_LINES_AT_MOST], *also]
    labels = [*list(found)[:LEGEND_LINES_AT_MOST], *(str(each.get_label()) for each in also)]
    legend_below(figure, handles, labels, grow=grow)
    cut = len(found) > LEGEND_LINES_AT_MOST
    return f"The legend names the first {LEGEND_LINES_AT_MOST} of {len(found)}. " if cut else ""


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One line of legend over small panels, whose common axis label stands below."""
    if labels:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), handlelength=2.4)


# --- labels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point: its place and error bars in data units, its marker's radius in points."""

    x: float
    y: float
    text: str
    radius: float
    x_error: float = 0.0
    y_error: float = 0.0


def place_labels(
    figure: Figure, axes: Axes, labels: Sequence[Label], line: Sequence[tuple[float, float]] = ()
) -> None:
    """Write a text beside every point where it covers no other text, point, error bar or ``line``.

    Candidates are tried in a fixed order, near ones first; a text that had to move away gets a thin line.
    """
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    markers = [_square(axes, label, label.radius + CLEARANCE_POINTS) for label in labels]
    drawn = [*(box for label in labels for box in _bars(axes, label)), *_dots_along(axes, line)]
    texts: list[Bbox] = []
    for place in sorted(range(len(labels)), key=lambda each: (-labels[each].y, labels[each].x)):
        own = _square(axes, labels[place], labels[place].radius)
        occupied = [*markers[:place], *markers[place + 1 :], own, *drawn]
        texts += _write(axes, labels[place], occupied, texts, frame)


def place_numbers(
    figure: Figure, axes: Axes, labels: Sequence[Label], middle: tuple[float, float], size: float
) -> None:
    """Write whole numbers beside their points, on the side away from ``middle``, where they cover nothing.

    The figure must have been drawn, so that every place is known in pixels. Crowded points keep their dots only.
    """
    from matplotlib.transforms import ScaledTranslation

    sizes = {len(label.text): _size_of(axes, "0" * len(label.text), size) for label in labels}
    points = _corners([_square(axes, label, label.radius) for label in labels])
    written = _corners([])
    for place, label in enumerate(labels):
        occupied = _joined(_without(points, place), written)
        offset, box = _free(axes, label, middle, sizes[len(label.text)], occupied)
        if offset is not None:
            moved = axes.transData + ScaledTranslation(offset[0] / 72, offset[1] / 72, figure.dpi_scale_trans)
            drawn = axes.text(label.x, label.y, label.text, transform=moved, fontsize=size, ha="center",
                              va="center", zorder=4)  # fmt: skip
            drawn.set_in_layout(False)
            written = _joined(written, box)


def _size_of(axes: Axes, text: str, size: float) -> tuple[float, float]:
    """Width and height of a text in pixels; every digit is as wide as any other."""
    drawn = axes.text(0, 0, text, fontsize=size)
    box = drawn.get_window_extent()
    drawn.remove()
    return float(box.width), float(box.height) * NUMBER_HEIGHT


def _free(
    axes: Axes,
    label: Label,
    middle: tuple[float, float],
    size: tuple[float, float],
    occupied: NDArray[float64],
) -> tuple[tuple[float, float] | None, NDArray[float64]]:
    """The first offset, in points, at which a text of that size covers nothing, and its box; None without any."""
    from matplotlib.transforms import Bbox

    x, y = map(float, axes.transData.transform((label.x, label.y)))
    centre = axes.transData.transform(middle)
    length = math.hypot(x - centre[0], y - centre[1]) or 1.0
    pixels = DOTS_PER_INCH / 72
    wide, high = size[0] / 2 / pixels, size[1] / 2 / pixels
    box, frame = _corners([]), _corners([axes.get_window_extent()])
    for across, up in _turns((x - centre[0]) / length, (y - centre[1]) / length):
        right, above = across * (label.radius + 1 + wide), up * (label.radius + 1 + high)
        left, bottom = x + (right - wide) * pixels, y + (above - high) * pixels
        box = _corners([Bbox.from_bounds(left, bottom, *size)])
        if not _overlap(box, occupied) and _overlap(box, frame) >= INSIDE * size[0] * size[1]:
            return (right, above), box
    return None, box


def _turns(across: float, up: float) -> Iterator[tuple[float, float]]:
    """A direction, and those at growing angles to both sides of it."""
    for angle in (0.0, 0.6, -0.6, 1.2, -1.2, 1.9, -1.9):
        cosine, sine = math.cos(angle), math.sin(angle)
        yield across * cosine - up * sine, across * sine + up * cosine


def _bars(axes: Axes, label: Label) -> list[Bbox]:
    """The room that a label's two error bars take, in pixels."""
    from matplotlib.transforms import Bbox

    ends = [
        ((label.x - label.x_error, label.y), (label.x + label.x_error, label.y)),
        ((label.x, label.y - label.y_error), (label.x, label.y + label.y_error)),
    ]
    boxes = [Bbox(axes.transData.transform(pair)) for pair in ends]
    return [box.padded(DOTS_PER_INCH / 72 * 2) for box in boxes]


def _dots_along(axes: Axes, line: Sequence[tuple[float, float]]) -> list[Bbox]:
    """Small boxes along a line through points in data units, close enough that no text fits between."""
    pixels = [tuple(map(float, axes.transData.transform(point))) for point in line]
    return [box for start, end in itertools.pairwise(pixels) for box in _dots_between(start, end)]


def _dots_between(start: tuple[float, ...], end: tuple[float, ...]) -> list[Bbox]:
    from matplotlib.transforms import Bbox

    across, up = end[0] - start[0], end[1] - start[1]
    count = max(1, math.ceil(math.hypot(across, up) / LINE_BOX_PIXELS))
    middles = [(start[0] + across * part / count, start[1] + up * part / count) for part in range(count + 1)]
    return [Bbox.from_extents(x - 2, y - 2, x + 2, y + 2) for x, y in middles]


def _write(
    axes: Axes, label: Label, occupied: Sequence[Bbox], texts: Sequence[Bbox], frame: Bbox
) -> list[Bbox]:
    """Write the label at the first free candidate, else where it covers least; returns what it covers."""
    near = _annotate(axes, label, (0.0, 0.0), line=False)
    size = near.get_window_extent()
    near.remove()
    there, written = _corners([*occupied, *texts]), _corners(texts)
    best, least, covered = (0.0, 0.0, 0.0), math.inf, [size]
    for far, (across, up) in itertools.product(LABEL_DISTANCES, LABEL_ANGLES):
        offset = (across * (label.radius + far), up * (label.radius + far))
        boxes = _covered(axes, label, offset, size, with_line=far > LINE_FROM_POINTS)
        text, line = _corners(boxes[:1]), _corners(boxes[1:])
        outside = float(boxes[0].width * boxes[0].height) - _overlap(text, _corners([frame]))
        cost = _overlap(text, there) + 10 * outside + 4 * _overlap(line, written)
        if cost < least:
            best, least, covered = (*offset, far), cost, boxes
        if cost == 0:
            break
    _annotate(axes, label, best[:2], line=best[2] > LINE_FROM_POINTS)
    return covered


def _covered(
    axes: Axes, label: Label, offset: tuple[float, float], size: Bbox, *, with_line: bool
) -> list[Bbox]:
    """The box of a text beside the offset, on the side away from the point, and its line's small boxes."""
    from matplotlib.transforms import Bbox

    point = tuple(map(float, axes.transData.transform((label.x, label.y))))
    anchor = tuple(place + part * DOTS_PER_INCH / 72 for place, part in zip(point, offset, strict=True))
    left, bottom = (
        place - length * (0.5 if part == 0 else 0.0 if part > 0 else 1.0)
        for place, part, length in zip(anchor, offset, (size.width, size.height), strict=True)
    )
    text = Bbox.from_bounds(left, bottom, size.width, size.height)
    return [text, *(_dots_between(point, anchor) if with_line else [])]


def _annotate(axes: Axes, label: Label, offset: tuple[float, float], *, line: bool) -> Any:
    across, up = offset
    horizontal = "center" if across == 0 else "left" if across > 0 else "right"
    vertical = "center" if up == 0 else "bottom" if up > 0 else "top"
    arrow = {"arrowstyle": "-", "color": "#777777", "linewidth": 0.5, "shrinkA": 0, "shrinkB": label.radius}
    drawn = axes.annotate(label.text, (label.x, label.y), xytext=(across, up), textcoords="offset points", fontsize=8,
                          ha=horizontal, va=vertical, arrowprops=arrow if line else None)  # fmt: skip
    drawn.set_in_layout(False)
    return drawn


def _square(axes: Axes, label: Label, points: float) -> Bbox:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((label.x, label.y))
    half = points * DOTS_PER_INCH / 72
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _corners(boxes: Sequence[Bbox]) -> NDArray[float64]:
    """[boxes, 4]: left, bottom, right and top of every box, in pixels."""
    import numpy

    return numpy.array([box.extents for box in boxes], dtype=float).reshape(-1, 4)


def _joined(first: NDArray[float64], second: NDArray[float64]) -> NDArray[float64]:
    import numpy

    return numpy.concatenate([first, second])


def _without(boxes: NDArray[float64], place: int) -> NDArray[float64]:
    import numpy

    return numpy.delete(boxes, place, axis=0)


def _overlap(boxes: NDArray[float64], others: NDArray[float64]) -> float:
    """The area, in square pixels, that [n, 4] boxes share with [m, 4] others, every pair counted."""
    import numpy

    low = numpy.maximum(boxes[:, None, :2], others[None, :, :2])
    high = numpy.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return float(numpy.clip(high - low, 0.0, None).prod(axis=2).sum())
