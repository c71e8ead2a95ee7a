"""Two models weight by weight: what arithmetic on weights needs of them.

``methods.unlearn``'s REVISION covers this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, Stage

if TYPE_CHECKING:
    from torch import Tensor


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
    from methods.checkpoint import load_tokenizer

    ours, theirs = (load_tokenizer(path).get_vocab() for path in (stage.parents["model"], folder))
    if ours != theirs:
        raise AssayError(
            f"{stage.method}: the tokenizer of {option} ({len(theirs)} tokens) is not the parent's ({len(ours)}): "
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
