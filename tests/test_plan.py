"""The planner: what is a job, what its id depends on, and what is still to run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workflows import code, plan
from workflows.plan import Plan
from workflows.record import Store, canonical, digest, read_job, write_atomic

BASE = "base: {new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16}"
TRAIN = 'base > train.sft(data="authors/forget01", steps=2, batch=4)'


def make(
    folder: Path, chains: dict[str, str], evaluate: str = "", seeds: str = "[0, 1]", **config: Any
) -> Plan:
    lines = "\n".join(f"  {name}: '{text}'" for name, text in chains.items())
    evaluations = f"evaluate:\n{evaluate}\n" if evaluate else ""
    path = folder / "toy.yaml"
    path.write_text(
        f"title: t\ncountry: FRA\nseeds: {seeds}\nmodels:\n  {BASE}\nchains:\n{lines}\n{evaluations}"
    )
    return plan.load({"experiment": str(path), "results": str(folder / "results"), **config})


def ids(built: Plan, method: str) -> list[str]:
    return [job.id for job in built.jobs.values() if job.method == method]


def test_a_shared_prefix_is_one_job(tmp_path: Path) -> None:
    built = make(
        tmp_path,
        {"target": TRAIN, "half": "target > prune.magnitude(sparsity=0.5)", "whole": TRAIN},
        seeds="[0]",
    )
    assert len(ids(built, "train.sft")) == 1
    assert len(built.jobs) == 3


def test_a_method_without_randomness_has_one_result_whatever_the_seeds(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    path = tmp_path / "toy.yaml"
    path.write_text(
        f"title: t\ncountry: FRA\nseeds: [0, 1, 2]\nmodels:\n  base: {{path: {tmp_path / 'model'}}}\n"
        "chains:\n  half: base > prune.magnitude(sparsity=0.5)\n"
    )
    built = plan.load({"experiment": str(path), "results": str(tmp_path / "results")})
    assert len(built.points) == 1
    assert built.points[0].shown_seed is None


def test_a_family_has_a_member_for_each_element_and_a_descendant_follows_its_own(tmp_path: Path) -> None:
    built = make(
        tmp_path,
        {
            "target": TRAIN,
            "pruned": "target > prune.magnitude(sparsity={0.25, 0.5})",
            "healed": "pruned > distill.forward_kl(teacher=pruned, steps=2, batch=4)",
        },
        seeds="[0]",
    )
    healed = [point for point in built.points if point.chain.startswith("healed")]
    assert [point.chain for point in healed] == ["healed[sparsity=0.25]", "healed[sparsity=0.5]"]
    for point in healed:
        assert point.job is not None
        assert point.job.parents["teacher"] == point.job.parents["model"]


def test_a_reference_means_the_same_seed_unless_it_is_pinned(tmp_path: Path) -> None:
    chains = {
        "target": TRAIN,
        "same": "target > distill.forward_kl(teacher=target, steps=2, batch=4)",
        "zero": "target > distill.forward_kl(teacher=target@0, steps=2, batch=4)",
    }
    built = make(tmp_path, chains)
    by_seed = {(p.chain, p.seed): p for p in built.points}
    for seed in (0, 1):
        job, zero = by_seed["same", seed].job, by_seed["zero", seed].job
        assert job is not None and zero is not None
        assert job.parents["teacher"].id == by_seed["target", seed].parent.id
        assert zero.parents["teacher"].id == by_seed["target", 0].parent.id


def test_options_that_say_how_do_not_enter_the_id(tmp_path: Path) -> None:
    one = make(tmp_path, {"target": TRAIN})
    two = make(tmp_path, {"target": TRAIN.replace("batch=4", "batch=4, micro_batch=2, save_seconds=1.0")})
    three = make(tmp_path, {"target": TRAIN.replace("batch=4", "batch=2")})
    assert ids(one, "train.sft") == ids(two, "train.sft")
    assert ids(one, "train.sft") != ids(three, "train.sft")


def test_a_default_written_out_is_the_same_job_with_the_same_label(tmp_path: Path) -> None:
    plain = make(tmp_path, {"half": "base > prune.magnitude(sparsity=0.5)"})
    written = make(tmp_path, {"half": 'base > prune.magnitude(structure="weights", sparsity=0.5)'})
    assert list(plain.jobs) == list(written.jobs)
    assert plain.points[0].label == written.points[0].label == "base > prune.magnitude(sparsity=0.5)"


def test_the_data_folder_and_the_results_folder_do_not_enter_the_id(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    one = make(tmp_path, {"target": TRAIN})
    two = make(tmp_path, {"target": TRAIN}, data=str(tmp_path / "data"))
    assert list(one.jobs) == list(two.jobs)


def test_the_content_of_a_data_set_enters_the_id(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    found = []
    for answer in ("a", "b"):
        (folder / "rows.jsonl").write_text(json.dumps({"question": "q", "answer": answer}) + "\n")
        built = make(
            tmp_path, {"t": 'base > train.sft(data="mine/rows", steps=2)'}, data=str(tmp_path / "data")
        )
        found.append(ids(built, "train.sft"))
    assert found[0] != found[1]


def test_finished_jobs_are_not_missing_and_a_remade_parent_is_wanted_only_by_a_reader(tmp_path: Path) -> None:
    chains = {"target": TRAIN, "half": "target > prune.magnitude(sparsity=0.5)"}
    built = make(tmp_path, chains, "  size: size", seeds="[0]")
    store = Store(tmp_path / "results")
    for job in built.jobs.values():
        if job.kind == "stage":
            (store.result(job.id)).mkdir(parents=True)
            (store.result(job.id) / "record.json").write_text("{}")
    again = make(tmp_path, chains, "  size: size", seeds="[0]")
    # the scores are missing and need weights, which are gone: both stages have to be made again, and their base
    assert {job.kind for job in again.missing.values()} == {"stage", "score"}
    assert len(again.missing) == 5
    for job in built.jobs.values():
        if job.kind == "stage":
            (store.result(job.id) / "model").mkdir()
    third = make(tmp_path, chains, "  size: size", seeds="[0]")
    assert {job.kind for job in third.missing.values()} == {"score"}


def test_one_process_scores_one_model_and_speed_runs_alone(tmp_path: Path) -> None:
    built = make(tmp_path, {"target": TRAIN}, "  size: size\n  speed: speed\n  again: size", seeds="[0]")
    sizes = sorted(len(members) for members in built.batches.values())
    assert sizes == [1, 1]
    assert len([job for job in built.jobs.values() if job.kind == "score"]) == 2


def test_a_job_file_is_frozen_once_and_reads_back(tmp_path: Path) -> None:
    built = make(tmp_path, {"target": TRAIN}, seeds="[0]")
    built.freeze()
    for job_id, job in built.jobs.items():
        assert read_job(built.store.job(job_id)) == job
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "jobs").iterdir()}
    built.freeze()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "jobs").iterdir()} == before


def test_comments_docstrings_annotations_and_claims_do_not_change_the_code_digest(tmp_path: Path) -> None:
    first = tmp_path / "first.py"
    first.write_text('"""A."""\nCLAIMS = (1,)\ndef loss(x: int) -> int:\n    """B."""\n    return x + 1\n')
    second = tmp_path / "second.py"
    second.write_text('"""C."""\n# why\nCLAIMS = (2,)\n\n\ndef loss(x):\n    return (x + 1)\n')
    third = tmp_path / "third.py"
    third.write_text("def loss(x):\n    return x + 2\n")
    digests = [code.file_digest(path, 0) for path in (first, second, third)]
    assert digests[0] == digests[1] != digests[2]


def test_canonical_json_has_one_spelling() -> None:
    assert canonical({"b": 1.0, "a": [True, None]}) == '{"a":[true,null],"b":1.0}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_the_first_writer_of_a_file_wins(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", "first", keep_existing=True)
    write_atomic(tmp_path / "x", "second", keep_existing=True)
    assert (tmp_path / "x").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_planning_does_not_import_torch() -> None:
    program = (
        "import sys; from workflows import plan; plan.load({'experiment': 'tiny'}); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("experiment", ["tiny", "tofu_llama_1b", "wikitext_llama_8b"])
def test_a_shipped_experiment_plans(experiment: str, tmp_path: Path) -> None:
    built = plan.load({"experiment": experiment, "results": str(tmp_path), "scale": "smoke"})
    assert built.missing and built.targets()
    full = plan.load({"experiment": experiment, "results": str(tmp_path)})
    shared = set(full.jobs) & set(built.jobs)
    assert {full.jobs[job_id].method for job_id in shared} <= {"model.new"}
