"""Reads the files under ``pruning/`` for the tests that compare with the authors' own code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from methods.prune._walk import Block
from tests.parity import cases

FOLDER = cases.folder("pruning")


def read(name: str) -> Any:
    """A JSON file of the folder, or nothing where this folder has none of that name."""
    path = FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


LINEAR = read("hyperparameters_linear.json")
META = read("tiny_llama_meta.json")


def records(*groups: str) -> list[Any]:
    """One pytest case per record of these groups, named after the group and the record's key."""
    found = [(group, record) for group in groups for record in LINEAR.get(group, [])]
    return [pytest.param(group, record, id=f"{group}:{record['key']}") for group, record in found]


def arrays(name: str) -> Any:
    """The arrays of a file of the folder; skips where it has none of that name."""
    path = FOLDER / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"this folder has no {path.name}")
    return cases.arrays(path)


def inputs(case: str) -> tuple[Tensor, Tensor]:
    """Weights [out,in] and calibration inputs [sequences,tokens,in] of a case."""
    found = cases.arrays(FOLDER / "linear_inputs.npz")
    return torch.tensor(found[f"{case}/W"]), torch.tensor(found[f"{case}/X"])


def watched_block(weight: Tensor, sequences: Tensor) -> Block:
    """A decoder block that is one linear layer, with its inputs: what the walk hands to a pruner."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    rows = [row[None] for row in sequences]
    return Block(0, "block", nn.Sequential(linear), rows, [{}] * len(rows))


def tiny_llama() -> Any:
    """The tiny dense Llama of the folder."""
    found = arrays("tiny_llama_dense")
    parameters = {"rope_theta": META["rope_theta"], "rope_type": "default"}
    model = LlamaForCausalLM(LlamaConfig(**META["config"], rope_parameters=parameters)).eval()
    model.load_state_dict({name: torch.tensor(values) for name, values in found.items()})
    return model


def calibration() -> list[Tensor]:
    """The tiny Llama's calibration sequences [1,T] without padding; the last one may be shorter."""
    tokens = torch.tensor(arrays("tiny_llama_extra")["calib_tokens"])
    return [row[row >= 0][None] for row in tokens]
