"""EvoPress for depth: which attentions and MLPs are removed, found by evolution at a fixed number of each.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025, arXiv 2410.14649; IST-DASLab/EvoPress, ``evo_drop_search.py``). Of L attentions and L MLPs the same share is
removed, each a sub-block whose branch of the residual stream is left out; the search minimises

    mean over tokens of KL(dense || pruned)    subject to    sparsity * L attentions and sparsity * L MLPs removed

A mutation makes n = min(U{1,2,3}, U{1,2,3}) switches: attention or MLP with probability one half, one removed sub-block
back and one kept sub-block away. With ``whole_blocks`` an MLP goes with its attention. The search starts from the best
of some random choices, as many as there are parents (the last of ``survivors``), and takes a parent uniformly for each
child. The paper bounds the expected generations for a linear fitness by O(k(n-k)/children) with k of n blocks removed;
the script runs k(n-k)/1.5.

Where this differs from the official code: k is ``sparsity * L`` and has to be a whole number (there it is rounded
down); and what ``search.evopress`` lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Lt

from methods.search import SMOKE, USES, Evolution, refuse_few_tokens
from methods.stage import Claim

if TYPE_CHECKING:
    from methods.search import Problem
    from methods.search._assignment import Assignment
    from methods.search._depth import Depth

# The seed draws the calibration sequences, the children and the batches.
SEEDED = True
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
__all__ = ["SMOKE", "USES", "Config", "search"]


@dataclass(frozen=True, kw_only=True)
class Config(Evolution):
    """Options of ``search.evopress_depth``. In the comments: the shipped script, for 8 billion parameters.

    It draws from 131,072 calibration tokens.
    """

    # share of the attentions, and of the MLPs, that is removed: a whole number of each
    sparsity: Annotated[float, Gt(0), Lt(1)]
    # whether only whole blocks are removed
    whole_blocks: bool = False
    # rounds of mutation and selection; None: k(n-k)/1.5 for k of n blocks, rounded up, as in the script; 0: the best of
    # the random choices
    generations: Annotated[int, Ge(0)] | None = None  # type: ignore[assignment]
    # distinct children of a generation (32)
    children: Annotated[int, Gt(0)] = 8
    # candidates that each stage of selection keeps (2, 1); the last is the number of parents
    survivors: tuple[Annotated[int, Gt(0)], ...] = (2, 1)
    # tokens on which each stage scores (2,048, 32,768)
    tokens: tuple[Annotated[int, Gt(1)], ...] = (1024, 8192)
    # random choices that the search starts from the best of (64)
    initial_candidates: Annotated[int, Gt(0)] = 16
    # tokens on which these are scored (2,048)
    initial_tokens: Annotated[int, Gt(1)] = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_few_tokens(
            self.initial_tokens, self.calibration_tokens, f"initial_tokens={self.initial_tokens}"
        )


def search(config: Config, problem: Problem) -> Assignment:
    """Evolve from the best of some random choices of sub-blocks."""
    from methods.search._depth import Depth

    space = Depth.of(problem.model, config.sparsity, config.whole_blocks)
    generations = usual_generations(space) if config.generations is None else config.generations
    return problem.evolve(
        replace(config, generations=generations),
        space,
        parents=config.survivors[-1],
        start=(config.initial_candidates, config.initial_tokens),
    )


def usual_generations(space: Depth) -> int:
    """k(n-k)/1.5 for k of n blocks, rounded up."""
    blocks, removed = len(space.attentions), space.removed_attentions
    return math.ceil(removed * (blocks - removed) / 1.5)
