"""RMU against the authors' code: losses and gradients of hidden states, with upstream's broadcasting and as intended.

Run with ``pytest tests/parity/test_rmu.py``; the data is described in ``tests/parity/cases.py``. Files are chosen by
what they hold: a control vector.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from methods.data import Part
from methods.terms import total
from tests.parity.cases import agree, arrays, folder, leaf, meta, method

FOLDER = folder("unlearning")
FLOAT64 = {"relative": 1e-8, "absolute": 1e-11}
FLOAT32 = {"relative": 1e-4, "absolute": 1e-6}
PRECISIONS = [
    pytest.param(torch.float64, FLOAT64, id="float64"),
    pytest.param(torch.float32, FLOAT32, id="float32"),
]
# of the file's arrays: what the code gave, and what its comments say it should have given
AVERAGES = {"broadcast": "out|", "answer": "out|intended_"}


def files() -> list[Any]:
    """Every file with a control vector."""
    paths = (path for path in sorted(FOLDER.glob("*.npz")) if "in|control_vec" in arrays(path))
    return [pytest.param(path, id=path.stem) for path in paths]


class Block(nn.Module):
    """Stands for a decoder block: its output at a position is the row of a table [N,D] that the token id names."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class Model(nn.Module):
    """A model of one such block; ``logits`` are not looked at."""

    def __init__(self, table: Tensor, control: Tensor | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=1))
        self.layers = nn.ModuleList([Block(table)])
        self.control_vector = control

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.layers[0](input_ids))


def batch(stored: Any) -> Any:
    """Forget and retain rows; token ids are row numbers of the table."""
    parts, start = {}, 0
    for name in ("forget", "retain"):
        labels = torch.as_tensor(stored[f"in|{name}_labels"])
        ids = torch.arange(start, start + labels.numel()).view_as(labels)
        parts[name] = Part(input_ids=ids, attention_mask=torch.ones_like(labels), labels=labels, name=name)
        start += labels.numel()
    return SimpleNamespace(**parts)


def table(forget: Tensor, retain: Tensor) -> Tensor:
    return torch.cat([forget.flatten(0, 1), retain.flatten(0, 1)])


def terms_of(path: Path, average: str, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Tensor]]:
    """The terms and the objective as the loop sees them, and the states that gradients are taken by."""
    stored, about, module = arrays(path), meta(path), method("unlearn.rmu")
    config = module.Config(
        layer=0, gamma=float(about["gamma"]), alpha=float(about["alpha"]), average=average,
        coefficient=float(about["steering_coeff"]),
    )  # fmt: skip
    states = {name: leaf(stored[f"in|{name}_act"], dtype) for name in ("forget", "retain")}
    control = torch.as_tensor(stored["in|control_vec"]).to(dtype).flatten()
    start = torch.as_tensor(stored["in|ref_retain_act"]).to(dtype)
    model = Model(table(states["forget"], states["retain"]), control)
    reference = Model(table(torch.zeros_like(states["forget"]), start))
    return module.loss(config, model, batch(stored), reference), module.outer(config), states


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("path", files())
def test_each_loss_equals_the_official_one(
    path: Path, average: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    stored = arrays(path)
    terms, _, _ = terms_of(path, average, dtype)
    for name in ("forget", "retain"):
        factor = terms.get(f"{name}_inverse_length")
        mean = terms[name].sum / terms[name].count * (factor.sum / factor.count if factor else 1)
        agree(mean, stored[f"{AVERAGES[average]}{name}_loss"], **tolerance, what=f"{name} loss, {average}")


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("path", files())
def test_total_and_gradients_equal_the_official_ones(
    path: Path, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    stored = arrays(path)
    terms, outer, states = terms_of(path, "broadcast", dtype)
    value = total(terms, outer)
    value.backward()
    agree(value, stored["out|loss"], **tolerance, what="loss")
    for name, leaves in states.items():
        agree(leaves.grad, stored[f"out|grad_{name}_act"], **tolerance, what=f"gradient of the {name} states")


@pytest.mark.parametrize("path", files())
def test_the_control_vector_is_the_drawn_one_scaled(path: Path) -> None:
    stored, about = arrays(path), meta(path)
    if "in|u_uniform" not in stored:
        pytest.skip(f"{path.name} does not say what the control vector was drawn from")
    drawn = torch.as_tensor(stored["in|u_uniform"]).flatten()
    control = method("unlearn.rmu").control_vector(drawn, float(about["steering_coeff"]))
    # the official code draws and scales in single precision
    agree(control, stored["in|control_vec"], relative=1e-6, absolute=1e-6, what="control vector")
    assert numpy.all(stored["in|u_uniform"] >= 0)
