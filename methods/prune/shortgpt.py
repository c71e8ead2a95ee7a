"""ShortGPT: blocks that change little of what passes through them are removed.

Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (arXiv 2403.03853),
block influence, its equation 1, with h_l the hidden state of a token in front of block l:

    BI_l = 1 - E[ h_l . h_{l+1} / (||h_l|| ||h_{l+1}||) ]

The blocks with the lowest influence go, all at once, and the others stay as they are. A shorthand for
``search.block_scores``, which has other scores and says where paper and code disagree, and ``prune.assigned``, which
makes the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from methods.prune._steps import handed_on
from methods.search import block_scores
from methods.stage import Claim, Dataset, From, Step

# The seed draws the calibration sequences.
SEEDED = True
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()

_SEARCH = block_scores.Config


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``prune.shortgpt``."""

    # rows the influence is measured on; PG19 in the paper
    data: Dataset
    # share of the blocks that is removed: a whole number of them; about a quarter in the paper
    sparsity: Annotated[float, Gt(0), Lt(1)]
    # the output of the last block is taken "official": behind the final norm, or "before" it, as the paper says
    final_norm: Literal["official", "before"] = _SEARCH.final_norm
    # whole sequences are drawn until they have as many tokens
    calibration_tokens: Annotated[int, Gt(0)] = _SEARCH.calibration_tokens
    # longer sequences are cut
    context_tokens: Annotated[int, Gt(1)] = _SEARCH.context_tokens


def expand(config: Config) -> tuple[Step, ...]:
    """Score the blocks, and build the model without the least influential ones."""
    return (
        Step("search", "search.block_scores", handed_on(config, _SEARCH, {}, score="influence")),
        Step("model", "prune.assigned", {"assignment": From("search")}),
    )
