"""AST's masks, optimizer and rise of the decay against the authors' code: weights after every step.

Run with ``pytest tests/parity/test_ast.py``. Other cases of the file belong to methods that are not built here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from methods.distill._masked_adam import MaskedAdam, rising, straight_through
from tests.parity.cases import agree, arrays, folder

FOLDER = folder("optimizers")
NAME = "sparse_training"
Case = dict[str, Any]


def adam(case: Case, stored: dict[str, numpy.ndarray]) -> None:
    """With a mask that stays, as the paper writes it."""
    hyper, weight = case["hyperparameters"], nn.Parameter(torch.tensor(stored["W0"]))
    options = SimpleNamespace(
        learning_rate=hyper["lr"],
        beta1=hyper["betas"][0],
        beta2=hyper["betas"][1],
        epsilon=hyper["eps"],
        weight_decay=hyper["weight_decay"],
    )
    masks = {"w": ~torch.tensor(stored["mask"]).bool()}
    optimizer = MaskedAdam([("w", weight)], masks, options, lambda step: hyper["decay"])
    for gradient, expected in zip(stored["grad"], stored["W"], strict=True):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        agree(weight, expected, relative=case["tolerance"]["rtol"], absolute=1e-12, what="W")


def mask(case: Case, stored: dict[str, numpy.ndarray]) -> None:
    """The N largest of every M are kept."""
    hyper, kept = case["hyperparameters"], torch.tensor(stored["mask"]).bool()
    layer = nn.Linear(kept.shape[1], kept.shape[0], bias=False)
    layer.weight.data = torch.tensor(stored["W"])
    masks = straight_through({"w": layer}, (hyper["M"] - hyper["N"], hyper["M"]), 10, 100)
    with masks.hiding(0):
        assert layer.weight.data.ne(0).equal(kept)


def ramp(case: Case, stored: dict[str, numpy.ndarray]) -> None:
    """In a straight line, and then no further."""
    hyper = case["hyperparameters"]
    decay = rising(hyper["srste_decay"], hyper["increase_step"])
    found = torch.tensor([decay(int(step)) for step in stored["it"]], dtype=torch.float64)
    agree(found, stored["decay"], relative=case["tolerance"]["rtol"], absolute=0.0, what="decay")


def reader(case: Case) -> Callable[[Case, dict[str, numpy.ndarray]], None] | None:
    """Who compares a case: the optimizer as it was meant, masks by size, the decay."""
    if case["name"].startswith("ast_mask") and case["hyperparameters"].get("metric") == "magnitude":
        return mask
    starts = {"ast_adamw_boolean_mask": adam, "ast_decay_ramp": ramp}
    return next((found for start, found in starts.items() if case["name"].startswith(start)), None)


def cases() -> list[Case]:
    """Those of this file."""
    path = FOLDER / f"{NAME}.json"
    found: list[Case] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [case for case in found if reader(case) is not None]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_ast_does_what_its_code_does(case: Case) -> None:
    known = arrays(FOLDER / f"{NAME}.npz")
    stored = {key.partition("/")[2]: known[key] for key in case["arrays"]}
    compare = reader(case)
    assert compare is not None
    compare(case, stored)
