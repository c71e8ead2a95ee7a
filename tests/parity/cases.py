"""Reads parity data: numbers that the authors' own code gave, and the stubs that stand in for a model.

The folder is ``$ASSAY_PARITY``, or ``shared/parity`` beside the repository. It holds numbers only, no code.
Another folder of the same format may have other cases, names, seeds, shapes and options: everything here is
driven by what the files say.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from methods.find import catalogue

ROOT = Path(__file__).resolve().parents[2]


def folder(family: str) -> Path:
    """The family's folder of parity data; skips the whole module where it is absent."""
    chosen = Path(os.environ.get("ASSAY_PARITY") or ROOT.parent / "shared" / "parity") / family
    if not chosen.is_dir():
        reason = (
            f"no parity data: {chosen} does not exist (set ASSAY_PARITY to the folder that holds {family}/)"
        )
        pytest.skip(reason, allow_module_level=True)
    return chosen


@cache
def arrays(path: Path) -> Mapping[str, numpy.ndarray]:
    """Every array of an npz file."""
    with numpy.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def meta(path: Path) -> dict[str, Any]:
    """What an npz file says about itself in ``meta_json``."""
    return dict(json.loads(str(arrays(path)["meta_json"])))


# Which test reads a file of the unlearning folder, told by the name of an array in it: the first that fits.
UNLEARNING = {
    "test_reglu.py": r"in\|loraB\d+_logits|in\|.+\|H_forget",
    "test_rmu.py": r"in\|control_vec",
    "test_kfade.py": r"in\|X_retain",
    "test_metrics_unlearning.py": r"in\|tok\|.+|.+\|correct_avg_loss|.+_rougeL_f1",
    "test_unlearning.py": r"in\|forget_logits",
}


def reader(path: Path) -> str | None:
    """The test file that reads a file of the unlearning folder."""
    found = names(path)
    return next(
        (test for test, one in UNLEARNING.items() if any(re.fullmatch(one, name) for name in found)), None
    )


def read_by(test: str) -> list[Path]:
    """The files of the unlearning folder that a test file reads, whatever they are called."""
    return [path for path in data_files() if reader(path) == test]


def data_files() -> list[Path]:
    """Everything in the unlearning folder but the text that describes it."""
    return [
        path for path in sorted(folder("unlearning").iterdir()) if path.is_file() and path.suffix != ".md"
    ]


@cache
def names(path: Path) -> frozenset[str]:
    """The arrays of an npz file, the keys of a JSON file and of its lists' rows; nothing of any other file."""
    if path.suffix == ".npz":
        with numpy.load(path, allow_pickle=False) as file:
            return frozenset(file.files)
    if path.suffix != ".json":
        return frozenset()
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for value in found.values() if isinstance(value, list) for row in value]
    return frozenset(found).union(*(row for row in rows if isinstance(row, dict)))


def method(name: str) -> ModuleType:
    """The method of that name, or a skip that says it is not built yet."""
    found = catalogue().methods.get(name)
    if found is None:
        pytest.skip(f"not built yet: {name}")
    return found.load()


@dataclass(frozen=True)
class Table:
    """A model whose answer at a position is a row of a table, looked up by the token id there.

    ``logits`` [N,V]; ``hidden`` (L+1 tensors [N,H]). With ids 0..N-1 each used once, the gradient with
    respect to the table is the gradient with respect to the model's outputs.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = False) -> Any:
        states = tuple(table[input_ids] for table in self.hidden) if output_hidden_states else None
        return SimpleNamespace(logits=self.logits[input_ids], hidden_states=states)


def leaf(values: numpy.ndarray, dtype: torch.dtype) -> Tensor:
    """The array as a tensor that collects a gradient."""
    return torch.tensor(values, dtype=dtype).requires_grad_()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors [B,T,X] laid one after the other as the rows of one table [sum of B*T, X]."""
    return torch.cat([tensor.flatten(0, 1) for tensor in tensors])


def agree(actual: Tensor, expected: Any, *, relative: float, absolute: float, what: str) -> None:
    """Assert that two arrays agree within the tolerance, naming what differs."""
    torch.testing.assert_close(
        actual.detach().double(),
        torch.as_tensor(numpy.asarray(expected)).double().reshape(actual.shape),
        rtol=relative,
        atol=absolute,
        msg=lambda text: f"{what}: {text}",
    )
