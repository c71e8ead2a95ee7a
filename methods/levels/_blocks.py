"""How level databases are built: layer after layer, or block after block where inputs are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from methods.prune._walk import decoder_layers, decoder_names, walk_shown
from methods.stage import Dataset

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune._walk import Block


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Options of databases that look at activations; a ``Config`` inherits them."""

    # Named data set the layers' inputs are measured on; FineWeb-Edu in EvoPress and Týr.
    data: Dataset
    # Tokens of it, at least, in whole sequences drawn by the seed; 2^23 in EvoPress, 2^22 in Týr.
    calibration_tokens: Annotated[int, Gt(0)] = 8192
    # Longest calibration sequence; 8,192 in EvoPress, 4,096 in Týr.
    context_tokens: Annotated[int, Gt(0)] = 2048


# Writes the levels of a block; what it returns by the layers' names in the block stands in for their dense weights.
Builder = Callable[["Block"], Mapping[str, "Tensor"]]


def build_blocks(
    model: PreTrainedModel, sequences: list[Tensor], progress: Progress, build_block: Builder
) -> None:
    """Let ``build_block`` write the levels of every block, each on the outputs of those before it.

    What it returns is in place while the block is run for its successor's inputs; then the dense weights are back, so
    that the model ends as it was, bit for bit.
    """
    import torch

    dense: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for block in walk_shown(model, sequences, progress, "blocks at every level"):
            _put(dense)
            linears = block.linears()
            seen = {linears[name].weight: weight for name, weight in build_block(block).items()}
            dense = {weight: weight.clone() for weight in seen}
            _put(seen)
            save_if_due(progress, block.index + 1)
        _put(dense)


def _put(weights: Mapping[Tensor, Tensor]) -> None:
    for weight, values in weights.items():
        weight.copy_(values)


def build_layers(
    model: PreTrainedModel,
    progress: Progress,
    writer: Writer,
    build_layer: Callable[[int, str, Tensor], None],
) -> None:
    """Let ``build_layer(block, name, weight)`` write the levels of every layer that is not finished by itself."""
    from torch import nn

    layers = [
        (index, f"{prefix}.{name}", part.weight.detach())
        for index, (prefix, block) in enumerate(zip(decoder_names(model), decoder_layers(model), strict=True))
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear)
    ]
    for number in progress.bar(len(layers), "layers at every level"):
        index, name, weight = layers[number]
        if not writer.finished(name):
            build_layer(index, name, weight)
        save_if_due(progress, number + 1)


def save_if_due(progress: Progress, step: int) -> None:
    """Save how far the job is, its account of energy with it; raises Interrupted if asked to stop.

    The levels themselves are safe already: the writer keeps every finished layer.
    """
    if progress.due(step):
        progress.save(step, {}, {})
