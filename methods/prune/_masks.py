"""Masks that pruners share: the smallest entries of rows, n:m patterns, and how a budget is given."""

from __future__ import annotations

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
