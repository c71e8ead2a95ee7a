"""A new, randomly started GPT-2 with a tokenizer trained for it.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", as transformers has it: learned positions,
biases everywhere, weights started from a normal distribution with standard deviation 0.02. The tokenizer is that of
``model.new``: a byte-level BPE trained on the named data sets. The defaults are a small model for the built-in world;
GPT-2 small itself is ``layers=12, heads=12, hidden=768, context_tokens=1024, vocabulary=50257``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

from methods.stage import AssayError, Claim, Dataset, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEEDED = True
USES = ("methods.data", "methods.checkpoint")
CLAIMS: tuple[Claim, ...] = ()
# GPT-2 small is nothing for a run that only has to reach its tables; one head divides any width.
SMOKE = {"layers": 2, "heads": 1, "hidden": 32, "vocabulary": 512}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a new GPT-2."""

    # Width of the residual stream.
    hidden: Annotated[int, Gt(0)] = 64
    # Decoder layers.
    layers: Annotated[int, Gt(0)] = 2
    # Attention heads, a divisor of hidden.
    heads: Annotated[int, Gt(0)] = 4
    # Whether the output layer shares the embedding's weights.
    tied: bool = True
    # Share of activations that training drops (the spec's harmonic recipe: none; the library's default is 0.1).
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    # Longest sequence: the number of positions that are learned.
    context_tokens: Annotated[int, Gt(1)] = 256
    # Entries of the tokenizer, 256 bytes and 3 special tokens included.
    vocabulary: Annotated[int, Ge(259)] = 768
    # Data sets the tokenizer is trained on, joined by "+"; "authors" is the whole built-in world.
    tokenizer: Dataset = "authors"

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise AssayError(f"hidden={self.hidden} must be a multiple of heads={self.heads}.")


def build(config: Config, stage: Stage) -> None:
    """Write the model, its tokenizer and the way it is spoken to."""
    from methods.model import write_language_model

    write_language_model(stage, lambda tokenizer: initial(config, tokenizer, stage.seed))


def initial(config: Config, tokenizer: Any, seed: int) -> PreTrainedModel:
    """The float32 model with weights drawn from ``seed``; the global generator is left as it was."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from methods.model import drawn

    layout = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=config.context_tokens,
        n_embd=config.hidden,
        n_layer=config.layers,
        n_head=config.heads,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        tie_word_embeddings=config.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model: PreTrainedModel = drawn(seed, lambda: GPT2LMHeadModel(layout))
    return model
