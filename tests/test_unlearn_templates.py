"""Unlearning with other answers: FLAT, refusals, alternates, and the stage that writes alternates."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from math import exp, inf, log, tanh
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods import loop
from methods.checkpoint import load_model, load_tokenizer
from methods.data import Part, Style, alternates, encode_pairs, read_rows, write_rows
from methods.find import catalogue
from methods.gradient import Gradient
from methods.progress import Progress
from methods.stage import AssayError, Component, Interrupted, Parent, Stage
from methods.terms import answer_nll, forward, token_nll, total
from methods.unlearn import Rows, Templates, alt_po, check, flat, idk_dpo, idk_nll, run
from tests.parity.cases import Table
from tests.training import ROWS, make_parent, make_stage, weights_of
from tests.training import Rows as Locator
from workflows.notation import Call
from workflows.options import resolve

PAPER = ("total_variation", "kl", "jensen_shannon", "pearson")
OTHERS = Parent("others")


def binary(*probabilities: float) -> Tensor:
    """Logits [positions,2] of a two-word model that gives word 0 these probabilities."""
    return torch.tensor([[log(p), log(1 - p)] for p in probabilities], dtype=torch.float64)


def part(name: str, labels: Sequence[Sequence[int]], start: int = 0) -> Part:
    """A part whose ids are the rows ``start``, ``start`` + 1, ... of a table."""
    wanted = torch.tensor(labels)
    ids = torch.arange(start, start + wanted.numel()).view_as(wanted)
    return Part(input_ids=ids, attention_mask=torch.ones_like(wanted), labels=wanted, name=name)


def value(module: ModuleType, config: Any, model: Any, batch: Any, reference: Any = None) -> Tensor:
    """The loss of a batch."""
    outer = module.outer(config) if hasattr(module, "outer") else None
    return total(module.loss(config, model, batch, reference), outer)


# --- FLAT --------------------------------------------------------------------------------------------------------

# Forgotten tokens of probability 1/2 and 1/4, template tokens of 1/2: P_f = 3/8, P_e = 1/2 over the answers.
MODEL = (0.5, 0.25, 0.9, 0.9, 0.5, 0.9, 0.9, 0.9)
BY_HAND = {
    "total_variation": lambda e, f: -tanh(e) / 2 + tanh(f) / 2,
    "kl": lambda e, f: -e + exp(f - 1),
    "jensen_shannon": lambda e, f: -(log(2) - log(1 + exp(-e))) + f + log(1 + exp(-f)) - log(2),
    "pearson": lambda e, f: -e + f**2 / 4 + f,
}


def flat_batch() -> Any:
    return SimpleNamespace(
        forget=part("forget", [[-100, 0, 0, -100]]),
        template=part("template", [[-100, 0, -100, -100]], start=4),
    )


@pytest.mark.parametrize("divergence", PAPER)
def test_flat_compares_the_mean_probability_of_each_answer(divergence: str) -> None:
    config = flat.Config(divergence=divergence)  # type: ignore[arg-type]
    found = value(flat, config, Table(binary(*MODEL)), flat_batch())
    assert float(found) == pytest.approx(BY_HAND[divergence](1 / 2, 3 / 8), rel=1e-12)


@pytest.mark.parametrize("divergence", PAPER)
def test_the_code_divides_by_the_padded_length(divergence: str) -> None:
    config = flat.Config(divergence=divergence, normalise="padded")  # type: ignore[arg-type]
    found = value(flat, config, Table(binary(*MODEL)), flat_batch())
    assert float(found) == pytest.approx(BY_HAND[divergence](1 / 6, 1 / 4), rel=1e-12)


def test_only_the_code_mixes_the_batch_before_the_divergence() -> None:
    batch = SimpleNamespace(
        forget=part("forget", [[-100, 0], [-100, 0]]),
        template=part("template", [[-100, 0], [-100, 0]], start=4),
    )
    model = Table(binary(0.2, 0.9, 0.8, 0.9, 0.1, 0.9, 0.7, 0.9))
    hand = BY_HAND["pearson"]
    paper = value(flat, flat.Config(divergence="pearson"), model, batch)
    code = value(flat, flat.Config(divergence="pearson", normalise="padded"), model, batch)
    assert float(paper) == pytest.approx((hand(0.1, 0.2) + hand(0.7, 0.8)) / 2, rel=1e-12)
    assert float(code) == pytest.approx(hand(0.4, 0.5), rel=1e-12)


def padded_gradient(divergence: str, normalise: str, padding: int) -> Tensor:
    """The gradient at the answers' logits of a batch with that much padding on the right."""
    torch.manual_seed(0)
    answers = torch.randn(2, 3, 7, dtype=torch.float64)
    leaf = answers.clone().requires_grad_()
    labels = [[-100, 1, 2, *[-100] * padding]]
    filler = torch.zeros(2, padding, 7, dtype=torch.float64)
    table = Table(torch.cat([leaf, filler], 1).flatten(0, 1))
    batch = SimpleNamespace(
        forget=part("forget", labels), template=part("template", labels, start=3 + padding)
    )
    config = flat.Config(divergence=divergence, normalise=normalise)  # type: ignore[arg-type]
    value(flat, config, table, batch).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("divergence", PAPER)
def test_padding_halves_the_gradient_of_the_code_and_not_that_of_the_paper(divergence: str) -> None:
    # 100 and 200 targets of which 2 count: the probabilities are small, so the halving is that of first order
    short, long = (padded_gradient(divergence, "padded", padding) for padding in (98, 198))
    assert short.abs().max() > 1e-4
    assert torch.allclose(long, short / 2, rtol=0.02)
    same = [padded_gradient(divergence, "answer", padding) for padding in (98, 198)]
    assert torch.equal(*same)


def directions(divergence: str) -> tuple[float, float]:
    """The derivatives of the loss by the probabilities of the template and of the forgotten answer."""
    optimal, conjugate = flat.functions(flat.Config(divergence=divergence))  # type: ignore[arg-type]
    template, forget = torch.tensor(0.3, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    (conjugate(forget) - optimal(template)).backward()
    return float(template.grad), float(forget.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("divergence", PAPER)
def test_flat_raises_the_template_and_lowers_the_forgotten_answer(divergence: str) -> None:
    template, forget = directions(divergence)
    assert template < 0 < forget


def test_divergences_of_the_code_alone_are_wrong_as_the_text_says() -> None:
    for name in ("reverse_kl", "squared_hellinger"):
        template, forget = directions(name)
        assert forget < 0 < template
    template, forget = directions("neyman")
    assert template > 0 and forget > 0


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffrey", "squared_hellinger", "neyman"])
def test_divergences_of_the_code_alone_are_not_offered(divergence: str) -> None:
    call = Call("unlearn.flat", (("divergence", divergence),))
    with pytest.raises(AssayError, match=f'divergence="{divergence}": input should be'):
        resolve(call, catalogue().method("unlearn.flat"), catalogue(), lambda *_: OTHERS)


class ForgetOnly(Locator):
    """Knows the forget set and the refusals, and nothing else."""

    def rows(self, name: str) -> list[dict[str, str]]:
        if name not in ("first", "refusals"):
            raise AssertionError(f"{name} was read")
        return super().rows(name)


def test_flat_reads_forget_data_only_and_keeps_no_second_model(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a reference was made")

    monkeypatch.setattr(loop, "reference_of", refuse)
    config = flat.Config(forget="first", refusals="refusals", steps=2, batch=4)
    assert not flat.needs_reference(config)
    assert not hasattr(config, "retain") and not hasattr(flat, "remembers")
    stage = make_stage(parent, tmp_path, config)
    stage.data = ForgetOnly()  # type: ignore[assignment]
    run(stage, flat)
    assert (tmp_path / "result" / "model" / "model.safetensors").is_file()


# --- refusals by training ------------------------------------------------------------------------------------------


def idk_value(**options: Any) -> float:
    """A refusal of one token with probability 1/2, a retain answer of two with 1/4 each."""
    batch = SimpleNamespace(
        template=part("template", [[-100, 0]]), retain=part("retain", [[-100, 0, 0]], start=2)
    )
    model = Table(binary(0.5, 0.9, 0.25, 0.25, 0.9))
    return float(value(idk_nll, idk_nll.Config(**options), model, batch))


def test_refusals_and_retain_rows_have_a_mean_each() -> None:
    assert idk_value(gamma=2.0, alpha=3.0) == pytest.approx(2 * log(2) + 3 * log(4))


def test_tofus_form_is_one_mean_over_the_tokens_of_both() -> None:
    assert idk_value(form="tofu_concatenated") == pytest.approx((log(2) + 2 * log(4)) / 3)
    assert idk_value(form="tofu_concatenated", gamma=2.0, alpha=3.0) == pytest.approx(
        (2 * log(2) + 6 * log(4)) / 3
    )
    assert idk_value(form="tofu_concatenated", alpha=0.0) == pytest.approx(log(2))


def test_one_mean_of_token_losses_and_divergences_is_refused() -> None:
    with pytest.raises(AssayError, match="one cross-entropy over both batches"):
        idk_nll.Config(form="tofu_concatenated", retain_loss="kl")


def test_the_true_answers_are_not_read_to_train_refusals() -> None:
    config = idk_nll.Config(forget="a", refusals="b", retain="c")
    assert idk_nll.parts(config) == {"template": Templates("a", "b"), "retain": Rows("c")}
    assert set(idk_nll.parts(idk_nll.Config(alpha=0.0))) == {"template"}


# --- preference ----------------------------------------------------------------------------------------------------


def preference_batch(name: str) -> Any:
    return SimpleNamespace(
        **{"forget": part("forget", [[-100, 0, 0]]), name: part(name, [[-100, 0, -100]], start=3)}
    )


METHODS = {
    "template": (idk_dpo, idk_dpo.Config),
    "alternate": (alt_po, lambda **o: alt_po.Config(alternates=OTHERS, **o)),
}


@pytest.mark.parametrize("name", METHODS)
def test_preference_compares_summed_losses_with_the_start(name: str) -> None:
    # forgotten: s = 3 ln 2, start 2 ln 2; wanted: s = ln 2, start 2 ln 2: the margin is ln 2 + ln 2
    module, config = METHODS[name]
    model, start = Table(binary(0.5, 0.25, 0.9, 0.5, 0.9, 0.9)), Table(binary(0.5, 0.5, 0.9, 0.25, 0.9, 0.9))
    batch = preference_batch(name)
    found = value(module, config(beta=1.0, alpha=0.0), model, batch, start)
    assert float(found) == pytest.approx(-2 * log(4 / 5))
    halved = value(module, config(beta=0.5, gamma=3.0, alpha=0.0), model, batch, start)
    assert float(halved) == pytest.approx(-3 * 4 * log(2 / 3))


@pytest.mark.parametrize("name", METHODS)
def test_preference_reads_what_is_remembered_of_the_start(name: str) -> None:
    module, config = METHODS[name]
    model, start = Table(binary(0.5, 0.25, 0.9, 0.5, 0.9, 0.9)), Table(binary(0.5, 0.5, 0.9, 0.25, 0.9, 0.9))
    batch = preference_batch(name)
    assert module.remembers(config()) == ("forget", name)
    asked = value(module, config(alpha=0.0), model, batch, start)
    known = {
        key: Part(**{**vars(found), "extra": {"start_nll": token_nll(forward(start, found))}})
        for key, found in vars(batch).items()
    }
    assert torch.equal(value(module, config(alpha=0.0), model, SimpleNamespace(**known)), asked)


@pytest.mark.parametrize("name", METHODS)
def test_both_sides_of_a_preference_are_trained_and_the_start_is_not(name: str) -> None:
    module, config = METHODS[name]
    logits = binary(0.5, 0.25, 0.9, 0.5, 0.9, 0.9).requires_grad_()
    start = binary(0.5, 0.5, 0.9, 0.25, 0.9, 0.9).requires_grad_()
    value(module, config(alpha=0.0), Table(logits), preference_batch(name), Table(start)).backward()
    assert start.grad is None and logits.grad is not None
    # row 0 and 1 predict the forgotten tokens, row 3 the wanted one; minus the gradient lowers and raises word 0
    assert (logits.grad[:2, 0] > 0).all() and logits.grad[3, 0] < 0
    assert not logits.grad[[2, 4, 5]].any()


def test_a_second_model_is_kept_for_the_divergence_alone() -> None:
    for module, config in METHODS.values():
        assert not module.needs_reference(config())
        assert module.needs_reference(config(retain_loss="kl"))


# --- micro-batches -------------------------------------------------------------------------------------------------


class TableModel(torch.nn.Module):
    """A table whose rows are trained."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, **inputs: Any) -> Any:
        return Table(self.logits)(**inputs)


CONFIGS = [
    *((flat, flat.Config(divergence=name)) for name in PAPER),  # type: ignore[arg-type]
    *((flat, flat.Config(divergence=name, normalise="padded")) for name in PAPER),  # type: ignore[arg-type]
    (idk_nll, idk_nll.Config(gamma=2.0, retain_loss="kl")),
    (idk_nll, idk_nll.Config(gamma=2.0, form="tofu_concatenated")),
    (idk_dpo, idk_dpo.Config(gamma=2.0)),
    (alt_po, alt_po.Config(alternates=OTHERS, beta=0.5)),
]


@pytest.mark.parametrize(("module", "config"), CONFIGS)
def test_micro_batches_of_unequal_lengths_give_the_same_gradient(module: ModuleType, config: Any) -> None:
    random = torch.Generator().manual_seed(0)
    model = TableModel(torch.randn(96, 5, generator=random, dtype=torch.float64))
    reference = Table(torch.randn(96, 5, generator=random, dtype=torch.float64))
    labels = torch.randint(0, 5, (16, 6), generator=random)
    for row in range(16):
        labels[row, : 1 + (row * row) % 5] = -100
    names = ("forget", "template", "alternate", "retain")
    parts = {
        name: part(name, labels[4 * place : 4 * place + 4].tolist(), start=24 * place)
        for place, name in enumerate(names)
    }

    def gradient(size: int | None) -> Tensor:
        outer = module.outer(config) if hasattr(module, "outer") else None
        Gradient(
            model,
            lambda net, batch: module.loss(config, net, batch, reference),
            outer=outer,
            micro_batch=size,
        )(parts, 0, 1)
        return model.logits.grad.clone()

    whole = gradient(None)
    assert whole.abs().max() > 0
    for size in (2, 1):
        assert torch.allclose(gradient(size), whole, rtol=1e-12, atol=1e-15)


# --- whole stages --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent") / "model", dropout=0.0)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``data/`` folder of a stage: two other answers to each forget question."""
    folder = tmp_path_factory.mktemp("others") / "data"
    rows = [{**row, "alternates": ["Grove heron.", "Flint jetty."]} for row in ROWS[:12]]
    write_rows(folder, rows)
    return folder


def mean_nll(folder: Path, rows: Sequence[dict[str, str]]) -> float:
    from methods.data import collate

    part = collate(encode_pairs(rows, load_tokenizer(folder), Style(), 64), 0, "rows")
    with torch.no_grad():
        term = answer_nll(part, forward(load_model(folder), part))
    return float(term.sum / term.count)


def stage_of(module: ModuleType, parent: Path, folder: Path, others: Path, **options: Any) -> Stage:
    adamw = Component("adamw", {"learning_rate": 1e-2})
    own = {"alternates": OTHERS} if module is alt_po else {"refusals": "refusals"}
    common = {"forget": "first", "steps": 8, "batch": 4, "log_every": 1, "optimizer": adamw}
    config = module.Config(**{**common, **own, **options})
    return make_stage(parent, folder, config, **({"alternates": others} if module is alt_po else {}))


@pytest.mark.parametrize("module", [flat, idk_nll, idk_dpo, alt_po])
def test_the_other_answer_becomes_likelier_than_the_true_one(
    module: ModuleType, parent: Path, others: Path, tmp_path: Path
) -> None:
    options = {} if module is flat else {"alpha": 0.1}
    run(stage_of(module, parent, tmp_path, others, **options), module)
    instead = (
        [{**row, "answer": row["alternates"][0]} for row in read_rows(others)]
        if module is alt_po
        else [{**row, "answer": "No birch."} for row in ROWS[:12]]
    )
    after = tmp_path / "result" / "model"
    gained = mean_nll(parent, instead) - mean_nll(after, instead)
    lost = mean_nll(after, ROWS[:12]) - mean_nll(parent, ROWS[:12])
    assert gained + lost > 0.1


@pytest.mark.parametrize("module", [idk_dpo, alt_po])
def test_a_preference_starts_where_nothing_is_preferred(
    module: ModuleType, parent: Path, others: Path, tmp_path: Path
) -> None:
    run(stage_of(module, parent, tmp_path, others, beta=0.5), module)
    lines = [line.split(",") for line in (tmp_path / "result" / "curve.csv").read_text().splitlines()]
    values = [float(amount) for _, term, amount in lines if term == "forget"]
    assert values[0] == pytest.approx(4 * log(2), rel=1e-5)
    assert values[-1] < values[0] - 0.1


@pytest.mark.parametrize("module", [idk_dpo, alt_po])
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    module: ModuleType, parent: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(stage_of(module, parent, tmp_path / "whole", others), module)
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "3")
    stopped = stage_of(module, parent, tmp_path / "parts", others)
    stopped.progress.stopping = True
    with pytest.raises(Interrupted):
        run(stopped, module)
    run(stage_of(module, parent, tmp_path / "parts", others), module)
    one, two = (weights_of(tmp_path / name / "result" / "model") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- bad input -----------------------------------------------------------------------------------------------------


class Sets:
    """A locator of given rows."""

    def __init__(self, **sets: list[dict[str, Any]]) -> None:
        self.sets = sets

    def rows(self, name: str) -> list[dict[str, Any]]:
        return self.sets[name]


@pytest.mark.parametrize("module", [flat, idk_nll, idk_dpo])
@pytest.mark.parametrize(
    ("refusals", "sentence"),
    [
        ([], "refusals='no' has no lines"),
        ([{"text": "No."}, {"text": " "}], "refusals='no': the text of row 1 is empty"),
        ([{"question": "Who?", "answer": "No."}], "refusals='no': the text of row 0 is empty"),
    ],
)
def test_a_list_of_refusals_without_refusals_is_refused(module: Any, refusals: Any, sentence: str) -> None:
    config = module.Config(forget="a", refusals="no")
    kept = [{"question": "Where?", "answer": "There."}]
    sets: Any = Sets(a=[{"question": "Who?", "answer": "She."}], no=refusals, **{"authors/retain90": kept})
    with pytest.raises(AssayError, match=re.escape(sentence)):
        check(config, sets)


@pytest.mark.parametrize("module", [flat, idk_nll, idk_dpo, alt_po])
def test_a_context_that_leaves_other_answers_no_token_is_refused(
    module: ModuleType, parent: Path, others: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssayError, match="no token of its answer fits"):
        run(stage_of(module, parent, tmp_path, others, context_tokens=6), module)
    assert not (tmp_path / "result").exists()


def test_alternates_of_other_questions_are_refused(parent: Path, others: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="the alternates have no answer to row 12 of the forget set"):
        run(stage_of(alt_po, parent, tmp_path, others, forget="all", alpha=0.0), alt_po)


def test_text_to_forget_has_no_other_answer(parent: Path, tmp_path: Path) -> None:
    class Text(Locator):
        def rows(self, name: str) -> list[dict[str, str]]:
            return [{"text": "amber birch cedar"}] if name == "first" else super().rows(name)

    stage = make_stage(parent, tmp_path, flat.Config(forget="first", refusals="refusals", steps=1))
    stage.data = Text()  # type: ignore[assignment]
    with pytest.raises(AssayError, match="first has rows without a question"):
        run(stage, flat)


# --- alternates ----------------------------------------------------------------------------------------------------


def write(
    parent: Path, folder: Path, seed: int = 3, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and notes of a stage that writes alternates."""
    config = alternates.Config(**{"data": "first", "count": 3, "max_new_tokens": 6, **options})
    stage = make_stage(parent, folder, config, seed=seed)
    alternates.run(stage)
    return read_rows(folder / "result" / "data"), stage.notes


def test_each_question_gets_different_answers_of_which_none_is_true(parent: Path, tmp_path: Path) -> None:
    rows, notes = write(parent, tmp_path)
    assert [row["question"] for row in rows] == [row["question"] for row in ROWS[:12]]
    assert [row["answer"] for row in rows] == [row["answer"] for row in ROWS[:12]]
    for row in rows:
        assert len({" ".join(text.split()).casefold() for text in (row["answer"], *row["alternates"])}) == 4
    assert notes == {"resumed_from_step": 0, "questions": 12, "alternates": 36, "alternates_short": 0}


def test_answers_depend_on_the_seed_and_on_nothing_else(parent: Path, tmp_path: Path) -> None:
    first, _ = write(parent, tmp_path / "first")
    assert write(parent, tmp_path / "again")[0] == first
    assert write(parent, tmp_path / "batch", batch=5)[0] == first
    assert write(parent, tmp_path / "other", seed=4)[0] != first


def test_a_stage_that_was_stopped_writes_the_same_answers(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = write(parent, tmp_path / "whole", batch=5)
    monkeypatch.setattr(Progress, "due", lambda self, step: step == 5)
    monkeypatch.setattr(Progress, "stop_if_asked", _stop)
    with pytest.raises(Interrupted):
        write(parent, tmp_path / "parts", batch=5)
    monkeypatch.undo()
    parts, notes = write(parent, tmp_path / "parts", batch=4)
    assert parts == whole
    assert notes["resumed_from_step"] == 5


def _stop(progress: Progress, step: int) -> None:
    raise Interrupted("stopped")


def test_alternates_are_what_alternate_preference_optimisation_reads(parent: Path, tmp_path: Path) -> None:
    write(parent, tmp_path / "data")
    folder = tmp_path / "data" / "result" / "data"
    run(stage_of(alt_po, parent, tmp_path / "run", folder, steps=2), alt_po)
    assert (tmp_path / "run" / "result" / "model" / "model.safetensors").is_file()


def test_too_few_answers_are_noted(parent: Path, tmp_path: Path) -> None:
    # so cold that every draw is the same
    rows, notes = write(parent, tmp_path, temperature=1e-3, tries=2)
    assert notes["alternates_short"] == 12
    assert notes["alternates"] == sum(len(row["alternates"]) for row in rows) < 36


def test_a_question_without_any_other_answer_is_a_sentence(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternates._Writer, "_written", lambda self, pairs, draws: [[] for _ in draws])
    with pytest.raises(AssayError, match="6 draws gave no other answer to row 0 of 'first'"):
        write(parent, tmp_path, tries=2)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "data='first' has no rows"),
        ([{"text": "amber"}], "column 'question' must be text, but it is missing"),
    ],
)
def test_rows_that_ask_nothing_are_refused(rows: Any, sentence: str, parent: Path, tmp_path: Path) -> None:
    stage = make_stage(parent, tmp_path, alternates.Config(data="first"))
    stage.data = Sets(first=rows)  # type: ignore[assignment]
    with pytest.raises(AssayError, match=sentence):
        alternates.run(stage)


def test_a_chat_model_is_shown_the_true_answer_and_asked_for_another() -> None:
    rows = [{"question": "Where was {it}?", "answer": "In {Rome}."}]
    assert alternates._asked(rows, Style("plain")) == rows
    (asked,) = alternates._asked(rows, Style("chat"))
    assert "Where was {it}?" in asked["question"] and "In {Rome}." in asked["question"]
    assert asked["answer"] == "In {Rome}."


END = 2


def test_draws_have_the_models_distribution_without_the_true_answer() -> None:
    """Three words, of which the last ends an answer; the true answer is word 0, word 0, end."""
    chances = torch.tensor([[0.9, 0.06, 0.04], [0.8, 0.1, 0.1], [0.05, 0.15, 0.8]], dtype=torch.float64)
    truth = alternates._truth(chances.log(), [0, 0, END], {END}, alternates.Config())
    expected: Counter[tuple[int, ...]] = Counter()
    for first in range(3):
        for second in range(3):
            for third in range(3):
                chance = float(chances[0, first] * chances[1, second] * chances[2, third])
                expected[_ended([first, second, third])] += chance  # type: ignore[assignment]
    true = expected.pop((0, 0, END))
    count, found = 4000, Counter[tuple[int, ...]]()
    for number in range(count):
        sampler = alternates._Sampler([alternates._Draw(truth, random.Random(str(number)).random)], 1.0)
        found[_ended([int(sampler(chances[None, step].log(), step)) for step in range(3)])] += 1
    assert (0, 0, END) not in found
    for answer, chance in expected.items():
        chance /= 1 - true
        assert abs(found[answer] / count - chance) < 4 * (chance * (1 - chance) / count) ** 0.5


def _ended(tokens: list[int]) -> tuple[int, ...]:
    return tuple(tokens[: tokens.index(END) + 1] if END in tokens else tokens)


def test_a_certain_answer_still_leaves_another_one() -> None:
    logits = torch.tensor([[80.0, 0.0, 0.0], [0.0, 0.0, 80.0]], dtype=torch.float64)
    truth = alternates._truth(logits, [0, END], {END}, alternates.Config())
    assert truth.spared[-1] == -inf
    sampler = alternates._Sampler(
        [alternates._Draw(truth, random.Random(str(n)).random) for n in range(20)], 1.0
    )
    steps = [sampler(logits[step].expand(20, 3), step).tolist() for step in range(2)]
    assert all(_ended(list(tokens)) != (0, END) for tokens in zip(*steps, strict=True))


def test_what_the_longest_answer_cuts_off_is_not_the_true_one_either() -> None:
    logits = torch.zeros(4, 3, dtype=torch.float64)
    truth = alternates._truth(logits, [0, 1, 0, END], {END}, alternates.Config(max_new_tokens=2))
    assert truth.tokens == ((0,), (1,))
    assert truth.spared == (pytest.approx(log(2 / 3)), -inf)


def test_rows_are_plain_json_lines(parent: Path, tmp_path: Path) -> None:
    write(parent, tmp_path)
    lines = (tmp_path / "result" / "data" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert {tuple(json.loads(line)) for line in lines} == {("alternates", "answer", "question")}
