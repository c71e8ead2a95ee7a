"""Squared distances as one matrix product, and their logarithms, with a hand-written gradient.

    q_ij = (x_i - w_j)^T P (x_i - w_j)        z_ij = f(q_ij)        P the identity, a diagonal or symmetric
    q_ij = c + k x_i.w_j                                            such as 1 - cos of unit vectors

With A = dL/dz * f'(q), r = A 1 and s = A^T 1, P symmetric:

    dx = 2 (r x - A w) P        dw = 2 (s w - A^T x) P        dP = x^T r x + w^T s w - x^T A w - (x^T A w)^T

Left to autograd, the chain q -> clamp -> add -> log -> multiply would hold five matrices [N,V] and read each from
memory. Here z alone is kept, from which f'(q) follows: -n / (q + epsilon) = -n exp(z / n). Forward and backward go
through it in blocks of tokens, in place or in one buffer. The product is not formed again in backward: that would
cost a third more than plain cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

REVISION = 1
# exp(z) is 2^(z log2 e), in less than half the time.
LOG2_E = math.log2(math.e)
# Norm below which a vector counts as having no direction; as in the official stable cosine layer.
SMALLEST_NORM = 1e-12
# Numbers of a block of tokens: 32 MB in float32 on a processor, where products of few rows are slow, and on a card
# enough to keep it busy. On a processor a curve goes through it in chunks that stay in a core's own cache.
BLOCK = {"cpu": 1 << 23, "cuda": 1 << 27}
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 27}


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

    @property
    def scale(self) -> float:
        """The constant factor of f', which ``pull`` leaves out."""
        if not self.logarithm:
            return 0.5 if self.root else 1.0
        return -self.power / 2 if self.root else -self.power

    def pull(self, z: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
        """``gradient f'(q) / scale`` from z = f(q), into ``out``; 0 where a distance has no reciprocal."""
        if not (self.logarithm or self.root):
            out.copy_(gradient)
        elif self.logarithm and not self.root:
            torch.mul(z, LOG2_E / self.power, out=out).exp2_().mul_(gradient)
        else:
            torch.div(gradient, self._steepness(z, out), out=out)
        if self.definite and self.inside > 0:
            return out
        # Where q was clamped, z is exactly this.
        return out.masked_fill_(z == self.value_(z.new_full((), self.inside)), 0.0)

    def _steepness(self, z: Tensor, out: Tensor) -> Tensor:
        """For the root D = sqrt(q + inside): D, or under a logarithm D (D + outside)."""
        if not self.logarithm:
            out.copy_(z)
        else:
            torch.mul(z, -LOG2_E / self.power, out=out).exp2_()
            if self.outside:
                # D (D + o) = (u - o / 2)^2 - o^2 / 4 of u = D + o, which is at hand.
                return out.sub_(self.outside / 2).square_().sub_(self.outside**2 / 4)
            out.square_()
        return out if self.inside > 0 else out.clamp_(min=torch.finfo(z.dtype).tiny ** 0.5)


class _Product(torch.autograd.Function):
    """``f(constant + factor x w^T)`` [N,V]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, constant: float, factor: float, curve: Curve
    ) -> Tensor:
        """Hidden states [N,d] and class vectors [V,d]."""
        column = weight.new_full((len(weight),), constant)
        values = _curved(hidden, weight, None, column, factor, curve)
        ctx.save_for_backward(hidden, weight, values)
        ctx.factor, ctx.curve = factor, curve
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """dx [N,d] and dw [V,d]."""
        hidden, weight, values = ctx.saved_tensors
        factor = ctx.factor * ctx.curve.scale
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = _filled_later(weight, len(hidden)) if ctx.needs_input_grad[1] else None
        with full_precision(hidden.device.type):
            for tokens, part in _pulls(values, gradient, ctx.curve):
                if d_hidden is not None:
                    torch.mm(part, weight, out=d_hidden[tokens]).mul_(factor)
                if d_weight is not None:
                    d_weight.addmm_(part.T, hidden[tokens], alpha=factor, beta=float(tokens.start > 0))
        return d_hidden, d_weight, None, None, None


class _Quadratic(torch.autograd.Function):
    """``f((x - w)^T P (x - w))`` [N,V]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, matrix: Tensor | None, curve: Curve) -> Tensor:
        """Hidden states [N,d], class vectors [V,d]; P [d,d], its diagonal [d], or None for the identity."""
        with full_precision(hidden.device.type):
            (moved, row), (images, column) = _images(hidden, matrix), _images(weight, matrix)
        values = _curved(moved, weight, row, column, -2.0, curve)
        ctx.save_for_backward(hidden, weight, values, *(() if matrix is None else (matrix, moved, images)))
        ctx.curve = curve
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """dx [N,d], dw [V,d] and dP."""
        hidden, weight, values, *kept = ctx.saved_tensors
        matrix, moved, images = kept or (None, hidden, weight)
        sums = _Sums(hidden, weight, ctx.curve.scale, ctx.needs_input_grad[1])
        with full_precision(hidden.device.type):
            for tokens, part in _pulls(values, gradient, ctx.curve):
                sums.add(part, tokens, weight, moved[tokens])
            sums.finish()
            d_hidden = (sums.rows[:, None] * moved).sub_(_times(sums.pulls, matrix)).mul_(2)
            d_matrix = None
            if matrix is not None and ctx.needs_input_grad[2]:
                d_matrix = _mixed(hidden, sums.rows, sums.pulls, matrix)
            for some in blocks(weight, CHUNK):
                if sums.weight is not None:
                    sums.weight[some].addcmul_(images[some], sums.columns[some, None], value=2)
                if d_matrix is not None:
                    _add_squares_(d_matrix, weight[some], sums.columns[some])
        return d_hidden, sums.weight, d_matrix, None


class _Sums:
    """``A 1`` [N], ``A^T 1`` [V], ``A w`` [N,d] and, where wanted, ``-2 A^T x P`` [V,d]."""

    def __init__(self, hidden: Tensor, weight: Tensor, scale: float, wanted: bool) -> None:
        self.scale = scale
        self.rows, self.columns = hidden.new_empty(len(hidden)), hidden.new_zeros(len(weight))
        self.pulls = torch.empty_like(hidden)
        self.weight = _filled_later(weight, len(hidden)) if wanted else None

    def add(self, part: Tensor, tokens: slice, weight: Tensor, moved: Tensor) -> None:
        """Take in the rows A / scale [n,V] of some tokens, whose ``x P`` are ``moved`` [n,d]."""
        torch.mm(part, weight, out=self.pulls[tokens])
        torch.sum(part, 1, out=self.rows[tokens])
        self.columns += part.sum(0)
        if self.weight is not None:
            self.weight.addmm_(part.T, moved, alpha=-2 * self.scale, beta=float(tokens.start > 0))

    def finish(self) -> None:
        """Multiply what does not hold the scale yet."""
        for found in (self.rows, self.columns, self.pulls):
            found.mul_(self.scale)


def _filled_later(like: Tensor, rows: int) -> Tensor:
    """Memory that the first block writes and the others add to; zeros where there is no block."""
    return torch.empty_like(like) if rows else torch.zeros_like(like)


def _images(vectors: Tensor, matrix: Tensor | None) -> tuple[Tensor, Tensor]:
    """``v P`` [M,d] and ``v^T P v`` [M] of every vector."""
    if matrix is None:
        # Not a norm squared: the lengths of bits (head hamming) are whole numbers and have to stay so.
        return vectors, torch.bmm(vectors[:, None], vectors[:, :, None]).flatten()
    images, forms = torch.empty_like(vectors), vectors.new_empty(len(vectors))
    for some in blocks(vectors, CHUNK):
        (torch.mul if matrix.dim() == 1 else torch.mm)(vectors[some], matrix, out=images[some])
        torch.sum(images[some] * vectors[some], 1, out=forms[some])
    return images, forms


def _times(vectors: Tensor, matrix: Tensor | None) -> Tensor:
    """``v P`` [M,d]."""
    if matrix is None:
        return vectors
    return vectors * matrix if matrix.dim() == 1 else vectors @ matrix


def _mixed(hidden: Tensor, rows: Tensor, pulls: Tensor, matrix: Tensor) -> Tensor:
    """``x^T r x - x^T p - p^T x`` [d,d] with p = A w, or its diagonal [d]: dP but for what the class vectors add."""
    if matrix.dim() == 1:
        return rows @ hidden.square() - 2 * (hidden * pulls).sum(dim=0)
    half = hidden.T @ (rows[:, None] * hidden / 2 - pulls)
    return half + half.T


def _add_squares_(d_matrix: Tensor, vectors: Tensor, factors: Tensor) -> None:
    """Add ``v^T s v`` of the vectors [m,d] and their factors s [m] to [d,d], or to its diagonal [d]."""
    scaled = vectors * factors[:, None]
    if d_matrix.dim() == 2:
        d_matrix.addmm_(vectors.T, scaled)
    else:
        d_matrix += (vectors * scaled).sum(dim=0)


def _curved(
    left: Tensor, right: Tensor, row: Tensor | None, column: Tensor, factor: float, curve: Curve
) -> Tensor:
    """``f(row + column + factor left right^T)`` [N,V]."""
    values = left.new_empty(len(left), len(right))
    column = column + curve.inside
    with full_precision(left.device.type):
        for tokens in blocks(values):
            part = torch.addmm(column, left[tokens], right.T, alpha=factor, out=values[tokens])
            for few in blocks(part, CHUNK):
                curve.value_(part[few] if row is None else part[few].add_(row[tokens][few, None]))
    return values


def _pulls(values: Tensor, gradient: Tensor, curve: Curve) -> Iterator[tuple[slice, Tensor]]:
    """A but for the curve's scale [n,V], by blocks of tokens, in a buffer that the next block overwrites."""
    buffer = values.new_empty(0, values.shape[1])
    for tokens in blocks(values):
        if len(buffer) != tokens.stop - tokens.start:
            buffer = torch.empty_like(values[tokens])
        for few in blocks(buffer, CHUNK):
            curve.pull(values[tokens][few], gradient[tokens][few], buffer[few])
        yield tokens, buffer


def blocks(matrix: Tensor, sizes: Mapping[str, int] = BLOCK) -> Iterator[slice]:
    """Blocks of the rows of [N,V], of about so many numbers each."""
    rows, classes = matrix.shape
    height = max(sizes[matrix.device.type if matrix.device.type in sizes else "cuda"] // max(classes, 1), 1)
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


def product(hidden: Tensor, weight: Tensor, constant: float, factor: float, curve: Curve) -> Tensor:
    """``f(constant + factor x w^T)`` [N,V] of hidden states [N,d] and class vectors [V,d]."""
    result: Tensor = _Product.apply(hidden, weight, constant, factor, curve)
    return result


def quadratic(
    hidden: Tensor, weight: Tensor, curve: Curve, matrix: Tensor | None = None, *, move: bool = True
) -> Tensor:
    """``f((x - w)^T P (x - w))`` [N,V]; P symmetric [d,d], its diagonal [d], or None for the identity.

    Both sides are first moved by the mean class vector. Distances do not notice, but the product cancels
    far less: with a common offset of 10 per coordinate float32 would lose 1 % of the distance. Without ``move``
    entries of 0 and 1 have distances without any rounding.
    """
    if move:
        centre = weight.detach().mean(dim=0)
        hidden, weight = hidden - centre, weight - centre
    result: Tensor = _Quadratic.apply(hidden, weight, matrix, curve)
    return result


def directions(vectors: Tensor) -> Tensor:
    """Vectors [M,d] of length 1, or shorter where they have next to none."""
    result: Tensor = _Directions.apply(vectors)
    return result


class _Directions(torch.autograd.Function):
    """``v / max(|v|, 1e-12)``, with a gradient of two passes over the vectors where autograd makes seven."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        """Vectors [M,d]."""
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        ctx.none = lengths <= SMALLEST_NORM
        units = vectors / lengths.clamp_(min=SMALLEST_NORM)
        ctx.save_for_backward(units, lengths)
        return units

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """What of the gradient is across the vector, over its length."""
        units, lengths = ctx.saved_tensors
        along = (gradient * units).sum(dim=1, keepdim=True).masked_fill_(ctx.none, 0.0)
        return torch.addcmul(gradient, units, along, value=-1).div_(lengths)
