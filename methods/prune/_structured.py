"""Structured pruning's shared part: which units a layer has, how many of them go, and what is zero then.

A unit is an attention head (or a whole key-value group) or a neuron of the MLP. What a unit gives to the
residual stream passes through its columns of ``o_proj`` or ``down_proj``: with these zero the unit is
removed, and its other matrices can be cut away. Týr's released code (AMD-AGI/Tyr-the-Pruner,
``src/local_pruner.py``) counts the units that stay as int(units * (1 - s)), which for 10 units at s = 0.9 is 0
(binary floats); ``kept_units`` says what is done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

REVISION = 1

Budget = Literal["heads", "neurons"]
Heads = Literal["group", "query"]
Rounding = Literal["exact", "nearest", "official"]
# The projection out of the units, and those into them.
LOCAL: dict[Budget, str] = {"heads": "self_attn.o_proj", "neurons": "mlp.down_proj"}
INTO = {"heads": ("q_proj", "k_proj", "v_proj"), "neurons": ("gate_proj", "up_proj")}
# A sparsity counts as met when rounding to whole units changes the share by no more than this.
WHOLE = 1e-3


# --- counts -----------------------------------------------------------------------------------------------


def kept_units(count: int, sparsity: float, rounding: Rounding, what: str) -> int:
    """How many of ``count`` units stay at a sparsity.

    "exact" and "nearest": count - round(count * s); "exact" is refused where that is another share than s.
    "official": int(count * (1 - s)), with its binary floats.
    """
    if rounding == "official":
        return int(count * (1 - sparsity))
    removed = round(count * sparsity)
    if rounding == "exact" and abs(removed / count - sparsity) > WHOLE:
        raise AssayError(
            f"sparsity={sparsity:g} cannot be met: of the {count} {what} that would be {count * sparsity:g}, no whole "
            f"number; {nearest_shares(count, sparsity)} can be met exactly."
        )
    return count - removed


def nearest_shares(count: int, sparsity: float) -> str:
    """The shares of ``count`` units beside a sparsity: "0.25 and 0.5"."""
    below = math.floor(count * sparsity)
    return f"{below / count:.6g} and {(below + 1) / count:.6g}"


# --- the units of a Llama ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One of the two matrices of a block whose input columns belong to units: ``o_proj`` or ``down_proj``."""

    name: str  # full module name
    local: str  # name inside its block
    block: int
    budget: Budget
    linear: nn.Linear
    count: int  # units: groups of as many consecutive input columns each

    def columns(self) -> Tensor:
        """The weight by unit: a view [units, columns of a unit, out]."""
        return self.linear.weight.data.T.unflatten(0, (self.count, -1))

    def contributing(self) -> Tensor:
        """Which of the units [units] have any weight that is not 0."""
        return (self.columns() != 0).flatten(1).any(dim=1)


def parts(model: PreTrainedModel, heads: Heads, purpose: str) -> list[Part]:
    """Every ``o_proj`` and ``down_proj`` of a Llama with its units, in the order of the blocks.

    Raises an AssayError for a model that is built otherwise, and for query heads that do not divide among groups.
    """
    from methods.architectures import require_llama
    from methods.prune._walk import decoder_layers

    require_llama(model, purpose)
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        for budget, local in LOCAL.items():
            owner, _, last = local.partition(".")
            linear = getattr(getattr(layer, owner), last)
            name = f"{names[id(layer)]}.{local}"
            count = linear.in_features
            if budget == "heads":
                count = head_units(getattr(layer, owner), heads, f"{purpose}: {name}")
            found.append(Part(name, local, index, budget, linear, count))
    return found


def head_units(attention: Any, heads: Heads, place: str) -> int:
    """How many query heads, or key-value groups with all their query heads, an attention has."""
    width = attention.head_dim
    queries, groups = attention.o_proj.in_features // width, attention.k_proj.out_features // width
    if heads == "query":
        return int(queries)
    if queries % groups:
        raise AssayError(
            f"{place} has {queries} query heads on {groups} key-value heads, which are no groups of equal size; "
            'levels.tyr(heads="query") prunes query heads one by one.'
        )
    return int(groups)


def unit_views(layer: Any, part: Part, read: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Everything that a block's units have in its matrices and biases, each [units, vectors of a unit, entries].

    A vector is a row of a projection into the unit, or a column of the one out of it.

    Args:
        read: makes of a parameter what is looked at, of the same shape. With its data the results are views.
    """
    owner = getattr(layer, part.local.partition(".")[0])
    found = [read(part.linear.weight).T.unflatten(0, (part.count, -1))]
    for name in INTO[part.budget]:
        linear = getattr(owner, name)
        found.append(read(linear.weight).unflatten(0, (part.count, -1)))
        if linear.bias is not None:
            found.append(read(linear.bias).unflatten(0, (part.count, -1))[..., None])
    return found


def lowest(found: Sequence[Part], scores: Sequence[Tensor], number: int) -> dict[str, Tensor]:
    """The ``number`` units with the lowest scores among all of these parts; of equal ones the earlier.

    Args:
        scores: [units] of each part.
    Returns:
        A boolean tensor [units] for each part, by its name.
    """
    import torch

    ranking = torch.cat(list(scores))
    chosen = torch.zeros_like(ranking, dtype=torch.bool)
    chosen[ranking.argsort(stable=True)[:number]] = True
    masks = chosen.split([part.count for part in found])
    return {part.name: mask for part, mask in zip(found, masks, strict=True)}


def zero_units(layer: Any, part: Part, gone: Tensor) -> None:
    """Zero everything that the units [units] that are true in ``gone`` have, in place."""
    for view in unit_views(layer, part, lambda parameter: parameter.data):
        view[gone] = 0.0
