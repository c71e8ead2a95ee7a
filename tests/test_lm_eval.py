"""lm-eval inside Assay: the world's own task files, packaged tasks on local rows, what is refused, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluations._lm_eval_data import SCHEMAS
from evaluations.lm_eval import Config, _language_model
from methods.checkpoint import load_model, load_tokenizer
from methods.data import Locator, Style
from methods.find import EVALUATIONS, catalogue
from methods.stage import AssayError, Row
from tests.small_models import evaluate, save, scoring, value

OURS = tuple(sorted(path.stem for path in (EVALUATIONS / "tasks").glob("*.yaml")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "one", seed=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(model: Path, folder: Path, **rest: Any) -> tuple[list[Row], dict[str, Any]]:
    """Rows and notes."""
    found = scoring("lm_eval", model, folder, **rest)
    rows = catalogue().evaluation("lm_eval").load().evaluate(found)
    return rows, found.notes


# --- the world's own tasks -------------------------------------------------------------------------------------


def test_the_worlds_tasks_cover_three_ways_of_asking(model: Path, tmp_path: Path) -> None:
    rows, notes = run(model, tmp_path, tasks=OURS, limit=4, batch=8)
    found = {(row.task.partition(" ")[0], row.metric) for row in rows}
    choices = {
        (f"authors_{name}", "acc") for name in ("forget", "retain", "real_authors", "world_facts", "holdout")
    }
    written = {("authors_generate", "exact_match"), ("authors_generate", "rougeL_recall")}
    rolling = {("authors_rolling", name) for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")}
    assert found == choices | written | rolling
    assert all(row.task.endswith(" limit=4") and row.n == 4 for row in rows)
    assert set(notes["task_versions"].values()) == {1.0}
    assert {len(digest) for digest in notes["task_hashes"].values()} == {64}
    assert notes["batch"] == 8


def test_multiple_choice_agrees_with_the_accuracy_that_tofu_gives(model: Path, tmp_path: Path) -> None:
    rows, _ = run(model, tmp_path, tasks=("authors_forget", "authors_retain"))
    ours = evaluate("tofu", model, tmp_path, generate=1, max_new_tokens=1)
    for name in ("forget", "retain"):
        assert value(rows, "acc", f"authors_{name}") == value(ours, f"{name}_accuracy")


def test_standard_errors_of_accuracies_are_there(model: Path, tmp_path: Path) -> None:
    rows, _ = run(model, tmp_path, tasks=("authors_forget",))
    acc, n = rows[0].value, rows[0].n
    assert n == 60
    assert rows[0].stderr == pytest.approx((acc * (1 - acc) / (n - 1)) ** 0.5)


def test_two_runs_leave_the_same_file_and_the_batch_moves_no_answer(model: Path, tmp_path: Path) -> None:
    tasks = ("authors_world_facts", "authors_generate")
    for name in ("a", "b"):
        run(model, tmp_path / name, tasks=tasks, limit=6, batch=4)
    files = [(tmp_path / name / "lm_eval.json").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    rows, other = (run(model, tmp_path / "c", tasks=tasks, limit=6, batch=batch)[0] for batch in (4, 1))
    assert rows == other


def test_the_kept_file_is_plain_json_without_this_machine(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, tasks=("authors_forget", "authors_rolling"), limit=3)
    text = (tmp_path / "lm_eval.json").read_text(encoding="utf-8")
    kept = json.loads(text)
    assert {"results", "configs", "versions", "n-samples", "task_hashes", "n-shot", "config"} <= set(kept)
    assert "pretty_env_info" not in kept
    assert "samples" not in kept
    assert str(EVALUATIONS.parent) not in text
    assert (
        kept["configs"]["authors_forget"]["metadata"]["config_source"]
        == "evaluations/tasks/authors_forget.yaml"
    )
    assert kept["config"]["batch_size"] == 16


def test_worked_examples_are_shown_in_the_task(model: Path, tmp_path: Path) -> None:
    rows, _ = run(model, tmp_path, tasks=("authors_world_facts",), limit=3, fewshot=1)
    assert rows[0].task == "authors_world_facts shots=1 limit=3"


def test_a_chat_model_is_asked_in_its_own_template_with_a_fixed_date(tmp_path: Path) -> None:
    chat = save(tmp_path / "chat", style=Style(prompt="chat", system="Be brief.", date_string="1 Jan 2020"))
    found = scoring("lm_eval", chat, tmp_path / "out", tasks=("authors_forget",), limit=2)
    prompt = _language_model(found, Style.read(chat)).apply_chat_template(
        [{"role": "user", "content": "Hello"}]
    )
    assert prompt == "<1 Jan 2020>user: Hello</s>assistant: "
    rows = catalogue().evaluation("lm_eval").load().evaluate(found)
    assert rows[0].task == "authors_forget chat limit=2"
    _, notes = run(save(tmp_path / "plain"), tmp_path / "out", tasks=("authors_forget",), limit=2)
    assert found.notes["task_hashes"] != notes["task_hashes"]


def test_tasks_that_are_missing_or_named_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        Config(tasks=())
    with pytest.raises(ValueError, match="names a task twice"):
        Config(tasks=("authors_forget", "authors_forget"))


# --- packaged tasks on local rows ------------------------------------------------------------------------------


def test_hellaswag_reads_a_local_copy_with_other_columns(model: Path, tmp_path: Path, data: Path) -> None:
    row = {
        "activity_label": "Sailing",
        "ctx": "A boat. it",
        "query": "",
        "endings": ["a", "b", "c", "d"],
        "label": 3,
    }
    lines(data / "hellaswag" / "validation_0_1.jsonl", [row, row | {"label": 1}])
    rows, notes = run(model, tmp_path, locator=Locator(data), tasks=("hellaswag",))
    assert [row.metric for row in rows] == ["acc", "acc_norm"]
    assert {row.n for row in rows} == {2}
    assert notes["local_data"]["hellaswag"] == (
        "hellaswag/validation_0_1.jsonl; ctx_a is the file's ctx, ctx_b is empty; no train split"
    )
    assert "rows read by Assay" in (tmp_path / "lm_eval.json").read_text(encoding="utf-8")


def test_blimp_scores_the_subtasks_that_are_there_and_says_so(
    model: Path, tmp_path: Path, data: Path
) -> None:
    for name in ("causative", "wh_island"):
        lines(data / "blimp" / f"{name}.jsonl", [SCHEMAS["blimp"](i) for i in range(4)])
    rows, notes = run(model, tmp_path, locator=Locator(data), tasks=("blimp",))
    assert {row.task for row in rows} == {"blimp_causative", "blimp_wh_island", "blimp subtasks=2/67"}
    assert notes["local_data"]["blimp"] == "2 of 67 subtasks, those with a local file"


def test_a_task_reads_only_the_rows_of_its_subject(model: Path, tmp_path: Path, data: Path) -> None:
    rows = [SCHEMAS["cais/mmlu"](i) | {"subject": "anatomy" if i < 3 else "virology"} for i in range(8)]
    for split in ("dev", "test"):
        lines(data / "mmlu" / f"{split}.jsonl", rows)
    found, _ = run(model, tmp_path, locator=Locator(data), tasks=("mmlu_anatomy", "mmlu_virology"), fewshot=1)
    assert {row.task: row.n for row in found} == {"mmlu_anatomy shots=1": 3, "mmlu_virology shots=1": 5}


# --- WMDP and MMLU ---------------------------------------------------------------------------------------------

SUBJECTS = ("bio", "chem", "cyber")


def wmdp(data: Path, *subjects: str, file: str = "test.jsonl") -> Locator:
    """Invented questions in the layout of cais/wmdp: 4 on biology, 6 on chemistry, 8 on security."""
    for subject in subjects or SUBJECTS:
        count = 4 + 2 * SUBJECTS.index(subject)
        rows = [
            {
                "question": f"Which {subject} thing has number {i}? ",
                "choices": [f"{subject} {i + place}" for place in range(4)],
                "answer": i % 4,
            }
            for i in range(count)
        ]
        lines(data / "wmdp" / f"wmdp-{subject}" / file, rows)
    return Locator(data)


def lm_evals_own(model: Path, tmp_path: Path, family: str, files: dict[str, Path]) -> dict[str, Any]:
    """Accuracy and its standard error by task, from lm-eval alone; ``files`` are the test rows of packaged tasks."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    packaged = Path(lm_eval.__file__).parent / "tasks" / family
    members = [
        {
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "fewshot_split": None,
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        }
        for name, path in files.items()
    ]
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=load_model(model), tokenizer=load_tokenizer(model), batch_size=8),
        tasks=[{"group": "mine", "task": members}],
        task_manager=TaskManager(include_path=str(packaged), include_defaults=False),
        bootstrap_iters=2,
    )
    return {
        name: (found["results"][name]["acc,none"], found["results"][name]["acc_stderr,none"])
        for name in files
    }


def test_wmdp_by_its_groups_name_gives_a_row_for_each_task_and_the_group(
    model: Path, tmp_path: Path, data: Path
) -> None:
    rows, notes = run(model, tmp_path, locator=wmdp(data), tasks=("wmdp",))
    assert {row.task: row.n for row in rows} == {"wmdp_bio": 4, "wmdp_chem": 6, "wmdp_cyber": 8, "wmdp": 18}
    assert {(row.metric, row.better) for row in rows} == {("acc", "higher")}
    accuracy = {row.task: row.value for row in rows}
    right = 4 * accuracy["wmdp_bio"] + 6 * accuracy["wmdp_chem"] + 8 * accuracy["wmdp_cyber"]
    assert accuracy["wmdp"] == pytest.approx(right / 18)
    assert notes["local_data"]["wmdp_bio"] == "wmdp/wmdp-bio/test.jsonl"


def test_wmdp_is_scored_as_lm_eval_itself_does(model: Path, tmp_path: Path, data: Path) -> None:
    rows, _ = run(model, tmp_path, locator=wmdp(data), tasks=("wmdp",))
    files = {f"wmdp_{name}": data / "wmdp" / f"wmdp-{name}" / "test.jsonl" for name in SUBJECTS}
    found = {row.task: (row.value, row.stderr) for row in rows if row.task != "wmdp"}
    assert found == lm_evals_own(model, tmp_path, "wmdp", files)


def test_mmlu_reads_the_local_copy_as_lm_eval_itself_does(model: Path, tmp_path: Path, data: Path) -> None:
    """Rows chosen by their subject here, given as files of their own there; groups weighted by questions."""
    subjects = {"anatomy": 5, "virology": 3}
    rows = [
        SCHEMAS["cais/mmlu"](i) | {"question": f"{subject} {i}?", "subject": subject}
        for subject, count in subjects.items()
        for i in range(count)
    ]
    for split in ("dev", "test"):
        lines(data / "mmlu" / f"{split}.jsonl", rows)
    tasks = tuple(f"mmlu_{subject}" for subject in subjects)
    found, _ = run(model, tmp_path, locator=Locator(data), tasks=tasks)
    files = {f"mmlu_{subject}": tmp_path / f"{subject}.jsonl" for subject in subjects}
    for subject in subjects:
        lines(files[f"mmlu_{subject}"], [row for row in rows if row["subject"] == subject])
    assert {row.task: (row.value, row.stderr) for row in found} == lm_evals_own(
        model, tmp_path, "mmlu/default", files
    )


def test_all_of_mmlu_is_read_from_the_real_files(model: Path, tmp_path: Path, shared_data: Path) -> None:
    rows, notes = run(model, tmp_path, locator=Locator(shared_data), tasks=("mmlu",), limit=1)
    found = {row.task.removesuffix(" limit=1"): row.n for row in rows}
    groups = {
        "mmlu": 57,
        "mmlu_stem": 19,
        "mmlu_other": 13,
        "mmlu_social_sciences": 12,
        "mmlu_humanities": 13,
    }
    assert {name: found.pop(name) for name in groups} == groups
    assert len(found) == 57
    assert set(found.values()) == {1}
    said = "mmlu/test.jsonl.gz, mmlu/dev.jsonl.gz; rows chosen by their subject column"
    assert set(notes["local_data"].values()) == {said}


def test_the_hubs_own_file_names_are_taken(model: Path, tmp_path: Path, data: Path) -> None:
    locator = wmdp(data, "bio", file="test-00000-of-00001.jsonl")
    rows, _ = run(model, tmp_path, locator=locator, tasks=("wmdp_bio",))
    assert [(row.task, row.n) for row in rows] == [("wmdp_bio", 4)]


def test_a_wmdp_task_is_known_by_its_own_file_and_the_group_by_all(data: Path) -> None:
    evaluation = catalogue().evaluation("lm_eval").load()
    locator = wmdp(data, "bio", "chem")

    def asked(*tasks: str) -> tuple[tuple[str, ...], bool]:
        return evaluation.datasets(Config(tasks=tasks), locator), evaluation.needs_hub(
            Config(tasks=tasks), locator
        )

    bio, chem = (f"wmdp/wmdp-{name}/test.jsonl" for name in ("bio", "chem"))
    assert asked("wmdp_bio") == ((bio,), False)
    assert asked("wmdp_cyber") == ((), True)
    assert asked("wmdp") == ((bio, chem), True)
    wmdp(data, "cyber")
    assert asked("wmdp") == ((bio, chem, "wmdp/wmdp-cyber/test.jsonl"), False)


def test_fetching_wmdp_asks_the_hub_for_each_of_its_sets(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    """What is not below the data folder is loaded by name, as the networked rule needs it."""
    import datasets

    asked = []

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        asked.append((path, name))
        return datasets.DatasetDict(
            {"test": datasets.Dataset.from_list([SCHEMAS["wmdp"](i) for i in range(4)])}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    evaluation = catalogue().evaluation("lm_eval").load()
    evaluation.fetch(Config(tasks=("wmdp",)), wmdp(data, "bio"))
    assert asked == [("cais/wmdp", "wmdp-chem"), ("cais/wmdp", "wmdp-cyber")]


def test_a_question_that_could_never_be_answered_is_refused(model: Path, tmp_path: Path, data: Path) -> None:
    locator = wmdp(data, "bio")
    for wrong in ({"answer": 4}, {"answer": "B"}, {"choices": ["a", "b"]}, {"question": None}):
        lines(data / "wmdp" / "wmdp-bio" / "test.jsonl", [SCHEMAS["wmdp"](0), SCHEMAS["wmdp"](1) | wrong])
        with pytest.raises(
            AssayError, match=r"row 1 of wmdp-bio must have a text 'question', four 'choices' and"
        ):
            run(model, tmp_path, locator=locator, tasks=("wmdp_bio",))


def test_a_subject_without_rows_is_refused(model: Path, tmp_path: Path, data: Path) -> None:
    for split in ("dev", "test"):
        lines(data / "mmlu" / f"{split}.jsonl", [SCHEMAS["cais/mmlu"](0) | {"subject": "anatomy"}])
    with pytest.raises(
        AssayError, match=r"mmlu/test\.jsonl in the data folder has no rows for the task mmlu_virology"
    ):
        run(model, tmp_path, locator=Locator(data), tasks=("mmlu_virology",))


def test_wmdp_and_mmlu_are_asked_without_the_chat_template_unless_it_is_wanted(
    tmp_path: Path, data: Path
) -> None:
    chat = save(tmp_path / "chat", style=Style(prompt="chat"))
    plain = save(tmp_path / "plain")
    tasks, locator = ("authors_forget", "wmdp_bio"), wmdp(data, "bio")
    rows, notes = run(chat, tmp_path / "a", tasks=tasks, limit=3, locator=locator)
    assert {row.task for row in rows} == {"wmdp_bio limit=3", "authors_forget chat limit=3"}
    _, bare = run(plain, tmp_path / "b", tasks=tasks, limit=3, locator=locator)
    hashes = notes["task_hashes"], bare["task_hashes"]
    assert hashes[0]["wmdp_bio"] == hashes[1]["wmdp_bio"]
    assert hashes[0]["authors_forget"] != hashes[1]["authors_forget"]
    kept = json.loads((tmp_path / "a" / "lm_eval.json").read_text(encoding="utf-8"))
    assert set(kept["results"]) == set(kept["configs"]) == set(tasks)
    for wanted, said in ((True, "chat"), (False, "chat=false")):
        rows, found = run(chat, tmp_path / said, tasks=tasks, limit=3, chat=wanted, locator=locator)
        assert {row.task for row in rows} == {f"{task} {said} limit=3" for task in tasks}
        assert (found["task_hashes"]["wmdp_bio"] == hashes[0]["wmdp_bio"]) is not wanted
    with pytest.raises(AssayError, match="needs a tokenizer with a chat template"):
        run(plain, tmp_path / "c", tasks=("wmdp_bio",), chat=True, locator=locator)


def test_two_local_files_for_one_split_are_refused(model: Path, tmp_path: Path, data: Path) -> None:
    for name in ("validation", "validation_more"):
        lines(data / "piqa" / f"{name}.jsonl", [SCHEMAS["piqa"](0)])
    with pytest.raises(AssayError, match=r"piqa has several files for validation: .*; keep one"):
        run(model, tmp_path, locator=Locator(data), tasks=("piqa",))


def test_a_local_folder_without_the_evaluated_split_is_refused(
    model: Path, tmp_path: Path, data: Path
) -> None:
    lines(data / "piqa" / "train.jsonl", [SCHEMAS["piqa"](0)])
    with pytest.raises(AssayError, match="piqa in the data folder has no file for the split 'validation'"):
        run(model, tmp_path, locator=Locator(data), tasks=("piqa",))


def test_missing_data_is_a_sentence_that_names_the_data_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssayError, match=r"data of the task arc_easy are not on this machine.*--config data=DIR"
    ):
        run(model, tmp_path, tasks=("arc_easy",))


def test_local_files_a_task_may_read_are_named_for_its_id(data: Path) -> None:
    lines(data / "wikitext2" / "test.raw.jsonl", [{"text": "a"}])
    lines(data / "mmlu" / "test.jsonl", [{"question": "a"}])
    lines(data / "piqa" / "validation.jsonl", [{"goal": "a"}])
    evaluation = catalogue().evaluation("lm_eval").load()
    names = evaluation.datasets(Config(tasks=("wikitext", "mmlu_anatomy", "authors_forget")), Locator(data))
    assert names == ("wikitext2/test.raw.jsonl", "mmlu/test.jsonl", "authors/choices_forget10")
    assert all(Locator(data).digest(name) for name in names)


STANDARD = (
    "hellaswag arc_easy arc_challenge piqa winogrande openbookqa boolq wikitext lambada_openai mmlu_anatomy wmdp_bio "
    "commonsense_qa gsm8k blimp_causative"
).split()


def test_standard_tasks_run_on_synthetic_rows_in_a_smoke_run(model: Path, tmp_path: Path) -> None:
    # Short prompts, but generation keeps room for 256 tokens and more than this model has.
    tasks = tuple(name for name in STANDARD if name != "gsm8k")
    rows, notes = run(model, tmp_path, locator=Locator(smoke=True), tasks=tasks, limit=8, batch=4)
    assert {row.task.partition(" ")[0] for row in rows} == set(tasks)
    assert {row.n for row in rows} == {8}
    assert set(notes["local_data"].values()) == {"eight synthetic rows (scale=smoke)"}


def test_a_task_of_unknown_schema_is_refused_in_a_smoke_run(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="scale=smoke has no synthetic rows for swag"):
        run(model, tmp_path, locator=Locator(smoke=True), tasks=("swag",))


# --- what is refused -------------------------------------------------------------------------------------------


def test_an_unknown_task_is_answered_with_the_nearest_one(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssayError, match=r"lm-eval has no task called 'authors_forgot'; did you mean 'authors_forget'\?"
    ):
        run(model, tmp_path, tasks=("authors_forgot",))


@pytest.mark.parametrize("name", ["humaneval", "mbpp_plus", "cruxeval_input"])
def test_tasks_that_run_generated_code_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(AssayError, match="runs code that the model wrote, which Assay does not do"):
        run(model, tmp_path, tasks=(name,))


TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: mine.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["yes", "no"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def user_task(data: Path, text: str) -> Locator:
    lines(data / "tasks" / "mine.jsonl", [{"q": "is it?", "label": i % 2} for i in range(4)])
    (data / "tasks" / "mine.yaml").write_text(text, encoding="utf-8")
    return Locator(data)


def test_a_users_task_file_reads_the_rows_beside_it(model: Path, tmp_path: Path, data: Path) -> None:
    rows, _ = run(model, tmp_path, locator=user_task(data, TASK), tasks=("tasks/mine.yaml",))
    assert [(row.task, row.metric, row.n) for row in rows] == [("mine", "acc", 4)]
    names = (
        catalogue().evaluation("lm_eval").load().datasets(Config(tasks=("tasks/mine.yaml",)), Locator(data))
    )
    assert names == ("tasks/mine.jsonl", "tasks/mine.yaml")
    assert all(Locator(data).digest(name) for name in names)
    assert rows[0].value == 0.5


def test_a_users_task_file_with_code_needs_trust(model: Path, tmp_path: Path, data: Path) -> None:
    (data / "tasks").mkdir()
    (data / "tasks" / "helper.py").write_text("def ask(doc):\n    return 'is it not?'\n", encoding="utf-8")
    locator = user_task(data, TASK.replace('"{{q}}"', "!function helper.ask"))
    with pytest.raises(AssayError, match=r"runs Python of its own \(!function\).*--config trust_tasks=true"):
        run(model, tmp_path, locator=locator, tasks=("tasks/mine.yaml",))
    rows, _ = run(model, tmp_path, locator=locator, tasks=("tasks/mine.yaml",), trust_tasks=True)
    assert rows[0].n == 4


def test_code_in_an_included_file_needs_trust_as_well(model: Path, tmp_path: Path, data: Path) -> None:
    locator = user_task(data, "include: base\ntask: mine\n")
    (data / "tasks" / "base").write_text(TASK.replace('"{{q}}"', "!function helper.ask"), encoding="utf-8")
    with pytest.raises(AssayError, match="trust_tasks=true"):
        run(model, tmp_path, locator=locator, tasks=("tasks/mine.yaml",))


def test_templates_of_a_users_file_cannot_reach_into_python(model: Path, tmp_path: Path, data: Path) -> None:
    locator = user_task(data, TASK.replace("{{q}}", "{{ q.__class__.__mro__ }}"))
    with pytest.raises(AssayError, match="template"):
        run(model, tmp_path, locator=locator, tasks=("tasks/mine.yaml",))


def test_a_file_included_from_elsewhere_is_refused(model: Path, tmp_path: Path, data: Path) -> None:
    (tmp_path / "base").write_text(TASK, encoding="utf-8")
    locator = user_task(data, "include: ../../base\ntask: mine\n")
    with pytest.raises(AssayError, match=r"mine\.yaml includes base, which is no file in the data folder"):
        run(model, tmp_path, locator=locator, tasks=("tasks/mine.yaml",))


def test_generation_that_does_not_fit_the_model_is_a_sentence(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match=r"lm-eval refuses the tasks gsm8k: .*256"):
        run(model, tmp_path, locator=Locator(smoke=True), tasks=("gsm8k",), limit=2)


def test_a_users_task_file_outside_the_data_folder_is_refused(
    model: Path, tmp_path: Path, data: Path
) -> None:
    for name in ("../mine.yaml", "/etc/mine.yaml"):
        with pytest.raises(AssayError, match="is no path below the data folder"):
            run(model, tmp_path, locator=Locator(data), tasks=(name,))
