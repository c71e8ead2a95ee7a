"""AST: an n:m mask that is learnt while the model under it is taught by the dense model.

Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training".

    L = cross_entropy * CE + kl * T**2 * D( p_T || q_T ) + squarehead * SquareHead,      q of the masked model W * M

M keeps the largest weights of every m consecutive inputs and is drawn anew every few steps; the gradient at the masked
weights goes straight through to the dense ones. Those that are masked are pulled to 0 by a term that is added after the
average of the gradients and before the division:

    W = W - rate * u / sqrt(v),    u = m + decay * W * (1 - M),    m = average of the gradients,   v = average of u**2

(``methods.distill._masked_adam``). An Adam whose gradient contains the pull is not equivalent. With another
optimizer than ``adamw`` the pull is ``rate * decay * W * (1 - M)`` beside its step.
Because v is of averages, which start from 0, the first steps are 1 / (1 - beta1) times as long as Adam's: they need the
schedule's way up.

The defaults are the repository's recipe for GPT-2 (thu-ml/Adaptive-Sparse-Trainer; there 40,000 steps of 128 packed
sequences); that for LLaMA-2-7B is ``cross_entropy=1.0, kl=0.5``. Upstream trains on packed text and takes the
divergence at every position, ``positions="all"``; here the default is the answers. Where the code disagrees with the
paper: ``adamw.py`` inverts a mask of *integers* bit by bit, which gives -1 and -2 in the place of 1 and 0, so that its
term pushes every weight away from 0 and kept ones twice as hard; ``squarehead`` is there taken before the last norm;
``train.sh`` trains without a teacher. Here it is as the paper writes it.

``curve.csv``: the terms, ``hidden``, ``flipped`` (the share whose mask this step changed), ``masked_decay``. The
written model has exactly n zeros in every m weights of the decoder's linear layers, or more where the parent had more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from methods.distill import _masked
from methods.prune._masks import read_pattern
from methods.stage import Claim

if TYPE_CHECKING:
    from methods.masking import ScheduledMasks
    from methods.term import Setting

SEEDED = True
USES = (
    "methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.term", "methods.masking",
    "methods.prune._masks", "methods.prune._walk", "methods.distill._masked", "methods.distill._masked_adam",
)  # fmt: skip
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(_masked.Masked):
    """What AST and CAST share, and AST's pull."""

    # pull on masked weights, times the weight (srste_decay: 6e-5)
    decay: Annotated[float, Ge(0)] = 6e-5
    # share of the steps in which it rises to that in a straight line (10,000 of 40,000)
    decay_rise: Annotated[float, Ge(0), Le(1)] = 0.25


terms = _masked.terms


def masking(config: Config, setting: Setting) -> ScheduledMasks:
    """Masks over the decoder's linear layers, drawn anew from the dense weights behind them."""
    from methods.distill._masked_adam import masked_layers, straight_through

    pattern = read_pattern(config.pattern)
    layers = masked_layers("distill.ast", setting.student, pattern)
    return straight_through(layers, pattern, config.every, setting.steps)


def optimizer(config: Config, setting: Setting, masking: ScheduledMasks) -> Any:
    """Adam with the pull inside; another optimizer with the pull beside it."""
    from methods.distill._masked_adam import MaskedAdam, Pulled, rising
    from methods.loop import component

    named = [(name, weight) for name, weight in setting.student.named_parameters() if weight.requires_grad]
    masks = {name: masking.mask(name) for name in masking.layers}
    pull = rising(config.decay, round(config.decay_rise * setting.steps))
    module, options = component("optimizer", config.optimizer)
    if config.optimizer.name == "adamw":
        return MaskedAdam(named, masks, options, pull)
    return Pulled(module.build(options, named), named, masks, pull)
