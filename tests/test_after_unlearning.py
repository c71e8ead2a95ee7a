"""What is asked of a model after unlearning: does it come back (relearned, rounded), and is it like the gold?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from evaluations import _distance, _known
from evaluations.quantize_probe import rounded
from evaluations.relearn import Config as Relearning
from evaluations.relearn import _split
from methods import world
from methods.checkpoint import load_model, load_tokenizer, save_model
from methods.data import Locator, Style, collate, encode_pairs, padding_id
from methods.find import catalogue
from methods.stage import AssayError, NotFinite, Parent, Row
from methods.terms import answer_nll, forward
from tests.small_models import evaluate, save, scoring, value

FORGET = "authors/forget10_perturbed[0:12]"
RETAIN = "authors/retain_perturbed[0:6]"
PLAIN = "authors/forget10[0:12]"
SMALL: dict[str, dict[str, Any]] = {
    "relearn": {"data": FORGET, "examples": 4, "after": (1, 3), "learning_rate": 0.01},
    "quantize_probe": {"forget": FORGET, "retain": RETAIN},
    "gold_distance": {"forget": FORGET, "retain": RETAIN},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "one", seed=0, scale=3.0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "other", seed=1, scale=3.0)


def run(name: str, model: Path, folder: Path, reference: Path | None = None, **options: Any) -> list[Row]:
    """The rows of a small measurement, against a reference where one is given."""
    beside = {"reference": Parent("x"), "parents": {"reference": reference}} if reference else {}
    return evaluate(name, model, folder, **{**SMALL[name], **beside, **options})


def values(rows: Sequence[Row]) -> dict[str, float]:
    return {row.metric: row.value for row in rows}


def twin(folder: Path, model: Path, swapped: Sequence[str] = ()) -> Path:
    """A copy of a model; in its tokenizer two tokens have changed their numbers."""
    save_model(load_model(model), folder, source=model)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary |= {one: vocabulary[two] for one, two in zip(swapped, reversed(swapped), strict=True)}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# --- what a model knows ----------------------------------------------------------------------------------------


def test_loss_and_accuracy_are_those_of_tofu(model: Path, tmp_path: Path) -> None:
    tofu = evaluate("tofu", model, tmp_path, limit=12, generate=1, max_new_tokens=1)
    rows = run("quantize_probe", model, tmp_path, bits=(8,), retain="authors/retain_perturbed[0:12]")
    for name in ("forget_nll", "forget_accuracy", "retain_nll"):
        assert value(rows, name) == pytest.approx(value(tofu, name), rel=1e-6)
    before = run("relearn", model, tmp_path)
    relearned, others = (value(before, f"{name}_nll_after_0") for name in ("relearned", "forget"))
    assert min(relearned, others) < value(tofu, "forget_nll") < max(relearned, others)


def test_rows_without_wrong_answers_have_no_accuracy(model: Path, tmp_path: Path) -> None:
    for name, option in (("relearn", "data"), ("quantize_probe", "forget")):
        plain: dict[str, Any] = {option: PLAIN}
        metrics = values(run(name, model, tmp_path, **plain))
        assert metrics
        assert not any("accuracy" in metric for metric in metrics)


def test_running_text_can_be_relearned_and_rounded(model: Path, tmp_path: Path) -> None:
    text: dict[str, Any] = {"context_tokens": 24}
    assert run("relearn", model, tmp_path, data="authors/text[0:6]", **text)[0].n is not None
    rows = run("quantize_probe", model, tmp_path, forget="authors/text[0:6]", **text)
    assert value(rows, "forget_nll") > 0


@pytest.mark.parametrize("name", ["relearn", "quantize_probe"])
def test_an_empty_answer_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    lines = [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": " "}]
    (tmp_path / "mine" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    mine: dict[str, Any] = {"data" if name == "relearn" else "forget": "mine/rows"}
    with pytest.raises(AssayError, match="row 1 of mine/rows has an empty answer: leave the row out"):
        run(name, model, tmp_path / "out", locator=Locator(tmp_path), **mine)


# --- relearning ------------------------------------------------------------------------------------------------


def test_relearning_is_plain_adamw_on_the_chosen_rows_alone(model: Path, tmp_path: Path) -> None:
    """Three full-batch steps on four rows, done again here; measured on the eight others."""
    rows = run("relearn", model, tmp_path)
    relearned, others = _split(12, Relearning(data=FORGET, examples=4), 0)
    assert sorted(relearned + others) == list(range(12))
    assert len(relearned) == 4
    again, tokenizer = load_model(model), load_tokenizer(model)
    again.requires_grad_(True)
    examples = encode_pairs(world.rows("forget10_perturbed")[:12], tokenizer, Style(), 512)
    shown, hidden = (
        collate([examples[i] for i in items], padding_id(tokenizer), "rows") for items in (relearned, others)
    )

    def loss(part: Any) -> torch.Tensor:
        term = answer_nll(part, forward(again, part))
        return term.sum / term.count

    optimizer = torch.optim.AdamW(again.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(4):
        if step in (0, 1, 3):
            assert value(rows, f"relearned_nll_after_{step}") == pytest.approx(loss(shown).item(), rel=1e-5)
            assert value(rows, f"forget_nll_after_{step}") == pytest.approx(loss(hidden).item(), rel=1e-5)
        optimizer.zero_grad()
        loss(shown).backward()
        optimizer.step()
    assert value(rows, "relearned_nll_after_3") < value(rows, "relearned_nll_after_0") - 0.1
    gain = value(rows, "forget_nll_after_0") - value(rows, "forget_nll_after_3")
    assert value(rows, "forget_nll_gain") == pytest.approx(gain)
    gain = value(rows, "forget_accuracy_after_3") - value(rows, "forget_accuracy_after_0")
    assert value(rows, "forget_accuracy_gain") == pytest.approx(gain)
    assert {row.n for row in rows if row.metric.startswith("forget")} == {8}
    task = f"{FORGET} examples=4 steps=3 learning_rate=0.01 rows_per_step=16"
    assert {row.task for row in rows} == {task}


def test_the_excess_is_the_gain_less_that_of_the_reference(model: Path, other: Path, tmp_path: Path) -> None:
    rows = run("relearn", model, tmp_path, reference=other)
    alone = values(run("relearn", model, tmp_path))
    gold = values(run("relearn", other, tmp_path))
    found = values(rows)
    assert {metric: found[metric] for metric in alone} == alone
    for metric in (name for name in gold if name.startswith("forget") and "after" in name):
        assert found[f"reference_{metric}"] == gold[metric]
    for what in ("nll", "accuracy"):
        wanted = alone[f"forget_{what}_gain"] - gold[f"forget_{what}_gain"]
        assert found[f"forget_{what}_excess"] == pytest.approx(wanted)


def test_a_model_that_is_its_own_reference_has_nothing_in_excess(model: Path, tmp_path: Path) -> None:
    rows = run("relearn", model, tmp_path, reference=model)
    assert value(rows, "forget_nll_excess") == 0.0
    assert value(rows, "forget_accuracy_excess") == 0.0


def test_relearning_is_seeded_and_leaves_the_scored_model_alone(model: Path, tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        one = scoring("relearn", model, tmp_path, **SMALL["relearn"])
        one.seed = seed
        before = {name: weight.clone() for name, weight in one.model().state_dict().items()}
        found.append(catalogue().evaluation("relearn").load().evaluate(one))
        assert all(weight.equal(before[name]) for name, weight in one.model().state_dict().items())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_relearning_needs_rows_to_measure_and_a_loss_that_is_finite(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match=r"examples=12 leaves none of the 12 rows of .* lower it"):
        run("relearn", model, tmp_path, examples=12)
    # found in training, and, after the last step, in what is measured
    for rate, after in ((1e30, 3), (1e38, 1)):
        with pytest.raises(
            NotFinite, match=r"after \d steps the loss is (nan|inf); lower learning_rate=1e\+3"
        ):
            run("relearn", model, tmp_path, learning_rate=rate, after=(after,))
    for wrong in ((), (3, 1), (2, 2)):
        with pytest.raises(ValueError, match="after needs step numbers in ascending order, each once"):
            Relearning(after=wrong)


# --- rounding --------------------------------------------------------------------------------------------------


def test_a_hand_worked_rounding() -> None:
    """4 bits, 7 = 2^3 - 1. Row 1: s = 1.4/7 = 0.2, codes 7, -2.25 -> -2, 1.65 -> 2, 0.4 -> 0.

    Row 2: s = 0.7/7 = 0.1, codes -7, 3.4 -> 3, 0, 0. In groups of two, row 1's second half has s = 0.33/7 and codes 7
    and 0.08 * 7 / 0.33 = 1.697 -> 2; a group of zeros stays zero. 8 bits: 0.33 is 0.33 * 127 / 1.4 = 29.94 -> 30 steps.
    """
    weight = torch.tensor([[1.4, -0.45, 0.33, 0.08], [-0.7, 0.34, 0.0, 0.0]])
    wanted = torch.tensor([[1.4, -0.4, 0.4, 0.0], [-0.7, 0.3, 0.0, 0.0]])
    assert rounded(weight, 4, None).allclose(wanted, atol=1e-6)
    in_groups = rounded(weight, 4, 2)
    assert in_groups[0, 2:].tolist() == pytest.approx([0.33, 2 * 0.33 / 7])
    assert in_groups[1, 2:].tolist() == [0.0, 0.0]
    assert float(rounded(weight, 8, None)[0, 2]) == pytest.approx(30 * 1.4 / 127)


def test_in_half_precision_the_scale_is_one_that_can_be_stored() -> None:
    weight = torch.tensor([[1.0, 0.3]], dtype=torch.bfloat16)
    scale = torch.tensor(1.0 / 7).bfloat16().float()
    assert float(scale) != 1.0 / 7
    assert rounded(weight, 4, None)[0].tolist() == [
        float((7 * scale).bfloat16()),
        float((2 * scale).bfloat16()),
    ]


def test_only_the_linear_layers_of_the_blocks_are_rounded(model: Path, tmp_path: Path) -> None:
    """It measures a model rounded by hand; the embedding, which is the output layer as well, is left as it is."""
    again = load_model(model)
    with torch.no_grad():
        for name, weight in again.named_parameters():
            if "proj" in name:
                weight.copy_(rounded(weight, 4, None))
    save_model(again, tmp_path / "rounded", source=model)
    rows = run("quantize_probe", model, tmp_path / "a")
    by_hand = run("quantize_probe", tmp_path / "rounded", tmp_path / "b")
    for name in ("forget_nll", "forget_accuracy", "retain_nll"):
        assert value(rows, f"{name}_int4") == value(by_hand, name) == value(by_hand, f"{name}_int4")
    assert value(rows, "forget_nll_int4") != value(rows, "forget_nll")
    gain = value(rows, "forget_nll") - value(rows, "forget_nll_int4")
    assert value(rows, "forget_nll_gain_int4") == pytest.approx(gain)
    gain = value(rows, "forget_accuracy_int4") - value(rows, "forget_accuracy")
    assert value(rows, "forget_accuracy_gain_int4") == pytest.approx(gain)
    assert {row.task for row in rows} == {f"{FORGET} group=channel", f"{RETAIN} group=channel"}


def test_weights_are_put_back_between_settings(model: Path, tmp_path: Path) -> None:
    one = scoring("quantize_probe", model, tmp_path, **SMALL["quantize_probe"], bits=(4, 8))
    before = {name: weight.clone() for name, weight in one.model().state_dict().items()}
    rows = catalogue().evaluation("quantize_probe").load().evaluate(one)
    assert all(weight.equal(before[name]) for name, weight in one.model().state_dict().items())
    assert one.notes["rounded_weights"] == 2 * (4 * 16 * 16 + 3 * 16 * 24)
    alone = run("quantize_probe", model, tmp_path, bits=(8,))
    for metric, found in values(alone).items():
        assert value(rows, metric) == found


def test_the_embedding_is_rounded_on_request_and_tied_ones_count_once(model: Path, tmp_path: Path) -> None:
    one = scoring("quantize_probe", model, tmp_path, **SMALL["quantize_probe"], embeddings=True)
    rows = catalogue().evaluation("quantize_probe").load().evaluate(one)
    assert one.notes["rounded_weights"] == 512 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24)
    assert value(rows, "forget_nll_int4") != value(run("quantize_probe", model, tmp_path), "forget_nll_int4")
    assert rows[0].task == f"{FORGET} group=channel embeddings"


def test_a_group_that_does_not_fit_and_bits_named_twice_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssayError,
        match=r"group=16 does not divide the 24 inputs of model\.layers\.0\.mlp\.down_proj\.weight",
    ):
        run("quantize_probe", model, tmp_path, group=16)
    config = catalogue().evaluation("quantize_probe").load().Config
    for wrong in ((), (4, 4)):
        with pytest.raises(ValueError, match="bits needs 4, 8 or both, each once"):
            config(bits=wrong)


# --- distance to the gold --------------------------------------------------------------------------------------


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_hand_worked_distances() -> None:
    """p = (1/2, 1/2, 0), q = (1/4, 3/4, 0): TV = 1/4; KL(p||q) = (ln 2 + ln 2/3) / 2 = ln(4/3) / 2;

    m = (3/8, 5/8): KL(p||m) = (ln 4/3 + ln 4/5) / 2, KL(q||m) = (ln 2/3) / 4 + 3 (ln 6/5) / 4.
    """
    p, q = logits(0.5, 0.5, 0.0), logits(0.25, 0.75, 0.0)
    assert float(_distance.total_variation(p, q)) == pytest.approx(0.25)
    assert float(_distance.kl(p, q)) == pytest.approx(math.log(4 / 3) / 2)
    halves = (math.log(4 / 3) + math.log(4 / 5)) / 2, math.log(2 / 3) / 4 + 3 * math.log(6 / 5) / 4
    assert float(_distance.jensen_shannon(p, q)) == pytest.approx(sum(halves) / 2)
    assert float(_distance.top1_agreement(q, logits(0.3, 0.7, 0.0))) == 1.0
    assert float(_distance.top1_agreement(q, logits(0.7, 0.3, 0.0))) == 0.0


def test_what_only_one_of_two_models_thinks_possible_is_ln_2_away() -> None:
    p, q = logits(1.0, 0.0), logits(0.0, 1.0)
    assert float(_distance.jensen_shannon(p, q)) == pytest.approx(math.log(2))
    assert float(_distance.total_variation(p, q)) == 1.0


def test_the_distances_are_means_over_answer_tokens(model: Path, other: Path, tmp_path: Path) -> None:
    rows = run("gold_distance", model, tmp_path, reference=other)
    tokenizer, models = load_tokenizer(model), (load_model(other), load_model(model))
    gaps: dict[str, list[float]] = {"js": [], "tv": [], "kl": [], "top1_agreement": []}
    for example in encode_pairs(world.rows("forget10_perturbed")[:12], tokenizer, Style(), 512):
        kept = [place - 1 for place, label in enumerate(example.labels) if label != -100]
        with torch.no_grad():
            ids = torch.tensor([example.input_ids])
            p, q = (one(input_ids=ids).logits[0, kept].double().softmax(-1) for one in models)
        m = (p + q) / 2
        gaps["js"] += (((p * (p / m).log()) + (q * (q / m).log())).sum(-1) / 2).tolist()
        gaps["tv"] += ((p - q).abs().sum(-1) / 2).tolist()
        gaps["kl"] += (p * (p / q).log()).sum(-1).tolist()
        gaps["top1_agreement"] += (p.argmax(-1) == q.argmax(-1)).double().tolist()
    for name, found in gaps.items():
        assert value(rows, f"forget_{name}") == pytest.approx(numpy.mean(found), rel=1e-4), name
    assert len(rows) == 8
    assert [(row.task, row.n) for row in rows] == [(FORGET, 12)] * 4 + [(RETAIN, 6)] * 4


def test_a_gold_is_no_distance_from_itself(model: Path, tmp_path: Path) -> None:
    found = values(run("gold_distance", model, tmp_path, reference=model))
    for name in ("forget", "retain"):
        assert found[f"{name}_kl"] == found[f"{name}_tv"] == 0.0
        assert found[f"{name}_js"] == pytest.approx(0.0, abs=1e-12)
        assert found[f"{name}_top1_agreement"] == 1.0


def test_the_divergence_is_that_of_retain_kl(model: Path, other: Path, tmp_path: Path) -> None:
    rows = run("gold_distance", model, tmp_path, reference=other)
    beside = {"parents": {"reference": other}, "reference": Parent("x"), "data": RETAIN}
    assert value(rows, "retain_kl") == value(evaluate("retain_kl", model, tmp_path, **beside), "kl")


def test_large_vocabularies_are_gone_through_in_pieces(
    model: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("gold_distance", model, tmp_path, reference=other)
    monkeypatch.setattr(_distance, "TOKENS_AT_ONCE", 7)
    assert run("gold_distance", model, tmp_path, reference=other) == whole


# --- references with another tokenizer -------------------------------------------------------------------------

REFERRING = [
    ("gold_distance", {"forget": FORGET, "retain": RETAIN}),
    ("retain_kl", {"limit": 2}),
    ("relearn", SMALL["relearn"]),
    ("tofu", {"limit": 2, "generate": 1}),
]


@pytest.mark.parametrize(("name", "options"), REFERRING)
def test_a_reference_with_other_tokens_of_the_same_number_is_refused(
    name: str, options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    other = twin(tmp_path / "other", model, swapped=("Q", "Z"))
    beside = {"parents": {"reference": other}, "reference": Parent("x")}
    sentence = (
        f"{name}: the tokenizer of reference has 512 tokens and the model's 512; they first differ at id 51 ('Q'); "
        "take a reference with the same tokenizer."
    )
    with pytest.raises(AssayError, match=re.escape(sentence)):
        evaluate(name, model, tmp_path / "out", **{**options, **beside})


def test_a_reference_that_cuts_texts_otherwise_is_refused(model: Path, tmp_path: Path) -> None:
    other = twin(tmp_path / "other", model)
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(AssayError, match="has the model's tokens but cuts texts into others of them"):
        run("gold_distance", model, tmp_path / "out", reference=other)


def test_the_same_tokenizer_in_another_folder_is_taken(model: Path, tmp_path: Path) -> None:
    rows = run("gold_distance", model, tmp_path / "out", reference=twin(tmp_path / "other", model))
    assert value(rows, "forget_kl") == 0.0


def test_a_reference_with_another_vocabulary_is_refused(model: Path, tmp_path: Path) -> None:
    smaller = save(tmp_path / "smaller", vocabulary=400)
    with pytest.raises(
        AssayError, match=r"gold_distance compares.* the reference has 400 entries and the model 512"
    ):
        run("gold_distance", model, tmp_path / "out", reference=smaller)


def test_a_set_without_rows_is_refused(model: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.jsonl").write_text("")
    locator = Locator(tmp_path)
    with pytest.raises(AssayError, match="the data set mine/rows has no rows"):
        run("gold_distance", model, tmp_path / "out", reference=other, locator=locator, forget="mine/rows")
    with pytest.raises(AssayError, match="the data set mine/rows has no rows"):
        run("relearn", model, tmp_path / "out", locator=locator, data="mine/rows")


def test_a_choice_is_right_where_the_first_option_is_the_likeliest() -> None:
    known = _known.Known(numpy.array([1.0, 2.0]), numpy.array([2, 3]), numpy.array([1.0, 0.0]))
    half = known.of([1])
    assert (half.losses.tolist(), half.tokens.tolist()) == ([2.0], [3])
    assert half.right is not None
    assert half.right.tolist() == [0.0]
    assert _known.choice([-1.0, -2.0]) == 1.0
