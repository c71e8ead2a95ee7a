"""The pruning family: loads the parent, gives calibration data, walks the blocks, writes what is left.

A method's ``prune(config, model, calibration, progress)`` sets weights of the decoder's linear layers to
zero, in place; embeddings, norms and the output head stay as they are. Zeros of the parent stay zero:
they are the smallest weights there are, so a sparsity is the share of zeros *afterwards*, not of those
added.

A method whose ``structural(config)`` is true removes whole heads or neurons. Its result has two forms
from one mask: ``model/``, with zeros, which loads anywhere, and ``model/physical/``, smaller in shape.
They are compared before the stage is published.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from methods.prune._walk import linear_weights
from methods.stage import AssayError, Stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

REVISION = 1

# Largest difference of float32 logits between the two forms, for logits of size 1 and less; larger ones
# carry a rounding error in proportion (a distance head with n = 64 has scores in the hundreds).
TOLERANCE = 1e-5


def run(stage: Stage, method: ModuleType) -> None:
    """Prune ``stage.parents["model"]`` with ``method`` into ``stage.folder / "model"``."""
    from methods.checkpoint import load_model, nonzero, save_model

    parent = stage.parents["model"]
    model = load_model(parent, dtype="float32")
    _, before = nonzero(model)
    state = stage.progress.load()
    stage.notes["resumed_from_step"] = state.step if state else 0
    method.prune(stage.config, model, Calibration(stage), stage.progress)
    total, after = nonzero(model)
    stage.notes.update(parameters=total, nonzero_before=before, nonzero_after=after, layers=report(model))
    save_model(model, stage.folder / "model", source=parent)
    structural = getattr(method, "structural", None)
    stage.notes["physical"] = structural is not None and bool(structural(stage.config))
    if stage.notes["physical"]:
        write_physical(stage.folder / "model", stage)


class Calibration:
    """Sequences of a named data set for methods that look at activations; read only when asked for."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def sequences(self, data: str, count: int, context_tokens: int) -> list[Tensor]:
        """``count`` token sequences [1,T] drawn without replacement by the stage's seed, without padding.

        A smaller data set is used whole; the number that was used is noted as ``calibration_sequences``.
        """
        import torch

        from methods.checkpoint import load_tokenizer
        from methods.data import Sampler, Style, encode

        folder = self.stage.parents["model"]
        rows = self.stage.data.rows(data)
        examples = encode(rows, load_tokenizer(folder), Style.read(folder), context_tokens)
        if not examples:
            raise AssayError(f"{self.stage.method}: the calibration data {data!r} has no sequences.")
        count = min(count, len(examples))
        self.stage.notes["calibration_sequences"] = count
        chosen = Sampler(len(examples), self.stage.seed).batch(0, count)
        return [torch.tensor([examples[index].input_ids]) for index in chosen]


# --- results -----------------------------------------------------------------------------------------


def report(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The share of zeros of every linear layer of the decoder, in order."""
    rows = []
    for name in linear_weights(model):
        weight = model.get_parameter(name)
        zeros = int((weight == 0).sum())
        rows.append(
            {
                "name": name.removesuffix(".weight"),
                "rows": weight.shape[0],
                "columns": weight.shape[1],
                "zeros": zeros,
                "sparsity": zeros / weight.numel(),
            }
        )
    return rows


def write_physical(masked: Path, stage: Stage) -> None:
    """Write the cut form of ``masked`` beside it, note its widths, and compare the two.

    Raises an AssayError where they disagree, so that nothing is published.
    """
    from methods.architectures import shrink
    from methods.checkpoint import load_model, save_model

    small = shrink(load_model(masked, dtype="float32"))
    save_model(small, masked / "physical", source=masked)
    stage.notes["parameters_physical"] = sum(parameter.numel() for parameter in small.parameters())
    stage.notes["widths"] = {
        "heads": small.config.layer_num_heads,
        "neurons": small.config.layer_intermediate_size,
    }
    check_same(masked, masked / "physical")


def check_same(masked: Path, physical: Path) -> None:
    """Raise an AssayError unless both folders give the same float32 logits and the same greedy text."""
    expected, text = behaviour(masked)
    logits, other_text = behaviour(physical)
    difference = float((logits - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    # Written so that a difference that is not a number fails, too.
    if not difference <= allowed:
        raise AssayError(
            "the zero-masked and the physically smaller model disagree: their logits differ by "
            f"{difference:.1e}, more than {allowed:.1e}; the stage writes no model."
        )
    if not text.equal(other_text):
        raise AssayError(
            "the zero-masked and the physically smaller model continue the same prompts with different text; "
            "the stage writes no model."
        )


def behaviour(folder: Path) -> tuple[Tensor, Tensor]:
    """Logits [4,12,V] and greedy continuations of four fixed prompts of random tokens."""
    import torch

    from methods.checkpoint import load_model

    model = load_model(folder, dtype="float32")
    prompts = torch.randint(model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    prompts = prompts.to(model.device)
    with torch.no_grad():
        logits = model(input_ids=prompts).logits.float()
        text = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    return logits.cpu(), text.cpu()
