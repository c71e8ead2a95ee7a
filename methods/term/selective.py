"""A divergence from the teacher on the rows that are marked, and the labels on the others.

Irawan et al., "LinguDistill: Recovering Linguistic Ability in Vision-Language Models via Selective Cross-Modal
Distillation" distils language-intensive data and keeps the task's loss elsewhere. With s = 1 on every token of a marked
row, and 0 on those of the others:

    L = 1/M sum_{b,t} ( s kl T**2 D( p_T || q_T ) + (1 - s) cross_entropy (- log q(y)) )[b,t],     M = all answer tokens

``forward_kl`` and ``cross_entropy`` in the curve are the two sums over M, without their weights. A method marks rows
with the number ``MARK`` of every token (``distill.lingu_distill``); where none is marked, all are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt

from methods.stage import AssayError
from methods.term import Tokens, Weighted

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.term", "methods.terms")
# 1 for the tokens of a row that is distilled, 0 for those of the others.
MARK = "distilled"


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """The weights of the two, and the temperature of the one."""

    # of the divergence on marked rows
    kl: Annotated[float, Ge(0)] = 1.0
    # of the cross-entropy on the others
    cross_entropy: Annotated[float, Ge(0)] = 1.0
    # both distributions are softened by it; the divergence is multiplied by its square
    temperature: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        if self.kl == self.cross_entropy == 0:
            raise AssayError("selective: kl and cross_entropy are both 0; set one of them above 0.")


def token_losses(config: Config, tokens: Tokens) -> dict[str, Tensor]:
    """``loss``, and its two parts [n]."""
    from torch.nn.functional import cross_entropy

    from methods.terms import kl_divergence

    assert tokens.teacher is not None  # the family refuses this term without a teacher
    divergence = kl_divergence(tokens.teacher, tokens.student, config.temperature)
    pull = config.kl * config.temperature**2
    if MARK not in tokens.extra:
        return {"loss": pull * divergence, "forward_kl": divergence.detach()}
    marked = tokens.extra[MARK]
    labels = cross_entropy(tokens.student, tokens.targets, reduction="none")
    kl, task = marked * divergence, (1 - marked) * labels
    loss = pull * kl + config.cross_entropy * task
    return {"loss": loss, "forward_kl": kl.detach(), "cross_entropy": task.detach()}
