"""MatryoshkaKV and LinguDistill: what is done to keys and values."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from methods.checkpoint import load_model
from methods.data import Part
from methods.distill import matryoshka_kv
from methods.distill._projections import Projections, Truncation, cayley, narrowed, principal, read
from methods.distill._shared_keys import Kept, SharedKeys, refuse_unshareable
from methods.distill.lingu_distill import marks_of
from methods.find import catalogue
from methods.stage import AssayError, Interrupted
from methods.term import Tokens, selective
from methods.term._attention import Attended, attending, recorded
from methods.terms import kl_divergence
from tests import generic
from tests.small_models import llama, ragged
from tests.test_sparse_distillation import stop_at
from workflows.notation import Call, Name


def padded() -> Part:
    """Four sequences of unequal lengths, padded on the right."""
    rows = [row[0] for row in ragged()]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return Part(ids, mask, ids.masked_fill(mask == 0, -100), "train")


def logits(model: Any, part: Part) -> torch.Tensor:
    """Logits at the positions that are no padding [n,V]."""
    with torch.no_grad():
        found = model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
    return found[part.attention_mask.bool()]


def turned(model: Any, part: Part) -> Projections:
    """Projections that have been trained a little."""
    found = principal(model, [part])
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    return found


# --- MatryoshkaKV -----------------------------------------------------------------------------------------------


def test_cayley_of_two_dimensions_is_a_rotation_by_hand() -> None:
    # A = [[0, 1], [-1, 0]]: (I - A/2)^-1 (I + A/2) = [[3, 4], [-4, 3]] / 5
    free = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(cayley(free), torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64))


def test_bases_stay_orthogonal_whatever_is_learnt() -> None:
    model, part = llama(), padded()
    projections = turned(model, part)
    for layer in range(3):
        for basis in (projections.key_basis(layer), projections.value_basis(layer)):
            assert torch.allclose(basis.mT @ basis, torch.eye(4).expand(2, 4, 4), atol=1e-5)


def test_the_start_is_the_principal_components_of_keys_and_values() -> None:
    """The projection on the first coordinates is the best of its rank: it leaves the smallest eigenvalues."""
    model, part = llama(), padded()
    projections = principal(model, [part])
    with torch.no_grad(), recorded(model) as found:
        model(input_ids=part.input_ids, attention_mask=part.attention_mask)
    attended: Any = found[1]
    keys = attended.key[:, 0][part.attention_mask.bool()].double()
    centred = keys - keys.mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred / len(keys))
    basis = projections.key_basis(1)[0, :, :2].detach().double()
    rest = centred - centred @ basis @ basis.T
    assert float(rest.square().sum() / len(keys)) == pytest.approx(float(values[:2].sum()), rel=1e-4)
    mean = attended.value[:, 1][part.attention_mask.bool()].mean(0)
    assert torch.allclose(projections.value_mean[1, 1], mean, atol=1e-5)


def test_a_kept_rank_drops_the_last_coordinates_by_hand() -> None:
    """One head of size 2 with the identity as its basis: of rank 1 the second coordinate becomes the mean's."""
    identity = torch.eye(2).expand(1, 1, 2, 2).contiguous()
    projections = Projections(identity, identity.clone(), torch.tensor([[[10.0, 20.0]]]))
    states = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    one = torch.tensor([1])
    found = projections.shortened(0, Attended(states, states, states, 1.0), one, one)
    assert found.key.tolist() == [[[[1.0, 0.0], [3.0, 0.0]]]]
    assert found.value.tolist() == [[[[1.0, 20.0], [3.0, 20.0]]]]


def test_all_ranks_leave_the_model_as_it_is() -> None:
    model, part = llama(), padded()
    truncation = Truncation(model, turned(model, part), [4], 4, seed=0)
    before = logits(model, part)
    with truncation.hiding(0):
        assert torch.allclose(logits(model, part), before, atol=1e-4)
    assert torch.equal(logits(model, part), before)


def test_ranks_are_drawn_for_each_layer_and_head_from_seed_and_step_alone() -> None:
    model, part = llama(), padded()
    projections = principal(model, [part])
    truncation = Truncation(model, projections, [1, 2, 3, 4], 2, seed=0)
    drawn = torch.stack([truncation.draw(step) for step in range(200)])
    assert drawn.shape == (200, 3, 2, 2)
    assert torch.equal(drawn[7], Truncation(model, projections, [1, 2, 3, 4], 2, seed=0).draw(7))
    assert not torch.equal(drawn[7], Truncation(model, projections, [1, 2, 3, 4], 2, seed=1).draw(7))
    for place in drawn.flatten(1).T:
        shares = torch.bincount(place, minlength=5)[1:] / 200
        assert float(shares.min()) > 0.12
    # Keys and values, heads, and layers: any two of them have the same rank in a quarter of the steps.
    for axis in (1, 2, 3):
        same = drawn.select(axis, 0) == drawn.select(axis, 1)
        assert float(same.float().mean()) == pytest.approx(0.25, abs=0.05), axis


def test_training_draws_ranks_and_evaluation_has_the_stated_one() -> None:
    model, part = llama(attention_dropout=0.0), padded()
    truncation = Truncation(model, principal(model, [part]), [1, 4], 2, seed=0)
    with truncation.hiding(3):
        stated = logits(model, part)
        model.train()
        drawn = logits(model, part)
        model.eval()
    assert not torch.allclose(stated, drawn)
    assert truncation.numbers().keys() == {"key_share", "value_share"}
    with truncation.hiding(4):
        assert torch.equal(logits(model, part), stated)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_written_model_attends_as_the_trained_one(attention: str) -> None:
    model, part = llama(attn_implementation=attention), padded()
    projections = turned(model, part)
    truncation = Truncation(model, projections, [4], 2, seed=0)
    with truncation.hiding(0):
        expected = logits(model, part)
    assert not torch.allclose(expected, logits(model, part), atol=0.1)
    found = narrowed(model, projections, 2)
    found.set_attn_implementation(attention)
    assert torch.allclose(logits(found, part), expected, atol=1e-4)


def test_the_written_model_keeps_half_a_cache_and_writes_the_same_with_and_without_it(tmp_path: Path) -> None:
    model, part = llama(), padded()
    narrowed(model, turned(model, part), 2).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    prompt = part.input_ids[:1, :5]
    with torch.no_grad():
        cache = loaded(input_ids=prompt, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (1, 2, 5, 2)
    assert cache.layers[0].values.shape == (1, 2, 5, 2)
    texts = [
        loaded.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    ]
    assert torch.equal(*texts)


def test_a_mean_of_the_keys_would_change_nothing() -> None:
    """It adds one number to every score of a query."""
    model, part = llama(), padded()
    shift = torch.randn(2, 1, 4)
    before = logits(model, part)
    with attending(model, lambda _, attended: replace(attended, key=attended.key + shift)):
        assert torch.allclose(logits(model, part), before, atol=1e-4)


def test_a_model_without_attention_in_a_layer_is_refused() -> None:
    from methods.architectures.pruned_llama import PrunedLlamaConfig, PrunedLlamaForCausalLM

    whole = llama().config.to_dict()
    for name in ("model_type", "architectures"):
        whole.pop(name)
    config = PrunedLlamaConfig(**whole, layer_num_heads=[[4, 2], [0, 0], [4, 2]])
    with pytest.raises(AssayError, match="layer 1 of the model has no attention"):
        principal(PrunedLlamaForCausalLM(config), [padded()])


def stage(**options: Any) -> generic.Outcome:
    usual: dict[str, Any] = {"batch": 18, "calibration": 18, "ranks": (0.5,), "keep": 0.5}
    return generic.run("distill.matryoshka_kv", **usual | options)


def rates(learning_rate: float) -> Call:
    return Call("adamw", (("learning_rate", learning_rate),))


def divergence(folder: Path) -> float:
    """Nats per position between the whole model and one with projections."""
    part = generic.part_of(folder, generic.DATA)
    with torch.no_grad():
        wanted, found = (
            load_model(each, device="cpu")(
                input_ids=part.input_ids, attention_mask=part.attention_mask
            ).logits
            for each in (generic.world().parents["whole"], folder)
        )
    return float(kl_divergence(wanted, found).mean())


def test_training_makes_the_kept_coordinates_worth_more_than_principal_components() -> None:
    shared: dict[str, Any] = {"teacher": Name("whole"), "kl": 1.0, "cross_entropy": 0.0, "check": False}
    start = stage(steps=1, optimizer=rates(1e-9), **shared)
    trained = stage(steps=15, optimizer=rates(0.03), **shared)
    assert divergence(trained.folder / "model") < 0.8 * divergence(start.folder / "model")


def test_the_written_model_has_its_parents_weights_and_a_narrower_cache() -> None:
    outcome = stage(steps=3)
    before = generic.tensors(generic.world().parents["whole"])
    assert all(torch.equal(outcome.weights[name], weight) for name, weight in before.items())
    model = load_model(outcome.folder / "model", device="cpu")
    assert model.config.model_type == "projected_llama"
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    width = model.config.head_dim
    assert cache.layers[0].keys.shape[-1] == width // 2
    assert outcome.notes["kv_cache_share"] == 0.5
    bases = read(outcome.folder / "model")
    assert torch.equal(bases.key_basis(0)[..., : width // 2], model.model.layers[0].self_attn.key_basis)


def test_zeros_of_a_pruned_parent_stay_and_kept_steps_are_narrow_too() -> None:
    outcome = stage(steps=3, parent="sparse", checkpoints=(2,))
    before = generic.tensors(generic.world().parents["sparse"])
    assert all(torch.equal(outcome.weights[name], weight) for name, weight in before.items())
    kept = load_model(outcome.folder / "model@2", device="cpu")
    assert kept.config.model_type == "projected_llama"
    assert not torch.equal(
        kept.model.layers[0].self_attn.value_mean,
        load_model(outcome.folder / "model", device="cpu").model.layers[0].self_attn.value_mean,
    )


@pytest.mark.parametrize("name", ["distill.matryoshka_kv", "distill.lingu_distill"])
def test_a_stopped_run_goes_on_where_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"steps": 6, "check": False}
    whole = generic.run(name, **options)
    stop_at(4, monkeypatch)
    with pytest.raises(Interrupted):
        generic.run(name, **options)
    (generic.world().fresh() / "result").rmdir()
    again = generic.run(name, **options)
    assert again.notes["resumed_from_step"] == 4
    assert again.same_weights(whole)
    assert again.curve == whole.curve


@pytest.mark.parametrize("name", ["distill.matryoshka_kv", "distill.lingu_distill"])
def test_activations_that_are_computed_twice_attend_the_same(name: str) -> None:
    """What shortens or keeps keys and values is at work in the backward pass, too."""
    options: dict[str, Any] = {"steps": 3, "check": False}
    plain = generic.run(name, **options)
    again = generic.run(name, gradient_checkpointing=True, **options)
    assert again.same_weights(plain, tolerance=1e-6)


def test_what_matryoshka_kv_cannot_do_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    for options, sentence in (
        ({"cross_entropy": 0.0, "kl": 0.0}, "both 0"),
        ({"ranks": ()}, "ranks is empty"),
        ({"adapter": Call("lora")}, "leave out the adapter"),
        ({"keep_zeros": False}, "leave out keep_zeros"),
    ):
        with pytest.raises(AssayError, match=sentence):
            generic.resolved(
                catalogue().method("distill.matryoshka_kv"), {"teacher": Name("other"), **options}
            )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    asked: Any = SimpleNamespace(parents={"model": tmp_path})
    with pytest.raises(AssayError, match="this one is of type gpt2"):
        matryoshka_kv.run(asked)


# --- LinguDistill -----------------------------------------------------------------------------------------------


def shared(student: Any, teacher: Any, part: Part) -> torch.Tensor:
    """The teacher's logits at the positions that are no padding, behind the student's keys and values."""
    kept = Kept(student)
    source = SharedKeys(teacher, None, kept)
    with kept.hiding(0):
        logits(student, part)
        look = source.look(part)
        return look.logits()[part.attention_mask.bool()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_a_teacher_that_shares_with_itself_says_what_it_says_alone(heads: int, attention: str) -> None:
    """With padding, and with keys that one or several queries share."""
    model = llama(num_key_value_heads=heads, attn_implementation=attention)
    other, part = llama(num_key_value_heads=heads, attn_implementation=attention), padded()
    assert torch.allclose(shared(other, model, part), logits(model, part), atol=1e-5)


def test_a_student_with_other_weights_changes_what_the_teacher_says() -> None:
    teacher, student, part = llama(), llama(), padded()
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    alone = logits(teacher, part)
    found = shared(student, teacher, part)
    assert not torch.allclose(found, alone, atol=1e-2)
    assert not torch.allclose(found, logits(student, part), atol=1e-2)
    assert torch.equal(logits(teacher, part), alone)


def test_only_the_keys_and_values_are_the_students() -> None:
    """Other queries, feed-forward layers and heads of the student leave a one-layer teacher as it is."""
    teacher, student = llama(num_hidden_layers=1), llama(num_hidden_layers=1)
    part = padded()
    with torch.no_grad():
        student.model.layers[0].self_attn.q_proj.weight.zero_()
        student.model.layers[0].mlp.up_proj.weight.zero_()
        student.lm_head.weight.zero_()
    assert torch.allclose(shared(student, teacher, part), logits(teacher, part), atol=1e-5)
    with torch.no_grad():
        student.model.layers[0].self_attn.v_proj.weight.zero_()
    assert not torch.allclose(shared(student, teacher, part), logits(teacher, part), atol=1e-2)


def test_shared_keys_get_no_gradient_and_are_forgotten_after_a_step() -> None:
    teacher, student, part = llama(), llama(), padded()
    kept = Kept(student)
    with kept.hiding(0):
        student(input_ids=part.input_ids, attention_mask=part.attention_mask)
        assert all(each is not None and not each.key.requires_grad for each in kept.layers)
    assert kept.layers == []
    with pytest.raises(AssayError, match="no keys and values to share"):
        SharedKeys(teacher, None, kept).look(part)


def folder_with(folder: Path, **changes: Any) -> Path:
    shape = {
        "model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 32, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 3}, "number of layers is 3 and the student's 4"),
        ({"num_key_value_heads": 4}, "number of key-value heads is 4 and the student's 2"),
        ({"head_dim": 16}, "head size is 16 and the student's 8"),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rotary embedding is rope_theta=500000.0, rope_type=default and the student's rope_theta=10000.0",
        ),
        ({"key_rank": 4, "value_rank": 4}, "the teacher keeps its keys and values in bases of its own"),
    ],
)
def test_a_teacher_of_another_shape_is_refused_from_its_configuration(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    student, teacher = folder_with(tmp_path / "student"), folder_with(tmp_path / "teacher", **changes)
    with pytest.raises(AssayError, match=sentence):
        refuse_unshareable(student, teacher)


def test_older_and_newer_ways_to_write_the_rotary_embedding_are_one(tmp_path: Path) -> None:
    old = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}
    refuse_unshareable(folder_with(tmp_path / "student"), folder_with(tmp_path / "teacher", **old))
    scaled = {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": None,
    }
    new = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}}
    refuse_unshareable(folder_with(tmp_path / "a", **scaled), folder_with(tmp_path / "b", **new))


def test_a_row_is_distilled_or_trained_on_its_labels_by_hand() -> None:
    """Teacher 1/4, student 1/2 on the first of two words: KL on marked tokens, log 2 on the others."""
    both = torch.tensor([[0.5, 0.5]] * 2, dtype=torch.float64).log()
    wanted = torch.tensor([[0.25, 0.75]] * 2, dtype=torch.float64).log()
    tokens = Tokens(both, torch.tensor([0, 1]), wanted, extra={selective.MARK: torch.tensor([1.0, 0.0])})
    found = selective.token_losses(selective.Config(kl=2.0, cross_entropy=3.0), tokens)
    kl = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    assert found["loss"].tolist() == pytest.approx([2 * kl, 3 * log(2)])
    assert found["forward_kl"].tolist() == pytest.approx([kl, 0.0])
    assert found["cross_entropy"].tolist() == pytest.approx([0.0, log(2)])
    unmarked = selective.token_losses(selective.Config(), replace(tokens, extra={}))
    assert unmarked["loss"].tolist() == pytest.approx([kl, kl])
    # softened by 2 the teacher has 1 : sqrt(3), and the divergence counts four times
    p = 1 / (1 + 3**0.5)
    softened = selective.token_losses(selective.Config(temperature=2.0), replace(tokens, extra={}))
    kl = p * log(2 * p) + (1 - p) * log(2 * (1 - p))
    assert softened["loss"].tolist() == pytest.approx([4 * kl, 4 * kl])
    assert softened["forward_kl"].tolist() == pytest.approx([kl, kl])


def test_marked_rows_are_distilled_and_the_others_keep_their_task() -> None:
    marked: dict[str, Any] = {"data": "marked/train", "distilled": "language", "check": False}
    outcome = generic.run("distill.lingu_distill", **marked)
    assert outcome.curve.keys() == {"selective", "selective.forward_kl", "selective.cross_entropy"}
    sums = zip(*(outcome.curve[f"selective.{name}"] for name in ("forward_kl", "cross_entropy")), strict=True)
    assert outcome.curve["selective"] == pytest.approx([one + other for one, other in sums])


def test_a_column_that_marks_no_rows_is_refused() -> None:
    rows = [{"question": "a", "answer": "b", "language": True}, {"question": "a", "answer": "b"}]
    assert marks_of(rows[:1], "language") == [True]
    with pytest.raises(AssayError, match="row 1 of the data needs true or false in the column 'language'"):
        marks_of(rows, "language")
    with pytest.raises(AssayError, match="text is cut into windows across them"):
        marks_of([{"text": "a", "language": True}], "language")
    with pytest.raises(AssayError, match="row 0 of the data needs true or false"):
        generic.run("distill.lingu_distill", distilled="language")
    with pytest.raises(AssayError, match="kl is 0"):
        generic.resolved(catalogue().method("distill.lingu_distill"), {"teacher": Name("other"), "kl": 0.0})
