"""What is read as a model, what is refused, and what is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import checkpoint
from methods.checkpoint import Models, load_model, load_tokenizer, nonzero, save_model
from methods.stage import AssayError, NotFinite
from tests.training import make_parent, same, weights_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# --- loading ------------------------------------------------------------------------------------------------


def test_a_model_loads_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    folder = make_parent(tmp_path, dtype="bfloat16")
    assert load_model(folder).dtype == torch.float32
    assert load_model(folder, "bfloat16").dtype == torch.bfloat16
    assert load_model(folder, "parent").dtype == torch.bfloat16
    assert not load_model(folder).training
    assert load_model(folder, train=True).training


def test_sharded_models_load(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "10KB")
    save_model(load_model(made), tmp_path, made)
    assert (tmp_path / checkpoint.INDEX).is_file()
    assert len(checkpoint.weight_files(tmp_path)) > 2
    assert checkpoint.parent_dtype(tmp_path) == "float32"
    assert same(dict(load_model(tmp_path).named_parameters()), dict(load_model(made).named_parameters()))


def test_a_small_model_is_one_file(made: Path, tmp_path: Path) -> None:
    save_model(load_model(made), tmp_path, made)
    assert checkpoint.weight_files(tmp_path) == [tmp_path / checkpoint.WEIGHTS]


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def add_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")


def add_other_pickle(folder: Path) -> None:
    (folder / "training.pt").write_bytes(b"")


def add_code(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModel": "evil.Model"})


def add_tokenizer_code(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.Tokenizer"})


def link_out(folder: Path) -> None:
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)


def index_out(folder: Path) -> None:
    drop_weights(folder)
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def index_missing(folder: Path) -> None:
    drop_weights(folder)
    (folder / checkpoint.INDEX).write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def unknown_type(folder: Path) -> None:
    edit(folder / "config.json", model_type="nobody_knows")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def lose_a_weight(folder: Path) -> None:
    from safetensors.torch import save_file

    weights = dict(weights_of(folder))
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop_config, "config.json is missing"),
        (drop_weights, "holds no model.safetensors"),
        (
            add_pickle,
            "pytorch_model.bin is a pickle, which can run any code when read: convert it to safetensors",
        ),
        (add_other_pickle, "training.pt is a pickle"),
        (add_code, r"config.json names code to run \(auto_map\)"),
        (add_tokenizer_code, r"tokenizer_config.json names code to run \(auto_map\)"),
        (link_out, "is a link out of the model folder"),
        (index_out, "names '../elsewhere.safetensors', which is no safetensors file of this folder"),
        (index_missing, "model-00001-of-00002.safetensors is missing"),
        (break_config, "is no JSON"),
        (list_config, "must hold a JSON object"),
        (unknown_type, "holds no model that can be loaded: .*nobody_knows"),
        (cut_weights, "holds no model that can be loaded"),
        (lose_a_weight, "lacks the weight model.norm.weight: it would be a random one"),
        (remove_all, "there is no such model folder"),
    ],
)
def test_what_is_no_safe_and_whole_model_is_refused(
    folder: Path, change: Callable[[Path], None], sentence: str
) -> None:
    change(folder)
    with pytest.raises(AssayError, match=sentence):
        load_model(folder)


def test_a_link_within_the_folder_is_fine(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    load_model(folder)


def test_a_folder_without_tokenizer_is_a_sentence(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(AssayError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(folder)


def test_the_auto_class_follows_the_architecture(folder: Path) -> None:
    assert checkpoint.auto_class(folder) == "AutoModelForCausalLM"
    edit(folder / "config.json", architectures=["ViTForImageClassification"])
    assert checkpoint.auto_class(folder) == "AutoModelForImageClassification"


# --- saving -------------------------------------------------------------------------------------------------


def test_what_travels_with_a_model_is_copied_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    for name, content in {"chat_template.jinja": "{{ date }}", "generation_config.json": '{"a":  1}'}.items():
        (folder / name).write_text(content)
    edit(folder / "assay.json", prompt="plain")
    save_model(load_model(folder), tmp_path / "copy", folder)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "assay.json",
    ):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes(), name


def test_files_can_be_read_by_everyone_and_name_no_place(made: Path, tmp_path: Path) -> None:
    save_model(load_model(made), tmp_path / "copy", made)
    for path in (tmp_path / "copy").rglob("*"):
        assert oct(path.stat().st_mode)[-3:] == "644", path
        if path.suffix == ".json":
            assert str(made) not in path.read_text()


@pytest.mark.parametrize(
    ("dtype", "expected"), [("parent", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_a_model_is_saved_in_a_stated_precision(tmp_path: Path, dtype: str, expected: str) -> None:
    parent = make_parent(tmp_path / "parent", dtype="bfloat16")
    model = load_model(parent)
    save_model(model, tmp_path / "saved", parent, dtype)
    assert {str(value.dtype) for value in weights_of(tmp_path / "saved").values()} == {f"torch.{expected}"}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == expected
    assert model.dtype == torch.float32
    assert same(dict(load_model(tmp_path / "saved").named_parameters()), dict(model.named_parameters()))


def test_each_weight_keeps_the_precision_it_has_in_the_parent(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    parent = make_parent(tmp_path / "parent", dtype="bfloat16")
    weights = dict(weights_of(parent))
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, parent / "model.safetensors", {"format": "pt"})
    save_model(load_model(parent), tmp_path / "saved", parent)
    assert same(weights_of(tmp_path / "saved"), weights)


def test_a_new_model_without_source_is_saved_in_float32(made: Path, tmp_path: Path) -> None:
    save_model(load_model(made, "bfloat16"), tmp_path, None)
    assert checkpoint.parent_dtype(tmp_path) == "float32"
    save_model(load_model(made), tmp_path, None, parent_dtype="bfloat16")
    assert checkpoint.parent_dtype(tmp_path) == "bfloat16"


def test_tied_weights_are_saved_once_in_any_precision(made: Path, tmp_path: Path) -> None:
    save_model(load_model(made), tmp_path, made, "bfloat16")
    assert "lm_head.weight" not in weights_of(tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_saving_twice_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        save_model(load_model(made), tmp_path / name, made)
    for path in (tmp_path / "1").rglob("*"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name


def test_a_weight_that_is_not_finite_is_not_written(made: Path, tmp_path: Path) -> None:
    model = load_model(made)
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(NotFinite, match=r"the weight model\.norm\.weight is not finite"):
        save_model(model, tmp_path / "saved", made)
    assert not (tmp_path / "saved").exists()


# --- counting and caching -------------------------------------------------------------------------------------


def test_tied_weights_count_once(made: Path) -> None:
    model = load_model(made)
    total, filled = nonzero(model)
    assert total == filled == sum(value.numel() for value in weights_of(made).values())
    with torch.no_grad():
        model.model.norm.weight[:3] = 0
    assert nonzero(model) == (total, total - 3)


def test_a_model_is_loaded_once_and_without_gradients(made: Path) -> None:
    models = Models()
    model = models.load(made)
    assert models.load(made / ".." / made.name) is model
    assert models.tokenizer(made) is models.tokenizer(made)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    models.forget()
    assert models.load(made) is not model
