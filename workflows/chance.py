"""Is a difference beyond chance? Student's t, by hand, so that the report needs neither scipy nor a table.

Everything here works on values keyed by seed; callers have already thrown away repeated results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

LEVEL = 0.95
PANELS = 400
TEST = (
    "two-sided t test at 95 %, paired by seed where both have the same seeds, Welch's otherwise; "
    "no correction for several columns"
)


@cache
def t_quantile(level: float, freedom: float) -> float:
    """The t with ``P(-t < T < t) = level`` for ``freedom`` >= 1 degrees of freedom.

    With ``t = sqrt(freedom) * tan(angle)`` the density becomes a power of a cosine on a finite range, which
    Simpson's rule integrates to about 1e-12; the angle is then found by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _mass(angle: float, freedom: float) -> float:
    """``P(|T| < sqrt(freedom) * tan(angle))``."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    step = angle / PANELS
    weights = [1.0] + [4.0 if index % 2 else 2.0 for index in range(1, PANELS)] + [1.0]
    heights = [max(math.cos(index * step), 0.0) ** (freedom - 1) for index in range(PANELS + 1)]
    return (
        2 * math.exp(log_scale) * step / 3 * math.fsum(w * h for w, h in zip(weights, heights, strict=True))
    )


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; nan for no values. Equal values give exactly that value."""
    if not values:
        return math.nan
    return values[0] if min(values) == max(values) else math.fsum(values) / len(values)


def sample_sd(values: Sequence[float]) -> float:
    """The sample standard deviation (n - 1); nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The t interval of the mean of paired differences; (nan, nan) for fewer than two."""
    count = len(differences)
    if count < 2:
        return math.nan, math.nan
    half = t_quantile(level, count - 1) * sample_sd(differences) / math.sqrt(count)
    return mean(differences) - half, mean(differences) + half


def beyond_chance(first: Mapping[str, float], second: Mapping[str, float], level: float = LEVEL) -> bool:
    """Whether two sets of values, keyed by seed, differ at the level. Fewer than two values never do."""
    if len(first) < 2 or len(second) < 2:
        return False
    if set(first) == set(second):
        low, high = interval([first[seed] - second[seed] for seed in first], level)
        return low > 0 or high < 0
    return _welch(list(first.values()), list(second.values()), level)


def _welch(first: Sequence[float], second: Sequence[float], level: float) -> bool:
    parts = [sample_sd(values) ** 2 / len(values) for values in (first, second)]
    distance = abs(mean(first) - mean(second))
    if sum(parts) == 0:
        return distance > 0
    spread = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return distance > t_quantile(level, sum(parts) ** 2 / spread) * math.sqrt(sum(parts))
