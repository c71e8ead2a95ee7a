"""Takes its time, saves its state where that is due, adds a number a step. Source: none, invented for tests."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from methods.stage import How, Stage

SEEDED = True
USES = ("methods.checkpoint",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long it takes."""

    # steps
    steps: Annotated[int, Gt(0)] = 10
    # seconds each of them sleeps
    seconds: Annotated[float, Ge(0), How] = 0.1


def run(stage: Stage) -> None:
    """The parent's model, its last norm moved by a random number a step."""
    import torch

    from methods.checkpoint import load_model, save_model

    state = stage.progress.load()
    first, total = (state.step, state.tensors["total"]) if state else (0, torch.zeros(()))
    stage.notes |= {"resumed_from_step": first, "steps": stage.config.steps}
    for step in range(first, stage.config.steps):
        time.sleep(stage.config.seconds)
        total = total + torch.rand((), generator=stage.progress.random(step)) * 0.01
        if stage.progress.due(step + 1):
            stage.progress.save(step + 1, {"total": total}, {})
    stage.progress.release()
    stage.notes["spent_at_step"] = {str(stage.config.steps): dict(stage.spent())}
    model = load_model(stage.parents["model"])
    with torch.no_grad():
        model.get_parameter("model.norm.weight").add_(total)
    save_model(model, stage.folder / "model", stage.parents["model"])
