"""Means with their item-level standard errors. ``N`` is items, always the rows of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from numpy import ndarray

REVISION = 1


class Estimate(NamedTuple):
    """A number, its standard error over items (None where there is only one item), and how many items."""

    value: float
    stderr: float | None
    n: int


def mean(values: Sequence[float] | ndarray) -> Estimate:
    """Mean of N values; standard error ``sd / sqrt(N)`` with the sample standard deviation."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    spread = float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else None
    return Estimate(float(array.mean()), spread, len(array))


def ratio(sums: Sequence[float] | ndarray, counts: Sequence[float] | ndarray) -> Estimate:
    """``sum(sums) / sum(counts)`` over N items, a mean over tokens; delta-method standard error over items."""
    import numpy as np

    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    value = float(sums.sum() / counts.sum())
    n = len(sums)
    residual = float(((sums - value * counts) ** 2).sum())
    return Estimate(value, (n / (n - 1) * residual) ** 0.5 / float(counts.sum()) if n > 1 else None, n)


def harmonic_mean(parts: Mapping[str, Sequence[Sequence[float] | ndarray]]) -> Estimate:
    """Harmonic mean of the means of all value lists; 0 as soon as one of them is 0.

    ``parts`` groups the lists by the set of items they were measured on: item i of one list is item i of every
    other list of its group (a shorter list covers the first items). The delta-method standard error adds up
    each item's influence over the lists of its group, so that their covariance is part of it.
    """
    import numpy as np

    lists = {
        group: [np.asarray(values, dtype=np.float64) for values in found] for group, found in parts.items()
    }
    means = [values.mean() for found in lists.values() for values in found]
    items = sum(max(len(values) for values in found) for found in lists.values())
    if min(means) <= 0.0:
        return Estimate(0.0, None, items)
    value = len(means) / sum(1.0 / mean for mean in means)
    variance = 0.0
    for found in lists.values():
        influence = np.zeros(max(len(values) for values in found))
        for values in found:
            slope = value**2 / (len(means) * values.mean() ** 2)
            influence[: len(values)] += slope * (values - values.mean()) / len(values)
        variance += float((influence**2).sum())
    return Estimate(float(value), variance**0.5, items)
