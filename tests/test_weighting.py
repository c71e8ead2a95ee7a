"""Weights from losses: every strategy by hand, and what a batch that is cut into pieces makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.data import Cases, Example, Part, collate
from methods.find import catalogue
from methods.gradient import Batch, Gradient
from methods.loop import component
from methods.stage import AssayError, Component, Count, Parent
from methods.terms import total
from methods.train import classify, sft
from methods.weighting import scaled, sequence_means, weigh, weighted_terms
from workflows.notation import Call
from workflows.options import resolve

E = math.e
# h = -1, 0, 1, and what each strategy's softmax makes of that at temperature 1.
LOSSES = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
BY_HAND = {
    "linear_upper": [1.0, E, E],
    "quadratic": [1.0, E, 1.0],
    "extremes": [E, 1.0, E],
    "upper": [1.0, math.sqrt(E), E],
}


def weights(name: str, losses: Tensor = LOSSES, step: int = 1000, **options: Any) -> Tensor:
    function = weigh(Component(name, options))
    assert function is not None
    return function(losses, step)


def shares(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


# --- the strategies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_HAND)
def test_the_weights_are_those_worked_out_by_hand(name: str) -> None:
    assert weights(name).tolist() == pytest.approx(shares(BY_HAND[name]), rel=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_low_temperature_takes_the_weights_apart(name: str) -> None:
    expected = shares([value**2 for value in BY_HAND[name]])
    assert weights(name, temperature=0.5).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["linear_upper", "extremes", "upper"])
def test_only_delta_over_temperature_counts(name: str) -> None:
    one, other = weights(name, delta=2.0, temperature=1.0), weights(name, delta=1.0, temperature=0.5)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_losses_are_scaled_to_the_range_from_minus_delta_to_delta() -> None:
    assert scaled(torch.tensor([5.0, 1.0, 2.0, 3.0]), 2.0).tolist() == [2.0, -2.0, -1.0, 0.0]


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("value", [0.0, 3.7, 1e6])
def test_equal_losses_weigh_the_same(name: str, value: float) -> None:
    assert weights(name, torch.full((4,), value)).tolist() == [0.25] * 4


@pytest.mark.parametrize("name", BY_HAND)
def test_in_the_first_steps_all_rows_weigh_the_same(name: str) -> None:
    assert weights(name, step=999).tolist() == pytest.approx([1 / 3] * 3)
    assert weights(name, step=1000).tolist() != pytest.approx([1 / 3] * 3)
    assert weights(name, step=0, warmup_steps=0).tolist() == weights(name).tolist()


def test_without_a_strategy_there_is_nothing_to_weigh_with() -> None:
    assert weigh(None) is None


# --- the loss -----------------------------------------------------------------------------------------------------


def part() -> Part:
    """Three sequences with answers of 1, 2 and 5 tokens after a prompt of 2."""
    examples = [Example(tuple(range(n + 2)), (-100, -100, *range(2, n + 2))) for n in (1, 2, 5)]
    return collate(examples, 0, "train")


def terms(name: str, losses: Tensor, **options: Any) -> Mapping[str, Any]:
    chosen = Component(name, {"warmup_steps": 0, **options})
    batch = Batch({}, 0, 1, weigh=lambda values: weights(name, values, 0, **chosen.options))
    return weighted_terms(chosen, part(), losses, batch)


def test_the_loss_is_the_weighted_sum_and_the_weights_get_no_gradient() -> None:
    losses = LOSSES.clone().requires_grad_()
    term = terms("linear_upper", losses)["train"]
    assert isinstance(term.count, Count) and term.count.source == "batch"
    value = total({"train": term})
    value.backward()
    expected = shares(BY_HAND["linear_upper"])
    assert float(value.detach()) == pytest.approx(
        sum(w * x for w, x in zip(expected, (1, 2, 3), strict=True))
    )
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx(expected)


def test_the_trainers_form_multiplies_by_shares_of_tokens_and_by_the_number_of_rows() -> None:
    term = terms("upper", LOSSES, form="trainer")["train"]
    expected = [
        3 * weight * length / 8 * value
        for weight, length, value in zip(shares(BY_HAND["upper"]), (1, 2, 5), (1.0, 2.0, 3.0), strict=True)
    ]
    assert float(total({"train": term})) == pytest.approx(sum(expected))


def test_a_sequences_loss_is_the_mean_over_its_own_answer_tokens() -> None:
    losses = torch.tensor([4.0, 1.0, 3.0, 1.0, 2.0, 3.0, 4.0, 10.0])
    assert sequence_means(part(), losses).tolist() == [4.0, 2.0, 4.0]


# --- pieces -------------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A classifier of three inputs into four classes, in float64."""

    main_input_name = "inputs"

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.weight = torch.nn.Parameter(torch.randn(4, 3, generator=draw, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Any:
        return type("Answer", (), {"logits": inputs @ self.weight.T})


def cases() -> Cases:
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(7, 3, generator=draw, dtype=torch.float64)
    return Cases(inputs, torch.arange(7) % 4, torch.arange(7), "train")


def gradient(micro_batch: int | None, **options: Any) -> tuple[float, Tensor]:
    chosen = Component("linear_upper", {"warmup_steps": 0, "temperature": 0.3, **options})
    config, model = classify.Config(data="any", weighting=chosen), Linear()
    run = Gradient(
        model,
        lambda model, batch: classify.loss(config, model, batch),
        weigh=weigh(config.weighting),
        micro_batch=micro_batch,
    )
    means = run({"train": cases()}, 0, 1)  # type: ignore[dict-item]
    assert model.weight.grad is not None
    return means["train"], model.weight.grad


def test_the_weights_are_those_among_all_rows_of_the_batch() -> None:
    model, batch = Linear(), cases()
    scores = model(batch.inputs).logits
    losses = torch.nn.functional.cross_entropy(scores, batch.labels, reduction="none")
    given = weights("linear_upper", losses.detach(), 0, warmup_steps=0, temperature=0.3)
    (given * losses).sum().backward()
    assert model.weight.grad is not None
    torch.testing.assert_close(gradient(None)[1], model.weight.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ["readme", "trainer"])
@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch: int, form: str) -> None:
    (value, whole), (cut, pieces) = gradient(None, form=form), gradient(micro_batch, form=form)
    assert cut == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(pieces, whole, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("form", ["readme", "trainer"])
def test_sequences_in_micro_batches_are_weighed_among_the_whole_batch(form: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    chosen = Component("extremes", {"warmup_steps": 0, "form": form})
    config = sft.Config(data="any", weighting=chosen)
    torch.manual_seed(1)
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape)).double()

    def of(micro_batch: int | None) -> list[Tensor]:
        run = Gradient(
            model,
            lambda model, batch: sft.loss(config, model, batch),
            weigh=weigh(config.weighting),
            micro_batch=micro_batch,
        )
        run({"train": part()}, 0, 1)
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    for pieces, whole in zip(of(1), of(None), strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-14)


# --- what is refused ----------------------------------------------------------------------------------------------


def planned(**options: Any) -> Any:
    """``train.sft`` with a weighting as the planner completes and checks it."""
    call = Call("train.sft", (("weighting", Call("quadratic", tuple(options.items()))),))
    found = catalogue().method("train.sft")
    return resolve(call, found, catalogue(), lambda _, name: Parent(name.text)).config


def test_a_strategy_is_an_option_of_training() -> None:
    chosen, options = component("weighting", planned(temperature=0.4).weighting)
    assert chosen.__name__ == "methods.weighting.quadratic"
    assert (options.temperature, options.warmup_steps, options.form) == (0.4, 1000, "readme")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"form": "paper"}, "readme"),
        ({"delta": 2.0}, "unknown option 'delta' for quadratic"),
    ],
)
def test_an_option_that_makes_no_sense_is_a_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(AssayError, match=said):
        planned(**options)


def test_a_loss_that_is_no_sum_over_rows_has_nothing_to_weigh() -> None:
    config = classify.Config(
        data="any", loss=Component("anyloss"), weighting=Component("upper", {"warmup_steps": 0})
    )
    batch = Batch({"train": cases()}, 0, 1, weigh=lambda losses: losses)  # type: ignore[dict-item]
    with pytest.raises(AssayError, match="leave out weighting"):
        classify.loss(config, Linear(), batch)
