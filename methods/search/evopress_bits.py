"""EvoPress for bit-widths: how many bits each layer's weights have, found by evolution at a fixed mean.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025, arXiv 2410.14649; IST-DASLab/EvoPress, ``evo_quant_search.py``). With b_l bits for each of the n_l weights
of layer l, the search minimises

    mean over tokens of KL(dense || compressed)    subject to    sum of n_l b_l = bits * sum of n_l

A mutation makes n = min(U{1,2,3}, U{1,2,3}) switches. With ``group_rule`` "size" or "name" a switch takes a bit from
one layer and gives it to another with as many weights (of the same name), so the budget is kept to the bit. With "none"
n layers of any size go up and then others go down until the budget is met again; it is an upper bound there, and a
child that changes more than ten levels or gives up more than a fifth of the bits it takes away is drawn again.

A whole number of bits starts from the uniform assignment. A fraction starts from the best of some random assignments:
all layers rounded up, then layers lowered at random until the budget is met.

``bits`` counts codes alone. What scales and zeros add (0.25 for float16 ones of every 128 weights) is stated beside it:
``bits`` and ``bits_with_scales`` of the assignment.

Where this differs from the official code: initial assignments meet the budget to the bit (there they may end below it,
and an exhausted group of layers stops the program with an assertion, as at 2.5 bits of a small model with grouped
queries); and what ``search.evopress`` lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from methods.search import SMOKE, USES, Evolution, refuse_few_tokens
from methods.stage import BitLevels, Claim

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
    """Options of ``search.evopress_bits``.

    The shipped script for 8 billion parameters keeps 16, 4 and 1 of 128 children on 2,048, 16,384 and 131,072 tokens.
    """

    # the bit-widths to choose from, of this chain's model
    levels: BitLevels
    # bits for each weight on average, scales not counted
    bits: Annotated[float, Gt(0)]
    # layers that exchange bits: with as many weights (as published), of the same name, or any
    group_rule: Literal["size", "name", "none"] = "size"
    # random assignments that a fraction of bits starts from the best of
    initial_candidates: Annotated[int, Gt(0)] = 16
    # tokens on which these are scored
    initial_tokens: Annotated[int, Gt(1)] = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        # A whole number of bits starts from all layers at that number, and nothing has to be scored first.
        if self.bits % 1:
            refuse_few_tokens(
                self.initial_tokens, self.calibration_tokens, f"initial_tokens={self.initial_tokens}"
            )


def search(config: Config, problem: Problem) -> Assignment:
    """Evolve from the uniform assignment, or from the best of some random ones."""
    from methods.search._assignment import bits_of
    from methods.search._bits import Bits

    database = problem.levels("bits")
    space = Bits.of(database, config.bits, config.group_rule)
    start = (config.initial_candidates, config.initial_tokens) if space.needs_start() else None
    found = problem.evolve(config, space, start=start)
    problem.stage.notes |= bits_of(database, found.levels)
    return found
