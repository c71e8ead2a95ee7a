"""Bit-widths of layers under a budget of bits: what EvoPress's quantisation search chooses from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Literal

from methods.search._spaces import (
    SAME_SHARE,
    Candidate,
    Switching,
    distinct,
    listed,
    moved,
    pick,
    places_of,
    replaced,
    shuffled,
    switches,
)
from methods.stage import AssayError

if TYPE_CHECKING:
    from random import Random

    from methods.levels._database import Database

# A child without groups changes at most this many levels, and wins back this share of the bits it gives up.
MOST_CHANGES = 10
LEAST_RETURN = 0.8
# As many states of a search without groups are looked at before its children are taken to be plenty.
MOST_STATES = 20_000


@dataclass(frozen=True)
class Bits(Switching):
    """Bit-widths with a mean of ``target`` bits for each weight (codes only), as in EvoPress's quantisation search.

    ``group_rule`` "size" and "name" exchange bits within a group: layers with as many weights, or of the same name (and
    as many weights, so that a switch costs nothing). A group is chosen in proportion to its layers, among those that
    can still move: the released code stops with an assertion where the chosen one cannot. "none" raises up to three
    layers and lowers others until the target is met again; its budget is an upper bound.
    """

    names: tuple[str, ...]
    weights: tuple[int, ...]  # of each unit
    levels: tuple[frozenset[int], ...]  # the bit-widths each unit has
    target: float
    group_rule: Literal["size", "name", "none"] = "size"
    most_switches: int = 3
    # the total to be met, or not to be passed
    budget: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", self._budget())

    @classmethod
    def of(cls, database: Database, target: float, group_rule: Literal["size", "name", "none"]) -> Bits:
        """The levels of a database. AssayError where no choice among them has ``target`` bits on average."""
        units = database.units
        return cls(
            names=tuple(unit.name for unit in units),
            weights=tuple(unit.rows * unit.columns for unit in units),
            levels=tuple(frozenset(int(name) for name in unit.names) for unit in units),
            target=target,
            group_rule=group_rule,
        )

    # -- the budget

    def _budget(self) -> int:
        """The total in bits that stands for ``target``; a sentence where there is none."""
        size = sum(self.weights)
        below, above = self._nearest_totals(self.target * size)
        for total in (below, above):
            if total is not None and abs(total / size - self.target) <= SAME_SHARE:
                return total
        if self.group_rule == "none" and below is not None and above is not None:
            return below
        near = " and ".join(f"{total / size:.6f}" for total in (below, above) if total is not None)
        raise AssayError(
            f"no choice of bit-widths has {self.target:g} bits for each weight on average; the nearest that one has: "
            f"{near}. Write bits= one of these, or add levels to the database."
        )

    def _nearest_totals(self, wanted: float) -> tuple[int | None, int | None]:
        """The largest total not above ``wanted`` and the smallest above it, among all choices of levels."""
        unit, floor = self._unit, self._floor
        reach = 1
        for options in self._options(self.levels):
            reach = _sums(reach, options)
        place = int((wanted - floor) // unit)
        low = reach & ((1 << (place + 1)) - 1) if place >= 0 else 0
        high = reach >> (place + 1) if place >= -1 else reach
        start = place + 1 if place >= -1 else 0
        below = floor + (low.bit_length() - 1) * unit if low else None
        above = floor + (start + (high & -high).bit_length() - 1) * unit if high else None
        return below, above

    @cached_property
    def _unit(self) -> int:
        """Every total is a multiple of this many bits: in a decoder at least the hidden size."""
        return gcd(*self.weights)

    @cached_property
    def _floor(self) -> int:
        return sum(min(levels) * size for levels, size in zip(self.levels, self.weights, strict=True))

    def _options(self, levels: Iterable[frozenset[int]]) -> list[list[int]]:
        """What each unit can add to the smallest total, in multiples of ``_unit``, for these levels."""
        return [
            [(bits - min(every)) * size // self._unit for bits in sorted(some)]
            for every, some, size in zip(self.levels, levels, self.weights, strict=True)
        ]

    # -- the start

    @cached_property
    def uniform(self) -> Candidate | None:
        """The candidate with ``target`` bits everywhere, where every layer has that level."""
        bits = round(self.target)
        everywhere = all(bits in levels for levels in self.levels)
        return (bits,) * len(self.names) if everywhere and abs(bits - self.target) <= SAME_SHARE else None

    def keeps(self) -> bool:
        return self.group_rule != "none"

    def needs_start(self) -> bool:
        return self.uniform is None

    def initial(self, random: Random) -> Iterator[Candidate]:
        if self.uniform is not None:
            yield self.uniform
            return
        yield from distinct(lambda: self._start(random))

    def _start(self, random: Random) -> Candidate:
        """All layers rounded up to the target's next level, then lowered at random until the budget is met."""
        candidate = tuple(
            min((bits for bits in levels if bits >= self.target), default=max(levels))
            for levels in self.levels
        )
        excess = self._bits(candidate) - self.budget
        while excess > 0 and (lower := self._lower_within(candidate, excess)):
            index = self._pick(lower, random)
            candidate = replaced(candidate, {index: candidate[index] - lower[index]})
            excess = self._bits(candidate) - self.budget
        return candidate if excess == 0 else self._composed(random)

    def _lower_within(self, candidate: Candidate, excess: int) -> dict[int, int]:
        """Layers that can go down one level without passing the budget, and by how many bits."""
        return {
            index: step
            for index, step in self._downs(candidate).items()
            if step * self.weights[index] <= excess
        }

    def _pick(self, among: Mapping[int, int], random: Random) -> int:
        """A layer, by way of a group: chosen in proportion to all its layers, among the groups that have one here."""
        groups = [places for places in self.groups if any(index in among for index in places)]
        group = pick(random, [places for places in groups for _ in places])
        return pick(random, [index for index in group if index in among])

    def _composed(self, random: Random) -> Candidate:
        """A candidate that meets the budget to the bit, from levels as close to the target as will do."""
        order = shuffled(random, range(len(self.names)))
        wanted = (self.budget - self._floor) // self._unit
        for spread in range(1, max(map(len, self.levels)) + 1):
            options = self._options([_closest(levels, self.target, spread) for levels in self.levels])
            tails = [1]  # the sums that the last units of the order can make
            for index in reversed(order):
                tails.append(_sums(tails[-1], options[index]))
            if tails[-1] >> wanted & 1:
                return self._walked(order, options, tails, wanted, random)
        raise AssayError(f"no choice of bit-widths has {self.budget} bits in total.")

    def _walked(
        self, order: list[int], options: list[list[int]], tails: list[int], wanted: int, random: Random
    ) -> Candidate:
        """Unit after unit, one of the options from which the units after it can still make the rest."""
        chosen = [0] * len(order)
        for index, tail in zip(order, reversed(tails[:-1]), strict=True):
            fitting = [add for add in options[index] if add <= wanted and tail >> (wanted - add) & 1]
            option = pick(random, fitting)
            chosen[index] = min(self.levels[index]) + option * self._unit // self.weights[index]
            wanted -= option
        return tuple(chosen)

    # -- mutation

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Layers that exchange bits, by their places."""
        if self.group_rule == "none":
            return (tuple(range(len(self.names))),)
        last = [name.rpartition(".")[2] if self.group_rule == "name" else "" for name in self.names]
        return tuple(tuple(places) for places in places_of(zip(last, self.weights, strict=True)).values())

    @cached_property
    def _lower(self) -> tuple[dict[int, int], ...]:
        """For each layer, from a level with one below: by how many bits that is lower."""
        return tuple({high: high - low for low, high in pairwise(sorted(levels))} for levels in self.levels)

    @cached_property
    def _higher(self) -> tuple[dict[int, int], ...]:
        """For each layer, from a level with one above: by how many bits that is higher."""
        return tuple({low: high - low for low, high in pairwise(sorted(levels))} for levels in self.levels)

    def _downs(self, candidate: Candidate) -> dict[int, int]:
        """Layers that have a lower level, and by how many bits the next one is lower."""
        return {i: self._lower[i][bits] for i, bits in enumerate(candidate) if bits in self._lower[i]}

    def _ups(self, candidate: Candidate) -> dict[int, int]:
        """Layers that have a higher level, and by how many bits the next one is higher."""
        return {i: self._higher[i][bits] for i, bits in enumerate(candidate) if bits in self._higher[i]}

    def _pairs(self, candidate: Candidate, group: tuple[int, ...]) -> dict[int, list[int]]:
        """Who of a group can go down, and who can take exactly its bits."""
        downs = {i: self._lower[i][candidate[i]] for i in group if candidate[i] in self._lower[i]}
        takers = {
            step: [index for index in group if candidate[index] + step in self.levels[index]]
            for step in set(downs.values())
        }
        return {index: takers[step] for index, step in downs.items() if takers[step]}

    def _passed(self, candidate: Candidate, giver: int, taker: int) -> Candidate:
        """The candidate after one layer gave the bits of one level to another."""
        return moved(candidate, giver, taker, self._lower[giver][candidate[giver]])

    def switch(self, candidate: Candidate, random: Random) -> Candidate | None:
        open_groups = [(group, pairs) for group in self.groups if (pairs := self._pairs(candidate, group))]
        if not open_groups:
            return None
        pairs = pick(random, [pairs for group, pairs in open_groups for _ in group])
        giver = pick(random, list(pairs))
        return self._passed(candidate, giver, pick(random, pairs[giver]))

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        for group in self.groups:
            for giver, takers in self._pairs(candidate, group).items():
                yield from (self._passed(candidate, giver, taker) for taker in takers)

    def mutate(self, parent: Candidate, random: Random) -> Candidate | None:
        if self.group_rule != "none":
            return super().mutate(parent, random)
        child, raised = parent, switches(random, self.most_switches)
        for changes in range(MOST_CHANGES + 1):
            if self._done(child, changes, raised):
                return child if self._worthwhile(child, parent) else None
            steps = self._steps(child, up=changes < raised)
            if not steps:
                return None
            index = pick(random, list(steps))
            child = replaced(child, {index: child[index] + steps[index]})
        return None

    def _done(self, child: Candidate, changes: int, raised: int) -> bool:
        """Whether a search without groups stops here: all is raised that should be, and the budget is met."""
        return changes >= raised and self._bits(child) <= self.budget

    def _steps(self, child: Candidate, up: bool) -> dict[int, int]:
        """What can be added to which layer's bits: one level up, or one down."""
        if up:
            return self._ups(child)
        return {index: -step for index, step in self._downs(child).items()}

    def _worthwhile(self, child: Candidate, parent: Candidate) -> bool:
        """Whether what the lowered layers gave up went to raised ones, up to a fifth."""
        changes = [(new - old) * size for new, old, size in zip(child, parent, self.weights, strict=True)]
        added = sum(change for change in changes if change > 0)
        return added >= LEAST_RETURN * -sum(change for change in changes if change < 0)

    def children(self, parent: Candidate, limit: int) -> int:
        if self.group_rule != "none":
            return super().children(parent, limit)
        found: set[Candidate] = set()
        # A stack: a legal child lies at the end of a path, so going deep finds the first ones soonest.
        stack = [(parent, 0, raised) for raised in range(1, self.most_switches + 1)]
        seen = set(stack)
        while stack and len(found) < limit and len(seen) < MOST_STATES:
            child, changes, raised = stack.pop()
            if self._done(child, changes, raised):
                if child != parent and self._worthwhile(child, parent):
                    found.add(child)
            elif changes < MOST_CHANGES:
                steps = self._steps(child, up=changes < raised).items()
                following = {
                    (replaced(child, {index: child[index] + step}), changes + 1, raised)
                    for index, step in steps
                }
                stack += following - seen
                seen |= following
        return limit if stack else len(found)

    # -- the contract

    def _bits(self, candidate: Candidate) -> int:
        return sum(bits * size for bits, size in zip(candidate, self.weights, strict=True))

    def spent(self, candidate: Candidate) -> dict[str, int]:
        return {"weights": self._bits(candidate)}

    def furthest(self) -> int:
        widest = max((step for steps in self._lower for step in steps.values()), default=0)
        return widest * (MOST_CHANGES if self.group_rule == "none" else 2 * self.most_switches)

    def check_levels(self, candidate: Candidate) -> None:
        self._check_length(candidate)
        for name, bits, available in zip(self.names, candidate, self.levels, strict=True):
            if bits not in available:
                raise AssayError(f"{name} has no level of {bits} bits: there are {listed(available)}.")

    def check(self, candidate: Candidate) -> None:
        self.check_levels(candidate)
        total = self._bits(candidate)
        if total > self.budget or (total < self.budget and self.group_rule != "none"):
            raise AssayError(f"a candidate has {total} bits in total, and the budget is {self.budget}.")

    def assignment(self, candidate: Candidate) -> dict[str, str]:
        return {name: str(bits) for name, bits in zip(self.names, candidate, strict=True)}


def _sums(reach: int, options: list[int]) -> int:
    """The sums that remain possible, as set bits, when one of ``options`` is added to one of ``reach``."""
    found = 0
    for option in options:
        found |= reach << option
    return found


def _closest(levels: frozenset[int], target: float, spread: int) -> frozenset[int]:
    """At most ``spread`` levels not above the target and as many above it."""
    below = [bits for bits in sorted(levels) if bits <= target]
    above = [bits for bits in sorted(levels) if bits > target]
    return frozenset(below[-spread:] + above[:spread])
