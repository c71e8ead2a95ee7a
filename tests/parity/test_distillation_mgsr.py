"""MGSR's pieces against the definitions that the data set gives; no official code is known: value and gradients.

Run with ``pytest tests/parity/test_distillation_mgsr.py``.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from methods.distill._mixture import Mixture
from tests.parity.cases import agree, method
from tests.parity.distillation import Case, World, cases, compare, name_of, precisions, stored, term

CLIPPED, SPANS, ERRORS = "hard-clipped DAC-KL", "span-level correlation consistency", "SCRG error token"


def claims(case: Case) -> bool:
    """Clipped divergences, spans and error positions."""
    return case["function"].startswith((CLIPPED, SPANS, ERRORS))


def named(function: str) -> list[Case]:
    return cases(lambda case: case["function"].startswith(function))


@pytest.mark.parametrize("case", named(CLIPPED), ids=name_of)
def test_the_clipped_divergence_agrees(case: Case) -> None:
    bounds = {name: float(case["hyper"][name]) for name in ("lower_quantile", "upper_quantile")}
    chosen = term("dac_kl", **bounds, keep_target=False, least_entries=1)
    for dtype, ending, tolerance in precisions(case):
        world, expected = World(dtype), stored(case)
        terms = world.terms([chosen])
        compare(terms, world, expected, ending, tolerance)
        kept = torch.as_tensor(expected["keep"])[:, :-1][world.part.mask]
        assert terms["dac_kl.kept"].sum.detach() == float(kept.sum())


@pytest.mark.parametrize("case", named(SPANS), ids=name_of)
def test_the_span_loss_agrees(case: Case) -> None:
    for dtype, ending, tolerance in precisions(case):
        world, expected = World(dtype), stored(case)
        # Every target gets an id of its own, so that a vocabulary can say where the stored spans begin.
        labels = world.part.input_ids.masked_fill(world.part.labels == -100, -100)
        mixture = Mixture([term("span_consistency")])
        mixture.prepare(spelling(expected["spans"], world))
        student, _ = world.models()
        terms = mixture.terms(student, world.source(), world.batch(replace(world.part, labels=labels)))
        assert terms["span_consistency"].count == case["hyper"].get("pairs", terms["span_consistency"].count)
        compare(terms, world, expected, ending, tolerance)


def spelling(spans: Any, world: World) -> Any:
    """What a term is prepared with: a vocabulary in which every token but those within a span begins a word.

    A span [row, start, end) is of positions; position t predicts token t + 1.
    """
    width = world.part.labels.shape[1]
    within = {
        int(row) * width + position + 1
        for row, start, end in spans
        for position in range(int(start) + 1, int(end))
    }
    entries = {
        f"{'' if number in within else chr(0x2581)}{number}": number
        for number in range(world.part.labels.numel())
    }
    return SimpleNamespace(
        tokenizer=SimpleNamespace(get_vocab=lambda: entries, all_special_ids=[]), device="cpu"
    )


@pytest.mark.parametrize("case", named(ERRORS), ids=name_of)
def test_the_error_position_agrees(case: Case) -> None:
    method("distill.mgsr")
    from methods.distill._revision import error_position

    world, expected = World(getattr(torch, case["dtype"])), stored(case)
    # The last position predicts nothing.
    mask = torch.nn.functional.pad(world.part.mask, (0, 1))
    found = error_position(world.student.detach(), world.teacher, mask)
    assert found.position.tolist() == expected["position"].tolist()
    there = found.position >= 0
    assert found.token[there].tolist() == torch.as_tensor(expected["teacher_token"])[there].tolist()
    near = {"relative": case["tolerance"]["loss_rtol"], "absolute": case["tolerance"]["loss_atol"]}
    agree(found.kl, expected["kl_per_token"], **near, what="kl_per_token")
