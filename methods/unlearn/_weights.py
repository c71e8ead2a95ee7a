"""Arithmetic on weights: the parent changed without training, and a second model weight by weight.

``methods.unlearn``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from methods.stage import AssayError, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from methods.loop import Weights


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Options of a method that changes weights without training."""

    # entries of matrices that are 0 in the parent stay 0
    keep_zeros: bool = True
    # precision of the written model; parent: as the model it was made from
    saved: Literal["parent", "float32", "bfloat16"] = "parent"


def rewrite(stage: Stage, change: Callable[[Any], None]) -> None:
    """Write the parent after ``change`` has been at its float32 weights; notes what is 0 and what rounding took."""
    import torch

    from methods.checkpoint import load_model, save_model
    from methods.loop import Weights

    config, parent = stage.config, stage.parents["model"]
    model = load_model(parent, "float32", torch.device("cpu"))
    weights = Weights(dict(model.named_parameters()))
    weights.remember(config.keep_zeros, config.saved, parent)
    change(model)
    weights.restore_zeros()
    save_model(model, stage.folder / "model", parent, config.saved)
    stage.notes |= notes_of(weights, config.saved, parent)


def notes_of(weights: Weights, saved: str, parent: Path) -> dict[str, Any]:
    """What the record says of weights that were ``remember``ed, changed and saved."""
    from methods.checkpoint import saved_dtype

    total, before = weights.counted
    return {
        "parameters": total,
        "nonzero_before": before,
        "nonzero_after": weights.nonzero()[1],
        "update_lost_in_saving": weights.lost_in_saving(),
        "saved_dtype": saved_dtype(saved, parent),
    }


def other_weights(stage: Stage, option: str, model: Any) -> dict[str, Tensor]:
    """The floating-point weights of the model that ``option`` names, in float32 on the processor, by name.

    Raises:
        AssayError: its tokenizer, or the name or shape of a weight, is not the parent's.
    """
    import torch

    from methods.checkpoint import load_model

    folder = stage.parents[option]
    _same_tokenizer(stage, option, folder)
    found = load_model(folder, "float32", torch.device("cpu")).state_dict()
    _same_shapes(stage, option, model.state_dict(), found)
    return {name: weight for name, weight in found.items() if weight.is_floating_point()}


def _same_tokenizer(stage: Stage, option: str, folder: Path) -> None:
    from methods.checkpoint import load_tokenizer, tokenizer_difference

    ours, theirs = load_tokenizer(stage.parents["model"]), load_tokenizer(folder)
    difference = tokenizer_difference(ours, theirs, "parent")
    if difference:
        raise AssayError(
            f"{stage.method}: the tokenizer of {option} {difference}: "
            f"weights can be compared only between descendants of one model; name one for {option}."
        )


def _same_shapes(stage: Stage, option: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    def shape(state: dict[str, Tensor], name: str) -> str:
        return "x".join(map(str, state[name].shape)) if name in state else "missing"

    for name in sorted(ours.keys() | theirs.keys()):
        if shape(ours, name) != shape(theirs, name):
            raise AssayError(
                f"{stage.method}: {name} is {shape(theirs, name)} in {option} and {shape(ours, name)} in the parent: "
                f"weights can be compared only between models of one shape; name such a chain for {option}."
            )
