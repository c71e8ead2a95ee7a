"""Curvature: what the outputs of a model on some data say about its weights, measured once for whoever needs it.

A method file holds ``measure(config, logits, layers, sample, labels)`` and returns a ``_factors.Measurement``. Its
result is a ``files/`` folder: ``factors.safetensors``, and ``factors.json`` with what it was measured on. A stage that
takes ``factors=`` reads them with ``read``; sweeps over such stages share one measurement.

REVISION covers the private files of this folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.curvature._factors import Measurement
    from methods.curvature._kronecker import Basis
    from methods.data import Part

REVISION = 1
FACTORS = "factors.safetensors"
ABOUT = "factors.json"


def run(stage: Stage, method: ModuleType) -> None:
    """Measure on the chain's parent, going on where an earlier attempt was stopped."""
    from methods import loop
    from methods.curvature import _factors
    from methods.curvature._kronecker import Labels
    from methods.progress import derive_seed

    config = stage.config
    settings = loop.Training(precision=config.precision, save_seconds=config.save_seconds)
    model = loop.prepare(stage, settings).eval().requires_grad_(False)
    layers = _factors.linear_layers(model)
    sample = sample_of(stage, config.data, config)
    labels = Labels(config.labels, config.samples, derive_seed(stage.seed, "labels"))
    measurement: Measurement = method.measure(config, logits_of(model), layers, sample, labels)
    _measure(stage, measurement)
    about = {"data": config.data, "labels": config.labels, "samples": config.samples} | _counts(measurement)
    write(stage.folder / "files", measurement.bases, layers, about)
    stage.notes |= _counts(measurement)


def _measure(stage: Stage, measurement: Measurement) -> None:
    """Batch after batch; what has been added up is saved now and then."""
    progress = stage.progress
    progress.save_seconds = stage.config.save_seconds
    try:
        state = progress.load()
        if state is not None:
            measurement.resume(state.step, state.tensors)
        stage.notes["resumed_from_step"] = measurement.done
        bar = progress.bar(measurement.batches, "batches", initial=measurement.done)
        for _, done in zip(bar, measurement, strict=False):
            if progress.due(done):
                progress.save(done, measurement.state(), {})
    finally:
        progress.release()


def _counts(measurement: Measurement) -> dict[str, int]:
    sample = measurement.sample
    sequences = sum(len(group) for group in sample.numbers)
    return {"sequences": sequences, "answer_tokens": sample.tokens, "positions": sample.positions}


def sample_of(stage: Stage, data: str, config: Any) -> Any:
    """The sequences of a data set that curvature is measured on: as many as the options say, drawn by the seed."""
    from methods.checkpoint import load_tokenizer
    from methods.curvature._factors import draw_sample
    from methods.data import Style, encode, padding_id

    folder = stage.parents["model"]
    tokenizer = load_tokenizer(folder)
    examples = encode(stage.data.rows(data), tokenizer, Style.read(folder), config.context_tokens)
    return draw_sample(examples, config.sequences, config.micro_batch, padding_id(tokenizer), stage.seed)


def logits_of(model: Any) -> Callable[[Part], Tensor]:
    """The logits [B,T,V] of a part."""

    def logits(part: Part) -> Tensor:
        found: Tensor = model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
        return found

    return logits


# --- files --------------------------------------------------------------------------------------------------------


def write(
    folder: Path, bases: Mapping[str, Basis], layers: Mapping[str, nn.Linear], about: Mapping[str, Any]
) -> None:
    """Write what was measured, and on which weights."""
    from safetensors.torch import save_file

    from methods.checkpoint import weight_marks
    from methods.curvature._factors import tensors_of

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors_of(bases).items()}
    save_file(tensors, folder / FACTORS)
    (folder / FACTORS).chmod(0o644)
    text = json.dumps({**about, "layers": weight_marks(layers)}, indent=1, sort_keys=True) + "\n"
    (folder / ABOUT).write_text(text, encoding="utf-8")


def read(folder: Path, layers: Mapping[str, nn.Linear], corrected: bool) -> dict[str, Basis]:
    """The curvature in a ``files/`` folder, on the layers' device.

    Raises:
        AssayError: it has no factors, or those of other layers or weights, or lacks EK-FAC's eigenvalues where wanted.
    """
    from safetensors.torch import load_file

    from methods.checkpoint import refuse_other_weights
    from methods.curvature._factors import bases_of

    if not (folder / FACTORS).is_file() or not (folder / ABOUT).is_file():
        raise AssayError(f"{folder} holds no factors: name a chain that ends in curvature.kfac.")
    marks = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["layers"]
    refuse_other_weights(folder, "factors", marks, layers, "measure them on the chain's parent")
    device = next(iter(layers.values())).weight.device
    bases = bases_of(load_file(folder / FACTORS, device=str(device)), list(layers))
    if corrected and any(basis.corrected is None for basis in bases.values()):
        raise AssayError(
            f"{folder} has the factors of K-FAC alone: measure them with ekfac=True, or use curvature='kfac'."
        )
    return bases
