"""Training that remembers: preferences over aligned models, trajectories of scores and weights, adversarial margins."""

from __future__ import annotations

import csv
import gc
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from methods import loop
from methods.checkpoint import load_model, load_tokenizer
from methods.data import Cases, CaseTable, Example, Part, collate, encode, padding_id, read_cases
from methods.find import catalogue
from methods.gradient import Batch, Gradient
from methods.likelihood import target_nll
from methods.stage import AssayError, Component, Parent, Stage
from methods.terms import case_scores, forward, token_nll
from methods.train import classify, poft, run, saf, smooth_adversarial
from tests.training import ROWS, Rows, make_parent, make_stage, same, weights_of
from workflows.chains import Builder
from workflows.experiment import Experiment
from workflows.notation import Call, Name
from workflows.options import resolve
from workflows.settings import Settings

FAST = Component("adamw", {"learning_rate": 1e-2})
DESCENT = Component("sgd", {"learning_rate": 0.1, "momentum": 0.0})
REFERENCES = (Parent("train.sft-000000000000"),)


# --- models and rows ----------------------------------------------------------------------------------------------


class Tasks(Rows):
    """Language rows, pairs of tokens whose sum modulo 5 is the class, and images of 2 x 2 whose brighter side it is."""

    def rows(self, name: str) -> list[dict[str, Any]]:
        if name == "sums":
            return [{"tokens": [a, b], "label": (a + b) % 5, "classes": 5} for a in range(5) for b in (0, 3)]
        if name == "images":
            draw = torch.Generator().manual_seed(4)
            pictures = (0.3 + 0.4 * torch.rand(10, 2, 2, generator=draw)).tolist()
            return [
                {"image": image, "label": int(sum(row[1] - row[0] for row in image) > 0), "classes": 2}
                for image in pictures
            ]
        return super().rows(name)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of the sums."""
    from methods.architectures.classifiers import TokenMLPConfig, TokenMLPForSequenceClassification

    shape = {"vocab_size": 5, "num_labels": 5, "hidden_size": 6, "hidden_sizes": [12]}
    return written(
        TokenMLPForSequenceClassification, TokenMLPConfig(**shape), tmp_path_factory.mktemp("sums")
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear classifier of the images."""
    from methods.architectures.classifiers import ImageMLPConfig, ImageMLPForImageClassification

    config = ImageMLPConfig(num_labels=2, image_size=[2, 2], hidden_sizes=[])
    return written(ImageMLPForImageClassification, config, tmp_path_factory.mktemp("pictures"))


def written(kind: Any, config: Any, folder: Path) -> Path:
    from methods.checkpoint import save_model

    torch.manual_seed(6)
    save_model(kind(config), folder, None, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models with the parent's tokenizer and other weights."""
    found = []
    for number in (1, 2):
        folder = make_parent(tmp_path_factory.mktemp(f"other{number}"), dropout=0.0)
        model = load_model(folder, device="cpu")
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 0.5 * number)
        model.save_pretrained(folder)
        found.append(folder)
    return found


def stage_of(folder: Path, at: Path, config: Any, **parents: Path) -> Stage:
    stage = make_stage(folder, at, config)
    stage.parents = {**stage.parents, **parents}
    stage.data = Tasks()  # type: ignore[assignment]
    return stage


def train(method: ModuleType, folder: Path, at: Path, config: Any, **parents: Path) -> Stage:
    stage = stage_of(folder, at, config, **parents)
    run(stage, method)
    return stage


def curve(stage: Stage, term: str) -> dict[int, float]:
    with open(stage.folder / "curve.csv", encoding="utf-8", newline="") as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["term"] == term}


class Killed(Exception):
    """A process that ends without a word."""


def killed_at(step: int, method: ModuleType) -> Any:
    """The method, whose loss ends the process at a step."""

    class Dying:
        def __getattr__(self, name: str) -> Any:
            return getattr(method, name)

        @staticmethod
        def loss(config: Any, model: Any, batch: Any) -> Any:
            if batch.step == step:
                raise Killed
            return method.loss(config, model, batch)

    return Dying()


def resumes_with_the_same_bits(
    method: ModuleType, folder: Path, at: Path, config: Any, step: int, save: int, **parents: Path
) -> bool:
    """Whether a run that is killed at a step ends as one that is not; a state is saved every ``save`` steps."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ASSAY_SAVE_EVERY_STEPS", str(save))
    whole = train(method, folder, at / "whole", config, **parents)
    with pytest.raises(Killed):
        train(killed_at(step, method), folder, at / "killed", config, **parents)
    resumed = train(method, folder, at / "killed", config, **parents)
    patch.undo()
    assert resumed.notes["resumed_from_step"] == step - step % save > 0
    assert (resumed.folder / "curve.csv").read_text() == (whole.folder / "curve.csv").read_text()
    return same(weights_of(resumed.folder / "model"), weights_of(whole.folder / "model"))


# --- preferences over aligned models ------------------------------------------------------------------------------


def preference(**changes: Any) -> poft.Config:
    options = {
        "data": "all",
        "references": REFERENCES,
        "steps": 4,
        "batch": 8,
        "optimizer": FAST,
        "log_every": 1,
    }
    return poft.Config(**{**options, **changes})


def test_the_preference_is_that_worked_out_by_hand() -> None:
    ours, theirs = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    found = poft.preference_losses(preference(beta=2.0, gamma=0.5), ours, theirs)
    expected = [math.log(1 + math.exp(-(2 * 0.5 + 0.5))), math.log(1 + math.exp(2 * 1.0 - 0.5))]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_hopeless_preference_is_large_and_not_infinite() -> None:
    found = poft.preference_losses(preference(), torch.tensor([-500.0]), torch.tensor([-1.0]))
    assert found.item() == pytest.approx(499.0)


def test_the_mean_log_likelihood_counts_answer_tokens_only() -> None:
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 5, -100, -100]])
    part = Part(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4), labels, "train")
    nll = torch.tensor([[9.0, 1.0, 4.0], [2.0, 9.0, 9.0]])
    assert poft.mean_log_likelihood(part, nll).tolist() == [-2.5, -2.0]


def references(others: list[Path]) -> dict[str, Path]:
    return {f"references.{number}": folder for number, folder in enumerate(others, start=1)}


def prepared(parent: Path, others: list[Path], at: Path, rows: list[dict[str, str]] = ROWS) -> list[Example]:
    """The examples as ``prepare`` leaves them."""
    from methods.data import Style

    config = preference(references=REFERENCES * len(others))
    stage = stage_of(parent, at, config, **references(others))
    examples = encode(rows, load_tokenizer(parent), Style.read(parent), 512)
    return poft.prepare(config, None, stage, {"train": examples})["train"]


def test_the_reference_is_the_mean_over_the_aligned_models(
    parent: Path, others: list[Path], tmp_path: Path
) -> None:
    examples, padding = prepared(parent, others, tmp_path), padding_id(load_tokenizer(parent))
    part = collate(examples[:5], padding, "train")
    found = poft.mean_log_likelihood(part, part.extra[poft.REFERENCE])
    expected = torch.zeros(5)
    with torch.no_grad():
        for folder in others:
            outputs = forward(load_model(folder, device="cpu"), part)
            expected += poft.mean_log_likelihood(part, token_nll(outputs)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_aligned_models_are_loaded_one_after_the_other_and_are_gone_before_training(
    parent: Path, others: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    most = []

    def count(folder: Path, settings: Any) -> Any:
        gc.collect()
        most.append(sum(one() is not None for one in alive))
        model = loop.frozen_model(folder, settings)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(poft, "frozen_model", count)
    prepared(parent, others, tmp_path)
    gc.collect()
    assert most == [0, 0]
    assert [one() for one in alive] == [None, None]


def test_scoring_leaves_the_model_in_the_mode_it_was_in(parent: Path) -> None:
    model = load_model(parent, device="cpu", train=True)
    example = Example((1, 2, 3), (-100, 2, 3))
    first, again = target_nll(model, [example], 0, 4), target_nll(model, [example], 0, 4)
    assert model.training and first == again and len(first[0]) == 2


def test_preference_training_raises_the_likelihood_of_the_answers(
    parent: Path, others: list[Path], tmp_path: Path
) -> None:
    config = preference(references=REFERENCES * 2, steps=12)
    stage = train(poft, parent, tmp_path, config, **references(others))
    losses = list(curve(stage, "train").values())
    assert losses[-1] < 0.8 * losses[0]


def test_preference_training_in_micro_batches_gives_the_same_model(
    parent: Path, others: list[Path], tmp_path: Path
) -> None:
    still = make_parent(tmp_path / "still", dropout=0.0)
    weights = []
    for micro_batch in (None, 3):
        config = preference(optimizer=DESCENT, micro_batch=micro_batch, references=REFERENCES * 2)
        stage = train(poft, still, tmp_path / str(micro_batch), config, **references(others))
        weights.append(weights_of(stage.folder / "model"))
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-6)


def test_preference_training_resumes_with_the_same_bits(
    parent: Path, others: list[Path], tmp_path: Path
) -> None:
    aligned = references(others[:1])
    assert resumes_with_the_same_bits(poft, parent, tmp_path, preference(), 3, 2, **aligned)


def test_an_aligned_model_with_another_tokenizer_is_refused_before_training(
    parent: Path, others: list[Path], tmp_path: Path
) -> None:
    other = make_parent(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"</s>"', '"<end>"'))
    config = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(config.replace('"</s>"', '"<end>"'))
    with pytest.raises(AssayError, match=r"tokenizer of model 2 of references .* take an aligned model"):
        train(poft, parent, tmp_path, preference(references=REFERENCES * 2), **references([others[0], other]))
    assert not (tmp_path / "result" / "model").exists()


# - lists of references


def preferring(value: Any) -> Any:
    """``train.poft(references=...)`` as the planner completes and checks it."""
    found = catalogue().method("train.poft")
    options = (("references", value),) if value is not None else ()
    return resolve(Call("train.poft", options), found, catalogue(), lambda _, name: Parent(name.text))


def test_references_are_a_list_of_chains() -> None:
    assert preferring((Name("a"), Name("b"))).config.references == (Parent("a"), Parent("b"))
    for value in (Name("a"), ()):
        with pytest.raises(
            AssayError, match=r"references takes a list of one or more: write references=\[a, b\]"
        ):
            preferring(value)
    with pytest.raises(AssayError, match="needs the option 'references'"):
        preferring(None)


def test_an_option_for_one_chain_takes_no_list() -> None:
    call = Call("distill.forward_kl", (("teacher", (Name("a"), Name("b"))),))
    with pytest.raises(AssayError, match="teacher takes no list"):
        resolve(call, catalogue().method(call.name), catalogue(), lambda _, name: Parent(name.text))


def builder(first: str, second: str) -> Builder:
    model = {"new": "llama", "tokenizer": "authors"}
    chains = {
        "one": "base > train.sft(steps=1)",
        "two": "base > train.sft(steps=2)",
        "best": f"base > train.poft(references=[{first}, {second}])",
    }
    text = {"title": "t", "country": "FRA", "seeds": [0], "models": {"base": model}, "chains": chains}
    return Builder(Experiment(name="test", **text), Settings())


def test_every_model_of_a_list_is_a_parent_of_the_job_and_part_of_its_id() -> None:
    jobs = []
    for first, second in (("one", "two"), ("two", "one"), ("one", "one")):
        made = builder(first, second)
        points = {
            name: next(made.points_of_chain(name))
            for name in ("base", "one", "two", "best")
            if name != "base"
        }
        job = points["best"].job
        assert job is not None
        assert set(job.parents) == {"model", "references.1", "references.2"}
        assert job.parents["references.1"].id == points[first].parent.id
        assert job.parents["references.2"].id == points[second].parent.id
        jobs.append(job)
    assert len({job.id for job in jobs}) == len({job.recipe for job in jobs}) == 3


# --- trajectories of scores ---------------------------------------------------------------------------------------


def trajectory(**changes: Any) -> saf.Config:
    options: dict[str, Any] = {
        "data": "sums", "steps": 12, "batch": 4, "optimizer": FAST, "log_every": 1, "start_epoch": 0, "minus_epochs": 1,
    }  # fmt: skip
    return saf.Config(**{**options, **changes})


def test_the_trajectory_term_is_that_worked_out_by_hand() -> None:
    """At tau = 2 past scores of 2 log 3 and 0 are p = (3/4, 1/4), and equal scores are q = (1/2, 1/2)."""
    past, scores = torch.tensor([[2 * math.log(3), 0.0]]), torch.tensor([[1.0, 1.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    found = saf.trajectory_losses(trajectory(temperature=2.0), scores, past)
    assert found.tolist() == pytest.approx([expected], rel=1e-6)


def watched(config: saf.Config, sums: Path, at: Path) -> list[dict[str, Any]]:
    """What each call of the loss gave ``trajectory_losses``, with the numbers of the cases and the step."""
    seen: list[dict[str, Any]] = []
    plain = saf.trajectory_losses
    patch = pytest.MonkeyPatch()

    class Watching:
        def __getattr__(self, name: str) -> Any:
            return getattr(saf, name)

        @staticmethod
        def loss(config: Any, model: Any, batch: Any) -> Any:
            scores = case_scores(model, batch.train).detach()
            seen.append({"step": batch.step, "numbers": batch.train.numbers.tolist(), "scores": scores})
            return saf.loss(config, model, batch)

    def note(config: Any, scores: Tensor, past: Tensor) -> Tensor:
        seen[-1]["past"] = past
        return plain(config, scores, past)

    patch.setattr(saf, "trajectory_losses", note)
    train(Watching(), sums, at, config)  # type: ignore[arg-type]
    patch.undo()
    return seen


@pytest.mark.parametrize("minus_epochs", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_the_past_scores_are_those_of_the_same_case_so_many_epochs_earlier(
    sums: Path, tmp_path: Path, minus_epochs: int, micro_batch: int | None
) -> None:
    """Ten cases in batches of four: epochs end within batches, and a case may come twice in one."""
    config = trajectory(steps=15, minus_epochs=minus_epochs, micro_batch=micro_batch)
    visits: dict[int, list[Tensor]] = {number: [] for number in range(10)}
    compared = 0
    for call in watched(config, sums, tmp_path):
        for row, number in enumerate(call["numbers"]):
            visits[number].append(call["scores"][row])
            epoch = len(visits[number]) - 1
            if epoch >= max(1, minus_epochs):
                torch.testing.assert_close(call["past"][row], visits[number][epoch - minus_epochs])
                compared += 1
    assert compared == 60 - 10 * max(1, minus_epochs)


def test_the_term_stands_strictly_between_its_two_epochs(sums: Path, tmp_path: Path) -> None:
    config = trajectory(batch=5, steps=10, start_epoch=1, end_epoch=4)
    stage = train(saf, sums, tmp_path, config)
    assert sorted(curve(stage, "trajectory")) == [4, 5, 6, 7]
    late = train(saf, sums, tmp_path / "late", trajectory(batch=5, steps=10, minus_epochs=3))
    assert sorted(curve(late, "trajectory")) == [6, 7, 8, 9]


def test_where_an_epoch_ends_within_a_batch_only_the_later_cases_have_the_term(
    sums: Path, tmp_path: Path
) -> None:
    """Step 2 holds the last two cases of epoch 0 and the first two of epoch 1."""
    seen = watched(trajectory(steps=3), sums, tmp_path)
    past, scores = seen[2]["past"], seen[2]["scores"]
    values = saf.trajectory_losses(trajectory(), scores, past)
    assert curve_of(tmp_path, "trajectory")[2] == pytest.approx(float(values[2:].sum()) / 4, rel=1e-5)


def curve_of(at: Path, term: str) -> dict[int, float]:
    with open(at / "result" / "curve.csv", encoding="utf-8", newline="") as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["term"] == term}


@pytest.mark.parametrize("variant", ["trajectory", "mesa"])
def test_a_killed_run_has_its_memory_back(sums: Path, tmp_path: Path, variant: str) -> None:
    config = trajectory(variant=variant, decay=0.9)
    assert resumes_with_the_same_bits(saf, sums, tmp_path, config, 8, 5)


@pytest.mark.parametrize("variant", ["trajectory", "mesa"])
def test_the_memory_is_no_part_of_the_model(sums: Path, tmp_path: Path, variant: str) -> None:
    stage = train(saf, sums, tmp_path, trajectory(variant=variant, checkpoints=(6,)))
    for name in ("model", "model@6"):
        assert weights_of(stage.folder / name).keys() == weights_of(sums).keys()


@pytest.mark.parametrize("changes", [{}, {"minus_epochs": 2}, {"variant": "mesa", "decay": 0.5}])
@pytest.mark.parametrize("loss", [None, Component("gce", {"q": 0.7})])
def test_micro_batches_leave_the_trajectory_as_it_is(
    sums: Path, tmp_path: Path, changes: dict[str, Any], loss: Component | None
) -> None:
    weights = []
    for micro_batch in (None, 3, 1):
        config = trajectory(optimizer=DESCENT, micro_batch=micro_batch, loss=loss, **changes)
        stage = train(saf, sums, tmp_path / str(micro_batch), config)
        weights.append(weights_of(stage.folder / "model"))
    for other in weights[1:]:
        for name in other:
            torch.testing.assert_close(other[name], weights[0][name], rtol=1e-4, atol=1e-6)


def test_weighted_cases_are_put_down_once_a_step(sums: Path, tmp_path: Path) -> None:
    """The pass that gathers losses for the weights comes before, and is no visit."""
    weights = []
    for micro_batch in (None, 2):
        weighting = Component("extremes", {"warmup_steps": 0})
        config = trajectory(optimizer=DESCENT, micro_batch=micro_batch, weighting=weighting)
        weights.append(weights_of(train(saf, sums, tmp_path / str(micro_batch), config).folder / "model"))
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-6)


def test_a_loss_of_the_whole_batch_takes_the_trajectory_beside_it(pictures: Path, tmp_path: Path) -> None:
    weights = []
    for micro_batch in (None, 2):
        config = trajectory(
            data="images", batch=10, optimizer=DESCENT, loss=Component("anyloss"), micro_batch=micro_batch
        )
        stage = train(saf, pictures, tmp_path / str(micro_batch), config)
        assert curve(stage, "trajectory")
        weights.append(weights_of(stage.folder / "model"))
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-6)


# - the running mean of the weights


def test_the_mean_follows_the_weights_of_every_step(sums: Path) -> None:
    table = read_cases(Tasks().rows("sums"), "sums")
    config = trajectory(variant="mesa", decay=0.75, batch=10, start_epoch=-1)
    model = load_model(sums, device="cpu", train=True)
    saf.prepare(config, model, stage_of(sums, sums, config), {"train": table})
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    cases = table.batch(range(10), "train")
    for step in range(3):
        saf.loss(config, model, Batch({"train": cases}, step, 3))  # type: ignore[dict-item]
        saf.loss(config, model, Batch({"train": cases}, step, 3))  # type: ignore[dict-item]  # another piece
        if step:
            for name, weight in model.named_parameters():
                expected[name] = 0.75 * expected[name] + 0.25 * weight.detach()
        for mean, (name, _) in saf._means(model):
            torch.testing.assert_close(mean, expected[name])
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
    other = load_model(sums, device="cpu")
    other.load_state_dict(expected, strict=False)
    found = saf._of_mean(model, cases)
    torch.testing.assert_close(found, case_scores(other, cases))
    assert model.training


def test_the_mean_of_the_weights_serves_language_models(parent: Path, tmp_path: Path) -> None:
    config = saf.Config(
        data="all", variant="mesa", start_epoch=0, steps=9, batch=8, optimizer=FAST, log_every=1, decay=0.5
    )
    stage = train(saf, parent, tmp_path, config)
    assert sorted(curve(stage, "trajectory")) == [3, 4, 5, 6, 7, 8]
    assert all(value > 0 for value in curve(stage, "trajectory").values())
    assert weights_of(stage.folder / "model").keys() == weights_of(parent).keys()


def test_an_adapter_has_a_mean_of_its_own_weights(parent: Path, tmp_path: Path) -> None:
    config = saf.Config(
        data="all", variant="mesa", start_epoch=0, steps=5, batch=8, optimizer=FAST, log_every=1, decay=0.5,
        adapter=Component("lora", {"rank": 2}),
    )  # fmt: skip
    stage = train(saf, parent, tmp_path, config)
    assert sorted(curve(stage, "trajectory")) == [3, 4]


# - what is refused


def test_past_scores_of_a_language_model_are_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match=r'train.saf\(variant="mesa"\)'):
        train(saf, parent, tmp_path, saf.Config(data="all", steps=1, batch=8))


def test_more_past_scores_than_allowed_are_refused(sums: Path, tmp_path: Path) -> None:
    config = trajectory(history_gigabytes=4e-7, minus_epochs=2)
    with pytest.raises(AssayError, match=r"6e-07 GB of past scores \(3 epochs of 10 cases with 5 classes\)"):
        train(saf, sums, tmp_path, config)


def test_past_scores_of_several_processes_are_refused(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saf, "make_accelerator", lambda _: type("Two", (), {"num_processes": 2}))
    with pytest.raises(AssayError, match="in one process only"):
        train(saf, sums, tmp_path, trajectory())


def test_a_loss_without_scores_has_no_trajectory(sums: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match=r"loss=cut_cross_entropy\(\) never has"):
        train(saf, sums, tmp_path, trajectory(loss=Component("cut_cross_entropy")))


def test_epochs_between_which_there_is_none_are_a_sentence() -> None:
    call = Call("train.saf", (("data", "sums"), ("start_epoch", 5), ("end_epoch", 6)))
    with pytest.raises(
        AssayError, match="no epoch lies between start_epoch=5 and end_epoch=6: raise end_epoch"
    ):
        resolve(call, catalogue().method("train.saf"), catalogue(), lambda _, name: Parent(name.text))


# --- adversarial margins ------------------------------------------------------------------------------------------


def adversarial(**changes: Any) -> smooth_adversarial.Config:
    options: dict[str, Any] = {"data": "images", "steps": 4, "batch": 5, "optimizer": FAST, "log_every": 1}
    return smooth_adversarial.Config(**{**options, **changes})


def images(count: int = 4) -> Cases:
    table: CaseTable = read_cases(Tasks().rows("images"), "images")
    return table.batch(range(count), "train")


def adversarial_terms(pictures: Path, cases: Cases, **changes: Any) -> Mapping[str, Any]:
    model = load_model(pictures, device="cpu", train=True)
    terms = smooth_adversarial.loss(adversarial(**changes), model, Batch({"train": cases}, 0, 1))  # type: ignore[dict-item]
    assert model.training
    return terms


def test_margins_are_differences_from_the_right_class() -> None:
    scores = torch.tensor([[1.0, 3.0, 0.0]])
    assert smooth_adversarial.margins(scores, torch.tensor([1])).tolist() == [[2.0, 0.0, 3.0]]


def test_the_margins_of_a_linear_model_change_most_at_the_corner_of_the_ball(pictures: Path) -> None:
    """sup |(w_y - w_v) d|: the radius times the 1-norm of w_y - w_v, in the Euclidean ball times its 2-norm."""
    weight = weights_of(pictures)["classifier.weight"]
    apart = weight[0] - weight[1]
    for norm, expected in (("inf", 0.2 * apart.abs().sum()), ("2", 0.2 * apart.norm())):
        term = adversarial_terms(pictures, images(), norm=norm, radius=0.2, attack_step_size=0.05)["margins"]
        assert float(term.sum.detach()) / 4 == pytest.approx(float(expected), rel=1e-4), norm


def test_the_first_term_is_the_comp_sum_loss_of_the_scores_over_rho(pictures: Path) -> None:
    cases = images()
    with torch.no_grad():
        scores = case_scores(load_model(pictures, device="cpu"), cases)
    right = (scores / 2).softmax(-1).gather(-1, cases.labels[:, None])
    for tau, expected in ((1.0, -right.log()), (0.0, 1 / right - 1), (2.0, 1 - right)):
        loss = Component("comp_sum", {"tau": tau})
        term = adversarial_terms(pictures, cases, loss=loss, rho=2.0)["train"]
        assert float(term.sum.detach()) == pytest.approx(float(expected.sum()), rel=1e-4), tau


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_inputs_stay_in_the_ball_and_from_0_to_1(pictures: Path, norm: Any) -> None:
    cases = images()
    dark = torch.zeros_like(cases.inputs)
    dark[2:] = 1.0
    edge = Cases(dark, cases.labels, cases.numbers, "train")
    model = load_model(pictures, device="cpu", train=True)
    moved = smooth_adversarial.worst(adversarial(radius=0.1, norm=norm), model, edge).inputs
    change = (moved - dark).flatten(1)
    assert bool(((moved >= 0) & (moved <= 1)).all()) and not moved.requires_grad
    assert float(change.abs().max() if norm == "inf" else change.norm(dim=-1).max()) <= 0.1 + 1e-6
    assert all(weight.grad is None for weight in model.parameters())


def test_a_case_whose_margins_cannot_change_costs_nothing_and_gives_no_nan(pictures: Path) -> None:
    model = load_model(pictures, device="cpu", train=True)
    with torch.no_grad():
        model.classifier.weight.zero_()
    terms = smooth_adversarial.loss(adversarial(), model, Batch({"train": images()}, 0, 1))  # type: ignore[dict-item]
    sum(term.sum for term in terms.values()).backward()
    assert float(terms["margins"].sum.detach()) == 0
    assert bool(model.classifier.weight.grad.isfinite().all())


@pytest.mark.parametrize("loss", [Component("comp_sum"), Component("anyloss")])
def test_micro_batches_leave_the_adversarial_loss_as_it_is(pictures: Path, loss: Component) -> None:
    config = adversarial(loss=loss, nu=0.7, weighting=None)
    found = []
    for micro_batch in (None, 3, 1):
        model = load_model(pictures, device="cpu", train=True).double()
        cases = images(8)
        double = Cases(cases.inputs.double(), cases.labels, cases.numbers, "train")
        run = Gradient(
            model,
            lambda model, batch: smooth_adversarial.loss(config, model, batch),
            outer=smooth_adversarial.outer(config),
            micro_batch=micro_batch,
        )
        means = run({"train": double}, 0, 1)  # type: ignore[dict-item]
        found.append((means, model.classifier.weight.grad.clone()))
    for means, gradient in found[1:]:
        assert means == pytest.approx(found[0][0], rel=1e-9)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-9, atol=1e-12)


def test_adversarial_training_narrows_the_change_of_the_margins(pictures: Path, tmp_path: Path) -> None:
    stages = [
        train(smooth_adversarial, pictures, tmp_path / str(nu), adversarial(nu=nu, steps=30))
        for nu in (0.0, 5.0)
    ]
    free, held = (list(curve(stage, "margins").values()) for stage in stages)
    assert held[-1] < 0.5 * free[-1]


def test_tokens_cannot_be_moved_a_little(sums: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="those of sums are tokens"):
        train(smooth_adversarial, sums, tmp_path, adversarial(data="sums"))


def test_the_adversarial_loss_needs_scores(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match=r"loss=cut_cross_entropy\(\) never has"):
        train(smooth_adversarial, pictures, tmp_path, adversarial(loss=Component("cut_cross_entropy")))


# --- the modules --------------------------------------------------------------------------------------------------


def test_the_recipe_of_classifiers_is_one() -> None:
    for method in (saf, smooth_adversarial):
        assert issubclass(method.Config, classify.Classifying)
