"""Classifiers: what they compute, how they start, that they are saved and loaded like any other model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from methods import architectures, checkpoint
from methods.architectures import classifiers
from methods.data import Locator, read_cases
from methods.find import catalogue
from methods.progress import Progress
from methods.stage import AssayError, Component, NotFinite, Stage
from tests.toy import experiments as toy
from workflows import plan, promises, runner
from workflows.record import Job, ParentRef, Store

architectures.register()

DIGITS, ADDITION = "digits/train[0:40]", "arithmetic/addition7/train"
EUCLIDEAN = {"name": "euclidean", "options": {"exponent": 2.0}}
SMALL_VIT = {
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
SHAPES: list[Any] = [
    pytest.param(classifiers.ImageMLPForImageClassification, {"hidden_sizes": [6, 5]}, id="mlp"),
    pytest.param(classifiers.ImageMLPForImageClassification, {"hidden_sizes": []}, id="one layer"),
    pytest.param(classifiers.ImageCNNForImageClassification, {"conv_channels": [2, 3], "hidden_size": 5}, id="cnn"),
    pytest.param(classifiers.ImageViTForImageClassification, SMALL_VIT, id="vit"),
    pytest.param(classifiers.TokenMLPForSequenceClassification, {"tie_word_embeddings": True}, id="tied token mlp"),
    pytest.param(classifiers.TokenMLPForSequenceClassification, {"bottleneck": False}, id="untied token mlp"),
    pytest.param(classifiers.TokenTransformerForSequenceClassification, {}, id="token transformer"),
    pytest.param(
        classifiers.TokenTransformerForSequenceClassification, {"tie_word_embeddings": True}, id="tied transformer"
    ),
]  # fmt: skip


def make(build: Any, seed: int = 0, **settings: Any) -> Any:
    """A model in evaluation mode: of images of 8 x 8 in 10 classes, or of two tokens out of 7."""
    images = build in classifiers.IMAGES
    shape = (
        {"image_size": [8, 8], "num_channels": 1, "num_labels": 10}
        if images
        else {"vocab_size": 7, "num_labels": 7}
    )
    torch.manual_seed(seed)
    return build(build.config_class(**shape | settings)).eval()


def built(folder: Path, method: str, seed: int = 0, **options: Any) -> Any:
    """The model that a builder writes, loaded."""
    module = catalogue().method(method).load()
    config, progress = module.Config(**options), Progress(folder / "scratch", seed)
    stage = Stage(f"{method}-000000000000", method, config, seed, {}, folder / "result", progress, Locator())
    module.build(config, stage)
    return checkpoint.load_model(folder / "result" / "model", device="cpu")


# --- saved and loaded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, EUCLIDEAN], ids=["linear", "euclidean"])
@pytest.mark.parametrize(("build", "settings"), SHAPES)
def test_a_classifier_is_loaded_as_it_was_saved(tmp_path: Path, build: Any, settings: Any, head: Any) -> None:
    model = make(build, assay_head=head, **settings)
    checkpoint.save_model(model, tmp_path, None, "float32")
    loaded = checkpoint.load_model(tmp_path, device="cpu")
    assert type(loaded) is build
    assert checkpoint.is_classifier(tmp_path)
    assert torch.equal(loaded(**model.dummy_inputs).logits, model(**model.dummy_inputs).logits)


@pytest.mark.parametrize(("build", "settings"), SHAPES)
def test_the_auto_class_of_its_name_finds_it(tmp_path: Path, build: Any, settings: Any) -> None:
    make(build, **settings).save_pretrained(tmp_path)
    images = build in classifiers.IMAGES
    loader = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    assert checkpoint.auto_class(tmp_path) == loader.__name__
    assert type(loader.from_pretrained(tmp_path)) is build


@pytest.mark.parametrize("head", [None, EUCLIDEAN], ids=["linear", "euclidean"])
@pytest.mark.parametrize("build", classifiers.TOKENS)
def test_tied_class_vectors_are_the_embedding_before_and_after_saving(
    tmp_path: Path, build: Any, head: Any
) -> None:
    model = make(build, tie_word_embeddings=True, assay_head=head)
    checkpoint.save_model(model, tmp_path, None, "float32")
    for each in (model, checkpoint.load_model(tmp_path, device="cpu")):
        assert each.classifier.weight is each.embedding.weight
        assert each.classifier.bias is None
    stored = checkpoint.tensor_dtypes(tmp_path)
    assert "embedding.weight" in stored and "classifier.weight" not in stored


@pytest.mark.parametrize(("build", "settings"), SHAPES)
def test_a_head_is_exchanged_and_its_class_is_the_nearest(build: Any, settings: Any) -> None:
    model = make(build, **settings)
    harmonic = architectures.with_head(model, Component("euclidean", {"exponent": 2.0}))
    assert type(harmonic) is build
    inputs = model.dummy_inputs
    with torch.no_grad(), architectures.without_head(harmonic):
        features = harmonic(**inputs).logits
    distances = torch.cdist(features, architectures.output_layer(harmonic).weight)
    assert harmonic(**inputs).logits.argmax(1).equal(distances.argmin(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("build", "settings"), SHAPES)
def test_images_are_taken_in_the_precision_of_the_model(build: Any, settings: Any, dtype: Any) -> None:
    model = make(build, **settings).to(dtype)
    logits = model(**model.dummy_inputs).logits
    assert logits.isfinite().all()
    assert logits.dtype == dtype


# --- what they compute -------------------------------------------------------------------------------------------


def test_the_token_mlp_computes_what_the_paper_writes() -> None:
    model = make(classifiers.TokenMLPForSequenceClassification, tie_word_embeddings=True, hidden_size=3)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    embedding = state["embedding.weight"]
    tokens = torch.tensor([[4, 1], [0, 6]])
    joined = torch.cat([embedding[tokens[:, 0]], embedding[tokens[:, 1]]], dim=1)
    hidden = silu(joined @ state["hidden.0.weight"].T + state["hidden.0.bias"])
    expected = (hidden @ state["bottleneck.weight"].T + state["bottleneck.bias"]) @ embedding.T
    assert torch.allclose(model.double()(tokens).logits, expected, atol=1e-12)


def test_an_mlp_without_hidden_layers_is_one_product() -> None:
    model = make(classifiers.ImageMLPForImageClassification, hidden_sizes=[], image_size=[1, 2], num_labels=2)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        model.classifier.bias.copy_(torch.tensor([0.5, 0.0]))
    # 1 * 0.25 + 2 * 0.5 + 0.5 and 3 * 0.25 - 1 * 0.5
    assert model(torch.tensor([[[[0.25, 0.5]]]])).logits.tolist() == [[1.75, 0.25]]


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        # 59 * 10 + (20 * 100 + 100) + (100 * 10 + 10); and with 100 * 100 + 100 and 100 * 59 + 59 in their place
        ({"tie_word_embeddings": True, "hidden_sizes": [100]}, 3700),
        ({"bottleneck": False, "hidden_sizes": [100, 100]}, 18749),
    ],
    ids=["harmonic", "standard"],
)
def test_both_published_layouts_of_modular_addition_can_be_built(settings: Any, parameters: int) -> None:
    config = classifiers.TokenMLPConfig(vocab_size=59, num_labels=59, hidden_size=10, **settings)
    model = classifiers.TokenMLPForSequenceClassification(config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_the_transformer_knows_positions_and_reads_the_last(tmp_path: Path) -> None:
    model = make(classifiers.TokenTransformerForSequenceClassification, hidden_dropout_prob=0.5)
    one, two = model(torch.tensor([[1, 2]])).logits, model(torch.tensor([[2, 1]])).logits
    assert not torch.allclose(one, two)
    assert torch.equal(one, model(torch.tensor([[1, 2]])).logits)
    model.train()
    assert not torch.equal(model(torch.tensor([[1, 2]])).logits, model(torch.tensor([[1, 2]])).logits)


@pytest.mark.parametrize("size", [[7, 9], [1, 1], [8, 8]])
def test_a_cnn_takes_images_of_any_size(size: list[int]) -> None:
    model = make(classifiers.ImageCNNForImageClassification, image_size=size, num_channels=3)
    assert model(torch.rand(2, 3, *size)).logits.shape == (2, 10)


# --- how they start ----------------------------------------------------------------------------------------------


def test_class_vectors_start_as_the_option_says() -> None:
    wide = {"hidden_sizes": [], "image_size": [40, 40], "num_labels": 50}
    linear, normal = (
        make(classifiers.ImageMLPForImageClassification, class_vectors=how, **wide).classifier.weight.detach()
        for how in ("linear", "normal")
    )
    # d = 1600: uniform up to 1/40, whose standard deviation is 1/(40 sqrt 3), and normal with 1/40
    assert float(linear.abs().max()) <= 1 / 40
    assert float(linear.std()) == pytest.approx(1 / 40 / math.sqrt(3), rel=0.02)
    assert float(normal.std()) == pytest.approx(1 / 40, rel=0.02)
    assert float(normal.abs().max()) > 3 / 40


def test_a_tied_embedding_starts_as_class_vectors_and_a_free_one_normally() -> None:
    settings = {"vocab_size": 400, "num_labels": 400, "hidden_size": 25}
    tied = make(classifiers.TokenMLPForSequenceClassification, tie_word_embeddings=True, **settings)
    free = make(classifiers.TokenMLPForSequenceClassification, **settings)
    assert float(tied.embedding.weight.detach().abs().max()) <= 1 / 5
    free.requires_grad_(False)
    assert float(free.embedding.weight.std()) == pytest.approx(1 / 5, rel=0.02)
    assert float(free.embedding.weight.abs().max()) > 3 / 5
    assert float(free.classifier.weight.abs().max()) <= 1 / 5


def test_a_builder_draws_from_its_seed_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    one = built(tmp_path / "one", "model.mlp", data=DIGITS)
    assert state.equal(torch.random.get_rng_state())
    torch.manual_seed(99)
    two = built(tmp_path / "two", "model.mlp", data=DIGITS)
    other = built(tmp_path / "other", "model.mlp", seed=1, data=DIGITS)
    assert one.classifier.weight.equal(two.classifier.weight)
    assert not one.classifier.weight.equal(other.classifier.weight)


# --- builders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "data"),
    [(f"model.{kind}", DIGITS) for kind in ("mlp", "cnn", "vit")]
    + [(f"model.{kind}", ADDITION) for kind in ("token_mlp", "token_transformer")],
)
def test_a_new_classifier_takes_the_cases_of_its_data_set(tmp_path: Path, method: str, data: str) -> None:
    model = built(tmp_path, method, data=data)
    table = read_cases(Locator().rows(data), data)
    cases = table.batch([3, 1], "train")
    assert model(**{model.main_input_name: cases.inputs}).logits.shape == (2, table.classes)
    assert list((tmp_path / "result" / "model").glob("tokenizer*")) == []


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("model.mlp", {"data": ADDITION}, "is a model of images.*take token_mlp or token_transformer"),
        ("model.token_mlp", {"data": DIGITS}, "is a model of tokens.*take mlp, cnn or vit"),
        ("model.vit", {"data": DIGITS, "patch": 3}, "patch=3 must divide the sides.*8 x 8"),
        ("model.vit", {"data": DIGITS, "hidden": 9}, "hidden=9 must be a multiple of heads=2"),
        (
            "model.token_transformer",
            {"data": ADDITION, "heads": 3},
            "hidden=16 must be a multiple of heads=3",
        ),
        (
            "model.token_mlp",
            {"data": ADDITION, "bottleneck": False},
            "give tied=False beside bottleneck=False",
        ),
        ("model.gpt2", {"heads": 5}, "hidden=64 must be a multiple of heads=5"),
    ],
)
def test_a_model_that_cannot_be_is_a_sentence(
    tmp_path: Path, method: str, options: Any, sentence: str
) -> None:
    with pytest.raises(AssayError, match=sentence):
        built(tmp_path, method, **options)


def test_a_configuration_that_cannot_be_is_a_sentence() -> None:
    with pytest.raises(AssayError, match=r"class_vectors='uniform'.*linear or normal"):
        classifiers.ImageMLPConfig(class_vectors="uniform")
    with pytest.raises(AssayError, match="there are 5 classes and 7 tokens"):
        classifiers.TokenMLPConfig(tie_word_embeddings=True, vocab_size=7, num_labels=5)
    with pytest.raises(AssayError, match="a tied model needs bottleneck"):
        classifiers.TokenMLPConfig(tie_word_embeddings=True, vocab_size=7, num_labels=7, bottleneck=False)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_gpt2_is_one_with_its_own_tokenizer(tmp_path: Path, tied: bool) -> None:
    model = built(
        tmp_path, "model.gpt2", hidden=16, layers=1, heads=2, vocabulary=300, context_tokens=40, tied=tied
    )
    tokenizer = checkpoint.load_tokenizer(tmp_path / "result" / "model")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert (len(tokenizer), tokenizer.model_max_length) == (300, 40)
    assert model.transformer.wpe.weight.shape == (40, 16)
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 300)


# --- what the runner checks --------------------------------------------------------------------------------------


def checked(folder: Path, model: Any, parent: Path | None = None) -> str:
    """The runner's promises for a stage that wrote this model."""
    model.save_pretrained(folder / "model")
    parents = {} if parent is None else {"model": ParentRef(id="model", path=str(parent))}
    job = Job(
        id="train.classify-000000000000", digest="", recipe="", kind="stage", method="train.classify", label="",
        config={}, parents=parents, seed=0, code={}, content={}, threads=1, country="FRA", resources={},
    )  # fmt: skip
    return promises.check(Store(folder), job, folder)


@pytest.mark.parametrize(("build", "settings"), SHAPES)
def test_the_runner_publishes_a_classifier_without_a_tokenizer(
    tmp_path: Path, build: Any, settings: Any
) -> None:
    expected = (
        "AutoModelForImageClassification"
        if build in classifiers.IMAGES
        else "AutoModelForSequenceClassification"
    )
    assert checked(tmp_path, make(build, **settings)) == expected


def test_the_runner_refuses_a_classifier_whose_logits_are_not_finite(tmp_path: Path) -> None:
    model = make(classifiers.ImageMLPForImageClassification, hidden_sizes=[])
    with torch.no_grad():
        model.classifier.weight.fill_(3e38)
    with pytest.raises(NotFinite, match="logits are not finite"):
        checked(tmp_path, model)


def test_the_runner_refuses_a_classifier_that_lost_its_zeros(tmp_path: Path) -> None:
    model = make(classifiers.ImageMLPForImageClassification, hidden_sizes=[6])
    with torch.no_grad():
        model.hidden[0].weight[0] = 0.0
    model.save_pretrained(tmp_path / "parent")
    with torch.no_grad():
        model.hidden[0].weight[0] = 0.1
    with pytest.raises(AssayError, match=r"filled 64 zeros of hidden\.0\.weight"):
        checked(tmp_path, model, tmp_path / "parent")


def test_a_chain_of_a_classifier_runs_to_its_record(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(
        "title: Toy\ncountry: FRA\nmodels:\n  net: {new: mlp, data: 'digits/train', hidden: [6]}\n"
        "chains:\n  taught: 'net > train.classify(data=\"digits/train[0:40]\", steps=3, epochs=None)'\n"
        "evaluate:\n  size: size\n"
    )
    results = tmp_path / "results"
    made = plan.load({"experiment": str(path), "results": str(results)})
    made.freeze()
    for job_id in made.missing:
        runner.run(job_id, results, None)
    record = toy.record(results, toy.job_of(made, "taught"))
    assert record.auto_class == "AutoModelForImageClassification"
    assert plan.load({"experiment": str(path), "results": str(results)}).missing == {}
