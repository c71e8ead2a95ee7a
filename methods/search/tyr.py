"""Tyr-the-Pruner's search: how many heads and neurons each block loses, found by evolution.

Li et al. 2025, "Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization" (NeurIPS 2025,
arXiv 2503.09657; AMD-AGI/Tyr-the-Pruner, ``search_sparsity_dist.py``). The search is EvoPress's for sparsity with
levels of ``o_proj`` (heads) and ``down_proj`` (neurons), up to four switches a mutation,

    n = min(U{1,2,3,4}, U{1,2,3,4})

and two budgets: the number of heads and the number of neurons that go are kept apart. The official code gets there by
exchanging layers whose places in a sorted list are both even or both odd; here it is by type. Its example keeps two
candidates in the last stage and takes the first.

The method is coarse to fine, ``prune.tyr``: levels around a centre, this search, levels half as far apart around what
it found. Every round is a ``levels.tyr`` and a ``search.tyr`` of its own.

``fitness="hidden"`` stands for the paper's variant. The paper compares hidden activations and logits, the released code
logits alone (``ppl``, ``kl``, ``sparse_kl``), and we know of no formula; ours is

    sparse_kl + 1/L sum over blocks l of the mean over positions of ||h_l - h*_l||^2 / ||h*_l||^2

with h*_l the dense block's output. It keeps L hidden states of each calibration position beside the logits.

Other differences from the official code are those of ``search.evopress``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from methods.search import SMOKE, USES, Evolution
from methods.stage import Claim, StructureLevels

if TYPE_CHECKING:
    from methods.search import Problem
    from methods.search._assignment import Assignment

# The seed draws the calibration sequences, the children and the batches.
SEEDED = True
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
__all__ = ["SMOKE", "USES", "Config", "search"]


@dataclass(frozen=True, kw_only=True)
class Config(Evolution):
    """Options of ``search.tyr``. In the comments: the official example, for 7 billion parameters.

    It scores on 2,048, 16,384 and 131,072 tokens, drawn from 4,194,304 in sequences of 4,096.
    """

    # the levels of heads and neurons to choose from, of this chain's model
    levels: StructureLevels
    # rounds of mutation and selection (50)
    generations: Annotated[int, Ge(0)] = 30
    # candidates that each stage of selection keeps (16, 4, 2, of 128 children); the first of the last stage is taken
    survivors: tuple[Annotated[int, Gt(0)], ...] = (8, 4, 2)
    # what is made small (sparse_kl); hidden: our form of the paper's variant, see above
    fitness: Literal["kl", "sparse_kl", "ppl", "hidden"] = "sparse_kl"
    # words kept for sparse_kl and hidden (8,192 of 32,000); a vocabulary that has fewer is kept
    top_k: Annotated[int, Gt(0)] = 256
    # whether a child may equal its parent; the official code lets it (in 9 of 12 generations of a stored trace it did)
    allow_parent: bool = False


def search(config: Config, problem: Problem) -> Assignment:
    """Evolve from the centre; see ``methods.search``."""
    from methods.search._spaces import Shift

    space = Shift.of(problem.levels("structure"), most_switches=4, allow_parent=config.allow_parent)
    return problem.evolve(config, space)
