"""SquareHead: the student's hidden states are pulled towards the teacher's, each layer measured by the teacher's size.

Kurtic et al., "Sparse Finetuning for Inference Acceleration of Large Language Models".

    sum_l mean((h_l - t_l)**2) / (mean(t_l**2) + 2**-7)

h are the student's hidden states and t the teacher's. The sum runs over layers 1..L (not the embedding's output);
each mean runs over every position that is not padding, *prompt included*, and over the width. ``2**-7`` is bfloat16's
machine epsilon, as in the code (IST-DASLab/SparseFinetuning, ``train_sparse.py``). Each layer is logged on its own,
``squarehead.1`` ... ``squarehead.L``: a sum of squared distances divided by the teacher's sum of squares over the
global batch, so micro-batches change nothing.

thu-ml/Adaptive-Sparse-Trainer's ``layerwise_loss`` is the same with padding counted (``padding=True``), on the blocks'
outputs before the final norm, where transformers' last hidden state is the one behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.stage import Claim, Term, Terms
from methods.term import _layers

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import View

USES = ("methods.term",)
HIDDEN = True
EPSILON = 2.0**-7


@dataclass(frozen=True, kw_only=True)
class Config(_layers.Matched):
    """Options of SquareHead."""

    # count positions of padding, too, as AST's code does on packed text
    padding: bool = False


CLAIMS: tuple[Claim, ...] = ()


# Layers and widths that cannot be compared are refused; the projections are trained with the student.
check = _layers.check
companion = _layers.projections


def terms(config: Config, view: View) -> Terms:
    """One term for each layer of the student that is compared, under its number."""
    return {
        str(layer): layer_term(state, target)
        for layer, state, target in _layers.compared(config, view, config.padding)
    }


def layer_term(state: Tensor, target: Tensor) -> Term:
    """One layer's distance over the teacher's energy, both [n,H].

    mean(d**2) / (mean(t**2) + eps) = sum(d**2) / (sum(t**2) + n * H * eps): both sums add up over micro-batches.
    """
    energy = float(target.square().sum())
    return Term((state - target).square().sum(), energy + EPSILON * target.numel())
