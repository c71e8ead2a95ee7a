"""A new, randomly started model with a tokenizer trained for it.

A decoder-only transformer in the Llama layout (Touvron et al. 2023, "LLaMA: Open and Efficient Foundation
Language Models"), initialised as transformers does it: normal with standard deviation 0.02, norms at 1. The
tokenizer is a byte-level BPE trained on the named data sets. The defaults are the recommended model of the built-in
world: 155,968 parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.stage import AssayError, Claim, Dataset, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEEDED = True
USES = ("methods.data", "methods.checkpoint")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a new model."""

    # The architecture.
    kind: Literal["llama"] = "llama"
    # Width of the residual stream.
    hidden: Annotated[int, Gt(0)] = 64
    # Decoder layers.
    layers: Annotated[int, Gt(0)] = 2
    # Attention heads; each is hidden / heads wide, which must be even for rotary positions.
    heads: Annotated[int, Gt(0)] = 4
    # Key and value heads, a divisor of heads; None is as many as heads (no grouping).
    kv_heads: Annotated[int, Gt(0)] | None = None
    # Width of the gated feed-forward layer.
    mlp: Annotated[int, Gt(0)] = 192
    # Whether the output layer shares the embedding's weights.
    tied: bool = True
    # Longest sequence the model is meant for; it has no weights that depend on it.
    context_tokens: Annotated[int, Gt(1)] = 256
    # Entries of the tokenizer, 256 bytes and 3 special tokens included.
    vocabulary: Annotated[int, Ge(259)] = 768
    # Data sets the tokenizer is trained on, joined by "+"; "authors" is the whole built-in world.
    tokenizer: Dataset = "authors"

    def __post_init__(self) -> None:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise AssayError(
                f"hidden={self.hidden} must be heads={self.heads} times an even number, the width of a head."
            )
        if self.heads % (self.kv_heads or self.heads):
            raise AssayError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")


def build(config: Config, stage: Stage) -> None:
    """Write the model, its tokenizer and the way it is spoken to."""
    from methods.model import write_language_model

    write_language_model(stage, lambda tokenizer: initial(config, tokenizer, stage.seed))


def initial(config: Config, tokenizer: Any, seed: int) -> PreTrainedModel:
    """The float32 model with weights drawn from ``seed``; the global generator is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from methods.model import drawn

    layout = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=config.context_tokens,
        tie_word_embeddings=config.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model: PreTrainedModel = drawn(seed, lambda: LlamaForCausalLM(layout))
    return model
