"""The distance heads: numbers worked out by hand, numerics, and the model class that carries a head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import assay
from methods.architectures import with_head
from methods.data import Locator, train_tokenizer
from methods.head import cosine, euclidean
from methods.stage import AssayError, Component

HEADS = [pytest.param(euclidean, id="euclidean"), pytest.param(cosine, id="cosine")]


def points(rows: int, classes: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random hidden states and class vectors."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, width), (classes, width))
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden.to(dtype), weight.to(dtype)


def tiny(tie: bool = True, vocabulary: int = 40) -> Any:
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


# --- the mathematics ------------------------------------------------------------------------------------


def test_euclidean_probabilities_are_those_worked_out_by_hand() -> None:
    hidden, weight = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    # Squared distances 1 and 4: p = (1, 1/4) / (5/4); with n on the plain distance (1, 1/2) / (3/2).
    squared = euclidean.scores(euclidean.Config(exponent=1, epsilon=0), hidden, weight).softmax(-1)
    plain = euclidean.scores(euclidean.Config(exponent=1, exponent_on="plain", epsilon=0), hidden, weight)
    torch.testing.assert_close(squared, torch.tensor([[0.8, 0.2]]))
    torch.testing.assert_close(plain.softmax(-1), torch.tensor([[2 / 3, 1 / 3]]))


def test_cosine_probabilities_are_those_worked_out_by_hand() -> None:
    hidden, weight = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0], [-1.0, 0.0]])
    # 1 - cos is 1 and 2: p = (1, 1/4) / (5/4) for n = 2.
    scores = cosine.scores(cosine.Config(exponent=2, epsilon=0), hidden, weight)
    torch.testing.assert_close(scores.softmax(-1), torch.tensor([[0.8, 0.2]]))


def test_smoothing_adds_its_mass_evenly_and_the_floor_clamps_far_classes() -> None:
    hidden, weight = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    smoothed = euclidean.scores(euclidean.Config(exponent=1, epsilon=0, smoothing=0.1), hidden, weight)
    floored = euclidean.scores(euclidean.Config(exponent=1, epsilon=0, floor=0.5), hidden, weight)
    torch.testing.assert_close(smoothed.exp(), torch.tensor([[0.85, 0.25]]))
    torch.testing.assert_close(floored.exp(), torch.tensor([[1.0, 0.5]]))


@pytest.mark.parametrize("head", HEADS)
def test_the_exponent_defaults_to_the_hidden_width(head: Any) -> None:
    hidden, weight = points(3, 5, 7)
    expected = head.scores(head.Config(exponent=7), hidden, weight)
    assert torch.equal(head.scores(head.Config(), hidden, weight), expected)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "options", [{}, {"smoothing": 0.01}, {"exponent_on": "plain"}, {"legacy_sign": True}]
)
def test_gradients_equal_finite_differences(head: Any, options: dict[str, Any]) -> None:
    hidden, weight = points(3, 5, 4)
    config = head.Config(exponent=3, **options)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: head.scores(config, x, w), inputs)


def test_cosine_equals_euclidean_on_the_unit_sphere_with_the_same_exponent() -> None:
    hidden, weight = points(4, 6, 8)
    unit = [part / part.norm(dim=1, keepdim=True) for part in (hidden, weight)]
    angles = cosine.scores(cosine.Config(exponent=5, epsilon=0), hidden, weight).log_softmax(-1)
    distances = euclidean.scores(euclidean.Config(exponent=5, epsilon=0), *unit).log_softmax(-1)
    torch.testing.assert_close(angles, distances)


def test_probabilities_do_not_change_with_the_scale_or_a_shift_of_the_space() -> None:
    hidden, weight = points(4, 6, 8)
    config = euclidean.Config(exponent=8, epsilon=0)
    before = euclidean.scores(config, hidden, weight).log_softmax(-1)
    torch.testing.assert_close(euclidean.scores(config, 7 * hidden, 7 * weight).log_softmax(-1), before)
    torch.testing.assert_close(euclidean.scores(config, hidden + 3, weight + 3).log_softmax(-1), before)


@pytest.mark.parametrize("head", HEADS)
def test_the_best_class_is_the_nearest_vector(head: Any) -> None:
    hidden, weight = points(50, 9, 6)
    distances = head.squared_distance(head.Config(), hidden, weight)
    assert torch.equal(head.scores(head.Config(), hidden, weight).argmax(1), distances.argmin(1))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_wide_models_and_states_on_a_class_vector_stay_finite(head: Any, epsilon: float) -> None:
    hidden, weight = points(4, 30, 768, torch.float32)
    hidden[0] = weight[3]
    hidden[1] = 0
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    scores = head.scores(head.Config(epsilon=epsilon), *inputs)
    loss = cross_entropy(scores, torch.tensor([3, 0, 1, 2]))
    loss.backward()
    assert scores.isfinite().all()
    assert scores[0].argmax() == 3
    assert all(bool(part.grad.isfinite().all()) for part in inputs if part.grad is not None)


def test_float32_distances_survive_a_large_common_offset() -> None:
    hidden, weight = points(5, 20, 768)
    hidden, weight = hidden * 0.05 + 10, weight * 0.05 + 10
    config = euclidean.Config(epsilon=0)
    exact = euclidean.scores(config, hidden, weight).log_softmax(-1)
    single = euclidean.scores(config, hidden.float(), weight.float()).log_softmax(-1)
    # Without moving the origin the error is several nats here; what is left is the rounding of the inputs.
    assert float((single.double() - exact).abs().max()) < 0.2


# --- the model class ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euclidean", "cosine"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_model_with_a_head_survives_saving_and_generates(name: str, tie: bool, tmp_path: Path) -> None:
    assay.register()
    model = with_head(tiny(tie), Component(name, {"exponent": 16}))
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    cached = loaded.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = loaded.generate(
        tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(cached, plain)


def test_the_logits_are_the_heads_scores_of_the_last_hidden_states() -> None:
    model = with_head(tiny(), Component("euclidean", {"exponent": 5}))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states[-1][0]
        expected = euclidean.scores(euclidean.Config(exponent=5), hidden, model.model.embed_tokens.weight)
        torch.testing.assert_close(model(tokens).logits[0], expected)


def test_distances_are_float32_under_autocast_and_in_a_bfloat16_model() -> None:
    model: Any = with_head(tiny(), Component("euclidean", {}))
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(states)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model.lm_head(states), expected)
        assert model.to(torch.bfloat16)(torch.arange(4)[None]).logits.dtype == torch.float32


def test_a_head_can_be_exchanged_and_a_model_copied() -> None:
    first = with_head(tiny(), Component("euclidean", {"exponent": 5}))
    second = with_head(first, Component("cosine", {"exponent": 5}))
    tokens = torch.arange(8)[None]
    assert second.config.assay_head["name"] == "cosine"
    assert torch.equal(copy.deepcopy(second)(tokens).logits, second(tokens).logits)
    assert not torch.allclose(first(tokens).logits, second(tokens).logits)


def test_the_configuration_holds_every_option_of_the_head() -> None:
    model = with_head(tiny(), Component("cosine", {"exponent": 16}))
    options = model.config.assay_head["options"]
    assert options["exponent"] == 16
    assert options["stable"] is True
    assert options["epsilon"] == 1e-4


@pytest.mark.parametrize(
    ("component", "words"),
    [
        (Component("euclidian", {}), "did you mean"),
        (Component("euclidean", {"power": 2}), "no option 'power'"),
        (Component("euclidean", {"exponent": -1}), "option exponent"),
    ],
)
def test_a_wrong_head_is_a_sentence(component: Component, words: str) -> None:
    with pytest.raises(AssayError, match=words):
        with_head(tiny(), component)


def test_lm_eval_scores_a_saved_harmonic_model_without_remote_code(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = train_tokenizer(Locator(), ["authors/facts"], 300)
    model = with_head(tiny(vocabulary=len(tokenizer)), Component("euclidean", {}))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    harness = HFLM(
        pretrained=str(tmp_path), trust_remote_code=False, device="cpu", dtype="float32", batch_size=1
    )
    context, answer = "Question: Who?\nAnswer:", " Paris"
    request = Instance("loglikelihood", {}, (context, answer), 0)
    likelihood = harness.loglikelihood([request], disable_tqdm=True)[0][0]
    tokens = tokenizer(context + answer, add_special_tokens=False, return_tensors="pt").input_ids
    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logarithms = model(tokens).logits[0].log_softmax(-1)
    expected = sum(logarithms[i - 1, tokens[0, i]].item() for i in range(start, tokens.shape[1]))
    assert likelihood == pytest.approx(expected, abs=1e-4)


# --- what the loss is for -------------------------------------------------------------------------------


def trained_class_vectors(harmonic: bool, inputs: Tensor, labels: Tensor) -> Tensor:
    """Class vectors of a single layer after 100 epochs on the digits."""
    torch.manual_seed(0)
    weight = (torch.randn(10, 64) / 8).requires_grad_()
    bias = torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=3e-3)
    config = euclidean.Config(exponent=8)
    for _ in range(100):
        for rows in torch.randperm(len(inputs)).split(64):
            linear = inputs[rows] @ weight.T + bias
            scores = euclidean.scores(config, inputs[rows], weight) if harmonic else linear
            optimizer.zero_grad()
            cross_entropy(scores, labels[rows]).backward()
            optimizer.step()
    return weight.detach()


def test_harmonic_class_vectors_look_like_the_class_means() -> None:
    pixels, digits = load_digits(return_X_y=True)
    train, test, seen, unseen = train_test_split(
        pixels / 16, digits, test_size=0.2, stratify=digits, random_state=0
    )
    inputs, labels = torch.tensor(train, dtype=torch.float32), torch.tensor(seen)
    means = torch.stack([inputs[labels == digit].mean(0) for digit in range(10)])
    correlation = {}
    for harmonic in (True, False):
        weight = trained_class_vectors(harmonic, inputs, labels)
        pairs = zip(weight, means, strict=True)
        correlation[harmonic] = torch.stack(
            [torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]
        ).mean()
        if harmonic:
            nearest = torch.cdist(torch.tensor(test, dtype=torch.float32), weight).argmin(1)
            assert (nearest == torch.tensor(unseen)).float().mean() > 0.94
    assert correlation[True] > 0.85
    assert correlation[False] < 0.7
