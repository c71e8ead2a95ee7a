"""SparseGPT and what local pruners share: sums of inputs, factors, budgets by column blocks, and the resumed walk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.progress import Progress
from methods.prune import magnitude, sparsegpt
from methods.prune._hessian import Gram, block_grams, sharing
from methods.prune._obs import (
    Budget,
    Pattern,
    budget,
    column_blocks,
    damped,
    dead_columns,
    inverse_factor,
    lowest,
    solve,
)
from methods.prune._shares import spread
from methods.prune._walk import Block, decoder_names, linear_weights, prune_blocks, walk
from methods.stage import AssayError, Interrupted
from tests.small_models import llama, ragged


def layer(rows: int = 12, columns: int = 20, seed: int = 0, mixing: float = 0.5) -> tuple[Tensor, Tensor]:
    """A weight [out,in] and correlated inputs [tokens,in]."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.eye(columns) + mixing * torch.randn(columns, columns, generator=draw)
    return torch.randn(rows, columns, generator=draw), torch.randn(90, columns, generator=draw) @ mixed


def block_of(weight: Tensor, inputs: Tensor) -> Block:
    """A decoder block that is one linear layer, on three sequences of different lengths."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    sequences = [part[None] for part in inputs.split([50, 1, len(inputs) - 51])]
    return Block(2, "block", nn.Sequential(linear), sequences, [{}] * 3)


def pruned(weight: Tensor, inputs: Tensor, **options: Any) -> Tensor:
    """The layer as ``prune.sparsegpt`` leaves it."""
    block = block_of(weight, inputs)
    with torch.no_grad():
        sparsegpt.prune_block(sparsegpt.Config(data="case", **options), block)
    return block.linears()["0"].weight.detach()


def given(sequences: list[Tensor]) -> Any:
    """Stands for the family's calibration."""
    return SimpleNamespace(sequences=lambda *_: sequences)


def output_error(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - other).T).square().sum())


# --- sums of inputs -----------------------------------------------------------------------------------------


def test_the_hessian_is_twice_the_sum_of_squares_per_sequence() -> None:
    gram = Gram()
    gram.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    gram.add(torch.tensor([[0.0, 1.0]]))
    assert gram.gram.tolist() == [[10.0, 2.0], [2.0, 5.0]]
    assert gram.hessian().tolist() == [[10.0, 2.0], [2.0, 5.0]]
    assert (gram.tokens, gram.sequences) == (3, 2)


def test_sums_are_kept_in_float32_or_in_float64() -> None:
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        gram = Gram()
        gram.add(torch.ones(3, 2, dtype=dtype))
        assert gram.gram.dtype == kept


def test_nothing_added_is_a_sentence() -> None:
    with pytest.raises(AssayError, match="no calibration inputs"):
        Gram().hessian()


def test_layers_that_share_their_inputs_share_one_sum() -> None:
    block = next(walk(llama(), ragged()))
    with torch.no_grad():
        grams = block_grams(block)
    groups = [names for _, names in sharing(grams)]
    attention = [f"self_attn.{part}_proj" for part in "qkv"]
    assert groups == [attention, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    assert {(gram.tokens, gram.sequences) for gram in grams.values()} == {(35, 4)}


def test_ragged_sequences_count_token_by_token() -> None:
    block = next(walk(llama(), ragged()))
    seen: list[Tensor] = []
    block.run_watched(lambda name, x: seen.append(x) if name == "mlp.down_proj" else None)
    with torch.no_grad():
        found = block_grams(block, ["mlp.down_proj"])["mlp.down_proj"].gram
    inputs = torch.cat(seen).detach()
    assert len(inputs) == 35
    torch.testing.assert_close(found, inputs.T @ inputs)


class Routed(nn.Module):
    """Two experts of which one gets all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.used(hidden)
        return found


def test_a_layer_that_no_token_reaches_is_a_sentence() -> None:
    block = Block(0, "block", Routed(), [torch.ones(1, 3, 4)], [{}])
    assert block_grams(block, ["used"])["used"].tokens == 3
    with pytest.raises(AssayError, match="block 0: idle saw none of the calibration tokens"):
        block_grams(block)


# --- factors ------------------------------------------------------------------------------------------------


def test_the_factor_is_that_of_the_inverse() -> None:
    _, inputs = layer()
    hessian = inputs.T @ inputs
    factor = inverse_factor(hessian, 0.01)
    assert torch.equal(factor, factor.triu()) and bool((factor.diagonal() > 0).all())
    identity = factor.T @ factor @ damped(hessian, 0.01)
    torch.testing.assert_close(identity, torch.eye(20), atol=1e-4, rtol=0)


def test_damping_counts_a_dead_input_as_one() -> None:
    hessian = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert dead_columns(hessian).tolist() == [False, True]
    assert damped(hessian, 0.5).tolist() == [[4.0, 0.0], [0.0, 2.0]]
    assert hessian.tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_what_float32_cannot_factor_is_tried_in_float64() -> None:
    # 1 + 1e-9 is 1 in float32, and the matrix singular.
    factor = inverse_factor(torch.ones(2, 2), 1e-9)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor[1, 1], torch.tensor(1.0))
    torch.testing.assert_close(factor[0], torch.tensor([22360.68, -22360.68]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("hessian", "words"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], "not positive definite"),
        ([[1.0, torch.nan], [torch.nan, 1.0]], "not finite"),
    ],
)
def test_a_hessian_that_cannot_be_factored_is_a_sentence(hessian: list[list[float]], words: str) -> None:
    with pytest.raises(AssayError, match=words):
        inverse_factor(torch.tensor(hessian), 0.01)


# --- budgets ------------------------------------------------------------------------------------------------


def test_a_total_is_spread_in_proportion_and_met_exactly() -> None:
    assert spread(10, [8, 8, 4], [0, 0, 0]) == [4, 4, 2]
    assert spread(11, [8, 8, 4], [0, 0, 0]) == [5, 4, 2]
    # The last part has 4 in any case: the others share 6 in proportion.
    assert spread(10, [8, 8, 4], [0, 0, 4]) == [3, 3, 4]
    assert spread(20, [8, 8, 4], [0, 0, 0]) == [8, 8, 4]
    assert spread(4, [8, 8, 4], [0, 0, 4]) == [0, 0, 4]


def test_spreading_keeps_to_its_bounds() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(1, 9, (5,), generator=draw)
        least = (torch.rand(5, generator=draw) ** 3 * (sizes + 1)).long()
        total = int(torch.randint(int(least.sum()), int(sizes.sum()) + 1, (1,), generator=draw))
        counts = torch.tensor(spread(total, sizes.tolist(), least.tolist()))
        assert int(counts.sum()) == total
        assert bool((counts >= least).all() and (counts <= sizes).all())


def test_the_three_thresholds_by_hand() -> None:
    # 3 rows, blocks of 4, 4 and 2 columns: 12, 12 and 6 weights, 3.6, 3.6 and 1.8 of them; 9 in all.
    free = torch.zeros(3, 10, dtype=torch.bool)
    counts = {name: budget(name, 0.3, 9, free, 4, "it").counts for name in ("exact", "block", "official")}
    assert counts == {"exact": (4, 3, 2), "block": (4, 4, 2), "official": (4, 4, 2)}
    free[:, 9] = True
    assert budget("exact", 0.3, 9, free, 4, "it").counts == (3, 3, 3)
    assert budget("block", 0.3, 9, free, 4, "it").counts == (4, 4, 3)


def test_the_lowest_are_exact_among_equals_or_take_all_of_them() -> None:
    scores = torch.tensor([[1.0, 1.0, 2.0], [1.0, 0.0, 1.0]])
    assert lowest(scores, 3).tolist() == [[True, True, False], [False, True, False]]
    assert lowest(scores, 3, ties=True).tolist() == [[True, True, False], [True, True, True]]
    assert not bool(lowest(scores, 0).any()) and bool(lowest(scores, 6).all())


# --- the solver ---------------------------------------------------------------------------------------------


def test_the_weight_that_stays_makes_up_for_the_other() -> None:
    # H = [[2,1],[1,2]]: scores 1 / (2/3) and 4 / (1/2); without the first weight the best second one is 2 + 1/2 * 1.
    factor = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 0.0)
    found, removed = solve(torch.tensor([[1.0, 2.0]]), factor, [Budget((1,))])
    torch.testing.assert_close(found, torch.tensor([[[0.0, 2.5]]]))
    assert removed.tolist() == [[[True, False]]]


def column_loop(weight: Tensor, factor: Tensor, counts: tuple[int, ...], block: int) -> Tensor:
    """The published algorithm as the paper writes it, one column and one rank-1 update at a time."""
    weight = weight.clone()
    for (start, end), count in zip(column_blocks(weight.shape[1], block), counts, strict=True):
        scores = weight[:, start:end].square() / factor.diagonal()[start:end].square()
        removed = scores <= scores.flatten().sort().values[count - 1]
        for at in range(start, end):
            error = torch.where(removed[:, at - start], weight[:, at], 0.0) / factor[at, at]
            weight[:, at:] -= error[:, None] * factor[at, at:]
            weight[removed[:, at - start], at] = 0.0
    return weight


@pytest.mark.parametrize("block", [4, 40, 128])
def test_the_solver_does_what_the_plain_column_loop_does(block: int) -> None:
    weight, inputs = layer(24, 90)
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    blocks = column_blocks(90, block)
    counts = tuple((end - start) * 24 // 2 for start, end in blocks)
    found, removed = solve(weight, factor, [Budget(counts)], block)
    expected = column_loop(weight.double(), factor.double(), counts, block)
    assert torch.equal(removed[0], expected == 0)
    torch.testing.assert_close(found[0].double(), expected, atol=1e-4, rtol=0)


def test_several_budgets_side_by_side_are_what_each_is_by_itself() -> None:
    weight, inputs = layer(24, 90)
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    free = torch.zeros_like(weight, dtype=torch.bool)
    budgets = [budget("block", share, 0, free, 32, "it") for share in (0.0, 0.3, 0.5, 0.9, 1.0)]
    together, removed = solve(weight, factor, budgets, 32)
    for one, level, mask in zip(budgets, together, removed, strict=True):
        alone, its_mask = solve(weight, factor, [one], 32)
        assert torch.equal(mask, its_mask[0])
        torch.testing.assert_close(level, alone[0], atol=1e-5, rtol=0)
    assert torch.equal(together[0], weight) and not bool(together[-1].any())


def test_a_pattern_holds_in_every_group_and_mixes_with_others_of_its_size() -> None:
    weight, inputs = layer(12, 24)
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    found, _ = solve(weight, factor, [Pattern(1, 8), Pattern(5, 8)], 16)
    zeros = (found == 0).unflatten(2, (-1, 8)).sum(dim=3)
    assert set(zeros[0].flatten().tolist()) == {1} and set(zeros[1].flatten().tolist()) == {5}


def test_outputs_change_less_than_by_magnitude() -> None:
    for seed in range(5):
        weight, inputs = layer(24, 40, seed, mixing=0.1)
        mask = magnitude.mask(magnitude.Config(sparsity=0.5), weight)
        plain = output_error(weight, weight.masked_fill(mask, 0.0), inputs)
        # A block as wide as the layer chooses all that goes before anything has been made up for.
        narrow, wide = (
            output_error(weight, pruned(weight, inputs, sparsity=0.5, block=block), inputs) / plain
            for block in (8, 128)
        )
        assert narrow < 0.9 * wide and wide < 1


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.51, 0.9])
@pytest.mark.parametrize("block", [3, 7, 128])
def test_the_budget_is_exact_however_many_blocks_of_columns_there_are(sparsity: float, block: int) -> None:
    found = pruned(*layer(11, 20), sparsity=sparsity, block=block)
    assert int((found == 0).sum()) == round(220 * sparsity)


def test_the_official_threshold_removes_one_more_in_every_block() -> None:
    weight, inputs = layer(12, 20)
    for block, zeros in ((128, 121), (10, 122), (5, 124)):
        found = pruned(weight, inputs, sparsity=0.5, block=block, threshold="official")
        assert int((found == 0).sum()) == zeros
    assert int((pruned(weight, inputs, sparsity=0.51, block=5, threshold="block") == 0).sum()) == 4 * 31


# --- zeros of the parent and dead inputs ----------------------------------------------------------------------


def test_zeros_of_the_parent_stay_and_are_part_of_the_budget() -> None:
    weight, inputs = layer()
    weight[:, ::3] = 0.0
    found = pruned(weight, inputs, sparsity=0.5, block=5)
    assert bool((found[weight == 0] == 0).all())
    assert int((found == 0).sum()) == 120
    filled = pruned(weight, inputs, sparsity=0.5, block=5, keep_zeros=False)
    assert int((filled == 0).sum()) == 120
    assert bool((filled[weight == 0] != 0).any())
    for pattern in ("2:4", "1:4"):
        assert bool((pruned(weight, inputs, pattern=pattern)[weight == 0] == 0).all())


def test_more_zeros_than_the_sparsity_allows_are_a_sentence() -> None:
    weight, inputs = layer()
    weight[:, ::2] = 0.0
    with pytest.raises(
        AssayError, match="block 2: 0: 120 of its 240 weights are zero already, more than the 96"
    ):
        pruned(weight, inputs, sparsity=0.4)
    assert int((pruned(weight, inputs, sparsity=0.4, threshold="block") == 0).sum()) == 120


def test_weights_of_dead_inputs_go_first_but_no_more_than_the_budget() -> None:
    weight, inputs = layer()
    inputs[:, [3, 4]] = 0.0
    found = pruned(weight, inputs, sparsity=0.3)
    assert not bool(found[:, [3, 4]].any()) and int((found == 0).sum()) == 72
    few = pruned(weight, inputs, sparsity=0.05)
    assert int((few == 0).sum()) == 12
    assert torch.equal(few[few != 0], weight[few != 0])
    official = pruned(weight, inputs, sparsity=0.05, threshold="official")
    assert not bool(official[:, [3, 4]].any())


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "not both"),
        ({"pattern": "2:4", "threshold": "official"}, "leave threshold out"),
        ({"pattern": "2:4", "block": 6}, "take a multiple of 4"),
        ({"pattern": "4:4"}, "of the form"),
    ],
)
def test_contradictory_options_are_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AssayError, match=words):
        sparsegpt.Config(data="case", **options)


def test_a_pattern_that_does_not_divide_the_inputs_is_a_sentence() -> None:
    with pytest.raises(AssayError, match="does not fit a matrix with 20 inputs"):
        pruned(*layer(), pattern="2:8")


def test_too_few_tokens_without_damping_are_a_sentence() -> None:
    weight, inputs = layer(12, 200)
    with pytest.raises(AssayError, match="90 calibration tokens are too few for 200 inputs"):
        pruned(weight, inputs, sparsity=0.5, relative_damping=0.0)
    assert int((pruned(weight, inputs, sparsity=0.5) == 0).sum()) == 1200


# --- the walk ---------------------------------------------------------------------------------------------------


def test_blocks_are_known_by_their_names() -> None:
    assert decoder_names(llama()) == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_later_blocks_are_pruned_on_the_inputs_that_pruned_ones_give(tmp_path: Path) -> None:
    model, config = llama(), sparsegpt.Config(data="case", sparsity=0.5)
    sparsegpt.prune(config, model, given(ragged()), Progress(tmp_path, 0))
    again = llama()
    with torch.no_grad():
        for block in walk(again, ragged()):
            sparsegpt.prune_block(config, block)
            for name, linear in block.linears().items():
                expected = model.get_parameter(f"model.layers.{block.index}.{name}.weight")
                assert torch.equal(linear.weight, expected)
                assert int((expected == 0).sum()) == expected.numel() // 2


def test_an_interrupted_walk_that_changes_weights_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    config = sparsegpt.Config(data="case", sparsity=0.5)
    whole, stopped, resumed = llama(), llama(), llama()
    sparsegpt.prune(config, whole, given(ragged()), Progress(tmp_path / "whole", 0))
    progress = Progress(tmp_path / "stopped", 0)
    progress.stopping = True
    with pytest.raises(Interrupted):
        sparsegpt.prune(config, stopped, given(ragged()), progress)
    after = Progress(tmp_path / "stopped", 0)
    state = after.load()
    assert state is not None and state.step == 1
    assert set(state.tensors) == set(linear_weights(stopped, 1))
    sparsegpt.prune(config, resumed, given(ragged()), after)
    for name in linear_weights(whole):
        assert torch.equal(resumed.get_parameter(name), whole.get_parameter(name))


def test_biases_are_saved_with_the_weights_and_masks_alone_otherwise(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=2, attention_bias=True)
    for weights, names, dtype in ((True, 11, torch.float32), (False, 7, torch.bool)):
        progress = Progress(tmp_path / str(weights), 0)
        progress.stopping = True
        with pytest.raises(Interrupted):
            prune_blocks(model, ragged(), progress, lambda block: None, weights)
        state = Progress(tmp_path / str(weights), 0).load()
        assert state is not None and len(state.tensors) == names
        assert {tensor.dtype for tensor in state.tensors.values()} == {dtype}
