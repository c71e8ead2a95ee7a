"""The evolutionary search that EvoPress and Tyr share: children, stages of selection, elitism, and a state to resume.

Sieberling et al. 2024, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search" (arXiv 2410.14649). In
every generation

    children   distinct mutations of the parent (of a parent drawn uniformly, where there are several)
    stages     each scores what is left on one new batch of exactly ``tokens`` tokens and keeps its ``survivors`` best
    elitism    the parents join in the last stage
    parents    the best of the last stage

The official code (IST-DASLab/EvoPress) lets the parent join in every stage that keeps as many as the last one; here it
is the last stage by its place. Its loops may never end; here draws are counted, and a sentence says what was asked for
and what there is. A fitness that is no number counts as infinite and never survives by its place in a list.

The parent is scored on a new batch every generation, so fitnesses of different generations are not comparable and
their curve need not fall. What is comparable is the parent on one held-out batch that never changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from methods.progress import derive_seed
from methods.search._candidates import Counts
from methods.stage import AssayError, NotFinite

if TYPE_CHECKING:
    from methods.progress import Progress, State
    from methods.search._candidates import Batch, Scorer
    from methods.search._spaces import Candidate, Space

# Draws for each child that is asked for before a generation gives up.
MOST_DRAWS = 1000
COLUMNS = (
    "generation", "stage", "tokens", "candidates", "survivors", "best", "parent", "changed_layers", "reused",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a search does. ``start`` is (candidates, tokens) of the initial scoring, where a start has to be found."""

    name: str
    generations: int
    children: int
    survivors: tuple[int, ...]
    tokens: tuple[int, ...]
    parents: int = 1
    start: tuple[int, int] | None = None
    score_every: int = 10


@dataclass
class Log:
    """What is written about a search: rows of fitness.csv, points of curve.csv, and the tokens that were forwarded."""

    rows: list[list[Any]] = field(default_factory=list)
    curve: list[tuple[int, str, float]] = field(default_factory=list)
    tokens: int = 0

    def text(self) -> str:
        """``fitness.csv``, every digit of a number; a cell is empty where there is none."""
        lines = [",".join("" if cell is None else repr(cell) for cell in row) for row in self.rows]
        return "\n".join([",".join(COLUMNS), *lines]) + "\n"

    def values(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"rows": self.rows, "curve": self.curve, "tokens": self.tokens}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Log:
        """The inverse of ``values``."""
        curve = [(int(step), str(term), float(value)) for step, term, value in values["curve"]]
        return cls([list(row) for row in values["rows"]], curve, int(values["tokens"]))


class Evolution:
    """One search, as far as it has come: ``generation`` of them are done, and ``parents`` is what they have left.

    Args:
        holdout: scores a candidate on the held-out batch; None where there is none.
    """

    def __init__(
        self,
        settings: Settings,
        space: Space,
        scorer: Scorer,
        progress: Progress,
        holdout: Callable[[Mapping[str, str]], float] | None = None,
    ) -> None:
        self.settings, self.space, self.scorer, self.progress = settings, space, scorer, progress
        self.holdout = holdout
        self.log = Log()
        self.generation = self.resumed_from = 0
        self.parents: list[Candidate] = []

    def run(self) -> Candidate:
        """All generations that are left; the best parent.

        Raises:
            AssayError: too few distinct children or initial candidates. NotFinite: no candidate has a finite fitness.
        """
        self._resume(self.progress.load())
        if not self.parents:
            self.parents = self._first_parents()
            self._follow(None)
            self._save()
        bar = self.progress.bar(self.settings.generations, "generations", initial=self.generation)
        for generation in bar:
            best = self._evolve(generation)
            self.generation = generation + 1
            self._follow(best)
            self._save()
        return self.parents[0]

    # --- a generation -----------------------------------------------------------------------------------------------

    def _evolve(self, generation: int) -> float:
        """One generation; the fitness of the best parent it leaves."""
        kids = self._children(generation)
        best = math.inf
        last = len(self.settings.tokens) - 1
        for stage, (survivors, tokens) in enumerate(
            zip(self.settings.survivors, self.settings.tokens, strict=True)
        ):
            if stage == last:
                kids += [parent for parent in self.parents if parent not in kids]
            kids, best = self._select(generation, stage, kids, survivors, tokens)
        self.parents = kids[: self.settings.parents]
        return best

    def _select(
        self, generation: int, stage: int, kids: list[Candidate], survivors: int, tokens: int
    ) -> tuple[list[Candidate], float]:
        """The best of one stage on a batch of its own, and the best fitness."""
        before = replace(self.scorer.counts)
        scores = self._scores(kids, self.scorer.batch(self._random("batch", generation, stage), tokens))
        # Equal ones stay in their order: the sort is stable.
        ranked = sorted(range(len(kids)), key=scores.__getitem__)
        kept = ranked[:survivors]
        parents = [scores[place] for place, kid in enumerate(kids) if kid in self.parents]
        numbers = (generation + 1, stage + 1, tokens, len(kids), len(kept))
        self._note(numbers, scores[ranked[0]], min(parents, default=math.inf), before)
        return [kids[place] for place in kept], scores[ranked[0]]

    def _note(self, numbers: tuple[int, ...], best: float, parent: float, before: Counts) -> None:
        """A row of the log: see ``COLUMNS``. ``reused`` is the share of sub-blocks that did not have to be run."""
        now = self.scorer.counts
        run, reused = now.run - before.run, now.reused - before.reused
        share = reused / (run + reused)
        self.log.rows.append([*numbers, _cell(best), _cell(parent), now.changed - before.changed, share])

    def _scores(self, candidates: Sequence[Candidate], batch: Batch) -> list[float]:
        """The fitness of candidates; at least one has to be a number."""
        scores = self.scorer.score([self.space.assignment(candidate) for candidate in candidates], batch)
        self.log.tokens += batch.tokens * len(candidates)
        if not any(map(math.isfinite, scores)):
            raise NotFinite(
                f"{self.settings.name}: the fitness of none of {len(candidates)} candidates is a finite number; look "
                "at the levels, or at the model itself."
            )
        return scores

    def _children(self, generation: int) -> list[Candidate]:
        """Distinct children of the parents, each checked against the budget."""
        wanted = self.settings.children
        if sum(self.space.children(parent, wanted) for parent in self.parents) < wanted:
            raise self._too_few(generation, 0)
        random = self._random("children", generation)
        kids: dict[Candidate, None] = {}
        for child, parent in self._drawn(random):
            if child not in kids and not self.space.refuse(child, parent):
                self.space.check(child)
                kids[child] = None
            if len(kids) == wanted:
                return list(kids)
        raise self._too_few(generation, len(kids))

    def _drawn(self, random: Random) -> Iterator[tuple[Candidate, Candidate]]:
        """Legal children with their parents, in so many draws."""
        for _ in range(MOST_DRAWS * self.settings.children):
            parent = self.parents[int(random.random() * len(self.parents))]
            child = self.space.mutate(parent, random)
            if child is not None:
                yield child, parent

    def _too_few(self, generation: int, found: int) -> AssayError:
        wanted = self.settings.children
        exist = sum(self.space.children(parent, wanted) for parent in self.parents)
        reason = (
            f"more than the {exist} distinct children that exist"
            if exist < wanted
            else f"more than the {found} distinct children that {MOST_DRAWS * wanted:,} draws gave"
        )
        return AssayError(
            f"{self.settings.name}: children={wanted} are {reason} in generation {generation + 1}: ask for fewer, or "
            "build levels that leave more choice."
        )

    # --- the start --------------------------------------------------------------------------------------------------

    def _first_parents(self) -> list[Candidate]:
        candidates = self.space.initial(self._random("initial"))
        if not self.space.needs_start():
            first = [next(candidates)]
            self.space.check(first[0])
            return first
        assert self.settings.start is not None, "a start has to be found, and nothing says how"
        count, tokens = self.settings.start
        drawn = self._initial(candidates, count)
        scores = self._scores(drawn, self.scorer.batch(self._random("batch", "initial"), tokens))
        self._note((0, 1, tokens, len(drawn), self.settings.parents), min(scores), math.inf, Counts())
        ranked = sorted(range(len(drawn)), key=scores.__getitem__)
        return [drawn[place] for place in ranked[: self.settings.parents]]

    def _initial(self, candidates: Iterator[Candidate], count: int) -> list[Candidate]:
        """At most ``count`` distinct candidates: a small space has fewer."""
        found: dict[Candidate, None] = {}
        for _, candidate in zip(range(MOST_DRAWS * count), candidates, strict=False):
            self.space.check(candidate)
            found[candidate] = None
            if len(found) == count:
                break
        if len(found) < self.settings.parents:
            raise AssayError(
                f"{self.settings.name}: {self.settings.parents} parents are wanted (the last of survivors), and only "
                f"{len(found)} initial candidates exist."
            )
        return list(found)

    def _random(self, *parts: int | str) -> Random:
        """A generator made from the seed and these words alone: a resumed search draws what an undisturbed one does."""
        return Random(derive_seed(self.progress.seed, "search", *parts))

    # --- the curve --------------------------------------------------------------------------------------------------

    def _follow(self, best: float | None) -> None:
        """Now and then, and at both ends: the parent's fitness, on the held-out batch too, and the tokens so far."""
        step = self.generation
        if step % self.settings.score_every and step != self.settings.generations:
            return
        if best is not None:
            self.log.curve.append((step, "fitness", best))
        if self.holdout is not None:
            score = self.holdout(self.space.assignment(self.parents[0]))
            if not math.isfinite(score):
                raise NotFinite(
                    f"{self.settings.name}: the fitness on the held-out batch is no finite number after generation "
                    f"{step}; look at the levels, at holdout, or at the model itself."
                )
            self.log.curve.append((step, "holdout", score))
        self.log.curve.append((step, "tokens", float(self.log.tokens)))

    # --- state ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Save the state where it is due."""
        if self.progress.due(self.generation):
            values = {
                "parents": [list(parent) for parent in self.parents],
                "log": self.log.values(),
                "counts": vars(self.scorer.counts),
                "loaded": list(self.scorer.carrier.loaded),
            }
            self.progress.save(self.generation, {}, values)

    def _resume(self, state: State | None) -> None:
        """Go on where an earlier attempt had saved its state, with the model as it was: swaps count alike then."""
        if state is None:
            return
        self.generation = self.resumed_from = state.step
        self.parents = [tuple(map(int, parent)) for parent in state.values["parents"]]
        self.log = Log.of(state.values["log"])
        loaded = tuple(map(str, state.values["loaded"]))
        if any(loaded):
            self.scorer.carrier.load(loaded)
        for name, value in state.values["counts"].items():
            setattr(self.scorer.counts, name, value)


def _cell(score: float) -> float | None:
    """A fitness as it is logged."""
    return score if math.isfinite(score) else None
