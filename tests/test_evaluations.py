"""The evaluations that Assay computes itself: TOFU's metrics, perplexity, size, speed, divergence."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from evaluations import _statistics, _unlearning
from evaluations._known import choice
from evaluations._likelihood import generate
from evaluations.perplexity import windows
from methods import world
from methods.architectures import shrink
from methods.checkpoint import Models, load_model, load_tokenizer, save_model
from methods.data import Locator, Style, encode_pairs
from methods.find import EVALUATIONS, catalogue
from methods.generate import continued, ends_of, left_padded
from methods.stage import AssayError, Parent
from tests.small_models import evaluate, save, scoring, value

TOFU_ROWS = set(
    """
    forget_truth_ratio forget_probability forget_rouge forget_accuracy forget_nll extraction_strength
    exact_memorization model_utility retain_probability retain_rouge retain_truth_ratio retain_accuracy retain_nll
    real_authors_probability real_authors_rouge real_authors_truth_ratio real_authors_accuracy
    world_facts_probability world_facts_rouge world_facts_truth_ratio world_facts_accuracy facts_accuracy facts_nll
    """.split()
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "one", seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "other", seed=1)


# --- all of them -----------------------------------------------------------------------------------------------


def test_reading_every_evaluation_loads_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys; from methods.find import catalogue\n"
        "for found in catalogue().evaluations.values(): found.load()\n"
        "print([name for name in ('torch', 'transformers', 'lm_eval', 'datasets', 'scipy') if name in sys.modules])"
    )
    root = EVALUATIONS.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_data_set_that_an_evaluation_names_has_a_digest() -> None:
    tofu, lm_eval = (catalogue().evaluation(name).load() for name in ("tofu", "lm_eval"))
    names = tofu.datasets(tofu.Config(reference=Parent("x")), Locator())
    assert len(names) == 5
    tasks = tuple(path.stem for path in (EVALUATIONS / "tasks").glob("authors_*.yaml"))
    names += lm_eval.datasets(lm_eval.Config(tasks=tasks), Locator())
    assert len(tasks) == 7
    for name in names:
        assert len(Locator().digest(name)) == 64


# --- statistics ------------------------------------------------------------------------------------------------


def test_mean_and_its_standard_error_are_the_textbook_ones() -> None:
    found = _statistics.mean([1.0, 2.0, 3.0, 6.0])
    assert found == (3.0, pytest.approx(math.sqrt(14 / 3 / 4)), 4)
    assert _statistics.mean([5.0]).stderr is None


def test_a_mean_over_tokens_weighs_long_answers_more() -> None:
    found = _statistics.ratio([2.0, 10.0], [1, 4])
    assert found.value == pytest.approx(12 / 5)
    # residuals -0.4 and 0.4: sqrt(2/1 * 0.32) / 5
    assert found.stderr == pytest.approx(0.8 / 5)


def test_harmonic_mean_is_zero_as_soon_as_one_part_is() -> None:
    assert _statistics.harmonic_mean({"a": [[1.0, 1.0], [0.0, 0.0]]}).value == 0.0
    assert _statistics.harmonic_mean({"a": [[1.0], [0.5]], "b": [[0.25]]}).value == pytest.approx(3 / 7)


def test_standard_error_of_the_harmonic_mean_agrees_with_a_bootstrap() -> None:
    draw = numpy.random.default_rng(0)
    shared = draw.uniform(0.2, 1.0, 80)
    parts = {"a": [shared, shared**2], "b": [draw.uniform(0.3, 0.9, 50), draw.uniform(0.3, 0.9, 20)]}

    def resampled() -> float:
        rows = {name: draw.integers(0, len(lists[0]), len(lists[0])) for name, lists in parts.items()}
        chosen = {
            name: [values[rows[name] % len(values)] for values in lists] for name, lists in parts.items()
        }
        return _statistics.harmonic_mean(chosen).value

    spread = numpy.std([resampled() for _ in range(400)])
    stderr = _statistics.harmonic_mean(parts).stderr
    assert stderr is not None
    assert 0.7 < stderr / spread < 1.4


# --- TOFU ------------------------------------------------------------------------------------------------------


def test_a_hand_worked_truth_ratio() -> None:
    right, wrong = numpy.array([math.log(2)]), numpy.array([[math.log(4), math.log(16)]])
    # geometric: 1/8 over 1/2; arithmetic: (1/4 + 1/16) / 2 over 1/2
    assert _unlearning.truth_ratio(right, wrong, "open_unlearning")[0] == pytest.approx(0.25, rel=1e-8)
    assert _unlearning.truth_ratio(right, wrong, "tofu")[0] == pytest.approx(0.3125)
    assert _unlearning.true_better(numpy.array([0.25, 3.0])).tolist() == [0.75, 0.0]


def test_extraction_strength_and_memorization_leave_the_end_mark_out() -> None:
    correct = numpy.array([False, True, True, False])
    assert _unlearning.extraction_strength(correct) == pytest.approx(2 / 3)
    assert _unlearning.exact_memorization(correct) == pytest.approx(2 / 3)
    assert _unlearning.extraction_strength(numpy.array([True, False, True])) == 0.5


def test_a_tie_in_multiple_choice_is_worth_its_chance() -> None:
    assert choice([-1.0, -1.0, -1.0, -1.0]) == 0.25
    assert choice([-1.0, -1.5, -3.0, -2.0]) == 1.0
    assert choice([-1.6, -1.5, -3.0, -2.0]) == 0.0


def test_tofu_gives_every_documented_row_once(model: Path, tmp_path: Path) -> None:
    rows = evaluate("tofu", model, tmp_path, limit=8, generate=4, max_new_tokens=4)
    assert {row.metric for row in rows} == TOFU_ROWS
    assert len(rows) == len(TOFU_ROWS)
    assert all(math.isfinite(row.value) for row in rows)
    expected = "authors/forget10 definition=open_unlearning generate=4 max_new_tokens=4 batch=64 limit=8"
    assert {row.task for row in rows} == {expected}


def test_tofu_is_the_same_twice_and_the_batch_moves_no_more_than_rounding(
    model: Path, tmp_path: Path
) -> None:
    options = {"limit": 6, "generate": 3, "max_new_tokens": 4}
    first, again = (evaluate("tofu", model, tmp_path, batch=16, **options) for _ in range(2))
    assert first == again
    alone = evaluate("tofu", model, tmp_path, batch=1, **options)
    assert [row.value for row in alone] == pytest.approx([row.value for row in first], rel=1e-3, abs=1e-5)


def test_a_model_that_is_its_own_reference_has_forgotten_as_much(model: Path, tmp_path: Path) -> None:
    options = {"limit": 10, "generate": 2, "max_new_tokens": 2, "reference": Parent("x")}
    rows = evaluate("tofu", model, tmp_path, parents={"reference": model}, **options)
    assert value(rows, "forget_quality") == 1.0
    assert value(rows, "privleak") == 0.0


def test_another_reference_can_be_told_apart(model: Path, other: Path, tmp_path: Path) -> None:
    options = {"generate": 1, "max_new_tokens": 1, "reference": Parent("x")}
    rows = evaluate("tofu", model, tmp_path, parents={"reference": other}, **options)
    assert value(rows, "forget_quality") < 1.0
    assert value(rows, "privleak") != 0.0


def test_the_two_definitions_of_the_truth_ratio_differ(model: Path, tmp_path: Path) -> None:
    found = [
        value(evaluate("tofu", model, tmp_path, limit=8, generate=1, definition=name), "forget_truth_ratio")
        for name in ("open_unlearning", "tofu")
    ]
    assert found[0] != found[1]


def test_answer_loss_is_the_mean_over_the_tokens_of_the_true_answers(model: Path, tmp_path: Path) -> None:
    rows = evaluate("tofu", model, tmp_path, limit=5, generate=1)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    total, tokens = 0.0, 0
    for example in encode_pairs(world.rows("forget10_perturbed")[:5], tokenizer, Style(), 128):
        labels = torch.tensor([example.labels])
        with torch.no_grad():
            loss = loaded(input_ids=torch.tensor([example.input_ids]), labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        total, tokens = total + float(loss) * count, tokens + count
    assert value(rows, "forget_nll") == pytest.approx(total / tokens, rel=1e-5)


def test_rows_without_wrong_answers_are_refused_with_a_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tofu").mkdir()
    for name in ("forget01", "retain", "real_authors", "world_facts"):
        (tmp_path / "tofu" / f"{name}_perturbed.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    with pytest.raises(
        AssayError, match=r"have no column 'perturbed_answer'; tofu needs TOFU's perturbed files\."
    ):
        evaluate("tofu", model, tmp_path, locator=Locator(tmp_path), dataset="tofu", split="forget01")


# --- generation ------------------------------------------------------------------------------------------------


def test_writing_with_a_cache_in_a_padded_batch_equals_writing_without(model: Path) -> None:
    loaded = load_model(model)
    prompts = [[5, 9, 300, 77, 12], [400, 3], [8, 8, 250]]
    inputs, mask = left_padded(prompts, 0)
    with torch.no_grad():
        batched = continued(loaded, inputs, mask, 6, ends=set())
        for prompt, found in zip(prompts, batched, strict=True):
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(loaded(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert ids[len(prompt) :] == found


def test_writing_stops_at_the_end_mark(model: Path) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    inputs, mask = left_padded([[5, 9, 300]], 0)
    with torch.no_grad():
        free = continued(loaded, inputs, mask, 6, ends=set())[0]
        stopped = continued(loaded, inputs, mask, 6, ends={free[2]})[0]
    assert stopped == free[: free.index(free[2])]
    assert ends_of(loaded, tokenizer, Style()) == {tokenizer.eos_token_id}
    assert len(generate(loaded, tokenizer, Style(), ["Who?", "What is it?"], 3, batch=1)) == 2


# --- perplexity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(50, 16, 16), (50, 16, 5), (16, 16, 8), (17, 16, 1), (9, 16, 16)]
)
def test_windows_score_every_token_once(length: int, context: int, stride: int) -> None:
    ids = list(range(100, 100 + length))
    found = windows(ids, context, stride)
    scored = [label for window in found for label in window.labels[1:] if label != -100]
    # With no overlap nothing stands before the first token of a window.
    unscored = set(ids[::context]) if stride == context else {ids[0]}
    assert scored == [token for token in ids if token not in unscored]
    for number, window in enumerate(found):
        assert list(window.input_ids) == ids[number * stride :][:context]


def test_perplexity_equals_a_direct_reading_with_the_same_contexts(model: Path, tmp_path: Path) -> None:
    options = {"data": "authors/text[0:2]", "context_tokens": 24, "stride_tokens": 7}
    rows = evaluate("perplexity", model, tmp_path, batch=3, **options)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    text = "".join(row["text"] + "\n" for row in world.rows("text")[:2])
    ids = tokenizer(text)["input_ids"]
    losses = []
    for place in range(1, len(ids)):
        begin = 0 if place < 24 else math.ceil((place - 24 + 1) / 7) * 7
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor([ids[begin:place]])).logits[0, -1]
        losses.append(-float(logits.log_softmax(-1)[ids[place]]))
    assert value(rows, "nll") == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert value(rows, "perplexity") == pytest.approx(math.exp(value(rows, "nll")))
    bits = value(rows, "nll") / math.log(2) * len(ids) / len(text.encode())
    assert value(rows, "bits_per_byte") == pytest.approx(bits)
    assert {row.n for row in rows} == {len(losses)}
    assert {row.task for row in rows} == {"authors/text[0:2] context=24 stride=7 joined=lines"}


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tmp_path: Path) -> None:
    blank = save(tmp_path / "blank", scale=0.0)
    rows = evaluate("perplexity", blank, tmp_path / "out", data="authors/text[0:2]", context_tokens=32)
    assert value(rows, "perplexity") == pytest.approx(512.0, rel=1e-4)


def test_a_stride_that_would_leave_tokens_out_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="stride_tokens=40 is longer than context_tokens=32"):
        evaluate("perplexity", model, tmp_path, data="authors/text", context_tokens=32, stride_tokens=40)
    with pytest.raises(AssayError, match="needs rows with a text column"):
        evaluate("perplexity", model, tmp_path, data="authors/forget10")


# --- size, divergence, speed -----------------------------------------------------------------------------------


def test_size_counts_tied_weights_once_and_zeros_not_at_all(model: Path, tmp_path: Path) -> None:
    pruned = load_model(model)
    with torch.no_grad():
        pruned.model.layers[0].mlp.up_proj.weight[:12] = 0.0
    save_model(pruned, tmp_path / "pruned", source=model)
    rows = evaluate("size", tmp_path / "pruned", tmp_path / "out")
    total = 512 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert value(rows, "parameters") == total
    # the padding token's row of the embedding is zero, too
    assert value(rows, "nonzero") == total - 13 * 16
    assert value(rows, "sparsity") == pytest.approx(13 * 16 / total)
    assert value(rows, "file_bytes") == (tmp_path / "pruned" / "model.safetensors").stat().st_size
    assert value(rows, "physical") == 0.0


def test_size_and_speed_look_at_the_physically_smaller_form(model: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    save_model(load_model(model), both, source=model)
    save(both / "physical", vocabulary=400)
    rows = evaluate("size", both, tmp_path / "out")
    assert value(rows, "parameters", "masked") - value(rows, "parameters", "physical") == 112 * 16
    assert value(rows, "physical") == 1.0
    rows = evaluate("speed", both, tmp_path / "out", prompt_tokens=8, new_tokens=4, repeats=2, seconds=0.05)
    assert all(
        row.task.startswith("physical=true prompt_tokens=8 new_tokens=4 batch=1 device=") for row in rows
    )
    *phases, memory = rows
    assert [row.metric for row in phases] == [
        f"{phase}_{what}"
        for phase in ("prefill", "decode")
        for what in ("tokens_per_second", "joules_per_token")
    ]
    assert all(row.value > 0 for row in phases)
    assert {row.unit for row in phases} <= {"tokens/s", "J/token estimated", "J/token measured"}
    weights = 400 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    cached = 2 * 2 * 16 * (8 + 4)  # two layers, keys and values, 16 numbers for each of the tokens
    assert (memory.metric, memory.value) == ("memory_bytes", 4 * (weights + cached))


def test_an_attention_that_is_gone_takes_no_memory_for_keys_and_values(model: Path, tmp_path: Path) -> None:
    both, masked = tmp_path / "both", load_model(model)
    save_model(masked, both, source=model)
    masked.model.layers[0].self_attn.o_proj.weight.data.zero_()
    save_model(shrink(masked), both / "physical", source=model)
    options = {"prompt_tokens": 8, "new_tokens": 4, "repeats": 2, "seconds": 0.01}
    whole, cut = (
        value(evaluate("speed", at, tmp_path / "out", **options), "memory_bytes") for at in (model, both)
    )
    assert whole - cut == 4 * (4 * 16 * 16 + 16 + 2 * 16 * 12)


def test_speed_refuses_more_tokens_than_the_model_has_places(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="120 prompt and 32 new tokens do not fit this model's 128"):
        evaluate("speed", model, tmp_path, prompt_tokens=120)


def test_a_model_does_not_diverge_from_itself(model: Path, tmp_path: Path) -> None:
    rows = evaluate(
        "retain_kl", model, tmp_path, parents={"reference": model}, reference=Parent("x"), limit=6
    )
    assert value(rows, "kl") == 0.0
    assert rows[0].task == "authors/retain_perturbed limit=6"


def test_divergence_runs_from_the_reference_to_the_model(model: Path, other: Path, tmp_path: Path) -> None:
    rows = evaluate(
        "retain_kl", model, tmp_path, parents={"reference": other}, reference=Parent("x"), limit=3
    )
    models, tokenizer = Models(), load_tokenizer(model)
    total, tokens = 0.0, 0
    for example in encode_pairs(world.rows("retain_perturbed")[:3], tokenizer, Style(), 128):
        ids = torch.tensor([example.input_ids])
        p, q = (
            models.load(folder)(input_ids=ids).logits.double().log_softmax(-1) for folder in (other, model)
        )
        kept = [place - 1 for place, label in enumerate(example.labels) if label != -100]
        total += float((p.exp() * (p - q)).sum(-1)[0, kept].sum())
        tokens += len(kept)
    assert value(rows, "kl") == pytest.approx(total / tokens, rel=1e-4)
    assert rows[0].n == 3


def test_divergence_between_two_vocabularies_is_refused(model: Path, tmp_path: Path) -> None:
    smaller = save(tmp_path / "smaller", vocabulary=400)
    found = scoring(
        "retain_kl", model, tmp_path / "out", parents={"reference": smaller}, reference=Parent("x"), limit=2
    )
    with pytest.raises(AssayError, match="the reference has 400 entries and the model 512"):
        catalogue().evaluation("retain_kl").load().evaluate(found)
