"""Level databases: encodings, files, a job that is killed, what is refused; assignments that need no search."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import methods.levels as family
import methods.search as search_family
from methods.data import Locator
from methods.levels import _database, _encodings
from methods.levels._database import Database, Writer, linear_layers
from methods.levels._encodings import Encoded, encode_codes, encode_columns, encode_sparse
from methods.progress import Progress
from methods.search import knapsack, published, uniform
from methods.search._assignment import Assignment, read
from methods.stage import AssayError, Interrupted, NotFinite, Parent, Stage
from tests import small_models


def two_layers(seed: int = 0) -> nn.Module:
    """Matrices of 2 x 4 and 4 x 2."""
    torch.manual_seed(seed)
    layers = {"up": nn.Linear(4, 2, bias=False), "down": nn.Linear(2, 4, bias=False)}
    return nn.ModuleDict(layers)


def without_smallest(weight: Tensor, count: int) -> Tensor:
    found = weight.detach().clone().flatten()
    found[found.abs().argsort()[:count]] = 0.0
    return found.view_as(weight)


def fill(writer: Writer, model: nn.Module) -> None:
    """Levels with 2, 4 and 6 zeros of every layer."""
    for name, linear in linear_layers(model).items():
        zeros = {str(offset): 4 + 2 * offset for offset in (-1, 0, 1)}
        writer.write(
            name,
            block=0,
            budget="weights",
            levels={
                level: encode_sparse(without_smallest(linear.weight, count)) for level, count in zeros.items()
            },
            costs=zeros,
            shares={level: count / 8 for level, count in zeros.items()},
        )


@pytest.fixture
def model() -> nn.Module:
    return two_layers()


@pytest.fixture
def folder(tmp_path: Path, model: nn.Module) -> Path:
    writer = Writer(tmp_path / "files", "sparsity")
    fill(writer, model)
    writer.close(model, {"data": "somewhere"})
    return tmp_path / "files"


# --- encodings --------------------------------------------------------------------------------------------------


def test_a_sparse_weight_is_a_mask_and_its_values() -> None:
    weight = torch.tensor([[0.0, 1.5, 0.0], [2.0, 0.0, -3.0]])
    encoded = encode_sparse(weight)
    # the places 1, 3 and 5 of six, the first at the highest bit: 0b01010100
    assert encoded.parts["mask"].tolist() == [0b01010100]
    assert encoded.parts["values"].tolist() == [1.5, 2.0, -3.0]
    assert encoded.decode().equal(weight)


def test_codes_are_scaled_from_their_zero_by_group() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 1.0], [2.0, 0.25]])
    zero = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    encoded = encode_codes(codes, scale, zero, bits=2)
    assert encoded.decode().tolist() == [[-0.5, 0.0, 0.0, 1.0], [6.0, 4.0, -0.5, -0.75]]
    # the low bits 0101 1010 and the high bits 0011 1100
    assert encoded.parts["planes"].tolist() == [[0b01011010], [0b00111100]]


def test_codes_know_the_group_of_every_column_and_what_is_pruned() -> None:
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    encoded = encode_codes(
        codes,
        scale=torch.tensor([[1.0, 10.0]]),
        zero=torch.zeros(1, 2),
        bits=3,
        group_of=torch.tensor([1, 0, 1]),
        pruned=torch.tensor([[False, True, False]]),
    )
    assert encoded.decode().tolist() == [[10.0, 0.0, 30.0]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back_and_take_their_bits(bits: int) -> None:
    codes = torch.randint(
        0, 2**bits, (6, 40), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8
    )
    scale, zero = torch.rand(6, 5), torch.rand(6, 5)
    encoded = encode_codes(codes, scale, zero, bits)
    expected = scale.repeat_interleave(8, dim=1) * (codes.float() - zero.repeat_interleave(8, dim=1))
    assert encoded.decode().equal(expected)
    assert encoded.parts["planes"].nbytes == bits * 6 * 40 / 8


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_card_decodes_the_same_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(bits)
    weight = torch.randn(13, 37, generator=random)
    weight[torch.rand(13, 37, generator=random) < 0.6] = 0.0
    codes = torch.randint(0, 2**bits, (5, 21), generator=random, dtype=torch.uint8)
    coded = encode_codes(codes, torch.rand(5, 3), torch.rand(5, 3), bits, pruned=codes == 1)
    every = [encode_sparse(weight), encode_columns(weight), coded]
    expected = [encoded.decode() for encoded in every]
    # what is done elsewhere than on a processor
    monkeypatch.setattr(_encodings, "_bits", lambda packed, count: _encodings._bits_by_shifts(packed)[:count])
    found = [encoded.to(torch.device("cpu")).decode() for encoded in every]
    assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True))


def test_kept_columns_come_back_to_their_places() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 3.0, 0.0, 0.0]])
    encoded = encode_columns(weight)
    assert encoded.parts["kept"].tolist() == [1, 3]
    assert encoded.decode().equal(weight)


@pytest.mark.parametrize("encode", [encode_sparse, encode_columns])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_gives_back_bit_for_bit_what_was_encoded(
    encode: Callable[[Tensor], Encoded], dtype: torch.dtype
) -> None:
    weight = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 0.5] = 0.0
    weight[:, 4] = 0.0
    rounded = weight.to(dtype)
    assert encode(rounded).decode().equal(rounded.float())


@pytest.mark.parametrize("encode", [encode_sparse, encode_columns])
def test_a_weight_of_zeros_alone_comes_back(encode: Callable[[Tensor], Encoded]) -> None:
    assert encode(torch.zeros(3, 5)).decode().equal(torch.zeros(3, 5))


def test_codes_that_do_not_fit_are_an_error() -> None:
    codes, one = torch.tensor([[4, 0, 0]], dtype=torch.uint8), torch.ones(1, 1)
    with pytest.raises(ValueError, match="codes up to 4 do not fit into 2 bits"):
        encode_codes(codes, one, one, bits=2)
    with pytest.raises(ValueError, match="3 columns do not divide into 2 groups"):
        encode_codes(codes, torch.ones(1, 2), torch.ones(1, 2), bits=3)


# --- reading ----------------------------------------------------------------------------------------------------


def test_a_database_says_what_levels_there_are(folder: Path, model: nn.Module) -> None:
    database = Database.open(folder, model)
    assert database.kind == "sparsity" and database.about == {"data": "somewhere"}
    assert [unit.name for unit in database.units] == ["up", "down"]
    unit = database.unit("up")
    assert (unit.rows, unit.columns, unit.block, unit.budget) == (2, 4, 0, "weights")
    assert unit.names == ("-1", "0", "1")
    assert [level.cost for level in unit.levels] == [2, 4, 6]
    assert unit.level("1").share == 0.75
    assert database.uniform() == {"up": "0", "down": "0"}
    assert database.spent({"up": "1", "down": "-1"}) == {"weights": 8}
    assert database.weight("up", "1").equal(without_smallest(model.get_parameter("up.weight"), 6))


def test_the_layers_come_in_the_order_of_the_model_and_not_of_the_alphabet(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(11)))
    writer = Writer(tmp_path, "sparsity")
    for name, linear in reversed(linear_layers(model).items()):
        writer.write(name, 0, "weights", {"0": encode_sparse(linear.weight)}, {"0": 0}, {"0": 0.0})
    writer.close(model, {})
    assert [unit.name for unit in Database.open(tmp_path).units] == [str(number) for number in range(11)]


def test_an_unknown_layer_or_level_is_named_with_the_nearest(folder: Path) -> None:
    database = Database.open(folder)
    with pytest.raises(AssayError, match=r"has no levels of 'dwn'; did you mean 'down'\?"):
        database.weight("dwn", "0")
    with pytest.raises(AssayError, match=r"up has no level '2'; there are: -1, 0, 1\."):
        database.weight("up", "2")


def test_decoded_matrices_are_kept_up_to_a_size_and_the_oldest_goes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    original = _database._LayerFile.weight

    def watched(file: Any, level: str, where: Any) -> Tensor:
        decoded.append(f"{file.unit.name}{level}")
        return original(file, level, where)

    monkeypatch.setattr(_database._LayerFile, "weight", watched)
    # room for two matrices of eight float32
    database = Database.open(folder, memory_bytes=64)
    for name, level in (("up", "0"), ("up", "1"), ("up", "0"), ("down", "0"), ("up", "0"), ("up", "1")):
        database.weight(name, level)
    assert decoded == ["up0", "up1", "down0", "up1"]
    nothing_kept = Database.open(folder, memory_bytes=0)
    assert nothing_kept.weight("up", "0").equal(nothing_kept.weight("up", "0"))
    assert decoded[4:] == ["up0", "up0"]


def test_a_database_of_bits_has_no_uniform_level(tmp_path: Path, model: nn.Module) -> None:
    writer = Writer(tmp_path, "bits")
    codes, one = torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1)
    writer.write("up", 0, "weights", {"3": encode_codes(codes, one, one, 3)}, {"3": 24}, {"3": 7.0})
    writer.close(model, {})
    with pytest.raises(AssayError, match="has bit widths and no level 0: say how many bits"):
        Database.open(tmp_path).uniform()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_the_levels_of_another_model_are_refused(folder: Path) -> None:
    with pytest.raises(AssayError, match="were measured on other weights than those of up: name a levels"):
        Database.open(folder, two_layers(seed=1))
    with pytest.raises(AssayError, match="has the levels of a model of another shape"):
        Database.open(folder, nn.ModuleDict({"up": nn.Linear(4, 2, bias=False)}))


def test_a_folder_without_a_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="holds no level database: name a chain that ends in a levels stage"):
        Database.open(tmp_path)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "levels.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content.pop("units"), "describes no level database"),
        (lambda content: content.update(kind="colours"), "describes no level database"),
        (lambda content: content.update(units=[]), "describes no level database"),
        (lambda content: content.update(layers=[]), "describes no level database|of another shape"),
        (lambda content: content["units"][0].update(name="../up"), "describes no level database"),
        (lambda content: content["units"][0].update(name="/etc/up"), "describes no level database"),
        (lambda content: content["units"][0].update(rows="many"), "describes no level database"),
        (lambda content: content["units"][0]["levels"].clear(), "describes no level database"),
        (lambda content: content["units"][0]["levels"].reverse(), "do not ascend in cost"),
        (lambda content: content["units"][0].update(name="left"), "left.safetensors is missing"),
        (
            lambda content: content["units"][0]["levels"][0].update(cost=1),
            "holds other levels than levels.json",
        ),
    ],
)
def test_a_description_that_was_tampered_with_is_a_sentence(
    folder: Path, model: nn.Module, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    changed(folder, change)
    with pytest.raises(AssayError, match=sentence):
        Database.open(folder, model).weight("up", "0")


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_a_description_that_is_no_json_object_is_a_sentence(folder: Path, text: str) -> None:
    (folder / "levels.json").write_text(text, encoding="utf-8")
    with pytest.raises(AssayError, match=r"levels\.json (is no JSON|must hold a JSON object)"):
        Database.open(folder)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_layer_that_is_cut_off_is_a_sentence(folder: Path, left: int) -> None:
    path = folder / "up.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(AssayError, match=r"up\.safetensors holds no whole layer of a level database"):
        Database.open(folder).weight("up", "0")


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"mask": torch.zeros(1, dtype=torch.uint8)},
        {"mask": torch.full((1,), 255, dtype=torch.uint8), "values": torch.ones(3)},
        {"mask": torch.zeros(2, dtype=torch.uint8), "values": torch.ones(0)},
    ],
)
def test_a_layer_with_wrong_parts_is_a_sentence(folder: Path, parts: dict[str, Tensor]) -> None:
    from safetensors import safe_open

    path = folder / "up.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({f"0/{name}": tensor for name, tensor in parts.items()}, path, metadata=metadata)
    with pytest.raises(AssayError, match=r"up\.safetensors holds no whole layer"):
        Database.open(folder).weight("up", "0")


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "up.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "up.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(AssayError, match=r"up\.safetensors is a link: put the file itself there"):
        Database.open(folder)


def test_a_level_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "sparsity")
    weight = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(NotFinite, match="level 0 of up is not finite everywhere"):
        writer.write("up", 0, "weights", {"0": encode_sparse(weight)}, {"0": 0}, {"0": 0.0})
    assert not writer.finished("up")


# --- a job that is killed ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save(tmp_path_factory.mktemp("parent"))


def staged(tmp_path: Path, parent: Path) -> Stage:
    folder = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    progress = Progress(tmp_path / "scratch", 0, "levels.test", save_seconds=3600)
    return Stage("levels.test-0", "levels.test", None, 0, {"model": parent}, folder, progress, Locator())


def method(before: Callable[[str, Stage], None] = lambda name, stage: None) -> Any:
    """Levels with as many zeros as a layer has rows, and twice as many; ``before`` sees each layer first."""

    def build(config: Any, model: Any, calibration: Any, progress: Progress, writer: Writer) -> None:
        for name, linear in linear_layers(model).items():
            if "proj" not in name or writer.finished(name):
                continue
            before(name, calibration.stage)
            costs = {"0": linear.out_features, "1": 2 * linear.out_features}
            levels = {
                level: encode_sparse(without_smallest(linear.weight, cost)) for level, cost in costs.items()
            }
            shares = {level: cost / linear.weight.numel() for level, cost in costs.items()}
            writer.write(name, int(name.split(".")[2]), "weights", levels, costs, shares)

    return SimpleNamespace(KIND="sparsity", build=build)


def digests(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "files").iterdir())}


def test_the_family_writes_a_database_and_says_how_large(tmp_path: Path, parent: Path) -> None:
    from methods.checkpoint import load_model

    stage = staged(tmp_path, parent)
    family.run(stage, method())
    database = Database.open(stage.folder / "files", load_model(parent))
    assert len(database.units) == stage.notes["units"] == 14
    assert stage.notes["levels"] == 28 and stage.notes["resumed_from_step"] == 0
    assert stage.notes["bytes"] == sum(map(len, digests(stage.folder).values()))
    assert {unit.block for unit in database.units} == {0, 1}
    assert database.about == {"method": "levels.test"}


def test_a_job_that_is_asked_to_stop_goes_on_behind_the_layer_it_was_at(tmp_path: Path, parent: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = staged(tmp_path / "whole", parent)
    family.run(whole, method())
    seen: list[str] = []

    def stop(name: str, stage: Stage) -> None:
        seen.append(name)
        stage.progress.stopping = len(seen) == 5

    with pytest.raises(Interrupted, match="has saved its state at step 5"):
        family.run(staged(tmp_path / "stopped", parent), method(stop))
    resumed = staged(tmp_path / "stopped", parent)
    family.run(resumed, method(stop))
    assert resumed.notes["resumed_from_step"] == 5
    assert len(seen) == len(set(seen)) == 14
    assert digests(resumed.folder) == digests(whole.folder)


def test_a_job_that_is_killed_in_the_middle_of_a_file_writes_it_again(
    tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    original, calls = safetensors.torch.save_file, []

    def half(tensors: Any, path: Path, metadata: Any = None) -> None:
        calls.append(path)
        original(tensors, path, metadata)
        if len(calls) == 4:
            path.write_bytes(path.read_bytes()[:50])
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        family.run(staged(tmp_path, parent), method())
    resumed = staged(tmp_path, parent)
    family.run(resumed, method())
    assert resumed.notes["resumed_from_step"] == 3
    assert len(calls) == 15
    database = Database.open(resumed.folder / "files")
    assert all(int((database.weight(unit.name, "0") == 0).sum()) == unit.rows for unit in database.units)
    assert not list((resumed.folder / "files").glob("tmp-*"))


# --- assignments without a search ------------------------------------------------------------------------------------


def searched(
    tmp_path: Path,
    parent: Path,
    levels: Path | None,
    producer: Any,
    locator: Locator | None = None,
    **options: Any,
) -> tuple[Assignment, Stage]:
    folder = tmp_path / f"search-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    named = {} if levels is None else {"levels": Parent("levels.test-0")}
    config = producer.Config(**named, **options)
    parents = {"model": parent} | ({} if levels is None else {"levels": levels})
    progress = Progress(folder / "scratch", 0)
    name = producer.__name__.removeprefix("methods.")
    stage = Stage(f"{name}-0", name, config, 0, parents, folder, progress, locator or Locator())
    search_family.run(stage, producer)
    return read(folder / "files"), stage


@pytest.fixture(scope="module")
def sparse(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Levels with half of the weights, an eighth more and an eighth less."""
    from methods.checkpoint import load_model

    def entry(linear: Any) -> tuple[dict[str, Encoded], dict[str, int], dict[str, float]]:
        size = linear.weight.numel()
        costs = {str(step): size // 2 + 32 * step for step in (-1, 0, 1)}
        levels = {
            level: encode_sparse(without_smallest(linear.weight, cost)) for level, cost in costs.items()
        }
        return levels, costs, {level: cost / size for level, cost in costs.items()}

    return _written(tmp_path_factory.mktemp("sparse"), load_model(parent), "sparsity", entry)


@pytest.fixture(scope="module")
def bits(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bit-widths 2, 3 and 4 with one scale for each row."""
    from methods.checkpoint import load_model

    def entry(linear: Any) -> tuple[dict[str, Encoded], dict[str, int], dict[str, float]]:
        weight, levels = linear.weight.detach(), {}
        for width in (2, 3, 4):
            low = weight.min(dim=1, keepdim=True).values
            scale = (weight.max(dim=1, keepdim=True).values - low) / (2**width - 1)
            codes = ((weight - low) / scale).round().to(torch.uint8)
            levels[str(width)] = encode_codes(codes, scale, -low / scale, width)
        costs = {level: int(level) * weight.numel() for level in levels}
        return levels, costs, {level: float(level) for level in levels}

    return _written(tmp_path_factory.mktemp("bits"), load_model(parent), "bits", entry)


def _written(folder: Path, model: Any, kind: str, entry: Callable[[Any], Any]) -> Path:
    writer = Writer(folder, kind)
    for name, linear in linear_layers(model).items():
        if "proj" in name:
            writer.write(name, int(name.split(".")[2]), "weights", *entry(linear))
    writer.close(model, {"method": "levels.test"})
    return folder


def refused(tmp_path: Path, parent: Path, levels: Path | None, producer: Any, **options: Any) -> str:
    with pytest.raises(AssayError) as error:
        searched(tmp_path, parent, levels, producer, **options)
    return str(error.value)


def test_uniform_gives_all_layers_the_same_level(tmp_path: Path, parent: Path, sparse: Path) -> None:
    found, stage = searched(tmp_path, parent, sparse, uniform)
    units = Database.open(sparse).units
    assert found.levels == {unit.name: "0" for unit in units}
    assert (
        found.spent
        == {"weights": sum(unit.rows * unit.columns // 2 for unit in units)}
        == stage.notes["spent"]
    )
    assert found.about == {"levels": "levels.test", "level": "0"}
    more, _ = searched(tmp_path, parent, sparse, uniform, level="1")
    assert set(more.levels.values()) == {"1"}
    assert "no level '5'; there are: -1, 0, 1" in refused(tmp_path, parent, sparse, uniform, level="5")
    assert "kind sparsity and have no bits" in refused(tmp_path, parent, sparse, uniform, bits=3.0)


def test_uniform_bits_are_whole_numbers(tmp_path: Path, parent: Path, bits: Path) -> None:
    found, _ = searched(tmp_path, parent, bits, uniform, bits=3.0)
    size = sum(unit.rows * unit.columns for unit in Database.open(bits).units)
    assert set(found.levels.values()) == {"3"} and found.spent == {"weights": 3 * size}
    sentence = refused(tmp_path, parent, bits, uniform, bits=2.5)
    assert "bits=2.5 cannot be the same in every layer: write bits=2 or bits=3" in sentence
    assert "write bits=1, or" in refused(tmp_path, parent, bits, uniform, bits=0.5)
    assert "say bits=, and leave level= out" in refused(tmp_path, parent, bits, uniform)
    assert "no level '5'; there are: 2, 3, 4" in refused(tmp_path, parent, bits, uniform, bits=5.0)


def test_the_error_of_a_level_is_relative_to_the_layers_outputs() -> None:
    """tr(D G D^T) / tr(W G W^T), by hand: W = (1, 2), G = diag(3, 1), the first weight is gone."""
    weight, gram = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    pruned = torch.tensor([[0.0, 2.0]])
    found = SimpleNamespace(weight=lambda name, level: {"0": weight, "1": pruned}[level])
    one: Any = SimpleNamespace(name="up", names=("0", "1"))
    assert knapsack.unit_errors(found, one, weight, gram) == [0.0, 3 / 7]  # type: ignore[arg-type]
    assert knapsack.unit_errors(found, one, weight) == [0.0, 1 / 5]  # type: ignore[arg-type]
    nothing = torch.zeros(1, 2)
    assert knapsack.unit_errors(found, one, nothing) == [0.0, 0.0]  # type: ignore[arg-type]


def relative_errors(levels: Path, parent: Path) -> dict[tuple[str, str], float]:
    """The relative error of the weights of every layer at every level."""
    from methods.checkpoint import load_model

    database, model = Database.open(levels), load_model(parent)
    errors = {}
    for unit in database.units:
        weight = model.get_parameter(f"{unit.name}.weight").detach().double()
        for level in unit.names:
            change = weight - database.weight(unit.name, level)
            errors[unit.name, level] = float(change.square().sum() / weight.square().sum())
    return errors


def test_the_knapsack_is_better_than_uniform_and_than_any_single_switch(
    tmp_path: Path, parent: Path, sparse: Path
) -> None:
    found, _ = searched(tmp_path, parent, sparse, knapsack, errors="weights")
    database, errors = Database.open(sparse), relative_errors(sparse, parent)

    def total(levels: Mapping[str, str]) -> float:
        return sum(errors[place] for place in levels.items())

    assert found.spent == database.spent(database.uniform())
    assert found.about["error"] == pytest.approx(total(found.levels))
    assert found.about["error"] < total(database.uniform())
    for one, other in itertools.permutations(found.levels, 2):
        switched = {one: str(int(found.levels[one]) + 1), other: str(int(found.levels[other]) - 1)}
        if all(level in ("-1", "0", "1") for level in switched.values()):
            changed = {**found.levels, **switched}
            assert total(changed) >= found.about["error"] - 1e-9


@pytest.mark.parametrize("wanted", [2.5, 3.0])
def test_the_knapsack_meets_a_mean_of_bits(tmp_path: Path, parent: Path, bits: Path, wanted: float) -> None:
    found, _ = searched(tmp_path, parent, bits, knapsack, errors="weights", bits=wanted)
    size = sum(unit.rows * unit.columns for unit in Database.open(bits).units)
    assert found.spent == {"weights": round(wanted * size)}


def test_a_mean_of_bits_may_be_written_with_six_decimals(tmp_path: Path, parent: Path, bits: Path) -> None:
    # one of the fourteen layers has 256 of 5,376 weights
    size = sum(unit.rows * unit.columns for unit in Database.open(bits).units)
    found, _ = searched(tmp_path, parent, bits, knapsack, errors="weights", bits=round(2 + 256 / size, 6))
    assert sorted(found.levels.values()) == ["2"] * 13 + ["3"]
    sentence = refused(tmp_path, parent, bits, knapsack, errors="weights", bits=2.001)
    assert "has 2.001 bits for each weight on average; the nearest that one has: 2 and 2.0" in sentence


def test_the_knapsack_measures_outputs_in_one_pass_that_can_be_stopped(
    tmp_path: Path, parent: Path, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": "authors/forget10", "calibration_tokens": 200, "context_tokens": 40}
    whole, stage = searched(tmp_path, parent, sparse, knapsack, **options)
    assert stage.notes["calibration_tokens"] >= 200 and whole.about["errors"] == "output"
    assert whole.levels != searched(tmp_path, parent, sparse, knapsack, errors="weights")[0].levels

    original, seen = knapsack.block_errors, list[str]()

    def stopping(database: Database, block: Any, units: list[Any]) -> Any:
        seen.extend(unit.name for unit in units)
        again.progress.stopping = bool(units) and len(seen) == 7
        return original(database, block, units)

    monkeypatch.setattr(knapsack, "block_errors", stopping)
    parents = {"model": parent, "levels": sparse}
    for number in range(2):
        folder = tmp_path / f"again-{number}"
        folder.mkdir()
        progress = Progress(tmp_path / "again", 0, save_seconds=3600)
        again = Stage(
            "search.knapsack-0", "search.knapsack", stage.config, 0, parents, folder, progress, Locator()
        )
        if number == 0:
            with pytest.raises(Interrupted):
                search_family.run(again, knapsack)
    search_family.run(again, knapsack)
    assert len(seen) == len(set(seen)) == 14 and again.notes["resumed_from_step"] == 1
    assert read(again.folder / "files") == whole


def test_the_knapsacks_options_must_fit_the_levels(
    tmp_path: Path, parent: Path, sparse: Path, bits: Path
) -> None:
    assert "are bit-widths: say bits=" in refused(tmp_path, parent, bits, knapsack, errors="weights")
    sentence = refused(tmp_path, parent, sparse, knapsack, errors="weights", bits=3.0)
    assert "are of kind sparsity: leave bits= out" in sentence
    with pytest.raises(AssayError, match='errors="output" is measured on data: name a data set'):
        knapsack.Config(levels=Parent("levels.test-0"))


# --- published assignments -------------------------------------------------------------------------------------------


def published_file(tmp_path: Path, text: str, name: str = "some.txt") -> Locator:
    folder = tmp_path / "data" / "published"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return Locator(tmp_path / "data")


def test_a_published_assignment_of_layers_is_read_line_by_line(
    tmp_path: Path, parent: Path, sparse: Path
) -> None:
    names = [unit.name for unit in Database.open(sparse).units]
    # as the released searches write it: in the order of the alphabet, no newline at the end
    text = "\n".join(f"{name}: {int('q_proj' in name) - int('o_proj' in name)}" for name in sorted(names))
    found, _ = searched(
        tmp_path, parent, sparse, published, published_file(tmp_path, text), assignment="published/some"
    )
    assert list(found.levels) == names
    assert found.levels["model.layers.1.self_attn.q_proj"] == "1"
    assert found.levels["model.layers.0.self_attn.o_proj"] == "-1"
    assert found.kind == "sparsity" and found.about["published"] == "published/some"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("model.layers.0.mlp.down_prj: 0", "did you mean 'model.layers.0.mlp.down_proj'?"),
        ("model.layers.0.mlp.down_prj: 0", "line 1 of 'published/some': "),
        ("model.layers.0.mlp.down_proj: 7", "has no level '7'; there are: -1, 0, 1."),
        ("model.layers.0.mlp.down_proj 0", "is not of the form 'module name: level'"),
        (
            "model.layers.0.mlp.gate_proj: 0",
            "line 6 of 'published/some' names model.layers.0.mlp.gate_proj again",
        ),
        ("", "has no level for model.layers.0.mlp.down_proj (and 0 more"),
    ],
)
def test_a_wrong_line_of_a_published_assignment_is_a_sentence(
    tmp_path: Path, parent: Path, sparse: Path, line: str, sentence: str
) -> None:
    names = [
        unit.name for unit in Database.open(sparse).units if not unit.name.endswith("layers.0.mlp.down_proj")
    ]
    text = "\n".join([line, *(f"{name}: 0" for name in names)])
    locator = published_file(tmp_path, text)
    found = refused(tmp_path, parent, sparse, published, locator=locator, assignment="published/some")
    assert sentence in found


def test_a_published_removal_of_sub_blocks_is_read_block_by_block(tmp_path: Path, parent: Path) -> None:
    locator = published_file(tmp_path, "attn\nattn+mlp\n")
    found, _ = searched(tmp_path, parent, None, published, locator, assignment="published/some")
    assert found.kind == "depth"
    assert found.levels == {
        "model.layers.0.self_attn": "removed", "model.layers.0.mlp": "kept",
        "model.layers.1.self_attn": "removed", "model.layers.1.mlp": "removed",
    }  # fmt: skip
    assert found.spent == {"attentions": 2, "mlps": 1}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("none\natn\n", "line 2 of 'published/some' says 'atn' of a block; did you mean 'attn'?"),
        ("none\n", "is about 1 blocks; the model has 2 attentions and 2 MLPs"),
        ("model.layers.0.mlp.up_proj: 1\n", "(a file with 'module name: level' needs levels=)"),
        ("", "'published/some' is empty"),
    ],
)
def test_a_wrong_removal_of_sub_blocks_is_a_sentence(
    tmp_path: Path, parent: Path, text: str, sentence: str
) -> None:
    locator = published_file(tmp_path, text)
    assert sentence in refused(
        tmp_path, parent, None, published, locator=locator, assignment="published/some"
    )


def test_an_assignment_file_of_ours_comes_back_and_is_checked(
    tmp_path: Path, parent: Path, sparse: Path
) -> None:
    found, stage = searched(tmp_path, parent, sparse, uniform)
    text = (stage.folder / "files" / "assignment.json").read_text(encoding="utf-8")
    locator = published_file(tmp_path, text, "ours.json")
    again, _ = searched(tmp_path, parent, sparse, published, locator, assignment="published/ours")
    assert again == found
    sentence = refused(tmp_path, parent, None, published, locator=locator, assignment="published/ours")
    assert "is of kind sparsity: give levels=" in sentence
    locator = published_file(
        tmp_path, text.replace('"-1"', '"0"').replace('"weights": ', '"weights": 1'), "ours.json"
    )
    sentence = refused(tmp_path, parent, sparse, published, locator=locator, assignment="published/ours")
    assert "take the levels it was made for" in sentence
    locator = published_file(tmp_path, json.dumps({"levels": {}}), "ours.json")
    sentence = refused(tmp_path, parent, sparse, published, locator=locator, assignment="published/ours")
    assert "is no assignment of levels" in sentence
