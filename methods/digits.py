"""scikit-learn's handwritten digits as rows to classify: 1,797 images of 8 x 8, read from the installed package.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI machine learning repository, 1998), the test part,
as scikit-learn ships it. A row is ``{"image": 8 x 8 numbers, "label": int, "classes": 10}``; a pixel, from
0 to 16, is divided by 16, which no float rounds. ``train`` has 1,437 images and ``test`` 360, with every digit's share
the same in both up to one image; the order and with it the split follow from ``random.Random(text).random()`` alone.
``nine_train`` and ``nine_test`` are the same images in two classes, 1 for a nine and 0 for any other digit: one in ten.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import random
from functools import cache
from pathlib import Path
from typing import Any

from methods.stage import AssayError

Row = dict[str, Any]

SPLITS = ("train", "test", "nine_train", "nine_test")
SIDE, CLASSES, LARGEST, NINE = 8, 10, 16, 9
# Of five images one is tested.
TESTED = 5


def rows(split: str) -> list[Row]:
    """The rows of a split, in a random order that never changes; fresh copies each time.

    AssayError where scikit-learn is not installed, or its file is not as it was.
    """
    nines = split.startswith("nine_")
    return [
        {
            "image": [list(line) for line in image],
            "label": int(digit == NINE) if nines else digit,
            "classes": 2 if nines else CLASSES,
        }
        for image, digit in _split()[split.removeprefix("nine_")]
    ]


_Digit = tuple[tuple[tuple[float, ...], ...], int]


@cache
def _split() -> dict[str, list[_Digit]]:
    """Every fifth image is tested, counted through a random order within each digit, digit after digit."""
    draw = random.Random("digits").random
    digits = sorted(_read(_file()), key=lambda digit: (digit[1], draw()))
    parts = {
        "train": [digit for place, digit in enumerate(digits) if place % TESTED],
        "test": digits[::TESTED],
    }
    return {name: sorted(part, key=lambda _: draw()) for name, part in parts.items()}


def _file() -> Path:
    """Where the installed package keeps it; scikit-learn is not imported, which would take a second."""
    found = importlib.util.find_spec("sklearn")
    for place in (found.submodule_search_locations or []) if found else []:
        path = Path(place) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return path
    raise AssayError(
        "the data sets digits/train and digits/test come with scikit-learn: install scikit-learn."
    )


def _read(path: Path) -> list[_Digit]:
    """A line is 64 pixels, row by row, and the digit."""
    with gzip.open(path, "rt", encoding="ascii", newline="") as file:
        lines = [[int(float(value)) for value in line] for line in csv.reader(file)]
    if not lines or any(len(line) != SIDE**2 + 1 for line in lines):
        raise AssayError(f"{path} is not the file of digits that scikit-learn ships: install it anew.")
    return [(_image(line[:-1]), line[-1]) for line in lines]


def _image(pixels: list[int]) -> tuple[tuple[float, ...], ...]:
    """From 64 pixels, row by row, to 8 x 8 numbers from 0 to 1."""
    starts = range(0, len(pixels), SIDE)
    return tuple(tuple(pixel / LARGEST for pixel in pixels[start : start + SIDE]) for start in starts)
