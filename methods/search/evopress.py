"""EvoPress for sparsity: how many weights each layer loses, found by evolution at a fixed number of zeros.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025, arXiv 2410.14649; IST-DASLab/EvoPress, ``evo_prune_search.py``). With levels l of layers in steps of the
same number of weights, the search minimises

    mean over tokens of KL(dense || compressed)    subject to    sum of l = 0

so every candidate has the zeros of the uniform assignment, which is where it starts. A mutation makes

    n = min(U{1,2,3}, U{1,2,3})

switches, each of which takes a level from one layer and gives it to another. ``_evolution`` says how children are
selected.

Where this differs from the official code: a child equal to its parent is refused (``allow_parent=False``), because it
spends a pass on what is known; the parent joins the last stage by its place and not by the number of survivors;
logarithms of probabilities are float32 (there: float16); a sequence of one token counts nothing (there it makes
``ppl`` and ``sparse_kl`` no number for all candidates, and then survivors are arbitrary); a stage that wants more
tokens than there are, or more children than exist, is an error (there: no end); rows of text are joined and cut into
windows of ``context_tokens`` (there every document is a sequence of its own length). The result is the assignment; the
official code evaluates and saves whatever was scored last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from methods.search import SMOKE, USES, Evolution
from methods.stage import Claim, SparsityLevels

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
    """Options of ``search.evopress``."""

    # the levels of sparsity to choose from, of this chain's model
    levels: SparsityLevels
    # no layer above this level; None (as published) for any there is
    max_level: Annotated[int, Ge(1)] | None = None
    # no candidate whose levels differ from 0 by more than this in all; None (as published) for any
    max_total_deviation: Annotated[int, Ge(2)] | None = None
    # whether a child may equal its parent; the official code lets it (in 2 of 12 generations of a stored trace it did)
    allow_parent: bool = False


def search(config: Config, problem: Problem) -> Assignment:
    """Evolve from the uniform assignment; see ``methods.search``."""
    from methods.search._spaces import Shift

    space = Shift.of(problem.levels("sparsity"), most_switches=3, allow_parent=config.allow_parent)
    filtered = replace(space, max_level=config.max_level, max_total_deviation=config.max_total_deviation)
    return problem.evolve(config, filtered)
