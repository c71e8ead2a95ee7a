"""The student's own past as its teacher: what is remembered, when it counts, and that a run can be resumed."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods import distill
from methods.checkpoint import load_model, load_tokenizer
from methods.data import Example, Part, Style, collate, encode, padding_id
from methods.distill import mgsr, mix, own_past
from methods.distill._past import Past, earlier, likeliest, trajectory_losses
from methods.find import catalogue
from methods.stage import AssayError, Component, Parent, Stage
from methods.term import entries, of
from methods.terms import forward, relative_entropy
from tests.training import ROWS, make_parent, make_stage, same, weights_of

DESCENT = Component("sgd", {"learning_rate": 1.0, "momentum": 0.0})
SMALL: dict[str, Any] = {
    "data": "first", "context_tokens": 64, "steps": 5, "batch": 12, "log_every": 1, "optimizer": DESCENT,
    "schedule": Component("constant"), "past_epochs": 1, "start_epoch": -1, "top_k": 290, "clip": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student, without dropout: it can be asked again what it said."""
    return make_parent(tmp_path_factory.mktemp("parent"), dropout=0.0)


def trained(parent: Path, at: Path, **options: Any) -> Stage:
    stage = make_stage(parent, at, own_past.Config(**SMALL | options))
    distill.run(stage, own_past)
    return stage


def curve(stage: Stage, term: str) -> dict[int, float]:
    with open(stage.folder / "curve.csv", encoding="utf-8", newline="") as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["term"] == term}


def answers(folder: Path, rows: int = 12) -> Tensor:
    """The logits [n,V] of all answer tokens."""
    tokenizer = load_tokenizer(folder)
    examples = encode(ROWS[:rows], tokenizer, Style.read(folder), 64)
    with torch.no_grad():
        outputs = forward(load_model(folder, device="cpu"), collate(examples, padding_id(tokenizer), "train"))
    return outputs.logits[outputs.mask]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_divergence_from_the_past_by_hand() -> None:
    """(1/2, 1/4, 1/4) in the past and (1/4, 1/2, 1/4) now; and at temperature 2, where square roots are compared."""
    past = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    now = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()

    def value(top_k: int, temperature: float) -> float:
        return float(trajectory_losses(now, *likeliest(past, top_k, temperature), temperature))

    assert value(3, 1.0) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert value(1, 1.0) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    roots = [math.sqrt(2), 1.0, 1.0]
    p = [root / sum(roots) for root in roots]
    assert value(9, 2.0) == pytest.approx((p[0] - p[1]) * 0.5 * math.log(2))


def test_repeats_are_counted_in_their_order() -> None:
    assert earlier(torch.tensor([4, 2, 4, 4, 0, 2])).tolist() == [0, 0, 1, 2, 0, 1]


def rows_of(*lengths: int) -> list[Example]:
    """Rows with so many answer tokens after a prompt of two."""
    return [Example((1,) * (n + 2), (-100, -100, *[1] * n), number=at) for at, n in enumerate(lengths)]


def memory(*lengths: int, past_epochs: int, top_k: int = 2) -> Past:
    return Past(nn.Linear(1, 1), "own_past", rows_of(*lengths), past_epochs, top_k, 3, limit=1.0)


def test_places_follow_the_answer_tokens_of_the_rows_in_a_batch() -> None:
    rows = rows_of(2, 1, 3)
    part = collate([rows[2], rows[0]], 0, "train")
    assert memory(2, 1, 3, past_epochs=1).places(part).tolist() == [3, 4, 5, 0, 1]
    written = Part(part.input_ids, part.attention_mask, part.labels, "train")
    with pytest.raises(AssayError, match="text that was written while training has not: leave the term out"):
        memory(2, 1, 3, past_epochs=1).places(written)


def test_what_comes_back_is_what_was_said_so_many_epochs_ago() -> None:
    """Three rows of a token each, two in a batch: every second batch reaches into the next epoch."""
    past, places = memory(1, 1, 1, past_epochs=2), [0, 1, 2, 2, 0, 1, 1, 2, 0, 0, 1, 2]
    said_in: dict[int, list[float]] = {}
    for step in range(6):
        here = torch.tensor(places[2 * step : 2 * step + 2])
        span = 2 * step // 3, (2 * step + 1) // 3
        logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        said = likeliest(logits, 2, 1.0)
        for visit in (False, True):  # the first of the two only gathers numbers
            _, log_p, epochs = past.exchange(here, said, span, visit)
        assert epochs.tolist() == [2 * step // 3, (2 * step + 1) // 3]
        for number, row in enumerate(here.tolist()):
            said_in.setdefault(row, []).append(float(said[1][number, 0]))
            epoch = int(epochs[number])
            assert float(log_p[number, 0]) == said_in[row][epoch - 2 if epoch >= 2 else epoch]


def test_a_token_twice_in_a_batch_and_a_pass_made_twice_are_told_apart() -> None:
    past = memory(1, 1, past_epochs=1, top_k=1)
    first, second = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[3.0, 0.0, 0.0]])
    both = torch.cat([first, second])
    for _ in range(2):  # the same step again: no third visit
        _, log_p, epochs = past.exchange(torch.tensor([1, 1]), likeliest(both, 1, 1.0), (0, 1), True)
        assert epochs.tolist()[1] == 1
    assert float(log_p[1]) == float(likeliest(both, 1, 1.0)[1][0])


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Every step is an epoch."""
    return trained(parent, tmp_path_factory.mktemp("usual"), checkpoints=(1, 2, 3, 4))


def test_the_curve_shows_the_divergence_from_the_model_of_the_epoch_before(
    parent: Path, usual: Stage
) -> None:
    values = curve(usual, "own_past")
    assert list(values) == [1, 2, 3, 4]
    said = [answers(folder) for folder in (parent, *(usual.folder / f"model@{step}" for step in range(1, 5)))]
    for step, value in values.items():
        then, now = ((logits / 5.0).log_softmax(-1) for logits in said[step - 1 : step + 1])
        assert value == pytest.approx(float(relative_entropy(then, now).mean()), rel=1e-3)
        assert value > 1e-6


def test_the_term_waits_for_its_epoch_and_for_a_past(parent: Path, usual: Stage, tmp_path: Path) -> None:
    """No uniform target: until then nothing but the labels pulls."""
    late = trained(parent, tmp_path / "late", start_epoch=2)
    far = trained(parent, tmp_path / "far", past_epochs=4)
    assert list(curve(late, "own_past")) == [3, 4] and list(curve(far, "own_past")) == [4]
    labels = trained(parent, tmp_path / "labels", strength=0.0)
    before, after = curve(labels, "cross_entropy"), curve(late, "cross_entropy")
    assert [before[step] for step in range(4)] == pytest.approx([after[step] for step in range(4)], rel=1e-6)
    assert before[4] != after[4]
    assert list(curve(labels, "own_past")) == [1, 2, 3, 4]  # with weight 0 it is only logged


def test_few_of_the_entries_give_less_than_all(parent: Path, usual: Stage, tmp_path: Path) -> None:
    few = curve(trained(parent, tmp_path, top_k=4, steps=2), "own_past")
    assert 0 < few[1] < curve(usual, "own_past")[1]


def test_a_resumed_run_remembers_and_has_the_same_bits(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of five of twelve rows, killed in the third epoch."""
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "2")
    options: dict[str, Any] = {"batch": 5, "steps": 9, "top_k": 8}
    whole = trained(parent, tmp_path / "whole", **options)
    terms, calls = distill._mixture.Mixture.terms, []

    def dying(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return terms(self, *arguments)

    monkeypatch.setattr(distill._mixture.Mixture, "terms", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(parent, tmp_path / "killed", **options)
    resumed = trained(parent, tmp_path / "killed", **options)
    assert resumed.notes["resumed_from_step"] == 6
    assert same(*(weights_of(stage.folder / "model") for stage in (resumed, whole)))
    assert curve(resumed, "own_past") == curve(whole, "own_past") != {}


def test_the_past_is_no_part_of_the_model(parent: Path, usual: Stage) -> None:
    names = {name for name, _ in load_model(parent).named_parameters()}
    assert {name for name, _ in load_model(usual.folder / "model").named_parameters()} == names
    for folder in (usual.folder / "model", usual.folder / "model@3"):
        assert not list(folder.rglob("*own_past*"))
        assert (folder / "model.safetensors").stat().st_size < 2 * (
            parent / "model.safetensors"
        ).stat().st_size


@pytest.mark.parametrize("beside", [(), ("squarehead",)])
def test_micro_batches_change_nothing_not_even_where_they_take_a_pass_of_their_own(
    parent: Path, tmp_path: Path, beside: tuple[str, ...]
) -> None:
    """The counts of hidden states are known after a pass over the whole batch only, and then the first piece is seen
    twice."""
    terms = (of("cross_entropy"), of("own_past", past_epochs=1, start_epoch=-1, top_k=8), *map(of, beside))
    shared = {
        name: value for name, value in SMALL.items() if name not in ("past_epochs", "start_epoch", "top_k")
    }
    folders: dict[str, Any] = {"teacher": make_parent(tmp_path / "teacher", zeros=0.3)} if beside else {}
    found = []
    for micro_batch in (None, 2):
        given: dict[str, Any] = dict.fromkeys(folders, SimpleNamespace(id="x"))
        config = mix.Config(**shared | {"batch": 5, "terms": terms, "micro_batch": micro_batch} | given)
        stage = make_stage(parent, tmp_path / str(micro_batch), config, **folders)
        distill.run(stage, mix)
        found.append(stage)
    one, other = (curve(stage, "own_past") for stage in found)
    assert one.keys() == other.keys() and len(one) >= 2
    for step, value in one.items():
        assert other[step] == pytest.approx(value, rel=1e-3, abs=1e-8)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_too_long_a_memory_is_refused_before_training(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssayError, match=r"own_past would keep .* GB .*: more than history_gigabytes=1e-05: lower"
    ):
        trained(parent, tmp_path, history_gigabytes=1e-5)
    assert not (tmp_path / "result" / "curve.csv").exists()


def test_alone_it_would_have_nothing_to_start_from(parent: Path, tmp_path: Path) -> None:
    terms = (of("own_past"), of("own_past", weight=0.5), of("cross_entropy", weight=0.0))
    config = mix.Config(data="first", context_tokens=64, steps=1, batch=4, terms=terms)
    with pytest.raises(AssayError, match=r"own_past cannot be the only term.*add cross_entropy\(\)"):
        distill.run(make_stage(parent, tmp_path, config), mix)


def test_text_that_the_student_writes_has_no_past() -> None:
    teacher = Parent("model.new-000000000000")
    config = mgsr.Config(teacher=teacher, divergence=of("own_past"))
    with pytest.raises(
        AssayError, match="own_past knows each row by its place in the data, which text that the st"
    ):
        distill.refuse_terms("distill.mgsr", config, entries(mgsr.terms(config)), writes=True)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssayError, match="own_past remembers in one process only"):
        memory(1, 1, past_epochs=1)


def test_a_run_too_short_for_its_past_says_so(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = trained(parent, tmp_path, start_epoch=5, steps=2)
    assert (
        "own_past begins in epoch 6, counted from 0, and this run has 2.0 of them" in capsys.readouterr().err
    )
    assert curve(stage, "own_past") == {}


def test_the_recipe_hands_its_options_to_the_term() -> None:
    config = own_past.Config(strength=0.8, temperature=2.0, past_epochs=2, start_epoch=4, top_k=7)
    labels, past = own_past.terms(config)
    assert labels.name == "cross_entropy"
    module = catalogue().component("term", past.name).load()
    found = module.Config(**past.options)
    assert (found.weight, found.temperature, found.past_epochs, found.start_epoch, found.top_k) == (
        0.8,
        2.0,
        2,
        4,
        7,
    )
    assert found.scale_by_temperature
