"""Squared distances as one matrix product, and their logarithms, with a hand-written gradient.

    q_ij = row_i + column_j + factor x_i.w_j        (Euclidean: |x|^2 + |w|^2 - 2 x.w; cosine: 1 - x.w)
    z_ij = f(q_ij)                                  (Euclidean: -n log(q + epsilon))

With A = dL/dz * f'(q):  d row = A 1,  d column = A^T 1,  dx = factor A w,  dw = factor A^T x.

Left to autograd, the chain q -> clamp -> add -> log -> multiply would hold five matrices [N,V] and read each from
memory. Here z alone is kept, from which f'(q) follows: -n / (q + epsilon) = -n exp(z / n). Forward and backward go
through it in blocks of tokens, in place or in one buffer. The product is not formed again in backward: that would
cost a third more than plain cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

REVISION = 1
# Numbers of a block: 32 MB in float32 on a processor, and on a card enough to keep it busy.
BLOCK = {"cpu": 1 << 23, "cuda": 1 << 27}
# A block is never shorter: products of a few rows are slow.
SHORTEST = 64


@dataclass(frozen=True)
class Curve:
    """``f``: minus ``power`` times the logarithm of ``q + inside``, or of its root plus ``outside``.

    Without ``logarithm`` it is ``q + inside`` itself, or its root. A negative q counts as 0. Where rounding made it
    negative (``definite``) the gradient is that of q nevertheless; where the form itself is not definite, it is 0.
    """

    inside: float
    power: float = 1.0
    root: bool = False
    outside: float = 0.0
    logarithm: bool = True
    definite: bool = True

    def value_(self, shifted: Tensor) -> Tensor:
        """f(q) from ``q + inside``, in place."""
        shifted.clamp_(min=self.inside or (torch.finfo(shifted.dtype).tiny if self.logarithm else 0.0))
        if self.root:
            shifted.sqrt_()
            if self.outside:
                shifted.add_(self.outside)
        return shifted.log_().mul_(-self.power) if self.logarithm else shifted

    def slope(self, z: Tensor, out: Tensor) -> Tensor:
        """f'(q) from z = f(q), into ``out``; 0 where the reciprocal of a distance is too large for a number."""
        if not (self.logarithm or self.root):
            out.fill_(1.0)
        elif not self.logarithm:
            out.copy_(z).clamp_(min=self._least(z)).reciprocal_().mul_(0.5)
        elif not self.root:
            torch.mul(z, 1 / self.power, out=out)
            out.exp_().mul_(-self.power)
        else:
            distance = torch.mul(z, -1 / self.power, out=out).exp_()
            reach = (distance - self.outside).clamp_(min=self._least(z))
            distance.mul_(reach).reciprocal_().mul_(-self.power / 2)
        return self._without_clamped_(out, z)

    def _least(self, z: Tensor) -> float:
        """The smallest root there is: guards the reciprocal against what is left of ``distance - outside``."""
        return max(self.inside, float(torch.finfo(z.dtype).tiny)) ** 0.5

    def _without_clamped_(self, slope: Tensor, z: Tensor) -> Tensor:
        """The slope with 0 where q was clamped, if its gradient ends there."""
        if self.definite and self.inside > 0:
            return slope
        edge = self.value_(z.new_full((), self.inside))
        return slope.masked_fill_(z == edge, 0.0)


class _Product(torch.autograd.Function):
    """``f(row + column + factor x w^T)`` [N,V]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, row: Tensor, column: Tensor, factor: float, curve: Curve
    ) -> Tensor:
        """Hidden states [N,d], class vectors [V,d], row [N], column [V]."""
        values = hidden.new_empty(len(hidden), len(weight))
        column = column + curve.inside
        with full_precision(hidden.device.type):
            for tokens in blocks(values):
                part = torch.addmm(column, hidden[tokens], weight.T, alpha=factor, out=values[tokens])
                curve.value_(part.add_(row[tokens, None]))
        ctx.save_for_backward(hidden, weight, values)
        ctx.factor, ctx.curve = factor, curve
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """dx [N,d], dw [V,d], d row [N], d column [V]."""
        hidden, weight, values = ctx.saved_tensors
        found = _Gradients(hidden, weight, ctx.needs_input_grad)
        buffer = None
        with full_precision(hidden.device.type):
            for tokens in blocks(values):
                if buffer is None or len(buffer) != tokens.stop - tokens.start:
                    buffer = torch.empty_like(values[tokens])
                part = ctx.curve.slope(values[tokens], buffer).mul_(gradient[tokens])
                found.add(part, tokens, ctx.factor)
        return found.hidden, found.weight, found.row, found.column, None, None


class _Gradients:
    """The sums that the blocks of tokens contribute to; None where no gradient is wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> None:
        self.inputs = (hidden, weight)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight) if wanted[1] else None
        self.row = hidden.new_empty(len(hidden)) if wanted[2] else None
        self.column = hidden.new_zeros(len(weight)) if wanted[3] else None

    def add(self, part: Tensor, tokens: slice, factor: float) -> None:
        """Take in dL/dq of a block of tokens [n,V]."""
        hidden, weight = self.inputs
        if self.hidden is not None:
            torch.mm(part, weight, out=self.hidden[tokens]).mul_(factor)
        if self.weight is not None:
            self.weight.addmm_(part.T, hidden[tokens], alpha=factor)
        if self.row is not None:
            torch.sum(part, 1, out=self.row[tokens])
        if self.column is not None:
            self.column += part.sum(0)


def blocks(matrix: Tensor) -> Iterator[slice]:
    """Blocks of the rows of [N,V], of some millions of numbers each."""
    rows, classes = matrix.shape
    height = max(BLOCK.get(matrix.device.type, BLOCK["cuda"]) // max(classes, 1), SHORTEST)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Products in float32 whatever the autocast, and on a card never in TF32.

    TF32 and bfloat16 keep 10 and 7 bits of a factor: n times that error is whole nats.
    """
    products = torch.backends.cuda.matmul
    rough = products.fp32_precision == "tf32"
    with torch.autocast(device, enabled=False):
        # Through the older of the two switches, which keeps the newer in step; mixing them is an error in torch.
        if rough:
            products.allow_tf32 = False
        try:
            yield
        finally:
            if rough:
                products.allow_tf32 = True


def product(
    hidden: Tensor, weight: Tensor, row: Tensor, column: Tensor, factor: float, curve: Curve
) -> Tensor:
    """``f(row + column + factor x w^T)`` [N,V] of hidden states [N,d], class vectors [V,d], row [N], column [V]."""
    result: Tensor = _Product.apply(hidden, weight, row, column, factor, curve)
    return result


def squared_euclidean(hidden: Tensor, weight: Tensor, curve: Curve) -> Tensor:
    """``f(|x - w|^2)`` [N,V].

    Both sides are first moved by the mean class vector. Distances do not notice, but the product cancels
    far less: with a common offset of 10 per coordinate float32 would lose 1 % of the distance.
    """
    hidden, weight = centred(hidden, weight)
    return product(hidden, weight, hidden.square().sum(dim=1), weight.square().sum(dim=1), -2.0, curve)


def centred(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both moved by the mean class vector, which is held fixed: no difference x - w notices."""
    centre = weight.detach().mean(dim=0)
    return hidden - centre, weight - centre
