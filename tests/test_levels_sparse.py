"""Databases of sparsities: exact steps between levels, what each solver leaves, resuming, and OWL's assignment."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import methods.levels as family
from methods.checkpoint import load_model
from methods.data import Locator
from methods.levels import _sparsity, magnitude, sparsegpt, wanda
from methods.levels._database import Database, Writer
from methods.levels._sparsity import Sparsities, at_precision, ladder, step_of
from methods.progress import Progress
from methods.prune import magnitude as prune_magnitude
from methods.prune import sparsegpt as prune_sparsegpt
from methods.prune import wanda as prune_wanda
from methods.prune._walk import linear_weights
from methods.search import owl
from methods.stage import AssayError, Interrupted, Parent, Stage
from tests import small_models
from tests.small_models import llama, ragged

METHODS = {"sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude}
SMALL: dict[str, Any] = {"sparsity": 0.5, "levels": 2, "weights_step": 20}


def tiny(zeros: float = 0.0) -> Any:
    """A three-layer Llama of whose projections a share is 0."""
    model = llama().requires_grad_(False)
    for name in linear_weights(model):
        weight = model.get_parameter(name)
        weight[torch.rand(weight.shape) < zeros] = 0.0
    return model


GIVEN: Any = SimpleNamespace(windows=lambda *_: ragged(), sequences=lambda *_: ragged())


def config_of(name: str, **options: Any) -> Any:
    data = {} if name == "magnitude" else {"data": "case"}
    return METHODS[name].Config(**SMALL | data | options)


def built(name: str, folder: Path, model: Any = None, **options: Any) -> Database:
    """The database of a method for the tiny model."""
    model = tiny() if model is None else model
    writer = Writer(folder / "files", "sparsity")
    METHODS[name].build(config_of(name, **options), model, GIVEN, Progress(folder / "scratch", 0), writer)
    writer.close(model, {})
    return Database.open(folder / "files", model)


def zeros_of(database: Database) -> dict[str, dict[str, int]]:
    """The zeros of every level, counted in its decoded weight."""
    return {
        unit.name: {name: int((database.weight(unit.name, name) == 0).sum()) for name in unit.names}
        for unit in database.units
    }


# --- ladders --------------------------------------------------------------------------------------------------


def test_a_ladder_by_hand() -> None:
    config = Sparsities(sparsity=0.3, levels=3, weights_step=50)
    # 0.3 * 512 = 153.6: floor(3.07) levels below, floor(7.17) above, cut to 3.
    assert ladder(config, "it", 512, 0, 50, "levels").zeros == {
        -3: 4, -2: 54, -1: 104, 0: 154, 1: 204, 2: 254, 3: 304,
    }  # fmt: skip
    # 0.3 * 128 = 38.4 gives no level below, 0.7 * 128 / 50 one above.
    assert ladder(config, "it", 128, 0, 50, "levels").zeros == {0: 38, 1: 88}
    # Levels with fewer zeros than there are already do not exist.
    assert list(ladder(config, "it", 512, 54, 50, "levels").zeros) == [-2, -1, 0, 1, 2, 3]


def test_a_level_can_be_dense_or_empty() -> None:
    config = Sparsities(sparsity=0.5, levels=8, weights_step=64)
    assert ladder(config, "it", 256, 0, 64, "levels").zeros == {-2: 0, -1: 64, 0: 128, 1: 192, 2: 256}


def test_the_default_step_is_half_the_smaller_part_of_a_square_projection() -> None:
    assert step_of(Sparsities(sparsity=0.7), 4096, "levels") == int(0.5 * 0.3 / 8 * 4096**2)
    assert step_of(Sparsities(sparsity=0.7, weights_step=7), 4096, "levels") == 7


@pytest.mark.parametrize(
    ("options", "zeros", "words"),
    [
        ({"sparsity": 0.01}, 0.0, "less than one weight apart in a model of width 16"),
        ({"sparsity": 0.2, "weights_step": 5}, 0.5, "more than the .* of sparsity=0.2"),
    ],
)
def test_levels_that_cannot_be_are_a_sentence(
    options: dict[str, Any], zeros: float, words: str, tmp_path: Path
) -> None:
    for name in METHODS:
        with pytest.raises(AssayError, match=rf"levels.{name}: .*{words}"):
            built(name, tmp_path, tiny(zeros), **{"levels": 8, "weights_step": None} | options)


# --- what is built ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sparsity", [0.5, 0.37])
def test_one_step_down_pays_exactly_for_one_step_up(name: str, sparsity: float, tmp_path: Path) -> None:
    small_blocks = {"block": 5} if name == "sparsegpt" else {}
    database = built(name, tmp_path, sparsity=sparsity, weights_step=13, **small_blocks)
    for unit, counted in zip(database.units, zeros_of(database).values(), strict=True):
        middle = round(unit.rows * unit.columns * sparsity)
        assert counted == {str(offset): middle + 13 * offset for offset in (-2, -1, 0, 1, 2)}
        assert {level.name: level.cost for level in unit.levels} == counted
        assert [level.share for level in unit.levels] == [
            level.cost / unit.rows / unit.columns for level in unit.levels
        ]
        assert unit.budget == "weights" and unit.name.startswith(f"model.layers.{unit.block}.")
    changed = database.uniform() | {database.units[0].name: "-2", database.units[-1].name: "2"}
    assert database.spent(changed) == database.spent(database.uniform())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("error_propagation", ["none", "uniform"])
def test_the_model_is_left_as_it_was_bit_for_bit(name: str, error_propagation: str, tmp_path: Path) -> None:
    model, before = tiny(), tiny().state_dict()
    built(name, tmp_path, model, **({} if name == "magnitude" else {"error_propagation": error_propagation}))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_zeros_of_the_parent_stay_at_every_level(name: str, tmp_path: Path) -> None:
    model = tiny(0.3)
    database = built(name, tmp_path, model)
    for unit in database.units:
        dense = model.get_parameter(f"{unit.name}.weight")
        for level in unit.levels:
            assert bool((database.weight(unit.name, level.name)[dense == 0] == 0).all())
            assert level.cost >= int((dense == 0).sum())


def test_the_parents_zeros_may_be_filled_where_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny(0.3)
    database = built("sparsegpt", tmp_path, model, keep_zeros=False, block=4)
    filled = [
        bool((database.weight(unit.name, "0")[model.get_parameter(f"{unit.name}.weight") == 0] != 0).any())
        for unit in database.units
    ]
    assert any(filled)
    assert all(
        counted == {level.name: level.cost for level in unit.levels}
        for unit, counted in zip(database.units, zeros_of(database).values(), strict=True)
    )


def test_a_dense_level_is_the_dense_weight_and_an_empty_one_is_zero(tmp_path: Path) -> None:
    model = tiny()
    database = built("sparsegpt", tmp_path, model, levels=8, weights_step=64)
    unit = database.unit("model.layers.1.self_attn.o_proj")
    assert unit.names == ("-2", "-1", "0", "1", "2")
    assert torch.equal(database.weight(unit.name, "-2"), model.get_parameter(f"{unit.name}.weight"))
    assert not bool(database.weight(unit.name, "2").any())


def test_magnitude_and_wanda_only_remove_and_each_level_contains_the_one_below(tmp_path: Path) -> None:
    model = tiny()
    for name in ("magnitude", "wanda"):
        database = built(name, tmp_path / name, model)
        for unit in database.units:
            weights = [database.weight(unit.name, level) for level in unit.names]
            dense = model.get_parameter(f"{unit.name}.weight")
            assert all(torch.equal(weight[weight != 0], dense[weight != 0]) for weight in weights)
            for less, more in pairwise(weights):
                assert bool((more[less == 0] == 0).all())


def test_levels_by_magnitude_are_those_of_the_pruner(tmp_path: Path) -> None:
    model = tiny()
    database = built("magnitude", tmp_path, model)
    for unit in database.units:
        dense = model.get_parameter(f"{unit.name}.weight")
        for level in unit.levels:
            mask = prune_magnitude.mask(prune_magnitude.Config(sparsity=level.share), dense)
            assert torch.equal(database.weight(unit.name, level.name), dense.masked_fill(mask, 0.0))


def test_wandas_rows_differ_by_one_at_most(tmp_path: Path) -> None:
    database = built("wanda", tmp_path)
    for unit in database.units:
        for level in unit.names:
            rows = (database.weight(unit.name, level) == 0).sum(dim=1)
            assert int(rows.max() - rows.min()) <= 1


def test_the_first_block_at_level_0_is_what_the_pruners_make_of_it(tmp_path: Path) -> None:
    """Behind it the levels see dense activations and the pruners pruned ones, unless errors are passed on."""
    for name, pruner in (("sparsegpt", prune_sparsegpt), ("wanda", prune_wanda)):
        expected: Any = tiny()
        options: Any = {"data": "case", "sparsity": 0.5}
        pruner.prune(pruner.Config(**options), expected, GIVEN, Progress(tmp_path / name, 0))
        apart = built(name, tmp_path / f"{name}-none")
        behind = built(name, tmp_path / f"{name}-uniform", error_propagation="uniform")
        for unit in apart.units:
            weight = expected.get_parameter(f"{unit.name}.weight")
            torch.testing.assert_close(behind.weight(unit.name, "0"), weight, atol=1e-5, rtol=0)
            assert torch.equal(apart.weight(unit.name, "0"), behind.weight(unit.name, "0")) == (
                unit.block == 0
            )


def test_levels_solved_a_few_at_a_time_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = built("sparsegpt", tmp_path / "together")
    monkeypatch.setattr(sparsegpt, "SIDE_BY_SIDE_BYTES", 1)
    apart = built("sparsegpt", tmp_path / "apart")
    for unit in together.units:
        for level in unit.names:
            one, two = together.weight(unit.name, level), apart.weight(unit.name, level)
            assert torch.equal(one == 0, two == 0)
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_blocks_that_are_rounded_one_by_one_must_have_equal_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"threshold": "block", "block": 8, "sparsity": 0.51, "levels": 1}
    # 16 rows: blocks of 128 weights, 65.28 of them; one step of 16 is 8 in each.
    database = built("sparsegpt", tmp_path / "even", weights_step=48, **options)
    assert database.unit("model.layers.0.self_attn.q_proj").level("0").cost == 2 * 65
    with pytest.raises(AssayError, match=r"no search could keep to a budget. threshold=\"block\""):
        built("sparsegpt", tmp_path / "odd", weights_step=13, **options)


@pytest.mark.parametrize("saved", ["float16", "bfloat16"])
def test_rounding_what_is_saved_adds_no_zeros(saved: str, tmp_path: Path) -> None:
    model = tiny()
    for name in linear_weights(model):
        model.get_parameter(name).mul_(1e-7)
    database = built("magnitude", tmp_path, model, saved=saved)
    assert all(
        counted == {level.name: level.cost for level in unit.levels}
        for unit, counted in zip(database.units, zeros_of(database).values(), strict=True)
    )


def test_what_would_round_to_zero_becomes_the_smallest_number_of_its_sign() -> None:
    weight = torch.tensor([[1e-9, -1e-9, 0.0, 1.0]])
    stored = at_precision(weight, weight == 0, "float16")
    assert stored.dtype == torch.float16
    assert stored.tolist() == [[2.0**-24, -(2.0**-24), 0.0, 1.0]]


# --- killed and gone on with --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error_propagation", ["none", "uniform"])
def test_a_killed_build_goes_on_with_the_same_bits(error_propagation: Any, tmp_path: Path) -> None:
    whole = built("sparsegpt", tmp_path / "whole", error_propagation=error_propagation)
    config, writer = (
        config_of("sparsegpt", error_propagation=error_propagation),
        Writer(tmp_path / "files", "sparsity"),
    )
    progress = Progress(tmp_path / "scratch", 0)
    progress.stopping = True
    with pytest.raises(Interrupted):
        sparsegpt.build(config, tiny(), GIVEN, progress, writer)
    done = [unit.name for unit in whole.units if writer.finished(unit.name)]
    assert len(done) == 7 and all(".0." in name for name in done)
    # A kill may also come inside a block.
    (tmp_path / "files" / "model.layers.0.mlp.up_proj.safetensors").unlink()
    sparsegpt.build(config, tiny(), GIVEN, Progress(tmp_path / "scratch", 0), writer)
    writer.close(tiny(), {})
    for path in sorted((tmp_path / "whole" / "files").iterdir()):
        assert (tmp_path / "files" / path.name).read_bytes() == path.read_bytes()


def staged(tmp_path: Path, method: str, config: Any, **parents: Path) -> Stage:
    """A stage as the runner makes it."""
    folder = tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    model = tmp_path / "model"
    if not model.is_dir():
        small_models.save(model)
    progress = Progress(folder / "scratch", 0)
    return Stage(f"{method}-0", method, config, 0, {"model": model, **parents}, folder, progress, Locator())


DATA = "authors/forget10[0:12]"


def test_a_stage_notes_what_it_measured_on(tmp_path: Path) -> None:
    config = sparsegpt.Config(data=DATA, sparsity=0.5, calibration_tokens=200, context_tokens=64, levels=2)
    stage = staged(tmp_path, "levels.sparsegpt", config)
    family.run(stage, sparsegpt)
    assert 200 <= stage.notes["calibration_tokens"] < 264
    assert (stage.notes["units"], stage.notes["levels"]) == (14, 70)


def test_too_few_calibration_tokens_are_a_sentence(tmp_path: Path) -> None:
    config = sparsegpt.Config(data=DATA, sparsity=0.5, calibration_tokens=100_000, context_tokens=64)
    with pytest.raises(AssayError, match="100000 calibration tokens are asked for"):
        family.run(staged(tmp_path, "levels.sparsegpt", config), sparsegpt)


# --- OWL ------------------------------------------------------------------------------------------------------------


def test_the_outlier_ratio_pools_the_layers_of_a_block() -> None:
    # Mean 2; above 2 * 2 lie 5 and 6 of ten.
    scores = [torch.tensor([[1.0, 1.0], [1.0, 5.0]]), torch.tensor([[1.0, 1.0, 1.0], [6.0, 1.0, 2.0]])]
    assert owl.outlier_ratio(scores, 2.0) == pytest.approx(0.2)
    assert owl.outlier_ratio(scores, 5.0) == 0.0


def test_blocks_with_outliers_keep_more_and_the_mean_stays() -> None:
    # Brackets 0, 0.08, 0.16 with mean 0.08.
    assert owl.shifts([0.1, 0.2, 0.3], 0.08) == pytest.approx([0.08, 0.0, -0.08])
    assert owl.shifts([0.2, 0.2], 0.08) == [0.0, 0.0]


def test_owl_meets_the_budget_exactly_and_spares_the_block_with_outliers(tmp_path: Path) -> None:
    import methods.search as searches

    levels = staged(tmp_path, "levels.magnitude", magnitude.Config(sparsity=0.5, weights_step=4))
    family.run(levels, magnitude)
    config = owl.Config(
        levels=Parent("levels"), data=DATA, sequences=4, context_tokens=64, outlier_factor=3.0
    )
    stage = staged(tmp_path, "search.owl", config, levels=levels.folder / "files")
    searches.run(stage, owl)
    database = Database.open(levels.folder / "files", load_model(tmp_path / "model", dtype="float32"))
    chosen = stage.notes["assignment"]
    assert database.spent(chosen) == database.spent(database.uniform()) == stage.notes["spent"]
    ratios = owl.outlier_ratios(config, searches.Problem(stage))
    spared = max(range(2), key=ratios.__getitem__)
    offsets = [
        sum(int(level) for name, level in chosen.items() if f".{block}." in name) for block in range(2)
    ]
    assert offsets[spared] < 0 < offsets[1 - spared]


def test_ladders_cover_every_linear_layer_of_the_decoder() -> None:
    model = tiny()
    found = _sparsity.ladders(magnitude.Config(**SMALL), model, "levels.magnitude")
    assert [f"{unit}.weight" for unit in found] == list(linear_weights(model))
