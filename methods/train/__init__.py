"""Training: from rows to a model that answers them.

A method file holds ``loss(config, model, batch)`` and returns named terms; ``batch.train`` is a
``methods.data.Part``. An option ``data`` names the rows, and ``head``, where a method has it, another output head.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from methods.stage import Stage

if TYPE_CHECKING:
    from methods.gradient import Batch
    from methods.stage import Terms

REVISION = 1


def run(stage: Stage, method: ModuleType) -> None:
    """Encode the rows, load the model and train it with the method's loss."""
    from methods import loop
    from methods.checkpoint import load_tokenizer
    from methods.data import Style, encode

    config, source = stage.config, stage.parents["model"]
    rows = stage.data.rows(config.data)
    examples = encode(rows, load_tokenizer(source), Style.read(source), config.context_tokens)
    model = loop.prepare(stage, config, head=getattr(config, "head", None))

    def loss(model: Any, batch: Batch) -> Terms:
        terms: Terms = method.loss(config, model, batch)
        return terms

    loop.train(
        stage, model, config, loop.Batches({"train": examples}, size=config.batch, seed=stage.seed), loss
    )
