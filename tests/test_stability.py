"""The evaluation ``stability``: steadiness and time to a threshold from learning curves written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluations import stability
from evaluations.stability import Arrival, arrival
from methods.loop import write_curve
from methods.stage import AssayError, Row
from tests.small_models import evaluate, scoring, value

TRAIN, TEST = "probe.train.accuracy", "probe.test.accuracy"


def stage(folder: Path, kept: str = "model", **terms: Sequence[float]) -> Path:
    """A stage's folder with a curve of these values at steps 0, 10, 20, ...; the path of its model.

    ``probe__test`` stands for ``probe.test``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        (10 * place, name.replace("__", "."), number)
        for name, values in terms.items()
        for place, number in enumerate(values)
    ]
    write_curve(folder / "curve.csv", rows)
    (folder / kept).mkdir(exist_ok=True)
    return folder / kept


def score(model: Path, **options: Any) -> list[Row]:
    return evaluate("stability", model, model.parent / "out", **options)


# --- steadiness ------------------------------------------------------------------------------------------------


def test_gradient_stability_is_that_of_the_last_half_of_the_steps(tmp_path: Path) -> None:
    # steps 0 to 40: from step 20 on 1, 2, 3 with mean 2 and sd sqrt(2/3)
    rows = score(stage(tmp_path, gradient_norm=[90.0, 50.0, 1.0, 2.0, 3.0]))
    assert value(rows, "gradient_stability") == pytest.approx(math.sqrt(2 / 3) / 2)
    assert value(rows, "clip_rate") == pytest.approx(4 / 5)
    whole = score(tmp_path / "model", last=1.0, clip=2.5)
    mean = 146 / 5
    expected = math.sqrt(sum((x - mean) ** 2 for x in (90, 50, 1, 2, 3)) / 5) / mean
    assert value(whole, "gradient_stability") == pytest.approx(expected)
    assert value(whole, "clip_rate") == pytest.approx(3 / 5)
    assert [(row.task, row.n) for row in whole] == [
        ("gradient_norm last=1", 5),
        ("gradient_norm clip=2.5", 5),
    ]


def test_a_run_of_two_points_has_the_stability_of_both(tmp_path: Path) -> None:
    # mean 2, sd 1
    assert value(score(stage(tmp_path, gradient_norm=[1.0, 3.0])), "gradient_stability") == pytest.approx(0.5)


def test_gradients_that_are_0_or_a_single_one_have_no_stability_and_are_finite(tmp_path: Path) -> None:
    zeros = score(stage(tmp_path / "zeros", gradient_norm=[0.0, 0.0, 0.0]))
    assert [(row.metric, row.value) for row in zeros] == [("clip_rate", 0.0)]
    single = score(stage(tmp_path / "single", gradient_norm=[2.0]))
    assert [(row.metric, row.value) for row in single] == [("clip_rate", 1.0)]


def test_learning_stability_is_the_spread_of_the_steps_over_what_was_gained(tmp_path: Path) -> None:
    # differences -2, 1, -2: mean -1, sd sqrt 2; 4 down to 1
    rows = score(stage(tmp_path, probe__test=[4.0, 2.0, 3.0, 1.0]))
    assert value(rows, "learning_stability") == pytest.approx(math.sqrt(2) / 3)
    assert rows[0].task == "probe.test"
    assert stability.learning_stability([4.0, 3.0, 2.0, 1.0]) == 0.0
    for losses in ([1.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 1.0], [1.0], []):
        assert stability.learning_stability(losses) is None


def test_a_spike_stands_out_of_the_points_before_it(tmp_path: Path) -> None:
    # before the sixth: median 10, deviations 2, 1, 0, 1, 2 with median 1: a spike is above 14
    steady = [8.0, 9.0, 10.0, 11.0, 12.0]
    assert [stability.spikes([*steady, last], 50) for last in (14.0, 14.1)] == [0, 1]
    # the first five points have too little before them
    assert stability.spikes([0.0, 100.0, 0.0, 100.0, 0.0], 50) == 0
    rows = score(stage(tmp_path, train=[*steady, 14.1, 10.0]))
    assert value(rows, "spikes", "train window=50") == 1.0


def test_spikes_look_back_over_the_window_alone() -> None:
    falling = [1000.0] * 40 + [1.0] * 10
    assert stability.spikes([*falling, 2.0], 10) == 1
    assert stability.spikes([*falling, 2.0], 50) == 0


# --- accuracies ------------------------------------------------------------------------------------------------


def test_area_under_the_curve_is_a_trapezoid_over_the_number_of_points() -> None:
    # (0 + 1) / 2 + (1 + 1) / 2 over three points; at best (E - 1) / E
    assert stability.aucc([0.0, 1.0, 1.0]) == pytest.approx(0.5)
    assert stability.aucc([1.0] * 4) == pytest.approx(3 / 4)
    assert stability.aucc([1.0]) == 0.0


@pytest.mark.parametrize(
    ("accuracies", "hold", "expected"),
    [
        ([0.1, 0.95, 0.95, 0.95], 3, Arrival(True, 10)),
        ([0.95, 0.95, 0.95], 3, Arrival(True, 0)),
        # a moment above it is no arrival
        ([0.95, 0.1, 0.95, 0.95, 0.1, 0.95, 0.95, 0.95], 3, Arrival(True, 50)),
        ([0.95, 0.1, 0.95], 1, Arrival(True, 0)),
        # once there, what comes later does not undo it
        ([0.95, 0.95, 0.1], 2, Arrival(True, 0)),
        # exactly at the threshold is not above it
        ([0.9, 0.9, 0.9], 1, Arrival(False, 20)),
        ([0.1, 0.2, 0.3, 0.4], 1, Arrival(False, 30)),
        # above it at the end, and not yet long enough: it may have arrived at step 20
        ([0.1, 0.1, 0.95, 0.95], 3, Arrival(False, 20)),
        ([0.1], 1, Arrival(False, 0)),
    ],
)
def test_arrival_is_the_first_step_of_a_stay(accuracies: list[float], hold: int, expected: Arrival) -> None:
    line = [(10 * place, accuracy) for place, accuracy in enumerate(accuracies)]
    assert arrival(line, 0.9, hold) == expected


def test_grokking_is_the_gap_between_test_and_training_accuracy(tmp_path: Path) -> None:
    train, test = [0.1, 0.95, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.3, 0.92, 0.95, 0.95]
    rows = score(stage(tmp_path, probe__train__accuracy=train, probe__test__accuracy=test), hold=2)
    at = {
        (row.task.partition(" hold")[0].replace(TRAIN, "train").replace(TEST, "test"), row.metric): row.value
        for row in rows
    }
    assert at == {
        ("train", "aucc"): pytest.approx((0.525 + 0.975 + 3.0) / 6),
        ("test", "aucc"): pytest.approx((0.15 + 0.61 + 0.935 + 0.95) / 6),
        ("train above 0.9", "reached"): 1.0,
        ("train above 0.9", "steps_to"): 10.0,
        ("train above 0.9", "steps_to_at_least"): 10.0,
        ("test above 0.9", "reached"): 1.0,
        ("test above 0.9", "steps_to"): 30.0,
        ("test above 0.9", "steps_to_at_least"): 30.0,
        ("test after train above 0.9", "gap"): 20.0,
        ("test after train above 0.9", "gap_at_least"): 20.0,
        ("train above 0.99", "reached"): 1.0,
        ("train above 0.99", "steps_to"): 20.0,
        ("train above 0.99", "steps_to_at_least"): 20.0,
        ("test above 0.99", "reached"): 0.0,
        ("test above 0.99", "steps_to_at_least"): 50.0,
        ("test after train above 0.99", "gap_at_least"): 30.0,
    }


def test_a_model_that_has_not_learnt_what_it_was_shown_has_no_gap(tmp_path: Path) -> None:
    rows = score(stage(tmp_path, probe__train__accuracy=[0.1, 0.2], probe__test__accuracy=[0.1, 0.1]))
    assert not [row for row in rows if row.metric.startswith("gap")]
    assert [row.value for row in rows if row.metric == "reached"] == [0.0] * 4
    assert [row.value for row in rows if row.metric == "steps_to_at_least"] == [10.0] * 4


# --- the curve -------------------------------------------------------------------------------------------------


def test_a_kept_model_is_judged_by_what_was_logged_up_to_its_step(tmp_path: Path) -> None:
    accuracies = [0.1, 0.2, 0.95, 0.95, 0.95]
    kept = stage(tmp_path, "model@20", probe__test__accuracy=accuracies)
    (tmp_path / "model").mkdir()
    reached = {}
    for model in (kept, tmp_path / "model"):
        rows = score(model, thresholds=(0.9,))
        reached[model.name] = value(rows, "reached"), value(rows, "steps_to_at_least"), rows[0].n
    assert reached == {"model@20": (0.0, 20.0, 3), "model": (1.0, 20.0, 5)}


def test_a_language_model_has_what_its_curve_has(tmp_path: Path) -> None:
    rows = score(
        stage(tmp_path, train=[3.0, 2.0, 1.5, 1.2, 1.1, 1.0], gradient_norm=[2.0, 1.5, 1.2, 1.0, 0.9, 0.8])
    )
    assert {row.metric for row in rows} == {"gradient_stability", "clip_rate", "spikes"}


def test_a_step_logged_twice_counts_once_and_what_is_not_finite_not_at_all(tmp_path: Path) -> None:
    model = stage(tmp_path, train=[1.0])
    write_curve(tmp_path / "curve.csv", [(0, "train", 5.0), (0, "train", 1.0), (10, "train", math.inf)])
    assert stability.read_curve(model) == {"train": [(0, 1.0)]}


def test_the_notes_say_how_often_was_logged(tmp_path: Path) -> None:
    model = stage(tmp_path, gradient_norm=[1.0, 1.0, 1.0], probe__test=[2.0])
    found = scoring("stability", model, tmp_path / "out")
    stability.evaluate(found)
    assert found.notes["steps_between_points"] == {"gradient_norm": 10, "probe.test": 0}


def test_a_model_that_was_not_trained_here_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(
        AssayError, match=r"reads the learning curve of the stage that made the model, and .*base has none"
    ):
        score(tmp_path / "base")


def test_a_term_that_is_named_and_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    model = stage(tmp_path, gradient_norm=[1.0, 2.0], probe__tests__accuracy=[0.1, 0.2])
    assert score(model)
    with pytest.raises(
        AssayError, match=r"test='probe.test': the curve has no such term; did you mean 'probe.tests"
    ):
        score(model, test="probe.test")


def test_a_curve_that_is_none_is_refused_with_its_line(tmp_path: Path) -> None:
    model = stage(tmp_path, train=[1.0])
    (tmp_path / "curve.csv").write_text("step,term,value\n0,train,1.0\n1,train,many\n", encoding="utf-8")
    with pytest.raises(AssayError, match=r"curve.csv, line 3: not step, term and value"):
        score(model)
    write_curve(tmp_path / "curve.csv", [])
    with pytest.raises(AssayError, match="has too few points: log more often"):
        score(model)
