"""What all figures share: looking up quantities, naming axes with units, and checking specifications."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows.columns import Cell, Column
from workflows.grid import unit
from workflows.measured import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Spec = Mapping[str, Any]
NARROW_LOGARITHM = 20.0
"""A logarithmic axis whose ends are closer than this factor gets plain numbers."""
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


def several(value: str | Sequence[str]) -> list[str]:
    """One name or a list of them as a list."""
    return [value] if isinstance(value, str) else list(value)


def quantity_label(column: Column, cells: Sequence[Cell]) -> str:
    """``forget10 · forget_nll (nats/token), lower is better``."""
    name = column.name.removesuffix("_kwh") if column.entry == "energy" else column.name
    said = unit(column, cells)
    text = (name if column.at else name.replace(".", " · ")) + (f" ({said})" if said else "")
    return ", ".join(filter(None, [text, _DIRECTIONS.get(column.better, "")]))


def term_label(name: str) -> str:
    """A curve's term with its unit: probes are mean answer NLLs, losses are as the method defines them."""
    if name.startswith("probe."):
        return f"{name.removeprefix('probe.')} NLL of the probe (nats/token)"
    return {"learning_rate": "learning rate", "gradient_norm": "gradient norm"}.get(name, f"loss term {name}")


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
