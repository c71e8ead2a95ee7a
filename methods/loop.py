"""The one training loop, on ``accelerate``: every method that follows a gradient goes through here.

    model = loop.prepare(stage, settings)                      # the parent, in float32, adapter attached
    reference = loop.reference_of(stage, model, settings)      # as it was at the start, frozen
    batches = loop.Batches({"forget": ..., "retain": ...}, size=16, seed=stage.seed)
    loop.train(stage, model, settings, batches, lambda model, batch: loss(config, model, batch, reference))

A loss gets ``batch.forget``, ``batch.retain``, … (``methods.data.Part`` on the device), ``batch.step`` (updates
done so far) and ``batch.steps``, and returns named terms, from which ``methods.gradient`` makes the exact gradient of
the global batch. Give ``Term.count`` a count of a part where possible; any other number costs a first pass under
micro-batches, and ``Count(1.0, "batch")`` means that nothing divides the sum. A term with weight 0 is only logged.

The master weights are float32; on an accelerator the forward pass runs in bfloat16. Adding a step of 1e-5 to
weights held in bfloat16 would leave most of them where they were. What rounding takes when the model is saved is in the
notes.

``curve.csv`` has a line per term: its mean on the batch, unweighted, at the weights after ``step`` updates, and the
learning rate and gradient norm (before clipping) of the update that follows.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from annotated_types import Ge, Gt

from methods.find import catalogue
from methods.generate import Cost
from methods.gradient import Gradient, Loss, Outer, Weigh, Workers
from methods.probes import Probes
from methods.progress import link, pack, unpack
from methods.stage import (
    Adapter,
    AssayError,
    Component,
    Head,
    How,
    NotFinite,
    Optimizer,
    Schedule,
    Stage,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.nn import Module, Parameter

    from methods.data import Cases, CaseTable, Example, Part, Variants
    from methods.masking import Masking
    from methods.progress import State

REVISION = 1
# The folder beside a model with what was trained with it and is no part of it.
COMPANIONS = "companions"


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of every gradient method; a method's ``Config`` inherits them and may state another default."""

    # optimizer steps; where given, they win over ``epochs``
    steps: Annotated[int, Gt(0)] | None = None
    # passes over the rows (of the batch's first part), where ``steps`` is not given (TOFU's finetuning: 5)
    epochs: Annotated[float, Gt(0)] | None = 5.0
    # sequences of each part in an optimizer step, over all micro-batches and processes (TOFU: 32)
    batch: Annotated[int, Gt(0)] = 32
    # sequences of each part that go through the model at once in a process; None: all of them
    micro_batch: Annotated[Annotated[int, Gt(0)] | None, How] = None
    # AdamW at TOFU's learning rate
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-5})
    # how the learning rate goes over the steps
    schedule: Schedule = Component("linear")
    # largest norm of the gradient; 0 leaves it as it is
    clip: Annotated[float, Ge(0)] = 1.0
    # train an adapter instead of the weights; it is merged when the model is saved
    adapter: Adapter | None = None
    # entries of matrices that are 0 at the start stay 0
    keep_zeros: bool = True
    # of the forward pass; auto: bfloat16 on an accelerator, float32 on the processor. Masters are float32 always
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # of the written model; parent: as the model it was made from
    saved: Literal["parent", "float32", "bfloat16"] = "parent"
    # compute activations twice instead of keeping them
    gradient_checkpointing: Annotated[bool, How] = False
    # longer sequences are cut
    context_tokens: Annotated[int, Gt(1)] = 512
    # seconds between two saved states
    save_seconds: Annotated[float, Gt(0), How] = 30.0
    # steps between two lines of the learning curve
    log_every: Annotated[int, Gt(0), How] = 10
    # data sets whose answer NLL is followed in the learning curve, each as "name=data set"
    probe: Annotated[tuple[str, ...], How] = ()
    # steps between two such measurements; one is made at the start and one at the end, too
    probe_every: Annotated[int, Gt(0), How] = 10
    # steps after which the model is kept, as model@<step>
    checkpoints: Annotated[tuple[int, ...], How] = ()


@dataclass(frozen=True)
class Batches:
    """Which examples each step sees, from (seed, part, step) alone.

    Each part is shuffled anew every epoch; the first one's length is what an epoch means. ``drawn`` parts are drawn
    uniformly with replacement instead. ``follows={"template": "forget"}`` gives a part the row numbers of another. Of a
    row that comes in ``Variants``, one is drawn each time it is seen.
    """

    parts: Mapping[str, Sequence[Example] | Variants | CaseTable]
    size: int
    seed: int
    follows: Mapping[str, str] = field(default_factory=dict)
    drawn: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Rows in an epoch."""
        return len(next(iter(self.parts.values())))

    def at(self, step: int) -> dict[str, list[Example]]:
        """The examples of a 0-based step, by part."""
        return {
            name: [self.example(name, *place) for place in self.places(name, step)] for name in self.parts
        }

    def collated(self, step: int, tokenizer: Any) -> dict[str, Any]:
        """The batch of a 0-based step, by part: padded sequences, or (where there is no tokenizer) cases."""
        from methods.data import collate, padding_id

        if tokenizer is None:
            return {name: self._cases(name, step) for name in self.parts}
        padding = padding_id(tokenizer)
        return {name: collate(rows, padding, name) for name, rows in self.at(step).items()}

    def _cases(self, name: str, step: int) -> Cases:
        table: Any = self.parts[name]
        # A batch of all cases has them in their own order: another one would change nothing but the rounding.
        everything = self.size == len(table) and name not in self.drawn
        cases: Cases = table.batch(range(self.size) if everything else self.rows(name, step), name)
        return cases

    def example(self, name: str, row: int, variant: int | None) -> Example:
        """One example of a part."""
        found: Any = self.parts[name][row]
        example: Example = found if variant is None else found[variant]
        return example

    def places(self, name: str, step: int) -> list[tuple[int, int | None]]:
        """The row numbers of one part, each with the variant that is drawn where rows have several."""
        from methods.data import Variants

        rows, part = self.rows(name, step), self.parts[name]
        if not isinstance(part, Variants):
            return [(row, None) for row in rows]
        draw = random.Random(f"{self.seed}/{name}/variant/{step}").random
        return [(row, int(draw() * self._variants(name, part, row))) for row in rows]

    def _variants(self, name: str, part: Variants, row: int) -> int:
        if len(part[row]) == 0:
            raise AssayError(f"row {row} of {name} has nothing to choose from.")
        return len(part[row])

    def rows(self, name: str, step: int) -> list[int]:
        """The row numbers of one part."""
        leader = self.follows.get(name, name)
        count = len(self.parts[leader])
        if len(self.parts[name]) != count:
            raise AssayError(
                f"{name} has {len(self.parts[name])} rows and must have one for each of the {count} of {leader}."
            )
        if count == 0:
            raise AssayError(f"the data set for {name!r} is empty.")
        if leader in self.drawn:
            draw = random.Random(f"{self.seed}/{leader}/{step}").random
            return [int(draw() * count) for _ in range(self.size)]
        return self._sampler(leader, count).batch(step, self.size)

    def _sampler(self, name: str, count: int) -> Any:
        from methods.data import Sampler

        # The sampler keeps the current epoch's order; making one per step would sort all rows each time.
        samplers: dict[str, Sampler] = self.__dict__.setdefault("_samplers", {})
        return samplers.setdefault(name, Sampler(count, f"{self.seed}/{name}"))


@dataclass(frozen=True)
class Adaptive:
    """Numbers that a loss reads as ``batch.values["name"]`` and that change after each step: dual variables and such.

    ``after`` gets the values of the step, among them the 0-based ``step`` itself, and the unweighted global mean of
    each of its terms.
    """

    start: Mapping[str, float]
    after: Callable[[Mapping[str, float], Mapping[str, float]], Mapping[str, float]]


class Writing(Protocol):
    """Text that is written while a model is trained, and stands in the place of a batch's rows or beside them.

    What is written depends on the model and on (seed, step) alone. ``tokens`` is how many the last call has written.
    """

    tokens: int

    def parts(self, step: int, parts: Mapping[str, Part], model: Any) -> Mapping[str, Part]:
        """The batch of a 0-based step, before its gradient; the model comes and is left in training mode."""

    def numbers(self) -> dict[str, float]:
        """What the curve shows of the last step."""

    def state(self) -> dict[str, Any]:
        """What later steps need, as JSON."""

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""

    def notes(self) -> dict[str, Any]:
        """What the record shows of the whole run."""


# --- models -------------------------------------------------------------------------------------------------


def prepare(
    stage: Stage,
    settings: Training,
    folder: Path | None = None,
    head: Head | None = None,
    fresh: bool = False,
) -> Any:
    """The model to be trained: float32, on the device, with another head and an adapter where asked for.

    Args:
        folder: where it lies; default: the chain's parent.
        fresh: start from new random weights of the same shapes, drawn from the stage's seed.
    """
    from methods.checkpoint import load_model

    make_deterministic(stage.threads)
    accelerator = make_accelerator(settings)
    model = load_model(folder or stage.parents["model"], "float32", accelerator.device, train=True)
    if fresh:
        model = _drawn_anew(model, stage.seed, settings.keep_zeros)
    if head is not None:
        from methods.architectures import with_head

        model = with_head(model, head)
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise AssayError(
                f"gradient_checkpointing=True: a {type(model).__name__} cannot compute activations twice; leave it out."
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.adapter is not None:
        adapter, options = component("adapter", settings.adapter)
        model = adapter.attach(options, model, stage.seed)
        _refuse_adapted_head(model)
    if hasattr(model.config, "use_cache"):
        model.register_forward_pre_hook(_without_cache, with_kwargs=True)
    return accelerator.prepare_model(model.train(), evaluation_mode=True)


def _refuse_adapted_head(model: Any) -> None:
    """An adapter adds a product to a layer's answer: behind a distance head that would be logits of no distance."""
    from methods.architectures import output_layer
    from methods.architectures.distance_head import DistanceHead

    if isinstance(getattr(output_layer(model), "base_layer", None), DistanceHead):
        raise AssayError(
            "the adapter's targets name a distance head, which has no product to adapt: leave it out."
        )


def _drawn_anew(model: Any, seed: int, keep_zeros: bool) -> Any:
    """The same architecture with its own initialisation; zeros of its matrices stay where they are kept."""
    import torch

    from methods.model import drawn

    new: Any = drawn(seed, lambda: type(model)(model.config))
    new.to(model.device)
    if keep_zeros:
        with torch.no_grad():
            for old, weight in zip(model.parameters(), new.parameters(), strict=True):
                if weight.ndim >= 2:
                    weight.masked_fill_(old == 0, 0.0)
    if hasattr(model, "generation_config"):
        new.generation_config = model.generation_config
    return new.train(model.training)


def reference_of(stage: Stage, model: Any, settings: Training) -> Any:
    """The model as it is now, frozen and in evaluation mode: a copy, or with an adapter itself without it."""
    if settings.adapter is None:
        return copy.deepcopy(model).eval().requires_grad_(False)
    return _WithoutAdapter(model, component("adapter", settings.adapter)[0])


def frozen_model(folder: Path, settings: Training, precision: str = "auto") -> Any:
    """Another model, such as a teacher: frozen, in evaluation mode; ``auto``: in the precision of the forward pass."""
    from methods.checkpoint import load_model

    accelerator = make_accelerator(settings)
    dtype = compute_precision(settings) if precision == "auto" else precision
    model = load_model(folder, dtype, accelerator.device).requires_grad_(False)
    if hasattr(model.config, "use_cache"):
        model.register_forward_pre_hook(_without_cache, with_kwargs=True)
    return model


class _WithoutAdapter:
    """A model with its adapter switched off and no dropout, sharing the weights of the one being trained."""

    def __init__(self, model: Any, adapter: ModuleType) -> None:
        self.model, self.adapter = model, adapter
        self.config = model.config

    def __call__(self, **inputs: Any) -> Any:
        import torch

        training = self.model.training
        self.model.eval()
        try:
            with self.adapter.disabled(self.model), torch.no_grad():
                return self.model(**inputs)
        finally:
            self.model.train(training)


def _without_cache(
    model: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Training never generates: keeping keys and values would only cost memory."""
    return arguments, {"use_cache": False} | options


def component(kind: str, part: Component) -> tuple[ModuleType, Any]:
    """A component's module and its typed options."""
    module = catalogue().component(kind, part.name).load()
    return module, module.Config(**part.options)


# --- the machine --------------------------------------------------------------------------------------------


def make_deterministic(threads: int) -> None:
    """The same bits for the same seed: deterministic algorithms and a stated number of threads."""
    import torch

    # cuBLAS reads it when it is first used; without it its sums depend on the order of its streams.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # On a card some operations have no deterministic form: that is worth a warning and no failed job.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.set_num_threads(threads)


def compute_precision(settings: Training) -> str:
    """What ``precision`` means on this machine."""
    import torch

    if settings.precision != "auto":
        return settings.precision
    return "bfloat16" if torch.cuda.is_available() else "float32"


def make_accelerator(settings: Training) -> Accelerator:
    """This process's device, precision and fellow processes (those that ``torchrun`` started)."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Its state outlives a job in a resident process, and would keep the first job's precision.
    AcceleratorState._reset_state()
    mixed = "bf16" if compute_precision(settings) == "bfloat16" else "no"
    return Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available())


# --- training -----------------------------------------------------------------------------------------------


def train(
    stage: Stage,
    model: Any,
    settings: Training,
    batches: Batches,
    loss: Loss,
    *,
    outer: Outer | None = None,
    adaptive: Adaptive | None = None,
    source: Path | None = None,
    start: Weights | None = None,
    optimizer: Any = None,
    weigh: Weigh | None = None,
    masking: Masking | None = None,
    companions: Mapping[str, Module] | None = None,
    writing: Writing | None = None,
) -> None:
    """Train a ``prepare``d model and write ``model/``, ``curve.csv`` and the notes of the stage.

    Args:
        loss: named terms of (model, batch).
        outer: for a loss that is no sum over items: the objective as a function of the terms' global means.
        adaptive: numbers the loss needs that change after each step; they are logged and saved.
        source: folder the tokenizer and the saved precision come from; default: the chain's parent.
        start: the weights that the result is compared with and whose zeros stay (see ``remember``), where a method
            has changed them since; default: as they are now.
        optimizer: a method's own, in the place of the one in the settings. Beside what torch's have it may have
            ``numbers``, of its last step, and ``observed(last)``, of the weights as they are: both go into the curve.
        weigh: weights of the global batch's rows from their losses, which ``loss`` reads with ``batch.weigh``.
        masking: hides weights while the model is trained, and for good in every model that is written.
        companions: what is trained with the model and is no part of it, such as projections; each is written beside
            every model, as ``model/companions/<name>.safetensors``.
        writing: what the model writes before a step and learns from in it.
    Raises:
        NotFinite: a term, gradient or weight is not finite; nothing is written.
        Interrupted: a stop signal came; the state is saved.
    """
    folder = source or stage.parents["model"]
    run = _Run(
        stage, model, settings, batches, loss, outer, adaptive, folder, start, optimizer, weigh, masking,
        companions, writing,
    )  # fmt: skip
    try:
        run.resume(stage.progress.load())
        for step in stage.progress.bar(run.steps, initial=run.step):
            run.probe(step)
            run.update(step)
            run.keep(step + 1)
            run.save(step + 1)
        run.probe(run.steps)
        run.finish()
    finally:
        stage.progress.release()


def remember(stage: Stage, model: Any, settings: Training, source: Path | None = None) -> Weights:
    """The weights of a ``prepare``d model as they are now, for ``train``: their zeros, their number, their values."""
    adapter = component("adapter", settings.adapter)[0] if settings.adapter is not None else None
    weights = Weights(adapter.base_parameters(model) if adapter else dict(model.named_parameters()))
    weights.remember(settings.keep_zeros, settings.saved, source or stage.parents["model"])
    return weights


class _Run:
    """One training run: the state of the loop, and what a step consists of."""

    def __init__(
        self,
        stage: Stage,
        model: Any,
        settings: Training,
        batches: Batches,
        loss: Loss,
        outer: Outer | None,
        adaptive: Adaptive | None,
        source: Path,
        start: Weights | None = None,
        optimizer: Any = None,
        weigh: Weigh | None = None,
        masking: Masking | None = None,
        companions: Mapping[str, Module] | None = None,
        writing: Writing | None = None,
    ) -> None:
        from methods.checkpoint import is_classifier, load_tokenizer

        self.masking, self.companions, self.writing = masking, companions or {}, writing
        self.written = Cost()
        self.stage, self.model, self.settings = stage, model, settings
        self.batches, self.source = batches, source
        self.accelerator = make_accelerator(settings)
        self.adapter = component("adapter", settings.adapter)[0] if settings.adapter is not None else None
        self.steps = steps_of(settings, batches.count)
        self.step = self.tokens = 0
        self.curve: list[tuple[int, str, float]] = []
        self.adaptive = adaptive or Adaptive({}, lambda values, means: {})
        self.values = dict(self.adaptive.start)
        self.tokenizer = None if is_classifier(source) else load_tokenizer(source)
        self.probes = self._probes()
        self.gradient = self._gradient(loss, outer, weigh)
        self.weights = start or remember(stage, model, settings, source)
        self.trained = [
            (name, weight)
            for name, weight in (*model.named_parameters(), *self._companions("named_parameters"))
            if weight.requires_grad
        ]
        self._build_optimizer(optimizer)
        stage.progress.save_seconds = settings.save_seconds
        stage.notes |= self._first_notes()

    def _gradient(self, loss: Loss, outer: Outer | None, weigh: Weigh | None) -> Gradient:
        accelerator = self.accelerator
        workers = Workers(accelerator.process_index, accelerator.num_processes, accelerator.reduce)
        return Gradient(
            self.model,
            loss,
            outer=outer,
            weigh=weigh,
            micro_batch=self.settings.micro_batch,
            seed=self.stage.seed,
            device=accelerator.device,
            workers=workers,
            companions=list(self.companions.values()),
        )

    def _companions(self, what: Literal["named_parameters", "named_buffers"]) -> list[tuple[str, Any]]:
        """Parameters or buffers of the companions, under names that no weight of the model has."""
        return [
            (f"companions.{name}.{entry}", value)
            for name, companion in self.companions.items()
            for entry, value in getattr(companion, what)()
        ]

    def _build_optimizer(self, own: Any) -> None:
        module, options = component("optimizer", self.settings.optimizer)
        self.optimizer = module.build(options, self.trained) if own is None else own
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        schedule, schedule_options = component("schedule", self.settings.schedule)
        self.factor: Callable[[int], float] = lambda step: schedule.factor(schedule_options, step, self.steps)

    def _first_notes(self) -> dict[str, Any]:
        from methods.checkpoint import saved_dtype

        total, nonzero = self.weights.counted
        return {
            "parameters": total,
            "nonzero_before": nonzero,
            "steps": self.steps,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "load_dtype": "float32",
            "master_dtype": "float32",
            "compute_dtype": compute_precision(self.settings),
            "saved_dtype": saved_dtype(self.settings.saved, self.source),
            "resumed_from_step": 0,
            "spent_at_step": {},
        }

    # --- a step ---------------------------------------------------------------------------------------------

    def update(self, step: int) -> None:
        """One optimizer step on one global batch."""
        parts = self._parts(step)
        with self._masks_shown(step):
            means = self.gradient(parts, step, self.steps, self.values)
        norm = self._clip(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor(step)
        self.optimizer.step()
        # Behind an adapter the weights are frozen; what the merged ones gain is taken off when they are written.
        if self.adapter is None:
            self.weights.restore_zeros()
        if self.masking is not None:
            self.masking.after()
        self.tokens += sum(part.seen for part in parts.values())
        if step % self.settings.log_every == 0 or step == self.steps - 1:
            rate = float(self.optimizer.param_groups[0]["lr"])
            own = getattr(self.optimizer, "numbers", {}) | (self.masking.numbers() if self.masking else {})
            own |= self.writing.numbers() if self.writing else {}
            self._log(step, means | self.values | own | {"learning_rate": rate, "gradient_norm": norm})
        self.values = dict(self.adaptive.after({**self.values, "step": float(step)}, means))

    def _parts(self, step: int) -> Mapping[str, Any]:
        """The batch of a step, and what the model writes before it."""
        parts = self.batches.collated(step, self.tokenizer)
        if self.writing is None:
            return parts
        with self.written.metered(self.stage), self._masks_shown(step):
            written = self.writing.parts(step, parts, self.model)
        self.written.tokens += self.writing.tokens
        return written

    def _clip(self, step: int) -> float:
        """Mask, measure and clip the gradient; the norm is that before clipping."""
        from torch.nn.utils import clip_grads_with_norm_, get_total_norm

        self.weights.mask_gradients()
        if self.masking is not None:
            self.masking.mask_gradients()
        weights = [weight for _, weight in self.trained if weight.grad is not None]
        total = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        norm = float(total)
        if norm - norm != 0:
            raise NotFinite(
                f"step {step}: the gradient of {self._culprit()} is not finite; try a smaller learning rate."
            )
        if self.settings.clip > 0:
            clip_grads_with_norm_(weights, self.settings.clip, total)
        return norm

    def _culprit(self) -> str:
        for name, weight in self.trained:
            if weight.grad is not None and not bool(weight.grad.isfinite().all()):
                return name
        return "all weights together"

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self.curve += [(step, name, value) for name, value in values.items()]

    # --- probes ---------------------------------------------------------------------------------------------

    def _probes(self) -> Probes:
        settings = self.settings
        return Probes(
            self.stage,
            self.model,
            settings.probe,
            settings.micro_batch or settings.batch,
            settings.context_tokens,
            self.tokenizer,
            self.source,
            self.accelerator.device,
        )

    def probe(self, step: int) -> None:
        """Note what the probed data sets say, and what the optimizer observes, after ``step`` updates."""
        if hasattr(self.optimizer, "observed"):
            self._log(step, self.optimizer.observed(step == self.steps))
        if step % self.settings.probe_every == 0 or step == self.steps:
            with self._masks_shown(step):
                self._log(step, self.probes.measure(step))

    def _masks_shown(self, step: int) -> AbstractContextManager[Any]:
        """Within it the model is as its masks show it, where it has any."""
        return nullcontext() if self.masking is None else self.masking.hiding(step)

    # --- state ----------------------------------------------------------------------------------------------

    def resume(self, state: State | None) -> None:
        """Go on where an earlier attempt had saved its state."""
        if any(not 0 < step <= self.steps for step in self.settings.checkpoints):
            raise AssayError(
                f"checkpoints={list(self.settings.checkpoints)}: each must be from 1 to {self.steps}, the steps."
            )
        if state is None:
            return
        import torch

        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(state.tensors[name])
        self.optimizer.load_state_dict(unpack(state.values["optimizer"], state.tensors))
        self.step, self.tokens = state.step, state.values["tokens"]
        self.curve = [tuple(row) for row in state.values["curve"]]
        self.values = dict(state.values["values"])
        if self.writing is not None:
            self.writing.resume(state.values["writing"])
            self.written = Cost(**state.values["written"])
        self.stage.notes["spent_at_step"] = state.values["spent_at_step"]
        self.stage.notes["resumed_from_step"] = state.step

    def save(self, step: int) -> None:
        """Save the state where it is due; all processes stop together."""
        progress = self.stage.progress
        due = progress.due(step)
        progress.stopping = self._any_process(progress.stopping)
        if (due or progress.stopping) and self.accelerator.is_main_process:
            tensors = dict(self._tensors())
            optimizer = pack(self.optimizer.state_dict(), "optimizer", tensors)
            values = {
                "optimizer": optimizer,
                "tokens": self.tokens,
                "curve": self.curve,
                "values": self.values,
            }
            if self.writing is not None:
                values |= {"writing": self.writing.state(), "written": asdict(self.written)}
            progress.save(step, tensors, values | {"spent_at_step": self.stage.notes["spent_at_step"]})
        progress.stop_if_asked(step)

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes: trained weights, and buffers such as running means."""
        buffers = (*self.model.named_buffers(), *self._companions("named_buffers"))
        return {f"model.{name}": weight for name, weight in (*self.trained, *buffers)}

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        import torch

        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    # --- results --------------------------------------------------------------------------------------------

    def keep(self, step: int) -> None:
        """Keep the model of this step where asked for, beside the state: the stage's folder does not outlive a stop."""
        if step not in self.settings.checkpoints or not self.accelerator.is_main_process:
            return
        kept = self._kept(step)
        unfinished = kept.with_name(f"unfinished-{kept.name}")
        for old in (unfinished, kept):
            shutil.rmtree(old, ignore_errors=True)
        self.stage.notes["spent_at_step"][str(step)] = dict(self.stage.spent())
        self._write(copy.deepcopy(self.model), unfinished)
        unfinished.rename(kept)

    def _kept(self, step: int) -> Path:
        return self.stage.progress.scratch / f"model@{step}"

    def finish(self) -> None:
        """Write the model, the kept ones and the curve, and complete the notes."""
        self.stage.notes["tokens_seen"] = self.tokens
        if self.writing is not None:
            self.stage.notes |= self.written.notes() | self.writing.notes()
        if self.accelerator.is_main_process:
            self.stage.folder.mkdir(parents=True, exist_ok=True)
            self.stage.notes |= self._write(self.model, self.stage.folder / "model")
            for step in self.settings.checkpoints:
                name = f"model@{step}"
                shutil.copytree(
                    self._kept(step), self.stage.folder / name, copy_function=link, dirs_exist_ok=True
                )
            write_curve(self.stage.folder / "curve.csv", self.curve)
        self.accelerator.wait_for_everyone()

    def _write(self, model: Any, folder: Path) -> dict[str, Any]:
        """Write a model, its adapter merged and kept beside; says what is non-zero and what rounding cost."""
        from methods.checkpoint import refuse_not_finite, save_model

        refuse_not_finite(model)
        beside = folder / "adapter"
        if self.adapter is not None:
            self.adapter.save(model, beside)
            model = self.adapter.merge(model)
        weights = self.weights.of(dict(model.named_parameters()))
        weights.restore_zeros()
        if self.masking is not None:
            self.masking.hide(dict(model.named_parameters()))
        save_model(model, folder, self.source, self.settings.saved)
        _save_companions(self.companions, folder / COMPANIONS)
        return {"nonzero_after": weights.nonzero()[1], "update_lost_in_saving": weights.lost_in_saving()}


def _save_companions(companions: Mapping[str, Module], folder: Path) -> None:
    """One file for each."""
    from safetensors.torch import save_file

    for name, companion in companions.items():
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in companion.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")


def steps_of(settings: Training, count: int) -> int:
    """Optimizer steps: as given, or so many passes over ``count`` rows."""
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is None:
        raise AssayError("give steps or epochs: nothing says how long to train.")
    return max(1, round(settings.epochs * count / settings.batch))


def write_curve(path: Path, rows: Sequence[tuple[int, str, float]]) -> None:
    """``step,term,value``, every digit of the value."""
    lines = ["step,term,value", *(f"{step},{name},{value!r}" for step, name, value in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- weights: zeros that stay, and what saving loses ----------------------------------------------------------


class Weights:
    """The weights of a model under the names they are saved with, their zeros, and where they started."""

    def __init__(self, named: Mapping[str, Parameter]) -> None:
        self.named = named
        self.zeros: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self.rounding: dict[str, str] = {}
        self.counted = (0, 0)

    def remember(self, keep_zeros: bool, saved: str, source: Path) -> None:
        """Note which entries of matrices are 0 and, if saving will round, what the weights are now."""
        from methods.checkpoint import saved_dtype, tensor_dtypes

        self.counted = self.nonzero()
        if keep_zeros:
            masks = {name: weight.detach() == 0 for name, weight in self.named.items() if weight.ndim >= 2}
            self.zeros = {name: mask for name, mask in masks.items() if bool(mask.any())}
        usual, single = saved_dtype(saved, source), tensor_dtypes(source) if saved == "parent" else {}
        wanted = {name: single.get(name, usual) for name in self.named}
        self.rounding = {name: dtype for name, dtype in wanted.items() if dtype not in ("float32", "float64")}
        self.start = {
            name: _compact(self.named[name].detach(), dtype) for name, dtype in self.rounding.items()
        }

    def of(self, named: Mapping[str, Parameter]) -> Weights:
        """The same memory for another model object, such as a copy or one with its adapter merged."""
        other = Weights(named)
        other.zeros, other.start, other.rounding = self.zeros, self.start, self.rounding
        return other

    def nonzero(self) -> tuple[int, int]:
        """Entries, and entries that are not 0."""
        weights = self.named.values()
        return sum(weight.numel() for weight in weights), sum(
            int(weight.count_nonzero()) for weight in weights
        )

    def mask_gradients(self) -> None:
        """No gradient where a zero has to stay: before clipping, so that it takes no part in the norm."""
        for name, mask in self.zeros.items():
            gradient = self.named[name].grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0.0)

    def restore_zeros(self) -> None:
        """Decay, momentum or a merged adapter may have moved them."""
        import torch

        with torch.no_grad():
            for name, mask in self.zeros.items():
                self.named[name].masked_fill_(mask, 0.0)

    def lost_in_saving(self) -> float:
        """The share of the update that rounding takes: sum |update - saved update| / sum |update|, from 0 to 1."""
        import torch

        lost = moved = 0.0
        for name, dtype in self.rounding.items():
            kind = getattr(torch, dtype)
            now, start = self.named[name].detach().cpu().double(), self.start[name].double()
            update, kept = now - start, now.to(kind).double() - start.to(kind).double()
            lost, moved = lost + float((update - kept).abs().sum()), moved + float(update.abs().sum())
        return min(1.0, lost / moved) if moved else 0.0


def _compact(weight: Tensor, dtype: str) -> Tensor:
    """A copy on the processor, in the saved precision where that loses nothing (a parent saved in it)."""
    import torch

    rounded = weight.to(getattr(torch, dtype))
    return (rounded if bool((rounded == weight).all()) else weight).cpu().clone()
