"""A quantity relative to a chain: the change in percent, seed by seed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from workflows.columns import Cell, Column, Sample

NO_PAIR = "no pair"
ZERO = "relative to 0"


def changed(own: Cell, base: Cell) -> Cell:
    """Every distinct pair of results of one seed as ``(own - base) / |base|`` in percent.

    The magnitude below keeps the sign of the difference where the quantity is negative, as a log-likelihood is. A
    result without a seed goes with every seed. ``statuses`` counts the results that have no partner, or one of 0.
    """
    pairs = paired(own.samples, base.samples)
    samples = [
        Sample(first.seed or second.seed, f"{first.id}/{second.id}",
               100 * (first.value - second.value) / abs(second.value))
        for first, second in pairs if second.value != 0
    ]  # fmt: skip
    alone = own.n - len({first.id for first, _ in pairs})
    lost = Counter(own.statuses) + Counter({NO_PAIR: alone, ZERO: len(pairs) - len(samples)})
    return Cell(tuple(samples), dict(sorted((+lost).items())), _units(own, base) if samples else ())


def paired(own: Sequence[Sample], base: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Distinct pairs of results with the same seed; a result without a seed goes with every seed."""
    pairs = [(a, b) for a in own for b in base if a.seed == b.seed or "" in (a.seed, b.seed)]
    return list({(first.id, second.id): (first, second) for first, second in pairs}.values())


def _units(own: Cell, base: Cell) -> tuple[str, ...]:
    """``% measured``: of an energy also how either side was obtained."""
    kinds = dict.fromkeys(kind for unit in (*own.units, *base.units) if (kind := obtained(unit)))
    return (" and ".join(kinds).join(["% ", ""]) if kinds else "%",)


def obtained(unit: str) -> str:
    """``estimated, shared`` of ``kWh estimated, shared``; empty for units that say nothing of the kind."""
    match = re.fullmatch(r"(?:kWh|%|1/kJ) (.+)", unit)
    return match[1] if match else ""


def explained(columns: Iterable[Column]) -> list[str]:
    """What stands under a table about its relative columns, once for every chain."""
    chains = dict.fromkeys(column.relative_to for column in columns if column.relative_to)
    return [
        f"Relative to {chain}: (X − X of {chain}) / |X of {chain}| in percent, paired by seed; (n) counts the pairs."
        for chain in chains
    ]
