"""Structure levels: every ``o_proj`` with fewer heads and every ``down_proj`` with fewer neurons, the rest refitted.

Li, Xu, Li et al. 2025, "Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization"
(NeurIPS 2025, arXiv 2503.09657; AMD-AGI/Tyr-the-Pruner, ``src/pruner.py``, ``src/local_pruner.py``): the supernet of
one of its iterations. ``prune._refit`` has the equations of the local pruner. ``score="osscar"`` is that of its
ancestor OSSCAR (Meng et al. 2024; mazumder-lab/OSSCAR).

Level j of a matrix has ``centre + j * step`` units less than the dense one, j = -4..4, as far as it has so many. Level
"0" is the centre: the same share in all layers, or what a search found on an earlier database (``center``). The step
is a share of the units, at least one head or ``least_neurons``; the same number in all layers, so that +1 in one pays
for -1 in another. Heads and neurons are budgets of their own. In coarse-to-fine search the step is halved from one
database to the next: 0.125, 0.0625, 0.03125, 0.015625 as released. All levels are made of the dense weights, never of
those of an earlier database. What goes are columns of ``o_proj`` and ``down_proj``; the other matrices of a unit are
without effect then, and are cut when the model is made smaller.

The paper passes the expectation over the pruned versions of a layer on to later layers; the released code means to
pass on the version at the centre (``--error_accumulation``), but overwrites the wanted sparsity with 0 first, so that
the only thing it ever puts in is the dense weight. ``error_propagation``: "none" is what was released, "center" what
the code means, "weighted" the expectation with weights 1 - s that stands there commented out. In all three a block is
measured with its own dense weights, on the outputs of the blocks before it.

With grouped queries the released code removes query heads one by one (``heads="query"``) and leaves keys and values as
they are, which can only be cut where all query heads of a group go. ``heads="group"`` removes whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from methods.levels._blocks import Measured, build_blocks
from methods.prune._refit import Score
from methods.prune._structured import Heads, Rounding
from methods.stage import AssayError, Assigned, Claim

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._structured import Part
    from methods.prune._walk import Block

KIND = "structure"
# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.search._assignment",
    "methods.prune",
    "methods.prune._refit",
    "methods.prune._structured",
    "methods.prune._hessian",
    "methods.prune._walk",
    "methods.architectures",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
SMOKE = {"levels": 3, "least_neurons": 1, "calibration_tokens": 256}


@dataclass(frozen=True, kw_only=True)
class Config(Measured):
    """Which levels there are, and how what stays is refitted."""

    # Share of heads and of neurons that level "0" has lost: in every layer, or on average with a centre.
    sparsity: Annotated[float, Ge(0), Lt(1)]
    # Share of the units between two levels; 0.125 in the first iteration of the shipped script.
    step: Annotated[float, Gt(0), Le(1)] = 0.125
    # Levels of a matrix, half of them on either side of the centre; 9 in the shipped script.
    levels: Annotated[int, Ge(3)] = 9
    # An assignment of levels.tyr: what each layer has lost there is its centre here. None: the same share everywhere.
    center: Assigned | None = None
    # Neurons between two levels, at least; 32 in the shipped script, for models of 11,008 in a layer.
    least_neurons: Annotated[int, Gt(0)] = 32
    # What a head is: a key-value group with all its query heads, or a query head (the released code).
    heads: Heads = "group"
    # Whether a score has Týr's energy term, or is the increase of the squared error alone.
    score: Score = "tyr"
    # Steps in which heads are removed, scores renewed in between; 1 in the released code.
    head_rounds: Annotated[int, Gt(0)] = 1
    # The same for neurons; 16 in the released code.
    neuron_rounds: Annotated[int, Gt(0)] = 16
    # Added to the diagonal of the Gram matrix, times its mean; 0.01 in the released code.
    relative_damping: Annotated[float, Gt(0)] = 0.01
    # What later blocks see: dense ones before them, the centre, or the mean of all levels with weights 1 - s.
    error_propagation: Literal["none", "center", "weighted"] = "none"
    # Units at the centre: "exact" refuses a share that whole units cannot meet, "nearest" takes the nearest;
    # "official" keeps int(units * (1 - s)) at every level, which floors binary floats: budgets may miss by a unit.
    rounding: Rounding = "exact"
    # What the weights are stored in; float16 in the released code.
    saved: Literal["float32", "bfloat16", "float16"] = "float32"
    # Whether weights that are 0 in the parent are 0 at every level.
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        if self.levels % 2 == 0:
            raise AssayError(
                f"levels.tyr: levels={self.levels} has no middle: as many on either side of the centre make it odd."
            )


def build(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress, writer: Writer
) -> None:
    """Write every ``o_proj`` and ``down_proj`` at every level; the model stays as it is."""
    from methods.prune._structured import parts

    found = parts(model, config.heads, "levels.tyr")
    folder = None if config.center is None else calibration.stage.parents["center"]
    plan = planned(config, found, centres(config, found, folder))
    sequences = calibration.windows(config.data, config.calibration_tokens, config.context_tokens)
    build_on(config, model, found, plan, sequences, progress, writer)


def build_on(
    config: Config,
    model: PreTrainedModel,
    found: Sequence[Part],
    plan: Mapping[str, Mapping[str, int]],
    sequences: list[Tensor],
    progress: Progress,
    writer: Writer,
) -> None:
    """The same from token sequences [1,T]; ``plan`` has the removed units of every level by the part's name."""

    def build(block: Block) -> dict[str, Tensor]:
        own = [part for part in found if part.block == block.index]
        build_block(config, block, own, plan, writer)
        passed = own if config.error_propagation != "none" else []
        return {part.local: passed_on(config, part, plan[part.name], writer) for part in passed}

    build_blocks(model, sequences, progress, build)


# --- which levels ---------------------------------------------------------------------------------------------


def centres(config: Config, found: Sequence[Part], folder: Path | None) -> dict[str, int]:
    """How many units each part has lost at level "0"."""
    from methods.prune._structured import kept_units

    uniform = {
        part.name: part.count
        - kept_units(part.count, config.sparsity, config.rounding, f"{part.budget} of {part.name}")
        for part in found
    }
    if folder is None:
        return uniform
    removed = removed_units(folder)
    if removed.keys() != uniform.keys():
        raise AssayError(
            f"levels.tyr: center={folder} is an assignment of other layers than this model's o_proj and down_proj."
        )
    for budget in dict.fromkeys(part.budget for part in found):
        names = [part.name for part in found if part.budget == budget]
        theirs, ours = (sum(counts[name] for name in names) for counts in (removed, uniform))
        if theirs != ours:
            raise AssayError(
                f"levels.tyr: center={folder} removes {theirs} {budget} in all, and sparsity={config.sparsity:g} with "
                f"heads={config.heads!r} is {ours}: give the sparsity and the heads it was searched with."
            )
    return removed


def removed_units(folder: Path) -> dict[str, int]:
    """What an assignment removes of every layer."""
    from methods.search._assignment import read

    assignment = read(folder)
    removed = assignment.about.get("removed")
    if assignment.kind != "structure" or not isinstance(removed, Mapping):
        raise AssayError(
            f"levels.tyr: center={folder} is an assignment of kind {assignment.kind} and does not say how many units "
            "of each layer it removes: name a chain that ends in a search over levels.tyr."
        )
    return {str(name): int(count) for name, count in removed.items()}


def planned(config: Config, found: Sequence[Part], centre: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The removed units of every level, by the part's name and the level's."""
    plan: dict[str, dict[str, int]] = {}
    for budget in dict.fromkeys(part.budget for part in found):
        members = [part for part in found if part.budget == budget]
        width = step_units(config, members)
        plan |= {part.name: level_counts(config, part, centre[part.name], width) for part in members}
        if all(len(plan[part.name]) == 1 for part in members):
            raise AssayError(
                f"levels.tyr: steps of {width} {budget} leave every layer with level 0 alone: lower step"
                + (" or least_neurons." if budget == "neurons" else ".")
            )
    return plan


def level_counts(config: Config, part: Part, centre: int, width: int) -> dict[str, int]:
    """The removed units of one part's levels, ``width`` apart."""
    half = range(-(config.levels // 2), config.levels // 2 + 1)
    if config.rounding == "official" and config.center is None:
        return official_counts(config, part, width, half)
    counts = {str(level): centre + level * width for level in half}
    return {level: count for level, count in counts.items() if 0 <= count <= part.count}


def official_counts(config: Config, part: Part, width: int, half: range) -> dict[str, int]:
    """The same as the released code has it, which rounds the sparsity of every level for itself."""
    from methods.prune._structured import kept_units

    below = math.floor(config.sparsity * part.count / width)
    above = math.floor((1 - config.sparsity) * part.count / width)
    shares = {
        str(level): config.sparsity + level * width / part.count for level in half if -below <= level <= above
    }
    return {
        level: part.count - kept_units(part.count, share, "official", part.name)
        for level, share in shares.items()
    }


def step_units(config: Config, members: Sequence[Part]) -> int:
    """Units between two levels of any part of a budget: a share of those of the largest part."""
    least = config.least_neurons if members[0].budget == "neurons" else 1
    return max(least, round(config.step * max(part.count for part in members)))


# --- one block ------------------------------------------------------------------------------------------------


def build_block(
    config: Config, block: Block, own: Sequence[Part], plan: Mapping[str, Mapping[str, int]], writer: Writer
) -> None:
    """Write all levels of a block's parts that an earlier attempt has not written."""
    from methods.prune._hessian import block_grams

    missing = [part for part in own if not writer.finished(part.name)]
    if missing:
        grams = block_grams(block, [part.local for part in missing])
        for part in missing:
            write_part(config, part, grams[part.local].gram, plan[part.name], writer)


def write_part(config: Config, part: Part, gram: Tensor, plan: Mapping[str, int], writer: Writer) -> None:
    """Write all levels of one part; ``gram`` [in,in] is the sum of x x^T over the calibration tokens."""
    import torch

    from methods.levels._encodings import encode_columns

    found = solved(config, part, gram, plan)
    stored = {level: weight.to(getattr(torch, config.saved)) for level, weight in found.items()}
    writer.write(
        part.name,
        part.block,
        part.budget,
        {level: encode_columns(weight) for level, weight in stored.items()},
        dict(plan),
        {level: count / part.count for level, count in plan.items()},
    )


def solved(config: Config, part: Part, gram: Tensor, plan: Mapping[str, int]) -> dict[str, Tensor]:
    """The weight [out,in] of one part at every level."""
    from methods.prune._refit import refit

    weights = refit(
        part.linear.weight.data,
        gram,
        part.count,
        [part.count - count for count in plan.values()],
        config.head_rounds if part.budget == "heads" else config.neuron_rounds,
        score=config.score,
        damping=config.relative_damping,
        keep_zeros=config.keep_zeros,
    )
    return {level: weights[part.count - count] for level, count in plan.items()}


def passed_on(config: Config, part: Part, plan: Mapping[str, int], writer: Writer) -> Tensor:
    """What later blocks see of a part [out,in]."""
    import torch

    if config.error_propagation == "center":
        return writer.weight(part.name, "0")
    shares = {level: 1 - count / part.count for level, count in plan.items()}
    # Where no level keeps anything, nothing is passed on.
    whole = sum(shares.values()) or 1.0
    mean = torch.zeros(part.linear.weight.shape)
    for level, share in shares.items():
        mean += share / whole * writer.weight(part.name, level)
    return mean
