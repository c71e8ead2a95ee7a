"""Reads the distillation parity data: each case in the precisions it is stored in, for the files that test it.

A test file chooses its cases with a function ``claims(case) -> bool`` and ``cases(claims)``; every case belongs to
exactly one file (``test_distillation.py`` looks after that). ``World`` holds the inputs in one precision; ``compare``
checks value and gradients of terms, computed by the very mixture that the loop calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.data import Part
from methods.distill._mixture import Mixture
from methods.distill._sources import Live, Source
from methods.find import catalogue
from methods.stage import Component, Terms
from methods.term import of
from methods.terms import total
from tests.parity.cases import Table, agree, arrays, flat, folder, leaf

FOLDER = folder("distillation")
CASES: list[dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())["cases"]
# as the data's README states it for float64
FLOAT64 = {"loss_rtol": 1e-9, "loss_atol": 1e-11, "grad_rtol": 1e-7, "grad_atol": 1e-10}
Case = dict[str, Any]


def cases(claims: Callable[[Case], bool]) -> list[Case]:
    """The cases that a test file claims."""
    return [case for case in CASES if claims(case)]


def name_of(case: Case) -> str:
    """For ``pytest.mark.parametrize(..., ids=name_of)``."""
    return str(case["case"])


def term(name: str, **options: Any) -> Component:
    """A term with its options; skips the test where there is no such term."""
    if f"term.{name}" not in catalogue().components:
        pytest.skip(f"not built yet: {name}")
    return of(name, **options)


def stored(case: Case) -> dict[str, Any]:
    """The arrays of a case by their short names."""
    return {name: arrays(FOLDER / case["file"])[key] for name, key in case["arrays"].items()}


def precisions(case: Case) -> Iterator[tuple[torch.dtype, str, dict[str, float]]]:
    """(type, ending of the stored names, tolerances): the case's own, and float64 where that is stored beside it."""
    yield getattr(torch, case["dtype"]), "", case["tolerance"]
    if any(name.endswith("_f64") for name in case["arrays"]):
        yield torch.float64, "_f64", FLOAT64


class World:
    """The inputs of all cases in one precision: leaves that collect gradients, and stubs of models made of them.

    ``part`` has the ids 0..B*T-1, so that a table answers with its own rows; ``ids`` [B,T] are the stored ones.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, absent: int = 0) -> None:
        """``absent``: how many of the last vocabulary entries are -inf in both models."""
        self.stored, self.dtype = arrays(FOLDER / "inputs.npz"), dtype
        self.student = self._logits("student_logits", absent)
        self.teacher = self._logits("teacher_logits", absent).detach()
        self.student_hidden = leaf(self.stored["student_hidden"], dtype)
        self.teacher_hidden = leaf(self.stored["teacher_hidden"], dtype).detach()
        self.ids = torch.as_tensor(self.stored["input_ids"])
        self.part = self.part_of("labels_hf", "attention_mask")

    def part_of(self, labels: str, attention: str | None = None, name: str = "train") -> Part:
        """A part with stored labels [B,T]; without a stored mask nothing is padding."""
        found = torch.as_tensor(self.stored[labels])
        ids = torch.arange(found.numel()).view_as(found)
        mask = torch.ones_like(found) if attention is None else torch.as_tensor(self.stored[attention])
        return Part(input_ids=ids, attention_mask=mask, labels=found, name=name)

    def _logits(self, name: str, absent: int) -> Tensor:
        values = self.stored[name].copy()
        values[..., values.shape[-1] - absent :] = -float("inf")
        return leaf(values, self.dtype)

    def array(self, name: str) -> Tensor:
        """A stored input in this precision, without gradient."""
        return torch.as_tensor(self.stored[name]).to(self.dtype)

    def models(self) -> tuple[Table, Table]:
        """Student and teacher as tables of logits and hidden states."""
        return table(self.student, self.student_hidden), table(self.teacher, self.teacher_hidden)

    def source(self) -> Live:
        """The teacher as a source."""
        return Live(self.models()[1])

    def ensemble(self) -> list[Table]:
        """The members of the ensemble."""
        return [table(member) for member in self.array("ensemble_teacher_logits")]

    def batch(self, part: Part | None = None, **more: Any) -> Any:
        """A batch with that part (default: the one of all cases) as ``train``; ``more``: other parts, step, values."""
        return SimpleNamespace(**({"train": part or self.part, "step": 0, "steps": 1, "values": {}} | more))

    def terms(
        self,
        chosen: Sequence[Component] | Mapping[str, Component],
        source: Source | None = None,
        batch: Any = None,
        block_tokens: int | None = None,
    ) -> Terms:
        """The terms of a mixture on these models."""
        mixture = Mixture(chosen, block_tokens=block_tokens)
        return mixture.terms(self.models()[0], source or self.source(), batch or self.batch())

    def masked(self) -> Part:
        """The same part with nothing to predict."""
        return replace(self.part, labels=torch.full_like(self.part.labels, -100))


def table(logits: Tensor, hidden: Tensor | None = None) -> Table:
    """A model that answers with logits [B,T,V] and hidden states [L+1,B,T,H] of ids 0..B*T-1."""
    return Table(flat([logits]), () if hidden is None else tuple(flat([state]) for state in hidden))


def compare(
    terms: Terms,
    world: World,
    expected: Mapping[str, Any],
    ending: str,
    tolerance: Mapping[str, float],
    *,
    plus: Tensor | float = 0.0,
    divide: float = 1.0,
) -> None:
    """The stored ``loss`` and gradients of one case in one precision against the total of these terms.

    Args:
        plus: what the source's value has beside ours, such as a teacher's entropy.
        divide: what our total is divided by where a source divides by something else.
    """
    near = {"relative": tolerance["loss_rtol"], "absolute": tolerance["loss_atol"]}
    value = total(terms) / divide
    value.backward()
    if "loss" + ending in expected:
        agree(value + plus, expected["loss" + ending], **near, what="loss" + ending)
    near = {"relative": tolerance["grad_rtol"], "absolute": tolerance["grad_atol"]}
    for name, tensor in (
        ("grad_student_logits", world.student),
        ("grad_student_hidden", world.student_hidden),
    ):
        if name + ending in expected:
            gradient = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
            agree(gradient, expected[name + ending], **near, what=name + ending)


def entropy(world: World, temperature: float = 1.0) -> Tensor:
    """The teacher's mean entropy over the answer tokens, which codes that return a cross-entropy leave in."""
    log_p = (world.teacher[:, :-1][world.part.mask] / temperature).log_softmax(-1)
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1).mean()
