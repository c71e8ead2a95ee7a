"""Clusters of rows in the space of their embeddings: a diffusion map and spectral clustering, for ``data.paser``.

With d the n**2 distances between the n points and s their median (that of a point from itself counted, as in PASER's
code),

    A = exp(- d**2 / (2 s**2)),     S = D**-1/2 A D**-1/2,     D = diag(row sums of A)

S has the eigenvalues of the random walk D**-1 A on the points. The walk's leading eigenvectors, each times its
eigenvalue, are the diffusion map (Coifman, Lafon 2006, "Diffusion maps"): coordinates in which points are close that
many short paths join. Up to ``DENSE_ROWS`` points all distances count, n**2 of them; of more, each point keeps its
``NEIGHBOURS`` nearest. Nothing is drawn: equal points give equal clusters. numpy is imported at the top: this module is
only loaded by a running job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from methods.stage import AssayError

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

    Numbers = NDArray[float64]

REVISION = 2
# Above so many rows, the 134 MB of their distances in float64, neighbours alone are joined.
DENSE_ROWS = 4096
NEIGHBOURS = 32
# Nobody says how many capabilities there are: the largest number that a gap in the spectrum is looked for at.
MOST_CLUSTERS = 12
# Below so many rows all eigenvectors are computed, which is exact and takes a second.
FEW_ROWS = 512
LANCZOS_VECTORS, TOLERANCE = 48, 1e-8


def capabilities(points: Numbers, clusters: int | None, by: str = "k_means") -> list[int]:
    """The cluster of each point [n,H]: 0 for the first one's, 1 for the next that is found, ...

    Args:
        clusters: how many; None: as many as the largest gap in the spectrum says, 2 to ``MOST_CLUSTERS``.
        by: ``k_means`` on the diffusion map, or ``nmf``, as PASER has it.

    Raises:
        AssayError: more clusters than points, or too many points for ``nmf``.
    """
    count = len(points)
    if clusters is not None and clusters > count:
        raise AssayError(f"data.paser: clusters={clusters}, but there are only {count} rows to divide.")
    if by == "nmf" and count > DENSE_ROWS:
        raise AssayError(
            f"data.paser: clustering=nmf takes all similarities of {count} rows, and at most {DENSE_ROWS} are allowed: "
            "use clustering=k_means, or fewer rows (data.sample)."
        )
    if clusters == 1 or count < 3 or not numpy.ptp(points, axis=0).any():
        return [0] * count
    # Only distances count, and they lose the least where the numbers are small.
    values, vectors, weights = spectrum(points - points.mean(axis=0), (clusters or MOST_CLUSTERS) + 1)
    wanted = clusters or gap(values)
    if by == "nmf":
        return _numbered(_factors(vectors[:, :wanted], wanted))
    return _numbered(_means(values[:wanted] * vectors[:, :wanted] / weights[:, None], wanted))


def gap(values: Sequence[float] | Numbers) -> int:
    """How many of the falling eigenvalues stand above the largest gap between two; 2 at least."""
    spectrum = list(values)
    if len(spectrum) < 4:
        return min(2, len(spectrum))
    steps = [spectrum[place] - spectrum[place + 1] for place in range(1, len(spectrum) - 1)]
    return 2 + steps.index(max(steps))


def spectrum(points: Numbers, count: int) -> tuple[Numbers, Numbers, Numbers]:
    """The ``count`` largest eigenvalues of S, falling, their vectors [n,count], and the roots of D's entries [n]."""
    affinity = joined(points) if len(points) > DENSE_ROWS else kernel(points)
    weights = numpy.sqrt(numpy.asarray(affinity.sum(axis=1)).ravel())
    if len(points) > DENSE_ROWS:
        from scipy.sparse import diags

        whitened = diags(1 / weights) @ affinity @ diags(1 / weights)
    else:
        whitened = affinity / weights[:, None] / weights[None, :]
    values, vectors = _leading(whitened, min(count, len(points)))
    return values, vectors, weights


def kernel(points: Numbers) -> Numbers:
    """A [n,n] of all distances; the width is their median, or their mean where half of them are 0."""
    squares = (points**2).sum(axis=1)
    distances = numpy.maximum(squares[:, None] + squares[None, :] - 2 * points @ points.T, 0.0)
    numpy.fill_diagonal(distances, 0.0)
    apart = numpy.sqrt(distances)
    width = float(numpy.median(apart)) or float(apart.mean())
    found: Numbers = numpy.exp(distances / (-2 * width**2))
    return found


def joined(points: Numbers) -> Any:
    """A as a sparse matrix: a point is joined to its nearest neighbours and to those whose neighbour it is."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(points) - 1), algorithm="brute").fit(points)
    graph = nearest.kneighbors_graph(mode="distance").tocsr()
    width = float(numpy.median(graph.data)) or float(graph.data.mean()) or 1.0
    graph.data = numpy.exp(graph.data**2 / (-2 * width**2))
    from scipy.sparse import identity

    return (graph.maximum(graph.T) + identity(len(points))).tocsr()


def _leading(matrix: Any, count: int) -> tuple[Numbers, Numbers]:
    """The largest eigenvalues of a symmetric matrix, falling, and their vectors."""
    if matrix.shape[0] <= max(FEW_ROWS, 2 * LANCZOS_VECTORS):
        dense = matrix if isinstance(matrix, numpy.ndarray) else matrix.toarray()
        values, vectors = numpy.linalg.eigh(dense)
    else:
        from scipy.sparse.linalg import eigsh

        # Where it starts is drawn by ARPACK unless it is given; the leading vector itself would be a dead end.
        start = numpy.random.default_rng(0).random(matrix.shape[0])
        size = max(LANCZOS_VECTORS, 2 * count + 1)
        values, vectors = eigsh(matrix, count, which="LA", v0=start, ncv=size, tol=TOLERANCE)
    order = numpy.argsort(-values, kind="stable")[:count]
    return values[order], vectors[:, order]


def _means(coordinates: Numbers, clusters: int) -> list[int]:
    from sklearn.cluster import KMeans

    found = KMeans(clusters, n_init=10, random_state=0).fit_predict(coordinates)
    return [int(each) for each in found]


def _factors(vectors: Numbers, clusters: int) -> list[int]:
    """The largest factor of each row of abs(V Vᵀ), written as a product of two matrices without negative entries."""
    from sklearn.decomposition import NMF

    factored = NMF(clusters, init="nndsvda", random_state=0, max_iter=500)
    return [int(each) for each in factored.fit_transform(numpy.abs(vectors @ vectors.T)).argmax(axis=1)]


def _numbered(labels: Sequence[int]) -> list[int]:
    """The same clusters, numbered in the order in which they are first met."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [numbers[label] for label in labels]
