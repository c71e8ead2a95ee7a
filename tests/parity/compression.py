"""Reads the files under ``compression/`` for the tests that compare with the authors' own code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tests.parity import cases

FOLDER = cases.folder("compression")
INDEX = FOLDER / "cases.json"
CASES: list[dict[str, Any]] = json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.is_file() else []


def of_method(*names: str) -> list[Any]:
    """One pytest case per record of these methods, named after the record."""
    return [pytest.param(case, id=case["name"]) for case in CASES if case["method"] in names]


def stored(case: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
    """The arrays of a case by what they are."""
    arrays = cases.arrays(FOLDER / case["file"])
    return {name: arrays[key] for name, key in case["arrays"].items()}


def inputs(case: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Weights [out,in] and inputs [sequences,tokens,in] of a case."""
    name, arrays = case["hyperparameters"]["case"], cases.arrays(FOLDER / "inputs.npz")
    return torch.tensor(arrays[f"{name}/W"]), torch.tensor(arrays[f"{name}/X"])


def output_error(case: Mapping[str, Any], weight: Tensor) -> float:
    """Squared error of the outputs over all tokens, relative to the outputs."""
    dense, sequences = inputs(case)
    tokens = sequences.flatten(0, 1).double()
    wrong, right = tokens @ (dense - weight).double().T, tokens @ dense.double().T
    return float(wrong.square().sum() / right.square().sum())
