"""Sums over blocks of places whose logits are computed again in the backward pass instead of being kept.

For terms that are no sum over tokens and cannot use the one pass of ``methods.term._blocks``. torch is imported at the
top: this module is only loaded by a running job. ``methods.term``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from methods.term._blocks import blocks
from methods.terms import widen

if TYPE_CHECKING:
    from methods.term import Look


def summed(compute: Callable[[slice], Tensor], look: Look, index: Tensor) -> Tensor:
    """The sum of ``compute(rows)`` over blocks of the places ``index`` [n] of a student's ``look``; 0 for none."""
    total = nothing(look)
    for block in blocks(look, len(index)):
        # No head draws random numbers, so none have to be drawn again.
        total = total + checkpoint(compute, block, use_reentrant=False, preserve_rng_state=False)
    return total


def nothing(look: Look) -> Tensor:
    """0, with a gradient of 0 for whatever the states have one for."""
    return widen(look.states[:0]).sum()
