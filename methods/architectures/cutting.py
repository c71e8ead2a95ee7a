"""Finds out what of a Llama is without effect, and makes the physically smaller model that lacks it.

A ``Cut`` is worked out from the weights alone. Where all layers come out alike the smaller model is a plain Llama, else
a ``pruned_llama``; a model with a head of ours keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM

from methods.architectures.harmonic_llama import HarmonicLlamaForCausalLM
from methods.architectures.pruned_llama import ATTENTION, FIELDS, MLP, PrunedLlamaForCausalLM, Shape, shape_of
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Factors = Mapping[str, tuple["Tensor", "Tensor"]]
"""By module name: a [out,r] and b [r,in], whose product is the layer's weight."""
NO_FACTORS: Factors = MappingProxyType({})
# The linear layers of a block.
PARTS = (*ATTENTION, *MLP)
# Where the layers are in a state dict.
PREFIX = "model.layers."
# Fields of a configuration, beside ours, that have one entry for each layer.
LISTS = ("layer_types",)


@dataclass(frozen=True)
class Cut:
    """What a model is cut to: for each of its blocks the tensors (with factors put in) and the units that stay."""

    model: PreTrainedModel
    layers: list[dict[str, Tensor]]
    kept: list[Kept]

    @classmethod
    def of(cls, model: PreTrainedModel, factors: Factors = NO_FACTORS) -> Cut:
        """Work out what can go. Raises an AssayError for factors that fit no linear layer of a block."""
        check_factors(model, factors)
        config = model.config
        layers = layer_states(model.state_dict(), config.num_hidden_layers)
        kept = []
        for index, layer in enumerate(layers):
            names = {part: f"{PREFIX}{index}.{part}" for part in PARTS}
            put_factors(layer, {part: factors[name] for part, name in names.items() if name in factors})
            kept.append(kept_units(layer, shape_of(config, index), config.head_dim))
        return cls(model, layers, kept)

    @cached_property
    def blocks(self) -> list[int]:
        """Indices of the blocks that stay: those that do something, and the first where none does."""
        return [index for index, units in enumerate(self.kept) if not units.nothing] or [0]

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of the blocks that stay."""
        return [self.kept[index].shape for index in self.blocks]

    @property
    def smaller(self) -> bool:
        """Whether anything goes."""
        config = self.model.config
        return self.shapes != [shape_of(config, index) for index in range(config.num_hidden_layers)]

    @cached_property
    def plain(self) -> dict[str, Any] | None:
        """The fields of a plain Llama of these shapes; None where they are no plain Llama's."""
        return uniform(self.shapes, self.model.config.hidden_size)

    def widths(self) -> dict[str, list[Any]]:
        """Heads ([query, key-value]) and neurons of every block of the model; zeros where nothing of it stays."""
        shapes = [units.shape for units in self.kept]
        return {"heads": [shape.heads for shape in shapes], "neurons": [shape.neurons for shape in shapes]}

    def build(self) -> PreTrainedModel:
        """The smaller model, on the model's device and in its precision."""
        from methods.architectures import copied_settings, rebuilt

        settings = copied_settings(self.model) | {"num_hidden_layers": len(self.blocks)}
        for name in LISTS:
            if settings.get(name):
                settings[name] = [settings[name][index] for index in self.blocks]
        settings |= self.plain or per_layer(self.shapes)
        return rebuilt(self.model, self._class(settings), settings, self.state())

    def _class(self, settings: dict[str, Any]) -> Any:
        """The class of the smaller model; of a plain one the settings lose our fields."""
        if self.model.config.model_type == "harmonic_llama":
            return HarmonicLlamaForCausalLM
        if self.plain is None:
            return PrunedLlamaForCausalLM
        for name in FIELDS:
            settings.pop(name)
        return LlamaForCausalLM

    def state(self) -> dict[str, Tensor]:
        """The state dict of the smaller model."""
        state = {
            name: value for name, value in self.model.state_dict().items() if not name.startswith(PREFIX)
        }
        for number, index in enumerate(self.blocks):
            layer = cut_layer(self.layers[index], self.kept[index])
            state |= {f"{PREFIX}{number}.{name}": tensor for name, tensor in layer.items()}
        return state

    def origin(self, name: str) -> str:
        """The weight of the model that a weight of the smaller one was made of."""
        if not name.startswith(PREFIX):
            return name
        number, _, part = name.removeprefix(PREFIX).partition(".")
        part = {"self_attn.bias": "self_attn.o_proj.bias", "mlp.bias": "mlp.down_proj.bias"}.get(part, part)
        part = part.replace(".outer.", ".").replace(".inner.", ".")
        return f"{PREFIX}{self.blocks[int(number)]}.{part}"


def check_factors(model: PreTrainedModel, factors: Factors) -> None:
    """Raise an AssayError unless the factors are those of linear layers of the model's blocks."""
    count = model.config.num_hidden_layers
    layers = {f"{PREFIX}{index}.{part}" for index in range(count) for part in PARTS}
    for name, (outer, inner) in factors.items():
        if name not in layers:
            raise AssayError(
                f"factors are given for {name!r}, which is no linear layer of a block: this model has {count} blocks, "
                f"{PREFIX}0 and so on, with the parts {', '.join(PARTS)}."
            )
        rows, columns = model.get_parameter(f"{name}.weight").shape
        if outer.shape != (rows, len(inner)) or inner.shape[1:] != (columns,):
            raise AssayError(
                f"the factors of {name} are {list(outer.shape)} and {list(inner.shape)}: to make its weight of "
                f"[{rows}, {columns}] they have to be [{rows}, r] and [r, {columns}]."
            )


# --- what stays ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Which units of a layer stay."""

    # indices of query heads
    queries: Tensor
    # how many query heads each key-value head of before has left
    counts: tuple[int, ...]
    # indices of neurons
    neurons: Tensor
    # ranks of all projections that are two factors
    ranks: Mapping[str, int]
    head_dim: int
    # whether a sub-block adds a bias that is not zero
    biased: bool

    @property
    def shape(self) -> Shape:
        """The shape that the layer has when it is cut."""
        left = tuple(count for count in self.counts if count)
        names = (*(ATTENTION if left else ()), *(MLP if len(self.neurons) else ()))
        ranks = {name: self.ranks[name] for name in names if name in self.ranks}
        return Shape(left, len(self.neurons), ranks)

    @property
    def nothing(self) -> bool:
        """Whether the block leaves the hidden states as they are."""
        return not (self.shape.queries or self.shape.neurons or self.biased)

    def rows(self, heads: Tensor) -> Tensor:
        """Indices of the rows or columns that belong to these heads."""
        return (heads[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()

    def chosen(self) -> dict[str, tuple[int, Tensor]]:
        """For each projection: the dimension that is cut and the indices that stay."""
        groups = torch.tensor([group for group, count in enumerate(self.counts) if count], dtype=torch.int64)
        queries, keys = self.rows(self.queries), self.rows(groups)
        return {
            "self_attn.q_proj": (0, queries),
            "self_attn.k_proj": (0, keys),
            "self_attn.v_proj": (0, keys),
            "self_attn.o_proj": (1, queries),
            "mlp.gate_proj": (0, self.neurons),
            "mlp.up_proj": (0, self.neurons),
            "mlp.down_proj": (1, self.neurons),
        }


def kept_units(layer: Mapping[str, Tensor], shape: Shape, head_dim: int) -> Kept:
    """The units of a layer that contribute something.

    A query head contributes nothing when its columns of ``o_proj`` are zero, or the rows of ``v_proj`` of its key-value
    head and their bias; a neuron when its column of ``down_proj`` is zero, or its row of ``up_proj`` and the bias.

    Args:
        layer: the layer's state dict; it has this shape.
    """
    queries, counts = kept_heads(layer, shape, head_dim)
    neurons = NONE
    if shape.neurons:
        neurons = alive_inputs(layer, "mlp.down_proj") & alive_outputs(layer, "mlp.up_proj")
    factors = {name: layer.get(f"{name}.inner.weight") for name in PARTS}
    return Kept(
        queries=queries,
        counts=counts,
        neurons=neurons.nonzero().flatten(),
        ranks={name: len(inner) for name, inner in factors.items() if inner is not None},
        head_dim=head_dim,
        biased=any(bool((bias != 0).any()) for bias in output_biases(layer).values()),
    )


NONE = torch.zeros(0, dtype=torch.bool)


def kept_heads(layer: Mapping[str, Tensor], shape: Shape, head_dim: int) -> tuple[Tensor, tuple[int, ...]]:
    """Indices of the query heads that contribute something, and how many each key-value head has of them."""
    if not shape.queries:
        return NONE.nonzero().flatten(), ()
    groups = torch.arange(len(shape.queries)).repeat_interleave(torch.tensor(shape.queries))
    written = alive_inputs(layer, "self_attn.o_proj").unflatten(0, (-1, head_dim)).any(dim=1)
    read = alive_outputs(layer, "self_attn.v_proj").unflatten(0, (-1, head_dim)).any(dim=1)
    alive = written & read[groups]
    counts = torch.bincount(groups[alive], minlength=len(shape.queries))
    return alive.nonzero().flatten(), tuple(counts.tolist())


def alive_inputs(layer: Mapping[str, Tensor], name: str) -> Tensor:
    """Which inputs of a projection count for anything [in], from its weight or the inner one of its factors."""
    weight = layer.get(f"{name}.inner.weight", layer.get(f"{name}.weight"))
    assert weight is not None  # every projection has one or the other
    return (weight != 0).any(dim=0).cpu()


def alive_outputs(layer: Mapping[str, Tensor], name: str) -> Tensor:
    """Which outputs of a projection can be anything but zero [out], from its weight or the outer one, and the bias."""
    part = f"{name}.outer" if f"{name}.outer.weight" in layer else name
    alive = (layer[f"{part}.weight"] != 0).any(dim=1)
    if f"{part}.bias" in layer:
        alive = alive | (layer[f"{part}.bias"] != 0)
    return alive.cpu()


def output_biases(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the sub-blocks of a layer add in any case: ``self_attn`` and ``mlp``, where they have such a bias."""
    found = {}
    for owner, last in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        for name in (f"{owner}.bias", f"{owner}.{last}.bias", f"{owner}.{last}.outer.bias"):
            if name in layer:
                found[owner] = layer[name]
    return found


# --- cutting ---------------------------------------------------------------------------------------------


# What of a projection, or of its two factors, runs along its outputs and its inputs.
ALONG = (("weight", "bias", "outer.weight", "outer.bias"), ("weight", "inner.weight"))


def layer_states(state: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The state dict of each of the layers, with names from the layer on."""
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in state.items():
        if name.startswith(PREFIX):
            index, _, part = name.removeprefix(PREFIX).partition(".")
            found[int(index)][part] = tensor
    return found


def put_factors(layer: dict[str, Tensor], factors: Factors) -> None:
    """Replace the weights of these projections by two factors, in a layer's state dict."""
    for name, (outer, inner) in factors.items():
        weight = layer.pop(f"{name}.weight")
        layer |= {f"{name}.outer.weight": outer.to(weight), f"{name}.inner.weight": inner.to(weight)}
        if f"{name}.bias" in layer:
            layer[f"{name}.outer.bias"] = layer.pop(f"{name}.bias")


def cut_layer(layer: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """A layer's state dict with all but the kept units cut out of every projection."""
    shape, chosen = kept.shape, kept.chosen()
    gone = (
        *(() if shape.queries else ("self_attn.", "input_layernorm.")),
        *(() if shape.neurons else ("mlp.", "post_attention_layernorm.")),
    )
    result = {f"{owner}.bias": bias for owner, bias in output_biases(layer).items() if f"{owner}." in gone}
    for name, tensor in layer.items():
        if not name.startswith(gone):
            result[name] = cut(tensor, name, chosen)
    return result


def cut(tensor: Tensor, name: str, chosen: Mapping[str, tuple[int, Tensor]]) -> Tensor:
    """One tensor of a layer, cut where it runs along a dimension that is."""
    owner, _, rest = name.partition(".")
    part, _, what = rest.partition(".")
    dimension, indices = chosen.get(f"{owner}.{part}", (0, NONE))
    if f"{owner}.{part}" not in chosen or what not in ALONG[dimension]:
        return tensor
    return tensor.index_select(dimension, indices.to(tensor.device)).contiguous()


def per_layer(shapes: list[Shape]) -> dict[str, Any]:
    """The configuration fields that describe layers of these shapes."""
    even, whole = all(shape.even for shape in shapes), not any(shape.ranks for shape in shapes)
    return {
        "layer_num_heads": [shape.heads for shape in shapes],
        "layer_intermediate_size": [shape.neurons for shape in shapes],
        "layer_queries_per_group": None if even else [list(shape.queries) for shape in shapes],
        "layer_ranks": None if whole else [dict(shape.ranks) for shape in shapes],
    }


def uniform(shapes: list[Shape], hidden: int) -> dict[str, Any] | None:
    """The fields of a plain Llama whose layers have these shapes; None where there is none.

    All layers must be alike, have both sub-blocks, no factors, and a number of heads that transformers allows.
    """
    first = shapes[0]
    heads, groups = first.heads
    alike = all(shape == first for shape in shapes) and first.even and not first.ranks
    if not (alike and heads and first.neurons and hidden % heads == 0):
        return None
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": first.neurons,
        **dict.fromkeys(FIELDS),
    }
