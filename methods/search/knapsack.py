"""The assignment with the least sum of layer errors: a knapsack, solved exactly.

Frantar, Alistarh 2022, "SPDY: Accurate Pruning with Speedup Guarantees" (ICML 2022, arXiv 2201.13096), without the
search over sensitivities, as the baseline "DP" of EvoPress (IST-DASLab/EvoPress, ``compute_layer_errors.py`` and
``dp_search.py``): with D = W - W_l the change of a layer W [out,in] at level l,

    minimise sum over layers of e(l),   e(l) = tr(D G D^T) / tr(W G W^T),   subject to the budget

where G = X^T X are the second moments of the layer's inputs in the dense model, so that e is the squared error of its
outputs over calibration tokens relative to the outputs themselves. ``errors="weights"`` takes |D|^2 / |W|^2 and needs
no data. A layer whose outputs are all zero has no error.

The sum is least over all assignments that meet the budget to the unit (dynamic programming over the reachable costs),
where the official code discretises the budget. The method assumes that layers' errors add up, which is what EvoPress
argues against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from methods.stage import AssayError, Claim, Dataset, Levels

if TYPE_CHECKING:
    from torch import Tensor

    from methods.levels._database import Database, Unit
    from methods.prune._walk import Block
    from methods.search import Problem
    from methods.search._assignment import Assignment

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.levels._database",
    "methods.search._assignment",
    "methods.prune",
    "methods.prune._hessian",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """The levels, the budget, and how errors are measured."""

    # a levels stage on this chain's parent; of other levels than bit-widths the budget is that of level 0 everywhere
    levels: Levels
    # of bit-widths: their mean over all weights
    bits: Annotated[float, Gt(0)] | None = None
    # "output": the squared error of a layer's outputs. "weights": that of its weights
    errors: Literal["output", "weights"] = "output"
    # data set that outputs are measured on; "weights" needs none
    data: Dataset | None = None
    # tokens of it, at least (8,388,608 in EvoPress)
    calibration_tokens: Annotated[int, Gt(0)] = 4096
    # longest calibration sequence (8,192 in EvoPress)
    context_tokens: Annotated[int, Gt(0)] = 2048

    def __post_init__(self) -> None:
        if self.errors == "output" and self.data is None:
            raise AssayError(
                'search.knapsack: errors="output" is measured on data: name a data set, data="…".'
            )


def search(config: Config, problem: Problem) -> Assignment:
    """The levels with the least sum of errors."""
    from methods.search._assignment import Assignment, least

    assert problem.database is not None  # ``levels`` is no option that may be left out
    budget = budget_of(config, problem.database)
    errors = layer_errors(config, problem, problem.database)
    levels = least(problem.database.units, errors, budget)
    total = sum(errors[unit.name][unit.names.index(levels[unit.name])] for unit in problem.database.units)
    return Assignment.of(
        problem.database, levels, "search.knapsack", {"errors": config.errors, "error": total}
    )


def budget_of(config: Config, database: Database) -> dict[str, int]:
    """What may be spent; AssayError where the options do not fit the kind of levels."""
    from methods.search._assignment import bits_budget

    if (database.kind == "bits") != (config.bits is not None):
        wanted = (
            "are bit-widths: say bits="
            if config.bits is None
            else f"are of kind {database.kind}: leave bits= out"
        )
        raise AssayError(f"search.knapsack: the levels {wanted}.")
    return database.spent(database.uniform()) if config.bits is None else bits_budget(database, config.bits)


# --- errors -----------------------------------------------------------------------------------------------


def layer_errors(config: Config, problem: Problem, database: Database) -> dict[str, list[float]]:
    """The relative error of every level of every layer, in the order of its levels."""
    if config.errors == "weights":
        return {
            unit.name: unit_errors(database, unit, problem.model.get_parameter(f"{unit.name}.weight"))
            for unit in database.units
        }
    assert config.data is not None  # checked by Config
    sequences = problem.calibration.windows(config.data, config.calibration_tokens, config.context_tokens)
    return output_errors(problem, database, sequences)


def output_errors(problem: Problem, database: Database, sequences: list[Tensor]) -> dict[str, list[float]]:
    """The errors of outputs, block after block of the dense model; what is measured is saved now and then."""
    import torch

    from methods.prune._walk import decoder_layers, walk

    progress = problem.progress
    state = progress.load()
    errors: dict[str, list[float]] = dict(state.values["errors"]) if state else {}
    problem.stage.notes["resumed_from_step"] = state.step if state else 0
    bar = progress.bar(len(decoder_layers(problem.model)), "blocks measured")
    with torch.no_grad():
        for _, block in zip(bar, walk(problem.model, sequences), strict=False):
            missing = [
                unit for unit in database.units if unit.block == block.index and unit.name not in errors
            ]
            errors |= dict(block_errors(database, block, missing))
            if progress.due(block.index + 1):
                progress.save(block.index + 1, {}, {"errors": errors})
    return errors


def block_errors(database: Database, block: Block, units: list[Unit]) -> Iterator[tuple[str, list[float]]]:
    """The errors of these layers of a block, from one pass over its sequences."""
    from methods.prune._hessian import block_grams

    inner = block.linears()
    local = {unit.name: next(name for name in inner if unit.name.endswith(f".{name}")) for unit in units}
    grams = block_grams(block, list(local.values())) if units else {}
    for unit in units:
        name = local[unit.name]
        yield unit.name, unit_errors(database, unit, inner[name].weight, grams[name].gram)


def unit_errors(database: Database, unit: Unit, weight: Tensor, gram: Tensor | None = None) -> list[float]:
    """The relative error of every level of a layer with this weight [out,in] and second moments [in,in]."""
    size = energy(weight.detach(), gram)
    changes = (
        energy(weight.detach() - database.weight(unit.name, level).to(weight.device), gram)
        for level in unit.names
    )
    return [change / size if size > 0 else 0.0 for change in changes]


def energy(weight: Tensor, gram: Tensor | None) -> float:
    """tr(V G V^T) of a matrix V [out,in]; without second moments those of white inputs."""
    moved = weight if gram is None else weight @ gram
    # Rounding can leave the trace of a tiny change below 0.
    return max(0.0, float((moved * weight).double().sum()))
