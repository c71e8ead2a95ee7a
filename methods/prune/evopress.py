"""EvoPress: single weights removed, how many from each layer found by evolution.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025, arXiv 2410.14649; IST-DASLab/EvoPress, ``prune.py`` and ``evo_prune_search.py``). Of all levels l of all
layers the search takes those with

    the least mean over tokens of KL(dense || pruned)    subject to    sum of l = 0

so that the model has the zeros of the uniform sparsity. A shorthand for three stages: ``levels.sparsegpt`` builds the
levels, ``search.evopress`` chooses, and ``prune.assigned`` builds the model from what was chosen (the official code
evaluates whatever candidate it scored last). Written out, the stages have the same ids, so that levels are built once
for all searches over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from methods.levels import sparsegpt
from methods.prune._steps import handed_on
from methods.search import Evolution, evopress
from methods.stage import Claim, From, Step

# The seed draws calibration sequences, children and batches.
SEEDED = True
RESULT = "model"
CLAIMS = (
    Claim(
        sentence="Mistral-7B with 70 % zeros, searched, has a perplexity of 14.42 or less (uniform 23.08).",
        source="EvoPress, first arXiv version, as told in a public summary",
        metric="perplexity.perplexity",
        subject="*> prune.evopress*",
        subject_options={"sparsity": 0.7},
        relation="at_most",
        value=14.42,
        scope="paper",
        model="mistralai/Mistral-7B",
    ),
)

_LEVELS, _SEARCH = sparsegpt.Config, evopress.Config


@dataclass(frozen=True, kw_only=True)
class Config(Evolution):
    """Options of ``levels.sparsegpt`` and of ``search.evopress``, with their defaults."""

    # share of zeros in the decoder's linear layers, those of the parent included
    sparsity: Annotated[float, Gt(0), Lt(1)]
    # levels above and below the uniform one
    levels: Annotated[int, Gt(0)] = _LEVELS.levels
    # zeros between two neighbouring levels of any layer; None: see levels.sparsegpt
    weights_step: Annotated[int, Gt(0)] | None = _LEVELS.weights_step
    # tokens that the levels are calibrated on
    database_tokens: Annotated[int, Gt(0)] = _LEVELS.calibration_tokens
    # longest sequence that the levels are calibrated on
    database_context_tokens: Annotated[int, Gt(0)] = _LEVELS.context_tokens
    # "none": levels are measured on the dense model's activations. "uniform": behind predecessors at level 0
    error_propagation: Literal["none", "uniform"] = _LEVELS.error_propagation
    # columns whose weights SparseGPT compares with each other
    block: Annotated[int, Gt(0)] = _LEVELS.block
    # added to the Hessian's diagonal, as a share of its mean
    relative_damping: Annotated[float, Ge(0)] = _LEVELS.relative_damping
    # "exact": the stated zeros in the whole matrix. "block": rounded in every block of columns
    threshold: Literal["exact", "block"] = _LEVELS.threshold
    # precision the levels are stored in
    saved: Literal["float32", "bfloat16", "float16"] = _LEVELS.saved
    # whether weights that are 0 in the parent stay 0
    keep_zeros: bool = _LEVELS.keep_zeros
    # no layer above this level; None: any there is
    max_level: Annotated[int, Ge(1)] | None = _SEARCH.max_level
    # no candidate whose levels differ from 0 by more than this in all; None: any
    max_total_deviation: Annotated[int, Ge(2)] | None = _SEARCH.max_total_deviation
    # whether a child may equal its parent
    allow_parent: bool = _SEARCH.allow_parent


def expand(config: Config) -> tuple[Step, ...]:
    """Levels, search, model."""
    search = handed_on(config, _SEARCH, {}, levels=From("levels"))
    chosen = {"levels": From("levels"), "assignment": From("search"), "keep_zeros": config.keep_zeros}
    return (
        Step("levels", "levels.sparsegpt", handed_on(config, _LEVELS)),
        Step("search", "search.evopress", search),
        Step("model", "prune.assigned", chosen),
    )
