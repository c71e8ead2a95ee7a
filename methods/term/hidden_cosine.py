"""The angle between the student's hidden states and the teacher's; their lengths are free.

As DistilBERT's cosine loss (Sanh et al., "DistilBERT, a distilled version of BERT"):

    1/K sum_l mean(1 - cos(h_l W_l, t_m(l)))        over positions that are not padding

K pairs of layers, by default 1..L of both models (W = 1). DistilBERT compares only the last hidden state
(``layers="last"``). Each layer's mean is logged, ``hidden_cosine.1`` ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import Claim, Term, Terms
from methods.term._layers import Matched

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.term import Setting, View

USES = ("methods.term",)
HIDDEN = True
# A state of length 0 has no direction: its cosine is 0.
EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class Config(Matched):
    """Which layers are compared."""


CLAIMS: tuple[Claim, ...] = ()


def check(config: Config, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """AssayError for layers or widths that cannot be compared."""
    from methods.term import _layers

    _layers.check(config, student, teacher, "hidden_cosine")


def companion(config: Config, setting: Setting) -> nn.ModuleDict | None:
    """The projections W."""
    from methods.term import _layers

    return _layers.projections(config, setting, "hidden_cosine")


def terms(config: Config, view: View) -> Terms:
    """One term for each layer of the student that is compared, under its number; their weights add up to 1."""
    from methods.term._layers import compared

    layers = list(compared(config, view, "hidden_cosine"))
    return {
        str(layer): Term(distances(state, target).sum(), view.part.attended, 1 / len(layers))
        for layer, state, target in layers
    }


def distances(state: Tensor, target: Tensor) -> Tensor:
    """1 - cosine [n] of states [n,H]; from 0 to 2."""
    from torch.nn.functional import cosine_similarity

    return 1 - cosine_similarity(state, target, dim=-1, eps=EPSILON)
