"""AST and CAST: masks, optimizers, and what is written in the end."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from methods.distill._masked_adam import (
    MaskedAdam,
    Pulled,
    Shrinking,
    SoftMasks,
    masked_layers,
    rising,
    straight_through,
)
from methods.find import catalogue
from methods.loop import component
from methods.progress import Progress, pack, unpack
from methods.stage import AssayError, Component, Interrupted
from tests import generic
from workflows.notation import Call, Name


def layer(weights: list[list[float]]) -> Any:
    found = nn.Linear(len(weights[0]), len(weights), bias=False)
    found.weight.data = torch.tensor(weights, dtype=torch.float64)
    return found


def options(**changes: float) -> Any:
    usual = {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.5, "epsilon": 0.0, "weight_decay": 0.0}
    return SimpleNamespace(**usual | changes)


def adam(found: Any, hidden: list[list[bool]], decay: float, **changes: float) -> MaskedAdam:
    masks = {"w": torch.tensor(hidden)}
    return MaskedAdam([("w", found.weight)], masks, options(**changes), lambda step: decay)


def step(optimizer: Any, found: Any, gradient: list[list[float]]) -> list[float]:
    found.weight.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer.step()
    return list(found.weight.detach().flatten().tolist())


# --- AST's optimizer ----------------------------------------------------------------------------------------


def test_the_pull_is_added_after_the_average_and_divided_by_the_root_of_its_own_square() -> None:
    """By hand, two steps of one masked weight with beta1 = beta2 = 1/2, rate 0.1, decay 0.5."""
    found = layer([[2.0]])
    optimizer = adam(found, [[True]], 0.5)
    # m = 1/2, u = 1/2 + 0.5 * 2 = 3/2, v = 9/8; u / (1/2) / sqrt(v / (1/2)) = 3 / 1.5 = 2
    assert step(optimizer, found, [[1.0]]) == pytest.approx([2.0 - 0.1 * 2])
    # m = 1/4 + 3/2 = 7/4, u = 7/4 + 0.9 = 2.65, v = 9/16 + 2.65^2 / 2
    second = 2.65 / 0.75 / ((9 / 16 + 2.65**2 / 2) / 0.75) ** 0.5
    assert step(optimizer, found, [[3.0]]) == pytest.approx([1.8 - 0.1 * second])
    assert optimizer.numbers == {"masked_decay": 0.5}


def test_a_weight_that_left_the_mask_is_pulled_no_longer() -> None:
    """The average is of the loss's gradients alone; inside it the pull would go on for many steps."""
    found, mask = layer([[2.0]]), torch.tensor([[True]])
    optimizer = MaskedAdam([("w", found.weight)], {"w": mask}, options(), lambda _: 0.5)
    [pulled] = step(optimizer, found, [[0.0]])
    mask.fill_(False)
    assert pulled < 2.0
    assert step(optimizer, found, [[0.0]]) == [pulled]


def test_weights_without_a_mask_are_trained_as_by_adamw_and_vectors_do_not_decay() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    chosen = options(weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8)
    optimizer: Any = MaskedAdam(list(ours.named_parameters()), {}, chosen, lambda _: 1.0)
    groups = [
        {"params": [theirs.weight], "weight_decay": 0.1},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    other = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))
    for number in range(4):
        for model, each in ((ours, optimizer), (theirs, other)):
            model.zero_grad()
            (model(torch.ones(1, 3)) * (number + 1)).square().sum().backward()
            each.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)
    assert torch.allclose(ours.bias, theirs.bias, atol=1e-6)


def test_adamw_with_the_pull_in_its_gradient_is_another_optimizer() -> None:
    found, other = layer([[2.0]]), layer([[2.0]])
    optimizer, plain = adam(found, [[True]], 0.5), adam(other, [[False]], 0.0)
    for gradient in (1.0, -3.0):
        step(optimizer, found, [[gradient]])
        step(plain, other, [[gradient + 0.5 * other.weight.item()]])
    assert found.weight.item() != pytest.approx(other.weight.item(), abs=0.01)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_state_comes_back_from_what_the_loop_saves(kind: str) -> None:
    def make(found: Any) -> Any:
        masks = {"w": torch.tensor([[True, False]])}
        named, pull = [("w", found.weight)], rising(0.5, 3)
        if kind == "adamw":
            return MaskedAdam(named, masks, options(), pull)
        module, config = component("optimizer", Component("sgd", {"learning_rate": 0.1}))
        return Pulled(module.build(config, named), named, masks, pull)

    found = layer([[2.0, 1.0]])
    optimizer = make(found)
    for gradient in (1.0, 2.0):
        step(optimizer, found, [[gradient, gradient]])
    tensors: dict[str, torch.Tensor] = {}
    saved = pack(optimizer.state_dict(), "optimizer", tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    again = layer(found.weight.tolist())
    other = make(again)
    other.load_state_dict(unpack(saved, tensors))
    assert step(optimizer, found, [[3.0, 3.0]]) == step(other, again, [[3.0, 3.0]])
    assert other.numbers == optimizer.numbers


def test_beside_another_optimizer_the_pull_is_of_the_weights_before_its_step() -> None:
    found = layer([[2.0, 4.0]])
    inner = torch.optim.SGD([found.weight], lr=0.1)
    optimizer = Pulled(inner, [("w", found.weight)], {"w": torch.tensor([[True, False]])}, lambda _: 0.5)
    assert step(optimizer, found, [[1.0, 1.0]]) == pytest.approx([2.0 - 0.1 - 0.1 * 0.5 * 2, 3.9])


def test_the_pull_rises_in_a_straight_line() -> None:
    assert [rising(8.0, 4)(step) for step in (0, 1, 4, 9)] == [0.0, 2.0, 8.0, 8.0]
    assert rising(8.0, 0)(0) == 8.0


def test_the_whole_pattern_is_hidden_from_the_first_step_and_drawn_anew() -> None:
    found = layer([[1.0, -2.0, 3.0, -4.0, 8.0, 7.0, 6.0, 5.0]])
    masks = straight_through({"w": found}, (2, 4), every=2, steps=5)
    with masks.hiding(0):
        assert found.weight.tolist() == [[0.0, 0.0, 3.0, -4.0, 8.0, 7.0, 0.0, 0.0]]
    found.weight.data[0, 0] = 9.0
    with masks.hiding(1):
        assert found.weight[0, 0] == 0.0
    with masks.hiding(2):
        assert found.weight.tolist() == [[9.0, 0.0, 0.0, -4.0, 8.0, 7.0, 0.0, 0.0]]
    assert masks.numbers() == {"hidden": 0.5, "flipped": 0.25}


# --- CAST ---------------------------------------------------------------------------------------------------


def test_masked_weights_shrink_alike_and_stop_at_zero() -> None:
    found = layer([[2.0, -1.0, 0.05, 3.0]])
    inner = torch.optim.SGD([found.weight], lr=0.1)
    mask = torch.tensor([[True, True, True, False]])
    optimizer = Shrinking(inner, [("w", found.weight)], {"w": mask}, lambda _: 1.0)
    assert step(optimizer, found, [[0.0] * 4]) == pytest.approx([1.9, -0.9, 0.0, 3.0])


def test_factors_of_rows_are_trained_and_multiplied_in() -> None:
    found = layer([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]])
    masks = SoftMasks({"w": found}, (2, 4), every=1, steps=3, scaling=True)
    masks.scales["w"].copy_(torch.tensor([2.0, 0.5]))
    inputs = torch.tensor([[1.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    with masks.hiding(0):
        assert found.weight.tolist() == [[2.0, -4.0, 6.0, -8.0], [2.0, 1.5, 1.0, 0.5]]
        found(inputs).sum().backward()
    masks.mask_gradients()
    assert found.weight.tolist() == [[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]]
    assert found.weight.grad.tolist() == [[2.0, 2.0, 2.0, 4.0], [0.5, 0.5, 0.5, 1.0]]
    assert masks.scales["w"].grad.tolist() == [1 - 2 + 3 - 8, 4 + 3 + 2 + 2]
    assert masks.numbers() == {"hidden": 0.5, "flipped": 0.5, "largest_masked": 2.0}
    masks.hide({"w": found.weight})
    assert found.weight.tolist() == [[0.0, 0.0, 6.0, -8.0], [2.0, 1.5, 0.0, 0.0]]


def test_without_factors_soft_masks_leave_the_model_as_it_is() -> None:
    found = layer([[1.0, -2.0, 3.0, -4.0]])
    masks = SoftMasks({"w": found}, (2, 4), every=1, steps=3, scaling=False)
    with masks.hiding(0):
        assert found.weight.tolist() == [[1.0, -2.0, 3.0, -4.0]]
    assert dict(found.named_buffers()).keys() == {"hidden_weights"}


def test_a_pattern_that_does_not_fit_is_refused_by_name() -> None:
    from tests.small_models import llama

    with pytest.raises(AssayError, match=r"distill\.ast: pattern 2:7 does not fit model\.layers\.0"):
        masked_layers("distill.ast", llama(), (2, 7))


# --- whole stages -------------------------------------------------------------------------------------------


def rates(learning_rate: float, **rest: float) -> Call:
    return Call("adamw", (("learning_rate", learning_rate), *rest.items()))


def curve(outcome: generic.Outcome, term: str) -> list[float]:
    with open(outcome.folder / "curve.csv", encoding="utf-8", newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["term"] == term]


def projections(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if "proj" in name}


def is_exact(weight: torch.Tensor, removed: int, group: int) -> bool:
    return bool(((weight.reshape(-1, group) == 0).sum(dim=1) == removed).all())


@pytest.mark.parametrize("name", ["distill.ast", "distill.cast"])
def test_the_written_model_has_the_pattern_exactly(name: str) -> None:
    outcome = generic.run(name, pattern="2:4", every=2)
    found = projections(outcome.weights)
    assert len(found) == 14
    assert all(is_exact(weight, 2, 4) for weight in found.values())
    assert curve(outcome, "hidden")[-1] == 0.5


@pytest.mark.parametrize("name", ["distill.ast", "distill.cast"])
def test_zeros_of_the_parent_are_among_those_of_the_pattern(name: str) -> None:
    outcome = generic.run(name, parent="sparse", pattern="2:4")
    before = generic.tensors(generic.world().parents["sparse"])
    for key, weight in projections(outcome.weights).items():
        assert bool((weight[before[key] == 0] == 0).all()), key
        assert bool(((weight.reshape(-1, 4) == 0).sum(dim=1) >= 2).all()), key


def test_masks_of_ast_flip_less_and_less_while_the_divergence_falls() -> None:
    shared: dict[str, Any] = {"steps": 24, "batch": 18, "every": 4, "pattern": "2:4", "check": False}
    outcome = generic.run("distill.ast", optimizer=rates(0.001, beta2=0.95), **shared)
    drawn = [share for share in curve(outcome, "flipped") if share]
    assert drawn[0] == 0.5
    assert drawn[1] > drawn[-1]
    assert curve(outcome, "forward_kl")[-1] < curve(outcome, "forward_kl")[0]


def test_before_cast_writes_its_model_the_masked_weights_are_gone() -> None:
    """Then hiding them changes the loss by less than a thousandth of a nat."""
    outcome = generic.run(
        "distill.cast", steps=40, batch=18, pattern="2:4", every=4, decay=12.0, optimizer=rates(0.003),
        schedule=Call("constant"), probe=(f"train={generic.DATA}",), check=False,
    )  # fmt: skip
    largest = curve(outcome, "largest_masked")
    assert largest[0] > 0.1
    assert largest[-1] < 1e-6
    before = curve(outcome, "probe.train")[-1]
    assert generic.nll(outcome.folder / "model", generic.DATA) == pytest.approx(before, abs=1e-3)
    assert all(is_exact(weight, 2, 4) for weight in projections(outcome.weights).values())


def test_a_pattern_cut_at_once_would_have_cost_more() -> None:
    shared: dict[str, Any] = {"steps": 40, "batch": 18, "pattern": "2:4", "every": 4, "check": False}
    shrunk = generic.run(
        "distill.cast", decay=12.0, optimizer=rates(0.003), schedule=Call("constant"), **shared
    )
    cut = generic.run("distill.cast", decay=0.0, optimizer=rates(0.003), schedule=Call("constant"), **shared)
    assert curve(cut, "largest_masked")[-1] > 0.1
    data = generic.DATA
    assert generic.nll(shrunk.folder / "model", data) < generic.nll(cut.folder / "model", data)


@pytest.mark.parametrize("name", ["distill.ast", "distill.cast"])
def test_a_stopped_run_goes_on_where_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"steps": 6, "every": 2, "optimizer": rates(0.003), "check": False}
    whole = generic.run(name, **options)
    stop_at(4, monkeypatch)
    with pytest.raises(Interrupted):
        generic.run(name, **options)
    (generic.world().fresh() / "result").rmdir()
    again = generic.run(name, **options)
    assert again.notes["resumed_from_step"] == 4
    assert again.same_weights(whole)
    assert again.curve == whole.curve


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the next run once its state of that step is saved; runs share a folder from here on."""
    save, folder = Progress.save, generic.world().fresh()

    def stop(self: Progress, step: int, tensors: Any, values: Any) -> None:
        save(self, step, tensors, values)
        raise Interrupted("stopped here")

    monkeypatch.setattr(Progress, "due", lambda self, now: now == step and self.load() is None)
    monkeypatch.setattr(Progress, "save", stop)
    monkeypatch.setattr(generic.World, "fresh", lambda self: folder)


@pytest.mark.parametrize("name", ["distill.ast", "distill.cast"])
def test_what_cannot_be_is_told_before_anything_runs(name: str) -> None:
    for options, sentence in (
        ({"pattern": "4:2"}, 'not of the form "n:m"'),
        ({"cross_entropy": 0.0, "kl": 0.0}, "are all 0"),
        ({"adapter": Call("lora")}, "leave out the adapter"),
    ):
        with pytest.raises(AssayError, match=sentence):
            generic.resolved(catalogue().method(name), {"teacher": Name("other"), **options})
    with pytest.raises(AssayError, match=rf"{name}: pattern 3:7 does not fit model\.layers\.0"):
        generic.run(name, pattern="3:7")
