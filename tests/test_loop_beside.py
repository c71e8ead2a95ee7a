"""What is trained, or written, beside a model: companions, and text that stands in the place of a batch."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from methods import loop
from methods.checkpoint import load_model
from methods.data import Part, Style, encode
from methods.stage import Component, Stage, Term, Terms
from methods.train import sft
from tests.training import ROWS, make_parent, make_stage, same, weights_of

FAST = Component("adamw", {"learning_rate": 1e-2})
QUICK = sft.Config(data="all", steps=6, batch=8, optimizer=FAST, log_every=1, checkpoints=(4,))


class Killed(BaseException):
    """The process died."""


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture
def save_every(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Save a state after so many steps, whatever the clock says."""

    def choose(steps: int) -> None:
        monkeypatch.setattr("methods.progress.Progress.due", lambda self, step: step % steps == 0)

    return choose


def batches(parent: Path) -> loop.Batches:
    from methods.checkpoint import load_tokenizer

    return loop.Batches({"train": encode(ROWS, load_tokenizer(parent), Style(), 64)}, size=8, seed=3)


def logged(stage: Stage, term: str) -> list[float]:
    with open(stage.folder / "curve.csv", encoding="utf-8", newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["term"] == term]


# --- companions -------------------------------------------------------------------------------------------------


def with_companion(parent: Path, folder: Path, killed: int = -1, **changes: Any) -> tuple[Stage, Any]:
    """The logits are scaled by a number that is trained with the model, and counted in a buffer."""
    settings = replace(QUICK, **changes)
    stage = make_stage(parent, folder, settings)
    model = loop.prepare(stage, settings)
    scale = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(scale.weight)
    scale.register_buffer("calls", torch.tensor(0))

    def loss(model: Any, batch: Any) -> Terms:
        if batch.step == killed:
            raise Killed
        scale.calls += 1
        train = sft.loss(settings, model, batch)["train"]
        return {"train": train, "scale": Term((scale.weight.sum() - 3) ** 2, batch.train.sequences, 8.0)}

    loop.train(stage, model, settings, batches(parent), loss, companions={"scale": scale})
    return stage, scale


def test_a_companion_is_trained_and_written_beside_the_model_and_never_into_it(
    parent: Path, tmp_path: Path
) -> None:
    stage, scale = with_companion(parent, tmp_path)
    assert scale.weight.item() != 1.0
    for name in ("model", "model@4"):
        beside = load_file(stage.folder / name / "companions" / "scale.safetensors")
        assert set(beside) == {"weight", "calls"}
        assert not [key for key in weights_of(stage.folder / name) if "scale" in key]
        load_model(stage.folder / name)
    final = load_file(stage.folder / "model" / "companions" / "scale.safetensors")
    assert torch.equal(final["weight"], scale.weight.detach())


def test_the_gradient_of_a_companion_starts_anew_in_every_step(parent: Path, tmp_path: Path) -> None:
    descent = Component("sgd", {"learning_rate": 0.01, "momentum": 0.0})
    _, scale = with_companion(parent, tmp_path, optimizer=descent, schedule=Component("constant"), clip=0.0)
    expected = 1.0
    for _ in range(6):
        # 8 / 8 sequences, times the derivative of (w - 3)^2
        expected -= 0.01 * 2 * (expected - 3)
    assert scale.weight.item() == pytest.approx(expected, rel=1e-5)


def test_a_killed_run_with_a_companion_ends_with_the_same_bits(
    parent: Path, tmp_path: Path, save_every: Callable[[int], None]
) -> None:
    whole, _ = with_companion(parent, tmp_path / "whole")
    save_every(2)
    with pytest.raises(Killed):
        with_companion(parent, tmp_path / "killed", killed=3)
    resumed, _ = with_companion(parent, tmp_path / "killed")
    assert resumed.notes["resumed_from_step"] == 2
    assert same(weights_of(resumed.folder / "model"), weights_of(whole.folder / "model"))
    beside = [
        load_file(each.folder / "model" / "companions" / "scale.safetensors") for each in (resumed, whole)
    ]
    assert same(*beside)


# --- what is written --------------------------------------------------------------------------------------------


class Repeating:
    """Puts what it has seen in the last step in the place of the rows of every second step."""

    def __init__(self) -> None:
        self.tokens, self.seen, self.calls = 0, [], []

    def parts(self, step: int, parts: Mapping[str, Part], model: Any) -> Mapping[str, Part]:
        assert model.training
        self.calls.append(step)
        part = parts["train"]
        chosen = part if step % 2 == 0 or not self.seen else part_of(self.seen)
        self.seen = [part.input_ids.tolist(), part.attention_mask.tolist(), part.labels.tolist()]
        self.tokens = 10 * (step + 1)
        return {"train": chosen}

    def numbers(self) -> dict[str, float]:
        return {"written": float(self.tokens)}

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def resume(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def notes(self) -> dict[str, Any]:
        return {"remembered": len(self.seen[0])}


def part_of(lists: list[Any]) -> Part:
    ids, mask, labels = (torch.tensor(each) for each in lists)
    return Part(input_ids=ids, attention_mask=mask, labels=labels, name="train")


def with_writing(parent: Path, folder: Path, killed: int = -1, meter: bool = True) -> tuple[Stage, Repeating]:
    stage = make_stage(parent, folder, QUICK)
    if meter:
        readings = iter(range(1, 100))
        stage.spent = lambda: {"kwh": 1e-3 * next(readings), "seconds": 1.0}
    model, writing = loop.prepare(stage, QUICK), Repeating()

    def loss(model: Any, batch: Any) -> Terms:
        if batch.step == killed:
            raise Killed
        return sft.loss(QUICK, model, batch)

    loop.train(stage, model, QUICK, batches(parent), loss, writing=writing)
    return stage, writing


def test_what_is_written_stands_in_the_place_of_the_batch_and_is_counted_apart(
    parent: Path, tmp_path: Path
) -> None:
    stage, writing = with_writing(parent, tmp_path)
    assert writing.calls == [0, 1, 2, 3, 4, 5]
    assert logged(stage, "written") == [10, 20, 30, 40, 50, 60]
    assert stage.notes["generated_tokens"] == 210
    assert stage.notes["remembered"] == 8
    # Read before and after each of the six steps; one more reading is that of the kept step.
    assert stage.notes["generation_kwh"] == pytest.approx(6e-3)
    assert 0 < stage.notes["generation_seconds"] < 60


def test_energy_that_nobody_metered_is_not_noted(parent: Path, tmp_path: Path) -> None:
    stage, _ = with_writing(parent, tmp_path, meter=False)
    assert "generation_kwh" not in stage.notes
    assert stage.notes["generated_tokens"] == 210


def test_a_killed_run_goes_on_with_what_was_written_before(
    parent: Path, tmp_path: Path, save_every: Callable[[int], None]
) -> None:
    whole, _ = with_writing(parent, tmp_path / "whole")
    save_every(3)
    with pytest.raises(Killed):
        with_writing(parent, tmp_path / "killed", killed=4)
    resumed, writing = with_writing(parent, tmp_path / "killed")
    assert writing.calls == [3, 4, 5]
    assert resumed.notes["generated_tokens"] == 210
    assert same(weights_of(resumed.folder / "model"), weights_of(whole.folder / "model"))
    assert (resumed.folder / "curve.csv").read_bytes() == (whole.folder / "curve.csv").read_bytes()
