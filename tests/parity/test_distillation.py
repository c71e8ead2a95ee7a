"""Forward KL in all the ways its sources write it, and what is mixed with it, against their code: value and gradients.

Run with ``pytest tests/parity/test_distillation.py``. ``cases.json`` names each case's arrays, options, origin,
precision and tolerance. Official float32 cases with an own float64 evaluation beside them (``*_f64``) are
compared in both. Here it is also made sure that every case is compared in one file, and in one alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from methods.distill._running import mixture_of
from methods.distill._sources import Ensemble, Live, places, softened
from methods.find import catalogue
from methods.stage import Component, Parent, Terms
from methods.terms import total
from tests.parity.cases import agree
from tests.parity.distillation import (
    CASES,
    Case,
    World,
    cases,
    compare,
    entropy,
    name_of,
    precisions,
    stored,
    term,
)

# Our names of terms where the data stores one on its own.
PARTS = {"ce": "cross_entropy", "kldiv": "kl", "kl_T2": "kl", "squarehead": "squarehead"}
KINDS = {"prob_mean": "probabilities", "logit_mean": "logits"}
Options = Mapping[str, Any]


# --- what each code asks for ------------------------------------------------------------------------------------


def plain(hyper: Options) -> dict[str, Component]:
    return {"kl": term("forward_kl")}


def unscaled(hyper: Options) -> dict[str, Component]:
    """trl's, without T**2."""
    return {"kl": term("forward_kl", temperature=float(hyper["temperature"]), scale_by_temperature=False)}


def mixed(hyper: Options) -> dict[str, Component]:
    alpha = float(hyper["alpha"])
    return {
        "kl": term("forward_kl", weight=alpha, temperature=float(hyper["T"])),
        "cross_entropy": term("cross_entropy", weight=1 - alpha),
    }


def kd_loss(hyper: Options) -> dict[str, Component]:
    """torchdistill's alpha is the weight of the cross-entropy: without it neither T**2 nor beta. ND's has only T."""
    temperature, alpha = float(hyper.get("temperature", hyper.get("T"))), float(hyper.get("alpha") or 0.0)
    beta = hyper.get("beta")
    weight = float(1 - alpha if beta is None else beta) if alpha else 1.0
    scaled = alpha != 0 or "T" in hyper
    return {
        "kl": term("forward_kl", weight=weight, temperature=temperature, scale_by_temperature=scaled),
        "cross_entropy": term("cross_entropy", weight=alpha),
    }


def everywhere(hyper: Options) -> dict[str, Component]:
    """Adaptive-Sparse-Trainer's, on packed text."""
    return {"kl": term("forward_kl", temperature=float(hyper["temperature"]), positions="all")}


def matryoshka(hyper: Options) -> dict[str, Component]:
    weight, temperature = float(hyper["soft_target_loss_weight"]), float(hyper["T"])
    return {
        "kl": term("forward_kl", weight=weight, temperature=temperature, positions="all"),
        "cross_entropy": term("cross_entropy", weight=float(hyper["ce_loss_weight"])),
    }


READERS: dict[str, Callable[[Options], dict[str, Component]]] = {
    "forward_kl": plain,
    "forward KL to an ensemble teacher": plain,
    "per-token forward KL": plain,
    "GKDTrainer.generalized_jsd_loss": unscaled,
    "(1-alpha)*CE + alpha*T^2*KL": mixed,
    "KDLoss.forward": kd_loss,
    "Distill_Model.kl_loss": everywhere,
    "PcaLlamaDistillationTrainer.compute_loss": matryoshka,
}


def reader(case: Case) -> Callable[[Options], dict[str, Component]] | None:
    """Who reads the case's options: the name of its function may go on in words."""
    return next((found for name, found in READERS.items() if case["function"].startswith(name)), None)


def claims(case: Case) -> bool:
    """Whether this file tests the case; of trl's family only what is a plain forward KL."""
    if case["function"].startswith("GKDTrainer"):
        hyper = case["hyper"]
        usual = hyper.get("reduction") == "batchmean" and not {"labels", "num_items_in_batch"} & hyper.keys()
        return bool(hyper.get("beta") == 0 and usual)
    return reader(case) is not None


# --- the cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(claims), ids=name_of)
def test_loss_equals_the_official_one(case: Case) -> None:
    read, expected = reader(case), stored(case)
    assert read is not None
    for dtype, ending, tolerance in precisions(case):
        world = World(dtype, case["hyper"].get("neg_inf_last_columns", 0))
        terms = world.terms(read(case["hyper"]), source_of(case, world))
        # DistiLLM's value is a cross-entropy: it has the teacher's entropy in it.
        plus = entropy(world) if case["function"] == "forward_kl" else 0.0
        compare(terms, world, expected, ending, tolerance, plus=plus)


def source_of(case: Case, world: World) -> Any:
    """The teacher, or the ensemble that the case names."""
    mode = case["hyper"].get("mode")
    if mode not in KINDS:
        return None
    return Ensemble([Live(member) for member in world.ensemble()], KINDS[mode])


@pytest.mark.parametrize(
    "case", cases(lambda case: claims(case) and "per_token" in case["arrays"]), ids=name_of
)
@pytest.mark.parametrize("block_tokens", [1, 3, None])
def test_each_token_and_their_sum_equal_the_stored_ones(case: Case, block_tokens: int | None) -> None:
    expected, world = stored(case), World(getattr(torch, case["dtype"]))
    near = {"relative": case["tolerance"]["loss_rtol"], "absolute": case["tolerance"]["loss_atol"]}
    mask = torch.as_tensor(expected["mask"]).bool()
    assert places(world.part).index.tolist() == mask.flatten().nonzero().squeeze(1).tolist()
    found = world.terms(plain({}), block_tokens=block_tokens)["kl"]
    agree(found.sum, expected["total"], **near, what="sum over tokens")
    assert found.count == float(expected["count"])
    module = catalogue().component("term", "forward_kl").load()
    log_p, log_q = (softened(logits, 1.0) for logits in (world.teacher, world.student))
    values = module.divergence(module.Config(), log_p.flatten(0, 1), log_q.flatten(0, 1))
    stored_values = torch.as_tensor(expected["per_token"]).flatten()[mask.flatten()]
    agree(values[mask.flatten()], stored_values, **near, what="per token")


# --- recipes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A method of the family and its options."""

    name: str
    options: dict[str, Any]

    def terms(self, world: World) -> Terms:
        method = catalogue().method(f"distill.{self.name}").load()
        config = method.Config(teacher=Parent("teacher-000000000000"), **self.options)
        return mixture_of(method, config).terms(world.models()[0], world.source(), world.batch())


def recipe(case: Case) -> Recipe | None:
    """The method that does the same as the code of a case; None where none does."""
    function, hyper = case["function"], case["hyper"]
    if function.startswith("(1-alpha)*CE + alpha*T^2*KL"):
        return Recipe("forward_kl", {"alpha": float(hyper["alpha"]), "temperature": float(hyper["T"])})
    if function == "KnowledgeDistillation.apply":
        names = {"cross_entropy": "hardness_ce", "kl": "hardness_kldiv", "squarehead": "hardness_squarehead"}
        weights = {name: float(hyper[key]) for name, key in names.items()}
        return Recipe(
            "squarehead", weights | {"temperature": float(hyper["temperature"]), "kl_labels": "unshifted"}
        )
    if function == "kldiv_loss":
        weights = {"cross_entropy": 0.0, "kl": 1.0, "squarehead": 0.0}
        return Recipe("squarehead", weights | {"temperature": float(hyper["temperature"])})
    return None


@pytest.mark.parametrize("case", cases(lambda case: recipe(case) is not None), ids=name_of)
def test_a_recipe_equals_the_official_loss(case: Case) -> None:
    chosen, expected = recipe(case), stored(case)
    assert chosen is not None
    for dtype, ending, tolerance in precisions(case):
        world = World(dtype)
        terms = chosen.terms(world)
        compare(terms, world, expected, ending, tolerance)
        for name in PARTS.keys() & expected.keys():
            compare_part(name, terms, chosen.options["temperature"], expected[name], tolerance)


def compare_part(
    name: str, terms: Terms, temperature: float, expected: Any, tolerance: Mapping[str, float]
) -> None:
    """A part that is stored on its own, where it takes part at all: without our weight, but with T**2."""
    near = {"relative": tolerance["loss_rtol"], "absolute": tolerance["loss_atol"]}
    means = [part.sum / part.count for key, part in terms.items() if key.partition(".")[0] == PARTS[name]]
    if means:
        squared = temperature**2 if PARTS[name] == "kl" else 1.0
        agree(sum(means[1:], start=means[0]) * squared, expected, **near, what=name)


# --- all cases --------------------------------------------------------------------------------------------------


def claimants() -> list[ModuleType]:
    """The test files that claim cases."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_distillation*.py"))
    found = [importlib.import_module(f"tests.parity.{name}") for name in names]
    return [module for module in found if hasattr(module, "claims")]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_case_is_compared_in_one_file(case: Case) -> None:
    found = [module.__name__ for module in claimants() if module.claims(case)]
    if not found:
        pytest.skip(f"not built yet: {case['function']}")
    assert len(found) == 1, found


def test_a_fully_masked_part_adds_nothing() -> None:
    world = World(torch.float64)
    chosen = [term("forward_kl"), term("cross_entropy")]
    value = total(world.terms(chosen, batch=world.batch(world.masked())))
    value.backward()
    assert value == 0
    assert world.student.grad is not None
    assert not world.student.grad.any()
