"""DistiLLM: a skewed divergence, and text of the student's own that is written rarely and used again.

Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models":

    skew forward KL     D( p ‖ skew * p + (1 - skew) * q )
    skew reverse KL     D( q ‖ (1 - skew) * p + skew * q )          0.1 each; mean over the answer tokens

and the adaptive off-policy schedule. With a threshold phi (0 at the start) and a number r drawn for each batch,

    r < phi * (1 - step/steps), or r < phi while the buffer is not full:   the student writes, and the buffer keeps it
    r < phi otherwise:                                                     rows drawn from the buffer
    else:                                                                  the data

Every ``validate_every`` steps the student's NLL of ``validation`` is measured. Where it lies at least ``tolerance``
above the last one that counted (the first, or the one at which phi rose last), phi rises by ``rise`` up to 1: that is
jongwooko/distillm (``finetune.py``), which keeps the old value when the loss falls or rises by less. It divides the
validation loss by batches, here it is a mean over tokens.

Its data set stores labels shifted by one and its sampler does not, so on written text its mask is one position late.
Here written text has the same alignment as all other. The cross-entropy on the answers has weight 0 there (kd_ratio 1)
and is left out here, and so is the language-model loss on further text.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from methods.distill._rollouts import (
    Drawn,
    Rollout,
    Writer,
    chance,
    log_chances,
    part_of,
    prompts_of,
    shared,
)
from methods.stage import AssayError, Claim, Component, Rows
from methods.term import Setting, of

if TYPE_CHECKING:
    from methods.data import Example, Part

SEEDED = True
USES = (
    "methods.loop",
    "methods.data",
    "methods.checkpoint",
    "methods.terms",
    "methods.distill",
    "methods.distill._rollouts",
    "methods.generate",
    "methods.term",
)
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Drawn):
    """The shared recipe, the divergence, and the schedule."""

    # forward: D(p ‖ mixture), the published choice for the smallest student; reverse: D(q ‖ mixture), for the larger
    direction: Literal["forward", "reverse"] = "reverse"
    # share of the first distribution in the mixture (the paper: 0.1)
    skew: Annotated[float, Ge(0), Lt(1)] = 0.1
    # of the student while it writes; 0: the likeliest token (the scripts: 1)
    sampling_temperature: Annotated[float, Ge(0)] = 1.0
    # answers that are kept for later batches (the scripts: 1000)
    capacity: Annotated[int, Gt(0)] = 1000
    # rows on which the student is validated; none of them should be trained on
    validation: Rows = "authors/holdout"
    # steps between two validations; None: an epoch (the scripts)
    validate_every: Annotated[int, Gt(0)] | None = None
    # how often batches are written or replayed at the start (the scripts: 0)
    threshold: Annotated[float, Ge(0), Le(1)] = 0.0
    # what is added to it (the code: 0.1)
    rise: Annotated[float, Ge(0), Le(1)] = 0.1
    # rise of the validation loss, in nats, that counts as one (the scripts: 0.1)
    tolerance: Annotated[float, Ge(0)] = 0.1

    def __post_init__(self) -> None:
        if self.capacity < self.batch:
            raise AssayError(
                f"distill.distillm: capacity={self.capacity} answers cannot fill a batch={self.batch}: raise capacity."
            )


def terms(config: Config) -> tuple[Component, ...]:
    """``skew_forward_kl`` or ``skew_reverse_kl`` alone."""
    return (of(f"skew_{config.direction}_kl", skew=config.skew),)


def writing(config: Config, setting: Setting) -> Replay:
    """What the student writes, and the buffer."""
    from methods.data import Style, encode

    style = Style.read(setting.student_folder)
    rows = setting.stage.rows("validation")
    examples = encode(rows, setting.tokenizer, style, config.context_tokens)
    validation = Validation(examples, config.micro_batch or config.batch, setting)
    every = config.validate_every or max(1, len(setting.examples) // config.batch)
    return Replay(
        config,
        Writer.of(setting, config.sampling_temperature, config.top_p),
        validation,
        every,
        setting.steps,
    )


class Validation:
    """The student's mean NLL of rows, in nats a token."""

    def __init__(self, examples: Sequence[Example], batch: int, setting: Setting) -> None:
        from methods.data import padding_id

        self.batches = [examples[start : start + batch] for start in range(0, len(examples), batch)]
        self.padding = padding_id(setting.tokenizer)
        self.entries = setting.mixture.vocabulary

    def __call__(self, model: Any) -> float:
        """In evaluation mode; each process takes a share of the batches, and all get the same number."""

        def measured(mine: Sequence[int]) -> list[tuple[float, int]]:
            return [self._sum(model, self.batches[place]) for place in mine]

        sums = shared(len(self.batches), measured)
        return sum(value for value, _ in sums) / sum(count for _, count in sums)

    def _sum(self, model: Any, examples: Sequence[Example]) -> tuple[float, int]:
        from methods.data import collate

        found = -log_chances(model, collate(examples, self.padding, "validation"), entries=self.entries)
        return float(found.double().sum()), len(found)


class Replay:
    """The adaptive off-policy schedule and its buffer (``methods.loop.Writing``)."""

    def __init__(self, config: Config, writer: Writer, validation: Any, every: int, steps: int) -> None:
        self.config, self.writer, self.validation = config, writer, validation
        self.every, self.steps = every, steps
        self.buffer: list[Rollout] = []
        self.threshold, self.last = config.threshold, float("nan")
        self.loss = float("nan")
        self.tokens = self.written = self.replayed = 0
        self.source = "data"

    def parts(self, step: int, parts: Mapping[str, Part], model: Any) -> Mapping[str, Part]:
        """The batch of a step as it is, with the student's own answers, or from the buffer."""
        self.tokens = 0
        if step % self.every == 0:
            self._validate(step, self.validation(model))
        number = chance(self.writer.seed, "on-policy", step)
        fresh = number < self.threshold * (1 - (step + 1) / self.steps)
        if fresh or (number < self.threshold and len(self.buffer) < self.config.capacity):
            self.source = "student"
            return {**parts, "train": self._write(parts["train"], model, step)}
        if number < self.threshold:
            self.source = "buffer"
            return {**parts, "train": self._replay(parts["train"], step)}
        self.source = "data"
        return parts

    def _validate(self, step: int, loss: float) -> None:
        """Raise the threshold where the loss has risen; the first loss is what later ones are compared with."""
        self.loss = loss
        if step == 0:
            self.last = loss
        elif loss >= self.last + self.config.tolerance:
            self.threshold = min(1.0, self.threshold + self.config.rise)
            self.last = loss

    def _write(self, part: Part, model: Any, step: int) -> Part:
        prompts = prompts_of(part, self.writer.prompt_tokens)
        rollouts = self.writer.rollouts(prompts, [model], [1.0], step)
        self.buffer = (self.buffer + rollouts)[-self.config.capacity :]
        self.written += 1
        self.tokens = sum(len(rollout.answer) for rollout in rollouts)
        return part_of(rollouts, self.writer.padding, part.name)

    def _replay(self, part: Part, step: int) -> Part:
        """As many answers of the buffer as the batch has rows, none twice."""
        draw = random.Random(f"{self.writer.seed}/replay/{step}").random
        order = sorted(range(len(self.buffer)), key=lambda _: draw())
        self.replayed += 1
        chosen = [self.buffer[place] for place in order[: part.labels.shape[0]]]
        return part_of(chosen, self.writer.padding, part.name)

    def numbers(self) -> dict[str, float]:
        """Where the batch came from, the threshold, and the last validation loss."""
        shares = {name: float(self.source == name) for name in ("student", "buffer")}
        return {
            "on_policy": shares["student"],
            "replayed": shares["buffer"],
            "threshold": self.threshold,
            "validation": self.loss,
        }

    def state(self) -> dict[str, Any]:
        return {
            "buffer": [rollout.saved() for rollout in self.buffer],
            "threshold": self.threshold,
            "last": self.last,
            "loss": self.loss,
            "written": self.written,
            "replayed": self.replayed,
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.buffer = [Rollout.of(saved) for saved in state["buffer"]]
        self.threshold, self.last, self.loss = state["threshold"], state["last"], state["loss"]
        self.written, self.replayed = state["written"], state["replayed"]

    def notes(self) -> dict[str, Any]:
        """How many batches the student wrote, how many came from the buffer, and where the threshold ended."""
        return {
            "student_batches": self.written,
            "replayed_batches": self.replayed,
            "threshold": self.threshold,
        }
