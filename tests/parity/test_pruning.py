"""Pruning of single weights against the authors' own code, case by case from the files under ``pruning/``.

The tolerances are those of the folder's README: masks must be equal, weights agree within 1e-5, activations within
1e-4; of a whole model's levels 99.5 % of a layer's mask must be equal and the weights both keep agree within 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from methods.levels._database import Writer
from methods.progress import Progress
from methods.prune._hessian import block_grams
from methods.prune._obs import budget, dead_columns, inverse_factor, solve
from methods.prune._walk import walk
from tests.parity import cases
from tests.parity.pruning import (
    FOLDER,
    LINEAR,
    META,
    arrays,
    calibration,
    inputs,
    records,
    tiny_llama,
    watched_block,
)


def options(record: Mapping[str, Any]) -> dict[str, Any]:
    """The budget of a record: n:m where it names a group, a sparsity otherwise."""
    if record["prune_m"]:
        return {"pattern": f"{record['prune_n']}:{record['prune_m']}"}
    return {"sparsity": record["sparsity"]}


@pytest.mark.parametrize(("group", "record"), records("wanda_magnitude"))
def test_masks_equal_the_official_ones(group: str, record: dict[str, Any]) -> None:
    weight, sequences = inputs(record["case"])
    method = cases.method(f"prune.{record['method']}")
    if record["method"] == "magnitude":
        threshold = {} if record["prune_m"] else {"threshold": "official"}
        pruned = method.mask(method.Config(**options(record), **threshold), weight)
    else:
        block = watched_block(weight, sequences)
        variant = {"variant": "alpha"} if record["use_variant"] else {}
        with torch.no_grad():
            method.prune_block(method.Config(data="case", **options(record), **variant), block)
        pruned = block.linears()["0"].weight == 0
    expected = cases.arrays(FOLDER / f"{group}.npz")[f"{record['key']}/mask_pruned"]
    assert numpy.array_equal(pruned.numpy(), expected)
    assert int(pruned.sum()) == record["zeros"]


@pytest.mark.parametrize("case", sorted(LINEAR.get("cases", {})))
def test_input_energies_equal_the_official_ones(case: str) -> None:
    with torch.no_grad():
        energies = cases.method("prune.wanda").input_energies(watched_block(*inputs(case)))
    expected = cases.arrays(FOLDER / "wanda_magnitude.npz")[f"{case}/scaler_row"]
    cases.agree(energies["0"], expected, relative=1e-4, absolute=1e-6, what="scaler_row")


@pytest.mark.parametrize(("group", "record"), records("sparsegpt_official"))
def test_sparsegpt_equals_the_official_one(group: str, record: dict[str, Any]) -> None:
    method = cases.method("prune.sparsegpt")
    weight, sequences = inputs(record["case"])
    block = watched_block(weight, sequences)
    common = {"data": "case", "block": record["blocksize"], "relative_damping": record["percdamp"]}
    if record["prunem"]:
        # The official code takes any n of a group of m, the case's own name for a pattern.
        config = method.Config(pattern=f"{record['prunen']}:{record['prunem']}", **common)
    else:
        config = method.Config(sparsity=record["sparsity"], threshold="official", **common)
    with torch.no_grad():
        method.prune_block(config, block)
    same_weights(block.linears()["0"].weight, arrays(group)[record["key"]], record["zeros"])


def same_weights(found: Tensor, expected: Any, zeros: int) -> None:
    """The same mask with that many zeros, and the same weights."""
    assert numpy.array_equal(found.detach().numpy() == 0, expected == 0)
    assert int((found == 0).sum()) == zeros
    cases.agree(found.detach(), expected, relative=0.0, absolute=1e-5, what="weights")


def calls(group: str) -> list[Any]:
    """The records of a group that came from one call: those of a case and its options, but for the sparsity."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in LINEAR.get(group, []):
        found.setdefault((record["case"], record["block_size"], record["rel_damp"]), []).append(record)
    return [pytest.param(several, id=f"{group}:{several[0]['key']}...") for several in found.values()]


@pytest.mark.parametrize("several", calls("evopress_fastobc"))
def test_all_levels_of_a_layer_equal_the_official_ones(several: list[dict[str, Any]]) -> None:
    cases.method("levels.sparsegpt")
    weight, sequences = inputs(several[0]["case"])
    block_size, damping = several[0]["block_size"], several[0]["rel_damp"]
    with torch.no_grad():
        hessian = block_grams(watched_block(weight, sequences))["0"].hessian()
        dead = dead_columns(hessian).expand_as(weight)
        budgets = [budget("block", record["sparsity"], 0, dead, block_size, "case") for record in several]
        found, removed = solve(weight, inverse_factor(hessian, damping), budgets, block_size, dead)
    assert torch.equal(found == 0, removed)
    for record, level in zip(several, found, strict=True):
        same_weights(level, arrays("evopress_fastobc")[record["key"]], record["zeros"])


@pytest.mark.parametrize("case", sorted(LINEAR.get("cases", {})))
def test_hessians_equal_the_official_ones(case: str) -> None:
    with torch.no_grad():
        gram = block_grams(watched_block(*inputs(case)))["0"]
    expected = arrays("sparsegpt_official")[f"{case}/H"]
    scale = float(abs(expected).max())
    cases.agree(gram.hessian(), expected, relative=1e-5, absolute=1e-6 * scale, what="H")


@pytest.mark.skipif(not META, reason="this folder has no tiny Llama")
def test_the_walk_sees_the_hidden_states_of_the_dense_model() -> None:
    extra = cases.arrays(FOLDER / "tiny_llama_extra.npz")
    model = tiny_llama()
    states = torch.tensor(extra["hidden_states"])
    sequences = [row[row >= 0][None] for row in torch.tensor(extra["calib_tokens"])]
    blocks = list(walk(model, sequences))
    # The stored last state is the one after the final norm; the walk has the others.
    for block, expected in zip(blocks, states[:-1], strict=True):
        cases.agree(
            torch.cat(block.inputs, dim=1)[0],
            expected,
            relative=1e-4,
            absolute=1e-5,
            what=f"block {block.index}",
        )
    with torch.no_grad():
        last = model.model.norm(torch.cat(blocks[-1].run(), dim=1)[0])
        logits = model.lm_head(last[: sequences[0].shape[1]])
    cases.agree(last, states[-1], relative=1e-4, absolute=1e-5, what="after the final norm")
    cases.agree(logits, extra["dense_logits_calib0"], relative=1e-4, absolute=1e-4, what="logits")


@pytest.mark.skipif(
    "sparsegpt_levels_zero_counts" not in META, reason="this folder has no tiny Llama's levels"
)
def test_levels_of_the_tiny_llama_equal_the_official_ones(tmp_path: Path) -> None:
    method, stored = cases.method("levels.sparsegpt"), arrays("tiny_llama_sparsegpt_levels")
    model, settings = tiny_llama(), META["params"]
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = method.Config(
        data="case",
        sparsity=settings["sp"],
        levels=settings["nl"],
        weights_step=settings["wd"],
        threshold="block",
    )
    given: Any = SimpleNamespace(windows=lambda *_: calibration())
    writer = Writer(tmp_path / "files", method.KIND)
    method.build(config, model, given, Progress(tmp_path / "scratch", 0), writer)
    units = writer.close(model, {})
    zeros = {unit.name: {level.name: level.cost for level in unit.levels} for unit in units}
    assert zeros == META["sparsegpt_levels_zero_counts"]
    for key, expected in stored.items():
        name, _, level = key.rpartition("/")
        nearly_same_weights(writer.weight(name, level), expected, key)
    assert META["evopress_prune_leaves_model_dense"]
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


def nearly_same_weights(found: Tensor, expected: Any, what: str) -> None:
    """99.5 % of the mask, and the weights that both keep."""
    theirs = torch.tensor(expected)
    assert float(((found == 0) == (theirs == 0)).double().mean()) >= 0.995, what
    both = (found != 0) & (theirs != 0)
    cases.agree(found[both], theirs[both], relative=0.0, absolute=1e-4, what=what)
