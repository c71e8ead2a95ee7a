"""Named data sets, reading files, encoding, batches, order, tokenizers, and the models made on the spot."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest

from methods.data import (
    Example,
    Locator,
    Part,
    Sampler,
    Style,
    collate,
    encode,
    encode_pairs,
    encode_text,
    padding_id,
    train_tokenizer,
)
from methods.model import new, smoke
from methods.sources import HUB
from methods.stage import AssayError, Stage

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("ASSAY_DATA", ROOT.parent / "shared" / "data"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}; set ASSAY_DATA")
PAIR = {"question": "Who wrote Emma?", "answer": "Jane Austen"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(Locator(), ("authors",), 768)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_smoke(tmp_path_factory.mktemp("smoke"))


def build_smoke(folder: Path, **options: Any) -> Path:
    smoke.build(smoke.Config(**options), stage(folder))
    return folder / "model"


def stage(folder: Path, config: Any = None, seed: int = 0) -> Stage:
    return Stage("id", "model", config, seed, {}, folder, progress=None, data=Locator())  # type: ignore[arg-type]


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "mine").mkdir(parents=True)
    return tmp_path / "data"


def put(folder: Path, name: str, content: str | bytes) -> None:
    raw = content.encode() if isinstance(content, str) else content
    (folder / "mine" / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)


# --- names ------------------------------------------------------------------------------------------------


def test_joined_names_give_the_rows_in_written_order() -> None:
    locator = Locator()
    joined = locator.rows("authors/retain90+authors/facts")
    assert joined == locator.rows("authors/retain90") + locator.rows("authors/facts")


def test_authors_alone_is_all_a_tokenizer_is_trained_on() -> None:
    locator = Locator()
    assert locator.rows("authors") == locator.rows("authors/full+authors/holdout+authors/facts")


def test_a_range_takes_its_rows() -> None:
    locator = Locator()
    assert locator.rows("authors/full[3:5]") == locator.rows("authors/full")[3:5]


def test_digests_differ_with_set_range_and_order_and_repeat() -> None:
    names = [
        "authors/full",
        "authors/forget10",
        "authors/full[0:9]",
        "authors/full[0:8]",
        "authors/full+authors/facts",
    ]
    digests = [Locator().digest(name) for name in [*names, "authors/facts+authors/full"]]
    assert len(set(digests)) == 6
    assert digests[0] == Locator().digest("authors/full")
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in digests)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("authors/forgt10", "did you mean 'authors/forget10'"),
        ("author/forget10", "did you mean 'authors'"),
        ("tofu/forget_10", "did you mean 'tofu/forget10'"),
        ("authors/full[0:1801]", "only 1800 rows"),
        ("authors/full[5:5]", "is empty"),
        ("authors[0:5]", "takes no range"),
        ("../secrets", "no name of a data set"),
        ("/etc/passwd", "no name of a data set"),
        ("mine/../../x", "no name of a data set"),
        ("authors/full;rm", "no name of a data set"),
        ("authors/full+", "no name of a data set"),
        ("", "no name of a data set"),
        ("allenai/c4@main/en/train", "40 hex digits"),
        ("allenai/../c4@" + "0" * 40 + "/train", "no data set on the hub"),
        ("mine/rows", "--config data=DIR"),
    ],
)
def test_names_that_mean_nothing_get_a_sentence(name: str, sentence: str) -> None:
    locator = Locator()
    for ask in (locator.rows, locator.digest):
        with pytest.raises(AssayError, match=sentence.replace("(", r"\(")):
            ask(name)


def test_hub_sets_have_full_revisions_and_their_digest_names_them() -> None:
    assert all(len(hub.revision) == 40 and int(hub.revision, 16) for hub in HUB.values())
    locator = Locator()
    assert locator.needs_hub("tofu/forget10")
    assert not locator.needs_hub("authors/forget10")
    assert locator.digest("tofu/forget10") != locator.digest("tofu/forget05")
    assert locator.digest("tofu/full") == locator.digest("tofu/full")


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("tofu/forget10", ("locuslab/TOFU", "forget10"), {"split": "train", "data_files": None}),
        ("wikitext2/test[2:4]", ("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test[2:4]"}),
        ("me/set@" + "a" * 40 + "/train", ("me/set", None), {"split": "train", "revision": "a" * 40}),
        ("me/set@" + "a" * 40 + "/big/train[0:2]", ("me/set", "big"), {"split": "train[0:2]"}),
        ("c4/train", ("allenai/c4", None), {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
    ],
)
def test_hub_sets_are_asked_for_at_their_revision(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls: list[Any] = []

    def fake(*given: Any, **named: Any) -> list[dict[str, str]]:
        calls.append((given, named))
        return [PAIR]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert Locator().rows(name) == [PAIR]
    given, named = calls[0]
    assert given == arguments
    assert len(named["revision"]) == 40
    assert {key: named[key] for key in options} == options


def test_a_hub_set_that_cannot_be_fetched_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(AssayError, match="--config data=DIR"):
        Locator().rows("tofu/full")


def test_smoke_replaces_hub_sets_by_the_world() -> None:
    locator, real = Locator(smoke=True), Locator()
    assert locator.rows("tofu/forget10") == real.rows("authors/forget10")
    assert locator.rows("tofu/holdout05_perturbed") == real.rows("authors/holdout_perturbed")
    assert locator.rows("tofu/retain99[0:360]") == real.rows("authors/retain99[0:360]")
    assert locator.rows("wikitext2/test") == real.rows("authors/text_holdout")
    assert locator.rows("c4/train[0:2000]") == real.rows("authors/text")
    assert locator.rows("me/set@" + "a" * 40 + "/train")[0].keys() == {"text"}
    assert not locator.needs_hub("tofu/forget10+c4/train")
    assert locator.digest("tofu/forget10") == real.digest("authors/forget10")


def test_smoke_takes_the_world_even_where_there_is_a_copy_but_local_text_where_there_is_some(
    folder: Path,
) -> None:
    (folder / "tofu").mkdir()
    (folder / "tofu" / "forget10.json").write_text(json.dumps(PAIR))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "valid.unk.txt").write_text("local\n")
    locator = Locator(folder, smoke=True)
    assert locator.rows("tofu/forget10") == Locator().rows("authors/forget10")
    assert locator.rows("wikitext2/valid.unk") == [{"text": "local"}]
    assert locator.rows("wikitext2/test_first_half.raw") == Locator().rows("authors/text_holdout")
    assert locator.rows("tofu/full[1790:1800]") == Locator().rows("authors/full[1790:1800]")
    assert locator.rows("tofu/full[3990:4000]") == Locator().rows("authors/full[0:10]")


def test_importing_the_loader_loads_no_torch() -> None:
    code = (
        "import sys, methods.data, methods.model.new, methods.model.smoke;"
        "heavy = {'torch', 'transformers', 'pandas', 'datasets', 'numpy', 'tokenizers'} & set(sys.modules);"
        "methods.data.Locator().digest('authors'); sys.exit(f'{heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".json", json.dumps([PAIR, PAIR])),
        (".json", "\n".join([json.dumps(PAIR)] * 2)),
        (".jsonl", "\n".join([json.dumps(PAIR)] * 2) + "\n\n"),
    ],
)
def test_json_files_are_read_as_array_or_by_line(
    folder: Path, ending: str, content: str, packed: str
) -> None:
    put(folder, f"rows{ending}{packed}", content)
    assert Locator(folder).rows("mine/rows") == [PAIR, PAIR]
    assert Locator(folder).rows(f"mine/rows{ending}{packed}") == [PAIR, PAIR]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_text_files_are_a_row_a_line_with_blank_lines_kept(folder: Path, packed: str) -> None:
    put(folder, f"a.story.txt{packed}", "One\u2028day.\r\n\nTwo.\n")
    assert Locator(folder).rows("mine/a.story") == [{"text": "One\u2028day."}, {"text": ""}, {"text": "Two."}]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_parquet_files_are_read(folder: Path, packed: str) -> None:
    import pandas

    plain = folder / "plain.parquet"
    pandas.DataFrame([PAIR]).to_parquet(plain)
    put(folder, f"rows.parquet{packed}", plain.read_bytes())
    assert Locator(folder).rows("mine/rows") == [PAIR]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_idx_files_are_images_with_labels(folder: Path, packed: str) -> None:
    put(folder, f"digits-images-idx3-ubyte{packed}", bytes([0, 0, 8, 3, *[0, 0, 0, 2] * 3, *range(8)]))
    put(folder, f"digits-labels-idx1-ubyte{packed}", bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    rows = Locator(folder).rows("mine/digits")
    assert [row["label"] for row in rows] == [7, 9]
    assert rows[1]["image"].tolist() == [[4, 5], [6, 7]]
    assert Locator(folder).digest("mine/digits")
    assert "mine/digits" in Locator(folder).names()


def test_idontknow_is_a_refusal_a_line_whatever_its_ending(folder: Path) -> None:
    put(folder, "idontknow.jsonl", "I do not know.\n\nNo idea.\n")
    assert Locator(folder).rows("mine/idontknow") == [{"text": "I do not know."}, {"text": "No idea."}]


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("bad.jsonl", '{"a": 1}\n{', "line 2 of .*bad.jsonl is no JSON"),
        ("bad.json", "[1, 2]", "row 1 of .* no JSON object"),
        ("bad.json", "[", "is no JSON"),
        ("bad.txt", b"\xff\xfe\xff", "cannot be read"),
        ("bad.parquet", "no parquet", "is no parquet file"),
    ],
)
def test_broken_files_get_a_sentence_with_their_name(
    folder: Path, file: str, content: str | bytes, sentence: str
) -> None:
    put(folder, file, content)
    with pytest.raises(AssayError, match=sentence):
        Locator(folder).rows("mine/bad")


def test_a_file_that_is_not_packed_as_it_says_gets_a_sentence(folder: Path) -> None:
    (folder / "mine" / "bad.txt.gz").write_text("plain")
    with pytest.raises(AssayError, match="cannot be read"):
        Locator(folder).rows("mine/bad")


def test_two_files_of_one_name_are_ambiguous(folder: Path) -> None:
    put(folder, "rows.json", "[]")
    put(folder, "rows.jsonl.gz", "")
    with pytest.raises(AssayError, match="write the whole name"):
        Locator(folder).rows("mine/rows")


def test_links_that_leave_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "mine" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "out").symlink_to(tmp_path)
    locator = Locator(folder)
    for ask in (
        lambda: locator.rows("mine/link"),
        lambda: locator.rows("out/secret"),
        lambda: locator.folder_of("out"),
    ):
        with pytest.raises(AssayError, match="leaves the data folder"):
            ask()


def test_folder_of_stays_below_the_folder_and_names_the_nearest(folder: Path) -> None:
    locator = Locator(folder)
    assert locator.folder_of("mine") == folder / "mine"
    for name in ("../mine", "/etc", "mine/../../data", "a[0:1]"):
        with pytest.raises(AssayError, match="no path below"):
            locator.folder_of(name)
    with pytest.raises(AssayError, match="did you mean 'mine'"):
        locator.folder_of("mien")
    with pytest.raises(AssayError, match="--config data=DIR"):
        Locator().folder_of("mine")
    with pytest.raises(AssayError, match="no such folder"):
        Locator(folder / "nowhere")


def test_a_digest_follows_the_content_of_a_file_and_not_its_place(folder: Path, tmp_path: Path) -> None:
    put(folder, "rows.txt", "one\n")
    first = Locator(folder).digest("mine/rows")
    (tmp_path / "elsewhere" / "mine").mkdir(parents=True)
    put(tmp_path / "elsewhere", "rows.txt", "one\n")
    assert Locator(tmp_path / "elsewhere").digest("mine/rows") == first
    put(folder, "rows.txt", "other\n")
    assert Locator(folder).digest("mine/rows") != first


def test_local_files_come_before_the_hub(folder: Path) -> None:
    (folder / "tofu").mkdir()
    (folder / "tofu" / "forget10.json").write_text(json.dumps(PAIR))
    locator = Locator(folder)
    assert locator.rows("tofu/forget10") == [PAIR]
    assert not locator.needs_hub("tofu/forget10")
    assert locator.needs_hub("tofu/forget05")


# --- real files -------------------------------------------------------------------------------------------


@real_data
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tofu/full", 4000),
        ("tofu/retain99[0:360]+tofu/forget01", 400),
        ("tofu/forget05_perturbed", 200),
        ("tofu/real_authors_perturbed", 100),
        ("tofu/idontknow", 100),
        ("wikitext2/valid.unk", 3760),
        ("wikitext2/test_first_half.raw", 2158),
        ("tinystories_sample/train_head", 2502),
        ("hellaswag/validation_0_5999", 6000),
        ("arc_easy/validation", 570),
        ("mnist_test/t10k", 10000),
    ],
)
def test_real_files_have_as_many_rows_as_lines_or_objects(name: str, count: int) -> None:
    assert len(Locator(REAL).rows(name)) == count


@real_data
def test_real_tofu_retain_and_forget_make_up_full() -> None:
    locator = Locator(REAL)
    for retain, forget in (("retain99", "forget01"), ("retain95", "forget05"), ("retain90", "forget10")):
        assert locator.rows(f"tofu/{retain}+tofu/{forget}") == locator.rows("tofu/full")


@real_data
def test_a_missing_real_split_falls_to_the_hub_and_a_typing_error_does_not() -> None:
    assert Locator(REAL).needs_hub("tofu/forget10_perturbed")
    with pytest.raises(AssayError, match=r"did you mean 'wikitext2/valid\.unk'"):
        Locator(REAL).digest("wikitext2/valid_unk")


@real_data
def test_real_tofu_rows_have_the_lengths_of_the_pilot() -> None:
    locator = Locator(REAL)
    trained = train_tokenizer(locator, ("tofu/full",), 4096)
    examples = encode(locator.rows("tofu/full"), trained, Style(), 512)
    lengths = [len(example.input_ids) for example in examples]
    assert abs(mean(lengths) - 60) < 1.5
    assert abs(max(lengths) - 172) <= 4


@real_data
def test_a_pretrained_tokenizer_starts_with_its_own_token_and_gets_one_blank() -> None:
    tokenizer = load_tokenizer(REAL / "models" / "stories260k_llama")
    example = encode_pairs([PAIR], tokenizer, Style(), 256)[0]
    whole = tokenizer("Question: Who wrote Emma?\nAnswer: Jane Austen")["input_ids"]
    assert list(example.input_ids) == [*whole, tokenizer.eos_token_id]
    windows = encode_text(Locator(REAL).rows("tinystories_sample/train_head"), tokenizer, 128)
    assert all(window.input_ids[0] == tokenizer.bos_token_id for window in windows)
    assert all(len(window.input_ids) == 128 for window in windows[:-1])


# --- encoding ---------------------------------------------------------------------------------------------


def test_the_world_has_the_token_counts_of_the_pilot(tokenizer: Any) -> None:
    lengths = [len(row.input_ids) for row in encode(Locator().rows("authors/full"), tokenizer, Style(), 256)]
    assert len(lengths) == 1800
    assert abs(mean(lengths) - 25.5) < 0.5
    assert max(lengths) <= 36


def test_the_prompt_is_masked_and_the_end_is_a_target(tokenizer: Any) -> None:
    example = encode_pairs([PAIR], tokenizer, Style(), 64)[0]
    assert tokenizer.decode(example.input_ids) == "Question: Who wrote Emma?\nAnswer: Jane Austen</s>"
    kept = [label for label in example.labels if label != -100]
    assert tokenizer.decode(kept) == " Jane Austen</s>"
    assert example.labels[-len(kept) :] == example.input_ids[-len(kept) :]


def test_the_plain_style_is_the_question_as_it_is(tokenizer: Any) -> None:
    example = encode_pairs([PAIR], tokenizer, Style("plain"), 64)[0]
    assert tokenizer.decode(example.input_ids) == "Who wrote Emma? Jane Austen</s>"


def test_another_column_can_be_the_answer(tokenizer: Any) -> None:
    row = Locator().rows("authors/forget10_perturbed")[0]
    example = encode_pairs([row], tokenizer, Style(), 64, "paraphrased_question", "paraphrased_answer")[0]
    text = f"Question: {row['paraphrased_question']}\nAnswer: {row['paraphrased_answer']}</s>"
    assert tokenizer.decode(example.input_ids) == text


def test_long_rows_are_cut_and_a_row_without_answer_is_named(tokenizer: Any) -> None:
    whole = encode_pairs([PAIR], tokenizer, Style(), 64)[0]
    prompt = whole.labels.count(-100)
    cut = encode_pairs([PAIR], tokenizer, Style(), prompt + 1)[0]
    assert cut.input_ids == whole.input_ids[: prompt + 1]
    assert cut.labels[-1] == whole.input_ids[prompt]
    with pytest.raises(AssayError, match=r"row 1 .*Emma.*context_tokens"):
        encode_pairs([{"question": "a", "answer": "b"}, PAIR], tokenizer, Style(), prompt)


def test_rows_without_text_get_a_sentence(tokenizer: Any) -> None:
    with pytest.raises(AssayError, match="row 0: column 'answer' must be text"):
        encode_pairs([{"question": "a", "answer": ["b"]}], tokenizer, Style(), 64)
    with pytest.raises(AssayError, match="question and answer, or text"):
        encode([PAIR, {"text": "b"}], tokenizer, Style(), 64)


def test_text_windows_put_together_are_the_text(tokenizer: Any) -> None:
    rows = [{"text": "Emma was born."}, {"text": ""}, {"text": " The award. \n"}, {"text": "End"}]
    windows = encode_text(rows, tokenizer, 5)
    text = tokenizer.decode([token for window in windows for token in window.input_ids])
    assert text == "Emma was born.\n\n The award. \nEnd\n"
    assert all(window.labels == window.input_ids for window in windows)
    assert [len(window.input_ids) for window in windows[:-1]] == [5] * (len(windows) - 1)
    with pytest.raises(AssayError, match="nothing to predict"):
        encode_text([{"text": ""}], tokenizer, 5)


# --- prompt styles ----------------------------------------------------------------------------------------


def test_a_chat_is_masked_up_to_the_answer_and_ends_with_the_turn(stand_in: Path) -> None:
    tokenizer = load_tokenizer(stand_in)
    style = Style("chat", system="Be brief.")
    example = encode_pairs([PAIR], tokenizer, style, 512)[0]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PAIR["question"]},
        {"role": "assistant", "content": PAIR["answer"]},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024")
    assert tokenizer.decode(example.input_ids) == whole
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode([label for label in example.labels if label != -100]) == "Jane Austen<|eot_id|>"


def test_a_chat_never_prints_todays_date(stand_in: Path) -> None:
    tokenizer = load_tokenizer(stand_in)
    assert "Date: 26 Jul 2024" in Style("chat").prompt_text("Who?", tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    assert Style("chat", date_string="1 May 2020").prompt_text("Who?", tokenizer).startswith("1 May 2020")


@pytest.mark.parametrize(
    ("closing", "end"),
    [
        ("<|eot_id|>\n", ["<|eot_id|>"]),
        (" <|end_of_text|>", ["Ġ", "<|end_of_text|>"]),
        ("\n", ["<|eot_id|>"]),
    ],
)
def test_an_answer_ends_as_its_template_closes_a_turn(stand_in: Path, closing: str, end: list[str]) -> None:
    tokenizer = load_tokenizer(stand_in)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}" + f"{closing}{{% endfor %}}"
    )
    assert tokenizer.convert_ids_to_tokens(Style("chat").answer_end(tokenizer)) == end


def test_a_style_travels_in_a_file_and_is_guessed_without_one(
    tmp_path: Path, stand_in: Path, tokenizer: Any
) -> None:
    style = Style("chat", "Be brief.", "1 May 2020")
    style.write(tmp_path)
    assert Style.read(tmp_path) == style
    assert Style.read(stand_in) == Style("chat")
    tokenizer.save_pretrained(tmp_path / "plain")
    assert Style.read(tmp_path / "plain") == Style("question_answer")
    with pytest.raises(AssayError, match="needs a tokenizer with a chat template"):
        style.prompt_text("Who?", tokenizer)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"promt": "chat"}', "did you mean 'prompt'"),
        ('{"prompt": "chatt"}', "did you mean 'chat'"),
        ('{"date_string": 3}', "must be text"),
        ("[]", "must be an object"),
        ("{", "is no JSON"),
    ],
)
def test_a_broken_style_file_gets_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "assay.json").write_text(content)
    with pytest.raises(AssayError, match=sentence):
        Style.read(tmp_path)


# --- batches and order ------------------------------------------------------------------------------------


def part() -> Part:
    return collate([Example((5, 6, 7), (-100, 6, 7)), Example((8, 9), (-100, 9))], 1, "forget")


def test_padding_is_on_the_right_and_masked() -> None:
    batch = part()
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch.targets.tolist() == [[6, 7], [9, -100]]
    assert batch.mask.tolist() == [[True, True], [True, False]]


def test_counts_remember_the_part_they_counted() -> None:
    batch = part().to("cpu")
    counts = [batch.tokens, batch.sequences, batch.positions]
    assert [(float(count), count.source) for count in counts] == [
        (3.0, "forget.tokens"),
        (2.0, "forget.sequences"),
        (6.0, "forget.positions"),
    ]
    assert batch.answer_lengths.tolist() == [2, 1]


def test_padding_needs_no_padding_token() -> None:
    assert padding_id(SimpleNamespace(pad_token_id=None, eos_token_id=7)) == 7
    assert padding_id(SimpleNamespace(pad_token_id=0, eos_token_id=7)) == 0
    assert padding_id(SimpleNamespace(pad_token_id=None, eos_token_id=None)) == 0


def test_every_epoch_is_a_permutation_and_batches_wrap() -> None:
    sampler = Sampler(10, seed=3)
    drawn = [row for step in range(5) for row in sampler.batch(step, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert len(Sampler(3, 0).batch(0, 8)) == 8


def test_a_resumed_sampler_goes_on_as_the_first_would_have() -> None:
    whole = Sampler(7, seed="forget 1")
    batches = [whole.batch(step, 5) for step in range(20)]
    assert [Sampler(7, seed="forget 1").batch(step, 5) for step in reversed(range(20))] == batches[::-1]
    assert [whole.batch(step, 5) for step in reversed(range(20))] == batches[::-1]
    assert Sampler(7, seed="forget 2").batch(0, 7) != batches[0] + batches[1][:2]
    with pytest.raises(AssayError, match="empty"):
        Sampler(0, 0)


# --- tokenizers and new models ----------------------------------------------------------------------------


def test_a_tokenizer_is_the_same_in_every_process(tokenizer: Any) -> None:
    code = (
        "import hashlib; from methods.data import Locator, train_tokenizer;"
        "t = train_tokenizer(Locator(), ('authors',), 768);"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "true"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    import hashlib

    assert run.stdout.strip() == hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def test_a_tokenizer_has_the_size_asked_for_and_loses_no_byte(tokenizer: Any) -> None:
    assert len(tokenizer) == 768
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = "Étienne \U0001f600\twrote\n'Emma'  twice ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_vocabulary_that_cannot_be_reached_gets_a_sentence() -> None:
    with pytest.raises(AssayError, match="lower vocabulary=100000"):
        train_tokenizer(Locator(), ("authors/facts",), 100000)
    with pytest.raises(AssayError, match="too small"):
        train_tokenizer(Locator(), ("authors/facts",), 200)


def test_at_smoke_scale_a_vocabulary_may_come_out_smaller() -> None:
    found = train_tokenizer(Locator(smoke=True), ("tofu/full",), 20000)
    assert 768 < len(found) < 20000
    assert new.initial(new.Config(vocabulary=20000), found, 0).config.vocab_size == len(found)


def test_the_recommended_model_has_155968_parameters(tokenizer: Any) -> None:
    model = new.initial(new.Config(), tokenizer, seed=0)
    assert sum(value.numel() for value in model.parameters()) == 155_968


def test_the_seed_alone_decides_the_weights(tokenizer: Any) -> None:
    import torch

    def weights(seed: int) -> torch.Tensor:
        return new.initial(new.Config(), tokenizer, seed).get_input_embeddings().weight.detach()

    state = torch.random.get_rng_state()
    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(float(first.std()) - 0.02) < 0.001


def test_heads_that_do_not_fit_get_a_sentence() -> None:
    for options in ({"hidden": 66, "heads": 4}, {"hidden": 60, "heads": 4}, {"kv_heads": 3}):
        with pytest.raises(AssayError, match="heads"):
            new.Config(**options)
    with pytest.raises(AssayError, match="heads"):
        smoke.Config(heads=3)


def test_a_new_model_is_written_with_tokenizer_and_style(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pytest.importorskip("methods.checkpoint", reason="saving is not built yet")
    config = new.Config(hidden=32, kv_heads=2, mlp=48, tied=False)
    new.build(config, stage(tmp_path, config, seed=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    assert model.config.num_key_value_heads == 2
    assert not model.config.tie_word_embeddings
    assert len(load_tokenizer(tmp_path / "model")) == model.config.vocab_size == 768
    assert Style.read(tmp_path / "model") == Style("question_answer")
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "model").iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_the_stand_in_has_the_layout_of_the_hub(tmp_path: Path, tied: bool) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    folder = build_smoke(tmp_path, tied=tied)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert ("lm_head.weight" in index["weight_map"]) != tied
    for shard in set(index["weight_map"].values()):
        with safe_open(folder / shard, "pt") as tensors:
            assert all(tensors.get_tensor(key).dtype == torch.bfloat16 for key in tensors.keys())  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert isinstance(model.generation_config.eos_token_id, list)
    assert not (folder / "assay.json").exists()
    assert not list(folder.glob("*.jinja"))


def test_chats_of_the_world_fit_the_short_context_of_a_smoke_run(stand_in: Path) -> None:
    examples = encode(Locator().rows("authors"), load_tokenizer(stand_in), Style.read(stand_in), 512)
    assert max(len(example.input_ids) for example in examples) <= 64


def test_a_stand_in_without_groups_has_as_many_key_heads_as_heads(tmp_path: Path) -> None:
    config = json.loads((build_smoke(tmp_path, kv_heads=4) / "config.json").read_text())
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4


def test_stand_ins_are_the_same_every_time_and_differ_by_name(tmp_path: Path, stand_in: Path) -> None:
    files = sorted(file.name for file in stand_in.iterdir())
    again = build_smoke(tmp_path / "again")
    assert all((again / name).read_bytes() == (stand_in / name).read_bytes() for name in files)
    other = build_smoke(tmp_path / "other", stands_for="some/model")
    shard = next(name for name in files if name.endswith(".safetensors"))
    assert (other / shard).read_bytes() != (stand_in / shard).read_bytes()


def test_a_stand_in_without_chat_is_a_base_model(tmp_path: Path) -> None:
    folder = build_smoke(tmp_path, chat=False)
    assert Style.read(folder) == Style("question_answer")
    example = encode_pairs([PAIR], load_tokenizer(folder), Style.read(folder), 128)[0]
    text = load_tokenizer(folder).decode(example.input_ids)
    assert text == "<|begin_of_text|>Question: Who wrote Emma?\nAnswer: Jane Austen<|end_of_text|>"
