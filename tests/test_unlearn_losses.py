"""Losses of the unlearning baselines: a number by hand each, what carries a gradient, options, and annotations."""

from __future__ import annotations

import re
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.checkpoint import load_tokenizer
from methods.data import Example, Part, Style, encode
from methods.find import catalogue
from methods.gradient import Gradient
from methods.stage import AssayError, Component, Count
from methods.terms import total
from methods.unlearn import run
from methods.unlearn._annotations import annotated
from tests.parity.cases import Table
from tests.training import make_parent, make_stage

START = (0.5, 0.5, 0.5, 0.5, 0.5)
# Every loss of this file with options under which each of its branches is taken somewhere.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("simnpo", {}),
    ("simnpo", {"length": "labels", "delta": 0.3, "retain_loss": "kl"}),
    ("wga", {"beta": 0.5}),
    ("tnpo", {"extra": 0.5, "epsilon": 1e-5}),
    ("kl_min", {}),
    ("undial", {"beta": 2.0, "alpha": 1.0}),
    ("undial", {"beta": 2.0, "mask": "all"}),
    ("ce_u", {}),
    ("pdu", {"alpha": 2.0}),
    ("npo", {"annotations": "stored"}),
    ("npo", {"margin": "batch", "beta": 0.5, "retain_loss": "kl"}),
    ("satimp", {"keep": "above", "quantile": 0.3}),
    ("satimp", {"keep": "below", "annotations": "stored"}),
    ("satimp", {"reduction": "sum", "beta1": 0.5}),
    ("satimp", {"reduction": "positions", "beta1": 0.5}),
]
IDS = [f"{name} {' '.join(f'{key}={value}' for key, value in options.items())}" for name, options in VARIANTS]


def method(name: str) -> Any:
    return catalogue().method(f"unlearn.{name}").load()


def binary(*probabilities: float) -> Tensor:
    """Logits [positions,2] of a two-word model that gives word 0 these probabilities."""
    return torch.tensor([[log(p), log(1 - p)] for p in probabilities], dtype=torch.float64)


def part(name: str, labels: list[list[int]], start: int = 0, **extra: Tensor) -> Part:
    """A part whose ids are the rows ``start``, ``start`` + 1, ... of a table."""
    wanted = torch.tensor(labels)
    ids = torch.arange(start, start + wanted.numel()).view_as(wanted)
    return Part(ids, torch.ones_like(wanted), wanted, name, extra)


def hand(
    name: str, start: tuple[float, ...] = START, forget: Part | None = None, step: int = 0, **options: Any
) -> float:
    """The loss of a forget answer with probabilities 1/2 and 1/4 and a retain answer with 1/2.

    ``start`` are the reference's probabilities; the positions after the answers have 9/10.
    """
    module = method(name)
    config = module.Config(**options)
    adaptive = module.adaptive(config) if hasattr(module, "adaptive") else None
    batch = SimpleNamespace(
        forget=forget or part("forget", [[-100, 0, 0]]),
        retain=part("retain", [[-100, 0]], start=3),
        step=step,
        steps=10,
        values=adaptive.start if adaptive else {},
    )
    terms = module.loss(config, Table(binary(0.5, 0.25, 0.9, 0.5, 0.9)), batch, Table(binary(*start)))
    return float(total(terms, module.outer(config) if hasattr(module, "outer") else None))


# --- one number each ------------------------------------------------------------------------------------------


def test_simnpo_compares_the_loss_per_token_with_nothing() -> None:
    # s / n = 3 ln 2 / 2; sigmoid(3 ln 2) = 8/9
    assert hand("simnpo", gamma=1.0, alpha=0.0, beta=2.0) == pytest.approx(-log(8 / 9))


def test_simnpo_subtracts_delta_before_it_multiplies_by_beta() -> None:
    # 2 (3/2 ln 2 - ln 2) = ln 2, sigmoid(ln 2) = 2/3
    assert hand("simnpo", gamma=1.0, alpha=0.0, beta=2.0, delta=log(2)) == pytest.approx(-log(2 / 3))


def test_simnpo_divides_by_what_is_predicted_unless_told_otherwise() -> None:
    text = part("forget", [[1, 0, 0]])  # the first label is nobody's target
    options = {"gamma": 1.0, "alpha": 0.0, "beta": 2.0, "forget": text}
    assert hand("simnpo", **options) == pytest.approx(-log(8 / 9))
    assert hand("simnpo", length="labels", **options) == pytest.approx(-log(4 / 5))  # 2 * 3 ln 2 / 3


def test_wga_weighs_a_token_by_its_probability() -> None:
    assert hand("wga", alpha=0.0, beta=2.0) == pytest.approx(-(log(2) / 4 + log(4) / 16) / 2)
    assert hand("wga", alpha=0.0, beta=0.0) == pytest.approx(hand("grad_ascent"))


def test_tnpo_weighs_a_token_by_how_far_it_has_come() -> None:
    # weights 2 * 1/2 / (1/2 + 1/2) = 1 and 2 * 1/4 / (1/4 + 1/2) = 2/3
    assert hand("tnpo", alpha=0.0) == pytest.approx(-(log(2) + 2 / 3 * log(4)) / 2)


def test_weighted_tnpo_has_a_further_exponent() -> None:
    assert hand("tnpo", alpha=0.0, extra=1.0) == pytest.approx(-(log(2) / 2 + log(4) / 6) / 2)


def test_an_epsilon_in_its_denominator_makes_tnpo_let_go_earlier() -> None:
    assert hand("tnpo", alpha=0.0, epsilon=0.25) == pytest.approx(-(log(2) / 1.25 + log(4) / 2) / 2)


def test_tnpo_lets_go_of_a_token_that_is_as_good_as_gone() -> None:
    module = method("tnpo")
    gone = torch.tensor([300.0, 300.0])
    weight = module.reweight(module.Config(beta=4.0, epsilon=1e-5), gone, torch.tensor([0.0, 300.0]))
    assert weight.tolist() == [0.0, 0.0]
    assert module.reweight(module.Config(beta=4.0), gone, gone).tolist() == [1.0, 1.0]


def test_kl_minimisation_stays_close_on_every_position() -> None:
    # the last position agrees: 0; the one before has D((1/4, 3/4) || (1/2, 1/2))
    divergence = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    expected = -1.5 * log(2) + 2.0 * divergence / 2
    assert hand("kl_min", (0.5, 0.5, 0.5, 0.25, 0.9), alpha=2.0) == pytest.approx(expected)


def test_undial_distils_what_the_start_would_be_with_the_token_pushed_down() -> None:
    # softmax(-ln 3, 0) = (1/4, 3/4)
    entropies = log(2) + (0.25 * log(4) + 0.75 * log(4 / 3))
    assert hand("undial", beta=log(3)) == pytest.approx(entropies / 2)


def test_undial_may_count_prompts_and_pushes_down_what_stands_there() -> None:
    ids = torch.tensor([[0, 1, 0]])
    question = Part(ids, torch.ones_like(ids), torch.tensor([[-100, -100, 0]]), "forget")
    answer = 0.25 * log(4) + 0.75 * log(4 / 3)
    assert hand("undial", beta=log(3), forget=question) == pytest.approx(answer)
    assert hand("undial", beta=log(3), forget=question, mask="all") == pytest.approx((log(2) + answer) / 2)


def test_undial_may_push_down_the_entry_that_an_ignored_label_happens_to_mean() -> None:
    module = method("undial")
    config = module.Config(beta=log(3), mask="all", minus_100_as_index=True)
    now, start = torch.zeros(2, 101, dtype=torch.float64), torch.zeros(2, 101, dtype=torch.float64)
    now[0, 1] = log(2)
    batch = SimpleNamespace(forget=part("forget", [[-100, -100]]))
    found = total(module.loss(config, Table(now), batch, Table(start)))
    # entry 1 of the target is 1/3 / (100 + 1/3)
    assert float(found) == pytest.approx(log(102) - log(2) / 301)


def test_such_an_entry_has_to_exist() -> None:
    with pytest.raises(AssayError, match="needs a vocabulary of 100 entries; this has 2"):
        hand("undial", mask="all", minus_100_as_index=True)
    with pytest.raises(AssayError, match="add mask='all' or leave it out"):
        method("undial").Config(minus_100_as_index=True)


def test_ce_u_distils_the_model_without_the_token() -> None:
    # with two words nothing but the other one is left
    assert hand("ce_u") == pytest.approx((-log(0.5) - log(0.75)) / 2)


def test_pdu_flattens_the_logits_that_the_answer_itself_gives() -> None:
    # (max - mean)^2 = (ln 3 / 2)^2 at the second position and (ln 9 / 2)^2 at the third
    flat = (log(3) ** 2 / 4 + log(9) ** 2 / 4) / 2
    expected = 2.0 * flat + 50.0 * (log(2) - 0.3)
    assert hand("pdu", gamma=2.0) == pytest.approx(expected)


def test_npo_counts_what_people_marked() -> None:
    marked = part("forget", [[-100, 0, 0]], importance=torch.tensor([[0.0, 2.0]]))
    # twice ln 2 lost at the second token, sigmoid(2 ln 2) = 4/5
    options = {"beta": 1.0, "alpha": 0.0, "annotations": "important"}
    assert hand("npo", forget=marked, **options) == pytest.approx(-2 * log(4 / 5))


def test_npo_may_have_one_margin_for_a_batch() -> None:
    ids = torch.tensor([[0, 1, 2], [0, 1, 2]])
    twice = Part(ids, torch.ones_like(ids), torch.tensor([[-100, 0, 0]] * 2), "forget")
    assert hand("npo", forget=twice, beta=1.0, alpha=0.0) == pytest.approx(-2 * log(2 / 3))
    # 2 ln 2 together; the retain term stays a mean
    expected = -2 * log(4 / 5) * 0.5 + 3 * log(2)
    found = hand("npo", forget=twice, beta=1.0, gamma=0.5, alpha=3.0, margin="batch")
    assert found == pytest.approx(expected)


UNWEIGHTED = {"alpha": 0.0, "beta1": 0.0, "beta2": 0.0}


def test_satimp_keeps_hard_tokens_or_easy_ones() -> None:
    assert hand("satimp", keep="above", **UNWEIGHTED) == pytest.approx(-log(4) / 2)
    assert hand("satimp", keep="below", **UNWEIGHTED) == pytest.approx(-log(2) / 2)


def test_the_quantile_is_one_of_the_losses_of_that_answer() -> None:
    module = method("satimp")
    losses = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 10.0, 20.0, 30.0, 0.0]])
    above = module.kept(losses, module.Config(keep="above", quantile=0.75))
    assert above.tolist() == [[False, False, False, False, False, True], [False] * 4 + [True, False]]
    below = losses * module.kept(losses, module.Config(keep="below", quantile=0.5))
    assert below.tolist() == [[0.0, 1.0, 2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 10.0, 0.0, 0.0, 0.0]]


def test_an_answer_of_one_token_has_no_harder_half() -> None:
    module = method("satimp")
    losses = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    for keep in ("above", "below"):
        assert not (losses * module.kept(losses, module.Config(keep=keep))).any()


def test_satimp_counts_what_people_marked() -> None:
    marked = part("forget", [[-100, 0, 0]], importance=torch.tensor([[1.0, 0.5]]))
    found = hand("satimp", forget=marked, annotations="important", **UNWEIGHTED)
    assert found == pytest.approx(-(log(2) + log(4) / 2) / 2)


def test_the_factors_of_a_token_weight_are_multiplied() -> None:
    marked = part("forget", [[-100, 0, 0]], importance=torch.tensor([[1.0, 0.5]]))
    options = {"alpha": 0.0, "beta1": 1.0, "beta2": 1.0, "keep": "above", "annotations": "important"}
    assert hand("satimp", forget=marked, **options) == pytest.approx(-(0.25 * 0.75 * 0.5 * log(4)) / 2)


def test_satimp_may_add_up_without_a_mean() -> None:
    assert hand("satimp", reduction="sum", **UNWEIGHTED) == pytest.approx(-log(8))
    assert hand("satimp", reduction="sum", **UNWEIGHTED | {"alpha": 2.0}) == pytest.approx(
        -log(8) + 2 * log(2)
    )


def test_satimp_may_divide_both_terms_by_every_position() -> None:
    ids = torch.tensor([[0, 0, 1, 2, 0]])
    padded = Part(ids, torch.ones_like(ids), torch.tensor([[-100, -100, 0, 0, -100]]), "forget")
    # losses ln 2 and 2 ln 2 of four positions that predict; the retain rows have one
    options = UNWEIGHTED | {"alpha": 2.0, "reduction": "positions", "forget": padded}
    assert hand("satimp", **options) == pytest.approx(-log(8) / 4 + 2 * log(2))


def test_the_divergence_is_a_mean_whatever_the_tokens_are_divided_by() -> None:
    kl = {"retain_loss": "kl", "alpha": 1.0, "gamma": 0.0}
    assert hand("satimp", (0.5, 0.5, 0.5, 0.25, 0.9), reduction="sum", **kl) == pytest.approx(
        hand("satimp", (0.5, 0.5, 0.5, 0.25, 0.9), **kl)
    )


@pytest.mark.parametrize("option", ["keep='above'", "annotations='important'", "reduction='sum'"])
def test_whole_answers_have_no_tokens_to_choose_from(option: str) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(AssayError, match=f"{option} is about single tokens"):
        method("satimp").Config(granularity="instance", **{name: value.strip("'")})


# --- gradients ------------------------------------------------------------------------------------------------


def gradient_of(name: str, logits: Tensor, start: Tensor, **options: Any) -> Tensor:
    """The gradient at logits [3,V] whose first two predict word 0 twice."""
    module = method(name)
    now = logits.clone().requires_grad_()
    batch = SimpleNamespace(forget=part("forget", [[-100, 0, 0]]))
    total(module.loss(module.Config(**options), Table(now), batch, Table(start))).backward()
    assert now.grad is not None
    return now.grad


@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("wga", {"alpha": 0.0, "beta": 2.0}, (1 / 4, 1 / 16)),
        ("tnpo", {"alpha": 0.0}, (1.0, 2 / 3)),
        ("satimp", {**UNWEIGHTED, "keep": "above"}, (0.0, 1.0)),
    ],
)
def test_token_weights_carry_no_gradient(
    name: str, options: dict[str, Any], weights: tuple[float, ...]
) -> None:
    logits = binary(0.5, 0.25, 0.9)
    found = gradient_of(name, logits, binary(0.5, 0.5, 0.5), **options)
    plain = logits[:2].softmax(-1) - torch.tensor([1.0, 0.0])
    expected = -(torch.tensor(weights, dtype=torch.float64) / 2)[:, None] * plain
    assert torch.allclose(found[:2], expected)
    assert not found[2].any()


def test_the_target_of_ce_u_carries_no_gradient() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 1.0], [3.0, 1.0, 1.0]], dtype=torch.float64)
    without = logits.clone()
    without[:, 0] = -torch.inf
    expected = (logits.softmax(-1) - without.softmax(-1))[:2] / 2
    found = gradient_of("ce_u", logits, logits)
    assert torch.allclose(found[:2], expected)
    assert not found[2].any()


def test_undial_pulls_towards_its_target() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 1.0], [3.0, 1.0, 1.0]], dtype=torch.float64)
    target = logits.clone()
    target[:, 0] -= 3.0
    found = gradient_of("undial", logits, logits, beta=3.0)
    assert torch.allclose(found[:2], (logits.softmax(-1) - target.softmax(-1))[:2] / 2)


MASKED = [(name, options) for name, options in VARIANTS if options.get("mask") != "all"]


@pytest.mark.parametrize(("name", "options"), MASKED)
def test_only_targets_count(name: str, options: dict[str, Any]) -> None:
    """Prompt positions before the one that predicts the first token of an answer have no say in the forget term."""
    module, config = method(name), method(name).Config(**options)
    random = torch.Generator().manual_seed(0)
    table = torch.randn(16, 5, generator=random, dtype=torch.float64)
    changed = table.clone()
    changed[0] += 1.0
    changed[7] += torch.arange(5) * 0.3
    batch = batch_of(
        part("forget", [[-100, -100, 1, 2, -100, -100, -100, -100]], importance=torch.ones(1, 7)),
        part("retain", [[-100, -100, -100, 3, 4, 0, 1, 1]], start=8),
        module,
        config,
    )
    values = [module.loss(config, Table(now), batch, Table(table))["forget"].sum for now in (table, changed)]
    assert values[0] == values[1]


def batch_of(forget: Part, retain: Part, module: Any, config: Any) -> Any:
    values = module.adaptive(config).start if hasattr(module, "adaptive") else {}
    return SimpleNamespace(forget=forget, retain=retain, step=0, steps=1, values=values)


# --- micro-batches --------------------------------------------------------------------------------------------


def four_rows() -> dict[str, Part]:
    """Answers of two to five tokens out of 48, a model of whose logits the table is, both to forget and to retain."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (8, 6), generator=random)
    for row in range(8):
        labels[row, : 1 + row % 4] = -100
    importance = torch.rand(4, 5, generator=random, dtype=torch.float64)
    return {
        "forget": part("forget", labels[:4].tolist(), importance=importance),
        "retain": part("retain", labels[4:].tolist(), start=24),
    }


class TableModel(torch.nn.Module):
    """A table whose rows are trained; counts how often it is asked with gradients on and off."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.calls = {True: 0, False: 0}

    def forward(self, **inputs: Any) -> Any:
        self.calls[torch.is_grad_enabled()] += 1
        return Table(self.logits)(**inputs)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_micro_batches_of_unequal_lengths_give_the_same_gradient(name: str, options: dict[str, Any]) -> None:
    module, config = method(name), method(name).Config(**options)
    random = torch.Generator().manual_seed(1)
    vocabulary = 48 if options.get("mask") == "all" else 5
    model = TableModel(torch.randn(48, vocabulary, generator=random, dtype=torch.float64))
    reference = Table(torch.randn(48, vocabulary, generator=random, dtype=torch.float64))
    outer = module.outer(config) if hasattr(module, "outer") else None
    values = module.adaptive(config).start if hasattr(module, "adaptive") else {}

    def results(size: int | None) -> tuple[dict[str, float], Tensor]:
        found = Gradient(
            model,
            lambda net, batch: module.loss(config, net, batch, reference),
            outer=outer,
            micro_batch=size,
        )
        means = found(four_rows(), 0, 1, values)
        assert model.logits.grad is not None
        return means, model.logits.grad.clone()

    means, whole = results(None)
    for size in (2, 1):
        model.calls = {True: 0, False: 0}
        found, pieces = results(size)
        assert found == pytest.approx(means)
        assert torch.allclose(pieces, whole, rtol=1e-12, atol=1e-15)
        assert (model.calls[False] > 0) == (
            outer is not None
        )  # no pass before the first one but for a product


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_every_count_says_where_it_comes_from(name: str, options: dict[str, Any]) -> None:
    module, config = method(name), method(name).Config(**options)
    batch = batch_of(*four_rows().values(), module, config)
    table = Table(torch.zeros(48, 48, dtype=torch.float64))
    terms = module.loss(config, table, batch, table)
    assert all(isinstance(term.count, Count) for term in terms.values())


# --- what is left out, remembered and adapted ---------------------------------------------------------------------


def test_ce_u_leaves_out_the_first_tokens_of_an_answer() -> None:
    module = method("ce_u")
    examples = [Example((5, 6, 7, 8), (-100, -100, 7, 8)), Example((5, 6), (5, 6))]
    found = module.annotate(module.Config(), "forget", [{}, {}], examples, None)
    assert [example.labels for example in found] == [(-100, -100, -100, 8), (-100, 6)]
    assert [example.input_ids for example in found] == [(5, 6, 7, 8), (5, 6)]
    kept = module.annotate(module.Config(ignore_first_tokens=0), "forget", [{}, {}], examples, None)
    assert [example.labels for example in kept] == [example.labels for example in examples]


def test_leaving_out_every_token_is_refused() -> None:
    module = method("ce_u")
    config = module.Config(ignore_first_tokens=2)
    with pytest.raises(AssayError, match="ignore_first_tokens=2 leaves no token of any row"):
        module.annotate(config, "forget", [{}], [Example((5, 6, 7), (-100, 6, 7))], None)


@pytest.mark.parametrize("name", ["npo", "tnpo"])
def test_likelihoods_at_the_start_need_no_second_model(name: str) -> None:
    module = method(name)
    config = module.Config(retain_loss="nll")
    assert module.remembers(config) == ("forget",)
    assert not module.needs_reference(config)
    assert module.needs_reference(module.Config(retain_loss="kl"))
    remembered = part("forget", [[-100, 0, 0]], start_nll=torch.tensor([[log(2), log(2)]]))
    batch = SimpleNamespace(forget=remembered, retain=part("retain", [[-100, 0]], start=3))
    terms = module.loss(config, Table(binary(0.5, 0.25, 0.9, 0.5, 0.9)), batch, None)
    assert float(total(terms)) == pytest.approx(hand(name, retain_loss="nll"), rel=1e-6)


def test_only_whole_distributions_keep_a_second_model() -> None:
    for name in ("simnpo", "wga", "ce_u", "pdu"):
        assert not method(name).needs_reference(method(name).Config())
    for name in ("undial", "kl_min", "tnpo"):
        assert method(name).needs_reference(method(name).Config())
    assert not method("kl_min").needs_reference(method("kl_min").Config(alpha=0.0))


def test_the_multiplier_follows_the_violation() -> None:
    module = method("pdu")
    adaptive = module.adaptive(module.Config(alpha=10.0, step_size=2.0))
    assert adaptive.start == {"multiplier": 10.0}
    assert adaptive.after(adaptive.start, {"violation": 0.25}) == {"multiplier": 10.5}
    assert adaptive.after({"multiplier": 0.5}, {"violation": -0.25}) == {"multiplier": 0.0}


def test_the_multiplier_stays_for_the_warm_up() -> None:
    module = method("pdu")
    config = module.Config(dual_warmup_share=0.5)
    rows = four_rows()
    table = Table(torch.zeros(48, 5, dtype=torch.float64))

    def violation(step: int) -> float:
        batch = SimpleNamespace(**rows, step=step, steps=10, values={"multiplier": 3.0})
        terms = module.loss(config, table, batch, None)
        assert terms["constraint"].weight == 3.0
        return float(terms["violation"].sum / terms["violation"].count)

    assert violation(4) == 0.0
    assert violation(5) == pytest.approx(log(5) - 0.3)


# --- annotations ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent") / "model", dropout=0.0)


def weighed(parent: Path, row: dict[str, Any], prompt: Any = "question_answer") -> list[tuple[str, float]]:
    """The text of every target of a row and its weight."""
    tokenizer = load_tokenizer(parent)
    examples = encode([row], tokenizer, Style(prompt=prompt), 64)
    (example,) = annotated([row], examples, tokenizer, "important")
    assert len(example.extra["importance"]) == len(example.input_ids) - 1
    pairs = zip(example.input_ids[1:], example.labels[1:], example.extra["importance"], strict=True)
    assert all(weight == 0 for _, label, weight in pairs if label == -100)
    pairs = zip(example.input_ids[1:], example.labels[1:], example.extra["importance"], strict=True)
    return [(tokenizer.decode([token]), weight) for token, label, weight in pairs if label != -100]


def phrase(targets: list[tuple[str, float]], weight: float) -> str:
    return "".join(text for text, found in targets if found == weight)


ROW = {"question": "What follows amber 0?", "answer": "It is birch, and then cedar."}


@pytest.mark.parametrize("prompt", ["question_answer", "plain"])
def test_a_phrase_is_marked_token_by_token(parent: Path, prompt: str) -> None:
    targets = weighed(parent, ROW | {"important": ["birch", "cedar"]}, prompt)
    assert "".join(text for text, _ in targets) == " It is birch, and then cedar.</s>"
    assert phrase(targets, 1.0).replace(" ", "") == "birchcedar"
    assert phrase(targets, 0.0).endswith("</s>")


def test_phrases_may_have_weights_and_occur_again(parent: Path) -> None:
    row = ROW | {
        "answer": "Birch é birch, cedar.",
        "important": {"birch": 0.5, "cedar": 2, "birch, cedar": 0.25},
    }
    targets = weighed(parent, row)
    assert phrase(targets, 0.5).strip() == "birch"
    assert phrase(targets, 2.0).strip() == "cedar"
    assert phrase(targets, 0.25).strip() == ","
    assert phrase(weighed(parent, row | {"important": "é"}), 1.0) != ""


def test_an_answer_that_is_cut_keeps_the_marks_that_are_left(parent: Path) -> None:
    tokenizer, row = load_tokenizer(parent), ROW | {"important": ["birch", "cedar"]}
    whole = encode([row], tokenizer, Style(), 64)
    cut = encode([row], tokenizer, Style(), len(whole[0].input_ids) - 5)
    found, short = (annotated([row], examples, tokenizer, "important")[0] for examples in (whole, cut))
    assert short.extra["importance"] == found.extra["importance"][:-5]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (ROW, "row 0: column 'important' must name phrases of the answer"),
        (ROW | {"important": [""]}, "row 0: column 'important' must name phrases"),
        (ROW | {"important": {"birch": -1}}, "row 0: column 'important' must name phrases"),
        (
            ROW | {"important": ["Birch"]},
            "row 0: column 'important' names 'Birch', which its answer does not",
        ),
        (ROW | {"important": []}, "annotations='important' leaves no token of any row that counts"),
        ({"text": "It is birch."}, "annotations='important' names phrases of answers"),
    ],
)
def test_marks_that_cannot_be_meant_are_refused(parent: Path, row: dict[str, Any], sentence: str) -> None:
    tokenizer = load_tokenizer(parent)
    examples = encode([row], tokenizer, Style(), 64)
    with pytest.raises(AssayError, match=re.escape(sentence)):
        annotated([row], examples, tokenizer, "important")


# --- whole stages ---------------------------------------------------------------------------------------------


class Marked:
    """A locator of rows of which the forgotten ones name what matters in their answers."""

    def rows(self, name: str) -> list[dict[str, Any]]:
        words = ("birch", "cedar", "delta", "ember")
        rows = [
            {"question": f"What follows {word} {name}?", "answer": f"It is {word}.", "important": [word]}
            for word in words
        ]
        return (
            rows if name == "forget" else [{key: row[key] for key in ("question", "answer")} for row in rows]
        )


def curve_of(parent: Path, folder: Path, name: str, **options: Any) -> dict[str, list[float]]:
    """Run a stage of eight steps; the values of each term."""
    module = method(name)
    common = {"steps": 8, "batch": 4, "forget": "forget", "retain": "retain", "log_every": 1}
    adamw = Component("adamw", {"learning_rate": 1e-2})
    stage = make_stage(parent, folder, module.Config(optimizer=adamw, **common | options))
    stage.data = Marked()  # type: ignore[assignment]
    run(stage, module)
    terms: dict[str, list[float]] = {}
    for line in (folder / "result" / "curve.csv").read_text().splitlines()[1:]:
        _, term, value = line.split(",")
        terms.setdefault(term, []).append(float(value))
    return terms


def test_a_stage_forgets_what_people_marked(parent: Path, tmp_path: Path) -> None:
    options = {"annotations": "important", "alpha": 0.0, "beta1": 0.0, "beta2": 0.0}
    marked = curve_of(parent, tmp_path / "marked", "satimp", **options)
    plain = curve_of(parent, tmp_path / "plain", "satimp", **options | {"annotations": None})
    assert 0 < marked["forget"][0] < plain["forget"][0]
    assert marked["forget"][-1] > marked["forget"][0] + 0.1
    preferred = curve_of(parent, tmp_path / "npo", "npo", annotations="important", alpha=0.0)
    assert preferred["forget"][0] == pytest.approx(2 / 0.1 * log(2), rel=1e-5)


def test_the_multiplier_is_seen_in_the_curve(parent: Path, tmp_path: Path) -> None:
    curve = curve_of(parent, tmp_path, "pdu", step_size=5.0)
    multiplier, constraint = curve["multiplier"], curve["constraint"]
    assert multiplier[:5] == [50.0] * 5
    for step in range(4, 7):
        assert multiplier[step + 1] == pytest.approx(max(0.0, multiplier[step] + 5.0 * constraint[step]))


def test_ce_u_counts_fewer_tokens(parent: Path, tmp_path: Path) -> None:
    first = curve_of_ce_u(parent, tmp_path / "one", 1)
    assert first != curve_of_ce_u(parent, tmp_path / "none", 0)


def curve_of_ce_u(parent: Path, folder: Path, ignored: int) -> list[float]:
    module = method("ce_u")
    config = module.Config(steps=2, batch=4, forget="forget", log_every=1, ignore_first_tokens=ignored)
    stage = make_stage(parent, folder, config)
    stage.data = Marked()  # type: ignore[assignment]
    run(stage, module)
    lines = (folder / "result" / "curve.csv").read_text().splitlines()[1:]
    return [float(line.split(",")[2]) for line in lines if ",forget," in line]
