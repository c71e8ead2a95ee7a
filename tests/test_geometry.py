"""The evaluation ``geometry``: spectra and crystals by hand, and what it reads of classifiers and language models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy import ndarray

from evaluations import _crystal, _points, _spectrum, geometry
from methods.architectures import output_layer, register
from methods.checkpoint import Models
from methods.data import Locator, read_cases
from methods.find import catalogue
from methods.stage import AssayError, Row
from tests.small_models import evaluate, save, scoring, value

EUCLIDEAN = {"name": "euclidean", "options": {"exponent": 2.0}}


# --- spectra ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (9, 9), (1, 4)])
def test_singular_values_in_blocks_are_those_of_the_whole_matrix(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spectrum, "BLOCK", 3)
    draw = numpy.random.default_rng(0)
    matrix, shift, scale = draw.normal(size=shape), draw.normal(size=shape[1]), draw.uniform(1, 2, shape[1])
    expected = numpy.linalg.svd((matrix - shift) / scale, compute_uv=False)
    assert _spectrum.singular_values(matrix, shift, scale) == pytest.approx(expected)
    assert _spectrum.singular_values(matrix) == pytest.approx(numpy.linalg.svd(matrix, compute_uv=False))


# Four points around (5, 7), four times as much variance along the first axis.
CROSS = numpy.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) + numpy.array([5.0, 7.0])


def test_ratios_are_shares_of_the_variance_around_the_mean() -> None:
    assert _spectrum.ratios(CROSS).tolist() == pytest.approx([0.8, 0.2])
    assert _spectrum.ratios(CROSS, standardised=True).tolist() == pytest.approx([0.5, 0.5])
    assert _spectrum.ratios(CROSS, components=1).tolist() == pytest.approx([0.8])


def test_a_constant_coordinate_takes_no_part_and_equal_vectors_have_no_spectrum() -> None:
    with_constant = numpy.column_stack([CROSS, numpy.full(4, 0.1)])
    found = _spectrum.ratios(with_constant, standardised=True)
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.0])
    for constant in (numpy.full((6, 3), 0.1), numpy.zeros((6, 3), dtype=numpy.float32)):
        assert _spectrum.ratios(constant).tolist() == []
        assert _spectrum.ratios(constant, standardised=True).tolist() == []


def test_components_are_counted_up_to_a_share_or_to_their_end() -> None:
    shares = numpy.array([0.5, 0.25, 0.125])
    assert [_spectrum.components_for(shares, part) for part in (0.5, 0.51, 0.75, 0.8, 0.9)] == [1, 2, 2, 3, 3]


def test_three_effective_ranks_by_hand() -> None:
    quarters, uneven = numpy.full(4, 0.25), numpy.array([3.0, 1.0])
    assert _spectrum.effective_rank_ratios(quarters) == pytest.approx(4.0)
    # shares 3/4 and 1/4 of the values themselves, 9/10 and 1/10 of their squares
    values = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    squares = math.exp(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    assert _spectrum.effective_rank_singular(uneven) == pytest.approx(values)
    assert _spectrum.effective_rank_ratios(uneven**2 / 10) == pytest.approx(squares)
    assert _spectrum.effective_rank_singular(numpy.zeros(3)) == 0.0
    assert _spectrum.participation_ratio(numpy.array([0.5, 0.5])) == pytest.approx(2.0)
    assert _spectrum.participation_ratio(numpy.array([0.8, 0.2])) == pytest.approx(1 / 0.68)


def test_rankme_of_singular_values_sees_the_mean_and_that_of_eigenvalues_does_not() -> None:
    draw = numpy.random.default_rng(0).normal(size=(400, 6))
    far = draw + 1000.0
    assert _spectrum.rankme_eigen(_spectrum.ratios(draw)) == pytest.approx(6.0, abs=0.05)
    assert _spectrum.rankme_eigen(_spectrum.ratios(far)) == pytest.approx(6.0, abs=0.05)
    singular = [_spectrum.rankme_singular(_spectrum.singular_values(matrix)) for matrix in (draw, far)]
    assert singular[0] == pytest.approx(6.0, abs=0.05)
    assert singular[1] == pytest.approx(1.0, abs=0.1)
    assert _spectrum.rankme_singular(numpy.zeros(3)) is None


def test_alpha_is_the_exponent_of_a_planted_power_law() -> None:
    law = _spectrum.alpha_req(numpy.arange(1, 33) ** -1.5, 3, 16)
    assert law is not None
    assert law == pytest.approx((1.5, 1.0))
    flat = _spectrum.alpha_req(numpy.full(32, 1 / 32), 3, 16)
    assert flat is not None
    assert flat.alpha == pytest.approx(0.0, abs=1e-12)
    assert _spectrum.fitted_ranks(points=192, width=96) == (6, 48)
    assert _spectrum.fitted_ranks(points=11, width=96) == (6, 5)


def test_alpha_needs_three_ranks_that_are_more_than_rounding() -> None:
    assert _spectrum.alpha_req(numpy.arange(1, 33) ** -1.5, 3, 5) is None
    assert _spectrum.alpha_req(numpy.array([0.5, 0.5, *[1e-17] * 20]), 3, 12) is None
    assert _spectrum.alpha_req(numpy.zeros(0), 3, 12) is None


def spread(directions: int, width: int) -> ndarray:
    """Both signs of the first unit vectors: [2 * directions, width]."""
    unit = numpy.eye(width)[:directions]
    return numpy.concatenate([unit, -unit])


def test_nuclear_norm_and_entropy_have_their_closed_forms_at_one_direction_and_at_all() -> None:
    one, every = spread(1, 4), spread(4, 4)
    # one column of norm sqrt(L), over L = 2 tokens; all d of norm sqrt(L/d) over L = 8, of which min(L,d) count
    assert _spectrum.matrix_nuclear_norm(one) == pytest.approx(1 / math.sqrt(2))
    assert _spectrum.matrix_nuclear_norm(every) == pytest.approx(math.sqrt(4 / 8))
    assert _spectrum.matrix_entropy(one) == pytest.approx(0.0)
    assert _spectrum.matrix_entropy(every) == pytest.approx(1.0)


def test_both_ignore_size_and_mean_and_only_entropy_ignores_a_rotation() -> None:
    draw = numpy.random.default_rng(1)
    states = draw.normal(size=(12, 5))
    turned = states @ numpy.linalg.qr(draw.normal(size=(5, 5)))[0]
    for measure in (_spectrum.matrix_nuclear_norm, _spectrum.matrix_entropy):
        assert measure(3.0 * states + 7.0) == pytest.approx(measure(states))
    assert _spectrum.matrix_entropy(turned) == pytest.approx(_spectrum.matrix_entropy(states))
    assert _spectrum.matrix_nuclear_norm(turned) != pytest.approx(_spectrum.matrix_nuclear_norm(states))


@pytest.mark.parametrize("states", [numpy.ones((1, 8)), numpy.ones((4, 8)), numpy.zeros((3, 2))])
def test_states_that_are_all_the_same_have_neither(states: ndarray) -> None:
    assert _spectrum.matrix_nuclear_norm(states) is None
    assert _spectrum.matrix_entropy(states) is None
    assert _spectrum.matrix_entropy(numpy.arange(5.0)[:, None]) is None


def test_the_plane_of_points_keeps_their_first_two_axes_and_has_a_sign() -> None:
    lying = numpy.array([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    found, mirrored = _spectrum.plane(lying), _spectrum.plane(-lying)
    distances = numpy.linalg.norm(found[:, None] - found, axis=-1)
    assert distances == pytest.approx(numpy.linalg.norm(lying[:, None] - lying, axis=-1))
    for points in (found, mirrored):
        assert points.max(axis=0) == pytest.approx(numpy.abs(points).max(axis=0))
    # of two that reach equally far the first
    assert _spectrum.plane(numpy.array([[1.0], [3.0]])) == pytest.approx(
        numpy.array([[1.0, 0.0], [-1.0, 0.0]])
    )
    assert _spectrum.plane(numpy.ones((3, 2))).tolist() == [[0.0, 0.0]] * 3


# --- crystals --------------------------------------------------------------------------------------------------


def polygon(corners: int) -> ndarray:
    angle = 2 * numpy.pi * numpy.arange(corners) / corners
    return numpy.column_stack([numpy.cos(angle), numpy.sin(angle), numpy.zeros(corners)])


def test_a_regular_polygon_is_a_circle_and_a_turned_square_is_itself() -> None:
    assert _crystal.circle(polygon(8)) == pytest.approx(0.0, abs=1e-9)
    assert _crystal.permutation(polygon(4), 4) == pytest.approx(1.0)
    # two of five points in the middle: radii 1, 1, 1, 1, 0 times half of a unit side, mean 0.4 and sd 0.2
    assert _crystal.circle(numpy.concatenate([polygon(4), numpy.zeros((1, 3))])) == pytest.approx(0.5)


def test_a_lattice_of_two_by_two_has_one_parallelogram_worked_out_by_hand() -> None:
    # |ab| = 1, |cd| = sqrt 5, |ac| = 1, |bd| = 3, |bc|^2 = 2, |ad|^2 = 10
    bent = numpy.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 3.0]])
    expected = math.sqrt((1 - math.sqrt(5)) ** 2 + (1 - 3) ** 2) / math.sqrt((1 + 2 + 5 + 10) / 2)
    assert _crystal.lattice(bent, 2) == pytest.approx(expected)
    straight = numpy.array([[column, 2.0 * row, 1.0] for row in range(5) for column in range(5)])
    assert _crystal.lattice(straight, 5) == pytest.approx(0.0, abs=1e-12)


def test_equivalence_is_the_distance_within_classes_over_that_between_them() -> None:
    # within: four times 0 to itself, four times 1; between: 10, 11, 9, 10, each twice
    line = numpy.array([[0.0], [10.0], [1.0], [11.0]])
    assert _crystal.equivalence(line, 2) == pytest.approx(0.5 / 10)
    # within: 0 eight times over and |100 - 0| twice, which is more than the mean between (1 or 99) and is left out
    outlier = numpy.array([[0.0], [1.0], [100.0], [1.0]])
    assert _crystal.equivalence(outlier, 2) == pytest.approx(0.0)


def test_a_parallelogram_is_off_by_the_corner_that_is_missing() -> None:
    corners = numpy.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    assert _crystal.parallelogram(corners, [(0, 1, 2, 3)]) == pytest.approx(0.0, abs=1e-12)
    bent = corners.copy()
    bent[3] = [2.0, 4.0]
    # e0 + e3 - e1 - e2 = (0, 2); around the mean (1, 3/2) squared lengths 13/4, 13/4, 5/4, 29/4
    for scale in ("all", "task", "datapoint"):
        found = _crystal.parallelogram(bent, [(0, 1, 2, 3)], scale=scale)  # type: ignore[arg-type]
        assert found == pytest.approx(4 / (60 / 16))
    far = numpy.concatenate([bent, [[50.0, 0.0], [-46.0, 6.0]]])
    sizes = [_crystal.parallelogram(far, [(0, 1, 2, 3)], scale=scale) for scale in ("all", "task")]  # type: ignore[arg-type]
    assert sizes[0] < sizes[1]  # type: ignore[operator]


def test_quadruples_that_any_vectors_fulfil_are_left_out() -> None:
    vectors = numpy.random.default_rng(0).normal(size=(6, 4))
    real = _crystal.parallelogram(vectors, [(0, 1, 2, 3)])
    assert _crystal.parallelogram(vectors, [(0, 0, 4, 4), (5, 2, 5, 2), (0, 1, 2, 3)]) == real
    assert _crystal.parallelogram(vectors, [(0, 0, 4, 4)]) is None
    assert _crystal.parallelogram(vectors, []) is None


@pytest.mark.parametrize("vectors", [numpy.ones((25, 3)), numpy.zeros((25, 1))])
def test_a_figure_of_equal_vectors_has_no_score(vectors: ndarray) -> None:
    assert _crystal.circle(vectors) is None
    assert _crystal.lattice(vectors, 5) is None
    assert _crystal.equivalence(vectors, 5) is None
    assert _crystal.permutation(vectors, 4) is None
    assert _crystal.parallelogram(vectors, [(0, 1, 2, 3)]) is None


def test_points_on_a_line_are_no_circle() -> None:
    assert _crystal.circle(numpy.arange(12.0)[:, None] * numpy.ones(3)) is None


@pytest.mark.parametrize(
    ("data", "figure"),
    [
        ("arithmetic/addition59/train", ("circle", 59)),
        ("arithmetic/lattice/test", ("lattice", 5)),
        ("arithmetic/equivalence40.split2/test[0:9]", ("equivalence", 40)),
        ("arithmetic/permutation4/train+arithmetic/permutation4/test", ("permutation", 4)),
        ("arithmetic/genealogy127/train", None),
        ("digits/test", None),
        ("authors/forget10", None),
    ],
)
def test_a_data_set_tells_the_figure_of_its_tokens(data: str, figure: tuple[str, int] | None) -> None:
    assert _crystal.figure_of(data) == figure


# --- classifiers -----------------------------------------------------------------------------------------------


def pixels(folder: Path, head: dict[str, Any] | None = None, weight: ndarray | None = None) -> Path:
    """One layer from the pixels of a digit to its classes."""
    from methods.architectures.classifiers import ImageMLPConfig, ImageMLPForImageClassification

    register()
    torch.manual_seed(0)
    model = ImageMLPForImageClassification(
        ImageMLPConfig(image_size=(8, 8), num_labels=10, hidden_sizes=(), assay_head=head)
    )
    if weight is not None:
        model.classifier.weight.data = torch.from_numpy(weight.astype(numpy.float32))
    model.save_pretrained(folder)
    return folder


def tokens(folder: Path, classes: int = 25, length: int = 3, weight: ndarray | None = None) -> Path:
    """A tied token MLP with a Euclidean head."""
    from methods.architectures.classifiers import TokenMLPConfig, TokenMLPForSequenceClassification

    register()
    torch.manual_seed(0)
    layout = TokenMLPConfig(
        vocab_size=classes, num_labels=classes, sequence_length=length, hidden_size=8, hidden_sizes=(12,),
        tie_word_embeddings=True, assay_head=EUCLIDEAN,
    )  # fmt: skip
    model = TokenMLPForSequenceClassification(layout)
    if weight is not None:
        model.embedding.weight.data = torch.from_numpy(weight.astype(numpy.float32))
    model.save_pretrained(folder)
    return folder


def digits(name: str) -> tuple[ndarray, ndarray]:
    """Pixels [M,64] and labels [M]."""
    table = read_cases(Locator().rows(name), name)
    return table.inputs.flatten(1).numpy().astype(numpy.float64), table.labels.numpy()


def test_class_vectors_that_are_the_class_means_correlate_fully_and_lie_at_no_distance(
    tmp_path: Path,
) -> None:
    inputs, labels = digits("digits/train")
    means = numpy.stack([inputs[labels == label].mean(axis=0) for label in range(10)])
    model = pixels(tmp_path / "means", EUCLIDEAN, means)
    rows = evaluate("geometry", model, tmp_path / "out", data="digits/test", centres="digits/train")
    assert value(rows, "centre_correlation") == pytest.approx(1.0)
    assert value(rows, "centre_distance") == pytest.approx(0.0, abs=1e-6)
    flat = inputs.std(axis=0) <= 0.02
    assert value(rows, "constant_coordinates") == flat.sum()
    assert value(rows, "constant_weight_rms") == pytest.approx(
        math.sqrt((means[:, flat] ** 2).mean()), abs=1e-7
    )
    assert value(rows, "norm", "class_vectors") == pytest.approx(float(numpy.linalg.norm(means)))
    shares = _spectrum.ratios(means)
    assert value(rows, "explained_variance_2", "class_vectors") == pytest.approx(shares[:2].sum(), rel=1e-5)
    assert {row.task for row in rows if row.metric == "centre_distance"} == {
        "centres digits/train points=1437 classes=10"
    }


@pytest.mark.parametrize("name", ["euclidean", "cosine", "manhattan", "canberra", "mahalanobis"])
def test_nearest_vector_accuracy_is_the_accuracy_of_a_harmonic_head(name: str, tmp_path: Path) -> None:
    if f"head.{name}" not in catalogue().components:
        pytest.skip(f"not built yet: head {name}")
    model = pixels(tmp_path / "model", {"name": name, "options": {"exponent": 2.0}})
    seen = scoring("geometry", model, tmp_path / "out", data="digits/test")
    rows = catalogue().evaluation("geometry").load().evaluate(seen)
    assert value(rows, "nearest_vector_accuracy") == value(rows, "accuracy")
    assert seen.notes["nearest_by"] == name


def test_the_inverted_wiring_shows_as_another_accuracy_and_the_same_nearest_vectors(tmp_path: Path) -> None:
    inputs, labels = digits("digits/train")
    means = numpy.stack([inputs[labels == label].mean(axis=0) for label in range(10)])
    found = []
    for legacy in (False, True):
        head = {"name": "euclidean", "options": {"exponent": 2.0, "legacy_sign": legacy}}
        model = pixels(tmp_path / str(legacy), head, means)
        rows = evaluate("geometry", model, tmp_path / f"out {legacy}", data="digits/test")
        found.append((value(rows, "accuracy"), value(rows, "nearest_vector_accuracy")))
    (right, near), (inverted, still_near) = found
    assert right == near == still_near
    assert right > 0.8
    assert inverted < 0.1


def test_under_a_linear_head_the_nearest_vector_is_that_of_euclid(tmp_path: Path) -> None:
    model = pixels(tmp_path / "model")
    rows = evaluate("geometry", model, tmp_path / "out", data="digits/test")
    inputs, labels = digits("digits/test")
    weight = output_layer(Models().load(model)).weight.detach().double().cpu()
    nearest = torch.cdist(torch.from_numpy(inputs), weight).argmin(dim=1).numpy()
    assert value(rows, "nearest_vector_accuracy") == pytest.approx((nearest == labels).mean())
    assert value(rows, "nearest_vector_accuracy") != value(rows, "accuracy")
    # the features are the pixels themselves
    shares = _spectrum.ratios(inputs, 50, standardised=True)
    assert value(rows, "explained_variance_2", "features") == pytest.approx(shares[:2].sum())
    assert value(rows, "effective_rank_ratios", "features") == pytest.approx(
        _spectrum.effective_rank_ratios(shares)
    )


def test_each_class_of_a_small_head_has_a_place_in_the_plane(tmp_path: Path) -> None:
    from sklearn.decomposition import PCA

    model = pixels(tmp_path / "model")
    rows = evaluate("geometry", model, tmp_path / "out", data="digits/test")
    found = numpy.array(
        [[value(rows, f"pc{axis}", f"class {label}") for axis in (1, 2)] for label in range(10)]
    )
    weight = output_layer(Models().load(model)).weight.detach().double().cpu().numpy()
    assert numpy.abs(found) == pytest.approx(numpy.abs(PCA(2).fit_transform(weight)), abs=1e-9)


def test_what_an_image_classifier_does_not_have_is_not_written(tmp_path: Path) -> None:
    rows = evaluate("geometry", pixels(tmp_path / "model"), tmp_path / "out", data="digits/test")
    kinds = {row.task.split()[0] for row in rows}
    assert kinds == {"features", "class_vectors", "centres", "logits", "class"}
    assert not {"circle", "lattice", "parallelogram"} & {row.metric for row in rows}
    assert all(math.isfinite(row.value) for row in rows)


def test_tokens_that_lie_on_a_lattice_are_found_to_do_so(tmp_path: Path) -> None:
    grid = numpy.array([[row, column, *[0.0] * 6] for row in range(5) for column in range(5)])
    model = tokens(tmp_path / "model", weight=grid)
    rows = evaluate("geometry", model, tmp_path / "out", data="arithmetic/lattice5/test")
    for what in ("embedding", "class_vectors"):
        assert value(rows, "lattice", what) == pytest.approx(0.0, abs=1e-7)
        assert value(rows, "parallelogram", what) == pytest.approx(0.0, abs=1e-7)
        assert value(rows, "explained_variance_2", what) == pytest.approx(1.0)
        assert value(rows, "component_variance_5", what) == pytest.approx(0.0, abs=1e-12)
        assert value(rows, "participation_ratio", what) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("data", "classes", "metric"),
    [("addition31", 31, "circle"), ("equivalence40", 42, "equivalence"), ("permutation4", 24, "permutation")],
)
def test_each_arithmetic_task_has_its_own_figure(
    data: str, classes: int, metric: str, tmp_path: Path
) -> None:
    model = tokens(tmp_path / "model", classes, 2)
    rows = evaluate("geometry", model, tmp_path / "out", data=f"arithmetic/{data}/test", weights=False)
    vectors = Models().load(model).embedding.weight.detach().double().cpu().numpy()
    figure = _crystal.figure_of(f"arithmetic/{data}/test")
    assert figure is not None
    assert value(rows, metric, "embedding") == pytest.approx(_crystal.score(vectors, figure))
    figures = {"circle", "lattice", "equivalence", "permutation", "parallelogram"}
    assert figures & {row.metric for row in rows} == {metric}


def test_the_matrices_of_a_model_leave_embedding_and_output_layer_out(tmp_path: Path) -> None:
    model = Models().load(tokens(tmp_path / "model"))
    found = geometry.matrices(model, output_layer(model))
    assert [tuple(weight.shape) for weight in found] == [(12, 24), (8, 12)]


def one_label(folder: Path, count: int, grey: bool = False) -> Locator:
    """``few/rows``: digits that are all labelled 3, or all the same picture."""
    rows = [row for row in Locator().rows("digits/train") if row["label"] == 3][:count]
    (folder / "few").mkdir(parents=True)
    lines = [
        json.dumps(
            {"image": (rows[0] if grey else row)["image"], "label": 3, "classes": 10},
            default=numpy.ndarray.tolist,
        )
        for row in rows
    ]
    (folder / "few" / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Locator(folder)


@pytest.mark.parametrize("count", [2, 5, 40])
def test_one_class_and_fewer_points_than_dimensions_give_finite_numbers(count: int, tmp_path: Path) -> None:
    locator = one_label(tmp_path / "data", count)
    rows = evaluate(
        "geometry", pixels(tmp_path / "model"), tmp_path / "out", locator=locator, data="few/rows"
    )
    assert all(math.isfinite(row.value) for row in rows)
    assert value(rows, "explained_variance_1", "features") > 0
    assert {row.n for row in rows if row.metric == "centre_correlation"} == {1}


def test_points_that_are_all_the_same_have_no_spectrum_and_say_so(tmp_path: Path) -> None:
    locator = one_label(tmp_path / "data", 6, grey=True)
    found = scoring(
        "geometry", pixels(tmp_path / "model"), tmp_path / "out", locator=locator, data="few/rows"
    )
    rows = geometry.evaluate(found)
    assert all(math.isfinite(row.value) for row in rows)
    assert not [row for row in rows if row.task.startswith("features") and "variance" in row.metric]
    assert value(rows, "rankme_singular") == pytest.approx(1.0, abs=1e-3)
    assert found.notes["not_defined"] == ["alpha_req", "matrix_nuclear_norm", "matrix_entropy"]


def test_one_point_is_refused_with_a_sentence(tmp_path: Path) -> None:
    model = pixels(tmp_path / "model")
    with pytest.raises(AssayError, match="needs two points or more, but digits/test"):
        evaluate("geometry", model, tmp_path / "out", data="digits/test[0:1]")
    with pytest.raises(AssayError, match="quadruples are of words, which a classifier does not read"):
        evaluate("geometry", tokens(tmp_path / "tokens"), tmp_path / "out", data="arithmetic/lattice5/test",
                 quadruples="words/any")  # fmt: skip


# --- language models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "one")


def of(rows: list[Row], *metrics: str) -> list[float]:
    return [row.value for row in rows if row.metric in metrics]


def test_points_of_a_language_model_are_the_states_that_predict_the_answers(
    model: Path, tmp_path: Path
) -> None:
    found = scoring("geometry", model, tmp_path, data="authors/forget10[0:3]", batch=2)
    points = _points.collect(found, "authors/forget10[0:3]", None)
    from methods.data import Style, encode

    examples = encode(Locator().rows("authors/forget10[0:3]"), found.tokenizer(), Style(), 512)
    states, targets = [], []
    for example in examples:
        with torch.no_grad():
            answer = found.model()(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True)
        kept = [place for place, label in enumerate(example.labels[1:]) if label != -100]
        states.append(answer.hidden_states[-1][0, kept])
        targets += [example.labels[place + 1] for place in kept]
    assert points.features == pytest.approx(torch.cat(states).numpy(), abs=1e-4)
    assert points.labels.tolist() == targets
    assert [len(text) for text in points.texts] == [len(example.input_ids) for example in examples]


def test_the_batch_and_its_padding_change_nothing(model: Path, tmp_path: Path) -> None:
    found = [
        evaluate(
            "geometry", model, tmp_path / str(batch), data="authors/forget10[0:12]", points=60, batch=batch
        )
        for batch in (1, 7)
    ]
    assert [(row.task, row.metric, row.n) for row in found[0]] == [
        (row.task, row.metric, row.n) for row in found[1]
    ]
    assert [row.value for row in found[0]] == pytest.approx(
        [row.value for row in found[1]], rel=1e-4, abs=1e-6
    )


def test_of_more_points_the_same_ones_are_drawn_every_time(model: Path, tmp_path: Path) -> None:
    options = {"data": "authors/forget10[0:12]", "points": 50, "weights": False}
    first, again = (evaluate("geometry", model, tmp_path / name, **options) for name in "ab")
    assert first == again
    assert {row.n for row in first if row.metric == "accuracy"} == {50}
    every = evaluate("geometry", model, tmp_path / "c", data="authors/forget10[0:12]", weights=False)
    assert of(every, "rankme_eigen") != of(first, "rankme_eigen")
    drawn = _points.drawn(1000, 10, 0, "x")
    assert drawn == sorted(set(drawn)) == _points.drawn(1000, 10, 0, "x") != _points.drawn(1000, 10, 1, "x")


def test_texts_are_cut_to_one_length_and_shorter_ones_are_left_out(model: Path, tmp_path: Path) -> None:
    options = {"data": "authors/forget10[0:12]", "weights": False}
    rows = evaluate("geometry", model, tmp_path, **options)
    (task,) = {row.task for row in rows if row.metric == "matrix_entropy"}
    assert {row.n for row in rows if row.task == task} == {12}
    shortest = int(task.rpartition("=")[2])
    longer = evaluate("geometry", model, tmp_path, text_tokens=shortest + 3, **options)
    (fewer,) = {row.n for row in longer if row.metric == "matrix_entropy"}
    assert fewer is not None
    assert fewer < 12
    with pytest.raises(AssayError, match=r"no text of .* has text_tokens=500 tokens; the longest has"):
        evaluate("geometry", model, tmp_path, text_tokens=500, **options)


def test_a_large_head_has_no_picture_and_the_hook_is_gone_afterwards(model: Path, tmp_path: Path) -> None:
    found = scoring("geometry", model, tmp_path, data="authors/forget10[0:4]")
    rows = geometry.evaluate(found)
    assert not of(rows, "pc1", "pc2")
    assert not output_layer(found.model())._forward_pre_hooks
    # tied: the same vectors under both names
    for metric in ("explained_variance_1", "norm", "effective_rank_singular"):
        assert value(rows, metric, "embedding") == value(rows, metric, "class_vectors")


def test_a_model_that_knows_nothing_gives_finite_numbers(tmp_path: Path) -> None:
    blank = save(tmp_path / "blank", scale=0.0)
    rows = evaluate("geometry", blank, tmp_path / "out", data="authors/forget10[0:4]")
    assert all(math.isfinite(row.value) for row in rows)
    assert not of(rows, "explained_variance_1", "rankme_singular", "centre_correlation", "matrix_entropy")
    assert of(rows, "effective_rank_singular") == [0.0] * 5


def test_words_that_are_one_token_each_make_parallelograms(model: Path, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    lines = [["a", "b", "c", "d"], ["zqxj vk", "b", "c", "e"], ["a", "a", "b", "b"]]
    text = "".join(json.dumps({"words": words}) + "\n" for words in lines)
    (tmp_path / "words" / "some.jsonl").write_text(text, encoding="utf-8")
    options: dict[str, Any] = {
        "data": "authors/forget10[0:4]",
        "weights": False,
        "locator": Locator(tmp_path),
    }
    rows = evaluate("geometry", model, tmp_path / "out", quadruples="words/some", **options)
    (row,) = [row for row in rows if row.metric == "parallelogram" and row.task.startswith("embedding")]
    assert row.n == 1
    assert row.task.endswith("quadruples=words/some scale=all")
    for content, sentence in (
        ({"words": ["a", "b"]}, "row 0 of words/bad needs a column words with four words"),
        ({"words": ["zqxj vk"] * 4}, "in no row of words/bad each of the four words is one token"),
    ):
        (tmp_path / "words" / "bad.jsonl").write_text(json.dumps(content) + "\n", encoding="utf-8")
        with pytest.raises(AssayError, match=sentence):
            evaluate("geometry", model, tmp_path / "out", quadruples="words/bad", **options)
