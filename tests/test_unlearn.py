"""Unlearning losses: one number worked out by hand each, what carries a gradient, masks and micro-batches."""

from __future__ import annotations

import re
from math import log
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.checkpoint import load_tokenizer
from methods.data import Part
from methods.find import catalogue
from methods.gradient import Gradient
from methods.stage import AssayError, Component
from methods.terms import answer_nll, forward, token_nll, total
from methods.unlearn import (
    Retaining,
    Rows,
    Templates,
    check,
    forget_and_retain,
    probe_of,
    run,
    start_nll,
)
from tests.parity.cases import Table
from tests.training import make_parent, make_stage

METHODS = ("grad_ascent", "grad_diff", "npo", "satimp")


def method(name: str) -> Any:
    return catalogue().method(f"unlearn.{name}").load()


def binary(*probabilities: float) -> Tensor:
    """Logits [positions,2] of a two-word model that gives word 0 these probabilities."""
    return torch.tensor([[log(p), log(1 - p)] for p in probabilities], dtype=torch.float64)


def part(name: str, labels: list[list[int]], start: int = 0) -> Part:
    """A part whose ids are the rows ``start``, ``start`` + 1, ... of a table."""
    wanted = torch.tensor(labels)
    ids = torch.arange(start, start + wanted.numel()).view_as(wanted)
    return Part(input_ids=ids, attention_mask=torch.ones_like(wanted), labels=wanted, name=name)


def hand(name: str, start: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5, 0.5), **options: Any) -> float:
    """The loss of a forget answer with probabilities 1/2 and 1/4 and a retain answer with 1/2.

    ``start`` are the reference's probabilities.
    """
    module = method(name)
    batch = SimpleNamespace(
        forget=part("forget", [[-100, 0, 0]]), retain=part("retain", [[-100, 0]], start=3)
    )
    model, reference = Table(binary(0.5, 0.25, 0.9, 0.5, 0.9)), Table(binary(*start))
    config = module.Config(**options)
    outer = module.outer(config) if hasattr(module, "outer") else None
    return float(total(module.loss(config, model, batch, reference), outer))


def test_gradient_ascent_is_minus_the_answer_loss() -> None:
    assert hand("grad_ascent") == pytest.approx(-(log(2) + log(4)) / 2)


def test_gradient_difference_weighs_both_sides() -> None:
    assert hand("grad_diff", gamma=2.0, alpha=3.0) == pytest.approx(-2 * 1.5 * log(2) + 3 * log(2))


def test_kl_retain_is_a_mean_over_every_position() -> None:
    start = (
        0.5,
        0.5,
        0.5,
        0.25,
        0.9,
    )  # the last position agrees: 0; the one before has D((1/4, 3/4) || (1/2, 1/2))
    divergence = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    assert hand("grad_diff", start, gamma=0.0, retain_loss="kl") == pytest.approx(divergence / 2)


def test_negative_preference_compares_summed_losses() -> None:
    # s = 3 ln 2, s_start = 2 ln 2, sigmoid(ln 2) = 2/3
    assert hand("npo", beta=1.0, alpha=0.0) == pytest.approx(-2 * log(2 / 3))


def test_satimp_weighs_tokens_by_saturation_and_importance() -> None:
    expected = -(0.5 * 0.5 * log(2) + 0.25 * 0.75 * log(4)) / 2
    assert hand("satimp", beta1=1.0, beta2=1.0, alpha=0.0) == pytest.approx(expected)


def test_satimp_groups_share_their_mean_weight() -> None:
    expected = -(0.375 * log(2) + 0.375 * log(4)) / 2
    assert hand("satimp", beta1=1.0, beta2=0.0, alpha=0.0, group_tokens=2) == pytest.approx(expected)


def test_satimp_weighs_whole_answers() -> None:
    expected = -(1 / 8) * log(8)
    assert hand("satimp", beta1=1.0, beta2=0.0, alpha=0.0, granularity="instance") == pytest.approx(expected)
    assert hand("satimp", beta1=1.0, beta2=0.0, alpha=0.0, granularity="batch") == pytest.approx(expected)


def test_satimp_weights_carry_no_gradient() -> None:
    module = method("satimp")
    logits = binary(0.5, 0.25, 0.9).requires_grad_()
    batch = SimpleNamespace(forget=part("forget", [[-100, 0, 0]]))
    total(module.loss(module.Config(beta1=2.0, beta2=1.0, alpha=0.0), Table(logits), batch, None)).backward()
    weights = torch.tensor([0.25 * 0.5, 0.0625 * 0.75])
    expected = -(weights / 2)[:, None] * (logits[:2].softmax(-1) - torch.tensor([1.0, 0.0]))
    assert torch.allclose(logits.grad[:2], expected.detach())
    assert not logits.grad[2].any()


def test_satimp_does_not_vanish_on_memorised_tokens_in_single_precision() -> None:
    module = method("satimp")
    logits = torch.tensor([[18.0, 0.0], [0.0, 0.0]])  # 1 - exp(-1.5e-8) rounds to 0 in float32
    losses = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([0, 0]), reduction="none")
    weight = module.reweight(losses.float(), module.Config(beta1=0.0, beta2=1.0))
    assert float(weight[0]) == pytest.approx(1.523e-8, rel=1e-3)


def test_zero_to_the_power_of_zero_is_one() -> None:
    module = method("satimp")
    certain, hopeless = module.reweight(torch.tensor([0.0, 1e4]), module.Config(beta1=0.0, beta2=0.0))
    assert certain == hopeless == 1


def test_the_reference_gets_no_gradient() -> None:
    module = method("npo")
    start = binary(0.5, 0.5, 0.5, 0.5, 0.5).requires_grad_()
    batch = SimpleNamespace(
        forget=part("forget", [[-100, 0, 0]]), retain=part("retain", [[-100, 0]], start=3)
    )
    model = Table(binary(0.5, 0.25, 0.9, 0.5, 0.9).requires_grad_())
    total(module.loss(module.Config(retain_loss="kl"), model, batch, Table(start))).backward()
    assert start.grad is None


@pytest.mark.parametrize("name", METHODS)
def test_prompts_do_not_count(name: str) -> None:
    module = method(name)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 5, generator=random, dtype=torch.float64)
    changed = logits.clone()
    changed[[0, 7]] += torch.randn(
        2, 5, generator=random, dtype=torch.float64
    )  # a prompt position and a last one
    batch = SimpleNamespace(
        forget=part("forget", [[-100, -100, 1, 2, -100, -100, -100, -100]]),
        retain=part("retain", [[-100, -100, -100, 3, 4, 0, 1, 1]], start=8),
    )
    values = [
        total(module.loss(module.Config(), Table(table), batch, Table(logits))) for table in (logits, changed)
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("micro_batch", [2, 1])
def test_micro_batches_of_unequal_lengths_give_the_same_gradient(name: str, micro_batch: int) -> None:
    options = {} if name == "grad_ascent" else {"retain_loss": "kl"}
    check_micro_batches(name, micro_batch, **options)


@pytest.mark.parametrize("granularity", ["instance", "batch"])
def test_answer_and_batch_weights_give_the_same_gradient_in_micro_batches(granularity: str) -> None:
    check_micro_batches("satimp", 2, granularity=granularity, beta1=0.1, beta2=0.5)


def check_micro_batches(name: str, micro_batch: int, **options: Any) -> None:
    """The loop's gradient of four forget and four retain rows, whole and in pieces."""
    module = method(name)
    config = module.Config(**options)
    outer = module.outer(config) if hasattr(module, "outer") else None
    random = torch.Generator().manual_seed(0)
    model = TableModel(torch.randn(48, 5, generator=random, dtype=torch.float64))
    reference = Table(torch.randn(48, 5, generator=random, dtype=torch.float64))
    labels = torch.randint(0, 5, (8, 6), generator=random)
    for row in range(8):
        labels[row, : 1 + row % 4] = -100  # answers of two to five tokens
    parts = {
        "forget": part("forget", labels[:4].tolist()),
        "retain": part("retain", labels[4:].tolist(), start=24),
    }

    def gradient(size: int | None) -> Tensor:
        found = Gradient(
            model,
            lambda net, batch: module.loss(config, net, batch, reference),
            outer=outer,
            micro_batch=size,
        )
        found(parts, 0, 1)
        return model.logits.grad.clone()

    assert torch.allclose(gradient(micro_batch), gradient(None), rtol=1e-12, atol=1e-15)


class TableModel(torch.nn.Module):
    """A table whose rows are trained."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, **inputs: Any) -> Any:
        return Table(self.logits)(**inputs)


def test_only_a_loss_that_looks_back_asks_for_a_reference() -> None:
    assert not method("grad_ascent").needs_reference(method("grad_ascent").Config())
    for name in ("grad_diff", "npo", "satimp"):
        module = method(name)
        assert not module.needs_reference(module.Config())
        assert module.needs_reference(module.Config(retain_loss="kl"))
        assert not module.needs_reference(module.Config(retain_loss="kl", alpha=0.0))


def test_groups_of_whole_answers_are_refused_with_a_sentence() -> None:
    with pytest.raises(AssayError, match="group_tokens=10 is about single tokens"):
        method("satimp").Config(granularity="instance", group_tokens=10)


def test_retain_rows_are_read_only_where_they_count() -> None:
    assert set(forget_and_retain(method("grad_ascent").Config())) == {"forget"}
    assert set(forget_and_retain(method("npo").Config(alpha=0.0))) == {"forget"}
    assert forget_and_retain(method("npo").Config(retain="tofu/retain99"))["retain"] == Rows("tofu/retain99")


def test_probes_may_name_the_methods_own_sets() -> None:
    config = method("grad_diff").Config(forget="tofu/forget01")
    assert probe_of(config, "forget") == "forget=tofu/forget01"
    assert probe_of(config, "facts=authors/facts") == "facts=authors/facts"


# --- whole stages -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent") / "model", dropout=0.0)


def unlearned(parent: Path, folder: Path, name: str, **options: Any) -> list[tuple[str, str, float]]:
    """Run a stage of six steps; the lines of its curve."""
    module = method(name)
    adamw = Component("adamw", {"learning_rate": 1e-2})
    common = {
        "steps": 6,
        "batch": 4,
        "forget": "first",
        "probe": ("forget",),
        "probe_every": 6,
        "log_every": 1,
    }
    config = module.Config(optimizer=adamw, **common, **options)
    run(make_stage(parent, folder, config), module)
    lines = (folder / "result" / "curve.csv").read_text().splitlines()[1:]
    return [(step, term, float(value)) for step, term, value in (line.split(",") for line in lines)]


@pytest.mark.parametrize("name", METHODS)
def test_a_stage_raises_the_forget_loss(name: str, parent: Path, tmp_path: Path) -> None:
    # this model has memorised nothing: learning the retain rows helps with the forget rows, too, and SatImp's
    # default exponents would weigh a token with 1e-12
    options = {"grad_diff": {"alpha": 0.1}, "satimp": {"beta1": 0.0, "beta2": 1.0}}
    curve = unlearned(parent, tmp_path, name, **options.get(name, {}))
    before, after = (value for _, term, value in curve if term == "probe.forget")
    assert after > before + 0.1


def test_the_reference_is_the_start(parent: Path, tmp_path: Path) -> None:
    curve = unlearned(parent, tmp_path, "npo", retain_loss="kl", beta=0.5)
    forget = [value for _, term, value in curve if term == "forget"]
    retain = [value for _, term, value in curve if term == "retain"]
    assert forget[0] == pytest.approx(2 / 0.5 * log(2), rel=1e-5)  # nothing has moved yet
    assert retain[0] == pytest.approx(0.0, abs=1e-6)
    assert forget[-1] < forget[0]
    assert retain[-1] > 1e-4


def test_micro_batches_do_not_change_the_result(parent: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"granularity": "batch", "beta1": 0.0, "beta2": 1.0, "retain_loss": "kl"}
    whole = unlearned(parent, tmp_path / "whole", "satimp", **options)
    pieces = unlearned(parent, tmp_path / "pieces", "satimp", micro_batch=1, **options)
    for (_, term, expected), (_, _, actual) in zip(whole, pieces, strict=True):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5), term


# --- what is remembered, drawn and refused ------------------------------------------------------------------


def toy(**functions: Any) -> Any:
    """A method made of the given functions, on the shared recipe."""
    module = ModuleType("methods.unlearn.toy")
    module.__dict__.update(functions)
    return module


def toy_stage(parent: Path, folder: Path, **options: Any) -> Any:
    config = Retaining(steps=4, batch=4, forget="first", log_every=1, **options)
    return make_stage(parent, folder, config)


def test_remembered_likelihoods_are_those_of_the_start(parent: Path, tmp_path: Path) -> None:
    seen = []

    def loss(config: Any, model: Any, batch: Any, reference: Any) -> Any:
        assert reference is None
        now = token_nll(forward(model, batch.forget))
        seen.append((now.detach(), start_nll(batch.forget, None)))
        return {"forget": answer_nll(batch.forget, forward(model, batch.forget), -1.0)}

    method = toy(loss=loss, needs_reference=lambda config: False, remembers=lambda config: ("forget",))
    run(toy_stage(parent, tmp_path, optimizer=Component("adamw", {"learning_rate": 1e-2})), method)
    now, start = seen[0]
    assert torch.allclose(now, start, atol=1e-5)
    assert (seen[-1][0] - seen[-1][1]).abs().max() > 0.05
    assert not start[seen[0][0] == 0].any()


def test_the_start_is_asked_once_and_not_at_every_step(parent: Path, tmp_path: Path) -> None:
    calls = {"training": 0, "start": 0}

    def loss(config: Any, model: Any, batch: Any, reference: Any) -> Any:
        if batch.step == 0 and not calls["training"]:
            model.register_forward_pre_hook(lambda *_: calls.__setitem__("training", calls["training"] + 1))
        module = method("npo")
        return module.loss(module.Config(alpha=0.0), model, batch, reference)

    def prepare(config: Any, model: Any, stage: Any, parts: Any) -> None:
        calls["start"] = sum("start_nll" in example.extra for example in parts["forget"])

    module = toy(
        loss=loss, prepare=prepare, needs_reference=lambda config: False, remembers=lambda config: ("forget",)
    )
    run(toy_stage(parent, tmp_path), module)
    assert calls == {"training": 4, "start": 12}  # a forward pass each step, every row scored before


def test_each_question_gets_a_drawn_answer(parent: Path, tmp_path: Path) -> None:
    seen = []

    def loss(config: Any, model: Any, batch: Any, reference: Any) -> Any:
        tokenizer = load_tokenizer(parent)
        ids = [
            row[mask.bool()]
            for row, mask in zip(batch.template.input_ids, batch.template.attention_mask, strict=True)
        ]
        asked = [
            row[mask.bool()]
            for row, mask in zip(batch.forget.input_ids, batch.forget.attention_mask, strict=True)
        ]
        seen.extend(zip(tokenizer.batch_decode(asked), tokenizer.batch_decode(ids), strict=True))
        return {"template": answer_nll(batch.template, forward(model, batch.template))}

    def parts(config: Any) -> Any:
        return {"forget": Rows(config.forget), "template": Templates(config.forget, "refusals")}

    run(toy_stage(parent, tmp_path), toy(loss=loss, parts=parts, needs_reference=lambda config: False))
    questions = [(one.split("Answer:")[0], other.split("Answer:")[0]) for one, other in seen]
    assert all(one == other for one, other in questions)
    answers = {other.split("Answer:")[1] for _, other in seen}
    assert answers == {" No amber.</s>", " No birch.</s>", " No cedar.</s>"}


class Sets:
    """A locator of given rows."""

    def __init__(self, **sets: list[dict[str, str]]) -> None:
        self.sets = sets

    def rows(self, name: str) -> list[dict[str, str]]:
        return self.sets[name]


ROW = {"question": "Who?", "answer": "She."}
OTHER = {"question": "Where?", "answer": "There."}


@pytest.mark.parametrize(
    ("forget", "retain", "sentence"),
    [
        ([ROW, OTHER], [OTHER], "holds 1 of 2 rows of forget='a'; 'Where?' is row 1 there and row 0 here"),
        ([ROW | {"answer": " "}], [OTHER], "forget='a': the answer of row 0 is empty"),
        ([ROW], [OTHER, OTHER | {"answer": ""}], "retain='b': the answer of row 1 is empty"),
        ([], [OTHER], "forget='a' has no lines"),
    ],
)
def test_sets_that_cannot_be_meant_are_refused(forget: Any, retain: Any, sentence: str) -> None:
    config = Retaining(forget="a", retain="b")
    with pytest.raises(AssayError, match=re.escape(sentence)):
        check(config, Sets(a=forget, b=retain))  # type: ignore[arg-type]


def test_a_retain_set_that_is_not_read_may_overlap() -> None:
    check(Retaining(forget="a", retain="b", alpha=0.0), Sets(a=[ROW], b=[ROW]))  # type: ignore[arg-type]


def test_an_answer_that_the_context_leaves_no_room_for_is_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="no token of its answer fits"):
        run(toy_stage(parent, tmp_path, context_tokens=5), method("grad_diff"))
    assert not (tmp_path / "result").exists()
