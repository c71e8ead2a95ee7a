"""The training loop: exact gradients, zeros, precision, resuming, several processes."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import loop
from methods.checkpoint import load_model
from methods.data import Example, Part, Variants, collate
from methods.find import catalogue
from methods.gradient import Gradient, Workers, cut, pieces_of
from methods.progress import Progress
from methods.stage import AssayError, Component, Count, Interrupted, NotFinite, Stage, Term, Terms
from methods.terms import answer_nll, forward, sequence_nll, token_nll
from methods.train import run, sft
from tests.training import ROWS, Rows, make_parent, make_stage, same, weights_of

FAST = Component("adamw", {"learning_rate": 1e-2})
QUICK = sft.Config(data="all", steps=6, batch=8, optimizer=FAST, log_every=1)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("sparse"), zeros=0.5)


def finetune(parent: Path, folder: Path, config: sft.Config = QUICK, **changes: Any) -> Stage:
    stage = make_stage(parent, folder, replace(config, **changes))
    run(stage, sft)
    return stage


def curve(stage: Stage) -> dict[tuple[int, str], float]:
    with open(stage.folder / "curve.csv", encoding="utf-8", newline="") as file:
        return {(int(row["step"]), row["term"]): float(row["value"]) for row in csv.DictReader(file)}


# --- the gradient of a global batch ---------------------------------------------------------------------------


def parts() -> dict[str, Part]:
    """Seven and seven sequences of very unequal lengths."""
    generator = torch.Generator().manual_seed(0)

    def example(length: int, prompt: int) -> Example:
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        return Example(tuple(ids), (*[-100] * prompt, *ids[prompt:]))

    lengths = {"forget": (12, 3, 9, 2, 5, 14, 4), "retain": (2, 11, 6, 13, 3, 7, 10)}
    return {name: collate([example(n, n // 3) for n in sizes], 0, name) for name, sizes in lengths.items()}


def gradient_of(
    loss: Callable[[Any, Any], Terms], **options: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).double()
    means = Gradient(model, loss, **options)(parts(), 0, 1)
    return means, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def by_tokens(model: Any, batch: Any) -> Terms:
    forget, retain = forward(model, batch.forget), forward(model, batch.retain)
    every = Term(retain.all_logits.logsumexp(-1).sum(), batch.retain.positions, 0.3)
    return {
        "forget": answer_nll(batch.forget, forget, -0.5),
        "sequences": Term(sequence_nll(forget).sqrt().sum(), batch.forget.sequences, 2.0),
        "retain": answer_nll(batch.retain, retain, 1.5),
        "every": every,
    }


def by_plain_numbers(model: Any, batch: Any) -> Terms:
    """The same numbers, but nobody knows where the counts come from."""
    return {name: replace(term, count=float(term.count)) for name, term in by_tokens(model, batch).items()}


def in_processes(loss: Callable[[Any, Any], Terms], count: int, **options: Any) -> dict[str, torch.Tensor]:
    """What processes that share a batch add up to: each is run by itself, counts being known ahead."""
    shares = [gradient_of(loss, workers=Workers(rank, count), **options)[1] for rank in range(count)]
    return {name: sum(share[name] for share in shares) for name in shares[0]}


@pytest.mark.parametrize("loss", [by_tokens, by_plain_numbers])
@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_micro_batches_of_unequal_lengths_give_the_gradient_of_the_whole_batch(
    loss: Any, micro_batch: int
) -> None:
    means, whole = gradient_of(loss)
    cut_means, pieces = gradient_of(loss, micro_batch=micro_batch)
    assert cut_means == pytest.approx(means, rel=1e-12)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_processes_add_up_to_the_gradient_of_the_whole_batch(micro_batch: int | None) -> None:
    whole = gradient_of(by_tokens)[1]
    for name, value in in_processes(by_tokens, 3, micro_batch=micro_batch).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-14)


def statistics(model: Any, batch: Any) -> Terms:
    forget, retain = forward(model, batch.forget), forward(model, batch.retain)
    likelihood = torch.exp(-token_nll(retain)) * retain.mask
    return {"a": answer_nll(batch.forget, forget), "b": Term(likelihood.sum(), float(batch.retain.tokens))}


def outer(means: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return means["a"].square() / (1 + means["b"].exp())


def test_a_loss_of_the_whole_batch_is_exact_under_micro_batches() -> None:
    def direct(model: Any, batch: Any) -> Terms:
        terms = statistics(model, batch)
        value = outer({name: term.sum / term.count for name, term in terms.items()})
        return {"loss": Term(value, Count(1.0, "batch"))}

    means, expected = gradient_of(direct)
    for micro_batch in (None, 3, 1):
        found, gradient = gradient_of(statistics, outer=outer, micro_batch=micro_batch)
        assert found["loss"] == pytest.approx(means["loss"], rel=1e-12)
        for name in expected:
            torch.testing.assert_close(gradient[name], expected[name], rtol=1e-10, atol=1e-14)


def weigh(losses: torch.Tensor, step: int) -> torch.Tensor:
    """Weights that no row could tell by itself: they depend on the range of all losses."""
    return torch.softmax((losses - losses.min()) / (losses.max() - losses.min()), dim=0)


def weighted(model: Any, batch: Any) -> Terms:
    part = batch.forget
    losses = sequence_nll(forward(model, part)) / part.mask.sum(-1)
    weights = batch.weigh(losses.detach())
    assert not weights.requires_grad
    return {"forget": Term((weights * losses).sum(), Count(1.0, "batch"))}


@pytest.mark.parametrize("micro_batch", [3, 1])
def test_rows_are_weighed_among_all_rows_of_the_batch_whatever_the_micro_batches(micro_batch: int) -> None:
    means, whole = gradient_of(weighted, weigh=weigh)
    cut_means, pieces = gradient_of(weighted, weigh=weigh, micro_batch=micro_batch)
    assert cut_means == pytest.approx(means, rel=1e-12)
    assert means != pytest.approx(
        gradient_of(weighted, weigh=lambda losses, _: losses * 0 + 1 / 7)[0], rel=1e-4
    )
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-10, atol=1e-14)


def test_two_terms_by_hand() -> None:
    # L = 2 * (1 w + 3 w) / 4 - (5 w) / 10, so dL/dw = 2 - 0.5
    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(1.0))

    model = Line()
    terms = {"one": (4.0, 4.0, 2.0), "two": (5.0, 10.0, -1.0)}
    loss = lambda model, batch: {k: Term(model.w * s, c, w) for k, (s, c, w) in terms.items()}  # noqa: E731
    assert Gradient(model, loss)(parts(), 0, 1) == {"one": 1.0, "two": 0.5}
    assert model.w.grad is not None
    assert float(model.w.grad) == pytest.approx(1.5)


def test_a_sum_that_nothing_divides_stays_a_sum_under_micro_batches() -> None:
    def summed(model: Any, batch: Any) -> Terms:
        return {"sum": Term(token_nll(forward(model, batch.forget)).sum(), Count(1.0, "batch"))}

    (one, whole), (many, pieces) = gradient_of(summed), gradient_of(summed, micro_batch=1)
    assert many == pytest.approx(one)
    torch.testing.assert_close(pieces["lm_head.weight"], whole["lm_head.weight"])


def test_every_part_is_cut_in_the_same_proportion() -> None:
    batch = parts()
    assert pieces_of(batch, micro_batch=2, processes=1) == 4
    pieces = cut(batch, 3)
    assert [piece["forget"].labels.shape[0] for piece in pieces] == [2, 2, 3]
    assert torch.equal(torch.cat([piece["retain"].labels for piece in pieces]), batch["retain"].labels)


def test_too_many_processes_are_refused_with_a_sentence() -> None:
    with pytest.raises(AssayError, match="a batch of 7 sequences cannot be shared by 8 processes"):
        pieces_of(parts(), None, 8)


def test_a_missing_part_is_named() -> None:
    with pytest.raises(AttributeError, match="no part 'template'; it has: forget, retain"):
        gradient_of(lambda model, batch: {"x": batch.template})


# --- batches, schedules, components ---------------------------------------------------------------------------


def test_batches_depend_on_seed_part_and_step_alone() -> None:
    rows = [Example((n,), (n,)) for n in range(5)]
    made = [
        loop.Batches({"forget": rows, "retain": rows}, size=3, seed=4, drawn=("retain",)) for _ in range(2)
    ]
    assert [made[0].at(step) for step in range(9)] == [made[1].at(step) for step in reversed(range(9))][::-1]
    assert made[0].at(1)["forget"] != made[0].at(1)["retain"]
    first_epoch = [row for step in range(5) for row in made[0].rows("forget", step)]
    assert sorted(first_epoch[:5]) == sorted(first_epoch[5:10]) == [0, 1, 2, 3, 4]
    assert loop.Batches({"forget": rows}, size=3, seed=5).at(0) != loop.Batches(
        {"forget": rows}, size=3, seed=4
    ).at(0)


def test_a_part_that_follows_another_has_its_rows() -> None:
    rows = [Example((n,), (n,)) for n in range(5)]
    batches = loop.Batches({"forget": rows, "template": rows}, size=2, seed=0, follows={"template": "forget"})
    assert all(batches.at(step)["forget"] == batches.at(step)["template"] for step in range(6))
    with pytest.raises(AssayError, match="template has 4 rows and must have one for each of the 5 of forget"):
        loop.Batches({"forget": rows, "template": rows[:4]}, 2, 0, {"template": "forget"}).at(0)


def test_of_a_row_with_variants_one_is_drawn_each_time() -> None:
    rows = [Example((n,), (n,)) for n in range(4)]
    variants = Variants([[Example((n, k), (n, k)) for k in range(3)] for n in range(4)])
    follows = {"template": "forget"}
    made = loop.Batches({"forget": rows, "template": variants}, size=2, seed=1, follows=follows)
    seen = [pair for step in range(40) for pair in zip(*made.at(step).values(), strict=True)]
    assert all(plain.input_ids[0] == drawn.input_ids[0] for plain, drawn in seen)
    assert {drawn.input_ids[1] for _, drawn in seen} == {0, 1, 2}
    assert made.at(7) == loop.Batches({"forget": rows, "template": variants}, 2, 1, follows).at(7)
    with pytest.raises(AssayError, match="row 0 of template has nothing to choose from"):
        loop.Batches({"template": Variants([[]])}, 1, 0).at(0)


def test_further_numbers_of_the_targets_are_padded_and_cut_with_their_rows() -> None:
    examples = [
        Example((1, 2, 3), (-100, 2, 3), {"weight": (0.5, 0.25)}),
        Example((1, 2), (1, 2), {"weight": (1.0,)}),
    ]
    part = collate(examples, 0, "forget")
    assert part.extra["weight"].tolist() == [[0.5, 0.25], [1.0, 0.0]]
    assert [piece["forget"].extra["weight"].tolist() for piece in cut({"forget": part}, 2)] == [
        [[0.5, 0.25]],
        [[1.0, 0.0]],
    ]


def factors(name: str, steps: int, **options: Any) -> list[float]:
    module, config = loop.component("schedule", Component(name, options))
    return [round(module.factor(config, step, steps), 6) for step in range(steps)]


def test_schedules_warm_up_and_come_down() -> None:
    assert factors("constant", 4) == [1, 1, 1, 1]
    assert factors("constant", 4, warmup_steps=2) == [0.5, 1, 1, 1]
    assert factors("linear", 6, warmup_steps=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert factors("linear", 6, warmup_share=0.3) == factors("linear", 6, warmup_steps=2)
    assert factors("linear", 4, final=0.2) == [1, 0.8, 0.6, 0.4]
    assert factors("cosine", 6, warmup_steps=2) == [0.5, 1, 1, 0.853553, 0.5, 0.146447]
    assert factors("cosine", 2, warmup_steps=4, final=0.1) == [0.25, 0.5]


def test_steps_win_over_epochs() -> None:
    assert loop.steps_of(loop.Training(steps=7), 100) == 7
    assert loop.steps_of(loop.Training(epochs=2.0, batch=8), 100) == 25
    with pytest.raises(AssayError, match="give steps or epochs"):
        loop.steps_of(loop.Training(epochs=None), 100)


@pytest.mark.parametrize(
    ("name", "options"), [("adamw", {}), ("sgd", {}), ("sgd", {"nesterov": True, "weight_decay": 0.1})]
)
def test_a_step_of_each_optimizer_by_hand(name: str, options: dict[str, Any]) -> None:
    module, config = loop.component("optimizer", Component(name, {"learning_rate": 0.1} | options))
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = module.build(config, [("w", weight)])
    weight.grad = torch.tensor([0.5])
    optimizer.step()
    decayed = 0.5 + config.weight_decay * 2
    step = 0.1 * (decayed * 1.9 if options else decayed) if name == "sgd" else 0.1 * 0.01 * 2 + 0.1
    assert weight.item() == pytest.approx(2 - step)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a momentum above 0"):
        loop.component("optimizer", Component("sgd", {"nesterov": True, "momentum": 0.0}))


def test_label_smoothing_by_hand() -> None:
    module, config = loop.component("loss", Component("cross_entropy", {"label_smoothing": 0.5}))
    logits = torch.tensor([[math.log(0.25), math.log(0.75)]])
    expected = -(0.75 * math.log(0.25) + 0.25 * math.log(0.75))
    assert float(module.token_losses(config, logits, torch.tensor([0]))[0]) == pytest.approx(expected)


# --- a whole run --------------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_notes_say_what_was_done(parent: Path, tmp_path: Path) -> None:
    stage = finetune(parent, tmp_path, steps=30)
    values = curve(stage)
    assert values[29, "train"] < 0.6 * values[0, "train"]
    assert values[0, "learning_rate"] == 1e-2
    assert values[15, "learning_rate"] == pytest.approx(5e-3)
    notes = stage.notes
    assert (notes["steps"], notes["processes"], notes["resumed_from_step"]) == (30, 1, 0)
    assert notes["master_dtype"] == notes["load_dtype"] == notes["saved_dtype"] == "float32"
    assert notes["parameters"] == notes["nonzero_before"] == notes["nonzero_after"] > 5000
    assert notes["tokens_seen"] > 30 * 8 * 10
    assert notes["update_lost_in_saving"] == 0


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(parent: Path, tmp_path: Path) -> None:
    one, two = finetune(parent, tmp_path / "1"), finetune(parent, tmp_path / "2")
    assert same(weights_of(one.folder / "model"), weights_of(two.folder / "model"))
    other = make_stage(parent, tmp_path / "3", QUICK, seed=4)
    run(other, sft)
    assert not same(weights_of(one.folder / "model"), weights_of(other.folder / "model"))


def test_micro_batches_train_the_same_model(sparse: Path, tmp_path: Path) -> None:
    plain = make_parent(tmp_path / "parent", dropout=0.0)
    config = replace(QUICK, optimizer=Component("sgd", {"learning_rate": 0.1}))
    whole, pieces = (
        finetune(plain, tmp_path / "1", config),
        finetune(plain, tmp_path / "2", config, micro_batch=3),
    )
    expected = weights_of(whole.folder / "model")
    for name, value in weights_of(pieces.folder / "model").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_trains_the_same_model(parent: Path, tmp_path: Path) -> None:
    one, two = finetune(parent, tmp_path / "1"), finetune(parent, tmp_path / "2", gradient_checkpointing=True)
    assert same(weights_of(one.folder / "model"), weights_of(two.folder / "model"))


def test_clipping_is_recorded_before_and_felt_after(parent: Path, tmp_path: Path) -> None:
    sgd = Component("sgd", {"learning_rate": 1.0, "momentum": 0.0})
    constant = Component("constant")
    stage = finetune(parent, tmp_path, steps=1, clip=0.01, optimizer=sgd, schedule=constant)
    start, end = weights_of(parent), weights_of(stage.folder / "model")
    moved = math.sqrt(sum(float((end[name] - start[name]).square().sum()) for name in start))
    assert curve(stage)[0, "gradient_norm"] > 0.1
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_loss_component_takes_the_place_of_cross_entropy(parent: Path, tmp_path: Path) -> None:
    plain = finetune(parent, tmp_path / "1", loss=Component("cross_entropy"))
    default = finetune(parent, tmp_path / "2")
    smooth = finetune(parent, tmp_path / "3", loss=Component("cross_entropy", {"label_smoothing": 0.2}))
    assert curve(plain)[3, "train"] == pytest.approx(curve(default)[3, "train"], rel=1e-4)
    assert curve(smooth)[0, "train"] != curve(plain)[0, "train"]


def test_a_head_takes_the_place_of_the_model_s_own(parent: Path, tmp_path: Path) -> None:
    stage = finetune(parent, tmp_path, head=Component("euclidean"), saved="bfloat16")
    model = load_model(stage.folder / "model")
    assert type(model).__name__ == "HarmonicLlamaForCausalLM"
    assert 0 < stage.notes["update_lost_in_saving"] < 0.5


# --- zeros --------------------------------------------------------------------------------------------------

LORA = Component("lora", {"rank": 4})


@pytest.mark.parametrize("adapter", [None, LORA])
def test_zeros_stay_zeros_after_training(sparse: Path, tmp_path: Path, adapter: Component | None) -> None:
    stage = finetune(sparse, tmp_path, adapter=adapter)
    start, end = weights_of(sparse), weights_of(stage.folder / "model")
    assert all(bool((end[name][start[name] == 0] == 0).all()) for name in start)
    assert not same(start, end)
    assert stage.notes["nonzero_after"] == stage.notes["nonzero_before"] < 0.9 * stage.notes["parameters"]


def test_without_keep_zeros_a_pruned_model_becomes_dense(sparse: Path, tmp_path: Path) -> None:
    stage = finetune(sparse, tmp_path, keep_zeros=False)
    assert stage.notes["nonzero_after"] > 1.2 * stage.notes["nonzero_before"]


def test_masked_gradients_take_no_part_in_the_norm(sparse: Path, tmp_path: Path) -> None:
    kept, free = finetune(sparse, tmp_path / "1"), finetune(sparse, tmp_path / "2", keep_zeros=False)
    assert curve(kept)[0, "gradient_norm"] < curve(free)[0, "gradient_norm"]


# --- precision ----------------------------------------------------------------------------------------------


def test_a_bfloat16_parent_moves_and_says_what_saving_loses(tmp_path: Path) -> None:
    parent = make_parent(tmp_path / "parent", dtype="bfloat16", dropout=0.0)
    config = replace(
        QUICK, steps=10, optimizer=Component("adamw", {"learning_rate": 1e-5, "weight_decay": 0.01})
    )
    constant = Component("constant")
    # Every row of the tied embedding gets a gradient through the output, so every weight should move.
    exact = finetune(parent, tmp_path / "1", config, saved="float32", schedule=constant)
    start, end = weights_of(parent), weights_of(exact.folder / "model")
    moved = sum(int((end[name] != start[name].float()).sum()) for name in start)
    assert moved > 0.99 * exact.notes["parameters"]
    rounded = finetune(parent, tmp_path / "2", config, schedule=constant)
    assert rounded.notes["saved_dtype"] == "bfloat16"
    assert 0.2 < rounded.notes["update_lost_in_saving"] < 1
    assert exact.notes["update_lost_in_saving"] == 0
    assert json.loads((rounded.folder / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    # What the note says is what the files say.
    lost = moved_by = 0.0
    for name, kept in weights_of(rounded.folder / "model").items():
        update = end[name].double() - start[name].double()
        lost += float((end[name].double() - kept.double()).abs().sum())
        moved_by += float(update.abs().sum())
    assert rounded.notes["update_lost_in_saving"] == pytest.approx(lost / moved_by, rel=1e-6)


def test_bfloat16_computing_keeps_float32_masters(parent: Path, tmp_path: Path) -> None:
    stage = finetune(parent, tmp_path, precision="bfloat16", steps=20)
    assert stage.notes["compute_dtype"] == "bfloat16"
    values = curve(stage)
    assert values[19, "train"] < values[0, "train"]
    assert weights_of(stage.folder / "model")["model.norm.weight"].dtype == torch.float32
    # The next job of the same process computes as it says, and not as this one did.
    assert finetune(parent, tmp_path / "next", steps=1).notes["compute_dtype"] == "float32"


# --- adapters and references ------------------------------------------------------------------------------------


def test_the_reference_of_an_adapter_is_the_start(parent: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, adapter=LORA)
    stage = make_stage(parent, tmp_path, settings)
    model = loop.prepare(stage, settings)
    reference = loop.reference_of(stage, model, settings)
    seen = []

    def loss(model: Any, batch: Any) -> Terms:
        inputs = {"input_ids": batch.train.input_ids, "attention_mask": batch.train.attention_mask}
        start = load_model(parent)(**inputs).logits
        seen.append(torch.equal(reference(**inputs).logits, start))
        assert model.training
        return sft.loss(settings, model, batch)

    loop.train(stage, model, settings, batches_of(parent), loss)
    assert seen == [True] * 6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_reference_of_a_trained_model_stays_as_it_was(
    parent: Path, tmp_path: Path, precision: Any
) -> None:
    settings = replace(QUICK, precision=precision)
    stage = make_stage(parent, tmp_path, settings)
    model = loop.prepare(stage, settings)
    reference = loop.reference_of(stage, model, settings)
    inputs = torch.arange(12).view(2, 6)
    before = reference(input_ids=inputs).logits
    loop.train(
        stage, model, settings, batches_of(parent), lambda model, batch: sft.loss(settings, model, batch)
    )
    assert torch.equal(reference(input_ids=inputs).logits, before)
    assert not torch.equal(model.eval()(input_ids=inputs).logits, before)
    assert same(dict(reference.named_parameters()), dict(load_model(parent).named_parameters()))
    assert not reference.training
    assert not any(weight.requires_grad for weight in reference.parameters())


def test_an_adapter_is_merged_and_kept_beside(parent: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    stage = finetune(parent, tmp_path, adapter=LORA)
    folder = stage.folder / "model"
    merged, rebuilt = load_model(folder), PeftModel.from_pretrained(load_model(parent), folder / "adapter")
    inputs = torch.arange(12).view(2, 6)
    torch.testing.assert_close(merged(inputs).logits, rebuilt(inputs).logits, rtol=1e-4, atol=1e-5)
    config = (folder / "adapter" / "adapter_config.json").read_text()
    assert str(parent) not in config
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert oct((folder / "adapter" / "adapter_model.safetensors").stat().st_mode)[-3:] == "644"


def test_an_adapter_for_no_layer_is_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match=r"lora\(targets=\['nowhere'\]\)"):
        finetune(parent, tmp_path, adapter=Component("lora", {"targets": ("nowhere",)}))


def batches_of(parent: Path, size: int = 8) -> loop.Batches:
    from methods.checkpoint import load_tokenizer
    from methods.data import Style, encode

    return loop.Batches({"train": encode(ROWS, load_tokenizer(parent), Style.read(parent), 64)}, size, seed=3)


# --- resuming -----------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the death of the process."""


@pytest.fixture
def save_every(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda steps: monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", str(steps))


def train_until(parent: Path, folder: Path, settings: sft.Config, act: Callable[[int], None]) -> Stage:
    """Train; ``act`` is called at every step, within the loss."""
    stage = make_stage(parent, folder, settings)
    model = loop.prepare(stage, settings)

    def loss(model: Any, batch: Any) -> Terms:
        act(batch.step)
        return sft.loss(settings, model, batch)

    loop.train(stage, model, settings, batches_of(parent), loss)
    return stage


def kill_at(killed: int) -> Callable[[int], None]:
    def act(step: int) -> None:
        if step == killed:
            raise Killed

    return act


def nothing(step: int) -> None:
    return None


RICH = replace(QUICK, probe=("retain=all", "forget=first"), probe_every=2, checkpoints=(2, 4), micro_batch=3)


@pytest.mark.parametrize("adapter", [None, Component("lora", {"rank": 2, "dropout": 0.2})])
def test_a_run_killed_at_any_step_ends_with_the_same_bits(
    parent: Path, tmp_path: Path, save_every: Callable[[int], None], adapter: Component | None
) -> None:
    settings = replace(RICH, adapter=adapter)
    whole = train_until(parent, tmp_path / "whole", settings, nothing)
    save_every(2)
    for killed in range(1, 6):
        folder = tmp_path / str(killed)
        with pytest.raises(Killed):
            train_until(parent, folder, settings, kill_at(killed))
        assert not (folder / "result").exists()
        resumed = train_until(parent, folder, settings, nothing)
        assert resumed.notes["resumed_from_step"] == killed // 2 * 2
        for name in ("model", "model@2", "model@4"):
            assert same(weights_of(resumed.folder / name), weights_of(whole.folder / name)), (killed, name)
        assert (resumed.folder / "curve.csv").read_bytes() == (whole.folder / "curve.csv").read_bytes()
        assert {k: v for k, v in resumed.notes.items() if k != "resumed_from_step"} == {
            k: v for k, v in whole.notes.items() if k != "resumed_from_step"
        }


def adaptively(parent: Path, folder: Path, killed: int = -1) -> Stage:
    """The weight of the loss doubles after each step, and steps 2 and 4 are kept."""
    settings = replace(QUICK, checkpoints=(2, 4))
    stage = make_stage(parent, folder, settings)
    readings = iter(range(1, 9))
    stage.spent = lambda: {"kwh": 1e-3 * next(readings), "seconds": 1.0}
    model = loop.prepare(stage, settings)

    def loss(model: Any, batch: Any) -> Terms:
        kill_at(killed)(batch.step)
        term = sft.loss(settings, model, batch)["train"]
        return {"train": replace(term, weight=batch.values["price"])}

    def after(values: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
        assert means["train"] > 0
        assert values["price"] == 0.5 * 2 ** values["step"]
        return {"price": 2 * values["price"]}

    loop.train(
        stage, model, settings, batches_of(parent), loss, adaptive=loop.Adaptive({"price": 0.5}, after)
    )
    return stage


def test_numbers_that_change_after_each_step_are_logged_and_resumed(
    parent: Path, tmp_path: Path, save_every: Callable[[int], None]
) -> None:
    whole = adaptively(parent, tmp_path / "whole")
    assert [curve(whole)[step, "price"] for step in range(6)] == [0.5, 1, 2, 4, 8, 16]
    assert whole.notes["spent_at_step"] == {
        "2": {"kwh": 1e-3, "seconds": 1.0},
        "4": {"kwh": 2e-3, "seconds": 1.0},
    }
    save_every(3)
    with pytest.raises(Killed):
        adaptively(parent, tmp_path / "killed", 4)
    resumed = adaptively(parent, tmp_path / "killed")
    assert resumed.notes["resumed_from_step"] == 3
    assert set(resumed.notes["spent_at_step"]) == {"2", "4"}
    assert same(weights_of(resumed.folder / "model"), weights_of(whole.folder / "model"))
    assert (resumed.folder / "curve.csv").read_bytes() == (whole.folder / "curve.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_saves_the_state_and_the_run_can_go_on(
    parent: Path, tmp_path: Path, number: int
) -> None:
    before = signal.getsignal(number)
    whole = train_until(parent, tmp_path / "whole", QUICK, nothing)

    def stop(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="saved its state at step 3"):
        train_until(parent, tmp_path / "stopped", QUICK, stop)
    assert signal.getsignal(number) == before
    resumed = train_until(parent, tmp_path / "stopped", QUICK, nothing)
    assert resumed.notes["resumed_from_step"] == 3
    assert same(weights_of(resumed.folder / "model"), weights_of(whole.folder / "model"))


def test_a_run_that_died_while_writing_its_result_only_writes_again(
    parent: Path, tmp_path: Path, save_every: Callable[[int], None]
) -> None:
    save_every(6)
    whole = finetune(parent, tmp_path)
    again = train_until(parent, tmp_path, QUICK, kill_at(0))
    assert again.notes["resumed_from_step"] == 6
    assert again.notes["tokens_seen"] == whole.notes["tokens_seen"]


# --- what must not happen -----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_and_term_and_leaves_nothing(
    parent: Path, tmp_path: Path
) -> None:
    stage = make_stage(parent, tmp_path, QUICK)
    model = loop.prepare(stage, QUICK)

    def loss(model: Any, batch: Any) -> Terms:
        term = answer_nll(batch.train, forward(model, batch.train))
        return {"kept": term, "lost": replace(term, sum=term.sum * (math.nan if batch.step == 3 else 1))}

    with pytest.raises(NotFinite, match="step 3: the term 'lost' of the loss is nan"):
        loop.train(stage, model, QUICK, batches_of(parent), loss)
    assert not stage.folder.exists()


def test_a_gradient_that_is_not_finite_names_step_and_weight(parent: Path, tmp_path: Path) -> None:
    stage = make_stage(parent, tmp_path, QUICK)
    model = loop.prepare(stage, QUICK)

    def loss(model: Any, batch: Any) -> Terms:
        zero = (model.model.norm.weight * 0).sum().sqrt()
        return {"train": Term(zero + sft.loss(QUICK, model, batch)["train"].sum, batch.train.tokens)}

    with pytest.raises(NotFinite, match=r"step 0: the gradient of model\.norm\.weight is not finite"):
        loop.train(stage, model, QUICK, batches_of(parent), loss)
    assert not stage.folder.exists()


def test_weights_that_end_up_infinite_are_not_saved(parent: Path, tmp_path: Path) -> None:
    sgd = Component("sgd", {"learning_rate": 3e38, "weight_decay": 10.0})
    with pytest.raises(NotFinite, match="is not finite"):
        finetune(parent, tmp_path, steps=1, optimizer=sgd, clip=0.0, schedule=Component("constant"))
    assert not list((tmp_path / "result").iterdir())


def test_a_loss_that_depends_on_nothing_is_refused(parent: Path, tmp_path: Path) -> None:
    stage = make_stage(parent, tmp_path, QUICK)
    model = loop.prepare(stage, QUICK)
    with pytest.raises(AssayError, match="no term of the loss depends on a weight that is trained"):
        loop.train(
            stage, model, QUICK, batches_of(parent), lambda model, batch: {"x": Term(torch.tensor(1.0), 1.0)}
        )


def test_probing_does_not_disturb_training(parent: Path, tmp_path: Path) -> None:
    plain = finetune(parent, tmp_path / "1")
    probed = finetune(parent, tmp_path / "2", probe=("retain=all",), probe_every=1)
    assert same(weights_of(plain.folder / "model"), weights_of(probed.folder / "model"))


def test_probes_are_the_answer_loss_at_the_start_and_the_end(parent: Path, tmp_path: Path) -> None:
    stage = finetune(parent, tmp_path, probe=("retain=all",), probe_every=4)
    values = {step: value for (step, term), value in curve(stage).items() if term == "probe.retain"}
    assert sorted(values) == [0, 4, 6]
    batch = collate(batches_of(parent).parts["train"], 0, "train")
    for step, folder in ((0, parent), (6, stage.folder / "model")):
        term = answer_nll(batch, forward(load_model(folder), batch))
        assert values[step] == pytest.approx(term.sum.item() / term.count, rel=1e-5)


@pytest.mark.parametrize("probe", ["retain", "=all", "retain="])
def test_a_probe_written_otherwise_is_refused(parent: Path, tmp_path: Path, probe: str) -> None:
    with pytest.raises(AssayError, match="must be written as name=data set"):
        finetune(parent, tmp_path, probe=(probe,))


def test_a_checkpoint_behind_the_last_step_is_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="each must be from 1 to 6, the steps"):
        finetune(parent, tmp_path, checkpoints=(7,))


def test_a_kept_model_is_that_of_a_shorter_run(parent: Path, tmp_path: Path) -> None:
    constant = Component("constant")
    long = finetune(parent, tmp_path / "1", schedule=constant, checkpoints=(2,))
    short = finetune(parent, tmp_path / "2", schedule=constant, steps=2)
    assert same(weights_of(long.folder / "model@2"), weights_of(short.folder / "model"))
    assert (long.folder / "model@2" / "tokenizer.json").is_file()


# --- several processes --------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from tests.test_loop import QUICK, finetune
from dataclasses import replace
parent, folder = map(Path, sys.argv[1:])
stage = finetune(parent, folder, replace(QUICK, micro_batch=2), checkpoints=(4,), probe=("retain=all",))
assert stage.notes["processes"] == 2
"""


def test_two_processes_train_the_same_model_as_one(tmp_path: Path) -> None:
    parent = make_parent(tmp_path / "parent", dropout=0.0)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
        "ASSAY_SAVE_EVERY_STEPS": "3",
    }
    arguments = [*command, str(parent), str(tmp_path / "two")]
    done = subprocess.run(
        arguments, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = finetune(parent, tmp_path / "one")
    expected = weights_of(one.folder / "model")
    for name, value in weights_of(tmp_path / "two" / "result" / "model").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    with open(tmp_path / "two" / "result" / "curve.csv", encoding="utf-8", newline="") as file:
        losses = {
            int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["term"] == "train"
        }
    assert losses == pytest.approx({step: curve(one)[step, "train"] for step in range(6)}, rel=1e-4)
    assert (tmp_path / "two" / "result" / "model@4" / "model.safetensors").is_file()


# --- the module ---------------------------------------------------------------------------------------------


def test_reading_the_options_loads_neither_torch_nor_transformers() -> None:
    code = "import sys; from methods.find import catalogue as c; c().method('train.sft').load(); "
    code += "[c().component(*n).load() for n in (('adapter','lora'),('optimizer','adamw'),('schedule','linear'))]; "
    code += "import methods.checkpoint; heavy = ('torch', 'transformers', 'accelerate', 'peft'); "
    code += "print([name for name in heavy if name in sys.modules])"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_component_of_the_loop_is_found() -> None:
    for kind, names in {
        "optimizer": "adamw sgd",
        "schedule": "constant linear cosine",
        "adapter": "lora",
    }.items():
        for name in names.split():
            assert catalogue().component(kind, name).load().__doc__


def test_the_stand_ins_of_these_tests_are_enough() -> None:
    assert len(Rows().rows("first")) < len(Rows().rows("all")) == len(ROWS)
    assert Progress(Path("nowhere"), 0).load() is None


# --- what cannot be trained -------------------------------------------------------------------------------------


def test_an_adapter_behind_a_distance_head_is_refused(parent: Path, tmp_path: Path) -> None:
    adapter = Component("lora", {"rank": 2, "alpha": 2, "targets": ("lm_head",)})
    with pytest.raises(AssayError, match="targets name a distance head"):
        finetune(parent, tmp_path, head=Component("euclidean", {"exponent": 4.0}), adapter=adapter)


def test_a_model_starts_from_new_weights_where_asked_for_and_keeps_its_zeros(
    sparse: Path, tmp_path: Path
) -> None:
    kept = weights_of(finetune(sparse, tmp_path / "kept", steps=1).folder / "model")
    fresh = [
        weights_of(finetune(sparse, tmp_path / str(seed), steps=1, start="random").folder / "model")
        for seed in (1, 2)
    ]
    assert same(*fresh)
    before = weights_of(sparse)
    zeros = {name: weight == 0 for name, weight in before.items() if "proj" in name}
    assert all(bool((fresh[0][name][mask] == 0).all()) for name, mask in zeros.items())
    # A step of 1e-2 moves trained weights a little; new ones have nothing to do with the old.
    moved = {name: float((weights[name] - before[name]).abs().max()) for weights in (kept,) for name in zeros}
    assert all(float((fresh[0][name] - before[name]).abs().max()) > 2 * moved[name] for name in zeros)
