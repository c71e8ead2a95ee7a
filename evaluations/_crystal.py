"""How close token vectors come to the figure their task suggests: circle, lattice, equivalence, permutations.

``vectors`` [V,d] in the order of the tokens. Definitions of Baek, Liu, Tyagi, Tegmark 2025, "Harmonic Loss Trains
Interpretable AI Models", ``src/utils/crystal_metric.py``; of parallelograms that of the repository's GPT-2 part. A
score that is not defined, because vectors coincide or lie on one line, is None: the official code gives NaN there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations, product
from math import factorial
from typing import TYPE_CHECKING, Literal, NamedTuple

from evaluations._spectrum import ROUNDING, plane
from methods.algorithmic import MODULUS, TASKS

if TYPE_CHECKING:
    from numpy import ndarray

REVISION = 1

Scale = Literal["all", "task", "datapoint"]


class Figure(NamedTuple):
    """What the vectors of an algorithmic task's tokens should look like, and its size."""

    name: str
    size: int


# By task; the family tree of "genealogy" has none here.
_FIGURES = {
    "addition": "circle",
    "lattice": "lattice",
    "equivalence": "equivalence",
    "permutation": "permutation",
}


def figure_of(data: str) -> Figure | None:
    """The figure of a data set such as ``arithmetic/lattice5/test``; None for any other."""
    match = re.match(r"arithmetic/([a-z]+)(\d*)[./]", data)
    if match is None or match[1] not in _FIGURES:
        return None
    return Figure(_FIGURES[match[1]], int(match[2] or TASKS[match[1]].usual))


def tokens(figure: Figure) -> int:
    """How many tokens the figure is made of: the answers of ``equivalence`` come after them."""
    return {"lattice": figure.size**2, "permutation": factorial(figure.size)}.get(figure.name, figure.size)


def score(vectors: ndarray, figure: Figure) -> float | None:
    """The figure's score of the vectors of its tokens."""
    vectors = vectors[: tokens(figure)]
    if figure.name == "circle":
        return circle(vectors)
    if figure.name == "lattice":
        return lattice(vectors, figure.size)
    if figure.name == "equivalence":
        return equivalence(vectors, MODULUS)
    return permutation(vectors, figure.size)


# --- the scores ------------------------------------------------------------------------------------------------


def circle(vectors: ndarray) -> float | None:
    """Standard deviation over mean of the distances to the centre in the unit plane; 0 is a perfect circle."""
    import numpy

    points = _unit_plane(vectors)
    if points is None:
        return None
    radii = numpy.linalg.norm(points - points.mean(axis=0), axis=1)
    return float(radii.std() / radii.mean())


def lattice(vectors: ndarray, size: int) -> float | None:
    """Mean deviation of the lattice's parallelograms; token ``size * row + column``, 0 is a perfect lattice.

    With d = b + c - a it is sqrt((|ab| - |cd|)^2 + (|ac| - |bd|)^2) / sqrt((|ab|^2 + |bc|^2 + |cd|^2 + |ad|^2) / 2).
    """
    import numpy

    corners = numpy.array(_parallelograms(size))
    if len(corners) == 0:
        return None
    a, b, c, d = (vectors.astype(numpy.float64)[corners[:, place]] for place in range(4))

    def side(one: ndarray, other: ndarray) -> ndarray:
        return numpy.linalg.norm(one - other, axis=1)

    size_of = numpy.sqrt((side(a, b) ** 2 + side(b, c) ** 2 + side(c, d) ** 2 + side(a, d) ** 2) / 2)
    if float(size_of.min()) <= 0.0:
        return None
    skew = numpy.sqrt((side(a, b) - side(c, d)) ** 2 + (side(a, c) - side(b, d)) ** 2)
    return float((skew / size_of).mean())


def _parallelograms(size: int) -> list[tuple[int, int, int, int]]:
    """Tokens a < b < c and d = b + c - a on the lattice, without triples in one row or one column."""
    found = []
    for a, b, c in combinations(product(range(size), repeat=2), 3):
        row, column = b[0] + c[0] - a[0], b[1] + c[1] - a[1]
        if not (0 <= row < size and 0 <= column < size):
            continue
        if a[0] == b[0] == c[0] or a[1] == b[1] == c[1]:
            continue
        first, second, third = (size * point[0] + point[1] for point in (a, b, c))
        found.append((first, second, third, size * row + column))
    return found


def equivalence(vectors: ndarray, modulus: int) -> float | None:
    """Mean distance within the classes of tokens equal modulo ``modulus`` over that between them; 0 is perfect.

    As in the official code a token's distance 0 to itself counts within, and distances within a class that reach the
    mean one between classes are dropped as outliers.
    """
    import numpy

    wide = vectors.astype(numpy.float64)
    distances = numpy.linalg.norm(wide[:, None] - wide, axis=-1)
    token = numpy.arange(len(wide)) % modulus
    same = token[:, None] == token
    if same.all():
        return None
    between = float(distances[~same].mean())
    if between <= 0.0:
        return None
    within = distances[same]
    return float(within[within < between].mean() / between)


def permutation(vectors: ndarray, rotations: int) -> float | None:
    """1 / (1 + mean distance to the nearest point after each turn by 1/rotations of a circle); 1 is perfect."""
    import numpy

    points = _unit_plane(vectors)
    if points is None or rotations < 2:
        return None
    points = points - points.mean(axis=0)
    nearest = []
    for turn in range(1, rotations):
        angle = 2 * numpy.pi * turn / rotations
        cosine, sine = numpy.cos(angle), numpy.sin(angle)
        turned = points @ numpy.array([[cosine, -sine], [sine, cosine]]).T
        nearest.append(numpy.linalg.norm(points[:, None] - turned, axis=-1).min(axis=1).mean())
    return float(1.0 / (1.0 + numpy.mean(nearest)))


def parallelogram(
    vectors: ndarray, quadruples: Sequence[Sequence[int]], components: int = 2, scale: Scale = "all"
) -> float | None:
    """Mean of |e_0 + e_3 - e_1 - e_2|^2 / scale in the first principal components of all vectors; 0 is perfect.

    Quadruples that are parallelograms because tokens in them are identical are left out. ``scale`` is the mean squared
    distance from the centre, of all vectors, of those the quadruples use, or of the four of each quadruple.
    """
    import numpy

    chosen = numpy.array(telling(quadruples))
    if len(chosen) == 0:
        return None
    moved = vectors.astype(numpy.float64) - vectors.mean(axis=0, dtype=numpy.float64)
    directions = numpy.linalg.svd(moved, full_matrices=False)[2]
    points = moved @ directions[:components].T
    squares = (points**2).sum(axis=1)
    sizes = {
        "all": squares.mean(),
        "task": squares[numpy.unique(chosen)].mean(),
        "datapoint": squares[chosen].mean(axis=1),
    }[scale]
    if float(numpy.min(sizes)) <= ROUNDING**2 * float((vectors.astype(numpy.float64) ** 2).sum()):
        return None
    e0, e1, e2, e3 = (points[chosen[:, place]] for place in range(4))
    return float((((e0 + e3 - e1 - e2) ** 2).sum(axis=1) / sizes).mean())


def telling(quadruples: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The quadruples without those for which e_0 + e_3 - e_1 - e_2 is 0 whatever the vectors are."""
    return [one for one in quadruples if sorted((one[0], one[3])) != sorted((one[1], one[2]))]


def _unit_plane(vectors: ndarray) -> ndarray | None:
    """The first two principal components [V,2], each scaled to 0..1; None where one of them has no extent."""
    import numpy

    points = plane(vectors)
    extent = points.max(axis=0) - points.min(axis=0)
    if float(extent.min()) <= ROUNDING * float(numpy.abs(vectors).max(initial=0.0)):
        return None
    unit: ndarray = (points - points.min(axis=0)) / extent
    return unit
