"""The model that an assignment of levels stands for, whoever chose it.

The last step of EvoPress (Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression
via Evolutionary Search", ICML 2025) and of Týr-the-Pruner (Li et al. 2025, NeurIPS 2025): every layer gets the weights
of its level, read anew from the level database,

    W_l = database[l][level_l],

and never what a search happened to leave in a model: the released code evaluates and saves the candidate it scored last
(IST-DASLab/EvoPress, ``evo_drop_search.py``; AMD-AGI/Tyr-the-Pruner, ``search_sparsity_dist.py``).

Levels of whole heads and neurons (``levels.tyr``) are zero columns of ``o_proj`` and ``down_proj``. What these make
useless goes, too: the rows of ``q_proj``, ``gate_proj`` and ``up_proj``, and those of ``k_proj`` and ``v_proj`` whose
query heads are all gone. An assignment of the kind ``depth`` needs no levels: every weight of a removed attention or
MLP is zero. Both kinds have a physically smaller form (see ``methods.prune``).

The method draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, Assigned, Claim, Levels

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from methods.levels._database import Database, Level, Unit
    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.search._assignment import Assignment

SEEDED = False
USES = (
    "methods.levels._database",
    "methods.search._assignment",
    "methods.search._spaces",
    "methods.prune._walk",
    "methods.architectures",
    "methods.checkpoint",
)
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which level every layer gets, and where its weights come from."""

    # a search stage: what says which layer gets which level
    assignment: Assigned
    # the levels stage that the assignment is about; left out for the kind "depth"
    levels: Levels | None = None
    # a weight that is 0 in the parent stays 0, also where the levels were built to fill it
    keep_zeros: bool = True


def prune(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress
) -> Mapping[str, tuple[Tensor, Tensor]] | None:
    """Give every layer of the assignment its level, in place. A mapping where whole units are gone."""
    from methods.search._assignment import read

    stage = calibration.stage
    assignment = read(stage.parents["assignment"])
    stage.notes |= {
        "kind": assignment.kind,
        "producer": assignment.producer,
        "spent": dict(assignment.spent),
        "assignment": dict(assignment.levels),
    }
    if assignment.kind == "depth":
        _refuse_levels(config)
        remove_sub_blocks(model, assignment)
        gone = {unit: float(level == "removed") for unit, level in assignment.levels.items()}
        stage.notes["profile"] = _profile("removed", gone)
        return {}
    database = _database(config, calibration, model)
    assignment.check(database)
    stage.notes |= put_in(model, database, assignment, config.keep_zeros)
    metric = "removed" if assignment.kind == "structure" else assignment.kind
    stage.notes["profile"] = _profile(metric, stage.notes["shares"])
    if assignment.kind != "structure":
        return None
    zero_dead_rows(model)
    return {}


def _profile(metric: str, values: Mapping[str, float]) -> list[dict[str, Any]]:
    """What every unit got, as the report's profiles read it."""
    return [{"unit": unit, "metric": metric, "value": value} for unit, value in values.items()]


def _database(config: Config, calibration: Calibration, model: PreTrainedModel) -> Database:
    from methods.levels._database import Database

    if config.levels is None:
        raise AssayError(
            "prune.assigned: this assignment is about levels of weights: give levels=, the levels stage it was made "
            "with."
        )
    # Every layer is read once.
    return Database.open(calibration.stage.parents["levels"], model, memory_bytes=0)


def _refuse_levels(config: Config) -> None:
    if config.levels is not None:
        raise AssayError(
            "prune.assigned: this assignment removes whole sub-blocks and reads no levels: leave levels= out."
        )


# --- levels of weights ------------------------------------------------------------------------------------------


def put_in(
    model: PreTrainedModel, database: Database, assignment: Assignment, keep_zeros: bool
) -> dict[str, Any]:
    """Copy every layer's level into the model; returns what there is to note about it."""
    import torch

    shares, bits, zeros, weights = {}, 0.0, 0, 0
    with torch.no_grad():
        for unit, level, new in _levels(database, assignment):
            weight = model.get_parameter(f"{unit.name}.weight")
            gone = weight == 0
            weight.copy_(new)
            if keep_zeros:
                weight.masked_fill_(gone, 0.0)
            shares[unit.name] = level.share
            bits += level.share * weight.numel()
            zeros += int((weight == 0).sum())
            weights += weight.numel()
    notes: dict[str, Any] = {"shares": shares, "zeros": zeros}
    return notes | ({"bits_per_weight": bits / weights} if database.kind == "bits" else {})


def _levels(database: Database, assignment: Assignment) -> Iterator[tuple[Unit, Level, Tensor]]:
    """Every layer with its level and the weight [rows,columns] of it, which costs what the level says."""
    for unit in database.units:
        level = unit.level(assignment.levels[unit.name])
        weight = database.weight(unit.name, level.name)
        _refuse_false_cost(database, unit, level, weight)
        yield unit, level, weight


def _refuse_false_cost(database: Database, unit: Unit, level: Level, weight: Tensor) -> None:
    """The budget is a promise about weights, not about what a file says of them."""
    found, said = {
        "sparsity": lambda: (int((weight == 0).sum()), level.cost),
        "bits": lambda: (int(level.name) * weight.numel(), level.cost),
        "structure": lambda: (int((weight == 0).all(dim=0).sum()), round(level.share * unit.columns)),
    }[database.kind]()
    # Columns that were zero in the dense matrix come on top of the removed units.
    if found != said and not (database.kind == "structure" and found > said):
        what = {"sparsity": "zeros", "bits": "bits", "structure": "zero columns"}[database.kind]
        raise AssayError(
            f"level {level.name} of {unit.name} in {database.folder} has {found:,} {what} and is said to have "
            f"{said:,}: build the levels anew."
        )


# --- whole units ------------------------------------------------------------------------------------------------


def zero_dead_rows(model: PreTrainedModel) -> None:
    """Zero the rows of projections whose outputs no longer reach the residual stream, in place."""
    import torch

    from methods.architectures import require_llama
    from methods.architectures.cutting import Cut
    from methods.prune._walk import decoder_layers

    require_llama(model, "removing heads and neurons")
    with torch.no_grad():
        for layer, kept in zip(decoder_layers(model), Cut.of(model).kept, strict=True):
            for name, (dimension, units) in kept.chosen().items():
                if dimension == 0:
                    zero_rows(layer.get_submodule(name), units)


def zero_rows(projection: nn.Module, kept: Tensor) -> None:
    """Zero the weight's rows and the biases that are not among ``kept`` indices, in place."""
    for part in projection.parameters():
        gone = part.new_ones(len(part)).bool()
        gone[kept] = False
        part[gone] = 0.0


def remove_sub_blocks(model: PreTrainedModel, assignment: Assignment) -> None:
    """Zero every weight and bias of the linear layers of removed attentions and MLPs, in place."""
    import torch

    from methods.architectures import require_llama
    from methods.search._depth import sub_blocks

    require_llama(model, "removing sub-blocks")
    assignment.check_sub_blocks(*sub_blocks(model))
    removed = [name for name, level in assignment.levels.items() if level == "removed"]
    with torch.no_grad():
        for name in removed:
            for linear in _linears(model.get_submodule(name)):
                for part in linear.parameters():
                    part.zero_()


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    from torch import nn

    return (part for part in module.modules() if isinstance(part, nn.Linear))
