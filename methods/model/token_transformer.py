"""A new classifier of token sequences: the transformer of the algorithmic tasks.

Baek, Liu, Tyagi, Tegmark 2025, "Harmonic Loss Trains Interpretable AI Models" (section 3; KindXiaoming/
grow-crystals, ``src/utils/driver.py``): embedded tokens and learned positions, two encoder blocks (Vaswani et al. 2017)
each with a residual around the whole block, the answer read at the last position. The official code ties the embedding
to a linear output layer and leaves it free under a harmonic one. It also measures test accuracy with dropout on,
because its models cannot leave training mode; here an evaluation never drops anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from methods.model import NewNetwork, token_shape, write_classifier
from methods.stage import AssayError, Claim, Stage

SEEDED = True
TASKS = ("classification",)
USES = ("methods.data", "methods.checkpoint", "methods.architectures")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(NewNetwork):
    """Options of a new token transformer."""

    # Width of the residual stream (the official code: 16).
    hidden: Annotated[int, Gt(0)] = 16
    # Encoder blocks (the official code: 2).
    layers: Annotated[int, Gt(0)] = 2
    # Attention heads, a divisor of hidden (the official code: 2).
    heads: Annotated[int, Gt(0)] = 2
    # Width of the feed-forward layer.
    mlp: Annotated[int, Gt(0)] = 64
    # Share of activations that training drops (the official code: 0.1).
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    # Whether the class vectors are the embedding's vectors.
    tied: bool = False

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise AssayError(f"hidden={self.hidden} must be a multiple of heads={self.heads}.")


def build(config: Config, stage: Stage) -> None:
    """Write a model for sequences and classes like the data set's."""
    from methods.architectures.classifiers import TokenTransformerForSequenceClassification
    from methods.data import read_cases

    table = read_cases(stage.data.rows(config.data), config.data)
    settings = {
        **token_shape(table, config.data, "token_transformer"),
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "hidden_dropout_prob": config.dropout,
        "tie_word_embeddings": config.tied,
        "output_bias": config.output_bias,
        "class_vectors": config.class_vectors,
    }
    write_classifier(stage, table, TokenTransformerForSequenceClassification, settings)
