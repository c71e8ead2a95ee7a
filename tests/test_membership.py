"""Membership inference: each attack's score by hand, areas with their errors, and what is refused."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from evaluations import _membership, _unlearning, membership
from evaluations._likelihood import Answer, answers
from methods.checkpoint import Models, load_model, load_tokenizer, save_model
from methods.data import Example, Locator, Part, Style
from methods.stage import AssayError, Parent
from tests.generic import FORGET, world
from tests.small_models import evaluate, save, scoring, value

ATTACKS = ("loss", "min_k", "min_k_plus_plus", "zlib", "reference", "gradnorm")
SMALL = {"members": "authors/forget10_perturbed", "others": "authors/holdout_perturbed", "limit": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "one", seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "other", seed=1)


def row_of(*losses: float) -> Answer:
    """An answer whose last loss is that of the end mark."""
    return Answer(numpy.array(losses), numpy.zeros(len(losses), dtype=bool), len(losses))


def table(*distributions: tuple[float, ...]) -> Any:
    """A model that gives each token id its own distribution of the next."""
    logits = torch.tensor(distributions, dtype=torch.float64).log()
    return lambda input_ids, attention_mask: SimpleNamespace(logits=logits[input_ids])


def part_of(ids: list[int], labels: list[int]) -> Part:
    rows = torch.tensor([ids])
    return Part(rows, torch.ones_like(rows), torch.tensor([labels]), "row")


# --- scores ----------------------------------------------------------------------------------------------------


def test_min_k_leaves_the_end_mark_out_and_takes_the_dearest_tokens() -> None:
    """Kept: 1, 4, 2, 3, 5; two fifths of them are the two largest."""
    found = _membership.min_k([row_of(1.0, 4.0, 2.0, 3.0, 5.0, 99.0)], 0.4)
    assert found.tolist() == [4.5]
    assert _membership.min_k([row_of(1.0, 4.0, 99.0)], 0.4).tolist() == [4.0]


def test_a_share_too_small_for_one_token_still_takes_one_unless_none_will_do() -> None:
    assert _unlearning.min_k(numpy.array([1.0, 2.0, 9.0]), 0.4) == 2.0
    assert math.isnan(_unlearning.min_k(numpy.array([1.0, 2.0, 9.0]), 0.4, least=0))
    assert math.isnan(_unlearning.min_k(numpy.array([9.0])))


def test_tokens_are_standardized_under_the_distribution_that_they_came_from() -> None:
    """p = (3/4, 1/4): the two log-probabilities lie ln 3 apart, their variance is 3/16 ln(3)^2.

    So the likely token lies 1/4 ln 3 above the mean, 1/sqrt(3) deviations, and the unlikely one sqrt(3) below.
    """
    model, part = table((0.75, 0.25), (0.75, 0.25)), part_of([0, 1, 1, 0], [-100, 0, 1, 1])
    found = answers(model, part, standardized=True)[0]
    assert found.standardized is not None
    assert found.standardized.tolist() == pytest.approx([3**-0.5, -(3**0.5), -(3**0.5)])
    # of the two that are kept the lower one, turned round
    assert _membership.min_k_plus_plus([found], 0.5).tolist() == pytest.approx([3**0.5])
    assert answers(model, part)[0].standardized is None


def test_a_distribution_without_variance_or_with_impossible_entries_stays_finite() -> None:
    part = part_of([0, 1, 0], [-100, 1, 0])
    flat = answers(table((0.5, 0.5), (0.5, 0.5)), part, standardized=True)[0].standardized
    padded = answers(table((0.75, 0.25, 0.0), (0.75, 0.25, 0.0)), part, standardized=True)[0].standardized
    assert flat is not None and padded is not None
    assert flat.tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    assert padded.tolist() == pytest.approx([-(3**0.5), 3**-0.5])


def test_compressed_length_and_reference_enter_as_published() -> None:
    found, text = [row_of(1.0, 2.0, 6.0)], " Alvora."
    assert _membership.zlib_ratio(found, [text]).tolist() == [3.0 / len(zlib.compress(text.encode()))]
    assert _membership.less_than_reference(found, [row_of(0.5, 0.5, 0.5)]).tolist() == [2.5]


class Constant(nn.Module):
    """Logits that are the sum of two weight vectors, wherever; a third weight is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=(self.one + self.two).expand(*input_ids.shape, 2))


def test_gradient_norm_is_a_mean_over_the_weights_that_have_one() -> None:
    """softmax - onehot is (-1/2, 1/2) for token 0 and (1/2, -1/2) for token 1.

    Of the targets 0, 0, 1 and an end mark the mean is (-1/6, 1/6), its norm sqrt(2)/6, for both weights alike.
    """
    example = Example((1, 0, 0, 1, 1), (-100, 0, 0, 1, 1))
    found = _membership.gradient_norms(Constant(), [example, Example((1, 0), (-100, 0))])
    assert found[0] == pytest.approx(2**0.5 / 6, rel=1e-6)
    # an answer of one token has nothing left
    assert math.isnan(found[1])


def test_gradient_norms_leave_the_model_as_they_found_it() -> None:
    model = Constant().requires_grad_(False)
    model.two.requires_grad_(True)
    model.two.grad = torch.tensor([5.0, 7.0])
    _membership.gradient_norms(model, [Example((1, 0, 1), (-100, 0, 1))])
    assert [weight.requires_grad for weight in model.parameters()] == [False, True, False]
    assert model.one.grad is None
    assert model.two.grad.tolist() == [5.0, 7.0]


def test_a_scored_model_keeps_no_gradients(model: Path, tmp_path: Path) -> None:
    found = scoring("membership", model, tmp_path, attacks=("gradnorm",), **SMALL)
    membership.evaluate(found)
    weights = list(found.model().parameters())
    assert not any(weight.requires_grad for weight in weights)
    assert all(weight.grad is None for weight in weights)
    assert not found.model().training


def test_gradient_norms_are_those_of_a_backward_pass(model: Path, tmp_path: Path) -> None:
    found = scoring("membership", model, tmp_path, attacks=("gradnorm",), **SMALL)
    rows = found.data.rows("authors/forget10_perturbed")[:2]
    examples = _membership.encoded(rows, "rows", found.tokenizer(), Style(), 128)
    norms = _membership.gradient_norms(found.model(), examples)
    trained = load_model(model)
    for example, norm in zip(examples, norms, strict=True):
        trained.zero_grad()
        # the end mark is no target
        labels = torch.tensor([[*example.labels[:-1], -100]])
        trained(input_ids=torch.tensor([example.input_ids]), labels=labels).loss.backward()
        expected = [float(weight.grad.norm()) for weight in trained.parameters()]
        assert norm == pytest.approx(sum(expected) / len(expected), rel=1e-4)


# --- areas and rates -------------------------------------------------------------------------------------------


def test_an_area_with_delongs_error_by_hand() -> None:
    """Members 1, 2 and others 2, 3: placements 1, 3/4 and 3/4, 1; area 7/8.

    Each side's sample variance is 1/32, over two rows 1/64; together 1/32.
    """
    found = _membership.area(numpy.array([1.0, 2.0]), numpy.array([2.0, 3.0]))
    sides = _membership.placements(numpy.array([1.0, 2.0]), numpy.array([2.0, 3.0]))
    assert [side.tolist() for side in sides] == [[1.0, 0.75], [0.75, 1.0]]
    assert found == (0.875, pytest.approx(32**-0.5), 4)
    assert _membership.area(numpy.array([1.0]), numpy.array([2.0, 3.0])).stderr is None


def test_rows_without_a_score_are_left_out_of_an_area() -> None:
    members = numpy.array([1.0, math.nan, 2.0])
    assert _membership.area(members, numpy.array([2.0, 3.0])).value == 0.875
    with pytest.raises(AssayError, match="none of the others can be scored: the last token is left out"):
        _membership.area(members, numpy.array([math.nan]))


@pytest.mark.parametrize("area", [0.0, 0.1, 0.5, 0.875, 1.0])
def test_the_ends_of_an_interval_lie_two_of_their_own_errors_away(area: float) -> None:
    low, high = _membership.interval(area, 12, 20)
    assert 0.0 <= low <= area <= high <= 1.0
    for end in {low, high} - {0.0, 1.0}:
        distance = abs(area - end) / _membership._variance(end, 12, 20) ** 0.5
        assert distance == pytest.approx(1.96, abs=1e-3)
    assert (1 - high, 1 - low) == pytest.approx(_membership.interval(1 - area, 12, 20), abs=1e-9)


def test_the_interval_of_a_perfect_area_is_no_point() -> None:
    low, high = _membership.interval(1.0, 60, 100)
    assert 0.93 < low < 0.99
    assert high == 1.0


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Normal scores one deviation apart: the area is Phi(1/sqrt(2)) = 0.7602."""
    draw, truth, held = numpy.random.default_rng(0), 0.760250, 0
    for _ in range(400):
        members, others = draw.normal(0.0, 1.0, 20), draw.normal(1.0, 1.0, 30)
        low, high = _membership.interval(_membership.area(members, others).value, 20, 30)
        held += low <= truth <= high
    assert 0.925 <= held / 400 <= 0.985


def test_members_are_found_below_the_threshold_that_few_others_pass() -> None:
    """Of 20 others one may pass at 5 %, so the threshold is the second lowest, 3; at 1 % none, the lowest, 2.5."""
    others = numpy.array([2.5, 3.0, *range(4, 22)])
    members = numpy.array([1.0, 2.0, 2.7, 3.0])
    assert _membership.true_positive_rate(members, others, 0.05).value == 0.75
    assert _membership.true_positive_rate(members, others, 0.01).value == 0.5
    # 0.05 * 60 is a little below 3 in floating point
    assert (
        _membership.true_positive_rate(members, numpy.array([1.0, 1.0, 1.0] + [2.5] * 57), 0.05).value == 0.5
    )


def test_privacy_leak_and_its_error_agree_with_a_bootstrap() -> None:
    draw = numpy.random.default_rng(1)
    hard = draw.normal(0.0, 1.0, 60), draw.normal(0.0, 1.0, 80)
    found = (hard[0] + draw.normal(-0.8, 0.5, 60), hard[1] + draw.normal(0.0, 0.5, 80))
    retained = (hard[0] + draw.normal(0.0, 0.5, 60), hard[1] + draw.normal(0.0, 0.5, 80))
    leak = _membership.privacy_leak(found, retained)
    areas = [_membership.area(*scores).value for scores in (found, retained)]
    assert leak.value == _unlearning.privacy_leak(*areas)
    assert leak.n == 140

    def resampled() -> float:
        rows = draw.integers(0, 60, 60), draw.integers(0, 80, 80)
        again = [(scores[0][rows[0]], scores[1][rows[1]]) for scores in (found, retained)]
        return _membership.privacy_leak(*again).value

    spread = numpy.std([resampled() for _ in range(300)])
    assert leak.stderr is not None
    assert 0.8 < leak.stderr / spread < 1.25
    assert _membership.privacy_leak(found, found)[:2] == (0.0, 0.0)


# --- the evaluation --------------------------------------------------------------------------------------------


def test_every_attack_has_its_five_rows(model: Path, other: Path, tmp_path: Path) -> None:
    options = {**SMALL, "attacks": ATTACKS, "reference": Parent("x")}
    rows = evaluate("membership", model, tmp_path, parents={"reference": other}, **options)
    ends = ("auc", "auc_low", "auc_high", "tpr_at_1_percent", "tpr_at_5_percent")
    assert [row.metric for row in rows] == [f"{attack}_{end}" for attack in ATTACKS for end in ends] + [
        "privleak"
    ]
    assert {row.task for row in rows} == {
        "authors/forget10_perturbed others=authors/holdout_perturbed share=0.4 context_tokens=512 limit=8"
    }
    for attack in ATTACKS:
        assert (
            value(rows, f"{attack}_auc_low")
            < value(rows, f"{attack}_auc")
            < value(rows, f"{attack}_auc_high")
        )


def test_what_is_known_by_heart_is_found_by_every_attack(tmp_path: Path) -> None:
    parents = {"reference": world().parents["other"]}
    options = {
        "members": FORGET,
        "others": "authors/holdout[0:8]",
        "reference": Parent("x"),
        "attacks": ATTACKS,
    }
    rows = evaluate("membership", world().parents["whole"], tmp_path, parents=parents, **options)
    assert [value(rows, f"{attack}_auc") for attack in ATTACKS] == pytest.approx([1.0] * 6, abs=0.05)
    assert value(rows, "loss_tpr_at_1_percent") == 1.0


def test_a_model_compared_with_itself_leaks_nothing(model: Path, tmp_path: Path) -> None:
    options = {**SMALL, "attacks": ("reference", "min_k"), "reference": Parent("x")}
    rows = evaluate("membership", model, tmp_path, parents={"reference": model}, **options)
    assert value(rows, "reference_auc") == 0.5
    assert value(rows, "reference_tpr_at_5_percent") == 0.0
    assert value(rows, "privleak") == 0.0


def test_tofu_gives_the_same_privacy_leak(model: Path, other: Path, tmp_path: Path) -> None:
    parents, reference = {"reference": other}, {"reference": Parent("x")}
    tofu = evaluate(
        "tofu", model, tmp_path / "a", parents=parents, limit=8, generate=1, max_new_tokens=2, **reference
    )
    found = evaluate(
        "membership", model, tmp_path / "b", parents=parents, attacks=("min_k",), **SMALL, **reference
    )
    assert value(found, "privleak") == pytest.approx(value(tofu, "privleak"), rel=1e-9)


def test_each_text_is_a_row_of_its_own(model: Path) -> None:
    tokenizer, rows = load_tokenizer(model), [{"text": "Alvora is a city."}, {"text": "Who?"}]
    examples = _membership.encoded(rows, "texts", tokenizer, Style(), 128)
    assert [tokenizer.decode(example.input_ids) for example in examples] == ["Alvora is a city.\n", "Who?\n"]
    # nothing stands before the first token
    assert all(
        example.labels[0] == -100 and example.labels[1:] == example.input_ids[1:] for example in examples
    )
    cut = _membership.encoded(rows, "texts", tokenizer, Style(), 3)
    assert [example.input_ids for example in cut] == [example.input_ids[:3] for example in examples]


def test_texts_can_be_told_apart_as_well(model: Path, tmp_path: Path) -> None:
    options = {"members": "authors/text[0:6]", "others": "authors/text_holdout[0:5]", "attacks": ATTACKS[:4]}
    rows = evaluate("membership", model, tmp_path, **options)
    assert {row.n for row in rows if row.metric == "loss_auc"} == {11}


# --- what is refused -------------------------------------------------------------------------------------------


def refused(folder: Path, sentence: str, model: Path, lines: dict[str, list[Any]], **options: Any) -> None:
    """Files of these rows below ``own/``, and the sentence that scoring them ends with."""
    (folder / "own").mkdir()
    for name, rows in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "own" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(AssayError, match=sentence):
        evaluate("membership", model, folder / "out", locator=Locator(folder), **options)


PAIR = {"question": "Who?", "answer": "Nobody at all."}
OTHER_PAIR = {"question": "Where?", "answer": "Nowhere at all."}


def test_an_empty_set_is_refused(model: Path, tmp_path: Path) -> None:
    refused(tmp_path, "the data set own/none has no rows: there is nothing to score", model, {"none": []},
            members="own/none")  # fmt: skip


def test_blank_lines_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "lines.txt").write_text("\nAlvora.\n \n\nA city.\n", encoding="utf-8")
    rows = _membership.rows_of(Locator(tmp_path), "own/lines", limit=2)
    assert [row["text"] for row in rows] == ["Alvora.", "A city."]


def test_an_empty_answer_is_refused(model: Path, tmp_path: Path) -> None:
    rows = {"blank": [PAIR, OTHER_PAIR | {"answer": " "}]}
    refused(tmp_path, "own/blank: the answer of row 1 is empty", model, rows, members="own/blank")


def test_a_row_that_stands_in_both_sets_is_refused(model: Path, tmp_path: Path) -> None:
    rows = {"one": [PAIR, OTHER_PAIR], "two": [OTHER_PAIR]}
    sentence = "1 of the 2 rows of members='own/one' stand in others='own/two', too; 'Where.' is row 1 of the first and"
    refused(tmp_path, sentence, model, rows, members="own/one", others="own/two")


def test_texts_against_questions_are_refused(model: Path, tmp_path: Path) -> None:
    rows = {"texts": [{"text": "A city."}]}
    refused(
        tmp_path, "have to be of one kind: question and answer, or text", model, rows, members="own/texts"
    )


def test_rows_of_another_kind_are_refused(model: Path, tmp_path: Path) -> None:
    rows = {"one": [{"title": "A"}], "two": [{"title": "B"}]}
    refused(tmp_path, "own/one needs rows with a question and an answer, or with a text, and all the same; these "
            "have: title", model, rows, members="own/one", others="own/two")  # fmt: skip


def test_answers_of_which_the_context_leaves_one_token_are_refused(model: Path, tmp_path: Path) -> None:
    rows = {"one": [PAIR], "two": [PAIR | {"answer": "Somebody."}]}
    prompt = len(load_tokenizer(model)("Question: Who?\nAnswer:")["input_ids"])
    refused(tmp_path, "none of the members can be scored: the last token is left out", model, rows,
            members="own/one", others="own/two", context_tokens=prompt + 1, attacks=("min_k",))  # fmt: skip


def test_a_text_of_one_token_is_refused(model: Path, tmp_path: Path) -> None:
    rows = {"one": [{"text": "A city."}, {"text": "\n?"}], "two": [{"text": "A town."}]}
    refused(tmp_path, "own/one: row 0: context_tokens=1 leaves no room|own/one: row 0: the text is shorter than two "
            "tokens", model, rows, members="own/one", others="own/two", context_tokens=1)  # fmt: skip


def test_attacks_that_lack_their_reference_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="the attack 'reference' compares with another model; name it with"):
        evaluate("membership", model, tmp_path, attacks=("loss", "reference"))
    with pytest.raises(
        AssayError, match="none of the attacks looks at the reference; add 'reference' or 'min_k'"
    ):
        evaluate(
            "membership",
            model,
            tmp_path,
            attacks=("loss",),
            reference=Parent("x"),
            parents={"reference": model},
        )
    with pytest.raises(AssayError, match="at least one attack, and each only once"):
        evaluate("membership", model, tmp_path, attacks=("loss", "loss"))


def test_a_reference_that_reads_other_tokens_is_refused(model: Path, tmp_path: Path) -> None:
    smaller = save(tmp_path / "smaller", vocabulary=400)
    with pytest.raises(AssayError, match="membership: the tokenizer of reference has 400 tokens"):
        evaluate(
            "membership", model, tmp_path, parents={"reference": smaller}, reference=Parent("x"), **SMALL
        )


def test_a_model_that_gives_no_numbers_is_refused(model: Path, tmp_path: Path) -> None:
    broken = load_model(model)
    save_model(broken, tmp_path / "broken", source=model)
    found = scoring("membership", tmp_path / "broken", tmp_path / "out", **SMALL)
    assert isinstance(found.models, Models)
    with torch.no_grad():
        found.model().model.norm.weight.fill_(math.nan)
    with pytest.raises(
        AssayError, match="loss on row 0 of authors/forget10_perturbed is not a finite number"
    ):
        membership.evaluate(found)
