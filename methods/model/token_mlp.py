"""A new classifier of token sequences: the MLP of the algorithmic tasks.

Baek, Liu, Tyagi, Tegmark 2025, "Harmonic Loss Trains Interpretable AI Models" (section 3; KindXiaoming/
grow-crystals, ``src/utils/driver.py``): every token is embedded with width d and the embeddings are concatenated,

    h = W2 silu(W1 [E a; E b] + b1) + b2,    scores = head(h),

where W1 leads to 100 units, W2 back to d, and the class vectors are the embedding E itself (``tied``). The control of
the paper's notebook (modadd.ipynb) shares nothing and has no bottleneck, 20-100-100-59: ``tied=False,
bottleneck=False, hidden=[100, 100]``. Layers start as torch starts a linear layer, an embedding that is not tied from
N(0, 1/d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from methods.model import NewNetwork, token_shape, write_classifier
from methods.stage import AssayError, Claim, Stage

SEEDED = True
TASKS = ("classification",)
USES = ("methods.data", "methods.checkpoint", "methods.architectures")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(NewNetwork):
    """Options of a new token MLP."""

    # Width of the embedding (the official code: 16; its notebook: 10).
    width: Annotated[int, Gt(0)] = 16
    # Width of each hidden layer (the official code: one of 100).
    hidden: tuple[Annotated[int, Gt(0)], ...] = (100,)
    # Whether a last linear layer leads back to the embedding's width.
    bottleneck: bool = True
    # Whether the class vectors are the embedding's vectors.
    tied: bool = True

    def __post_init__(self) -> None:
        if self.tied and not self.bottleneck:
            raise AssayError(
                "class vectors shared with the embedding are as wide as it: give tied=False beside bottleneck=False."
            )


def build(config: Config, stage: Stage) -> None:
    """Write a model for sequences and classes like the data set's."""
    from methods.architectures.classifiers import TokenMLPForSequenceClassification
    from methods.data import read_cases

    table = read_cases(stage.data.rows(config.data), config.data)
    settings = {
        **token_shape(table, config.data, "token_mlp"),
        "hidden_size": config.width,
        "hidden_sizes": list(config.hidden),
        "bottleneck": config.bottleneck,
        "tie_word_embeddings": config.tied,
        "output_bias": config.output_bias,
        "class_vectors": config.class_vectors,
    }
    write_classifier(stage, table, TokenMLPForSequenceClassification, settings)
