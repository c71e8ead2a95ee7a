"""Cross-entropy on the labels: the term that needs no teacher.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" mixes it with the divergence from the teacher.

    L = 1/M sum_{b,t} - log q(y[b,t] | y[b,<t], x[b])        M = answer tokens of the batch

It is taken at temperature 1, whatever the other terms do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.term import Tokens, Weighted

if TYPE_CHECKING:
    from torch import Tensor

TEACHER = False
USES = ("methods.term",)


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """Only a weight."""


def token_losses(config: Config, tokens: Tokens) -> Tensor:
    """Negative log-likelihood of each target [n], in nats."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(tokens.student, tokens.targets, reduction="none")
