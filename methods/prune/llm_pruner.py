"""LLM-Pruner: the heads and neurons whose removal changes the loss least, to first order.

Ma, Fang, Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models" (NeurIPS 2023, arXiv
2305.11627; horseee/LLM-Pruner). A unit is everything that only makes sense together: of a head (with grouped
queries: a key-value group with all its query heads) its rows of ``q_proj``, ``k_proj``, ``v_proj`` and its columns of
``o_proj``; of a neuron its rows of ``gate_proj`` and ``up_proj`` and its column of ``down_proj``. Its importance is
the sum over these of the first Taylor term of the loss L when a weight w becomes 0:

    element:  I = sum_w |w dL/dw|            vector:  I = sum_v |sum_{w in v} w dL/dw|

with v a row or column of the unit. L is the cross-entropy of the model's next-token predictions on a few short
sequences. The units with the lowest importance go, in a middle range of blocks: the first and last blocks carry
more than their share.

What is here follows the paper's equations and the usual description of the official code, which was not run: it is a
baseline in the spirit of LLM-Pruner and is compared with no numbers of its authors. As released, every block of the
range loses the same share of *its* units and the model therefore a smaller one; here ``sparsity`` is the share of all
heads and of all neurons of the model, and the range bears it. Second-order terms are left out. The authors'
recovery by LoRA is a stage of its own behind this one.

Memory: the model and the gradient of its decoder's matrices, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Lt

from methods.stage import AssayError, Claim, Dataset, NotFinite

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._structured import Part

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.prune._structured",
    "methods.prune._walk",
    "methods.architectures",
    "methods.data",
    "methods.terms",
    "methods.checkpoint",
)
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()

# The blocks spared at both ends by default: 4 and 2 of the 32 of a Llama-7B, none of a model with few blocks.
SPARED_FIRST, SPARED_LAST = 8, 16


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``prune.llm_pruner``."""

    # Named data set the gradients are taken on; the paper takes BookCorpus.
    data: Dataset
    # Share of all heads and of all neurons of the model that goes.
    sparsity: Annotated[float, Ge(0), Lt(1)]
    # Whether gradients may cancel within a row or column of a unit, or not at all (see above).
    importance: Literal["element", "vector"] = "element"
    # Whether every block of the range loses as many units, or those go that are least important in the whole range.
    scope: Literal["block", "range"] = "block"
    # The first block that is pruned; None: the first eighth is spared.
    first: Annotated[int, Ge(0)] | None = None
    # The first block behind the range that is pruned; None: the last sixteenth is spared.
    end: Annotated[int, Gt(0)] | None = None
    # Calibration sequences; 10 in the paper.
    sequences: Annotated[int, Gt(0)] = 10
    # Longest calibration sequence; 64 in the official code, 128 in the paper.
    context_tokens: Annotated[int, Gt(1)] = 64


def structural(config: Config) -> bool:
    """Whole units always go, so that a physically smaller model exists."""
    return True


def prune(config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress) -> None:
    """Zero the least important heads and neurons of the range, in place."""
    import torch

    from methods.prune._structured import parts, zero_units
    from methods.prune._walk import decoder_layers

    found = parts(model, "group", "prune.llm_pruner")
    layers = decoder_layers(model)
    chosen = [part for part in found if part.block in block_range(config, len(layers))]
    sequences = calibration.sequences(config.data, config.sequences, config.context_tokens)
    add_gradients(model, sequences, progress)
    with torch.no_grad():
        scores = {part.name: unit_scores(config, layers[part.block], part) for part in chosen}
        gone = choose(config, found, chosen, scores)
        for part in chosen:
            zero_units(layers[part.block], part, gone[part.name])
    model.zero_grad(set_to_none=True)


def block_range(config: Config, blocks: int) -> range:
    """The blocks that are pruned."""
    first = blocks // SPARED_FIRST if config.first is None else config.first
    end = blocks - blocks // SPARED_LAST if config.end is None else config.end
    if not first < end <= blocks:
        raise AssayError(
            f"prune.llm_pruner: first={first} and end={end} are no range within the {blocks} blocks of this model."
        )
    return range(first, end)


# --- importance -----------------------------------------------------------------------------------------------


def add_gradients(model: PreTrainedModel, sequences: Sequence[Tensor], progress: Progress) -> None:
    """Leave the gradient of the summed loss of all sequences in ``grad`` of the decoder's matrices."""
    from methods.prune import sequence_nll
    from methods.prune._walk import linear_weights

    wanted = set(linear_weights(model))
    wanted |= {f"{name.removesuffix('weight')}bias" for name in wanted}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    if all(tokens.shape[1] < 2 for tokens in sequences):
        raise AssayError(
            "prune.llm_pruner: no calibration sequence has a second token, which could be predicted."
        )
    for number in progress.bar(len(sequences), "sequences"):
        loss = sequence_nll(model, sequences[number])
        if not bool(loss.isfinite()):
            raise NotFinite(f"prune.llm_pruner: the loss of calibration sequence {number} is not finite.")
        loss.backward()
        # A few short sequences are no work that would be worth saving.
        progress.stop_if_asked(0)


def unit_scores(config: Config, layer: nn.Module, part: Part) -> Tensor:
    """The importance of a part's units [units]; biases count as vectors of one element."""
    import torch

    from methods.prune._structured import unit_views

    def change(parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return parameter.detach() * parameter.grad

    views = unit_views(layer, part, change)
    if config.importance == "vector":
        views = [view.sum(dim=2, keepdim=True) for view in views]
    return torch.stack([view.abs().sum(dim=(1, 2)) for view in views]).sum(dim=0)


# --- budgets --------------------------------------------------------------------------------------------------


def choose(
    config: Config, found: Sequence[Part], chosen: Sequence[Part], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Which units [units] of the chosen parts go, by their names: the share of all units that is asked for."""
    from methods.prune._structured import kept_units, lowest

    gone: dict[str, Tensor] = {}
    for kind in dict.fromkeys(part.budget for part in found):
        total = sum(part.count for part in found if part.budget == kind)
        count = total - kept_units(total, config.sparsity, "exact", f"{kind} of all layers")
        members = [part for part in chosen if part.budget == kind]
        together = [members] if config.scope == "range" else [[part] for part in members]
        for parts, share in zip(together, shares(count, together, kind), strict=True):
            gone |= lowest(parts, [scores[part.name] for part in parts], share)
    return gone


def shares(count: int, together: Sequence[Sequence[Part]], kind: str) -> list[int]:
    """``count`` units divided among the pools as evenly as whole units allow; the first ones take the remainder."""
    pools = max(len(together), 1)
    found = [count // pools + (number < count % pools) for number in range(pools)]
    room = [sum(part.count for part in parts) for parts in together] or [0]
    if any(share > units for share, units in zip(found, room, strict=True)):
        raise AssayError(
            f"prune.llm_pruner: {count} {kind} are to go, but the blocks that are pruned have {sum(room)}, not enough "
            "in each: lower the sparsity, or widen the range with first and end."
        )
    return found[: len(together)]
