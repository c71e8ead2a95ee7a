"""The angle between the student's hidden states and the teacher's; their lengths are free.

As DistilBERT's cosine loss (Sanh et al., "DistilBERT, a distilled version of BERT"):

    1/K sum_l mean(1 - cos(h_l W_l, t_m(l)))        over positions that are not padding

K pairs of layers, by default 1..L of both models (W = 1). DistilBERT compares only the last hidden state
(``layers="last"``). Each layer's mean is logged, ``hidden_cosine.1`` ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.stage import Claim, Terms
from methods.term import _layers

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import View

USES = ("methods.term",)
HIDDEN = True
# A state of length 0 has no direction: its cosine is 0.
EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class Config(_layers.Matched):
    """Which layers are compared."""


CLAIMS: tuple[Claim, ...] = ()


# Layers and widths that cannot be compared are refused; the projections are trained with the student.
check = _layers.check
companion = _layers.projections


def terms(config: Config, view: View) -> Terms:
    """One term for each layer of the student that is compared, under its number; their weights add up to 1."""
    return _layers.averaged(config, view, distances)


def distances(state: Tensor, target: Tensor) -> Tensor:
    """1 - cosine [n] of states [n,H]; from 0 to 2."""
    from torch.nn.functional import cosine_similarity

    return 1 - cosine_similarity(state, target, dim=-1, eps=EPSILON)
