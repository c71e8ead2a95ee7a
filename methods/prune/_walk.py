"""Walks the blocks of a decoder for pruners that look at activations, and saves where the walk stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from methods.progress import Progress

REVISION = 1


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder blocks in order, or a sentence for a model that is built otherwise."""
    from torch import nn

    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        found = ", ".join(name for name, _ in model.base_model.named_children()) or "no modules"
        raise AssayError(
            f"pruning needs a Llama-like decoder, with its blocks in a list called layers (model.layers.0, …); "
            f"{type(model).__name__} has {found}."
        )
    return layers


def linear_weights(model: PreTrainedModel, blocks: int | None = None) -> Iterator[str]:
    """Full names of the weights that pruning may touch, in the order of the blocks."""
    from torch import nn

    layers = decoder_layers(model)
    wanted = {
        id(part) for layer in layers[:blocks] for part in layer.modules() if isinstance(part, nn.Linear)
    }
    for name, part in model.named_modules():
        if id(part) in wanted:
            yield f"{name}.weight"


def decoder_names(model: PreTrainedModel) -> list[str]:
    """The full names of the decoder's blocks in order, such as ``model.layers.0``."""
    layers = decoder_layers(model)
    found = {id(part): name for name, part in model.named_modules()}
    return [found[id(layer)] for layer in layers]


@dataclass(frozen=True)
class Block:
    """One decoder block with its inputs for every calibration sequence."""

    index: int
    name: str  # in the model, such as model.layers.0
    module: nn.Module
    inputs: list[Tensor]  # one [1,T,d] per sequence
    settings: list[Mapping[str, Any]]  # the other arguments of the block, per sequence

    def linears(self) -> dict[str, nn.Linear]:
        """The block's linear layers by name, in the order they were defined."""
        from torch import nn

        return {name: part for name, part in self.module.named_modules() if isinstance(part, nn.Linear)}

    def full(self, name: str) -> str:
        """The name in the model of a module of the block."""
        return f"{self.name}.{name}"

    def run(self) -> list[Tensor]:
        """The block's outputs with the weights it has now, one [1,T,d] per sequence."""
        return list(self._outputs())

    def _outputs(self) -> Iterator[Tensor]:
        """The same one after the other."""
        import torch

        for hidden, settings in zip(self.inputs, self.settings, strict=True):
            with torch.no_grad():
                output = first(self.module(hidden, **settings))
            yield output

    def run_watched(self, see: Any) -> None:
        """Run all sequences; ``see(name, x)`` gets the input [tokens, in] of every linear layer."""
        with ExitStack() as stack:
            for name, linear in self.linears().items():

                def hook(_module: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                    see(name, arguments[0].flatten(0, -2))

                handle = linear.register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            # Only what is seen counts: nothing is kept of the outputs.
            for _ in self._outputs():
                pass


def first(output: Any) -> Tensor:
    """The hidden states among what a block returns: some models return a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def walk(model: PreTrainedModel, sequences: list[Tensor]) -> Iterator[Block]:
    """Yield the decoder blocks in order; each sees the outputs of its predecessors *as they are by then*.

    Whatever the caller changes in a block before asking for the next one is what the next one's inputs
    are computed with. Memory: the hidden states of all sequences at one depth.
    """
    layers, names = decoder_layers(model), decoder_names(model)
    inputs, settings = first_inputs(model, sequences)
    for index, (name, module) in enumerate(zip(names, layers, strict=True)):
        block = Block(index, name, module, inputs, settings)
        yield block
        if index + 1 < len(layers):
            inputs = block.run()


def walk_shown(
    model: PreTrainedModel, sequences: list[Tensor], progress: Progress, what: str
) -> Iterator[Block]:
    """``walk`` with a bar that counts the blocks."""
    bar = progress.bar(len(decoder_layers(model)), what)
    for _, block in zip(bar, walk(model, sequences), strict=False):
        yield block


class _Caught(Exception):
    """Ends a forward pass once the first block's arguments are known."""


def first_inputs(
    model: PreTrainedModel, sequences: list[Tensor]
) -> tuple[list[Tensor], list[Mapping[str, Any]]]:
    """What the first decoder block is called with: hidden states and other arguments, per sequence."""
    import torch

    inputs: list[Tensor] = []
    settings: list[Mapping[str, Any]] = []

    def catch(_module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        inputs.append(arguments[0])
        settings.append(keywords)
        raise _Caught

    handle = decoder_layers(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for sequence in sequences:
            with torch.no_grad(), suppress(_Caught):
                model(input_ids=sequence.to(model.device), use_cache=False)
    finally:
        handle.remove()
    return inputs, settings


# --- pruning along the walk ---------------------------------------------------------------------------------


def prune_blocks(
    model: PreTrainedModel,
    sequences: list[Tensor],
    progress: Progress,
    prune_block: Callable[[Block], None],
    weights: bool = False,
) -> None:
    """Prune block after block, each on the inputs that its pruned predecessors give; go on after a kill.

    Args:
        sequences: token ids [1,T] each, of any lengths.
        prune_block: changes the linear layers of one block in place.
        weights: whether it changes weights that stay, too. Then the finished layers themselves are saved, weights
            and biases; otherwise one bit for each weight is enough.
    """
    import torch

    finished = resume(model, progress)
    with torch.no_grad():
        for block in walk_shown(model, sequences, progress, "blocks pruned"):
            if block.index >= finished:
                prune_block(block)
                remember(model, progress, block.index + 1, weights)


def resume(model: PreTrainedModel, progress: Progress) -> int:
    """Put the masks or the weights of an interrupted walk back; returns how many blocks they cover."""
    import torch

    state = progress.load()
    if state is None:
        return 0
    with torch.no_grad():
        for name, saved in state.tensors.items():
            parameter = model.get_parameter(name)
            if saved.dtype == torch.bool:
                parameter.masked_fill_(saved.to(parameter.device), 0.0)
            else:
                parameter.copy_(saved)
    return int(state.step)


def remember(model: PreTrainedModel, progress: Progress, blocks: int, weights: bool = False) -> None:
    """Save the first ``blocks`` blocks when it is due; raises Interrupted if asked to stop."""
    if progress.due(blocks):
        progress.save(blocks, _state(model, blocks, weights), {})


def _state(model: PreTrainedModel, blocks: int, weights: bool) -> dict[str, Tensor]:
    """What a resumed walk needs of the first blocks: the zeros of every linear layer, or all its numbers."""
    names = list(linear_weights(model, blocks))
    if not weights:
        return {name: model.get_parameter(name).data == 0 for name in names}
    biases = {name.removesuffix("weight") + "bias" for name in names}
    wanted = biases.union(names)
    return {name: part.data for name, part in model.named_parameters() if name in wanted}
