"""LoRA: a low-rank update beside frozen weights. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models".

    W' = W + (alpha / rank) B A,     A [rank, in] random, B [out, rank] zero at the start

Trained through ``peft``. The paper adapts the attention's query and value projections; here, as in QLoRA and most later
work, every linear layer but the output is adapted unless ``targets`` names some. The update is merged when the
model is saved and kept beside it in ``adapter/``. Merged zeros are put back to zero (``keep_zeros``), so behind
pruning the written model differs from the one that was trained by what the adapter had put there.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch.nn import Parameter


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of LoRA; defaults of the QLoRA recipe."""

    # rank of the update
    rank: Annotated[int, Gt(0)] = 16
    # the update is scaled by alpha / rank
    alpha: Annotated[int, Gt(0)] = 32
    # share of the adapter's inputs set to 0 in training
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    # last parts of the names of the layers to adapt; empty: every linear layer but the output
    targets: tuple[str, ...] = ()


def attach(config: Config, model: Any, seed: int) -> Any:
    """The model with a fresh adapter, everything else frozen."""
    import torch
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, options)
        except ValueError as error:
            raise AssayError(f"lora(targets={list(config.targets)}): {error}") from error


def merge(model: Any) -> Any:
    """The plain model, the update added to its weights. The adapter is gone from ``model``, too."""
    return model.merge_and_unload()


def disabled(model: Any) -> AbstractContextManager[None]:
    """Within it the model answers as if it had no adapter."""
    context: AbstractContextManager[None] = model.disable_adapter()
    return context


def base_parameters(model: Any) -> dict[str, Parameter]:
    """The frozen weights, under the names they have once the adapter is merged."""
    named = model.get_base_model().named_parameters()
    return {name.replace(".base_layer.", "."): weight for name, weight in named if ".lora_" not in name}


def save(model: Any, folder: Path) -> None:
    """Write the adapter in peft's layout, free of the place it was trained at.

    Nothing where the weights below it were changed, too (``base_changed``): on those it came from it would be wrong.
    """
    if getattr(model, "base_changed", False):
        return
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
