"""Low rank: the truncation and its theorems, budgets that are met exactly, and MoDeGPT's three decompositions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.find import catalogue
from methods.prune import _lowrank, drank, fwsvd, modegpt, svd
from methods.prune._hessian import block_grams
from methods.prune._lowrank import Transform, full_rank, pays, rank_for, truncate, whitening
from methods.prune._shares import apportion, fill
from methods.prune._walk import linear_weights, walk
from methods.stage import AssayError, Interrupted, NotFinite, Stage
from tests.generic import Outcome, run, small_options, tensors, through_json, usual, world
from tests.generic import resolved as resolve
from tests.small_models import llama

METHODS = ("prune.svd", "prune.fwsvd", "prune.drank", "prune.modegpt")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int = 200, channels: int = 12, seed: int = 1) -> Tensor:
    """Correlated inputs [tokens,channels] of unequal sizes."""
    return (drawn(tokens, channels, seed=seed) @ drawn(channels, channels, seed=seed + 1)) * torch.linspace(
        0.1, 3, channels
    )


def output_error(weight: Tensor, other: Tensor, tokens: Tensor) -> float:
    return float((tokens @ (weight - other).double().T).square().sum())


def product(found: _lowrank.Truncated) -> Tensor:
    return found.a @ found.b


def tiny(heads: int = 4, groups: int = 2, **settings: Any) -> Any:
    """A two-layer Llama with random weights large enough to prefer some tokens."""
    sizes = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }
    model = llama(**sizes | settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


SEQUENCES = [torch.arange(start, start + 20)[None] % 64 for start in (0, 7, 30)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return torch.cat([model(input_ids=ids).logits[0] for ids in SEQUENCES])


# --- one matrix ------------------------------------------------------------------------------------------------


def test_truncation_keeps_what_is_largest_under_the_transform() -> None:
    weight = torch.diag(torch.tensor([3.0, 1.0]))
    plain = truncate(weight, Transform(), 1)
    assert torch.allclose(product(plain), torch.diag(torch.tensor([3.0, 0.0], dtype=torch.float64)))
    weighted = truncate(weight, Transform(torch.tensor([1.0, 4.0], dtype=torch.float64)), 1)
    assert torch.allclose(product(weighted), torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    assert weighted.spectrum.tolist() == pytest.approx([4.0, 3.0])


def test_the_singular_values_are_split_between_both_factors() -> None:
    found = truncate(torch.diag(torch.tensor([4.0, 1.0])), Transform(), 2)
    assert found.a.norm(dim=0).tolist() == pytest.approx([2.0, 1.0])
    assert found.b.norm(dim=1).tolist() == pytest.approx([2.0, 1.0])


def test_the_whitened_truncation_is_the_best_for_the_outputs() -> None:
    weight, tokens = drawn(10, 12), inputs()
    white = truncate(weight, whitening(tokens.T @ tokens), 4)
    error = output_error(weight, product(white), tokens)
    assert error == pytest.approx(float(white.spectrum[4:].square().sum()))
    others = [Transform(), svd.scaling(tokens.abs().mean(dim=0), 0.5)]
    assert all(error < output_error(weight, product(truncate(weight, one, 4)), tokens) for one in others)


def test_the_weighted_truncation_has_the_least_weighted_error_and_not_the_least_error() -> None:
    weight, fisher = drawn(10, 12), drawn(12, seed=3).exp()
    weighting = fwsvd.scaling(fisher)
    ours, plain = (product(truncate(weight, one, 4)) for one in (weighting, Transform()))
    assert weighting.apply(weight - ours).norm() < weighting.apply(weight - plain).norm()
    assert (weight - ours).norm() > (weight - plain).norm()


def test_a_refit_changes_nothing_on_the_inputs_of_the_whitening_and_helps_on_others() -> None:
    weight, tokens, others = drawn(10, 12), inputs(), inputs(seed=5)
    found = truncate(weight, whitening(tokens.T @ tokens), 4)
    same = _lowrank.refit(weight, found.b, tokens.T @ tokens)
    assert torch.allclose(same @ found.b, product(found), atol=1e-8)
    new = _lowrank.refit(weight, found.b, others.T @ others)
    assert output_error(weight, new @ found.b, others) < output_error(weight, product(found), others)


def test_inputs_that_are_fewer_than_channels_or_dead_are_no_obstacle() -> None:
    weight, tokens = drawn(10, 12), inputs(tokens=5)
    tokens[:, 3] = 0
    found = truncate(weight, whitening(tokens.T @ tokens), 5)
    assert bool(torch.isfinite(product(found)).all())
    assert output_error(weight, product(found), tokens) < 1e-6 * output_error(weight, 0 * weight, tokens)
    again = _lowrank.refit(weight, found.b, tokens.T @ tokens)
    assert output_error(weight, again @ found.b, tokens) < 1e-6 * output_error(weight, 0 * weight, tokens)


def test_inputs_that_overflow_are_named() -> None:
    with pytest.raises(NotFinite, match="the inputs of a layer are not finite"):
        whitening(torch.full((3, 3), float("nan")))


@pytest.mark.parametrize(
    ("keep", "rows", "columns", "rank"),
    [(0.4, 24, 32, 5), (0.7, 32, 64, 14), (0.999999, 4, 4, 1), (1.0, 4, 4, None), (0.5, 16, 16, 4)],
)
def test_a_rank_is_what_the_share_affords_and_none_where_it_does_not_pay(
    keep: float, rows: int, columns: int, rank: int | None
) -> None:
    assert rank_for(keep, rows, columns) == rank


def test_the_largest_rank_that_pays_is_half_of_a_square_and_more_of_a_wide_matrix() -> None:
    assert full_rank(16, 16) == 7
    assert full_rank(4096, 11008) == 2985
    for rows, columns in ((16, 16), (8, 16), (4096, 11008), (5, 7)):
        most = full_rank(rows, columns)
        assert pays(most, rows, columns)
        assert not pays(most + 1, rows, columns)


def test_a_share_below_one_rank_is_a_sentence() -> None:
    with pytest.raises(
        AssayError, match=r"keep=0\.1 leaves less than one rank of a 8 x 8 layer, which takes 0\.25"
    ):
        rank_for(0.1, 8, 8)


# --- sharing out -----------------------------------------------------------------------------------------------


def test_what_a_cap_cuts_off_goes_to_the_others_in_proportion() -> None:
    assert fill([1, 1, 2], [10, 1, 10], 8) == pytest.approx([7 / 3, 1, 14 / 3])
    assert fill([1, 3], [10, 10], 8) == pytest.approx([2, 6])
    assert fill([0, 1], [10, 2], 8) == pytest.approx([6, 2])
    assert fill([0, 0], [10, 30], 8) == pytest.approx([2, 6])


def test_remainders_are_handed_out_to_the_largest_first_and_the_sum_is_exact() -> None:
    assert apportion([1.2, 2.7, 0.1], [9, 9, 9], 4) == [1, 3, 0]
    assert apportion([1.2, 2.7, 0.1], [9, 2, 9], 4) == [2, 2, 0]
    assert apportion([0.0, 0.0], [3, 1], 4) == [3, 1]
    with pytest.raises(AssayError, match="5 units are to be shared out where no more than 4 have room"):
        apportion([1.0, 1.0], [2, 2], 5)


# --- whole models ----------------------------------------------------------------------------------------------


def factor_numbers(outcome: Outcome) -> dict[str, int]:
    """Numbers that each layer's two factors have."""
    shapes = {row["name"]: row["rows"] + row["columns"] for row in outcome.notes["layers"]}
    return {name: rank * shapes[name] for name, rank in outcome.notes["ranks"].items()}


@pytest.mark.parametrize("name", ["prune.svd", "prune.fwsvd"])
def test_every_layer_gets_as_many_ranks_as_its_share_affords(name: str) -> None:
    outcome = usual(name, keep=0.6)
    sizes = {row["name"]: (row["rows"], row["columns"]) for row in outcome.notes["layers"]}
    found = factor_numbers(outcome)
    assert len(found) == 14
    for layer, (rows, columns) in sizes.items():
        assert found[layer] <= 0.6 * rows * columns < found[layer] + rows + columns
    before = tensors(world().parents["whole"])
    untouched = [key for key in before if "proj" not in key]
    assert untouched
    assert all(torch.equal(outcome.weights[key], before[key]) for key in untouched)
    # The family compares the two forms' logits and text before it publishes anything.
    assert outcome.notes["physical"]
    saved = sum(rows * columns for rows, columns in sizes.values()) - sum(found.values())
    assert outcome.notes["parameters_physical"] == outcome.notes["parameters"] - saved


def test_plain_truncation_needs_no_data_and_all_else_says_so(tmp_path: Path) -> None:
    assert run("prune.svd", whitening="none", data=None).notes.get("calibration_sequences") is None
    for options in ({}, {"whitening": "diagonal"}, {"whitening": "none", "update": True}):
        with pytest.raises(AssayError, match=r'prune\.svd needs data="\.\.\."'):
            svd.Config(keep=0.5, **options)


def test_the_update_changes_left_factors_only_and_not_those_of_the_first_block() -> None:
    model = tiny()
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    for update in (False, True):
        config = svd.Config(keep=0.5, data="case", update=update)
        found.append(svd.prune(config, tiny(), Fixed(), Steps()))
    before, after = found
    assert list(before) == list(after) == [name.removesuffix(".weight") for name in linear_weights(model)]
    for name, (a, b) in before.items():
        assert torch.equal(after[name][1], b)
        same = torch.allclose(after[name][0] @ b, a @ b, atol=1e-4)
        assert same == name.startswith("model.layers.0."), name


def test_the_update_is_the_least_squares_solution_on_what_compressed_blocks_give() -> None:
    """The outputs of every layer of the second block, on the inputs that the first one gives when it is compressed."""
    dense, errors = tiny(), []
    for update in (False, True):
        model = tiny()
        factors = svd.prune(svd.Config(keep=0.5, data="case", update=update), model, Fixed(), Steps())
        if not update:
            compressed = tiny()
            _put(compressed, {name: pair for name, pair in factors.items() if ".0." in name})
        block = list(walk(compressed, SEQUENCES))[1]
        grams = block_grams(block)
        error = 0.0
        for name, (a, b) in factors.items():
            if ".1." in name:
                gram = grams[name.removeprefix("model.layers.1.")].gram.double()
                difference = dense.get_parameter(f"{name}.weight").detach().double() - a.double() @ b.double()
                error += float(((difference @ gram) * difference).sum())
        errors.append(error)
    assert errors[1] < errors[0]


@torch.no_grad()
def _put(model: Any, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (a, b) in factors.items():
        model.get_parameter(f"{name}.weight").copy_(a @ b)


class Fixed:
    """Calibration on the same sequences, whatever is asked for."""

    def __init__(self) -> None:
        self.stage = Stage("", "", None, 0, {}, Path(), Steps(), None)  # type: ignore[arg-type]

    def sequences(self, data: str, count: int, context_tokens: int) -> list[Tensor]:
        return SEQUENCES


class Steps:
    """Progress of a run that is never stopped."""

    def load(self) -> None: ...

    def due(self, step: int) -> bool:
        return False

    def bar(self, total: int, description: str = "", initial: int = 0) -> range:
        return range(initial, total)

    def random(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(step)


@pytest.mark.parametrize("name", METHODS)
def test_a_pruned_parent_is_refused_or_its_filled_zeros_are_counted(name: str) -> None:
    with pytest.raises(AssayError, match=rf"{name} would fill the [\d,]+ zeros .* or set keep_zeros=False"):
        run(name, parent="sparse", check=False)
    outcome = run(name, parent="sparse", keep_zeros=False)
    assert outcome.notes["zeros_filled"] > 500


def test_what_fills_no_zeros_takes_a_pruned_parent() -> None:
    outcome = run("prune.modegpt", parent="sparse", refit=False)
    before = tensors(world().parents["sparse"])
    assert all(
        bool((outcome.weights[name][old == 0] == 0).all()) for name, old in before.items() if old.ndim > 1
    )


# A method, its options, and the steps after which it is stopped: in each of its passes.
STOPS = [
    ("prune.svd", {"update": True}, (1, 2, 3)),
    ("prune.fwsvd", {}, (2, 4, 5)),
    ("prune.drank", {}, (1,)),
    ("prune.modegpt", {"parts": ("mlp", "vo", "qk"), "selection": "random"}, (1, 2, 3)),
]


@pytest.mark.parametrize(("name", "options", "stops"), STOPS, ids=[name for name, _, _ in STOPS])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    name: str,
    options: dict[str, Any],
    stops: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import methods.prune as family

    undisturbed = run(name, **options)
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "1")
    for attempt, stop in enumerate((*stops, 0)):
        stage = staged(name, options, tmp_path, attempt)
        if stop:
            _stop_at(stage, stop)
            with pytest.raises(Interrupted):
                family.run(stage, catalogue().method(name).load())
        else:
            family.run(stage, catalogue().method(name).load())
    assert stage.notes["resumed_from_step"] == stops[-1]
    found = Outcome(name, stage.config, stage.folder, stage.notes, tmp_path)
    assert found.files == undisturbed.files


def staged(name: str, options: dict[str, Any], folder: Path, attempt: int) -> Stage:
    from methods.data import Locator
    from methods.progress import Progress

    found = catalogue().method(name)
    config = through_json(resolve(found, small_options(found) | options))
    result = folder / f"attempt-{attempt}"
    result.mkdir()
    parents = {"model": world().parents["whole"]}
    return Stage(name, name, config, 0, parents, result, Progress(folder / "scratch", 0), Locator(smoke=True))


def _stop_at(stage: Stage, step: int) -> None:
    save = stage.progress.save

    def stopping(at: int, state: dict[str, Tensor], values: dict[str, Any]) -> None:
        save(at, state, values)
        if at == step:
            raise Interrupted("stopped")

    stage.progress.save = stopping  # type: ignore[method-assign]


# --- FWSVD -----------------------------------------------------------------------------------------------------


def test_the_importance_of_an_input_is_summed_over_the_outputs() -> None:
    assert fwsvd.row_fisher(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [4.0, 6.0]
    weights = fwsvd.scaling(torch.tensor([0.0, 4.0])).values
    assert weights is not None
    assert weights.tolist() == pytest.approx([2e-6, 2.0])
    assert fwsvd.scaling(torch.zeros(3)).values is None
    with pytest.raises(NotFinite):
        fwsvd.scaling(torch.tensor([float("inf"), 1.0]))


def test_the_importance_is_that_of_the_gradients_of_the_models_own_loss() -> None:
    model = tiny()
    name = "model.layers.1.mlp.down_proj"
    found = fwsvd.input_fisher(model, [*SEQUENCES, torch.tensor([[5]])], Steps())[name]  # type: ignore[arg-type]
    wanted = torch.zeros(24, dtype=torch.float64)
    for ids in SEQUENCES:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        wanted += model.get_parameter(f"{name}.weight").grad.double().square().sum(dim=0)
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_sequences_of_one_token_alone_are_a_sentence() -> None:
    with pytest.raises(AssayError, match="no calibration sequence has two tokens"):
        fwsvd.input_fisher(tiny(), [torch.tensor([[5]])], Steps())  # type: ignore[arg-type]


# --- D-Rank ----------------------------------------------------------------------------------------------------


def test_the_effective_rank_lies_between_one_and_the_number_of_singular_values() -> None:
    assert drank.effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert drank.effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    # Shares 0.8 and 0.2: exp(0.8 ln 1.25 + 0.2 ln 5).
    assert drank.effective_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.25**0.8 * 5**0.2)
    assert 1 < drank.effective_rank(torch.rand(9)) < 9


def layers(*effective: float, rows: int = 16, columns: int = 16) -> list[drank.Layer]:
    return [drank.Layer(f"layer{at}", rows, columns, rank) for at, rank in enumerate(effective)]


def test_ranks_go_with_the_root_of_the_effective_rank() -> None:
    # A budget of 256 numbers is 8 ranks, shared out as 1 to 3.
    assert drank.allocate(layers(1.0, 9.0), 0.5, beta=0.0) == {"layer0": 2, "layer1": 6}


def test_equal_spectra_get_equal_ranks() -> None:
    assert set(drank.allocate(layers(4.0, 4.0, 4.0), 0.5, beta=0.0).values()) == {4}
    assert sorted(drank.allocate(layers(4.0, 4.0, 4.0), 0.59, beta=0.0).values()) == [4, 5, 5]  # type: ignore[type-var]


@pytest.mark.parametrize("seed", range(12))
def test_the_budget_is_never_exceeded_and_never_left_where_a_rank_is_to_be_had(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = torch.randint(6, 40, (9, 2), generator=draw).tolist()
    effective = (1 + 5 * torch.rand(9, generator=draw)).tolist()
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "x", "y")
    found = [
        drank.Layer(f"block.{part}", *shape, rank)
        for part, shape, rank in zip(parts, shapes, effective, strict=True)
    ]
    for keep in (0.35, 0.6, 0.8, 0.95):
        ranks = drank.allocate(found, keep, beta=0.3)
        left = int(keep * sum(layer.size for layer in found))
        left -= sum(layer.cost(ranks[layer.name]) for layer in found)
        assert left >= 0
        for layer in found:
            rank = ranks[layer.name]
            if rank is not None:
                assert pays(rank, layer.rows, layer.columns)
                assert layer.cost(layer.above(rank)) - layer.cost(rank) > left


def test_a_layer_whose_ranks_would_not_pay_stays_dense_and_the_others_get_the_rest() -> None:
    ranks = drank.allocate(layers(400.0, 1.0, 1.0), 0.6, beta=0.0)
    # 460 numbers: 256 for the first, 204 for two others of 32 a rank.
    assert ranks == {"layer0": None, "layer1": 3, "layer2": 3}


def test_beta_moves_numbers_from_queries_and_keys_to_values() -> None:
    found = [
        drank.Layer(f"block.{part}_proj", rows, 64, 9.0) for part, rows in (("q", 64), ("k", 32), ("v", 32))
    ]
    none, some = (drank.allocate(found, 0.4, beta) for beta in (0.0, 0.3))
    assert some["block.v_proj"] > none["block.v_proj"]  # type: ignore[operator]
    assert all(some[f"block.{part}_proj"] < none[f"block.{part}_proj"] for part in "qk")  # type: ignore[operator]


def test_a_layer_without_a_rank_is_a_sentence() -> None:
    with pytest.raises(AssayError, match=r"keep=0\.13 leaves no rank for layer0 \(16 x 16\): raise keep"):
        drank.allocate(layers(1e-3, 9.0), 0.13, beta=0.0)


def test_drank_spends_its_budget_in_a_model() -> None:
    outcome = usual("prune.drank", keep=0.6)
    found = factor_numbers(outcome)
    sizes = {row["name"]: row["rows"] * row["columns"] for row in outcome.notes["layers"]}
    spent = sum(found.get(name, size) for name, size in sizes.items())
    assert 0.6 * sum(sizes.values()) - 24 < spent <= 0.6 * sum(sizes.values())
    assert all(1 <= rank <= 16 for rank in outcome.notes["effective_ranks"].values())


# --- MoDeGPT ---------------------------------------------------------------------------------------------------


def test_leverage_is_what_ridge_regression_keeps_of_a_neuron() -> None:
    moment = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    assert modegpt.leverage(moment, 1.0).tolist() == pytest.approx([0.75, 0.5, 0.0])
    assert modegpt.leverage(torch.zeros(2, 2), 1.0).tolist() == [0.0, 0.0]


def test_a_neuron_that_stays_takes_over_what_its_double_did() -> None:
    moment = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    kept = torch.tensor([0])
    assert float(modegpt.refitted(torch.tensor([[2.0, 3.0]]), moment, kept)) == pytest.approx(5.0)
    # Two doubles that both stay share the work: nothing is divided by 0.
    both = modegpt.refitted(torch.tensor([[2.0, 3.0]]), moment, torch.tensor([0, 1]))
    assert float(both.sum()) == pytest.approx(5.0)


def test_the_refit_has_the_least_error_whichever_neurons_stay() -> None:
    tokens, down = inputs(channels=16), drawn(6, 16, seed=4)
    moment = tokens.T @ tokens / len(tokens)
    for seed in range(4):
        kept = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:9].sort().values
        errors = []
        for columns in (modegpt.refitted(down, moment, kept), down[:, kept]):
            errors.append(output_error(down, torch.zeros_like(down).index_copy(1, kept, columns), tokens))
        assert errors[0] < errors[1]


def test_blocks_of_equal_influence_share_alike_and_the_cap_holds() -> None:
    assert modegpt.sparsities([0.2, 0.2], 0.3, 0.1, 0.8, [10, 10]) == pytest.approx([0.3, 0.3])
    # exp(-1) / (1 + exp(-1)) of 2 * 0.5, capped: the rest goes to the other block.
    assert modegpt.sparsities([0.1, 0.0], 0.5, 0.1, 0.6, [10, 10]) == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize("sparsity", [0.07, 0.25, 0.5, 0.61])
def test_as_many_neurons_go_as_were_asked_for(sparsity: float) -> None:
    config = modegpt.Config(data="case", sparsity=sparsity, epsilon=0.05)
    gone = modegpt.removed(config, [0.4, 0.1, 0.2, 0.3], [33, 33, 33, 33])
    assert sum(gone) == round(sparsity * 132)
    assert all(count <= 0.8 * 33 for count in gone)
    outcome = run("prune.modegpt", sparsity=sparsity)
    assert sum(outcome.notes["removed_units"]["mlp"]) == round(sparsity * 128)
    zeros = [
        int((outcome.weights[f"model.layers.{at}.mlp.down_proj.weight"] == 0).all(dim=0).sum())
        for at in (0, 1)
    ]
    assert zeros == outcome.notes["removed_units"]["mlp"]


def test_budgets_that_cannot_be_met_are_sentences() -> None:
    with pytest.raises(AssayError, match=r"sparsity=0\.9 is above max_sparsity=0\.8"):
        modegpt.Config(data="case", sparsity=0.9)
    with pytest.raises(AssayError, match='parts names "mlp", "vo" or "qk", at least one and each once'):
        modegpt.Config(data="case", sparsity=0.5, parts=("mlp", "mlp"))
    config = modegpt.Config(data="case", sparsity=0.8)
    with pytest.raises(AssayError, match=r"6 of 8 units cannot go .* \(5 can\)"):
        modegpt.removed(modegpt.Config(data="case", sparsity=0.8), [0.1, 0.2], [6, 2])
    assert modegpt.removed(config, [0.1, 0.1], [10, 10]) == [8, 8]


def moment_of(model: Any) -> Tensor:
    """The second moment of what enters the attention of the first block."""
    block = next(walk(model, SEQUENCES))
    gram = block_grams(block, ["self_attn.q_proj"])["self_attn.q_proj"]
    return gram.gram.double() / gram.tokens


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
@torch.no_grad()
def test_values_of_low_rank_go_through_fewer_dimensions_unchanged(
    heads: int, groups: int, bias: bool
) -> None:
    """Every head has 4 dimensions, two of which say the same as the others."""
    model = tiny(heads, groups, attention_bias=bias)
    attention = model.model.layers[0].self_attn
    values = attention.v_proj.weight.view(groups, 4, 16)
    values[:, 2:] = values[:, :2].flip(1)
    expected = logits(model)
    for name, tensor in modegpt.values_and_outputs(attention, moment_of(model), 2).items():
        model.model.layers[0].get_parameter(name).copy_(tensor)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert bool((attention.v_proj.weight.view(groups, 4, 16)[:, 2:] == 0).all())
    assert bool((attention.o_proj.weight.view(16, heads, 4)[:, :, 2:] == 0).all())


@torch.no_grad()
def test_truncated_values_come_closer_than_leaving_out_the_weakest_dimensions() -> None:
    model = tiny(4, 4)
    attention, moment = model.model.layers[0].self_attn, moment_of(model)
    changed = modegpt.values_and_outputs(attention, moment, 2)
    for head in range(4):
        rows = slice(4 * head, 4 * head + 4)
        old = (attention.o_proj.weight[:, rows] @ attention.v_proj.weight[rows]).double()
        new_value, new_output = (changed[f"self_attn.{name}_proj.weight"] for name in "vo")
        ours = old - (new_output[:, rows] @ new_value[rows]).double()
        error = float(((ours @ moment) * ours).sum())
        for kept in ([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]):
            at = [4 * head + one for one in kept]
            other = old - (attention.o_proj.weight[:, at] @ attention.v_proj.weight[at]).double()
            assert error <= float(((other @ moment) * other).sum())


def test_a_bias_of_the_values_needs_somewhere_to_go() -> None:
    attention = tiny(4, 4).model.layers[0].self_attn
    attention.v_proj = torch.nn.Linear(16, 16)
    with pytest.raises(AssayError, match="leave vo out of parts"):
        modegpt.values_and_outputs(attention, torch.eye(16, dtype=torch.float64), 1)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
@torch.no_grad()
def test_rotary_pairs_that_do_nothing_go_first_and_are_not_missed(heads: int, groups: int) -> None:
    model = tiny(heads, groups)
    attention = model.model.layers[0].self_attn
    # Of the pairs (0, 2) and (1, 3) of every key head the second, or in the first head the first, has no weights.
    keys = attention.k_proj.weight.view(groups, 4, 16)
    keys[1:, [1, 3]] = 0
    keys[0, [0, 2]] = 0
    expected = logits(model)
    changed = modegpt.queries_and_keys(attention, moment_of(model), 1)
    for name, tensor in changed.items():
        model.model.layers[0].get_parameter(name).copy_(tensor)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    queries = attention.q_proj.weight.view(groups, heads // groups, 4, 16)
    assert bool((queries[1:, :, [1, 3]] == 0).all())
    assert bool((queries[0, :, [0, 2]] == 0).all())
    assert int((queries == 0).all(dim=3).sum()) == 2 * heads


def test_heads_and_mlp_are_made_narrower_together_and_only_the_mlp_physically() -> None:
    outcome = run("prune.modegpt", parts=("mlp", "vo", "qk"), sparsity=0.5)
    gone = outcome.notes["removed_units"]
    # Two blocks of 64 neurons; heads of 4 dimensions, which are two rotary pairs.
    assert {part: sum(counts) for part, counts in gone.items()} == {"mlp": 64, "vo": 4, "qk": 2}
    assert outcome.notes["widths"]["neurons"] == [64 - count for count in gone["mlp"]]
    assert outcome.notes["physical"]
    assert not run("prune.modegpt", parts=("vo",), sparsity=0.5).notes["physical"]


def test_a_model_of_another_kind_is_named() -> None:
    config = modegpt.Config(data="case", sparsity=0.5)
    model = type("Other", (), {"config": type("Config", (), {"model_type": "gpt2"})()})()
    with pytest.raises(AssayError, match=r"prune\.modegpt is available for models of type llama"):
        modegpt.prune(config, model, Fixed(), Steps())  # type: ignore[arg-type]
