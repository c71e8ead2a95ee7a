"""Schedules: the learning rate over the steps, as a factor of the optimizer's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt

REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """The way up that every schedule may begin with: (s + 1) / w in step s of w."""

    # steps until the whole of the rate is reached
    warmup_steps: Annotated[int, Ge(0)] = 0
    # the same as a share of all steps, rounded up; the longer of the two counts
    warmup_share: Annotated[float, Ge(0), Lt(1)] = 0.0


def warmup_of(config: Warmup, steps: int) -> int:
    """How many of ``steps`` the warm-up takes."""
    return max(config.warmup_steps, math.ceil(config.warmup_share * steps))
