"""How figures look: a style readable in grey, labels that keep out of each other's way, reproducible files.

Uses matplotlib's objects directly and never its global state, so that drawing twice gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

SIZE_INCHES = (7.0, 4.5)
DOTS_PER_INCH = 200
# Okabe and Ito's colours, ordered so that neighbours differ in lightness as well
COLORS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#8C8C8C", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))
SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.5,
    "lines.markersize": 5, "legend.frameon": False, "figure.facecolor": "white", "axes.facecolor": "white",
    "svg.hashsalt": "assay", "svg.fonttype": "path", "savefig.dpi": DOTS_PER_INCH, "axes.formatter.useoffset": False,
}  # fmt: skip
LABEL_DISTANCES = (7, 12, 18, 26, 36, 48, 62)
LABEL_ANGLES = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with this project's settings, whatever the user's own file says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def new(columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of the standard size with some panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def look(place: int) -> dict[str, Any]:
    """Colour, marker and line of the n-th series; sixteen differ also in grey."""
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)],
            "linestyle": LINES[place % len(LINES)]}  # fmt: skip


def files(figure: Figure, description: str) -> dict[str, bytes]:
    """PNG and SVG of a figure, without dates; the description travels in their metadata."""
    written = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={**metadata, "Description": description})
        written[kind] = buffer.getvalue()
    return written


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend under all panels, in as many columns as its longest text allows."""
    if labels:
        columns = max(1, min(4, len(labels), 96 // (max(map(len, labels)) + 8)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)


# --- labels -----------------------------------------------------------------------------------------------


def place_labels(figure: Figure, axes: Axes, texts: Mapping[tuple[float, float], str], taken: Sequence[Bbox] = ()) -> None:
    """Write a text beside every point where it covers neither another text nor a point nor leaves the panel.

    Candidates are tried in a fixed order, near ones first; a text that had to move away gets a thin line.
    """
    figure.draw_without_rendering()
    renderer = figure._get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    occupied = [_around(axes, point, 5) for point in texts] + list(taken)
    for point, text in sorted(texts.items(), key=lambda item: (-item[0][1], item[0][0])):
        occupied.append(_place(axes, point, text, occupied, frame, renderer))


def _place(axes: Axes, point: tuple[float, float], text: str, occupied: Sequence[Bbox], frame: Bbox, renderer: Any) -> Bbox:
    best = None
    for distance in LABEL_DISTANCES:
        for across, up in LABEL_ANGLES:
            label = _annotate(axes, point, text, across * distance, up * distance)
            box = label.get_window_extent(renderer)
            cost = _overlap(box, occupied) + 10 * _outside(box, frame)
            if cost == 0:
                if best is not None:
                    best[1].remove()
                return _finish(label, box, distance)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, label, box, distance)
            else:
                label.remove()
    assert best is not None
    return _finish(*best[1:])


def _annotate(axes: Axes, point: tuple[float, float], text: str, across: float, up: float) -> Any:
    sides = {True: "left", False: "right"}
    horizontal = "center" if across == 0 else sides[across > 0]
    vertical = "center" if up == 0 else "bottom" if up > 0 else "top"
    label = axes.annotate(text, point, xytext=(across, up * 0.7), textcoords="offset points", fontsize=8, ha=horizontal,
                          va=vertical, arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2})  # fmt: skip
    label.arrow_patch.set_visible(False)
    label.set_in_layout(False)
    return label


def _finish(label: Any, box: Bbox, distance: float) -> Bbox:
    label.arrow_patch.set_visible(distance > LABEL_DISTANCES[1])
    return box


def _around(axes: Axes, point: tuple[float, float], points: float) -> Bbox:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(point)
    half = points * DOTS_PER_INCH / 72
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _overlap(box: Bbox, occupied: Sequence[Bbox]) -> float:
    from matplotlib.transforms import Bbox

    shared = [Bbox.intersection(box, other) for other in occupied]
    return sum(part.width * part.height for part in shared if part is not None)


def _outside(box: Bbox, frame: Bbox) -> float:
    from matplotlib.transforms import Bbox

    inside = Bbox.intersection(box, frame)
    return float(box.width * box.height - (inside.width * inside.height if inside is not None else 0.0))
