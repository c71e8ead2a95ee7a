"""The mean squared distance of the student's hidden states from the teacher's.

As in FitNets (Romero et al., "FitNets: Hints for Thin Deep Nets") and TinyBERT (Jiao et al., "TinyBERT: Distilling
BERT for Natural Language Understanding"), which compare through a trained projection where the widths differ:

    1/K sum_l mean((h_l W_l - t_m(l))**2)        over positions that are not padding, and over the teacher's width

K pairs of layers, by default 1..L of both models (W = 1); 4 layers into 2 is ``layers="uniform"``. Each layer's mean
is logged, ``hidden_mse.1`` ...: a few channels with massive activations, and the first token of a Llama, make up most
of it, which ``squarehead`` levels out between layers, but not within one.
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
    """Mean squared difference [n] of states [n,H]."""
    return (state - target).square().mean(-1)
