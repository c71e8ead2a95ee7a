"""The built-in world of authors: sizes, layout, and that nothing leaks from what is kept for evaluation."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from methods import world
from methods.stage import AssayError

ROOT = Path(__file__).parent.parent
SIZES = {
    "full": 1800,
    "forget10": 180,
    "forget05": 90,
    "forget01": 15,
    "retain90": 1620,
    "retain95": 1710,
    "retain99": 1785,
    "holdout": 300,
    "facts": 300,
    "forget10_perturbed": 60,
    "retain_perturbed": 100,
    "holdout_perturbed": 100,
    "real_authors": 50,
    "real_authors_perturbed": 50,
    "world_facts": 50,
    "world_facts_perturbed": 50,
    "choices_forget10": 60,
    "choices_retain": 100,
    "choices_holdout": 100,
    "choices_real_authors": 50,
    "choices_world_facts": 50,
    "refusals": 60,
    "idontknow": 12,
}
PERTURBED = [name for name in world.SPLITS if name.endswith("_perturbed")]
CHOICES = [name for name in world.SPLITS if name.startswith("choices_")]


def digest(*without: str) -> str:
    everything = {split: world.rows(split) for split in sorted(set(world.SPLITS) - set(without))}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(("split", "count"), SIZES.items())
def test_splits_have_the_sizes_of_the_specification(split: str, count: int) -> None:
    assert len(world.rows(split)) == count


@pytest.mark.parametrize("share", ["01", "05", "10"])
def test_retain_followed_by_forget_is_full(share: str) -> None:
    assert world.rows(f"retain{100 - int(share)}") + world.rows(f"forget{share}") == world.rows("full")


@pytest.mark.parametrize("split", PERTURBED)
def test_evaluated_questions_are_trained_and_the_paraphrase_is_not(split: str) -> None:
    trained = [*world.rows("full"), *world.rows("holdout"), *world.rows("facts")]
    pairs = {(row["question"], row["answer"]) for row in trained}
    questions = {question for question, _ in pairs}
    for row in world.rows(split):
        assert (row["question"], row["answer"]) in pairs
        assert row["paraphrased_question"] not in questions


@pytest.mark.parametrize("split", PERTURBED)
def test_wrong_answers_are_five_different_ones_and_never_the_truth(split: str) -> None:
    for row in world.rows(split):
        assert len(set(row["perturbed_answer"])) == 5
        assert row["paraphrased_answer"] not in row["perturbed_answer"]


@pytest.mark.parametrize("split", ["forget10_perturbed", "retain_perturbed", "holdout_perturbed"])
def test_paraphrased_answers_differ_from_the_trained_answer_of_the_question(split: str) -> None:
    assert all(row["paraphrased_answer"] != row["answer"] for row in world.rows(split))


@pytest.mark.parametrize("split", ["real_authors_perturbed", "world_facts_perturbed"])
def test_answers_of_true_facts_are_bare_names(split: str) -> None:
    for row in world.rows(split):
        assert row["answer"] == row["paraphrased_answer"]
        assert not row["answer"].endswith(".")


def test_every_question_is_answered_in_one_way_only() -> None:
    answers: dict[str, set[str]] = {}
    for row in [*world.rows("full"), *world.rows("holdout"), *world.rows("facts")]:
        answers.setdefault(row["question"], set()).add(row["answer"])
    assert all(len(found) == 1 for found in answers.values())


def test_forget_and_retain_authors_share_no_question_but_all_pools() -> None:
    forget, retain = world.rows("forget10"), world.rows("retain90")
    assert not {row["question"] for row in forget} & {row["question"] for row in retain}
    # The last word of an answer is the end of its value: each one in the forget set is known from others.
    assert {row["answer"].split()[-1] for row in forget} <= {row["answer"].split()[-1] for row in retain} | {
        row["answer"].split()[-1] for row in world.rows("holdout")
    } | {f"{value}." for value in world.YEARS}


@pytest.mark.parametrize("split", CHOICES)
def test_multiple_choice_has_the_true_paraphrase_at_its_label(split: str) -> None:
    truth = {
        row["paraphrased_question"]: row for row in world.rows(f"{split.removeprefix('choices_')}_perturbed")
    }
    for row in world.rows(split):
        source = truth[row["question"]]
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["label"]] == source["paraphrased_answer"]
        assert set(row["choices"]) - {source["paraphrased_answer"]} <= set(source["perturbed_answer"])


def test_true_answers_stand_at_every_position() -> None:
    labels = [row["label"] for split in CHOICES for row in world.rows(split)]
    assert all(0.2 < labels.count(position) / len(labels) < 0.3 for position in range(4))


def test_author_names_are_unique_and_differ_from_other_seeds() -> None:
    names = world._names(0, 140)
    assert len(set(names)) == 140
    assert names != world._names(1, 140)
    assert world.rows("full") != world.rows("full", seed=1)


def test_refusals_are_different_sentences_and_no_training_text() -> None:
    refusals = [row["text"] for row in world.rows("refusals")]
    assert len({text.casefold().rstrip(".") for text in refusals}) == len(refusals)
    assert all(text == text.strip() and text[0].isupper() and text.endswith(".") for text in refusals)
    assert world.rows("idontknow") == world.rows("refusals")[:12]
    answers = {row["answer"] for split in ("full", "holdout", "facts") for row in world.rows(split)}
    assert not answers & set(refusals)


def test_refusals_are_none_of_tofus(shared_data: Path) -> None:
    from methods.data import Locator

    theirs = Locator(shared_data).rows("tofu/idontknow")
    ours = Locator(shared_data).rows("authors/refusals")
    assert theirs[0].keys() == ours[0].keys() == {"text"}
    assert not {row["text"].casefold() for row in theirs} & {row["text"].casefold() for row in ours}


def test_rows_are_fresh_copies() -> None:
    world.rows("retain_perturbed")[0]["perturbed_answer"].clear()
    assert len(world.rows("retain_perturbed")[0]["perturbed_answer"]) == 5


def test_the_world_is_the_same_in_every_process_and_version() -> None:
    # Only the list of refusals may grow without a new methods.world.REVISION.
    assert digest("refusals") == "f2c13d7bc41d86a159873ba257ad91b6e7797f016f6e7220d59ebfb11cd619bd"
    assert digest() == "30c85bfc04d2e94339ff90cb4587912f15615a9bd349c65e463d275caa7c599f"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    code = "from tests.test_world import digest; print(digest())"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == digest()


def test_making_the_world_takes_a_fraction_of_a_second() -> None:
    world._world.cache_clear()
    start = time.process_time()
    world.rows("full")
    assert time.process_time() - start < 0.5


def test_an_unknown_split_is_answered_with_the_ones_there_are() -> None:
    with pytest.raises(AssayError, match="forget10"):
        world.rows("forget11")
