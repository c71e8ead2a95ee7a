"""CAST: weights shrink out of an n:m pattern while the dense model teaches the one that is left.

Huang et al., "CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language Models",
the successor of AST.

    L = cross_entropy * CE + kl * T**2 * D( p_T || q_T ) + squarehead * SquareHead,      q of diag(s) W, unmasked
    W = sign(W) max(|W| - rate * decay_t, 0)    where M = 0, after the optimizer's step
    M: the largest of every m consecutive inputs, drawn anew every 10 steps

Nothing is masked while the model is trained: what the mask would zero shrinks until it is 0, and writing the model
changes next to nothing. ``scaling`` gives every output of a linear layer a factor s, trained with the weights, which
makes up for what the others have lost; it is multiplied into the written weights.

No code of the authors was found, and of the paper only the abstract and summaries. From these come the optimizer AdamS
(the mask of the n:m largest drawn anew every 10 steps, an adaptive L1 decay of masked weights alone that "promotes
uniform sparsification across all parameters"), scaling of weights, and the dense model as the teacher. Ours are: that
the decay stands apart from Adam's fraction (inside it every weight would shrink at another speed), its strength and its
straight way up over the whole training, and that the factors belong to outputs and are learnt. Weights of the terms and
the temperature are not verified: they are those of AST, and so are learning rate and schedule. No parity with the paper
is claimed.

``decay`` counts in steps of Adam, whose own are no longer than ``rate``: from 1 on no gradient keeps a masked weight
alive. In all it shrinks a weight by about rate * decay * steps / 2, which must be more than the largest masked weight:
raise it for a short training. ``curve.csv`` shows ``largest_masked``, the largest weight that the mask would zero now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from methods.distill import _masked
from methods.prune._masks import read_pattern
from methods.stage import Claim, Component, Optimizer

if TYPE_CHECKING:
    from methods.distill._masked_adam import SoftMasks
    from methods.term import Setting

SEEDED = True
USES = (
    "methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.term", "methods.masking",
    "methods.prune._masks", "methods.prune._walk", "methods.distill._masked", "methods.distill._masked_adam",
)  # fmt: skip
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(_masked.Masked):
    """What AST and CAST share, CAST's decay, and its factors."""

    # the decay of masked weights in the last step, in units of the learning rate; it rises from 0 (ours)
    decay: Annotated[float, Ge(0)] = 2.0
    # train a factor for every output of a linear layer (ours: learnt, and of outputs)
    scaling: bool = True
    # AST's, without its weight decay: the L1 decay stands in its place (ours)
    optimizer: Optimizer = Component("adamw", {"learning_rate": 2e-4, "beta2": 0.95, "weight_decay": 0.0})


terms = _masked.terms


def masking(config: Config, setting: Setting) -> SoftMasks:
    """Masks that say what shrinks, and the factors of the rows."""
    from methods.distill._masked_adam import SoftMasks, masked_layers

    pattern = read_pattern(config.pattern)
    layers = masked_layers("distill.cast", setting.student, pattern)
    return SoftMasks(layers, pattern, every=config.every, steps=setting.steps, scaling=config.scaling)


def optimizer(config: Config, setting: Setting, masking: SoftMasks) -> Any:
    """Any optimizer of weights and factors, and the decay after each of its steps."""
    from methods.distill._masked_adam import Shrinking, rising
    from methods.loop import component

    named = [(name, weight) for name, weight in setting.student.named_parameters() if weight.requires_grad]
    masks = {name: masking.mask(name) for name in masking.layers}
    module, options = component("optimizer", config.optimizer)
    inner = module.build(options, named)
    if masking.scales:
        inner.add_param_group({"params": list(masking.scales.values()), "weight_decay": 0.0})
    return Shrinking(inner, named, masks, rising(config.decay, setting.steps - 1))
