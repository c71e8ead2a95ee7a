"""Distances that no matrix product gives, block by block: never a tensor of tokens x classes x width.

A block of n hidden states and v class vectors is as large as fits in the cache, so that what the memory of
a processor would limit runs at the speed of its arithmetic. Nothing but x, W and further parameters is kept
for the backward pass: it visits the same blocks and computes their differences again.

All functions take float32 or float64 tensors and are exact in either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

REVISION = 1
# Bytes of one [n,v,d] block: half of a core's second-level cache, so that two of them stay there; on a card
# enough to keep it busy.
CPU_BLOCK = 512 * 1024
CARD_BLOCK = 64 * 1024 * 1024

# distance(hidden [n,d], weight [v,d], *parameters) -> [n,v]
Distance = Callable[..., Tensor]
# pull(hidden [n,d], weight [v,d], gradient [n,v], *parameters) -> gradients of hidden, weight and parameters
Pull = Callable[..., "tuple[Tensor, ...]"]


def blocked(
    distance: Distance, hidden: Tensor, weight: Tensor, *parameters: Tensor, pull: Pull | None = None
) -> Tensor:
    """``distance(hidden [N,d], weight [V,d], *parameters)`` [N,V], computed and differentiated in blocks.

    ``pull`` is the block's derivative where a formula is faster than autograd on the block.
    """
    result: Tensor = _Blocked.apply(distance, pull, hidden, weight, *parameters)
    return result


class _Blocked(torch.autograd.Function):
    """The blocks of ``blocked`` as one step of the graph."""

    @staticmethod
    def forward(
        ctx: Any, distance: Distance, pull: Pull | None, hidden: Tensor, weight: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.distance, ctx.pull = distance, pull
        ctx.save_for_backward(hidden, weight, *parameters)
        result = hidden.new_empty(len(hidden), len(weight))
        for rows, columns in blocks(hidden, weight):
            result[rows, columns] = distance(hidden[rows], weight[columns], *parameters)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *parameters = ctx.saved_tensors
        sums = [torch.zeros_like(tensor) for tensor in (hidden, weight, *parameters)]
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, columns in blocks(hidden, weight):
                block = gradient[rows, columns].contiguous()
                inputs = (hidden[rows], weight[columns], *parameters)
                if ctx.pull is None:
                    parts = _by_autograd(ctx.distance, inputs, block)
                else:
                    parts = ctx.pull(*inputs[:2], block, *parameters)
                for total, part in zip((sums[0][rows], sums[1][columns], *sums[2:]), parts, strict=True):
                    total += part
        return None, None, *sums


def blocks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """The blocks of rows and classes, about as many of the one as of the other in each."""
    pairs = max(block_bytes(hidden) // (hidden.element_size() * max(hidden.shape[1], 1)), 1)
    height = min(2 ** ((pairs.bit_length() - 1) // 2), len(hidden)) or 1
    width = max(pairs // height, 1)
    for row in range(0, len(hidden), height):
        for column in range(0, len(weight), width):
            yield slice(row, row + height), slice(column, column + width)


def block_bytes(tensor: Tensor) -> int:
    """The size of a block where the tensor is."""
    return CPU_BLOCK if tensor.device.type == "cpu" else CARD_BLOCK


def _by_autograd(
    function: Callable[..., Tensor], inputs: Iterable[Tensor], gradient: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a block's inputs from that of its result, by autograd on the block alone."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(
            function(*leaves), leaves, gradient, allow_unused=True, materialize_grads=True
        )


# --- what follows on distances ----------------------------------------------------------------------------


def by_rows(function: Callable[..., Tensor], matrix: Tensor, *further: Tensor) -> Tensor:
    """``function(matrix [N,V], *further)`` [N,V], whose rows depend on the same rows alone.

    It is computed a few rows at a time and again in the backward pass, so that of all it is made of only
    ``matrix`` is kept: a logarithm of a clamped sum would otherwise hold three matrices of that size.

    Args:
        further: tensors [N,1], taken by rows too, or [V], taken whole.
    """
    result: Tensor = _ByRows.apply(function, matrix, *further)
    return result


class _ByRows(torch.autograd.Function):
    """The row slices of ``by_rows`` as one step of the graph."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], matrix: Tensor, *further: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(matrix, *further)
        result = torch.empty_like(matrix)
        for rows in row_slices(matrix):
            result[rows] = function(matrix[rows], *_rows_of(further, rows))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        matrix, *further = ctx.saved_tensors
        whole = torch.empty_like(matrix)
        sums = [torch.zeros_like(tensor) for tensor in further]
        with torch.autocast(matrix.device.type, enabled=False):
            for rows in row_slices(matrix):
                inputs = (matrix[rows], *_rows_of(further, rows))
                whole[rows], *parts = _by_autograd(ctx.function, inputs, gradient[rows])
                for total, part in zip(_rows_of(sums, rows), parts, strict=True):
                    total += part
        return None, whole, *sums


def _rows_of(tensors: Iterable[Tensor], rows: slice) -> tuple[Tensor, ...]:
    """The rows of those that have rows."""
    return tuple(tensor[rows] if tensor.ndim == 2 else tensor for tensor in tensors)


def row_slices(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows, as many at a time as make a block."""
    height = max(block_bytes(matrix) // (matrix.element_size() * max(matrix.shape[1], 1)), 1)
    return (slice(row, row + height) for row in range(0, len(matrix), height))


def differences(hidden: Tensor, weight: Tensor) -> Tensor:
    """``x_i - w_j`` [n,v,d] of one block."""
    return hidden[:, None] - weight


def spread(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [n,d] and [v,d] of a block from those of its differences [n,v,d]."""
    return gradient.sum(dim=1), -gradient.sum(dim=0)


def above(values: Tensor, limit: float) -> Tensor:
    """1 where a value is above the limit, else 0: to multiply by, in a quarter of the time that a mask takes."""
    return (values - limit).clamp_(min=0).sign_()


# --- the sum of absolute differences, which several distances are made of ---------------------------------


def manhattan(hidden: Tensor, weight: Tensor) -> Tensor:
    """``sum_k |x_ik - w_jk|`` [N,V]. Three times as fast as ``cdist`` on a processor; its derivative at 0 is 0."""
    return blocked(_sums, hidden, weight, pull=_pull_sums)


def _sums(hidden: Tensor, weight: Tensor) -> Tensor:
    return differences(hidden, weight).abs_().sum(dim=-1)


def _pull_sums(hidden: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return spread(differences(hidden, weight).sign_().mul_(gradient[..., None]))


# --- bits -------------------------------------------------------------------------------------------------


def bits(vectors: Tensor, threshold: float, temperature: float, share: float = 1.0) -> Tensor:
    """1 where an entry of ``vectors`` is above the threshold, else 0; straight-through.

    The gradient is ``share`` of that of ``sigmoid(vectors / temperature)``.
    """
    result: Tensor = _Bits.apply(vectors, threshold, temperature, share)
    return result


class _Bits(torch.autograd.Function):
    """``bits``, without the rounding errors of writing it as ``hard + soft - soft.detach()``."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, threshold: float, temperature: float, share: float) -> Tensor:
        ctx.save_for_backward(vectors)
        ctx.temperature, ctx.share = temperature, share
        return (vectors > threshold).to(vectors.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (vectors,) = ctx.saved_tensors
        smooth = (vectors / ctx.temperature).sigmoid_()
        slope = smooth.sub_(smooth.square()).mul_(ctx.share / ctx.temperature)
        return slope.mul_(gradient), None, None, None
