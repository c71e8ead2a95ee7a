"""What methods that choose some of the rows share: how many, and the sentences where there are none or too few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt, Le

from methods.stage import AssayError, Rows, Stage

REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """Which rows there are, and how many of them are kept."""

    # rows to choose from
    data: Rows = "authors/full+authors/facts"
    # share of the rows that is kept, rounded to a whole row (PASER: 0.04 to 0.2)
    share: Annotated[float, Gt(0), Le(1)] | None = 0.2
    # how many rows are kept; where given, it wins over ``share``
    rows: Annotated[int, Gt(0)] | None = None

    def __post_init__(self) -> None:
        """One of the two."""
        if self.rows is None and self.share is None:
            method = ".".join(type(self).__module__.split(".")[-2:])
            raise AssayError(f"{method}: give share or rows: nothing says how many rows are kept.")


def rows_of(stage: Stage) -> list[dict[str, Any]]:
    """The rows to choose from. AssayError where there are none."""
    rows = stage.rows("data")
    if not rows:
        raise AssayError(f"{stage.method}: data has no rows to choose from.")
    return rows


def wanted(stage: Stage, rows: Sequence[Any]) -> int:
    """How many rows are kept, one at least.

    Raises:
        AssayError: there are fewer rows than that.
    """
    config: Choosing = stage.config
    if config.rows is None:
        return max(1, round((config.share or 0.0) * len(rows)))
    if config.rows > len(rows):
        raise AssayError(f"{stage.method}: rows={config.rows}, but data has only {len(rows)}: ask for fewer.")
    return config.rows
