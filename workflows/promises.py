"""What the runner checks of every result before it is published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods.find import catalogue
from methods.stage import AssayError, NotFinite
from workflows.parts import parts_of
from workflows.record import PARTS, FileEntry, Job, Store, file_sha256

# Spoken to in the same way: these files of the parent must reappear byte for byte.
SPEECH = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "assay.json",
)


def check(store: Store, job: Job, folder: Path) -> str:
    """Check a stage's result. Returns the Auto class it loads with (empty for data and files).

    Raises:
        AssayError: other parts were written than ``RESULT`` names, a model does not load, lost a zero it had to keep,
            or changed how it is spoken to. ``NotFinite``: a weight is not a finite number.
    """
    promised = parts_of(catalogue().method(job.method).load())
    _check_parts(job, folder, promised)
    for part in set(promised) - {"model"}:
        _check_bundle(job, folder / part)
    models = sorted(path for path in folder.glob("model*") if path.is_dir())
    if not models:
        return ""
    parent = job.parents.get("model")
    parent_folder = store.parent_folder(parent) if parent else None
    from methods.checkpoint import auto_class

    for model in models:
        _check_loads(job, model)
        if parent_folder is not None:
            _check_speech(job, parent_folder, model)
            if job.config.get("keep_zeros", True):
                _check_zeros(job, parent_folder, model)
    return auto_class(models[0])


def _check_parts(job: Job, folder: Path, promised: tuple[str, ...]) -> None:
    """The planner tells from ``RESULT`` what other stages may read."""
    for part in PARTS:
        written = (folder / part).is_dir() and any((folder / part).iterdir())
        if part in promised and not written:
            raise AssayError(f"{job.method} wrote no {part}/, which its RESULT promises.")
        if written and part not in promised:
            raise AssayError(f"{job.method} wrote {part}/, which its RESULT does not name.")


def _check_bundle(job: Job, folder: Path) -> None:
    """Rows can be read, and nothing in ``data/`` or ``files/`` runs code or lies elsewhere."""
    from methods.checkpoint import PICKLES
    from methods.data import read_rows

    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.suffix in PICKLES:
            what = "a link" if path.is_symlink() else "a pickle"
            raise AssayError(f"{job.method} wrote {what}, {folder.name}/{path.relative_to(folder)}: write a "
                             "safetensors, JSON, CSV or parquet file.")  # fmt: skip
    if folder.name == "data":
        read_rows(folder)


def _check_loads(job: Job, folder: Path) -> None:
    import torch

    from methods.checkpoint import is_classifier, load_model, load_tokenizer

    try:
        model = load_model(folder, dtype="float32")
        if not is_classifier(folder):
            load_tokenizer(folder)
        inputs = {name: tensor.to(model.device) for name, tensor in _example(model, folder).items()}
        with torch.no_grad():
            logits = model(**inputs).logits
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise AssayError(f"{job.method} wrote a model that does not load: {error}") from error
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NotFinite(f"{job.method} wrote a weight that is not finite: {name}.")
    if not torch.isfinite(logits).all():
        raise NotFinite(f"{job.method} wrote a model whose logits are not finite.")


def _example(model: Any, folder: Path) -> dict[str, Any]:
    """An input of the model's own shape: three tokens, images, or what a classifier of tokens says of itself."""
    import torch

    from methods.architectures.classifiers import example_images
    from methods.checkpoint import is_classifier

    if not is_classifier(folder):
        return {"input_ids": torch.tensor([[1, 2, 3]])}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": example_images(model.config)}
    return dict(model.dummy_inputs)


def _check_speech(job: Job, parent: Path, folder: Path) -> None:
    for name in SPEECH:
        if (parent / name).is_file() and not _same_bytes(parent / name, folder / name):
            raise AssayError(
                f"{job.method} changed {name}: how a model is spoken to travels with it byte for byte."
            )


def _same_bytes(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _check_zeros(job: Job, parent: Path, folder: Path) -> None:
    after = dict(_tensors(folder))
    for name, before in _tensors(parent):
        now = after.get(name)
        if now is None or now.shape != before.shape or before.ndim < 2:
            continue
        lost = int(((before == 0) & (now != 0)).sum())
        if lost:
            raise AssayError(
                f"{job.method} filled {lost} zeros of {name}; give keep_zeros=False if that is meant."
            )


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 — not a mapping
                yield key, file.get_tensor(key)


def files_of(folder: Path) -> list[FileEntry]:
    """Every file of a result with its size and sha256 (the log and the record themselves aside)."""
    entries = []
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        relative = path.relative_to(folder).as_posix()
        if relative not in ("log.txt", "record.json"):
            entries.append(FileEntry(path=relative, bytes=path.stat().st_size, sha256=file_sha256(path)))
    return entries
