"""How a budget is shared out: in proportion, within what each part can take, and in whole numbers that add up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from methods.stage import AssayError

REVISION = 1


def spread(total: int, sizes: Sequence[int], least: Sequence[int]) -> list[int]:
    """``total`` shared out over parts of these sizes in proportion, in whole numbers whose sum is ``total``.

    No part gets less than its ``least``; what the others then give up is again in proportion. What rounding down leaves
    goes to the parts with the largest remainders, of equal ones to the first. ``sum(least) <= total <= sum(sizes)``.
    """
    assert sum(least) <= total <= sum(sizes), (total, sizes, least)
    counts, parts = list(least), list(range(len(sizes)))
    # Each round but the last takes at least one part out.
    for _ in sizes:
        rest, size = total - sum(least) + sum(least[at] for at in parts), sum(sizes[at] for at in parts)
        inside = [at for at in parts if rest * sizes[at] >= least[at] * size]
        if len(inside) == len(parts):
            break
        parts = inside
    quotas = {at: divmod(rest * sizes[at], size) for at in parts}
    for at, (whole, _) in quotas.items():
        counts[at] = whole
    upwards = sorted(parts, key=lambda at: -quotas[at][1])
    for at in upwards[: total - sum(counts)]:
        counts[at] += 1
    return counts


def fill(weights: Sequence[float], caps: Sequence[float], total: float) -> list[float]:
    """Shares of ``total`` in proportion to ``weights``, none above its cap; what a cap cuts off goes to the others.

    Weights that are all 0 count as equal to the caps. ``total`` must not exceed the sum of the caps.
    """
    weights = list(weights) if sum(weights) > 0 else list(caps)
    shares = [0.0] * len(weights)
    left, mass = total, sum(weights)
    # Those that reach their caps first; of those that ask for nothing, the smallest.
    full = [cap / weight if weight > 0 else math.inf for cap, weight in zip(caps, weights, strict=True)]
    order = sorted(range(len(weights)), key=lambda at: (full[at], caps[at]))
    for place, at in enumerate(order):
        share = left * weights[at] / mass if mass > 0 else left / (len(order) - place)
        shares[at] = min(share, caps[at])
        left, mass = left - shares[at], mass - weights[at]
    return shares


def apportion(shares: Sequence[float], caps: Sequence[int], total: int) -> list[int]:
    """Whole numbers near ``shares`` that add up to ``total``, none above its cap, by largest remainders.

    Raises:
        AssayError: the caps allow less than the total.
    """
    if total > sum(caps):
        raise AssayError(f"{total} units are to be shared out where no more than {sum(caps)} have room.")
    counts = [min(int(share), cap) for share, cap in zip(shares, caps, strict=True)]
    order = sorted(range(len(shares)), key=lambda at: counts[at] - shares[at])
    while sum(counts) < total:
        for at in order:
            if counts[at] < caps[at] and sum(counts) < total:
                counts[at] += 1
    return counts
