"""Tyr-the-Pruner: heads and neurons removed and the rest refitted, how many from each block found coarse to fine.

Li, Xu, Li et al. 2025, "Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization"
(NeurIPS 2025, arXiv 2503.09657; AMD-AGI/Tyr-the-Pruner). Each of ``rounds`` rounds prunes and searches:

    levels   centre_l + j step, j = -4..4, of heads and neurons of every block, made from the original dense weights
    centre   the levels found by a search in which heads and neurons are budgets of their own
    step     step / 2

beginning with the same share of heads and neurons in all blocks. The step has a floor of one head and of
``least_neurons`` neurons, so that heads may keep theirs in the last rounds.

A shorthand for a ``levels.tyr`` and a ``search.tyr`` a round and a ``prune.assigned`` at the end, from the levels and
the assignment of the last round (the official code evaluates whatever candidate it scored last, and reports the best
perplexity on the test set over all generations). Written out, the stages have the same ids. The first round's levels
are shared by shorthands with other searches. The docstrings of both methods say where paper and code disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from methods.levels import tyr as levels_tyr
from methods.prune._refit import Score
from methods.prune._steps import handed_on
from methods.prune._structured import Heads, Rounding
from methods.search import Evolution
from methods.search import tyr as search_tyr
from methods.stage import Claim, From, Step

# The seed draws calibration sequences, children and batches.
SEEDED = True
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()

_LEVELS, _SEARCH = levels_tyr.Config, search_tyr.Config


@dataclass(frozen=True, kw_only=True)
class Config(Evolution):
    """Options of ``levels.tyr`` and of ``search.tyr``, with their defaults, and the number of rounds."""

    # share of the heads, and of the neurons, that is removed
    sparsity: Annotated[float, Gt(0), Lt(1)]
    # rounds of levels and search; 4 in the example script
    rounds: Annotated[int, Gt(0)] = 4
    # share of the units between two levels in the first round; half of it in the second, and so on
    step: Annotated[float, Gt(0), Le(1)] = _LEVELS.step
    # levels of a matrix, half of them on either side of the centre
    levels: Annotated[int, Ge(3)] = _LEVELS.levels
    # neurons between two levels, at least
    least_neurons: Annotated[int, Gt(0)] = _LEVELS.least_neurons
    # what a head is: a key-value group with all its query heads, or a query head (the released code)
    heads: Heads = _LEVELS.heads
    # whether a score has Týr's energy term, or is the increase of the squared error alone
    score: Score = _LEVELS.score
    # steps in which heads are removed, scores renewed in between
    head_rounds: Annotated[int, Gt(0)] = _LEVELS.head_rounds
    # the same for neurons
    neuron_rounds: Annotated[int, Gt(0)] = _LEVELS.neuron_rounds
    # added to the diagonal of the Gram matrix, as a share of its mean
    relative_damping: Annotated[float, Gt(0)] = _LEVELS.relative_damping
    # what later blocks see while levels are built: dense ones before them, the centre, or the mean of all levels
    error_propagation: Literal["none", "center", "weighted"] = _LEVELS.error_propagation
    # units at the centre: "exact" refuses a share that whole units cannot meet, "nearest" takes the nearest
    rounding: Rounding = _LEVELS.rounding
    # tokens that the levels are calibrated on
    database_tokens: Annotated[int, Gt(0)] = _LEVELS.calibration_tokens
    # longest sequence that the levels are calibrated on
    database_context_tokens: Annotated[int, Gt(0)] = _LEVELS.context_tokens
    # precision the levels are stored in
    saved: Literal["float32", "bfloat16", "float16"] = _LEVELS.saved
    # whether weights that are 0 in the parent stay 0
    keep_zeros: bool = _LEVELS.keep_zeros
    # generations of each round's search
    generations: Annotated[int, Ge(0)] = _SEARCH.generations
    # candidates that each stage of selection keeps; the first of the last stage is taken
    survivors: tuple[Annotated[int, Gt(0)], ...] = _SEARCH.survivors
    # what is made small
    fitness: Literal["kl", "sparse_kl", "ppl", "hidden"] = _SEARCH.fitness
    # words kept for sparse_kl and hidden
    top_k: Annotated[int, Gt(0)] = _SEARCH.top_k
    # whether a child may equal its parent
    allow_parent: bool = _SEARCH.allow_parent


def expand(config: Config) -> tuple[Step, ...]:
    """A levels and a search for each round, then the model."""
    steps: list[Step] = []
    for number in range(1, config.rounds + 1):
        built = handed_on(config, _LEVELS, step=config.step / 2 ** (number - 1))
        if number > 1:
            built["center"] = From(f"search{number - 1}")
        searched = handed_on(config, _SEARCH, {}, levels=From(f"levels{number}"))
        steps.append(Step(f"levels{number}", "levels.tyr", built))
        steps.append(Step(f"search{number}", "search.tyr", searched))
    chosen = {"levels": From(steps[-2].name), "assignment": From(steps[-1].name)}
    return (*steps, Step("model", "prune.assigned", chosen | {"keep_zeros": config.keep_zeros}))
