"""ReGLU against the authors' code: losses with their gradients, and what the adapter is started from.

Run with ``pytest tests/parity/test_reglu.py``; the data is described in ``tests/parity/cases.py``. Files are chosen by
what they hold: LoRA matrices beside logits (losses), or the outputs of layers on forget and retain rows (start).
Eigenvectors are compared by their projectors.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from methods.data import Part
from methods.terms import total
from tests.parity.cases import Table, agree, arrays, flat, folder, leaf, meta, method

FOLDER = folder("unlearning")
# the official code computes the overlap in single precision
LOSS = {"relative": 1e-5, "absolute": 1e-7}
LOSS32 = {"relative": 1e-4, "absolute": 1e-6}
START = {"relative": 0.0, "absolute": 2e-4}
PARTS = ("forget", "retain")


# --- losses -------------------------------------------------------------------------------------------------------


def loss_cases() -> list[Any]:
    """Every case of every file with LoRA matrices."""
    paths = [path for path in sorted(FOLDER.glob("*.npz")) if "in|loraB0_logits" in arrays(path)]
    return [
        pytest.param(path, name, about, id=f"{path.stem}/{name}")
        for path in paths
        for name, about in meta(path)["cases"].items()
    ]


class Model(nn.Module):
    """Logits from a table, and adapted layers with given B and P."""

    def __init__(self, logits: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.table = Table(logits)
        self.layers = nn.ModuleList()
        for up, basis in layers:
            layer = nn.Module()
            layer.lora_B = nn.ModuleDict({"default": nn.Linear(up.shape[1], up.shape[0], bias=False)})
            layer.lora_B["default"].weight = nn.Parameter(up)
            layer.register_buffer("retain_basis", basis)
            self.layers.append(layer)

    def forward(self, **inputs: Any) -> Any:
        return self.table(**inputs)


def batch(stored: Any, leaves: dict[str, Tensor]) -> Any:
    """The parts of a batch; token ids are row numbers of the table."""
    parts, start = {}, 0
    for name in leaves:
        labels = torch.as_tensor(stored[f"in|{name}_labels"])
        ids = torch.arange(start, start + labels.numel()).view_as(labels)
        parts[name] = Part(input_ids=ids, attention_mask=torch.ones_like(labels), labels=labels, name=name)
        start += labels.numel()
    return SimpleNamespace(**parts)


def options(name: str, about: dict[str, Any]) -> dict[str, Any]:
    """What a case asks for; the forget loss is told by the case's name, or its description."""
    words = re.split(r"[^a-z0-9.]+", f"{name} {about.get('forget_loss', '')}".lower())
    return {
        "forget_loss": "gd" if {"gd", "ga"} & set(words) else "ihl",
        "overlap": float(about["rol_lambda"]),
        "alpha": float(about.get("alpha", about.get("retain_gamma", 1.0))),
        "gamma": float(about.get("gamma", 1.0)),
    }


@pytest.mark.parametrize(("path", "name", "about"), loss_cases())
def test_loss_equals_the_official_one(path: Path, name: str, about: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float64, LOSS), (torch.float32, LOSS32)):
        compare(path, name, options(name, about), dtype, tolerance)


def compare(
    path: Path, name: str, chosen: dict[str, Any], dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    """Value and every stored gradient of one case in one precision; a gradient that is not stored is zero."""
    stored, module = arrays(path), method("unlearn.reglu")
    leaves = {part: leaf(stored[f"in|{part}_logits"], dtype) for part in PARTS}
    count = sum(key.startswith("in|loraB") for key in stored)
    layers = [
        tuple(torch.as_tensor(stored[f"in|{kind}{number}_logits"]).to(dtype) for kind in ("loraB", "rolQ"))
        for number in range(count)
    ]
    model = Model(flat(leaves.values()), layers)  # type: ignore[arg-type]
    value = total(module.loss(module.Config(**chosen), model, batch(stored, leaves), None))
    value.backward()
    agree(value, stored[f"out|{name}|loss"], **tolerance, what=f"loss in {dtype}")
    found = {part: logits.grad for part, logits in leaves.items()}
    found |= {f"B{number}": layer.lora_B["default"].weight.grad for number, layer in enumerate(model.layers)}
    for what, gradient in found.items():
        shape = leaves[what].shape if what in leaves else layers[int(what[1:])][0].shape
        gradient = torch.zeros(shape) if gradient is None else gradient
        expected = stored.get(f"out|{name}|grad_{what}", numpy.zeros(shape))
        agree(gradient, expected, **tolerance, what=f"gradient of {what} in {dtype}")


# --- start --------------------------------------------------------------------------------------------------------


def layers() -> list[Any]:
    """Every layer of every file with outputs on forget rows."""
    found = []
    for path in sorted(FOLDER.glob("*.npz")):
        names = [key.split("|")[1] for key in arrays(path) if key.endswith("|H_forget")]
        found += [pytest.param(path, name, id=f"{path.stem}/{name}") for name in names]
    return found


def read(path: Path, layer: str, what: str) -> Tensor:
    return torch.as_tensor(arrays(path)[f"{'in' if what in INPUTS else 'out'}|{layer}|{what}"]).double()


INPUTS = ("H_forget", "H_retain", "W0")


def sums(path: Path, layer: str, what: str) -> Tensor:
    """Outputs [N,T,d] summed as the method sums them; the file's rows have no padding, or it counts as tokens there."""
    method("unlearn.reglu")
    from methods.unlearn._rila import summed

    outputs = read(path, layer, what)
    return summed(outputs, torch.ones(outputs.shape[:2], dtype=torch.int64))


@pytest.mark.parametrize(("path", "layer"), layers())
def test_the_start_of_the_adapter_equals_the_official_one(path: Path, layer: str) -> None:
    about = meta(path)
    forget, retain = sums(path, layer, "H_forget"), sums(path, layer, "H_retain")
    from methods.unlearn._rila import guided

    scale = float(about.get("scaling", about["alpha"] / about["r"]))
    found = guided(read(path, layer, "W0"), forget, retain, int(about["r"]), scale, float(about["beta"]))
    agree(found.up @ found.up.T, read(path, layer, "BBt"), **START, what="B B^T")
    agree(found.up @ found.down, read(path, layer, "BA"), **START, what="B A")
    agree(found.residual, read(path, layer, "W_residual"), **START, what="W0 - s B A")


@pytest.mark.parametrize(("path", "layer"), layers())
def test_the_directions_to_be_kept_equal_the_official_ones(path: Path, layer: str) -> None:
    retain = sums(path, layer, "H_retain")
    from methods.unlearn._rila import retain_basis

    basis = retain_basis(retain, int(meta(path)["rol_rank"]))
    agree(basis @ basis.T, read(path, layer, "QQt"), **START, what="P P^T")
    assert basis.shape == read(path, layer, "Q_retain").shape
