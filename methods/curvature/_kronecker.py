"""The mathematics of Kronecker-factored curvature: pure functions on tensors, in the precision they are given.

For a layer with inputs a [in] (a 1 appended where it has a bias) and output gradients d [out], vec(W) row by row, one
block of the Gauss-Newton matrix of the model's own likelihood, and what stands in for it:

    G      =  E[ d d^T (x) a a^T ]
    K-FAC     S (x) A,   S = E[ d d^T ],   A = E[ a a^T ]                   (Martens and Grosse 2015)
    EK-FAC    (Q_S (x) Q_A) diag(L) (Q_S (x) Q_A)^T,   A = Q_A diag(a) Q_A^T,  S = Q_S diag(s) Q_S^T,
              L_ij = E[ (Q_S^T  g  Q_A)_ij ^ 2 ],  g the gradient of one draw (George et al. 2018)

L is the exact diagonal of G in that basis, so the trace of EK-FAC is that of G; that of K-FAC is not. Two ways to damp
with lambda give two different steps:

    eigenbasis   Q_S [ (Q_S^T g Q_A)_ij / (s_i a_j + lambda) ] Q_A^T        (L_ij for s_i a_j with EK-FAC)
    factored     (S + sqrt(lambda)/pi I)^-1  g  (A + sqrt(lambda) pi I)^-1,   pi^2 = (tr A / in) / (tr S / out)

``methods.curvature``'s REVISION covers this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from methods.progress import derive_seed

if TYPE_CHECKING:
    from torch import Generator, Tensor

Inverse = Literal["eigenbasis", "factored"]
LabelKind = Literal["sampled", "signs", "exact"]


# --- the expectation over the model's own labels ----------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """How the expectation over what the model predicts is taken; the labels of the data play no part.

    Every draw gives each token a gradient v of a negative log-likelihood by its logits, such that the sum over the
    draws of v v^T has the expectation diag(p) - p p^T, while v of two tokens are uncorrelated.

    * ``sampled``: v = p - onehot(y), y drawn from p.
    * ``signs``: v = sqrt(p) e - p (sqrt(p) . e) with random signs e: the same matrix with less noise. A memorised token
      draws another label than its own once in hundreds of times; here every entry of p takes part each time.
    * ``exact``: v = sqrt(p_c) (p - onehot(c)) for every vocabulary entry c, one token of each sequence at a time. It
      costs V times the longest answer in draws: for small vocabularies and short answers.
    """

    kind: LabelKind = "sampled"
    samples: int = 1
    seed: int = 0

    def draws(self, p: Tensor, counts: Sequence[int], numbers: Sequence[int]) -> Iterator[Tensor]:
        """Gradients [M,V] for the distributions p [M,V] of some sequences' tokens, laid one after the other.

        Args:
            counts: how many of the tokens belong to each sequence.
            numbers: a number for each sequence, of which its random numbers are made: they do not depend on which
                sequences share a batch.
        """
        if self.kind == "exact":
            yield from _every_label(p, counts)
            return
        draw = _sampled if self.kind == "sampled" else _signed
        for sample in range(self.samples):
            seeds = [derive_seed(self.seed, number, sample) for number in numbers]
            yield draw(p, counts, seeds) / math.sqrt(self.samples)


def _every_label(p: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """One token of each sequence and one vocabulary entry at a time."""
    import torch

    place = torch.cat([torch.arange(count) for count in counts]).to(p.device)
    for here in range(max(counts)):
        for label in range(p.shape[-1]):
            gradient = p.clone()
            gradient[:, label] -= 1.0
            yield gradient * (p[:, label].sqrt() * (place == here))[:, None]


def _sampled(p: Tensor, counts: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """p - onehot(y), y drawn by inverting the distribution function."""
    import torch

    pairs = zip(counts, seeds, strict=True)
    uniform = torch.cat(
        [torch.rand(count, 1, dtype=torch.float64, generator=_generator(seed)) for count, seed in pairs]
    )
    below = p.double().cumsum(-1)
    label = torch.searchsorted(below, uniform.to(p.device) * below[:, -1:], right=True)
    label = label.clamp(max=p.shape[-1] - 1)
    return p.scatter_add(-1, label, -torch.ones_like(p[:, :1]))


def _signed(p: Tensor, counts: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """sqrt(p) e - p (sqrt(p) . e), e = +-1."""
    import torch

    pairs = zip(counts, seeds, strict=True)
    bits = [
        torch.randint(2, (count, p.shape[-1]), dtype=torch.int8, generator=_generator(seed))
        for count, seed in pairs
    ]
    root = p.sqrt() * (2 * torch.cat(bits) - 1).to(p)
    return root - p * root.sum(-1, keepdim=True)


def _generator(seed: int) -> Generator:
    import torch

    return torch.Generator().manual_seed(seed)


# --- a layer's curvature ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """The eigenbases of a layer's two factors, and its curvature in them.

    ``inputs`` [in,in] and ``outputs`` [out,out] have the eigenvectors of A and S as columns, ``input_values`` [in] and
    ``output_values`` [out] their eigenvalues, ascending, none below 0. ``corrected`` [out,in] are EK-FAC's.
    """

    inputs: Tensor
    input_values: Tensor
    outputs: Tensor
    output_values: Tensor
    corrected: Tensor | None = None

    def values(self, corrected: bool) -> Tensor:
        """The eigenvalues [out,in] of EK-FAC or of K-FAC."""
        if corrected:
            assert self.corrected is not None
            return self.corrected
        return self.output_values[:, None] * self.input_values

    def project(self, matrix: Tensor) -> Tensor:
        """Q_S^T matrix Q_A for a matrix [out,in]."""
        return self.outputs.T @ matrix @ self.inputs

    def restore(self, matrix: Tensor) -> Tensor:
        """The inverse of ``project``."""
        return self.outputs @ matrix @ self.inputs.T


def basis_of(inputs: Tensor, outputs: Tensor) -> Basis:
    """The eigendecomposition of A [in,in] and S [out,out]."""
    import torch

    input_values, input_basis = torch.linalg.eigh(inputs)
    output_values, output_basis = torch.linalg.eigh(outputs)
    return Basis(input_basis, input_values.clamp(min=0), output_basis, output_values.clamp(min=0))


def second_moments(gradients: Tensor, activations: Tensor, basis: Basis) -> Tensor:
    """EK-FAC's sum [out,in] over sequences: each one's gradient, projected and squared.

    Args:
        gradients: of the layer's outputs [B,T,out]. ``activations``: its inputs [B,T,in].
    """
    projected = (gradients @ basis.outputs).transpose(1, 2) @ (activations @ basis.inputs)
    return projected.square().sum(0)


def damping_of(values: Tensor, relative: float, floor: float) -> float:
    """lambda = max(floor, relative * mean eigenvalue)."""
    return max(floor, relative * float(values.mean()))


def precondition(
    gradient: Tensor, basis: Basis, damping: float, corrected: bool = False, inverse: Inverse = "eigenbasis"
) -> Tensor:
    """The damped inverse curvature times a gradient [out,in]."""
    if inverse == "eigenbasis":
        return basis.restore(basis.project(gradient) / (basis.values(corrected) + damping))
    inputs, outputs = basis.input_values, basis.output_values
    means = float(inputs.mean()), float(outputs.mean())
    balance = math.sqrt(means[0] / means[1]) if all(means) else 1.0
    share = math.sqrt(damping)
    denominator = (outputs[:, None] + share / balance) * (inputs + share * balance)
    return basis.restore(basis.project(gradient) / denominator)


# --- the trust region -----------------------------------------------------------------------------------------------


def kl_slopes(logits: Tensor, tangents: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of KL(start || model) along a direction, summed over tokens.

    With p and p0 the softmax of ``logits`` and ``start`` [M,V] and t the ``tangents``, the derivatives of the logits:
    (p - p0) . t, and the variance of t under p, which is d^T G d of the Gauss-Newton matrix itself: no Kronecker
    approximation, all layers together. For logits linear in the weights both are exact.
    """
    p = logits.softmax(-1)
    mean = (p * tangents).sum(-1, keepdim=True)
    slope = ((p - start.softmax(-1)) * tangents).sum()
    return slope, (p * (tangents - mean).square()).sum()


def largest_step(room: float, slope: float, curvature: float) -> float:
    """The largest x with slope * x + curvature * x^2 / 2 <= room; infinite where nothing rises."""
    room = max(room, 0.0)
    if curvature <= 0:
        return room / slope if slope > 0 else math.inf
    root = math.sqrt(slope * slope + 2 * curvature * room)
    # Of the two forms of the solution the one without cancellation.
    return 2 * room / (slope + root) if slope > 0 else (root - slope) / curvature
