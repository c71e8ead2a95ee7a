"""A measured quantity, its distinct results, and the rows of results.csv that hold it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from workflows import chance
from workflows.specs import COSTS, PER_KILOJOULE, RECOVERED, RELATIVE, STEP

Row = Mapping[str, Any]
CLASS_TASK = re.compile(r"(?:(.*) )?class (\d+)")
"""The task of a number about one class, behind what was measured: ``class_vectors class 3``."""


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
    """One measured quantity; with ``at``, where that other quantity first passes ``level``.

    ``entry`` is ``curve`` for a logged term (its name is ``metric``) and ``step`` for the number of steps. With
    ``relative_to``, the name of a chain, it is the change of ``absolute`` against that chain in percent; with
    ``towards``, what the last stage has won back of ``absolute`` (``per_kilojoule`` of its energy).
    """

    name: str
    entry: str
    task: str
    metric: str
    better: str = ""
    unit: str = ""
    at: Column | None = None
    level: float = math.nan
    relative_to: str = ""
    towards: str = ""
    per_kilojoule: bool = False
    absolute: Column | None = None

    @property
    def is_cost(self) -> bool:
        return self.entry in COSTS

    @property
    def is_curve(self) -> bool:
        return self.entry == "curve"

    @property
    def is_score(self) -> bool:
        """Whether the quantity is known only where a model was scored."""
        return not (self.is_curve or self.is_cost or self.entry == STEP)


def term(name: str) -> Column:
    """The column of a logged term."""
    return Column(f"curve.{name}", "curve", "", name)


def change(column: Column, chain: str) -> Column:
    """``column relative to chain``; better is which way the change should go, where that is one way for all numbers."""
    better = column.better if column.better in ("higher", "lower") else ""
    return replace(column, name=f"{column.name}{RELATIVE}{chain}", better=better, unit="%", relative_to=chain,
                   absolute=column)  # fmt: skip


def won_back(column: Column, chain: str, *, per_kilojoule: bool) -> Column:
    """``column recovered towards chain``, a share of 1, also ``per kilojoule``; more is better."""
    ending, unit = (PER_KILOJOULE, "1/kJ") if per_kilojoule else ("", "")
    return replace(column, name=f"{column.name}{RECOVERED}{chain}{ending}", better="higher", unit=unit, towards=chain,
                   per_kilojoule=per_kilojoule, absolute=column)  # fmt: skip


# --- which columns a reference means ----------------------------------------------------------------------


def matching(rows: pd.DataFrame, rest: str) -> list[Column]:
    """Columns for ``metric`` or ``task.metric``; a task may be given without its settings.

    A metric of something as a whole and of its single classes means the whole.
    """
    frame = rows[["entry", "task", "metric", "better", "unit"]].drop_duplicates(["entry", "task", "metric"])
    keys = frame.to_dict("records")
    exact = [key for key in keys if rest in (key["metric"], f"{key['task']}.{key['metric']}")]
    loose = [
        key for key in keys if any(rest == f"{task}.{key['metric']}" for task in _short_tasks(key["task"]))
    ]
    chosen = exact or loose
    chosen = [key for key in chosen if not CLASS_TASK.fullmatch(key["task"])] or chosen
    return [_column(key, alone=len(chosen) == 1, asked=rest) for key in chosen]


def _short_tasks(task: str) -> list[str]:
    """``wikitext2/test(context=512)`` may be called ``wikitext2/test`` or ``wikitext2``."""
    ends = [match.start() for match in re.finditer(r"[^\w-]", task)]
    return [task[:end] for end in ends]


def _column(key: dict[str, Any], *, alone: bool, asked: str) -> Column:
    name = f"{key['entry']}.{asked}" if alone else f"{key['entry']}.{key['task']}.{key['metric']}"
    return Column(name, key["entry"], key["task"], key["metric"], key["better"], key["unit"])


# --- rows of a column -------------------------------------------------------------------------------------


def identity(row: Row) -> str:
    """What makes a result distinct: the score, or the model for its stage's and chain's cost."""
    per_model = row["evaluation"] in COSTS and not row["metric"].startswith("score_")
    key = row["model_id"] if per_model else row["score_id"] or row["model_id"]
    return str(key or f"seed {row['seed']}")


def has_number(row: Row, column: Column) -> bool:
    """Whether a row holds the column's number."""
    own = (row["entry"], row["task"], row["metric"]) == (column.entry, column.task, column.metric)
    return own and row["status"] == "ok" and not math.isnan(row["value"])


def is_lost(row: Row, column: Column) -> bool:
    """Whether a row says why the column's number is not there."""
    if row["status"] == "ok" or row["entry"] != column.entry:
        return False
    return column.is_cost or (row["metric"] in ("", column.metric) and row["task"] in ("", column.task))


def sample(row: Row) -> Sample:
    """The row's number as one distinct result."""
    stderr = None if math.isnan(row["stderr"]) else row["stderr"]
    return Sample(row["seed"], identity(row), row["value"], stderr)


def statuses(rows: Iterable[Row]) -> dict[str, int]:
    """How many seeds ended in which way."""
    return dict(
        sorted(Counter(status for _, status in {(row["seed"], row["status"]) for row in rows}).items())
    )
