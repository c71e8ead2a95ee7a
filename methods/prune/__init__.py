"""The pruning family: loads the parent, gives calibration data, walks the blocks, writes what is left.

A method's ``prune(config, model, calibration, progress)`` changes weights of the decoder's linear layers in
place; embeddings, norms and the output head stay as they are. Zeros of the parent stay zero: they are the
smallest weights there are, so a sparsity is the share of zeros *afterwards*, not of those added.

A structural result has two forms: ``model/``, the *chain form*, in the parent's own shapes, which loads anywhere
and takes every further stage, and ``model/physical/``, smaller in shape. They are compared before the stage is
published. The method says whether its result is structural, and nothing is guessed from the zeros (a pruner of single
weights may empty a column by chance):

    structural(config) -> bool      where the options alone tell; may be left out
    prune(...) -> None              zeros only: no second form, unless ``structural(config)`` is true
    prune(...) -> a mapping         structural, whatever the options: heads, neurons, sub-blocks and blocks that
                                    contribute exactly nothing are cut. The mapping may be empty; what it holds,
                                    {module name: (a [out,r], b [r,in])}, are the linear layers that become two factors

A layer with factors gets ``a @ b`` as its weight in the chain form, from factors rounded to the precision the parent's
weight is saved in; a method need not write that weight itself. So that both forms are one model, such a weight is saved
in float32 in the chain form, also below a bfloat16 parent. What is cut is decided by
``methods.architectures.shrink``: a head goes when its columns of ``o_proj`` are zero, a neuron when its column of
``down_proj`` is, an attention or MLP when all of them are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from methods.prune._walk import linear_weights
from methods.stage import AssayError, Dataset, Stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.architectures.cutting import Cut
    from methods.data import Example

REVISION = 1

# Largest difference of float32 logits between the two forms, for logits of size 1 and less; larger ones
# carry a rounding error in proportion (a distance head with n = 64 has scores in the hundreds).
TOLERANCE = 1e-5


def run(stage: Stage, method: ModuleType) -> None:
    """Prune ``stage.parents["model"]`` with ``method`` into ``stage.folder / "model"``."""
    from methods.checkpoint import load_model, nonzero

    parent = stage.parents["model"]
    model = load_model(parent, dtype="float32")
    _, before = nonzero(model)
    state = stage.progress.load()
    stage.notes["resumed_from_step"] = state.step if state else 0
    del state  # the method reads it for itself, and of a large model it is as large
    factors = method.prune(stage.config, model, Calibration(stage), stage.progress)
    structural = factors is not None or is_structural(method, stage.config)
    factors = rounded(factors or {}, parent)
    recompose(model, factors)
    total, after = nonzero(model)
    stage.notes.update(parameters=total, nonzero_before=before, nonzero_after=after, layers=report(model))
    save_chain_form(model, stage, factors)
    # What follows reads the folder: at full size there is no room for more than one or two of these models.
    del model
    stage.notes["physical"] = structural
    if structural:
        write_physical(stage.folder / "model", stage, factors)


def is_structural(method: ModuleType, config: Any) -> bool:
    """Whether the method's options alone say that whole units go."""
    structural = getattr(method, "structural", None)
    return structural is not None and bool(structural(config))


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Options of methods that look at activations; a ``Config`` inherits them."""

    # Named data set the activations are measured on; C4 in the papers of Wanda, SparseGPT, GPTQ and OWL.
    data: Dataset
    # Calibration sequences; 128 in these papers.
    sequences: Annotated[int, Gt(0)] = 128
    # Longest calibration sequence; 2,048 in these papers, the full context of the first LLaMA.
    context_tokens: Annotated[int, Gt(0)] = 2048


class Calibration:
    """Sequences of a named data set for methods that look at activations; read only when asked for."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def sequences(self, data: str, count: int, context_tokens: int) -> list[Tensor]:
        """``count`` token sequences [1,T] drawn without replacement by the stage's seed, without padding.

        A smaller data set is used whole; the number that was used is noted as ``calibration_sequences``.
        """
        shuffled = self._shuffled(data, context_tokens)
        return self._chosen(shuffled[:count])

    def windows(self, data: str, tokens: int, context_tokens: int) -> list[Tensor]:
        """Sequences [1,T] drawn without replacement by the seed until they have ``tokens`` tokens or more together.

        Notes ``calibration_sequences`` and ``calibration_tokens``. Raises an AssayError where the data has fewer.
        """
        shuffled = self._shuffled(data, context_tokens)
        ends = list(accumulate(len(ids) for ids in shuffled))
        if ends[-1] < tokens:
            raise AssayError(
                f"{self.stage.method}: {tokens} calibration tokens are asked for, but {data!r} has {ends[-1]} in "
                f"sequences of at most {context_tokens} tokens: ask for fewer, or name more data."
            )
        return self._chosen(shuffled[: bisect_left(ends, tokens) + 1])

    def shuffled(self, data: str, context_tokens: int, seed: int | str) -> list[Example]:
        """Every sequence of a data set, cut to ``context_tokens``, in the order that a seed gives."""
        from methods.checkpoint import load_tokenizer
        from methods.data import Sampler, Style, encode

        folder = self.stage.parents["model"]
        rows = self.stage.data.rows(data)
        examples = encode(rows, load_tokenizer(folder), Style.read(folder), context_tokens)
        order = Sampler(len(examples), seed).batch(0, len(examples)) if examples else ()
        return [examples[index] for index in order]

    def _shuffled(self, data: str, context_tokens: int) -> list[tuple[int, ...]]:
        """The tokens of every sequence, in the order that the stage's seed gives."""
        examples = self.shuffled(data, context_tokens, self.stage.seed)
        if not examples:
            raise AssayError(f"{self.stage.method}: the calibration data {data!r} has no sequences.")
        return [example.input_ids for example in examples]

    def _chosen(self, sequences: list[tuple[int, ...]]) -> list[Tensor]:
        """The sequences as tensors [1,T]; how many they are is noted."""
        import torch

        self.stage.notes["calibration_sequences"] = len(sequences)
        self.stage.notes["calibration_tokens"] = sum(map(len, sequences))
        return [torch.tensor([ids]) for ids in sequences]


def sequence_nll(model: Any, ids: Tensor) -> Tensor:
    """Nats of the tokens of one calibration sequence [1,T] after the first, summed: a scalar, 0 for a single token."""
    import torch

    from methods.data import Part
    from methods.terms import forward, token_nll

    ids = ids.to(model.device)
    return token_nll(forward(model, Part(ids, torch.ones_like(ids), ids, "calibration"))).sum()


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


def rounded(factors: Mapping[str, tuple[Tensor, Tensor]], parent: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors as float32 numbers that the precision in which the parent saves that weight can hold."""
    import torch

    from methods.checkpoint import parent_dtype, tensor_dtypes

    dtypes, usual = (tensor_dtypes(parent), parent_dtype(parent)) if factors else ({}, "float32")

    def held(name: str, factor: Tensor) -> Tensor:
        return factor.detach().to(getattr(torch, dtypes.get(f"{name}.weight", usual))).float()

    return {name: (held(name, a), held(name, b)) for name, (a, b) in factors.items()}


def recompose(model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give every layer with factors their product as its weight, in place."""
    import torch

    if not factors:
        return
    from methods.architectures.cutting import check_factors

    check_factors(model, factors)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(a.to(weight.device) @ b.to(weight.device))


def save_chain_form(model: PreTrainedModel, stage: Stage, factors: Mapping[str, object]) -> None:
    """Write ``model/`` as the parent is saved; a recomposed weight in float32, else it would be another model's."""
    from methods.checkpoint import save_model

    exact = {f"{name}.weight": "float32" for name in factors}
    save_model(model, stage.folder / "model", source=stage.parents["model"], dtypes=exact)


def write_physical(masked: Path, stage: Stage, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write the cut form of ``masked`` beside it, note its widths, and compare the two.

    Raises an AssayError where they disagree, so that nothing is published.
    """
    write_cut(masked, stage, factors)
    check_same(masked, masked / "physical")


def write_cut(masked: Path, stage: Stage, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write the cut form of ``masked`` beside it and note its widths."""
    from methods.architectures import require_llama
    from methods.architectures.cutting import Cut
    from methods.checkpoint import load_model

    model = load_model(masked, dtype="float32")
    require_llama(model, f"{stage.method}'s physically smaller form", whole=False)
    cut = Cut.of(model, factors)
    small = cut.build()
    save_physical(cut, small, masked / "physical", stage.parents["model"])
    stage.notes["parameters_physical"] = sum(parameter.numel() for parameter in small.parameters())
    stage.notes["widths"] = cut.widths()
    stage.notes["ranks"] = {name: len(inner) for name, (_, inner) in factors.items()}
    stage.notes["plain"] = small.config.model_type == "llama"


def save_physical(cut: Cut, small: PreTrainedModel, folder: Path, parent: Path) -> None:
    """Write the cut form with every weight in the precision in which the parent has the one it was made of."""
    from methods.checkpoint import parent_dtype, save_model, tensor_dtypes

    dtypes, usual = tensor_dtypes(parent), parent_dtype(parent)
    precision = {name: dtypes.get(cut.origin(name), usual) for name in small.state_dict()}
    save_model(small, folder, source=parent, dtypes=precision)


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
