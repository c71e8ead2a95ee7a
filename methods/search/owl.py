"""OWL: blocks with more outliers keep more of their weights.

Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity"
(ICML 2024, arXiv 2310.05175); as in EvoPress (IST-DASLab/EvoPress, ``src/owl_pruner.py``), where it is a baseline. With
Wanda's scores A_ij = |W_ij| ||X_j||_2 of all linear layers of block l in the dense model, pooled:

    D_l = mean(A_l > m mean(A_l))                                      the outlier ratio
    s_l = s - b_l + mean(b),    b_l = 2 lambda (D_l - min D) / (max D - min D)

All layers of a block aim at s_l; s is the sparsity of level 0. The levels that are closest to that in squared zeros,
and whose zeros add up to those of level 0 exactly, are the assignment. Where no block stands out, all have level 0.

The paper tunes lambda, the option ``half_spread``, in {0.02, 0.05, 0.08, 0.1, 0.2} and m, ``outlier_factor``, in {3, 5,
7, 10} for each model; the defaults are its choice for LLaMA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Lt

from methods.prune import Calibrated
from methods.prune._hessian import input_energies
from methods.stage import Claim, SparsityLevels

if TYPE_CHECKING:
    from torch import Tensor

    from methods.prune._walk import Block
    from methods.search import Problem
    from methods.search._assignment import Assignment

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.levels._database",
    "methods.search._assignment",
    "methods.prune",
    "methods.prune._hessian",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Calibrated):
    """The levels, and how far the blocks may lie apart."""

    # A level database of sparsities; that of its level 0 is kept.
    levels: SparsityLevels
    # Half the distance between the densest and the sparsest block, as a share of the weights.
    half_spread: Annotated[float, Gt(0), Lt(0.5)] = 0.08
    # A weight is an outlier when its score is more than this many times its block's mean.
    outlier_factor: Annotated[float, Gt(0)] = 5.0


def search(config: Config, problem: Problem) -> Assignment:
    """Levels as close to the blocks' sparsities as the budget allows."""
    from methods.search._assignment import Assignment, nearest_levels

    database = problem.levels("sparsity")
    ratios = outlier_ratios(config, problem)
    moved = shifts(ratios, config.half_spread)
    wanted = {
        unit.name: unit.level("0").cost + moved[unit.block] * unit.rows * unit.columns
        for unit in database.units
    }
    levels = nearest_levels(database, wanted, database.spent(database.uniform()))
    about = {"outlier_ratios": ratios, "shifts": moved}
    return Assignment.of(database, levels, "search.owl", about)


def outlier_ratios(config: Config, problem: Problem) -> list[float]:
    """D of every block, on the dense model."""
    import torch

    from methods.prune._walk import walk

    sequences = problem.calibration.sequences(config.data, config.sequences, config.context_tokens)
    with torch.no_grad():
        return [
            outlier_ratio(block_scores(block), config.outlier_factor)
            for block in walk(problem.model, sequences)
        ]


def block_scores(block: Block) -> list[Tensor]:
    """Wanda's scores [out,in] of every linear layer of a block."""
    energies = input_energies(block)
    return [linear.weight.abs() * energies[name].sqrt() for name, linear in block.linears().items()]


def outlier_ratio(scores: Sequence[Tensor], factor: float) -> float:
    """The share of all these scores that are more than ``factor`` times their mean."""
    numel = sum(part.numel() for part in scores)
    mean = sum(float(part.double().sum()) for part in scores) / numel
    return sum(int((part > factor * mean).sum()) for part in scores) / numel


def shifts(ratios: Sequence[float], half_spread: float) -> list[float]:
    """s_l - s of every block: mean 0, at most twice ``half_spread`` apart, least where the outliers are."""
    lowest, widest = min(ratios), max(ratios) - min(ratios)
    if widest == 0:
        return [0.0] * len(ratios)
    brackets = [2 * half_spread * (ratio - lowest) / widest for ratio in ratios]
    mean = sum(brackets) / len(brackets)
    return [mean - bracket for bracket in brackets]
