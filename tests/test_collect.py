"""From records to tables: every shown number has a row, with its cost, and what failed or is missing says so."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from methods.stage import AssayError
from tests.toy import experiments as toy
from workflows import collect, specs
from workflows.collect import CURVE_COLUMNS, JOB_COLUMNS, RESULT_COLUMNS, Collector
from workflows.plan import Plan
from workflows.record import SPENT_LATER, Failure, Job, Record, RowEntry, write_atomic

TRAIN = 'base > train.sft(data="authors/forget01", steps=2, batch=4)'
CHAINS = {
    "target": TRAIN,
    "pruned": "target > prune.magnitude(sparsity={0.5, 0.75})",
    "healed": "pruned[sparsity=0.5] > distill.forward_kl(teacher=target, steps=2)",
}
HEALED = "healed[sparsity=0.5]"
EVALUATE = {"size": "size", "start": "{run: size, of: [base]}"}
CLAIM = {
    "sentence": "Healing adds no weights.",
    "source": "none",
    "metric": "size.nonzero",
    "subject": HEALED,
    "relation": "within",
    "other": "pruned*",
}


def energy(kwh: float, label: str = "estimated", alone: bool = True) -> dict[str, Any]:
    """An account as the meter leaves it."""
    source = {"cpu": "estimated: cpu load", "gpu": "none", "ram": "estimated: constant"}
    return {"total_kwh": kwh, "cpu_kwh": kwh / 2, "gpu_kwh": 0.0, "ram_kwh": kwh / 2, "emissions_kg": kwh / 10,
            "seconds": 1.0, "readings": 12, "source": source, "alone": alone, "cards": {}, "label": label}  # fmt: skip


def record_of(job: Job, kwh: float = 1.0, rows: list[RowEntry] | None = None, **rest: Any) -> Record:
    """A record such as the runner would leave."""
    values: dict[str, Any] = {
        "attempts": 1, "start": 100.0, "end": 110.0, "seconds_inside": 2.0, "seconds_outside": 0.5,
        "resumed_from_step": 0, "energy": energy(kwh), "energy_attempts": [energy(kwh)], "device": "cpu",
        "processes": 1, "threads": 1, "peak_memory_mb": 300.0, "versions": {"python": "3.11"}, "commit": "0" * 40,
        "dirty": False, "machine": "toy", "notes": {"parameters": 100, "nonzero_after": 50, "tokens_seen": 7},
    } | rest  # fmt: skip
    same = ("id", "digest", "recipe", "kind", "label", "method", "config", "parents", "seed", "content")
    return Record(**{name: getattr(job, name) for name in same}, **values, rows=rows or [])


ROWS = [
    RowEntry(task="masked", metric="nonzero", value=50.0, unit="parameters", better="lower"),
    RowEntry(task="masked", metric="odd", value=None, n=3),
]


def finish(plan: Plan, job: Job, **rest: Any) -> None:
    """Write the record of a job, and a learning curve where it trains."""
    rows = ROWS if job.kind == "score" else []
    write_atomic(plan.store.record(job.id), record_of(job, rows=rows, **rest).model_dump_json())
    if job.method == "train.sft":
        write_atomic(plan.store.result(job.id) / "curve.csv", "step,term,value\n0,train,6.25\n1,train,0.1\n")


def fail(plan: Plan, job: Job, reason: Any) -> None:
    """Write down the failure of a job."""
    failure = Failure(id=job.id, label=job.label, method=job.method, reason=reason, message="toy", traceback="",
                      attempts=2, energy=energy(0.25), end=120.0)  # fmt: skip
    write_atomic(plan.store.failure(job.id), failure.model_dump_json())


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """The planned toy, none of it run."""
    more = f"claims:\n  - {json.dumps(CLAIM)}\ntables:\n  sizes: {{rows: chain, columns: [size.nonzero]}}"
    experiment = toy.write(tmp_path / "toy.yaml", CHAINS, EVALUATE, more)
    return toy.planned(experiment, tmp_path / "results")


@pytest.fixture
def finished(plan: Plan) -> Plan:
    """Every job with its record; the n-th stage took n kWh."""
    stages = [job for job in plan.jobs.values() if job.kind == "stage"]
    for number, job in enumerate(stages, start=1):
        finish(plan, job, kwh=float(number))
    for job in plan.jobs.values():
        if job.kind == "score":
            finish(plan, job, kwh=0.125)
    return plan


def results(plan: Plan) -> list[dict[str, Any]]:
    return list(Collector(plan).results())


def one(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The only row with these values."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, (wanted, found)
    return found[0]


def kwh(plan: Plan, method: str) -> float:
    """What the stages of that method took."""
    jobs = [job for job in plan.jobs.values() if job.method == method]
    return sum(toy.record(plan.store.root, job.id).energy["total_kwh"] for job in jobs)


# --- rows -----------------------------------------------------------------------------------------------------


def test_every_row_says_where_it_comes_from(finished: Plan) -> None:
    row = one(results(finished), chain="pruned[sparsity=0.5]", metric="nonzero")
    assert set(row) == set(RESULT_COLUMNS)
    assert row["label"].endswith("> prune.magnitude(sparsity=0.5)") and row["base"] == "base"
    assert (row["family"], row["method"], row["entry"], row["evaluation"]) == (
        "prune",
        "prune.magnitude",
        "size",
        "size",
    )
    assert json.loads(row["swept"]) == {"sparsity": 0.5} and json.loads(row["options"])["sparsity"] == 0.5
    assert row["seed"] == 0 and row["step"] is None and row["status"] == "ok" and row["value"] == 50.0
    assert toy.record(finished.store.root, row["score_id"]).parents["model"].id == row["model_id"]


def test_every_score_of_every_chain_has_its_rows_and_its_cost(finished: Plan) -> None:
    rows = results(finished)
    for chain in ("target", "pruned[sparsity=0.5]", "pruned[sparsity=0.75]", HEALED):
        metrics = [row["metric"] for row in rows if row["chain"] == chain]
        assert metrics == ["nonzero", "odd", "score_kwh", "score_seconds", "score_peak_mb", "stage_kwh", "chain_kwh",
                           "stage_seconds", "chain_seconds", "stage_peak_mb"]  # fmt: skip
    assert one(rows, chain=HEALED, metric="score_kwh")["value"] == 0.125
    assert one(rows, chain=HEALED, metric="stage_peak_mb")["unit"] == "MB"


def test_a_model_that_is_scored_but_is_no_chain_has_its_cost_too(finished: Plan) -> None:
    rows = [row for row in results(finished) if row["chain"] == "base"]
    assert {row["entry"] for row in rows} == {"start", "energy", "time", "memory"}
    assert one(rows, metric="chain_kwh")["value"] == kwh(finished, "model.new")


def test_the_energy_of_a_chain_counts_every_stage_it_needed_once(finished: Plan) -> None:
    # the teacher is also where the pruned model comes from
    healed = one(results(finished), chain=HEALED, metric="chain_kwh")
    half = next(
        job
        for job in finished.jobs.values()
        if job.method == "prune.magnitude" and job.config["sparsity"] == 0.5
    )
    others = sum(kwh(finished, method) for method in ("model.new", "train.sft", "distill.forward_kl"))
    assert healed["value"] == others + toy.record(finished.store.root, half.id).energy["total_kwh"]
    assert one(results(finished), chain=HEALED, metric="chain_seconds")["value"] == 4 * 2.0


@pytest.mark.parametrize(
    ("label", "alone", "unit"),
    [
        ("measured", True, "kWh estimated"),
        ("estimated", True, "kWh estimated"),
        ("measured", False, "kWh estimated, shared"),
    ],
)
def test_a_chain_is_measured_only_if_every_part_was(
    finished: Plan, label: str, alone: bool, unit: str
) -> None:
    trained = next(job for job in finished.jobs.values() if job.method == "train.sft")
    finish(finished, trained, energy=energy(2.0, label, alone))
    rows = results(finished)
    assert one(rows, chain="target", metric="chain_kwh")["unit"] == unit
    own = f"kWh {label}" + ("" if alone else ", shared")
    assert one(rows, chain="target", metric="stage_kwh")["unit"] == own


def test_a_number_that_is_none_is_a_failed_row_without_a_value(finished: Plan) -> None:
    row = one(results(finished), chain="target", metric="odd")
    assert row["status"] == "failed" and row["value"] is None and row["n"] == 3


# --- what is not there --------------------------------------------------------------------------------------------


def test_what_was_not_run_is_missing(plan: Plan) -> None:
    rows = results(plan)
    assert {row["status"] for row in rows} == {"missing"}
    assert all(row.get("value") is None for row in rows)
    assert {row["chain"] for row in rows} == {
        "target", "pruned[sparsity=0.5]", "pruned[sparsity=0.75]", HEALED, "base",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "status"),
    [("error", "failed"), ("not finite", "failed"), ("out of memory", "oom"), ("timeout", "timeout")],
)
def test_a_failed_stage_and_the_scores_behind_it_say_how(finished: Plan, reason: str, status: str) -> None:
    broken = [job for job in finished.jobs.values() if job.label.endswith("prune.magnitude(sparsity=0.5)")]
    for job in (*broken, *(job for job in finished.jobs.values() if "distill" in job.label)):
        finished.store.record(job.id).unlink()
    fail(finished, next(job for job in broken if job.kind == "stage"), reason)
    rows = results(finished)
    assert one(rows, chain="pruned[sparsity=0.5]", entry="size")["status"] == status
    assert one(rows, chain="pruned[sparsity=0.5]", entry="energy")["status"] == status
    assert one(rows, chain=HEALED, entry="size")["status"] == status
    assert one(rows, chain=HEALED, entry="energy")["status"] == status
    assert one(rows, chain="target", metric="nonzero")["status"] == "ok"


def test_a_broken_record_is_a_sentence_that_names_the_file(
    finished: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.store.record(next(iter(finished.jobs)))
    path.write_text("{}")
    words = [str(tmp_path / "toy.yaml"), f"results={finished.store.root}", f"methods={toy.METHODS}"]
    assert collect.main(words) == 2
    assert f"assay: {path} is no record of this version" in capsys.readouterr().err


def test_a_score_behind_a_failed_reference_says_how_that_failed(tmp_path: Path) -> None:
    evaluate = {"far": "{run: 'retain_kl(data=\"authors/forget01\", reference=half)', of: [target]}"}
    chains = {"target": TRAIN, "half": "target > prune.magnitude(sparsity=0.5)"}
    built = toy.planned(toy.write(tmp_path / "toy.yaml", chains, evaluate), tmp_path / "results")
    jobs = {job.method: job for job in built.jobs.values()}
    finish(built, jobs["train.sft"])
    fail(built, jobs["prune.magnitude"], "timeout")
    assert one(results(built), chain="target", entry="far")["status"] == "timeout"


# --- trajectories and chains without a model ------------------------------------------------------------------------

ASCENT = '> unlearn.grad_ascent(forget="authors/forget01", steps=6, batch=4, checkpoints=[2, 4])'
WAYS = {
    "target": TRAIN,
    "direct": f"target {ASCENT}",
    "whole": f"target > prune.magnitude(sparsity=0.5) {ASCENT}",
    "copy": "direct@step2",
    "sums": "target > curvature.measured",
    "moved": "target > unlearn.moved(sums=sums)",
}


@pytest.fixture
def ways(tmp_path: Path) -> Plan:
    """Two trajectories, one of them from a start without a name; the n-th stage took n kWh and n + 0.5 seconds."""
    evaluate = {"size": "{run: size, of: [direct@steps, whole@steps, copy, moved]}"}
    built = toy.planned(toy.write(tmp_path / "toy.yaml", WAYS, evaluate), tmp_path / "results")
    stages = [job for job in built.jobs.values() if job.kind == "stage"]
    for number, job in enumerate(stages, start=1):
        notes = {"spent_at_step": {"2": {"kwh": 0.25, "seconds": 0.5}}} if "ascent" in job.method else {}
        finish(built, job, kwh=float(number), notes=notes, seconds_inside=number + 0.5)
    for job in built.jobs.values():
        if job.kind == "score":
            finish(built, job, kwh=0.125)
    return built


def test_the_models_on_the_way_have_rows_under_their_chains_name_with_their_step(ways: Plan) -> None:
    rows = [row for row in results(ways) if row["metric"] == "nonzero"]
    shown = [(row["chain"], row["step"], row["method"]) for row in rows]
    assert shown == [
        ("direct", None, "unlearn.grad_ascent"), ("direct", 2, "unlearn.grad_ascent"),
        ("direct", 4, "unlearn.grad_ascent"), ("target", None, "train.sft"),
        ("whole", None, "unlearn.grad_ascent"), ("whole", 2, "unlearn.grad_ascent"),
        ("whole", 4, "unlearn.grad_ascent"), ("whole", 0, "prune.magnitude"),
        ("copy", None, "unlearn.grad_ascent"), ("moved", None, "unlearn.moved"),
    ]  # fmt: skip
    direct = [row for row in rows if row["chain"] == "direct"]
    assert len({row["label"] for row in direct}) == 1 and "@step" not in direct[0]["label"]
    assert [row["model_id"].partition("@")[2] for row in direct] == ["", "step2", "step4"]
    assert direct[1]["model_id"].partition("@")[0] == direct[0]["model_id"]
    copied = one(rows, chain="copy")
    assert copied["model_id"] == direct[1]["model_id"] and copied["label"].endswith("@step2")


def test_the_start_of_a_trajectory_is_found_through_the_table_of_jobs(ways: Plan) -> None:
    rows, jobs = results(ways), {row["id"]: row for row in Collector(ways).jobs()}
    for chain, start in (("direct", one(rows, chain="target", metric="nonzero")),
                         ("whole", one(rows, chain="whole", step=0, metric="nonzero"))):  # fmt: skip
        end = one(rows, chain=chain, step=None, metric="nonzero")
        assert jobs[end["model_id"]]["parents"].split(";")[0] == start["model_id"]


def test_a_kept_model_costs_what_had_been_spent_by_then(ways: Plan) -> None:
    rows, direct = results(ways), toy.record(ways.store.root, toy.job_of(ways, "direct"))
    before = kwh(ways, "model.new") + kwh(ways, "train.sft")
    wanted = {None: direct.energy["total_kwh"], 2: 0.25}
    for step, spent in wanted.items():
        assert one(rows, chain="direct", step=step, metric="stage_kwh")["value"] == spent
        assert one(rows, chain="direct", step=step, metric="chain_kwh")["value"] == spent + before
        assert one(rows, chain="direct", step=step, metric="stage_peak_mb")["value"] == 300.0
    assert one(rows, chain="direct", step=2, metric="stage_seconds")["value"] == 0.5
    assert one(rows, chain="direct", step=2, metric="chain_seconds")["value"] == 0.5 + 1.5 + 2.5
    assert one(rows, chain="copy", metric="stage_kwh")["value"] == 0.25
    start = one(rows, chain="whole", step=0, metric="chain_kwh")
    assert start["value"] == before + kwh(ways, "prune.magnitude")


def test_what_a_kept_model_cost_is_missing_until_it_is_known(ways: Plan) -> None:
    for metric in ("stage_kwh", "chain_kwh", "stage_seconds", "chain_seconds"):
        row = one(results(ways), chain="direct", step=4, metric=metric)
        assert row["value"] is None and row["status"] == "missing"
    later = ways.store.result(toy.job_of(ways, "direct")) / SPENT_LATER
    write_atomic(later, json.dumps({"2": {"kwh": 9.0, "seconds": 9.0}, "4": {"kwh": 0.5, "seconds": 1.0}}))
    rows = results(ways)
    assert one(rows, chain="direct", step=4, metric="stage_kwh")["value"] == 0.5
    # what the record says stands
    assert one(rows, chain="direct", step=2, metric="stage_kwh")["value"] == 0.25


def test_a_chain_without_a_model_has_its_cost_and_no_scores(ways: Plan) -> None:
    rows = [row for row in results(ways) if row["chain"] == "sums"]
    assert [row["metric"] for row in rows] == [
        "stage_kwh", "chain_kwh", "stage_seconds", "chain_seconds", "stage_peak_mb",
    ]  # fmt: skip
    assert {(row["family"], row["method"], row["status"]) for row in rows} == {
        ("curvature", "curvature.measured", "ok")
    }
    moved = one(results(ways), chain="moved", metric="chain_kwh")["value"]
    methods = ("model.new", "train.sft", "curvature.measured", "unlearn.moved")
    assert moved == sum(kwh(ways, method) for method in methods)


def test_a_trajectory_leaves_one_learning_curve_and_a_whole_number_for_the_step(ways: Plan) -> None:
    write_atomic(
        ways.store.result(toy.job_of(ways, "direct")) / "curve.csv", "step,term,value\n0,forget,1.0\n"
    )
    curves = list(Collector(ways).curves())
    assert [row["chain"] for row in curves if row["term"] == "forget"] == ["direct", "copy"]
    import pandas

    folder = collect.report_folder(ways)
    Collector(ways).write(folder)
    assert {row["step"] for row in read(folder / "results.csv")} == {"", "0", "2", "4"}
    table = pandas.read_parquet(folder / "results.parquet")
    assert str(table["step"].dtype) == "Int64" and table["step"].max() == 4


# --- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(finished: Plan) -> Path:
    """The four files."""
    folder = collect.report_folder(finished)
    Collector(finished).write(folder)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_have_the_columns_that_the_report_reads(written: Path) -> None:
    for name, columns in (("results", RESULT_COLUMNS), ("jobs", JOB_COLUMNS), ("curves", CURVE_COLUMNS)):
        lines = (written / f"{name}.csv").read_bytes()
        assert lines.splitlines()[0].decode() == ",".join(columns)
        assert b"\r" not in lines


def test_floats_come_back_bit_by_bit(finished: Plan) -> None:
    trained = next(job for job in finished.jobs.values() if job.method == "train.sft")
    finish(finished, trained, kwh=0.1 + 0.2)
    folder = collect.report_folder(finished)
    Collector(finished).write(folder)
    row = next(
        row
        for row in read(folder / "results.csv")
        if row["chain"] == "target" and row["metric"] == "stage_kwh"
    )
    assert float(row["value"]) == 0.1 + 0.2


def test_jobs_are_listed_once_with_their_chains_and_counts(written: Path, finished: Plan) -> None:
    rows = {row["id"]: row for row in read(written / "jobs.csv")}
    assert set(rows) == set(finished.jobs)
    trained = next(row for row in rows.values() if row["method"] == "train.sft")
    assert trained["chains"] == "target;pruned[sparsity=0.5];pruned[sparsity=0.75];healed[sparsity=0.5]"
    assert (trained["parameters_total"], trained["parameters_nonzero"], trained["tokens_seen"]) == (
        "100",
        "50",
        "7",
    )
    assert trained["status"] == "ok" and trained["stale"] == "False"
    assert json.loads(trained["config"])["steps"] == 2


def test_a_failed_job_is_listed_with_what_it_spent(finished: Plan) -> None:
    healed = next(job for job in finished.jobs.values() if job.method == "distill.forward_kl")
    finished.store.record(healed.id).unlink()
    fail(finished, healed, "timeout")
    row = one(list(Collector(finished).jobs()), id=healed.id)
    assert (row["status"], row["attempts"], row["energy_kwh"]) == ("timeout", 2, 0.25)


def test_learning_curves_carry_their_chain(written: Path) -> None:
    rows = read(written / "curves.csv")
    assert [(row["chain"], row["step"], row["term"], row["value"]) for row in rows] == [
        ("target", "0", "train", "6.25"), ("target", "1", "train", "0.1"),
    ]  # fmt: skip


def test_the_experiment_is_written_resolved_with_its_claims(written: Path) -> None:
    found = json.loads((written / "experiment.json").read_text())
    assert found["chains"] == CHAINS and found["seeds"] == [0] and found["scale"] == "full"
    assert found["tables"]["sizes"]["columns"] == ["size.nonzero"]
    own = [claim for claim in found["claims"] if claim["method"] == "experiment"]
    assert len(own) == 1 and CLAIM.items() <= own[0].items()


def test_the_parquet_copy_has_the_same_rows(written: Path) -> None:
    import pandas

    table = pandas.read_parquet(written / "results.parquet")
    rows = read(written / "results.csv")
    assert list(table.columns) == list(RESULT_COLUMNS) and len(table) == len(rows)
    values = [math.nan if row["value"] == "" else float(row["value"]) for row in rows]
    assert table["value"].tolist() == pytest.approx(values, nan_ok=True)


@pytest.mark.parametrize(
    ("claim", "sentence"),
    [
        ({"sentance": "x"}, "there is no key 'sentance'"),
        ({"sentence": "x"}, "claim 3: .*missing"),
        (CLAIM | {"relation": "recover"}, "claim 3: relation is one of higher, .*, recovers, not 'recover'"),
        (CLAIM | {"scope": "papers"}, "claim 3: scope is one of paper, scaled, not 'papers'"),
        (
            CLAIM | {"relation": "recovers", "other": "pruned"},
            "claim 3: recovers needs other, .*, and intact",
        ),
    ],
)
def test_a_malformed_claim_is_a_sentence(claim: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AssayError, match=sentence):
        specs.own_claim(claim, 3)


# --- stale results --------------------------------------------------------------------------------------------------


def test_of_several_results_of_one_recipe_the_newest_stands_in(finished: Plan) -> None:
    trained = next(job for job in finished.jobs.values() if job.method == "train.sft")
    for number, end in ((1, 500.0), (2, 300.0)):
        old = trained.model_copy(update={"id": f"train.sft-{number:012d}"})
        finish(finished, old, end=end)
    assert collect.newest_by_recipe(finished.store)[trained.recipe] == "train.sft-000000000001"
