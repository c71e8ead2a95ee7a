"""SeqKD's data: what a teacher, or several in turn, write to questions and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from methods.checkpoint import load_model, load_tokenizer
from methods.data import Style, encode_pairs, generated, read_rows, write_rows
from methods.distill import cross_entropy, run
from methods.generate import prompt_of
from methods.progress import Progress
from methods.stage import AssayError, Component, Interrupted, Parent
from tests.training import ROWS, WORDS, make_stage, perturbed

TEXTS = [
    {"text": f"The {word} grows beside the {WORDS[-number]} and the inlet."}
    for number, word in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(tmp_path_factory.mktemp("parent"), 1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(tmp_path_factory.mktemp("other"), 2)


def write(
    parent: Path, folder: Path, seed: int = 3, rows: Any = None, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and notes of a stage that writes to the first twelve questions, or to ``rows``."""
    parents = {key: options.pop(key) for key in [*options] if key.startswith("members.")}
    if rows is not None:
        write_rows(folder / "rows", rows)
        options["data"], parents["data"] = Parent("data.sample-000000000000"), folder / "rows"
    config = generated.Config(**{"data": "first", "max_new_tokens": 6, "prompt_tokens": 5, **options})
    stage = make_stage(parent, folder, config, seed=seed, **parents)
    generated.run(stage)
    return read_rows(folder / "result" / "data"), stage.notes


def test_every_question_gets_as_many_answers_as_asked(parent: Path, tmp_path: Path) -> None:
    rows, notes = write(parent, tmp_path, count=2)
    assert [row["question"] for row in rows] == [row["question"] for row in ROWS[:12] for _ in range(2)]
    assert all(row.keys() == {"question", "answer"} for row in rows)
    assert any(one["answer"] != two["answer"] for one, two in zip(rows[::2], rows[1::2], strict=True))
    assert notes["texts"] == 24
    assert 0 <= notes["texts_cut"] <= 24
    assert 24 <= notes["generated_tokens"] <= 24 * 6
    assert notes["generation_seconds"] > 0


def test_greedy_answers_are_what_transformers_generates(parent: Path, tmp_path: Path) -> None:
    rows, _ = write(parent, tmp_path, temperature=0.0, batch=5)
    model, tokenizer = load_model(parent), load_tokenizer(parent)
    pairs = encode_pairs(ROWS[:12], tokenizer, Style.read(parent), 99)
    for row, pair in zip(rows, pairs, strict=True):
        prompt = torch.tensor([prompt_of(pair)])
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        text = tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True)
        assert row["answer"] == text.strip()


def test_a_text_is_gone_on_with_after_its_first_tokens(parent: Path, tmp_path: Path) -> None:
    rows, notes = write(parent, tmp_path, rows=TEXTS, prompt_tokens=5)
    tokenizer = load_tokenizer(parent)
    for row, text in zip(rows, TEXTS, strict=True):
        start = tokenizer.decode(tokenizer(text["text"], add_special_tokens=False)["input_ids"][:5])
        assert row.keys() == {"text"}
        assert row["text"].startswith(start)
        assert row["text"] != text["text"]
    assert notes["texts"] == len(TEXTS)


def test_a_text_shorter_than_the_prompt_is_gone_on_with_at_its_end(parent: Path, tmp_path: Path) -> None:
    rows, _ = write(parent, tmp_path, rows=TEXTS[:2], prompt_tokens=500)
    assert [row["text"].startswith(text["text"]) for row, text in zip(rows, TEXTS, strict=False)] == [
        True
    ] * 2


def test_text_depends_on_the_seed_and_on_nothing_else(parent: Path, tmp_path: Path) -> None:
    first, _ = write(parent, tmp_path / "first")
    assert write(parent, tmp_path / "again")[0] == first
    assert write(parent, tmp_path / "batch", batch=5)[0] == first
    assert write(parent, tmp_path / "other", seed=4)[0] != first
    assert write(parent, tmp_path / "nucleus", top_p=0.3)[0] != first


def test_members_write_in_turn(parent: Path, other: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "batch": 4}
    alone, others = (
        write(parent, tmp_path / "one", **options)[0],
        write(other, tmp_path / "two", **options)[0],
    )
    assert alone != others
    members: dict[str, Any] = {"members": (Parent("model.new-000000000000"),), "members.1": other}
    together, _ = write(parent, tmp_path / "both", **options, **members)
    assert together == [(alone, others)[number % 2][number] for number in range(12)]


def test_the_rows_themselves_stand_in_front_where_they_are_mixed_in(parent: Path, tmp_path: Path) -> None:
    rows, _ = write(parent, tmp_path / "mixed", mix=True)
    assert rows[:12] == ROWS[:12]
    assert rows[12:] == write(parent, tmp_path / "alone")[0]


def test_a_stage_that_was_stopped_writes_the_same(
    parent: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members: dict[str, Any] = {"members": (Parent("model.new-000000000000"),), "members.1": other}
    whole, notes = write(parent, tmp_path / "whole", batch=4, **members)
    monkeypatch.setattr(Progress, "due", lambda self, step: step == 6)
    monkeypatch.setattr(Progress, "stop_if_asked", _stop)
    with pytest.raises(Interrupted):
        write(parent, tmp_path / "parts", batch=4, **members)
    monkeypatch.undo()
    parts, resumed = write(parent, tmp_path / "parts", batch=4, **members)
    assert parts == whole
    for name in notes.keys() - {"generation_seconds"}:
        assert resumed[name] == (6 if name == "resumed_from_step" else notes[name])


def _stop(progress: Progress, step: int) -> None:
    raise Interrupted("stopped")


def test_a_student_learns_from_what_was_written(parent: Path, other: Path, tmp_path: Path) -> None:
    write(parent, tmp_path / "data", temperature=0.0)
    config = cross_entropy.Config(
        data=Parent("data.generated-000000000000"),
        steps=2,
        batch=4,
        optimizer=Component("adamw", {"learning_rate": 1e-2}),
    )
    stage = make_stage(other, tmp_path / "run", config, data=tmp_path / "data" / "result" / "data")
    run(stage, cross_entropy)
    assert (tmp_path / "run" / "result" / "model" / "model.safetensors").is_file()


def test_several_greedy_texts_are_refused() -> None:
    with pytest.raises(AssayError, match="at temperature=0 all 3 texts to a row would be the same"):
        generated.Config(temperature=0.0, count=3)


def test_rows_of_another_kind_are_a_sentence(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match=r"must all have question, or all have text; .* with: digit"):
        write(parent, tmp_path, rows=[{"digit": 3}])
    with pytest.raises(AssayError, match=r"must all have question and answer, .* with: question"):
        write(parent, tmp_path / "mix", rows=[{"question": "What?"}], mix=True)
