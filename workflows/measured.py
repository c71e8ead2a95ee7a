"""What an experiment measured, as the report reads it: rows, jobs, curves and the resolved experiment.

``Measured.read(folders)`` holds one or several result folders; a chain is always one chain of one folder.
``columns`` resolves ``forget10.model_utility``, ``tasks.authors_retain.acc``, ``curve.probe.retain@probe.forget=2``,
``forget10.model_utility@forget10.forget_nll=2``, ``energy.stage_kwh relative to target`` or ``forget10.retain_nll
recovered towards target``; ``cell`` gives a chain's distinct results for a column, and ``trajectories`` everything
measured on the way to them.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from methods.stage import AssayError
from workflows.columns import (
    CLASS_TASK,
    Cell,
    Column,
    Row,
    Sample,
    change,
    has_number,
    is_lost,
    matching,
    sample,
    statuses,
    term,
    won_back,
)
from workflows.curves import Line, lines
from workflows.reading import read_curves, read_experiment, read_jobs, read_rows, source_names
from workflows.recovered import STAGE_ENERGY, each_kilojoule, parent_label
from workflows.recovered import recovered as shares_of
from workflows.relative import changed
from workflows.specs import CURVE, PROFILE, STEP, against, at_level, recovered, relative
from workflows.trajectory import SPENT, Trajectory, trajectories

CLASSES_AT_MOST = 12
"""A column for each of so many classes can still be read beside each other."""
ON_THE_WAY = {key for pair in SPENT.items() for key in pair}


@dataclass(frozen=True)
class Curve:
    """What one model's last stage logged, by term."""

    seed: str
    model_id: str
    lines: Mapping[str, Line]


@dataclass(frozen=True)
class ChainRun:
    """One chain of one folder: name, label, method of the last stage, swept options, rows by seed.

    ``rows`` are those of its end, ``kept`` those of models on the way. A kept model shown by itself is a run of its
    own, ``direct@step40``, whose ``step`` is 40.
    """

    source: str
    name: str
    label: str
    method: str
    family: str
    base: str
    swept: Mapping[str, Any]
    options: Mapping[str, Any]
    rows: pd.DataFrame = field(compare=False, repr=False)
    curves: pd.DataFrame = field(compare=False, repr=False)
    kept: pd.DataFrame = field(compare=False, repr=False)
    step: int | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.source, self.name

    @property
    def group(self) -> str:
        """The chain's name without the member's sweep: ``pruned`` of ``pruned[sparsity=0.5]``."""
        return self.chain.partition("[")[0]

    @property
    def chain(self) -> str:
        """The chain's name, also where this is one of its kept models."""
        return self.name if self.step is None else self.name.removesuffix(f"@step{self.step}")

    @cached_property
    def records(self) -> list[Row]:
        """The rows as plain mappings."""
        return _records(self.rows)

    @cached_property
    def has_numbers(self) -> bool:
        """Whether anything about the chain was measured."""
        return any(row["status"] == "ok" for row in self.records)

    @cached_property
    def distinct_curves(self) -> list[Curve]:
        """The curve of every distinct model of the chain; only its last stage's is in curves.csv."""
        found: dict[str, Curve] = {}
        for (seed, model), rows in self.curves.groupby(["seed", "model_id"], sort=False):
            if model not in found:
                found[model] = Curve(seed, model, lines(rows[["step", "term", "value"]].to_dict("records")))
        return list(found.values())

    @cached_property
    def terms(self) -> set[str]:
        """Everything that any of the chain's curves logged."""
        return {term for curve in self.distinct_curves for term in curve.lines}


@dataclass
class Measured:
    """One or several result folders."""

    results: pd.DataFrame
    jobs: pd.DataFrame
    curves: pd.DataFrame
    experiments: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Measured:
        """Read the four files of every folder. Raises ``AssayError`` naming a missing or broken one."""
        names = source_names(folders)
        tables = {name: [] for name in ("results", "jobs", "curves")}  # type: dict[str, list[pd.DataFrame]]
        for folder, source in zip(folders, names, strict=True):
            tables["results"].append(read_rows(folder / "results.csv").assign(source=source))
            tables["jobs"].append(read_jobs(folder / "jobs.csv").assign(source=source))
            tables["curves"].append(read_curves(folder / "curves.csv").assign(source=source))
        frames = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
        experiments = {name: read_experiment(folder) for folder, name in zip(folders, names, strict=True)}
        return cls(**frames, experiments=experiments)

    @cached_property
    def chains(self) -> list[ChainRun]:
        """Every chain, in the order of its experiment file."""
        runs = []
        for source, experiment in self.experiments.items():
            rows = self.results[self.results["source"] == source]
            words = [*experiment.get("models", {}), *experiment.get("chains", {})]
            declared = {name: place for place, name in enumerate(words)}
            names = list(dict.fromkeys(rows["chain"]))
            names.sort(key=lambda name: declared.get(name.partition("[")[0], len(declared)))
            runs += [self._chain(source, name, rows[rows["chain"] == name]) for name in names]
        return runs

    def _chain(self, source: str, name: str, rows: pd.DataFrame) -> ChainRun:
        ends, kept = rows[rows[STEP] == ""], rows[rows[STEP] != ""]
        # rows of step 0 carry the label and method of the stage before
        first = (ends if len(ends) else kept[kept[STEP] != "0"] if (kept[STEP] != "0").any() else kept).iloc[
            0
        ]
        curves = self.curves[(self.curves["source"] == source) & (self.curves["chain"] == name)]
        return ChainRun(source, name, first["label"], first["method"], first["family"], first["base"],
                        _mapping(first["swept"]), _mapping(first["options"]), ends, curves, kept)  # fmt: skip

    @cached_property
    def with_steps(self) -> list[ChainRun]:
        """Every chain, each behind its kept models as runs of their own."""
        return [each for run in self.chains for each in [*_kept_runs(run), run]]

    def chosen(self, of: Sequence[str] | None) -> list[ChainRun]:
        """The chains that ``of`` names (names, families or patterns); all of them without it.

        Kept models are meant only by words with a step: ``direct@step40``, ``direct@step*``, ``direct@steps`` (all
        of them and the end).
        """
        if of is None:
            return self.chains
        return [run for run in self.with_steps if any(names_chain(word, run) for word in of)]

    def shown_name(self, run: ChainRun) -> str:
        """The chain's name, with its folder where there are several."""
        return run.name if len(self.experiments) == 1 else f"{run.source}: {run.name}"

    # - columns and cells

    def columns(self, reference: str) -> list[Column]:
        """Every measured quantity a reference means: several where it leaves the task open.

        Raises:
            AssayError: nothing of that name was measured; names the nearest that was.
        """
        quantity, chain = against(reference)
        if chain:
            return self._compared(reference, quantity, chain)
        parts = at_level(reference)
        if parts is None and reference == STEP:
            raise AssayError(
                "step has a value at a level only: write step@Y=LEVEL, e.g. step@forget10.forget_nll=2."
            )
        if parts is None:
            return self.along(reference)
        found = self.along(parts[0])
        at = self._where(found[0], parts[1])
        columns = [self.at(column, at, parts[2]) for column in found]
        return columns if len(columns) > 1 else [replace(columns[0], name=reference)]

    def _compared(self, reference: str, quantity: str, chain: str) -> list[Column]:
        """Every quantity that ``quantity`` means, relative to a chain of that name or recovered towards it."""
        if not self.chosen([chain]):
            names = [word for run in self.with_steps for word in (run.name, run.group)]
            near = difflib.get_close_matches(chain, names, 1, 0.6)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise AssayError(f"{reference}: results.csv has no chain {chain}.{hint}")
        parts = recovered(reference)
        if parts is None:
            return [change(column, chain) for column in self.columns(quantity)]
        return [won_back(column, chain, per_kilojoule=parts[2]) for column in self.columns(quantity)]

    def along(self, reference: str) -> list[Column]:
        """What a reference means along a trajectory: rows of results.csv, ``curve.TERM`` or ``step``."""
        if relative(reference) is not None:
            raise AssayError(f"{reference}: a change against a chain is no quantity along a trajectory.")
        if recovered(reference) is not None:
            raise AssayError(
                f"{reference}: what was recovered is known of a chain's end, not along a trajectory."
            )
        if reference == STEP:
            return [Column(STEP, STEP, "", STEP)]
        if reference.startswith(CURVE):
            return [term(reference.removeprefix(CURVE))]
        head, _, rest = reference.partition(".")
        scored = self.results[self.results["metric"] != ""]
        for owner in ("entry", "evaluation"):
            found = matching(scored[scored[owner] == head], rest)
            kind, each = ("profile", "layers") if head == PROFILE else ("plane", "classes")
            if len(found) > CLASSES_AT_MOST and (head == PROFILE or CLASS_TASK.fullmatch(found[0].task)):
                raise AssayError(
                    f"{reference} is measured for {len(found)} {each}; draw a figure of kind {kind}, or name one: "
                    f"{found[0].name}."
                )
            if found:
                return found
        near = difflib.get_close_matches(reference, self._references, 1, 0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise AssayError(f"No row of results.csv is called {reference}.{hint}")

    def _where(self, wanted: Column, reference: str) -> Column:
        """The one quantity behind an @: a term where a curve stands before it, unless no curve logged it."""
        if wanted.is_curve and not reference.startswith(CURVE):
            logged = reference in set(self.curves["term"])
            if logged or reference.partition(".")[0] not in set(self.results["entry"]):
                return term(reference)
        return self.one(reference)

    def one(self, reference: str) -> Column:
        """The one quantity along a trajectory that a reference means."""
        found = self.along(reference)
        if len(found) > 1:
            there = ", ".join(column.name for column in found)
            raise AssayError(f"{reference} is measured on several tasks; name one: {there}.")
        return found[0]

    def at(self, column: Column, at: Column, level: float) -> Column:
        """``column`` where ``at`` first passes ``level``."""
        for each in (column, at):
            if each.is_cost and (each.entry, each.metric) not in ON_THE_WAY:
                there = ", ".join(sorted(".".join(key) for key in ON_THE_WAY))
                raise AssayError(
                    f"{each.name} is not known on the way to a chain's end; these costs are: {there}."
                )
        return replace(column, name=f"{column.name}@{at.name}={level:g}", at=at, level=level)

    @cached_property
    def _references(self) -> list[str]:
        keys = self.results[["entry", "task", "metric"]].drop_duplicates().itertuples(index=False)
        return sorted({f"{entry}.{metric}" for entry, _, metric in keys if metric})

    def cell(self, run: ChainRun, column: Column) -> Cell:
        """The chain's distinct results in a column."""
        if column.towards:
            return self._won_back(run, column)
        if column.absolute is not None:
            base = self._compared_with(run, column.relative_to)
            return (
                changed(self.cell(run, column.absolute), self.cell(base, column.absolute)) if base else Cell()
            )
        if column.at is not None:
            return self._cell_at(run, column)
        known = run.has_numbers or any(row["entry"] == column.entry for row in run.records)
        lost = [row for row in run.records if not known or is_lost(row, column)]
        there = [row for row in run.records if has_number(row, column)]
        samples: dict[str, Sample] = {}
        for each in map(sample, there):
            samples.setdefault(each.id, each)
        units = tuple(dict.fromkeys(row["unit"] for row in there))
        return Cell(tuple(samples.values()), statuses(lost), units)

    def started_from(self, run: ChainRun) -> ChainRun | None:
        """The chain, or the kept model of one, that the run's last stage started from, where it is shown here."""
        label = parent_label(run.label)
        return next(
            (each for each in self.with_steps if each.source == run.source and each.label == label), None
        )

    def _won_back(self, run: ChainRun, column: Column) -> Cell:
        """What the last stage won back; nothing for the intact chain itself and for a model without a stage."""
        assert column.absolute is not None
        aim = self._compared_with(run, column.towards)
        if not parent_label(run.label) or aim is None or aim.key == run.key:
            return Cell()
        start = self.started_from(run)
        broken = self.cell(start, column.absolute) if start else Cell()
        own, intact = self.cell(run, column.absolute), self.cell(aim, column.absolute)
        found = shares_of(own, broken, intact, column.absolute.better)
        return each_kilojoule(found, self.cell(run, STAGE_ENERGY)) if column.per_kilojoule else found

    def _compared_with(self, run: ChainRun, name: str) -> ChainRun | None:
        """The chain of this name in the run's folder; of a swept one, its member with the options of the run."""
        found = [each for each in self.chosen([name]) if each.source == run.source]
        if len(found) > 1:
            own = [each for each in found if each.key == run.key]
            found = own or [each for each in found if each.swept.items() <= run.swept.items()]
        return found[0] if len(found) == 1 else None

    def unrelated(self, runs: Sequence[ChainRun], column: Column) -> list[str]:
        """Sentences about chains for which a relative column has no chain to compare with, or one without numbers."""
        if column.absolute is None:
            return []
        chain = column.relative_to or column.towards
        nothing = "nothing is recovered towards it" if column.towards else "nothing is relative to it"
        pairs = [(run, self._compared_with(run, chain)) for run in runs]
        alone = [self.shown_name(run) for run, base in pairs if base is None]
        empty = {self.shown_name(base): None for _, base in pairs
                 if base and not self.cell(base, column.absolute).samples}  # fmt: skip
        said = [f"{', '.join(alone)}: no one chain here is called {chain}; name one, as in "
                f"{chain}[option=value]."] if alone else []  # fmt: skip
        said += [f"{name} has no {column.absolute.name}: {nothing}." for name in empty]
        return said

    # - trajectories

    def trajectories(self, run: ChainRun) -> list[Trajectory]:
        """One for every distinct result of the chain; none for a kept model shown by itself."""
        if run.step is not None:
            return []
        if run.key not in self._trajectories:
            logged = {each.seed: (each.model_id, each.lines) for each in reversed(run.distinct_curves)}
            found = trajectories(
                run.records, _records(run.kept), logged, lambda name: self._parent(run.source, name)
            )
            self._trajectories[run.key] = found
        return self._trajectories[run.key]

    @cached_property
    def _trajectories(self) -> dict[tuple[str, str], list[Trajectory]]:
        return {}

    def _parent(self, source: str, name: str) -> Sequence[Row]:
        """The rows of the model that a model's last stage started from."""
        return self._by_model.get((source, self._parents.get((source, name), "")), ())

    @cached_property
    def _parents(self) -> dict[tuple[str, str], str]:
        """For every job of every folder the first of its parents."""
        jobs = zip(self.jobs["source"], self.jobs["id"], self.jobs["parents"], strict=True)
        return {(source, name): parents.partition(";")[0] for source, name, parents in jobs if parents}

    @cached_property
    def _by_model(self) -> dict[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        for row in _records(self.results):
            found.setdefault((row["source"], row["model_id"]), []).append(row)
        return found

    def is_scored_between(self, run: ChainRun, column: Column) -> bool:
        """Whether any model that the chain kept on the way has the column's number."""
        ways = self.trajectories(run)
        return any(step in way.kept for way in ways for step, _ in way.line(column))

    def coarse(self, runs: Sequence[ChainRun], columns: Iterable[Column]) -> list[str]:
        """Sentences about scores of which only start and end are known: what is read between is a straight line."""
        scores = dict.fromkeys(each for each in columns if each.is_score)
        found = []
        for column in scores:
            names = [run.name for run in runs if not self.is_scored_between(run, column)
                     and any(len(way.line(column)) > 1 for way in self.trajectories(run))]  # fmt: skip
            if names:
                line = f"{column.name} is read off the straight line from start to end"
                found.append(f"{', '.join(names)}: {line}; nothing between was scored.")
        return found

    def straight(self, runs: Sequence[ChainRun], column: Column) -> list[str]:
        """The same for one column at a level, about those of the chains that have a value there."""
        column = column.absolute or column
        if column.at is None:
            return []
        along = column.at if column.at.is_score else replace(column, at=None)
        return self.coarse([run for run in runs if self.cell(run, column).samples], [along])

    def _cell_at(self, run: ChainRun, column: Column) -> Cell:
        """One sample for every trajectory that reaches the level; the others say why they have none."""
        assert column.at is not None
        found = [each for each in self.trajectories(run) if each.follows(column.at)]
        lost = self._lost_on_the_way(run, column.at, {each.seed for each in found})
        if not any(each.line(column) for each in found):
            return Cell(statuses=lost)
        read = [(each, each.read(column)) for each in found]
        samples = [Sample(each.seed, each.id, value) for each, value in read if not isinstance(value, str)]
        words = Counter(value for _, value in read if isinstance(value, str))
        units = tuple(dict.fromkeys(each.unit(column) for each in found))
        return Cell(tuple(samples), dict(sorted((words + Counter(lost)).items())), units)

    def _lost_on_the_way(self, run: ChainRun, at: Column, found: set[str]) -> dict[str, int]:
        """Why seeds have no trajectory along ``at``: their score or, for a curve, their stage is not there."""
        rows = [row for row in run.records if row["seed"] not in found and row["status"] != "ok"]
        if run.has_numbers:
            stage = at.is_curve and bool(found)
            rows = [row for row in rows if is_lost(row, at) or (stage and row["entry"] == "energy")]
        return statuses(rows)


def names_chain(word: str, run: ChainRun) -> bool:
    """Whether a word is the chain's name, its family's name, or a pattern on its name or label.

    A kept model is meant by a word for its chain with a step behind it.
    """
    head, at, step = word.rpartition("@step")
    if at and _is_called(head, run) and (step == "s" or fnmatchcase(str(run.step), step)):
        return True
    return run.step is None and _is_called(word, run)


def _is_called(word: str, run: ChainRun) -> bool:
    label = run.label if run.step is None else run.label.removesuffix(f"@step{run.step}")
    return word in (run.chain, run.group) or fnmatchcase(label, word) or fnmatchcase(run.chain, word)


def _kept_runs(run: ChainRun) -> list[ChainRun]:
    """The kept models of a chain, each as a run of its own, in order."""
    steps = sorted(map(int, set(run.kept[STEP])))
    return [
        replace(run, name=f"{run.name}@step{step}", label=f"{run.label}@step{step}", step=step,
                rows=run.kept[run.kept[STEP] == str(step)], curves=run.curves.iloc[:0])
        for step in steps
    ]  # fmt: skip


def _records(rows: pd.DataFrame) -> list[Row]:
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


def _mapping(text: str) -> dict[str, Any]:
    return dict(json.loads(text)) if text else {}
