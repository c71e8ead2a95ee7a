"""A Llama whose layers differ in shape: what structural and low-rank compression leave, physically smaller.

The configuration keeps the dense ``num_attention_heads``, ``num_key_value_heads`` and ``intermediate_size``, so that
rotary embedding and validation see the model they know (transformers insists that the hidden size be a multiple of the
number of heads), and adds per layer

    layer_num_heads           [[query heads, key-value heads], ...]; [0, 0]: the layer has no attention
    layer_intermediate_size   [neurons, ...]; 0: the layer has no MLP
    layer_queries_per_group   [[query heads of each key-value head], ...]; needed where they are not equally many
    layer_ranks               [{"self_attn.q_proj": rank}, ...]: linear layers that are two factors

None means as in the dense model. A sub-block that is gone is skipped with its norm and adds its output bias, where the
configuration has biases. Layers without attention have no place in the key-value cache: those with one are numbered
through, so that the length of the cache is that of its first place whatever was removed. Whole blocks that are gone
are not in the model at all. ``methods.architectures.cutting`` makes such models out of dense ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))


class PrunedLlamaConfig(LlamaConfig):
    """A Llama configuration with per-layer shapes; None means as in the dense model."""

    model_type = "pruned_llama"

    layer_num_heads: list[list[int]] | None = None
    layer_intermediate_size: list[int] | None = None
    layer_queries_per_group: list[list[int]] | None = None
    layer_ranks: list[dict[str, int]] | None = None


FIELDS = ("layer_num_heads", "layer_intermediate_size", "layer_queries_per_group", "layer_ranks")


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """A causal Llama with the per-layer shapes of its configuration."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            reshape(layer, shape_of(config, index), config)
        number_caches(self.model.layers)
        self.post_init()


# --- shapes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a layer has."""

    # query heads of each key-value head; empty where the layer has no attention
    queries: tuple[int, ...]
    # 0 where it has no MLP
    neurons: int
    # by name of the projection ("mlp.up_proj"), for those that are two factors
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def heads(self) -> list[int]:
        """Query heads and key-value heads."""
        return [sum(self.queries), len(self.queries)]

    @property
    def even(self) -> bool:
        """Whether every key-value head has the same number of query heads."""
        return len(set(self.queries)) <= 1


def shape_of(config: Any, index: int) -> Shape:
    """The shape of a layer by a Llama's configuration, whether it has our fields or not.

    Raises an AssayError where query heads do not divide among the key-value heads and nothing says who has how many.
    """
    heads, neurons, queries, ranks = (entry(config, name, index) for name in FIELDS)
    count, groups = heads or (config.num_attention_heads, config.num_key_value_heads)
    return Shape(
        queries=tuple(queries) if queries is not None else evenly(count, groups, index),
        neurons=config.intermediate_size if neurons is None else neurons,
        ranks=ranks or {},
    )


def entry(config: Any, name: str, index: int) -> Any:
    """A layer's entry in one of the per-layer lists; None where there is no such list."""
    values = getattr(config, name, None)
    if values is None:
        return None
    if len(values) != config.num_hidden_layers:
        raise AssayError(
            f"config.json: {name} has {len(values)} entries for {config.num_hidden_layers} layers; give each its own."
        )
    return values[index]


def evenly(count: int, groups: int, index: int) -> tuple[int, ...]:
    """``count`` query heads in equal parts on ``groups`` key-value heads."""
    if groups == 0 or count % groups:
        if (count, groups) == (0, 0):
            return ()
        raise AssayError(
            f"layer {index}: {count} query heads cannot be divided equally among {groups} key-value heads; say in "
            "layer_queries_per_group how many each of them has."
        )
    return (count // groups,) * groups


def reshape(layer: Any, shape: Shape, config: Any) -> None:
    """Give a dense layer the parts of this shape, with new weights."""
    if shape.queries:
        layer.self_attn = attention_of(layer.self_attn, shape, config)
    else:
        layer.self_attn = NoAttention(config.hidden_size, config.attention_bias)
        layer.input_layernorm = nn.Identity()
    if shape.neurons:
        resize_mlp(layer.mlp, shape.neurons)
    else:
        layer.mlp = NoMLP(config.hidden_size, config.mlp_bias)
        layer.post_attention_layernorm = nn.Identity()
    for name, rank in shape.ranks.items():
        owner, _, part = name.partition(".")
        module = getattr(layer, owner)
        setattr(module, part, LowRank(getattr(module, part), rank))


def attention_of(attention: LlamaAttention, shape: Shape, config: Any) -> LlamaAttention:
    """An attention module with these heads: the given one, or another where key-value heads are shared unevenly."""
    if not shape.even:
        attention = UnevenAttention(config, attention.layer_idx, shape.queries)
    resize_attention(attention, *shape.heads)
    attention.num_key_value_groups = shape.queries[0] if shape.even else 1
    return attention


def resize_attention(attention: Any, query_heads: int, key_value_heads: int) -> None:
    """Give an attention module new projections for these numbers of heads."""
    hidden, width = attention.q_proj.in_features, attention.head_dim
    attention.q_proj = like(attention.q_proj, hidden, query_heads * width)
    attention.k_proj = like(attention.k_proj, hidden, key_value_heads * width)
    attention.v_proj = like(attention.v_proj, hidden, key_value_heads * width)
    attention.o_proj = like(attention.o_proj, query_heads * width, hidden)


def resize_mlp(mlp: Any, neurons: int) -> None:
    """Give an MLP new projections for this number of neurons."""
    hidden = mlp.gate_proj.in_features
    mlp.intermediate_size = neurons
    mlp.gate_proj = like(mlp.gate_proj, hidden, neurons)
    mlp.up_proj = like(mlp.up_proj, hidden, neurons)
    mlp.down_proj = like(mlp.down_proj, neurons, hidden)


def like(linear: nn.Linear, inputs: int, outputs: int, bias: bool | None = None) -> nn.Linear:
    """A linear layer of another shape; with a bias where the old one has one, unless said otherwise."""
    bias = linear.bias is not None if bias is None else bias
    return nn.Linear(inputs, outputs, bias=bias, device=linear.weight.device, dtype=linear.weight.dtype)


def number_caches(layers: Iterable[Any]) -> None:
    """Number the attentions that are left; where none is, the first layer counts the tokens in the cache."""
    parts = [layer.self_attn for layer in layers]
    attentions = [part for part in parts if not isinstance(part, NoAttention)]
    for number, attention in enumerate(attentions):
        attention.layer_idx = number
    if parts and not attentions:
        parts[0].counts = True


# --- parts -----------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A linear layer as two factors: ``outer(inner(x))``; the bias belongs to the outer one."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        self.inner = like(linear, linear.in_features, rank, bias=False)
        self.outer = like(linear, rank, linear.out_features)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.outer(self.inner(inputs))
        return outputs


class Absent(nn.Module):
    """In place of a sub-block that is gone: what it still adds is its output bias, or nothing."""

    def __init__(self, hidden: int, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden)) if bias else None

    def added(self, hidden_states: Tensor) -> Tensor:
        """What is added to the hidden states [B,T,d], in a shape that broadcasts."""
        return hidden_states.new_zeros(()) if self.bias is None else self.bias


class NoAttention(Absent):
    """In place of an attention."""

    # Whether it counts the tokens in the key-value cache: in the first layer of a model without any attention.
    counts = False

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        if self.counts and past_key_values is not None:
            place = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            past_key_values.update(place, place, 0)
        return self.added(hidden_states), None


class NoMLP(Absent):
    """In place of an MLP."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.added(hidden_states)


class UnevenAttention(LlamaAttention):
    """Attention whose key-value heads have different numbers of query heads, which stand in their order."""

    def __init__(self, config: Any, layer_idx: int, queries: tuple[int, ...]) -> None:
        super().__init__(config, layer_idx)
        self.queries = queries

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        keywords["past_key_values"] = Spread(keywords.get("past_key_values"), self.queries)
        return super().forward(*arguments, **keywords)


class Spread:
    """A key-value cache that gives every query head its own copy of its key-value head; stores each once."""

    def __init__(self, cache: Any, queries: tuple[int, ...]) -> None:
        self.cache, self.queries = cache, queries

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, key-value heads, T, d] of all tokens so far, as [B, query heads, T, d]."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, layer, *rest, **more)
        return self.spread(keys), self.spread(values)

    def spread(self, states: Tensor) -> Tensor:
        heads = zip(states.split(1, dim=1), self.queries, strict=True)
        return torch.cat([head.expand(-1, count, -1, -1) for head, count in heads], dim=1)
