"""A linear way up, then a straight line down. Devlin et al., "BERT", appendix A.2.

With w warm-up steps of n, step s counted from 0:  (s + 1) / w  while s < w, then 1 - (1 - final) (s - w) / (n - w).
transformers starts at 0, which makes the first step an idle one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from methods.schedule import Warmup, warmup_of

USES = ("methods.schedule",)


@dataclass(frozen=True, kw_only=True)
class Config(Warmup):
    """Options of the linear schedule."""

    # share of the rate that the line ends at
    final: Annotated[float, Ge(0), Le(1)] = 0.0


def factor(config: Config, step: int, steps: int) -> float:
    """Factor of the learning rate at a 0-based step of ``steps``."""
    warmup = warmup_of(config, steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return 1 - (1 - config.final) * done
