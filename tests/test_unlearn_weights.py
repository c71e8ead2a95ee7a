"""Unlearning that works on states and weights: RMU, ReGLU, task arithmetic, retraining, alignment recovery."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods import loop, train, unlearn
from methods.checkpoint import load_model, save_model
from methods.data import Part
from methods.find import catalogue
from methods.stage import AssayError, Component, Parent, Stage
from methods.terms import Outputs, forward, total
from methods.train import sft
from methods.unlearn import _rila
from tests.training import make_parent, make_stage, same, weights_of

FAST = Component("adamw", {"learning_rate": 1e-2, "weight_decay": 0.0})
COMMON = {"steps": 6, "batch": 4, "forget": "first", "log_every": 1, "optimizer": FAST}
LORA = Component("lora", {"rank": 4, "alpha": 8})


def method(name: str) -> Any:
    return catalogue().method(f"unlearn.{name}").load()


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent") / "model", dropout=0.0)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("sparse") / "model", dropout=0.0, zeros=0.5)


@pytest.fixture
def save_every(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda steps: monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", str(steps))


def stage_of(name: str, parent: Path, folder: Path, seed: int = 3, **options: Any) -> Stage:
    """A stage with a method's options; a folder among them is a reference."""
    parents = {key: value for key, value in options.items() if isinstance(value, Path)}
    given = options | {key: Parent(key) for key in parents}
    stage = make_stage(parent, folder, method(name).Config(**given), seed=seed, **parents)
    stage.method = f"unlearn.{name}"
    return stage


def run(name: str, parent: Path, folder: Path, **options: Any) -> Stage:
    """Run a whole stage."""
    stage, module = stage_of(name, parent, folder, **options), method(name)
    if hasattr(module, "run"):
        module.run(stage)
    else:
        unlearn.run(stage, module)
    return stage


def curve(stage: Stage, term: str) -> list[float]:
    with open(stage.folder / "curve.csv", encoding="utf-8", newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["term"] == term]


def changed(parent: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of a model whose weights went through ``change``."""
    model = load_model(parent, device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(change(name, weight))
    save_model(model, folder, parent)
    return folder


class Killed(Exception):
    """Stands for a process that dies."""


# --- RMU ------------------------------------------------------------------------------------------------------------


def steered(**options: Any) -> float:
    """Two forget rows with answers of one and two tokens; squared distances 4, and 16 and 4, from (3, 4)."""
    rmu = method("rmu")
    states = torch.tensor([[[0.0, 0.0], [3.0, 2.0]], [[3.0, 0.0], [1.0, 4.0]]])
    labels = torch.tensor([[-100, 7], [5, 6]])
    part = Part(torch.zeros(2, 2), torch.ones(2, 2), labels, "forget")
    config = rmu.Config(alpha=0.0, layer=0, **options)
    control = rmu.control_vector(torch.tensor([0.6, 0.8]), 5.0)
    return float(total(rmu.distance(config, "forget", part, states, control, 2.0), rmu.outer(config)))


def test_rmu_is_a_mean_over_entries_answer_tokens_and_sequences() -> None:
    assert steered() == pytest.approx(2 * ((4 / 2) / 1 + (16 / 2 + 4 / 2) / 2) / 2)


def test_rmu_can_repeat_the_broadcasting_of_the_official_code() -> None:
    assert steered(average="broadcast", gamma=2.0) == pytest.approx(2 * ((2 + 10) / 2) * ((1 + 1 / 2) / 2))


def test_rmu_trains_the_matrices_of_its_recipe_and_leaves_the_rest(parent: Path, tmp_path: Path) -> None:
    stage = run("rmu", parent, tmp_path, layer=0, **COMMON)
    before, after = weights_of(parent), weights_of(stage.folder / "model")
    moved = [name for name in before if not before[name].equal(after[name])]
    assert moved == ["model.layers.0.mlp.down_proj.weight"]
    assert curve(stage, "forget")[-1] < curve(stage, "forget")[0]
    assert curve(stage, "retain")[0] == 0.0 < curve(stage, "retain")[-1]


@pytest.mark.parametrize("adapter", [None, LORA])
def test_patterns_say_what_rmu_trains_also_with_an_adapter(
    parent: Path, tmp_path: Path, adapter: Component | None
) -> None:
    options = COMMON | {"adapter": adapter, "trained": ("*.self_attn.[qk]_proj.*",)}
    stage = run("rmu", parent, tmp_path, layer=1, **options)
    before, after = weights_of(parent), weights_of(stage.folder / "model")
    moved = {name.split(".")[-2] for name in before if not before[name].equal(after[name])}
    assert moved == {"q_proj", "k_proj"}


def test_the_control_vector_comes_from_the_seed_alone(parent: Path, tmp_path: Path) -> None:
    rmu, found = method("rmu"), []
    for seed in (1, 1, 2):
        stage = stage_of("rmu", parent, tmp_path, seed=seed, layer=1, trained="all", coefficient=7.0)
        model = loop.prepare(stage, stage.config)
        rmu.prepare(stage.config, model, stage, {})
        found.append(model.control_vector)
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])
    assert float(found[0].norm()) == pytest.approx(7.0)
    assert bool((found[0] >= 0).all())


def test_a_block_is_seen_before_the_last_norm(parent: Path) -> None:
    rmu, model = method("rmu"), load_model(parent, device="cpu")
    part = Part(torch.arange(12).view(2, 6), torch.ones(2, 6), torch.zeros(2, 6), "forget")
    states = forward(model, part, hidden=True).hidden_states or ()
    assert torch.equal(rmu.hidden_states(model, part, 0), states[1])
    last = rmu.hidden_states(model, part, 1)
    assert not torch.allclose(last, states[2])
    assert torch.allclose(model.model.norm(last), states[2])


def test_the_states_of_the_start_are_those_without_the_adapter(parent: Path, tmp_path: Path) -> None:
    stage = run("rmu", parent, tmp_path, layer=1, trained="all", adapter=LORA, alpha=5.0, **COMMON)
    assert curve(stage, "retain")[0] == 0.0
    assert 0.0 < curve(stage, "retain")[-1] < 0.5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layer": 7}, "layer=7, but the model's decoder blocks are 0 to 1"),
        ({"layer": 0, "trained": ("*.fc2.*",)}, "no trainable weight matches *.fc2.*"),
        ({"layer": 1, "adapter": Component("lora", {"targets": ("q_proj",)})}, "no trainable weight matches"),
    ],
)
def test_rmu_refuses_what_the_model_does_not_have(
    parent: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AssayError, match=re.escape(sentence)):
        run("rmu", parent, tmp_path, **COMMON, **options)
    assert not (tmp_path / "result").exists()


# --- ReGLU ----------------------------------------------------------------------------------------------------------


def outputs_of(probabilities: list[list[float]], targets: list[int]) -> Outputs:
    logits = torch.tensor([probabilities]).log()
    mask = torch.tensor([[target >= 0 for target in targets]])
    return Outputs(logits, torch.tensor([targets]).clamp(min=0), mask, logits)


def test_the_inverted_hinge_compares_the_answer_with_the_best_other_token() -> None:
    found = method("reglu").inverted_hinge(
        outputs_of([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.5, 0.3, 0.2]], [0, 1, -1])
    )
    assert found.tolist() == pytest.approx([1 + 0.5 - 0.3, 1 + 0.1 - 0.8])


def test_the_inverted_hinge_takes_the_softmax_of_logits_between_0_and_1() -> None:
    logits = torch.tensor([[[0.0, 1.0]]])
    outputs = Outputs(logits, torch.tensor([[1]]), torch.tensor([[True]]), logits)
    share = float(torch.tensor([0.0, 1.0]).softmax(0)[1])
    assert float(method("reglu").inverted_hinge(outputs)) == pytest.approx(1 + share - (1 - share))


def test_the_overlap_is_added_up_over_layers_and_counted_once_a_batch() -> None:
    reglu = method("reglu")

    def layer(up: list[list[float]], basis: list[list[float]]) -> Any:
        found = torch.nn.Module()
        found.lora_B = {"default": SimpleNamespace(weight=torch.tensor(up))}  # type: ignore[assignment]
        found.register_buffer("retain_basis", torch.tensor(basis))
        return found

    # (2, 3) on (1, 0): 4;  (1, 2) on (0.6, 0.8): 2.2 ** 2
    model = torch.nn.ModuleList(
        [layer([[2.0], [3.0]], [[1.0], [0.0]]), layer([[1.0], [2.0]], [[0.6], [0.8]])]
    )
    part = Part(torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 2), "forget")
    term = reglu.overlap_term(reglu.Config(overlap=0.5), model, part)
    assert float(term.sum / term.count) == pytest.approx(4 + 2.2**2)
    assert term.weight == 0.5


def test_the_start_points_where_forget_rows_speak_and_retain_rows_do_not() -> None:
    forget = torch.tensor([[3.0, 0.0, 2.0], [-3.0, 0.0, 2.0]])  # energies 9, 0, 4
    retain = torch.tensor([[0.0, 5.0, 2.0]])  # 0, 25, 4: the third direction is shared
    weight = torch.arange(6.0).view(3, 2)
    found = _rila.guided(weight, forget, retain, rank=1, scale=2.0, beta=0.5)
    assert found.up.squeeze().tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert found.down.tolist() == [[0.0, 1.0]]
    assert found.residual.tolist() == [[0.0, -1.0], [2.0, 3.0], [4.0, 5.0]]
    assert _rila.retain_basis(retain, 1).squeeze().tolist() == pytest.approx([0.0, 5 / 29**0.5, 2 / 29**0.5])


def test_few_rows_of_many_outputs_give_the_same_directions_as_the_whole_matrix() -> None:
    random = torch.Generator().manual_seed(0)
    forget, retain = (torch.randn(5, 40, generator=random, dtype=torch.float64) for _ in range(2))
    matrix = 0.3 * forget.T @ forget / 5 - 0.7 * retain.T @ retain / 5
    whole = torch.linalg.eigh(matrix).eigenvectors[:, -3:]
    found = _rila.leading([(0.3, forget), (-0.7, retain)], 3)
    assert torch.allclose(found @ found.T, whole @ whole.T, atol=1e-10)
    assert bool((found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all())


def test_a_layer_narrower_than_the_rank_leaves_the_rest_unused() -> None:
    found = _rila.guided(torch.eye(2), torch.eye(2), torch.ones(1, 2), rank=3, scale=1.0, beta=0.5)
    assert not found.up[:, 2].any()
    assert not found.down[2].any()
    assert torch.allclose(found.residual, torch.zeros(2, 2, dtype=torch.float64), atol=1e-12)


def test_padding_is_no_output() -> None:
    outputs = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    assert _rila.summed(outputs, torch.tensor([[1, 1, 0]])).tolist() == [[4.0, 6.0]]


def started(parent: Path, folder: Path, **options: Any) -> tuple[Stage, Any]:
    """A model whose adapter has been started, and its stage."""
    stage = stage_of("reglu", parent, folder, adapter=LORA, **COMMON, **options)
    model = loop.prepare(stage, stage.config)
    parts = unlearn._encoded(stage, method("reglu"), stage.config)
    method("reglu").prepare(stage.config, model, stage, parts)
    return stage, model


def test_nothing_has_changed_when_reglu_begins(parent: Path, tmp_path: Path) -> None:
    _, model = started(parent, tmp_path)
    ids = torch.arange(40).view(4, 10)
    with torch.no_grad():
        before = load_model(parent, device="cpu")(input_ids=ids).logits
        assert float((model.eval()(input_ids=ids).logits - before).abs().max()) < 1e-6
    layer = next(iter(_rila.adapted(model).values()))
    weight = weights_of(parent)["model.layers.0.self_attn.q_proj.weight"]
    assert float((layer.base_layer.weight - weight).abs().max()) > 1e-3
    assert layer.lora_B["default"].weight.any()


def test_the_overlap_is_lower_with_its_penalty(parent: Path, tmp_path: Path) -> None:
    last = {
        weight: curve(
            run(
                "reglu", parent, tmp_path / str(weight), adapter=LORA, overlap=weight, retain_rank=6, **COMMON
            ),
            "overlap",
        )
        for weight in (0.0, 5.0)
    }
    assert last[0.0][0] == last[5.0][0] > 0
    assert last[5.0][-1] < 0.9 * last[0.0][-1]


def test_the_saved_model_is_the_one_that_was_trained(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, seen = torch.arange(40).view(4, 10), {}
    finish = loop._Run.finish

    def note(run: Any) -> None:
        seen["logits"] = run.model.eval()(input_ids=ids).logits.detach().clone()
        finish(run)

    monkeypatch.setattr(loop._Run, "finish", note)
    stage = run("reglu", parent, tmp_path, adapter=LORA, checkpoints=(6,), **COMMON)
    folder = stage.folder / "model"
    saved = load_model(folder, device="cpu")(input_ids=ids).logits
    assert float((saved - seen["logits"]).abs().max()) < 1e-5
    assert float((saved - load_model(parent, device="cpu")(input_ids=ids).logits).abs().max()) > 0.01
    # on the parent's weights the adapter alone would be another model
    assert not (folder / "adapter").exists()
    assert same(weights_of(folder), weights_of(stage.folder / "model@6"))


def test_reglu_killed_and_resumed_ends_with_the_same_bits(
    parent: Path, tmp_path: Path, save_every: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("reglu", parent, tmp_path / "whole", adapter=LORA, **COMMON)
    save_every(2)
    module = method("reglu")
    loss = module.loss

    def fragile(config: Any, model: Any, batch: Any, reference: Any) -> Any:
        if batch.step == 5:
            raise Killed
        return loss(config, model, batch, reference)

    monkeypatch.setattr(module, "loss", fragile)
    with pytest.raises(Killed):
        run("reglu", parent, tmp_path / "killed", adapter=LORA, **COMMON)
    monkeypatch.setattr(module, "loss", loss)
    resumed = run("reglu", parent, tmp_path / "killed", adapter=LORA, **COMMON)
    assert resumed.notes["resumed_from_step"] == 4
    assert same(weights_of(resumed.folder / "model"), weights_of(whole.folder / "model"))
    assert (resumed.folder / "curve.csv").read_bytes() == (whole.folder / "curve.csv").read_bytes()


def test_the_zeros_of_a_pruned_parent_outlive_the_new_base_weights(sparse: Path, tmp_path: Path) -> None:
    stage = run("reglu", sparse, tmp_path, adapter=LORA, **COMMON)
    before, after = weights_of(sparse), weights_of(stage.folder / "model")
    zeros = {name: weight == 0 for name, weight in before.items() if "proj" in name}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 1000
    assert all(not after[name][mask].any() for name, mask in zeros.items())
    assert all(not after[name].equal(before[name]) for name in zeros)
    counted = sum(int(weight.count_nonzero()) for weight in before.values())
    assert stage.notes["nonzero_before"] == counted
    assert stage.notes["nonzero_after"] <= counted


def test_what_saving_loses_is_measured_against_the_parent(parent: Path, tmp_path: Path) -> None:
    stage = run("reglu", parent, tmp_path, adapter=LORA, saved="bfloat16", **COMMON)
    assert 0 < stage.notes["update_lost_in_saving"] < 0.5


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_adapter_on_the_embedding_is_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="lm_head cannot be started from representations"):
        run("reglu", parent, tmp_path, adapter=Component("lora", {"targets": ("lm_head",)}), **COMMON)


# --- task arithmetic ------------------------------------------------------------------------------------------------


def test_a_task_vector_is_subtracted(parent: Path, tmp_path: Path) -> None:
    finetuned = changed(parent, tmp_path / "finetuned", lambda name, weight: weight + 0.25)
    stage = run("task_vector", parent, tmp_path, finetuned=finetuned, scale=2.0)
    before, after = weights_of(parent), weights_of(stage.folder / "model")
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert torch.allclose(after[name], weight - 0.5, atol=1e-6), name


def test_a_task_vector_leaves_zeros_alone_unless_told_otherwise(sparse: Path, tmp_path: Path) -> None:
    finetuned = changed(sparse, tmp_path / "finetuned", lambda name, weight: weight + 0.25)
    name = "model.layers.0.mlp.up_proj.weight"
    zeros = weights_of(sparse)[name] == 0
    kept = run("task_vector", sparse, tmp_path / "kept", finetuned=finetuned)
    filled = run("task_vector", sparse, tmp_path / "filled", finetuned=finetuned, keep_zeros=False)
    assert not weights_of(kept.folder / "model")[name][zeros].any()
    assert torch.allclose(weights_of(filled.folder / "model")[name][zeros], torch.tensor(-0.25))
    assert kept.notes["nonzero_after"] == kept.notes["nonzero_before"]


def other_model(folder: Path, width: int) -> Path:
    """A model of another width with the tokenizer of ``parent``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = make_parent(folder / "source", dropout=0.0)
    shape = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=290, tie_word_embeddings=True, **shape)
    save_model(LlamaForCausalLM(config), folder / "model", source)
    return folder / "model"


def other_tokenizer(folder: Path, parent: Path) -> Path:
    """A copy of a model that calls one token differently."""
    model = changed(parent, folder / "model", lambda name, weight: weight)
    text = (model / "tokenizer.json").read_text(encoding="utf-8")
    (model / "tokenizer.json").write_text(text.replace("<pad>", "<dap>"), encoding="utf-8")
    settings = (model / "tokenizer_config.json").read_text(encoding="utf-8")
    (model / "tokenizer_config.json").write_text(settings.replace("<pad>", "<dap>"), encoding="utf-8")
    return model


RECOVER = {"alignment": "all", "task": "first", "sequences": 12, "share": 0.02, "rounds": 6}


@pytest.mark.parametrize(
    ("name", "option", "options"), [("task_vector", "finetuned", {}), ("realign", "aligned", RECOVER)]
)
def test_arithmetic_on_unlike_models_is_refused(
    parent: Path, tmp_path: Path, name: str, option: str, options: dict[str, Any]
) -> None:
    with pytest.raises(AssayError, match=rf"weight is 290x12 in {option} and 290x16 in the parent"):
        run(name, parent, tmp_path, **{option: other_model(tmp_path / "wide", 12)}, **options)
    with pytest.raises(AssayError, match=f"the tokenizer of {option} has .* and the parent's"):
        run(name, parent, tmp_path, **{option: other_tokenizer(tmp_path / "named", parent)}, **options)
    assert not (tmp_path / "result").exists()


# --- retraining -----------------------------------------------------------------------------------------------------


def test_retraining_is_supervised_finetuning_on_what_is_kept(parent: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "batch": 4, "optimizer": FAST, "log_every": 1}
    retrained = run("retrain", parent, tmp_path / "retrained", retain="first", **options)
    stage = make_stage(parent, tmp_path / "trained", sft.Config(data="first", **options))
    train.run(stage, sft)
    assert same(weights_of(retrained.folder / "model"), weights_of(stage.folder / "model"))
    assert (retrained.folder / "curve.csv").read_bytes() == (stage.folder / "curve.csv").read_bytes()


def test_retraining_has_the_recipe_of_supervised_finetuning() -> None:
    shared = {field.name for field in dataclasses.fields(loop.Training)}
    ours, theirs = method("retrain").Config(), sft.Config()
    assert {name: getattr(ours, name) for name in shared} == {name: getattr(theirs, name) for name in shared}
    assert ours.retain == theirs.data


# --- alignment recovery ---------------------------------------------------------------------------------------------


def test_what_a_restored_weight_promises_is_gradient_times_step() -> None:
    realign = method("realign")
    gradient, step = torch.tensor([2.0, -3.0, 1.0, 0.0]), torch.tensor([0.5, -0.1, -4.0, 9.0])
    options: dict[str, Any] = {"aligned": Parent("aligned"), "alignment": "a", "task": "b"}
    found = realign.promise(realign.Config(**options), gradient, step)
    assert found.tolist() == pytest.approx([1.0, 0.3, 0.0, 0.0])
    found = realign.promise(realign.Config(score="gradient", **options), gradient, step)
    assert found.tolist() == [2.0, 3.0, 0.0, 0.0]


def test_the_best_are_chosen_over_all_matrices() -> None:
    top = method("realign").top
    scores = {"one": torch.tensor([0.1, 5.0, 0.0]), "two": torch.tensor([[3.0], [-9.0]])}
    assert {name: mask.flatten().tolist() for name, mask in top(scores, 2).items()} == {
        "one": [False, True, False],
        "two": [True, False],
    }
    assert sum(int(mask.sum()) for mask in top(scores, 99).values()) == 3
    assert not any(bool(mask.any()) for mask in top(scores, 0).values())


@pytest.fixture(scope="module")
def aligned(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt all rows."""
    config = sft.Config(data="all", steps=40, batch=24, optimizer=FAST)
    stage = make_stage(parent, tmp_path_factory.mktemp("aligned"), config)
    train.run(stage, sft)
    return stage.folder / "model"


@pytest.fixture(scope="module")
def broken(aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model after noise on every matrix."""
    random = torch.Generator().manual_seed(1)

    def shake(name: str, weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=random)
        return weight + 0.05 * noise if weight.ndim == 2 else weight

    return changed(aligned, tmp_path_factory.mktemp("broken") / "model", shake)


@pytest.mark.parametrize(("objective", "score"), [("answers", "decrease"), ("direction", "gradient")])
def test_a_few_restored_weights_win_back_what_was_lost(
    aligned: Path, broken: Path, tmp_path: Path, objective: str, score: str
) -> None:
    stage = run("realign", broken, tmp_path, aligned=aligned, objective=objective, score=score, **RECOVER)
    alignment, restored = curve(stage, "alignment"), curve(stage, "restored")
    assert alignment[-1] < alignment[0] - 0.02
    assert len(alignment) == 7
    assert 0 < restored[-1] <= 6 * 0.02 + 0.001
    assert stage.notes["restored"] == restored[-1]
    good, bad, now = (weights_of(folder) for folder in (aligned, broken, stage.folder / "model"))
    whole = sum(weight.numel() for weight in now.values())
    taken = sum(int(((now[name] == good[name]) & (good[name] != bad[name])).sum()) for name in now)
    assert taken == round(restored[-1] * whole)
    assert all(bool(((now[name] == good[name]) | (now[name] == bad[name])).all()) for name in now)


def test_the_task_never_ends_beyond_the_tolerance(aligned: Path, broken: Path, tmp_path: Path) -> None:
    options = RECOVER | {"tolerance": 0.01, "task_nll": "high"}
    stage = run("realign", broken, tmp_path, aligned=aligned, **options)
    task = curve(stage, "task")
    assert min(task) >= task[0] - 0.01
    assert curve(stage, "rolled_back")[-1] > 0
    free = run("realign", broken, tmp_path / "free", aligned=aligned, **options | {"tolerance": 9.0})
    assert curve(free, "task")[-1] < task[0] - 0.02
    assert curve(free, "rolled_back")[-1] == 0


def test_a_round_is_undone_where_nothing_may_be_rolled_back(
    aligned: Path, broken: Path, tmp_path: Path
) -> None:
    options = RECOVER | {"tolerance": 0.0, "task_nll": "high", "task": "all", "rollback": 0.0, "rounds": 2}
    stage = run("realign", broken, tmp_path, aligned=aligned, **options)
    assert curve(stage, "restored") == [0.0, 0.0, 0.0]
    assert curve(stage, "task")[-1] == curve(stage, "task")[0]
    assert same(weights_of(stage.folder / "model"), weights_of(broken))


def test_an_aligned_model_has_nothing_to_restore(aligned: Path, tmp_path: Path) -> None:
    stage = run("realign", aligned, tmp_path, aligned=aligned, **RECOVER)
    assert same(weights_of(stage.folder / "model"), weights_of(aligned))
    assert stage.notes["steps"] == 0
    assert len(curve(stage, "alignment")) == 1


def test_restoring_fills_no_zero(aligned: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    pruned = changed(aligned, tmp_path / "pruned", lambda key, weight: weight * (weight.abs() > 0.02))
    zeros = weights_of(pruned)[name] == 0
    kept = run("realign", pruned, tmp_path / "kept", aligned=aligned, **RECOVER)
    filled = run("realign", pruned, tmp_path / "filled", aligned=aligned, keep_zeros=False, **RECOVER)
    assert not weights_of(kept.folder / "model")[name][zeros].any()
    assert weights_of(filled.folder / "model")[name][zeros].any()


def test_recovery_killed_and_resumed_ends_with_the_same_bits(
    aligned: Path,
    broken: Path,
    tmp_path: Path,
    save_every: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = RECOVER | {"tolerance": 0.02, "task_nll": "high"}
    whole = run("realign", broken, tmp_path / "whole", aligned=aligned, **options)
    save_every(2)
    recovery = method("realign")._Recovery
    play = recovery.round

    def fragile(self: Any, number: int) -> bool:
        if number == 3:
            raise Killed
        return bool(play(self, number))

    monkeypatch.setattr(recovery, "round", fragile)
    with pytest.raises(Killed):
        run("realign", broken, tmp_path / "killed", aligned=aligned, **options)
    monkeypatch.setattr(recovery, "round", play)
    resumed = run("realign", broken, tmp_path / "killed", aligned=aligned, **options)
    assert resumed.notes["resumed_from_step"] == 2
    assert same(weights_of(resumed.folder / "model"), weights_of(whole.folder / "model"))
    assert (resumed.folder / "curve.csv").read_bytes() == (whole.folder / "curve.csv").read_bytes()
