"""Sums over blocks of places whose logits are computed again in the backward pass instead of being kept.

For terms that are no sum over tokens and cannot use the one pass of ``methods.term._blocks``. torch is imported at the
top: this module is only loaded by a running job. ``methods.term``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from methods.term import Look

# Logits in a block: 64 MiB of float32.
ENTRIES = 2**24


def summed(compute: Callable[[slice], Tensor], look: Look, index: Tensor) -> Tensor:
    """The sum of ``compute(rows)`` over blocks of the places ``index`` [n] of a student's ``look``; 0 for none."""
    rows = block_rows(look)
    total = nothing(look)
    for start in range(0, len(index), rows):
        block = slice(start, min(start + rows, len(index)))
        # No head draws random numbers, so none have to be drawn again.
        total = total + checkpoint(compute, block, use_reentrant=False, preserve_rng_state=False)
    return total


def nothing(look: Look) -> Tensor:
    """0, with a gradient of 0 for whatever the states have one for."""
    from methods.terms import widen

    return widen(look.states[:0]).sum()


def block_rows(look: Look) -> int:
    """How many places have ``ENTRIES`` logits together."""
    with torch.no_grad():
        vocabulary = look.at(torch.zeros(0, dtype=torch.int64, device=look.states.device)).shape[-1]
    return max(1, ENTRIES // vocabulary)
