"""Rows to classify as tensors: tables, batches taken from them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from methods.data import Cases, CaseTable, Locator, read_cases
from methods.stage import AssayError

PAIRS = [{"tokens": [row, row + 1], "label": row % 3, "classes": 9} for row in range(6)]


def table(rows: list[dict[str, Any]] | None = None) -> CaseTable:
    return read_cases(PAIRS if rows is None else rows, "mine/pairs")


def write_idx(folder: Path, name: str, images: Any, labels: list[int]) -> None:
    """The two files of a set in the format of MNIST."""
    sizes = b"".join(size.to_bytes(4, "big") for size in images.shape)
    (folder / f"{name}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + sizes + images.tobytes())
    count = len(labels).to_bytes(4, "big")
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + count + bytes(labels))


# --- tables and batches ----------------------------------------------------------------------------------------


def test_a_table_of_tokens_holds_the_rows_in_order() -> None:
    found = table()
    assert found.inputs.tolist() == [row["tokens"] for row in PAIRS]
    assert found.labels.tolist() == [row["label"] for row in PAIRS]
    assert (found.inputs.dtype, found.labels.dtype) == (torch.int64, torch.int64)
    assert (found.classes, len(found)) == (9, 6)


def test_a_batch_has_the_rows_asked_for_in_the_order_asked_for() -> None:
    batch = table().batch([4, 0, 4], "train")
    assert batch.inputs.tolist() == [[4, 5], [0, 1], [4, 5]]
    assert batch.labels.tolist() == [1, 0, 1]
    assert batch.numbers.tolist() == [4, 0, 4]
    assert batch.numbers.dtype == torch.int64
    assert (batch.examples, batch.examples.source, batch.seen) == (3.0, "train.examples", 3)


def test_further_numbers_travel_with_their_rows() -> None:
    scores = torch.arange(12.0).view(6, 2)
    found = table().with_extra("past", scores).with_extra("weight", torch.arange(6))
    batch = found.batch([5, 2], "train")
    assert batch.extra["past"].tolist() == [[10.0, 11.0], [4.0, 5.0]]
    assert batch.rows(slice(1, 2)).extra["weight"].tolist() == [2]
    assert batch.to("cpu").extra["past"].shape == (2, 2)
    assert table().extra == {}
    with pytest.raises(AssayError, match="'past' has 5 values for a data set of 6 rows"):
        table().with_extra("past", scores[:5])


def test_some_of_a_batch_keep_their_name_and_place() -> None:
    part = table().batch([3, 1, 0], "train").rows(slice(1, 3))
    assert isinstance(part, Cases)
    assert part.numbers.tolist() == [1, 0] and part.inputs.tolist() == [[1, 2], [0, 1]]
    assert part.examples == 2.0 and part.name == "train"


def test_a_table_is_a_sequence_of_its_rows() -> None:
    found = table()
    assert found[-1].numbers.tolist() == [5] and found[-1].inputs.tolist() == [[5, 6]]
    assert [int(row.labels) for row in found] == found.labels.tolist()
    assert len(found[1:4]) == 3 and found[1:4].labels.tolist() == [1, 2, 0]
    with pytest.raises(IndexError):
        found[6]


# --- images ----------------------------------------------------------------------------------------------------


def test_bytes_are_divided_by_255_and_numbers_are_left_as_they_are() -> None:
    bytes_, numbers = numpy.array([[0, 51], [102, 255]], dtype=numpy.uint8), [[0.0, 0.2], [0.4, 1.0]]
    for image in (bytes_, numbers):
        found = table([{"image": image, "label": 1, "classes": 2}])
        assert found.inputs.shape == (1, 1, 2, 2) and found.inputs.dtype == torch.float32
        assert found.inputs.flatten().tolist() == pytest.approx([0.0, 0.2, 0.4, 1.0])


def test_channels_come_first() -> None:
    image = numpy.zeros((2, 4, 3))
    image[1, 2] = [0.1, 0.2, 0.3]
    found = table([{"image": image, "label": 0, "classes": 2}])
    assert found.inputs.shape == (1, 3, 2, 4)
    assert found.inputs[0, :, 1, 2].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_the_files_of_mnist_are_a_table_of_ten_classes(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    images = numpy.arange(3 * 28 * 28, dtype=numpy.uint32).astype(numpy.uint8).reshape(3, 28, 28)
    write_idx(tmp_path / "mnist", "t10k", images, [9, 0, 3])
    locator = Locator(tmp_path)
    assert "mnist/t10k" in locator.names()
    found = read_cases(locator.rows("mnist/t10k"), "mnist/t10k")
    assert found.inputs.shape == (3, 1, 28, 28)
    assert torch.equal(found.inputs[2, 0], torch.tensor(images[2] / numpy.float32(255)))
    assert (found.labels.tolist(), found.classes) == ([9, 0, 3], 10)
    # A range knows the classes of the whole file.
    assert read_cases(locator.rows("mnist/t10k[1:3]"), "mnist/t10k[1:3]").classes == 10


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [("mnist/train", "digits/train"), ("mnist/t10k", "digits/test"), ("fashion-mnist/test", "digits/test")],
)
def test_mnist_that_is_not_there_is_replaced_by_digits_at_smoke_scale(name: str, stand_in: str) -> None:
    smoke = Locator(smoke=True)
    assert smoke.rows(name) == Locator().rows(stand_in)
    assert smoke.digest(name) == Locator().digest(stand_in)
    assert len(smoke.rows(f"{name}[50000:60000]")) == len(Locator().rows(stand_in))
    with pytest.raises(AssayError, match=f"there is no data set called '{name}'"):
        Locator().rows(name)


def test_mnist_that_is_there_is_read_at_smoke_scale(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    write_idx(tmp_path / "mnist", "train", numpy.zeros((2, 3, 3), dtype=numpy.uint8), [1, 0])
    assert len(Locator(tmp_path, smoke=True).rows("mnist/train")) == 2


# --- what is refused -------------------------------------------------------------------------------------------


def changed(number: int, **values: Any) -> list[dict[str, Any]]:
    """The pairs with another value in one row; None takes the column away."""
    rows = [dict(row) for row in PAIRS]
    rows[number] = {name: value for name, value in (rows[number] | values).items() if value is not None}
    return rows


def picture(image: Any, **values: Any) -> dict[str, Any]:
    return {"image": image, "label": 0, "classes": 2, **values}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "data set 'mine/pairs' has no rows to classify"),
        ([{"question": "a", "answer": "b"}], "need the columns .* these have: answer, question"),
        (changed(2, label=None), "need the columns"),
        (changed(2, label=9), "row 2: label must be a whole number from 0 to 8, but it is 9"),
        (changed(2, label=-1), "row 2: label must be .* but it is -1"),
        (changed(2, label=True), "row 2: label must be .* but it is True"),
        (changed(2, label=1.0), "row 2: label must be .* but it is 1.0"),
        (changed(3, classes=None), "row 3: the column classes must be the number of classes.* it is None"),
        (changed(3, classes=1), "row 3: the column classes must be"),
        (changed(3, classes=8), "has rows of 8 and of 9 classes"),
        (changed(4, tokens=[1]), "row 4 has 1 tokens, but row 0 has 2"),
        (changed(4, tokens=[1, 9]), "row 4: every token must be a whole number from 0 to 8, but it is 9"),
        (changed(4, tokens="ab"), "row 4: the column tokens must be a list"),
        (changed(0, tokens=[]), "row 0: the column tokens must be a list"),
        ([picture([[0.0, 1.5]])], "row 0: the image has values from 0 to 1.5: scale them"),
        ([picture([[0.0, float("nan")]])], "row 0: the image has values"),
        ([picture([0.0, 1.0])], "row 0: an image is height x width"),
        ([picture([[0.0], [1.0, 0.5]])], "row 0: the image is no rectangle of numbers"),
        ([picture([["a"]])], "row 0: the image is no rectangle of numbers"),
        ([picture([[0.0]]), picture([[0.0, 1.0]])], "row 1: the image is 1 x 2, but that of row 0 is 1 x 1"),
    ],
)
def test_rows_that_are_no_cases_get_a_sentence(rows: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(AssayError, match=sentence):
        table(rows)


def classifier(**config: Any) -> Any:
    """As much of a model as is asked about its inputs."""
    return SimpleNamespace(config=SimpleNamespace(**config))


def test_a_model_that_was_made_for_other_cases_is_refused() -> None:
    pairs, images = table(), table([picture([[0.0, 1.0]])])
    pairs.check_model(classifier(num_labels=9, sequence_length=2), "mine/pairs")
    images.check_model(classifier(num_labels=2, image_size=(1, 2), num_channels=1), "mine/images")
    with pytest.raises(AssayError, match="'mine/pairs' has 9 classes, but the model tells 5 apart"):
        pairs.check_model(classifier(num_labels=5, sequence_length=2), "mine/pairs")
    with pytest.raises(AssayError, match="'mine/pairs': the model takes inputs of 3, but these are 2"):
        pairs.check_model(classifier(num_labels=9, sequence_length=3), "mine/pairs")
    with pytest.raises(AssayError, match="takes inputs of 1 x 8 x 8, but these are 1 x 1 x 2"):
        images.check_model(classifier(num_labels=2, image_size=8, num_channels=1), "mine/images")
