"""Means over every position that predicts another one, padding included, as some official codes take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from methods.stage import Term

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Part

REVISION = 1


def over_positions(total: Tensor, part: Part, weight: float = 1.0) -> Term:
    """``total`` divided by B*(T-1), written as a sum over the part's B*T positions.

    Micro-batches have the padding of the whole batch, so T is the same in each.
    """
    width = part.labels.shape[1]
    return Term(total * (width / (width - 1)), part.positions, weight)
