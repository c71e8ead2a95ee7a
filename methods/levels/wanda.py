"""A database of sparsities by Wanda's scores: every linear layer without its least used weights, at every level.

The score is that of Sun, Liu, Bair, Kolter 2024, "A Simple and Effective Pruning Approach for Large Language Models"
(ICLR 2024), |W_ij| ||X_j||_2, compared within each output row; the ladder of levels is EvoPress's (Sieberling,
Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML 2025),
built there with SparseGPT. Level l of a layer has round(s numel) + l ``weights_step`` zeros in all.

Wanda removes the same number in every row. Where a level's zeros do not divide by the rows, the first rows lose one
more, so that the total is exact; a row that has more zeros in the parent keeps them, and the others lose fewer.

Weights that stay are not changed, and all levels are measured on the dense model unless ``error_propagation`` says
otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.levels import _sparsity
from methods.levels._sparsity import Ladder, Made, MeasuredSparsities
from methods.prune._hessian import input_energies
from methods.prune._shares import spread
from methods.stage import Claim

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.levels._database import Writer
    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._walk import Block

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.prune",
    "methods.prune._hessian",
    "methods.prune._shares",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
KIND = "sparsity"
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
SMOKE = {"levels": 2, "weights_step": None, "calibration_tokens": 256}


@dataclass(frozen=True, kw_only=True)
class Config(MeasuredSparsities):
    """Options of ``levels.wanda``."""


def build(
    config: Config,
    model: PreTrainedModel,
    calibration: Calibration,
    progress: Progress,
    writer: Writer,
) -> None:
    """Write the levels of every layer of the decoder, block after block."""
    _sparsity.build(config, model, calibration, progress, writer, "levels.wanda", solve_block)


def solve_block(block: Block, ladders: Mapping[str, Ladder]) -> Iterator[tuple[str, Iterable[Made]]]:
    """The levels of those layers of a block that have a ladder."""
    energies, linears = input_energies(block), block.linears()
    for name, ladder in ladders.items():
        yield name, levels(linears[name].weight.detach(), energies[name], ladder)


def levels(weight: Tensor, energy: Tensor, ladder: Ladder) -> Iterator[Made]:
    """Every level of a weight [out,in] whose inputs have these energies [in]."""
    import torch

    # Zeros come before weights that no input reaches, which score 0 as well.
    scores = (weight.abs() * energy.sqrt()).masked_fill(weight == 0, -1.0)
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    rows, columns = weight.shape
    zeros = (weight == 0).sum(dim=1).tolist()
    for offset, count in ladder.zeros.items():
        counts = torch.tensor(spread(count, [columns] * rows, zeros), device=weight.device)
        removed = rank < counts[:, None]
        yield offset, weight.masked_fill(removed, 0.0), removed
