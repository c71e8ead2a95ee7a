"""The runner: what a single frozen job promises, checked in this process on a toy model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from methods.data import read_rows
from methods.find import catalogue, using
from methods.stage import AssayError
from tests.toy import experiments as toy
from workflows import clean, job, promises, runner, show
from workflows.account import Account
from workflows.plan import Plan
from workflows.record import ParentRef, Store, open_result, read_failure, read_record

TRAIN = 'base > train.sft(data="authors/forget01", steps=6, batch=4)'
CHAINS = {"target": TRAIN, "pruned": "target > prune.magnitude(sparsity=0.5)"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a new model, a trained one and a pruned one."""
    folder = tmp_path_factory.mktemp("runner")
    toy.run(toy.planned(toy.write(folder / "toy.yaml", CHAINS), folder / "results"))
    return folder / "results"


def with_chain(tmp_path: Path, results: Path, text: str) -> tuple[Plan, str]:
    """The plan with one more chain, and the id of its result."""
    built = toy.planned(toy.write(tmp_path / "toy.yaml", CHAINS | {"odd": text}), results)
    return built, toy.job_of(built, "odd")


def refused(tmp_path: Path, results: Path, text: str) -> tuple[str, str]:
    """Run a chain that must fail; the sentence and the reason it leaves. Nothing else may be left."""
    built, job_id = with_chain(tmp_path, results, text)
    with pytest.raises(AssayError) as caught:
        toy.run(built, [job_id])
    assert not built.store.result(job_id).exists()
    assert not list((results / "stages").glob("*.tmp-*"))
    assert not list((results / "claims").glob("*.json"))
    return str(caught.value), read_failure(built.store.failure(job_id)).reason


# --- records ------------------------------------------------------------------------------------------------------


def test_a_record_says_what_ran_where_and_at_what_cost(results: Path) -> None:
    found = next(r for r in map(read_record, results.glob("stages/train.sft-*/record.json")))
    assert found.attempts == 1 and found.resumed_from_step == 0 and found.seed == 0
    assert found.notes["steps"] == 6 and found.notes["tokens_seen"] > 0
    assert found.seconds_inside > 0 and found.seconds_outside > 0
    assert found.energy["total_kwh"] > 0 and found.energy["label"] == "estimated"
    assert found.auto_class == "AutoModelForCausalLM" and found.threads == 1
    assert {"python", "torch", "transformers"} <= set(found.versions)
    assert {"model/model.safetensors", "curve.csv"} <= {entry.path for entry in found.files}
    assert not (results / "scratch" / found.id).exists()


def test_a_job_returns_at_once_where_its_record_is_there(results: Path, tmp_path: Path) -> None:
    path = next(results.glob("stages/train.sft-*/record.json"))
    before, receipt = path.stat(), tmp_path / "receipts" / "run" / path.parent.name
    begun = time.monotonic()
    runner.run(path.parent.name, results, receipt)
    assert time.monotonic() - begun < 1
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert receipt.is_file()


def test_the_page_on_a_job_shows_its_record_its_failure_or_its_plan(results: Path, tmp_path: Path) -> None:
    store = Store(results)
    built, job_id = with_chain(tmp_path, results, 'target > train.misbehaves(way="memory")')
    assert "planned, not run" in show.describe(store, job_id)
    with pytest.raises(AssayError, match="out of memory"):
        toy.run(built, [job_id])
    assert "out of memory" in show.describe(store, job_id)
    finished = toy.job_of(built, "pruned")
    assert "0.5" in show.describe(store, finished[:18]) and "energy" in show.describe(store, finished)
    with pytest.raises(AssayError, match="has no job"):
        show.describe(store, "prune.magnitudes")


@pytest.mark.parametrize("text", ["", "{", '{"id": "x"}', "[]"])
def test_a_broken_record_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(AssayError, match=r"record\.json is no record of this version: "):
        read_record(tmp_path / "record.json")


def test_a_missing_job_file_is_a_sentence_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(["train.sft-000000000000", f"--results={tmp_path}"]) == 2
    assert "there is no such job file" in capsys.readouterr().err
    assert job.main(["../../etc/passwd", f"--results={tmp_path}"]) == 2
    assert "is no id of a job" in capsys.readouterr().err


def test_a_result_is_waited_for_until_its_files_are_there(results: Path, tmp_path: Path) -> None:
    job_id = next(results.glob("stages/train.sft-*")).name
    copy = Store(tmp_path / "copy")
    shutil.copytree(results / "stages" / job_id, copy.result(job_id))
    late = copy.result(job_id) / "model" / "config.json"
    text = late.read_text()
    late.unlink()
    writer = threading.Timer(0.5, lambda: late.write_text(text))
    writer.start()
    assert open_result(copy, job_id, patience_seconds=10).id == job_id
    late.write_text(text[:-1])
    with pytest.raises(
        AssayError, match=r"not complete after 0 s: model/config\.json has .* bytes and should"
    ):
        open_result(copy, job_id, patience_seconds=0.1)
    late.unlink()
    with pytest.raises(AssayError, match=r"model/config\.json is missing"):
        open_result(copy, job_id, patience_seconds=0.1)
    late.write_text(text)
    # what lies beside the folders belongs to each of them: an evaluation of the model reads its curve
    (copy.result(job_id) / "curve.csv").unlink()
    with pytest.raises(AssayError, match=r"curve\.csv is missing"):
        open_result(copy, job_id, "model", patience_seconds=0.1)
    with pytest.raises(AssayError, match=r"there is no record\.json"):
        open_result(copy, "train.sft-000000000000", patience_seconds=0.1)


# --- promises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "reason", "sentence"),
    [
        ("nothing", "error", "wrote no model/, which its RESULT promises"),
        ("more", "error", "wrote files/, which its RESULT does not name"),
        ("not_finite", "not finite", "a weight that is not finite"),
        ("fills_zeros", "error", r"filled \d+ zeros of model\..*keep_zeros=False"),
        ("pickle", "error", r"pytorch_model\.bin is a pickle"),
        ("truncated", "error", "holds no model that can be loaded|is no whole safetensors file"),
        ("other_words", "error", r"changed tokenizer_config\.json"),
        ("memory", "out of memory", "the toy is too big"),
        ("time", "timeout", "the toy is too slow"),
    ],
)
def test_a_broken_promise_is_refused_with_its_reason(
    results: Path, tmp_path: Path, way: str, reason: str, sentence: str
) -> None:
    said, left = refused(tmp_path, results, f'pruned > train.misbehaves(way="{way}")')
    assert left == reason
    assert re.search(sentence, said), said


def test_zeros_may_be_filled_where_that_is_asked_for(results: Path, tmp_path: Path) -> None:
    built, job_id = with_chain(
        tmp_path, results, 'pruned > train.misbehaves(way="fills_zeros", keep_zeros=False)'
    )
    toy.run(built, [job_id])
    assert toy.record(results, job_id).kind == "stage"


def test_a_loss_that_is_no_number_leaves_no_model_and_says_at_which_step(
    results: Path, tmp_path: Path
) -> None:
    said, reason = refused(tmp_path, results, "target > train.diverges(steps=6, batch=4)")
    assert reason == "not finite"
    assert "step 2" in said and "train" in said


def test_a_failure_keeps_its_traceback_and_what_it_cost_and_is_gone_after_success(
    results: Path, tmp_path: Path
) -> None:
    cure = tmp_path / "cure"
    text = f'target > train.fragile(cure="{cure}")'
    said, reason = refused(tmp_path, results, text)
    assert reason == "error" and "the toy is broken" in said
    built, job_id = with_chain(tmp_path, results, text)
    failure = read_failure(built.store.failure(job_id))
    assert "fragile.py" in failure.traceback and failure.energy["total_kwh"] > 0 and failure.attempts == 1
    cure.touch()
    toy.run(built, [job_id])
    assert toy.record(results, job_id).attempts == 2
    assert toy.record(results, job_id).energy["total_kwh"] > failure.energy["total_kwh"]
    assert not built.store.failure(job_id).exists()


def test_code_that_changed_since_it_was_planned_is_refused(results: Path, tmp_path: Path) -> None:
    methods = tmp_path / "edited"
    shutil.copytree(toy.METHODS, methods, ignore=shutil.ignore_patterns("__pycache__"))
    experiment = toy.write(tmp_path / "toy.yaml", CHAINS | {"odd": "target > train.scaled"})
    built = toy.planned(experiment, results, methods)
    path = methods / "train" / "scaled.py"
    path.write_text(path.read_text().replace("TIMES = 1.0", "TIMES = 2.0"))
    with pytest.raises(AssayError, match=r"train\.scaled changed since this job was planned"):
        toy.run(built, [toy.job_of(built, "odd")])


def test_a_parent_that_is_gone_is_a_sentence(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, job_id = with_chain(tmp_path, results, "target > prune.magnitude(sparsity=0.125)")
    monkeypatch.setattr(
        runner, "open_result", lambda store, name, part: open_result(store, name, part, patience_seconds=0.1)
    )
    aside = tmp_path / "aside"
    os.rename(results / "stages" / toy.job_of(built, "target"), aside)
    try:
        with pytest.raises(AssayError, match=r"is not complete after 0 s: there is no record\.json"):
            toy.run(built, [job_id])
    finally:
        os.rename(aside, results / "stages" / toy.job_of(built, "target"))


def test_secrets_are_dropped_from_a_jobs_environment(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = (
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "my_password",
        "SOME_API_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
    )
    for name in secret:
        monkeypatch.setenv(name, "do not show")
    monkeypatch.setenv("HARMLESS", "1")
    built, job_id = with_chain(tmp_path, results, "target > train.surroundings")
    toy.run(built, [job_id])
    folder = results / "stages" / job_id
    names = json.loads((folder / "files" / "environment.json").read_text())
    assert "HARMLESS" in names and not set(secret) & set(names)
    written = [path for path in (results / "jobs", folder) for path in path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"do not show" in path.read_bytes()]


def test_a_component_from_an_outside_folder_is_found_while_the_job_runs(
    results: Path, tmp_path: Path
) -> None:
    built, job_id = with_chain(
        tmp_path, results, 'target > train.sft(data="authors/forget01", steps=2, batch=4, optimizer=plain())'
    )
    toy.run(built, [job_id])
    assert toy.record(results, job_id).config["optimizer"]["options"] == {"learning_rate": 0.1}
    assert "optimizer.plain" not in catalogue().components


def test_a_method_that_its_family_runs_has_the_familys_revision_in_its_id(
    results: Path, tmp_path: Path
) -> None:
    built, job_id = with_chain(tmp_path, results, "target > train.diverges(steps=6, batch=4)")
    assert "methods.train" in built.jobs[job_id].code
    built, job_id = with_chain(tmp_path, results, "target > train.scaled")
    assert "methods.train" not in built.jobs[job_id].code


# --- attempts -------------------------------------------------------------------------------------------------------


def test_a_job_that_is_asked_to_stop_saves_its_state_and_goes_on_from_there(
    results: Path, tmp_path: Path
) -> None:
    text = "target > train.slow(steps={}, seconds={})"
    built, job_id = with_chain(tmp_path, results, text.format(40, 0.05))
    command = [sys.executable, "-m", "workflows.job", job_id, f"--results={results}"]
    environment = os.environ | {"ASSAY_SAVE_EVERY_STEPS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not list(results.glob(f"scratch/{job_id}/state-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert said.strip().splitlines()[-1].endswith("its state is saved and the next run goes on from there.")
    assert not built.store.failure(job_id).exists() and not built.store.result(job_id).exists()
    # the seconds are no part of what is computed: the rest may be done quickly
    again, same = with_chain(tmp_path, results, text.format(40, 0.0))
    assert same == job_id
    toy.run(again, [job_id])
    found = toy.record(results, job_id)
    assert found.attempts == 2 and 0 < found.resumed_from_step < 40
    assert len(found.energy_attempts) == 2
    first = found.energy_attempts[0]
    assert found.energy["total_kwh"] > first["total_kwh"] > 0
    spent = found.notes["spent_at_step"]["40"]
    assert first["total_kwh"] < spent["kwh"] <= found.energy["total_kwh"]
    assert first["seconds"] < spent["seconds"] <= found.seconds_inside < found.energy["seconds"] + 0.1
    fresh = toy.planned(tmp_path / "toy.yaml", tmp_path / "fresh")
    shutil.copytree(results / "stages", tmp_path / "fresh" / "stages", ignore=lambda *_: [job_id])
    toy.run(fresh, [job_id])
    assert toy.record(tmp_path / "fresh", job_id).files == found.files


def test_what_a_killed_attempt_left_is_removed_by_the_next(results: Path, tmp_path: Path) -> None:
    built, job_id = with_chain(tmp_path, results, "target > prune.magnitude(sparsity=0.375)")
    left = results / "stages" / f"{job_id}.tmp-0123abcd"
    (left / "model").mkdir(parents=True)
    (left / "model" / "model.safetensors").write_bytes(b"half")
    toy.run(built, [job_id])
    assert not list((results / "stages").glob("*.tmp-*"))
    assert built.store.record(job_id).is_file()


def test_of_two_results_of_one_job_the_first_stays(results: Path, tmp_path: Path) -> None:
    built, job_id = with_chain(tmp_path, results, "target > prune.magnitude(sparsity=0.625)")
    done = runner._done
    calls: list[bool] = []

    def done_by_another(store: Store, asked: Any) -> bool:
        """Between the second look and the work another process publishes the same job."""
        calls.append(done(store, asked))
        if len(calls) == 2:
            toy.run(built, [job_id])
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Claim", _NoClaim)
        patch.setattr(runner, "_done", done_by_another)
        toy.run(built, [job_id])
    assert calls[:2] == [False, False]
    assert not list((results / "stages").glob("*.tmp-*"))


class _NoClaim:
    """Claims that hold nobody off, as on a file system without locks."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(results: Path, tmp_path: Path) -> Path:
    """A copy of the results folder that a test may spoil."""
    shutil.copytree(results, tmp_path / "own")
    return tmp_path / "own"


def test_weights_that_were_removed_come_back_bit_by_bit_to_the_same_record(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = toy.write(tmp_path / "toy.yaml", CHAINS)
    built = toy.planned(experiment, own)
    models = [built.store.result(job_id) / "model" for job_id in built.jobs]
    words = [str(experiment), f"results={own}", f"methods={toy.METHODS}"]
    assert clean.main(words) == 0
    assert "would remove" in capsys.readouterr().out and all(model.is_dir() for model in models)
    assert clean.main([*words, "--yes"]) == 0
    assert not any(model.exists() for model in models)
    built = toy.planned(experiment, own)
    assert not built.missing
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in own.glob("stages/*/record.json")}
    reading = toy.planned(
        toy.write(experiment, CHAINS | {"odd": "pruned > prune.magnitude(sparsity=0.75)"}), own
    )
    assert [reading.jobs[i].method for i in reading.missing] == [
        "model.new", "train.sft", "prune.magnitude", "prune.magnitude",
    ]  # fmt: skip
    toy.run(reading)
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in before} == before
    for job_id in reading.jobs:
        open_result(reading.store, job_id, patience_seconds=0)
        assert promises.files_of(reading.store.result(job_id)) == toy.record(own, job_id).files


def test_weights_that_come_out_different_are_not_put_back(own: Path, tmp_path: Path) -> None:
    built = toy.planned(toy.write(tmp_path / "toy.yaml", CHAINS), own)
    job_id = toy.job_of(built, "pruned")
    path = built.store.record(job_id)
    shutil.rmtree(path.parent / "model")
    found = json.loads(path.read_text())
    for entry in found["files"]:
        entry["sha256"] = "0" * 64
    path.write_text(json.dumps(found))
    with pytest.raises(AssayError, match="came out different from what"):
        toy.run(built, [job_id])
    assert not (path.parent / "model").exists()


def test_a_step_asked_for_later_is_kept_without_touching_the_record(own: Path, tmp_path: Path) -> None:
    store = toy.planned(toy.write(tmp_path / "toy.yaml", CHAINS), own).store
    target = CHAINS["target"].rstrip()
    later = CHAINS | {
        "target": f"{target[:-1]}, checkpoints=[2])",
        "early": "target@step2 > prune.magnitude(sparsity=0.5)",
    }
    built = toy.planned(toy.write(tmp_path / "toy.yaml", later), own)
    job_id = toy.job_of(built, "target")
    record = store.record(job_id)
    before = (record.stat().st_ino, record.read_bytes())
    assert store.spent_at_step(read_record(record)) == {}
    assert job_id in built.missing and not (record.parent / "model@2").exists()
    toy.run(built)
    assert (record.parent / "model@2" / "model.safetensors").is_file()
    assert (record.stat().st_ino, record.read_bytes()) == before
    spent = store.spent_at_step(read_record(record))
    assert set(spent) == {"2"} and spent["2"]["kwh"] > 0 and spent["2"]["seconds"] > 0
    assert not toy.planned(tmp_path / "toy.yaml", own).missing


def test_a_model_of_an_earlier_step_is_a_parent_of_its_own(results: Path) -> None:
    store = Store(results)
    assert store.parent_folder(ParentRef(id="train.sft-000000000000", step=4)).name == "model@4"
    assert store.parent_folder(ParentRef(id="train.sft-000000000000", kind="files")).name == "files"
    assert store.parent_folder(ParentRef(id="x", path="/somewhere")) == Path("/somewhere")


# --- several parts --------------------------------------------------------------------------------------------------

PARTS = CHAINS | {
    "sums": "target > curvature.measured",
    "rows": 'data.noted(data="authors/forget01[0:3]")',
    "seen": "pruned > data.noted",
    "moved": "target > unlearn.moved(sums=sums, rows=seen)",
}


@pytest.fixture(scope="module")
def parted(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A stage of model and files that has read another's files and a third one's data."""
    folder = tmp_path_factory.mktemp("parts")
    shutil.copytree(results, folder / "results")
    built = toy.planned(toy.write(folder / "toy.yaml", PARTS), folder / "results")
    toy.run(built)
    return built


def test_a_stage_gets_the_files_and_data_of_others(parted: Plan) -> None:
    folders = {chain: parted.store.result(toy.job_of(parted, chain)) for chain in PARTS}
    rows = {chain: read_rows(folders[chain] / "data") for chain in ("rows", "seen")}
    assert [row["weights"] for row in rows["rows"]] == [0, 0, 0]
    assert all(row["weights"] > 1000 for row in rows["seen"])
    sums = json.loads((folders["sums"] / "files" / "sums.json").read_text())
    moved = json.loads((folders["moved"] / "files" / "moved.json").read_text())
    assert moved["far"] == 0.001 * (1 + sums["model.norm.weight"] + 3)
    found = toy.record(parted.store.root, folders["moved"].name)
    assert {entry.path.partition("/")[0] for entry in found.files} == {"model", "files"}
    assert found.auto_class and not toy.record(parted.store.root, folders["sums"].name).auto_class
    assert "sums=curvature.measured-" in (page := show.describe(parted.store, found.id)) and "/files" in page
    assert not toy.planned(parted.store.root.parent / "toy.yaml", parted.store.root).missing


def test_cleaning_takes_models_only_and_each_part_is_done_by_itself(
    parted: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(parted.store.root, tmp_path / "own")
    experiment, own = toy.write(tmp_path / "toy.yaml", PARTS), tmp_path / "own"
    words = [str(experiment), f"results={own}", f"methods={toy.METHODS}", "--yes"]
    assert clean.main(words) == 0 and "4 folders" in capsys.readouterr().out
    store, moved = Store(own), toy.job_of(parted, "moved")
    folders = [store.result(toy.job_of(parted, chain)) for chain in PARTS]
    kept = {path: path.stat().st_ino for folder in folders for path in folder.glob("*/*.json*")}
    assert sorted({path.parent.name for path in kept}) == ["data", "files"] and len(kept) == 4
    assert not store.is_whole(moved) and store.is_whole(toy.job_of(parted, "sums"))
    # a reader of the files alone takes what is there; open_result does not wait for the model
    open_result(store, moved, "files", patience_seconds=0)
    with pytest.raises(AssayError, match="is missing"):
        open_result(store, moved, patience_seconds=0)
    reading = toy.planned(toy.write(experiment, PARTS | {"more": "moved > unlearn.moved"}), own)
    # its own model is wanted; what it is made from are the target's model and the files and data that stayed
    assert [job.method for job in reading.missing.values()] == [
        "model.new", "train.sft", "unlearn.moved", "unlearn.moved",
    ]  # fmt: skip
    assert clean.removable(reading) == []
    toy.run(reading)
    assert store.is_whole(moved)
    assert {path: path.stat().st_ino for path in kept} == kept


def test_files_that_come_out_different_are_not_put_beside_the_old_ones(parted: Plan, tmp_path: Path) -> None:
    shutil.copytree(parted.store.root, tmp_path / "own")
    built = toy.planned(toy.write(tmp_path / "toy.yaml", PARTS), tmp_path / "own")
    job_id = toy.job_of(built, "moved")
    path = built.store.record(job_id)
    shutil.rmtree(path.parent / "model")
    found = json.loads(path.read_text())
    for entry in found["files"]:
        if entry["path"].startswith("files/"):
            entry["sha256"] = "0" * 64
    path.write_text(json.dumps(found))
    with pytest.raises(AssayError, match=r"files/moved\.json came out different from what"):
        toy.run(built, [job_id])


@pytest.mark.parametrize(
    ("chain", "name", "sentence"),
    [
        ("sums", "files/weights.pt", r"curvature\.measured wrote a pickle, files/weights\.pt"),
        ("sums", "files/elsewhere", r"wrote a link, files/elsewhere"),
        ("seen", "data/rows.jsonl", r"holds no rows of a data stage"),
    ],
)
def test_files_and_data_are_of_kinds_that_can_be_read_safely(
    parted: Plan, tmp_path: Path, chain: str, name: str, sentence: str
) -> None:
    job_id = toy.job_of(parted, chain)
    shutil.copytree(parted.store.result(job_id), tmp_path / "result")
    spoilt = tmp_path / "result" / name
    if name.endswith("elsewhere"):
        spoilt.symlink_to("/etc/hostname")
    else:
        spoilt.write_text("{")
    with using((toy.METHODS,)), pytest.raises(AssayError, match=sentence):
        promises.check(parted.store, parted.jobs[job_id], tmp_path / "result")


# --- what it has spent ----------------------------------------------------------------------------------------------


def test_what_a_kept_step_had_cost_is_noted_while_the_job_runs(results: Path, tmp_path: Path) -> None:
    text = TRAIN.replace("batch=4", "batch=8, checkpoints=[2, 5]")
    built, job_id = with_chain(tmp_path, results, text)
    toy.run(built, [job_id])
    found = toy.record(results, job_id)
    early, late = (found.notes["spent_at_step"][step] for step in ("2", "5"))
    assert 0 < early["kwh"] <= late["kwh"] <= found.energy["total_kwh"]
    assert 0 < early["seconds"] < late["seconds"] < found.seconds_inside


class _Meter:
    """A meter that cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def running(self) -> dict[str, Any]:
        raise self.error


@pytest.mark.parametrize("error", [KeyError("energy"), OSError("no counter"), AssayError("no counter")])
def test_energy_that_cannot_be_read_is_a_sentence_for_the_method(tmp_path: Path, error: Exception) -> None:
    account = Account(tmp_path, "FRA")
    account.meter = _Meter(error)
    with pytest.raises(AssayError, match=r"cannot be read: 'energy'|no counter"):
        account.spent()


# --- scores ---------------------------------------------------------------------------------------------------------


EVALUATE = {
    "draws": "draws",
    "spoils": "spoils",
    "more": "draws(number=1)",
    "size": "size",
    "text": 'perplexity(data="authors/text_holdout", context_tokens=32, limit=2)',
}


@pytest.fixture(scope="module")
def batched(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """All scores of the pruned model, made by one leader."""
    folder = tmp_path_factory.mktemp("batch")
    evaluate = {name: f"{{run: '{text}', of: [pruned]}}" for name, text in EVALUATE.items()}
    built = toy.planned(toy.write(folder / "toy.yaml", CHAINS, evaluate), results)
    leader, ids = next(iter(built.batches.items()))
    assert len(ids) == len(EVALUATE)
    receipts = results / "receipts" / "one"
    receipts.mkdir(parents=True)
    (receipts / "batches.json").write_text(json.dumps(built.batches))
    runner.run(leader, results, receipts / leader)
    return built


def test_a_leader_runs_every_score_of_its_model_each_with_its_record(batched: Plan, results: Path) -> None:
    methods = [toy.record(results, shown.job.id).method for shown in batched.shown]
    assert methods == ["draws", "spoils", "draws", "size", "perplexity"]
    assert all(toy.record(results, shown.job.id).energy["total_kwh"] > 0 for shown in batched.shown)


def test_a_batch_and_a_lone_score_agree_bit_for_bit(batched: Plan, results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "stages", tmp_path / "alone" / "stages")
    shutil.copytree(results / "jobs", tmp_path / "alone" / "jobs")
    # backwards, so that no score has the same one before it
    for shown in reversed(batched.shown):
        runner.run(shown.job.id, tmp_path / "alone", None)
        alone, together = (toy.record(folder, shown.job.id).rows for folder in (tmp_path / "alone", results))
        assert alone == together, shown.entry


def test_a_score_that_changes_weights_disturbs_no_other(batched: Plan, results: Path) -> None:
    rows = {shown.entry: toy.record(results, shown.job.id).rows for shown in batched.shown}
    spoilt = next(row.value for row in rows["spoils"] if row.metric == "nonzero_before")
    assert spoilt == next(row.value for row in rows["size"] if row.metric == "nonzero") > 0
    assert rows["draws"] == rows["more"]


def test_a_number_that_is_none_has_no_value(batched: Plan, results: Path) -> None:
    spoilt = next(shown.job.id for shown in batched.shown if shown.entry == "spoils")
    assert [row.value for row in toy.record(results, spoilt).rows if row.metric == "not_a_number"] == [None]


def test_one_failing_score_does_not_take_the_others_of_its_model_along(
    batched: Plan, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(own / "scores")
    (leader, ids), failing = next(iter(batched.batches.items())), "text"
    broken = next(shown.job for shown in batched.shown if shown.entry == failing)
    module = __import__("evaluations.perplexity", fromlist=["evaluate"])
    monkeypatch.setattr(module, "evaluate", lambda scoring: 1 / 0)
    with pytest.raises(AssayError, match="1 of 5 scores failed"):
        runner.run(leader, own, own / "receipts" / "one" / leader)
    store = Store(own)
    assert [i for i in ids if not store.record(i).is_file()] == [broken.id]
    assert "division by zero" in read_failure(store.failure(broken.id)).message


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk needs the right to mount one")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("left_kilobytes", [0, 8, 32])
def test_a_full_disk_loses_nothing_and_the_job_completes_once_there_is_room(
    results: Path, tmp_path: Path, small_disk: Path, left_kilobytes: int
) -> None:
    shutil.copytree(results / "stages", small_disk / "stages")
    experiment = toy.write(tmp_path / "toy.yaml", CHAINS | {"odd": TRAIN.replace("base", "pruned")})
    built = toy.planned(experiment, small_disk)
    job_id = toy.job_of(built, "odd")
    before = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    filler = small_disk / "filler"
    _fill(filler, small_disk, left_kilobytes)
    with pytest.raises(AssayError, match="No space left on device"):
        toy.run(built, [job_id])
    assert {path: path.read_bytes() for path in before} == before
    assert not built.store.result(job_id).exists()
    filler.unlink()
    toy.run(built, [job_id])
    assert toy.record(small_disk, job_id).kind == "stage"
    assert not list(small_disk.glob("stages/*.tmp-*")) and not list(small_disk.glob("claims/*.json"))


def _fill(path: Path, disk: Path, left_kilobytes: int) -> None:
    free = os.statvfs(disk)
    wanted = free.f_bavail * free.f_frsize - left_kilobytes * 1024
    with open(path, "wb") as file:
        file.write(b"\0" * max(wanted, 0))
