"""Ladders of sparsity: how many zeros each level of a layer has, and the walk that builds them.

After EvoPress (IST-DASLab/EvoPress, ``src/pruner.py``). Level l of a layer with ``numel`` weights has l times
``weights_step`` zeros more than at the uniform sparsity s, whatever the layer's size, so that one step down in one
layer pays exactly for one step up in another:

    zeros(l) = round(s numel) + l weights_step,
    -floor(s numel / weights_step) <= l <= floor((1 - s) numel / weights_step)

and at most ``levels`` each way. The published code rounds share by share in blocks of columns, which can break this by
a weight; here it is exact and checked level by level. A level with fewer zeros than the dense layer does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Lt

from methods.levels._blocks import Measured, build_blocks
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._walk import Block

BUDGET = "weights"


@dataclass(frozen=True, kw_only=True)
class Sparsities:
    """Options of every database of sparsities."""

    # Share of zeros in every layer at level 0, and in the whole decoder at any level of a search.
    sparsity: Annotated[float, Gt(0), Lt(1)]
    # Levels above and below the uniform one; 8 in the official code. Small layers may have fewer.
    levels: Annotated[int, Gt(0)] = 8
    # Zeros by which two neighbouring levels of any layer differ. None: int(0.5 * min(s, 1 - s) / levels * hidden^2),
    # the official default: at s = 0.5 the outermost levels of a square projection have 0.25 and 0.75.
    weights_step: Annotated[int, Gt(0)] | None = None
    # Precision the levels are stored in; float16 in the official code.
    saved: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def total_is_exact(self) -> bool:
        """Whether a level has exactly the zeros that the sparsity asks for: equal steps it must have in any case."""
        return True


@dataclass(frozen=True, kw_only=True)
class MeasuredSparsities(Sparsities, Measured):
    """Options of databases of sparsities that look at activations."""

    # "none": every layer is measured on the dense model's activations, as in the official code. "uniform": on those
    # behind predecessors at level 0.
    error_propagation: Literal["none", "uniform"] = "none"


@dataclass(frozen=True)
class Ladder:
    """The levels of one layer of ``numel`` weights: zeros by offset, ascending and ``step`` apart."""

    unit: str
    numel: int
    step: int
    zeros: Mapping[int, int]


# One level of a layer: its offset, its weight [out,in] and what was pruned.
Made = tuple[int, "Tensor", "Tensor"]
# Makes the levels of those layers of a block that have a ladder, by their names inside the block.
Solver = Callable[["Block", Mapping[str, Ladder]], Iterator[tuple[str, Iterable[Made]]]]


# --- ladders --------------------------------------------------------------------------------------------------


def ladders(config: Sparsities, model: PreTrainedModel, method: str) -> dict[str, Ladder]:
    """The ladder of every linear layer of the decoder by its full name; AssayError where a layer has no level 0."""
    from methods.prune._walk import linear_weights

    step = step_of(config, int(model.config.hidden_size), method)
    units = {name.removesuffix(".weight"): model.get_parameter(name) for name in linear_weights(model)}
    return {
        unit: ladder(config, unit, weight.numel(), int((weight == 0).sum()), step, method)
        for unit, weight in units.items()
    }


def step_of(config: Sparsities, hidden: int, method: str) -> int:
    """Zeros between two neighbouring levels."""
    if config.weights_step is not None:
        return config.weights_step
    step = int(0.5 * min(config.sparsity, 1 - config.sparsity) / config.levels * hidden**2)
    if step == 0:
        raise AssayError(
            f"{method}: {config.levels} levels each way of sparsity {config.sparsity} lie less than one weight apart "
            f"in a model of width {hidden}: take fewer levels, or set weights_step."
        )
    return step


def ladder(config: Sparsities, unit: str, numel: int, zeros: int, step: int, method: str) -> Ladder:
    """The levels of a layer of ``numel`` weights of which ``zeros`` are zero already.

    Raises:
        AssayError: more are zero than the uniform sparsity allows.
    """
    middle = round(numel * config.sparsity)
    if zeros > middle:
        raise AssayError(
            f"{method}: {unit} has {zeros} zeros of {numel} weights already, more than the {middle} of "
            f"sparsity={config.sparsity}, so that it cannot be met exactly: raise the sparsity."
        )
    low = min(int(config.sparsity * numel / step), config.levels)
    high = min(int((1 - config.sparsity) * numel / step), config.levels)
    wanted = {offset: middle + offset * step for offset in range(-low, high + 1)}
    return Ladder(unit, numel, step, {at: count for at, count in wanted.items() if zeros <= count <= numel})


# --- building -------------------------------------------------------------------------------------------------


def build(
    config: MeasuredSparsities,
    model: PreTrainedModel,
    calibration: Calibration,
    progress: Progress,
    writer: Writer,
    method: str,
    solver: Solver,
) -> None:
    """Write the levels of all layers, block after block; the model is left as it was."""
    planned = ladders(config, model, method)
    sequences = calibration.windows(config.data, config.calibration_tokens, config.context_tokens)

    def build_block(block: Block) -> dict[str, Tensor]:
        units = {name: block.full(name) for name in block.linears()}
        missing = {name: planned[unit] for name, unit in units.items() if not writer.finished(unit)}
        for name, made in solver(block, missing) if missing else ():
            write(config, writer, block.index, missing[name], made)
        # As it was written, so that a resumed job sees the same.
        passed_on = units if config.error_propagation == "uniform" else {}
        return {name: writer.weight(unit, "0") for name, unit in passed_on.items()}

    build_blocks(model, sequences, progress, build_block)


def write(config: Sparsities, writer: Writer, block: int, planned: Ladder, made: Iterable[Made]) -> None:
    """Write the levels of one layer, checking that each has exactly the zeros it is counted with."""
    from methods.levels._encodings import encode_sparse

    levels, costs = {}, {}
    for offset, weight, removed in made:
        stored = at_precision(weight, removed, config.saved)
        levels[str(offset)], costs[str(offset)] = encode_sparse(stored), int((stored == 0).sum())
    _check(planned, costs, config.total_is_exact)
    shares = {level: cost / planned.numel for level, cost in costs.items()}
    writer.write(planned.unit, block, BUDGET, levels, costs, shares)


def _check(planned: Ladder, costs: Mapping[str, int], total_is_exact: bool) -> None:
    """One step down must pay exactly for one step up, in whichever layers."""
    middle = planned.zeros[0] if total_is_exact else costs["0"]
    wanted = {str(offset): middle + offset * planned.step for offset in planned.zeros}
    if costs != wanted:
        raise AssayError(
            f"the levels of {planned.unit} have {list(costs.values())} zeros instead of {list(wanted.values())}: no "
            'search could keep to a budget. threshold="block" rounds in every block of columns; take "exact".'
        )


def at_precision(weight: Tensor, removed: Tensor, saved: str) -> Tensor:
    """A level in the precision it is stored in: zero exactly where it was pruned.

    A weight that stays but rounds to zero becomes the smallest number there is, else the level would have more zeros
    than it is counted with.
    """
    import torch

    dtype: torch.dtype = getattr(torch, saved)
    stored = weight.to(dtype)
    lost = (stored == 0) & ~removed
    if bool(lost.any()):
        # float16 has too few exponents to leave out its subnormal numbers; elsewhere processors may flush them.
        smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
        stored[lost] = torch.where(torch.signbit(weight[lost]), -smallest, smallest).to(dtype)
    return stored
