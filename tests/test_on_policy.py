"""Text that the student writes: how it is drawn, what becomes of it, and the three recipes that learn from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods import loop
from methods.checkpoint import load_model, load_tokenizer
from methods.data import Example, Part, collate
from methods.distill import distillm, gkd, minillm, mix, run
from methods.distill._rollouts import (
    Prompt,
    Rollout,
    Writer,
    evaluating,
    log_chances,
    part_of,
    prompt_of,
    prompts_of,
    shared,
)
from methods.find import catalogue
from methods.generate import Drawing, Mixed, continued, drawn, left_padded, nucleus
from methods.stage import AssayError, Component, Parent, Stage
from methods.term import Tokens, of
from methods.term import policy_gradient as pg
from tests.small_models import llama
from tests.training import curve_of, make_parent, make_stage, perturbed, same, weights_of

TEACHER = Parent("model.new-000000000000")
FAST = Component("adamw", {"learning_rate": 1e-2})
QUICK: dict[str, Any] = {
    "teacher": TEACHER, "data": "all", "steps": 6, "batch": 4, "optimizer": FAST, "log_every": 1,
    "max_new_tokens": 5, "context_tokens": 64,
}  # fmt: skip
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gkd": (gkd, {}),
    "distillm": (distillm, {"threshold": 0.9, "capacity": 6, "validation": "first", "validate_every": 2}),
    "minillm": (minillm, {"rollouts": 6, "passes": 2}),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer, of large weights."""
    return perturbed(tmp_path_factory.mktemp("teacher"), 8)


def train(
    module: Any, parent: Path, teacher: Path, folder: Path, changes: dict[str, Any] | None = None
) -> Stage:
    own = next(options for recipe, options in RECIPES.values() if recipe is module)
    config = module.Config(**QUICK | own | (changes or {}))
    stage = make_stage(parent, folder, config, teacher=teacher)
    run(stage, module)
    return stage


# --- drawing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 0), (0.19, 0), (0.21, 1), (0.49, 1), (0.51, 2), (0.99, 2)]
)
def test_a_token_is_where_the_distribution_function_passes_the_number(number: float, token: int) -> None:
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log()
    assert Drawing([lambda: number])(logits, 0).tolist() == [token]


def test_the_temperature_divides_the_logits() -> None:
    # softmax of 2 log(1/4), 2 log(3/4): 1/10 and 9/10
    logits = torch.tensor([[0.25, 0.75]]).log()
    chosen = [Drawing([lambda n=n: n], 0.5)(logits, 0).item() for n in (0.09, 0.11)]
    assert chosen == [0, 1]


def test_the_nucleus_is_the_likeliest_tokens_that_together_reach_the_mass() -> None:
    chances = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    assert nucleus(chances, 0.7).tolist() == [[0.0, 0.5, 0.0, 0.25]]
    assert nucleus(chances, 0.3).tolist() == [[0.0, 0.5, 0.0, 0.0]]
    assert nucleus(chances, 0.8).tolist() == [[0.0, 0.5, 0.15, 0.25]]
    drawn_ones = {int(Drawing([lambda n=n: n / 100], top_p=0.7)(chances.log(), 0)) for n in range(100)}
    assert drawn_ones == {1, 3}


def test_many_draws_are_as_frequent_as_they_are_likely() -> None:
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log().expand(6000, 3)
    tokens = drawn([f"1/2/{row}" for row in range(6000)])(logits, 0)
    shares = torch.bincount(tokens, minlength=3) / 6000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.3, 0.5]), atol=0.02, rtol=0)


def test_a_mixture_is_the_weighted_mean_of_the_probabilities_with_a_cache_for_each() -> None:
    models = [llama(), llama(num_hidden_layers=2, initializer_range=0.5)]
    mixed, seen = Mixed(models, [0.8, 0.2], 0.7), []

    def look(logits: Tensor, step: int) -> Tensor:
        seen.append(logits)
        return logits.argmax(-1)

    prompt = [3, 9, 4, 4, 7]
    with torch.no_grad():
        written = continued(mixed, *left_padded([prompt], 0), 4, set(), look)[0]
        every = [
            (model(torch.tensor([prompt + written])).logits[0, 4:-1] / 0.7).softmax(-1) for model in models
        ]
    expected = (0.8 * every[0] + 0.2 * every[1]).log()
    torch.testing.assert_close(torch.cat(seen), expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_share_is_not_run() -> None:
    def never(**inputs: Any) -> Any:
        raise AssertionError

    model = llama()
    with torch.no_grad():
        alone = continued(Mixed([model], [1.0]), *left_padded([[5, 6]], 0), 3, set())
        assert continued(Mixed([model, never], [1.0, 0.0]), *left_padded([[5, 6]], 0), 3, set()) == alone


def test_greedy_writing_is_what_transformers_generates() -> None:
    model, rows = llama(), [[3, 1, 4], [15, 9, 2, 6, 5], [35]]
    inputs, mask = left_padded(rows, 0)
    expected = model.generate(
        inputs, attention_mask=mask, max_new_tokens=7, do_sample=False, eos_token_id=[11], pad_token_id=0
    )[:, inputs.shape[1] :].tolist()
    with torch.no_grad():
        written = continued(Mixed([model], [1.0]), inputs, mask, 7, {11}, drawn(["", "", ""], 0.0), True)
    assert [row + [0] * (len(expected[0]) - len(row)) for row in written] == expected


# --- rollouts -------------------------------------------------------------------------------------------------


def writer_of(**changes: Any) -> Writer:
    usual: dict[str, Any] = {
        "seed": 3, "ends": frozenset({2}), "padding": 2, "context_tokens": 64, "new_tokens": 6, "prompt_tokens": 4,
        "temperature": 1.0, "at_once": 8,
    }  # fmt: skip
    return Writer(**usual | changes)


PROMPTS = [Prompt(tuple(range(10, 10 + size)), number) for number, size in enumerate((3, 9, 1, 5, 5))]


def test_prompts_end_before_the_first_label_and_texts_have_the_first_tokens() -> None:
    pair, text = Example((5, 6, 7, 8), (-100, -100, 7, 8), number=4), Example((5, 6, 7), (5, 6, 7), number=9)
    part = collate([pair, text], 0, "train")
    assert prompts_of(part, 2) == [Prompt((5, 6), 4), Prompt((5, 6), 9)]
    assert prompt_of(text.input_ids, text.labels, 0, 50).tokens == (5, 6)


def test_every_written_token_is_a_target_also_an_end_mark_that_is_the_padding() -> None:
    part = part_of([Rollout((5, 6), (7, 2), 4), Rollout((5,), (8, 9, 2), 0)], 2, "train")
    assert part.labels.tolist() == [[-100, -100, 7, 2], [-100, 8, 9, 2]]
    assert part.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert float(part.tokens) == 5
    assert part.numbers is not None
    assert part.numbers.tolist() == [4, 0]


def test_nothing_behind_the_first_end_mark_is_kept() -> None:
    model = llama()
    free = writer_of(ends=frozenset()).rollouts(PROMPTS, [model], [1.0], 0)
    ends = frozenset({free[0].answer[2], free[1].answer[4]})
    cut = writer_of(ends=ends, padding=min(ends)).rollouts(PROMPTS, [model], [1.0], 0)
    for whole, part in zip(free, cut, strict=True):
        first = next((place for place, token in enumerate(whole.answer) if token in ends), 5)
        assert part.answer == whole.answer[: first + 1]
    labels = part_of(cut, min(ends), "train").labels
    assert {int(row[row != -100][-1]) for row in labels[:2]} <= ends


def test_rollouts_are_the_same_however_they_are_batched_and_differ_by_seed_step_and_row() -> None:
    model = llama()

    def written(step: int = 0, **changes: Any) -> list[Rollout]:
        return writer_of(**changes).rollouts(PROMPTS, [model], [1.0], step)

    assert written(at_once=1) == written(at_once=2) == written()
    assert written(seed=4) != written()
    assert written(step=1) != written()
    assert written()[3].answer != written()[4].answer  # two rows with the same prompt
    assert written(temperature=0.0)[3].answer == written(temperature=0.0)[4].answer


def test_prompt_and_answer_stay_within_the_context() -> None:
    found = writer_of(ends=frozenset(), context_tokens=10).rollouts(PROMPTS, [llama()], [1.0], 0)
    assert [len(rollout.answer) for rollout in found] == [6, 1, 6, 5, 5]


def test_padded_entries_of_the_vocabulary_are_never_written() -> None:
    found = writer_of(ends=frozenset(), entries=7).rollouts(PROMPTS, [llama()], [1.0], 0)
    assert max(token for rollout in found for token in rollout.answer) < 7


def test_writing_leaves_modes_gradients_and_random_numbers_as_they_were() -> None:
    model, frozen = llama(attention_dropout=0.5), llama()
    model.train()
    model.model.norm.eval()
    before, state = [module.training for module in model.modules()], torch.get_rng_state()
    with evaluating([model]):
        assert not any(module.training for module in model.modules())
    found = writer_of().rollouts(PROMPTS, [model, frozen], [0.5, 0.5], 0)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert found == writer_of().rollouts(PROMPTS, [model.eval(), frozen], [0.5, 0.5], 0)


def test_log_chances_are_those_of_the_answers_whatever_the_blocks() -> None:
    model = llama()
    rollouts = [Rollout((5, 6), (7, 2), 4), Rollout((5,), (8, 9, 2), 0)]
    part = part_of(rollouts, 0, "train")
    with torch.no_grad():
        likely = (model(torch.tensor([[5, 8, 9, 2]])).logits[0] / 2).log_softmax(-1)
    expected = torch.stack([likely[0, 8], likely[1, 9], likely[2, 2]])
    for block in (1, 3, 512):
        torch.testing.assert_close(log_chances(model, part, 2.0, block=block)[2:], expected)


def test_processes_do_a_share_each_and_all_get_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import distributed

    done: list[list[int]] = []

    def work(mine: Sequence[int]) -> list[int]:
        done.append(list(mine))
        return [10 * row for row in mine]

    def gather(found: list[Any], mine: list[int]) -> None:
        found[:] = [[10 * row for row in range(rank, 5, 2)] for rank in range(2)]
        assert mine == found[1]

    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    assert shared(5, work) == [0, 10, 20, 30, 40]
    assert done == [[1, 3]]


def test_a_rollout_survives_json() -> None:
    rollout = Rollout((5,), (8, 9), 3, {"reward": (0.1, float(torch.tensor(0.3)))})
    assert Rollout.of(json.loads(json.dumps(rollout.saved()))) == rollout


# --- policy gradient ------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    mask = torch.tensor([[True, True, False]])
    values = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    assert pg.advantages(values, mask, 0.5).tolist() == [[(1 + 0.5 * 2) / 2, 2.0, 0.0]]
    assert pg.advantages(values, mask, 0.5, "absolute").tolist() == [[2.0, 1.0, 0.0]]
    discounted = pg.advantages(values, mask, 0.5, "discounted")[0]
    assert discounted.tolist() == pytest.approx([2 / (1.5 + 0.25e-4), 1 / (0.5 + 0.25e-4), 0.0])
    assert pg.advantages(values, mask, 0.0, "discounted").tolist() == values.tolist()


def test_whitening_counts_every_position_and_has_the_unbiased_variance() -> None:
    found = pg.whitened(torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64))
    deviation = math.sqrt((0.25 + 0.25 + 2.25 + 2.25) / 3)
    assert found.flatten().tolist() == pytest.approx([n / deviation for n in (-0.5, 0.5, 1.5, -1.5)])


def test_rewards_are_scaled_clipped_and_masked() -> None:
    log_p, log_q = torch.tensor([[-1.0, -9.0, -1.0]]), torch.tensor([[-2.0, -1.0, -3.0]])
    mask = torch.tensor([[True, True, False]])
    assert pg.rewards(log_p, log_q, mask, 0.5, 3.0).tolist() == [[2.0, -3.0, 0.0]]


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "slope"),
    [(1, 1.5, -1.2, 0), (-1, 1.5, 1.5, 1.5), (1, 0.5, -0.5, -0.5), (-1, 0.5, 0.8, 0), (2, 1.1, -2.2, -2.2)],
)
def test_a_ratio_beyond_the_clip_only_counts_against_the_student(
    advantage: float, ratio: float, expected: float, slope: float
) -> None:
    # the student's logarithm of 1/2, and an importance of 1/2
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    old = math.log(0.5) - math.log(2 * ratio)
    extra = {"advantage": advantage, "old_log_prob": old, "importance": 0.5}
    tokens = Tokens(
        logits,
        torch.tensor([0]),
        extra={name: torch.tensor([value], dtype=torch.float64) for name, value in extra.items()},
    )
    loss = pg.token_losses(pg.Config(), tokens)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected)
    assert logits.grad is not None
    # d log q_0 / d z_0 = 1 - q_0
    assert logits.grad[0, 0].item() == pytest.approx(slope * 0.5)


def test_the_importance_is_the_students_probability_over_the_mixtures() -> None:
    log_q, log_p = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert pg.importance(log_q, log_p, 0.2).item() == pytest.approx(0.5 / (0.8 * 0.5 + 0.2 * 0.25))
    assert pg.importance(log_q, log_p, 0.0).tolist() == [1.0]


def test_the_estimate_is_the_reverse_kl_on_average() -> None:
    q, p = torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[0.4, 0.4, 0.2]])
    estimates = pg.reverse_kl_estimate(p.log(), q.log(), torch.ones(1, 3, dtype=torch.bool))
    assert (estimates >= 0).all()
    assert (q * estimates).sum().item() == pytest.approx((q * (q / p).log()).sum().item())


# --- recipes --------------------------------------------------------------------------------------------------


def test_gkd_without_writing_is_distillation_on_the_data_bit_for_bit(
    parent: Path, teacher: Path, tmp_path: Path
) -> None:
    alone = train(gkd, parent, teacher, tmp_path / "alone", {"fraction": 0.0})
    options = {name: value for name, value in QUICK.items() if name != "max_new_tokens"}
    stage = make_stage(parent, tmp_path / "mix", mix.Config(**options, terms=(of("jsd"),)), teacher=teacher)
    run(stage, mix)
    assert same(weights_of(alone.folder / "model"), weights_of(stage.folder / "model"))
    assert alone.notes["student_batches"] == alone.notes["generated_tokens"] == 0


def test_gkd_replaces_whole_batches_as_often_as_asked(parent: Path, teacher: Path, tmp_path: Path) -> None:
    before = weights_of(teacher)
    stage = train(gkd, parent, teacher, tmp_path, {"steps": 12, "max_new_tokens": 3})
    wrote = curve_of(stage)["on_policy"]
    assert set(wrote) == {0.0, 1.0}
    assert stage.notes["student_batches"] == sum(wrote)
    assert sum(wrote) * 4 <= stage.notes["generated_tokens"] <= sum(wrote) * 12
    assert stage.notes["generation_seconds"] > 0
    assert same(weights_of(teacher), before)


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_ends_with_the_same_bits(
    name: str, parent: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = RECIPES[name]
    whole = train(module, parent, teacher, tmp_path / "whole")
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "2")
    update = loop._Run.update
    for killed in (3, 5):

        def dying(run: Any, step: int, killed: int = killed) -> None:
            if step == killed:
                raise KeyboardInterrupt
            update(run, step)

        monkeypatch.setattr(loop._Run, "update", dying)
        with pytest.raises(KeyboardInterrupt):
            train(module, parent, teacher, tmp_path / str(killed))
        monkeypatch.setattr(loop._Run, "update", update)
        resumed = train(module, parent, teacher, tmp_path / str(killed))
        assert resumed.notes["resumed_from_step"] == killed // 2 * 2
        assert same(weights_of(resumed.folder / "model"), weights_of(whole.folder / "model"))
        assert curve_of(resumed) == curve_of(whole)
        # what was written after the last saved state is written again, and only counted once
        for note in ("generated_tokens", "student_batches", "replayed_batches", "rollout_sets"):
            assert resumed.notes.get(note) == whole.notes.get(note)


@pytest.mark.parametrize("name", RECIPES)
def test_the_student_writes_the_same_whatever_goes_through_it_at_once(
    name: str, teacher: Path, tmp_path: Path
) -> None:
    module, _ = RECIPES[name]
    # Dropout is drawn anew for every micro-batch.
    parent = make_parent(tmp_path / "parent", dropout=0.0)
    whole = train(module, parent, teacher, tmp_path / "whole", {"steps": 3})
    pieces = train(
        module, parent, teacher, tmp_path / "pieces", {"steps": 3, "written_at_once": 1, "micro_batch": 2}
    )
    assert pieces.notes["generated_tokens"] == whole.notes["generated_tokens"]
    for term, values in curve_of(whole).items():
        assert curve_of(pieces)[term] == pytest.approx(values, rel=2e-3, abs=1e-4), term


# --- distillm -------------------------------------------------------------------------------------------------


def replay(losses: Sequence[float], steps: int = 10, every: int = 1, **options: Any) -> distillm.Replay:
    """A schedule whose validation losses are given."""
    config = distillm.Config(teacher=TEACHER, batch=2, **{"capacity": 4} | options)
    found = iter(losses)
    return distillm.Replay(config, writer_of(), lambda model: next(found), every, steps)


def batch() -> dict[str, Part]:
    rows = [Example((5, 6, 7, 8), (-100, -100, 7, 8), number=n) for n in range(2)]
    return {"train": collate(rows, 0, "train")}


def test_the_threshold_rises_where_the_loss_lies_above_the_last_that_counted() -> None:
    schedule, model, seen = replay([1.0, 0.5, 1.05, 1.1, 1.15, 1.3]), llama(), []
    for step in range(6):
        schedule.parts(step, batch(), model)
        seen.append(schedule.threshold)
    # 0.5 is below and 1.05 less than 0.1 above 1.0; 1.15 is less than 0.1 above 1.1
    assert seen == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.1, 0.2])


def test_the_threshold_never_passes_one_and_is_looked_at_every_so_many_steps() -> None:
    schedule, model = replay([0.0, 1.0, 2.0], every=3, threshold=0.95), llama()
    for step in range(9):
        schedule.parts(step, batch(), model)
        assert schedule.threshold == (0.95 if step < 3 else 1.0)


def test_rows_are_written_until_the_buffer_is_full_and_then_also_replayed() -> None:
    schedule, model, sources = replay([0.0] * 40, steps=40, threshold=1.0), llama(), []
    for step in range(40):
        parts = schedule.parts(step, batch(), model)
        sources.append(schedule.source)
        assert parts["train"].labels.shape[0] == 2
        assert len(schedule.buffer) <= 4
        assert schedule.tokens == (parts["train"].tokens if schedule.source == "student" else 0)
    assert sources[:2] == ["student", "student"]
    assert set(sources) == {"student", "buffer"}
    # fresh text with the probability 1 - step/steps: rarely towards the end
    assert sources[:20].count("student") > sources[20:].count("student")
    assert schedule.notes()["replayed_batches"] == sources.count("buffer")


def test_replayed_rows_are_different_ones_of_the_buffer() -> None:
    schedule = replay([0.0], threshold=1.0)
    schedule.buffer = [Rollout((5,), (token,), token) for token in range(10, 14)]
    part = schedule._replay(batch()["train"], 7)
    assert part.numbers is not None
    assert len(set(part.numbers.tolist())) == 2
    assert part.labels[:, 1].tolist() == part.numbers.tolist()


def test_written_text_has_the_alignment_of_all_other(parent: Path, teacher: Path) -> None:
    model = load_model(parent)
    tokenizer = load_tokenizer(parent)
    writer = writer_of(ends=frozenset({tokenizer.eos_token_id}))
    part = writer.part(batch()["train"], model, 0)
    row = part.labels[0].tolist()
    assert row[:2] == [-100, -100]
    assert row[2:] == part.input_ids[0, 2:].tolist()


def test_a_buffer_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(AssayError, match="capacity=3 answers cannot fill a batch=4: raise capacity"):
        distillm.Config(teacher=TEACHER, capacity=3, batch=4)


# --- minillm --------------------------------------------------------------------------------------------------


def rollouts_of(**options: Any) -> tuple[minillm.Rollouts, Any]:
    usual: dict[str, Any] = {
        "teacher": TEACHER,
        "batch": 2,
        "rollouts": 4,
        "passes": 2,
        "max_new_tokens": 6,
    }
    config = minillm.Config(**usual | options)
    examples = [Example((5, 6, 7 + n, 8), (-100, -100, 7 + n, 8), number=n) for n in range(5)]
    source = SimpleNamespace(model=llama(num_hidden_layers=2, initializer_range=0.5), entries=None)
    return minillm.Rollouts(config, writer_of(), examples, source), llama()


def test_a_set_of_rollouts_is_gone_through_in_passes_of_another_order() -> None:
    made, model = rollouts_of()
    seen, sets = [], []
    for step in range(8):
        parts = made.parts(step, {}, model)
        ids = parts["rollouts"].input_ids
        seen.append([tuple(row[row != 2].tolist()) for row in ids])
        sets.append(made.sets)
        assert (made.tokens > 0) == (step in (0, 4))
    assert sets == [1, 1, 1, 1, 2, 2, 2, 2]
    first, second = sorted(seen[0] + seen[1]), sorted(seen[2] + seen[3])
    assert first == second
    assert seen[0] + seen[1] != seen[2] + seen[3] or seen[4] + seen[5] != seen[6] + seen[7]


def test_the_first_step_on_a_set_has_the_importance_as_its_ratio() -> None:
    made, model = rollouts_of()
    part = made.parts(0, {}, model)["rollouts"]
    assert part.extra.keys() == {"old_log_prob", "importance", "advantage"}
    mask = part.mask
    with torch.no_grad():
        now = log_chances(model, part)
        teacher = log_chances(made.teacher, part)
    torch.testing.assert_close(part.extra["old_log_prob"][mask], now)
    expected = now.exp() / (0.8 * now.exp() + 0.2 * teacher.exp())
    torch.testing.assert_close(part.extra["importance"][mask], expected)
    assert all(not values[~mask].any() for values in part.extra.values())


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_teacher_has_its_share_in_what_is_written(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = rollouts_of(teacher_share=share)
    write, asked = type(made.writer).rollouts, []

    def noted(self: Any, prompts: Any, models: Any, shares: Any, step: int) -> Any:
        asked.append(dict(zip(map(id, models), shares, strict=True)))
        return write(self, prompts, models, shares, step)

    monkeypatch.setattr(type(made.writer), "rollouts", noted)
    made.parts(0, {}, model)
    assert asked == [{id(model): pytest.approx(1 - share), id(made.teacher): pytest.approx(share)}]


def test_advantages_are_whitened_over_all_positions_up_to_the_longest_answer() -> None:
    made, _ = rollouts_of(max_new_tokens=3, gamma=0.5)
    rollouts = [Rollout((5,), (6, 7), 0, {"reward": (1.0, 2.0)}), Rollout((5,), (6,), 0, {"reward": (-1.0,)})]
    plain = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 0.0, 0.0]])
    torch.testing.assert_close(made.advantages(rollouts), pg.whitened(plain))
    unwhitened, _ = rollouts_of(max_new_tokens=3, gamma=0.5, whiten=False)
    torch.testing.assert_close(unwhitened.advantages(rollouts), plain)


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(AssayError, match="rollouts=3 cannot fill a batch=4: raise rollouts"):
        minillm.Config(teacher=TEACHER, rollouts=3, batch=4)


def test_minillm_brings_the_student_nearer_to_the_teacher(
    parent: Path, teacher: Path, tmp_path: Path
) -> None:
    changes = {"steps": 30, "rollouts": 8, "batch": 8, "language_model": 0.0}
    found = curve_of(train(minillm, parent, teacher, tmp_path, changes))
    assert found["reverse_kl"][-1] < 0.7 * found["reverse_kl"][0]
    assert {"policy_gradient", "reverse_kl", "rollouts.reward"} <= found.keys()
    assert "cross_entropy" not in found


def test_a_sampled_term_is_refused_where_nobody_writes(parent: Path, teacher: Path, tmp_path: Path) -> None:
    assert catalogue().component("term", "policy_gradient").load().SAMPLED
    options = {name: value for name, value in QUICK.items() if name != "max_new_tokens"}
    with pytest.raises(AssayError, match="text that the student wrote"):
        mix.Config(**options, terms=(of("policy_gradient"), of("forward_kl")))
