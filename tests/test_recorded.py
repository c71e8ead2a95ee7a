"""Teachers that were asked beforehand: what is written, what is made of the largest entries, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods import distill, teacher
from methods.checkpoint import load_model, load_tokenizer
from methods.data import Example, Part, Style, collate, encode, padding_id
from methods.distill import _recorded, forward_kl
from methods.distill._mixture import Mixture
from methods.distill._recorded import Recorded
from methods.distill._sources import Live, places
from methods.stage import AssayError, Component, Interrupted, NotFinite, Parent, Stage
from methods.teacher import _files, logits
from methods.term import entries, of
from methods.term._top import buckets, log_one_less, log_rest
from methods.terms import forward, relative_entropy
from tests.training import ROWS, make_parent, make_stage

# --- the largest entries, by hand -----------------------------------------------------------------------------------


def logs(*rows: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype).log()


def test_the_largest_entry_alone_by_hand() -> None:
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4), of which the first entry was kept."""
    log_q, kept, where = logs((0.25, 0.5, 0.25)), logs((0.5,)), torch.tensor([[0]], dtype=torch.int32)

    def value(rest: Any) -> float:
        return float(relative_entropy(*buckets(kept, where, log_q, rest)))

    assert value("tail") == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert value("renormalised") == pytest.approx(math.log(4))
    assert value("raw") == pytest.approx(0.5 * math.log(2))


def test_the_bucket_of_the_rest_only_brings_the_two_closer() -> None:
    draw = torch.Generator().manual_seed(1)
    log_p, log_q = (4 * torch.randn(50, 12, generator=draw, dtype=torch.float64) for _ in "pq")
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    found = [relative_entropy(*buckets(*log_p.topk(k), log_q)) for k in range(1, 13)]
    for fewer, more in itertools.pairwise(found):
        assert bool((fewer <= more + 1e-12).all())
    torch.testing.assert_close(found[-1], relative_entropy(log_p, log_q))


def test_nothing_is_left_out_where_the_kept_entries_have_all_the_mass() -> None:
    kept, where = torch.tensor([[-0.0, -40.0], [1e-4, -200.0]]), torch.tensor([[0, 1], [2, 0]])
    student = torch.randn(2, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    log_p, log_q = buckets(kept, where, student.log_softmax(-1))
    assert log_p[:, -1].tolist() == [-math.inf, -math.inf]
    value = relative_entropy(log_p, log_q).sum()
    value.backward()
    assert bool(value.isfinite()) and student.grad is not None and bool(student.grad.isfinite().all())


def test_a_student_that_has_nothing_else_gets_no_gradient_that_is_no_number() -> None:
    student = torch.tensor([[0.3, 0.1, -math.inf, -math.inf]], requires_grad=True)
    log_p, log_q = buckets(
        logs((0.4, 0.3), dtype=torch.float32), torch.tensor([[0, 1]]), student.log_softmax(-1)
    )
    assert float(log_q.detach()[0, -1]) == -math.inf
    relative_entropy(log_p, log_q).sum().backward()
    assert student.grad is not None and bool(student.grad.isfinite().all())


def test_a_rest_too_small_for_its_sum_to_one_still_pulls() -> None:
    """In float32 1 - sum q is 0 here, and so would the gradient be."""
    where = torch.tensor([[0]])
    exact = torch.tensor([[0.0, -20.0, -21.0]], dtype=torch.float64)
    found = []
    for dtype in (torch.float32, torch.float64):
        student = exact.to(dtype).requires_grad_()
        rest = log_rest(student.log_softmax(-1), where)
        (slope,) = torch.autograd.grad(rest.sum(), student)
        found.append((float(rest.detach()), slope.double()))
    assert found[0][0] == pytest.approx(math.log(math.exp(-20) + math.exp(-21)), rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)
    _, kept = buckets(torch.tensor([[-0.5]]), where, exact.float().log_softmax(-1))
    assert float(kept[0, 1]) == pytest.approx(found[1][0], rel=1e-6)
    assert float(log_one_less(torch.tensor(-1e-12, dtype=torch.float64))) == pytest.approx(
        math.log(1e-12), rel=1e-3
    )


# --- stages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher."""
    return sharpened(make_parent(tmp_path_factory.mktemp("teacher"), dropout=0.0), 12.0)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with its tokenizer."""
    return sharpened(make_parent(tmp_path_factory.mktemp("student"), dropout=0.0), 8.0)


def sharpened(folder: Path, factor: float) -> Path:
    """The model with larger weights: it prefers some tokens."""
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(factor)
    model.save_pretrained(folder)
    return folder


SMALL: dict[str, Any] = {"data": "first", "context_tokens": 64}


def recorded(parent: Path, folder: Path, **options: Any) -> Stage:
    stage = make_stage(parent, folder, logits.Config(**SMALL | options))
    teacher.run(stage, logits)
    return stage


@pytest.fixture(scope="module")
def whole(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return recorded(parent, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def largest(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return recorded(parent, tmp_path_factory.mktemp("largest"), top_k=8, temperatures=(1.0, 2.0))


def examples(folder: Path, count: int = 12, context_tokens: int = 64) -> list[Example]:
    return encode(ROWS[:count], load_tokenizer(folder), Style.read(folder), context_tokens)


def part_of(folder: Path, rows: Sequence[int]) -> Part:
    every = examples(folder)
    return collate([every[row] for row in rows], padding_id(load_tokenizer(folder)), "train")


def manifest(stage: Stage) -> dict[str, Any]:
    return dict(json.loads((stage.folder / "files" / "manifest.json").read_text()))


def answers(folder: Path, part: Part) -> Tensor:
    """The logits [n,V] of the answer tokens, from the model itself."""
    with torch.no_grad():
        outputs = forward(load_model(folder, device="cpu"), part)
    return outputs.logits[outputs.mask]


def test_a_full_record_gives_back_the_logits_of_any_rows_in_any_order(parent: Path, whole: Stage) -> None:
    part = part_of(parent, [7, 0, 11, 7])
    where = places(part)
    said = Recorded(whole.folder / "files").said(part, where)
    expected = answers(parent, part)
    torch.testing.assert_close(said.logits(slice(0, len(where))), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said.logits(slice(3, 9)), expected[3:9], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        said.log_probs(slice(2, 4), 3.0), (expected[2:4] / 3).log_softmax(-1), rtol=1e-5, atol=1e-5
    )
    assert said.top(slice(0, 3), 1.0) is None and said.logits(slice(0, 0)).shape == (0, expected.shape[1])


def test_the_largest_entries_are_exact_at_every_recorded_temperature(parent: Path, largest: Stage) -> None:
    part = part_of(parent, [2, 5])
    where = places(part)
    said = Recorded(largest.folder / "files").said(part, where)
    for temperature in (1.0, 2.0):
        expected = (answers(parent, part) / temperature).log_softmax(-1)
        top = said.top(slice(0, len(where)), temperature)
        assert top is not None
        values, indices = expected.topk(8)
        assert top[0].equal(indices)
        torch.testing.assert_close(top[1], values, rtol=1e-5, atol=1e-5)


def test_the_manifest_says_what_was_recorded_and_how_much_of_it(
    parent: Path, whole: Stage, largest: Stage
) -> None:
    about, everything = manifest(largest), examples(parent)
    tokens = sum(label != -100 for example in everything for label in example.labels[1:])
    assert (about["rows"], about["tokens"], about["top_k"], about["dtype"]) == (12, tokens, 8, "float32")
    assert about["bytes_per_token"] == 8 * 8 + 2 * 4 == largest.notes["bytes_per_token"]
    assert manifest(whole)["bytes_per_token"] == 4 * about["vocabulary"]
    assert largest.notes["answer_tokens"] == tokens
    assert largest.notes["bytes"] == sum(path.stat().st_size for path in (largest.folder / "files").iterdir())
    mass = []
    for temperature in (1.0, 2.0):
        log_p = (answers(parent, part_of(parent, range(12))) / temperature).log_softmax(-1)
        mass.append(log_p.topk(8).values.exp().sum(-1))
        found = about["captured_mass"][repr(temperature)]
        assert found["mean"] == pytest.approx(float(mass[-1].mean()), abs=1e-5)
        assert found["least"] == pytest.approx(float(mass[-1].min()), abs=1e-5)
    assert float(mass[1].mean()) < float(mass[0].mean())


def test_halved_numbers_are_near_enough(parent: Path, tmp_path: Path) -> None:
    part = part_of(parent, range(4))
    everything = slice(0, len(places(part)))
    exact = answers(parent, part).log_softmax(-1)
    small = Recorded(recorded(parent, tmp_path / "whole", stored="float16").folder / "files")
    found = small.said(part, places(part)).log_probs(everything, 1.0)
    assert float((found - exact).abs().max()) < 0.01
    few = recorded(parent, tmp_path / "few", stored="float16", top_k=4)
    top = Recorded(few.folder / "files").said(part, places(part)).top(everything, 1.0)
    assert top is not None
    assert float((top[1] - exact.topk(4).values).abs().max()) < 0.005
    assert few.notes["bytes_per_token"] == 4 * 6 + 4 + 4


def test_a_killed_recording_goes_on_behind_the_last_shard_with_the_same_bits(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "SHARD_TOKENS", 20)
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "1")
    undisturbed = recorded(parent, tmp_path / "undisturbed", top_k=5)
    count = len(manifest(undisturbed)["shards"])
    assert count > 3
    write, written = _files.Folder.write, list[int]()

    def interrupted(self: Any, number: int, *rest: Any) -> None:
        if number == 2 and not written:
            written.append(number)
            (self.path / "tmp-half").write_bytes(b"half a shard")
            raise Interrupted("stopped")
        write(self, number, *rest)

    monkeypatch.setattr(_files.Folder, "write", interrupted)
    with pytest.raises(Interrupted):
        recorded(parent, tmp_path / "killed", top_k=5)
    again = recorded(parent, tmp_path / "killed", top_k=5)
    assert again.notes["resumed_from_step"] == 2
    files = {path.name: path.read_bytes() for path in (undisturbed.folder / "files").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (again.folder / "files").iterdir()}
    assert len(files) == count + 1
    # Read with one shard open at a time.
    monkeypatch.setattr(_recorded, "OPEN", 1)
    part = part_of(parent, [11, 0, 6])
    top = Recorded(again.folder / "files").said(part, places(part)).top(slice(1, 8), 1.0)
    assert top is not None
    torch.testing.assert_close(
        top[1], answers(parent, part).log_softmax(-1).topk(5).values[1:8], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": "none"}, r"data='none' has no rows, so there is nothing to record"),
        ({"top_k": 291}, r"top_k=291 is more than the 290 entries"),
        ({"most_gigabytes": 1e-6}, r"keeping all of 290 entries of \d+ answer tokens takes .* GB, more than"),
        ({"most_gigabytes": 1e-6, "top_k": 9}, r"keeping 9 of 290 entries .*: lower top_k, name fewer rows"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_the_teacher_is_loaded(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], sentence: str
) -> None:
    from methods import loop

    monkeypatch.setattr(loop, "frozen_model", lambda *_: pytest.fail("the teacher was loaded"))
    stage = make_stage(parent, tmp_path, logits.Config(**SMALL | options))
    rows = stage.data.rows
    stage.data = SimpleNamespace(rows=lambda name: [] if name == "none" else rows(name))  # type: ignore[assignment]
    with pytest.raises(AssayError, match=sentence):
        teacher.run(stage, logits)


@pytest.mark.parametrize("temperatures", [(1.0, 0.0), (-1.0,), (float("nan"),), (), (2.0, 2.0)])
def test_temperatures_that_make_no_distribution_are_refused_with_the_options(temperatures: Any) -> None:
    with pytest.raises(AssayError, match=r"teacher\.logits: temperatures="):
        logits.Config(temperatures=temperatures)


def test_a_teacher_that_says_no_number_is_refused(parent: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    make_parent(folder, dropout=0.0)
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(NotFinite, match=r"rows from 0 to 11 are not finite"):
        recorded(folder, tmp_path / "at")


# --- what a record fits ---------------------------------------------------------------------------------------------


def refused(source: Recorded, folder: Path, **changes: Any) -> str:
    given: dict[str, Any] = {
        "examples": examples(folder), "data": "first", "context_tokens": 64, "style": Style.read(folder)
    }  # fmt: skip
    with pytest.raises(AssayError) as error:
        source.refuse_rows(**given | changes)
    return str(error.value)


def test_other_rows_are_refused_with_what_differs(parent: Path, whole: Stage) -> None:
    source = Recorded(whole.folder / "files")
    source.refuse_rows(examples(parent), "under another name", 64, Style.read(parent))
    packed = examples(parent, context_tokens=30)
    assert "context_tokens is 64 there and 30 here; row" in refused(
        source, parent, examples=packed, context_tokens=30
    )
    fewer = refused(source, parent, examples=examples(parent, 9), data="fewer")
    assert "data is 'first' there and 'fewer' here; there are 12 rows there and 9 here" in fewer
    swapped = examples(parent)
    swapped[4], swapped[5] = swapped[5], swapped[4]
    assert "row 4 is the first that differs" in refused(source, parent, examples=swapped)
    plain = Style(prompt="plain")
    spoken = encode(ROWS[:12], load_tokenizer(parent), plain, 64)
    assert "the style's prompt is 'question_answer' there and 'plain' here" in refused(
        source, parent, examples=spoken, style=plain
    )


def test_labels_alone_make_other_rows(parent: Path, whole: Stage) -> None:
    rows = examples(parent)
    rows[3] = replace(rows[3], labels=(-100, *rows[3].labels[1:-1], -100))
    assert "row 3 is the first that differs" in refused(
        Recorded(whole.folder / "files"), parent, examples=rows
    )


def test_another_tokenizer_is_refused(parent: Path, whole: Stage) -> None:
    source, tokenizer = Recorded(whole.folder / "files"), load_tokenizer(parent)
    source.refuse_tokenizer(tokenizer)
    tokenizer.add_tokens(["amber birch"])
    with pytest.raises(AssayError, match=r"another tokenizer, of 290 tokens; the student's has 291"):
        source.refuse_tokenizer(tokenizer)


def test_terms_that_want_more_than_the_largest_entries_are_refused(whole: Stage, largest: Stage) -> None:
    full, few = Recorded(whole.folder / "files"), Recorded(largest.folder / "files")
    full.refuse_terms(entries([of("dkd"), of("forward_kl", temperature=7.0)]))
    few.refuse_terms(entries([of("cross_entropy"), of("forward_kl", temperature=2.0)]))
    with pytest.raises(
        AssayError, match=r"the term dkd needs the probabilities of all entries.*has the 8 largest"
    ):
        few.refuse_terms(entries([of("dkd")]))
    with pytest.raises(
        AssayError, match=r"temperature=3, and this record .* serves 1, 2: record with .*\[1, 2, 3\]"
    ):
        few.refuse_terms(entries([of("forward_kl", temperature=3.0)]))


def test_folders_that_hold_no_record_are_refused(largest: Stage, tmp_path: Path) -> None:
    with pytest.raises(
        AssayError, match=r"holds no teacher's outputs: name a chain that ends in teacher\.logits"
    ):
        Recorded(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(AssayError, match=r"does not describe a teacher's outputs"):
        Recorded(tmp_path)
    (tmp_path / "manifest.json").write_text((largest.folder / "files" / "manifest.json").read_text())
    with pytest.raises(AssayError, match=r"answers-00000\.safetensors is missing"):
        Recorded(tmp_path)
    (tmp_path / "answers-00000.safetensors").write_bytes(b"nothing")
    part = SimpleNamespace(numbers=torch.tensor([0]))
    where: Any = SimpleNamespace(positions="answers", index=torch.zeros(1))
    with pytest.raises(AssayError, match=r"is no whole shard of a teacher's outputs"):
        Recorded(tmp_path).said(part, where)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"file": "../answers-00000.safetensors"},
            r"\.\./answers-00000\.safetensors is missing or is not the file",
        ),
        ({"file": "/etc/passwd"}, r"/etc/passwd is missing or is not the file itself"),
        ({"rows": [1, 2]}, r"a shard begins with row 1 where 0 comes"),
        ({"tokens": 1}, r"its shards have \d+ rows and 1 tokens"),
        ({"tokens": "many"}, r"does not describe a teacher's outputs"),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(
    largest: Stage, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    """No file outside the folder is opened, even where there is one of that name."""
    files = tmp_path / "files"
    shutil.copytree(largest.folder / "files", files)
    shutil.copy(files / "answers-00000.safetensors", tmp_path)
    about = json.loads((files / "manifest.json").read_text())
    about["shards"][0] |= change
    (files / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(AssayError, match=said):
        Recorded(files)


# --- the record in the place of the teacher -------------------------------------------------------------------------


def step(
    student: Path, source: Any, part: Part, term: Component, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """The value of a term and the gradients of the student's weights."""
    model, mixture = load_model(student, device="cpu"), Mixture([term], **options)
    (found,) = mixture.terms(model, source, SimpleNamespace(train=part)).values()
    (found.sum * (found.weight / found.count)).backward()
    return float(found.sum.detach() / found.count), {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("block_tokens", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_full_record_teaches_what_the_live_teacher_does(
    parent: Path, student: Path, whole: Stage, temperature: float, block_tokens: int | None
) -> None:
    part, term = part_of(parent, [3, 8, 1]), of("forward_kl", temperature=temperature)
    live = step(student, Live(load_model(parent, device="cpu")), part, term)
    written = step(student, Recorded(whole.folder / "files"), part, term, block_tokens=block_tokens)
    assert live[0] > 0.01
    assert written[0] == pytest.approx(live[0], rel=1e-5)
    assert written[1].keys() == live[1].keys() and live[1]
    for name, gradient in live[1].items():
        torch.testing.assert_close(written[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_largest_entries_with_one_bucket_stay_below_the_live_teacher(
    parent: Path, student: Path, largest: Stage, tmp_path: Path
) -> None:
    part, term = part_of(parent, [3, 8, 1]), of("forward_kl")
    live = step(student, Live(load_model(parent, device="cpu")), part, term)
    few = step(student, Recorded(largest.folder / "files"), part, term)
    every = recorded(parent, tmp_path, top_k=290)
    all_of_them = step(student, Recorded(every.folder / "files"), part, term)
    assert 0 < few[0] < live[0]
    assert all_of_them[0] == pytest.approx(live[0], rel=1e-5)
    for name, gradient in live[1].items():
        torch.testing.assert_close(all_of_them[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_what_becomes_of_the_rest_is_the_terms_to_say(parent: Path, student: Path, largest: Stage) -> None:
    part = part_of(parent, [3, 8, 1])
    found = {}
    for rest in ("tail", "renormalised", "raw"):
        found[rest], _ = step(student, Recorded(largest.folder / "files"), part, of("forward_kl", rest=rest))
        log_p, log_q = (answers(folder, part).log_softmax(-1) for folder in (parent, student))
        expected = relative_entropy(*buckets(*log_p.topk(8), log_q, rest))
        assert found[rest] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert len(set(found.values())) == 3


def test_padding_of_the_vocabulary_is_cut_off_the_record_too(
    parent: Path, student: Path, tmp_path: Path
) -> None:
    """A teacher with six entries more than its tokenizer, and a student with none."""
    padded = tmp_path / "padded"
    make_parent(padded, dropout=0.0)
    model = load_model(parent, device="cpu")
    model.resize_token_embeddings(296, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[290:] = 3 * model.get_output_embeddings().weight[20:26]
    model.save_pretrained(padded)
    part, term = part_of(parent, [0, 9]), of("forward_kl")
    live = step(student, Live(load_model(padded, device="cpu"), 290), part, term, vocabulary=290)
    for options in ({}, {"top_k": 290}):
        source = Recorded(recorded(padded, tmp_path / str(len(options)), **options).folder / "files")
        assert source.fit_vocabulary(296) is None
        assert source.fit_vocabulary(290) == 290
        written = step(student, source, part, term, vocabulary=290)
        assert written[0] == pytest.approx(live[0], rel=1e-5)
        torch.testing.assert_close(
            written[1]["model.embed_tokens.weight"],
            live[1]["model.embed_tokens.weight"],
            rtol=1e-4,
            atol=1e-6,
        )
    with pytest.raises(AssayError, match=r"predicts 200 entries and .* has 290 of the tokenizer's"):
        source.fit_vocabulary(200)


# --- the stage ------------------------------------------------------------------------------------------------------

FAST: dict[str, Any] = {
    "data": "first", "context_tokens": 64, "steps": 3, "batch": 5, "log_every": 1,
    "optimizer": Component("sgd", {"learning_rate": 0.1, "momentum": 0.0}), "schedule": Component("constant"),
}  # fmt: skip


def taught(student: Path, at: Path, **sources: Any) -> Stage:
    given: dict[str, Any] = {name: Parent("x") for name in sources}
    stage = make_stage(student, at, forward_kl.Config(**FAST | given), **sources)
    distill.run(stage, forward_kl)
    return stage


def weights_in(stage: Stage) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in load_model(stage.folder / "model").named_parameters()}


def test_a_student_learns_the_same_from_the_record_and_from_the_teacher(
    parent: Path, student: Path, whole: Stage, tmp_path: Path
) -> None:
    live = weights_in(taught(student, tmp_path / "live", teacher=parent))
    written = weights_in(taught(student, tmp_path / "written", recorded=whole.folder / "files"))
    before = dict(load_model(student).named_parameters())
    for name, weight in live.items():
        torch.testing.assert_close(written[name], weight, rtol=1e-5, atol=1e-6)
    assert any(not weight.equal(before[name]) for name, weight in live.items())


def test_a_record_of_another_packing_is_refused_before_a_model_is_loaded(
    parent: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from methods import checkpoint

    files = recorded(parent, tmp_path / "short", context_tokens=30).folder / "files"
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(AssayError, match=r"recorded on other rows .*context_tokens is 30 there and 64 here"):
        taught(student, tmp_path / "at", recorded=files)
