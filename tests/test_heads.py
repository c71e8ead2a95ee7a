"""The heads that are matrix products: numbers worked out by hand, gradients, numerics, and what each cannot do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods.architectures import loss_floor
from methods.architectures.distance_head import DistanceHead
from methods.head import _products, cosine, cosine_similarity, euclidean, linear, mahalanobis, vq_logits
from methods.stage import AssayError, Component

DISTANCES = [
    pytest.param(euclidean, {}, id="euclidean"),
    pytest.param(cosine, {}, id="cosine"),
    pytest.param(cosine, {"stable": False}, id="cosine unstable"),
    *(
        pytest.param(mahalanobis, {"variant": variant}, id=f"mahalanobis {variant}")
        for variant in ("standard", "diagonal", "cholesky")
    ),
]
SIMILARITIES = [
    pytest.param(linear, {}, id="linear"),
    pytest.param(linear, {"bias": True, "softcap": 2.0}, id="linear softcap"),
    pytest.param(cosine_similarity, {"variant": "half"}, id="half"),
    pytest.param(cosine_similarity, {"temperature": 0.1}, id="softmax"),
    pytest.param(cosine_similarity, {"variant": "sigmoid"}, id="sigmoid"),
]


def points(rows: int, classes: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random hidden states and class vectors."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, width), (classes, width))
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden.to(dtype), weight.to(dtype)


def further(head: Any, config: Any, weight: Tensor) -> dict[str, Tensor]:
    """The head's own parameters, a little away from where they start."""
    if not hasattr(head, "parameters"):
        return {}
    generator = torch.Generator().manual_seed(2)
    found = head.parameters(config, weight.detach())
    for name, value in found.items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        found[name] = value + 0.1 * noise.to(value.dtype)
    return dict(found)


def scored(head: Any, config: Any, hidden: Tensor, weight: Tensor) -> Tensor:
    """The head's scores with parameters a little away from where they start."""
    scores: Tensor = head.scores(config, hidden, weight, **further(head, config, weight))
    return scores


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


def test_mahalanobis_probabilities_are_those_worked_out_by_hand() -> None:
    hidden, weight = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    config = mahalanobis.Config(exponent=1, exponent_on="plain", epsilon=0, regularization=0.0)
    # P = [[2, 1], [1, 2]], of which only the symmetric part of the parameter counts: D^2 = 2 and 8.
    scores = mahalanobis.scores(config, hidden, weight, precision=torch.tensor([[2.0, 2.0], [0.0, 2.0]]))
    torch.testing.assert_close(scores.softmax(-1), torch.tensor([[2 / 3, 1 / 3]]))


def test_linear_scores_are_products_with_a_bias_within_their_bound() -> None:
    hidden, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0], [0.0, -4.0]]), torch.ones(2)
    assert linear.scores(linear.Config(bias=True), hidden, weight, bias=bias).tolist() == [[6.0, -7.0]]
    assert linear.scores(linear.Config(clamp=4.0), hidden, weight).tolist() == [[4.0, -4.0]]
    capped = linear.scores(linear.Config(softcap=5.0), hidden, weight)
    torch.testing.assert_close(capped, torch.tensor([[5 * math.tanh(1.0), 5 * math.tanh(-1.6)]]))


def test_similarity_scores_are_those_worked_out_by_hand() -> None:
    hidden, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0], [-4.0, 3.0]])
    # Cosines 1 and 0; the products 50 and 0 over lengths 7 * 14 and 7 * 7 in the 1-norm.
    half = cosine_similarity.scores(cosine_similarity.Config(variant="half"), hidden, weight)
    softmax = cosine_similarity.scores(cosine_similarity.Config(temperature=0.5), hidden, weight)
    sigmoid = cosine_similarity.scores(cosine_similarity.Config(variant="sigmoid"), hidden, weight)
    torch.testing.assert_close(half.exp(), torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(softmax, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(sigmoid.exp(), torch.tensor([[1 / (1 + math.exp(-50 / 98)), 0.5]]))


def test_smoothing_adds_its_mass_evenly_and_the_floor_clamps_far_classes() -> None:
    hidden, weight = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    smoothed = euclidean.scores(euclidean.Config(exponent=1, epsilon=0, smoothing=0.1), hidden, weight)
    floored = euclidean.scores(euclidean.Config(exponent=1, epsilon=0, floor=0.5), hidden, weight)
    torch.testing.assert_close(smoothed.exp(), torch.tensor([[0.85, 0.25]]))
    torch.testing.assert_close(floored.exp(), torch.tensor([[1.0, 0.5]]))


@pytest.mark.parametrize(("head", "options"), DISTANCES)
def test_the_exponent_defaults_to_the_hidden_width(head: Any, options: dict[str, Any]) -> None:
    hidden, weight = points(3, 5, 7)
    expected = scored(head, head.Config(exponent=7, **options), hidden, weight)
    assert torch.equal(scored(head, head.Config(**options), hidden, weight), expected)


def test_cosine_equals_euclidean_on_the_unit_sphere_with_the_same_exponent() -> None:
    hidden, weight = points(4, 6, 8)
    unit = [part / part.norm(dim=1, keepdim=True) for part in (hidden, weight)]
    angles = cosine.scores(cosine.Config(exponent=5, epsilon=0), hidden, weight).log_softmax(-1)
    distances = euclidean.scores(euclidean.Config(exponent=5, epsilon=0), *unit).log_softmax(-1)
    torch.testing.assert_close(angles, distances)


def test_mahalanobis_with_the_identity_is_euclidean() -> None:
    hidden, weight = points(4, 6, 8)
    expected = euclidean.scores(euclidean.Config(exponent=5, epsilon=0), hidden, weight)
    for variant, parameter in (
        ("standard", torch.eye(8)),
        ("diagonal", torch.zeros(8)),
        ("cholesky", torch.eye(8)),
    ):
        options: dict[str, Any] = {"regularization": 0.0} if variant == "standard" else {}
        config = mahalanobis.Config(exponent=5, epsilon=0, variant=variant, **options)
        scores = mahalanobis.scores(config, hidden, weight, parameter=parameter.double())
        torch.testing.assert_close(scores, expected)


def test_probabilities_do_not_change_with_the_scale_or_a_shift_of_the_space() -> None:
    hidden, weight = points(4, 6, 8)
    config = euclidean.Config(exponent=8, epsilon=0)
    before = euclidean.scores(config, hidden, weight).log_softmax(-1)
    torch.testing.assert_close(euclidean.scores(config, 7 * hidden, 7 * weight).log_softmax(-1), before)
    torch.testing.assert_close(euclidean.scores(config, hidden + 3, weight + 3).log_softmax(-1), before)


@pytest.mark.parametrize("variant", ["standard", "diagonal", "cholesky"])
def test_mahalanobis_probabilities_do_not_change_with_a_shift_or_the_scale_of_the_metric(
    variant: Any,
) -> None:
    hidden, weight = points(4, 6, 8)
    config = mahalanobis.Config(exponent=3, epsilon=0, variant=variant)
    before = scored(mahalanobis, config, hidden, weight).log_softmax(-1)
    torch.testing.assert_close(
        scored(mahalanobis, config, 7 * hidden + 3, 7 * weight + 3).log_softmax(-1), before
    )


def test_dividing_by_the_nearest_distance_changes_probabilities_only_where_epsilon_is_added_after_it() -> (
    None
):
    hidden, weight = points(4, 6, 8)
    for epsilon, same in ((0.0, True), (0.1, False)):
        vision = mahalanobis.Config(exponent=3, epsilon=epsilon, variant="diagonal", scale=False)
        scaled = mahalanobis.Config(exponent=3, epsilon=epsilon, variant="diagonal", scale=True)
        found = [scored(mahalanobis, config, hidden, weight).log_softmax(-1) for config in (vision, scaled)]
        assert torch.allclose(*found, rtol=1e-9) == same


@pytest.mark.parametrize(("head", "options"), DISTANCES)
def test_the_best_class_is_the_nearest_vector(head: Any, options: dict[str, Any]) -> None:
    hidden, weight = points(50, 9, 6)
    config = head.Config(**options)
    if head is mahalanobis:
        (parameter,) = further(head, config, weight).values()
        matrix = mahalanobis.precision(config, parameter)
        matrix = torch.diag(matrix) if matrix.dim() == 1 else matrix
        gaps = hidden[:, None] - weight
        distances = torch.einsum("nvi,ij,nvj->nv", gaps, matrix, gaps)
    else:
        distances = head.squared_distance(config, hidden, weight)
    assert torch.equal(scored(head, config, hidden, weight).argmax(1), distances.argmin(1))


# --- gradients and memory -------------------------------------------------------------------------------


def check_gradients(head: Any, config: Any) -> None:
    """Compare with finite differences, for the head's own parameters, too."""
    hidden, weight = points(5, 6, 4)
    own = further(head, config, weight)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, *own.values())]

    def function(x: Tensor, w: Tensor, *values: Tensor) -> Tensor:
        scores: Tensor = head.scores(config, x, w, **dict(zip(own, values, strict=True)))
        return scores

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(("head", "options"), DISTANCES)
@pytest.mark.parametrize(
    "habits", [{}, {"smoothing": 0.01}, {"exponent_on": "plain", "epsilon": 0.0}, {"legacy_sign": True}]
)
def test_gradients_of_distances_equal_finite_differences(
    head: Any, options: dict[str, Any], habits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two hidden states a block and one a chunk, so that the last block is a shorter one.
    monkeypatch.setitem(_products.BLOCK, "cpu", 12)
    monkeypatch.setitem(_products.CHUNK, "cpu", 6)
    check_gradients(head, head.Config(exponent=3, **options, **habits))


@pytest.mark.parametrize("impl", ["vision", "toy", "language"])
@pytest.mark.parametrize("variant", ["standard", "diagonal", "cholesky"])
def test_gradients_of_every_mahalanobis_layer_equal_finite_differences(variant: Any, impl: Any) -> None:
    check_gradients(mahalanobis, mahalanobis.Config(exponent=3, variant=variant, impl=impl))


@pytest.mark.parametrize(("head", "options"), SIMILARITIES)
def test_gradients_of_similarities_equal_finite_differences(head: Any, options: dict[str, Any]) -> None:
    check_gradients(head, head.Config(**options))


def test_a_form_that_is_not_definite_gives_distance_0_and_no_gradient_where_it_is_negative() -> None:
    hidden, weight = torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    hidden.requires_grad_()
    config = mahalanobis.Config(exponent=1, exponent_on="plain", epsilon=0.01, regularization=0.0)
    matrix = torch.diag(torch.tensor([-5.0, 1.0], dtype=torch.float64))
    scores = mahalanobis.scores(config, hidden, weight, precision=matrix)
    # The first distance is sqrt(0 + eps) + eps.
    torch.testing.assert_close(scores[0, 0].exp(), torch.tensor(1 / 0.11, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(scores[0, 0], hidden)
    assert gradient.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("head", "options"), DISTANCES)
def test_one_matrix_of_tokens_and_classes_is_kept_for_the_backward_pass(
    head: Any, options: dict[str, Any]
) -> None:
    hidden, weight = points(64, 200, 8, torch.float32)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scored(head, head.Config(exponent=3, **options), hidden.requires_grad_(), weight.requires_grad_())
    matrices = sum(size >= 64 * 200 for size in kept.values())
    assert matrices <= (1 if options != {"stable": False} else 6)
    assert sum(size for size in kept.values() if size < 64 * 200) < 64 * 200


@pytest.mark.parametrize(("head", "options"), [*DISTANCES, *SIMILARITIES])
def test_a_slice_of_the_classes_has_the_scores_it_has_among_all(head: Any, options: dict[str, Any]) -> None:
    hidden, weight = points(4, 9, 6)
    entry = {"name": head.__name__.rpartition(".")[2], "options": options}
    layer = DistanceHead(6, 9, entry).double()
    layer.weight.data = weight
    torch.testing.assert_close(layer.block(hidden, slice(2, 7)), layer(hidden)[:, 2:7])


def test_a_score_that_depends_on_the_other_classes_is_not_given_for_a_slice() -> None:
    for options in ({"smoothing": 0.1}, {"floor": 1e-8}, {"legacy_sign": True}):
        layer = DistanceHead(6, 9, {"name": "euclidean", "options": options})
        with pytest.raises(AssayError, match="depends on the other classes"):
            layer.block(torch.ones(2, 6), slice(0, 3))


@pytest.mark.parametrize(("head", "options"), DISTANCES)
def test_no_hidden_states_give_no_scores_and_a_gradient_of_zero(head: Any, options: dict[str, Any]) -> None:
    hidden, weight = points(0, 9, 6)
    scores = scored(head, head.Config(**options), hidden, weight.requires_grad_())
    assert scores.shape == (0, 9)
    (gradient,) = torch.autograd.grad(scores.sum(), weight)
    assert not gradient.any()


# --- numerics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "options"), DISTANCES)
@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_wide_models_and_states_on_a_class_vector_stay_finite(
    head: Any, options: dict[str, Any], epsilon: float
) -> None:
    hidden, weight = points(4, 30, 768, torch.float32)
    hidden[0] = weight[3]
    hidden[1] = 0
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    scores = scored(head, head.Config(epsilon=epsilon, **options), *inputs)
    loss = cross_entropy(scores, torch.tensor([3, 0, 1, 2]))
    loss.backward()
    assert scores.isfinite().all()
    assert scores[0].argmax() == 3
    assert all(bool(part.grad.isfinite().all()) for part in inputs if part.grad is not None)


@pytest.mark.parametrize(("head", "options"), DISTANCES)
def test_scores_and_gradients_are_those_of_float32_under_autocast(head: Any, options: dict[str, Any]) -> None:
    config, (hidden, weight) = head.Config(**options), points(4, 30, 768, torch.float32)

    def run() -> tuple[Tensor, ...]:
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        scores = scored(head, config, *inputs)
        return scores, *torch.autograd.grad(cross_entropy(scores, torch.tensor([3, 0, 1, 2])), inputs)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(bool(tensor.isfinite().all()) for tensor in found)


def test_float32_distances_survive_a_large_common_offset() -> None:
    hidden, weight = points(5, 20, 768)
    hidden, weight = hidden * 0.05 + 10, weight * 0.05 + 10
    config = euclidean.Config(epsilon=0)
    exact = euclidean.scores(config, hidden, weight).log_softmax(-1)
    single = euclidean.scores(config, hidden.float(), weight.float()).log_softmax(-1)
    # Without moving the origin the error is several nats here; what is left is the rounding of the inputs.
    assert float((single.double() - exact).abs().max()) < 0.2


# --- tokens that share vectors ------------------------------------------------------------------------------


def codes(**options: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A configuration of three codes, hidden states, code vectors and the code of seven classes."""
    hidden, weight = points(5, 3, 4)
    return vq_logits.Config(codes=3, **options), hidden, weight, torch.tensor([0, 1, 1, 2, 2, 2, 0])


def test_tokens_of_a_code_share_its_score_and_their_loss_is_at_least_the_logarithm_of_the_group() -> None:
    config, hidden, weight, code_of = codes()
    scores = vq_logits.scores(config, hidden, weight, code_of=code_of)
    torch.testing.assert_close(scores, (hidden @ weight.T)[:, code_of])
    certain = vq_logits.scores(config, 1e4 * weight[2:], weight, code_of=code_of)
    assert cross_entropy(certain, torch.tensor([3])).item() == pytest.approx(math.log(3))
    # Groups of 2, 2 and 3: (4 log 2 + 3 log 3) / 7.
    floor = vq_logits.loss_floor(config, weight, code_of)
    assert floor == pytest.approx((4 * math.log(2) + 3 * math.log(3)) / 7)


def test_the_grouped_loss_equals_that_of_all_tokens_in_value_and_gradient() -> None:
    config, hidden, weight, code_of = codes()
    targets, inputs = torch.tensor([0, 2, 4, 6, 1]), (hidden.requires_grad_(), weight.requires_grad_())
    scores = vq_logits.scores(config, hidden, weight, code_of=code_of)
    grouped, normalisers = vq_logits.token_losses(config, hidden, weight, targets, code_of)
    torch.testing.assert_close(grouped, cross_entropy(scores, targets, reduction="none"))
    torch.testing.assert_close(normalisers, scores.logsumexp(-1))
    expected = torch.autograd.grad(cross_entropy(scores, targets), inputs)
    torch.testing.assert_close(torch.autograd.grad(grouped.mean(), inputs), expected)


def test_k_means_finds_separate_groups_and_gives_the_same_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = 10 * torch.eye(4, 6)
    vectors = middles.repeat_interleave(5, dim=0) + 0.1 * torch.randn(20, 6, generator=generator)
    config = vq_logits.Config(codes=4)
    first, second = (vq_logits.adopted(config, vectors) for _ in range(2))
    groups = first["code_of"].view(4, 5)
    assert all(len(set(group.tolist())) == 1 for group in groups)
    assert len(set(groups[:, 0].tolist())) == 4
    torch.testing.assert_close(first["weight"][groups[0, 0]], vectors[:5].mean(0))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_code_has_a_token_even_where_class_vectors_are_all_the_same() -> None:
    found = vq_logits.adopted(vq_logits.Config(codes=5), torch.ones(8, 3))
    assert sorted(set(found["code_of"].tolist())) == [0, 1, 2, 3, 4]
    assert found["weight"].isfinite().all()


# --- what a head cannot do ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "floor"),
    [
        (Component("euclidean", {}), 0.0),
        (Component("mahalanobis", {}), 0.0),
        (Component("linear", {}), 0.0),
        (Component("linear", {"clamp": 2.0}), math.log1p(50303 * math.exp(-4))),
        (Component("vq_logits", {"codes": 512}), math.log(50304 / 512)),
        (Component("euclidean", {"legacy_sign": True}), math.log1p(50303 * math.exp(-1))),
    ],
)
def test_the_loss_floor_follows_from_the_head_and_the_number_of_classes(
    component: Component, floor: float
) -> None:
    assert loss_floor(component, 768, 50304) == pytest.approx(floor, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "nats"),
    [
        ({"variant": "half"}, 10.13),
        ({"temperature": 2.0}, 10.33),
        ({"temperature": 1.0}, 9.83),
        ({"temperature": 0.5}, 8.83),
        ({"temperature": 0.3}, 7.49),
        ({"temperature": 0.1}, 1.19),
        ({"variant": "sigmoid"}, 10.45),
    ],
)
def test_similarities_stay_near_a_guess_where_other_classes_are_orthogonal(
    options: dict[str, Any], nats: float
) -> None:
    best = cosine_similarity.usual(cosine_similarity.Config(**options), 50304)
    assert -math.log(best) == pytest.approx(nats, abs=0.006)


@pytest.mark.parametrize(
    ("head", "options", "words"),
    [
        (linear, {"softcap": 1.0, "clamp": 2.0}, "choose one"),
        (cosine_similarity, {"variant": "half", "temperature": 0.5}, "temperature=0.5 is read only with"),
        (mahalanobis, {"variant": "diagonal", "regularization": 0.1}, "regularization=0.1 is read only with"),
        (mahalanobis, {"impl": "language", "scale": True}, "leave scale=True out"),
    ],
)
def test_options_that_a_variant_does_not_read_are_refused(
    head: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(AssayError, match=words):
        head.Config(**options)


def test_more_codes_than_classes_are_refused() -> None:
    with pytest.raises(AssayError, match="codes must be at most the classes"):
        DistanceHead(4, 9, {"name": "vq_logits", "options": {"codes": 10}})


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
