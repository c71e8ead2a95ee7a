"""The same learning rate throughout, after a linear way up. Goyal et al., "Accurate, Large Minibatch SGD", 2.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the constant schedule."""

    # steps from 1/warmup_steps of the rate to the whole of it
    warmup_steps: Annotated[int, Ge(0)] = 0


def factor(config: Config, step: int, steps: int) -> float:
    """Factor of the learning rate at a 0-based step of ``steps``."""
    return min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
