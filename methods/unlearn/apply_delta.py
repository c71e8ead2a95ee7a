"""Put an update that was computed once on a model that was trained further: theta' + scale * delta.

"Gauss-Newton Unlearning for the LLM Era" (K-FADE) states that its updates can be re-applied after further training. It
is task arithmetic (Ilharco et al., "Editing Models with Task Arithmetic") with the difference that ``unlearn.kfade``
made. No K-FADE code is public; the formula is all there is to it. Nothing is random and no data are read.

    unlearned: target > unlearn.kfade
    again:     target > train.sft(data="more/rows") > unlearn.apply_delta(delta=unlearned)

The model must be built as the one the update was made on: same names, shapes and vocabulary. Memory: the model and the
update, both in float32 on the processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from methods.stage import Claim, Files, Stage

SEEDED = False
USES = ("methods.loop", "methods.checkpoint")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which update, and how much of it."""

    # a chain that ends in unlearn.kfade
    delta: Files
    # the factor of the update; 1 is the update itself
    scale: Annotated[float, Gt(0)] = 1.0
    # entries of matrices that are 0 in the parent stay 0
    keep_zeros: bool = True
    # precision of the written model; parent: as the model it was made from
    saved: Literal["parent", "float32", "bfloat16"] = "parent"


def run(stage: Stage) -> None:
    """Write the parent with the update added."""
    import torch

    from methods.checkpoint import load_model, save_model, saved_dtype
    from methods.loop import Weights
    from methods.unlearn import _delta

    config: Config = stage.config
    parent = stage.parents["model"]
    model = load_model(parent, "float32", torch.device("cpu"))
    delta, about = _delta.read(stage.parents["delta"])
    named = dict(model.named_parameters())
    _delta.check(named, model.config.vocab_size, delta, about)
    weights = Weights(named)
    weights.remember(config.keep_zeros, config.saved, parent)
    _delta.add(named, delta, config.scale)
    weights.restore_zeros()
    save_model(model, stage.folder / "model", parent, config.saved)
    total, before = weights.counted
    stage.notes |= {
        "parameters": total,
        "nonzero_before": before,
        "nonzero_after": weights.nonzero()[1],
        "update_lost_in_saving": weights.lost_in_saving(),
        "saved_dtype": saved_dtype(config.saved, parent),
    }
