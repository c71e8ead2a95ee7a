"""The heads without a matrix product: blocks against the plain formula, gradients, numbers by hand, numerics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from methods import head
from methods.find import catalogue
from methods.head import _blocks
from methods.stage import AssayError
from tests import generic

# A distance of all pairs [N,V] from x [N,1,d] and w [V,d] by plain broadcasting.
Formula = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A head with options, and the same distance written down plainly."""

    name: str
    plain: Formula
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> Any:
        return catalogue().component("head", self.name).load()

    def config(self, **more: Any) -> Any:
        return self.module.Config(**self.options | more)

    def scores(self, hidden: Tensor, weight: Tensor, **more: Any) -> Tensor:
        result: Tensor = self.module.scores(self.config(**more), hidden, weight)
        return result

    def distance(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if self.name == "manhattan":
            return self.module.distance(hidden, weight)
        return self.module.distance(self.config(), hidden, weight)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


def gap(x: Tensor, w: Tensor) -> Tensor:
    return (x - w).abs()


def size(x: Tensor, w: Tensor) -> Tensor:
    return x.abs() + w.abs()


def minkowski(p: float, added: float, inside: float) -> Formula:
    return lambda x, w: ((gap(x, w) + added).pow(p).sum(-1) + inside).pow(1 / p)


def standardized(x: Tensor, w: Tensor) -> Tensor:
    return gap(x, w) / (gap(x, w).std(-1, keepdim=True) + 1e-4)


def weighted(power: float, normalize: bool) -> Formula:
    def formula(x: Tensor, w: Tensor) -> Tensor:
        factors = (size(x, w) + 1e-4).pow(power)
        if normalize:
            factors = factors / factors.sum(-1, keepdim=True)
        return (factors * gap(x, w) / (size(x, w) + 1e-4)).sum(-1)

    return formula


def bray(x: Tensor, w: Tensor) -> Tensor:
    return gap(x, w).sum(-1) / ((x.sum(-1) + w.sum(-1)).abs() + 1e-3).clamp(min=1e-2)


def unit(vectors: Tensor) -> Tensor:
    positive = vectors.abs() + 1e-3
    return positive / positive.sum(-1, keepdim=True).clamp(min=1e-2)


def squashed(x: Tensor, w: Tensor, temperature: float, threshold: float = 0.0) -> Tensor:
    return gap(((x - threshold) / temperature).sigmoid(), ((w - threshold) / temperature).sigmoid()).sum(-1)


CASES = [
    Case("manhattan", lambda x, w: gap(x, w).sum(-1)),
    Case("minkowski", minkowski(1.5, 1e-4, 1e-4), {"p": 1.5}),
    Case("minkowski", minkowski(3.0, 1e-4, 1e-4), {"p": 3.0}),
    Case("minkowski", minkowski(1.0, 1e-4, 1e-4), {"p": 1.0}),
    Case("minkowski", minkowski(1.7, 1e-4, 1e-4), {"p": 1.7}),
    Case("minkowski", minkowski(0.5, 1e-4, 1e-4), {"p": 0.5, "impl": "language"}),
    Case("minkowski", minkowski(2.0, 0.0, 1e-4), {"p": 2.0, "impl": "language"}),
    Case("minkowski", minkowski(3.0, 0.0, 0.0), {"p": 3.0, "impl": "language"}),
    Case("chebyshev", lambda x, w: (standardized(x, w).softmax(-1) * standardized(x, w)).sum(-1)),
    Case(
        "chebyshev",
        lambda x, w: (10 * standardized(x, w)).clamp(max=50).logsumexp(-1) / 10,
        {"smooth": True},
    ),
    Case("chebyshev", lambda x, w: gap(x, w).max(-1)[0], {"impl": "toy"}),
    Case(
        "chebyshev",
        lambda x, w: (3 * gap(x, w)).logsumexp(-1) / 3,
        {"impl": "toy", "smooth": True, "alpha": 3.0},
    ),
    Case("canberra", lambda x, w: (gap(x, w) / size(x, w).clamp(min=1e-4)).sum(-1)),
    Case("canberra", lambda x, w: (gap(x, w) / (size(x, w) + 1e-4)).sum(-1), {"impl": "toy"}),
    Case(
        "canberra",
        lambda x, w: (gap(x, w) / size(x, w).clamp(min=0.7)).sum(-1),
        {"variant": "robust", "minimum_denominator": 0.7},
    ),
    Case("canberra", weighted(0.5, True), {"variant": "weighted"}),
    Case("canberra", weighted(1.0, True), {"variant": "weighted", "impl": "toy"}),
    Case(
        "canberra",
        weighted(1.3, False),
        {"variant": "weighted", "weight_power": 1.3, "normalize_weights": False},
    ),
    Case("bray_curtis", bray, {"variant": "standard"}),
    Case("bray_curtis", lambda x, w: gap(x, w).sum(-1) / (size(x, w).sum(-1) + 1e-3)),
    Case("bray_curtis", lambda x, w: bray(unit(x), unit(w)), {"variant": "normalized"}),
    Case("hamming", lambda x, w: squashed(x, w, 1.0)),
    Case("hamming", lambda x, w: squashed(x, w, 0.5), {"variant": "gumbel"}),
    Case("hamming", lambda x, w: squashed(x, w, 0.1, 0.5), {"variant": "hard", "impl": "toy"}),
]
BITS = Case("hamming", lambda x, w: ((x > 0.5) != (w > 0.5)).to(x.dtype).sum(-1), {"variant": "hard"})


def points(
    rows: int, classes: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Random hidden states and class vectors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (classes, width))
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def gradients(values: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Derivatives of a fixed random sum of the values."""
    factors = torch.randn(values.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        values
    )
    return torch.autograd.grad(values, inputs, factors)


# --- blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [8, 600, 4000, 512 * 1024])
@pytest.mark.parametrize("case", [*CASES, BITS], ids=str)
def test_blocks_of_any_size_give_the_plain_formula(
    case: Case, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blocks, "CPU_BLOCK", block_bytes)
    inputs = points(7, 11, 5)
    expected = case.plain(inputs[0][:, None], inputs[1])
    actual = case.distance(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    if expected.requires_grad:
        both = zip(gradients(actual, inputs), gradients(expected, inputs), strict=True)
        for found, wanted in both:
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_blocks_cover_every_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "CPU_BLOCK", 1000)
    seen = torch.zeros(23, 17)
    for rows, columns in _blocks.blocks(torch.zeros(23, 6), torch.zeros(17, 6)):
        seen[rows, columns] += 1
        assert seen[rows, columns].numel() * 6 * 4 <= 1000
    assert bool((seen == 1).all())


def test_a_block_without_a_formula_for_its_derivative_is_differentiated_by_autograd() -> None:
    hidden, weight = points(5, 6, 3)
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def distance(x: Tensor, w: Tensor, factors: Tensor) -> Tensor:
        return ((x[:, None] - w).square() * factors).sum(-1)

    assert torch.autograd.gradcheck(
        lambda x, w, factors: _blocks.blocked(distance, x, w, factors), (hidden, weight, scale)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.05}, {"exponent_on": "plain", "legacy_sign": True}])
def test_gradients_equal_finite_differences(case: Case, options: dict[str, Any]) -> None:
    inputs = points(3, 4, 5, seed=3)
    assert torch.autograd.gradcheck(lambda x, w: case.scores(x, w, exponent=2, **options), inputs)


class Largest(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("case", [*CASES, BITS], ids=str)
def test_no_tensor_grows_with_tokens_times_classes_times_width(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blocks, "CPU_BLOCK", 4 * 1024)
    tokens, classes, width = 24, 36, 64
    inputs = points(tokens, classes, width, torch.float32)
    with Largest() as seen:
        loss = cross_entropy(case.scores(*inputs), torch.zeros(tokens, dtype=torch.long))
        loss.backward()
    assert seen.entries <= max(tokens * classes, classes * width)


# --- numbers by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "hidden", "weight", "expected"),
    [
        # |3| + |1| = 4 and 1 + 1 = 2: 1/4 to 1/2.
        ("manhattan", {"epsilon": 0}, [0.0, 0.0], [[3.0, 1.0], [1.0, -1.0]], [1 / 3, 2 / 3]),
        # r = 2 and 1: 1/3 to 1/2.
        (
            "manhattan",
            {"epsilon": 0, "form": "reciprocal"},
            [0.0, 0.0],
            [[3.0, 1.0], [1.0, -1.0]],
            [0.4, 0.6],
        ),
        # 3^2 + 4^2 = 5^2 and 10: 1/5 to 1/10.
        ("minkowski", {"p": 2.0, "epsilon": 0}, [0.0, 0.0], [[3.0, 4.0], [0.0, 10.0]], [2 / 3, 1 / 3]),
        # (sqrt 1 + sqrt 4)^2 = 9 and 3.
        (
            "minkowski",
            {"p": 0.5, "epsilon": 0, "impl": "language"},
            [0.0, 0.0],
            [[1.0, 4.0], [0.0, 3.0]],
            [0.25, 0.75],
        ),
        # The largest differences are 4 and 1.
        ("chebyshev", {"impl": "toy", "epsilon": 0}, [0.0, 0.0], [[3.0, -4.0], [1.0, 0.5]], [0.2, 0.8]),
        # 2/4 + 4/4 = 1.5 and 0 + 2/2 = 1: x_2 is 0, so its coordinate adds 1.
        ("canberra", {"epsilon": 0}, [1.0, 0.0], [[3.0, 4.0], [1.0, 2.0]], [0.4, 0.6]),
        # 6 / 8 and 2 / 4.
        ("bray_curtis", {"epsilon": 0}, [1.0, 0.0], [[3.0, -4.0], [1.0, 2.0]], [0.4, 0.6]),
        # 6 / |1 - 1| grows to 6 / 10 epsilon = 60 and 2 / 4 becomes 2 / 4.01: nearly all to the second.
        (
            "bray_curtis",
            {"epsilon": 0.01, "variant": "standard"},
            [1.0, 0.0],
            [[3.0, -4.0], [1.0, 2.0]],
            [(2 / 4.01 + 0.01) / (2 / 4.01 + 60.02), 60.01 / (2 / 4.01 + 60.02)],
        ),
        # sigmoid is 1/2, 3/4 and 1/4 at 0, log 3 and -log 3: distances 1/4 + 1/4 and 1/4.
        (
            "hamming",
            {"epsilon": 0},
            [0.0, 0.0],
            [[math.log(3), -math.log(3)], [0.0, math.log(3)]],
            [1 / 3, 2 / 3],
        ),
        # Bits 10 against 01 and 11: two differ, and one.
        (
            "hamming",
            {"epsilon": 0, "variant": "hard"},
            [1.0, 0.0],
            [[0.2, 0.7], [0.9, 0.6]],
            [1 / 3, 2 / 3],
        ),
    ],
)
def test_probabilities_are_those_worked_out_by_hand(
    name: str,
    options: dict[str, Any],
    hidden: list[float],
    weight: list[list[float]],
    expected: list[float],
) -> None:
    module = catalogue().component("head", name).load()
    config = module.Config(exponent=1, exponent_on="plain", **options)
    vectors = torch.tensor([hidden], dtype=torch.float64), torch.tensor(weight, dtype=torch.float64)
    probabilities = module.scores(config, *vectors).softmax(-1)
    torch.testing.assert_close(probabilities, torch.tensor([expected], dtype=torch.float64))


def test_the_image_models_chebyshev_is_a_soft_maximum_of_standardized_differences() -> None:
    module = catalogue().component("head", "chebyshev").load()
    hidden, weight = torch.zeros(1, 2).double(), torch.tensor([[1.0, 3.0]]).double()
    # Standard deviation sqrt 2, so t = (1, 3) / sqrt 2, weighted by a softmax.
    t = [1 / math.sqrt(2), 3 / math.sqrt(2)]
    share = 1 / (1 + math.exp(t[0] - t[1]))
    found = module.distance(module.Config(epsilon=0), hidden, weight)
    assert float(found) == pytest.approx((1 - share) * t[0] + share * t[1], rel=1e-12)


def test_weighted_canberra_counts_large_coordinates_for_more() -> None:
    module = catalogue().component("head", "canberra").load()
    hidden, weight = torch.tensor([[1.0, 4.0]]).double(), torch.tensor([[0.0, 5.0]]).double()
    # Fractions 1 and 1/9, weights sqrt 1 and sqrt 9 over 4.
    found = module.distance(module.Config(variant="weighted", epsilon=0), hidden, weight)
    assert float(found) == pytest.approx(1 / 4 + 3 / 4 / 9, rel=1e-6)


# --- conventions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, BITS], ids=str)
def test_the_exponent_is_on_the_square_unless_it_says_plain(case: Case) -> None:
    inputs = points(4, 5, 6)
    squared = case.scores(*inputs, exponent=1.5).log_softmax(-1)
    plain = case.scores(*inputs, exponent=3, exponent_on="plain").log_softmax(-1)
    torch.testing.assert_close(squared, plain)


@pytest.mark.parametrize("case", [*CASES, BITS], ids=str)
def test_the_best_class_is_the_nearest_vector(case: Case) -> None:
    inputs = points(40, 9, 8)
    distances = case.plain(inputs[0][:, None], inputs[1])
    # Numbers of bits tie: any of the nearest will do.
    best = case.scores(*inputs).argmax(1, keepdim=True)
    assert torch.equal(distances.gather(1, best)[:, 0], distances.amin(1))


HOMOGENEOUS = [
    Case("manhattan", CASES[0].plain),
    Case("minkowski", CASES[1].plain, {"p": 1.5}),
    Case("chebyshev", CASES[8].plain),
    Case("chebyshev", CASES[10].plain, {"impl": "toy"}),
    Case("chebyshev", CASES[10].plain, {"impl": "language"}),
    Case("canberra", CASES[12].plain),
    Case("bray_curtis", CASES[18].plain),
]


@pytest.mark.parametrize("case", HOMOGENEOUS, ids=str)
def test_probabilities_do_not_change_with_the_scale_of_the_space(case: Case) -> None:
    inputs = points(4, 6, 8)
    before = case.scores(*inputs, epsilon=0, exponent=3).log_softmax(-1)
    after = case.scores(*(7 * part for part in inputs), epsilon=0, exponent=3).log_softmax(-1)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("name", ["minkowski", "chebyshev", "canberra", "bray_curtis", "hamming"])
def test_dividing_by_the_smallest_distance_matters_only_through_epsilon(name: str) -> None:
    module = catalogue().component("head", name).load()
    inputs = points(4, 6, 8)

    def logarithms(**options: Any) -> Tensor:
        config = module.Config(exponent=2, **options)
        return module.scores(config, *inputs).log_softmax(-1)

    exact = {"epsilon": 0.0}
    torch.testing.assert_close(logarithms(scale=True, **exact), logarithms(**exact))
    torch.testing.assert_close(logarithms(scale=False), logarithms())
    assert not torch.allclose(logarithms(scale=True, epsilon=0.5), logarithms(epsilon=0.5))


def test_floor_and_sign_act_on_the_power_itself_where_scale_is_off() -> None:
    module = catalogue().component("head", "canberra").load()
    inputs = points(4, 6, 8)
    settings = {"exponent": 1, "exponent_on": "plain"}
    power = (module.distance(module.Config(), *inputs) + 1e-4).reciprocal()
    floored = module.scores(module.Config(**settings, scale=False, floor=0.2), *inputs)
    torch.testing.assert_close(floored, power.clamp(min=0.2).log())
    inverted = module.scores(module.Config(**settings, scale=False, legacy_sign=True), *inputs)
    torch.testing.assert_close(inverted, -power)
    ratio = power / power.amax(1, keepdim=True)
    torch.testing.assert_close(module.scores(module.Config(**settings, legacy_sign=True), *inputs), -ratio)


@pytest.mark.parametrize("case", [*CASES, BITS], ids=str)
def test_a_head_that_calls_itself_separable_can_be_computed_in_slices(case: Case) -> None:
    hidden, weight = points(4, 9, 8)
    separable = getattr(case.module, "separable", head.separable)
    whole = case.scores(hidden, weight)
    sliced = torch.cat([case.scores(hidden, weight[:4]), case.scores(hidden, weight[4:])], dim=1)
    if separable(case.config()):
        torch.testing.assert_close(sliced, whole)
    else:
        assert case.options.get("impl") == "language" or case.options.get("variant") == "gumbel"
    assert not separable(case.config(smoothing=0.1))
    assert not separable(case.config(floor=1e-8))


def test_ceilings_follow_from_the_bound_of_the_distance() -> None:
    module = catalogue().component("head", "bray_curtis").load()
    config = module.Config(exponent=1, exponent_on="plain", epsilon=0.1)
    # D + epsilon lies between 0.1 and 1.1: eleven times as probable as each of the 99 others.
    assert module.ceiling(config, 8, 100) == pytest.approx(11 / 110)
    assert module.ceiling(module.Config(variant="standard", exponent=1), 8, 100) == 1.0
    assert head.ceiling(head.Harmonic(smoothing=1.0), 8, 4) == pytest.approx(0.625)
    assert head.ceiling(head.Harmonic(floor=0.5), 8, 3) == pytest.approx(0.5)
    # The right class farthest: logit 0 against -1 of all others.
    assert head.ceiling(head.Harmonic(legacy_sign=True), 8, 3) == pytest.approx(1 / (1 + 2 / math.e))
    reciprocal = catalogue().component("head", "manhattan").load()
    config = reciprocal.Config(form="reciprocal", exponent=1, exponent_on="plain")
    assert -math.log(reciprocal.ceiling(config, 768, 50304)) == pytest.approx(9.12, abs=0.005)


# --- Hamming ----------------------------------------------------------------------------------------------


def test_gumbel_noise_comes_from_the_global_generator_and_only_in_training() -> None:
    module = catalogue().component("head", "hamming").load()
    hidden, weight = points(4, 6, 8)
    config = module.Config(variant="gumbel")
    soft = module.scores(module.Config(temperature=0.5), hidden, weight)
    assert torch.equal(module.scores(config, hidden, weight, training=False), soft)
    torch.manual_seed(3)
    first = module.scores(config, hidden, weight, training=True)
    second = module.scores(config, hidden, weight, training=True)
    torch.manual_seed(3)
    assert torch.equal(module.scores(config, hidden, weight, training=True), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, soft)


def test_bits_that_agree_pass_on_no_gradient_and_others_that_of_a_sigmoid() -> None:
    module = catalogue().component("head", "hamming").load()
    hidden = torch.tensor([[0.9, 0.45, 0.7]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.6, 0.55, 0.3]], dtype=torch.float64, requires_grad=True)
    distance = module.distance(module.Config(variant="hard", temperature=0.2), hidden, weight)
    assert distance.item() == 2
    distance.sum().backward()
    slope = [math.exp(-z / 0.2) / (1 + math.exp(-z / 0.2)) ** 2 / 0.2 for z in (0.45, 0.7)]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[0, -slope[0], slope[1]]], dtype=torch.float64))


def test_the_gradient_of_bits_is_that_of_their_absolute_difference() -> None:
    inputs = points(6, 7, 5)
    bits = [_blocks.bits(part, 0.5, 0.1) for part in inputs]
    expected = (bits[0][:, None] - bits[1]).abs().sum(-1)
    both = zip(gradients(BITS.distance(*inputs), inputs), gradients(expected, inputs), strict=True)
    for found, wanted in both:
        torch.testing.assert_close(found, wanted)


# --- numerics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [None, 0.0])
@pytest.mark.parametrize("case", [*CASES, BITS], ids=str)
def test_wide_models_and_states_on_a_class_vector_stay_finite(case: Case, epsilon: float | None) -> None:
    hidden, weight = (part.detach() for part in points(4, 20, 768, torch.float32))
    hidden[0] = weight[3]
    hidden[1] = 0
    weight[5] = 0
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    more: dict[str, Any] = {} if epsilon is None else {"epsilon": epsilon}
    scores = case.scores(*inputs, **more)
    cross_entropy(scores, torch.tensor([3, 0, 1, 2])).backward()
    assert scores.isfinite().all()
    assert scores[0].argmax() == 3 or case.name == "bray_curtis"
    assert all(bool(part.grad.isfinite().all()) for part in inputs if part.grad is not None)


@pytest.mark.parametrize("case", [*CASES, BITS], ids=str)
def test_distances_are_float32_under_autocast_and_for_bfloat16_states(case: Case) -> None:
    hidden, weight = points(5, 7, 16, torch.float32)
    expected = case.scores(hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.scores(hidden, weight), expected)
    assert case.scores(hidden.bfloat16(), weight.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("case", [*CASES, BITS], ids=str)
def test_no_hidden_states_have_no_scores(case: Case) -> None:
    hidden, weight = points(0, 5, 4)
    scores = case.scores(hidden, weight)
    scores.sum().backward()
    assert scores.shape == (0, 5)


def test_differences_beyond_a_million_are_cut_off_as_in_the_official_minkowski_layer() -> None:
    module = catalogue().component("head", "minkowski").load()
    hidden = torch.tensor([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[3e6, 1.0]], dtype=torch.float64)
    distance = module.distance(module.Config(p=3.0), hidden, weight)
    distance.sum().backward()
    assert distance.item() == pytest.approx(1e6)
    assert hidden.grad is not None
    assert float(hidden.grad[0, 0]) == 0


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("manhattan", {"exponent": 0.0}, "exponent"),
        ("manhattan", {"p": 2.0}, "p"),
        ("minkowski", {"exponent": -1.0}, "exponent"),
        ("minkowski", {"p": 0.0}, "p"),
        ("minkowski", {"impl": "language", "scale": True}, "always divides"),
        ("chebyshev", {"alpha": 5.0}, "only with smooth=true"),
        ("chebyshev", {"smooth": True, "alpha": 50.0}, "alpha"),
        ("canberra", {"variant": "strong"}, "variant"),
        ("canberra", {"minimum_denominator": 0.1}, "only with variant='robust'"),
        ("canberra", {"variant": "robust", "weight_power": 0.1}, "only with variant='weighted'"),
        ("bray_curtis", {"minimum_sum": 0.1}, "only with variant='normalized'"),
        ("hamming", {"threshold": 0.1}, "only with variant='hard'"),
        ("hamming", {"variant": "hard", "impl": "toy", "straight_through": "official"}, "about the bits"),
        ("hamming", {"flavour": "hard"}, "flavour"),
    ],
)
def test_an_option_that_is_wrong_or_not_read_is_a_sentence(
    name: str, options: dict[str, Any], words: str
) -> None:
    found = catalogue().component("head", name)
    with pytest.raises(AssayError, match=words):
        generic.resolved(found, options)
