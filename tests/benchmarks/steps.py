"""What a step of each unlearning loss costs: at most 1.15 times plain cross-entropy over the same forward passes.

    python tests/benchmarks/steps.py [METHOD ...] [--pairs N]

Both run in the same loop, on the same model (the embedded experiment's, untrained) and the same batches, in turn, step
by step. The baseline is asked to run what the loss runs: the same parts, with hidden states where they were wanted, and
without gradients where none were recorded; of what goes through the trained model it takes the answer NLL.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from methods import loop, unlearn
from methods.data import Locator
from methods.find import Found, catalogue
from methods.progress import Progress
from methods.stage import Stage, Terms
from methods.terms import answer_nll, forward
from tests import generic
from workflows.options import fields_of

LIMIT = 1.15
STEPS = 400
BATCH = 16


@dataclass
class Call:
    """One forward pass: of which model and part, whether a gradient was recorded and hidden states were wanted."""

    model: Any
    part: str
    gradient: bool
    hidden: bool


def main() -> int:
    """Print a table; exit code 1 if a loss takes longer than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "methods", nargs="*", help="names such as unlearn.npo; default: every one with a loss"
    )
    parser.add_argument("--pairs", type=int, default=40, help="steps of each kind that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    slow = []
    print(f"{'method':24}{'step, ms':>10}{'baseline, ms':>14}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        parent = new_model(Path(folder))
        for name in arguments.methods or first_order():
            step, baseline = times(name, parent, Path(folder), arguments.pairs)
            ratio = statistics.median(a / b for a, b in zip(step, baseline, strict=True))
            slow += [name] if ratio > LIMIT else []
            print(f"{name:24}{1e3 * min(step):10.1f}{1e3 * min(baseline):14.1f}{ratio:8.3f}", flush=True)
    print(f"more than {LIMIT} times the baseline: {', '.join(slow) or 'none'}")
    return 1 if slow else 0


def first_order() -> list[str]:
    """Every unlearning method with a loss that can be called without the result of another chain."""
    found = (method for method in catalogue().methods.values() if method.family == "unlearn")
    return [method.name for method in found if hasattr(method.load(), "loss") and not needs_another(method)]


def needs_another(method: Found) -> bool:
    """Whether an option without a default names another chain."""
    return any(option.reference and not option.optional for option in fields_of(method.load().Config))


def new_model(folder: Path) -> Path:
    """The embedded experiment's model, with random weights."""
    module = catalogue().method("model.new").load()
    stage = Stage(
        "", "model.new", module.Config(), 0, {}, folder / "new", Progress(folder / "scratch", 0), Locator()
    )
    module.build(module.Config(), stage)
    return folder / "new" / "model"


def times(name: str, parent: Path, folder: Path, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each step with the method's loss, and with the baseline's."""
    run = captured(name, parent, folder / name)
    own, baseline = run.gradient.loss, like(run)
    found: tuple[list[float], list[float]] = ([], [])
    for step in range(pairs + 5):
        for seconds, loss in zip(found, (own, baseline), strict=True):
            run.gradient.loss = loss
            begun = time.perf_counter()
            run.update(step)
            seconds.append(time.perf_counter() - begun)
    return found[0][5:], found[1][5:]


def captured(name: str, parent: Path, folder: Path) -> Any:
    """The training run that the method starts, before its first step."""
    method = catalogue().method(name)
    options = {"steps": STEPS, "batch": BATCH, "log_every": STEPS}
    config = generic.through_json(generic.resolved(method, generic.needed_options(method) | options))
    stage = Stage("", name, config, 0, {"model": parent}, folder, Progress(folder, 0), Locator())
    kept: dict[str, Any] = {}

    def keep(stage: Stage, model: Any, settings: Any, batches: Any, loss: Any, *, outer: Any = None,
             adaptive: Any = None, source: Path | None = None, start: Any = None) -> None:  # fmt: skip
        # The baseline has none of the terms that such numbers follow: they stay as they start.
        fixed = adaptive and loop.Adaptive(adaptive.start, lambda values, means: values)
        kept["run"] = loop._Run(stage, model, settings, batches, loss, outer, fixed, parent, start)

    with patch.object(loop, "train", keep):
        module = method.load()
        module.run(stage) if hasattr(module, "run") else unlearn.run(stage, module)
    return kept["run"]


def like(run: Any) -> Any:
    """A loss of plain cross-entropies over the forward passes that the run's own loss makes."""
    calls: list[Call] = []

    def baseline(model: Any, batch: Any) -> Terms:
        if not calls:
            calls.extend(recorded(run.gradient.model, own, batch))
        terms = {}
        for number, call in enumerate(calls):
            part = batch.parts[call.part]
            with torch.set_grad_enabled(call.gradient):
                outputs = forward(call.model, part, call.hidden)
            if call.gradient:
                terms[f"{call.part}{number}"] = answer_nll(part, outputs)
        return terms

    own = run.gradient.loss
    return baseline


def recorded(model: Any, loss: Any, batch: Any) -> list[Call]:
    """The forward passes of one call of a loss."""
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
    plain, calls = kind.forward, []

    def noting(self: Any, *arguments: Any, **inputs: Any) -> Any:
        part = next(name for name, part in batch.parts.items() if part.input_ids is inputs["input_ids"])
        calls.append(Call(self, part, torch.is_grad_enabled(), bool(inputs.get("output_hidden_states"))))
        return plain(self, *arguments, **inputs)

    with patch.object(kind, "forward", noting):
        loss(model, batch)
    return calls


if __name__ == "__main__":
    sys.exit(main())
