"""Small algorithmic tasks as rows to classify: the five of the original harmonic-loss paper, without its leak.

Baek, Liu, Tyagi, Tegmark, "Harmonic Loss Trains Interpretable AI Models" (2025), code KindXiaoming/grow-crystals. A row
is ``{"tokens": [...], "label": int, "classes": V}``; tokens and labels are numbers below the vocabulary V. Sizes are
the paper's; ``addition59`` is its notebook's:

    ===============  ============================================  =====================================  =====
    name             tokens                                        label                                      V
    ===============  ============================================  =====================================  =====
    addition31       a, b ("circle" in the paper)                  (a + b) mod 31                            31
    lattice5         a, b, c: points of a 5 x 5 grid, 5 row + col  b + c - a, where that is on the grid      25
    equivalence40    a, b < 40                                     41 if (a - b) mod 5 = 0, else 40          42
    genealogy127     person, relation: 127 parent, 128             that person in the binary tree in        130
                     grandparent, 129 sibling                      which 2i + 1 and 2i + 2 are i's children
    permutation4     f, g: permutations of 0..3, in order          f after g: x -> f(g(x))                   24
    ===============  ============================================  =====================================  =====

Where this differs from the original code: that draws 1,000 samples with replacement and splits them afterwards, so that
more than half of the test items of modular addition are trained on as well. Here **every item occurs once**, and four
fifths of all items are trained on; a range of rows (``arithmetic/lattice5/train[0:800]``) gives a smaller set. Pairs
are ordered: (a, b) may be trained on while (b, a) is tested, as in the original. A fifth of all pairs are equivalent;
the lattice's 7,225 items hold those with a = b or a = c, too.

The order of the items, and with it the split, follows from task, size and the split's number through
``random.Random(text).random()`` alone, which Python documents as stable across versions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from math import factorial
from typing import Any

from methods.find import nearest
from methods.stage import AssayError

Row = dict[str, Any]
# Tokens and the label that follows from them.
Item = tuple[tuple[int, ...], int]

SPLITS = ("train", "test")
# What two numbers are compared by in ``equivalence``.
MODULUS = 5
# Of five items that many are trained on.
TRAINED_OF_FIVE = 4


@dataclass(frozen=True)
class _Task:
    """All items of one size, its vocabulary, and the sizes there are (larger ones have too many items)."""

    items: Callable[[int], Iterator[Item]]
    vocabulary: Callable[[int], int]
    usual: int
    smallest: int
    largest: int


@dataclass(frozen=True)
class _Name:
    """A parsed name: ``addition59.split2/train``."""

    task: str
    size: int
    split: int
    part: str


def rows(name: str) -> list[Row]:
    """The rows of ``<task>[size][.split<k>]/train|test``, in a random order that never changes; fresh copies each time.

    AssayError for a task, a size or a part that does not exist.
    """
    parsed = _parse(name)
    items = _shuffled(parsed.task, parsed.size, parsed.split)
    trained = len(items) * TRAINED_OF_FIVE // 5
    chosen = items[:trained] if parsed.part == "train" else items[trained:]
    vocabulary = TASKS[parsed.task].vocabulary(parsed.size)
    return [{"tokens": list(tokens), "label": label, "classes": vocabulary} for tokens, label in chosen]


def names() -> list[str]:
    """The sizes of the paper and of its notebook; every other size can be named, too."""
    usual = [f"{task}{found.usual}" for task, found in TASKS.items()]
    return [f"{name}/{part}" for name in ["addition59", *usual] for part in SPLITS]


# --- names ------------------------------------------------------------------------------------------------

_NAME = re.compile(r"(?P<task>[a-z_]+?)(?P<size>\d*)(?P<split>\.split\d+)?/(?P<part>[a-z_]+)")


def _parse(name: str) -> _Name:
    match = _NAME.fullmatch(name)
    if match is None or match["task"] not in TASKS or match["part"] not in SPLITS:
        raise _unknown(name, match)
    task = TASKS[match["task"]]
    size = int(match["size"] or task.usual)
    if not task.smallest <= size <= task.largest:
        raise AssayError(
            f"'arithmetic/{name}': sizes of {match['task']} go from {task.smallest} to {task.largest}."
        )
    return _Name(
        match["task"], size, int((match["split"] or ".split0").removeprefix(".split")), match["part"]
    )


def _unknown(name: str, match: re.Match[str] | None) -> AssayError:
    """What of a name is wrong, with the nearest word."""
    if match is None:
        return AssayError(
            f"'arithmetic/{name}' is no arithmetic data set: write the task, a size where it is not the usual one, "
            f".split1 where it is not the first split, and /train or /test, as in arithmetic/{names()[0]}; "
            f"tasks are {', '.join(TASKS)}."
        )
    word, kind, choices = match["part"], "part of a data set", list(SPLITS)
    if match["task"] not in TASKS:
        word, kind, choices = match["task"], "arithmetic task", list(TASKS)
    return AssayError(
        f"there is no data set called 'arithmetic/{name}': {word!r} is no {kind}{nearest(word, choices)}"
    )


@cache
def _shuffled(task: str, size: int, split: int) -> tuple[Item, ...]:
    """Every item once, in a uniformly random order."""
    draw = random.Random(f"arithmetic {task}{size} split {split}").random
    return tuple(sorted(TASKS[task].items(size), key=lambda _: draw()))


# --- the tasks --------------------------------------------------------------------------------------------


def _addition(size: int) -> Iterator[Item]:
    for a, b in product(range(size), repeat=2):
        yield (a, b), (a + b) % size


def _lattice(size: int) -> Iterator[Item]:
    points = list(product(range(size), repeat=2))
    for a, b, c in product(points, repeat=3):
        row, column = (b[axis] + c[axis] - a[axis] for axis in range(2))
        if 0 <= row < size and 0 <= column < size:
            tokens = tuple(size * point[0] + point[1] for point in (a, b, c))
            yield tokens, size * row + column


def _equivalence(size: int) -> Iterator[Item]:
    for a, b in product(range(size), repeat=2):
        yield (a, b), size + ((a - b) % MODULUS == 0)


def _genealogy(size: int) -> Iterator[Item]:
    """The relations' tokens come after the persons'; person 0 is the root."""
    for person in range(1, size):
        parent = (person - 1) // 2
        yield (person, size), parent
        if parent > 0:
            yield (person, size + 1), (parent - 1) // 2
        # Children are pairs of an odd number and the even one after it.
        sibling = person + 1 if person % 2 else person - 1
        if sibling < size:
            yield (person, size + 2), sibling


def _permutation(size: int) -> Iterator[Item]:
    elements = list(permutations(range(size)))
    number = {element: place for place, element in enumerate(elements)}
    for f, g in product(elements, repeat=2):
        yield (number[f], number[g]), number[tuple(f[x] for x in g)]


TASKS = {
    "addition": _Task(_addition, lambda size: size, usual=31, smallest=2, largest=199),
    "lattice": _Task(_lattice, lambda size: size**2, usual=5, smallest=2, largest=6),
    "equivalence": _Task(_equivalence, lambda size: size + 2, usual=40, smallest=MODULUS + 1, largest=199),
    "genealogy": _Task(_genealogy, lambda size: size + 3, usual=127, smallest=4, largest=1023),
    "permutation": _Task(_permutation, factorial, usual=4, smallest=2, largest=5),
}
