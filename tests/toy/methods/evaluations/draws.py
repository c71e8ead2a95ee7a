"""A number from each of the global generators, which a score gets alone and in a batch alike. For tests."""

from __future__ import annotations

import random
from dataclasses import dataclass

from methods.stage import Row, Scoring

USES: tuple[str, ...] = ()
SEEDED = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""

    # only makes another score of it
    number: int = 0


def evaluate(scoring: Scoring) -> list[Row]:
    """One row for each generator."""
    import numpy
    import torch

    return [
        Row("global", "python", random.random()),
        Row("global", "numpy", float(numpy.random.rand())),  # noqa: NPY002 — that is the generator in question
        Row("global", "torch", float(torch.rand(()))),
    ]
