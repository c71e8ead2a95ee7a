"""Cutting: the physically smaller form of a model that already has units of zeros; nothing more is removed.

A unit whose outgoing weights are zero can be taken out with everything that leads to it, and no output changes: Li,
Kadav, Durdanovic, Samet, Graf 2017, "Pruning Filters for Efficient ConvNets" (ICLR 2017, arXiv 1608.08710), figure 1,
for filters and their feature maps. Here, for a head h with columns W_o[:, h] and a neuron j,

    W_o[:, h] = 0   or   W_down[:, j] = 0,

and a whole attention, MLP or block where all of them are zero (``methods.architectures.cutting``).

Structural pruning writes this form by itself. What is trained afterwards has the zeros only: training keeps them
(``keep_zeros``), and ``pruned > distill.forward_kl > prune.cut`` makes the healed model really smaller. Layers that a
low-rank method wrote as two factors are dense after training: their rank does not show in zeros.

The method draws no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.stage import AssayError, Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration

SEEDED = False
USES = ("methods.architectures", "methods.checkpoint")
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


def prune(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress
) -> dict[str, tuple[Tensor, Tensor]]:
    """Leave the weights as they are; there are no factors. Raises an AssayError where nothing can be cut."""
    from methods.architectures import require_llama
    from methods.architectures.cutting import Cut

    require_llama(model, "prune.cut", whole=False)
    if not Cut.of(model).smaller:
        raise AssayError(
            "prune.cut: nothing can be cut from this model. No head has only zeros in its columns of o_proj, and no "
            "neuron in its column of down_proj: remove some first, for example with "
            'prune.magnitude(sparsity=0.5, structure="neurons"), and leave keep_zeros true in what trains it after.'
        )
    return {}
