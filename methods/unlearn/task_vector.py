"""Task arithmetic: subtract from the weights what learning the forget set adds to them.

Ilharco et al., "Editing Models with Task Arithmetic"; the baseline of Shi et al., "MUSE: Machine Unlearning Six-Way
Evaluation".

    theta' = theta - scale * (theta_finetuned - theta)

theta is the chain's parent and theta_finetuned the same model trained further on the forget set alone, a chain of
its own:    reinforced: target > train.sft(data="authors/forget10", saved="float32")
            target > unlearn.task_vector(finetuned=reinforced)

MUSE's code (swj0419/muse_bench, ``task_vector.py``) agrees: scale 1, buffers of whole numbers are left alone. Saved
in bfloat16 a short finetuning is mostly rounded away, and a large scale enlarges the rounding: hence ``saved``
above. Nothing is random here, and no forget row is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from methods.stage import Claim, Model, Stage
from methods.unlearn._weights import Arithmetic, other_weights, rewrite

if TYPE_CHECKING:
    from torch import Tensor

SEEDED = False
USES = ("methods.loop", "methods.checkpoint")


@dataclass(frozen=True, kw_only=True)
class Config(Arithmetic):
    """Options of task arithmetic."""

    # the chain whose model is the parent trained further on the forget set
    finetuned: Model
    # how far to go the other way (1 in MUSE)
    scale: Annotated[float, Gt(0)] = 1.0


CLAIMS: tuple[Claim, ...] = ()


def run(stage: Stage) -> None:
    """Write the parent with the task vector subtracted."""

    def change(model: Any) -> None:
        subtract(model, other_weights(stage, "finetuned", model), stage.config.scale)

    rewrite(stage, change)


def subtract(model: Any, finetuned: dict[str, Tensor], scale: float) -> None:
    """theta - scale * (theta_finetuned - theta), in place; a weight with two names is changed once."""
    import torch

    changed: set[int] = set()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name in finetuned and weight.data_ptr() not in changed:
                weight.sub_(finetuned[name].to(weight.device) - weight, alpha=scale)
                changed.add(weight.data_ptr())
