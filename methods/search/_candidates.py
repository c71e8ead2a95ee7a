"""Scores the candidates of a search: few swaps, and nothing is computed twice that has been computed already.

A candidate is a tuple of levels, one for each unit, ordered as the units run. Candidates of one batch are scored in an
order in which each shares as long a beginning as possible with the one before, and among those the one with the fewest
changed layers comes first (greedy nearest neighbour). Whatever lies before the first difference has the same hidden
states bit for bit, so they are kept, site by site, and the next candidate starts there. In that order every beginning
that several candidates share, such as that of the parent, is run once. Where the hidden states of a batch would take
too much memory (the last stages of a large model) each candidate is run as a whole and ordered by changed layers alone.

A candidate is put into the model in place: the layers whose level differs from the loaded one are overwritten, and
only they. There is no second copy of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from methods.search._fitness import (
    COMPARE,
    MOST_READY_BYTES,
    Padded,
    Piece,
    Sequences,
    Target,
    Targets,
    draw,
    finished,
    hidden_error,
    padded,
    parts,
    refuse_empty,
    tokens_at_once,
    wanted,
)
from methods.stage import AssayError

if TYPE_CHECKING:
    from random import Random

    import numpy
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Database
    from methods.search._runner import Prepared, Runner

# Hidden states that are kept between candidates may take so many bytes, and the same share of the model's size.
KEPT_BYTES, KEPT_SHARE = 2**26, 0.125

Levels = tuple[str, ...]


# --- putting a candidate into the model -------------------------------------------------------------------------------


class Carrier(Protocol):
    """What puts levels into a model. ``sites`` is where each unit runs, ascending; ``loaded`` is what is in it now."""

    sites: tuple[int, ...]
    loaded: Levels

    def levels(self, assignment: Mapping[str, str]) -> Levels:
        """An assignment's levels in the order of the units."""

    def load(self, levels: Levels) -> int:
        """Put them in; returns how many units have changed."""

    def runs(self, site: int) -> bool:
        """Whether a site does anything."""


class _Units:
    """The order of the units, and which levels are loaded (empty strings: nothing yet, the dense model)."""

    def __init__(self, named: Mapping[str, int]) -> None:
        self.names = tuple(sorted(named, key=lambda name: named[name]))
        self.sites = tuple(named[name] for name in self.names)
        self.loaded: Levels = ("",) * len(self.names)

    def levels(self, assignment: Mapping[str, str]) -> Levels:
        return tuple(assignment[name] for name in self.names)

    def _changes(self, levels: Levels) -> list[int]:
        pairs = enumerate(zip(self.loaded, levels, strict=True))
        return [place for place, (old, new) in pairs if old != new]


class Swaps(_Units):
    """Puts the levels of a database into the linear layers of a model, in place."""

    def __init__(self, model: PreTrainedModel, database: Database, runner: Runner) -> None:
        super().__init__({unit.name: runner.site_of(unit.name) for unit in database.units})
        self.database = database
        self._weights = [model.get_parameter(f"{name}.weight") for name in self.names]

    def load(self, levels: Levels) -> int:
        """Overwrite the layers whose level differs; returns how many they are."""
        import torch

        changes = self._changes(levels)
        with torch.inference_mode():
            for place in changes:
                self._weights[place].copy_(self.database.weight(self.names[place], levels[place]))
        self.loaded = levels
        return len(changes)

    def runs(self, site: int) -> bool:
        return True


class Removals(_Units):
    """Leaves out the attention and MLP sub-blocks that are removed: what is not run costs nothing."""

    def __init__(self, runner: Runner) -> None:
        refuse_whole_blocks(runner)
        super().__init__({site.name: index for index, site in enumerate(runner.sites)})
        self.loaded = ("kept",) * len(self.names)

    def load(self, levels: Levels) -> int:
        """Remember what is removed; returns how many sub-blocks have changed."""
        changes = len(self._changes(levels))
        self.loaded = levels
        return changes

    def runs(self, site: int) -> bool:
        return self.loaded[site] != "removed"


def refuse_whole_blocks(runner: Runner) -> None:
    """Raise an AssayError where attention and MLP cannot be run apart."""
    from methods.search._runner import HALVES

    if any(not site.kind for site in runner.sites):
        raise AssayError(
            f"sub-blocks can be removed from decoders whose blocks are a norm and attention, then a norm and an MLP; "
            f"those of a {type(runner.model).__name__} are not: looked for {', '.join(sorted(HALVES))}."
        )


# --- the order of a batch's candidates --------------------------------------------------------------------------------


def shared(one: Levels, other: Levels, sites: Sequence[int], count: int) -> int:
    """How many of ``count`` sites, from the first, two candidates run in the same way."""
    for place, (ours, theirs) in enumerate(zip(one, other, strict=True)):
        if ours != theirs:
            return sites[place]
    return count


def order(candidates: Sequence[Levels], loaded: Levels, sites: Sequence[int], reuse: bool) -> list[int]:
    """Indices of the candidates in the order they are scored in, starting nearest to what is loaded.

    Nearest: the longest shared beginning where hidden states are kept (``reuse``), then the fewest changed layers, then
    the first. Each step takes the nearest of what is left.
    """
    import numpy

    table = _numbered([loaded, *candidates])
    # Shared beginnings in sites; no difference at all counts as one site more than there are.
    ends = numpy.append(numpy.asarray(sites), max(sites) + 1)
    left, at, found = numpy.arange(1, len(table)), 0, []
    while len(left):
        differs = table[left] != table[at]
        changed = differs.sum(1)
        begun = ends[_first(differs)] if reuse else numpy.zeros(len(left), dtype=int)
        place = int(numpy.lexsort((left, changed, -begun))[0])
        at = int(left[place])
        found.append(at - 1)
        left = numpy.delete(left, place)
    return found


def _numbered(rows: Sequence[Levels]) -> numpy.ndarray:
    """The same table with numbers for level names."""
    import numpy

    numbers: dict[str, int] = {}
    return numpy.array([[numbers.setdefault(level, len(numbers)) for level in row] for row in rows])


def _first(differs: numpy.ndarray) -> numpy.ndarray:
    """The first true column of each row; one past the last where there is none."""
    import numpy

    return numpy.where(differs.any(1), differs.argmax(1), differs.shape[1])


# --- scoring ----------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What scoring has cost: tokens of candidates, layers swapped, sites run and sites whose states were there."""

    tokens: int = 0
    candidates: int = 0
    changed: int = 0
    run: int = 0
    reused: int = 0


@dataclass
class _Micro:
    """A batch with what all candidates share, and the hidden states of the last candidate behind each site."""

    batch: Padded
    prepared: Prepared
    places: Tensor
    ready: tuple[Target, Tensor | None] | None
    # states[k] enters site k; with them the sum of the errors of the blocks before.
    states: list[Tensor] = field(default_factory=list)
    errors: list[Tensor | float] = field(default_factory=list)


class Batch:
    """Pieces of sequences, padded and ready for every candidate of a stage."""

    def __init__(
        self, runner: Runner, targets: Targets, sequences: Sequences, pieces: Sequence[Piece]
    ) -> None:
        self.tokens = sum(piece.length for piece in pieces)
        self.positions = sum(map(sequences.counted, pieces))
        refuse_empty(self.positions)
        where = runner.model.device
        self.targets, self.where = targets, where
        keep = self._bytes(runner) <= MOST_READY_BYTES
        self.micro = [
            self._micro(runner, batch, keep)
            for batch in padded(sequences, pieces, tokens_at_once(where))
            if len(batch.rows)
        ]

    @classmethod
    def of(cls, runner: Runner, targets: Targets, sequences: Sequences) -> Batch:
        """All sequences."""
        import torch

        with torch.inference_mode():
            return cls(runner, targets, sequences, sequences.whole())

    def _bytes(self, runner: Runner) -> int:
        """Roughly what targets that are ready take: logarithms, probabilities, and words as 64-bit numbers."""
        targets = self.targets
        width = 0 if targets.log is None else targets.log.shape[1] * (8 if targets.words is None else 16)
        blocks = len(runner.layers) * runner.model.config.hidden_size * runner.model.dtype.itemsize
        return self.positions * (width + (blocks if targets.blocks is not None else 0))

    def _micro(self, runner: Runner, batch: Padded, keep: bool) -> _Micro:
        ready = self._made(batch) if keep else None
        return _Micro(batch, runner.prepare(batch.ids), batch.places.to(self.where), ready)

    def _made(self, batch: Padded) -> tuple[Target, Tensor | None]:
        return self.targets.at(batch, self.where), self.targets.blocks_at(batch, self.where)

    def target(self, micro: _Micro) -> tuple[Target, Tensor | None]:
        """What a batch's positions, and the blocks there, are compared with."""
        return micro.ready or self._made(micro.batch)

    def state_bytes(self) -> int:
        """The size of one site's hidden states."""
        return sum(micro.prepared.hidden.nbytes for micro in self.micro)


class Scorer:
    """Scores candidates by how far they make the model from the dense one."""

    def __init__(self, runner: Runner, carrier: Carrier, targets: Targets, sequences: Sequences) -> None:
        self.runner, self.carrier, self.targets, self.sequences = runner, carrier, targets, sequences
        self.counts = Counts()
        model_bytes = sum(weight.nbytes for weight in runner.model.parameters())
        self.kept_bytes = KEPT_BYTES + int(KEPT_SHARE * model_bytes)

    def batch(self, random: Random, tokens: int) -> Batch:
        """A new batch of exactly so many tokens."""
        import torch

        with torch.inference_mode():
            return Batch(
                self.runner, self.targets, self.sequences, draw(random, self.sequences.lengths, tokens)
            )

    def score(
        self, assignments: Sequence[Mapping[str, str]], batch: Batch, reuse: bool = True
    ) -> list[float]:
        """The fitness of each candidate on one batch, in the order given; no number at all counts as infinite.

        Args:
            reuse: start where a candidate first differs from the one before (the result is the same bit for bit).
        """
        import torch

        candidates = [self.carrier.levels(assignment) for assignment in assignments]
        count = len(self.runner.sites)
        reuse = reuse and batch.state_bytes() * (count + 1) <= self.kept_bytes
        found = [0.0] * len(candidates)
        before: Levels | None = None
        with torch.inference_mode():
            for index in order(candidates, self.carrier.loaded, self.carrier.sites, reuse):
                levels = candidates[index]
                begun = (
                    shared(before, levels, self.carrier.sites, count) if before is not None and reuse else 0
                )
                self.counts.changed += self.carrier.load(levels)
                found[index] = self._fitness(batch, begun, reuse)
                before = levels
        for micro in batch.micro:
            micro.states, micro.errors = [], []
        self.counts.candidates += len(candidates)
        self.counts.tokens += len(candidates) * batch.tokens
        return found

    def _fitness(self, batch: Batch, begun: int, reuse: bool) -> float:
        """The fitness of what is loaded; the states of the first ``begun`` sites are there."""
        total = sum(float(self._total(batch, micro, begun, reuse)) for micro in batch.micro)
        self.counts.run += len(self.runner.sites) - begun
        self.counts.reused += begun
        return finished(self.targets.kind, total, batch.positions)

    def _total(self, batch: Batch, micro: _Micro, begun: int, reuse: bool) -> Tensor:
        """The sum over the positions of one padded batch."""
        target, blocks = batch.target(micro)
        hidden, error = self._run(micro, blocks, begun, reuse)
        hidden = wanted(hidden, micro.places)
        total: Tensor | float = error
        for part in parts(len(micro.places), int(self.runner.model.config.vocab_size)):
            total = total + COMPARE[self.targets.kind](self.runner.logits(hidden[part]), target.rows(part))
        return total  # type: ignore[return-value]

    def _run(
        self, micro: _Micro, blocks: Tensor | None, begun: int, reuse: bool
    ) -> tuple[Tensor, Tensor | float]:
        """Hidden states behind the last site, and the mean error of the blocks, from site ``begun`` on."""
        del micro.states[begun + 1 :], micro.errors[begun + 1 :]
        hidden = micro.states[begun] if begun else micro.prepared.hidden
        error: Tensor | float = micro.errors[begun] if begun else 0.0
        if reuse and not begun:
            micro.states, micro.errors = [hidden], [0.0]
        for index in range(begun, len(self.runner.sites)):
            if self.carrier.runs(index):
                hidden = self.runner.step(index, hidden, micro.prepared.settings)
            site = self.runner.sites[index]
            if blocks is not None and site.ends_block:
                here = hidden_error(wanted(hidden, micro.places), blocks[site.block])
                error = error + here / len(blocks)
            if reuse:
                micro.states.append(hidden)
                micro.errors.append(error)
        return hidden, error
