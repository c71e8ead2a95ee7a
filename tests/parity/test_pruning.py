"""Pruning against the authors' own code, case by case from the files under ``pruning/``.

The tolerances are those of the folder's README: masks must be equal, activations agree within 1e-4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from methods.prune._walk import Block, walk
from tests.parity import cases

FOLDER = cases.folder("pruning")


def read(name: str) -> Any:
    """A JSON file of the folder, or nothing where this folder has none of that name."""
    path = FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


LINEAR = read("hyperparameters_linear.json")
META = read("tiny_llama_meta.json")

# Groups of cases whose methods do not exist yet, and what they will be called.
LATER = {
    "sparsegpt_official": "prune.sparsegpt",
    "evopress_fastobc": "levels.sparsegpt",
    "gptq_official": "prune.gptq",
    "evopress_fastobq": "levels.gptq",
    "flap_metrics": "prune.flap",
    "tyr_local": "levels.tyr",
}
SEARCHES = {
    "prune": "search.evopress",
    "quant": "search.evopress",
    "drop": "search.evopress",
    "tyr": "search.tyr",
}


def records(*groups: str) -> list[Any]:
    """One pytest case per record of these groups, named after the group and the record's key."""
    found = [(group, record) for group in groups for record in LINEAR.get(group, [])]
    return [pytest.param(group, record, id=f"{group}:{record['key']}") for group, record in found]


def options(record: Mapping[str, Any]) -> dict[str, Any]:
    """The budget of a record: n:m where it names a group, a sparsity otherwise."""
    if record["prune_m"]:
        return {"pattern": f"{record['prune_n']}:{record['prune_m']}"}
    return {"sparsity": record["sparsity"]}


def inputs(case: str) -> tuple[Tensor, Tensor]:
    """Weights [out,in] and calibration inputs [sequences,tokens,in] of a case."""
    arrays = cases.arrays(FOLDER / "linear_inputs.npz")
    return torch.tensor(arrays[f"{case}/W"]), torch.tensor(arrays[f"{case}/X"])


def watched_block(weight: Tensor, sequences: Tensor) -> Block:
    """A decoder block that is one linear layer, with its inputs: what the walk hands to a pruner."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    rows = [row[None] for row in sequences]
    return Block(0, nn.Sequential(linear), rows, [{}] * len(rows))


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


@pytest.mark.parametrize(("group", "record"), records(*LATER))
def test_weights_equal_the_official_ones(group: str, record: dict[str, Any]) -> None:
    cases.method(LATER[group])
    pytest.fail(f"{LATER[group]} exists now: compare it with {group}.")


def tiny_llama() -> Any:
    """The tiny dense Llama of the folder."""
    arrays = cases.arrays(FOLDER / "tiny_llama_dense.npz")
    parameters = {"rope_theta": META["rope_theta"], "rope_type": "default"}
    model = LlamaForCausalLM(LlamaConfig(**META["config"], rope_parameters=parameters)).eval()
    model.load_state_dict({name: torch.tensor(values) for name, values in arrays.items()})
    return model


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


@pytest.mark.parametrize("levels", ["sparsegpt", "gptq", "tyr"])
def test_levels_of_the_tiny_llama_equal_the_official_ones(levels: str) -> None:
    cases.method(f"levels.{levels}")
    pytest.fail(f"levels.{levels} exists now: compare it with tiny_llama_{levels}_levels.npz.")


@pytest.mark.parametrize("trace", sorted(read("search_traces.json")))
def test_stored_candidates_pass_our_validator(trace: str) -> None:
    name = SEARCHES.get(trace.partition("_")[0], trace)
    cases.method(name)
    pytest.fail(f"{name} exists now: check the candidates of {trace}.")


@pytest.mark.parametrize("scores", sorted(META.get("block_scores", {})) + sorted(META.get("fitness", {})))
def test_block_scores_and_fitness_equal_the_official_ones(scores: str) -> None:
    cases.method("search.evopress")
    pytest.fail(f"search.evopress exists now: compare {scores}.")


def test_removing_more_sub_blocks_can_lower_the_divergence() -> None:
    cases.method("search.evopress")
    pytest.fail("search.evopress exists now: check nonmonotone_drop.json.")
