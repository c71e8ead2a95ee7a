"""Masks that pruners share: the smallest entries of rows, n:m patterns, and how a budget is given and spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

REVISION = 1


def smallest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` smallest entries of every row of [rows, columns]; of equal ones those further left."""
    import torch

    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def pattern_mask(scores: Tensor, pattern: str) -> Tensor:
    """The n smallest scores of every m consecutive inputs, for scores [out,in]."""
    removed, group = fitting_pattern(pattern, scores.shape[1])
    return smallest(scores.reshape(-1, group), removed).view_as(scores)


def fitting_pattern(pattern: str, columns: int) -> tuple[int, int]:
    """n and m of a pattern; a sentence where m does not divide the inputs."""
    removed, group = read_pattern(pattern)
    if columns % group:
        raise AssayError(
            f"pattern {pattern} does not fit a matrix with {columns} inputs: {group} must divide it."
        )
    return removed, group


def read_pattern(pattern: str) -> tuple[int, int]:
    """(2, 4) of "2:4"; a sentence for anything that is not n:m with 0 < n < m."""
    removed, _, group = pattern.partition(":")
    if not (removed.isdecimal() and group.isdecimal() and 0 < int(removed) < int(group)):
        raise AssayError(
            f'pattern {pattern!r} is not of the form "n:m" with n smaller than m, such as "2:4".'
        )
    return int(removed), int(group)


def check_budget(name: str, sparsity: float | None, pattern: str | None) -> None:
    """Raise an AssayError unless exactly one of the two is given and a pattern can be read."""
    if (sparsity is None) == (pattern is None):
        raise AssayError(f'{name} needs either sparsity=0.5 or pattern="2:4", and not both.')
    if pattern is not None:
        read_pattern(pattern)


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
