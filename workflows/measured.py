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
from workflows import chance, curves

COSTS = ("energy", "time", "memory")
NOT_REACHED = "level not reached"
_LEVEL = re.compile(r"curve\.(?P<term>[^@]+)@(?P<at>[^=]+)=(?P<level>.+)")
_CURVES = ("chain", "label", "model_id", "seed", "method", "step", "term", "value")
_JOBS = (
    "id",
    "kind",
    "label",
    "method",
    "status",
    "energy_kwh",
    "energy_source",
    "update_lost_in_saving",
    "stale",
    "chains",
)


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
        names = _source_names(folders)
        tables = {name: [] for name in ("results", "jobs", "curves")}  # type: dict[str, list[pd.DataFrame]]
        for folder, source in zip(folders, names, strict=True):
            tables["results"].append(read_rows(folder / "results.csv").assign(source=source))
            tables["jobs"].append(_optional(folder / "jobs.csv", _JOBS).assign(source=source))
            tables["curves"].append(_curves(folder / "curves.csv").assign(source=source))
        frames = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
        experiments = {name: _experiment(folder) for folder, name in zip(folders, names, strict=True)}
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
        rows = run.rows[run.rows["entry"] == column.entry]
        wanted = rows[(rows["metric"] == column.metric) & (rows["task"] == column.task)]
        there = wanted[(wanted["status"] == "ok") & wanted["value"].notna()]
        about = rows["metric"].isin(["", column.metric]) & rows["task"].isin(["", column.task])
        lost = rows[(rows["status"] != "ok") & (about | rows["entry"].isin(COSTS))]
        if rows.empty and not (run.rows["status"] == "ok").any():
            lost = run.rows
        samples: dict[str, Sample] = {}
        for row in there.to_dict("records"):
            stderr = None if math.isnan(row["stderr"]) else row["stderr"]
            samples.setdefault(_identity(row), Sample(row["seed"], _identity(row), row["value"], stderr))
        return Cell(tuple(samples.values()), _statuses(lost), tuple(dict.fromkeys(there["unit"])))


def names_chain(word: str, run: ChainRun) -> bool:
    """Whether a word is the chain's name, its family's name, or a pattern on its name or label."""
    return word in (run.name, run.group) or fnmatchcase(run.label, word) or fnmatchcase(run.name, word)


# --- reading ----------------------------------------------------------------------------------------------


def read_rows(path: Path) -> pd.DataFrame:
    """A results table: text columns as text, ``value`` and ``stderr`` as numbers (nan where empty)."""
    if not path.is_file():
        raise AssayError(f"{path}: there is no such results table; draw a report from a folder that has one.")
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    needed = ("chain", "label", "seed", "evaluation", "entry", "task", "metric", "value", "status")
    lacking = [name for name in needed if name not in frame]
    if lacking:
        raise AssayError(f"{path}: this is no results table; it has no column {', '.join(lacking)}.")
    for name in (
        "experiment",
        "model_id",
        "score_id",
        "base",
        "family",
        "method",
        "options",
        "swept",
        "unit",
        "better",
        "stderr",
    ):
        if name not in frame:
            frame[name] = ""
    for name in ("value", "stderr"):
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    return frame


def _optional(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    """A table that an interrupted experiment may not have yet."""
    empty = not path.is_file() or path.stat().st_size < 2
    frame = pd.DataFrame() if empty else pd.read_csv(path, dtype=str, keep_default_na=False)
    for name in needed:
        if name not in frame:
            frame[name] = pd.Series([""] * len(frame), dtype=object)
    return frame


def _curves(path: Path) -> pd.DataFrame:
    frame = _optional(path, _CURVES)
    for name in ("step", "value"):
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    return frame


def _experiment(folder: Path) -> dict[str, Any]:
    path = folder / "experiment.json"
    try:
        experiment = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssayError(
            f"{path}: there is no such file; a report needs the resolved experiment beside results.csv."
        ) from None
    except json.JSONDecodeError as error:
        raise AssayError(f"{path}: this is no JSON (line {error.lineno}).") from None
    return dict(experiment)


def _source_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with their parents' where two are called the same."""
    paths = [Path(folder).resolve() for folder in folders]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    if len(set(paths)) < len(paths):
        raise AssayError("The same results folder is given twice.")
    return ["/".join(path.parts[-depth:]) for path in paths]


def _mapping(text: str) -> dict[str, Any]:
    return dict(json.loads(text)) if text else {}


# --- references -------------------------------------------------------------------------------------------


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


def _statuses(rows: pd.DataFrame) -> dict[str, int]:
    seeds = rows[["seed", "status"]].drop_duplicates()
    return dict(sorted(Counter(seeds["status"]).items()))


# --- curves ---------------------------------------------------------------------------------------------


def _curve_cell(run: ChainRun, column: Column) -> Cell:
    """One sample for every distinct run that reaches the level; the others say that they do not."""
    if not {column.metric, column.at} <= set(run.curves["term"]):
        scored = (run.rows["status"] == "ok").any()
        return Cell() if scored else Cell(statuses=_statuses(run.rows))
    samples, unreached = [], 0
    for seed, model, rows in distinct_curves(run):
        value = curves.value_at_level(rows, column.metric, column.at, column.level)
        unreached += value is None
        samples += [] if value is None else [Sample(seed, model, value)]
    return Cell(tuple(samples), {NOT_REACHED: unreached} if unreached else {})


def distinct_curves(run: ChainRun) -> list[tuple[str, str, pd.DataFrame]]:
    """(seed, model id, rows) of every distinct model of the chain: the curve of its last stage."""
    first = run.curves.drop_duplicates("model_id")
    own = run.curves
    return [(seed, model, own[(own["model_id"] == model) & (own["seed"] == seed)])
            for seed, model in zip(first["seed"], first["model_id"], strict=True)]  # fmt: skip
