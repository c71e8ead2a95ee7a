"""Models made on the spot: a method of this family builds one from nothing and writes it to ``model/``.

``{new: KIND, ...}`` in an experiment file is ``model.KIND``; ``llama`` is ``model.new``. A builder of classifiers says
``TASKS = ("classification",)`` and has an option ``data``: the set whose cases the model takes and whose classes it
tells apart. ``SMOKE`` in a builder's file holds the largest values of its options at ``scale=smoke``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from methods.stage import AssayError, Dataset, Stage

if TYPE_CHECKING:
    from methods.data import CaseTable

REVISION = 1


@dataclass(frozen=True, kw_only=True)
class NewClassifier:
    """Options of every new classifier."""

    # Data set whose inputs it takes and whose classes it tells apart.
    data: Dataset
    # Whether a linear output layer has a bias; one that shares the embedding's vectors has none.
    output_bias: bool = True


@dataclass(frozen=True, kw_only=True)
class NewNetwork(NewClassifier):
    """Options of the classifiers that start as torch starts their layers."""

    # How the class vectors start: as nn.Linear does (uniform up to 1/sqrt(d)), or drawn from N(0, 1/d).
    class_vectors: Literal["linear", "normal"] = "linear"


def run(stage: Stage, method: ModuleType) -> None:
    """Let the method build the model; it writes ``stage.folder / "model"`` itself."""
    method.build(stage.config, stage)


def write_language_model(stage: Stage, make: Callable[[Any], Any]) -> None:
    """Write the tokenizer that the options ask for, the model that ``make`` makes for it, and how it is spoken to."""
    from methods import checkpoint
    from methods.data import Style, train_tokenizer

    config, folder = stage.config, stage.folder / "model"
    tokenizer = train_tokenizer(stage.data, (config.tokenizer,), config.vocabulary)
    tokenizer.model_max_length = config.context_tokens
    checkpoint.save_model(make(tokenizer), folder, None, dtype="float32")
    tokenizer.save_pretrained(folder)
    Style().write(folder)


def drawn(seed: int, make: Callable[[], Any]) -> Any:
    """What ``make`` draws from the global generator under a seed; the generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def write_classifier(stage: Stage, table: CaseTable, build: Any, settings: dict[str, Any]) -> None:
    """Draw a classifier of class ``build`` for the table's classes from the stage's seed, and write it in float32."""
    from methods import checkpoint

    layout = build.config_class(num_labels=table.classes, dtype="float32", **settings)
    model = drawn(stage.seed, lambda: build(layout))
    checkpoint.save_model(model, stage.folder / "model", None, dtype="float32")


def image_shape(table: CaseTable, dataset_name: str, kind: str) -> dict[str, Any]:
    """Channels and size of a set of images as settings of a classifier; AssayError for a set of tokens."""
    if table.inputs.ndim != 4:
        raise AssayError(
            f"new: {kind} is a model of images, but data set {dataset_name!r} has sequences of tokens: take token_mlp "
            "or token_transformer."
        )
    return {"num_channels": table.inputs.shape[1], "image_size": list(table.inputs.shape[2:])}


def token_shape(table: CaseTable, dataset_name: str, kind: str) -> dict[str, Any]:
    """Tokens and length of a set of sequences as settings of a classifier; AssayError for a set of images."""
    if table.inputs.ndim != 2:
        raise AssayError(
            f"new: {kind} is a model of tokens, but data set {dataset_name!r} has images: take mlp, cnn or vit."
        )
    # inputs and answers share their vocabulary
    return {"vocab_size": table.classes, "sequence_length": table.inputs.shape[1]}
