"""One call in a chain that stands for several stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from methods.stage import AssayError
from tests.toy import experiments as toy
from workflows.collect import Collector
from workflows.plan import Plan, Point

WRITTEN_OUT = {
    "sums": "base > curvature.measured",
    "moved": "base > unlearn.moved(times=0.002, sums=sums)",
}
SHORT = {"short": "base > unlearn.measured_and_moved"}


def plan_of(folder: Path, chains: dict[str, str], more: str = "") -> Plan:
    return toy.planned(toy.write(folder / "toy.yaml", chains, {"size": "size"}, more), folder / "results")


def point_of(built: Plan, chain: str) -> Point:
    return next(point for point in built.points if point.chain == chain)


def test_a_shorthand_has_the_jobs_of_its_stages_written_out(tmp_path: Path) -> None:
    short, written_out = plan_of(tmp_path / "a", SHORT), plan_of(tmp_path / "b", WRITTEN_OUT)
    stages = [
        {job.id for job in built.jobs.values() if job.kind == "stage"} for built in (short, written_out)
    ]
    assert stages[0] == stages[1]
    assert toy.job_of(short, "short") == toy.job_of(written_out, "moved")


def test_it_is_shown_as_it_was_written(tmp_path: Path) -> None:
    built = plan_of(tmp_path, {"short": "base > unlearn.measured_and_moved(times=0.5)"})
    point = point_of(built, "short")
    assert point.label == "base > unlearn.measured_and_moved(times=0.5)"
    assert (point.method, point.family, point.config["times"]) == (
        "unlearn.measured_and_moved",
        "unlearn",
        0.5,
    )
    assert [job.method for job in point.last_jobs] == ["curvature.measured", "unlearn.moved"]


def test_a_sweep_over_it_is_a_family_that_shares_its_steps(tmp_path: Path) -> None:
    built = plan_of(tmp_path, {"short": "base > unlearn.measured_and_moved(times={0.25, 0.5})"})
    assert [point.chain for point in built.points] == ["short[times=0.25]", "short[times=0.5]"]
    assert sum(job.method == "curvature.measured" for job in built.jobs.values()) == 1


def test_its_cost_is_that_of_all_its_steps_and_its_claims_are_checked(tmp_path: Path) -> None:
    built = plan_of(tmp_path, SHORT)
    toy.run(built)
    collector = Collector(built)
    rows = {row["metric"]: row["value"] for row in collector.results() if row["evaluation"] == "time"}
    spent = [
        toy.record(built.store.root, job.id).seconds_inside for job in point_of(built, "short").last_jobs
    ]
    assert len(spent) == 2
    assert rows["stage_seconds"] == pytest.approx(sum(spent))
    assert [claim["method"] for claim in collector.experiment()["claims"]] == ["unlearn.measured_and_moved"]
    shown = next(
        row for row in collector.results() if row["evaluation"] == "size" and row["chain"] == "short"
    )
    assert shown["method"] == "unlearn.measured_and_moved"
    assert json.loads(shown["options"]) == {"times": 0.002, "reads": "sums"}


def test_resources_asked_for_it_go_to_its_steps_unless_these_have_their_own(tmp_path: Path) -> None:
    more = (
        "resources: {unlearn.measured_and_moved: {hours: 12}, unlearn.moved: {hours: 2}, default: {hours: 1}}"
    )
    jobs = point_of(plan_of(tmp_path, SHORT, more), "short").last_jobs
    assert [job.resources["hours"] for job in jobs] == [12, 2]


def test_wrong_options_and_steps_are_told(tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="did you mean 'times'"):
        plan_of(tmp_path, {"short": "base > unlearn.measured_and_moved(time=0.5)"})
    with pytest.raises(AssayError, match="a step reads 'sum', which is no step before it"):
        plan_of(tmp_path, {"short": 'base > unlearn.measured_and_moved(reads="sum")'})
    with pytest.raises(AssayError, match=r"times=1\.5 moves too far"):
        plan_of(tmp_path, {"short": "base > unlearn.measured_and_moved(times=1.5)"})
    with pytest.raises(AssayError, match="needs a model to start from"):
        plan_of(tmp_path, {"short": "unlearn.measured_and_moved"})
