"""Round to nearest: every weight at the nearest number of its group's grid, the baseline of all quantisers.

Without calibration and without a look at any other weight: w becomes s (c - z), c its code. With the ``official`` grid
this is the ``nearest`` baseline of Frantar et al. 2023, "GPTQ" (IST-DASLab/gptq, ``quant.py``); QuantEase's own grouped
baseline (linkedin/QuantEase, ``method/rtn.py``) puts the whole matrix on the *last* group's grid instead, which is not
followed. ``methods/prune/_grids.py`` has the grids.

Weights that are 0 in the parent stay 0 on both grids: 0 has a code in every group that holds a 0.

The method draws no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from methods.prune._grids import Gridded, nearest, sizes
from methods.prune._walk import linear_weights
from methods.stage import Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration

SEEDED = False
USES = ("methods.prune._grids", "methods.prune._walk", "methods.checkpoint")
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Gridded):
    """The grid, and how many numbers it has."""

    # Bits of a code.
    bits: Annotated[int, Ge(2), Le(8)] = 4


def prune(config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress) -> None:
    """Put the weights of every decoder layer on their grid, in place."""
    calibration.stage.notes |= sizes(model, config.numbers, config.bits, config.group)
    names = list(linear_weights(model))
    for _, name in zip(progress.bar(len(names), "layers quantised"), names, strict=True):
        weight = model.get_parameter(name).data
        weight.copy_(rounded(config, weight))


def rounded(config: Config, weight: Tensor) -> Tensor:
    """A matrix [out,in] with every weight at the nearest number of its grid."""
    return nearest(weight, config.numbers, config.bits, config.group).weight()
