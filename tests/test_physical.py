"""The physically smaller form: what is cut from random Llamas of a few tiny layers, and that nobody can tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import methods.prune as family
from methods.architectures import register, require_llama, shrink, with_head
from methods.architectures.cutting import Cut
from methods.architectures.pruned_llama import (
    LowRank,
    NoAttention,
    NoMLP,
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
)
from methods.checkpoint import load_model, save_model, tensor_dtypes
from methods.data import Locator, Style, train_tokenizer
from methods.progress import Progress
from methods.prune import cut, magnitude
from methods.prune._walk import decoder_layers, linear_weights, walk
from methods.stage import AssayError, Component, Stage

DATA = "authors/forget10"
HIDDEN, HEAD, NEURONS = 32, 8, 24

register()


def llama(layers: int = 3, heads: int = 4, groups: int = 2, bias: bool = False, tied: bool = True) -> Any:
    """A Llama with random weights, biases and norms, large enough to prefer some tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=128,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    model: Any = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


Change = Callable[[Any], None]


def no_heads(layer: int, *heads: int) -> Change:
    """Zero what query heads write."""

    def change(model: Any) -> None:
        columns = model.model.layers[layer].self_attn.o_proj.weight.data.unflatten(1, (-1, HEAD))
        columns[:, list(heads)] = 0.0

    return change


def no_neurons(layer: int, *neurons: int) -> Change:
    """Zero what neurons write."""

    def change(model: Any) -> None:
        model.model.layers[layer].mlp.down_proj.weight.data[:, list(neurons)] = 0.0

    return change


def without(layer: int, *owners: str, bias: bool = False) -> Change:
    """Zero the last weight, and unless ``bias`` its bias, of ``self_attn`` or ``mlp``."""

    def change(model: Any) -> None:
        for owner in owners:
            part = getattr(model.model.layers[layer], owner)
            last = part.o_proj if owner == "self_attn" else part.down_proj
            last.weight.data.zero_()
            if last.bias is not None and not bias:
                last.bias.data.zero_()

    return change


def changed(model: Any, *changes: Change) -> Any:
    for change in changes:
        change(model)
    return model


def low_rank(model: Any, ranks: Mapping[str, int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors of some layers, whose product becomes the layer's weight."""
    draw, factors = torch.Generator().manual_seed(1), {}
    for name, rank in ranks.items():
        weight = model.get_parameter(f"{name}.weight").data
        outer = torch.randn(weight.shape[0], rank, generator=draw) / rank
        inner = torch.randn(rank, weight.shape[1], generator=draw)
        weight.copy_(outer @ inner)
        factors[name] = (outer, inner)
    return factors


def continued(model: Any, cache: bool = True) -> torch.Tensor:
    """Greedy text after prompts of 3, 7 and 5 tokens, padded on the left."""
    draw = torch.Generator().manual_seed(0)
    lengths, width = (3, 7, 5), 7
    tokens = torch.randint(4, 300, (3, width), generator=draw)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    text: torch.Tensor = model.generate(
        input_ids=tokens * mask, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, do_sample=False,
        pad_token_id=0, use_cache=cache,
    )  # fmt: skip
    return text


def assert_same(model: Any, small: Any) -> None:
    """The promise: float32 logits within 1e-5 (in proportion where they are large), identical greedy text."""
    tokens = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = model(tokens).logits, small(tokens).logits
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    text = continued(model)
    assert torch.equal(continued(small), text)
    assert torch.equal(continued(small, cache=False), text)


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- what is cut ------------------------------------------------------------------------------------------

EVERY = range(3)
KINDS: dict[str, tuple[Change, ...]] = {
    "heads by whole groups": (no_heads(0, 0, 1), no_heads(1, 2, 3)),
    "single query heads": (no_heads(0, 0), no_heads(1, 1, 2, 3)),
    "one query head of each group": (no_heads(0, 0, 2),),
    "neurons": (no_neurons(0, *range(10)), no_neurons(2, 1, 3, 5)),
    "one attention": (without(1, "self_attn"),),
    "the first attention": (without(0, "self_attn"),),
    "all attentions": tuple(without(layer, "self_attn") for layer in EVERY),
    "one MLP": (without(1, "mlp"),),
    "all MLPs": tuple(without(layer, "mlp") for layer in EVERY),
    "one block": (without(1, "self_attn", "mlp"),),
    "the first and the last block": (without(0, "self_attn", "mlp"), without(2, "self_attn", "mlp")),
    "all blocks": tuple(without(layer, "self_attn", "mlp") for layer in EVERY),
    "everything at once": (
        without(0, "self_attn"),
        no_neurons(0, 0, 4, 7),
        without(1, "self_attn", "mlp"),
        no_heads(2, 3),
        no_neurons(2, *range(20)),
    ),
    "nothing": (),
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_smaller_model_cannot_be_told_from_the_masked_one(kind: str, bias: bool, tmp_path: Path) -> None:
    model = changed(llama(bias=bias, tied=not bias), *KINDS[kind])
    small: Any = shrink(model)
    assert_same(model, small)
    assert (parameters(small) < parameters(model)) == (kind != "nothing")
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(again) is type(small)
    state = again.state_dict()
    assert state.keys() == small.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in small.state_dict().items())
    assert_same(model, again)


def test_single_query_heads_leave_shared_keys_with_unequal_numbers_of_them() -> None:
    small: Any = shrink(changed(llama(), no_heads(0, 0)))
    attention = small.model.layers[0].self_attn
    assert small.config.layer_num_heads == [[3, 2], [4, 2], [4, 2]]
    assert small.config.layer_queries_per_group == [[1, 2], [2, 2], [2, 2]]
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (24, 16)


def test_the_cache_stores_the_keys_of_unequally_shared_heads_once() -> None:
    small: Any = shrink(changed(llama(), no_heads(0, 0)))
    cache = small(torch.arange(5)[None], use_cache=True).past_key_values
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(1, 2, 5, HEAD)] * 3


def test_a_group_goes_when_all_its_query_heads_do_and_one_whose_values_are_zero() -> None:
    model = changed(llama(layers=2), no_heads(0, 2, 3))
    model.model.layers[1].self_attn.v_proj.weight.data[:HEAD] = 0.0
    model.model.layers[1].mlp.up_proj.weight.data[:4] = 0.0
    small: Any = shrink(model)
    assert_same(model, small)
    assert small.config.layer_num_heads == [[2, 1], [2, 1]]
    assert small.config.layer_intermediate_size == [24, 20]


def test_what_is_gone_is_not_computed() -> None:
    small: Any = shrink(changed(llama(), without(0, "self_attn"), without(2, "mlp")))
    first, last = small.model.layers[0], small.model.layers[2]
    assert isinstance(first.self_attn, NoAttention)
    assert isinstance(last.mlp, NoMLP)
    assert not list(first.self_attn.parameters()) + list(first.input_layernorm.parameters())
    assert not list(last.mlp.parameters()) + list(last.post_attention_layernorm.parameters())
    assert small.config.layer_num_heads == [[0, 0], [4, 2], [4, 2]]
    assert small.config.layer_intermediate_size == [24, 24, 0]


def test_a_sub_block_that_is_gone_still_adds_its_bias() -> None:
    kept = {"bias": True}
    model = changed(llama(bias=True), without(0, "self_attn", **kept), without(1, "self_attn", "mlp", **kept))
    small: Any = shrink(model)
    assert_same(model, small)
    assert len(small.model.layers) == 3
    assert torch.equal(small.model.layers[0].self_attn.bias, model.model.layers[0].self_attn.o_proj.bias)


@pytest.mark.parametrize("gone", [(0,), (0, 1, 2)])
def test_the_cache_knows_how_long_it_is_whatever_attention_is_gone(gone: tuple[int, ...]) -> None:
    small: Any = shrink(changed(llama(), *(without(layer, "self_attn") for layer in gone)))
    cache = DynamicCache(config=small.config)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        whole = small(tokens).logits
        small(tokens[:, :6], past_key_values=cache, use_cache=True)
        rest = small(tokens[:, 6:], past_key_values=cache, use_cache=True).logits
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(rest, whole[:, 6:])
    cache.crop(-3)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}],
    ids=str,
)
def test_other_ways_of_writing_text_agree_too(options: dict[str, Any]) -> None:
    model = changed(llama(), *KINDS["everything at once"], no_heads(2, 0))
    tokens = torch.tensor([[7, 8, 9, 7, 8, 9, 7]])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    texts = [
        each.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        for each in (model, shrink(model))
    ]
    assert torch.equal(*texts)


def test_a_cut_model_can_be_trained_and_walked_through() -> None:
    small: Any = shrink(changed(llama(), *KINDS["everything at once"], no_heads(2, 0)))
    tokens = torch.arange(4, 16)[None]
    small.train()(tokens, labels=tokens).loss.backward()
    assert all(weight.grad is not None for weight in small.parameters())
    with torch.no_grad():
        states = small.eval()(tokens, output_hidden_states=True).hidden_states
        for block, state in zip(walk(small, [tokens]), states, strict=False):
            torch.testing.assert_close(block.inputs[0], state)
    magnitude.prune(magnitude.Config(sparsity=0.5), small, None, None)  # type: ignore[arg-type]
    assert all(
        float((small.get_parameter(name) == 0).float().mean()) == 0.5 for name in linear_weights(small)
    )


def test_a_cut_model_is_cut_again() -> None:
    once = changed(llama(layers=4), no_heads(0, 0), without(1, "self_attn"), no_neurons(2, 0, 1))
    small: Any = shrink(once)
    further = (no_heads(0, 0), no_neurons(1, 5), without(2, "self_attn", "mlp"), no_heads(3, 0, 1))
    twice: Any = shrink(changed(small, *further))
    assert_same(small, twice)
    assert twice.config.layer_num_heads == [[2, 1], [0, 0], [2, 1]]
    assert twice.config.layer_intermediate_size == [24, 23, 24]


# --- plain Llamas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ((without(1, "self_attn", "mlp"),), (2, 4, 2, 24)),
        (tuple(no_neurons(layer, layer, 9 + layer, 20) for layer in EVERY), (3, 4, 2, 21)),
        (tuple(no_heads(layer, 0, 1) for layer in EVERY), (3, 2, 1, 24)),
        (tuple(no_heads(layer, layer % 2, 2) for layer in EVERY), (3, 2, 2, 24)),
        ((without(0, "self_attn", "mlp"), *(no_neurons(layer, 3) for layer in EVERY)), (2, 4, 2, 23)),
    ],
)
def test_layers_that_come_out_alike_are_a_plain_llama(
    changes: tuple[Change, ...], fields: tuple[int, ...], tmp_path: Path
) -> None:
    model = changed(llama(), *changes)
    small: Any = shrink(model)
    assert type(small) is LlamaForCausalLM
    assert_same(model, small)
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert tuple(config[name] for name in names) == fields
    assert (config["model_type"], config["head_dim"]) == ("llama", HEAD)
    assert not any(name.startswith("layer_") for name in config)


def test_heads_that_do_not_divide_the_hidden_size_need_our_class() -> None:
    small: Any = shrink(changed(llama(groups=4), *(no_heads(layer, 0) for layer in EVERY)))
    assert type(small) is PrunedLlamaForCausalLM
    assert small.config.layer_num_heads == [[3, 3]] * 3


def test_lists_with_an_entry_for_each_layer_lose_those_of_the_blocks_that_go() -> None:
    model = llama()
    model.config.layer_types = ["full_attention"] * 3
    small: Any = shrink(changed(model, without(2, "self_attn", "mlp")))
    assert small.config.layer_types == ["full_attention"] * 2


@pytest.mark.parametrize(
    "changes", [(no_heads(0, 0), without(1, "self_attn")), (without(1, "self_attn", "mlp"),)]
)
def test_a_distance_head_stays_on_a_cut_model(changes: tuple[Change, ...], tmp_path: Path) -> None:
    model = changed(with_head(llama(), Component("euclidean", {"exponent": 8})), *changes)
    small: Any = shrink(model)
    assert small.config.model_type == "harmonic_llama"
    assert_same(model, small)
    small.save_pretrained(tmp_path)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())


# --- two factors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_layers_with_factors_become_two(bias: bool, tmp_path: Path) -> None:
    model = llama(bias=bias)
    ranks = {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.mlp.down_proj": 5,
        "model.layers.2.mlp.up_proj": 3,
    }
    factors = low_rank(model, ranks)
    small: Any = shrink(model, factors)
    down = small.model.layers[0].mlp.down_proj
    assert isinstance(down, LowRank)
    assert (down.inner.weight.shape, down.outer.weight.shape) == ((5, NEURONS), (HIDDEN, 5))
    assert (down.outer.bias is None, down.inner.bias) == (not bias, None)
    assert_same(model, small)
    small.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.layer_ranks == [{"self_attn.q_proj": 4, "mlp.down_proj": 5}, {}, {"mlp.up_proj": 3}]
    assert_same(model, again)


def test_factors_are_cut_with_the_units_they_belong_to() -> None:
    model = llama()
    names = [
        f"model.layers.{layer}.{part}" for layer in (0, 2) for part in ("self_attn.o_proj", "mlp.up_proj")
    ]
    factors = low_rank(model, dict.fromkeys(names, 6))
    factors[names[0]][1][:, :HEAD] = 0.0
    model.get_parameter(f"{names[0]}.weight").data.copy_(factors[names[0]][0] @ factors[names[0]][1])
    changed(model, no_neurons(0, 1, 2), without(2, "mlp"))
    small: Any = shrink(model, factors)
    assert_same(model, small)
    first = small.model.layers[0]
    assert first.self_attn.o_proj.inner.weight.shape == (6, 24)
    assert first.mlp.up_proj.outer.weight.shape == (22, 6)
    assert small.config.layer_ranks[2] == {"self_attn.o_proj": 6}
    assert_same(small, shrink(small))


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        ("lm_head", ((300, 2), (2, HIDDEN)), "no linear layer of a block"),
        ("model.layers.0.mlp.up_proj", ((NEURONS, 2), (3, HIDDEN)), r"have to be \[24, r\] and \[r, 32\]"),
        ("model.layers.7.mlp.up_proj", ((NEURONS, 2), (2, HIDDEN)), "has 3 blocks"),
    ],
)
def test_factors_that_fit_nothing_are_a_sentence(name: str, shapes: Any, words: str) -> None:
    with pytest.raises(AssayError, match=words):
        shrink(llama(), {name: (torch.zeros(shapes[0]), torch.zeros(shapes[1]))})


# --- configurations ------------------------------------------------------------------------------------------


def test_a_configuration_of_before_still_gives_its_model() -> None:
    fields = llama().config.to_dict()
    fields.pop("model_type")
    config = PrunedLlamaConfig(
        **fields, layer_num_heads=[[2, 1], [4, 2], [4, 2]], layer_intermediate_size=[24, 10, 24]
    )
    model: Any = PrunedLlamaForCausalLM(config)
    assert model.model.layers[0].self_attn.q_proj.out_features == 16
    assert model.model.layers[1].mlp.up_proj.out_features == 10
    assert "layer_ranks" not in model.state_dict()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"layer_num_heads": [[3, 2], [4, 2], [4, 2]]},
            "layer 0: 3 query heads cannot be divided equally among 2",
        ),
        ({"layer_intermediate_size": [24, 24]}, "layer_intermediate_size has 2 entries for 3 layers"),
    ],
)
def test_a_configuration_that_fits_no_model_is_a_sentence(fields: dict[str, Any], words: str) -> None:
    base = llama().config.to_dict()
    base.pop("model_type")
    with pytest.raises(AssayError, match=words):
        PrunedLlamaForCausalLM(PrunedLlamaConfig(**base, **fields))


def test_a_model_of_another_family_is_told_what_was_looked_for() -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(AssayError, match=r"type llama.*self_attn.\{q,k,v,o\}_proj and mlp.*of type gpt2"):
        shrink(other)
    with pytest.raises(AssayError, match=r"in a list called layers.*GPT2LMHeadModel has wte, wpe"):
        decoder_layers(other)


def test_a_method_that_needs_whole_blocks_says_so() -> None:
    for changes in ((without(0, "mlp"),), (no_heads(1, 0),)):
        with pytest.raises(AssayError, match="take the zero-masked form"):
            require_llama(shrink(changed(llama(), *changes)), "counting heads")
    require_llama(shrink(changed(llama(), no_neurons(0, 1))), "counting heads")


# --- stages --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(Locator(), [DATA], 300)


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The model as a parent's folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Style().write(folder)
    return folder


def staged(tmp_path: Path, parent: Path, config: Any = None, seed: int = 0) -> Stage:
    folder = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    progress = Progress(tmp_path / f"scratch-{folder.name}", seed)
    return Stage("prune.test-0", "prune.test", config, seed, {"model": parent}, folder, progress, Locator())


def run(tmp_path: Path, parent: Path, prune: Callable[[Any], Any], **more: Any) -> Stage:
    """The family's run of a method that does this to the model and returns what it returns."""
    stage = staged(tmp_path, parent)
    method: Any = SimpleNamespace(prune=lambda config, model, calibration, progress: prune(model), **more)
    family.run(stage, method)
    return stage


def test_what_a_method_returns_says_whether_its_result_is_structural(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(llama(), tokenizer, tmp_path / "parent")
    cases: list[tuple[Any, dict[str, Any], bool]] = [
        (None, {}, False),
        ({}, {}, True),
        (None, {"structural": lambda config: True}, True),
        (None, {"structural": lambda config: False}, False),
        ({}, {"structural": lambda config: False}, True),
    ]
    for returned, more, expected in cases:
        stage = run(
            tmp_path, parent, lambda model, returned=returned: no_neurons(0, 1)(model) or returned, **more
        )
        assert stage.notes["physical"] is expected
        assert (stage.folder / "model" / "physical").is_dir() is expected


def test_the_notes_give_every_blocks_widths_and_the_ranks(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(llama(), tokenizer, tmp_path / "parent")

    def prune(model: Any) -> Any:
        changed(model, without(0, "self_attn", "mlp"), no_heads(1, 0))
        return low_rank(model, {"model.layers.2.mlp.up_proj": 3})

    stage = run(tmp_path, parent, prune)
    small: Any = load_model(stage.folder / "model" / "physical")
    assert stage.notes["widths"] == {"heads": [[0, 0], [3, 2], [4, 2]], "neurons": [0, 24, 24]}
    assert stage.notes["ranks"] == {"model.layers.2.mlp.up_proj": 3}
    assert stage.notes["plain"] is False
    assert stage.notes["parameters_physical"] == parameters(small) < stage.notes["parameters"]
    assert (stage.folder / "model" / "physical" / "assay.json").is_file()
    assert (
        run(tmp_path, parent, lambda model: without(1, "self_attn", "mlp")(model) or {}).notes["plain"]
        is True
    )


def test_below_a_bfloat16_parent_both_forms_of_factors_are_one_model(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(llama().to(torch.bfloat16), tokenizer, tmp_path / "parent")
    name = "model.layers.1.mlp.up_proj"

    def prune(model: Any) -> Any:
        without(0, "self_attn", "mlp")(model)
        return low_rank(model, {name: 3})

    folder = run(tmp_path, parent, prune).folder / "model"
    kinds = tensor_dtypes(folder)
    assert {other for other, kind in kinds.items() if kind == "float32"} == {f"{name}.weight"}
    assert set(tensor_dtypes(folder / "physical").values()) == {"bfloat16"}
    assert_same(load_model(folder), load_model(folder / "physical"))


def test_a_block_that_goes_takes_no_other_blocks_precision_with_it(tmp_path: Path, tokenizer: Any) -> None:
    model = llama().to(torch.bfloat16)
    saved(model, tokenizer, tmp_path / "plain")
    exact = {"model.layers.2.mlp.up_proj.weight": "float32"}
    save_model(llama(), tmp_path / "parent", source=tmp_path / "plain", dtypes=exact)
    stage = run(tmp_path, tmp_path / "parent", lambda model: without(0, "self_attn", "mlp")(model) or {})
    kinds = tensor_dtypes(stage.folder / "model" / "physical")
    assert [name for name, kind in kinds.items() if kind == "float32"] == [
        "model.layers.1.mlp.up_proj.weight"
    ]


def test_zeros_that_a_trained_model_kept_are_cut(tmp_path: Path, tokenizer: Any) -> None:
    healed = changed(llama(), no_heads(0, 0, 1), no_neurons(1, 4), without(2, "mlp"))
    parent = saved(healed, tokenizer, tmp_path / "parent")
    stage = staged(tmp_path, parent, cut.Config())
    family.run(stage, cut)
    assert stage.notes["nonzero_after"] == stage.notes["nonzero_before"]
    assert stage.notes["widths"] == {"heads": [[2, 1], [4, 2], [4, 2]], "neurons": [24, 23, 0]}
    masked, small = load_model(stage.folder / "model"), load_model(stage.folder / "model" / "physical")
    assert all(torch.equal(masked.state_dict()[name], tensor) for name, tensor in healed.state_dict().items())
    assert_same(masked, small)


def test_a_model_from_which_nothing_can_be_cut_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = llama()
    magnitude.prune(magnitude.Config(sparsity=0.5), model, None, None)  # type: ignore[arg-type]
    with pytest.raises(AssayError, match="nothing can be cut"):
        family.run(staged(tmp_path, saved(model, tokenizer, tmp_path / "parent"), cut.Config()), cut)
    assert not Cut.of(model).smaller


def test_calibration_windows_reach_the_tokens_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    parent = saved(llama(layers=1), tokenizer, tmp_path / "parent")
    stage = staged(tmp_path, parent)
    windows = family.Calibration(stage).windows(DATA, 200, 48)
    lengths = [window.shape[1] for window in windows]
    assert sum(lengths) >= 200 > sum(lengths[:-1])
    assert max(lengths) <= 48
    assert stage.notes == {"calibration_sequences": len(windows), "calibration_tokens": sum(lengths)}
    more = family.Calibration(stage).windows(DATA, 400, 48)
    assert all(torch.equal(one, other) for one, other in zip(windows, more, strict=False))
    other = family.Calibration(staged(tmp_path, parent, seed=1)).windows(DATA, 200, 48)
    assert [window.tolist() for window in other] != [window.tolist() for window in windows]


def test_calibration_data_with_too_few_tokens_says_how_many_it_has(tmp_path: Path, tokenizer: Any) -> None:
    calibration = family.Calibration(staged(tmp_path, saved(llama(layers=1), tokenizer, tmp_path / "parent")))
    everything = sum(window.shape[1] for window in calibration.sequences(DATA, 10**6, 48))
    assert len(calibration.windows(DATA, everything, 48)) == calibration.stage.notes["calibration_sequences"]
    with pytest.raises(
        AssayError, match=f"{everything + 1} calibration tokens are asked for.* has {everything} in"
    ):
        calibration.windows(DATA, everything + 1, 48)


def test_lm_eval_scores_every_form_alike_without_remote_code(tmp_path: Path, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    parent = saved(llama(), tokenizer, tmp_path / "parent")

    def prune(model: Any) -> Any:
        changed(model, without(0, "self_attn"), no_heads(1, 0))
        return low_rank(model, {"model.layers.2.mlp.up_proj": 3})

    stage, found = run(tmp_path, parent, prune), []
    for folder in (stage.folder / "model", stage.folder / "model" / "physical"):
        harness = HFLM(
            pretrained=str(folder), trust_remote_code=False, device="cpu", dtype="float32", batch_size=1
        )
        request = Instance("loglikelihood", {}, ("Question: Who?\nAnswer:", " Nobody"), 0)
        found.append(harness.loglikelihood([request], disable_tqdm=True)[0][0])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
