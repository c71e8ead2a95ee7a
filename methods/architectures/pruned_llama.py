"""A Llama whose layers differ in heads and neurons: what structural pruning leaves, physically smaller.

The configuration keeps the dense ``num_attention_heads``, ``num_key_value_heads`` and
``intermediate_size``, so that rotary embedding and validation see the model they know (transformers
insists that the hidden size be a multiple of the number of heads), and adds per layer

    layer_num_heads          [[query heads, key-value heads], ...]
    layer_intermediate_size  [neurons, ...]

Query heads are removed by whole key-value groups; each layer keeps at least one group and one neuron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from torch import Tensor


class PrunedLlamaConfig(LlamaConfig):
    """A Llama configuration with per-layer widths; None means as wide as the dense model."""

    model_type = "pruned_llama"

    layer_num_heads: list[list[int]] | None = None
    layer_intermediate_size: list[int] | None = None


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """A causal Llama with the per-layer widths of its configuration."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            if config.layer_num_heads is not None:
                resize_attention(layer.self_attn, *config.layer_num_heads[index])
            if config.layer_intermediate_size is not None:
                resize_mlp(layer.mlp, config.layer_intermediate_size[index])
        self.post_init()


def resize_attention(attention: Any, query_heads: int, key_value_heads: int) -> None:
    """Give an attention module new projections for these numbers of heads."""
    hidden, width = attention.q_proj.in_features, attention.head_dim
    attention.q_proj = like(attention.q_proj, hidden, query_heads * width)
    attention.k_proj = like(attention.k_proj, hidden, key_value_heads * width)
    attention.v_proj = like(attention.v_proj, hidden, key_value_heads * width)
    attention.o_proj = like(attention.o_proj, query_heads * width, hidden)
    attention.num_key_value_groups = query_heads // key_value_heads


def resize_mlp(mlp: Any, neurons: int) -> None:
    """Give an MLP new projections for this number of neurons."""
    hidden = mlp.gate_proj.in_features
    mlp.intermediate_size = neurons
    mlp.gate_proj = like(mlp.gate_proj, hidden, neurons)
    mlp.up_proj = like(mlp.up_proj, hidden, neurons)
    mlp.down_proj = like(mlp.down_proj, neurons, hidden)


def like(linear: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    """A linear layer of another shape, with a bias where the old one has one."""
    return nn.Linear(
        inputs, outputs, bias=linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype
    )


# --- cutting ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """Which units of a layer stay: indices of key-value groups and of neurons, and the group's width."""

    groups: Tensor
    neurons: Tensor
    queries_per_group: int
    head_dim: int

    def rows(self, heads_per_group: int) -> Tensor:
        """Row indices of the kept groups in a projection with that many heads a group."""
        import torch

        width = heads_per_group * self.head_dim
        offsets = torch.arange(width, device=self.groups.device)
        return (self.groups[:, None] * width + offsets).flatten()


def group_columns(attention: Any) -> Tensor:
    """``o_proj`` by group: [hidden, groups, columns of a group]."""
    groups = attention.k_proj.out_features // attention.head_dim
    columns: Tensor = attention.o_proj.weight.unflatten(1, (groups, -1))
    return columns


def kept_units(layer: Any) -> Units:
    """The units of a layer that contribute something; the first one where none does."""
    attention, down = layer.self_attn, layer.mlp.down_proj.weight
    return Units(
        groups=indices_or_first((group_columns(attention) != 0).any(dim=2).any(dim=0)),
        neurons=indices_or_first((down != 0).any(dim=0)),
        queries_per_group=attention.q_proj.out_features // attention.k_proj.out_features,
        head_dim=attention.head_dim,
    )


def indices_or_first(alive: Tensor) -> Tensor:
    """Indices of the true entries, or [0]: a layer without a single head or neuron has no shape."""
    indices = alive.nonzero().flatten()
    return indices if len(indices) else alive.new_zeros(1).long()


def widths(model: PreTrainedModel, kept: list[Units]) -> dict[str, object]:
    """The configuration fields that describe the kept units."""
    heads = [[len(units.groups) * units.queries_per_group, len(units.groups)] for units in kept]
    return {"layer_num_heads": heads, "layer_intermediate_size": [len(units.neurons) for units in kept]}


def sliced_state(model: PreTrainedModel, kept: list[Units]) -> dict[str, Tensor]:
    """The model's state dict with the removed units cut out of every projection."""
    state = dict(model.state_dict())
    prefix = f"{model.base_model_prefix}.layers"
    for index, units in enumerate(kept):
        for name, (dimension, chosen) in cuts(units).items():
            for part in ("weight", "bias"):
                key = f"{prefix}.{index}.{name}.{part}"
                # A bias runs along the outputs: cutting inputs leaves it whole.
                if key in state and not (part == "bias" and dimension == 1):
                    state[key] = state[key].index_select(dimension, chosen).contiguous()
    return state


def cuts(units: Units) -> dict[str, tuple[int, Tensor]]:
    """For each projection: the dimension that is cut and the indices that stay."""
    queries, keys = units.rows(units.queries_per_group), units.rows(1)
    return {
        "self_attn.q_proj": (0, queries),
        "self_attn.k_proj": (0, keys),
        "self_attn.v_proj": (0, keys),
        "self_attn.o_proj": (1, queries),
        "mlp.gate_proj": (0, units.neurons),
        "mlp.up_proj": (0, units.neurons),
        "mlp.down_proj": (1, units.neurons),
    }
