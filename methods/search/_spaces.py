"""What a search may choose from: candidates, how they mutate, and the budget that every one of them meets.

A candidate is a tuple of small integers, one for each unit in the model's order: an offset of levels (``Shift``,
here), a bit-width (``_bits.Bits``), or 0 for kept and 1 for removed (``_depth.Depth``). Its mutations are switches,
as many as the smaller of two draws:

    n = min(U{1..m}, U{1..m}),    m = 3 (EvoPress): P(1) = 5/9, P(2) = 3/9, P(3) = 1/9

A draw that gives nothing legal is ``None`` and no loop: the caller counts its draws. ``children`` says how many
different children a parent has, so that asking for more of them than exist is a sentence and not an endless search.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeVar

from methods.stage import AssayError

if TYPE_CHECKING:
    from random import Random

    from methods.levels._database import Database

# Covers _bits.py and _depth.py as well.
REVISION = 1

Candidate = tuple[int, ...]
T = TypeVar("T")

# Shares in options are decimal text: two of them are the same when six decimals are.
SAME_SHARE = 5e-7
# As many draws that only repeat what is there end the search for new initial candidates.
MOST_REPEATS = 1000


class Space(Protocol):
    """The candidates of one problem. ``check`` and ``validate`` raise an AssayError for one that is not legal."""

    @property
    def names(self) -> tuple[str, ...]:
        """The units, in the order of a candidate's levels."""

    def initial(self, random: Random) -> Iterator[Candidate]:
        """Distinct candidates to start from; ends where there are no more. One where no start has to be found."""

    def needs_start(self) -> bool:
        """Whether several initial candidates have to be scored to find the first parent."""

    def mutate(self, parent: Candidate, random: Random) -> Candidate | None:
        """A child, or None where this draw gave nothing legal."""

    def refuse(self, child: Candidate, parent: Candidate) -> bool:
        """Whether a legal child is turned down, because it is its parent again."""

    def check_levels(self, candidate: Candidate) -> None:
        """Raise an AssayError unless there is a level for every unit, and it exists."""

    def check(self, candidate: Candidate) -> None:
        """The same, and the budget is met: to the unit, or as an upper bound where it is one."""

    def keeps(self) -> bool:
        """Whether children spend exactly what their parent does; else the budget is an upper bound."""

    def spent(self, candidate: Candidate) -> dict[str, int]:
        """What the candidate spends of each budget: levels, bits, or sub-blocks."""

    def furthest(self) -> int:
        """The largest L1 distance of a child to its parent."""

    def children(self, parent: Candidate, limit: int) -> int:
        """How many different children ``parent`` has that are not refused; ``limit`` where there are as many."""

    def assignment(self, candidate: Candidate) -> dict[str, str]:
        """The level of every unit, by the unit's name."""


def switches(random: Random, most: int) -> int:
    """The number of switches of one mutation: the smaller of two draws from 1..``most``."""
    return 1 + min(pick(random, range(most)), pick(random, range(most)))


def pick(random: Random, choices: Sequence[T]) -> T:
    """One of the choices, uniformly. Only ``random()`` is promised to give the same values in every Python version."""
    return choices[int(random.random() * len(choices))]


def shuffled(random: Random, items: Iterable[T]) -> list[T]:
    """The items in random order."""
    return [item for _, item in sorted(((random.random(), item) for item in items), key=lambda pair: pair[0])]


def validate(space: Space, parent: Candidate, child: Candidate) -> None:
    """Raise an AssayError unless ``child`` can have been made from ``parent``: same budget, and not too far away.

    Parent and child spend the same to the unit, except where the budget is an upper bound.
    """
    if not space.keeps():
        space.check(child)
    space.check_levels(child)
    if space.keeps() and space.spent(child) != space.spent(parent):
        raise AssayError(f"a child spends {space.spent(child)}, and its parent {space.spent(parent)}.")
    distance = sum(abs(ours - theirs) for ours, theirs in zip(child, parent, strict=True))
    if distance > space.furthest():
        raise AssayError(f"a child is {distance} levels away from its parent, more than {space.furthest()}.")


class Switching(ABC):
    """What spaces share whose mutations are switches: one unit gives what another one takes."""

    names: tuple[str, ...]
    most_switches: int

    def keeps(self) -> bool:
        return True

    @abstractmethod
    def switch(self, candidate: Candidate, random: Random) -> Candidate | None:
        """One switch; None where this draw gives nothing legal."""

    @abstractmethod
    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        """What one switch makes of a candidate."""

    def legal(self, candidate: Candidate) -> bool:
        """Whether the optional filters let the candidate pass."""
        return True

    def refuse(self, child: Candidate, parent: Candidate) -> bool:
        return child == parent

    def mutate(self, parent: Candidate, random: Random) -> Candidate | None:
        child: Candidate | None = parent
        for _ in range(switches(random, self.most_switches)):
            child = self.switch(child, random) if child is not None else None
        return child if child is not None and self.legal(child) else None

    def children(self, parent: Candidate, limit: int) -> int:
        found: set[Candidate] = set()
        reached, frontier = {parent}, [parent]
        for _ in range(self.most_switches):
            following: list[Candidate] = []
            for child in self._unseen(frontier, reached):
                following.append(child)
                if self.legal(child) and not self.refuse(child, parent):
                    found.add(child)
                if len(found) >= limit:
                    return limit
            frontier = following
        return len(found) + (not self.refuse(parent, parent))

    def _unseen(self, frontier: list[Candidate], reached: set[Candidate]) -> Iterator[Candidate]:
        for candidate in frontier:
            for neighbour in self.neighbours(candidate):
                if neighbour not in reached:
                    reached.add(neighbour)
                    yield neighbour

    def _check_length(self, candidate: Candidate) -> None:
        if len(candidate) != len(self.names):
            raise AssayError(f"a candidate has {len(candidate)} levels for {len(self.names)} units.")


def distinct(draw: Callable[[], Candidate]) -> Iterator[Candidate]:
    """Different candidates among those that ``draw`` gives, until it only repeats itself."""
    seen: set[Candidate] = set()
    repeats = 0
    while repeats < MOST_REPEATS:
        candidate = draw()
        repeats = repeats + 1 if candidate in seen else 0
        if candidate not in seen:
            seen.add(candidate)
            yield candidate


def replaced(candidate: Candidate, changes: Mapping[int, int]) -> Candidate:
    """The candidate with other levels at these places."""
    return tuple(changes.get(index, level) for index, level in enumerate(candidate))


def places_of(values: Iterable[object]) -> dict[object, list[int]]:
    """Where each value stands, in the order of first appearance."""
    found: dict[object, list[int]] = {}
    for index, value in enumerate(values):
        found.setdefault(value, []).append(index)
    return found


# --- sparsity and structure ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift(Switching):
    """Offsets of levels whose sum is kept for each budget: EvoPress's sparsity search, and Tyr's with two budgets.

    A switch takes a level from one unit and gives it to another one of the same budget; a and b may be the same unit,
    which changes nothing. Children equal to their parent are refused here; the released searches let them pass, and
    spend passes on them (``allow_parent``).
    """

    names: tuple[str, ...]
    levels: tuple[frozenset[int], ...]  # the offsets each unit has
    budgets: tuple[str, ...]  # what each unit's levels are paid from
    # 3 in EvoPress, 4 in Tyr
    most_switches: int = 3
    allow_parent: bool = False
    # filters of the released search, off by default: the largest level, and the largest sum of |level|
    max_level: int | None = None
    max_total_deviation: int | None = None

    @classmethod
    def of(cls, database: Database, most_switches: int = 3, allow_parent: bool = False) -> Shift:
        """The levels of a database. AssayError where the levels of a budget do not cost the same everywhere."""
        units = database.units
        _refuse_uneven(database)
        return cls(
            names=tuple(unit.name for unit in units),
            levels=tuple(frozenset(int(name) for name in unit.names) for unit in units),
            budgets=tuple(unit.budget for unit in units),
            most_switches=most_switches,
            allow_parent=allow_parent,
        )

    @cached_property
    def members(self) -> dict[object, list[int]]:
        return places_of(self.budgets)

    def initial(self, random: Random) -> Iterator[Candidate]:
        start = (0,) * len(self.names)
        self.check(start)
        yield start

    def needs_start(self) -> bool:
        return False

    def refuse(self, child: Candidate, parent: Candidate) -> bool:
        return child == parent and not self.allow_parent

    def switch(self, candidate: Candidate, random: Random) -> Candidate | None:
        takers = {budget: self._can(candidate, budget, +1) for budget in self.members}
        givers = [i for budget in self.members if takers[budget] for i in self._can(candidate, budget, -1)]
        if not givers:
            return None
        giver = pick(random, sorted(givers))
        return moved(candidate, giver, pick(random, takers[self.budgets[giver]]), 1)

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        for budget in self.members:
            takers = self._can(candidate, budget, +1)
            for giver in self._can(candidate, budget, -1):
                yield from (moved(candidate, giver, taker, 1) for taker in takers)

    def _can(self, candidate: Candidate, budget: object, step: int) -> list[int]:
        """The units of a budget that have a level ``step`` further."""
        return [index for index in self.members[budget] if candidate[index] + step in self.levels[index]]

    def legal(self, candidate: Candidate) -> bool:
        return (self.max_level is None or max(candidate) <= self.max_level) and (
            self.max_total_deviation is None or sum(map(abs, candidate)) <= self.max_total_deviation
        )

    def spent(self, candidate: Candidate) -> dict[str, int]:
        return {
            str(budget): sum(candidate[index] for index in places) for budget, places in self.members.items()
        }

    def furthest(self) -> int:
        return 2 * self.most_switches

    def check_levels(self, candidate: Candidate) -> None:
        self._check_length(candidate)
        for name, level, available in zip(self.names, candidate, self.levels, strict=True):
            if level not in available:
                raise AssayError(f"{name} has no level {level}: there are {listed(available)}.")

    def check(self, candidate: Candidate) -> None:
        self.check_levels(candidate)
        for budget, total in self.spent(candidate).items():
            if total != 0:
                raise AssayError(
                    f"the levels of a candidate sum to {total} in the budget {budget}, not to 0."
                )

    def assignment(self, candidate: Candidate) -> dict[str, str]:
        return {name: str(level) for name, level in zip(self.names, candidate, strict=True)}


def moved(candidate: Candidate, giver: int, taker: int, step: int) -> Candidate:
    """``step`` levels go from one unit to another one; nothing happens where they are the same."""
    if giver == taker:
        return candidate
    return replaced(candidate, {giver: candidate[giver] - step, taker: candidate[taker] + step})


def _refuse_uneven(database: Database) -> None:
    """A switch keeps a budget only where a level costs the same in every unit that shares it."""
    steps: dict[str, tuple[int, str]] = {}
    for unit in database.units:
        costs = {int(level.name): level.cost for level in unit.levels}
        for level in sorted(costs):
            if level + 1 in costs:
                step = costs[level + 1] - costs[level]
                first, where = steps.setdefault(unit.budget, (step, unit.name))
                if step != first:
                    raise AssayError(
                        f"the levels of this database cannot be exchanged: a level of {unit.name} costs {step} and "
                        f"one of {where} costs {first}. Build it with levels that are equally far apart."
                    )


def listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))
