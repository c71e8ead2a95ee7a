from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests import invented
from workflows import chance
from workflows.columns import Cell, Sample
from workflows.curves import Line, first_passing, lines, value_at_step
from workflows.measured import Measured
from workflows.verdicts import (
    Verdict,
    _differences,
    _paired,
    _sides,
    as_frame,
    matching,
    parent_label,
    verdicts,
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured.read([invented.write(tmp_path_factory.mktemp("invented"))])


def judged(measured: Measured, **claim: Any) -> list[Verdict]:
    start = {"method": "experiment", "sentence": "said", "source": "here", "relation": "lower"}
    measured.experiments[next(iter(measured.experiments))]["claims"] = [start | claim]
    return verdicts(measured)


# --- statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 2.5, 3, 9, 40.7])
def test_the_t_quantile_is_that_of_scipy(freedom: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert chance.t_quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-8)


def test_the_interval_of_three_differences_is_the_one_worked_out_by_hand() -> None:
    # mean 2, sd 1, t(2 degrees) 4.3027, so 2 -+ 4.3027 / sqrt(3)
    low, high = chance.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)


def test_one_value_has_no_interval_and_is_never_beyond_chance() -> None:
    assert all(math.isnan(end) for end in chance.interval([1.0]))
    assert not chance.beyond_chance({"0": 1.0}, {"0": 5.0, "1": 5.0})


def test_pairing_by_seed_sees_a_lead_that_unpaired_values_hide() -> None:
    first, second = {"0": 1.0, "1": 5.0, "2": 9.0}, {"0": 1.1, "1": 5.11, "2": 9.1}
    assert chance.beyond_chance(first, second)
    assert not chance.beyond_chance(first, {"7": 1.1, "8": 5.11, "9": 9.1})


def test_welch_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = random.Random(0)
    for shift in (0.2, 0.9, 1.5, 3.0):
        first = {str(index): generator.gauss(0, 1) for index in range(4)}
        second = {str(index): generator.gauss(shift, 0.5) for index in range(6)}
        p_value = stats.ttest_ind([*first.values()], [*second.values()], equal_var=False).pvalue
        assert chance.beyond_chance(first, second) == (p_value < 0.05)


# --- patterns ---------------------------------------------------------------------------------------------


def test_the_parent_of_a_label_is_found_despite_arrows_and_brackets_in_its_options() -> None:
    label = 'base > train.sft(data="a > b", optimizer=adamw(betas=[0.9, 0.99])) > prune.magnitude(text="a\\" > (c")'
    parent = parent_label(label)
    assert parent == 'base > train.sft(data="a > b", optimizer=adamw(betas=[0.9, 0.99]))'
    assert parent_label(parent_label(parent)) == ""


def test_a_pattern_means_the_chains_whose_last_stage_completes_it(measured: Measured) -> None:
    names = [run.name for run in matching("*prune.magnitude(sparsity=0.7)*", measured.chains)]
    assert names == ["pruned[sparsity=0.7]"]


def test_a_name_wins_over_a_pattern_and_a_family_name_means_its_members(measured: Measured) -> None:
    assert [run.name for run in matching("difference[alpha=1.0]", measured.chains)] == [
        "difference[alpha=1.0]"
    ]
    assert [run.name for run in matching("pruned", measured.chains)] == [
        "pruned[sparsity=0.5]",
        "pruned[sparsity=0.7]",
    ]


def test_every_pair_has_its_row_so_that_the_fairness_control_is_seen(measured: Measured) -> None:
    rows = judged(measured, subject="*unlearn.satimp*", other="*unlearn.grad_diff*", metric="tofu.retain_nll")
    assert [row.other for row in rows] == ["difference[alpha=1.0]", "difference[alpha=20.0]"]
    assert [row.verdict for row in rows] == ["holds here", "does not hold here"]
    assert "gamma 10.0 / 1.0" in rows[0].condition


def test_a_claim_may_be_made_for_certain_options_only(measured: Measured) -> None:
    claim = {"subject": "*unlearn.satimp*", "other": "*unlearn.grad_diff*", "metric": "tofu.retain_nll"}
    assert [row.other for row in judged(measured, **claim, other_options={"alpha": 20.0})] == [
        "difference[alpha=20.0]"
    ]
    (row,) = judged(measured, **claim, subject_options={"gamma": 3.0})
    assert row.verdict == "not run"
    assert "with gamma=3.0" in row.condition


def test_siblings_are_compared_before_chains_with_another_start(measured: Measured) -> None:
    rows = judged(
        measured, subject="ascent", other="*unlearn.grad_diff*", metric="tofu.retain_nll", relation="higher"
    )
    assert "private" not in [row.other for row in rows]


def test_parent_means_the_chain_without_the_last_stage(measured: Measured) -> None:
    (row,) = judged(measured, subject="healed", other="parent", metric="forget10.retain_nll")
    assert (row.other, row.verdict, row.n) == ("pruned[sparsity=0.7]", "holds here", 3)


# --- verdicts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relation", "margin", "values", "verdict"),
    [
        ("higher", 0.0, (1.0, 1.1, 1.2), "holds here"),
        ("higher", 2.0, (1.0, 1.1, 1.2), "does not hold here"),
        ("higher", 1.1, (1.0, 1.1, 1.2), "needs more seeds"),
        ("lower", 0.5, (-1.0, -1.1, -1.2), "holds here"),
        ("lower", 0.0, (0.0, 0.0, 0.0), "does not hold here"),
        ("within", 0.5, (0.1, -0.1, 0.0), "holds here"),
        ("within", 0.5, (1.0, 1.1, 1.2), "does not hold here"),
        ("within", 0.5, (0.1, -0.9, 0.6), "needs more seeds"),
        ("higher", 0.0, (1.0,), "needs more seeds"),
    ],
)
def test_a_relation_is_decided_only_where_the_whole_interval_is_on_one_side(
    tmp_path: Path, relation: str, margin: float, values: tuple[float, ...], verdict: str
) -> None:
    measured = two_chains(tmp_path, values, [0.0] * len(values))
    (row,) = judged(measured, subject="first", other="second", metric="e.m", relation=relation, margin=margin)
    assert (row.verdict, row.n) == (verdict, len(values))


@pytest.mark.parametrize(
    ("relation", "value", "verdict"),
    [("at_least", 1.0, "holds here"), ("at_least", 1.01, "does not hold here"), ("at_most", 1.0, "holds here"),
     ("at_most", 0.9, "does not hold here")],
)  # fmt: skip
def test_a_threshold_itself_is_good_enough(tmp_path: Path, relation: str, value: float, verdict: str) -> None:
    measured = two_chains(tmp_path, [1.0, 1.0, 1.0], [0.0] * 3)
    (row,) = judged(measured, subject="first", metric="e.m", relation=relation, value=value)
    assert (row.verdict, row.other) == (verdict, f"{value:g}")


def test_the_same_result_under_three_seeds_counts_once(tmp_path: Path) -> None:
    measured = two_chains(tmp_path, [1.0] * 3, [0.0] * 3, same=True)
    (row,) = judged(measured, subject="first", other="second", metric="e.m", relation="higher")
    assert (row.n, row.verdict) == (1, "needs more seeds")


def test_a_level_that_is_not_reached_is_said_and_that_seed_left_out(measured: Measured) -> None:
    (row, *_) = judged(
        measured, subject="saturation", other="preference", metric="curve.probe.retain@probe.forget=2"
    )
    assert row.n == 2
    assert "saturation: level not reached (1)" in row.condition
    assert "seed 2 has no partner" in row.condition


def test_a_claim_nobody_reaches_stays_in_the_table(measured: Measured) -> None:
    (row,) = judged(
        measured, subject="ascent", metric="curve.probe.retain@probe.forget=9", relation="at_most", value=1.0
    )
    assert (row.verdict, row.n) == ("not run", 0)
    assert "level not reached (3)" in row.condition


def test_a_failed_subject_stays_in_the_table(measured: Measured) -> None:
    (row,) = judged(measured, subject="broken", other="target", metric="tofu.retain_nll")
    assert row.verdict == "not run"
    assert "failed (1), oom (1), timeout (1)" in row.condition


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (
            {"subject": "*unlearn.nobody*", "other": "target", "metric": "tofu.retain_nll"},
            "no chain here matches",
        ),
        (
            {"subject": "target", "other": "*nobody*", "metric": "tofu.retain_nll"},
            "no scored chains here match",
        ),
        (
            {"subject": "target", "other": "base", "metric": "tofu.retain_nl"},
            "Did you mean forget10.retain_nll",
        ),
        ({"subject": "base", "other": "parent", "metric": "tofu.retain_nll"}, "the parent is no chain"),
    ],
)
def test_what_was_not_run_says_why(measured: Measured, claim: dict[str, Any], reason: str) -> None:
    (row,) = judged(measured, **claim)
    assert row.verdict == "not run"
    assert reason in row.condition


def test_a_paper_claim_is_compared_only_with_the_papers_model_and_data(measured: Measured) -> None:
    claim = {
        "subject": "ascent",
        "other": "target",
        "metric": "tofu.retain_nll",
        "relation": "higher",
        "scope": "paper",
    }
    (row,) = judged(measured, **claim, model="meta-llama/Llama-2-7b", data="tofu/forget10")
    assert row.verdict == "not run"
    (row,) = judged(measured, **claim, model="llama", data="authors/full")
    assert row.verdict == "reproduced"
    (row,) = judged(measured, **{**claim, "relation": "lower"}, model="llama", data="authors/full")
    assert row.verdict == "not reproduced"


def test_a_smoke_run_proves_nothing(tmp_path: Path) -> None:
    measured = Measured.read([invented.write(tmp_path, scale="smoke")])
    assert {row.verdict for row in verdicts(measured)} == {"not run"}


def test_the_item_error_of_a_difference_stands_beside_it(measured: Measured) -> None:
    (row,) = judged(measured, subject="ascent", other="target", metric="lm_eval.authors_retain.acc")
    assert row.item_stderr == pytest.approx(math.hypot(0.02, 0.02))
    assert row.verdict == "holds here"


def test_the_table_has_the_promised_columns(measured: Measured) -> None:
    frame = as_frame(judged(measured, subject="ascent", other="target", metric="tofu.retain_nll"))
    wanted = (
        "method claim source scope subject other metric n mean_difference low high verdict condition".split()
    )
    assert [name for name in frame.columns if name != "item_stderr"] == wanted


# --- trajectories -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured.read([invented.write_ways(tmp_path_factory.mktemp("ways"), invented.WAYS)])


def test_a_claim_may_compare_at_equal_forgetting(ways: Measured) -> None:
    # at forget NLL 2: late 0.85 + 0.5 / 2.0 * 0.04 = 0.86 and 0.8675, steady 0.71 and 0.72
    metric = "forget10.model_utility@forget10.forget_nll=2"
    (row,) = judged(ways, subject="late", other="steady", metric=metric, relation="higher")
    assert (row.n, row.verdict, row.metric) == (2, "holds here", metric)
    assert row.mean_difference == pytest.approx((0.15 + 0.1475) / 2)
    assert "late: level not reached (1)" in row.condition
    assert "seed 1 has no partner" in row.condition


def test_a_claim_says_where_nothing_was_scored_between_start_and_end(ways: Measured) -> None:
    metric = "forget10.model_utility@forget10.forget_nll=1.1"
    (row,) = judged(ways, subject="steady", other="single", metric=metric, relation="higher")
    assert row.condition.endswith(
        "single: forget10.forget_nll is read off the straight line from start to end; nothing between was scored."
    )


def test_a_claim_about_ends_does_not_see_what_was_kept(ways: Measured) -> None:
    (row,) = judged(ways, subject="*unlearn.npo*", other="costly", metric="forget10.forget_nll")
    assert (row.subject, row.n, row.mean_difference) == ("steady", 3, pytest.approx(-2.0))


def test_a_claim_may_name_a_kept_model(ways: Measured) -> None:
    (row,) = judged(
        ways, subject="costly@step20", other="steady", metric="forget10.forget_nll", relation="within"
    )
    assert (row.subject, row.mean_difference, row.verdict) == ("costly@step20", 0.0, "holds here")


# --- curves -----------------------------------------------------------------------------------------------


def value_at_level(run: dict[str, Line], name: str, at: str, level: float) -> float | None:
    step = first_passing(run[at], level)
    return None if step is None else value_at_step(run[name], step)


def curve(*points: tuple[float, float, float]) -> Any:
    rows = [
        (step, name, value)
        for step, *values in points
        for name, value in zip(("forget", "retain"), values, strict=True)
    ]
    return lines({"step": step, "term": name, "value": value} for step, name, value in rows)


def test_a_matched_level_is_interpolated_between_the_logged_steps() -> None:
    rows = curve((0, 0.0, 0.1), (10, 1.0, 0.2), (20, 3.0, 0.6))
    assert value_at_level(rows, "retain", "forget", 2.0) == pytest.approx(0.4)


def test_only_the_first_passing_upwards_counts() -> None:
    rows = curve((0, 5.0, 9.0), (10, 1.0, 0.0), (20, 3.0, 1.0), (30, 1.0, 7.0), (40, 3.0, 8.0))
    assert value_at_level(rows, "retain", "forget", 2.0) == pytest.approx(0.5)


def test_a_level_never_passed_gives_nothing() -> None:
    assert value_at_level(curve((0, 5.0, 9.0), (10, 4.0, 8.0)), "retain", "forget", 4.5) is None


def two_chains(folder: Path, first: Any, second: Any, *, same: bool = False) -> Measured:
    """Two chains with one metric; ``same`` gives every seed the same score."""
    rows = [
        dict.fromkeys(invented.COLUMNS, "")
        | {"chain": chain, "label": f"base > {chain}.x", "score_id": chain if same else f"{chain}-{seed}", "seed": seed,
           "evaluation": "e", "entry": "e", "task": "t", "metric": "m", "value": value, "status": "ok"}
        for chain, values in (("first", first), ("second", second)) for seed, value in enumerate(values)
    ]  # fmt: skip
    invented.write(folder)
    invented.write_csv(folder / "results.csv", rows)
    return Measured.read([folder])


def test_recovering_is_the_share_of_the_loss_won_back() -> None:
    # lost 1.0 - 0.2 = 0.8, won back 1.0 - 0.28 = 0.72: nine tenths, 0.1 above the claimed 0.8
    def cell(value: float) -> Cell:
        return Cell((Sample("0", str(value), value),))

    pairs = _paired(cell(0.28), cell(1.0))
    claim = {"relation": "recovers", "value": 0.8}
    assert _differences(claim, pairs, cell(0.2)) == pytest.approx([0.1])
    assert _differences(claim, pairs, cell(1.0)) == []
    assert _sides("recovers", 0.0, 0.05, 0.15) == (True, False)
    assert _sides("recovers", 0.0, -0.15, -0.05) == (False, True)
