"""Training that prunes on its way: the share of hidden weights rises from one point of the training to another.

Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression", section 3,
with t from ``begin`` to ``finish``:

    s(t) = s_end + (s_start - s_end) (1 - (t - begin) / (finish - begin))^3

The smallest weights of each matrix of the decoder are hidden; embeddings, norms and the output head are not touched.
The schedule's default is what "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense
Scaling Laws" found best among eighty: from 25 % to 75 % of the training (there of its compute, here of its steps, which
are dearer before pruning than after it). The record has that paper's average parameter count, over the steps.

``update="removed"`` sets hidden weights to 0 for good. ``update="straight_through"`` keeps the dense weights behind the
masks, passes them the gradient at the masked weights, and draws the mask anew every few steps, so that weights return;
``masked_decay`` pulls hidden ones to 0 (Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks
From Scratch", SR-STE, equation 8: 2e-4). With ``pattern`` the hidden weights of every group of m consecutive inputs
rise from 0 to n, as in the structure decay of abhibambhaniya/progressive_gradient_flow_nm_sparsity.

``curve.csv``: ``train``, ``hidden`` (the share), ``flipped`` (the share whose mask this step changed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from methods import loss as losses
from methods.loop import Training
from methods.prune._masks import check_budget, read_pattern
from methods.stage import AssayError, Claim, Dataset, Stage, Terms

if TYPE_CHECKING:
    from methods.gradient import Batch
    from methods.masking import ScheduledMasks

SEEDED = True
USES = (
    "methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.masking", "methods.prune._masks",
    "methods.prune._walk",
)  # fmt: skip
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """The shared recipe, the rows, and the schedule: either ``sparsity`` or ``pattern``."""

    # rows to train on; several sets joined by +
    data: Dataset = "authors/retain90+authors/facts"
    # the parent's weights, or new ones of its shapes, drawn from the seed
    start: Literal["parent", "random"] = "parent"
    # share of hidden weights in every matrix at the end
    sparsity: Annotated[float, Ge(0), Lt(1)] | None = None
    # "n:m" hides n of every m consecutive inputs at the end ("2:4"); m must divide the inputs
    pattern: str | None = None
    # share of hidden weights where the schedule begins; with a pattern of the n
    start_sparsity: Annotated[float, Ge(0), Lt(1)] = 0.0
    # where in the training the schedule begins, as a share of its steps ("The Journey Matters": 0.25)
    begin: Annotated[float, Ge(0), Lt(1)] = 0.25
    # where it is finished ("The Journey Matters": 0.75)
    finish: Annotated[float, Gt(0), Le(1)] = 0.75
    # how the share rises (Zhu and Gupta: cubic)
    shape: Literal["cubic", "linear"] = "cubic"
    # steps between two masks
    every: Annotated[int, Gt(0)] = 10
    # whether hidden weights are 0 for good, or kept behind the mask
    update: Literal["removed", "straight_through"] = "removed"
    # pull on hidden weights, added to their gradient (SR-STE: 2e-4); for straight_through
    masked_decay: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        check_budget("train.sparse", self.sparsity, self.pattern)
        if self.finish <= self.begin:
            raise AssayError(f"train.sparse: finish={self.finish} must come after begin={self.begin}.")
        if self.sparsity is not None and self.start_sparsity > self.sparsity:
            raise AssayError(
                f"train.sparse: start_sparsity={self.start_sparsity} is more than sparsity={self.sparsity}; weights "
                "that were hidden do not all return."
            )
        if self.masked_decay and self.update != "straight_through":
            raise AssayError('train.sparse: masked_decay is about update="straight_through"; leave it out.')
        if self.adapter is not None:
            raise AssayError("train.sparse hides the model's own weights: leave out the adapter.")


def loss(config: Config, model: Any, batch: Batch) -> Terms:
    """``train``: the answer NLL of the model as its masks show it."""
    return losses.terms(None, model, batch.train, None, batch)


def masking(config: Config, model: Any, stage: Stage, steps: int) -> ScheduledMasks:
    """The schedule over the run's steps."""
    from methods.masking import Schedule, ScheduledMasks

    pattern = read_pattern(config.pattern) if config.pattern is not None else None
    # of a pattern the schedule counts shares of its n
    end = config.sparsity if config.sparsity is not None else 1.0
    schedule = Schedule(config.start_sparsity, end, config.begin, config.finish, steps, config.shape)
    masks = ScheduledMasks(
        _layers(model, pattern),
        schedule,
        pattern=pattern,
        every=config.every,
        straight_through=config.update == "straight_through",
        decay=config.masked_decay,
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    stage.notes["average_parameters"] = total - masks.average_hidden()
    return masks


def _layers(model: Any, pattern: tuple[int, int] | None) -> dict[str, Any]:
    """The decoder's linear layers by the name of their weight; a pattern must fit them."""
    from methods.prune._walk import linear_weights

    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in linear_weights(model)}
    for name, layer in layers.items():
        if pattern is not None and layer.in_features % pattern[1]:
            raise AssayError(
                f"train.sparse: pattern {pattern[0]}:{pattern[1]} does not fit {name} with {layer.in_features} inputs."
            )
    return layers
