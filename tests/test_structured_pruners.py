"""Structured pruning: the refit worked out by hand, Týr's levels, FLAP and LLM-Pruner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import methods.levels as levels_family
import methods.prune as prune_family
from methods.architectures import shrink, with_head
from methods.checkpoint import load_model
from methods.data import Locator, Style, train_tokenizer
from methods.levels import tyr
from methods.levels._database import Database
from methods.progress import Progress
from methods.prune import flap, llm_pruner
from methods.prune._refit import refit, split_evenly
from methods.prune._structured import kept_units, lowest, parts
from methods.prune._walk import decoder_layers
from methods.search._assignment import Assignment
from methods.stage import AssayError, Component, Interrupted, Parent, Stage
from tests.small_models import llama

DATA = "authors/forget10"
HIDDEN, NEURONS = 32, 48


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(Locator(), [DATA], 300)


def tiny(heads: int = 4, groups: int = 2, **settings: Any) -> Any:
    """A two-layer Llama with random weights large enough to prefer some tokens."""
    sizes = {
        "vocab_size": 300,
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    return llama(**sizes | settings)


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The model as a parent's folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Style().write(folder)
    return folder


@pytest.fixture(scope="module")
def parent(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny(), tokenizer, tmp_path_factory.mktemp("parent"))


def staged(tmp_path: Path, config: Any, seed: int = 0, **parents: Path) -> Stage:
    folder = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    progress = Progress(tmp_path / f"scratch-{folder.name}", seed, save_seconds=3600)
    return Stage("test-0", "levels.tyr", config, seed, parents, folder, progress, Locator())


def built(tmp_path: Path, parent: Path, center: Path | None = None, **options: Any) -> Database:
    """The database that ``levels.tyr`` makes of a parent."""
    shared: dict[str, Any] = {"data": DATA, "sparsity": 0.5, "least_neurons": 6, "calibration_tokens": 200}
    references = {} if center is None else {"center": center}
    if center is not None:
        shared["center"] = Parent("search.test-0")
    stage = staged(tmp_path, tyr.Config(**{**shared, **options}), model=parent, **references)
    levels_family.run(stage, tyr)
    return Database.open(stage.folder / "files", load_model(parent, dtype="float32"))


def pruned(tmp_path: Path, parent: Path, method: Any, **options: Any) -> tuple[Any, Stage]:
    """Run a pruning stage and load its result."""
    stage = staged(tmp_path, method.Config(data=DATA, **options), model=parent)
    prune_family.run(stage, method)
    return load_model(stage.folder / "model", dtype="float32"), stage


def removed(model: Any) -> dict[str, list[int]]:
    """How many units of each layer are without effect, by kind."""
    counts: dict[str, list[int]] = {"heads": [], "neurons": []}
    for part in parts(model, "group", "a test"):
        counts[part.budget].append(int((~part.contributing()).sum()))
    return counts


def problem(out: int = 6, groups: int = 8, width: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out,in] and the Gram matrix [in,in] of correlated inputs, float64."""
    draw = torch.Generator().manual_seed(seed)
    size = groups * width
    mixed = torch.randn(size, size, generator=draw, dtype=torch.float64)
    inputs = torch.randn(200, size, generator=draw, dtype=torch.float64) @ mixed
    return torch.randn(out, size, generator=draw, dtype=torch.float64), inputs.T @ inputs


def staying(weight: Tensor, groups: int) -> list[int]:
    """The groups of inputs that have any weight."""
    alive = (weight.unflatten(1, (groups, -1)) != 0).flatten(2).any(dim=2).any(dim=0)
    return [int(index) for index in alive.nonzero().flatten()]


def damped_error(weight: Tensor, dense: Tensor, gram: Tensor) -> float:
    """The squared error of the problem that is solved: on the damped Gram matrix."""
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return float(((weight - dense) @ hessian * (weight - dense)).sum())


# --- counts --------------------------------------------------------------------------------------------------


def test_ten_units_at_nine_tenths_leave_one_and_the_official_floor_leaves_none() -> None:
    assert kept_units(10, 0.9, "exact", "heads") == 1
    assert kept_units(10, 0.9, "official", "heads") == 0


def test_a_share_that_whole_units_cannot_meet_is_a_sentence_with_the_nearest() -> None:
    with pytest.raises(
        AssayError, match=r"of the 4 heads .* 1\.2, no whole number; 0\.25 and 0\.5 can be met"
    ):
        kept_units(4, 0.3, "exact", "heads")
    assert kept_units(4, 0.3, "nearest", "heads") == 3
    assert kept_units(11008, 0.3, "exact", "neurons") == 11008 - 3302


def test_rounds_are_even_and_the_first_ones_take_the_remainder() -> None:
    assert split_evenly(10, 4) == (3, 3, 2, 2)
    assert split_evenly(3, 16) == (1, 1, 1)
    assert split_evenly(0, 16) == ()


# --- the refit -----------------------------------------------------------------------------------------------


def test_the_refit_of_two_inputs_is_the_one_worked_out_by_hand() -> None:
    """H = [[2,1],[1,2]], W = [3,1]: G = (7,5), R = [[2,-1],[-1,2]]/3, scores 27.75 and 5.75; what stays is 7/2."""
    weight, gram = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = refit(weight, gram, 2, [2, 1, 0], 16, damping=0.0)
    assert found[2].tolist() == [[3.0, 1.0]]
    assert found[1].tolist() == [[3.5, 0.0]]
    assert found[0].tolist() == [[0.0, 0.0]]


def test_the_energy_term_spares_loud_inputs_that_others_could_replace() -> None:
    """Of two inputs all but equal one costs an error of 0.1 and an energy of 19.9; the third costs 0.5 and 1."""
    gram = torch.tensor([[10.0, 9.9, 0.0], [9.9, 10.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.ones(1, 3)
    assert staying(refit(weight, gram, 3, [2], 1, score="osscar")[2], 3) == [1, 2]
    assert staying(refit(weight, gram, 3, [2], 1, score="tyr")[2], 3) == [0, 1]


@pytest.mark.parametrize("rounds", [1, 16])
@pytest.mark.parametrize("keep_zeros", [True, False])
def test_what_stays_is_the_least_squares_solution_and_better_than_the_mask_alone(
    rounds: int, keep_zeros: bool
) -> None:
    for seed in range(5):
        weight, gram = problem(seed=seed)
        for count, found in refit(weight, gram, 8, [6, 4, 1], rounds, keep_zeros=keep_zeros).items():
            assert len(staying(found, 8)) == count
            mask = found != 0
            assert damped_error(found, weight, gram) < damped_error(weight * mask, weight, gram)
            hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(16, dtype=gram.dtype)
            gradient = (found - weight) @ hessian
            assert float((gradient * mask).abs().max()) < 1e-8 * float(gradient.abs().max())


def test_one_round_and_sixteen_keep_as_many_groups() -> None:
    weight, gram = problem(groups=24, width=1)
    one, many = (refit(weight, gram, 24, [18, 12, 3], rounds) for rounds in (1, 16))
    for count in (18, 12, 3):
        assert len(staying(one[count], 24)) == len(staying(many[count], 24)) == count
    assert any(staying(one[count], 24) != staying(many[count], 24) for count in (18, 12, 3))


@pytest.mark.parametrize("rounds", [1, 3, 16])
def test_levels_that_share_rounds_are_what_each_is_alone(rounds: int) -> None:
    weight, gram = problem(groups=12, width=1)
    together = refit(weight, gram, 12, list(range(13)), rounds)
    for count, found in together.items():
        assert torch.equal(found, refit(weight, gram, 12, [count], rounds)[count])


def test_groups_whose_inputs_are_always_zero_go_first() -> None:
    weight, gram = problem()
    dead = torch.zeros(16, dtype=torch.bool)
    dead[4:6] = dead[10:12] = True
    gram = gram.masked_fill(dead[:, None] | dead, 0.0)
    found = refit(weight, gram, 8, [8, 7, 6, 5], 1)
    assert torch.equal(found[8], weight)
    assert torch.equal(found[7], weight.masked_fill(dead, 0.0)) and torch.equal(found[6], found[7])
    assert len(staying(found[5], 8)) == 5 and not {2, 5} & set(staying(found[5], 8))
    # The others are as if the dead ones had never been there, but for the damping's mean diagonal.
    alone = refit(weight[:, ~dead], gram[~dead][:, ~dead], 6, [5], 1, damping=0.01 * 12 / 16)
    torch.testing.assert_close(found[5][:, ~dead], alone[5])


def test_zeros_stay_zero_and_the_rest_is_the_best_there_is_beside_them() -> None:
    weight, gram = problem()
    weight[torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) < 0.3] = 0.0
    sparse, filled = (refit(weight, gram, 8, [5], 16, keep_zeros=keep)[5] for keep in (True, False))
    assert bool((sparse[weight == 0] == 0).all())
    assert not bool((filled[weight == 0] == 0).all())
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(16, dtype=gram.dtype)
    gradient = ((sparse - weight) @ hessian).masked_fill(sparse == 0, 0.0)
    assert float(gradient.abs().max()) < 1e-8 * float(gram.abs().max())


def test_bad_matrices_are_sentences() -> None:
    weight, gram = problem()
    with pytest.raises(AssayError, match="16 inputs do not divide into 5 groups"):
        refit(weight, gram, 5, [3], 1)
    with pytest.raises(AssayError, match="not positive definite"):
        refit(weight, -gram, 8, [3], 1)
    with pytest.raises(AssayError, match="not positive definite"):
        refit(weight, gram * float("nan"), 8, [3], 1)


# --- the units of a model ------------------------------------------------------------------------------------


def test_parts_are_counted_in_groups_and_in_query_heads() -> None:
    model = tiny(heads=4, groups=2)
    assert [part.count for part in parts(model, "group", "a test")] == [2, NEURONS, 2, NEURONS]
    assert [part.count for part in parts(model, "query", "a test")] == [4, NEURONS, 4, NEURONS]
    assert [part.name for part in parts(model, "group", "a test")][:2] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    ]


def test_another_architecture_is_refused_with_a_sentence() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(AssayError, match="models of type llama"):
        parts(model, "group", "a test")


def test_heads_that_do_not_divide_are_refused_with_a_sentence() -> None:
    model = tiny(heads=4, groups=4)
    attention = model.model.layers[1].self_attn
    attention.k_proj = nn.Linear(HIDDEN, 24, bias=False)
    with pytest.raises(AssayError, match="4 query heads on 3 key-value heads"):
        parts(model, "group", "a test")


def test_the_lowest_of_all_layers_go_and_of_equal_ones_the_earlier() -> None:
    found = parts(tiny(), "query", "a test")[::2]
    gone = lowest(found, [torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([1.0, 8.0, 2.0, 9.0])], 3)
    assert [mask.tolist() for mask in gone.values()] == [
        [False, True, True, False],
        [True, False, False, False],
    ]


# --- levels.tyr ----------------------------------------------------------------------------------------------


def test_the_database_has_the_levels_around_half_with_what_they_remove(tmp_path: Path, parent: Path) -> None:
    database = built(tmp_path, parent)
    assert database.kind == "structure"
    assert [unit.budget for unit in database.units] == ["heads", "neurons"] * 2
    heads, neurons = database.units[:2]
    assert {level.name: level.cost for level in heads.levels} == {"-1": 0, "0": 1, "1": 2}
    assert {level.name: level.cost for level in neurons.levels} == {str(j): 24 + 6 * j for j in range(-4, 5)}
    assert neurons.level("-2").share == 0.25
    dense = load_model(parent, dtype="float32")
    for unit in database.units:
        count = 2 if unit.budget == "heads" else NEURONS
        for level in unit.levels:
            weight = database.weight(unit.name, level.name)
            assert len(staying(weight, count)) == count - level.cost
        none = next(level.name for level in unit.levels if not level.cost)
        assert torch.equal(database.weight(unit.name, none), dense.get_parameter(f"{unit.name}.weight"))


def test_query_heads_have_levels_of_their_own(tmp_path: Path, parent: Path) -> None:
    unit = built(tmp_path, parent, heads="query").units[0]
    assert {level.name: level.cost for level in unit.levels} == {"-2": 0, "-1": 1, "0": 2, "1": 3, "2": 4}


def centre(tmp_path: Path, removed: dict[str, int] | None, kind: str = "structure") -> Path:
    """An assignment as a search leaves it."""
    about = {} if removed is None else {"removed": removed}
    names = removed or {"model.layers.0.self_attn.o_proj": 0}
    Assignment(kind, dict.fromkeys(names, "0"), "search.test", {"heads": 0}, about).write(tmp_path / "center")
    return tmp_path / "center"


FOUND = {
    "model.layers.0.self_attn.o_proj": 0,
    "model.layers.0.mlp.down_proj": 30,
    "model.layers.1.self_attn.o_proj": 2,
    "model.layers.1.mlp.down_proj": 18,
}


def test_a_centre_moves_the_levels_of_each_layer(tmp_path: Path, parent: Path) -> None:
    database = built(tmp_path, parent, center=centre(tmp_path, FOUND), step=0.0625, least_neurons=3, levels=3)
    costs = {unit.name: {level.name: level.cost for level in unit.levels} for unit in database.units}
    assert costs == {
        "model.layers.0.self_attn.o_proj": {"0": 0, "1": 1},
        "model.layers.0.mlp.down_proj": {"-1": 27, "0": 30, "1": 33},
        "model.layers.1.self_attn.o_proj": {"-1": 1, "0": 2},
        "model.layers.1.mlp.down_proj": {"-1": 15, "0": 18, "1": 21},
    }
    # The levels are made of the dense weights, so that a count is the same matrix whatever the centre.
    again = built(tmp_path, parent)
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(database.weight(name, "0"), again.weight(name, "-1"))


@pytest.mark.parametrize(
    ("removed", "kind", "words"),
    [
        (None, "structure", "does not say how many units"),
        (FOUND, "sparsity", "of kind sparsity"),
        ({**FOUND, "model.layers.1.self_attn.o_proj": 1}, "structure", "removes 1 heads in all, and .* is 2"),
        ({"model.layers.0.self_attn.o_proj": 1}, "structure", "of other layers"),
    ],
)
def test_a_centre_that_does_not_fit_is_a_sentence(
    tmp_path: Path, parent: Path, removed: Any, kind: str, words: str
) -> None:
    with pytest.raises(AssayError, match=words):
        built(tmp_path, parent, center=centre(tmp_path, removed, kind))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": 8}, "has no middle"),
        ({"sparsity": 0.3}, r"of the 2 heads of model.layers.0.self_attn.o_proj .* 0 and 0\.5"),
        ({"least_neurons": 40}, "lower step or least_neurons"),
        ({"calibration_tokens": 10**6}, "1000000 calibration tokens are asked for"),
    ],
)
def test_levels_that_cannot_be_are_sentences(
    tmp_path: Path, parent: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(AssayError, match=words):
        built(tmp_path, parent, **options)


def test_later_blocks_see_pruned_ones_only_where_that_is_asked_for(tmp_path: Path, parent: Path) -> None:
    none, centred, weighted = (
        built(tmp_path, parent, error_propagation=mode) for mode in ("none", "center", "weighted")
    )
    first, second = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    assert torch.equal(none.weight(first, "0"), centred.weight(first, "0"))
    assert torch.equal(none.weight(first, "0"), weighted.weight(first, "0"))
    found = [database.weight(second, "0") for database in (none, centred, weighted)]
    assert not any(torch.equal(found[one], found[two]) for one, two in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("mode", ["none", "center", "weighted"])
def test_the_model_is_dense_behind_its_levels(
    tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense = tiny(), tiny()
    seen: list[bool] = []
    original = tyr.build_block

    def watched(config: Any, block: Any, *rest: Any) -> None:
        weights = model.state_dict()
        seen.append(all(torch.equal(weights[name], weight) for name, weight in dense.state_dict().items()))
        original(config, block, *rest)

    monkeypatch.setattr(tyr, "build_block", watched)
    config = tyr.Config(data=DATA, sparsity=0.5, least_neurons=6, error_propagation=mode)
    found = parts(model, "group", "a test")
    plan = tyr.planned(config, found, tyr.centres(config, found, None))
    writer = levels_family_writer(tmp_path)
    tyr.build_on(config, model, found, plan, [torch.arange(60)[None]], Progress(tmp_path, 0), writer)
    assert seen == [True, True]
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in dense.state_dict().items())


def levels_family_writer(folder: Path) -> Any:
    from methods.levels._database import Writer

    return Writer(folder / "levels", tyr.KIND)


def test_what_is_passed_on_is_weighted_by_what_each_level_keeps(tmp_path: Path) -> None:
    config = tyr.Config(data=DATA, sparsity=0.5, error_propagation="weighted")
    part = parts(tiny(), "group", "a test")[0]
    writer, plan = levels_family_writer(tmp_path), {"-1": 0, "0": 1, "1": 2}
    _, gram = problem(groups=2, width=HIDDEN // 2)
    tyr.write_part(config, part, gram.float(), plan, writer)
    dense, half = (writer.weight(part.name, level) for level in ("-1", "0"))
    torch.testing.assert_close(tyr.passed_on(config, part, plan, writer), (dense + 0.5 * half) / 1.5)


@pytest.mark.parametrize("mode", ["none", "weighted"])
def test_levels_that_were_interrupted_go_on_where_they_stopped(
    tmp_path: Path, parent: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"error_propagation": mode}
    undisturbed = built(tmp_path, parent, **options)
    config = tyr.Config(data=DATA, sparsity=0.5, least_neurons=6, calibration_tokens=200, **options)
    stage = staged(tmp_path, config, model=parent)
    stage.progress.stopping = True
    with pytest.raises(Interrupted):
        levels_family.run(stage, tyr)
    solved: list[str] = []
    original = tyr.write_part

    def watched(config: Any, part: Any, *rest: Any) -> None:
        solved.append(part.name)
        original(config, part, *rest)

    monkeypatch.setattr(tyr, "write_part", watched)
    stage.progress.stopping = False
    levels_family.run(stage, tyr)
    assert "model.layers.0.self_attn.o_proj" not in solved and "model.layers.1.mlp.down_proj" in solved
    resumed = Database.open(stage.folder / "files")
    for unit in undisturbed.units:
        for level in unit.names:
            assert torch.equal(resumed.weight(unit.name, level), undisturbed.weight(unit.name, level))


def test_zeros_of_the_parent_are_zero_at_every_level(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny()
    with torch.no_grad():
        for part in parts(model, "group", "a test"):
            weight = part.linear.weight
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.2] = 0.0
    folder = saved(model, tokenizer, tmp_path / "sparse")
    kept, filled = (built(tmp_path, folder, keep_zeros=keep) for keep in (True, False))
    for unit in kept.units:
        zeros = model.get_parameter(f"{unit.name}.weight") == 0
        assert all(bool((kept.weight(unit.name, level)[zeros] == 0).all()) for level in unit.names)
    assert not bool((filled.weight(unit.name, "0")[zeros] == 0).all())


# --- FLAP ----------------------------------------------------------------------------------------------------


def test_mean_and_variance_are_those_of_all_tokens_of_ragged_sequences() -> None:
    draw = torch.Generator().manual_seed(0)
    sequences = [torch.randn(length, 5, generator=draw) + 3 for length in (7, 1, 12)]
    seen = flap.Fluctuation(official=False)
    for sequence in sequences:
        seen.add(sequence)
    tokens = torch.cat(sequences).double()
    torch.testing.assert_close(seen.mean, tokens.mean(dim=0))
    torch.testing.assert_close(seen.variance, tokens.var(dim=0))


def test_the_official_statistics_are_the_ones_worked_out_by_hand() -> None:
    """Sequences (1, 3) and (5): mean 2, then (2 + 5) / 2 = 3.5; the first adds nothing, the second (5 - 3.5)^2 / 2."""
    seen = flap.Fluctuation(official=True)
    seen.add(torch.tensor([[1.0], [3.0]]))
    assert float(seen.variance) == 0.0
    seen.add(torch.tensor([[5.0]]))
    assert (float(seen.mean), float(seen.variance), float(seen.energy)) == (3.5, 1.125, (10 + 25) / 2)


def test_the_metrics_are_the_ones_worked_out_by_hand() -> None:
    seen = flap.Fluctuation(official=False)
    seen.add(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    weight = torch.tensor([[1.0, 2.0], [-2.0, 0.0]])
    assert flap.metric("IFV", seen, weight).tolist() == [2.0, 8.0]
    assert flap.metric("WIFV", seen, weight).tolist() == [2.0 * 5, 8.0 * 4]
    assert flap.metric("WIFN", seen, weight).tolist() == pytest.approx([1.5 * 10**0.5, 4.0])


def pools_of(model: Any, heads: list[float], neurons: Callable[[int], float]) -> list[flap.Pool]:
    """The pools of a model with these scores of its heads, and of neurons by their number."""
    found = parts(model, "group", "a test")
    own = [torch.tensor(heads[:2]), torch.tensor([neurons(j) for j in range(NEURONS)])]
    own += [torch.tensor(heads[2:]), torch.tensor([neurons(NEURONS + j) for j in range(NEURONS)])]
    return flap.pools("AL-AM", found, own)


def test_heads_and_neurons_that_go_together_meet_the_budget_exactly() -> None:
    """A group has 2 * 16 + 2 * 8 = 48 rows and columns, a neuron 3: 4 * 48 + 96 * 3 = 480 in all, half of them 240."""
    model = tiny()
    some_quiet = flap.joint(0.5, model, *pools_of(model, [-9.0, -8.0, 50.5, 60.5], float))
    all_loud = flap.joint(0.5, model, *pools_of(model, [200.0, 201.0, 202.0, 203.0], float))
    assert some_quiet == [2, (240 - 2 * 48) // 3]
    assert all_loud == [0, 80]


def test_a_head_that_fits_no_more_is_left_and_neurons_make_up_the_rest() -> None:
    """Nine tenths are 432: three heads and 32 neurons score lowest, the last head is too much for what is left."""
    model = tiny()
    pools = pools_of(model, [-9.0, -8.0, -7.0, 90.5], float)
    assert flap.joint(0.9, model, *pools) == [3, (432 - 3 * 48) // 3]


@pytest.mark.parametrize("structure", ["AL-AM", "AL-MM", "UL-UM"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_budget_is_met_exactly_by_the_smaller_model(
    tmp_path: Path, parent: Path, structure: Any, bias: bool
) -> None:
    model, stage = pruned(tmp_path, parent, flap, sparsity=0.5, structure=structure, bias=bias, sequences=8)
    counts, dense = removed(model), load_model(parent, dtype="float32")
    assert 48 * sum(counts["heads"]) + 3 * sum(counts["neurons"]) == 240
    if structure == "UL-UM":
        assert counts == {"heads": [1, 1], "neurons": [24, 24]}
    if structure == "AL-MM":
        assert (sum(counts["heads"]), sum(counts["neurons"])) == (2, 48)
    matrices = sum(weight.numel() for name, weight in dense.named_parameters() if "proj" in name)
    smaller = load_model(stage.folder / "model" / "physical", dtype="float32")
    left = sum(weight.numel() for name, weight in smaller.named_parameters() if name.endswith("proj.weight"))
    assert left == matrices // 2
    assert model.config.attention_bias is bias and model.config.mlp_bias is bias


def test_the_mean_of_what_goes_stays_in_the_bias(tmp_path: Path, parent: Path) -> None:
    """On the calibration tokens the first attention's mean output is what it was."""
    model, stage = pruned(tmp_path, parent, flap, sparsity=0.5, structure="UL-UM", sequences=6)
    calibration = prune_family.Calibration(stage).sequences(DATA, 6, 128)
    means = []
    for one in (load_model(parent, dtype="float32"), model):
        outputs: list[Tensor] = []
        attention = one.model.layers[0].self_attn.o_proj
        attention.register_forward_hook(
            lambda module, inputs, output, outputs=outputs: outputs.append(output[0])
        )
        with torch.no_grad():
            for tokens in calibration:
                one(tokens)
        means.append(torch.cat(outputs).mean(dim=0))
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)
    assert bool((model.model.layers[0].self_attn.q_proj.bias == 0).all())


def test_units_without_weight_go_first(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 16:] = 0.0
        model.model.layers[0].mlp.down_proj.weight[:, :30] = 0.0
    folder = saved(model, tokenizer, tmp_path / "parent")
    found, _ = pruned(tmp_path, folder, flap, sparsity=0.25, structure="AL-MM", sequences=4)
    assert removed(found) == {"heads": [0, 1], "neurons": [30, 0]}


def test_a_model_that_has_lost_an_attention_is_refused_with_a_sentence(
    tmp_path: Path, tokenizer: Any
) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    folder = saved(shrink(model), tokenizer, tmp_path / "parent")
    for method in (flap, llm_pruner):
        with pytest.raises(AssayError, match="zero-masked form"):
            pruned(tmp_path, folder, method, sparsity=0.5, sequences=4)


def test_a_cut_model_whose_layers_differ_can_be_pruned_on(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :16] = 0.0
    folder = saved(shrink(model), tokenizer, tmp_path / "parent")
    found, stage = pruned(tmp_path, folder, flap, sparsity=0.5, structure="UL-UM", sequences=4)
    assert removed(found) == {"heads": [1, 1], "neurons": [16, 24]} and stage.notes["physical"] is True
    costs = [unit.level("0").cost for unit in built(tmp_path, folder).units]
    assert costs == [1, 16, 1, 24]


def test_a_share_of_each_layer_that_cannot_be_met_is_a_sentence(tmp_path: Path, parent: Path) -> None:
    with pytest.raises(
        AssayError, match=r"of the 2 heads of model\.layers\.0\.self_attn\.o_proj .* 0 and 0\.5"
    ):
        pruned(tmp_path, parent, flap, sparsity=0.3, structure="UL-UM", sequences=4)


@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.9])
def test_any_share_of_all_parameters_is_met_to_the_nearest_neuron(
    tmp_path: Path, parent: Path, sparsity: float
) -> None:
    model, _ = pruned(tmp_path, parent, flap, sparsity=sparsity, sequences=4)
    counts = removed(model)
    assert 16 * sum(counts["heads"]) + sum(counts["neurons"]) == round(160 * sparsity)


# --- LLM-Pruner ----------------------------------------------------------------------------------------------


def test_importance_is_the_one_worked_out_by_hand() -> None:
    """All weights 1: a gradient that is 2 in one entry of a row and -2 in the next cancels in the row alone."""
    model = tiny()
    layer, part = decoder_layers(model)[0], parts(model, "group", "a test")[1]
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    layer.mlp.up_proj.weight.grad[5, :2] = torch.tensor([2.0, -2.0])
    layer.mlp.down_proj.weight.grad[:3, 7] = torch.tensor([1.0, 1.0, -0.5])
    element, vector = (
        llm_pruner.unit_scores(llm_pruner.Config(data=DATA, sparsity=0.5, importance=kind), layer, part)
        for kind in ("element", "vector")
    )
    assert (float(element[5]), float(vector[5])) == (4.0, 0.0)
    assert (float(element[7]), float(vector[7])) == (2.5, 1.5)
    assert float(element.sum()) == 6.5


def test_the_importance_of_a_head_counts_all_its_matrices() -> None:
    model = tiny()
    layer, part = decoder_layers(model)[1], parts(model, "group", "a test")[2]
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    attention = layer.self_attn
    attention.q_proj.weight.grad[20, 0] = 1.0
    attention.k_proj.weight.grad[3, 0] = 2.0
    attention.v_proj.weight.grad[12, 0] = 4.0
    attention.o_proj.weight.grad[0, 15] = 8.0
    scores = llm_pruner.unit_scores(llm_pruner.Config(data=DATA, sparsity=0.5), layer, part)
    assert scores.tolist() == [2.0 + 8.0, 1.0 + 4.0]


def test_the_gradient_is_that_of_the_summed_loss_of_all_sequences() -> None:
    model, sequences = tiny(), [torch.arange(9)[None], torch.arange(40, 45)[None]]
    llm_pruner.add_gradients(model, sequences, Progress(Path("unused"), 0))
    found = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    assert model.model.embed_tokens.weight.grad is None
    model.zero_grad()
    loss = sum(model(tokens, labels=tokens).loss * (tokens.shape[1] - 1) for tokens in sequences)
    loss.backward()
    torch.testing.assert_close(found, model.model.layers[0].mlp.up_proj.weight.grad)


def test_the_middle_blocks_are_the_papers_of_a_large_model_and_all_of_a_small_one() -> None:
    config = llm_pruner.Config(data=DATA, sparsity=0.5)
    assert llm_pruner.block_range(config, 32) == range(4, 30)
    assert llm_pruner.block_range(config, 2) == range(2)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"sparsity": 0.5}, {"heads": [1, 1], "neurons": [24, 24]}),
        ({"sparsity": 0.25, "first": 1}, {"heads": [0, 1], "neurons": [0, 24]}),
        ({"sparsity": 0.25, "end": 1}, {"heads": [1, 0], "neurons": [24, 0]}),
    ],
)
def test_the_share_is_of_the_whole_model_and_the_range_bears_it(
    tmp_path: Path, parent: Path, options: dict[str, Any], counts: dict[str, list[int]]
) -> None:
    model, stage = pruned(tmp_path, parent, llm_pruner, sequences=4, **options)
    assert removed(model) == counts
    assert stage.notes["parameters_physical"] == stage.notes["nonzero_after"]


def test_the_least_important_of_the_whole_range_go_where_that_is_asked_for(
    tmp_path: Path, parent: Path
) -> None:
    model, _ = pruned(tmp_path, parent, llm_pruner, sparsity=0.5, scope="range", sequences=4)
    counts = removed(model)
    assert (sum(counts["heads"]), sum(counts["neurons"])) == (2, NEURONS)
    assert counts["neurons"] != [24, 24]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5, "first": 2}, "no range within the 2 blocks"),
        ({"sparsity": 0.5, "end": 3}, "no range within the 2 blocks"),
        ({"sparsity": 0.75, "first": 1}, "3 heads are to go, but the blocks that are pruned have 2"),
        ({"sparsity": 0.3}, r"of the 4 heads of all layers .* 0\.25 and 0\.5"),
    ],
)
def test_budgets_that_cannot_be_are_sentences(
    tmp_path: Path, parent: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(AssayError, match=words):
        pruned(tmp_path, parent, llm_pruner, sequences=4, **options)


def test_sequences_of_one_token_are_a_sentence() -> None:
    with pytest.raises(AssayError, match="second token"):
        llm_pruner.add_gradients(tiny(), [torch.tensor([[3]])], Progress(Path("unused"), 0))


# --- other models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [flap, llm_pruner])
@pytest.mark.parametrize("kind", ["bfloat16", "harmonic", "biased"])
def test_both_forms_agree_for_other_models_too(
    tmp_path: Path, tokenizer: Any, method: Any, kind: str
) -> None:
    model = tiny(attention_bias=kind == "biased", mlp_bias=kind == "biased")
    if kind == "biased":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.1)
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    if kind == "harmonic":
        model = with_head(model, Component("euclidean", {"exponent": 8}))
    folder = saved(model, tokenizer, tmp_path / "parent")
    found, stage = pruned(tmp_path, folder, method, sparsity=0.5, sequences=4)
    assert stage.notes["physical"] is True and stage.notes["parameters_physical"] < stage.notes["parameters"]
    assert found.config.model_type == model.config.model_type
