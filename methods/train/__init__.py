"""Training: from rows to a model that answers them, or that tells classes apart.

A method file holds ``loss(config, model, batch)`` and returns named terms; ``batch.train`` is a
``methods.data.Part`` of sequences or, where the model is a classifier, ``methods.data.Cases``. An option ``data`` names
the rows, and ``head``, where a method has it, another output head. What else it needs it says in functions of its own,
each of which may be left out:

* ``prepare(config, model, stage, parts)``: called with the model under its head, before training; ``parts`` is
  ``{"train": examples or cases}``, and what it returns, if anything, stands in their place. Buffers that it registers
  on the model with ``persistent=False`` are saved and resumed with the run, and not written with the model.
* ``masking(config, model, stage, steps)``: masks that change while the model is trained (``methods.masking``).
* ``outer(config)``: for a loss that is no sum over items, the objective as a function of the terms' means.

Batches that a method's option ``loss`` cannot work on are refused before training, and its option ``weighting`` gives
the weights of the global batch's rows, which the loss reads with ``batch.weigh``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from methods.stage import Stage

if TYPE_CHECKING:
    from methods.gradient import Batch
    from methods.stage import Terms

REVISION = 1


def run(stage: Stage, method: ModuleType) -> None:
    """Read the rows, load the model, give it its head and train it with the method's loss.

    ``loss_floor_nats`` in the notes is the least mean cross entropy that the head can reach.
    """
    from methods import loop, weighting
    from methods import loss as losses
    from methods.architectures import output_layer
    from methods.data import CaseTable

    config = stage.config
    parts = _parts(stage)
    fresh = getattr(config, "start", "parent") == "random"
    model = loop.prepare(stage, config, head=getattr(config, "head", None), fresh=fresh)
    layer = output_layer(model)
    if hasattr(layer, "loss_floor"):
        stage.notes["loss_floor_nats"] = layer.loss_floor()
    rows = parts["train"]
    if isinstance(rows, CaseTable):
        rows.check_model(model, config.data)
    parts = _hook(method, "prepare", config, model, stage, parts) or parts
    # A batch of more cases than there are would see some of them twice.
    size = min(config.batch, len(parts["train"])) if isinstance(rows, CaseTable) else config.batch
    settings = replace(config, batch=size)
    batches = loop.Batches(parts, size=size, seed=stage.seed)
    steps = loop.steps_of(settings, batches.count)
    losses.check_batches(getattr(config, "loss", None), batches, steps)

    def loss(model: Any, batch: Batch) -> Terms:
        terms: Terms = method.loss(config, model, batch)
        return terms

    weigh = weighting.weigh(getattr(config, "weighting", None))
    masking = _hook(method, "masking", config, model, stage, steps)
    outer = _hook(method, "outer", config)
    loop.train(stage, model, settings, batches, loss, outer=outer, weigh=weigh, masking=masking)


def _parts(stage: Stage) -> Mapping[str, Any]:
    """The rows as encoded examples, or as a table of cases where the model is a classifier."""
    from methods.checkpoint import is_classifier, load_tokenizer
    from methods.data import Style, encode, read_cases

    config, source = stage.config, stage.parents["model"]
    rows = stage.data.rows(config.data)
    if is_classifier(source):
        return {"train": read_cases(rows, config.data)}
    return {"train": encode(rows, load_tokenizer(source), Style.read(source), config.context_tokens)}


def _hook(method: ModuleType, name: str, *arguments: Any) -> Any:
    """What one of the method's own functions says; None where it has none of that name."""
    return getattr(method, name)(*arguments) if hasattr(method, name) else None
