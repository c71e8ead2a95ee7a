"""Distillation losses: one number worked out by hand each, gradients, masks, micro-batches, vocabularies."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.data import Part
from methods.distill import check_teacher, cut, run
from methods.find import catalogue
from methods.gradient import Gradient
from methods.stage import AssayError, Component, Parent
from methods.terms import kl_divergence, total
from tests.parity.cases import Table
from tests.training import make_parent, make_stage, same, weights_of

TEACHER = Parent("model.new-000000000000")
METHODS = ("cross_entropy", "forward_kl", "squarehead")


def method(name: str) -> Any:
    return catalogue().method(f"distill.{name}").load()


def config_of(name: str, **options: Any) -> Any:
    teacher = {} if name == "cross_entropy" else {"teacher": TEACHER}
    return method(name).Config(**teacher, **options)


def binary(*probabilities: float) -> Tensor:
    """Logits [positions,2] of a two-word model that gives word 0 these probabilities."""
    return torch.tensor([[log(p), log(1 - p)] for p in probabilities], dtype=torch.float64)


def one_batch(labels: list[list[int]]) -> Any:
    """A batch whose ids are the rows of a table."""
    wanted = torch.tensor(labels)
    ids = torch.arange(wanted.numel()).view_as(wanted)
    return SimpleNamespace(
        train=Part(input_ids=ids, attention_mask=torch.ones_like(wanted), labels=wanted, name="train")
    )


def hand(name: str, hidden: tuple[float, float] = (0.0, 0.0), **options: Any) -> float:
    """Student 1/2, teacher 1/4 at the one answer position; one layer of one unit that is ``hidden`` everywhere."""

    def states(value: float) -> tuple[Tensor, Tensor]:
        return torch.full((2, 1), 9.0, dtype=torch.float64), torch.full((2, 1), value, dtype=torch.float64)

    student, teacher = Table(binary(0.5, 0.9), states(hidden[0])), Table(binary(0.25, 0.1), states(hidden[1]))
    return float(
        total(method(name).loss(config_of(name, **options), student, teacher, one_batch([[-100, 0]])))
    )


DIVERGENCE = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)


def test_cross_entropy_is_the_answer_loss() -> None:
    assert hand("cross_entropy") == pytest.approx(log(2))


def test_forward_kl_is_the_divergence_of_the_student_from_the_teacher() -> None:
    assert hand("forward_kl") == pytest.approx(DIVERGENCE)


def test_alpha_mixes_in_the_labels() -> None:
    assert hand("forward_kl", alpha=0.25) == pytest.approx(0.75 * log(2) + 0.25 * DIVERGENCE)


def test_temperature_softens_both_and_is_squared_out() -> None:
    soft = 1 / (1 + 3**0.5)  # softmax of (log 1/4, log 3/4) / 2
    expected = soft * log(soft / 0.5) + (1 - soft) * log((1 - soft) / 0.5)
    assert hand("forward_kl", temperature=2.0) == pytest.approx(4 * expected)
    assert hand("forward_kl", temperature=2.0, scale_by_temperature=False) == pytest.approx(expected)


def test_squarehead_divides_by_the_teachers_mean_square() -> None:
    # (3 - 1)^2 / (1^2 + 2^-7); the embedding's output, 9 in both, is not looked at
    assert hand("squarehead", (3.0, 1.0), cross_entropy=0.0, kl=0.0) == pytest.approx(4 / (1 + 2**-7))


def test_squarehead_adds_three_weighted_terms() -> None:
    expected = 2 * log(2) + 3 * DIVERGENCE + 0.5 * 4 / (1 + 2**-7)
    assert hand("squarehead", (3.0, 1.0), cross_entropy=2.0, kl=3.0, squarehead=0.5) == pytest.approx(
        expected
    )


def test_squarehead_without_hidden_weight_asks_for_no_hidden_states() -> None:
    student, teacher = Table(binary(0.5, 0.9)), Table(binary(0.25, 0.1))
    config = config_of("squarehead", squarehead=0.0)
    terms = method("squarehead").loss(config, student, teacher, one_batch([[-100, 0]]))
    assert set(terms) == {"cross_entropy", "kl"}


def test_squarehead_looks_at_prompts_but_not_at_padding() -> None:
    module = method("squarehead")
    batch = one_batch([[-100, -100, 0, -100]])
    mask = torch.tensor([[1, 1, 1, 0]])
    batch.train = replace(batch.train, attention_mask=mask)
    target = torch.ones(1, 4, 2)
    state = target.clone()
    state[0, 3] = 100.0
    assert module.layer_term(batch.train, target, state, 1.0).sum == 0
    state[0, 0] = 2.0
    assert module.layer_term(batch.train, target, state, 1.0).sum == 2


def test_three_weights_of_zero_are_refused_with_a_sentence() -> None:
    with pytest.raises(AssayError, match="all three weights are 0"):
        config_of("squarehead", cross_entropy=0.0, kl=0.0, squarehead=0.0)


def test_the_teacher_gets_no_gradient() -> None:
    logits, states = binary(0.25, 0.1).requires_grad_(), torch.ones(2, 1).requires_grad_()
    student = Table(binary(0.5, 0.9).requires_grad_(), (torch.ones(2, 1), torch.zeros(2, 1)))
    module = method("squarehead")
    total(
        module.loss(config_of("squarehead"), student, Table(logits, (states, states)), one_batch([[-100, 0]]))
    ).backward()
    assert logits.grad is None
    assert states.grad is None


def test_absent_entries_of_a_padded_vocabulary_add_nothing() -> None:
    padding = torch.full((2, 3), -torch.inf, dtype=torch.float64)
    student = torch.cat([binary(0.5, 0.9), padding], -1).requires_grad_()
    values = kl_divergence(torch.cat([binary(0.25, 0.1), padding], -1), student)
    assert float(values[0].detach()) == pytest.approx(DIVERGENCE)
    values.sum().backward()
    assert torch.isfinite(student.grad).all()


def test_a_fully_masked_batch_gives_zero_and_no_gradient() -> None:
    logits = binary(0.5, 0.9).requires_grad_()
    module = method("forward_kl")
    value = total(
        module.loss(
            config_of("forward_kl"), Table(logits), Table(binary(0.25, 0.1)), one_batch([[-100, -100]])
        )
    )
    value.backward()
    assert value == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("micro_batch", [2, 1])
def test_micro_batches_of_unequal_lengths_give_the_same_gradient(name: str, micro_batch: int) -> None:
    random = torch.Generator().manual_seed(0)

    def table(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    model, teacher = TableModel(table(24, 5), table(3, 24, 4)), Table(table(24, 5), tuple(table(3, 24, 4)))
    labels = torch.randint(0, 5, (4, 6), generator=random)
    for row in range(4):
        labels[row, : 1 + row] = -100

    def gradients(size: int | None) -> list[Tensor]:
        def loss(student: Any, batch: Any) -> Any:
            return method(name).loss(config_of(name), student, teacher, batch)

        Gradient(model, loss, micro_batch=size)({"train": one_batch(labels.tolist()).train}, 0, 1)
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    for actual, expected in zip(gradients(micro_batch), gradients(None), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-15)


class TableModel(torch.nn.Module):
    """A table whose rows are trained."""

    def __init__(self, logits: Tensor, states: Tensor) -> None:
        super().__init__()
        self.logits, self.states = torch.nn.Parameter(logits), torch.nn.Parameter(states)

    def forward(self, **inputs: Any) -> Any:
        return Table(self.logits, tuple(self.states))(**inputs)


# --- what is compared before any weight is loaded ---------------------------------------------------------


def model_folder(folder: Path, words: list[str], vocabulary: int, hidden: int = 8, layers: int = 1) -> Path:
    """A folder with a word tokenizer, a config and an empty file of weights, which nobody may open."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps(shape | {"model_type": "llama"}))
    (folder / "model.safetensors").touch()
    return folder


def test_equal_vocabularies_are_left_alone(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "student", ["a", "b", "c"], 3)
    assert check_teacher(student, student) is None


def test_a_padded_vocabulary_is_cut_to_the_tokenizers_size(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "student", ["a", "b", "c"], 4)
    teacher = model_folder(tmp_path / "teacher", ["a", "b", "c"], 8)
    assert check_teacher(student, teacher) == 3


def test_cutting_renormalises_and_keeps_hidden_states() -> None:
    answer = cut(Table(torch.zeros(2, 5), (torch.ones(2, 1),)), 3)(
        input_ids=torch.tensor([[0, 1]]), attention_mask=torch.ones(1, 2), output_hidden_states=True
    )
    assert answer.logits.shape == (1, 2, 3)
    assert len(answer.hidden_states) == 1


def test_equal_sizes_with_different_tokens_are_refused(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "student", ["a", "b", "c"], 3)
    teacher = model_folder(tmp_path / "teacher", ["a", "c", "b"], 3)
    with pytest.raises(AssayError, match=r"first differ at id 1 .*take a teacher of the same model family"):
        check_teacher(student, teacher)


def test_another_tokenizer_is_refused_with_its_size(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "student", ["a", "b", "c"], 3)
    teacher = model_folder(tmp_path / "teacher", ["a", "b", "c", "d"], 4)
    with pytest.raises(
        AssayError, match=r"teacher's tokenizer has 4 tokens and the student's 3; .* id 3 \('d'\)"
    ):
        check_teacher(student, teacher)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "student", ["a", "b", "c"], 2)
    teacher = model_folder(tmp_path / "teacher", ["a", "b", "c"], 3)
    with pytest.raises(AssayError, match="only a vocabulary padded beyond the tokenizer's can be cut"):
        check_teacher(student, teacher)


def test_hidden_states_of_another_shape_are_refused_only_where_they_are_used(tmp_path: Path) -> None:
    student = model_folder(tmp_path / "student", ["a", "b"], 2, layers=1)
    teacher = model_folder(tmp_path / "teacher", ["a", "b"], 2, layers=2)
    assert check_teacher(student, teacher) is None
    with pytest.raises(AssayError, match="teacher's num_hidden_layers is 2 and the student's 1"):
        check_teacher(student, teacher, hidden=True)


# --- whole stages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_stage_lowers_its_terms_and_leaves_the_teacher_alone(name: str, tmp_path: Path) -> None:
    student = make_parent(tmp_path / "student", dropout=0.0)
    teacher = trained(student, tmp_path / "teacher", "cross_entropy", steps=16)
    before = weights_of(teacher)
    parents = {} if name == "cross_entropy" else {"teacher": teacher}
    trained(student, tmp_path, name, steps=8, **parents)
    curve = terms_of(tmp_path / "result" / "curve.csv")
    expected = {"cross_entropy": {"cross_entropy"}, "forward_kl": {"kl"}}
    assert set(curve) == expected.get(name, {"cross_entropy", "kl", "squarehead.1", "squarehead.2"})
    assert sum(values[-1] for values in curve.values()) < sum(values[0] for values in curve.values())
    assert same(before, weights_of(teacher))


def trained(student: Path, folder: Path, name: str, steps: int, **parents: Path) -> Path:
    """Run a stage on a whole small set; the folder of its model."""
    adamw = Component("adamw", {"learning_rate": 1e-2})
    config = config_of(name, steps=steps, batch=12, data="first", optimizer=adamw, log_every=1)
    run(make_stage(student, folder, config, **parents), method(name))
    return folder / "result" / "model"


def terms_of(path: Path) -> dict[str, list[float]]:
    """The terms of the loss along a learning curve."""
    found: dict[str, list[float]] = {}
    for line in path.read_text().splitlines()[1:]:
        _, term, value = line.split(",")
        if term not in ("learning_rate", "gradient_norm"):
            found.setdefault(term, []).append(float(value))
    return found
