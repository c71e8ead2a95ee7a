"""A linear way up, then a straight line down. Devlin et al., "BERT", appendix A.2.

With w warm-up steps of n, step s counted from 0:  (s + 1) / w  while s < w, then 1 - (1 - final) (s - w) / (n - w).
transformers starts at 0, which makes the first step an idle one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the linear schedule."""

    # steps from 1/warmup_steps of the rate to the whole of it
    warmup_steps: Annotated[int, Ge(0)] = 0
    # share of the rate that the line ends at
    final: Annotated[float, Ge(0), Le(1)] = 0.0


def factor(config: Config, step: int, steps: int) -> float:
    """Factor of the learning rate at a 0-based step of ``steps``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return 1 - (1 - config.final) * done
