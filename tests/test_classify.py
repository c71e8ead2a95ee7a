"""The evaluation of classifiers: accuracy, loss, further metrics worked out by hand, and the attack."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from evaluations import classify
from methods.data import Locator, read_cases
from methods.stage import AssayError, Row
from tests.small_models import evaluate, value


def linear(folder: Path, weight: list[list[float]], side: tuple[int, int] = (1, 2)) -> Path:
    """One layer without a bias from the pixels to the classes, with these weights [V,d]."""
    from methods.architectures.classifiers import ImageMLPConfig, ImageMLPForImageClassification
    from methods.checkpoint import save_model

    layout: dict[str, Any] = {"image_size": side, "hidden_sizes": (), "num_labels": len(weight)}
    model = ImageMLPForImageClassification(ImageMLPConfig(**layout, output_bias=False, dtype="float32"))
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(weight))
    save_model(model, folder, None, dtype="float32")
    return folder


def data(folder: Path, pixels: list[tuple[float, float]], labels: list[int], classes: int) -> Locator:
    """Images of two pixels as the data set ``mine/cases``."""
    (folder / "mine").mkdir(parents=True)
    rows = [
        {"image": [list(pair)], "label": label, "classes": classes}
        for pair, label in zip(pixels, labels, strict=True)
    ]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "mine" / "cases.jsonl").write_text(lines, encoding="utf-8")
    return Locator(folder)


def answers(labels: list[int], chosen: list[int], scores: Any = None) -> classify.Answers:
    scores = numpy.zeros((len(labels), 2)) if scores is None else numpy.array(scores, dtype=float)
    return classify.Answers(numpy.array(labels), numpy.array(chosen), numpy.zeros(len(labels)), scores)


# Class 1 where the second pixel is brighter than the first.
BRIGHTER = [[1.0, 0.0], [0.0, 1.0]]
PIXELS = [(0.9, 0.1), (0.2, 0.6), (0.5, 0.4), (0.3, 0.8)]
LABELS = [0, 1, 1, 0]


# --- rows ------------------------------------------------------------------------------------------------------


def rows_of(folder: Path, **options: Any) -> list[Row]:
    model, locator = linear(folder / "model", BRIGHTER), data(folder, PIXELS, LABELS, 2)
    return evaluate("classify", model, folder / "out", locator=locator, data="mine/cases", **options)


def test_accuracy_and_loss_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    assert [row.metric for row in rows] == ["accuracy", "nll"]
    assert {(row.task, row.n) for row in rows} == {("mine/cases", 4)}
    # right, right, wrong, wrong
    assert value(rows, "accuracy") == 0.5
    assert rows[0].stderr == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))
    # -log softmax of the own class: log(1 + exp(other - own))
    losses = [math.log1p(math.exp(gap)) for gap in (-0.8, -0.4, 0.1, 0.5)]
    assert value(rows, "nll") == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert (rows[1].unit, rows[1].better, rows[0].better) == ("nats", "lower", "higher")


def test_every_metric_is_a_row_that_names_what_it_depends_on(tmp_path: Path) -> None:
    metrics = ("auc", "f_beta", "accuracy", "g_mean", "auc")
    rows = rows_of(tmp_path, metrics=metrics, beta=2.0, limit=3, batch=2)
    assert [(row.metric, row.task) for row in rows] == [
        ("accuracy", "mine/cases limit=3"),
        ("nll", "mine/cases limit=3"),
        ("auc", "mine/cases limit=3"),
        ("f_beta", "mine/cases limit=3 beta=2"),
        ("g_mean", "mine/cases limit=3"),
    ]
    assert {row.n for row in rows} == {3}
    # Differences of scores: -0.8 of class 0, 0.4 and -0.1 of class 1.
    assert value(rows, "auc") == 1.0


def test_the_size_of_the_batches_changes_nothing(tmp_path: Path) -> None:
    whole = rows_of(tmp_path / "whole", metrics=("f1_macro",), radius=0.05)
    assert rows_of(tmp_path / "parts", metrics=("f1_macro",), radius=0.05, batch=3) == whole


def test_token_models_are_scored_as_well(tmp_path: Path) -> None:
    from methods.architectures.classifiers import TokenMLPConfig, TokenMLPForSequenceClassification
    from methods.checkpoint import save_model
    from methods.terms import case_scores

    torch.manual_seed(0)
    layout: dict[str, Any] = {"vocab_size": 31, "num_labels": 31, "dtype": "float32"}
    model = TokenMLPForSequenceClassification(TokenMLPConfig(**layout))
    save_model(model, tmp_path / "model", None, dtype="float32")
    name = "arithmetic/addition31/test"
    rows = evaluate("classify", tmp_path / "model", tmp_path / "out", data=name, batch=50)
    table = read_cases(Locator().rows(name), name)
    cases = table.batch(range(len(table)), "all")
    with torch.no_grad():
        log_p = case_scores(model, cases).double().log_softmax(-1)
    assert value(rows, "nll") == pytest.approx(
        -float(log_p[range(len(table)), cases.labels].mean()), rel=1e-6
    )
    assert value(rows, "accuracy") == pytest.approx(float((log_p.argmax(-1) == cases.labels).double().mean()))


# --- metrics ---------------------------------------------------------------------------------------------------


def test_recall_and_precision_of_two_classes_by_hand() -> None:
    """2 of 3 of class 1 are found, 3 of 5 of class 0; so 2 of the 4 cases that are taken for class 1 are."""
    found = answers([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0, 0])
    recall, precision = 2 / 3, 1 / 2
    assert classify.measure(found, "balanced_accuracy") == pytest.approx((2 / 3 + 3 / 5) / 2)
    assert classify.measure(found, "g_mean") == pytest.approx(math.sqrt(2 / 3 * 3 / 5))
    for beta in (0.5, 1.0, 2.0):
        by_hand = (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
        assert classify.measure(found, "f_beta", beta) == pytest.approx(by_hand)
    # f1 of class 0: recall 3/5, precision 3/4
    both = (2 * precision * recall / (precision + recall) + 2 * 0.6 * 0.75 / 1.35) / 2
    assert classify.measure(found, "f1_macro", beta=3.0) == pytest.approx(both)
    assert classify.measure(found, "f_beta_macro", beta=1.0) == pytest.approx(both)


def test_the_area_under_the_curve_counts_pairs_in_the_right_order() -> None:
    found = answers([0, 0, 1, 1], [0, 0, 1, 1], [[0, -1], [0, 2], [0, 1], [5, 8]])
    # Of the four pairs, the one of scores 2 and 1 is the wrong way round.
    assert classify.measure(found, "auc") == 0.75


def test_a_class_that_is_never_found_makes_the_geometric_mean_zero() -> None:
    found = answers([0, 1, 2, 2], [0, 0, 2, 2])
    assert classify.measure(found, "g_mean") == 0.0
    assert classify.measure(found, "balanced_accuracy") == pytest.approx(2 / 3)


def test_classes_that_do_not_occur_are_left_out_of_the_mean_recall() -> None:
    """Of 42 tokens only two are answers to whether numbers are equivalent."""
    found = answers([40, 41, 41, 40], [40, 41, 3, 40])
    assert classify.measure(found, "balanced_accuracy") == 0.75
    assert classify.measure(found, "g_mean") == pytest.approx(math.sqrt(0.5))


# --- the attack ------------------------------------------------------------------------------------------------


def test_an_attack_on_a_linear_model_moves_the_margin_by_twice_the_radius(tmp_path: Path) -> None:
    """Both pixels move against the label, so a case stays right where its margin is more than 2 radius."""
    model = linear(tmp_path / "model", BRIGHTER)
    # margins 0.5, 0.25, 0.15 and, already wrong, -0.1
    pixels = [(0.6, 0.1), (0.3, 0.55), (0.5, 0.35), (0.4, 0.5)]
    locator = data(tmp_path, pixels, [0, 1, 0, 0], 2)

    def robust(radius: float) -> Row:
        options: Any = {"locator": locator, "data": "mine/cases", "radius": radius, "attack_steps": 4}
        return evaluate("classify", model, tmp_path / "out", **options)[-1]

    assert robust(0.01).value == 0.75
    assert robust(0.1).value == 0.5
    assert robust(0.2).value == 0.25
    assert robust(0.3).value == 0.0
    assert (robust(0.1).metric, robust(0.1).task) == (
        "robust_accuracy",
        "mine/cases radius=0.1 attack_steps=4",
    )


@pytest.mark.parametrize(
    ("weight", "pixels", "withstands", "falls"),
    [
        # 2 (0.9 - r) against 0.8 + r, which stops at 1: wrong from r = 0.4 on, and without the stop from 1/3 on
        ([[2.0, 0.0], [0.0, 1.0]], (0.9, 0.8), 0.39, 0.41),
        # 0.5 - r against -2 (0.1 - r), which stops at 0: wrong from r = 0.5 on, and without the stop from 0.24 on
        ([[0.0, 1.0], [-2.0, 0.0]], (0.1, 0.5), 0.49, None),
    ],
)
def test_an_attack_keeps_pixels_between_zero_and_one(
    tmp_path: Path, weight: Any, pixels: Any, withstands: float, falls: float | None
) -> None:
    model, locator = linear(tmp_path / "model", weight), data(tmp_path, [pixels], [0], 2)
    for radius, right in ((withstands, 1.0), (falls, 0.0)):
        if radius is not None:
            rows = evaluate(
                "classify", model, tmp_path / "out", locator=locator, data="mine/cases", radius=radius
            )
            assert value(rows, "robust_accuracy") == right


# --- what is refused -------------------------------------------------------------------------------------------


def test_an_unknown_metric_is_refused_with_the_nearest_word() -> None:
    with pytest.raises(AssayError, match="no metric 'balanced_acuracy'; did you mean 'balanced_accuracy'"):
        classify.check(classify.Config(metrics=("accuracy", "balanced_acuracy")), Locator())


def test_metrics_of_two_classes_and_attacks_on_tokens_are_refused_while_planning() -> None:
    with pytest.raises(
        AssayError, match="'auc' is for two classes, and 'digits/test' has 10; ask for 'balanced_"
    ):
        classify.check(classify.Config(metrics=("auc",)), Locator())
    with pytest.raises(AssayError, match=r"radius=0\.1 moves pixels, and 'arithmetic/lattice/test' has no"):
        classify.check(classify.Config(data="arithmetic/lattice/test", radius=0.1), Locator())
    classify.check(classify.Config(metrics=("f1_macro",), radius=0.1), Locator())


def test_cases_of_another_shape_or_none_at_all_are_refused(tmp_path: Path) -> None:
    model = linear(tmp_path / "model", BRIGHTER)
    for name, sentence in (
        ("digits/test", "'digits/test': the model takes inputs of 1 x 1 x 2, but these are 1 x 8 x 8"),
        ("authors/facts", "'authors/facts': rows to classify need the columns"),
    ):
        with pytest.raises(AssayError, match=sentence):
            evaluate("classify", model, tmp_path / "out", data=name)
    locator = data(tmp_path, PIXELS, LABELS, 3)
    with pytest.raises(AssayError, match="has 3 classes, but the model tells 2 apart"):
        evaluate("classify", model, tmp_path / "out", locator=locator, data="mine/cases")


def test_an_area_needs_both_classes(tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="only one occurs: raise limit"):
        rows_of(tmp_path, metrics=("auc",), limit=1)
