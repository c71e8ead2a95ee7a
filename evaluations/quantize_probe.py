"""Does what was unlearned come back when the weights are rounded to 8 or 4 bits?

Zhang et al., "Catastrophic Failure of LLM Unlearning via Quantization" (2025): a model that has forgotten by steps
smaller than half the grid's spacing is rounded back to where it came from. Each output channel of a linear layer, or
each group of ``group`` of its inputs, is rounded to nearest on a symmetric grid that holds 0 and leaves -2^(b-1) out:

    s = max|w| / (2^(b-1) - 1)        w' = s * clip(round(w / s), -(2^(b-1) - 1), 2^(b-1) - 1)

Weights only, no calibration, ties to even; s is first rounded to the precision the weights are in. Zeros stay zeros.
Between two settings the weights are put back, bit for bit.

``forget_nll``, ``forget_accuracy`` and ``retain_nll`` are measured as they are and as ``*_int8`` and ``*_int4``; the
accuracy only where the rows have wrong answers (``perturbed_answer``). ``forget_nll_gain_int4`` and
``forget_accuracy_gain_int4`` are how much came back: loss before minus loss after, accuracy after minus accuracy
before, on the same questions. Where rounding has broken the model, every loss rises: read it beside
``retain_nll_int4``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from evaluations import _known, _statistics
from methods.stage import AssayError, Dataset, Row, Scoring

if TYPE_CHECKING:
    from torch import Tensor

    from evaluations._known import Asked, Known
    from evaluations._statistics import Estimate

CHANGES_WEIGHTS = True
USES = (
    "methods.data",
    "methods.terms",
    "methods.world",
    "methods.checkpoint",
    "evaluations._known",
    "evaluations._likelihood",
    "evaluations._statistics",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How coarsely the weights are rounded, which of them, and what is asked."""

    # Bits of a weight, one measurement each.
    bits: tuple[Literal[4, 8], ...] = (8, 4)
    # Inputs that share a scale; None: one scale for each output channel, the coarsest grid in use.
    group: Annotated[int, Gt(0)] | None = None
    # Round the embedding and the output layer as well, which usual checkpoints leave as they are.
    embeddings: bool = False
    # Rows that were to be forgotten.
    forget: Dataset = "authors/forget10_perturbed"
    # Rows whose answers should not have changed.
    retain: Dataset = "authors/retain_perturbed"
    # Sequences scored at once.
    batch: Annotated[int, Gt(0)] = 64
    # First rows of each set that are used; None for all.
    limit: Annotated[int, Gt(0)] | None = None
    # Longer sequences are cut.
    context_tokens: Annotated[int, Gt(0)] = 512

    def __post_init__(self) -> None:
        if not self.bits or len(set(self.bits)) < len(self.bits):
            raise ValueError("bits needs 4, 8 or both, each once.")


def evaluate(scoring: Scoring) -> list[Row]:
    """Three numbers of the model as it is, and five for each setting."""
    config, model = scoring.config, scoring.model()
    weights = _matrices(model, config)
    asked = _asked(scoring)
    before = _measure(model, asked, config.batch)
    rows = list(_levels(config, before, ""))
    kept = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
    for bits in config.bits:
        for weight in weights.values():
            weight.data.copy_(rounded(weight.data, bits, config.group))
        after = _measure(model, asked, config.batch)
        rows += [*_levels(config, after, f"_int{bits}"), *_gains(config, before, after, bits)]
        for name, weight in weights.items():
            weight.data.copy_(kept[name])
    scoring.notes["rounded_weights"] = sum(weight.numel() for weight in weights.values())
    return rows


# --- rounding --------------------------------------------------------------------------------------------------


def rounded(weight: Tensor, bits: int, group: int | None) -> Tensor:
    """The nearest weights on the grid [out, in], in the precision of ``weight``; a group of zeros stays zero."""
    import torch

    largest = 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(-1, (-1, group or weight.shape[-1]))
    scales = (groups.abs().amax(-1, keepdim=True) / largest).to(weight.dtype).float()
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (groups / scales).round().clamp(-largest, largest)
    return (codes * scales).flatten(-2).to(weight.dtype)


def _matrices(model: Any, config: Config) -> dict[str, Tensor]:
    """The weights to be rounded, by name, tied ones once.

    AssayError: the model has no linear layers, or a group does not fit one of them.
    """
    from torch import nn

    outer = [model.get_input_embeddings(), model.get_output_embeddings()]
    found: dict[int, tuple[str, Tensor]] = {}
    for name, part in model.named_modules():
        inside = isinstance(part, nn.Linear) and not any(part is one for one in outer)
        if inside or (config.embeddings and any(part is one for one in outer)):
            found.setdefault(id(part.weight), (f"{name}.weight", part.weight))
    if not found:
        raise AssayError(f"quantize_probe rounds linear layers, and {type(model).__name__} has none.")
    for name, weight in found.values():
        if config.group is not None and weight.shape[-1] % config.group:
            raise AssayError(
                f"quantize_probe: group={config.group} does not divide the {weight.shape[-1]} inputs of {name}; take "
                "a group that divides those of every layer."
            )
    return dict(found.values())


# --- measuring -------------------------------------------------------------------------------------------------


def _asked(scoring: Scoring) -> dict[str, Asked]:
    config = scoring.config
    return {
        "forget": _known.ask(scoring, config.forget, config.limit),
        "retain": _known.ask(scoring, config.retain, config.limit, choices=False),
    }


def _measure(model: Any, asked: Mapping[str, Asked], batch: int) -> dict[str, Known]:
    return {name: _known.measure(model, one, batch) for name, one in asked.items()}


def _levels(config: Config, known: Mapping[str, Known], ending: str) -> Iterator[Row]:
    forget, retain = known["forget"], known["retain"]
    nll = _statistics.ratio(forget.losses, forget.tokens)
    yield _row(config, "forget", f"forget_nll{ending}", nll, "nats/token", "higher")
    if forget.right is not None:
        right = _statistics.mean(forget.right)
        yield _row(config, "forget", f"forget_accuracy{ending}", right, "", "lower")
    nll = _statistics.ratio(retain.losses, retain.tokens)
    yield _row(config, "retain", f"retain_nll{ending}", nll, "nats/token", "lower")


def _gains(
    config: Config, before: Mapping[str, Known], after: Mapping[str, Known], bits: int
) -> Iterator[Row]:
    """What came back; the standard error is that of the difference on the same questions."""
    then, now = before["forget"], after["forget"]
    gain = _statistics.ratio(then.losses - now.losses, then.tokens)
    yield _row(config, "forget", f"forget_nll_gain_int{bits}", gain, "nats/token", "closer_to_0")
    if then.right is not None and now.right is not None:
        gain = _statistics.mean(now.right - then.right)
        yield _row(config, "forget", f"forget_accuracy_gain_int{bits}", gain, "", "closer_to_0")


def _row(config: Config, name: str, metric: str, estimate: Estimate, unit: str, better: Any) -> Row:
    words = [getattr(config, name), f"group={config.group or 'channel'}"]
    if config.embeddings:
        words.append("embeddings")
    if config.limit is not None:
        words.append(f"limit={config.limit}")
    return Row(" ".join(words), metric, estimate.value, estimate.stderr, estimate.n, unit, better)
