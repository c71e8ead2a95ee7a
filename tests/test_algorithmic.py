"""The algorithmic tasks and the digits: every rule worked out again by another way, and the splits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest

from methods import algorithmic, digits
from methods.data import Locator, read_cases
from methods.stage import AssayError

ROOT = Path(__file__).parent.parent
# Task and size: how many items, and the vocabulary.
SIZES = {
    "addition31": (31**2, 31),
    "addition59": (59**2, 59),
    "lattice5": (85**2, 25),
    "equivalence40": (40**2, 42),
    "genealogy127": (126 + 124 + 126, 130),
    "permutation4": (24**2, 24),
}


def everything(name: str) -> dict[tuple[int, ...], int]:
    """All items of a task, train and test together."""
    rows = [*algorithmic.rows(f"{name}/train"), *algorithmic.rows(f"{name}/test")]
    return {tuple(row["tokens"]): row["label"] for row in rows}


def printed(code: str, environment: dict[str, str] | None = None) -> str:
    """What a new process prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --- splits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count", "vocabulary"), [(name, *sizes) for name, sizes in SIZES.items()])
def test_every_item_occurs_once_and_four_fifths_are_trained_on(
    name: str, count: int, vocabulary: int
) -> None:
    train, test = (algorithmic.rows(f"{name}/{part}") for part in ("train", "test"))
    items = [tuple(row["tokens"]) for row in [*train, *test]]
    assert len(items) == len(set(items)) == count
    assert len(train) == int(count * 0.8)
    for row in [*train, *test]:
        assert row["classes"] == vocabulary
        assert all(0 <= token < vocabulary for token in (*row["tokens"], row["label"]))


def test_no_test_item_is_trained_on_in_any_split_and_splits_differ() -> None:
    tests = []
    for split in range(4):
        train, test = (
            {tuple(row["tokens"]) for row in algorithmic.rows(f"addition31.split{split}/{part}")}
            for part in ("train", "test")
        )
        assert not train & test
        tests.append(test)
    assert len({frozenset(test) for test in tests}) == 4
    # Two random fifths share about a fifth of each other.
    shared = [len(one & other) / len(one) for one, other in itertools.combinations(tests, 2)]
    assert all(0.08 < share < 0.35 for share in shared)


def test_the_first_split_needs_no_number_and_the_usual_size_no_size() -> None:
    assert algorithmic.rows("addition/train") == algorithmic.rows("addition31.split0/train")
    assert algorithmic.rows("lattice/test") == algorithmic.rows("lattice5/test")


def test_the_rows_are_the_same_in_every_process_and_version() -> None:
    first = [(row["tokens"], row["label"]) for row in algorithmic.rows("addition59/train")[:3]]
    assert first == [([39, 32], 12), ([37, 46], 24), ([41, 41], 23)]
    code = "from methods.data import Locator; print(Locator().digest('arithmetic/permutation4/test'))"
    found = {printed(code, {"PYTHONHASHSEED": seed}) for seed in ("1", "2")}
    assert found == {Locator().digest("arithmetic/permutation4/test")}


def test_rows_are_fresh_copies() -> None:
    algorithmic.rows("addition/train")[0]["tokens"].append(7)
    assert len(algorithmic.rows("addition/train")[0]["tokens"]) == 2
    digits.rows("test")[0]["image"][0][0] = 5.0
    assert digits.rows("test")[0]["image"][0][0] <= 1.0


# --- the rules -------------------------------------------------------------------------------------------------


def test_addition_goes_round_a_circle() -> None:
    """Turning by a and then by b of 31 steps ends where (a + b) mod 31 lies."""
    circle = numpy.exp(2j * numpy.pi * numpy.arange(31) / 31)
    for (a, b), label in everything("addition31").items():
        assert int(numpy.argmin(abs(circle - circle[a] * circle[b]))) == label


def test_a_lattice_item_closes_a_parallelogram_on_the_grid() -> None:
    """By brute force over four points: d is the answer where d - c = b - a in both directions."""
    points = [complex(row, column) for row in range(5) for column in range(5)]
    for (a, b, c), d in everything("lattice5").items():
        assert points[d] - points[c] == points[b] - points[a]
    closed = {
        (a, b, c)
        for a, b, c, d in itertools.product(range(25), repeat=4)
        if points[b] + points[c] == points[a] + points[d]
    }
    assert closed == set(everything("lattice5"))


def test_two_numbers_are_equivalent_where_they_lie_in_one_class_modulo_five() -> None:
    classes = [set(range(rest, 40, 5)) for rest in range(5)]
    items = everything("equivalence40")
    for (a, b), label in items.items():
        assert label == (41 if any({a, b} <= members for members in classes) else 40)
    assert Counter(items.values()) == {41: 5 * 8 * 8, 40: 1600 - 320}


def test_a_family_tree_has_two_children_each_and_everyone_the_right_relatives() -> None:
    """From the parents alone: grandparents and siblings are what follows from them."""
    items = everything("genealogy127")
    parent = {person: label for (person, relation), label in items.items() if relation == 127}
    assert sorted(parent) == list(range(1, 127))
    assert Counter(Counter(parent.values()).values()) == {2: 63}
    grandparents = {person: label for (person, relation), label in items.items() if relation == 128}
    assert grandparents == {person: parent[up] for person, up in parent.items() if up in parent}
    siblings = {person: label for (person, relation), label in items.items() if relation == 129}
    assert set(siblings) == set(parent)
    for person, sibling in siblings.items():
        assert sibling != person and parent[sibling] == parent[person]
    depths = Counter(depth(person, parent) for person in range(127))
    assert depths == {level: 2**level for level in range(7)}


def depth(person: int, parent: dict[int, int]) -> int:
    return 1 + depth(parent[person], parent) if person in parent else 0


def test_permutations_are_composed_as_matrices_are_multiplied() -> None:
    def matrix(order: tuple[int, ...]) -> Any:
        return numpy.eye(4, dtype=int)[:, list(order)]

    elements = list(itertools.permutations(range(4)))
    number = {matrix(element).tobytes(): place for place, element in enumerate(elements)}
    for (f, g), label in everything("permutation4").items():
        assert number[(matrix(elements[f]) @ matrix(elements[g])).tobytes()] == label
    # Every element once in each row and column, and not a commutative table.
    table = everything("permutation4")
    assert all(len({table[f, g] for g in range(24)}) == 24 for f in range(24))
    assert any(table[f, g] != table[g, f] for f, g in table)


def test_every_size_there_is_has_a_table_of_cases() -> None:
    for task, found in algorithmic.TASKS.items():
        for size in (found.smallest, found.largest):
            name = f"arithmetic/{task}{size}/test"
            table = read_cases(Locator().rows(name), name)
            assert table.classes == found.vocabulary(size)


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "additon59/train",
            "'arithmetic/additon59/train': 'additon' is no arithmetic task; did you mean 'addition'",
        ),
        ("addition59/tets", "'tets' is no part of a data set; did you mean 'test'"),
        ("addition59", "is no arithmetic data set: write the task, a size"),
        ("addition.spilt1/train", "is no arithmetic data set"),
        ("addition500/train", "sizes of addition go from 2 to 199"),
        ("permutation6/train", "sizes of permutation go from 2 to 5"),
    ],
)
def test_a_name_that_is_none_gets_a_sentence(name: str, sentence: str) -> None:
    for ask in (Locator().rows, Locator().digest):
        with pytest.raises(AssayError, match=sentence):
            ask(f"arithmetic/{name}")


def test_listed_names_exist_and_take_ranges() -> None:
    listed = [name for name in Locator().names() if name.startswith(("arithmetic/", "digits/"))]
    assert len(listed) == 2 * 6 + 2 * 2
    for name in listed:
        assert len(Locator().digest(name)) == 64
        assert not Locator().needs_hub(name)
        assert Locator().rows(f"{name}[3:5]") == Locator().rows(name)[3:5]
    with pytest.raises(AssayError, match="has only 193 rows"):
        Locator().digest("arithmetic/addition31/test[0:194]")


# --- digits ----------------------------------------------------------------------------------------------------


def test_the_digits_are_those_that_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    theirs = Counter(
        (tuple(pixels / 16), int(label)) for pixels, label in zip(loaded.data, loaded.target, strict=True)
    )
    rows = [*digits.rows("train"), *digits.rows("test")]
    assert Counter((tuple(itertools.chain(*row["image"])), row["label"]) for row in rows) == theirs
    assert all(len(row["image"]) == 8 and row["classes"] == 10 for row in rows)


def test_every_digit_has_the_same_share_in_train_and_test() -> None:
    train, test = (Counter(row["label"] for row in digits.rows(part)) for part in ("train", "test"))
    assert train.total() == 1437 and test.total() == 360
    for digit in range(10):
        assert abs(test[digit] - (train[digit] + test[digit]) / 5) <= 1
    # A range is a random sample, not one digit.
    assert len({row["label"] for row in digits.rows("test")[:40]}) == 10


def test_naming_built_in_cases_loads_neither_torch_nor_scikit_learn() -> None:
    code = (
        "import sys; from methods.data import Locator\n"
        "Locator().digest('digits/test+digits/train'); Locator().digest('arithmetic/lattice5/train')\n"
        "print([name for name in ('torch', 'sklearn', 'numpy', 'pandas') if name in sys.modules])"
    )
    assert printed(code) == "[]"


def test_without_scikit_learn_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    digits._split.cache_clear()
    with pytest.raises(AssayError, match="come with scikit-learn: install scikit-learn"):
        digits.rows("train")


def test_nine_or_not_is_the_same_images_in_two_classes() -> None:
    for part in ("train", "test"):
        plain, nines = digits.rows(part), digits.rows(f"nine_{part}")
        assert [row["image"] for row in plain] == [row["image"] for row in nines]
        assert [int(row["label"] == 9) for row in plain] == [row["label"] for row in nines]
        assert {row["classes"] for row in nines} == {2}
