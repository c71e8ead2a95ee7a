"""Assignments of levels: their file, budgets met exactly, the model that one stands for, and the shorthands."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import methods.prune as family
from methods.checkpoint import load_model
from methods.data import Locator, Style, train_tokenizer
from methods.find import catalogue
from methods.levels._database import Database, Level, Unit, Writer
from methods.levels._encodings import Encoded, encode_codes, encode_columns, encode_sparse
from methods.progress import Progress
from methods.prune import assigned
from methods.search._assignment import Assignment, least, nearest_levels, read
from methods.stage import AssayError, From, NotFinite, Parent, Stage, Step
from tests.generic import usual
from tests.test_prune import DATA, saved, tiny

ALL = "weights"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(Locator(), [DATA], 300)


# --- meeting budgets ----------------------------------------------------------------------------------------------


def unit(name: str, costs: list[int], budget: str = ALL) -> Unit:
    levels = tuple(Level(str(number), cost, 0.0) for number, cost in enumerate(costs))
    return Unit(name, 0, budget, 4, 4, levels)


def database(*units: Unit) -> Database:
    return Database(Path("nowhere"), "sparsity", units, {})


def test_wanted_costs_are_rounded_so_that_the_budget_is_met_exactly() -> None:
    # wanted 2.9 and 3.1 of levels 0, 2, 4: alone they would both take 2 or 4; 6 in all needs one of each
    found = nearest_levels(
        database(unit("a", [0, 2, 4]), unit("b", [0, 2, 4])), {"a": 2.9, "b": 3.1}, {ALL: 6}
    )
    assert found == {"a": "1", "b": "2"}


def test_budgets_are_kept_apart() -> None:
    both = database(unit("a", [0, 1], "heads"), unit("b", [0, 5], "neurons"), unit("c", [0, 1], "heads"))
    wanted = {"a": 0.0, "b": 0.0, "c": 1.0}
    assert nearest_levels(both, wanted, {"heads": 1, "neurons": 5}) == {"a": "0", "b": "1", "c": "1"}
    with pytest.raises(AssayError, match="nothing is said about the budget of neurons"):
        nearest_levels(both, wanted, {"heads": 1})


@pytest.mark.parametrize("at_most", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_least_sum_is_that_of_trying_everything(seed: int, at_most: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    units = [
        unit(name, sorted({0, *torch.randint(1, 12, (3,), generator=draw).tolist()})) for name in "abcde"
    ]
    values = {one.name: torch.rand(len(one.levels), generator=draw).tolist() for one in units}
    budget = sum(one.levels[1].cost for one in units)

    def cost(choice: tuple[int, ...]) -> int:
        return sum(one.levels[number].cost for one, number in zip(units, choice, strict=True))

    def value(choice: tuple[int, ...]) -> float:
        return sum(values[one.name][number] for one, number in zip(units, choice, strict=True))

    every = itertools.product(*(range(len(one.levels)) for one in units))
    legal = [choice for choice in every if cost(choice) == budget or (at_most and cost(choice) < budget)]
    found = least(units, values, {ALL: budget}, at_most)
    choice = tuple(int(found[one.name]) for one in units)
    assert choice in legal
    assert value(choice) == pytest.approx(min(map(value, legal)))


def test_a_budget_that_cannot_be_met_is_a_sentence_with_the_nearest_that_can() -> None:
    both = database(unit("a", [1, 4]), unit("b", [0, 6]))
    wanted = {"a": 1.0, "b": 0.0}
    with pytest.raises(
        AssayError, match=r"weights, 5, cannot be met exactly .* nearest that can are 4 and 7"
    ):
        nearest_levels(both, wanted, {ALL: 5})
    with pytest.raises(AssayError, match="nearest that can are 10"):
        nearest_levels(both, wanted, {ALL: 11})
    with pytest.raises(AssayError, match="nearest that can are 1"):
        nearest_levels(both, wanted, {ALL: 0})
    with pytest.raises(AssayError, match="0 is below the least that can be spent on weights: 1"):
        least(both.units, {"a": [0.0, 1.0], "b": [0.0, 1.0]}, {ALL: 0}, at_most=True)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NotFinite, match="what the levels of a are chosen by is not finite"):
        nearest_levels(database(unit("a", [0, 1])), {"a": float("nan")}, {ALL: 1})


def test_costs_without_a_common_step_are_refused_before_memory_runs_out() -> None:
    wide = database(unit("a", [0, 10**9]), unit("b", [0, 10**9 + 1]))
    with pytest.raises(AssayError, match="Build levels whose costs have a larger common step"):
        nearest_levels(wide, {"a": 0.0, "b": 0.0}, {ALL: 0})


# --- the file -------------------------------------------------------------------------------------------------------


def example(**changes: Any) -> Assignment:
    fields: dict[str, Any] = {
        "kind": "sparsity", "levels": {"a": "0", "b": "1"}, "producer": "search.test", "spent": {ALL: 3},
        "about": {"generations": 4},
    }  # fmt: skip
    return Assignment(**fields | changes)


def test_an_assignment_comes_back_from_its_file(tmp_path: Path) -> None:
    path = example().write(tmp_path / "files")
    assert path == tmp_path / "files" / "assignment.json"
    assert read(tmp_path / "files") == example()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "colours"}', '{"kind": "sparsity", "levels": [], "spent": {}}']
)
def test_a_file_that_is_no_assignment_is_a_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        AssayError, match=r"holds no assignment\.json: name a chain that ends in a search stage"
    ):
        read(tmp_path)
    (tmp_path / "assignment.json").write_text(text, encoding="utf-8")
    with pytest.raises(AssayError, match=r"assignment\.json is no assignment of levels"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "bits"}, "kind bits does not belong to the levels in nowhere, which are of kind sparsity"),
        ({"levels": {"a": "0"}}, r"names no level of b"),
        ({"levels": {"a": "0", "b": "1", "c": "0"}}, r"has no levels of 'c'"),
        ({"levels": {"a": "0", "b": "7"}}, r"b has no level '7'; there are: 0, 1"),
        ({"spent": {ALL: 4}}, "says that it costs 4 weights; .* it costs 3 weights: take the levels it was"),
        ({"spent": {}}, "says that it costs nothing"),
    ],
)
def test_an_assignment_is_checked_against_its_levels(changes: dict[str, Any], sentence: str) -> None:
    levels = database(unit("a", [0, 1]), unit("b", [2, 3]))
    example().check(levels)
    with pytest.raises(AssayError, match=sentence):
        example(**changes).check(levels)


# --- the model ------------------------------------------------------------------------------------------------------


def without_smallest(weight: Tensor, count: int) -> Tensor:
    found = weight.detach().clone().flatten()
    found[found.abs().argsort()[:count]] = 0.0
    return found.view_as(weight)


def write_levels(
    folder: Path, model: Any, kind: str, levels_of: Callable[[str, Tensor], Any], which: str = "proj"
) -> Path:
    """A database of the layers whose name has ``which``; ``levels_of`` gives (level: encoded, cost, share), budget."""
    writer = Writer(folder, kind)
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and which in name:
            found, budget = levels_of(name, part.weight.detach())
            encoded, costs, shares = ({key: value[at] for key, value in found.items()} for at in range(3))
            writer.write(name, int(name.split(".")[2]), budget, encoded, costs, shares)
    writer.close(model, {})
    return folder


def sparse_levels(name: str, weight: Tensor) -> tuple[dict[str, tuple[Encoded, int, float]], str]:
    half, step = weight.numel() // 2, 64
    costs = {str(offset): half + offset * step for offset in (-1, 0, 1)}
    return {
        level: (encode_sparse(without_smallest(weight, cost)), cost, cost / weight.numel())
        for level, cost in costs.items()
    }, ALL


def staged(tmp_path: Path, parent: Path, levels: Path | None, assignment: Path, **options: Any) -> Stage:
    folder = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    named: dict[str, Any] = {} if levels is None else {"levels": Parent("levels.test-0")}
    config = assigned.Config(assignment=Parent("search.test-0"), **named, **options)
    parents = {"model": parent, "assignment": assignment} | ({} if levels is None else {"levels": levels})
    progress = Progress(tmp_path / "scratch", 0)
    return Stage("prune.assigned-0", "prune.assigned", config, 0, parents, folder, progress, Locator())


def assigned_model(
    tmp_path: Path, parent: Path, levels: Path | None, assignment: Path, **options: Any
) -> tuple[Any, Stage]:
    stage = staged(tmp_path, parent, levels, assignment, **options)
    family.run(stage, assigned)
    return load_model(stage.folder / "model", dtype="float32"), stage


@pytest.fixture
def dense(tmp_path: Path, tokenizer: Any) -> Path:
    return saved(tiny(), tokenizer, tmp_path / "dense")


@pytest.fixture
def levels(tmp_path: Path, dense: Path) -> Path:
    return write_levels(tmp_path / "levels", load_model(dense), "sparsity", sparse_levels)


def winner(levels: Path, changes: dict[str, str]) -> Assignment:
    found = Database.open(levels)
    chosen = found.uniform() | changes
    return Assignment("sparsity", chosen, "search.test", found.spent(chosen))


SWITCHED = {"model.layers.0.self_attn.q_proj": "1", "model.layers.1.mlp.down_proj": "-1"}


def test_the_model_has_exactly_the_weights_of_the_winner(tmp_path: Path, dense: Path, levels: Path) -> None:
    chosen = winner(levels, SWITCHED)
    chosen.write(tmp_path / "search")
    model, stage = assigned_model(tmp_path, dense, levels, tmp_path / "search")
    found = Database.open(levels)
    for name, level in chosen.levels.items():
        assert model.get_parameter(f"{name}.weight").equal(found.weight(name, level)), name
    before = load_model(dense)
    for name, weight in before.named_parameters():
        if "proj" not in name:
            assert weight.equal(model.get_parameter(name)), name
    zeros = sum(int((model.get_parameter(f"{name}.weight") == 0).sum()) for name in chosen.levels)
    total = sum(unit.rows * unit.columns for unit in found.units)
    assert zeros == stage.notes["zeros"] == stage.notes["spent"][ALL] == total // 2
    assert stage.notes["assignment"] == dict(chosen.levels)
    assert stage.notes["kind"] == "sparsity" and stage.notes["producer"] == "search.test"
    assert stage.notes["shares"]["model.layers.0.self_attn.q_proj"] == 0.5 + 64 / 1024
    assert not stage.notes["physical"] and not (stage.folder / "model" / "physical").exists()


def test_zeros_of_the_parent_stay_unless_told_otherwise(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[0] = 0.0
    parent = saved(model, tokenizer, tmp_path / "sparse")

    def filled(name: str, weight: Tensor) -> Any:
        return {"0": (encode_sparse(torch.ones_like(weight)), 0, 0.0)}, ALL

    levels = write_levels(tmp_path / "levels", load_model(parent), "sparsity", filled)
    winner(levels, {}).write(tmp_path / "search")
    kept, stage = assigned_model(tmp_path, parent, levels, tmp_path / "search")
    lost, _ = assigned_model(tmp_path, parent, levels, tmp_path / "search", keep_zeros=False)
    name = "model.layers.1.mlp.up_proj.weight"
    assert (kept.get_parameter(name)[0] == 0).all() and (kept.get_parameter(name)[1:] == 1).all()
    assert (lost.get_parameter(name) == 1).all()
    assert stage.notes["zeros"] == sum(unit.columns for unit in Database.open(levels).units)


def test_bits_are_noted_with_their_scales(tmp_path: Path, dense: Path) -> None:
    def bits_of(name: str, weight: Tensor) -> Any:
        grid = (torch.ones(len(weight), 1), torch.full((len(weight), 1), 2.0))
        codes = torch.ones(weight.shape, dtype=torch.uint8)
        share = 32 / weight.shape[1]
        return {
            str(bits): (encode_codes(codes, *grid, bits), bits * weight.numel(), bits + share)
            for bits in (2, 4)
        }, ALL

    levels = write_levels(tmp_path / "levels", load_model(dense), "bits", bits_of, "up_proj")
    found = Database.open(levels)
    names = [unit.name for unit in found.units]
    chosen = dict(zip(names, ("2", "4"), strict=True))
    Assignment("bits", chosen, "search.test", found.spent(chosen)).write(tmp_path / "search")
    model, stage = assigned_model(tmp_path, dense, levels, tmp_path / "search")
    assert stage.notes["bits_per_weight"] == 3 + 1
    assert stage.notes["spent"] == {ALL: 3 * sum(unit.rows * unit.columns for unit in found.units)}
    assert (model.get_parameter(f"{names[0]}.weight") == -1).all()


# --- whole units ----------------------------------------------------------------------------------------------------


def structure_levels(heads: list[int], neurons: list[int], head_dim: int) -> Callable[[str, Tensor], Any]:
    """Level "0" removes nothing, "1" these heads or neurons."""

    def levels_of(name: str, weight: Tensor) -> Any:
        width, gone, budget = (head_dim, heads, "heads") if "o_proj" in name else (1, neurons, "neurons")
        pruned = weight.clone()
        pruned.unflatten(1, (-1, width))[:, gone] = 0.0
        count = weight.shape[1] // width
        return {
            "0": (encode_columns(weight), 0, 0.0),
            "1": (encode_columns(pruned), len(gone), len(gone) / count),
        }, budget

    return levels_of


def structured(tmp_path: Path, tokenizer: Any, groups: int, heads: list[int], bias: bool = False) -> Any:
    """Heads go from the first layer, neurons 5 and 7 from the second."""
    parent = saved(tiny(heads=4, groups=groups, bias=bias), tokenizer, tmp_path / "dense")
    make = structure_levels(heads, [5, 7], head_dim=8)
    dense_model = load_model(parent)
    writer = Writer(tmp_path / "levels", "structure")
    for name, part in dense_model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            found, budget = make(name, part.weight.detach())
            encoded, costs, shares = ({key: value[at] for key, value in found.items()} for at in range(3))
            writer.write(name, int(name.split(".")[2]), budget, encoded, costs, shares)
    writer.close(dense_model, {})
    found = Database.open(tmp_path / "levels")
    chosen = found.uniform() | {"model.layers.0.self_attn.o_proj": "1", "model.layers.1.mlp.down_proj": "1"}
    Assignment("structure", chosen, "search.test", found.spent(chosen)).write(tmp_path / "search")
    model, stage = assigned_model(tmp_path, parent, tmp_path / "levels", tmp_path / "search")
    return model, stage, load_model(parent)


def dead_rows(weight: Tensor) -> list[int]:
    found: list[int] = (weight == 0).all(dim=1).nonzero().flatten().tolist()
    return found


def test_whole_groups_of_heads_take_their_keys_and_values_along(tmp_path: Path, tokenizer: Any) -> None:
    # query heads 2 and 3 are the second of two key-value groups, of 8 rows each
    model, stage, before = structured(tmp_path, tokenizer, groups=2, heads=[2, 3], bias=True)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    assert dead_rows(attention.q_proj.weight) == list(range(16, 32))
    assert dead_rows(attention.k_proj.weight) == dead_rows(attention.v_proj.weight) == list(range(8, 16))
    assert (attention.k_proj.bias[8:] == 0).all() and (attention.k_proj.bias[:8] != 0).all()
    assert attention.o_proj.bias.equal(before.model.layers[0].self_attn.o_proj.bias)
    assert dead_rows(mlp.gate_proj.weight) == dead_rows(mlp.up_proj.weight) == [5, 7]
    assert stage.notes["spent"] == {"heads": 2, "neurons": 2}
    assert stage.notes["widths"]["heads"] == [[2, 1], [4, 2]]
    assert stage.notes["widths"]["neurons"] == [48, 46]
    small = load_model(stage.folder / "model" / "physical")
    assert stage.notes["nonzero_after"] == sum(int((weight != 0).sum()) for weight in small.parameters())


def test_single_query_heads_leave_the_keys_that_others_need(tmp_path: Path, tokenizer: Any) -> None:
    model, stage, before = structured(tmp_path, tokenizer, groups=2, heads=[1])
    attention = model.model.layers[0].self_attn
    assert dead_rows(attention.q_proj.weight) == list(range(8, 16))
    for name in ("k_proj", "v_proj"):
        weight = before.model.layers[0].self_attn.get_parameter(f"{name}.weight")
        assert attention.get_parameter(f"{name}.weight").equal(weight)
    assert stage.notes["widths"]["heads"] == [[3, 2], [4, 2]]


def depth(removed: list[str], blocks: int = 2) -> Assignment:
    names = [f"model.layers.{index}.{part}" for index in range(blocks) for part in ("self_attn", "mlp")]
    chosen = {name: "removed" if name in removed else "kept" for name in names}
    spent = {
        budget: sum(part in name for name in removed)
        for budget, part in (("attentions", "self_attn"), ("mlps", "mlp"))
    }
    return Assignment("depth", chosen, "search.test", spent)


@pytest.mark.parametrize("bias", [False, True])
def test_removed_sub_blocks_add_nothing_and_are_gone_from_the_small_model(
    tmp_path: Path, tokenizer: Any, bias: bool
) -> None:
    parent = saved(tiny(bias=bias), tokenizer, tmp_path / "dense")
    depth(["model.layers.0.self_attn", "model.layers.1.mlp"]).write(tmp_path / "search")
    model, stage = assigned_model(tmp_path, parent, None, tmp_path / "search")
    first, second = model.model.layers
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    assert all((weight == 0).all() for weight in first.self_attn.parameters())
    assert (second.mlp(hidden) == 0).all() and (first.mlp(hidden) != 0).any()
    assert stage.notes["spent"] == {"attentions": 1, "mlps": 1}
    assert stage.notes["physical"]
    # four projections of the first block's attention, three of the second block's MLP, with a norm each; of the biases
    # those of the outputs have a place in the small model, too
    gone = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32 + (3 * 32 + 2 * 48 if bias else 0)
    assert stage.notes["parameters_physical"] == stage.notes["parameters"] - gone


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, parent: Path, levels: Path | None, assignment: Assignment) -> str:
    assignment.write(tmp_path / "search")
    stage = staged(tmp_path, parent, levels, tmp_path / "search")
    with pytest.raises(AssayError) as error:
        family.run(stage, assigned)
    assert not (stage.folder / "model").exists()
    return str(error.value)


def test_levels_of_another_model_are_refused(tmp_path: Path, tokenizer: Any, levels: Path) -> None:
    other = tiny()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    parent = saved(other, tokenizer, tmp_path / "other")
    sentence = refusal(tmp_path, parent, levels, winner(levels, SWITCHED))
    assert "were measured on other weights than those of model.layers.0.mlp.up_proj" in sentence


def test_an_assignment_for_other_levels_is_refused(tmp_path: Path, dense: Path, levels: Path) -> None:
    def narrower(name: str, weight: Tensor) -> Any:
        found, budget = sparse_levels(name, weight)
        less = without_smallest(weight, weight.numel() // 2 - 32)
        found["-1"] = (encode_sparse(less), weight.numel() // 2 - 32, 0.0)
        return found, budget

    others = write_levels(tmp_path / "others", load_model(dense), "sparsity", narrower)
    assert "take the levels it was made for" in refusal(tmp_path, dense, others, winner(levels, SWITCHED))


def test_wrong_pairs_of_levels_and_assignment_are_refused(tmp_path: Path, dense: Path, levels: Path) -> None:
    gone = depth(["model.layers.0.mlp"])
    assert "reads no levels: leave levels= out" in refusal(tmp_path, dense, levels, gone)
    assert "give levels=, the levels stage" in refusal(tmp_path, dense, None, winner(levels, {}))
    bits = Assignment("bits", {"model.layers.0.mlp.up_proj": "4"}, "search.test", {ALL: 1})
    assert "which are of kind sparsity" in refusal(tmp_path, dense, levels, bits)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model.layers.0.mlp": "gone"}, "model.layers.0.mlp has no level 'gone'; there are: kept, removed."),
        (
            {"model.layers.2.mlp": "kept"},
            "no sub-block 'model.layers.2.mlp'; did you mean 'model.layers.1.mlp'?",
        ),
        ({"model.layers.0.mlp": "kept"}, "says that it removes 0 attentions and 1 mlps, and it removes"),
    ],
)
def test_an_assignment_of_depth_that_does_not_fit_is_refused(
    tmp_path: Path, dense: Path, change: dict[str, str], sentence: str
) -> None:
    good = depth(["model.layers.0.mlp"])
    wrong = Assignment("depth", {**good.levels, **change}, good.producer, good.spent)
    assert sentence in refusal(tmp_path, dense, None, wrong)


def test_a_sub_block_that_is_not_named_is_a_sentence(tmp_path: Path, dense: Path) -> None:
    good = depth(["model.layers.0.mlp"])
    fewer = {name: level for name, level in good.levels.items() if name != "model.layers.1.mlp"}
    wrong = Assignment("depth", fewer, good.producer, good.spent)
    assert "does not say whether model.layers.1.mlp is kept" in refusal(tmp_path, dense, None, wrong)


@pytest.mark.parametrize("cost", [511, 513])
def test_a_level_that_costs_something_else_than_it_says_is_refused(
    tmp_path: Path, dense: Path, cost: int
) -> None:
    def false(name: str, weight: Tensor) -> Any:
        return {"0": (encode_sparse(without_smallest(weight, 512)), cost, 0.5)}, ALL

    levels = write_levels(tmp_path / "levels", load_model(dense), "sparsity", false, "q_proj")
    sentence = refusal(tmp_path, dense, levels, winner(levels, {}))
    assert f"has 512 zeros and is said to have {cost}: build the levels anew" in sentence


def test_the_note_can_be_written_as_json(tmp_path: Path, dense: Path, levels: Path) -> None:
    winner(levels, SWITCHED).write(tmp_path / "search")
    _, stage = assigned_model(tmp_path, dense, levels, tmp_path / "search")
    assert json.loads(json.dumps(stage.notes))["assignment"]["model.layers.0.self_attn.q_proj"] == "1"
    assert Style.read(stage.folder / "model") == Style.read(dense)


# --- shorthands -----------------------------------------------------------------------------------------------------

SHORTHANDS = ("prune.evopress", "prune.evopress_bits", "prune.evopress_depth", "prune.tyr")


def config_of(name: str, **options: Any) -> Any:
    needed = {"bits": 2.5} if name == "prune.evopress_bits" else {"sparsity": 0.5}
    return catalogue().method(name).load().Config(data=DATA, **needed | options)


def steps_of(name: str, **options: Any) -> tuple[Step, ...]:
    found: tuple[Step, ...] = catalogue().method(name).load().expand(config_of(name, **options))
    return found


@pytest.mark.parametrize("name", SHORTHANDS)
def test_a_shorthands_defaults_are_those_of_its_steps(name: str) -> None:
    for step in steps_of(name):
        for field in dataclasses.fields(catalogue().method(step.method).load().Config):
            given = step.options.get(field.name, field.default)
            # what a shorthand is given here, what refers to another step, and the step of later rounds is its own
            if (
                field.default is dataclasses.MISSING
                or field.name == "data"
                or isinstance(given, From)
                or step.name in ("levels3", "levels4")
            ):
                continue
            if (step.name, field.name) not in (("levels2", "step"), ("search", "bits")):
                assert given == field.default, (step.name, field.name)


@pytest.mark.parametrize("name", SHORTHANDS)
def test_a_shorthand_hands_on_every_option_of_its_steps(name: str) -> None:
    for step in steps_of(name):
        fields = {field.name for field in dataclasses.fields(catalogue().method(step.method).load().Config)}
        # the first round of tyr has no centre, and depth no levels; zeros that depth makes stay anyway
        left_out = (
            {"center", "levels", "keep_zeros"} if step.method in ("levels.tyr", "prune.assigned") else set()
        )
        assert fields - step.options.keys() <= left_out, step.name
        assert step.options.keys() <= fields, step.name


def test_bits_that_no_widths_have_on_average_are_refused_before_anything_runs() -> None:
    with pytest.raises(AssayError, match=r"no choice among widths=\[2, 4\] has 5 bits .*: take 2 to 4"):
        config_of("prune.evopress_bits", bits=5.0, widths=(2, 4))


@pytest.mark.parametrize("name", SHORTHANDS)
def test_no_option_of_a_shorthand_is_left_behind(name: str) -> None:
    config = config_of(name)
    taken = {"rounds"}  # the number of steps
    for option in dataclasses.fields(config):
        if option.name not in taken:
            marked = object()
            changed = dataclasses.replace(config)
            object.__setattr__(changed, option.name, 0.25 if option.name == "step" else marked)
            expanded = catalogue().method(name).load().expand(changed)
            values = [value for step in expanded for value in step.options.values()]
            assert (0.25 if option.name == "step" else marked) in values, option.name


def test_tyr_goes_from_coarse_to_fine_around_what_it_found() -> None:
    steps = steps_of("prune.tyr", rounds=3, step=0.2)
    assert [step.name for step in steps] == [
        "levels1",
        "search1",
        "levels2",
        "search2",
        "levels3",
        "search3",
        "model",
    ]
    assert [step.options["step"] for step in steps[0:6:2]] == [0.2, 0.1, 0.05]
    assert "center" not in steps[0].options
    assert steps[2].options["center"] == From("search1") and steps[4].options["center"] == From("search2")
    assert steps[5].options["levels"] == From("levels3")
    assert steps[6].options == {
        "levels": From("levels3"), "assignment": From("search3"), "keep_zeros": True
    }  # fmt: skip
    assert len(steps_of("prune.tyr")) == 2 * 4 + 1


def test_levels_and_search_are_calibrated_on_as_many_tokens_as_each_needs() -> None:
    levels, search, _ = steps_of("prune.evopress", database_tokens=100, calibration_tokens=20_000, levels=5)
    assert levels.options["calibration_tokens"] == 100 and search.options["calibration_tokens"] == 20_000
    assert levels.options["levels"] == 5 and search.options["levels"] == From("levels")
    levels, search, _ = steps_of("prune.evopress_bits", widths=(2, 3), bits=2.25)
    assert levels.options["bits"] == (2, 3) and search.options["bits"] == 2.25


def test_evopress_ends_with_the_zeros_of_the_uniform_sparsity() -> None:
    outcome = usual("prune.evopress")
    weights = [weight for name, weight in outcome.weights.items() if "proj" in name]
    zeros, total = sum(int((weight == 0).sum()) for weight in weights), sum(map(Tensor.numel, weights))
    assert zeros == total // 2 == outcome.notes["spent"][ALL]
    assert sum(map(int, outcome.notes["assignment"].values())) == 0


def test_evopress_bits_ends_with_the_bits_that_were_asked_for() -> None:
    notes = usual("prune.evopress_bits").notes
    weights = sum(layer["rows"] * layer["columns"] for layer in notes["layers"])
    assert notes["spent"] == {ALL: 2.5 * weights}
    assert notes["bits_per_weight"] > 2.5


def test_evopress_depth_ends_with_a_model_that_is_smaller() -> None:
    notes = usual("prune.evopress_depth").notes
    assert notes["spent"] == {"attentions": 1, "mlps": 1}
    assert notes["physical"] and notes["parameters_physical"] < notes["parameters"]


def test_tyr_ends_with_half_of_the_heads_and_half_of_the_neurons() -> None:
    notes = usual("prune.tyr").notes
    # two layers of two key-value groups and 64 neurons
    assert notes["spent"] == {"heads": 2, "neurons": 64}
    assert sum(groups for _, groups in notes["widths"]["heads"]) == 2
    assert sum(notes["widths"]["neurons"]) == 64
    assert notes["parameters_physical"] < notes["parameters"]
