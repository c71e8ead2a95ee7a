"""The one training loop. Signatures are settled; the bodies are being written (see the helper's report).

    model = loop.prepare(stage, settings)                      # parent in float32 on the device, adapter attached
    reference = loop.reference_of(stage, model, settings)      # frozen start (with an adapter: the adapter off)
    teacher = loop.frozen_model(folder, settings)              # any other model, eval, no gradients, same precision
    batches = loop.Batches({"forget": [...Example], "retain": [...]}, size=16, seed=stage.seed, follows={"template": "forget"})
    loop.train(stage, model, settings, batches, lambda model, batch: method.loss(config, model, batch, reference))
    # whole-batch losses: loop.train(..., loss=terms are statistics, outer=lambda means: method.outer(config, means))

``batch`` given to the loss: ``batch.forget``, ``batch.retain``, ... (data.Part on the device), ``batch.step`` (updates done so far),
``batch.steps`` (in all). Padding is that of the GLOBAL batch, so ``positions`` counts are exact under micro-batches.
Term.count: a ``Count`` from the part (best: totals known ahead), any plain number (added up in a no-grad first pass when there
are several micro-batches), or ``Count(1.0, "batch")`` for a plain sum that is not divided.
A term with weight 0 is only logged. train() writes stage.folder/'model' (+ 'model/adapter', 'model@N', 'curve.csv') and stage.notes;
probes ("name=dataset" in settings.probe) are encoded and evaluated by train() itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.stage import Adapter, Component, Head, How, Optimizer, Schedule, Stage, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example

REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options that every gradient method has; a method's ``Config`` inherits them and may restate a default."""

    # Optimizer steps; where given it wins over ``epochs``.
    steps: Annotated[int, Gt(0)] | None = None
    # Passes over the data (the first part of the batch); used where ``steps`` is None.
    epochs: Annotated[float, Gt(0)] | None = 5.0
    # Sequences of each part in one optimizer step, over all micro-batches and processes.
    batch: Annotated[int, Gt(0)] = 32
    # Sequences of each part that go through the model at once; None: the whole batch of this process.
    micro_batch: Annotated[Annotated[int, Gt(0)] | None, How] = None
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-5})
    schedule: Schedule = Component("linear")
    # Largest gradient norm; 0 switches clipping off.
    clip: Annotated[float, Ge(0)] = 1.0
    adapter: Adapter | None = None
    # Weights that are 0 at the start stay 0.
    keep_zeros: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    saved: Literal["parent", "float32", "bfloat16"] = "parent"
    gradient_checkpointing: Annotated[bool, How] = False
    context_tokens: Annotated[int, Gt(1)] = 512
    save_seconds: Annotated[float, Gt(0), How] = 30.0
    log_every: Annotated[int, Gt(0), How] = 10
    probe: Annotated[tuple[str, ...], How] = ()
    probe_every: Annotated[int, Gt(0), How] = 10
    checkpoints: Annotated[tuple[int, ...], How] = ()


@dataclass(frozen=True)
class Batches:
    """Which examples make up each step: every part shuffled on its own from (seed, part, epoch), ``follows`` parts in step."""

    parts: Mapping[str, Sequence[Example]]
    size: int
    seed: int
    follows: Mapping[str, str] = field(default_factory=dict)


def prepare(stage: Stage, settings: Training, folder: Path | None = None, head: Head | None = None) -> Any:
    """The model to train: ``folder`` (default: the parent) in float32 on the device, head replaced, adapter attached."""
    raise NotImplementedError


def reference_of(stage: Stage, model: Any, settings: Training) -> Any:
    """The model as it was at the start, frozen, in eval mode (call before train)."""
    raise NotImplementedError


def frozen_model(folder: Path, settings: Training) -> Any:
    """Another model (teacher, reference), frozen, eval mode, on the device, same compute precision."""
    raise NotImplementedError


def train(
    stage: Stage,
    model: Any,
    settings: Training,
    batches: Batches,
    loss: Callable[[Any, Any], Terms],
    *,
    outer: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    source: Path | None = None,
) -> None:
    """Train ``model``; write stage.folder/'model' (tokenizer etc. copied from ``source``, default the parent) and notes."""
    raise NotImplementedError
