"""Structured pruning against the authors' own code: Týr's local pruner and supernet, FLAP's metrics.

The tolerances are those of the folder's README: the groups that stay must be the same and their weights agree within
1e-4 of the largest weight; of a whole model's levels 99.5 % of a layer's mask must be equal and the weights both keep
agree within 1e-4; FLAP's metrics agree within 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.levels import tyr
from methods.levels._database import Writer
from methods.progress import Progress
from methods.prune import flap
from methods.prune._hessian import Gram
from methods.prune._refit import refit
from methods.prune._structured import Part, kept_units, parts
from tests.parity.cases import agree
from tests.parity.pruning import LINEAR, META, arrays, calibration, inputs, records, tiny_llama

RELATIVE = 1e-4
SHARE_EQUAL = 0.995


def probe(record: Mapping[str, Any]) -> bool:
    """Whether a record is a finding about the released code and has no weights."""
    return "equals_dense" in record


def of_layer(record: Mapping[str, Any]) -> str:
    return str(record["key"]).partition("/")[0]


def matrix(layer: str) -> tuple[Tensor, Tensor]:
    """Weight [out,in] and Gram matrix [in,in] of a layer, whose inputs come sequence by sequence."""
    found = arrays("tyr_local")
    gram = Gram()
    for sequence in torch.tensor(found[f"{layer}/X"]):
        gram.add(sequence)
    return torch.tensor(found[f"{layer}/W"]), gram.gram


def staying(weight: Tensor, groups: int) -> list[int]:
    """The groups of inputs that have any weight."""
    alive = (weight.unflatten(1, (groups, -1)) != 0).flatten(2).any(dim=2).any(dim=0)
    return [int(index) for index in alive.nonzero().flatten()]


# --- the local pruner -----------------------------------------------------------------------------------------


LOCAL = [case for case in records("tyr_local") if not probe(case.values[1])]
PROBES = [case for case in records("tyr_local") if probe(case.values[1])]


def kept(record: Mapping[str, Any]) -> int:
    """How many groups stay: told, or by the released code's rule from a sparsity."""
    if "keep" in record:
        return int(record["keep"])
    return kept_units(record["groups"], record["sparsity"], "official", of_layer(record))


@cache
def refitted(layer: str, groups: int, rounds: int) -> dict[int, Tensor]:
    """Everything that is asked of a layer with that many rounds, from one call."""
    asked = [record for record in LINEAR["tyr_local"] if not probe(record) and of_layer(record) == layer]
    wanted = {kept(record) for record in asked if record["update_iter"] == rounds}
    return refit(*matrix(layer), groups, sorted(wanted), rounds)


@pytest.mark.parametrize(("group", "record"), LOCAL)
def test_the_groups_that_stay_and_their_weights_are_the_official_ones(
    group: str, record: dict[str, Any]
) -> None:
    expected = torch.tensor(arrays(group)[record["key"]])
    found = refitted(of_layer(record), record["groups"], record["update_iter"])[kept(record)]
    assert kept(record) == record.get("kept_groups", record.get("keep"))
    assert staying(found, record["groups"]) == staying(expected, record["groups"])
    if "kept_ids" in record:
        assert staying(found, record["groups"]) == record["kept_ids"]
    largest = float(matrix(of_layer(record))[0].abs().max())
    agree(found, expected, relative=0.0, absolute=RELATIVE * largest, what=record["key"])


@pytest.mark.parametrize(("group", "record"), [case for case in LOCAL if "prune_loss" in case.values[1]])
def test_the_loss_of_what_stays_is_the_official_one(group: str, record: dict[str, Any]) -> None:
    """Half the squared error of the damped problem, without the constant of the dense weights."""
    weight, gram = (tensor.double() for tensor in matrix(of_layer(record)))
    found = refitted(of_layer(record), record["groups"], record["update_iter"])[kept(record)].double()
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    loss = ((0.5 * found - weight) @ hessian * found).sum()
    assert float(loss) == pytest.approx(record["prune_loss"], rel=RELATIVE)


@pytest.mark.parametrize(("group", "record"), PROBES)
def test_the_released_error_accumulation_leaves_the_layer_dense_and_so_does_ours_by_default(
    group: str, record: dict[str, Any]
) -> None:
    """What the record says of the released code is what ``error_propagation="none"`` is documented to be."""
    assert record["equals_dense"] and not record["equals_level_0p5"]
    assert tyr.Config(data="case", sparsity=0.5).error_propagation == "none"
    assert "released" in (tyr.__doc__ or "") and "--error_accumulation" in (tyr.__doc__ or "")


# --- the supernet of a whole model ----------------------------------------------------------------------------

needs_levels = pytest.mark.skipif(
    "tyr_levels_kept_groups" not in META, reason="this folder has no levels of Týr"
)


def settings(budget: str, numel: int) -> tyr.Config:
    """The options with which the levels of a budget were made; a step is given as a number of weights."""
    step = META["tyr_weights_diff"]["mha" if budget == "heads" else "mlp"] / numel
    return tyr.Config(
        data="case",
        sparsity=META["tyr_weights_diff"]["sparsity"],
        step=step,
        levels=META["tyr_weights_diff"]["num_sparsity_levels"],
        least_neurons=1,
        heads="query",
        rounding="official",
    )


def plan(found: Sequence[Part]) -> dict[str, dict[str, int]]:
    """The removed units of all levels."""
    planned: dict[str, dict[str, int]] = {}
    for budget in dict.fromkeys(part.budget for part in found):
        members = [part for part in found if part.budget == budget]
        config = settings(budget, members[0].linear.weight.numel())
        planned |= tyr.planned(config, members, tyr.centres(config, members, None))
    return planned


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Sequence[Part], Writer]:
    """The tiny Llama after its levels were written, its parts and the levels."""
    folder, model = tmp_path_factory.mktemp("supernet"), tiny_llama()
    found = parts(model, "query", "levels.tyr")
    writer = Writer(folder / "levels", tyr.KIND)
    config = settings(found[0].budget, found[0].linear.weight.numel())
    tyr.build_on(config, model, found, plan(found), calibration(), Progress(folder, 0), writer)
    return model, found, writer


@needs_levels
def test_every_level_keeps_as_many_groups_as_the_official_supernet(
    supernet: tuple[Any, Sequence[Part], Writer],
) -> None:
    _, found, writer = supernet
    removed = plan(found)
    counts = {
        part.name: {level: part.count - gone for level, gone in removed[part.name].items()} for part in found
    }
    assert counts == META["tyr_levels_kept_groups"]
    for part in found:
        for level, count in counts[part.name].items():
            assert len(staying(writer.weight(part.name, level), part.count)) == count


@needs_levels
def test_the_levels_of_a_whole_model_are_the_official_ones(
    supernet: tuple[Any, Sequence[Part], Writer],
) -> None:
    _, _, writer = supernet
    for key, values in arrays("tiny_llama_tyr_levels").items():
        name, _, level = key.rpartition("/")
        expected, found = torch.tensor(values), writer.weight(name, level)
        equal = (found == 0) == (expected == 0)
        assert float(equal.double().mean()) >= SHARE_EQUAL, key
        assert int((found == 0).sum()) == int((expected == 0).sum()), key
        agree(found[equal], expected[equal], relative=0.0, absolute=RELATIVE, what=key)


@needs_levels
def test_the_model_is_dense_behind_its_supernet(supernet: tuple[Any, Sequence[Part], Writer]) -> None:
    model, dense = supernet[0].state_dict(), tiny_llama().state_dict()
    same = all(torch.equal(model[name], weight) for name, weight in dense.items())
    assert same == META["tyr_model_dense_after_supernet"]


# --- FLAP -----------------------------------------------------------------------------------------------------


def measured(case: str) -> flap.Fluctuation:
    """What the official code adds up of a case's inputs."""
    seen = flap.Fluctuation(official=True)
    for sequence in inputs(case)[1]:
        seen.add(sequence)
    return seen


@pytest.mark.parametrize(("group", "record"), records("flap_metrics"))
def test_flaps_metrics_and_means_are_the_official_ones(group: str, record: dict[str, Any]) -> None:
    expected, case = arrays(group), record["case"]
    seen = measured(case)
    found = flap.metric(record["metric"], seen, inputs(case)[0])
    agree(found, expected[record["key"]], relative=RELATIVE, absolute=0.0, what=record["key"])
    if f"{case}/baseline_inp" in expected:
        agree(seen.mean, expected[f"{case}/baseline_inp"], relative=RELATIVE, absolute=1e-6, what="means")
