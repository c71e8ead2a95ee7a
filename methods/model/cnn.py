"""A new classifier of images: a small convolutional network in the manner of LeNet.

LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition": (convolution -> maximum over 2 x 2) a
few times, then a hidden layer, then the output layer. Here convolutions are 3 x 3 with padding, and ReLU stands after
each layer; all start as torch starts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from methods.model import NewNetwork, image_shape, write_classifier
from methods.stage import Claim, Stage

SEEDED = True
TASKS = ("classification",)
USES = ("methods.data", "methods.checkpoint", "methods.architectures")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(NewNetwork):
    """Options of a new CNN."""

    # Channels of each convolution.
    channels: tuple[Annotated[int, Gt(0)], ...] = (16, 32)
    # Width of the hidden layer that the output layer reads.
    hidden: Annotated[int, Gt(0)] = 64


def build(config: Config, stage: Stage) -> None:
    """Write a model of the shape of the data set's images."""
    from methods.architectures.classifiers import ImageCNNForImageClassification
    from methods.data import read_cases

    table = read_cases(stage.data.rows(config.data), config.data)
    settings = {
        **image_shape(table, config.data, "cnn"),
        "conv_channels": list(config.channels),
        "hidden_size": config.hidden,
        "output_bias": config.output_bias,
        "class_vectors": config.class_vectors,
    }
    write_classifier(stage, table, ImageCNNForImageClassification, settings)
