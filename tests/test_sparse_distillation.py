"""AST and CAST: masks, optimizers, and what is written in the end."""

from __future__ import annotations

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
from methods.loop import component
from methods.progress import pack, unpack
from methods.stage import AssayError, Component


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
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
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
