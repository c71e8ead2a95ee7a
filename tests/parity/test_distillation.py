"""Distillation losses against the authors' code: value and gradients.

Run with ``pytest tests/parity/test_distillation.py``. ``cases.json`` names each case's arrays, options, origin,
precision and tolerance. Official float32 cases with an own float64 evaluation beside them (``*_f64``) are
compared in both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.data import Part
from methods.stage import Parent
from methods.terms import total
from tests.parity.cases import Table, agree, arrays, folder, leaf, method

FOLDER = folder("distillation")
CASES: list[dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())["cases"]
# as the data's README states it for float64
FLOAT64 = {"loss_rtol": 1e-9, "loss_atol": 1e-11, "grad_rtol": 1e-7, "grad_atol": 1e-10}
# our names of terms where the data stores one on its own, and whether the stored one contains our weight
PARTS = {"ce": "cross_entropy", "kldiv": "kl", "kl_T2": "kl", "squarehead": "squarehead"}
Recipe = tuple[str, dict[str, Any]]


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_loss_equals_the_official_one(case: dict[str, Any]) -> None:
    full_name, options = recipe(case)
    module = method(full_name)
    if options is None:
        pytest.fail(
            f"{full_name} exists, but tests/parity/test_distillation.py does not know the options of its cases"
        )
    config = module.Config(teacher=Parent("teacher-000000000000"), **options)
    stored = {name: arrays(FOLDER / case["file"])[key] for name, key in case["arrays"].items()}
    precisions = [(case["dtype"], "", case["tolerance"])]
    if "loss_f64" in stored:
        precisions.append(("float64", "_f64", FLOAT64))
    for dtype, ending, tolerance in precisions:
        world = World(getattr(torch, dtype), case["hyper"].get("neg_inf_last_columns", 0))
        compare(module.loss, config, world, stored, ending, tolerance, entropy_of(case, world))


class World:
    """The inputs of all cases in one precision, and the two models made of them."""

    def __init__(self, dtype: torch.dtype, absent: int) -> None:
        self.stored = arrays(FOLDER / "inputs.npz")
        self.student = self._logits("student_logits", dtype, absent)
        self.teacher = self._logits("teacher_logits", dtype, absent).detach()
        self.student_hidden = leaf(self.stored["student_hidden"], dtype)
        self.teacher_hidden = leaf(self.stored["teacher_hidden"], dtype).detach()
        labels = torch.as_tensor(self.stored["labels_hf"])
        ids = torch.arange(labels.numel()).view_as(labels)
        mask = torch.as_tensor(self.stored["attention_mask"])
        self.part = Part(input_ids=ids, attention_mask=mask, labels=labels, name="train")

    def _logits(self, name: str, dtype: torch.dtype, absent: int) -> Tensor:
        values = self.stored[name].copy()
        values[..., values.shape[-1] - absent :] = -float("inf")
        return leaf(values, dtype)

    def models(self) -> tuple[Table, Table]:
        student = Table(self.student.flatten(0, 1), tuple(self.student_hidden.flatten(1, 2)))
        return student, Table(self.teacher.flatten(0, 1), tuple(self.teacher_hidden.flatten(1, 2)))


def compare(
    loss: Callable[..., Any],
    config: Any,
    world: World,
    stored: dict[str, Any],
    ending: str,
    tolerance: dict[str, float],
    entropy: Tensor | float,
) -> None:
    """Value, stored parts and stored gradients of one case in one precision."""
    near = {"relative": tolerance["loss_rtol"], "absolute": tolerance["loss_atol"]}
    student, teacher = world.models()
    terms = loss(config, student, teacher, SimpleNamespace(train=world.part))
    value = total(terms)
    value.backward()
    if "total" in stored:  # per-token sums and counts, before the division
        agree(terms["kl"].sum, stored["total"], **near, what="sum over tokens")
        assert terms["kl"].count == float(stored["count"])
    for name in {"loss" + ending} & stored.keys():
        agree(value + entropy, stored[name], **near, what=name)
    for name in PARTS.keys() & stored.keys():
        compare_part(name, terms, config, stored[name], near)
    near = {"relative": tolerance["grad_rtol"], "absolute": tolerance["grad_atol"]}
    for name, tensor in (
        ("grad_student_logits", world.student),
        ("grad_student_hidden", world.student_hidden),
    ):
        if name + ending in stored:
            gradient = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
            agree(gradient, stored[name + ending], **near, what=name + ending)


def compare_part(name: str, terms: Any, config: Any, expected: Any, near: dict[str, float]) -> None:
    """One part of the loss, where it takes part at all; upstream stores it with T**2 and without its weight."""
    parts = {key: term for key, term in terms.items() if key.partition(".")[0] == PARTS[name]}
    if parts:
        squared = config.temperature**2 if PARTS[name] == "kl" else 1.0
        unweighted = sum(term.sum / term.count for term in parts.values()) * squared
        agree(unweighted, expected, **near, what=name)


def entropy_of(case: dict[str, Any], world: World) -> Tensor | float:
    """The teacher's entropy over the answer tokens, which codes that return a cross-entropy leave in."""
    if case["function"] != "forward_kl":
        return 0.0
    log_p = world.teacher[:, :-1][world.part.mask].log_softmax(-1)
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1).mean()


def recipe(case: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The method and options a case asks for; None for a method this file has no options of."""
    for choose in (forward_kl, squarehead):
        options = choose(case["function"], case["hyper"])
        if options is not None:
            return f"distill.{choose.__name__}", options
    return f"distill.{family(case)}", None


def forward_kl(function: str, hyper: dict[str, Any]) -> dict[str, Any] | None:
    """Every way in which the sources write the forward KL with the mean over answer tokens."""
    if function == "forward_kl":
        return {}
    if function == "GKDTrainer.generalized_jsd_loss" and hyper.get("beta") == 0:
        usual = (
            hyper.get("reduction") == "batchmean"
            and "labels" not in hyper
            and "num_items_in_batch" not in hyper
        )
        return {"temperature": hyper["temperature"], "scale_by_temperature": False} if usual else None
    if function.startswith("(1-alpha)*CE + alpha*T^2*KL"):
        return {"alpha": hyper["alpha"], "temperature": hyper["T"]}
    if function == "KDLoss.forward":
        # torchdistill's alpha is the weight of the cross-entropy, and without it there is no T**2; ND's code has only T
        temperature = float(hyper.get("temperature", hyper.get("T")))
        scaled = {"scale_by_temperature": "alpha" in hyper or "T" in hyper}
        return {"alpha": 1.0 - hyper.get("alpha", 0.0), "temperature": temperature} | scaled
    if function.startswith("per-token forward KL"):
        return {}
    return None


def squarehead(function: str, hyper: dict[str, Any]) -> dict[str, Any] | None:
    """The official total (with its KL one position late), its KL alone on the right positions, and the layer mean."""
    if function == "KnowledgeDistillation.apply":
        names = {"cross_entropy": "hardness_ce", "kl": "hardness_kldiv", "squarehead": "hardness_squarehead"}
        weights = {name: float(hyper[key]) for name, key in names.items()}
        return weights | {"temperature": float(hyper["temperature"]), "kl_labels": "unshifted"}
    if function == "kldiv_loss":
        return {
            "cross_entropy": 0.0,
            "kl": 1.0,
            "squarehead": 0.0,
            "temperature": float(hyper["temperature"]),
        }
    if function == "squarehead_mean":
        layers = arrays(FOLDER / "inputs.npz")["student_hidden"].shape[0] - 1
        return {"cross_entropy": 0.0, "kl": 0.0, "squarehead": 1.0 / layers}
    return None


def family(case: dict[str, Any]) -> str:
    """A word for a method that is not here, made of the case's name without its options."""
    return re.sub(r"[^a-z0-9]+", "_", re.split(r"_(?=[a-zA-Z]+\d*\.?\d)", case["case"])[0].lower()).strip("_")
