"""What all figures share: looking up quantities, naming axes with units, and checking specifications."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows.columns import Cell, Column
from workflows.grid import plain_name, unit
from workflows.measured import Measured
from workflows.specs import RECOVERED, RELATIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Spec = Mapping[str, Any]
PROBE, ACCURACY = "probe.", ".accuracy"
NARROW_LOGARITHM = 20.0
"""A logarithmic axis whose ends are closer than this factor gets plain numbers."""
_TERMS = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "tokens": "tokens forwarded",
    "fitness": "fitness of the parent, each on a new batch",
    "holdout": "fitness on one held-out batch",
}
_DIRECTIONS = {
    "higher": "higher is better",
    "lower": "lower is better",
    "closer_to_0": "closer to 0 is better",
    "closer_to_1": "closer to 1 is better",
}


def quantity(measured: Measured, name: str, reference: str) -> Column:
    """The one measured quantity that figure ``name`` means. Raises ``AssayError`` where it leaves the task open."""
    columns = measured.columns(reference)
    if len(columns) > 1:
        there = ", ".join(column.name for column in columns)
        raise AssayError(f"figures.{name}: {reference} is measured on several tasks; name one: {there}.")
    return columns[0]


def quantity_label(column: Column, cells: Sequence[Cell]) -> str:
    """``forget10 · forget_nll (nats/token), lower is better``."""
    words = RECOVERED if column.towards else RELATIVE
    (name, words, chain), said = plain_name(column).partition(words), unit(column, cells)
    plain = name if (column.absolute or column).at else name.replace(".", " · ")
    text = plain + words + chain + (f" ({said})" if said else "")
    return ", ".join(filter(None, [text, _DIRECTIONS.get(column.better, "")]))


def term_label(name: str, logged: Collection[str] = ()) -> str:
    """A curve's term with its unit: losses are as the method defines them, probes are mean NLLs or accuracies.

    A probe whose accuracy is among ``logged`` is of cases that are classified; any other is of answers.
    """
    if name.startswith(PROBE) and name.endswith(ACCURACY):
        return f"{probe_name(name)} accuracy (share of cases)"
    if name.startswith(PROBE):
        per = "case" if f"{name}{ACCURACY}" in logged else "token"
        return f"{probe_name(name)} NLL of the probe (nats/{per})"
    return _TERMS.get(name, f"loss term {name}")


def probe_name(term: str) -> str:
    """``test`` of ``probe.test`` and ``probe.test.accuracy``."""
    return term.removeprefix(PROBE).removesuffix(ACCURACY)


def finish(axes: Axes, spec: Spec, x_label: str, y_label: str) -> None:
    """Axis labels and scales; the specification's own words win."""
    axes.set_xlabel(spec.get("x_label", x_label))
    axes.set_ylabel(spec.get("y_label", y_label))
    for axis in spec.get("log", ()):
        getattr(axes, f"set_{axis}scale")("log")


def plain_logarithms(axes: Axes, spec: Spec) -> None:
    """Ticks such as 0.5 and 0.8 on a logarithmic axis that spans too little for powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for name in spec.get("log", ()):
        axis = getattr(axes, f"{name}axis")
        low, high = axis.get_view_interval()
        if 0 < low < high < low * NARROW_LOGARITHM:
            subs = [1.0, 2.0, 3.0, 5.0] if high > 3 * low else [part / 2 for part in range(2, 20)]
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())


def sd_or_zero(cell: Cell) -> float:
    """The sd over distinct results; 0 for a single one, which has no bar."""
    return 0.0 if math.isnan(cell.sd) else cell.sd
