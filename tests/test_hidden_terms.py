"""Terms on hidden states and attention: one number by hand each, layer maps, widths, padding, micro-batches."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import log, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from methods import distill
from methods.architectures import with_head
from methods.architectures.pruned_llama import PrunedLlamaConfig, PrunedLlamaForCausalLM
from methods.data import Example, Part
from methods.distill._mixture import Mixture
from methods.distill._sources import Live
from methods.find import catalogue
from methods.gradient import Gradient
from methods.stage import AssayError, Component, Parent, Term
from methods.term import Look, View, of
from methods.term._attention import Attended, recorded, sharing
from methods.term._blocks import look
from methods.term._layers import pairs, projection, uniform
from methods.terms import total
from tests.training import make_parent, make_stage, same, weights_of

LAYERWISE = ("squarehead", "hidden_mse", "hidden_cosine")


def term(name: str) -> Any:
    return catalogue().component("term", name).load()


def make_part(mask: list[list[int]], labels: list[list[int]] | None = None) -> Part:
    """Token ids 1, 2, ...; every position that is not padding is an answer unless labels are given."""
    attended = torch.tensor(mask)
    ids = torch.arange(attended.numel()).view_as(attended) % 11 + 1
    wanted = ids.masked_fill(attended == 0, -100) if labels is None else torch.tensor(labels)
    return Part(input_ids=ids, attention_mask=attended, labels=wanted, name="train")


def states(*layers: list[list[float]]) -> list[Tensor]:
    """The hidden states [1,T,H] of each layer of one sequence."""
    return [torch.tensor([layer], dtype=torch.float64, requires_grad=True) for layer in layers]


def view(part: Part, student: list[Tensor], teacher: list[Tensor], **more: Any) -> View:
    def shown(layers: list[Tensor]) -> Look:
        return Look(layers[-1], lambda block: block, hidden_states=layers)

    return View(part, shown(student), shown([layer.detach() for layer in teacher]), **more)


def value(name: str, seen: View, **options: Any) -> Tensor:
    return total(term(name).terms(term(name).Config(**options), seen))


def random_states(count: int, width: int, seed: int, rows: int = 2, length: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, length, width, generator=draw, dtype=torch.float64).requires_grad_()
        for _ in range(count)
    ]


# --- hidden states: numbers -----------------------------------------------------------------------------------


def one_unit(student: float, teacher: float) -> View:
    """One layer of one unit that has these values; the embedding's output, 9 and 0, is not looked at."""
    return view(make_part([[1]]), states([[9.0]], [[student]]), states([[0.0]], [[teacher]]))


def test_squarehead_divides_by_the_teachers_mean_square() -> None:
    assert float(value("squarehead", one_unit(3.0, 1.0)).detach()) == pytest.approx(4 / (1 + 2**-7))


def test_squarehead_adds_up_its_layers_and_logs_each() -> None:
    seen = view(make_part([[1]]), states([[0.0]], [[3.0]], [[1.0]]), states([[0.0]], [[1.0]], [[2.0]]))
    terms = term("squarehead").terms(term("squarehead").Config(), seen)
    expected = {"1": 4 / (1 + 2**-7), "2": 1 / (4 + 2**-7)}
    assert {name: float(each.sum.detach()) / each.count for name, each in terms.items()} == pytest.approx(
        expected
    )
    assert float(total(terms).detach()) == pytest.approx(sum(expected.values()))


def test_squarehead_hardly_changes_when_both_models_states_are_scaled() -> None:
    part = make_part([[1, 1, 1, 1], [1, 1, 0, 0]])
    student, teacher = random_states(3, 5, 0), random_states(3, 5, 1)
    once = value("squarehead", view(part, student, teacher))
    scaled = value("squarehead", view(part, [20 * s for s in student], [20 * t for t in teacher]))
    assert float(scaled.detach()) == pytest.approx(float(once.detach()), rel=0.03)
    assert float(scaled.detach()) > float(once.detach())  # the epsilon weighs less


def test_hidden_mse_is_the_mean_over_layers_positions_and_width() -> None:
    student = states([[0.0, 0.0]], [[1.0, 3.0]], [[2.0, 2.0]])
    teacher = states([[5.0, 5.0]], [[1.0, 1.0]], [[2.0, 0.0]])
    # layer 1: (0 + 4) / 2; layer 2: (0 + 4) / 2
    assert float(value("hidden_mse", view(make_part([[1]]), student, teacher)).detach()) == pytest.approx(2.0)


def test_hidden_cosine_sees_the_angle_alone() -> None:
    student = states([[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 7.0]])
    teacher = states([[5.0, 5.0]], [[3.0, 3.0]], [[0.0, 0.1]])
    found = float(value("hidden_cosine", view(make_part([[1]]), student, teacher)).detach())
    assert found == pytest.approx((1 - sqrt(0.5)) / 2)


def test_a_state_of_length_zero_has_a_finite_cosine_and_gradient() -> None:
    student = states([[0.0, 0.0]], [[0.0, 0.0]])
    loss = value("hidden_cosine", view(make_part([[1]]), student, states([[0.0, 0.0]], [[1.0, 0.0]])))
    loss.backward()
    assert float(loss.detach()) == 1
    assert torch.isfinite(student[1].grad).all()


@pytest.mark.parametrize("name", LAYERWISE)
def test_equal_states_cost_nothing(name: str) -> None:
    student = random_states(3, 5, 0)
    seen = view(make_part([[1, 1, 1, 1], [1, 1, 0, 0]]), student, student)
    assert float(value(name, seen).detach()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LAYERWISE)
def test_prompts_count_and_padding_does_not(name: str) -> None:
    part = make_part([[1, 1, 1, 0]], labels=[[-100, -100, 3, -100]])
    student, teacher = random_states(2, 3, 0, rows=1), random_states(2, 3, 1, rows=1)
    value(name, view(part, student, teacher)).backward()
    moved = student[1].grad[0].abs().sum(-1) > 0
    assert moved.tolist() == [True, True, True, False]
    assert student[0].grad is None


def test_squarehead_may_count_padding_as_ast_does() -> None:
    part = make_part([[1, 0]])
    seen = view(part, states([[0.0], [0.0]], [[1.0], [3.0]]), states([[0.0], [0.0]], [[1.0], [1.0]]))
    assert float(value("squarehead", seen, padding=True).detach()) == pytest.approx(4 / (2 + 2 * 2**-7))


@pytest.mark.parametrize("name", LAYERWISE)
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = random_states(2, 3, 0), random_states(2, 3, 1)
    value(name, view(make_part([[1, 1, 1, 1], [1, 1, 0, 0]]), student, teacher)).backward()
    assert all(layer.grad is None for layer in teacher)


# --- layers and widths ----------------------------------------------------------------------------------------


def config_json(layers: int = 2, width: int = 8, heads: int = 2, **more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, **more}


def matched(layers: Any, student: int, teacher: int) -> Any:
    return pairs(term("hidden_mse").Config(layers=layers), student, teacher, "hidden_mse")


def test_four_layers_into_two_is_one_word() -> None:
    assert matched("uniform", 2, 4) == ((1, 2), (2, 4))
    assert matched("uniform", 3, 4) == ((1, 1), (2, 3), (3, 4))
    assert matched("last", 2, 4) == ((2, 4),)
    assert matched(((1, 4),), 2, 4) == ((1, 4),)
    assert matched("same", 3, 3) == ((1, 1), (2, 2), (3, 3))


def test_an_even_map_ends_at_the_last_layers_and_never_steps_back() -> None:
    for student in range(1, 9):
        for teacher in range(1, 9):
            found = uniform(student, teacher)
            assert found[-1] == (student, teacher)
            assert len(found) == len(set(found)) == min(student, teacher)
            assert min(found[0]) >= 1
            assert sorted(found) == list(found)


def test_chosen_layers_are_compared_and_logged_under_the_students_number() -> None:
    student, teacher = random_states(3, 4, 0), random_states(5, 4, 1)
    seen = view(make_part([[1, 1, 1, 1], [1, 1, 1, 1]]), student, teacher)
    terms = term("hidden_mse").terms(term("hidden_mse").Config(layers="uniform"), seen)
    assert list(terms) == ["1", "2"]
    expected = [(student[1] - teacher[2]).square().mean(), (student[2] - teacher[4]).square().mean()]
    assert float(total(terms).detach()) == pytest.approx(float(sum(expected).detach()) / 2)


@pytest.mark.parametrize("name", LAYERWISE)
def test_different_depths_are_refused_with_a_sentence_before_loading(name: str) -> None:
    with pytest.raises(
        AssayError, match=rf"{name}: the student has 2 layers and the teacher 4.*layers=\"uniform\""
    ):
        term(name).check(term(name).Config(), config_json(2), config_json(4))
    term(name).check(term(name).Config(layers="uniform"), config_json(2), config_json(4))


@pytest.mark.parametrize("name", LAYERWISE)
def test_different_widths_are_refused_with_a_sentence_that_names_them(name: str) -> None:
    with pytest.raises(AssayError, match=r"states are 8 wide and the teacher's 12: write .*project=True"):
        term(name).check(term(name).Config(), config_json(width=8), config_json(width=12))
    term(name).check(term(name).Config(project=True), config_json(width=8), config_json(width=12))


def test_layers_that_are_not_there_or_named_twice_are_refused() -> None:
    with pytest.raises(AssayError, match=r"the pair \[1, 5\], but the student's layers are 0 to 2 .* 0 to 4"):
        matched(((1, 5),), 2, 4)
    with pytest.raises(AssayError, match="each layer of the student only once"):
        matched(((1, 2), (1, 3)), 2, 4)
    with pytest.raises(AssayError, match="hidden_mse: layers needs one pair or more"):
        term("hidden_mse").Config(layers=())  # before there are models


def test_gpt2_says_the_same_in_its_own_words() -> None:
    gpt2 = {"n_layer": 2, "n_embd": 8, "n_head": 2}
    term("hidden_mse").check(term("hidden_mse").Config(), gpt2, config_json())
    term("minilm").check(term("minilm").Config(), gpt2, config_json())


def test_a_projection_is_orthonormal_seeded_and_the_identity_between_equal_widths() -> None:
    before = torch.random.get_rng_state()
    weight = projection(4, 6, 3, "hidden_mse.1").weight.detach()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(weight.T @ weight, torch.eye(4))
    assert torch.equal(weight, projection(4, 6, 3, "hidden_mse.1").weight)
    assert not torch.equal(weight, projection(4, 6, 4, "hidden_mse.1").weight)
    assert not torch.equal(weight, projection(4, 6, 3, "hidden_mse.2").weight)
    assert torch.equal(projection(5, 5, 3, "nd").weight, torch.eye(5))


def test_a_projection_is_compared_in_place_of_the_state_and_is_trained() -> None:
    seen = view(make_part([[1]]), states([[0.0]], [[2.0]]), states([[0.0, 0.0]], [[1.0, 0.0]]))
    layer = torch.nn.Linear(1, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.5]]))
    loss = value("hidden_mse", replace(seen, companion=torch.nn.ModuleDict({"1": layer})), project=True)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(((2 - 1) ** 2 + 1**2) / 2)
    # d/dW 1/2 |W h - t|^2 = (W h - t) h
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[2.0], [2.0]], dtype=torch.float64))


# --- attention ------------------------------------------------------------------------------------------------


def test_minilm_of_two_positions_by_hand() -> None:
    """Scores of the second position: student (0, 0), teacher (log 3, 0); values: student (0, 0), teacher (0, log 2)."""
    part = make_part([[1, 1]])

    def attended(query: list[float], value: list[float]) -> Attended:
        tensors = (
            torch.tensor(each, dtype=torch.float64).view(1, 1, 2, 1) for each in (query, [1.0, 0.0], value)
        )
        return Attended(*tensors, scaling=1.0)

    student = attended([1.0, 0.0], [0.0, 0.0])
    teacher = attended([1.0, log(3)], [0.0, sqrt(log(2))])
    bare = Look(torch.zeros(1, 2, 1), lambda block: block)
    seen = View(part, replace(bare, attention=[student]), replace(bare, attention=[teacher]))
    terms = term("minilm").terms(term("minilm").Config(), seen)
    # the first position attends to itself alone in both models
    attention = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)
    relation = 1 / 3 * log(1 / 3 / 0.5) + 2 / 3 * log(2 / 3 / 0.5)
    found = {name: float(each.sum.detach()) / each.count for name, each in terms.items()}
    assert found == pytest.approx({"attention": attention / 2, "values": relation / 2})


def random_attention(heads: int, shared: int, size: int, seed: int) -> Attended:
    draw = torch.Generator().manual_seed(seed)

    def tensor(count: int) -> Tensor:
        return torch.randn(2, count, 5, size, generator=draw, dtype=torch.float64).requires_grad_()

    return Attended(tensor(heads), tensor(shared), tensor(shared), size**-0.5)


PADDED = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def minilm(student: Attended | None, teacher: Attended | None, **options: Any) -> Tensor:
    bare = Look(torch.zeros(2, 5, 1), lambda block: block)
    seen = View(make_part(PADDED), replace(bare, attention=[student]), replace(bare, attention=[teacher]))
    return value("minilm", seen, **options)


def test_minilm_leaves_padding_and_the_future_out() -> None:
    student, teacher = random_attention(2, 2, 3, 0), random_attention(2, 2, 6, 1)
    minilm(student, teacher).backward()
    for tensor in (student.query, student.key, student.value):
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad[1, :, 3:] == 0).all()
    changed = replace(student, key=torch.cat([student.key[:, :, :-1], student.key[:, :, -1:] + 9], 2))
    before, after = (
        term("minilm").divergences(each, teacher, term("minilm").allowed(torch.ones(2, 5, dtype=torch.bool)))
        for each in (student, changed)
    )
    torch.testing.assert_close(before["attention"][:, :, :-1], after["attention"][:, :, :-1])


def test_equal_attention_costs_nothing() -> None:
    student = random_attention(4, 2, 3, 0)
    assert float(minilm(student, student).detach()) == pytest.approx(0, abs=1e-12)


def test_shared_keys_and_values_are_repeated_for_their_query_heads() -> None:
    student, teacher = random_attention(4, 2, 3, 0), random_attention(4, 4, 3, 1)
    wide = replace(student, key=student.key[:, [0, 0, 1, 1]], value=student.value[:, [0, 0, 1, 1]])
    torch.testing.assert_close(minilm(student, teacher), minilm(wide, teacher))


def test_relation_heads_compare_models_of_different_heads() -> None:
    student, teacher = random_attention(2, 2, 6, 0), random_attention(4, 4, 6, 1)
    found = minilm(student, teacher, relation_heads=3)
    found.backward()
    assert torch.isfinite(student.value.grad).all()
    same = random_attention(2, 2, 6, 1)
    torch.testing.assert_close(minilm(student, same, relation_heads=2), minilm(student, same))


def test_minilm_compares_the_last_layers_that_attend_or_those_named() -> None:
    one, two, teacher = (random_attention(2, 2, 3, seed) for seed in range(3))
    chosen = term("minilm").chosen
    assert chosen([one, two, None], None) is two
    assert chosen([one, two, teacher], 1) is one


def test_heads_that_cannot_be_compared_are_refused_before_loading() -> None:
    check, config = term("minilm").check, term("minilm").Config
    with pytest.raises(AssayError, match="the student attends with 2 heads and the teacher with 4"):
        check(config(), config_json(heads=2), config_json(heads=4))
    check(config(relation_heads=4), config_json(heads=2), config_json(heads=4))
    with pytest.raises(
        AssayError, match="relation_heads=3 does not divide the width of the student's attention, 8"
    ):
        check(config(relation_heads=3), config_json(), config_json())
    with pytest.raises(AssayError, match="layer 3 of the teacher, which has 2, does not attend"):
        check(config(teacher_layer=3), config_json(), config_json())


def test_a_pruned_models_heads_are_those_of_its_last_attention() -> None:
    pruned = config_json(heads=4, layer_num_heads=[[4, 2], [2, 2], [0, 0]])
    term("minilm").check(term("minilm").Config(), pruned | {"num_hidden_layers": 3}, config_json(heads=2))
    with pytest.raises(AssayError, match="layer 3 of the student, which has 3, does not attend"):
        term("minilm").check(term("minilm").Config(student_layer=3), pruned, config_json(heads=2))


# --- recording ------------------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UNEVEN = {
    "layer_num_heads": [[4, 2], [3, 2], [0, 0]],
    "layer_queries_per_group": [[2, 2], [2, 1], []],
}
HEADS = {"llama": [4, 4, 4], "harmonic": [4, 4, 4], "pruned": [4, 3, None], "gpt2": [4, 4, 4]}


def make_model(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "gpt2":
        words = {"bos_token_id": 1, "eos_token_id": 1, "vocab_size": 50}
        scaled = {"scale_attn_by_inverse_layer_idx": True}
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=4, **words, **scaled)).eval()
    if kind == "pruned":
        return PrunedLlamaForCausalLM(PrunedLlamaConfig(**SHAPE, **UNEVEN)).eval()
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return with_head(model, Component("euclidean")) if kind == "harmonic" else model


def inputs() -> dict[str, Tensor]:
    part = make_part(PADDED)
    return {"input_ids": part.input_ids, "attention_mask": part.attention_mask}


@pytest.mark.parametrize("kind", HEADS)
def test_recording_changes_nothing_and_gives_the_models_own_attention(kind: str) -> None:
    model, before = make_model(kind), AttentionInterface.get_interface
    model.set_attn_implementation("eager")
    plain = model(**inputs(), output_attentions=True)
    with recorded(model) as found:
        again = model(**inputs())
    assert AttentionInterface.get_interface is before
    assert torch.equal(plain.logits, again.logits)
    assert [each and each.query.shape[1] for each in found] == HEADS[kind]
    looked = make_part(PADDED).attention_mask.bool()
    may = term("minilm").allowed(looked)
    shown = [each for each in plain.attentions if each is not None]
    for attended, expected in zip([each for each in found if each is not None], shown, strict=False):
        own = term("minilm").relations(attended, may, None)["attention"].exp()
        torch.testing.assert_close(own.transpose(1, 2)[looked], expected.transpose(1, 2)[looked])


@pytest.mark.parametrize("kind", HEADS)
def test_fused_attention_is_recorded_as_well(kind: str) -> None:
    model = make_model(kind)
    found = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with recorded(model) as found[name]:
            model(**inputs())
    for eager, fused in zip(found["eager"], found["sdpa"], strict=True):
        assert (eager is None) == (fused is None)
        if eager is not None:
            torch.testing.assert_close(eager.query[0], fused.query[0])
            torch.testing.assert_close(eager.value[0], fused.value[0])


def test_only_the_asked_layers_of_the_asked_model_are_recorded() -> None:
    model, other = make_model("llama"), make_model("gpt2")
    with recorded(model, layers=(2,)) as found:
        other(**inputs())
        model(**inputs())
    assert [each is None for each in found] == [True, True, False]
    assert found[2].key.shape[1] == 2  # not GPT-2's four


def test_the_last_layer_that_attends_can_be_asked_for_whatever_its_number() -> None:
    model = make_model("llama")
    with recorded(model, layers={0, -1}) as found:
        model(**inputs())
    assert [each is None for each in found] == [False, True, False]


def test_minilm_keeps_the_attention_of_the_layers_that_it_compares_alone() -> None:
    shown: list[Look] = []

    class Teacher(Live):
        def look(self, *asked: Any) -> Look:
            shown.append(super().look(*asked))
            return shown[-1]

    student, teacher = make_model("llama"), Teacher(make_model("gpt2"))
    mixture = Mixture([of("minilm", teacher_layer=2), of("minilm", weight=0.5)])
    found = mixture.terms(student, teacher, SimpleNamespace(train=make_part(PADDED)))
    assert set(found) == {"minilm.attention", "minilm.values", "minilm.2.attention", "minilm.2.values"}
    assert [each is None for each in shown[0].attention] == [True, False, False]
    assert shown[0] is shown[1]  # one pass for both
    assert teacher._last is None  # and nothing is held beyond the step


def test_two_models_can_be_recorded_at_once() -> None:
    model, other = make_model("llama"), make_model("gpt2")
    with recorded(model) as mine, recorded(other) as its:
        other(**inputs())
        model(**inputs())
    assert mine[0].key.shape[1] == 2
    assert its[0].key.shape[1] == 4


def test_a_model_that_attends_otherwise_is_refused_with_a_sentence() -> None:
    model = make_model("llama")
    with (
        pytest.raises(AssayError, match="LlamaForCausalLM has no layer that attends through"),
        recorded(model),
    ):
        pass


def test_after_an_error_everything_is_as_before() -> None:
    model, before = make_model("llama"), AttentionInterface.get_interface
    with pytest.raises(RuntimeError, match="stopped"), recorded(model):
        raise RuntimeError("stopped")
    assert AttentionInterface.get_interface is before


def test_gradients_are_the_same_where_activations_are_computed_twice() -> None:
    def gradients(twice: bool) -> list[Tensor]:
        model = make_model("llama").train()
        if twice:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with recorded(model) as found:
            model(**inputs())
        (found[2].query.square().sum() + found[1].value.square().sum()).backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    for once, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(once, again)


def test_a_model_that_shares_its_own_keys_says_the_same_and_another_ones_something_else() -> None:
    model, other = make_model("llama"), make_model("llama", seed=1)
    plain = model(**inputs()).logits
    looked = make_part(PADDED).attention_mask.bool()
    for source, equal in ((model, True), (other, False)):
        with recorded(source) as found:
            source(**inputs())
        with sharing(model, found):
            shared = model(**inputs()).logits
        assert torch.allclose(shared[looked], plain[looked], atol=1e-6) is equal


# --- ND -------------------------------------------------------------------------------------------------------


def test_nd_by_hand_on_both_sides_of_the_kink() -> None:
    student = torch.tensor([[3.0, 4.0], [0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    units = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    found = term("nd").losses(student, torch.tensor([2.0, 2.0], dtype=torch.float64), units)
    # longer than the teacher: 1 - cos; shorter: 1 - s . e / |t|
    assert found.tolist() == pytest.approx([1 - 3 / 5, 1 - 0.6 / 2])
    found.sum().backward()
    long, short = student.grad
    assert float((long @ student[0]).detach()) == pytest.approx(0)  # only the direction is trained
    assert short.tolist() == pytest.approx([-1 / 2, 0])  # pushed along e


def example(*labels: int) -> Example:
    return Example(input_ids=(1,) * len(labels), labels=labels)


def test_nd_counts_targets_and_leaves_rare_tokens_out() -> None:
    # a label at the first position is nobody's target
    rows = [example(5, 5, 7), example(-100, 5, 7), example(5, -100, 3)]
    assert term("nd").tokens_kept(rows, 2) == [5, 7]
    assert term("nd").tokens_kept(rows, 3) == []


def test_nd_takes_unit_vectors_of_the_mean_states() -> None:
    batches = [
        (torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 2.0]]), torch.tensor([4, 6, 2])),
        (torch.tensor([[2.0, 4.0], [5.0, 5.0]]), torch.tensor([4, 90])),
    ]
    known = term("nd").directions([2, 4], iter(batches))
    torch.testing.assert_close(known.units, torch.tensor([[0.0, 1.0], [0.6, 0.8]]))
    assert known.of(torch.tensor([4, 2, 6, 90, 0])).tolist() == [1, 0, -1, -1, -1]


def nd_view(student: Tensor, teacher: Tensor, part: Part, known: Any) -> View:
    return View(part, Look(student, lambda block: block), Look(teacher, lambda block: block), memory=known)


def test_nd_looks_at_answers_whose_token_is_known() -> None:
    part = make_part([[1, 1, 1, 1, 1]], labels=[[-100, -100, 4, 6, 4]])
    known = term("nd").directions([4], iter([(torch.tensor([[1.0, 0.0]]), torch.tensor([4]))]))
    student = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    terms = term("nd").terms(term("nd").Config(), nd_view(student, torch.ones(1, 5, 2), part, known))
    assert terms[""].count == 2
    terms[""].sum.backward()
    assert (student.grad[0].abs().sum(-1) > 0).tolist() == [False, True, False, True, False]


def test_nd_without_a_known_token_in_the_batch_is_zero_and_not_nan() -> None:
    part = make_part([[1, 1]], labels=[[-100, 6]])
    known = term("nd").directions([4], iter([(torch.tensor([[1.0, 0.0]]), torch.tensor([4]))]))
    student = torch.ones(1, 2, 2, requires_grad=True)
    loss = total(term("nd").terms(term("nd").Config(), nd_view(student, torch.ones(1, 2, 2), part, known)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (student.grad == 0).all()


def test_nd_without_any_frequent_token_is_refused_with_a_sentence() -> None:
    setting = SimpleNamespace(examples=[example(-100, 5)])
    with pytest.raises(AssayError, match="no token is an answer's 8 times or more in the 1 rows"):
        term("nd").prepare(term("nd").Config(), setting)


def test_nd_refuses_different_widths_before_loading() -> None:
    with pytest.raises(AssayError, match=r"nd: the student's .* 8 wide and the teacher's 12.*project=True"):
        term("nd").check(term("nd").Config(), config_json(width=8), config_json(width=12))


# --- micro-batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LAYERWISE, "minilm", "nd"])
def test_micro_batches_change_nothing(name: str) -> None:
    student, teacher = make_model("llama").double(), make_model("llama", seed=1).double()
    part = make_part([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    kept = part.targets[part.mask].unique().tolist()[1:]
    memory = None
    if name == "nd":
        memory = term("nd").directions(
            kept, iter([(look(teacher, part).states[:, :-1][part.mask], part.targets[part.mask])])
        )

    def loss(model: Any, batch: Any) -> dict[str, Term]:
        with torch.no_grad():
            its = look(teacher, batch.train, True, True)
        seen = View(batch.train, look(model, batch.train, True, True), its, memory=memory)
        return dict(term(name).terms(term(name).Config(), seen))

    found = []
    for micro_batch in (None, 2, 1):
        means = Gradient(student, loss, micro_batch=micro_batch)({"train": part}, 0, 1)
        slopes = [weight.grad.clone() for weight in student.parameters() if weight.grad is not None]
        found.append((means, slopes))
    for means, slopes in found[1:]:
        assert means == pytest.approx(found[0][0], rel=1e-10)
        for one, other in zip(slopes, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# --- whole stages ---------------------------------------------------------------------------------------------


def make_teacher(student: Path, folder: Path, layers: int = 4, width: int = 24, heads: int = 2) -> Path:
    """A deeper and wider Llama that reads as the student does."""
    shutil.copytree(student, folder)
    saved = json.loads((student / "config.json").read_text())
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    torch.manual_seed(9)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=saved["vocab_size"], intermediate_size=24, tie_word_embeddings=True, **shape)
    ).save_pretrained(folder)
    return folder


def distilled(student: Path, teacher: Path, folder: Path, *terms: Component, **options: Any) -> Path:
    """Run ``distill.mix`` for a few steps; the folder of its model."""
    module = catalogue().method("distill.mix").load()
    adamw = Component("adamw", {"learning_rate": 1e-2})
    small = {
        "steps": 8,
        "batch": 12,
        "data": "first",
        "optimizer": adamw,
        "log_every": 1,
        "precision": "float32",
    }
    config = module.Config(teacher=Parent("teacher-000000000000"), terms=terms, **small | options)
    distill.run(make_stage(student, folder, config, teacher=teacher), module)
    return folder / "result" / "model"


def curve_of(model: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in (model.parent / "curve.csv").read_text().splitlines()[1:]:
        _, name, number = line.split(",")
        found.setdefault(name, []).append(float(number))
    return found


INTO_TWO = (
    of("hidden_mse", layers="uniform", project=True),
    of("squarehead", layers="last", project=True),
    of("hidden_cosine", layers=((1, 3),), project=True),
    of("minilm"),
    of("nd", project=True, least_seen=3),
    of("forward_kl"),
)


def test_four_wide_layers_are_distilled_into_two_narrow_ones(tmp_path: Path) -> None:
    student = make_parent(tmp_path / "student", dropout=0.0)
    teacher = make_teacher(student, tmp_path / "teacher")
    before = weights_of(teacher)
    model = distilled(student, teacher, tmp_path / "once", *INTO_TWO)
    curve = curve_of(model)
    names = {"hidden_mse.1", "hidden_mse.2", "squarehead.2", "hidden_cosine.1"}
    names |= {"minilm.attention", "minilm.values", "nd", "forward_kl"}
    assert names <= set(curve)
    assert sum(curve[name][-1] for name in names) < sum(curve[name][0] for name in names)
    assert same(before, weights_of(teacher))
    beside = {path.stem: load_file(path) for path in (model / "companions").iterdir()}
    assert set(beside) == {"hidden_mse", "squarehead", "hidden_cosine", "nd"}
    assert beside["hidden_mse"].keys() == {"1.weight", "2.weight"}
    assert beside["nd"]["weight"].shape == (24, 16)
    assert set(weights_of(model)) == set(weights_of(student))
    again = distilled(student, teacher, tmp_path / "again", *INTO_TWO, micro_batch=5)
    for name, weight in weights_of(again).items():
        torch.testing.assert_close(weight, weights_of(model)[name], rtol=1e-3, atol=1e-4)


def test_projections_are_trained(tmp_path: Path) -> None:
    student = make_parent(tmp_path / "student", dropout=0.0)
    teacher = make_teacher(student, tmp_path / "teacher")
    term_of = of("hidden_mse", layers="last", project=True)
    model = distilled(student, teacher, tmp_path, term_of)
    weight = load_file(model / "companions" / "hidden_mse.safetensors")["2.weight"]
    assert not torch.equal(weight, projection(16, 24, 3, "hidden_mse.2").weight)


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        (of("squarehead"), "squarehead: the student has 2 layers and the teacher 4"),
        (of("hidden_mse", layers="uniform"), "hidden states are 16 wide and the teacher's 24"),
        (of("hidden_cosine", layers=((3, 4),), project=True), "the student's layers are 0 to 2"),
        (of("nd"), "nd: the student's hidden states are 16 wide"),
        (of("minilm"), "the student attends with 2 heads and the teacher with 4"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_weights_are_loaded(
    chosen: Component, sentence: str, tmp_path: Path
) -> None:
    student = make_parent(tmp_path / "student")
    teacher = make_teacher(student, tmp_path / "teacher", heads=4)
    for folder in (student, teacher):
        (folder / "model.safetensors").write_bytes(b"nobody may open this")
    with pytest.raises(AssayError, match=sentence):
        distilled(student, teacher, tmp_path, chosen)


@pytest.mark.parametrize("name", [*LAYERWISE, "minilm", "nd"])
def test_a_record_or_several_teachers_have_no_hidden_states(name: str) -> None:
    module = catalogue().method("distill.mix").load()
    one = Parent("teacher-000000000000")
    for source in ({"recorded": one}, {"ensemble": (one, one)}):
        with pytest.raises(AssayError, match=rf"the term {name} .*: give teacher= instead"):
            module.Config(terms=(of(name),), **source)
