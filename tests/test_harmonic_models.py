"""Models under a head of ours: saving and loading, adapters, exchanged heads, and what a loss reaches them by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import assay
from methods.architectures import (
    block_scores,
    class_vectors,
    output_layer,
    shrink,
    with_head,
    without_head,
)
from methods.architectures.classifiers import TokenMLPConfig, TokenMLPForSequenceClassification
from methods.architectures.distance_head import DistanceHead
from methods.checkpoint import load_model, save_model
from methods.data import Locator, train_tokenizer
from methods.head import cosine, euclidean
from methods.stage import AssayError, Component

TOKENS = torch.arange(8)[None]
# Every kind of head: with nothing of its own, with a vector or a matrix to learn, with a bias, with constants.
HEADS = {
    "euclidean": Component("euclidean", {"exponent": 16}),
    "cosine": Component("cosine", {"exponent": 16}),
    "diagonal": Component("mahalanobis", {"variant": "diagonal"}),
    "standard": Component("mahalanobis", {}),
    "linear": Component("linear", {"bias": True}),
    "vq_logits": Component("vq_logits", {"codes": 7}),
}
UNTIED = ("vq_logits",)


def llama(tie: bool = True, vocabulary: int = 40) -> Any:
    """A two-layer Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(tie: bool = True) -> Any:
    """A two-layer GPT-2 with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=tie,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def token_classifier(tie: bool = True) -> Any:
    """An MLP of pairs of tokens."""
    torch.manual_seed(0)
    config = TokenMLPConfig(vocab_size=11, num_labels=11, hidden_size=8, tie_word_embeddings=tie)
    return TokenMLPForSequenceClassification(config).eval()


BUILDERS: dict[str, Callable[[bool], Any]] = {"llama": llama, "gpt2": gpt2, "classifier": token_classifier}


def inputs_of(model: Any) -> Tensor:
    """Token ids that the model takes."""
    length = getattr(model.config, "sequence_length", 8)
    return torch.arange(2 * length).view(2, -1) % 11


def moved(model: Any) -> Any:
    """The model with every parameter of its head away from where it started."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in output_layer(model).parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# --- saving and loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "tie"), [(head, tie) for head in HEADS for tie in (True, False) if not tie or head not in UNTIED]
)
@pytest.mark.parametrize("build", BUILDERS)
def test_a_model_with_a_head_survives_saving(build: str, head: str, tie: bool, tmp_path: Path) -> None:
    assay.register()
    model = moved(with_head(BUILDERS[build](tie), HEADS[head]))
    tokens = inputs_of(model)
    model.save_pretrained(tmp_path)
    automatic = AutoModelForSequenceClassification if build == "classifier" else AutoModelForCausalLM
    loaded: Any = automatic.from_pretrained(tmp_path, dtype=torch.float32)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    shared = [weight for _, weight in loaded.named_parameters(remove_duplicate=False)]
    assert sum(weight is output_layer(loaded).weight for weight in shared) == (2 if tie else 1)


@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_a_model_with_a_head_generates_the_same_with_and_without_a_cache(build: str) -> None:
    model = with_head(BUILDERS[build](True), HEADS["standard"])
    tokens = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    options = {
        "attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    generate: Any = model.generate
    assert torch.equal(generate(tokens, **options), generate(tokens, use_cache=False, **options))


def test_this_projects_own_files_keep_parameters_and_constants_of_a_head(tmp_path: Path) -> None:
    for name in ("standard", "vq_logits"):
        model = moved(with_head(llama(tie=False), HEADS[name]))
        save_model(model, tmp_path / name, None, "bfloat16")
        loaded = load_model(tmp_path / name, "float32", "cpu")
        for key, value in output_layer(model).state_dict().items():
            expected = value.to(torch.bfloat16).float() if value.is_floating_point() else value
            assert torch.equal(output_layer(loaded).state_dict()[key], expected), key


def test_a_file_that_lacks_a_parameter_of_the_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = with_head(llama(tie=False), HEADS["standard"])
    save_model(model, tmp_path, None)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.precision"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssayError, match=r"lacks the weight lm_head\.precision"):
        load_model(tmp_path, "float32", "cpu")


@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_lm_eval_scores_a_saved_harmonic_model_without_remote_code(build: str, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = train_tokenizer(Locator(), ["authors/facts"], 300)
    start = llama(vocabulary=len(tokenizer))
    if build == "gpt2":
        start = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)).eval()
    model: Any = with_head(start, Component("euclidean", {}))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    harness = HFLM(
        pretrained=str(tmp_path), trust_remote_code=False, device="cpu", dtype="float32", batch_size=1
    )
    context, answer = "Question: Who?\nAnswer:", " Paris"
    request = Instance("loglikelihood", {}, (context, answer), 0)
    likelihood = harness.loglikelihood([request], disable_tqdm=True)[0][0]
    tokens = tokenizer(context + answer, add_special_tokens=False, return_tensors="pt").input_ids
    first = len(tokenizer(context, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logarithms = model(tokens).logits[0].log_softmax(-1)
    expected = sum(logarithms[i - 1, tokens[0, i]].item() for i in range(first, tokens.shape[1]))
    assert likelihood == pytest.approx(expected, abs=1e-4)


# --- what the scores are ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_logits_are_the_heads_scores_of_the_last_hidden_states(build: Callable[[], Any]) -> None:
    model: Any = with_head(build(), Component("euclidean", {"exponent": 5}))
    with torch.no_grad():
        hidden = model(TOKENS, output_hidden_states=True).hidden_states[-1][0]
        expected = euclidean.scores(euclidean.Config(exponent=5), hidden, model.get_input_embeddings().weight)
        torch.testing.assert_close(model(TOKENS).logits[0], expected)


def test_distances_are_float32_under_autocast_and_in_a_bfloat16_model() -> None:
    model: Any = with_head(llama(), Component("euclidean", {}))
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(states)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model.lm_head(states), expected)
        assert model.to(torch.bfloat16)(TOKENS).logits.dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_of_a_head_gets_a_gradient(head: str) -> None:
    model: Any = with_head(llama(tie=False), HEADS[head])
    model(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.lm_head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_noise_is_drawn_in_training_and_only_there() -> None:
    model: Any = with_head(llama(), Component("hamming", {"variant": "gumbel"}))
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    model.lm_head.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


# --- exchanging heads ---------------------------------------------------------------------------------------


def test_a_head_can_be_exchanged_and_a_model_copied() -> None:
    first = with_head(llama(), Component("euclidean", {"exponent": 5}))
    second = with_head(first, Component("cosine", {"exponent": 5}))
    assert second.config.assay_head["name"] == "cosine"
    assert torch.equal(copy.deepcopy(second)(TOKENS).logits, second(TOKENS).logits)
    assert not torch.allclose(first(TOKENS).logits, second(TOKENS).logits)


def test_the_same_head_once_more_changes_nothing() -> None:
    model = moved(with_head(llama(tie=False), HEADS["standard"]))
    assert torch.equal(with_head(model, HEADS["standard"])(TOKENS).logits, model(TOKENS).logits)


def test_a_linear_head_keeps_the_bias_of_the_layer_it_replaces() -> None:
    model = token_classifier(tie=False)
    nn.init.normal_(model.classifier.bias)
    tokens = inputs_of(model)
    same = with_head(model, HEADS["linear"])
    assert isinstance(same.classifier, DistanceHead)
    assert torch.equal(same(tokens).logits, model(tokens).logits)


def test_codes_are_made_of_the_old_class_vectors_and_give_one_to_every_class() -> None:
    model: Any = llama(tie=False)
    quantised: Any = with_head(model, HEADS["vq_logits"])
    assert quantised.lm_head.weight.shape == (7, 32)
    assert class_vectors(quantised.lm_head).shape == (40, 32)
    group = quantised.lm_head.code_of == quantised.lm_head.code_of[0]
    torch.testing.assert_close(class_vectors(quantised.lm_head)[0], model.lm_head.weight[group].mean(0))
    restored = with_head(quantised, Component("euclidean", {}))
    assert torch.equal(class_vectors(output_layer(restored)), class_vectors(quantised.lm_head))


def test_the_configuration_holds_every_option_of_the_head() -> None:
    model = with_head(llama(), Component("cosine", {"exponent": 16}))
    options = model.config.assay_head["options"]
    assert options["exponent"] == 16
    assert options["stable"] is True
    assert options["epsilon"] == 1e-4


def test_a_pruned_model_keeps_the_parameters_of_its_head_when_it_is_cut() -> None:
    model: Any = moved(with_head(llama(tie=False), HEADS["diagonal"]))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5:] = 0
    small = shrink(model)
    torch.testing.assert_close(small(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("component", "words"),
    [
        (Component("euclidian", {}), "did you mean"),
        (Component("euclidean", {"power": 2}), "no option 'power'"),
        (Component("euclidean", {"exponent": -1}), "option exponent"),
        (Component("vq_logits", {"codes": 8}), "cannot share the 40 of the embedding"),
    ],
)
def test_a_wrong_head_is_a_sentence(component: Component, words: str) -> None:
    with pytest.raises(AssayError, match=words):
        with_head(llama(), component)


def test_a_model_of_another_family_is_refused() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    other = OPTForCausalLM(
        OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(AssayError, match="this model is of type opt"):
        with_head(other, HEADS["euclidean"])


def test_what_a_head_cannot_reach_is_said_before_a_language_model_is_trained(capfd: Any) -> None:
    with_head(llama(tie=False), HEADS["vq_logits"])
    with_head(llama(), Component("euclidean", {"exponent": 1, "exponent_on": "plain"}))
    with_head(llama(), Component("cosine_similarity", {}))
    said = capfd.readouterr().err
    assert "head vq_logits over 40 classes: no loss below" in said
    assert "head euclidean over 40 classes: with every wrong class 10 times as far away" in said
    assert "head cosine_similarity over 40 classes: no loss below" in said
    with_head(llama(), HEADS["euclidean"])
    with_head(token_classifier(), Component("cosine_similarity", {}))
    assert "nats" not in capfd.readouterr().err


# --- what losses reach a model by -----------------------------------------------------------------------------


def with_adapter(model: Any) -> Any:
    """The model under a low-rank adapter that already does something."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("head", [None, "euclidean", "diagonal", "vq_logits"])
@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_the_hidden_states_that_enter_the_head_give_the_scores_in_slices(
    build: str, head: str | None, adapter: bool
) -> None:
    model = BUILDERS[build](False)
    model = model if head is None else with_head(model, HEADS[head])
    tokens = inputs_of(model)
    model = (with_adapter(model) if adapter else model).eval()
    expected = model(input_ids=tokens).logits
    with without_head(model):
        hidden = model(input_ids=tokens).logits
    flat, slices = hidden.flatten(0, -2), (slice(0, 4), slice(4, expected.shape[-1]))
    scores = torch.cat([block_scores(output_layer(model), flat, part) for part in slices], dim=-1)
    torch.testing.assert_close(scores, expected.flatten(0, -2))
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_the_head_is_back_after_an_error() -> None:
    model: Any = llama()
    with pytest.raises(ValueError, match="out of the blue"), without_head(model):
        raise ValueError("out of the blue")
    assert model(TOKENS).logits.shape == (1, 8, 40)


def test_an_output_layer_with_an_adapter_cannot_be_scored_in_slices() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(tie=False), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(AssayError, match="leave it out of the adapter's targets"):
        block_scores(output_layer(model), torch.ones(2, 32), slice(0, 3))


def test_a_model_that_changes_its_logits_behind_the_head_is_refused() -> None:
    model: Any = llama()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(AssayError, match=r"final_logit_softcapping=30\.0"), without_head(model):
        pass


def test_a_model_without_an_output_layer_is_refused() -> None:
    model: Any = llama()
    with pytest.raises(AssayError, match="LlamaModel has no output layer"):
        output_layer(model.model)


def test_cut_cross_entropy_takes_the_shorter_way_that_codes_have() -> None:
    from methods.loss.cut_cross_entropy import cut_cross_entropy

    layer: Any = output_layer(with_head(llama(tie=False), HEADS["vq_logits"]))
    hidden, targets = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), torch.arange(6) * 5
    direct, normalisers = cut_cross_entropy(layer, hidden, targets, softcap=3.0, normaliser=True)
    blocks, expected = cut_cross_entropy(
        layer, hidden, targets, softcap=3.0, normaliser=True, implementation="blockwise"
    )
    torch.testing.assert_close(direct, blocks)
    torch.testing.assert_close(normalisers, expected)


def test_cosine_class_vectors_are_the_weight_itself() -> None:
    layer = DistanceHead(6, 9, {"name": "cosine", "options": {}})
    assert class_vectors(layer) is layer.weight
    assert torch.equal(
        layer(torch.ones(2, 3, 6))[0], cosine.scores(cosine.Config(), torch.ones(3, 6), layer.weight)
    )
