"""Does what was unlearned come back when a few of its examples are seen again?

The relearning attack of Lynch et al., "Eight Methods to Evaluate Robust Unlearning in LLMs" (2024), and Hu et al.,
"Jogging the Memory of Unlearned LLMs Through Targeted Relearning Attacks" (2024), on question-answer rows: a seeded
choice of ``examples`` rows of the forget set is finetuned on, and what comes back is measured on the *other* rows,
never trained on here. Rows that say the same thing in other words would stand on both sides: the default set has one
row for each fact.

Full finetuning of a copy in float32: AdamW without weight decay, a constant learning rate, no dropout; a step takes
the mean loss of the answer tokens of ``rows_per_step`` rows.

* ``forget_nll_after_20``: nats per answer token of the other rows after 20 steps, ``relearned_nll_after_20`` that of
  the rows trained on; ``*_accuracy_after_20`` (multiple choice, chance 0.25) where the rows have wrong answers. 0
  steps is the model as it came.
* ``forget_nll_gain``, ``forget_accuracy_gain``: what came back by the last step: loss before minus loss after,
  accuracy after minus accuracy before.
* With ``reference``, a model that never saw the forget set and is relearned in the same way on the same rows:
  ``reference_forget_*_after_20``, and ``forget_*_excess``, the model's gain less the reference's. A retrained model
  learns from the examples, too (how such answers are worded, if not these), so only what exceeds it had been hidden
  and not removed. A model that was driven far beyond the reference's loss gains much by merely coming back to
  it: compare the levels as well as the gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from evaluations import _known, _statistics
from evaluations._reference import check_tokenizer
from methods.stage import AssayError, Dataset, Model, NotFinite, Row, Scoring

if TYPE_CHECKING:
    from evaluations._known import Asked, Known
    from evaluations._statistics import Estimate
    from methods.data import Example

SEEDED = True
USES = (
    "methods.loop",
    "methods.data",
    "methods.terms",
    "methods.world",
    "methods.checkpoint",
    "evaluations._known",
    "evaluations._likelihood",
    "evaluations._reference",
    "evaluations._statistics",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is shown again, for how long, and against which model."""

    # Forget rows: some are trained on, the others are measured.
    data: Dataset = "authors/forget10_perturbed"
    # How many rows are trained on, drawn with the seed.
    examples: Annotated[int, Gt(0)] = 10
    # Steps after which is measured; before the first step, too.
    after: tuple[Annotated[int, Gt(0)], ...] = (5, 10, 20)
    # Constant; 1e-5 is TOFU's for finetuning a large model, one of the built-in world's wants 1e-3.
    learning_rate: Annotated[float, Gt(0)] = 1e-5
    # Rows of a step; all the examples if they are fewer.
    rows_per_step: Annotated[int, Gt(0)] = 16
    # A model that never saw the forget set, relearned in the same way; None leaves the comparison out.
    reference: Model | None = None
    # Sequences scored at once.
    batch: Annotated[int, Gt(0)] = 64
    # Longer sequences are cut.
    context_tokens: Annotated[int, Gt(0)] = 512

    def __post_init__(self) -> None:
        if not self.after or list(self.after) != sorted(set(self.after)):
            raise ValueError("after needs step numbers in ascending order, each once.")


# What is known of every row after so many steps.
Trajectory = Mapping[int, "Known"]


def evaluate(scoring: Scoring) -> list[Row]:
    """Rows as the module's text describes them; n is the number of rows measured."""
    config = scoring.config
    if config.reference is not None:
        check_tokenizer(scoring, "reference")
    asked = _known.ask(scoring, config.data)
    relearned, others = _split(len(asked.true), config, scoring.seed)
    examples = [asked.true[item] for item in relearned]
    names = ["model"] + ["reference"] * (config.reference is not None)
    folders = {name: scoring.parents[name].resolve() for name in names}
    # A reference that is scored itself is relearned once.
    found = {folder: _relearn(scoring, folder, asked, examples) for folder in dict.fromkeys(folders.values())}
    forget = _of(found[folders["model"]], others)
    rows = [*_levels(config, "forget", forget, "lower"), *_gains(config, forget)]
    rows += _levels(config, "relearned", _of(found[folders["model"]], relearned), "")
    if config.reference is not None:
        reference = _of(found[folders["reference"]], others)
        rows += [*_levels(config, "reference_forget", reference, ""), *_excess(config, forget, reference)]
    return rows


# --- relearning ------------------------------------------------------------------------------------------------


def _split(count: int, config: Config, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows to be trained on and of the others, by the seed alone."""
    from methods.data import Sampler

    if config.examples >= count:
        raise AssayError(
            f"relearn: examples={config.examples} leaves none of the {count} rows of {config.data} to be measured; "
            "lower it."
        )
    order = Sampler(count, f"{seed}/relearn").batch(0, count)
    return sorted(order[: config.examples]), sorted(order[config.examples :])


def _relearn(scoring: Scoring, folder: Path, asked: Asked, examples: Sequence[Example]) -> Trajectory:
    """Finetune a copy of the model and measure all rows on the way."""
    from methods.checkpoint import load_model
    from methods.loop import make_deterministic

    config = scoring.config
    make_deterministic(scoring.threads)
    # A copy of its own, not the one that ``scoring`` shares: in float32 whatever that is in, and gone on return.
    model = load_model(folder, "float32").requires_grad_(True)
    step = _steps(model, config, examples, asked.padding, scoring.seed)
    found = {0: _known.measure(model, asked, config.batch)}
    for number in scoring.progress.bar(config.after[-1], "relearning"):
        step(number)
        if number + 1 in config.after:
            found[number + 1] = _known.measure(model, asked, config.batch)
            _check(float(found[number + 1].losses.sum()), number + 1, config)
    return found


def _check(loss: float, steps: int, config: Config) -> None:
    if not math.isfinite(loss):
        raise NotFinite(
            f"relearn: after {steps} steps the loss is {loss}; lower learning_rate={config.learning_rate}."
        )


def _steps(
    model: Any, config: Config, examples: Sequence[Example], padding: int, seed: int
) -> Callable[[int], None]:
    """A function that makes the 0-based step of that number."""
    from torch.optim import AdamW

    from methods.data import Sampler, collate
    from methods.terms import answer_nll, forward

    optimizer = AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    sampler = Sampler(len(examples), f"{seed}/relearn/steps")
    size = min(config.rows_per_step, len(examples))

    def step(number: int) -> None:
        part = collate([examples[i] for i in sampler.batch(number, size)], padding, "relearn")
        term = answer_nll(part, forward(model, part.to(model.device)))
        loss = term.sum / term.count
        _check(loss.item(), number, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# --- rows ------------------------------------------------------------------------------------------------------


def _of(trajectory: Trajectory, items: Sequence[int]) -> Trajectory:
    return {steps: known.of(items) for steps, known in trajectory.items()}


def _levels(config: Config, name: str, trajectory: Trajectory, accuracy_better: str) -> Iterator[Row]:
    nll_better = "higher" if accuracy_better else ""
    for steps, known in trajectory.items():
        nll = _statistics.ratio(known.losses, known.tokens)
        yield _row(config, f"{name}_nll_after_{steps}", nll, "nats/token", nll_better)
        if known.right is not None:
            right = _statistics.mean(known.right)
            yield _row(config, f"{name}_accuracy_after_{steps}", right, "", accuracy_better)


def _gains(config: Config, trajectory: Trajectory) -> Iterator[Row]:
    """What came back, with the standard error of the difference on the same rows."""
    for name, values in _gain(config, trajectory).items():
        yield _gain_row(config, name, "gain", values, trajectory)


def _excess(config: Config, trajectory: Trajectory, reference: Trajectory) -> Iterator[Row]:
    """How much more came back than the reference learnt."""
    learnt = _gain(config, reference)
    for name, values in _gain(config, trajectory).items():
        yield _gain_row(config, name, "excess", values - learnt[name], trajectory)


def _gain(config: Config, trajectory: Trajectory) -> dict[str, Any]:
    """Of each row [N] the loss that was lost, in nats, and the accuracy that was won."""
    first, last = trajectory[0], trajectory[config.after[-1]]
    gain: dict[str, Any] = {"nll": first.losses - last.losses}
    if first.right is not None and last.right is not None:
        gain["accuracy"] = last.right - first.right
    return gain


def _gain_row(config: Config, name: str, what: str, values: Any, trajectory: Trajectory) -> Row:
    nll = name == "nll"
    estimate = _statistics.ratio(values, trajectory[0].tokens) if nll else _statistics.mean(values)
    return _row(config, f"forget_{name}_{what}", estimate, "nats/token" if nll else "", "closer_to_0")


def _row(config: Config, metric: str, estimate: Estimate, unit: str, better: Any) -> Row:
    words = [config.data, f"examples={config.examples}", f"steps={config.after[-1]}"]
    words += [f"learning_rate={config.learning_rate:g}", f"rows_per_step={config.rows_per_step}"]
    return Row(" ".join(words), metric, estimate.value, estimate.stderr, estimate.n, unit, better)
