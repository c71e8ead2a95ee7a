"""Sub-blocks of a decoder that are removed or kept: what a search for depth chooses from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from math import comb
from typing import TYPE_CHECKING

from methods.search._spaces import (
    SAME_SHARE,
    Candidate,
    Switching,
    distinct,
    listed,
    pick,
    replaced,
    shuffled,
)
from methods.stage import AssayError

if TYPE_CHECKING:
    from random import Random

    from transformers import PreTrainedModel

# As many removal masks are written out and shuffled; more of them are drawn.
MOST_MASKS = 10_000


@dataclass(frozen=True)
class Depth(Switching):
    """Which attention and MLP sub-blocks are removed: as many of each, in every candidate.

    The units are ordered as the model runs them, attention before MLP. A switch picks attention or MLP with probability
    one half, puts one removed unit of that kind back and removes a kept one. With ``whole_blocks`` a block's MLP
    follows its attention, so that a switch of MLPs does nothing.
    """

    attentions: tuple[str, ...]
    mlps: tuple[str, ...]
    removed_attentions: int
    removed_mlps: int
    whole_blocks: bool = False
    most_switches: int = 3

    @classmethod
    def of(cls, model: PreTrainedModel, sparsity: float, whole_blocks: bool = False) -> Depth:
        """The sub-blocks of a model. AssayError where ``sparsity`` is no whole number of them, none or all."""
        attentions, mlps = sub_blocks(model)
        if whole_blocks and list(map(_block, attentions)) != list(map(_block, mlps)):
            raise AssayError(
                "whole_blocks needs blocks with an attention and an MLP each; this model has others."
            )
        return cls(
            attentions,
            mlps,
            removed_attentions=share_of(sparsity, len(attentions), "attention"),
            removed_mlps=share_of(sparsity, len(mlps), "MLP"),
            whole_blocks=whole_blocks,
        )

    @cached_property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(sorted((*self.attentions, *self.mlps), key=_running_order))

    @cached_property
    def members(self) -> tuple[list[int], list[int]]:
        """Where attentions and MLPs stand among the units."""
        place = {name: index for index, name in enumerate(self.names)}
        return [place[name] for name in self.attentions], [place[name] for name in self.mlps]

    def needs_start(self) -> bool:
        return True

    def initial(self, random: Random) -> Iterator[Candidate]:
        if self.size() <= MOST_MASKS:
            yield from shuffled(random, self._every())
            return
        yield from distinct(lambda: self._drawn(random))

    def size(self) -> int:
        """The number of candidates there are."""
        attentions = comb(len(self.attentions), self.removed_attentions)
        return attentions if self.whole_blocks else attentions * comb(len(self.mlps), self.removed_mlps)

    def _every(self) -> Iterator[Candidate]:
        attentions, mlps = self.members
        first = combinations(range(len(attentions)), self.removed_attentions)
        if self.whole_blocks:
            yield from (self.removing(chosen, chosen) for chosen in first)
            return
        second = list(combinations(range(len(mlps)), self.removed_mlps))
        yield from (self.removing(ours, theirs) for ours, theirs in product(first, second))

    def _drawn(self, random: Random) -> Candidate:
        attentions = shuffled(random, range(len(self.attentions)))[: self.removed_attentions]
        if self.whole_blocks:
            return self.removing(attentions, attentions)
        return self.removing(attentions, shuffled(random, range(len(self.mlps)))[: self.removed_mlps])

    def removing(self, attentions: Iterable[int], mlps: Iterable[int]) -> Candidate:
        """The candidate that removes these attentions and MLPs, by their numbers among their kind."""
        places = self.members
        gone = {places[0][index] for index in attentions} | {places[1][index] for index in mlps}
        return tuple(int(index in gone) for index in range(len(self.names)))

    def switch(self, candidate: Candidate, random: Random) -> Candidate | None:
        kind = pick(random, (0, 1))
        if kind == 1 and self.whole_blocks:
            return candidate
        gone = [index for index, place in enumerate(self.members[kind]) if candidate[place]]
        kept = [index for index, place in enumerate(self.members[kind]) if not candidate[place]]
        if not gone or not kept:
            return candidate
        return self._exchanged(candidate, kind, pick(random, gone), pick(random, kept))

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        for kind in range(1 if self.whole_blocks else 2):
            places = self.members[kind]
            gone = [index for index, place in enumerate(places) if candidate[place]]
            kept = [index for index, place in enumerate(places) if not candidate[place]]
            yield from (self._exchanged(candidate, kind, *pair) for pair in product(gone, kept))

    def _exchanged(self, candidate: Candidate, kind: int, back: int, away: int) -> Candidate:
        kinds = (0, 1) if self.whole_blocks else (kind,)
        changes = {self.members[each][back]: 0 for each in kinds} | {
            self.members[each][away]: 1 for each in kinds
        }
        return replaced(candidate, changes)

    def spent(self, candidate: Candidate) -> dict[str, int]:
        attentions, mlps = self.members
        return {
            "attentions": sum(candidate[index] for index in attentions),
            "mlps": sum(candidate[index] for index in mlps),
        }

    def furthest(self) -> int:
        return 2 * self.most_switches * (2 if self.whole_blocks else 1)

    def check_levels(self, candidate: Candidate) -> None:
        self._check_length(candidate)
        if set(candidate) - {0, 1}:
            raise AssayError(
                f"a sub-block is kept (0) or removed (1); a candidate says {listed(set(candidate))}."
            )
        attentions, mlps = ([candidate[index] for index in places] for places in self.members)
        if self.whole_blocks and attentions != mlps:
            raise AssayError("a candidate removes an attention without its MLP; blocks go as a whole here.")

    def check(self, candidate: Candidate) -> None:
        self.check_levels(candidate)
        wanted = {"attentions": self.removed_attentions, "mlps": self.removed_mlps}
        if self.spent(candidate) != wanted:
            raise AssayError(f"a candidate removes {self.spent(candidate)}, and the budget is {wanted}.")

    def assignment(self, candidate: Candidate) -> dict[str, str]:
        return {name: "removed" if gone else "kept" for name, gone in zip(self.names, candidate, strict=True)}


def share_of(share: float, count: int, kind: str) -> int:
    """How many of ``count`` a share stands for. AssayError where that is no whole number, none or all of them."""
    wanted = round(share * count)
    if abs(share - wanted / count) > SAME_SHARE:
        low = int(share * count)
        near = [f"{number / count:.6g} ({number})" for number in (low, low + 1) if 0 < number < count]
        raise AssayError(
            f"sparsity={share:g} cannot be met exactly: of {count} {kind} blocks it is {share * count:g}. "
            f"Write {' or '.join(near) if near else 'another one: one block is all there is'}."
        )
    if not 0 < wanted < count:
        raise AssayError(
            f"sparsity={share:g} removes {'all' if wanted else 'none'} of {count} {kind} blocks: "
            f"write one between {1 / count:.6g} (1) and {(count - 1) / count:.6g} ({count - 1})."
        )
    return wanted


def sub_blocks(model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Full names of the attention and of the MLP sub-blocks a decoder has, in order.

    Raises:
        AssayError: no decoder with a list of layers, or none of its layers has a ``self_attn`` or ``mlp``.
    """
    from methods.prune._walk import decoder_layers

    layers = decoder_layers(model)
    prefix = next(name for name, part in model.named_modules() if part is layers)
    attentions, mlps = (
        tuple(
            f"{prefix}.{index}.{kind}"
            for index, layer in enumerate(layers)
            if getattr(layer, kind, None) is not None
        )
        for kind in ("self_attn", "mlp")
    )
    if not attentions or not mlps:
        raise AssayError(
            f"{type(model).__name__} has no sub-blocks that can be removed: its layers were searched for modules "
            "named self_attn and mlp."
        )
    return attentions, mlps


def _block(name: str) -> int:
    """The number of the block a sub-block is in."""
    return int(name.split(".")[-2])


def _running_order(name: str) -> tuple[int, bool]:
    """Where a sub-block runs: its block's number, attention first."""
    return _block(name), name.endswith(".mlp")
