"""K-FADE: curvature by hand and against a K-FAC library, the trust region, the stages, and updates as files."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods import curvature
from methods.checkpoint import load_model
from methods.curvature import _factors, kfac
from methods.curvature._factors import Measurement, Sample, linear_layers, weights_of
from methods.curvature._kronecker import (
    Basis,
    Labels,
    basis_of,
    damping_of,
    kl_slopes,
    largest_step,
    precondition,
)
from methods.data import Example, Part
from methods.stage import AssayError, Interrupted, Parent, Stage
from methods.unlearn import _delta, _uphill, apply_delta, kfade
from methods.unlearn._uphill import Measured, Uphill
from tests.training import make_parent, make_stage, same
from tests.training import weights_of as weights_in

VOCABULARY = 11


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- by hand ------------------------------------------------------------------------------------------------------


def test_a_layer_of_one_weight_is_damped_as_worked_out_by_hand() -> None:
    """A = 4, S = 1/4: the eigenvalue is 1; lambda = 0.1 * 1 beats the floor 0.05 and loses against 0.2."""
    basis = basis_of(tensor([[4.0]]), tensor([[0.25]]))
    values = basis.values(corrected=False)
    assert float(values) == 1.0
    assert damping_of(values, 0.1, 0.05) == pytest.approx(0.1) and damping_of(values, 0.1, 0.2) == 0.2
    assert float(precondition(tensor([[3.0]]), basis, 0.2)) == pytest.approx(3.0 / 1.2)
    # pi = sqrt(4 / 0.25) = 4 and sqrt(lambda) = 1/2: 3 / ((1/4 + 1/8) (4 + 2))
    factored = precondition(tensor([[3.0]]), basis, 0.25, inverse="factored")
    assert float(factored) == pytest.approx(3.0 / (0.375 * 6.0))


def test_the_divergence_rises_as_worked_out_by_hand() -> None:
    """p = (1/2, 1/2), p0 = (3/4, 1/4), t = (1, 0): (p - p0) . t = -1/4 and Var_p t = 1/4."""
    start = tensor([[0.75, 0.25]]).log()
    slope, bend = kl_slopes(tensor([[0.0, 0.0]]), tensor([[1.0, 0.0]]), start)
    assert (float(slope), float(bend)) == pytest.approx((-0.25, 0.25))


@pytest.mark.parametrize(
    ("room", "slope", "bend", "expected"),
    [
        (0.02, 0.0, 4.0, 0.1),  # 2 x^2 = 0.02
        (3.0, 2.0, 2.0, 1.0),  # 2 x + x^2 = 3
        (3.0, -2.0, 2.0, 3.0),  # -2 x + x^2 = 3
        (0.5, 2.0, 0.0, 0.25),
        (-1.0, 2.0, 2.0, 0.0),
        (0.5, -1.0, 0.0, math.inf),
    ],
)
def test_the_largest_step_is_the_root_of_the_prediction(
    room: float, slope: float, bend: float, expected: float
) -> None:
    assert largest_step(room, slope, bend) == pytest.approx(expected)


# --- labels -------------------------------------------------------------------------------------------------------


def moments(labels: Labels, p: Tensor, counts: list[int]) -> Tensor:
    draws = list(labels.draws(p, counts, range(len(counts))))
    return sum((draw.T @ draw for draw in draws), start=torch.zeros(p.shape[1], p.shape[1], dtype=p.dtype))


@pytest.mark.parametrize("kind", ["sampled", "signs"])
def test_draws_have_the_covariance_of_the_models_own_labels(kind: Any) -> None:
    p = tensor([[0.7, 0.2, 0.1], [0.98, 0.01, 0.01], [0.1, 0.6, 0.3]])
    found = moments(Labels(kind, samples=6000), p, [1, 2])
    assert torch.allclose(found, p.sum(0).diag() - p.T @ p, atol=0.02)


def test_the_exact_expectation_is_exact() -> None:
    p = torch.rand(5, 4, dtype=torch.float64).softmax(-1)
    assert torch.allclose(moments(Labels("exact"), p, [2, 3]), p.sum(0).diag() - p.T @ p, atol=1e-14)


def test_signs_estimate_the_curvature_of_memorised_tokens_with_less_noise() -> None:
    p = tensor([[0.998, 0.001, 0.001]]).expand(40, 3)
    exact = p.sum(0).diag() - p.T @ p

    def error(kind: Any) -> float:
        seeds = range(200)
        return sum(float((moments(Labels(kind, 1, seed), p, [40]) - exact).square().sum()) for seed in seeds)

    assert error("signs") < 0.2 * error("sampled")


@pytest.mark.parametrize("kind", ["sampled", "signs"])
def test_the_draws_of_a_sequence_do_not_depend_on_its_batch(kind: Any) -> None:
    p = torch.rand(5, 4, dtype=torch.float64).softmax(-1)
    (whole,) = Labels(kind).draws(p, [2, 3], [7, 9])
    (alone,) = Labels(kind).draws(p[2:], [3], [9])
    assert whole[2:].equal(alone)


# --- measuring ----------------------------------------------------------------------------------------------------


class TokenNet(nn.Module):
    """Two linear layers, one with a bias, at each position for itself."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(30, 6, dtype=torch.float64)
        self.first = nn.Linear(6, 5, dtype=torch.float64)
        self.second = nn.Linear(5, VOCABULARY, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.tanh(self.first(self.embedding(ids))))
        return logits

    @property
    def layers(self) -> dict[str, nn.Linear]:
        return {"first": self.first, "second": self.second}


def answered(ids: Tensor, labels: Tensor) -> Part:
    """Every position predicts a label; the position that carries the last one is padding."""
    ids = torch.cat([ids, torch.zeros_like(ids[:, :1])], 1)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    return Part(ids, mask, torch.cat([torch.full_like(labels[:, :1], -100), labels], 1), "retain")


def random_part(sequences: int, tokens: int) -> Part:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(30, (sequences, tokens), generator=generator)
    return answered(ids, torch.randint(VOCABULARY, (sequences, tokens), generator=generator))


def measured(
    run: Callable[[Part], Tensor],
    layers: Mapping[str, nn.Linear],
    part: Part,
    labels: Labels | None = None,
    corrected: bool = True,
    batch: int = 100,
) -> dict[str, Basis]:
    starts = range(0, len(part.labels), batch)
    parts = [part.rows(slice(start, start + batch)) for start in starts]
    numbers = [list(range(start, min(start + batch, len(part.labels)))) for start in starts]
    return Measurement(run, layers, Sample(parts, numbers), labels or Labels("exact"), corrected).finished()


def times(basis: Basis, matrix: Tensor, corrected: bool = False) -> Tensor:
    """The curvature times a matrix."""
    return basis.restore(basis.project(matrix) * basis.values(corrected))


def llama(**options: Any) -> Any:
    """A random Llama in float64 with biases in its attention; its norms compute in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY, attention_bias=True, tie_word_embeddings=True,
        attn_implementation="eager", **shape, **options,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return model


def sentences() -> Part:
    """Five sequences of five tokens, answers of two and three."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (5, 5), generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, :3] = -100
    return Part(ids, torch.ones_like(ids), labels, "retain")


def logits_of(model: Any) -> Callable[[Part], Tensor]:
    return curvature.logits_of(model)


def test_all_layers_are_measured_in_one_pass_over_the_data_and_ekfac_in_two() -> None:
    net, part, calls = TokenNet(), random_part(9, 1), []

    def run(piece: Part) -> Tensor:
        calls.append(len(piece.labels))
        return net(piece.input_ids)

    measured(run, net.layers, part, Labels(), corrected=False, batch=4)
    assert calls == [4, 4, 1]
    measured(run, net.layers, part, Labels(), corrected=True, batch=4)
    assert calls == [4, 4, 1] * 3


def test_what_is_kept_is_as_large_as_the_factors() -> None:
    net, part = TokenNet(), random_part(4, 2)
    bases = measured(lambda piece: net(piece.input_ids), net.layers, part, corrected=True)
    floats = sum(value.numel() for value in _factors.tensors_of(bases).values())
    shapes = [(5, 7), (VOCABULARY, 5)]  # a bias is a column
    assert floats == sum(out * out + width * width + out + width + out * width for out, width in shapes)


def test_batches_and_padding_change_nothing() -> None:
    net, part = TokenNet(), random_part(6, 3)
    run = lambda piece: net(piece.input_ids)  # noqa: E731
    wide = Part(
        *(torch.cat([values, torch.full_like(values[:, :2], fill)], 1) for values, fill in (
            (part.input_ids, 5), (part.attention_mask, 0), (part.labels, -100)
        )), "retain",
    )  # fmt: skip
    whole = measured(run, net.layers, part)
    for other in (measured(run, net.layers, part, batch=4), measured(run, net.layers, wide)):
        for name, basis in whole.items():
            matrix = torch.ones(basis.outputs.shape[0], basis.inputs.shape[0], dtype=torch.float64)
            for corrected in (False, True):
                found = times(other[name], matrix, corrected)
                assert torch.allclose(found, times(basis, matrix, corrected), atol=1e-12)


def test_embeddings_and_head_are_no_layers_and_other_models_are_refused() -> None:
    names = list(linear_layers(llama()))
    assert len(names) == 14 and all("proj" in name for name in names)
    with pytest.raises(
        AssayError, match="a decoder with a list of layers, which SimpleNamespace does not have"
    ):
        linear_layers(SimpleNamespace(base_model=TokenNet()))


def test_tied_layers_are_refused_with_a_sentence() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        AssayError, match=r"layers\.0\.mlp\.up_proj\.weight and model\.layers\.1.* are one weight"
    ):
        linear_layers(model)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(AssayError, match="the data set is empty"):
        _factors.draw_sample([], None, 4, 0, 0)


def test_a_sample_is_drawn_by_the_seed_and_sorted_by_length() -> None:
    examples = [Example((1,) * (2 + n % 3), (1,) * (2 + n % 3)) for n in range(12)]
    one, other, again = (_factors.draw_sample(examples, 5, 2, 0, seed) for seed in (0, 1, 0))
    assert one.numbers == again.numbers != other.numbers
    assert [len(group) for group in one.numbers] == [2, 2, 1]
    assert sorted(len(part.input_ids[0]) for part in one.parts) == [
        len(part.input_ids[0]) for part in one.parts
    ]
    assert sum(map(len, _factors.draw_sample(examples, None, 4, 0, 0).numbers)) == 12


# --- against a K-FAC library ----------------------------------------------------------------------------------------


class Flat(nn.Module):
    """A model as curvlinops calls it: ids to logits [tokens,V]."""

    def __init__(self, model: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, ids: Tensor) -> Tensor:
        return self.call(ids).flatten(0, 1)


def library() -> Any:
    return pytest.importorskip("curvlinops", reason="the packages of envs/checks.lock are not installed")


@pytest.mark.parametrize(
    ("tokens", "name"), [(1, "KFACLinearOperator"), (1, "EKFACLinearOperator"), (4, "KFACLinearOperator")]
)
def test_products_are_those_of_curvlinops(tokens: int, name: str) -> None:
    """With one token for each sequence, and with weights that are shared by positions (expand)."""
    net, part = TokenNet(), random_part(7, tokens)
    corrected = name == "EKFACLinearOperator"
    bases = measured(lambda piece: net(piece.input_ids), net.layers, part, corrected=corrected)
    weights = [net.first.weight, net.first.bias, net.second.weight]
    data = [(part.input_ids[:, :-1], part.labels[:, 1:].flatten())]
    operator = getattr(library(), name)(
        Flat(net, net),
        nn.CrossEntropyLoss(),
        weights,
        data,
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    vector = [torch.randn(weight.shape, dtype=torch.float64) for weight in weights]
    expected = operator @ [piece.clone() for piece in vector]
    first = times(bases["first"], torch.cat([vector[0], vector[1][:, None]], 1), corrected)
    found = [first[:, :-1], first[:, -1], times(bases["second"], vector[2], corrected)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def exact_operator(model: Any, part: Part) -> tuple[Any, dict[str, Tensor]]:
    """The Gauss-Newton matrix of all linear layers of a Llama, as a product with a vector."""
    weights = {
        f"{name}.{kind}": weight
        for name, layer in linear_layers(model).items()
        for kind, weight in layer.named_parameters()
    }
    flat = Flat(model, lambda ids: model(ids).logits[:, :-1])
    data = [(part.input_ids, part.targets.flatten())]
    return library().GGNLinearOperator(flat, nn.CrossEntropyLoss(), list(weights.values()), data), weights


def quadratic(operator: Any, weights: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> float:
    whole = [vector.get(name, torch.zeros_like(weight)) for name, weight in weights.items()]
    return sum(
        float((one * other).sum())
        for one, other in zip(whole, operator @ [v.clone() for v in whole], strict=True)
    )


def test_the_predicted_divergence_of_a_transformer_is_that_of_the_exact_matrix() -> None:
    model, part = llama(num_key_value_heads=1), sentences()
    operator, weights = exact_operator(model, part)
    vector = {name: torch.randn(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    climb = climber(model, part, part)
    slope, bend = climb._slopes(vector)
    assert slope == 0.0
    assert bend == pytest.approx(quadratic(operator, weights, vector), rel=1e-5)


def test_ekfacs_eigenvalues_of_a_transformer_are_the_diagonal_of_the_exact_matrix() -> None:
    """Attention, several answer tokens and shared positions included: each entry is q^T G q."""
    model, part = llama(), sentences()
    operator, weights = exact_operator(model, part)
    layers = linear_layers(model)
    bases = measured(logits_of(model), layers, part)
    for name in (
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ):
        basis = bases[name]
        values = basis.values(corrected=True)
        for i, j in ((-1, -1), (-2, -3)):
            direction = torch.outer(basis.outputs[:, i], basis.inputs[:, j])
            expected = quadratic(operator, weights, weights_of(name, layers[name], direction))
            assert float(values[i, j]) == pytest.approx(expected, rel=1e-4), (name, i, j)


# --- a step -------------------------------------------------------------------------------------------------------

CONTROL: dict[str, Any] = {
    "curvature": "ekfac", "inverse": "eigenbasis", "damping": 0.1, "damping_floor": 1e-5, "kl_budget": 0.02,
    "tries": 8, "refresh": True,
}  # fmt: skip


def climber(model: Any, forget: Part, retain: Part, **options: Any) -> Uphill:
    sample = Sample([retain], [list(range(len(retain.labels)))])
    control: Any = SimpleNamespace(**(CONTROL | options))
    layers = linear_layers(model)
    start = copy.deepcopy(model)
    return Uphill(control, model, layers, {}, [forget], sample, start, lambda step: Labels("signs", 1, step))


def with_gradient(climb: Uphill) -> Uphill:
    """The gradient of minus the forget NLL, as the loop leaves it."""
    from methods.terms import forward, token_nll

    climb.model.zero_grad()
    (part,) = climb.forget
    (-token_nll(forward(climb.model, part)).sum() / part.tokens).backward()
    return climb


def test_a_step_raises_the_forget_loss_within_the_measured_budget() -> None:
    climb = with_gradient(climber(llama(), random_sentence(7), sentences()))
    before = climb.measure()
    climb.step()
    assert before.retain_kl == 0.0
    assert climb.at is not None and climb.at.forget > before.forget
    assert 0 < climb.at.retain_kl <= 0.02
    assert climb.measure() == climb.at
    assert climb.numbers["accepted"] == 1.0 and climb.param_groups[0]["lr"] > 0


def random_sentence(seed: int) -> Part:
    ids = torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(seed))
    return Part(ids, torch.ones_like(ids), ids.clone(), "forget")


def scripted(climb: Uphill, outcomes: list[Measured], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Measurements that are told in advance; the lengths of the candidates are noted."""
    lengths: list[float] = []
    told = iter([Measured(0.0, 1.0), *outcomes])
    monkeypatch.setattr(Uphill, "measure", lambda self: next(told))
    move = Uphill._move
    monkeypatch.setattr(
        Uphill, "_move", lambda self, kept, way, size: (lengths.append(size), move(self, kept, way, size))[1]
    )
    return lengths


def test_a_step_that_goes_too_far_is_shortened_until_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    climb = with_gradient(climber(llama(), random_sentence(7), sentences()))
    told = [Measured(math.nan, 2.0), Measured(0.08, 2.0), Measured(0.01, 0.9), Measured(0.019, 1.5)]
    lengths = scripted(climb, told, monkeypatch)
    climb.step()
    ratios = [after / before for before, after in itertools.pairwise(lengths)]
    # not finite: a tenth; four times the budget: 0.9 / 2; forgets less than before: 0.7
    assert ratios == pytest.approx([0.1, 0.45, 0.7])
    assert climb.at == told[-1] and climb.numbers["tries"] == 4.0


def test_where_no_candidate_is_allowed_the_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    climb = with_gradient(climber(model, random_sentence(7), sentences(), tries=3))
    scripted(climb, [Measured(9.0, 2.0)] * 3, monkeypatch)
    climb.step()
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    assert climb.numbers["accepted"] == 0.0 and climb.param_groups[0]["lr"] == 0.0
    assert climb.at == Measured(0.0, 1.0)


def test_no_step_is_longer_than_the_weights_even_where_nothing_seems_to_rise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    climb = with_gradient(climber(llama(), random_sentence(7), sentences(), curvature="identity"))
    monkeypatch.setattr(Uphill, "_slopes", lambda self, way: (0.0, 0.0))
    lengths = scripted(climb, [Measured(0.01, 2.0)], monkeypatch)
    weights, gradient = (
        math.sqrt(sum(float(value.square().sum()) for value in values))
        for values in (
            [weight.detach() for weight in climb.parameters().values()],
            [weight.grad for weight in climb.parameters().values()],
        )
    )
    climb.step()
    assert lengths[0] * gradient == pytest.approx(weights, rel=1e-5)


def test_kept_curvature_is_measured_once_and_given_curvature_never(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    made = []
    finished = Measurement.finished
    monkeypatch.setattr(Measurement, "finished", lambda self: (made.append(1), finished(self))[1])
    kept = climber(model, random_sentence(7), sentences(), refresh=False)
    for _ in range(2):
        with_gradient(kept).step()
    assert len(made) == 1 and kept.state_dict()["bases"]
    given = climber(model, random_sentence(7), sentences(), refresh=False)
    given.bases, given.given = kept.bases, True
    with_gradient(given).step()
    assert len(made) == 1 and not given.state_dict()["bases"]


# --- the stages -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent"), zeros=0.2)


SMALL: dict[str, Any] = {
    "forget": "first", "retain": "authors/retain90", "steps": 3, "sequences": 8, "kl_budget": 0.05, "context_tokens": 64
}  # fmt: skip


def unlearned(parent: Path, folder: Path, seed: int = 3, files: Path | None = None, **options: Any) -> Stage:
    given = {} if files is None else {"factors": files}
    config = kfade.Config(**SMALL | options, factors=None if files is None else Parent("x"))
    stage = make_stage(parent, folder, config, seed, **given)
    kfade.run(stage)
    return stage


def factors(parent: Path, folder: Path, seed: int = 3, **options: Any) -> Path:
    config = kfac.Config(**{"sequences": 8, "context_tokens": 64} | options)
    stage = make_stage(parent, folder, config, seed)
    curvature.run(stage, kfac)
    return stage.folder / "files"


def applied(parent: Path, folder: Path, files: Path, **options: Any) -> Stage:
    stage = make_stage(parent, folder, apply_delta.Config(delta=Parent("x"), **options), delta=files)
    apply_delta.run(stage)
    return stage


def curve_of(stage: Stage, term: str) -> list[float]:
    with open(stage.folder / "curve.csv", encoding="utf-8", newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["term"] == term]


@pytest.fixture(scope="module")
def usual(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A run with its defaults, but small, that keeps two models."""
    return unlearned(parent, tmp_path_factory.mktemp("usual"), probe=("forget",), checkpoints=(1, 2))


def test_forgetting_rises_and_the_retain_divergence_stays_in_its_budget(usual: Stage) -> None:
    forget, divergence = curve_of(usual, "forget"), curve_of(usual, "retain_kl")
    assert len(forget) == len(divergence) == 4
    assert forget == sorted(forget) and forget[-1] > forget[0] + 0.1
    assert divergence[0] == 0.0
    assert all(value <= 0.05 * step for step, value in enumerate(divergence))
    assert curve_of(usual, "probe.forget") == pytest.approx(forget, rel=1e-5)
    for term in ("predicted_kl", "damping", "tries", "accepted", "learning_rate"):
        assert len(curve_of(usual, term)) == 3


def test_zeros_stay_and_nothing_but_linear_layers_moves(parent: Path, usual: Stage) -> None:
    before, after = weights_in(parent), weights_in(usual.folder / "model")
    for name, weight in before.items():
        assert weight.equal(after[name]) == ("proj" not in name)
        if "proj" in name:
            assert bool((after[name][weight == 0] == 0).all())


def test_models_are_kept_at_the_steps_asked_for(parent: Path, usual: Stage, tmp_path: Path) -> None:
    shorter = unlearned(parent, tmp_path, steps=2)
    assert same(weights_in(usual.folder / "model@2"), weights_in(shorter.folder / "model"))
    assert not same(weights_in(usual.folder / "model@1"), weights_in(usual.folder / "model@2"))
    assert set(usual.notes["spent_at_step"]) == {"1", "2"}


@pytest.mark.parametrize("refresh", [True, False])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refresh: bool
) -> None:
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "1")
    whole = unlearned(parent, tmp_path / "whole", refresh=refresh)
    step, killed = Uphill.step, []

    def interrupted(self: Uphill) -> None:
        step(self)
        if self.done == 2 and not killed:
            killed.append(1)
            raise Interrupted("stopped")

    monkeypatch.setattr(Uphill, "step", interrupted)
    with pytest.raises(Interrupted):
        unlearned(parent, tmp_path / "killed", refresh=refresh)
    resumed = unlearned(parent, tmp_path / "killed", refresh=refresh)
    assert resumed.notes["resumed_from_step"] == 1
    for name in ("model/model.safetensors", "files/delta.safetensors", "curve.csv"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_measuring_goes_on_where_it_was_stopped(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "1")
    whole = factors(parent, tmp_path / "whole", micro_batch=3)
    batch = Measurement._batch
    for stop in (2, 5):  # in the first pass of three batches, and in the second
        folder = tmp_path / f"killed{stop}"

        def interrupted(self: Measurement, number: int, stop: int = stop) -> None:
            if self.done == stop:
                raise Interrupted("stopped")
            batch(self, number)

        monkeypatch.setattr(Measurement, "_batch", interrupted)
        with pytest.raises(Interrupted):
            factors(parent, folder, micro_batch=3)
        monkeypatch.setattr(Measurement, "_batch", batch)
        again = factors(parent, folder, micro_batch=3)
        assert (again / curvature.FACTORS).read_bytes() == (whole / curvature.FACTORS).read_bytes()


def test_given_factors_are_used_for_the_first_step_only_unless_they_are_kept(
    parent: Path, usual: Stage, tmp_path: Path
) -> None:
    files = factors(parent, tmp_path / "factors", seed=8)
    first, kept = (
        unlearned(parent, tmp_path / str(refresh), files=files, refresh=refresh) for refresh in (True, False)
    )
    damping = [curve_of(stage, "damping") for stage in (usual, first, kept)]
    assert damping[0][0] != damping[1][0] == damping[2][0]
    assert damping[2] == damping[2][:1] * 3 and damping[1][1] != damping[1][0]


def test_factors_that_do_not_fit_are_refused_with_a_sentence(parent: Path, tmp_path: Path) -> None:
    files = factors(parent, tmp_path / "factors", ekfac=False)
    with pytest.raises(AssayError, match="measure them with ekfac=True, or use curvature='kfac'"):
        unlearned(parent, tmp_path / "1", files=files)
    other = make_parent(tmp_path / "other", zeros=0.5)
    with pytest.raises(
        AssayError, match=r"on other weights than those of .*measure them on the chain's parent"
    ):
        unlearned(other, tmp_path / "2", files=files, curvature="kfac")
    with pytest.raises(AssayError, match=r"holds no factors: name a chain that ends in curvature\.kfac"):
        unlearned(parent, tmp_path / "3", files=tmp_path)
    about = json.loads((files / curvature.ABOUT).read_text())
    about["layers"].popitem()
    (files / curvature.ABOUT).write_text(json.dumps(about))
    with pytest.raises(AssayError, match="a model of another shape"):
        unlearned(parent, tmp_path / "4", files=files, curvature="kfac")


def test_the_files_say_what_was_measured_on(parent: Path, tmp_path: Path) -> None:
    about = json.loads((factors(parent, tmp_path, labels="signs") / curvature.ABOUT).read_text())
    assert (about["data"], about["labels"], about["samples"], about["sequences"]) == (
        "authors/retain90",
        "signs",
        1,
        8,
    )
    assert len(about["layers"]) == 14 and 8 < about["answer_tokens"] < about["positions"]


def test_exact_labels_are_what_many_samples_tend_to(tmp_path: Path) -> None:
    model, part = llama(), sentences()
    layers = linear_layers(model)
    exact = measured(logits_of(model), layers, part, corrected=False)
    drawn = measured(logits_of(model), layers, part, Labels("signs", 300), corrected=False)
    for name, basis in exact.items():
        trace = float(basis.output_values.sum())
        assert float(drawn[name].output_values.sum()) == pytest.approx(trace, rel=0.15), name


# --- options ------------------------------------------------------------------------------------------------------


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(AssayError, match="write curvature='kfac' with it instead of 'ekfac'"):
        kfade.Config(inverse="factored")
    with pytest.raises(AssayError, match="leave factors out"):
        kfade.Config(curvature="identity", factors=Parent("x"))


def test_a_retain_set_that_overlaps_the_forget_set_is_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="holds 12 of 12 rows of forget='first'"):
        unlearned(parent, tmp_path, retain="everything")


def test_the_gradient_alone_needs_no_curvature(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measurement, "__iter__", lambda self: pytest.fail("curvature was measured"))
    assert curve_of(unlearned(parent, tmp_path, curvature="identity"), "damping") == [0.0] * 3


# --- updates as files -----------------------------------------------------------------------------------------------


def test_the_update_put_on_its_own_start_is_the_unlearned_model(
    parent: Path, usual: Stage, tmp_path: Path
) -> None:
    stage = applied(parent, tmp_path, usual.folder / "files")
    expected = weights_in(usual.folder / "model")
    for name, weight in weights_in(stage.folder / "model").items():
        assert torch.allclose(weight, expected[name], atol=1e-7)
    assert stage.notes["nonzero_after"] == usual.notes["nonzero_after"]


def test_half_an_update_goes_half_the_way_on_a_model_that_was_trained_further(
    parent: Path, usual: Stage, tmp_path: Path
) -> None:
    from methods.checkpoint import save_model

    further = load_model(parent, "float32", "cpu")
    with torch.no_grad():
        for weight in further.parameters():
            weight.mul_(1.01)
    save_model(further, tmp_path / "further", parent, "float32")
    found = weights_in(
        applied(tmp_path / "further", tmp_path / "half", usual.folder / "files", scale=0.5).folder / "model"
    )
    before, after, moved = (
        weights_in(parent),
        weights_in(usual.folder / "model"),
        weights_in(tmp_path / "further"),
    )
    for name, weight in found.items():
        assert torch.allclose(weight, moved[name] + 0.5 * (after[name] - before[name]), atol=1e-6)


def test_zeros_of_the_model_stay_unless_they_may_go(parent: Path, usual: Stage, tmp_path: Path) -> None:
    sparser = make_parent(tmp_path / "sparser", zeros=0.6)
    for keep in (True, False):
        stage = applied(sparser, tmp_path / str(keep), usual.folder / "files", keep_zeros=keep)
        assert (stage.notes["nonzero_after"] > stage.notes["nonzero_before"]) != keep


def test_an_update_of_another_model_is_refused_with_a_sentence(
    parent: Path, usual: Stage, tmp_path: Path
) -> None:
    files = usual.folder / "files"
    delta, about = _delta.read(files)
    name = next(iter(delta))
    weights = dict(load_model(parent, "float32", "cpu").named_parameters())
    with pytest.raises(AssayError, match="for a vocabulary of 290 entries and the model has 300"):
        _delta.check(weights, 300, delta, about)
    with pytest.raises(AssayError, match=f"the update changes {name}, which the model does not have"):
        _delta.check({}, 290, delta, about)
    with pytest.raises(
        AssayError, match="as 16 x 16, but the model's is 2 x 2: apply it to a model of the same"
    ):
        _delta.check({name: torch.zeros(2, 2)}, 290, {name: torch.zeros(16, 16)}, about)
    with pytest.raises(
        AssayError, match=r"holds no update of weights: name a chain that ends in unlearn\.kfade"
    ):
        _delta.read(tmp_path)


def test_the_update_says_what_it_was_made_on(parent: Path, usual: Stage) -> None:
    delta, about = _delta.read(usual.folder / "files")
    assert about == {
        "made_by": usual.id, "parent": parent.name, "retain_kl": curve_of(usual, "retain_kl")[-1], "steps": 3,
        "vocabulary": 290,
    }  # fmt: skip
    assert set(delta) == {name for name in weights_in(parent) if "proj" in name}
    assert all(change.dtype == torch.float32 for change in delta.values())


def test_the_update_is_exact_where_the_model_is_saved_with_fewer_digits(parent: Path, tmp_path: Path) -> None:
    rounded = unlearned(parent, tmp_path, saved="bfloat16")
    delta, _ = _delta.read(rounded.folder / "files")
    before, after = weights_in(parent), weights_in(rounded.folder / "model")
    assert any(bool((after[name].float() - before[name] != change).any()) for name, change in delta.items())
    assert all(torch.equal((before[name] + change).bfloat16(), after[name]) for name, change in delta.items())


def test_shrinking_never_leaves_its_limits() -> None:
    assert _uphill._shrink(Measured(1e9, 2.0), 0.01) == 0.1
    assert _uphill._shrink(Measured(0.0, 0.5), 0.01) == 0.7
