"""Terms on hidden states and attention against the authors' code and own definitions: value and gradients.

Run with ``pytest tests/parity/test_distillation_hidden.py``. The whole of SquareHead's released loss is here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.data import Part
from methods.stage import Component, Parent, Terms
from methods.term import Look, View, entries, weight_of
from methods.term._attention import Attended
from methods.terms import total
from tests.parity.cases import agree, arrays, leaf, method
from tests.parity.distillation import FOLDER, Case, World, cases, compare, name_of, precisions, stored, term

# Our names of terms where the data stores one on its own.
PARTS = {"ce": "cross_entropy", "kldiv": "kl", "squarehead": "squarehead"}


def claims(case: Case) -> bool:
    """Hidden states, attention and ND, and every case of SquareHead's code."""
    return case["function"] in CHOSEN or case["function"].startswith(("MiniLM", "DirectNormLoss"))


def layers() -> int:
    """How many layers there are beside the embedding's output."""
    return int(arrays(FOLDER / "inputs.npz")["student_hidden"].shape[0]) - 1


# --- hidden states --------------------------------------------------------------------------------------------


def released(hyper: Mapping[str, Any]) -> Mapping[str, Component]:
    """SparseFinetuning's total, with its KL one position late."""
    names = {"cross_entropy": "hardness_ce", "kl": "hardness_kldiv", "squarehead": "hardness_squarehead"}
    weights = {name: float(hyper[key]) for name, key in names.items()}
    return recipe(**weights, temperature=float(hyper["temperature"]), kl_labels="unshifted")


def corrected_kl(hyper: Mapping[str, Any]) -> Mapping[str, Component]:
    """Its KL alone, on the right positions."""
    return recipe(cross_entropy=0.0, kl=1.0, squarehead=0.0, temperature=float(hyper["temperature"]))


def squarehead_mean(hyper: Mapping[str, Any]) -> Mapping[str, Component]:
    """The mean over layers instead of their sum."""
    return recipe(cross_entropy=0.0, kl=0.0, squarehead=1.0 / layers())


def layerwise(hyper: Mapping[str, Any]) -> Mapping[str, Component]:
    """AST's term: every state it is given, padding counted; upstream the first is no embedding's output."""
    pairs = tuple((layer, layer) for layer in range(layers() + 1))
    return {"squarehead": term("squarehead", layers=pairs, padding=True)}


def recipe(**options: Any) -> Mapping[str, Component]:
    """The terms of ``distill.squarehead``."""
    module = method("distill.squarehead")
    found: Mapping[str, Component] = module.terms(
        module.Config(teacher=Parent("teacher-000000000000"), **options)
    )
    return found


CHOSEN: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Component]]] = {
    "KnowledgeDistillation.apply": released,
    "kldiv_loss": corrected_kl,
    "squarehead_mean": squarehead_mean,
    "Distill_Model.layerwise_loss": layerwise,
    "mse": lambda hyper: {"hidden_mse": term("hidden_mse")},
    "cosine": lambda hyper: {"hidden_cosine": term("hidden_cosine")},
}


@pytest.mark.parametrize("case", cases(lambda case: case["function"] in CHOSEN), ids=name_of)
def test_hidden_states_cost_what_the_source_says(case: Case) -> None:
    chosen, expected = CHOSEN[case["function"]](case["hyper"]), stored(case)
    for kind, ending, tolerance in precisions(case):
        world = World(kind)
        terms = world.terms(chosen)
        compare(terms, world, expected, ending, tolerance)
        for name in PARTS.keys() & expected.keys():
            compare_part(name, terms, case["hyper"], expected[name], tolerance)


def compare_part(
    name: str, terms: Terms, hyper: Mapping[str, Any], expected: Any, tolerance: Mapping[str, float]
) -> None:
    """One part of the loss where it takes part at all; upstream stores it with T**2 and without its weight."""
    parts = [each for key, each in terms.items() if key.partition(".")[0] == PARTS[name]]
    if parts:
        squared = float(hyper["temperature"]) ** 2 if name == "kldiv" else 1.0
        unweighted = torch.stack([each.sum / each.count for each in parts]).sum() * squared
        agree(
            unweighted, expected, relative=tolerance["loss_rtol"], absolute=tolerance["loss_atol"], what=name
        )


# --- attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(lambda case: case["function"].startswith("MiniLM")), ids=name_of)
def test_minilm_compares_attention_as_defined(case: Case) -> None:
    expected = stored(case)
    for kind, ending, tolerance in precisions(case):
        tensors = {
            name: leaf(arrays(FOLDER / "inputs.npz")[f"attn_{name}"], kind)
            for name in ("sq", "sk", "sv", "tq", "tk", "tv")
        }
        terms = minilm_terms(attended(tensors, "s"), attended(tensors, "t"), bool(case["hyper"]["causal"]))
        means = {name: value.mean() for name, value in terms.items()}
        loss = means["attention"] + means["values"]
        loss.backward()
        near = {"relative": tolerance["loss_rtol"], "absolute": tolerance["loss_atol"]}
        named = {
            "loss": loss,
            "attention_term": means["attention"],
            "value_relation_term": means["values"],
        }
        for name, value in named.items():
            if name + ending in expected:
                agree(value, expected[name + ending], **near, what=name + ending)
        near = {"relative": tolerance["grad_rtol"], "absolute": tolerance["grad_atol"]}
        for name, tensor in tensors.items():
            if f"grad_attn_{name}{ending}" in expected:
                agree(tensor.grad, expected[f"grad_attn_{name}{ending}"], **near, what=f"gradient of {name}")


def attended(tensors: Mapping[str, Tensor], whose: str) -> Attended:
    query, key, value = (tensors[whose + letter] for letter in "qkv")
    return Attended(query, key, value, query.shape[-1] ** -0.5)


def minilm_terms(student: Attended, teacher: Attended, causal: bool) -> Mapping[str, Tensor]:
    """The term as the loop calls it; of a model that sees the future, which no language model does, its pieces."""
    module = entries([term("minilm")])[0].module
    rows, _, length, _ = student.query.shape
    ones = torch.ones(rows, length, dtype=torch.int64)
    if not causal:
        found: Mapping[str, Tensor] = module.divergences(
            student, teacher, module.allowed(ones.bool(), causal=False)
        )
        return found
    look = Look(torch.zeros(rows, length, 1), lambda block: block)
    part = Part(input_ids=ones, attention_mask=ones, labels=ones, name="train")
    seen = View(
        part,
        Look(look.states, look.head, attention=[student]),
        Look(look.states, look.head, attention=[teacher]),
    )
    return {name: each.sum / each.count for name, each in module.terms(module.Config(), seen).items()}


# --- ND -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", cases(lambda case: case["function"].startswith("DirectNormLoss")), ids=name_of
)
def test_nd_equals_the_official_one(case: Case) -> None:
    """Its samples are the answer tokens of one sequence, its classes the tokens."""
    expected = stored(case)
    entry = entries([term("nd", weight=float(case["hyper"]["nd_loss_factor"]))])[0]
    for kind, ending, tolerance in precisions(case):
        inputs = {name: torch.as_tensor(value) for name, value in arrays(FOLDER / "inputs.npz").items()}
        student = leaf(inputs["student_emb"].numpy(), kind)
        means = inputs["class_means"].to(kind)
        classes = torch.arange(len(means))
        memory = entry.module.directions(classes.tolist(), iter([(means, classes)]))
        part = sequence(inputs["emb_class"])
        seen = View(part, look_of(student), look_of(inputs["teacher_emb"].to(kind)), memory=memory)
        loss = total(entry.module.terms(entry.config, seen)) * weight_of(entry.config)
        loss.backward()
        near = {"relative": tolerance["loss_rtol"], "absolute": tolerance["loss_atol"]}
        agree(loss, expected["loss" + ending], **near, what="loss" + ending)
        near = {"relative": tolerance["grad_rtol"], "absolute": tolerance["grad_atol"]}
        agree(student.grad, expected["grad_student_emb" + ending], **near, what="gradient" + ending)


def sequence(classes: Tensor) -> Part:
    """One sequence whose targets are these classes."""
    labels = torch.cat([torch.tensor([-100]), classes])[None]
    return Part(
        input_ids=torch.zeros_like(labels),
        attention_mask=torch.ones_like(labels),
        labels=labels,
        name="train",
    )


def look_of(states: Tensor) -> Look:
    """States [N,H] at the positions that predict the targets, and one more at the last position."""
    return Look(torch.cat([states, torch.zeros_like(states[:1])])[None], lambda block: block)
