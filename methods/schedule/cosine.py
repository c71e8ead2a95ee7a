"""A linear way up, then half a cosine down. Loshchilov and Hutter, "SGDR", equation 5, without restarts.

With w warm-up steps of n, step s counted from 0:  (s + 1) / w  while s < w, then
final + (1 - final) (1 + cos(pi (s - w) / (n - w))) / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from methods.schedule import Warmup, warmup_of

USES = ("methods.schedule",)


@dataclass(frozen=True, kw_only=True)
class Config(Warmup):
    """Options of the cosine schedule."""

    # share of the rate that the curve ends at
    final: Annotated[float, Ge(0), Le(1)] = 0.0


def factor(config: Config, step: int, steps: int) -> float:
    """Factor of the learning rate at a 0-based step of ``steps``."""
    warmup = warmup_of(config, steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2
