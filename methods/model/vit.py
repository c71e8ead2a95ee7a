"""A new classifier of images: a small vision transformer.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", as transformers
has it: the image in square patches, a class token whose last state enters the output layer, weights started from a
normal distribution with standard deviation 0.02.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from methods.model import NewClassifier, image_shape, write_classifier
from methods.stage import AssayError, Claim, Stage

SEEDED = True
TASKS = ("classification",)
USES = ("methods.data", "methods.checkpoint", "methods.architectures")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(NewClassifier):
    """Options of a new ViT."""

    # Side of a patch in pixels; a divisor of the image's sides.
    patch: Annotated[int, Gt(0)] = 4
    # Width of the residual stream.
    hidden: Annotated[int, Gt(0)] = 32
    # Encoder layers.
    layers: Annotated[int, Gt(0)] = 2
    # Attention heads, a divisor of hidden.
    heads: Annotated[int, Gt(0)] = 2
    # Width of the feed-forward layer.
    mlp: Annotated[int, Gt(0)] = 64
    # Share of activations that training drops.
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise AssayError(f"hidden={self.hidden} must be a multiple of heads={self.heads}.")


def build(config: Config, stage: Stage) -> None:
    """Write a model of the shape of the data set's images."""
    from methods.architectures.classifiers import ImageViTForImageClassification
    from methods.data import read_cases

    table = read_cases(stage.data.rows(config.data), config.data)
    shape = image_shape(table, config.data, "vit")
    if any(side % config.patch for side in shape["image_size"]):
        sides = " x ".join(map(str, shape["image_size"]))
        raise AssayError(
            f"patch={config.patch} must divide the sides of the images, which are {sides} pixels."
        )
    settings = {
        **shape,
        "patch_size": config.patch,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "output_bias": config.output_bias,
    }
    write_classifier(stage, table, ImageViTForImageClassification, settings)
