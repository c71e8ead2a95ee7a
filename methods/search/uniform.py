"""The same level everywhere: what every search starts from and has to beat.

The baseline of Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via
Evolutionary Search" (ICML 2025), and of Li et al. 2025, "Týr-the-Pruner" (NeurIPS 2025): level 0 of a database of
sparsities, or of heads and neurons, is the same sparsity in every layer (with a ``center`` of levels.tyr, that centre);
of a database of bit-widths every layer gets the same number of bits.

The method draws no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from methods.stage import AssayError, Claim, Levels

if TYPE_CHECKING:
    from methods.levels._database import Database
    from methods.search import Problem
    from methods.search._assignment import Assignment

SEEDED = False
USES = ("methods.levels._database", "methods.search._assignment", "methods.checkpoint")
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """The levels, and which of them all layers get."""

    # a levels stage on this chain's parent
    levels: Levels
    # of sparsities, heads and neurons: steps away from level 0
    level: str = "0"
    # of bit-widths: how many; a whole number, because all layers get the same
    bits: Annotated[float, Gt(0)] | None = None


def search(config: Config, problem: Problem) -> Assignment:
    """Every layer at the same level."""
    from methods.search._assignment import Assignment

    assert problem.database is not None  # ``levels`` is no option that may be left out
    level = level_of(config, problem.database)
    levels = {unit.name: unit.level(level).name for unit in problem.database.units}
    return Assignment.of(problem.database, levels, "search.uniform", {"level": level})


def level_of(config: Config, database: Database) -> str:
    """The name of the level that the options ask for; AssayError where they do not fit the kind of levels."""
    if database.kind != "bits":
        if config.bits is not None:
            raise AssayError(
                f"search.uniform: the levels are of kind {database.kind} and have no bits: leave bits= out, or write "
                'level="0".'
            )
        return config.level
    if config.bits is None or config.level != "0":
        raise AssayError("search.uniform: the levels are bit-widths: say bits=, and leave level= out.")
    if config.bits != int(config.bits):
        whole = sorted({int(config.bits), int(config.bits) + 1} - {0})
        raise AssayError(
            f"search.uniform: bits={config.bits:g} cannot be the same in every layer: write "
            f"{' or '.join(f'bits={number}' for number in whole)}, or let search.evopress_bits or search.knapsack mix "
            "bit-widths."
        )
    return str(int(config.bits))
