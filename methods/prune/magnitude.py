"""Magnitude pruning: remove what is smallest.

Weights: |W| per matrix, the baseline of LeCun, Denker, Solla 1989 ("Optimal Brain Damage") and Han et al.
2015 ("Learning both Weights and Connections"), as implemented in locuslab/wanda, ``lib/prune.py``:

    prune W_ij  if  |W_ij| <= t,     t = sort(|W|)[int(numel * s)]

With ``<=`` the official code removes the threshold itself, too: one weight more than the budget, and more
where weights tie. ``threshold="official"`` does the same; ``"exact"`` removes round(numel * s) weights,
first come first removed among equals. ``pattern="2:4"`` removes the 2 smallest of every 4 consecutive
inputs of an output.

Heads and neurons: per layer, whole units with the smallest L2 norm over the matrices in which they
appear. For a head these are its rows of ``q_proj`` and its columns of ``o_proj``; with grouped queries
the unit is a key-value group with all its query heads, because nothing less can be cut. For a neuron: its
rows of ``gate_proj`` and ``up_proj`` and its column of ``down_proj``. Of ``count`` units ``count -
round(count * s)`` stay, at least one. All weights of a removed unit become zero.

The method draws no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Lt

from methods.prune._masks import check_budget, pattern_mask, smallest
from methods.prune._structured import Part, parts, zero_units
from methods.prune._walk import decoder_layers, linear_weights
from methods.stage import AssayError, Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration

SEEDED = False
USES = (
    "methods.prune._masks",
    "methods.prune._structured",
    "methods.prune._walk",
    "methods.architectures",
    "methods.checkpoint",
)
RESULT = "model"
# The projections into a unit that count for its norm, beside the one out of it.
SCORED = {"heads": ("q_proj",), "neurons": ("gate_proj", "up_proj")}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``prune.magnitude``: either ``sparsity`` or ``pattern``."""

    # Share that is zero afterwards: of the weights in each matrix, or of the heads or neurons in each layer.
    sparsity: Annotated[float, Ge(0), Lt(1)] | None = None
    # "n:m" removes the n smallest of every m consecutive inputs ("2:4"); m must divide the inputs.
    pattern: str | None = None
    # What is removed: single weights, attention heads, or neurons of the MLP.
    structure: Literal["weights", "heads", "neurons"] = "weights"
    # "exact" meets the budget of weights to the weight; "official" removes one more per matrix (see above).
    threshold: Literal["exact", "official"] = "exact"

    def __post_init__(self) -> None:
        check_budget("prune.magnitude", self.sparsity, self.pattern)
        if self.structure != "weights" and (self.pattern is not None or self.threshold != "exact"):
            raise AssayError(
                f"prune.magnitude: pattern and threshold are about single weights; leave them out with "
                f"structure={self.structure!r}."
            )
        if self.pattern is not None and self.threshold != "exact":
            raise AssayError("prune.magnitude: a pattern has no threshold; leave threshold out.")


_MEASURED = "measured on the built-in authors world, 156 thousand parameters, 3 of 3 seeds"
_ACCURACY = "lm_eval.authors_retain.acc"
CLAIMS = (
    Claim(
        sentence="Removing 70 % of the decoder's weights by magnitude visibly lowers accuracy.",
        source=_MEASURED,
        metric=_ACCURACY,
        subject="*> prune.magnitude(sparsity=0.7)",
        relation="lower",
        other="parent",
        margin=0.05,
    ),
    Claim(
        sentence="Removing 2 of every 4 weights by magnitude visibly lowers accuracy.",
        source=_MEASURED,
        metric=_ACCURACY,
        subject="*> prune.magnitude(pattern=?2:4?)",
        relation="lower",
        other="parent",
    ),
    Claim(
        sentence="Removing half of the attention heads by magnitude visibly lowers accuracy.",
        source=_MEASURED,
        metric=_ACCURACY,
        subject="*> prune.magnitude(sparsity=0.5, structure=?heads?)",
        relation="lower",
        other="parent",
        margin=0.05,
    ),
)


def structural(config: Config) -> bool:
    """Whether whole units go, so that a physically smaller model exists."""
    return config.structure != "weights"


def prune(config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress) -> None:
    """Zero the smallest weights or units of every decoder layer, in place."""
    import torch

    with torch.no_grad():
        if config.structure == "weights":
            for name in linear_weights(model):
                weight = model.get_parameter(name)
                weight.masked_fill_(mask(config, weight), 0.0)
        else:
            prune_units(config, model)


def mask(config: Config, weight: Tensor) -> Tensor:
    """Which entries of a matrix [out,in] go: a boolean tensor of its shape."""
    scores = weight.abs()
    if config.pattern is not None:
        return pattern_mask(scores, config.pattern)
    assert config.sparsity is not None  # checked by Config
    if config.threshold == "official":
        threshold = scores.flatten().sort().values[int(scores.numel() * config.sparsity)]
        return scores <= threshold
    return smallest(scores.flatten()[None], round(scores.numel() * config.sparsity)).view_as(scores)


# --- whole units ----------------------------------------------------------------------------------------


def prune_units(config: Config, model: PreTrainedModel) -> None:
    """Zero the weakest heads or neurons of every layer."""
    assert config.sparsity is not None  # checked by Config
    found = parts(model, "group", f"prune.magnitude(structure={config.structure!r})")
    layers = decoder_layers(model)
    for part in found:
        if part.budget == config.structure:
            scores = importance(scored_matrices(layers[part.block], part))
            zero_units(layers[part.block], part, weakest(scores, config.sparsity))


def scored_matrices(layer: Any, part: Part) -> list[Tensor]:
    """The weights that a unit is judged by, each [units, numbers of a unit]; all are views."""
    owner = layer.self_attn if part.budget == "heads" else layer.mlp
    into = [getattr(owner, name).weight.unflatten(0, (part.count, -1)) for name in SCORED[part.budget]]
    return [*into, part.linear.weight.unflatten(1, (part.count, -1)).transpose(0, 1)]


def importance(matrices: list[Tensor]) -> Tensor:
    """L2 norm [units] over everything the unit has in the matrices."""
    import torch

    return torch.stack([part.flatten(1).square().sum(dim=1) for part in matrices]).sum(dim=0).sqrt()


def weakest(scores: Tensor, sparsity: float) -> Tensor:
    """Which of the units [units] go: round(count * sparsity) of them, but never all."""
    count = len(scores)
    return smallest(scores[None], min(round(count * sparsity), count - 1))[0]
