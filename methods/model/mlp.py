"""A new classifier of images: a multi-layer perceptron.

Pixels in one row, then (linear layer -> ReLU) for every hidden width, then the output layer, all started as torch
starts a linear layer. Without hidden widths it is the single layer of Baek, Liu, Tyagi, Tegmark 2025,
"Harmonic Loss Trains Interpretable AI Models" (notebooks/mnist.ipynb of KindXiaoming/grow-crystals), whose
class vectors start from N(0, 1/d): ``hidden=(), class_vectors="normal"``.
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
    """Options of a new image MLP."""

    # Width of each hidden layer.
    hidden: tuple[Annotated[int, Gt(0)], ...] = (64, 32)


def build(config: Config, stage: Stage) -> None:
    """Write a model of the shape of the data set's images."""
    from methods.architectures.classifiers import ImageMLPForImageClassification
    from methods.data import read_cases

    table = read_cases(stage.data.rows(config.data), config.data)
    settings = {
        **image_shape(table, config.data, "mlp"),
        "hidden_sizes": list(config.hidden),
        "output_bias": config.output_bias,
        "class_vectors": config.class_vectors,
    }
    write_classifier(stage, table, ImageMLPForImageClassification, settings)
