"""GKD: the student writes part of the text it learns from, and is corrected by the teacher there.

Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes":

    L = E_(x,y)[ 1/|y| sum_t JSD_beta( p(. | y_<t, x), q(. | y_<t, x) ) ]
    y from the student with probability ``fraction``, otherwise from the data; no gradient through the writing

The draw is made once for a whole batch, as in the paper's algorithm and in huggingface/trl (``lmbda``). Fraction 0 is
distillation on the data, fraction 1 purely on the student's own text. Mean: over the answer tokens of the global batch.

Where trl's code differs: its ``temperature`` (0.9) is that of the sampling alone, as ``sampling_temperature`` here; the
loss is at temperature 1. With ``seq_kd`` it lets the teacher write while the loss stays the divergence; SeqKD proper is
a data stage (``data.generated``). It masks written text by the padding's id; here everything up to and including the
first end mark counts. trl's newer distillation trainer is ``fraction=1.0, beta=1.0, sampling_temperature=1.0``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le

from methods.distill._rollouts import Drawn, Writer, chance
from methods.stage import Claim, Component
from methods.term import Setting, of

if TYPE_CHECKING:
    from methods.data import Part

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
    """The shared recipe, how often the student writes, and the divergence."""

    # how often a batch is written by the student (trl's lmbda: 0.5)
    fraction: Annotated[float, Ge(0), Le(1)] = 0.5
    # of the divergence; 0: forward KL, 1: reverse KL, between: Jensen-Shannon (trl: 0.5)
    beta: Annotated[float, Ge(0), Le(1)] = 0.5
    # of both distributions in the loss (trl: always 1)
    temperature: Annotated[float, Gt(0)] = 1.0
    # of the student while it writes; 0: the likeliest token (trl: 0.9)
    sampling_temperature: Annotated[float, Ge(0)] = 0.9


def terms(config: Config) -> tuple[Component, ...]:
    """``jsd`` alone."""
    return (of("jsd", beta=config.beta, temperature=config.temperature),)


def writing(config: Config, setting: Setting) -> OnPolicy:
    """What the student writes."""
    return OnPolicy(Writer.of(setting, config.sampling_temperature, config.top_p), config.fraction)


class OnPolicy:
    """Replaces whole batches by what the student writes to their prompts (``methods.loop.Writing``)."""

    def __init__(self, writer: Writer, fraction: float) -> None:
        self.writer, self.fraction = writer, fraction
        self.tokens = self.batches = 0
        self.wrote = False

    def parts(self, step: int, parts: Mapping[str, Part], model: Any) -> Mapping[str, Part]:
        """The batch of a step as it is, or with the student's own answers."""
        self.tokens = 0
        self.wrote = chance(self.writer.seed, "on-policy", step) < self.fraction
        if not self.wrote:
            return parts
        part = self.writer.part(parts["train"], model, step)
        self.batches += 1
        self.tokens = int(part.tokens)
        return {**parts, "train": part}

    def numbers(self) -> dict[str, float]:
        """Whether the student wrote this batch."""
        return {"on_policy": float(self.wrote)}

    def state(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def resume(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]

    def notes(self) -> dict[str, Any]:
        """How many batches the student wrote."""
        return {"student_batches": self.batches}
