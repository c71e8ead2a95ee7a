"""What a chain's last stage won back of what the model it started from had lost, as a share and per kilojoule.

The share is ``(broken - x) / (broken - intact)``, seed by seed: *broken* is the model that the last stage started from,
*intact* a chain that is named. 1 means that everything came back, 0 nothing, less than 0 that the stage made it worse.
Claims (``recovers``) and columns (``X recovered towards CHAIN``) ask here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from workflows.columns import Cell, Column, Sample
from workflows.relative import NO_PAIR, obtained, paired
from workflows.trajectory import NO_START

NOT_WORSE = "start not worse"
NO_ENERGY = "no energy"
STAGE_ENERGY = Column("energy.stage_kwh", "energy", "", "stage_kwh")
KILOJOULES_PER_KWH = 3600.0


def parent_label(label: str) -> str:
    """The label without its last stage: splits at the last `` > `` outside quotes and brackets."""
    depth, quoted, escaped, cut = 0, False, False, 0
    for place, character in enumerate(label):
        if escaped or (quoted and character == "\\"):
            escaped = not escaped
        elif character == '"':
            quoted = not quoted
        elif not quoted:
            depth += (character in "([{") - (character in ")]}")
            cut = place if depth == 0 and character == ">" else cut
    return label[:cut].rstrip()


def share(own: float, broken: float, intact: float, better: str = "") -> float | None:
    """What ``own`` has won back of what ``broken`` lost against ``intact``; None where it is not worse.

    ``better`` is the metric's direction. Without one any difference counts as a loss; a metric that should come close
    to 0 or 1 is taken by its distance from there.
    """
    aim = {"closer_to_0": 0.0, "closer_to_1": 1.0}.get(better)
    if aim is not None:
        own, broken, intact = abs(own - aim), abs(broken - aim), abs(intact - aim)
    lost = broken - intact
    not_worse = {"": lost == 0, "higher": lost >= 0}.get(better, lost <= 0)
    return None if not_worse else (broken - own) / lost


def shares(
    pairs: Sequence[tuple[Sample, Sample]], intact: Cell, better: str = ""
) -> tuple[list[Sample], dict[str, int]]:
    """One share for each result of the intact model with the seed of a pair (own, broken), and why others have none."""
    found: dict[str, Sample] = {}
    words: Counter[str] = Counter()
    for own, broken in pairs:
        whole = [
            each for _, each in paired([Sample(own.seed or broken.seed, own.id, own.value)], intact.samples)
        ]
        words[NO_PAIR] += not whole
        for each in whole:
            value = share(own.value, broken.value, each.value, better)
            name = f"{own.id}/{broken.id}/{each.id}"
            words[NOT_WORSE] += value is None
            if value is not None:
                found.setdefault(name, Sample(own.seed or broken.seed or each.seed, name, value))
    return list(found.values()), dict(+words)


def recovered(own: Cell, broken: Cell, intact: Cell, better: str = "") -> Cell:
    """The shares of a chain's results; ``statuses`` counts those without a partner or with nothing to win back."""
    pairs = paired(own.samples, broken.samples)
    samples, words = shares(pairs, intact, better)
    alone = {NO_PAIR if broken.samples else NO_START: own.n - len({first.id for first, _ in pairs})}
    lost = Counter(own.statuses) + Counter(words) + Counter(alone)
    return Cell(tuple(samples), dict(sorted((+lost).items())))


def each_kilojoule(won: Cell, energy: Cell) -> Cell:
    """The shares divided by the energy of the last stage, in kWh here and in kilojoules there."""
    pairs = paired(won.samples, energy.samples)
    samples = [
        Sample(first.seed or second.seed, f"{first.id}/{second.id}",
               first.value / (second.value * KILOJOULES_PER_KWH))
        for first, second in pairs if second.value > 0
    ]  # fmt: skip
    alone = won.n - len({first.id for first, _ in pairs}) + len(pairs) - len(samples)
    lost = Counter(won.statuses) + Counter({NO_ENERGY: alone})
    kinds = dict.fromkeys(f"1/kJ {obtained(unit)}".strip() for unit in energy.units)
    return Cell(tuple(samples), dict(sorted((+lost).items())), tuple(kinds) if samples else ())


def explained(columns: Iterable[Column]) -> list[str]:
    """What stands under a table about its recovered columns, once for every chain."""
    columns = list(columns)
    found = []
    for chain in dict.fromkeys(column.towards for column in columns if column.towards):
        energy = any(column.per_kilojoule for column in columns if column.towards == chain)
        found.append(
            f"Recovered towards {chain}: (X of the start − X) / (X of the start − X of {chain}), paired by seed; the "
            "start is the model that the chain's last stage started from, and 1 is all that it had lost. "
            f"{NOT_WORSE}: there was nothing to win back."
            + (" Per kilojoule: divided by the energy of the last stage." if energy else "")
        )
    return found
