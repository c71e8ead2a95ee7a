"""Universal logit distillation: what it is, what it cannot see, and a teacher with other tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods import distill
from methods.data import Part, Style, byte_bpe
from methods.distill import mix
from methods.gradient import Gradient
from methods.stage import AssayError, Component, Parent
from methods.term import Look, View, _blocks, uld
from tests.training import ROWS, curve_of, make_parent, make_stage

TEACHER = Parent("model.new-000000000000")


def part(labels: list[list[int]], name: str = "train") -> Part:
    wanted = torch.tensor(labels)
    return Part(torch.zeros_like(wanted), torch.ones_like(wanted), wanted, name)


def look(probabilities: Tensor) -> Look:
    """A model that gives every position these probabilities [B,T,V]."""
    return Look(probabilities.log(), lambda block: block)


def value(config: uld.Config, student: Look, teacher: Look, mine: Part, its: Part) -> Tensor:
    term = uld.terms(config, View(mine, student, teacher, batch=SimpleNamespace(teacher=its)))[""]
    return term.sum / term.count


def same_everywhere(chances: list[float], length: int) -> Tensor:
    return torch.tensor(chances).expand(1, length, len(chances)).clone()


WHOLE = uld.Config(skip_student_end=False)


def test_the_shorter_distribution_is_filled_up_with_zeros() -> None:
    # sorted: 0.75 0.25 0.00 against 0.50 0.30 0.20
    student, teacher = same_everywhere([0.25, 0.75], 2), same_everywhere([0.3, 0.5, 0.2], 2)
    found = value(WHOLE, look(student), look(teacher), part([[-100, 0]]), part([[-100, 1]], "teacher"))
    assert float(found) == pytest.approx(0.25 + 0.05 + 0.2)


def test_any_permutation_of_the_teacher_is_the_teacher() -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(5, 40, generator=draw).softmax(-1)
    teacher = torch.randn(5, 40, generator=draw).softmax(-1)
    order = torch.randperm(40, generator=draw)
    assert torch.equal(uld.sorted_distance(teacher[:, order], student), uld.sorted_distance(teacher, student))
    assert float(uld.sorted_distance(teacher[:, order], teacher).abs().max()) == 0.0


def test_it_lies_between_0_and_2() -> None:
    # one entry against many equal ones comes as close to 2 as 2 - 2/V
    sure, unsure = torch.zeros(1, 1000), torch.full((1, 1000), 1e-3)
    sure[0, 3] = 1.0
    assert float(uld.sorted_distance(unsure, sure)) == pytest.approx(2 - 2e-3)
    assert float(uld.sorted_distance(sure, sure)) == 0.0


def test_sequences_count_alike_whatever_their_lengths() -> None:
    mine, its = part([[-100, 0, 0, 0], [-100, 0, -100, -100]]), part([[-100, 0, 0], [-100, 0, 0]], "teacher")
    student = torch.tensor([0.5, 0.5]).expand(2, 4, 2).clone()
    teacher = torch.tensor([1.0, 0.0]).expand(2, 3, 2).clone()
    teacher[0, 1] = 0.5
    # first row: distances 1 and 0 over min(3, 2) positions; second: 1 over one
    assert float(value(WHOLE, look(student), look(teacher), mine, its)) == pytest.approx((0.5 + 1) / 2)


def test_ends_are_left_out_where_asked_for() -> None:
    mine, its = part([[-100, 0, 0]]), part([[-100, 0, 0]], "teacher")
    student, teacher = same_everywhere([0.5, 0.5], 3), same_everywhere([0.5, 0.5], 3)
    teacher[0, 1] = torch.tensor([1.0, 0.0])
    assert float(value(WHOLE, look(student), look(teacher), mine, its)) == pytest.approx(0.5)
    for options in ({"skip_student_end": True}, {"skip_student_end": False, "skip_teacher_end": True}):
        assert float(value(uld.Config(**options), look(student), look(teacher), mine, its)) == 0.0
    # where the student has one token more, leaving out its end leaves the two pairs as they are
    longer = part([[-100, 0, 0, 0]]), look(same_everywhere([0.5, 0.5], 4))
    for skip, expected in ((True, 0.5), (False, 0.5)):
        config = uld.Config(skip_student_end=skip, skip_teacher_end=False)
        assert float(value(config, longer[1], look(teacher), longer[0], its)) == pytest.approx(expected)
    config = uld.Config(skip_student_end=False, skip_teacher_end=True)
    assert float(value(config, longer[1], look(teacher), longer[0], its)) == 0.0


def test_an_answer_of_which_nothing_is_left_counts_as_0() -> None:
    mine, its = part([[-100, 0], [-100, 0]]), part([[-100, 0], [-100, 0]], "teacher")
    student = torch.tensor([0.5, 0.5]).expand(2, 2, 2).clone().requires_grad_()
    found = value(uld.Config(), look(student), look(student.detach()), mine, its)
    found.backward()
    assert found.detach() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_unshifted_reads_one_position_late() -> None:
    student, teacher = same_everywhere([0.5, 0.5], 2), same_everywhere([0.5, 0.5], 2)
    teacher[0, 1] = torch.tensor([1.0, 0.0])
    given = (look(student), look(teacher), part([[-100, 0]]), part([[-100, 0]], "teacher"))
    assert float(value(WHOLE, *given)) == 0.0
    assert float(value(replace(WHOLE, alignment="unshifted"), *given)) == pytest.approx(1.0)


def test_a_temperature_softens_its_own_side_alone() -> None:
    student, teacher = same_everywhere([0.9, 0.1], 2), same_everywhere([0.75, 0.25], 2)
    given = (look(student), look(teacher), part([[-100, 0]]), part([[-100, 0]], "teacher"))
    # 0.9 / 0.1 is 9; its square root is 3
    assert float(value(replace(WHOLE, student_temperature=2.0), *given)) == pytest.approx(0.0, abs=1e-6)
    assert float(value(replace(WHOLE, teacher_temperature=2.0), *given)) > float(value(WHOLE, *given))


def ragged() -> tuple[Tensor, Tensor, Part, Part]:
    draw = torch.Generator().manual_seed(1)
    mine = part([[-100, 0, 0, 0, 0], [-100, -100, 0, 0, -100], [-100, 0, 0, -100, -100], [-100, 0, 0, 0, 0]])
    its = part([[-100, 0, 0, 0], [-100, 0, 0, -100], [-100, 0, 0, 0], [-100, -100, 0, 0]], "teacher")
    student = torch.randn(4, 5, 7, generator=draw, dtype=torch.float64)
    teacher = torch.randn(4, 4, 9, generator=draw, dtype=torch.float64)
    return student, teacher, mine, its


def test_the_size_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for entries in (7, 21, 2**24):
        monkeypatch.setattr(_blocks, "ENTRIES", entries)
        student, teacher, mine, its = ragged()
        leaf = student.requires_grad_()
        result = value(WHOLE, Look(leaf, lambda block: block), Look(teacher, lambda block: block), mine, its)
        result.backward()
        found.append((result.detach(), leaf.grad))
    for result, gradient in found[:2]:
        torch.testing.assert_close(result, found[2][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, found[2][1], rtol=1e-12, atol=1e-15)


def test_micro_batches_change_nothing() -> None:
    student, teacher, mine, its = ragged()
    rows = torch.arange(4)[:, None]
    mine, its = (replace(each, input_ids=rows.expand_as(each.labels).contiguous()) for each in (mine, its))

    class Rows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(student.clone())

    def loss(model: Any, batch: Any) -> Any:
        seen = Look(model.table[batch.train.input_ids[:, 0]], lambda block: block)
        shown = Look(teacher[batch.teacher.input_ids[:, 0]], lambda block: block)
        return uld.terms(WHOLE, View(batch.train, seen, shown, batch=batch))

    found = []
    for size in (None, 1, 3):
        model = Rows()
        means = Gradient(model, loss, micro_batch=size)({"train": mine, "teacher": its}, 0, 1)
        found.append((means[""], model.table.grad))
    for mean, gradient in found[1:]:
        assert mean == pytest.approx(found[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-12, atol=1e-15)


# --- two tokenizers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("student"), dropout=0.0)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with longer tokens, other ids and one layer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("stranger")
    specials = {"eos_token": "<end>", "pad_token": "<none>"}
    texts = [row["question"] + " " + row["answer"] for row in ROWS]
    trained = byte_bpe(texts, 330, list(specials.values()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, **specials)
    torch.manual_seed(6)
    shape = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=330, initializer_range=0.3, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Style(prompt="plain").write(folder)
    return folder


def trained(student: Path, teacher: Path, folder: Path, *terms: Component, **options: Any) -> Any:
    settings = {
        "steps": 6,
        "batch": 4,
        "log_every": 1,
        "context_tokens": 64,
        "optimizer": Component("adamw", {"learning_rate": 0.01}),
    }
    config = mix.Config(teacher=TEACHER, terms=terms, data="first", **settings | options)
    stage = make_stage(student, folder, config, teacher=teacher)
    distill.run(stage, mix)
    return stage


def test_a_student_learns_from_a_teacher_with_other_tokens(
    student: Path, stranger: Path, tmp_path: Path
) -> None:
    stage = trained(student, stranger, tmp_path, Component("cross_entropy"), Component("uld"))
    lines = curve_of(stage)
    assert lines["uld"][-1] < lines["uld"][0]
    assert lines["cross_entropy"][-1] < lines["cross_entropy"][0]
    assert "uld" not in stage.notes


def test_micro_batches_of_two_tokenisations_give_the_same_model(
    student: Path, stranger: Path, tmp_path: Path
) -> None:
    descent = Component("sgd", {"learning_rate": 0.1, "momentum": 0.0})
    found = []
    for size in (None, 1):
        folder = tmp_path / str(size)
        terms = (Component("cross_entropy"), Component("uld"))
        options: dict[str, Any] = {"micro_batch": size, "steps": 2, "optimizer": descent}
        found.append(curve_of(trained(student, stranger, folder, *terms, **options)))
    for name, values in found[0].items():
        assert found[1][name] == pytest.approx(values, rel=1e-4), name


def test_standing_alone_is_noted(student: Path, stranger: Path, tmp_path: Path) -> None:
    stage = trained(student, stranger, tmp_path, Component("uld"), steps=1)
    assert "which token is meant" in stage.notes["uld"]


def test_another_loss_on_logits_is_refused_with_a_sentence(
    student: Path, stranger: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssayError, match="needs one vocabulary"):
        trained(student, stranger, tmp_path, Component("uld"), Component("forward_kl"))


def test_a_temperature_of_0_is_refused() -> None:
    from pydantic import TypeAdapter, ValidationError

    with pytest.raises(ValidationError):
        TypeAdapter(uld.Config).validate_python({"student_temperature": 0.0})
