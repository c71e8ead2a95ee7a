"""What an experiment measured, as the report reads it: rows, jobs, curves and the resolved experiment.

``Measured.read(folders)`` holds one or several result folders; a chain is always one chain of one folder.
``columns`` resolves ``forget10.model_utility``, ``tasks.authors_retain.acc`` or
``curve.probe.retain@probe.forget=2``; ``cell`` gives a chain's distinct results for a column.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from methods.stage import AssayError
from workflows import chance
from workflows.curves import Line, lines, value_at_level
from workflows.reading import read_curves, read_experiment, read_jobs, read_rows, source_names

COSTS = ("energy", "time", "memory")
NOT_REACHED = "level not reached"
_LEVEL = re.compile(r"curve\.(?P<term>[^@]+)@(?P<at>[^=]+)=(?P<level>.+)")


@dataclass(frozen=True)
class Sample:
    """One distinct result: its number, and the item-level standard error where the evaluation gives one."""

    seed: str
    id: str
    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Cell:
    """All distinct results of one chain in one column, and the statuses of those that are not there."""

    samples: tuple[Sample, ...] = ()
    statuses: Mapping[str, int] = field(default_factory=dict)
    units: tuple[str, ...] = ()

    @property
    def values(self) -> list[float]:
        return [sample.value for sample in self.samples]

    @property
    def by_seed(self) -> dict[str, float]:
        return {sample.seed: sample.value for sample in self.samples}

    @property
    def n(self) -> int:
        return len(self.samples)

    @property
    def mean(self) -> float:
        return chance.mean(self.values)

    @property
    def sd(self) -> float:
        return chance.sample_sd(self.values)

    @property
    def known(self) -> bool:
        """Whether anything is known here: a number, or why there is none."""
        return bool(self.samples or self.statuses)


@dataclass(frozen=True)
class Column:
    """One measured quantity. ``at`` and ``level`` are set for a curve read where another term has a level."""

    name: str
    entry: str
    task: str
    metric: str
    better: str = ""
    unit: str = ""
    at: str = ""
    level: float = math.nan

    @property
    def is_cost(self) -> bool:
        return self.entry in COSTS


@dataclass(frozen=True)
class Curve:
    """What one model's last stage logged, by term."""

    seed: str
    model_id: str
    lines: Mapping[str, Line]


@dataclass(frozen=True)
class ChainRun:
    """One chain of one folder: name, label, method of the last stage, swept options, rows by seed."""

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

    @property
    def key(self) -> tuple[str, str]:
        return self.source, self.name

    @property
    def group(self) -> str:
        """The chain's name without the member's sweep: ``pruned`` of ``pruned[sparsity=0.5]``."""
        return self.name.partition("[")[0]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The rows as plain mappings."""
        return [{str(key): value for key, value in row.items()} for row in self.rows.to_dict("records")]

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
        first = rows.iloc[0]
        curves = self.curves[(self.curves["source"] == source) & (self.curves["chain"] == name)]
        return ChainRun(source, name, first["label"], first["method"], first["family"], first["base"],
                        _mapping(first["swept"]), _mapping(first["options"]), rows, curves)  # fmt: skip

    def chosen(self, of: Sequence[str] | None) -> list[ChainRun]:
        """The chains that ``of`` names (names, families or patterns); all of them without it."""
        if of is None:
            return self.chains
        return [run for run in self.chains if any(names_chain(word, run) for word in of)]

    def shown_name(self, run: ChainRun) -> str:
        """The chain's name, with its folder where there are several."""
        return run.name if len(self.experiments) == 1 else f"{run.source}: {run.name}"

    # - columns and cells

    def columns(self, reference: str) -> list[Column]:
        """Every measured quantity a reference means: several where it leaves the task open.

        Raises:
            AssayError: nothing of that name was measured; names the nearest that was.
        """
        if reference.startswith("curve."):
            return [_curve_column(reference)]
        head, _, rest = reference.partition(".")
        scored = self.results[self.results["metric"] != ""]
        for owner in ("entry", "evaluation"):
            found = _matching(scored[scored[owner] == head], rest)
            if found:
                return found
        near = difflib.get_close_matches(reference, self._references, 1, 0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise AssayError(f"No row of results.csv is called {reference}.{hint}")

    @cached_property
    def _references(self) -> list[str]:
        keys = self.results[["entry", "task", "metric"]].drop_duplicates().itertuples(index=False)
        return sorted({f"{entry}.{metric}" for entry, _, metric in keys if metric})

    def cell(self, run: ChainRun, column: Column) -> Cell:
        """The chain's distinct results in a column."""
        if column.at:
            return _curve_cell(run, column)
        rows = [row for row in run.records if row["entry"] == column.entry]
        about = [row for row in rows if _is_about(row, column)]
        lost = [row for row in about if row["status"] != "ok"] if rows or run.has_numbers else run.records
        there = [row for row in about if row["status"] == "ok" and row["metric"] == column.metric]
        samples: dict[str, Sample] = {}
        for row in there:
            samples.setdefault(_identity(row), _sample(row))
        return Cell(
            tuple(samples.values()), _statuses(lost), tuple(dict.fromkeys(row["unit"] for row in there))
        )


def names_chain(word: str, run: ChainRun) -> bool:
    """Whether a word is the chain's name, its family's name, or a pattern on its name or label."""
    return word in (run.name, run.group) or fnmatchcase(run.label, word) or fnmatchcase(run.name, word)


# --- references -------------------------------------------------------------------------------------------


def _mapping(text: str) -> dict[str, Any]:
    return dict(json.loads(text)) if text else {}


def _matching(rows: pd.DataFrame, rest: str) -> list[Column]:
    """Columns for ``metric`` or ``task.metric``; a task may be given without its settings."""
    frame = rows[["entry", "task", "metric", "better", "unit"]].drop_duplicates(["entry", "task", "metric"])
    keys = frame.to_dict("records")
    exact = [key for key in keys if rest in (key["metric"], f"{key['task']}.{key['metric']}")]
    loose = [
        key for key in keys if any(rest == f"{task}.{key['metric']}" for task in _short_tasks(key["task"]))
    ]
    chosen = exact or loose
    return [_column(key, alone=len(chosen) == 1, asked=rest) for key in chosen]


def _short_tasks(task: str) -> list[str]:
    """``wikitext2/test(context=512)`` may be called ``wikitext2/test`` or ``wikitext2``."""
    ends = [match.start() for match in re.finditer(r"[^\w-]", task)]
    return [task[:end] for end in ends]


def _column(key: dict[str, Any], *, alone: bool, asked: str) -> Column:
    name = f"{key['entry']}.{asked}" if alone else f"{key['entry']}.{key['task']}.{key['metric']}"
    return Column(name, key["entry"], key["task"], key["metric"], key["better"], key["unit"])


def _curve_column(reference: str) -> Column:
    match = _LEVEL.fullmatch(reference)
    try:
        level = float(match["level"]) if match else math.nan
    except ValueError:
        level = math.nan
    if match is None or not math.isfinite(level):
        raise AssayError(
            f"{reference}: write a matched level as curve.TERM@TERM=LEVEL, e.g. curve.probe.retain@probe.forget=2."
        )
    return Column(reference, "curve", "", match["term"], at=match["at"], level=level)


def _identity(row: Mapping[str, Any]) -> str:
    """What makes a result distinct: the score, or the model for its stage's and chain's cost."""
    per_model = row["evaluation"] in COSTS and not row["metric"].startswith("score_")
    identity = row["model_id"] if per_model else row["score_id"] or row["model_id"]
    return str(identity or f"seed {row['seed']}")


def _is_about(row: Mapping[str, Any], column: Column) -> bool:
    """Whether a row of the column's entry has its number, or says why there is none."""
    if row["status"] == "ok":
        return bool(
            row["metric"] == column.metric and row["task"] == column.task and not math.isnan(row["value"])
        )
    return column.is_cost or (row["metric"] in ("", column.metric) and row["task"] in ("", column.task))


def _sample(row: Mapping[str, Any]) -> Sample:
    stderr = None if math.isnan(row["stderr"]) else row["stderr"]
    return Sample(row["seed"], _identity(row), row["value"], stderr)


def _statuses(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many seeds ended in which way."""
    return dict(
        sorted(Counter(status for _, status in {(row["seed"], row["status"]) for row in rows}).items())
    )


# --- curves ---------------------------------------------------------------------------------------------


def _curve_cell(run: ChainRun, column: Column) -> Cell:
    """One sample for every distinct run that reaches the level; the others say that they do not."""
    if not {column.metric, column.at} <= run.terms:
        return Cell() if run.has_numbers else Cell(statuses=_statuses(run.records))
    samples, unreached = [], 0
    for curve in run.distinct_curves:
        value = value_at_level(curve.lines, column.metric, column.at, column.level)
        unreached += value is None
        samples += [] if value is None else [Sample(curve.seed, curve.model_id, value)]
    return Cell(tuple(samples), {NOT_REACHED: unreached} if unreached else {})
