"""MGSR: DAC-KL and its bounds, span consistency, and answers that the teacher has put right."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods import distill
from methods.data import Part, byte_bpe
from methods.distill import mgsr
from methods.distill._revision import Revision, error_position
from methods.distill._rollouts import Writer
from methods.distill._sources import Live
from methods.gradient import Gradient
from methods.stage import AssayError, Component, Parent
from methods.term import Look, Tokens, View, _blocks, dac_kl, span_consistency
from tests.training import curve_of, make_parent, make_stage, same, weights_of

TEACHER = Parent("model.new-000000000000")
EVEN = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
UNEVEN = torch.tensor([[0.1, 0.4, 0.3, 0.2]], dtype=torch.float64)


# --- DAC-KL -----------------------------------------------------------------------------------------------------


def tokens(student: Tensor, teacher: Tensor, target: int = 1, companion: Any = None) -> Tokens:
    """Tokens with these probabilities [n,V]."""
    targets = torch.full((len(student),), target)
    return Tokens(student.log(), targets, teacher.log(), companion=companion)


def random_tokens(companion: Any = None, count: int = 6, vocabulary: int = 40) -> Tokens:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(count, vocabulary, generator=draw) for _ in range(2))
    targets = torch.randint(vocabulary, (count,), generator=draw)
    return Tokens(student.requires_grad_(), targets, teacher, companion=companion)


def learned(**options: Any) -> tuple[dac_kl.Config, Any]:
    config = dac_kl.Config(**options)
    return config, dac_kl.companion(config, SimpleNamespace(seed=3, device="cpu"))


def test_fixed_bounds_keep_what_lies_between_two_quantiles() -> None:
    # the median of 0.1 0.2 0.3 0.4 is 0.25: kept are 0.4 and 0.3, divided by 0.7
    found = dac_kl.token_losses(dac_kl.Config(lower_quantile=0.5), tokens(EVEN, UNEVEN))
    expected = 4 / 7 * math.log((4 / 7) / 0.5) + 3 / 7 * math.log((3 / 7) / 0.5)
    assert found["loss"].tolist() == pytest.approx([expected])
    assert found["kept"].tolist() == pytest.approx([2.0])
    assert found["kept_mass"].tolist() == pytest.approx([0.7])


@pytest.mark.parametrize("level", [0.0, 0.1, 0.29, 0.5, 0.57, 0.95, 1.0])
def test_quantiles_are_those_of_torch_to_the_last_digit(level: float) -> None:
    falling = torch.rand(5, 101, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(
        descending=True
    )
    expected = torch.quantile(falling.values, level, dim=-1, keepdim=True)
    assert dac_kl.quantile(falling.values, level).equal(expected)


def test_the_target_stays_unless_asked_otherwise() -> None:
    for keep, count in ((True, 3.0), (False, 2.0)):
        config = dac_kl.Config(lower_quantile=0.5, keep_target=keep)
        assert dac_kl.token_losses(config, tokens(EVEN, UNEVEN, target=0))["kept"].tolist() == [count]


def test_bounds_that_leave_too_little_get_the_likeliest_back() -> None:
    config = dac_kl.Config(lower_quantile=0.1, upper_quantile=0.2, keep_target=False, least_entries=3)
    # nothing lies between the two quantiles, and the three likeliest make up 0.9
    assert dac_kl.token_losses(config, tokens(EVEN, UNEVEN))["kept_mass"].tolist() == pytest.approx([0.9])


def test_open_bounds_are_the_forward_kl() -> None:
    expected = (UNEVEN * (UNEVEN / EVEN).log()).sum(-1)
    for renormalise in (True, False):
        config = dac_kl.Config(upper_quantile=1.0, renormalise=renormalise)
        found = dac_kl.token_losses(config, tokens(EVEN, UNEVEN))
        torch.testing.assert_close(found["loss"], expected)


def test_without_renormalising_the_products_are_added_up_as_they_are() -> None:
    config = dac_kl.Config(lower_quantile=0.5, renormalise=False)
    expected = 0.4 * math.log(1.6) + 0.3 * math.log(1.2)
    assert dac_kl.token_losses(config, tokens(EVEN, UNEVEN))["loss"].tolist() == pytest.approx([expected])


def test_a_learned_window_weighs_ranks() -> None:
    config, _ = learned(keep_target=False, mass_penalty=0.0, sharpness=0.25, least_entries=1)
    wanted = torch.tensor([[0.3, -0.4]])
    found = dac_kl.token_losses(config, tokens(EVEN, UNEVEN, companion=lambda features: wanted))
    lower, upper = (float(bound) for bound in dac_kl.bounds_of(config, wanted, 4))
    weights = [
        1 / (1 + math.exp(-(rank - lower) / 0.25)) / (1 + math.exp(-(upper - rank) / 0.25))
        for rank in (0, 1, 2 / 3, 1 / 3)  # of 0.1, 0.4, 0.3, 0.2
    ]
    p = [weight * chance for weight, chance in zip(weights, UNEVEN[0].tolist(), strict=True)]
    pairs = [(a / sum(p), w / sum(weights)) for a, w in zip(p, weights, strict=True)]
    expected = sum(a * math.log(a / b) for a, b in pairs)
    assert found["loss"].tolist() == pytest.approx([expected], rel=1e-6)
    assert found["kept_mass"].tolist() == pytest.approx([sum(p)], rel=1e-6)
    assert found["kept"].tolist() == pytest.approx([sum(weights)], rel=1e-6)


@pytest.mark.parametrize("window", ["soft", "straight_through"])
def test_a_learned_window_always_keeps_the_target(window: str) -> None:
    """Its weight is 1 also where it is the least likely entry, and the bounds lie above it."""
    above = torch.tensor([[50.0, 50.0]])
    kept = []
    for keep in (True, False):
        config, _ = learned(keep_target=keep, sharpness=0.01, least_entries=1, window=window)
        given = tokens(EVEN, UNEVEN, target=0, companion=lambda features: above)
        kept.append(float(dac_kl.token_losses(config, given)["kept_mass"]))
    assert kept[0] - kept[1] == pytest.approx(0.1, abs=1e-6)


def test_missing_mass_is_paid_for() -> None:
    narrow = torch.tensor([[-9.0, -9.0]])
    free, paid = (learned(keep_target=False, mass_penalty=factor)[0] for factor in (0.0, 2.0))
    given = tokens(EVEN, UNEVEN, companion=lambda features: narrow)
    before, after = (dac_kl.token_losses(config, given) for config in (free, paid))
    assert float(before["kept_mass"]) < 0.9
    assert float(after["loss"] - before["loss"]) == pytest.approx(2 * (0.9 - float(before["kept_mass"])))


@pytest.mark.parametrize("raw", [(-50.0, -50.0), (50.0, -50.0), (0.0, -50.0), (50.0, 50.0)])
def test_a_window_never_closes(raw: tuple[float, float]) -> None:
    config, _ = learned(least_entries=3, window="straight_through", keep_target=False)
    given = random_tokens(lambda features: torch.tensor([raw]).expand(len(features), 2))
    assert bool((dac_kl.token_losses(config, given)["kept"] >= 3).all())


def test_a_new_network_leaves_the_window_open() -> None:
    config, network = learned()
    found = dac_kl.token_losses(config, random_tokens(network))
    assert bool((found["kept_mass"] > 0.85).all())


def test_the_network_comes_from_the_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (
        dac_kl.companion(dac_kl.Config(), SimpleNamespace(seed=seed, device="cpu")) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0].weight, two[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert dac_kl.companion(dac_kl.Config(lower_quantile=0.5), SimpleNamespace(seed=1, device="cpu")) is None


@pytest.mark.parametrize("window", ["soft", "straight_through"])
def test_the_loss_trains_the_network_and_the_student(window: str) -> None:
    config, network = learned(window=window)
    given = random_tokens(network)
    dac_kl.token_losses(config, given)["loss"].sum().backward()
    assert all(float(weight.grad.abs().sum()) > 0 for weight in network.parameters())
    # what is restricted and renormalised is still a distribution: its logits' gradient adds up to 0
    torch.testing.assert_close(given.student.grad.sum(-1), torch.zeros(6), rtol=0, atol=1e-6)


def test_the_student_learns_nothing_through_what_the_network_sees() -> None:
    config, network = learned()
    given = random_tokens()
    bounds = network(dac_kl.features(config, dac_kl.in_order(config, given))).detach()
    gradients = []
    for companion in (network, lambda features: bounds):
        given = random_tokens(companion)
        dac_kl.token_losses(config, given)["loss"].sum().backward()
        gradients.append(given.student.grad)
    torch.testing.assert_close(*gradients)


def test_straight_through_keeps_or_leaves_out() -> None:
    config, network = learned(window="straight_through")
    kept = dac_kl.token_losses(config, random_tokens(network))["kept"]
    torch.testing.assert_close(kept, kept.round())


@pytest.mark.parametrize("options", [{}, {"lower_quantile": 0.3, "upper_quantile": 0.9}])
def test_the_order_of_the_vocabulary_does_not_matter(options: dict[str, float]) -> None:
    config, network = learned(**options)
    given = random_tokens(network)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    moved = replace(
        given,
        student=given.student[:, order],
        teacher=given.teacher[:, order],
        targets=order.argsort()[given.targets],
    )
    one, other = (dac_kl.token_losses(config, each)["loss"] for each in (given, moved))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", [{}, {"window": "straight_through"}, {"lower_quantile": 0.3}])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_absent_entries_add_nothing(options: dict[str, Any], side: str) -> None:
    config, network = learned(**options)
    given = random_tokens(network)
    absent = torch.zeros_like(given.teacher)
    absent[:, 30:] = -math.inf
    hidden = replace(given, targets=given.targets % 30, **{side: getattr(given, side) + absent})
    found = dac_kl.token_losses(config, hidden)
    assert all(bool(values.isfinite().all()) for values in found.values())
    found["loss"].sum().backward()
    weights = [] if network is None else list(network.parameters())
    for leaf in (given.student, *weights):
        assert bool(leaf.grad.isfinite().all())
        assert float(leaf.grad.abs().sum()) > 0
    assert float(given.student.grad[:, 30:].abs().max()) == 0.0 or side == "teacher"


def test_bounds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(AssayError, match="nothing lies between them"):
        dac_kl.Config(lower_quantile=0.9, upper_quantile=0.1)


# --- span consistency -------------------------------------------------------------------------------------------


def spans(
    labels: list[list[int]], edges: span_consistency.Edges | None, student: Tensor, teacher: Tensor
) -> View:
    wanted = torch.tensor(labels)
    part = Part(torch.zeros_like(wanted), torch.ones_like(wanted), wanted, "train")
    looks = [Look(values, lambda block: block) for values in (student, teacher)]
    return View(part, *looks, memory=edges)


def edges(goes_on: list[int], lasts: list[int]) -> span_consistency.Edges:
    return span_consistency.Edges(torch.tensor(goes_on).bool(), torch.tensor(lasts).bool())


def mean(view: View, **options: Any) -> float:
    term = span_consistency.terms(span_consistency.Config(**options), view)[""]
    return float(term.sum.detach()) / term.count


def test_products_of_neighbouring_tokens_are_compared() -> None:
    # the teacher is sure twice: (1, 0) * (1, 0); the student is not: (1/4, 1/4)
    teacher = torch.tensor([[[40.0, -40.0], [40.0, -40.0], [0.0, 0.0]]])
    view = spans([[-100, 0, 1]], None, torch.zeros(1, 3, 2), teacher)
    assert mean(view, spans="answer") == pytest.approx(0.75**2 + 0.25**2)


def test_pairs_lie_within_one_word_and_one_answer() -> None:
    # tokens: 0 begins a word, 1 goes on, 2 goes on and ends with a blank
    words = edges([0, 1, 1], [1, 1, 0])
    labels = [[-100, 0, 1, 2, 1, 0], [-100, -100, 1, 1, -100, 1]]
    logits = torch.zeros(2, 6, 3)
    assert span_consistency.joined(spans(labels, words, logits, logits)).tolist() == [
        True,  # 0 1
        True,  # 1 2
        False,  # 2 | 1: a blank between them
        False,  # 1 | 0: a new word
        False,  # the next row
        True,  # 1 1
        False,  # a prompt between them
    ]


def test_a_batch_without_a_pair_is_0() -> None:
    student = torch.zeros(1, 3, 2, requires_grad=True)
    term = span_consistency.terms(
        span_consistency.Config(), spans([[-100, 0, 0]], edges([0, 0], [1, 1]), student, student.detach())
    )[""]
    assert term.count == 0
    term.sum.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_the_edges_of_words_are_read_off_a_byte_level_vocabulary() -> None:
    from transformers import PreTrainedTokenizerFast

    trained = byte_bpe(["heron heron\n heron"] * 9, 300, ["<s>"], exact=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>")
    found = span_consistency.edges_of(tokenizer)

    def told(text: str) -> list[tuple[bool, bool]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [(bool(found.goes_on[token]), bool(found.lasts[token])) for token in ids]

    assert told("he") == [(True, True)] * len(told("he"))
    assert told(" heron")[0] == (False, True)
    assert told("\n")[0] == (False, False)
    assert told("<s>")[0] == (False, False)


def test_the_edges_of_words_are_read_off_a_sentencepiece_vocabulary() -> None:
    entries = {"<s>": 0, "<0x0A>": 1, "\u2581he": 2, "ron": 3, "\u2581": 4, "<0x41>": 5}
    tokenizer = SimpleNamespace(get_vocab=lambda: entries, all_special_ids=[0])
    found = span_consistency.edges_of(tokenizer)
    assert found.goes_on.tolist() == [False, False, False, True, False, True]
    assert found.lasts.tolist() == [False, False, True, True, False, True]


def ragged() -> tuple[Part, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    labels = torch.randint(3, (4, 7), generator=draw)
    for row, prompt in enumerate((1, 4, 2, 6)):
        labels[row, :prompt] = -100
    rows = torch.arange(4)[:, None].expand(4, 7).contiguous()
    student, teacher = (torch.randn(4, 7, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    return Part(rows, torch.ones_like(labels), labels, "train"), student, teacher


def test_micro_batches_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    part, student, teacher = ragged()
    words = edges([0, 1, 1], [1, 1, 0])

    def loss(model: Any, batch: Any) -> Any:
        rows = batch.train.input_ids[:, 0]
        looks = [Look(values[rows], lambda block: block) for values in (model.table, teacher)]
        return span_consistency.terms(
            span_consistency.Config(temperature=2.0), View(batch.train, *looks, memory=words)
        )

    found = []
    for size, entries in ((None, 2**24), (None, 5), (None, 15), (1, 2**24), (3, 10)):
        monkeypatch.setattr(_blocks, "ENTRIES", entries)
        model = torch.nn.Module()
        model.table = torch.nn.Parameter(student.clone())
        found.append((Gradient(model, loss, micro_batch=size)({"train": part}, 0, 1)[""], model.table.grad))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-12, atol=1e-16)


# --- correction and regeneration --------------------------------------------------------------------------------


def test_the_token_with_the_largest_divergence_is_the_error() -> None:
    sure, unsure, other = [0.0, 9.0], [0.0, 1.0], [3.0, 0.0]
    student = torch.tensor([[sure, unsure, sure, sure], [sure] * 4, [unsure, sure, sure, sure]])
    teacher = torch.tensor([[sure, other, other, other], [sure] * 4, [other] * 4])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    found = error_position(student, teacher, mask)
    # row 1: both differ at 1 and 2, more so at 2; row 2: nowhere; row 3: only the first counts
    assert found.position.tolist() == [2, -1, 0]
    assert found.token.tolist()[0] == found.token.tolist()[2] == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student, and a teacher of the same shape with other weights."""
    from transformers import AutoModelForCausalLM

    student, teacher = (
        make_parent(tmp_path_factory.mktemp(name), dropout=0.0) for name in ("student", "teacher")
    )
    for seed, folder in enumerate((student, teacher)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(20 + seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" not in name:
                    weight.normal_(0.0, 0.3)
        model.save_pretrained(folder)
    return student, teacher


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    return student.train(), teacher.eval()


def revision(teacher: Any, fraction: float = 1.0, corrections: int = 1, **options: Any) -> Revision:
    usual: dict[str, Any] = {"ends": frozenset({2}), "context_tokens": 40, "new_tokens": 9, "at_once": 2}
    writer = Writer(seed=1, padding=0, prompt_tokens=4, temperature=0.0, **usual | options)
    setting = SimpleNamespace(source=Live(teacher), mixture=SimpleNamespace(vocabulary=None))
    return Revision(setting, writer, "revised", fraction, corrections)


def prompts() -> Part:
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 290, (5, 12), generator=draw)
    labels = ids.clone()
    for row, prompt in enumerate((3, 6, 4, 8, 5)):
        labels[row, :prompt] = -100
    return Part(ids, torch.ones_like(ids), labels, "train")


def likeliest(model: Any, ids: list[int]) -> int:
    """The next token."""
    training = model.training
    with torch.no_grad():
        found = int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    model.train(training)
    return found


def answers(part: Part) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of every row."""
    rows = zip(part.input_ids.tolist(), part.labels.tolist(), strict=True)
    split = []
    for ids, labels in rows:
        places = [place for place, label in enumerate(labels) if label != -100]
        split.append((ids[: places[0]], [labels[place] for place in places]))
    return split


def greedy(model: Any, prompt: list[int], begun: list[int], longest: int = 9) -> list[int]:
    """What the model writes behind a prompt and the beginning of an answer."""
    answer = list(begun)
    while len(answer) < longest and (not answer or answer[-1] != 2):
        answer.append(likeliest(model, [*prompt, *answer]))
    return answer


def test_one_token_is_put_right_and_the_student_goes_on(models: tuple[Any, Any]) -> None:
    student, teacher = models
    wrote = revision(teacher)
    parts = wrote.parts(0, {"train": prompts()}, student)
    assert list(parts) == ["train", "revised"] and parts["revised"].name == "revised"
    corrected = 0
    for (prompt, answer), (given, _) in zip(answers(parts["revised"]), answers(prompts()), strict=True):
        own = greedy(student, given, [])
        assert prompt == given
        if answer == own:
            continue
        corrected += 1
        place = next(at for at, (one, other) in enumerate(zip(answer, own, strict=False)) if one != other)
        assert answer[place] == likeliest(teacher, [*given, *answer[:place]])
        assert answer == greedy(student, given, answer[: place + 1])
    assert corrected >= 4
    assert wrote.numbers() == {"corrected": corrected / 5}
    assert wrote.tokens > 5 * 9 - 9
    assert student.training


def test_the_worst_token_is_the_one_that_is_put_right(models: tuple[Any, Any]) -> None:
    student, teacher = models
    own = revision(teacher, corrections=0).parts(0, {"train": prompts()}, student)["revised"]
    seen = {"input_ids": own.input_ids, "attention_mask": own.attention_mask}
    with torch.no_grad():
        logits = [model.eval()(**seen).logits[:, :-1] for model in (student, teacher)]
    student.train()
    expected = error_position(*logits, own.mask)
    new = revision(teacher).parts(0, {"train": prompts()}, student)["revised"]
    for row, place in enumerate(expected.position.tolist()):
        if place >= 0:
            assert int(new.targets[row, place]) == int(expected.token[row])
            assert torch.equal(new.targets[row, :place], own.targets[row, :place])


def test_a_second_correction_comes_behind_the_first(models: tuple[Any, Any]) -> None:
    student, teacher = models
    once, twice = (
        answers(revision(teacher, corrections=count).parts(0, {"train": prompts()}, student)["revised"])
        for count in (1, 2)
    )
    assert once != twice
    for (prompt, one), (_, two), (given, _) in zip(once, twice, answers(prompts()), strict=True):
        first = _first_difference(one, greedy(student, given, []))
        second = _first_difference(two, one)
        assert second is None or first is None or second > first
        if second is not None:
            assert two[second] == likeliest(teacher, [*prompt, *two[:second]])


def _first_difference(one: list[int], other: list[int]) -> int | None:
    pairs = zip(one, other, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), None)


def test_a_student_that_agrees_with_the_teacher_is_left_alone(models: tuple[Any, Any]) -> None:
    student, _ = models
    wrote = revision(student)
    part = wrote.parts(0, {"train": prompts()}, student)["revised"]
    assert wrote.numbers() == {"corrected": 0.0}
    assert [answer for _, answer in answers(part)] == [
        greedy(student, given, []) for given, _ in answers(prompts())
    ]


def test_answers_stay_within_their_length_and_the_context(models: tuple[Any, Any]) -> None:
    student, teacher = models
    part = revision(teacher, corrections=3, context_tokens=10).parts(0, {"train": prompts()}, student)[
        "revised"
    ]
    for prompt, answer in answers(part):
        assert len(answer) <= 9 and len(prompt) + len(answer) <= 10


def test_nothing_follows_an_end_mark(models: tuple[Any, Any]) -> None:
    student, teacher = models
    given = prompts()
    own = greedy(teacher, answers(given)[0][0], [])
    part = revision(teacher, ends=frozenset(own[:3]), corrections=3).parts(0, {"train": given}, student)[
        "revised"
    ]
    for _, answer in answers(part):
        assert not set(answer[:-1]) & set(own[:3])


def test_batches_that_are_not_revised_are_the_rows_themselves(models: tuple[Any, Any]) -> None:
    student, teacher = models
    wrote = revision(teacher, fraction=0.0)
    parts = wrote.parts(0, {"train": prompts()}, student)
    assert torch.equal(parts["revised"].input_ids, prompts().input_ids)
    assert torch.equal(parts["revised"].labels, prompts().labels)
    assert parts["revised"].name == "revised" and wrote.tokens == 0
    some = revision(teacher, fraction=0.5, new_tokens=2)
    revised = [bool(some.parts(step, {"train": prompts()}, student) and some.tokens) for step in range(12)]
    assert 0 < sum(revised) < 12


def test_how_many_are_written_at_once_changes_nothing(models: tuple[Any, Any]) -> None:
    student, teacher = models
    one, other = (
        revision(teacher, at_once=size).parts(0, {"train": prompts()}, student)["revised"] for size in (1, 5)
    )
    assert torch.equal(one.input_ids, other.input_ids)


# --- the recipe -------------------------------------------------------------------------------------------------


def trained(folders: tuple[Path, Path], folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "steps": 5,
        "batch": 4,
        "log_every": 1,
        "context_tokens": 48,
        "max_new_tokens": 6,
        "optimizer": Component("adamw", {"learning_rate": 0.01}),
    }
    config = mgsr.Config(teacher=TEACHER, data="first", **settings | options)
    stage = make_stage(folders[0], folder, config, teacher=folders[1])
    distill.run(stage, mgsr)
    return stage


def test_the_recipe_trains_student_and_bounds(folders: tuple[Path, Path], tmp_path: Path) -> None:
    stage = trained(folders, tmp_path, steps=12, fraction=0.0)
    lines = curve_of(stage)
    assert {"cross_entropy", "dac_kl", "dac_kl.kept_mass", "dac_kl.kept", "span_consistency"} <= set(lines)
    assert lines["dac_kl"][-1] < lines["dac_kl"][0]
    assert lines["cross_entropy"][-1] < lines["cross_entropy"][0]
    assert stage.notes["generated_tokens"] == 0
    model = stage.folder / "model"
    assert weights_of(model).keys() == weights_of(folders[0]).keys()
    assert (model / "companions" / "dac_kl.safetensors").is_file()


def test_what_is_written_is_counted_and_the_same_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = (trained(folders, tmp_path / name) for name in ("one", "two"))
    assert 5 * 4 < one.notes["generated_tokens"] <= 5 * 4 * 12
    assert set(curve_of(one)["corrected"]) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert max(curve_of(one)["corrected"]) > 0
    assert same(weights_of(one.folder / "model"), weights_of(two.folder / "model"))


def test_the_losses_stand_for_themselves(folders: tuple[Path, Path], tmp_path: Path) -> None:
    stage = trained(folders, tmp_path, divergence=Component("forward_kl"), cross_entropy=0.0, steps=1)
    assert "forward_kl" in curve_of(stage) and "dac_kl" not in curve_of(stage)
    with pytest.raises(AssayError, match="stands in two places"):
        mgsr.Config(teacher=TEACHER, divergence=Component("span_consistency"))


@pytest.mark.parametrize("name", ["policy_gradient", "sampled_reverse_kl"])
def test_terms_on_text_as_the_student_drew_it_are_refused(name: str) -> None:
    with pytest.raises(AssayError, match=f"{name} works only on text as the student drew it"):
        mgsr.Config(teacher=TEACHER, span=Component(name))
