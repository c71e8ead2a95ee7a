"""The planner: what is a job, what its id depends on, and what is still to run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from methods.data import Locator
from methods.find import catalogue
from methods.stage import AssayError
from tests.toy import experiments as toy
from workflows import code, plan
from workflows.experiment import Evaluation
from workflows.parts import tasks_of
from workflows.plan import Plan, Point
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


def test_a_component_for_another_task_is_refused_while_planning(tmp_path: Path) -> None:
    with pytest.raises(AssayError, match=r"loss\.anyloss works on classifiers; base is a language model"):
        make(tmp_path, {"target": TRAIN.replace("batch=4", "batch=4, loss=anyloss()")})


def test_options_of_a_component_that_say_how_do_not_enter_the_id_either(tmp_path: Path) -> None:
    blocks = 'cut_cross_entropy(implementation="blockwise")'
    one, two = (
        make(tmp_path, {"target": TRAIN.replace("batch=4", f"batch=4, loss={loss}")})
        for loss in ("cut_cross_entropy()", blocks)
    )
    assert one.jobs.keys() == two.jobs.keys()
    job, other = one.jobs[ids(one, "train.sft")[0]], two.jobs[ids(two, "train.sft")[0]]
    assert job.label == other.label
    assert [each.config["loss"]["options"]["implementation"] for each in (job, other)] == [
        "auto",
        "blockwise",
    ]


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


# --- what other stages wrote ----------------------------------------------------------------------------------

KEPT = 'target > unlearn.grad_ascent(forget="authors/forget01", steps=6, batch=4, checkpoints=[4, 2])'
PARTS = {
    "target": TRAIN,
    "sums": "target > curvature.measured",
    "rows": "data.noted",
    "seen": "target > data.noted",
    "moved": "target > unlearn.moved(sums=sums, rows=seen)",
    "further": "moved > unlearn.moved(times=0.01)",
    "direct": KEPT,
}


def toy_plan(
    folder: Path, chains: dict[str, str], evaluate: dict[str, str] | None = None, **config: object
) -> Plan:
    """A plan with the toy methods and one seed."""
    return toy.planned(toy.write(folder / "toy.yaml", chains, evaluate), folder / "results", **config)


def points_of(built: Plan) -> dict[str, Point]:
    return {point.chain: point for point in built.points}


def test_an_option_reads_the_part_of_another_result_that_its_type_says(tmp_path: Path) -> None:
    built = toy_plan(tmp_path, PARTS)
    points = points_of(built)
    job = points["moved"].job
    assert job is not None
    assert {name: parent.part for name, parent in job.parents.items()} == {
        "model": "model", "sums": "files", "rows": "data",
    }  # fmt: skip
    assert job.parents["sums"].id == points["sums"].parent.id
    assert (
        built.store.parent_folder(job.parents["rows"])
        == built.store.result(points["seen"].parent.id) / "data"
    )
    further = points["further"].job
    assert further is not None and further.parents["model"].part == "model"
    assert points["rows"].base == "data.noted" and points["rows"].shown_seed is None


def test_a_reader_of_files_does_not_have_a_removed_model_made_again(tmp_path: Path) -> None:
    chains = {"target": TRAIN, "moved": "target > unlearn.moved"}
    built = toy_plan(tmp_path, chains)
    for job_id in built.jobs:
        write_atomic(built.store.record(job_id), "{}")
    (built.store.result(toy.job_of(built, "moved")) / "files").mkdir()
    sums = {"again": "moved > prune.magnitude(sparsity=0.5)"}
    assert len(toy_plan(tmp_path, chains | sums).missing) == 4
    # a stage that reads nothing but the files: everything that was made before stays as it is
    reader = {"reader": "data.reader(files=moved)"}
    methods = tmp_path / "methods" / "data"
    methods.mkdir(parents=True)
    (methods / "reader.py").write_text(READER)
    shutil.copytree(toy.METHODS / "unlearn", tmp_path / "methods" / "unlearn")
    path = toy.write(tmp_path / "toy.yaml", chains | reader)
    again = toy.planned(path, tmp_path / "results", tmp_path / "methods")
    assert [job.method for job in again.missing.values()] == ["data.reader"]


READER = '''"""Reads files. Source: none, invented for tests."""

from dataclasses import dataclass

from methods.stage import Files

SEEDED = False
RESULT = "data"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which."""

    # what is read
    files: Files
'''


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "target > unlearn.moved(sums=direct)",
            "sums=direct reads files/, but direct ends in unlearn.grad_ascent, which writes model/ only; the option "
            "takes a chain such as target > ",
        ),
        ("target > unlearn.moved(sums=base)", "sums=base reads files/, but base ends in model.new"),
        ("target > unlearn.moved(sums=direct@step2)", "reads files/, but direct@step2 is model/ only"),
        ("target > unlearn.moved(sums=rows)", "but rows ends in data.noted, which writes data/ only"),
        ("target > unlearn.moved(rows=moved)", "writes model/ and files/ only"),
        ("target > unlearn.moved(sums='sums')", "write sums=sums, without quotes"),
        ("target > unlearn.moved(sums=3)", "this option takes the name of a chain that writes files/"),
        ("target > unlearn.moved(sums=measured())", "sums takes no component"),
        ("target > distill.forward_kl(teacher=sums)", "teacher=sums reads model/, but sums ends in curvature.measured"),
        ("sums > prune.magnitude(sparsity=0.5)", "but curvature.measured before it writes files/ only"),
        ("target > curvature.measured > unlearn.moved", "give its name to an option that reads files/"),
        ("seen > unlearn.moved", "but data.noted before it writes data/ only"),
        ("curvature.measured", "needs a model to start from: write base > curvature.measured"),
        ("direct@steps > prune.magnitude(sparsity=0.5)", "direct@steps means several models, which only of:"),
        ("target > distill.forward_kl(teacher=direct@steps)", "write direct@step40 for one of them"),
        ("base@step3 > prune.magnitude(sparsity=0.5)", "base keeps no model at step 3"),
        ("target > unlearn.moved(times=3.0)", "toy.yaml, line 13: chain odd: unlearn.moved: times=3.0 moves too far"),
        (
            'target > unlearn.grad_diff(forget="authors/forget01", retain="authors/full", steps=2)',
            "toy.yaml, line 13: chain odd: unlearn.grad_diff: retain='authors/full' holds",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_handed_over_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    odd = '"' in text
    with pytest.raises(AssayError) as caught:
        toy_plan(tmp_path, PARTS | {"odd": text if odd else text.replace("'", '"')})
    assert sentence in str(caught.value), str(caught.value)


def test_a_data_stage_may_say_that_it_needs_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = toy_plan(tmp_path, PARTS)
    module = catalogue((toy.METHODS,)).method("data.noted").load()
    monkeypatch.setattr(module, "NEEDS_MODEL", True, raising=False)
    with pytest.raises(AssayError, match=r"data\.noted needs a model to start from"):
        plan.build(built.experiment, built.settings)


def test_a_result_of_no_kind_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = toy_plan(tmp_path, PARTS)
    module = catalogue((toy.METHODS,)).method("data.noted").load()
    monkeypatch.setattr(module, "RESULT", "rows")
    with pytest.raises(AssayError, match=r"RESULT='rows'; it is made of model, data, files"):
        plan.build(built.experiment, built.settings)


# --- checks ---------------------------------------------------------------------------------------------------


def test_a_config_is_checked_once_whatever_the_seeds_and_not_at_smoke_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = toy_plan(tmp_path, PARTS)
    asked: list[float] = []
    module = catalogue((toy.METHODS,)).method("unlearn.moved").load()
    monkeypatch.setattr(module, "check", lambda config, data: asked.append(config.times))
    experiment = built.experiment.model_copy(update={"seeds": [0, 1, 2]})
    plan.build(experiment, built.settings)
    assert asked == [0.001, 0.01]
    plan.build(experiment, replace(built.settings, scale="smoke"))
    assert len(asked) == 2


def test_an_evaluation_is_checked_as_a_method_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = toy_plan(tmp_path, PARTS, {"drawn": "draws(number=7)"})
    module = catalogue((toy.METHODS,)).evaluation("draws").load()
    asked: list[int] = []

    def check(config: Any, data: Locator) -> None:
        asked.append(config.number)
        raise AssayError(f"number={config.number} is too high; give at most 3.")

    monkeypatch.setattr(module, "check", check, raising=False)
    with pytest.raises(AssayError, match=r"line 14: evaluate drawn: draws: number=7 is too high"):
        plan.build(built.experiment, built.settings)
    assert asked == [7]
    plan.build(built.experiment, replace(built.settings, scale="smoke"))
    assert asked == [7]


def test_a_check_reads_a_data_set_once_and_none_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    rows = Locator.rows
    monkeypatch.setattr(Locator, "rows", lambda self, name: (read.append(name), rows(self, name))[1])
    chains = {"target": TRAIN}
    for number, name in enumerate(("authors/forget01", "authors/forget01", "tofu/forget10")):
        chains[f"moved{number}"] = f'target > unlearn.moved(times=0.{number + 1}, data="{name}")'
    toy_plan(tmp_path, chains)
    assert read == ["authors/forget01"]


# --- trajectories ---------------------------------------------------------------------------------------------


def trajectory(built: Plan) -> list[tuple[str, int | None, str]]:
    """Chain, step and the last stage's method of everything that is scored."""
    points = [shown.point for shown in built.shown]
    return [(point.chain, point.step, point.job.method if point.job else "") for point in points]


def test_a_trajectory_is_the_end_the_kept_models_and_the_start(tmp_path: Path) -> None:
    evaluate = {"size": "{run: size, of: [direct@steps, target, direct]}"}
    built = toy_plan(tmp_path, {"target": TRAIN, "direct": KEPT}, evaluate)
    assert trajectory(built) == [
        ("direct", None, "unlearn.grad_ascent"), ("direct", 2, "unlearn.grad_ascent"),
        ("direct", 4, "unlearn.grad_ascent"), ("target", None, "train.sft"),
    ]  # fmt: skip
    end = built.shown[0].point
    assert [shown.point.parent.shown for shown in built.shown[:3]] == [
        end.parent.id, f"{end.parent.id}@step2", f"{end.parent.id}@step4",
    ]  # fmt: skip
    assert {shown.point.chain_label for shown in built.shown[:3]} == {end.label}
    assert built.shown[3].job.id == plan.build(
        built.experiment.model_copy(update={"evaluate": {"size": Evaluation(run="size", of=["target"])}}),
        built.settings,
    ).shown[0].job.id  # fmt: skip
    assert len(built.batches) == 4


def test_a_start_without_a_name_is_step_0_of_every_seeds_trajectory(tmp_path: Path) -> None:
    chains = {"whole": f"{TRAIN} > prune.magnitude(sparsity=0.5) > {KEPT.partition('> ')[2]}"}
    built = make(tmp_path, chains, "  size: {run: size, of: [whole@steps]}")
    shown = [
        (s.point.step, s.point.shown_seed, s.point.job.method if s.point.job else "") for s in built.shown
    ]
    for seed in (0, 1):
        assert (None, seed, "unlearn.grad_ascent") in shown and (4, seed, "unlearn.grad_ascent") in shown
        assert (0, seed, "prune.magnitude") in shown
    assert {shown.point.chain for shown in built.shown} == {"whole"} and len(shown) == 8


def test_trajectories_of_one_start_score_it_once_each_in_its_own_name(tmp_path: Path) -> None:
    chains = {
        "target": TRAIN,
        "family": KEPT.replace("steps=6", "steps={6, 8}"),
        "later": KEPT.replace("target >", "direct@step2 >"),
        "direct": KEPT,
        "alias": "direct",
    }
    evaluate = "  size: {run: size, of: ['family@0@steps', later@0@steps, alias@steps@0]}"
    built = make(tmp_path, chains, evaluate)
    assert trajectory(built) == [
        *[("family[steps=6]", step, "unlearn.grad_ascent") for step in (None, 2, 4)],
        ("target", None, "train.sft"),
        *[("family[steps=8]", step, "unlearn.grad_ascent") for step in (None, 2, 4)],
        *[("later", step, "unlearn.grad_ascent") for step in (None, 2, 4)],
        ("direct", 2, "unlearn.grad_ascent"),
        *[("alias", step, "unlearn.grad_ascent") for step in (None, 2, 4)],
    ]
    assert {shown.point.seed for shown in built.shown} == {0}
    start = next(s.point for s in built.shown if s.point.chain == "direct")
    assert start.parent.shown.endswith("@step2") and start.parent.id == toy.job_of(built, "direct")


@pytest.mark.parametrize(
    ("of", "sentence"),
    [
        (
            "target@steps",
            "target keeps no models on its way; give its last stage, train.sft, checkpoints=[...]",
        ),
        (
            "half@steps",
            "prune.magnitude, the last stage of half, has no steps at which it could keep a model",
        ),
        ("base@steps", "base is one model, with none on the way to it"),
        ("copy@steps", "copy is one model, with none on the way to it"),
        ("direct@step3", "direct keeps no model at step 3; give its last stage checkpoints=[3]"),
        ("direct@steps@step2", "the step is given twice"),
        ("direct@0@0", "the seed is given twice"),
        ("direct@all", "a seed (retained@0), a step (direct@step40) or steps (direct@steps)"),
        ("direct@7@steps", "the experiment has no seed 7"),
        ("sums", "sums: curvature.measured at its end writes files/ and no model: there is nothing to score"),
    ],
)
def test_what_cannot_be_scored_is_a_sentence(tmp_path: Path, of: str, sentence: str) -> None:
    more = {"half": "target > prune.magnitude(sparsity=0.5)", "copy": "direct@step2"}
    with pytest.raises(AssayError) as caught:
        toy_plan(tmp_path, PARTS | more, {"size": f"{{run: size, of: ['{of}']}}"})
    assert sentence in str(caught.value) and "toy.yaml, line 16" in str(caught.value)


def test_without_of_every_chain_that_ends_in_a_model_is_scored(tmp_path: Path) -> None:
    built = toy_plan(tmp_path, PARTS, {"size": "size"})
    assert [chain for chain, _, _ in trajectory(built)] == ["target", "moved", "further", "direct"]
    assert {point.chain for point in built.points} == set(PARTS)
    assert {"curvature.measured", "data.noted"} <= {job.method for job in built.missing.values()}


def test_steps_that_two_chains_ask_of_one_job_are_all_kept(tmp_path: Path) -> None:
    chains = {"target": TRAIN, "plain": KEPT.replace(", checkpoints=[4, 2]", ""), "direct": KEPT,
              "other": KEPT.replace("[4, 2]", "[5]")}  # fmt: skip
    built = toy_plan(tmp_path, chains, {"size": "{run: size, of: [other@steps]}"})
    assert [step for _, step, _ in trajectory(built)] == [None, 2, 4, 5, None]
    assert len(ids(built, "unlearn.grad_ascent")) == 1
    assert built.jobs[ids(built, "unlearn.grad_ascent")[0]].config["checkpoints"] == [2, 4, 5]


def test_a_stage_wanted_for_a_kept_step_comes_before_scores_of_its_end(tmp_path: Path) -> None:
    chains = {"target": TRAIN, "direct": KEPT}
    built = toy_plan(tmp_path, chains, {"size": "{run: size, of: [direct@steps]}"})
    stages = {job.id for job in built.jobs.values() if job.kind == "stage"}
    for stage in stages:  # all finished with their ends, but the kept steps were cleaned away
        (built.store.result(stage) / "model").mkdir(parents=True)
    built.__dict__.pop("missing", None)
    built.__dict__["finished"] = stages
    order = list(built.missing)
    (direct,) = ids(built, "unlearn.grad_ascent")
    assert order[0] == direct
    assert all(
        order.index(parent) < order.index(job)
        for job in order
        for parent in built.parents_of(built.jobs[job])
    )


def test_at_smoke_scale_a_trajectory_has_its_first_step(tmp_path: Path) -> None:
    chains = PARTS | {"early": "direct@step4 > prune.magnitude(sparsity=0.5)"}
    evaluate = {"size": "{run: size, of: [direct@steps, direct@step4]}"}
    built = toy_plan(tmp_path, chains, evaluate, scale="smoke")
    assert [step for _, step, _ in trajectory(built)] == [None, 1, None]
    early = points_of(built)["early"].job
    assert early is not None and early.parents["model"].step == 1
    with pytest.raises(AssayError, match="target keeps no models on its way"):
        toy_plan(tmp_path, chains, {"size": "{run: size, of: [target@steps]}"}, scale="smoke")


# --- tasks and kinds of models -------------------------------------------------------------------------------------

KINDS = """title: t
country: FRA
models:
  base: {new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16}
  net: {new: mlp, data: digits/train, hidden: [8]}
  words: {new: gpt2, hidden: 768, layers: 12, heads: 12, vocabulary: 3000}
chains:
  known: 'base > train.sft(data="authors/forget01", steps=2)'
  taught: 'net > train.classify(data="digits/train", steps=2)'
"""


def of_kinds(folder: Path, more: str = "", change: tuple[str, str] = ("", ""), **config: Any) -> Plan:
    path = folder / "toy.yaml"
    path.write_text(KINDS.replace(*change) + more)
    return plan.load({"experiment": str(path), "results": str(folder / "results"), **config})


def test_a_new_model_of_a_kind_is_made_by_the_method_of_that_name(tmp_path: Path) -> None:
    built = of_kinds(tmp_path, "  spoken: 'words > prune.magnitude(sparsity=0.5)'\n")
    made = {point.base: point.task for point in built.points}
    assert made == {"base": "language", "net": "classification", "words": "language"}
    methods = {job.method for job in built.jobs.values() if not job.parents}
    assert methods == {"model.new", "model.mlp", "model.gpt2"}
    net = next(job for job in built.jobs.values() if job.method == "model.mlp")
    assert net.config["hidden"] == [8]
    assert set(net.content) == {"digits/train"}


@pytest.mark.parametrize(
    ("word", "sentence"),
    [("mpl", "new: mpl: there is no such kind of new model; did you mean 'mlp'?"), ("smoke", "no such kind"),
     ("new", "no such kind")],
)  # fmt: skip
def test_a_kind_that_is_none_is_a_sentence_with_the_nearest(tmp_path: Path, word: str, sentence: str) -> None:
    with pytest.raises(AssayError) as caught:
        of_kinds(tmp_path, change=("new: mlp", f"new: {word}"))
    assert sentence in str(caught.value)
    assert "toy.yaml, line 5: model net: " in str(caught.value)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            "  odd: 'net > unlearn.npo'\n",
            "toy.yaml, line 10: chain odd: unlearn.npo works on language models; net is a classifier (new: mlp).",
        ),
        (
            "  odd: 'taught > train.sft'\n",
            "train.sft works on language models; net is a classifier (new: mlp).",
        ),
        (
            "  odd: 'base > train.classify(data=\"digits/train\")'\n",
            "train.classify works on classifiers; base is a language model (new: llama).",
        ),
        (
            "  odd: 'known > distill.forward_kl(teacher=taught)'\n",
            "distill.forward_kl works on language models; teacher=taught is a classifier (new: mlp).",
        ),
        (
            "evaluate:\n  tasks: lm_eval(tasks=['arc_easy'])\n",
            "lm_eval works on language models; taught is a classifier (new: mlp).",
        ),
        (
            "evaluate:\n  right: {run: 'classify(data=\"digits/test\")', of: [known]}\n",
            "classify works on classifiers; known is a language model (new: llama).",
        ),
        (
            "evaluate:\n  text: {run: perplexity, of: [net]}\n",
            "perplexity works on language models; net is a classifier (new: mlp).",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_runs(
    tmp_path: Path, more: str, sentence: str
) -> None:
    with pytest.raises(AssayError) as caught:
        of_kinds(tmp_path, more)
    assert sentence in str(caught.value), str(caught.value)


def test_an_evaluation_of_both_tasks_scores_all(tmp_path: Path) -> None:
    built = of_kinds(tmp_path, "evaluate:\n  size: size\n")
    assert {shown.point.chain for shown in built.shown} == {"known", "taught"}


def test_a_model_folder_says_by_its_class_what_it_is_for(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {"architectures": ["ViTForImageClassification"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    change = ("net: {new: mlp, data: digits/train, hidden: [8]}", f"net: {{path: {tmp_path / 'model'}}}")
    built = of_kinds(tmp_path, change=change)
    assert {point.chain: point.task for point in built.points}["taught"] == "classification"
    with pytest.raises(AssayError, match="works on language models; net is a classifier"):
        of_kinds(tmp_path, "  odd: 'net > train.sft'\n", change)


def test_at_smoke_scale_a_large_new_model_is_small(tmp_path: Path) -> None:
    more = "  spoken: 'words > prune.magnitude(sparsity=0.5)'\n"
    built = of_kinds(tmp_path, more, scale="smoke")
    config = next(job.config for job in built.jobs.values() if job.method == "model.gpt2")
    assert {key: config[key] for key in ("hidden", "layers", "heads", "vocabulary")} == {
        "hidden": 32, "layers": 2, "heads": 1, "vocabulary": 512
    }  # fmt: skip
    net = next(job.config for job in built.jobs.values() if job.method == "model.mlp")
    assert net["hidden"] == [8]


def test_a_hub_model_of_class_gpt2_has_a_stand_in_of_that_class(tmp_path: Path) -> None:
    hub = f"base: {{hf: openai-community/gpt2, revision: {'a' * 40}, layout: {{kind: gpt2, heads: 2}}}}"
    path = tmp_path / "toy.yaml"
    path.write_text(f"title: t\ncountry: FRA\nmodels:\n  {hub}\nchains:\n  target: '{TRAIN}'\n")
    built = plan.load({"experiment": str(path), "results": str(tmp_path / "results"), "scale": "smoke"})
    job = built.jobs[ids(built, "model.smoke")[0]]
    assert (job.config["kind"], job.config["heads"]) == ("gpt2", 2)


def test_what_a_file_says_of_its_tasks_is_no_code(tmp_path: Path) -> None:
    digests = []
    for number, text in enumerate(("A = 1\n", 'A = 1\nTASKS = ("language",)\nSMOKE = {"a": 1}\n', "A = 2\n")):
        path = tmp_path / f"{number}.py"
        path.write_text(text)
        digests.append(code.file_digest(path, 0))
    assert digests[0] == digests[1] != digests[2]


def test_a_task_that_is_none_is_a_sentence() -> None:
    module = ModuleType("methods.train.odd")
    assert tasks_of(module) == ("language",)
    module.__dict__["TASKS"] = ("languages",)
    with pytest.raises(AssayError, match=r"TASKS=\('languages',\); it is made of language, classification"):
        tasks_of(module)


# --- lists of references -------------------------------------------------------------------------------------------

TWO = {"one": TRAIN, "two": "one > prune.magnitude(sparsity=0.5)"}


def test_a_list_of_references_is_a_parent_for_each_in_order(tmp_path: Path) -> None:
    chains = TWO | {
        "there": "base > train.poft(references=[one, two], steps=2)",
        "back": "base > train.poft(references=[two, one], steps=2)",
    }
    built = make(tmp_path, chains, seeds="[0]")
    point = {point.chain: point for point in built.points}
    there, back = (point[name].job for name in ("there", "back"))
    assert there is not None and back is not None
    first, second = point["one"].parent.id, point["two"].parent.id
    assert {key: parent.id for key, parent in there.parents.items() if key != "model"} == {
        "references.1": first,
        "references.2": second,
    }
    assert back.parents["references.1"].id == second
    assert there.id != back.id and there.recipe != back.recipe
    assert there.label == "base > train.poft(steps=2, references=[one, two])"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "base > train.poft(references=one, steps=2)",
            "takes a list of one or more: write references=[a, b]",
        ),
        ("base > train.poft(references=[], steps=2)", "takes a list of one or more"),
        ("base > train.poft(references=[one, 3], steps=2)", "this option takes the name of a chain or model"),
        ("base > distill.forward_kl(teacher=[one, two], steps=2)", "teacher takes no list"),
    ],
)
def test_a_list_where_none_belongs_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(AssayError) as caught:
        make(tmp_path, TWO | {"odd": text}, seeds="[0]")
    assert sentence in str(caught.value), str(caught.value)


LEVELS = {
    "target": TRAIN,
    "zeros": "target > levels.magnitude(sparsity=0.5)",
    "chosen": "target > search.uniform(levels=zeros)",
}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "prune.assigned(assignment=zeros)",
            "assignment=zeros reads the files of a search stage, but zeros ends in levels.magnitude; the option takes "
            "a chain such as target > search.",
        ),
        ("prune.assigned(assignment=chosen, levels=chosen)", "levels=chosen reads the files of a levels stage, but"),
        (
            "search.layerwise(levels=zeros, lowered=1)",
            "levels=zeros reads the files of a levels stage of kind bits, but zeros ends in levels.magnitude of kind "
            "sparsity; the option takes a chain such as target > levels.gptq or target > levels.rtn.",
        ),
        ("search.uniform(levels=target)", "the option takes a chain such as target > levels."),
    ],
)  # fmt: skip
def test_the_files_of_another_family_or_kind_are_refused_before_they_are_made(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(AssayError) as caught:
        toy_plan(tmp_path, LEVELS | {"odd": f"target > {text}"})
    assert sentence in str(caught.value), str(caught.value)
