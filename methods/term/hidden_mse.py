"""The mean squared distance of the student's hidden states from the teacher's.

As in FitNets (Romero et al., "FitNets: Hints for Thin Deep Nets") and TinyBERT (Jiao et al., "TinyBERT: Distilling
BERT for Natural Language Understanding"), which compare through a trained projection where the widths differ:

    1/K sum_l mean((h_l W_l - t_m(l))**2)        over positions that are not padding, and over the teacher's width

K pairs of layers, by default 1..L of both models (W = 1); 4 layers into 2 is ``layers="uniform"``. Each layer's mean
is logged, ``hidden_mse.1`` ...: a few channels with massive activations, and the first token of a Llama, make up most
of it, which ``squarehead`` levels out between layers, but not within one.
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


@dataclass(frozen=True, kw_only=True)
class Config(Matched):
    """Which layers are compared."""


CLAIMS: tuple[Claim, ...] = ()


def check(config: Config, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """AssayError for layers or widths that cannot be compared."""
    from methods.term import _layers

    _layers.check(config, student, teacher, "hidden_mse")


def companion(config: Config, setting: Setting) -> nn.ModuleDict | None:
    """The projections W."""
    from methods.term import _layers

    return _layers.projections(config, setting, "hidden_mse")


def terms(config: Config, view: View) -> Terms:
    """One term for each layer of the student that is compared, under its number; their weights add up to 1."""
    from methods.term._layers import compared

    layers = list(compared(config, view, "hidden_mse"))
    return {
        str(layer): Term(distances(state, target).sum(), view.part.attended, 1 / len(layers))
        for layer, state, target in layers
    }


def distances(state: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference [n] of states [n,H]."""
    return (state - target).square().mean(-1)
