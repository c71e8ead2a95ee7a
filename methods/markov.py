"""Text without meaning and with a known entropy: a second-order Markov chain over 32 symbols.

The next symbol depends on the last two alone; for each of the 1,024 pairs the probabilities are drawn from a symmetric
Dirichlet distribution with parameter 0.08, so that a few symbols carry nearly all of them. A row is
``{"text": 39 symbols}``: with its line break it fills a window of 40 tokens where a byte is a token
(``context_tokens=40`` and a model of ``vocabulary: 259``). It starts with two symbols drawn evenly. ``train`` has 4,096
rows and ``valid`` 256 others; ``noisy`` is ``train`` with a fifth of its symbols drawn anew, evenly.

What makes it a test of recovery: a small model learns it in seconds, a few rows of it (``markov/train[0:128]``) are
soon learnt by heart, and the teacher's distribution says more of the chain than one sampled symbol does.

Everything follows from ``random.Random(text).random()``, which Python documents as stable across versions.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any

Row = dict[str, Any]

SPLITS = ("train", "valid", "noisy")
SYMBOLS = "abcdefghijklmnopqrstuvwxyz012345"
CONCENTRATION = 0.08
LENGTH = 39
COUNTS = {"train": 4096, "valid": 256}
NOISE = 0.2


def rows(split: str) -> list[Row]:
    """The rows of a split; fresh copies each time."""
    return [{"text": text} for text in _texts(split)]


@cache
def _texts(split: str) -> tuple[str, ...]:
    draw = random.Random(f"markov/{split}").random
    if split == "noisy":
        return tuple(_disturbed(text, draw) for text in _texts("train"))
    return tuple(_written(draw) for _ in range(COUNTS[split]))


def _written(draw: Callable[[], float]) -> str:
    """One row: two symbols drawn evenly, then as the chain goes on."""
    places = [int(draw() * len(SYMBOLS)) for _ in range(2)]
    while len(places) < LENGTH:
        places.append(bisect(_chain()[places[-2]][places[-1]], draw(), hi=len(SYMBOLS) - 1))
    return "".join(SYMBOLS[place] for place in places)


def _disturbed(text: str, draw: Callable[[], float]) -> str:
    return "".join(SYMBOLS[int(draw() * len(SYMBOLS))] if draw() < NOISE else symbol for symbol in text)


def entropy_nats() -> float:
    """The entropy of a symbol given the two before it, in nats: a mean over the 1,024 pairs, each counted once."""
    pairs = [cumulative for first in _chain() for cumulative in first]
    return sum(_entropy(cumulative) for cumulative in pairs) / len(pairs)


def _entropy(cumulative: tuple[float, ...]) -> float:
    shares = [b - a for a, b in zip((0.0, *cumulative), cumulative, strict=False)]
    return -sum(share * math.log(share) for share in shares if share > 0)


@cache
def _chain() -> tuple[tuple[tuple[float, ...], ...], ...]:
    """For the last symbol but one and the last one: the cumulative probabilities of the next."""
    draw = random.Random("markov/chain").random
    return tuple(tuple(_dirichlet(draw) for _ in SYMBOLS) for _ in SYMBOLS)


def _dirichlet(draw: Callable[[], float]) -> tuple[float, ...]:
    """Cumulative probabilities of one draw: normalised gamma variates. All of them 0 is beyond float64's reach."""
    variates = [_gamma(CONCENTRATION, draw) for _ in SYMBOLS]
    return tuple(accumulate(variate / sum(variates) for variate in variates))


def _gamma(shape: float, draw: Callable[[], float]) -> float:
    """A gamma variate of a shape below 1, by rejection (Ahrens and Dieter 1974, algorithm GS)."""
    bound = (math.e + shape) / math.e
    while True:  # at least 70 % of the draws are taken
        drawn, test = bound * draw(), draw()
        if drawn <= 1:
            variate = drawn ** (1 / shape)
            if test <= math.exp(-variate):
                return variate
        else:
            variate = -math.log((bound - drawn) / shape)
            if test <= variate ** (shape - 1):
                return variate
