"""A Llama whose cache of keys and values is narrower: both are kept as coordinates in orthonormal bases.

For every layer and key-value head the configuration's ``key_rank`` and ``value_rank`` columns U (keys) and V (values)
of two bases, and the mean m of the values:

    kept: z = k U after the rotary embedding, y = (v - m) V        q k' becomes (q U) z',   the output a y V' + m

A mean of the keys would add the same number to all scores of a query, which the softmax takes away again; so there is
none. The weights are those of the model it was made from, and the bases are buffers: training leaves them alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

if TYPE_CHECKING:
    from torch import Tensor


class ProjectedLlamaConfig(LlamaConfig):
    """A Llama configuration with the numbers of coordinates that the cache holds of each key and value."""

    model_type = "projected_llama"

    key_rank: int | None = None
    value_rank: int | None = None


class ProjectedLlamaForCausalLM(LlamaForCausalLM):
    """A causal Llama with a narrower cache."""

    config_class = ProjectedLlamaConfig

    def __init__(self, config: ProjectedLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = ProjectedAttention(config, index)
        self.post_init()


class ProjectedAttention(LlamaAttention):
    """Attention on coordinates of keys and values."""

    key_basis: Tensor
    value_basis: Tensor
    value_mean: Tensor

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads, width = config.num_key_value_heads, self.head_dim
        keys, values = config.key_rank or width, config.value_rank or width
        self.register_buffer("key_basis", torch.zeros(heads, width, keys))
        self.register_buffer("value_basis", torch.zeros(heads, width, values))
        self.register_buffer("value_mean", torch.zeros(heads, width))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """As in a Llama, but for what is kept of keys and values and what is made of it."""
        assert position_embeddings is not None  # the decoder makes them once for all of its layers
        query, key, value = self._coordinates(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        options |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        output, weights = attend(self, query, key, value, attention_mask, **options)
        return self.o_proj(self._restored(output).flatten(-2)), weights

    def _coordinates(
        self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, query heads, T, key rank], keys [B,H,T,key rank] and values [B,H,T,value rank]."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        query = (self._grouped(query, 1) @ self.key_basis[:, None]).flatten(1, 2)
        return query, key @ self.key_basis, (value - self.value_mean[:, None]) @ self.value_basis

    def _restored(self, output: Tensor) -> Tensor:
        """Outputs [B,T,query heads,head size] from their coordinates [B,T,query heads,value rank]."""
        grouped = self._grouped(output, 2)
        return (grouped @ self.value_basis.mT + self.value_mean[:, None]).flatten(2, 3)

    def _grouped(self, states: Tensor, dimension: int) -> Tensor:
        """The query heads in that dimension as key-value heads, and query heads of each."""
        return states.unflatten(dimension, (len(self.key_basis), -1))
