"""Spectra of matrices of vectors: how many directions N vectors [N,d] fill, under each of the published definitions.

All in float64, and from singular values rather than from the covariance, which squares the condition number. ``ratios``
are the shares e_i = s_i^2 / sum s^2 of the variance that the principal components explain, largest first; they are
empty where all vectors are the same. No function returns NaN: what is not defined is None.

Sources: Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers"
(``vision/utils/pca_analysis.py``, ``llms/analysis/extract_checkpoint_metrics.py``); Roy and Vetterli 2007, "The
Effective Rank"; Garrido et al. 2023, "RankMe"; Agrawal et al. 2022, "alpha-ReQ"; Li et al. 2025, "Tracing the
Representation Geometry of Language Models"; Li et al. 2024, "Large Language Model Evaluation via Matrix Nuclear-Norm".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy import ndarray

REVISION = 1

# Rows that are taken to float64 at once.
BLOCK = 8192
# Of the largest, below which a singular value is what rounding left of 0.
ROUNDING = 1e-10
# Below it the published effective rank of singular values takes them for 0.
SMALLEST = 1e-10
# A line through fewer points says nothing of how well it fits.
FEWEST_RANKS = 3


# --- singular values -------------------------------------------------------------------------------------------


def singular_values(matrix: ndarray, shift: ndarray | None = None, scale: ndarray | None = None) -> ndarray:
    """Singular values [min(N,d)] of ``(matrix - shift) / scale``, largest first; ``shift`` and ``scale`` are [d].

    The longer side is taken in blocks whose triangular factors are stacked, so that a whole vocabulary is never held
    in float64.
    """
    import numpy

    width = min(matrix.shape)
    triangle: Any = numpy.zeros((0, width))
    for block in _blocks(matrix, shift, scale):
        triangle = numpy.linalg.qr(numpy.concatenate([triangle, block]), mode="r")
    values = numpy.linalg.svd(triangle, compute_uv=False)
    return numpy.concatenate([values, numpy.zeros(width - len(values))])


def _blocks(matrix: ndarray, shift: ndarray | None, scale: ndarray | None) -> Iterator[ndarray]:
    """The matrix, or where it is wide its transpose, in float64 and moved, in blocks of rows."""
    import numpy

    tall = matrix.shape[0] >= matrix.shape[1]
    step = max(BLOCK, min(matrix.shape))
    for start in range(0, max(matrix.shape), step):
        chosen = slice(start, start + step)
        block = (matrix[chosen] if tall else matrix[:, chosen]).astype(numpy.float64)
        columns = slice(None) if tall else chosen
        if shift is not None:
            block = block - shift[columns]
        if scale is not None:
            block = block / scale[columns]
        yield block if tall else block.T


def ratios(matrix: ndarray, components: int | None = None, standardised: bool = False) -> ndarray:
    """Shares of the variance [K] that the first K = min(components, N, d) principal components explain.

    ``standardised`` divides each coordinate by its standard deviation first, a constant one by 1.
    """
    import numpy

    mean = matrix.mean(axis=0, dtype=numpy.float64)
    scale = _deviations(matrix) if standardised else None
    if scale is not None:
        scale = numpy.where(scale > 0, scale, 1.0)
    squares = singular_values(matrix, mean, scale) ** 2
    if squares.sum() <= _negligible(matrix, scale):
        return numpy.zeros(0)
    return (squares / squares.sum())[:components]


def _deviations(matrix: ndarray) -> ndarray:
    """Standard deviation of each coordinate [d]; exactly 0 where all its values are the same."""
    import numpy

    constant = (matrix == matrix[:1]).all(axis=0)
    return numpy.where(constant, 0.0, matrix.std(axis=0, dtype=numpy.float64))


def _negligible(matrix: ndarray, scale: ndarray | None) -> float:
    """The sum of squares that rounding alone may leave of equal vectors."""
    import numpy

    moved = matrix.astype(numpy.float64) if scale is None else matrix / scale
    return float((moved**2).sum()) * (8 * numpy.finfo(numpy.float64).eps) ** 2


def plane(vectors: ndarray) -> ndarray:
    """The vectors' coordinates [N,2] in their first two principal components; a component that is missing gives 0.

    Each component points to where the vector lies that reaches farthest along it, of equal ones the first: its sign is
    free otherwise.
    """
    import numpy

    moved = vectors.astype(numpy.float64) - vectors.mean(axis=0, dtype=numpy.float64)
    left, values, _ = numpy.linalg.svd(moved, full_matrices=False)
    found = numpy.zeros((len(vectors), 2))
    for place in range(min(2, len(values))):
        along = left[:, place] * values[place]
        far = numpy.abs(along) >= (1.0 - ROUNDING) * numpy.abs(along).max()
        found[:, place] = along * (-1.0 if along[far.argmax()] < 0 else 1.0)
    return found


# --- how many directions ---------------------------------------------------------------------------------------


def components_for(shares: ndarray, part: float) -> int:
    """The fewest components that explain ``part`` of the variance; all of them where they explain less."""
    import numpy

    enough = numpy.flatnonzero(numpy.cumsum(shares) >= part)
    return int(enough[0]) + 1 if len(enough) else len(shares)


def effective_rank_ratios(shares: ndarray) -> float:
    """exp of the entropy of the ratios, to which 1e-12 is added before they are normalised (the image models')."""
    import numpy

    p = shares + 1e-12
    p = p / p.sum()
    return float(numpy.exp(-(p * numpy.log(p)).sum()))


def effective_rank_singular(values: ndarray) -> float:
    """exp of the entropy of the singular values themselves, not squared (the language models'); 0 of a zero matrix."""
    import numpy

    values = values[values > SMALLEST]
    if len(values) == 0:
        return 0.0
    p = values / values.sum()
    return float(numpy.exp(-(p * numpy.log(p + 1e-10)).sum()))


def participation_ratio(shares: ndarray) -> float:
    """1 / sum e_i^2 over the components that are looked at."""
    return float(1.0 / (shares**2).sum())


def rankme_eigen(shares: ndarray) -> float:
    """exp(-sum p ln p), p = e_i + 1e-7, over all ratios: of the squared values of the *centred* vectors (Li et al.)."""
    return _rankme(shares)


def rankme_singular(values: ndarray) -> float | None:
    """The same of p = s_i / sum s + 1e-7, singular values of the vectors *as they are* (Garrido et al.)."""
    total = float(values.sum())
    return _rankme(values / total) if total > 0 else None


def _rankme(shares: ndarray) -> float:
    import numpy

    p = shares + 1e-7
    return float(numpy.exp(-(p * numpy.log(p)).sum()))


class PowerLaw(NamedTuple):
    """The exponent alpha of e_i ~ i^-alpha and the share of the variance of ln e_i that the line explains."""

    alpha: float
    fit: float


def alpha_req(shares: ndarray, first: int, end: int) -> PowerLaw | None:
    """Least squares of ln e_i on -ln i with weights 1/i over the ranks i = first + 1 .. end.

    None for too few ranks, and where one of them is nothing but rounding.
    """
    import numpy

    there = int((shares > ROUNDING * shares[:1].sum()).sum())
    if end - first < FEWEST_RANKS or end > there:
        return None
    rank = numpy.arange(first + 1, end + 1)
    x, y, weight = -numpy.log(rank), numpy.log(shares[first:end]), 1.0 / rank
    middle = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    slope = (weight * (x - middle[0]) * (y - middle[1])).sum() / (weight * (x - middle[0]) ** 2).sum()
    left = y - middle[1] - slope * (x - middle[0])
    spread = ((y - y.mean()) ** 2).sum()
    return PowerLaw(float(slope), float(1.0 - (left**2).sum() / spread) if spread > 0 else 1.0)


def fitted_ranks(points: int, width: int) -> tuple[int, int]:
    """Which ranks alpha is fitted over: from max(3, d/16) + 1 to half of min(d, N - 1).

    The official ranks 12 to 100 do not exist in small models.
    """
    return max(3, width // 16), min(width, points - 1) // 2


# --- of the states of one text ---------------------------------------------------------------------------------


def normalised_states(states: ndarray) -> ndarray | None:
    """States [L,d] less their mean over the tokens, each of length 1; None where one is nothing but the mean."""
    import numpy

    moved = states.astype(numpy.float64) - states.mean(axis=0, dtype=numpy.float64)
    lengths = numpy.linalg.norm(moved, axis=1, keepdims=True)
    if float(lengths.min()) <= ROUNDING * float(numpy.abs(states).max()):
        return None
    return moved / lengths


def matrix_nuclear_norm(states: ndarray) -> float | None:
    """The sum of the min(L,d) largest column norms of the normalised states, divided by L."""
    import numpy

    unit = normalised_states(states)
    if unit is None:
        return None
    columns = numpy.sort(numpy.linalg.norm(unit, axis=0))[::-1]
    return float(columns[: min(unit.shape)].sum() / len(unit))


def matrix_entropy(states: ndarray) -> float | None:
    """-sum s ln s / ln d, s the eigenvalues of X^T X / L of the normalised states; None in one dimension."""
    import numpy

    unit = normalised_states(states)
    if unit is None or unit.shape[1] < 2:
        return None
    shares = singular_values(unit) ** 2 / len(unit)
    shares = shares[shares > 0]
    return float(-(shares * numpy.log(shares)).sum() / math.log(unit.shape[1]))
