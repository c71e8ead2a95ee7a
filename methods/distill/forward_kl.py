"""Knowledge distillation: the student's next-token distribution is pulled towards the teacher's.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network".

    L = (1 - alpha) * CE  +  alpha * T**2 * 1/M sum_{b,t} D( p_T || q_T )[b,t]
    p_T = softmax(z_teacher / T),  q_T = softmax(z_student / T),  M = answer tokens of the batch

``T**2`` keeps the gradient's size when T changes; trl's GKD trainer and jongwooko/distillm leave it out
(``scale_by_temperature=False``), and the latter returns the cross-entropy -sum p log q: another value with the same
gradient.

The two terms are ``methods/term/forward_kl.py`` and ``methods/term/cross_entropy.py``; ``distill.mix`` has them with
any weights, beside others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from methods.distill import Softening
from methods.stage import Claim, Component
from methods.term import of

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.term")


@dataclass(frozen=True, kw_only=True)
class Config(Softening):
    """The shared recipe, and how the teacher's distribution is mixed with the labels."""

    # share of the divergence; the rest is the cross-entropy on the labels (1: the teacher alone)
    alpha: Annotated[float, Ge(0), Le(1)] = 1.0
    # multiply the divergence by T**2, as Hinton et al. do
    scale_by_temperature: bool = True


CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="After magnitude pruning to 70 %, 100 steps of forward KL to the unpruned model wins back "
        "most of what was lost: the retain NLL is at least 0.3 nats below the pruned model's.",
        source="pilot in the embedded world: 0.59-0.75 before, 0.03-0.05 after (3 of 3); no better than CE there",
        metric="tofu.retain_nll",
        subject="*prune.magnitude(*sparsity=0.7*) > distill.forward_kl*",
        relation="lower",
        other="parent",
        margin=0.3,
    ),
)


def terms(config: Config) -> dict[str, Component]:
    """``kl``: the mean divergence over answer tokens; ``cross_entropy`` where alpha < 1."""
    found = {
        "kl": of(
            "forward_kl",
            weight=config.alpha,
            temperature=config.temperature,
            scale_by_temperature=config.scale_by_temperature,
        )
    }
    if config.alpha < 1:
        found["cross_entropy"] = of("cross_entropy", weight=1 - config.alpha)
    return found
