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

from methods.checkpoint import load_tokenizer
from methods.data import Part, Style, byte_bpe
from methods.distill import check_teacher, cut, run
from methods.distill._mixture import Mixture
from methods.distill._running import mixture_of, together
from methods.distill._sources import Live
from methods.find import catalogue
from methods.gradient import Gradient
from methods.loop import Adaptive
from methods.stage import AssayError, Component, Parent, Term
from methods.term import of
from methods.terms import kl_divergence, total
from tests.parity.cases import Table
from tests.training import make_parent, make_stage, same, weights_of
from workflows.notation import Call, Name
from workflows.options import resolve

TEACHER = Parent("model.new-000000000000")
METHODS = ("cross_entropy", "forward_kl", "squarehead")


def method(name: str) -> Any:
    return catalogue().method(f"distill.{name}").load()


def config_of(name: str, **options: Any) -> Any:
    teacher = {} if name == "cross_entropy" else {"teacher": TEACHER}
    return method(name).Config(**teacher, **options)


def terms_of(name: str, config: Any, student: Any, teacher: Any, batch: Any) -> Any:
    """The terms of a method on a batch, as the loop computes them."""
    return mixture_of(method(name), config).terms(student, Live(teacher), batch)


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
    batch = one_batch([[-100, 0]])
    return float(total(terms_of(name, config_of(name, **options), student, teacher, batch)))


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
    terms = terms_of("squarehead", config, student, teacher, one_batch([[-100, 0]]))
    assert set(terms) == {"cross_entropy", "kl"}


def test_squarehead_looks_at_prompts_but_not_at_padding() -> None:
    batch = one_batch([[-100, -100, 0, -100]])
    mask = torch.tensor([[1, 1, 1, 0]])
    batch.train = replace(batch.train, attention_mask=mask)
    target, logits = torch.ones(4, 2), torch.zeros(4, 3)
    state = target.clone()

    def distance() -> float:
        student, teacher = Table(logits, (target, state)), Table(logits, (target, target))
        return float(
            terms_of("squarehead", config_of("squarehead"), student, teacher, batch)["squarehead.1"].sum
        )

    state[3] = 100.0
    assert distance() == 0
    state[0] = 2.0
    assert distance() == 2


def test_three_weights_of_zero_are_refused_with_a_sentence() -> None:
    with pytest.raises(AssayError, match="all three weights are 0"):
        config_of("squarehead", cross_entropy=0.0, kl=0.0, squarehead=0.0)


def test_the_teacher_gets_no_gradient() -> None:
    logits, states = binary(0.25, 0.1).requires_grad_(), torch.ones(2, 1).requires_grad_()
    student = Table(binary(0.5, 0.9).requires_grad_(), (torch.ones(2, 1), torch.zeros(2, 1)))
    teacher = Table(logits, (states, states))
    total(
        terms_of("squarehead", config_of("squarehead"), student, teacher, one_batch([[-100, 0]]))
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
    config, teacher = config_of("forward_kl"), Table(binary(0.25, 0.1))
    value = total(terms_of("forward_kl", config, Table(logits), teacher, one_batch([[-100, -100]])))
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
            return terms_of(name, config_of(name), student, teacher, batch)

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


def test_a_teacher_is_refused_before_any_weight_is_loaded(tmp_path: Path) -> None:
    """The files of weights are empty: opening one would be another error."""
    student = model_folder(tmp_path / "student", ["a", "b"], 2, layers=1)
    deeper = model_folder(tmp_path / "deeper", ["a", "b"], 2, layers=2)
    foreign = model_folder(tmp_path / "foreign", ["a", "c"], 2)
    stage = make_stage(student, tmp_path / "first", config_of("forward_kl"), teacher=foreign)
    with pytest.raises(AssayError, match=r"different|first differ at id 1"):
        run(stage, method("forward_kl"))
    stage = make_stage(student, tmp_path / "second", config_of("squarehead"), teacher=deeper)
    with pytest.raises(AssayError, match="student has 1 layers and the teacher 2"):
        run(stage, method("squarehead"))


# --- terms and teachers on paper ----------------------------------------------------------------------------------


def mixed(*terms: Component, **options: Any) -> Any:
    teacher = {} if {"teacher", "ensemble", "recorded"} & options.keys() else {"teacher": TEACHER}
    return method("mix").Config(terms=terms, **teacher | options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ensemble": (TEACHER, TEACHER), "teacher": TEACHER}, "there is teacher= and ensemble="),
        ({"teacher": None}, "give one teacher: .* there is none of them"),
        ({"ensemble": (TEACHER,)}, "of two chains or more: with one alone write teacher=CHAIN"),
        ({"teacher": TEACHER, "ensemble_mean": "logits"}, "ensemble_mean is for an ensemble"),
    ],
)
def test_a_stage_has_one_teacher(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AssayError, match=sentence):
        method("forward_kl").Config(**options)


@pytest.mark.parametrize(
    ("terms", "options", "sentence"),
    [
        (("cross_entropy",), {}, r"no term asks a teacher \(cross_entropy\): leave out teacher"),
        (("forward_kl",), {"teacher": None}, "the term forward_kl needs a teacher: give teacher=CHAIN"),
        (
            ("cross_entropy", "squarehead"),
            {"ensemble": (TEACHER, TEACHER)},
            "squarehead needs hidden states, and several",
        ),
        (
            ("squarehead",),
            {"recorded": TEACHER},
            "squarehead looks at hidden states, and a record has logits alone",
        ),
        (("minilm",), {"recorded": TEACHER}, "minilm looks at attention, and a record has logits alone"),
        (
            ("uld", "cross_entropy"),
            {"recorded": TEACHER},
            "uld needs a teacher that answers while the student",
        ),
        (
            ("uld", "cross_entropy"),
            {"ensemble": (TEACHER, TEACHER)},
            "uld needs one model, and several models together",
        ),
        (("sampled_reverse_kl",), {}, "works only on text that the student wrote"),
        (("policy_gradient",), {}, "works only on text that the student wrote"),
        (("dist",), {"micro_batch": 4, "batch": 8}, "dist compares all rows of a batch with each other"),
    ],
)
def test_terms_are_compared_with_the_teacher_while_planning(
    terms: tuple[str, ...], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AssayError, match=sentence):
        mixed(*(of(name) for name in terms), **options)


def test_a_record_serves_no_position_but_those_of_answers() -> None:
    with pytest.raises(AssayError, match="a record has those that predict an answer token alone"):
        mixed(of("forward_kl", positions="all"), recorded=TEACHER)


def test_something_has_to_be_minimised() -> None:
    with pytest.raises(AssayError, match="the weights of all terms are 0"):
        mixed(of("forward_kl", weight=0.0))


def test_a_mixture_without_a_teacher_is_the_recovery_on_the_labels() -> None:
    assert mixed(of("cross_entropy"), teacher=None).teacher is None


def test_squarehead_is_refused_for_several_teachers_unless_its_weight_is_0() -> None:
    with pytest.raises(AssayError, match="squarehead needs hidden states, and several models"):
        method("squarehead").Config(ensemble=(TEACHER, TEACHER))
    method("squarehead").Config(ensemble=(TEACHER, TEACHER), squarehead=0.0)


def test_a_temperature_of_zero_is_a_sentence() -> None:
    found = catalogue().method("distill.forward_kl")
    call = Call("distill.forward_kl", (("teacher", Name("target")), ("temperature", 0.0)))
    with pytest.raises(
        AssayError, match=r"distill.forward_kl: temperature=0.0: input should be greater than 0"
    ):
        resolve(call, found, catalogue(), lambda _, name: Parent(name.text))


# --- whole stages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_stage_lowers_its_terms_and_leaves_the_teacher_alone(name: str, tmp_path: Path) -> None:
    student = make_parent(tmp_path / "student", dropout=0.0)
    teacher = trained(student, tmp_path / "teacher", "cross_entropy", steps=16)
    before = weights_of(teacher)
    parents = {} if name == "cross_entropy" else {"teacher": teacher}
    trained(student, tmp_path, name, steps=8, **parents)
    curve = curve_terms(tmp_path / "result" / "curve.csv")
    expected = {"cross_entropy": {"cross_entropy"}, "forward_kl": {"kl"}}
    assert set(curve) == expected.get(name, {"cross_entropy", "kl", "squarehead.1", "squarehead.2"})
    assert sum(values[-1] for values in curve.values()) < sum(values[0] for values in curve.values())
    assert same(before, weights_of(teacher))


def trained(student: Path, folder: Path, name: str, steps: int, **parents: Path) -> Path:
    """Run a stage on a whole small set; the folder of its model."""
    return trained_with(student, folder, name, config_of(name, **recipe(steps)), parents)


def recipe(steps: int) -> dict[str, Any]:
    adamw = Component("adamw", {"learning_rate": 1e-2})
    return {"steps": steps, "batch": 12, "data": "first", "optimizer": adamw, "log_every": 1}


def trained_with(student: Path, folder: Path, name: str, config: Any, parents: dict[str, Path]) -> Path:
    run(make_stage(student, folder, config, **parents), method(name))
    return folder / "result" / "model"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student, and what became of it on the rows: a teacher."""
    folder = tmp_path_factory.mktemp("pair")
    student = make_parent(folder / "student", dropout=0.0)
    return student, trained(student, folder / "teacher", "cross_entropy", steps=16)


def test_every_term_of_a_mixture_is_logged_without_its_weight(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    student, teacher = pair
    chosen = (
        of("forward_kl", weight=0.5, temperature=2.0),
        of("squarehead"),
        of("cross_entropy", weight=0.0),
        of("forward_kl"),
    )
    trained_with(student, tmp_path, "mix", mixed(*chosen, **recipe(3)), {"teacher": teacher})
    curve = curve_terms(tmp_path / "result" / "curve.csv")
    assert list(curve) == ["forward_kl", "squarehead.1", "squarehead.2", "cross_entropy", "forward_kl.2"]
    alone = tmp_path / "alone"
    config = mixed(of("forward_kl", weight=2.0), **recipe(3))
    trained_with(student, alone, "mix", config, {"teacher": teacher})
    first = curve_terms(alone / "result" / "curve.csv")["forward_kl"][0]
    assert curve["forward_kl.2"][0] == pytest.approx(first, rel=1e-6)


def test_a_recipe_and_a_mixture_of_its_terms_are_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = pair
    config = config_of("forward_kl", alpha=0.25, temperature=2.0, **recipe(4))
    one = trained_with(student, tmp_path / "one", "forward_kl", config, {"teacher": teacher})
    chosen = (of("forward_kl", weight=0.25, temperature=2.0), of("cross_entropy", weight=0.75))
    other = trained_with(
        student, tmp_path / "other", "mix", mixed(*chosen, **recipe(4)), {"teacher": teacher}
    )
    assert same(weights_of(one), weights_of(other))


def test_blocks_of_tokens_leave_the_result_as_it_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = pair
    found = []
    for block_tokens in (None, 3):
        config = config_of("forward_kl", block_tokens=block_tokens, **recipe(3))
        folder = tmp_path / str(block_tokens)
        found.append(weights_of(trained_with(student, folder, "forward_kl", config, {"teacher": teacher})))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-3, atol=1e-4)


def test_several_teachers_that_are_one_teach_as_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = pair
    config = mixed(of("forward_kl"), ensemble=(TEACHER, TEACHER), **recipe(3))
    both = {"ensemble.1": teacher, "ensemble.2": teacher}
    one = weights_of(trained_with(student, tmp_path / "one", "mix", config, both))
    config = mixed(of("forward_kl"), **recipe(3))
    other = weights_of(trained_with(student, tmp_path / "other", "mix", config, {"teacher": teacher}))
    for name, weight in other.items():
        torch.testing.assert_close(one[name], weight, rtol=1e-3, atol=1e-4)


def test_the_teacher_stays_in_evaluation_mode_and_out_of_the_student(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    usual = Mixture.terms

    def watched(self: Mixture, student: Any, source: Any, batch: Any) -> Any:
        inside = {id(module) for module in student.modules()}
        seen.append((student.training, source.model.training, id(source.model) in inside))
        return usual(self, student, source, batch)

    monkeypatch.setattr(Mixture, "terms", watched)
    student, teacher = pair
    probed = recipe(3) | {"probe": ("rows=first",), "probe_every": 1}
    written = trained_with(student, tmp_path, "mix", mixed(of("forward_kl"), **probed), {"teacher": teacher})
    assert set(seen) == {(True, False, False)}
    assert weights_of(written).keys() == weights_of(student).keys()
    assert not list(written.parent.rglob("teacher*"))


def test_the_teachers_precision_is_its_own_and_in_the_notes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = pair
    for chosen, expected in (("auto", "float32"), ("bfloat16", "bfloat16")):
        config = mixed(of("forward_kl"), teacher_precision=chosen, **recipe(1))
        stage = make_stage(student, tmp_path / chosen, config, teacher=teacher)
        run(stage, method("mix"))
        assert stage.notes["teacher_dtype"] == expected
        assert stage.notes["compute_dtype"] == "float32"


def test_across_tokenizers_the_batch_has_the_rows_in_the_teachers_tokens(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _ = pair
    teacher = reworded(student, tmp_path / "teacher")
    with pytest.raises(AssayError, match=r"with another one the term uld\(\)"):
        check_teacher(student, teacher)
    batches = []
    usual = Mixture.terms

    def watched(self: Mixture, model: Any, source: Any, batch: Any) -> Any:
        batches.append(batch)
        return usual(self, model, source, batch)

    monkeypatch.setattr(Mixture, "terms", watched)
    config = mixed(of("cross_entropy"), of("uld"), **recipe(2) | {"batch": 5})
    trained_with(student, tmp_path, "mix", config, {"teacher": teacher})
    ours, theirs = (load_tokenizer(folder) for folder in (student, teacher))
    for batch in batches:
        for row in range(5):
            texts = [
                tokenizer.decode(part.input_ids[row][part.labels[row] != -100], skip_special_tokens=True)
                for tokenizer, part in ((ours, batch.train), (theirs, batch.teacher))
            ]
            assert texts[0] == texts[1]
        padding = batch.teacher.input_ids[batch.teacher.attention_mask == 0]
        assert (padding == theirs.pad_token_id).all()


def reworded(student: Path, folder: Path) -> Path:
    """A random model of the student's shape with a smaller vocabulary of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(["a short text"], 264, list(specials.values())), **specials
    )
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Style().write(folder)
    return folder


def curve_terms(path: Path) -> dict[str, list[float]]:
    """The terms of the loss along a learning curve."""
    found: dict[str, list[float]] = {}
    for line in path.read_text().splitlines()[1:]:
        _, term, value = line.split(",")
        if term not in ("learning_rate", "gradient_norm"):
            found.setdefault(term, []).append(float(value))
    return found


def test_a_method_with_a_loss_of_its_own_gets_both_models_cut_to_one_vocabulary(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    student, teacher = pair

    def loss(config: Any, model: Any, taught_by: Any, batch: Any) -> Any:
        part = batch.train
        with torch.no_grad():
            wanted = taught_by(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
        found = model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
        values = kl_divergence(wanted, found)[:, :-1][part.mask]
        return {"own": Term(values.sum(), part.tokens)}

    config = config_of("forward_kl", **recipe(3))
    run(make_stage(student, tmp_path, config, teacher=teacher), SimpleNamespace(loss=loss))
    own = curve_terms(tmp_path / "result" / "curve.csv")["own"]
    other = tmp_path / "other"
    trained_with(student, other, "forward_kl", config, {"teacher": teacher})
    assert own == pytest.approx(curve_terms(other / "result" / "curve.csv")["kl"], rel=1e-4)


def test_a_term_on_whole_batches_is_refused_for_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    student = model_folder(tmp_path / "student", ["a", "b"], 2)
    stage = make_stage(student, tmp_path, mixed(of("dist")), teacher=student)
    with pytest.raises(AssayError, match="so one process has to see them all"):
        run(stage, method("mix"))


def test_numbers_of_terms_and_of_their_method_change_together() -> None:
    def adaptive(name: str, factor: float) -> Adaptive:
        return Adaptive({name: 1.0}, lambda values, means: {name: values[name] * factor * means["m"]})

    both = together(adaptive("one", 2.0), adaptive("other", 3.0))
    assert both is not None
    assert both.start == {"one": 1.0, "other": 1.0}
    assert both.after({"one": 5.0, "other": 7.0, "step": 0.0}, {"m": 1.0}) == {"one": 10.0, "other": 21.0}
    assert together(None, None) is None


def test_each_of_two_terms_of_a_kind_has_its_own_numbers() -> None:
    numbers = Mixture([of("taid", t_start=0.2), of("taid", t_start=0.4)]).adaptive(10)
    assert numbers is not None
    assert (numbers.start["taid.t"], numbers.start["taid.2.t"]) == (0.2, 0.4)
    means = {"taid": 1.0, "taid.2": 2.0}
    after = numbers.after({**numbers.after({**numbers.start, "step": 4.0}, means), "step": 5.0}, means)
    assert after.keys() == numbers.start.keys()
    assert after["taid.2.t"] > after["taid.t"] > 0.2
    assert (after["taid.previous"], after["taid.2.previous"]) == (1.0, 2.0)
