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
from typing import Annotated, Any

from annotated_types import Gt

from methods.stage import Claim, Files, Stage
from methods.unlearn._weights import Arithmetic, rewrite

SEEDED = False
USES = ("methods.loop", "methods.checkpoint")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Arithmetic):
    """Which update, and how much of it."""

    # a chain that ends in unlearn.kfade
    delta: Files
    # the factor of the update; 1 is the update itself
    scale: Annotated[float, Gt(0)] = 1.0


def run(stage: Stage) -> None:
    """Write the parent with the update added."""
    from methods.unlearn import _delta

    delta, about = _delta.read(stage.parents["delta"])

    def add(model: Any) -> None:
        named = dict(model.named_parameters())
        _delta.check(named, model.config.vocab_size, delta, about)
        _delta.add(named, delta, stage.config.scale)

    rewrite(stage, add)
