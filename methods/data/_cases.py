"""Rows to classify, images or short token sequences, as tensors: a table of all of them, and batches taken from it.

A row is ``{"tokens": [...], "label": int, "classes": V}``, whose tokens are numbers below V, or ``{"image": ...,
"label": int, "classes": V}`` with height x width (x channels) numbers from 0 to 1, or bytes as a uint8 array. All rows
of a set have one form, one size and one number of classes.

``M`` is the rows of the set, ``B`` those of a batch, ``T`` tokens, ``C, H, W`` channels, height and width. torch and
numpy are imported on use: the planner reads ``methods.data``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

from methods.sources import Row
from methods.stage import AssayError, Count

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What a row has beside its input.
_LABEL, _CLASSES = "label", "classes"


@dataclass(frozen=True, eq=False)
class Cases:
    """One batch of things to classify: a named part of what a step sees.

    ``inputs`` are tokens [B,T] (int64) or images [B,C,H,W] (float32, 0 to 1); ``labels`` [B] and ``numbers`` [B]
    (their places in the set) are int64. ``extra`` holds further numbers of each case [B,...].
    """

    inputs: Tensor
    labels: Tensor
    numbers: Tensor
    name: str
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def examples(self) -> Count:
        """Cases, each of which has one label."""
        return Count(float(self.seen), f"{self.name}.examples")

    @property
    def seen(self) -> int:
        """What the model is shown, for the record: cases."""
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str) -> Cases:
        return replace(
            self,
            inputs=self.inputs.to(device),
            labels=self.labels.to(device),
            numbers=self.numbers.to(device),
            extra={name: values.to(device) for name, values in self.extra.items()},
        )

    def rows(self, chosen: slice) -> Cases:
        """Some of the cases."""
        return replace(
            self,
            inputs=self.inputs[chosen],
            labels=self.labels[chosen],
            numbers=self.numbers[chosen],
            extra={name: values[chosen] for name, values in self.extra.items()},
        )


@dataclass(frozen=True, eq=False)
class CaseTable(Sequence[Cases]):
    """A whole set: ``inputs`` [M,T] or [M,C,H,W], ``labels`` [M], ``extra`` [M,...]; a row of it is a batch of one."""

    inputs: Tensor
    labels: Tensor
    classes: int
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @overload
    def __getitem__(self, row: int) -> Cases: ...
    @overload
    def __getitem__(self, row: slice) -> CaseTable: ...
    def __getitem__(self, row: int | slice) -> Cases | CaseTable:
        if isinstance(row, int):
            return self.batch([range(len(self))[row]], "row")
        extra = {name: values[row] for name, values in self.extra.items()}
        return replace(self, inputs=self.inputs[row], labels=self.labels[row], extra=extra)

    def batch(self, rows: Sequence[int], name: str) -> Cases:
        """The cases of these rows, in this order."""
        import torch

        numbers = torch.tensor(rows, dtype=torch.int64)
        return Cases(
            inputs=self.inputs.index_select(0, numbers),
            labels=self.labels.index_select(0, numbers),
            numbers=numbers,
            name=name,
            extra={key: values.index_select(0, numbers) for key, values in self.extra.items()},
        )

    def batches(self, size: int, name: str) -> list[Cases]:
        """All cases in their own order, ``size`` at a time."""
        starts = range(0, len(self), size)
        return [self.batch(range(start, min(start + size, len(self))), name) for start in starts]

    def with_extra(self, name: str, values: Tensor) -> CaseTable:
        """The same table with further numbers [M,...] of each case; AssayError where they are not M."""
        if len(values) != len(self):
            raise AssayError(f"{name!r} has {len(values)} values for a data set of {len(self)} rows.")
        return replace(self, extra={**self.extra, name: values})

    def check_model(self, model: Any, dataset_name: str) -> None:
        """AssayError where a classifier takes other inputs, or has another number of classes."""
        where, shape = f"data set {dataset_name!r}", tuple(self.inputs.shape[1:])
        takes = _takes(model.config)
        if takes is not None and takes != shape:
            sizes = [" x ".join(map(str, one)) for one in (takes, shape)]
            raise AssayError(
                f"{where}: the model takes inputs of {sizes[0]}, but these are {sizes[1]} (images as channels x height "
                "x width): name the data set that the model was made for."
            )
        if model.config.num_labels != self.classes:
            raise AssayError(
                f"{where} has {self.classes} classes, but the model tells {model.config.num_labels} apart: name the "
                "data set that the model was made for."
            )


def _takes(config: Any) -> tuple[int, ...] | None:
    """The shape of one input of a classifier, as its configuration tells it; None where it does not."""
    if hasattr(config, "sequence_length"):
        return (int(config.sequence_length),)
    if not hasattr(config, "image_size"):
        return None
    sides = config.image_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return (int(config.num_channels), int(height), int(width))


# --- from rows --------------------------------------------------------------------------------------------


def read_cases(rows: Sequence[Row], dataset_name: str) -> CaseTable:
    """The table of a set's rows; AssayError names the set and the row that is no case, or not like the others."""
    import torch

    where = f"data set {dataset_name!r}"
    kind, classes = _kind(rows, where), _classes(rows, where)
    labels = [_number(row, _LABEL, classes, f"{where}, row {at}") for at, row in enumerate(rows)]
    read = _images if kind == "image" else _tokens
    return CaseTable(read(rows, classes, where), torch.tensor(labels, dtype=torch.int64), classes)


def _kind(rows: Sequence[Row], where: str) -> str:
    """``image`` or ``tokens``: what all rows have."""
    if not rows:
        raise AssayError(f"{where} has no rows to classify.")
    for kind in ("tokens", "image"):
        if all(kind in row and _LABEL in row for row in rows):
            return kind
    columns = sorted({column for row in rows for column in row})
    raise AssayError(
        f"{where}: rows to classify need the columns tokens, label and classes, or image, label and classes, and all "
        f"the same; these have: {', '.join(columns)}."
    )


def _classes(rows: Sequence[Row], where: str) -> int:
    """The number of classes, which every row repeats."""
    for at, row in enumerate(rows):
        if not _is_int(row.get(_CLASSES)) or row[_CLASSES] < 2:
            raise AssayError(
                f"{where}, row {at}: the column classes must be the number of classes, 2 or more, "
                f"but it is {row.get(_CLASSES)!r}."
            )
    found = sorted({int(row[_CLASSES]) for row in rows})
    if len(found) > 1:
        raise AssayError(
            f"{where} has rows of {found[0]} and of {found[-1]} classes: they cannot be learnt together."
        )
    return found[0]


def _number(row: Row, column: str, classes: int, where: str) -> int:
    value = row[column]
    if not _is_int(value) or not 0 <= value < classes:
        raise AssayError(
            f"{where}: {column} must be a whole number from 0 to {classes - 1}, but it is {value!r}."
        )
    return int(value)


def _is_int(value: Any) -> bool:
    """Whether it is a whole number, numpy's included; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _tokens(rows: Sequence[Row], classes: int, where: str) -> Tensor:
    """[M,T]: every row has as many tokens, and each is a class, too, as inputs and answers share their vocabulary."""
    import torch

    width = _width(rows[0], f"{where}, row 0")
    for at, row in enumerate(rows):
        place = f"{where}, row {at}"
        if _width(row, place) != width:
            raise AssayError(f"{place} has {len(row['tokens'])} tokens, but row 0 has {width}.")
        for token in row["tokens"]:
            _number({"every token": token}, "every token", classes, place)
    return torch.tensor([[int(token) for token in row["tokens"]] for row in rows], dtype=torch.int64)


def _width(row: Row, where: str) -> int:
    tokens = row["tokens"]
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not tokens:
        raise AssayError(
            f"{where}: the column tokens must be a list of whole numbers, but it is {tokens!r:.60}."
        )
    return len(tokens)


def _images(rows: Sequence[Row], classes: int, where: str) -> Tensor:
    """[M,C,H,W], float32 from 0 to 1."""
    import numpy
    import torch

    images = [_image(row["image"], f"{where}, row {at}") for at, row in enumerate(rows)]
    for at, image in enumerate(images):
        if image.shape != images[0].shape:
            sizes = [" x ".join(map(str, one.shape)) for one in (image, images[0])]
            raise AssayError(f"{where}, row {at}: the image is {sizes[0]}, but that of row 0 is {sizes[1]}.")
    stacked = numpy.stack(images)
    planes = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    return torch.from_numpy(numpy.ascontiguousarray(planes))


def _image(value: Any, where: str) -> Any:
    """One image as a float32 array of height x width (x channels); bytes become parts of 255."""
    import numpy

    try:
        image = numpy.asarray(value)
        numbers = numpy.asarray(image, dtype=numpy.float32)
    except (TypeError, ValueError) as error:
        raise AssayError(f"{where}: the image is no rectangle of numbers ({error}).") from error
    if image.ndim not in (2, 3) or image.size == 0:
        raise AssayError(
            f"{where}: an image is height x width or height x width x channels, not {image.shape}."
        )
    if image.dtype == numpy.uint8:
        return numbers / numpy.float32(255)
    if not ((numbers >= 0) & (numbers <= 1)).all():
        raise AssayError(
            f"{where}: the image has values from {numbers.min():g} to {numbers.max():g}: "
            "scale them to 0 to 1 (only uint8 arrays are divided by 255 here)."
        )
    return numbers
