"""Figures of an experiment: scatter (Pareto), curve, sweep, matched, bars, plane and profile, from a few words.

``frontier: {kind: scatter, x: forget10.forget_nll, y: tasks.acc, size: energy.chain_kwh, color: family}``
``grokking: {kind: curve, terms: [probe.train.accuracy, probe.test.accuracy], panels: chain, log: x}``
``quality: {kind: bars, metrics: [digits.accuracy, energy.chain_kwh relative to control], group: base}``
``circles: {kind: plane, entry: geometry, what: class_vectors}``
``search: {kind: curve, terms: holdout, along: tokens}``
``levels: {kind: profile, metric: sparsity, of: [searched, uniform]}``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workflows import draw, specs
from workflows.axes import ACCURACY, PROBE, Spec
from workflows.bars import bars
from workflows.curve_figure import curve
from workflows.lines import sweep
from workflows.matched_figure import matched
from workflows.measured import ChainRun, Measured
from workflows.plane import plane
from workflows.profile import profile
from workflows.scatter import scatter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    specs.check(f"figures.{name}", spec, "figures")
    kind = specs.kind_of(spec, "figures")
    runs = measured.chosen(spec.get("of"))
    with draw.style():
        image, caption = _KINDS[kind](measured, runs, spec, name)
        if spec.get("title"):
            image.suptitle(spec["title"], fontsize=10)
        files = draw.files(image, f"{name}: {origin}")
    caption = " ".join(filter(None, [spec.get("caption", ""), caption]))
    return Drawn(name, spec.get("title", ""), caption, files["png"], files["svg"])


def default_specs(measured: Measured) -> dict[str, dict[str, Any]]:
    """Learning curves for an experiment that asks for no figure, where anything was logged: accuracies, else losses."""
    terms = [name for name in dict.fromkeys(measured.curves["term"]) if name not in _NOT_SHOWN]
    terms = [name for name in terms if name.startswith(PROBE) and name.endswith(ACCURACY)] or terms
    return {"learning": {"kind": "curve", "terms": terms[:3]}} if terms else {}


_NOT_SHOWN = ("learning_rate", "gradient_norm")
_KINDS: dict[str, Callable[[Measured, Sequence[ChainRun], Spec, str], tuple[Figure, str]]] = {
    "scatter": scatter,
    "curve": curve,
    "sweep": sweep,
    "matched": matched,
    "bars": bars,
    "plane": plane,
    "profile": profile,
}
