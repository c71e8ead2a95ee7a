"""A database of sparsities by magnitude: every linear layer with its smallest weights removed, at every level.

The scores are those of LeCun, Denker, Solla 1989 ("Optimal Brain Damage") and Han et al. 2015 ("Learning both Weights
and Connections"), |W_ij| in each matrix; the ladder of levels is EvoPress's (Sieberling, Kuznedelev, Kurtic, Alistarh
2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML 2025), built there with SparseGPT.
Level l of a layer has round(s numel) + l ``weights_step`` zeros. Of equal weights the first go first.

No data is looked at and no random number drawn. Zeros of the parent are the smallest weights there are and stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.levels._blocks import build_layers
from methods.levels._sparsity import Ladder, Made, Sparsities, ladders, write
from methods.stage import Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune import Calibration

SEEDED = False
USES = ("methods.prune._walk", "methods.checkpoint")
KIND = "sparsity"
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
SMOKE = {"levels": 2, "weights_step": None, "calibration_tokens": 256}


@dataclass(frozen=True, kw_only=True)
class Config(Sparsities):
    """Options of ``levels.magnitude``."""


def build(
    config: Config,
    model: PreTrainedModel,
    calibration: Calibration,
    progress: Progress,
    writer: Writer,
) -> None:
    """Write the levels of every layer of the decoder."""
    planned = ladders(config, model, "levels.magnitude")

    def build_layer(block: int, name: str, weight: Tensor) -> None:
        write(config, writer, block, planned[name], levels(weight, planned[name]))

    build_layers(model, progress, writer, build_layer)


def levels(weight: Tensor, ladder: Ladder) -> Iterator[Made]:
    """Every level of a weight [out,in]: without its smallest entries."""
    import torch

    order = weight.abs().flatten().argsort(stable=True)
    for offset, count in ladder.zeros.items():
        removed = torch.zeros_like(order, dtype=torch.bool)
        removed[order[:count]] = True
        removed = removed.view_as(weight)
        yield offset, weight.masked_fill(removed, 0.0), removed
