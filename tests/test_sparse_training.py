"""Masks that change while a model is trained."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from methods.masking import Schedule, ScheduledMasks
from methods.progress import Progress
from methods.stage import AssayError, Interrupted
from methods.train import sparse
from tests import generic


def curve(outcome: generic.Outcome, term: str) -> list[float]:
    with open(outcome.folder / "curve.csv", encoding="utf-8", newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["term"] == term]


def layer(weights: list[list[float]]) -> Any:
    found = nn.Linear(len(weights[0]), len(weights), bias=False)
    found.weight.data = torch.tensor(weights)
    return found


def masks(found: Any, schedule: Schedule, **options: Any) -> ScheduledMasks:
    return ScheduledMasks({"0.weight": found}, schedule, **options)


def test_the_share_rises_as_zhu_and_gupta_write_it() -> None:
    schedule = Schedule(0.0, 0.8, 0.25, 0.75, steps=100)
    assert [schedule.share(step) for step in (0, 25, 75, 99)] == pytest.approx([0.0, 0.0, 0.8, 0.8])
    assert schedule.share(50) == pytest.approx(0.8 * (1 - 0.5**3))
    line = Schedule(0.2, 0.6, 0.0, 1.0, steps=10, shape="linear")
    assert [line.share(step) for step in (0, 5, 10)] == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize("finish", [1.0, 0.99])
def test_a_schedule_that_ends_with_the_training_gets_to_its_end(finish: float) -> None:
    found = layer([[1.0, -2.0, 3.0, -4.0]])
    hiding = masks(found, Schedule(0.0, 0.75, 0.5, finish, steps=6), every=10)
    for step in range(6):
        with hiding.hiding(step):
            pass
    assert hiding.numbers()["hidden"] == 0.75


def test_what_is_removed_is_zero_and_gets_no_gradient() -> None:
    found = layer([[1.0, -2.0, 3.0, -4.0]])
    hiding = masks(found, Schedule(0.5, 0.5, 0.0, 1.0, steps=2))
    with hiding.hiding(0):
        assert found.weight.tolist() == [[0.0, 0.0, 3.0, -4.0]]
        found(torch.ones(1, 4)).sum().backward()
    hiding.mask_gradients()
    assert found.weight.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    found.weight.data += 1.0
    hiding.after()
    assert found.weight.tolist() == [[0.0, 0.0, 4.0, -3.0]]


def test_straight_through_hides_and_pulls_but_keeps_the_weight_behind() -> None:
    found = layer([[1.0, -2.0, 3.0, -4.0]])
    hiding = masks(found, Schedule(0.5, 0.5, 0.0, 1.0, steps=2), straight_through=True, decay=0.5)
    with hiding.hiding(0):
        assert found.weight.tolist() == [[0.0, 0.0, 3.0, -4.0]]
        found(torch.ones(1, 4)).sum().backward()
    hiding.mask_gradients()
    assert found.weight.tolist() == [[1.0, -2.0, 3.0, -4.0]]
    assert found.weight.grad.tolist() == [[1.5, 0.0, 1.0, 1.0]]
    found.weight.data = torch.tensor([[9.0, -2.0, 3.0, -4.0]])
    with hiding.hiding(1):
        assert found.weight.tolist() == [[9.0, 0.0, 0.0, -4.0]]
    assert hiding.numbers() == {"hidden": 0.5, "flipped": 0.5}


def test_a_pattern_tightens_from_none_to_all_of_its_n() -> None:
    found = layer([[1.0, -2.0, 3.0, -4.0]])
    hiding = masks(found, Schedule(0.0, 1.0, 0.0, 1.0, steps=4, shape="linear"), pattern=(2, 4))
    counts = []
    for step in range(5):
        with hiding.hiding(step):
            counts.append(int((found.weight == 0).sum()))
    assert counts == [0, 0, 1, 2, 2]


def test_training_ends_at_the_sparsity_exactly_and_the_loss_falls() -> None:
    outcome = generic.run("train.sparse", sparsity=0.5, every=1, steps=8)
    matrices = {name: weight for name, weight in outcome.weights.items() if "proj" in name}
    assert len(matrices) == 14
    assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in matrices.values())
    hidden = curve(outcome, "hidden")
    assert hidden == sorted(hidden)
    assert (hidden[0], hidden[-1]) == (0.0, 0.5)
    dense = sum(weight.numel() for weight in matrices.values())
    saved = outcome.notes["parameters"] - outcome.notes["average_parameters"]
    assert saved == pytest.approx(dense * sum(hidden) / 8)


def test_straight_through_leaves_an_exact_pattern() -> None:
    options: dict[str, Any] = {"sparsity": None, "pattern": "2:4", "update": "straight_through"}
    outcome = generic.run("train.sparse", steps=6, every=2, masked_decay=2e-4, **options)
    for name, weight in outcome.weights.items():
        if "proj" in name:
            assert bool(((weight.reshape(-1, 4) == 0).sum(dim=1) == 2).all()), name


def test_zeros_of_the_parent_are_the_first_to_be_hidden() -> None:
    outcome = generic.run("train.sparse", parent="sparse", sparsity=0.5)
    before = generic.tensors(generic.world().parents["sparse"])
    for name, weight in outcome.weights.items():
        if "proj" in name:
            assert bool((weight[before[name] == 0] == 0).all()), name


@pytest.mark.parametrize("update", ["removed", "straight_through"])
def test_a_stopped_run_goes_on_where_it_was(
    update: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"sparsity": 0.5, "steps": 8, "every": 3, "update": update}
    whole = generic.run("train.sparse", **options)
    save = Progress.save

    def stop(self: Progress, step: int, tensors: Any, values: Any) -> None:
        save(self, step, tensors, values)
        raise Interrupted("stopped here")

    monkeypatch.setattr(Progress, "due", lambda self, step: step == 5 and self.load() is None)
    monkeypatch.setattr(Progress, "save", stop)
    fresh = generic.World.fresh
    folder = fresh(generic.world())
    monkeypatch.setattr(generic.World, "fresh", lambda self: folder)
    with pytest.raises(Interrupted):
        generic.run("train.sparse", **options)
    (folder / "result").rmdir()
    again = generic.run("train.sparse", **options)
    assert again.notes["resumed_from_step"] == 5
    assert again.same_weights(whole)
    assert again.curve == whole.curve
    assert curve(again, "hidden") == curve(whole, "hidden")


def test_what_cannot_be_is_told_before_anything_runs() -> None:
    for options, sentence in (
        ({}, "needs either sparsity=0.5 or pattern"),
        ({"sparsity": 0.5, "begin": 0.8}, "must come after begin=0.8"),
        ({"sparsity": 0.5, "start_sparsity": 0.6}, "is more than sparsity=0.5"),
        ({"sparsity": 0.5, "masked_decay": 1.0}, "is about update"),
    ):
        with pytest.raises(AssayError, match=sentence):
            sparse.Config(**options)
    with pytest.raises(AssayError, match=r"pattern 3:7 does not fit model\.layers\.0"):
        generic.run("train.sparse", sparsity=None, pattern="3:7")
