"""An assignment that somebody has published, or that another search of ours has left.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025; IST-DASLab/EvoPress): its searches write text files with a line for each layer,

    model.layers.0.mlp.down_proj: -1

for sparsities (steps away from the uniform one) and bit-widths, and so does Týr-the-Pruner (AMD-AGI/Tyr-the-Pruner).
EvoPress' depth search writes a line for each block: ``none``, ``attn``, ``mlp`` or ``attn+mlp``, what of it is removed.
A file that ends in ``.json`` is an ``assignment.json`` of this project.

The file lies below ``--config data=DIR`` and is named like a data set: ``published/llama-70.txt``. It is checked
against the levels: every layer has to be named, at a level that exists. Whether a level means the same there as here
(so many weights a step, the sparsity at 0) no file says; the record notes what is spent.

The method draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.find import nearest
from methods.stage import AssayError, Claim, Dataset, Levels

if TYPE_CHECKING:
    from methods.search import Problem
    from methods.search._assignment import Assignment

SEEDED = False
USES = (
    "methods.levels._database",
    "methods.search._assignment",
    "methods.search._spaces",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()

# What EvoPress' depth search calls the parts of a block that it removes: whether attention and MLP are gone.
BLOCKS = {"none": (False, False), "attn": (True, False), "mlp": (False, True), "attn+mlp": (True, True)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The file, and the levels it is about."""

    # name of the file below --config data=DIR
    assignment: Dataset
    # the levels stage on this chain's parent that it is about; left out where sub-blocks are removed
    levels: Levels | None = None


def search(config: Config, problem: Problem) -> Assignment:
    """Read the file."""
    rows = problem.stage.data.rows(config.assignment)
    if not rows:
        raise AssayError(f"{config.assignment!r} is empty.")
    if "levels" in rows[0]:
        return ours(config, problem, rows[0])
    lines = [str(row.get("text", "")).strip() for row in rows]
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line]
    return (
        of_blocks(config, problem, numbered)
        if config.levels is None
        else of_layers(config, problem, numbered)
    )


def ours(config: Config, problem: Problem, content: Mapping[str, Any]) -> Assignment:
    """An ``assignment.json``."""
    from methods.search._assignment import from_json

    try:
        assignment = from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AssayError(f"{config.assignment!r} is no assignment of levels ({error}).") from error
    if assignment.kind == "depth":
        assignment.check_sub_blocks(*_sub_blocks(problem))
    elif problem.database is None:
        raise AssayError(
            f"{config.assignment!r} is of kind {assignment.kind}: give levels=, the levels stage that it is about."
        )
    return assignment


def of_layers(config: Config, problem: Problem, lines: Sequence[tuple[int, str]]) -> Assignment:
    """A level for each layer: ``module name: level`` in each line."""
    from methods.search._assignment import Assignment

    assert problem.database is not None  # only with ``levels``
    found: dict[str, str] = {}
    for number, line in lines:
        name, colon, level = (part.strip() for part in line.rpartition(":"))
        if not colon or not name:
            raise AssayError(
                f"line {number} of {config.assignment!r}, {line!r}, is not of the form 'module name: level'."
            )
        if name in found:
            raise AssayError(f"line {number} of {config.assignment!r} names {name} again.")
        try:
            found[name] = problem.database.unit(name).level(level).name
        except AssayError as error:
            raise AssayError(f"line {number} of {config.assignment!r}: {error}") from None
    missing = [unit.name for unit in problem.database.units if unit.name not in found]
    if missing:
        raise AssayError(
            f"{config.assignment!r} has no level for {missing[0]} (and {len(missing) - 1} more layers of the levels)."
        )
    levels = {unit.name: found[unit.name] for unit in problem.database.units}
    return Assignment.of(problem.database, levels, "search.published", {"published": config.assignment})


def of_blocks(config: Config, problem: Problem, lines: Sequence[tuple[int, str]]) -> Assignment:
    """What of each block is removed: a word in each line."""
    from methods.search._assignment import Assignment

    attentions, mlps = _sub_blocks(problem)
    for number, line in lines:
        if line not in BLOCKS:
            hint = " (a file with 'module name: level' needs levels=)" if ":" in line else ""
            raise AssayError(
                f"line {number} of {config.assignment!r} says {line!r} of a block{hint}{nearest(line, BLOCKS)}"
            )
    if not len(lines) == len(attentions) == len(mlps):
        raise AssayError(
            f"{config.assignment!r} is about {len(lines)} blocks; the model has {len(attentions)} attentions and "
            f"{len(mlps)} MLPs."
        )
    levels = {}
    spent = dict.fromkeys(("attentions", "mlps"), 0)
    for (_, word), *names in zip(lines, attentions, mlps, strict=True):
        for budget, name, gone in zip(spent, names, BLOCKS[word], strict=True):
            levels[name] = "removed" if gone else "kept"
            spent[budget] += gone
    return Assignment("depth", levels, "search.published", spent, {"published": config.assignment})


def _sub_blocks(problem: Problem) -> tuple[tuple[str, ...], tuple[str, ...]]:
    from methods.search._depth import sub_blocks

    return sub_blocks(problem.model)
