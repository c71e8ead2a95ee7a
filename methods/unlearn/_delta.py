"""An update of weights as a file of its own: what ``unlearn.kfade`` writes and ``unlearn.apply_delta`` adds.

``methods.unlearn``'s REVISION covers this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

DELTA = "delta.safetensors"
ABOUT = "delta.json"


def between(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """after - before of every tensor that changed, float32 (float64 where they are) on the processor."""
    from methods.terms import widen

    pairs = {name: (widen(before[name].detach().cpu()), widen(after[name].detach().cpu())) for name in after}
    return {name: then - now for name, (now, then) in pairs.items() if not then.equal(now)}


def write(folder: Path, delta: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write the update and what it was made for."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in delta.items()}, folder / DELTA)
    (folder / DELTA).chmod(0o644)
    (folder / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The update in a ``files/`` folder, and what was written beside it."""
    from safetensors.torch import load_file

    if not (folder / DELTA).is_file() or not (folder / ABOUT).is_file():
        raise AssayError(f"{folder} holds no update of weights: name a chain that ends in unlearn.kfade.")
    return load_file(folder / DELTA), json.loads((folder / ABOUT).read_text(encoding="utf-8"))


def check(weights: Mapping[str, Tensor], vocabulary: int, delta: Mapping[str, Tensor], about: Any) -> None:
    """Refuse an update of a model that is built otherwise.

    Raises:
        AssayError: names the first weight that is missing or of another shape, or the two vocabularies.
    """
    if about["vocabulary"] != vocabulary:
        raise AssayError(
            f"the update was made for a vocabulary of {about['vocabulary']} entries and the model has {vocabulary}: "
            "apply it to a descendant of the model it was made on."
        )
    for name, change in delta.items():
        if name not in weights:
            raise AssayError(
                f"the update changes {name}, which the model does not have: it is built otherwise."
            )
        if weights[name].shape != change.shape:
            ours, theirs = (" x ".join(map(str, tensor.shape)) for tensor in (weights[name], change))
            raise AssayError(
                f"the update changes {name} as {theirs}, but the model's is {ours}: "
                "apply it to a model of the same shape."
            )


def add(weights: Mapping[str, Tensor], delta: Mapping[str, Tensor], scale: float) -> None:
    """weights + scale * delta, in place."""
    import torch

    with torch.no_grad():
        for name, change in delta.items():
            weights[name].add_(change.to(weights[name]), alpha=scale)
