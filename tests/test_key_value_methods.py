"""MatryoshkaKV and LinguDistill: what is done to keys and values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.checkpoint import load_model
from methods.data import Part
from methods.distill._projections import Projections, Truncation, cayley, narrowed, principal
from methods.stage import AssayError
from methods.term._attention import Attended, attending, recorded
from tests.small_models import llama, ragged


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
    assert float((drawn[:, :, 0] == drawn[:, :, 1]).float().mean()) == pytest.approx(0.25, abs=0.05)


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
