"""The workflow under a real Snakemake: run, killed, continued, extended, failing, and cured. Slow, so runs are shared.

Every fixture is one or two runs on the toy experiment, and leaves what its tests look at.
"""

from __future__ import annotations

import csv
import glob
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import runs
from tests.toy import experiments as toy
from workflows import clean
from workflows.plan import Plan

LIMIT_SECONDS = 240.0
TRAIN = 'base > train.sft(data="authors/forget01", steps=160, batch=4)'
CHAINS = {"target": TRAIN, "pruned": "target > prune.magnitude(sparsity=0.5)"}
EVALUATE = {"size": "size", "text": 'perplexity(data="authors/text_holdout", context_tokens=32, limit=4)'}
MORE_CHAINS = {
    "healed": "pruned > train.sft(steps=2, batch=4)",
    "scaled": "target > train.scaled",
    "scaled_pruned": "scaled > prune.magnitude(sparsity=0.5)",
}
MORE_SCORES = {
    "wider": "{run: 'perplexity(data=\"authors/text_holdout\", context_tokens=48, limit=2)', of: [target]}"
}


@dataclass
class Run:
    """A finished call of Snakemake."""

    code: int
    text: str
    results: Path

    @property
    def rows(self) -> list[dict[str, str]]:
        """results.csv as it was when the run ended."""
        return self._rows

    def remember(self, name: str) -> Run:
        """Keep the rows: a later run writes the file anew."""
        path = self.results / name / "results.csv"
        with open(path, encoding="utf-8", newline="") as file:
            self._rows = list(csv.DictReader(file))
        return self


def call(experiment: Path, results: Path, *flags: str, **config: Any) -> Run:
    """Run Snakemake to its end."""
    log = results.with_name(f"{results.name}-{time.monotonic_ns()}.log")
    started = runs.start(runs.command(results, str(experiment), 2, *flags, **config), log)
    return Run(started.wait(LIMIT_SECONDS), started.text, results)


def stamps(results: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every record."""
    witness = runs.Witness(results)
    witness.look()
    return witness.seen


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


# --- undisturbed ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything of this file happens."""
    return tmp_path_factory.mktemp("snakemake")


@pytest.fixture(scope="module")
def first(place: Path) -> Run:
    """The toy experiment, from nothing."""
    experiment = toy.write(place / "toy.yaml", CHAINS, EVALUATE)
    return call(experiment, place / "first").remember("toy")


def test_an_experiment_runs_from_nothing_to_its_report(first: Run) -> None:
    assert first.code == 0, first.text
    assert {row["status"] for row in first.rows} == {"ok"}
    assert {row["entry"] for row in first.rows} == {"size", "text", "energy", "time", "memory"}
    for name in ("jobs.csv", "curves.csv", "experiment.json", "report.html"):
        assert (first.results / "toy" / name).stat().st_size > 0, name


def test_a_finished_run_leaves_nothing_but_results(first: Run) -> None:
    assert not list(first.results.glob("receipts/*"))
    assert not list(first.results.glob("claims/*.json"))
    assert not list(first.results.glob("scratch/*")) and not list(first.results.glob("s*s/*.tmp-*"))


def test_running_again_repeats_nothing_and_draws_the_same_tables(first: Run, place: Path) -> None:
    before = stamps(first.results)
    again = call(place / "toy.yaml", first.results).remember("toy")
    assert again.code == 0, again.text
    assert stamps(first.results) == before
    assert again.rows == first.rows


def test_a_dry_run_writes_nothing(first: Run, place: Path) -> None:
    fresh = call(place / "toy.yaml", place / "untouched", "-n")
    assert fresh.code == 0 and "train.sft-" in fresh.text, fresh.text
    assert not (place / "untouched").exists()


def test_the_whole_graph_can_be_shown_when_all_is_finished(first: Run, place: Path) -> None:
    before = files(first.results)
    shown = call(place / "toy.yaml", first.results, "--rulegraph", show="all")
    assert shown.code == 0, shown.text
    for rule in ("model", "train", "prune", "evaluate", "report"):
        assert f'label = "{rule}"' in shown.text, shown.text
    assert files(first.results) == before


def test_a_typo_gives_a_sentence_without_a_traceback(place: Path) -> None:
    said = call(Path("tiny"), place / "typo", sclae="smoke")
    assert said.code != 0
    assert "did you mean 'scale'?" in said.text and "Traceback" not in said.text
    assert not (place / "typo").exists()


# --- killed, then continued by two at once --------------------------------------------------------------------


@dataclass
class Killed:
    """A run that was killed, and the two that continued it at once."""

    results: Path
    outlived: list[str]
    before: dict[str, tuple[int, int]]
    trained: str
    both: list[Run]


def _states(results: Path) -> list[Path]:
    """The saved states of running jobs; ``glob`` overlooks a folder that vanishes, ``Path.glob`` does not."""
    return [Path(found) for found in glob.glob(str(results / "scratch/*/state-*"))]


@pytest.fixture(scope="module")
def killed(first: Run, place: Path) -> Killed:
    """Killed right after a state was saved; then two invocations at once on the same results."""
    results = place / "killed"
    words = runs.command(results, str(place / "toy.yaml"))
    environment = {"ASSAY_SAVE_EVERY_STEPS": "10"}
    started = runs.start(words, place / "killed.log", environment)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (states := _states(results)) and time.monotonic() < deadline:
        assert started.running(), started.text
        time.sleep(0.002)
    started.kill()
    time.sleep(0.3)
    outlived, before = [line for _, line in runs.members(started.process.pid)], stamps(results)
    pair = [runs.start(words, place / f"killed-{number}.log", environment) for number in (1, 2)]
    both = [Run(each.wait(LIMIT_SECONDS), each.text, results) for each in pair]
    return Killed(results, outlived, before, states[0].parent.name, both)


def test_killing_the_group_ends_every_process(killed: Killed) -> None:
    assert killed.outlived == []


def test_a_killed_job_goes_on_from_its_saved_state(killed: Killed) -> None:
    assert [run.code for run in killed.both] == [0, 0], killed.both[0].text + killed.both[1].text
    record = runs.records(killed.results)[killed.trained]
    assert 0 < record["resumed_from_step"] < 160
    assert record["attempts"] == 2 and len(record["energy_attempts"]) == 2
    assert record["energy"]["total_kwh"] > record["energy_attempts"][0]["total_kwh"] > 0


def test_a_killed_run_ends_with_the_rows_curves_and_models_of_an_undisturbed_one(
    first: Run, killed: Killed
) -> None:
    assert runs.differences(first.results, killed.results, "toy") == []


def test_of_two_invocations_at_once_each_job_is_done_by_one(first: Run, killed: Killed) -> None:
    after = runs.records(killed.results)
    assert set(after) == set(runs.records(first.results))
    # who would have done a job over would have counted another attempt, or have renewed its record
    assert {job_id: r["attempts"] for job_id, r in after.items() if r["attempts"] != 1} == {killed.trained: 2}
    now = stamps(killed.results)
    assert killed.before and {job_id: now[job_id] for job_id in killed.before} == killed.before
    assert not list(killed.results.glob("s*s/*.tmp-*"))


# --- extended, with a part that fails -------------------------------------------------------------------------


@dataclass
class Grown:
    """More chains, one of which fails, and one more score."""

    run: Run
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]
    plan: Plan
    methods: Path
    chains: dict[str, str]


@pytest.fixture(scope="module")
def grown(first: Run, place: Path) -> Grown:
    """The experiment with more in it, on the results of the first run."""
    methods = place / "methods"
    shutil.copytree(toy.METHODS, methods, ignore=shutil.ignore_patterns("__pycache__"))
    broken = {"broken": f'pruned > train.fragile(cure="{place / "cure"}")', "behind": "broken > train.scaled"}
    chains = CHAINS | MORE_CHAINS | broken
    experiment = toy.write(place / "toy.yaml", chains, EVALUATE | MORE_SCORES)
    before = stamps(first.results)
    run = call(experiment, first.results, methods=methods).remember("toy")
    built = toy.planned(experiment, first.results, methods)
    return Grown(run, before, stamps(first.results), built, methods, chains)


def test_a_failing_job_ends_the_run_with_an_error_and_keeps_the_others_going(grown: Grown) -> None:
    assert grown.run.code != 0
    assert "the toy is broken" in grown.run.text
    for chain in MORE_CHAINS:
        assert toy.job_of(grown.plan, chain) in grown.after, chain


def test_the_report_of_a_failing_run_says_what_failed_and_what_is_missing(grown: Grown) -> None:
    status = {(row["chain"], row["entry"]): row["status"] for row in grown.run.rows}
    assert status["broken", "energy"] == "failed" and status["broken", "size"] == "failed"
    assert status["behind", "energy"] == "failed" and status["behind", "text"] == "failed"
    assert status["healed", "size"] == status["target", "wider"] == "ok"
    assert not any(row["value"] for row in grown.run.rows if row["status"] != "ok")


def test_only_what_is_new_runs(grown: Grown) -> None:
    assert {job_id: grown.after[job_id] for job_id in grown.before} == grown.before
    wider = [shown.job.id for shown in grown.plan.shown if shown.entry == "wider"]
    made = set(grown.after) - set(grown.before)
    assert set(wider) < made
    stages = {toy.job_of(grown.plan, chain) for chain in MORE_CHAINS}
    assert {job_id for job_id in made if not job_id.startswith("evaluate.")} == stages
    assert len(made) == len(stages) * 3 + 1


# --- files, data and trajectories -----------------------------------------------------------------------------

PARTED = {
    "target": TRAIN,
    "sums": "target > curvature.measured",
    "rows": "data.noted",
    "moved": "target > unlearn.moved(sums=sums, rows=rows)",
    "direct": 'target > unlearn.grad_ascent(forget="authors/forget01", steps=12, batch=4, checkpoints=[4, 8])',
    "early": "direct@step4 > prune.magnitude(sparsity=0.5)",
}
WAYS = {"size": "size", "text": "{run: '" + EVALUATE["text"] + "', of: [direct@steps]}"}


@pytest.fixture(scope="module")
def parted(first: Run, place: Path) -> Run:
    """Stages that read the files and data of others, and a trajectory, on the results of the first run."""
    toy.write(place / "parted.yaml", PARTED, WAYS)
    return call(place / "parted.yaml", first.results, methods=toy.METHODS).remember("parted")


def test_files_and_data_go_from_stage_to_stage_and_are_not_scored(parted: Run) -> None:
    assert parted.code == 0, parted.text
    assert {row["status"] for row in parted.rows} == {"ok"}
    scored = {row["chain"] for row in parted.rows if row["entry"] == "size"}
    assert scored == {"target", "moved", "direct", "early"}
    assert {row["chain"] for row in parted.rows if row["entry"] == "energy"} == set(PARTED)


def test_a_trajectory_is_scored_from_its_start_to_its_end(parted: Run) -> None:
    rows = [row for row in parted.rows if row["entry"] == "text" and row["metric"] == "nll"]
    assert [(row["chain"], row["step"]) for row in rows] == [
        ("direct", ""), ("direct", "4"), ("direct", "8"), ("target", ""),
    ]  # fmt: skip
    assert len({row["value"] for row in rows}) == 4
    spent = {
        row["step"]: float(row["value"])
        for row in parted.rows
        if row["chain"] == "direct" and row["metric"] == "stage_seconds"
    }
    assert 0 < spent["4"] < spent["8"] < spent[""]


def test_at_smoke_scale_all_of_it_runs_too(place: Path, parted: Run) -> None:
    smoke = call(place / "parted.yaml", place / "small", methods=toy.METHODS, scale="smoke")
    assert parted.code == smoke.code == 0, smoke.text
    smoke.remember("parted_smoke")
    assert {row["status"] for row in smoke.rows} == {"ok"}
    rows = [row for row in smoke.rows if row["entry"] == "text" and row["metric"] == "nll"]
    assert [(row["chain"], row["step"]) for row in rows] == [("direct", ""), ("direct", "1"), ("target", "")]


# --- other code, kept for once --------------------------------------------------------------------------------


@dataclass
class Edited:
    """A method of the outside folder has other code; the old results are taken once more."""

    stale: Run
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def edited(grown: Grown, place: Path) -> Edited:
    """Edit the method, and ask for the tables with ``keep_stale``."""
    path = grown.methods / "train" / "scaled.py"
    path.write_text(path.read_text().replace("TIMES = 1.0", "TIMES = 0.5"))
    experiment = toy.write(place / "stale.yaml", CHAINS | MORE_CHAINS, EVALUATE)
    before = stamps(grown.run.results)
    run = call(experiment, grown.run.results, methods=grown.methods, keep_stale="true").remember("stale")
    return Edited(run, before, stamps(grown.run.results))


def test_stale_results_are_taken_where_asked_for_and_marked(edited: Edited) -> None:
    assert edited.stale.code == 0, edited.stale.text
    assert edited.after == edited.before
    assert {row["status"] for row in edited.stale.rows} == {"ok"}
    with open(edited.stale.results / "stale" / "jobs.csv", encoding="utf-8", newline="") as file:
        stale = {
            row["label"] for row in csv.DictReader(file) if row["stale"] == "True" and row["kind"] == "stage"
        }
    assert sorted(label.rpartition(" > ")[2] for label in stale) == [
        "prune.magnitude(sparsity=0.5)",
        "train.scaled",
    ]


# --- cured, with another default, without weights -------------------------------------------------------------


@dataclass
class Cured:
    """Weights were removed, a reader was added, a default was changed, and what failed can work now."""

    run: Run
    removed: list[Path]
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]
    old: Plan
    plan: Plan


@pytest.fixture(scope="module")
def cured(grown: Grown, edited: Edited, place: Path) -> Cured:
    """All of that in one run."""
    results = grown.run.results
    (place / "cure").touch()
    toy.write(place / "whole.yaml", CHAINS | {"healed": MORE_CHAINS["healed"]}, EVALUATE)
    models = set(results.glob("stages/*/model"))
    assert clean.main([str(place / "whole.yaml"), f"results={results}", "--yes"]) == 0
    removed = sorted(models - set(results.glob("stages/*/model")))
    path = grown.methods / "train" / "scaled.py"
    path.write_text(path.read_text().replace("] = 0.5", "] = 0.25"))
    chains = grown.chains | {"reader": "healed > prune.magnitude(sparsity=0.25)"}
    experiment = toy.write(place / "toy.yaml", chains, EVALUATE | MORE_SCORES)
    before = stamps(results)
    run = call(experiment, results, methods=grown.methods).remember("toy")
    return Cured(
        run, removed, before, stamps(results), grown.plan, toy.planned(experiment, results, grown.methods)
    )


def test_the_next_run_finishes_what_failed_once_the_cause_is_gone(cured: Cured) -> None:
    assert cured.run.code == 0, cured.run.text
    assert {row["status"] for row in cured.run.rows} == {"ok"}
    assert runs.records(cured.run.results)[toy.job_of(cured.plan, "broken")]["attempts"] == 2
    assert not list(cured.run.results.glob("failed/*"))


def test_another_default_gives_new_ids_to_the_method_and_its_descendants_only(cured: Cured) -> None:
    ids = {
        chain: (toy.job_of(cured.old, chain), toy.job_of(cured.plan, chain))
        for chain in cured.old.experiment.chains
    }
    changed = {chain for chain, (old, new) in ids.items() if old != new}
    assert changed == {"scaled", "scaled_pruned", "behind"}
    assert {
        cured.after[ids[chain][0]] == cured.before[ids[chain][0]] for chain in ("scaled", "scaled_pruned")
    } == {True}
    nonzero = {row["chain"]: row["model_id"] for row in cured.run.rows if row["metric"] == "nonzero"}
    assert nonzero["scaled"] == ids["scaled"][1]


def test_removed_weights_are_made_again_for_a_reader_with_the_same_bits(cured: Cured) -> None:
    assert len(cured.removed) == 4
    assert {job_id: cured.after[job_id] for job_id in cured.before} == cured.before
    records = runs.records(cured.run.results)
    for model in cured.removed:
        job_id = model.parent.name
        there = {entry["path"]: entry["bytes"] for entry in records[job_id]["files"]}
        assert all((model.parent / path).stat().st_size == size for path, size in there.items()), job_id


def test_a_command_shows_a_job_of_the_results(cured: Cured) -> None:
    words = [sys.executable, "-m", "workflows.show", "train.sft", f"--results={cured.run.results}"]
    shown = subprocess.run(words, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 2 and "is the beginning of several ids" in shown.stderr
    assert "Traceback" not in shown.stderr
