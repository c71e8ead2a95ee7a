"""MUSE's measures: what is asked, how it is compared, by whose definition, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from evaluations import muse
from evaluations._likelihood import complete, generate
from methods.checkpoint import load_model, load_tokenizer
from methods.data import Locator, Style
from methods.stage import AssayError, Parent
from tests.generic import FORGET, world
from tests.small_models import evaluate, save, value

NOTHING = {"verbatim": None, "knowledge": None, "retain": None}
SMALL = {"limit": 4, "new_tokens": 6, "answer_tokens": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "one", seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "other", seed=1)


def own(folder: Path, **files: list[Any]) -> Locator:
    """Files of these rows below ``own/``."""
    (folder / "own").mkdir()
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "own" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return Locator(folder)


# --- how texts are compared ------------------------------------------------------------------------------------


def test_overlap_is_a_longest_common_subsequence_by_hand() -> None:
    """Three of the truth's four words and of the text's five, in order: recall 3/4, precision 3/5, F1 2/3."""
    for definition in ("open_unlearning", "muse_bench"):
        found = muse.overlap("a dog ate cake", "a dog quickly ate bread", definition)
        assert found == pytest.approx(2 / 3)
        assert muse.overlap("a dog", "", definition) == 0.0


def test_only_open_unlearning_compares_stems() -> None:
    assert muse.overlap("winning awards", "wins award", "open_unlearning") == 1.0
    assert muse.overlap("winning awards", "wins award", "muse_bench") == 0.0


def test_an_answer_ends_at_an_empty_line_or_the_next_question() -> None:
    assert muse.answer_in(" Alvora.\n\nMore") == "Alvora."
    assert muse.answer_in(" Alvora.\nQuestion: Who?") == "Alvora."
    assert muse.answer_in(" Alvora. Question: Who?") == "Alvora."
    assert muse.answer_in(" Alvora.\nA city.") == "Alvora.\nA city."
    assert muse.answer_in("\n\nAlvora") == ""


# --- what is asked ---------------------------------------------------------------------------------------------


def test_examples_stand_before_the_question_as_in_muse(model: Path) -> None:
    tokenizer, examples = load_tokenizer(model), [{"question": "Who?", "answer": "Me."}]
    text = "Question: Who?\nAnswer: Me.\n\nQuestion: Where?\nAnswer:"
    for prompt in ("question_answer", "plain"):
        style = Style(prompt=prompt)
        asked = muse.asked_after([*examples], "Where?", style)
        assert style.prompt_text(asked, tokenizer) == text
        assert muse.asked_after([], "Where?", style) == "Where?"
    assert muse.asked_after(examples, "Where?", Style(prompt="chat")) == text


def test_a_text_is_cut_into_a_prompt_and_what_follows(model: Path) -> None:
    tokenizer, text = load_tokenizer(model), "Alvora is a city where it rains."
    ids = tokenizer(text)["input_ids"]
    config = muse.Config(prompt_tokens=4, new_tokens=3)
    prompt, truth = muse._cut({"text": f"{text}\n"}, 0, config, tokenizer)
    assert prompt == tuple(ids[:4])
    assert truth == tokenizer.decode(ids[4:7]).strip()


def test_only_muse_bench_shortens_a_given_reference_and_counts_its_begin_token(model: Path) -> None:
    tokenizer, text = load_tokenizer(model), "Alvora is a city where it rains."
    ids = tokenizer(text)["input_ids"]
    row = {"prompt": "About Alvora:", "gt": text}
    plain, cut = (
        muse._cut(row, 0, muse.Config(new_tokens=3, definition=definition), tokenizer)
        for definition in ("open_unlearning", "muse_bench")
    )
    assert plain == (tuple(tokenizer("About Alvora:")["input_ids"]), text)
    assert cut[1] == tokenizer.decode(ids[:3]).strip()
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    assert muse._begin(tokenizer) == (begin,)
    assert muse.shortened(tokenizer, text, 3) == tokenizer.decode(ids[:2])


def test_texts_are_completed_as_they_are_and_answers_without_blanks(model: Path) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    prompt = tokenizer("Question: Who?\nAnswer:")["input_ids"]
    ends = {tokenizer.eos_token_id}
    raw = complete(loaded, tokenizer, [prompt, prompt[:3]], ends, 5, batch=2)
    assert len(raw) == 2
    assert generate(loaded, tokenizer, Style(), ["Who?"], 5, batch=1) == [raw[0].strip()]


# --- the evaluation --------------------------------------------------------------------------------------------


def test_every_measure_has_one_row(model: Path, other: Path, tmp_path: Path) -> None:
    options = {**SMALL, "verbatim": "authors/text[108:120]", "reference": Parent("x")}
    rows = evaluate("muse", model, tmp_path, parents={"reference": other}, **options)
    assert [(row.metric, row.better, row.n, row.unit) for row in rows] == [
        ("forget_verbmem", "lower", 4, ""),
        ("forget_knowmem", "lower", 4, ""),
        ("retain_knowmem", "higher", 4, ""),
        ("privleak", "closer_to_0", 8, "%"),
    ]
    assert rows[0].task == (
        "authors/text[108:120] definition=open_unlearning prompt_tokens=24 new_tokens=6 limit=4"
    )
    assert rows[1].task == (
        "authors/forget10_perturbed definition=open_unlearning examples=none answer_tokens=6 limit=4"
    )
    assert all(0.0 <= row.value <= 1.0 for row in rows[:3])


def test_what_is_left_out_has_no_row(model: Path, tmp_path: Path) -> None:
    rows = evaluate("muse", model, tmp_path, **NOTHING | {"knowledge": "authors/forget10_perturbed"}, **SMALL)
    assert [row.metric for row in rows] == ["forget_knowmem"]


def test_what_a_model_itself_writes_is_recited_word_for_word(model: Path, tmp_path: Path) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    prompts = ["Alvora is", "A city where it rains"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    texts = complete(loaded, tokenizer, ids, {tokenizer.eos_token_id}, 8, batch=2)
    rows = [{"prompt": prompt, "gt": f"{text} ant bee"} for prompt, text in zip(prompts, texts, strict=True)]
    options = {**NOTHING, "verbatim": "own/texts", "new_tokens": 8}
    data = own(tmp_path, texts=rows)
    found = value(evaluate("muse", model, tmp_path / "out", locator=data, **options), "forget_verbmem")
    # the two words more cost some recall
    expected = [
        muse.overlap(row["gt"], text, "open_unlearning") for row, text in zip(rows, texts, strict=True)
    ]
    assert found == pytest.approx(sum(expected) / 2)
    assert found > 0.5


def test_knowledge_learnt_by_heart_is_found(tmp_path: Path) -> None:
    options = NOTHING | {"knowledge": FORGET, "answer_tokens": 20}
    known, less = (
        value(evaluate("muse", world().parents[name], tmp_path / name, **options), "forget_knowmem")
        for name in ("whole", "other")
    )
    assert known > 0.9
    assert known > less


def test_a_model_that_is_its_own_reference_leaks_nothing(model: Path, tmp_path: Path) -> None:
    options = NOTHING | {"reference": Parent("x"), "limit": 8}
    rows = evaluate("muse", model, tmp_path, parents={"reference": model}, **options)
    assert [(row.metric, row.value) for row in rows] == [("privleak", 0.0)]


def test_privacy_leakage_is_that_of_membership(model: Path, other: Path, tmp_path: Path) -> None:
    common = {"parents": {"reference": other}, "reference": Parent("x"), "limit": 8}
    found = evaluate("muse", model, tmp_path / "a", **NOTHING, **common)
    same = evaluate("membership", model, tmp_path / "b", attacks=("min_k",), **common)
    assert [(row.value, row.stderr) for row in found] == [
        (row.value, row.stderr) for row in same if row.metric == "privleak"
    ]


def test_muse_bench_leaves_out_rows_too_short_for_its_share(model: Path, other: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    short, longer = (
        {"question": "Who?", "answer": "Me"},
        {"question": "Where?", "answer": "In Alvora, a city."},
    )
    assert len(tokenizer(" Me")["input_ids"]) == 1
    members, others = [short, longer], [{**longer, "question": "When?"}]
    data = own(tmp_path, members=members, others=others)
    options: dict[str, Any] = NOTHING | {"members": "own/members", "others": "own/others", "locator": data}
    options |= {"reference": Parent("x"), "parents": {"reference": other}}
    counts = {
        name: evaluate("muse", model, tmp_path / name, definition=name, **options)[0].n
        for name in ("open_unlearning", "muse_bench")
    }
    assert counts == {"open_unlearning": 3, "muse_bench": 2}


# --- what is refused -------------------------------------------------------------------------------------------


def test_nothing_to_measure_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="verbatim, knowledge, retain and reference are all None"):
        evaluate("muse", model, tmp_path, **NOTHING)


def test_texts_that_the_prompt_uses_up_are_refused(model: Path, tmp_path: Path) -> None:
    data = own(tmp_path, texts=[{"text": "Alvora is a city."}])
    with pytest.raises(
        AssayError, match=r"verbatim='own/texts': row 0 has [0-9]+ tokens, so that nothing follows"
    ):
        evaluate("muse", model, tmp_path / "out", locator=data, verbatim="own/texts", prompt_tokens=90)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"question": "Who?", "answer": "Me."},
            "row 0 needs a text, or a prompt and its gt, but 'text' is no text",
        ),
        ({"prompt": "Alvora is"}, "row 0 needs a text, or a prompt and its gt, but 'gt' is no text"),
        ({"text": " "}, "the data set own/texts has no rows"),
    ],
)
def test_rows_that_cannot_be_recited_are_refused(
    model: Path, tmp_path: Path, row: dict[str, str], sentence: str
) -> None:
    data = own(tmp_path, texts=[row])
    with pytest.raises(AssayError, match=sentence):
        evaluate("muse", model, tmp_path / "out", locator=data, verbatim="own/texts")


def test_rows_that_cannot_be_asked_are_refused(model: Path, tmp_path: Path) -> None:
    data = own(tmp_path, none=[], texts=[{"text": "A city."}])
    with pytest.raises(AssayError, match="the data set own/none has no rows"):
        evaluate("muse", model, tmp_path / "a", locator=data, knowledge="own/none")
    sentence = (
        "own/texts: row 0 needs a question and its answer, but 'question' is no text; the row has: text"
    )
    with pytest.raises(AssayError, match=sentence):
        evaluate("muse", model, tmp_path / "b", locator=data, retain="own/texts")


def test_examples_that_give_an_answer_away_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssayError, match=r"examples='authors/forget10' answers 'Wh.*', which authors/forget10_perturbed asks"
    ):
        evaluate("muse", model, tmp_path, examples="authors/forget10")


def test_prompts_that_the_model_has_no_room_for_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssayError, match="has 24 tokens, which with new_tokens=128 do not fit this model's 128; lower"
    ):
        evaluate("muse", model, tmp_path, verbatim="authors/text[108:120]")


def test_a_reference_that_reads_other_tokens_is_refused(model: Path, tmp_path: Path) -> None:
    smaller = save(tmp_path / "smaller", vocabulary=400)
    with pytest.raises(AssayError, match="muse: the tokenizer of reference has 400 tokens"):
        evaluate(
            "muse", model, tmp_path / "out", **NOTHING, parents={"reference": smaller}, reference=Parent("x")
        )


def test_members_that_are_others_too_are_refused(model: Path, tmp_path: Path) -> None:
    options = NOTHING | {"members": "authors/forget10", "others": "authors/full", "reference": Parent("x")}
    with pytest.raises(AssayError, match="180 of the 180 rows of members='authors/forget10' stand in"):
        evaluate("muse", model, tmp_path, parents={"reference": model}, **options)
