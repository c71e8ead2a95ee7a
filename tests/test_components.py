"""Every component and every evaluation, found by where its file lies: it does its work and every option is live."""

from __future__ import annotations

import math
import re
from functools import cache

import pytest

from methods.find import Found, catalogue
from methods.stage import Row
from tests.generic import LAST_BITS, Case, cases, run_component, score, scored_model, usual_component
from workflows.notation import Call

COMPONENTS = list(catalogue().components.values())
EVALUATIONS = list(catalogue().evaluations.values())
COMPONENT_CASES = [case for found in COMPONENTS for case in cases(found)]
EVALUATION_CASES = [case for found in EVALUATIONS for case in cases(found)]
BETTER = ("higher", "lower", "closer_to_0", "closer_to_1", "")


def name_of(found: Found) -> str:
    return found.name


# --- components ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", COMPONENTS, ids=name_of)
def test_the_loss_falls_with_it(found: Found) -> None:
    gently = {"batch": 18, "optimizer": Call("adamw", (("learning_rate", 0.001),))}
    outcome = run_component(found, parent="other", beside=gently)
    assert outcome.curve
    # Where the objective is no sum of terms, it stands beside them and they may go either way.
    whole = {name: values for name, values in outcome.curve.items() if name == "loss"}
    for name, values in (whole or outcome.curve).items():
        assert values[-1] < values[0], name


@pytest.mark.parametrize("found", COMPONENTS, ids=name_of)
def test_a_component_gives_the_same_bits_twice(found: Found) -> None:
    assert run_component(found).result == usual_component(found.name).result


@pytest.mark.parametrize("case", COMPONENT_CASES, ids=str)
def test_every_option_of_a_component_is_live(case: Case) -> None:
    beside, host = dict(case.change.beside), case.change.host
    plain = not beside and not host
    before = usual_component(case.found.name) if plain else run_component(case.found, beside=host, **beside)
    after = run_component(case.found, beside=host, **beside | {case.option.name: case.change.value})
    if case.option.how:
        assert after.same_weights(before, tolerance=1e-6)
    else:
        assert after.result != before.result


# --- evaluations -----------------------------------------------------------------------------------------------


@cache
def usual(name: str) -> tuple[Row, ...]:
    return tuple(score(name))


@pytest.mark.parametrize("found", EVALUATIONS, ids=name_of)
def test_rows_are_numbers_with_a_name_and_a_unit(found: Found) -> None:
    rows = usual(found.name)
    assert rows
    assert len({(row.task, row.metric) for row in rows}) == len(rows)
    for row in rows:
        assert math.isfinite(row.value), row
        assert row.stderr is None or (math.isfinite(row.stderr) and row.stderr >= 0), row
        assert row.n is None or (type(row.n) is int and row.n >= 1), row
        assert re.fullmatch(r"[a-z][a-z0-9_:.]*", row.metric), row
        assert re.fullmatch(r"\S(.*\S)?", row.task) and re.fullmatch(r"(\S(.*\S)?)?", row.unit), row
        assert row.better in BETTER, row


@pytest.mark.parametrize("found", EVALUATIONS, ids=name_of)
def test_a_model_scored_twice_has_the_same_rows(found: Found) -> None:
    if not getattr(found.load(), "DETERMINISTIC", True):
        pytest.skip(f"{found.name} measures the machine")
    assert tuple(score(found.name)) == usual(found.name)


@pytest.mark.parametrize("found", EVALUATIONS, ids=name_of)
def test_scoring_leaves_the_model_as_it_was(found: Found) -> None:
    from methods.checkpoint import Models

    if getattr(found.load(), "CHANGES_WEIGHTS", False):
        pytest.skip(f"{found.name} says that it changes weights, and gets a model of its own")
    models = Models()
    model = models.load(scored_model(found))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(found.name, models=models)
    assert not model.training
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", EVALUATION_CASES, ids=str)
def test_every_option_of_an_evaluation_is_live(case: Case) -> None:
    """The rows change; where only time is measured, what they say of themselves."""
    name, beside = case.found.name, dict(case.change.beside)
    before = score(name, **beside) if beside else list(usual(name))
    after = score(name, **beside | {case.option.name: case.change.value})
    measured = not getattr(case.found.load(), "DETERMINISTIC", True)
    if measured:
        assert [(row.task, row.n) for row in after] != [(row.task, row.n) for row in before]
    elif case.option.name in LAST_BITS:
        assert [row.value for row in after] == pytest.approx(
            [row.value for row in before], rel=1e-4, abs=1e-6
        )
    else:
        assert after != before
