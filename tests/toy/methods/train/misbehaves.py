"""A method that breaks one of the promises that the runner checks, on purpose. Source: none, invented for tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from methods.stage import Stage

SEEDED = False
USES = ("methods.checkpoint",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What goes wrong."""

    # which promise is broken
    way: Literal[
        "nothing", "more", "not_finite", "fills_zeros", "pickle", "truncated", "other_words", "memory", "time"
    ]
    # whether zeros of the parent have to stay
    keep_zeros: bool = True


def run(stage: Stage) -> None:
    """Write the parent's model, spoilt."""
    way = stage.config.way
    if way == "memory":
        raise MemoryError("the toy is too big")
    if way == "time":
        raise TimeoutError("the toy is too slow")
    if way != "nothing":
        _spoil(stage, way, stage.folder / "model")


def _spoil(stage: Stage, way: str, folder: Path) -> None:
    import torch

    from methods.checkpoint import load_model, save_model

    model = load_model(stage.parents["model"])
    if way == "fills_zeros":
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.001
    save_model(model, folder, stage.parents["model"])
    weights = folder / "model.safetensors"
    if way == "more":
        (stage.folder / "files").mkdir()
        (stage.folder / "files" / "more.txt").write_text("more")
    elif way == "not_finite":
        _write_nan(weights)
    elif way == "pickle":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        weights.unlink()
    elif way == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif way == "other_words":
        settings: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "hello"}))


def _write_nan(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "norm" in name)
    tensors[name][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
