"""Assignments: which layer is compressed to which level, whoever chose it, and how a budget is met exactly.

``assignment.json`` in a ``files/`` folder::

    {"kind": "sparsity", "producer": "search.evopress", "levels": {"model.layers.0.mlp.down_proj": "-1", ...},
     "spent": {"weights": 4915200}, "about": {...}}

Of the kind ``depth`` the units are sub-blocks (``model.layers.3.self_attn``, ``model.layers.3.mlp``), the levels
``kept`` and ``removed``, and no level database is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.find import nearest
from methods.stage import AssayError, NotFinite

if TYPE_CHECKING:
    import numpy

    from methods.levels._database import Database, Unit

REVISION = 1
FILE = "assignment.json"
KINDS = ("sparsity", "bits", "structure", "depth", "widths")
SUB_BLOCK_LEVELS = ("kept", "removed")
# The table of ways to spend a budget has a row for each layer and a column for each step of cost; this many cells
# (1 GB) are the most. Llama-2-70B's neurons one by one take 180 million.
MOST_CELLS = 1_000_000_000
SAME_BITS = 5e-7


@dataclass(frozen=True)
class Assignment:
    """A level for every unit. ``spent`` is the cost by budget; ``about`` is for whoever reads the file."""

    kind: str
    levels: Mapping[str, str]
    producer: str
    spent: Mapping[str, int]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, database: Database, levels: Mapping[str, str], producer: str, about: Mapping[str, Any]
    ) -> Assignment:
        """Levels of a database, with what they cost.

        Of bit-widths ``about`` says their mean, see ``bits_of``; of heads and neurons how many go from each layer,
        ``removed``, which the levels of a next round may be centred on.
        """
        found = {"levels": database.about.get("method", ""), **about}
        if database.kind == "bits":
            found |= bits_of(database, levels)
        if database.kind == "structure":
            found["removed"] = {unit.name: unit.level(levels[unit.name]).cost for unit in database.units}
        return cls(database.kind, levels, producer, database.spent(levels), found)

    def write(self, folder: Path) -> Path:
        """Write ``assignment.json`` into a ``files/`` folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path

    def check(self, database: Database) -> None:
        """Raise an AssayError unless every layer has a level that exists and the cost is what ``spent`` says."""
        if self.kind != database.kind:
            raise AssayError(
                f"an assignment of kind {self.kind} does not belong to the levels in {database.folder}, which are of "
                f"kind {database.kind}."
            )
        for name, level in self.levels.items():
            database.unit(name).level(level)
        missing = [unit.name for unit in database.units if unit.name not in self.levels]
        if missing:
            raise AssayError(
                f"the assignment of {self.producer} names no level of {missing[0]} (of {len(missing)} layers in all)."
            )
        spent = database.spent(self.levels)
        if spent != dict(self.spent):
            raise AssayError(
                f"the assignment of {self.producer} says that it costs {_costs(self.spent)}; with the levels in "
                f"{database.folder} it costs {_costs(spent)}: take the levels it was made for."
            )

    def check_sub_blocks(self, attentions: Sequence[str], mlps: Sequence[str]) -> None:
        """The same for an assignment of kind ``depth``, for a model with these sub-blocks."""
        every = {*attentions, *mlps}
        for name, level in self.levels.items():
            if name not in every:
                raise AssayError(f"the model has no sub-block {name!r}{nearest(name, every)}")
            if level not in SUB_BLOCK_LEVELS:
                raise AssayError(f"{name} has no level {level!r}{nearest(level, SUB_BLOCK_LEVELS)}")
        missing = [name for name in (*attentions, *mlps) if name not in self.levels]
        if missing:
            raise AssayError(f"the assignment of {self.producer} does not say whether {missing[0]} is kept.")
        spent = {"attentions": self._removed(attentions), "mlps": self._removed(mlps)}
        if spent != dict(self.spent):
            raise AssayError(
                f"the assignment of {self.producer} says that it removes {_costs(self.spent)}, and it removes "
                f"{_costs(spent)}."
            )

    def _removed(self, names: Sequence[str]) -> int:
        return sum(self.levels[name] == "removed" for name in names)


def bits_of(database: Database, levels: Mapping[str, str]) -> dict[str, float]:
    """Bits for each weight of all layers at these levels: of the codes alone, and with scales and zero points."""
    chosen = [(unit.rows * unit.columns, unit.level(levels[unit.name])) for unit in database.units]
    weights = sum(size for size, _ in chosen)
    return {
        "bits": sum(level.cost for _, level in chosen) / weights,
        "bits_with_scales": sum(size * level.share for size, level in chosen) / weights,
    }


def _costs(spent: Mapping[str, int]) -> str:
    return " and ".join(f"{cost:,} {budget}" for budget, cost in spent.items()) or "nothing"


def read(folder: Path) -> Assignment:
    """The assignment in a ``files/`` folder; AssayError where there is none or it cannot be one."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise AssayError(f"{folder} holds no {FILE}: name a chain that ends in a search stage.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return from_json(content)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AssayError(f"{path} is no assignment of levels ({error}).") from error


def from_json(content: Any) -> Assignment:
    """An assignment as JSON has it; KeyError, TypeError, ValueError or AttributeError for anything else."""
    levels = {str(name): str(level) for name, level in content["levels"].items()}
    spent = {str(budget): int(cost) for budget, cost in content["spent"].items()}
    if content["kind"] not in KINDS:
        raise ValueError(
            f"there is no kind {content['kind']!r}{nearest(str(content['kind']), KINDS)}".rstrip(".")
        )
    if not levels:
        raise ValueError("it names no layer")
    return Assignment(content["kind"], levels, str(content["producer"]), spent, dict(content["about"]))


# --- meeting a budget exactly -----------------------------------------------------------------------------------


def nearest_levels(
    database: Database, wanted: Mapping[str, float], spent: Mapping[str, int]
) -> dict[str, str]:
    """The levels that meet every budget in ``spent`` exactly with the least squared deviation from ``wanted``.

    Args:
        wanted: a cost for every layer, not necessarily one of its levels'.
    Raises:
        AssayError: a budget cannot be met exactly; it says what the nearest that can be met are.
    """
    values = {
        unit.name: [(level.cost - wanted[unit.name]) ** 2 for level in unit.levels] for unit in database.units
    }
    return least(database.units, values, spent)


def bits_budget(database: Database, bits: float) -> dict[str, int]:
    """The budget that a mean number of bits for each weight stands for; AssayError where no choice of levels has it."""
    sums = _Knapsack(database.units).reachable()
    size = sum(unit.rows * unit.columns for unit in database.units)
    near = sums.around(round(bits * size))
    for total in near:
        # Numbers in options are decimal text: 2.333333 is meant to be 7/3.
        if abs(total / size - bits) <= SAME_BITS:
            return {database.units[0].budget: total}
    said = " and ".join(f"{total / size:.6g}" for total in near)
    raise AssayError(
        f"no choice among the levels in {database.folder} has {bits:g} bits for each weight on average; the nearest "
        f"that one has: {said}."
    )


def least(
    units: Sequence[Unit],
    values: Mapping[str, Sequence[float]],
    spent: Mapping[str, int],
    at_most: bool = False,
) -> dict[str, str]:
    """One level for each unit so that the sum of their values is least and every budget is met exactly.

    A knapsack with one choice for each unit, solved exactly by dynamic programming over the reachable costs. Among
    equal sums the cheaper level of the later unit wins.

    Args:
        values: a number for each level of each unit, in the order of its levels.
        at_most: a budget may also be left unspent in part.
    Raises:
        AssayError: a budget cannot be met; it says what the nearest that can be met are.
    """
    chosen: dict[str, str] = {}
    for budget in dict.fromkeys(unit.budget for unit in units):
        if budget not in spent:
            raise AssayError(f"nothing is said about the budget of {budget}{nearest(budget, spent)}")
        mine = [unit for unit in units if unit.budget == budget]
        _refuse_not_finite(values, mine)
        chosen |= _Knapsack(mine).solve([values[unit.name] for unit in mine], spent[budget], at_most)
    return {unit.name: chosen[unit.name] for unit in units}


def _refuse_not_finite(values: Mapping[str, Sequence[float]], units: Sequence[Unit]) -> None:
    for unit in units:
        if not all(map(math.isfinite, values[unit.name])):
            raise NotFinite(
                f"what the levels of {unit.name} are chosen by is not finite: {values[unit.name]}."
            )


class _Knapsack:
    """The units of one budget; costs are counted in steps above the cheapest assignment."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.budget, self.units = units[0].budget, units
        self.floor = sum(unit.levels[0].cost for unit in units)
        above = [[level.cost - unit.levels[0].cost for level in unit.levels] for unit in units]
        # Costs have a common step (so many weights of one level, bits times the smallest layer).
        self.step = math.gcd(*(cost for row in above for cost in row)) or 1
        self.above = [[cost // self.step for cost in row] for row in above]

    def solve(self, values: Sequence[Sequence[float]], spent: int, at_most: bool) -> dict[str, str]:
        """The names of the chosen levels."""
        target = (spent - self.floor) // self.step
        self._refuse_large()
        if target < 0 or (not at_most and spent not in self.reachable()):
            raise self._unreachable(spent, at_most)
        target = min(target, sum(max(row) for row in self.above))
        best, choices = self._table(values, target)
        at = self._end(best, target, at_most)
        chosen = {}
        for unit, row, choice in reversed(list(zip(self.units, self.above, choices, strict=True))):
            number = int(choice[at])
            chosen[unit.name] = unit.names[number]
            at -= row[number]
        return chosen

    def _refuse_large(self) -> None:
        steps = sum(max(row) for row in self.above)
        if len(self.units) * (steps + 1) > MOST_CELLS:
            raise AssayError(
                f"the levels of {len(self.units)} layers span {steps:,} steps of {self.step:,} {self.budget}: too many "
                "to meet a budget exactly. Build levels whose costs have a larger common step."
            )

    def _end(self, best: numpy.ndarray, target: int, at_most: bool) -> int:
        """The cost at which the best assignment ends: of equally good ones, the one that spends most."""
        if not at_most:
            return target
        least = best.min()
        return int((best == least).nonzero()[0][-1])

    def _table(
        self, values: Sequence[Sequence[float]], target: int
    ) -> tuple[numpy.ndarray, list[numpy.ndarray]]:
        """The least sum at each cost up to the target, and each unit's choice there."""
        import numpy

        best = numpy.full(target + 1, numpy.inf)
        best[0] = 0.0
        choices = []
        narrow = numpy.min_scalar_type(max(map(len, self.above)))
        for row, numbers in zip(self.above, values, strict=True):
            least = numpy.full(target + 1, numpy.inf)
            choice = numpy.zeros(target + 1, dtype=narrow)
            for number, (cost, value) in enumerate(zip(row, numbers, strict=True)):
                if cost > target:
                    break
                candidate = best[: target + 1 - cost] + value
                better = candidate < least[cost:]
                least[cost:][better] = candidate[better]
                choice[cost:][better] = number
            best = least
            choices.append(choice)
        return best, choices

    def reachable(self) -> _Sums:
        """Every total cost there is."""
        self._refuse_large()
        sums = 1
        for row in self.above:
            # Bit n of a whole number says that n steps can be met.
            sums = _either(sums << cost for cost in row)
        return _Sums(sums, self.floor, self.step)

    def _unreachable(self, spent: int, at_most: bool) -> AssayError:
        if at_most:
            return AssayError(
                f"{spent:,} is below the least that can be spent on {self.budget}: {self.floor:,}."
            )
        near = " and ".join(f"{cost:,}" for cost in self.reachable().around(spent))
        return AssayError(
            f"the budget of {self.budget}, {spent:,}, cannot be met exactly with the levels there are; the nearest "
            f"that can are {near}."
        )


def _either(numbers: Any) -> int:
    total = 0
    for number in numbers:
        total |= number
    return total


@dataclass(frozen=True)
class _Sums:
    """Total costs as the bits of a whole number."""

    bits: int
    floor: int
    step: int

    def __contains__(self, cost: int) -> bool:
        steps, rest = divmod(cost - self.floor, self.step)
        return steps >= 0 and not rest and bool(self.bits >> steps & 1)

    def around(self, cost: int) -> list[int]:
        """The nearest below and the nearest above."""
        steps = (cost - self.floor) // self.step
        below = self.bits & ((1 << max(steps + 1, 0)) - 1)
        above = self.bits >> max(steps + 1, 0)
        found = []
        if below:
            found.append(below.bit_length() - 1)
        if above:
            found.append(max(steps + 1, 0) + (above & -above).bit_length() - 1)
        return [self.floor + self.step * at for at in found]
