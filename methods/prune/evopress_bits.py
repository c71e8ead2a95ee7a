"""EvoPress for bit-widths: weights in few bits, how many in each layer found by evolution.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025, arXiv 2410.14649; IST-DASLab/EvoPress, ``quant.py`` and ``evo_quant_search.py``). Of all bit-widths b of
layers with n weights the search takes those with

    the least mean over tokens of KL(dense || quantised)    subject to    sum of n b = bits * sum of n

A shorthand for three stages: ``levels.gptq`` quantises every layer at every width, ``search.evopress_bits`` chooses,
and ``prune.assigned`` builds the model, with dequantised weights. Written out, the stages have the same ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from methods.levels import gptq
from methods.prune._grids import Kind, Precision
from methods.prune._steps import DATABASE, handed_on
from methods.search import Evolution, evopress_bits
from methods.stage import AssayError, Claim, From, Step

# The seed draws calibration sequences, children and batches.
SEEDED = True
RESULT = "model"
CLAIMS = (
    Claim(
        sentence="Llama-3-8B with 3 bits on average, searched, has a perplexity of 7.49 or less (uniform 12.19).",
        source="EvoPress, first arXiv version, as told in a public summary",
        metric="perplexity.perplexity",
        subject="*> prune.evopress_bits*",
        subject_options={"bits": 3.0},
        relation="at_most",
        value=7.49,
        scope="paper",
        model="meta-llama/Meta-Llama-3-8B",
    ),
)

_LEVELS, _SEARCH = gptq.Config, evopress_bits.Config


@dataclass(frozen=True, kw_only=True)
class Config(Evolution):
    """Options of ``levels.gptq`` and of ``search.evopress_bits``, with their defaults."""

    # bits for each weight on average, scales not counted
    bits: Annotated[float, Gt(0)]
    # bit-widths of every layer to choose from: the option bits of levels.gptq
    widths: tuple[Annotated[int, Ge(2), Le(8)], ...] = _LEVELS.bits
    # the bit-width whose errors later blocks see when the levels are built
    loaded: int = _LEVELS.loaded
    # inputs that share a scale; None: all of a row
    group: Annotated[int, Gt(0)] | None = _LEVELS.group
    # whether the range is as long below 0 as above it
    symmetric: bool = _LEVELS.symmetric
    # "evopress": the range is that of the weights. "official" (GPTQ): 0 always has a code
    grid: Kind = _LEVELS.grid
    # columns between two updates of the rest of the matrix
    block: Annotated[int, Gt(0)] = _LEVELS.block
    # added to the Hessian's diagonal, as a share of its mean
    relative_damping: Annotated[float, Gt(0)] = _LEVELS.relative_damping
    # tokens that the levels are calibrated on
    database_tokens: Annotated[int, Gt(0)] = _LEVELS.calibration_tokens
    # longest sequence that the levels are calibrated on
    database_context_tokens: Annotated[int, Gt(0)] = _LEVELS.context_tokens
    # what scales and zero points are stored in
    scales: Precision = _LEVELS.scales
    # whether weights that are 0 in the parent stay 0
    keep_zeros: bool = _LEVELS.keep_zeros
    # layers that exchange bits: with as many weights, of the same name, or any
    group_rule: Literal["size", "name", "none"] = _SEARCH.group_rule
    # random assignments that a fraction of bits starts from the best of
    initial_candidates: Annotated[int, Gt(0)] = _SEARCH.initial_candidates
    # tokens on which these are scored
    initial_tokens: Annotated[int, Gt(1)] = _SEARCH.initial_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths and not min(self.widths) <= self.bits <= max(self.widths):
            raise AssayError(
                f"prune.evopress_bits: no choice among widths={list(self.widths)} has {self.bits:g} bits for each "
                f"weight on average: take {min(self.widths)} to {max(self.widths)}, or other widths."
            )


def expand(config: Config) -> tuple[Step, ...]:
    """Levels, search, model."""
    search = handed_on(config, _SEARCH, {}, levels=From("levels"))
    chosen = {"levels": From("levels"), "assignment": From("search"), "keep_zeros": config.keep_zeros}
    return (
        Step("levels", "levels.gptq", handed_on(config, _LEVELS, {**DATABASE, "bits": "widths"})),
        Step("search", "search.evopress_bits", search),
        Step("model", "prune.assigned", chosen),
    )
