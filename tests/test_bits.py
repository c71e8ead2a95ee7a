"""Quantisation: grids and the solver worked out by hand, sizes, level databases of bit-widths, and their allocation."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import methods.levels
import methods.prune
import methods.search
from methods.checkpoint import load_model
from methods.data import Locator
from methods.find import catalogue
from methods.levels import gptq as levels_gptq
from methods.levels import rtn as levels_rtn
from methods.levels._database import Database
from methods.progress import Progress
from methods.prune import gptq, rtn
from methods.prune._gptq import Settings, invert, solve
from methods.prune._grids import Grid, nearest, stored_bits
from methods.prune._walk import linear_weights
from methods.search import layerwise
from methods.search._assignment import read
from methods.stage import AssayError, Interrupted, Parent, Stage
from tests import generic, small_models
from tests.benchmarks.local_pruners import plain_gptq

DATA = "authors/forget10"


def row(*weights: float) -> Tensor:
    return torch.tensor([weights])


def moments(columns: int, tokens: int = 200) -> Tensor:
    """A Hessian [in,in] of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return inputs.T @ inputs


def drawn(rows: int, columns: int, zeros: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < zeros, 0.0)


def output_error(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    return float(((weight - found) @ hessian * (weight - found)).sum())


# --- grids --------------------------------------------------------------------------------------------------------


def test_the_official_grid_by_hand() -> None:
    # lo = -2, hi = 4: scale 2 and zero point 1
    found = nearest(row(-2, 0.9, 2.1, 4), Grid(), 2, None)
    assert (found.scale.item(), found.zero.item()) == (2.0, 1.0)
    assert found.codes.tolist() == [[0, 1, 2, 3]]
    assert found.weight().tolist() == [[-2.0, 0.0, 2.0, 4.0]]


def test_the_evopress_grid_leaves_0_out_and_the_official_one_does_not() -> None:
    weight = row(4, 5, 6, 7)
    evopress = nearest(weight, Grid("evopress"), 2, None)
    assert (evopress.scale.item(), evopress.zero.item()) == (1.0, -4.0)
    assert evopress.weight().equal(weight)
    torch.testing.assert_close(nearest(weight, Grid(), 2, None).weight(), row(14, 14, 21, 21) / 3)


def test_evopress_rounds_with_the_zero_point_and_the_official_code_without() -> None:
    # 1 / 2 lies between two codes: to the even 0 without the zero point 1, to the even 2 with it
    weight = row(-2, 1, 0, 4)
    assert nearest(weight, Grid(), 2, None).codes.tolist() == [[0, 1, 1, 3]]
    assert nearest(weight, Grid("evopress"), 2, None).codes.tolist() == [[0, 2, 1, 3]]


@pytest.mark.parametrize("kind", ["official", "evopress"])
def test_a_symmetric_grid_is_as_long_below_0_as_above_it(kind: Any) -> None:
    # the range is -3 to 3: scale 2, and code 2 for 0
    found = nearest(row(2.2, 1.2, 0.4, 0, 3), Grid(kind, symmetric=True), 2, None)
    assert (found.scale.item(), found.zero.item()) == (2.0, 2.0)
    assert found.weight()[0, :4].tolist() == [2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["official", "evopress"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_equal_weights_is_no_division_by_0(kind: Any, symmetric: bool) -> None:
    found = nearest(torch.tensor([[5.0, 5.0], [0.0, 0.0]]), Grid(kind, symmetric), 8, None).weight()
    torch.testing.assert_close(found[0], torch.tensor([5.0, 5.0]), rtol=0.01, atol=0.0)
    assert found[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["official", "evopress"])
@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_have_a_code_on_every_grid(kind: Any, scales: Any, symmetric: bool) -> None:
    weight = drawn(40, 24, zeros=0.3)
    weight[:20] = weight[:20].abs()
    for bits in (2, 3, 8):
        found = nearest(weight, Grid(kind, symmetric, scales), bits, 8)
        assert bool((found.weight()[weight == 0] == 0).all())


def test_scales_are_rounded_before_weights_are() -> None:
    weight = drawn(6, 16)
    found = nearest(weight, Grid(scales="float16"), 4, 8)
    assert found.scale.equal(found.scale.half().float())
    steps = (weight / found.scale[:, found.group_of]).round() + found.zero[:, found.group_of]
    assert found.codes.float().equal(steps.clamp(0, 15))


def test_weights_too_large_for_the_scales_are_a_sentence() -> None:
    with pytest.raises(AssayError, match="not finite in float16"):
        nearest(row(-1e6, 1e6), Grid(scales="float16"), 2, None)
    assert nearest(row(-1e6, 1e6), Grid(scales="float32"), 2, None).scale.item() > 6e5


def test_every_group_has_its_scale_and_the_last_may_be_shorter() -> None:
    weight = row(0, 3, 0, 30, 0, 300)
    assert nearest(weight, Grid(), 2, 2).weight().equal(weight)
    assert nearest(weight, Grid(), 2, 4).scale.tolist() == [[10.0, 100.0]]
    assert nearest(weight, Grid(), 2, 4).group_of.tolist() == [0, 0, 0, 0, 1, 1]
    assert nearest(weight, Grid(), 2, 99).scale.equal(nearest(weight, Grid(), 2, None).scale)


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "columns", "symmetric", "expected"),
    [
        (4, 128, 4096, False, 4.15625),
        (3, 128, 4096, False, 3.1484375),
        (4, 128, 4096, True, 4.125),
        (4, 32, 4096, True, 4.5),
        (4, None, 4096, True, 4.00390625),
        (4, 4, 10, True, 4 + 3 * 16 / 10),
    ],
)
def test_bits_per_weight_count_scales_and_zero_points(
    bits: int, group: int | None, columns: int, symmetric: bool, expected: float
) -> None:
    assert stored_bits(1, columns, bits, group, symmetric) / columns == expected


def test_an_evopress_zero_point_is_stored_like_a_scale() -> None:
    assert Grid("evopress", scales="float16").stored_bits(2, 128, 3, 128) == 2 * (128 * 3 + 32)
    assert Grid("official", scales="float16").stored_bits(2, 128, 3, 128) == 2 * (128 * 3 + 19)
    assert Grid("evopress", True, "float16").stored_bits(2, 128, 3, 128) == 2 * (128 * 3 + 16)


def test_groups_in_another_order_need_a_number_for_every_input() -> None:
    plain = stored_bits(8, 64, 4, 16, False)
    assert stored_bits(8, 64, 4, 16, False, indices=True) == plain + 64 * 32
    assert stored_bits(8, 64, 4, None, False, indices=True) == stored_bits(8, 64, 4, None, False)


# --- the solver ---------------------------------------------------------------------------------------------------


def test_an_error_is_mended_in_the_next_column_by_hand() -> None:
    # H^-1 of the first two inputs is [[2, -1], [-1, 2]] / 3, so that U_12 / U_11 = -1/2: rounding 0.4 down to 0 adds
    # 0.4 / 2 to the second weight, and 1.4 + 0.2 rounds to 2.
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    weight = row(0.4, 1.4, 3.0)
    found = solve(weight, invert(hessian, 1e-6), Settings(Grid()), [2])[2]
    assert found.weight().tolist() == [[0.0, 2.0, 3.0]]
    assert nearest(weight, Grid(), 2, None).weight().tolist() == [[0.0, 1.0, 3.0]]


@pytest.mark.parametrize("group", [None, 8, 12, 40, 100])
@pytest.mark.parametrize("block", [8, 16, 128])
def test_results_are_those_of_the_plain_loop(group: int | None, block: int) -> None:
    weight, inverse = drawn(24, 40), invert(moments(40), 0.01)
    found = solve(weight, inverse, Settings(Grid(), group, block), (2, 3, 4))
    for bits, level in found.items():
        plain = plain_gptq(weight, inverse.factor, bits, group, block)
        # another code would be a tenth away; in one block the operations are the same, one by one
        torch.testing.assert_close(level.weight(), plain, rtol=0.0, atol=0.0 if block > 40 else 1e-5)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}])
def test_bit_widths_side_by_side_are_those_solved_one_by_one(
    options: dict[str, bool], monkeypatch: Any
) -> None:
    weight, settings = drawn(9, 20, zeros=0.2), Settings(Grid("evopress"), 8, 4, **options)
    inverse = invert(moments(20), 0.01, settings.act_order)
    together = solve(weight, inverse, settings, (2, 3, 5))
    monkeypatch.setattr("methods.prune._gptq.MOST_NUMBERS", 1)
    for bits, level in solve(weight, inverse, settings, (2, 3, 5)).items():
        assert level.codes.equal(together[bits].codes)
        torch.testing.assert_close(level.weight(), together[bits].weight(), rtol=0.0, atol=1e-5)


def test_outputs_are_nearer_than_those_of_rounding_to_nearest() -> None:
    weight, hessian = drawn(16, 32), moments(32)
    for bits in (2, 3, 4):
        mended = solve(weight, invert(hessian, 0.01), Settings(Grid(), 16), [bits])[bits].weight()
        rounded = nearest(weight, Grid(), bits, 16).weight()
        assert output_error(weight, mended, hessian) < 0.8 * output_error(weight, rounded, hessian)


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("static", [False, True])
def test_act_order_is_undone(group: int | None, static: bool) -> None:
    weight, hessian = (
        drawn(12, 32),
        moments(32) * torch.linspace(1, 30, 32).sqrt().outer(torch.linspace(1, 30, 32).sqrt()),
    )
    inverse = invert(hessian, 0.01, act_order=True)
    settings = Settings(Grid(), group, 8, act_order=True, static_groups=static and group is not None)
    found = solve(weight, inverse, settings, [8])[8]
    # the order is another one, and yet every weight is in its place
    assert inverse.order is not None and not inverse.order.equal(torch.arange(32))
    assert float((found.weight() - weight).abs().max()) < 0.1
    assert float((found.weight() - weight[:, inverse.order]).abs().max()) > 1.0
    consecutive = torch.arange(32) // (group or 32)
    assert found.group_of.equal(consecutive) == (static or group is None)


def test_act_order_is_the_plain_solve_of_permuted_columns() -> None:
    weight, hessian = drawn(6, 16), moments(16)
    ordered = invert(hessian, 0.01, act_order=True)
    assert ordered.order is not None
    permuted = hessian[ordered.order][:, ordered.order]
    plain = solve(weight[:, ordered.order], invert(permuted, 0.01), Settings(Grid(), 4), [3])[3]
    found = solve(weight, ordered, Settings(Grid(), 4, act_order=True), [3])[3]
    assert found.weight()[:, ordered.order].equal(plain.weight())


@pytest.mark.parametrize("kind", ["official", "evopress"])
@pytest.mark.parametrize("group", [None, 8])
def test_zeros_stay_and_what_they_cost_is_mended(kind: Any, group: int | None) -> None:
    weight, hessian = drawn(16, 32, zeros=0.5), moments(32)
    inverse, zeros = invert(hessian, 0.01), drawn(16, 32, zeros=0.5) == 0
    kept = solve(weight, inverse, Settings(Grid(kind), group), [3])[3].weight()
    filled = solve(weight, inverse, Settings(Grid(kind), group, keep_zeros=False), [3])[3].weight()
    assert bool((kept[zeros] == 0).all())
    assert not bool((filled[zeros] == 0).all())
    masked = output_error(weight, filled.masked_fill(zeros, 0.0), hessian)
    assert output_error(weight, kept, hessian) < masked


def test_inputs_that_are_always_0_lose_their_weights_after_the_scale_of_whole_rows_is_fitted() -> None:
    hessian = moments(8)
    hessian[3] = hessian[:, 3] = 0.0
    weight = drawn(4, 8)
    weight[:, 3] = 100.0
    inverse = invert(hessian, 0.01)
    official = solve(weight, inverse, Settings(Grid()), [8])[8]
    assert bool((official.weight()[:, 3] == 0).all())
    assert bool((official.scale > 100 / 255).all())
    for settings in (Settings(Grid("evopress")), Settings(Grid(), 8)):
        assert bool((solve(weight, inverse, settings, [8])[8].scale < 0.1).all())


# --- stages -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save(tmp_path_factory.mktemp("parent") / "model")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, parent: Path) -> Path:
    """The same with a third of the weights of every projection zero."""
    model = load_model(parent, dtype="float32")
    for name in linear_weights(model):
        weight = model.get_parameter(name).data
        weight.masked_fill_(weight.abs() <= weight.abs().flatten().kthvalue(weight.numel() // 3).values, 0.0)
    folder = small_models.save(tmp_path_factory.mktemp("sparse") / "model")
    model.save_pretrained(folder)
    return folder


def staged(name: str, tmp_path: Path, parents: dict[str, Path], scratch: str = "", **options: Any) -> Stage:
    """A stage of a method with these options."""
    config = catalogue().method(name).load().Config(**options)
    folder = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    progress = Progress(tmp_path / (scratch or f"{folder.name}-scratch"), 0, save_seconds=3600)
    return Stage(f"{name}-0", name, config, 0, parents, folder, progress, Locator())


def done(
    family: ModuleType, name: str, tmp_path: Path, parents: dict[str, Path], **options: Any
) -> tuple[Path, Stage]:
    """Run a stage; its folder."""
    stage = staged(name, tmp_path, parents, **options)
    family.run(stage, catalogue().method(name).load())
    return stage.folder, stage


CALIBRATION = {"data": DATA, "context_tokens": 32}


@pytest.mark.parametrize("name", ["prune.gptq", "prune.rtn"])
def test_the_chain_form_is_on_its_grid_and_its_size_is_noted(name: str, tmp_path: Path, sparse: Path) -> None:
    calibration = CALIBRATION | {"sequences": 4} if name == "prune.gptq" else {}
    folder, stage = done(methods.prune, name, tmp_path, {"model": sparse}, bits=2, group=8, **calibration)
    before, after = load_model(sparse, dtype="float32"), load_model(folder / "model", dtype="float32")
    for parameter in linear_weights(before):
        weight = after.get_parameter(parameter).data
        for piece in weight.split(8, dim=1):
            assert all(len(numbers.unique()) <= 4 for numbers in piece)
        assert bool((weight[before.get_parameter(parameter) == 0] == 0).all())
    assert stage.notes["physical"] is False
    # 2 bits, and for every 8 inputs 16 bits of scale and 2 of zero point
    assert stage.notes["bits_per_weight"] == 2 + 18 / 8
    assert set(stage.notes["bits_per_weight_layers"].values()) == {2 + 18 / 8}
    assert len(stage.notes["bits_per_weight_layers"]) == 14
    inner = sum(before.get_parameter(name).numel() for name in linear_weights(before))
    everything = sum(parameter.numel() for parameter in before.parameters())
    expected = (4.25 * inner + 16 * (everything - inner)) / everything
    assert stage.notes["bits_per_weight_model"] == pytest.approx(expected)


@pytest.mark.parametrize(("static", "more"), [(True, 0.0), (False, 2.0)])
def test_act_order_without_static_groups_counts_the_group_numbers(
    tmp_path: Path, parent: Path, static: bool, more: float
) -> None:
    options = CALIBRATION | {"group": 8, "act_order": True, "static_groups": static, "sequences": 4}
    _, stage = done(methods.prune, "prune.gptq", tmp_path, {"model": parent}, **options)
    queries = stage.notes["bits_per_weight_layers"]["model.layers.0.self_attn.q_proj"]
    # 32 bits for every input of 16 outputs
    assert queries == 4 + 20 / 8 + more


@pytest.mark.parametrize("grid", ["official", "evopress"])
@pytest.mark.parametrize("group", [None, 8, 9])
def test_levels_are_stored_as_they_were_solved(
    tmp_path: Path, sparse: Path, group: int | None, grid: Any
) -> None:
    options = CALIBRATION | {"calibration_tokens": 100, "bits": (4, 2), "loaded": 2}
    folder, stage = done(
        methods.levels, "levels.gptq", tmp_path, {"model": sparse}, group=group, grid=grid, **options
    )
    model = load_model(sparse, dtype="float32")
    database = Database.open(folder / "files", model)
    assert stage.notes["levels"] == 28
    for unit in database.units:
        dense = model.get_parameter(f"{unit.name}.weight")
        assert unit.names == ("2", "4") and unit.budget == "weights"
        for level in unit.levels:
            bits = int(level.name)
            assert level.cost == bits * dense.numel()
            zero = 16 if grid == "evopress" else bits
            whole = stored_bits(1, unit.columns, bits, group, False, zero_bits=zero)
            assert level.share == whole / unit.columns
            assert bool((database.weight(unit.name, level.name)[dense == 0] == 0).all())
    first = solve_first_layer(stage, model)
    assert database.weight("model.layers.0.self_attn.q_proj", "2").equal(first)


def solve_first_layer(stage: Stage, model: Any) -> Tensor:
    """The first block's queries at 2 bits, worked out from the sequences that the stage drew."""
    from methods.prune import Calibration
    from methods.prune._hessian import block_grams
    from methods.prune._walk import walk

    sequences = Calibration(stage).windows(DATA, 100, 32)
    with torch.no_grad():
        block = next(walk(model, sequences))
        gram = block_grams(block)["self_attn.q_proj"]
        weight = block.linears()["self_attn.q_proj"].weight.data
        return solve(weight, invert(gram.hessian(), 0.01), stage.config.settings, [2])[2].weight()


def test_later_blocks_see_the_errors_of_the_bits_that_are_loaded(tmp_path: Path, parent: Path) -> None:
    options = CALIBRATION | {"calibration_tokens": 100, "bits": (2, 6), "group": 8}
    found = []
    for loaded in (2, 6):
        folder, _ = done(methods.levels, "levels.gptq", tmp_path, {"model": parent}, loaded=loaded, **options)
        found.append(Database.open(folder / "files"))
    for unit in found[0].units:
        same = all(one.equal(two) for one, two in _levels(unit, *found))
        assert same == (unit.block == 0)


def _levels(unit: Any, one: Database, two: Database) -> list[tuple[Tensor, Tensor]]:
    return [(one.weight(unit.name, level), two.weight(unit.name, level)) for level in unit.names]


def test_a_database_that_was_interrupted_is_the_one_of_an_undisturbed_run(
    tmp_path: Path, parent: Path, monkeypatch: Any
) -> None:
    options = CALIBRATION | {"calibration_tokens": 100, "bits": (2, 3), "group": 8}
    whole, _ = done(methods.levels, "levels.gptq", tmp_path, {"model": parent}, **options)
    first = staged("levels.gptq", tmp_path, {"model": parent}, "shared", **options)

    def stop(layers: int) -> None:
        if layers == 9:
            raise Interrupted("asked to stop in the second block")

    monkeypatch.setattr(first.progress, "stop_if_asked", stop)
    with pytest.raises(Interrupted):
        methods.levels.run(first, levels_gptq)
    second = staged("levels.gptq", tmp_path, {"model": parent}, "shared", **options)
    methods.levels.run(second, levels_gptq)
    assert second.notes["resumed_from_step"] == 9
    assert {path.name: path.read_bytes() for path in (second.folder / "files").iterdir()} == {
        path.name: path.read_bytes() for path in (whole / "files").iterdir()
    }


def test_levels_by_rounding_are_those_of_prune_rtn(tmp_path: Path, parent: Path) -> None:
    options: dict[str, Any] = {"group": 8, "grid": "evopress"}
    folder, _ = done(methods.levels, "levels.rtn", tmp_path, {"model": parent}, bits=(3, 5), **options)
    model = load_model(parent, dtype="float32")
    database = Database.open(folder / "files", model)
    for bits in (3, 5):
        config = rtn.Config(bits=bits, **options)
        for unit in database.units:
            weight = model.get_parameter(f"{unit.name}.weight").data
            assert database.weight(unit.name, str(bits)).equal(rtn.rounded(config, weight))


# --- layer-wise allocation ----------------------------------------------------------------------------------------


def test_similarity_by_hand() -> None:
    before, after = [torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])], [torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])]
    assert layerwise.similarity(before, after, "token") == pytest.approx(0.5)
    assert layerwise.similarity(before, after, "mean") == pytest.approx(0.5**0.5)


def test_the_share_far_above_the_mean_by_hand() -> None:
    # mean 1, standard deviation 2: of 5 weights only the 5 lies above 3
    assert layerwise.share_far_above([torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])]) == 0.2


def test_the_lowest_scores_are_lowered_first() -> None:
    assert layerwise.lowest([-0.2, -0.9, -0.5], 2) == [1, 2]
    with pytest.raises(AssayError, match="has 3 blocks"):
        layerwise.lowest([0.0, 0.0, 0.0], 4)


@pytest.mark.parametrize("score", ["lim", "zd"])
def test_lowered_blocks_get_few_bits_in_all_their_layers(tmp_path: Path, parent: Path, score: Any) -> None:
    files, _ = done(methods.levels, "levels.rtn", tmp_path, {"model": parent}, bits=(2, 4))
    options = CALIBRATION | {"levels": Parent("levels"), "lowered": 1, "score": score, "sequences": 4}
    parents = {"model": parent, "levels": files / "files"}
    folder, stage = done(methods.search, "search.layerwise", tmp_path, parents, **options)
    assignment = read(folder / "files")
    (lowered,) = assignment.about["lowered"]
    scores = assignment.about["scores"]
    assert scores[lowered] == min(scores)
    for name, level in assignment.levels.items():
        assert level == ("2" if f"layers.{lowered}." in name else "4")
    inner = sum(parameter.numel() for parameter in _matrices(parent)) // 2
    assert stage.notes["spent"] == {"weights": 2 * inner + 4 * inner}


def _matrices(folder: Path) -> list[Tensor]:
    model = load_model(folder, dtype="float32")
    return [model.get_parameter(name) for name in linear_weights(model)]


def test_levels_of_another_kind_or_without_these_bits_are_a_sentence(tmp_path: Path, parent: Path) -> None:
    files, _ = done(methods.levels, "levels.rtn", tmp_path, {"model": parent}, bits=(3, 4))
    options = CALIBRATION | {"levels": Parent("levels"), "lowered": 1, "sequences": 2}
    parents = {"model": parent, "levels": files / "files"}
    with pytest.raises(AssayError, match="has no level '2'"):
        done(methods.search, "search.layerwise", tmp_path, parents, **options)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (gptq, {"data": DATA, "static_groups": True}, "give group=128"),
        (levels_gptq, {"data": DATA, "bits": (2, 4)}, "loaded=3 .* must be one of"),
        (levels_gptq, {"data": DATA, "bits": (3, 3)}, "each of them once"),
        (levels_rtn, {"bits": ()}, "must name bit-widths"),
        (layerwise, {"levels": Parent("levels"), "lowered": 1, "low": 4, "high": 4}, "must be fewer"),
        (layerwise, {"levels": Parent("levels"), "lowered": 1}, "is measured on data: name a data set"),
    ],
)
def test_a_contradiction_is_a_sentence(method: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(AssayError, match=words):
        method.Config(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prune.rtn", {"bits": 9}),
        ("prune.rtn", {"bits": 1}),
        ("prune.gptq", {"data": DATA, "group": 0}),
        ("levels.rtn", {"bits": (2, 16)}),
        ("levels.gptq", {"data": DATA, "relative_damping": 0.0}),
    ],
)
def test_a_number_out_of_range_is_refused_by_the_planner(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(AssayError, match=f"{name}.*{list(options)[-1]}"):
        generic.resolved(catalogue().method(name), options)


def test_too_few_calibration_tokens_are_a_sentence(tmp_path: Path, parent: Path) -> None:
    with pytest.raises(AssayError, match="100000000 calibration tokens are asked for"):
        done(
            methods.levels,
            "levels.gptq",
            tmp_path,
            {"model": parent},
            **CALIBRATION,
            calibration_tokens=100_000_000,
        )
