"""Pruning: budgets, masks worked out by hand, the walk, and the two forms of a structural result."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import methods.prune as family
from methods.architectures import shrink, with_head
from methods.checkpoint import load_model
from methods.data import Locator, Style, train_tokenizer
from methods.progress import Progress
from methods.prune import magnitude, wanda
from methods.prune._walk import linear_weights, walk
from methods.stage import AssayError, Component, Interrupted, Stage

DATA = "authors/forget10"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(Locator(), [DATA], 300)


def tiny(heads: int = 4, groups: int = 4, bias: bool = False, **settings: Any) -> Any:
    """A two-layer Llama with random weights large enough to prefer some tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.2,
        tie_word_embeddings=True,
        **settings,
    )
    model: Any = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The model as a parent's folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Style().write(folder)
    return folder


def staged(tmp_path: Path, parent: Path, config: Any, seed: int = 0) -> Stage:
    folder = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    progress = Progress(tmp_path / "scratch", seed, save_seconds=3600)
    return Stage("prune.test-0", "prune.test", config, seed, {"model": parent}, folder, progress, Locator())


def pruned(tmp_path: Path, parent: Path, method: Any, seed: int = 0, **options: Any) -> tuple[Any, Stage]:
    """Run the stage and load its result."""
    stage = staged(tmp_path, parent, method.Config(**options), seed)
    family.run(stage, method)
    return load_model(stage.folder / "model", dtype="float32"), stage


def zeros(model: Any) -> dict[str, int]:
    return {name: int((model.get_parameter(name) == 0).sum()) for name in linear_weights(model)}


def masks(model: Any) -> dict[str, Any]:
    return {name: model.get_parameter(name) == 0 for name in linear_weights(model)}


# --- masks by hand --------------------------------------------------------------------------------------


def test_magnitude_removes_exactly_the_smallest_and_the_official_rule_one_more() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.3, -0.4], [0.5, -0.6, 0.7, -0.8]])
    exact = magnitude.mask(magnitude.Config(sparsity=0.5), weight)
    official = magnitude.mask(magnitude.Config(sparsity=0.5, threshold="official"), weight)
    assert exact.tolist() == [[True] * 4, [False] * 4]
    assert official.tolist() == [[True] * 4, [True, False, False, False]]


def test_equal_weights_do_not_break_the_budget() -> None:
    assert int(magnitude.mask(magnitude.Config(sparsity=0.3), torch.ones(10, 10)).sum()) == 30


def test_a_pattern_removes_the_smallest_of_every_group() -> None:
    weight = torch.tensor([[4.0, 1.0, -3.0, 2.0, 0.1, 0.2, 0.3, 0.4]])
    removed = magnitude.mask(magnitude.Config(pattern="2:4"), weight)
    assert removed.tolist() == [[False, True, False, True, True, True, False, False]]


def test_wanda_weighs_a_large_weight_on_a_quiet_input_less() -> None:
    scores = torch.tensor([[3.0, 1.0], [1.0, 2.0]]) * torch.tensor([0.01, 4.0]).sqrt()
    removed = wanda.mask(wanda.Config(data=DATA, sparsity=0.5), scores)
    assert removed.tolist() == [[True, False], [True, False]]


def test_wandas_variant_lets_rows_differ_and_meets_the_sparsity_about() -> None:
    scores = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) ** 4
    scores[:32] = scores[:32].sqrt()
    removed = wanda.mask(wanda.Config(data=DATA, sparsity=0.5, variant="alpha"), scores)
    assert abs(float(removed.float().mean()) - 0.5) < 0.01
    assert removed[:32].sum() < removed[32:].sum()


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (magnitude, {}, "either sparsity"),
        (magnitude, {"sparsity": 0.5, "pattern": "2:4"}, "not both"),
        (magnitude, {"pattern": "4:2"}, "of the form"),
        (magnitude, {"pattern": "two"}, "of the form"),
        (magnitude, {"pattern": "2:4", "structure": "heads"}, "leave them out"),
        (magnitude, {"pattern": "2:4", "threshold": "official"}, "leave threshold out"),
        (wanda, {"data": DATA}, "either sparsity"),
        (wanda, {"data": DATA, "pattern": "2:4", "variant": "alpha"}, "leave it out"),
    ],
)
def test_a_contradictory_budget_is_a_sentence(method: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(AssayError, match=words):
        method.Config(**options)


def test_a_pattern_that_does_not_fit_is_a_sentence() -> None:
    with pytest.raises(AssayError, match="does not fit"):
        magnitude.mask(magnitude.Config(pattern="2:5"), torch.ones(4, 32))


# --- whole stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_the_budget_is_met_exactly_in_every_matrix(tmp_path: Path, tokenizer: Any, sparsity: float) -> None:
    parent = saved(tiny(), tokenizer, tmp_path / "parent")
    model, stage = pruned(tmp_path, parent, magnitude, sparsity=sparsity)
    for name, count in zeros(model).items():
        assert count == round(model.get_parameter(name).numel() * sparsity)
    assert sum(row["zeros"] for row in stage.notes["layers"]) == sum(zeros(model).values())
    assert stage.notes["physical"] is False
    assert len(stage.notes["layers"]) == 14


def test_embeddings_norms_and_head_are_untouched(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(tiny(), tokenizer, tmp_path / "parent")
    before, after = tiny(), pruned(tmp_path, parent, magnitude, sparsity=0.5)[0]
    touched = set(linear_weights(before))
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)) == (name not in touched)


def test_what_stays_is_not_changed_and_zeros_of_the_parent_stay(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(tiny(), tokenizer, tmp_path / "parent")
    first, stage = pruned(tmp_path, parent, magnitude, sparsity=0.6)
    second, _ = pruned(tmp_path, stage.folder / "model", wanda, data=DATA, sparsity=0.3, context_tokens=64)
    for name, mask in masks(first).items():
        weight = second.get_parameter(name)
        assert bool((weight[mask] == 0).all())
        assert torch.equal(weight[weight != 0], tiny().get_parameter(name)[weight != 0])


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_wanda_removes_the_same_number_in_every_row(tmp_path: Path, tokenizer: Any, budget: Any) -> None:
    parent = saved(tiny(), tokenizer, tmp_path / "parent")
    model, stage = pruned(tmp_path, parent, wanda, data=DATA, sequences=8, context_tokens=64, **budget)
    assert stage.notes["calibration_sequences"] == 8
    for mask in masks(model).values():
        assert bool((mask.sum(dim=1) == mask.shape[1] // 2).all())


def test_wanda_repeats_with_its_seed_and_differs_with_another(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(tiny(), tokenizer, tmp_path / "parent")
    options = {"data": DATA, "sparsity": 0.5, "sequences": 4, "context_tokens": 64}
    runs = [masks(pruned(tmp_path, parent, wanda, seed, **options)[0]) for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_later_blocks_see_the_inputs_that_pruned_blocks_give() -> None:
    model, tokens = tiny(), [torch.arange(12)[None]]
    dense = [block.inputs[0] for block in walk(model, tokens)]
    with torch.no_grad():
        seen = []
        for block in walk(model, tokens):
            seen.append(block.inputs[0])
            for linear in block.linears().values():
                linear.weight.zero_()
    assert torch.equal(seen[0], dense[0])
    assert not torch.allclose(seen[1], dense[1])
    assert torch.equal(seen[1], seen[0])


def test_an_interrupted_wanda_goes_on_where_it_stopped(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = saved(tiny(), tokenizer, tmp_path / "parent")
    config = wanda.Config(data=DATA, sparsity=0.5, sequences=4, context_tokens=64)
    undisturbed = masks(
        pruned(tmp_path, parent, wanda, data=DATA, sparsity=0.5, sequences=4, context_tokens=64)[0]
    )
    stopped = staged(tmp_path, parent, config)
    stopped.progress.stopping = True
    with pytest.raises(Interrupted):
        family.run(stopped, wanda)
    pruned_blocks: list[int] = []
    original = wanda.prune_block

    def watched(config: Any, block: Any) -> None:
        pruned_blocks.append(block.index)
        original(config, block)

    monkeypatch.setattr(wanda, "prune_block", watched)
    resumed = staged(tmp_path, parent, config)
    family.run(resumed, wanda)
    found = masks(load_model(resumed.folder / "model", dtype="float32"))
    assert pruned_blocks == [1]
    assert resumed.notes["resumed_from_step"] == 1
    assert all(torch.equal(found[name], undisturbed[name]) for name in undisturbed)


# --- heads and neurons ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "sparsity", "heads", "neurons"),
    [
        ("heads", 0.5, [2, 2], 48),
        ("heads", 0.25, [3, 3], 48),
        ("heads", 0.9, [1, 1], 48),
        ("heads", 0.0, [4, 4], 48),
        ("neurons", 0.5, [4, 4], 24),
        ("neurons", 0.3, [4, 4], 34),
    ],
)
def test_the_cut_model_has_the_stated_widths_and_behaves_like_the_masked_one(
    tmp_path: Path, tokenizer: Any, structure: Any, sparsity: float, heads: list[int], neurons: int
) -> None:
    parent = saved(tiny(), tokenizer, tmp_path / "parent")
    masked, stage = pruned(tmp_path, parent, magnitude, sparsity=sparsity, structure=structure)
    physical = load_model(stage.folder / "model" / "physical", dtype="float32")
    assert stage.notes["physical"] is True
    assert stage.notes["widths"] == {"heads": [heads, heads], "neurons": [neurons, neurons]}
    assert physical.model.layers[0].self_attn.q_proj.out_features == heads[0] * 8
    assert physical.model.layers[1].mlp.down_proj.in_features == neurons
    assert stage.notes["parameters_physical"] == stage.notes["nonzero_after"]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert float((physical(tokens).logits - masked(tokens).logits).abs().max()) < 1e-5
    assert (stage.folder / "model" / "physical" / "tokenizer.json").is_file()


def test_grouped_queries_go_by_whole_groups_and_biases_go_along(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(tiny(heads=4, groups=2, bias=True), tokenizer, tmp_path / "parent")
    _, stage = pruned(tmp_path, parent, magnitude, sparsity=0.5, structure="heads")
    assert stage.notes["widths"]["heads"] == [[2, 1], [2, 1]]
    _, both = pruned(tmp_path, stage.folder / "model", magnitude, sparsity=0.5, structure="neurons")
    assert both.notes["widths"] == {"heads": [[2, 1], [2, 1]], "neurons": [24, 24]}


def test_the_head_with_the_smallest_norms_goes_first() -> None:
    model = tiny()
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight[8:16] *= 0.01
        attention.o_proj.weight[:, 8:16] *= 0.01
    magnitude.prune(magnitude.Config(sparsity=0.25, structure="heads"), model, None, None)  # type: ignore[arg-type]
    columns = attention.o_proj.weight.unflatten(1, (4, 8))
    assert [bool((columns[:, head] == 0).all()) for head in range(4)] == [False, True, False, False]
    assert bool((attention.v_proj.weight[8:16] == 0).all())


def test_a_harmonic_model_keeps_its_head_when_it_is_cut(tmp_path: Path, tokenizer: Any) -> None:
    model = with_head(tiny(), Component("euclidean", {"exponent": 8}))
    parent = saved(model, tokenizer, tmp_path / "parent")
    _, stage = pruned(tmp_path, parent, magnitude, sparsity=0.5, structure="neurons")
    physical = load_model(stage.folder / "model" / "physical", dtype="float32")
    assert physical.config.assay_head["name"] == "euclidean"
    assert physical.model.layers[0].mlp.down_proj.in_features == 24


def test_a_cut_model_can_be_pruned_again(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(tiny(), tokenizer, tmp_path / "parent")
    _, stage = pruned(tmp_path, parent, magnitude, sparsity=0.5, structure="heads")
    _, again = pruned(
        tmp_path, stage.folder / "model" / "physical", magnitude, sparsity=0.5, structure="heads"
    )
    assert again.notes["widths"]["heads"] == [[1, 1], [1, 1]]


def test_a_bfloat16_parent_gives_bfloat16_forms_that_agree(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(tiny().to(torch.bfloat16), tokenizer, tmp_path / "parent")
    _, stage = pruned(tmp_path, parent, magnitude, sparsity=0.5, structure="heads")
    for folder in (stage.folder / "model", stage.folder / "model" / "physical"):
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_forms_that_disagree_are_not_published(tmp_path: Path, tokenizer: Any) -> None:
    masked = saved(tiny(), tokenizer, tmp_path / "masked")
    other = shrink(tiny())
    other.model.layers[0].mlp.down_proj.weight.data += 1e-3
    with pytest.raises(AssayError, match="disagree"):
        family.check_same(masked, saved(other, tokenizer, tmp_path / "physical"))


def test_heads_of_an_unknown_architecture_are_refused_with_a_sentence() -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="gpt2"))
    with pytest.raises(AssayError, match="models of type llama"):
        magnitude.prune(magnitude.Config(sparsity=0.5, structure="heads"), model, None, None)  # type: ignore[arg-type]


def test_lm_eval_scores_the_cut_model_like_the_masked_one(tmp_path: Path, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    parent = saved(tiny(), tokenizer, tmp_path / "parent")
    _, stage = pruned(tmp_path, parent, magnitude, sparsity=0.5, structure="heads")
    found = []
    for folder in (stage.folder / "model", stage.folder / "model" / "physical"):
        harness = HFLM(
            pretrained=str(folder), trust_remote_code=False, device="cpu", dtype="float32", batch_size=1
        )
        request = Instance("loglikelihood", {}, ("Question: Who?\nAnswer:", " Nobody"), 0)
        found.append(harness.loglikelihood([request], disable_tqdm=True)[0][0])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
