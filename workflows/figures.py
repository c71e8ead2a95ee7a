"""Figures of an experiment: scatter (Pareto), curve, sweep and matched, from a few words of specification.

``frontier: {kind: scatter, x: forget10.forget_nll, y: tasks.acc, size: energy.chain_kwh, color: family}``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows import draw
from workflows.axes import Spec
from workflows.lines import curve, matched, sweep
from workflows.measured import ChainRun, Measured
from workflows.scatter import scatter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMON = ("kind", "of", "title", "caption", "log", "x_label", "y_label")
KEYS = {
    "scatter": ("x", "y", "color", "size", "front"),
    "curve": ("terms",),
    "sweep": ("x", "y", "baseline"),
    "matched": ("x", "y", "levels"),
}


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
    terms = [
        name
        for name in dict.fromkeys(measured.curves["term"])
        if name not in ("learning_rate", "gradient_norm")
    ]
    return {"learning": {"kind": "curve", "terms": terms[:3]}} if terms else {}


def _check(name: str, kind: str, spec: Mapping[str, Any]) -> None:
    if kind not in KEYS:
        raise AssayError(f"figures.{name}: kind {kind!r} is none of {', '.join(KEYS)}.")
    unknown = sorted(set(spec) - {*COMMON, *KEYS[kind]})
    if unknown:
        raise AssayError(
            f"figures.{name}: there is no key {unknown[0]!r}; a {kind} has {', '.join((*KEYS[kind], *COMMON))}."
        )
    for key in ("x", "y") if kind != "curve" else ("terms",):
        if not spec.get(key):
            raise AssayError(f"figures.{name}: a {kind} needs {key}.")


_KINDS: dict[str, Callable[[Measured, Sequence[ChainRun], Spec, str], tuple[Figure, str]]] = {
    "scatter": scatter,
    "curve": curve,
    "sweep": sweep,
    "matched": matched,
}
