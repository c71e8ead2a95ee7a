"""Teachers of which the largest entries were kept, and the student's own past: value and gradients.

Run with ``pytest tests/parity/test_distillation_topk.py``; ``distillation.py`` says how the cases are read.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.data import Example
from methods.distill._mixture import Mixture
from methods.distill._past import likeliest, trajectory_losses
from methods.distill._sources import Places
from methods.stage import Term
from methods.teacher import logits
from methods.teacher._files import top_log_probs
from tests.parity.cases import agree
from tests.parity.distillation import (
    Case,
    World,
    cases,
    compare,
    name_of,
    precisions,
    stored,
    table,
    term,
)

# What the data calls them, and we.
RESTS = {"renorm": "renormalised", "raw": "raw", "tail": "tail"}


def claims(case: Case) -> bool:
    """The cases of this file: a teacher's largest entries, and SAF's trajectory."""
    return case["function"].startswith("forward KL against cached teacher top-k") or (
        "trajectory" in case["function"] and "SAF" in str(case["path"])
    )


TOP_K = [case for case in cases(claims) if "mode" in case["hyper"]]
PAST = [case for case in cases(claims) if "mode" not in case["hyper"]]


class Kept:
    """A source of stored largest entries, indices and log-probabilities [B,T,k]."""

    def __init__(self, indices: Tensor, log_p: Tensor) -> None:
        self.indices, self.log_p = indices, log_p

    def said(self, part: Any, places: Places, hidden: bool = False, attention: bool = False) -> Any:
        found = [each.flatten(0, 1)[places.index] for each in (self.indices, self.log_p)]
        return SimpleNamespace(look=None, top=lambda rows, temperature: (found[0][rows], found[1][rows]))

    def forget(self) -> None:
        pass


@pytest.mark.parametrize("case", TOP_K, ids=name_of)
@pytest.mark.parametrize("block_tokens", [None, 2])
def test_loss_against_the_largest_entries(case: Case, block_tokens: int | None) -> None:
    expected, hyper = stored(case), case["hyper"]
    chosen = term("forward_kl", temperature=float(hyper["T"]), rest=RESTS[hyper["mode"]])
    for dtype, ending, tolerance in precisions(case):
        world = World(dtype)
        log_p = torch.as_tensor(expected["teacher_logprobs_topk"]).to(dtype)
        source: Any = Kept(torch.as_tensor(expected["indices"]), log_p)
        compare(world.terms([chosen], source, block_tokens=block_tokens), world, expected, ending, tolerance)


@pytest.mark.parametrize("case", TOP_K, ids=name_of)
def test_what_is_recorded_are_the_stored_entries(case: Case) -> None:
    expected, temperature = stored(case), float(case["hyper"]["T"])
    world = World(torch.float32)
    config = logits.Config(top_k=case["hyper"]["k"], temperatures=(temperature,))
    said = logits.kept(config, world.teacher.flatten(0, 1), None)
    assert said["indices"].equal(torch.as_tensor(expected["indices"]).flatten(0, 1))
    agree(
        top_log_probs(said, 0, temperature),
        expected["teacher_logprobs_topk"],
        relative=2e-5,
        absolute=2e-6,
        what="log-probabilities",
    )


# --- SAF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PAST, ids=name_of)
def test_trajectory_equals_the_official_one(case: Case) -> None:
    """The function that the term calls, with every entry kept: in the precisions that are stored."""
    temperature, strength = float(case["hyper"]["temperature"]), float(case["hyper"]["reinforce"])
    for dtype, ending, tolerance in precisions(case):
        world = World(dtype)
        now, past = (each[:, :-1][world.part.mask] for each in (world.student, world.teacher))
        losses = trajectory_losses(now, *likeliest(past, now.shape[-1], temperature), temperature)
        found = Term(losses.sum(), world.part.tokens, strength * temperature**2)
        compare({"own_past": found}, world, stored(case), ending, tolerance)


@pytest.mark.parametrize("case", PAST, ids=name_of)
def test_the_term_remembers_what_the_trajectory_starts_from(case: Case) -> None:
    """An epoch in which the student says what the data calls the past, and the next, with what it says now."""
    hyper, (dtype, ending, tolerance) = case["hyper"], next(precisions(case))
    world = World(dtype)
    entries = world.student.shape[-1]
    chosen = term(
        "own_past",
        weight=float(hyper["reinforce"]),
        temperature=float(hyper["temperature"]),
        past_epochs=1,
        start_epoch=-1,
        top_k=entries,
    )
    part = replace(world.part, numbers=torch.arange(len(world.part.labels)))
    labels = [tuple(row) for row in world.part.labels.tolist()]
    mixture = Mixture([chosen])
    setting: Any = SimpleNamespace(
        student=nn.Linear(1, 1),
        examples=[Example(row, row) for row in labels],
        config=SimpleNamespace(batch=len(labels)),
        steps=2,
        mixture=SimpleNamespace(vocabulary=entries, entries=[SimpleNamespace(config=None, weight=1.0)]),
    )
    mixture.prepare(setting)
    before = table(world.teacher.clone().requires_grad_())
    assert mixture.terms(before, None, world.batch(part, step=0)) == {}
    now = mixture.terms(table(world.student), None, world.batch(part, step=1))
    compare(now, world, stored(case), ending, tolerance)
