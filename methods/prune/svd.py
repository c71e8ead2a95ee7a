"""Truncated singular value decomposition of every linear layer, with or without a weighting of its inputs.

    W' = trunc_r(W T) T^-1,      r = int(keep * out * in / (out + in))

``whitening="cholesky"`` is SVD-LLM: Wang et al. 2025, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large
Language Model Compression" (ICLR 2025, arXiv 2403.07378). T = L with L L^T = X^T X, the second moments of the layer's
inputs in the dense model; then the truncation is the best there is for the layer's outputs on these inputs.
``update=True`` is its second phase: the layers are walked in order on the inputs that *compressed* blocks give, and the
left factor becomes the least-squares solution for the layer's own outputs on them. On the inputs of the whitening this
changes nothing, because that truncation is the least-squares optimum already.

``whitening="diagonal"`` is ASVD: Yuan et al. 2023, "ASVD: Activation-aware Singular Value Decomposition for Compressing
Large Language Models" (arXiv 2312.05821). T = diag(a^alpha) + 1e-6 with a_j the mean |x_j| of a sequence, summed over
the sequences. The search over layers that the paper adds is not part of it: every layer keeps the same share.

``whitening="none"`` is plain truncation, T = I, without data.

Where papers and official code disagree. AIoT-MLSys-Lab/SVD-LLM: the help of ``--ratio`` says that a share is kept, the
code *removes* it; here ``keep`` is what is kept. Its Llama sizes keys and values as if every query head had its own;
here each matrix has its own rank. hahnyuan/ASVD4LLM takes a randomised decomposition with exactly r columns, up to 12 %
worse than the exact one and different with every seed; here it is exact.

Memory beside the model: the hidden states of all sequences at one depth, the second moments of one block's inputs, and
the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from methods.prune._hessian import Gram, block_grams
from methods.prune._lowrank import (
    LowRank,
    Pass,
    Transform,
    collect,
    entries,
    factors,
    factors_of,
    refit,
    refuse_zeros,
    whitening,
)
from methods.stage import AssayError, Claim, Dataset

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._walk import Block

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.prune._lowrank",
    "methods.prune._hessian",
    "methods.prune._walk",
    "methods.architectures",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()

# What keeps a channel that is never used from being divided by; hahnyuan/ASVD4LLM.
FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(LowRank):
    """Options of ``prune.svd``."""

    # Data set that the inputs are measured on; the papers take WikiText-2. Only whitening="none" does without.
    data: Dataset | None = None
    # What the inputs are weighted by: their second moments (SVD-LLM), their sizes (ASVD), or nothing.
    whitening: Literal["none", "cholesky", "diagonal"] = "cholesky"
    # Exponent of the sizes with whitening="diagonal"; the paper's 0.5.
    alpha: Annotated[float, Ge(0)] = 0.5
    # Whether the left factors are fitted again, block after block, on the inputs that compressed blocks give.
    update: bool = False

    def __post_init__(self) -> None:
        if self.data is None and (self.whitening != "none" or self.update):
            raise AssayError(
                'prune.svd needs data="..." to look at activations: name a data set, or use whitening="none" without '
                "update."
            )


def prune(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress
) -> dict[str, tuple[Tensor, Tensor]]:
    """Two factors for every linear layer of the decoder."""
    refuse_zeros("prune.svd", model, calibration, config.keep_zeros)
    sequences = (
        calibration.sequences(config.data, config.sequences, config.context_tokens) if config.data else []
    )

    def factorise(block: Block, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return factors(block, config.keep, input_transforms(config, block))

    passes = [Pass(factorise)] + ([Pass(updated, compressed=True)] if config.update else [])
    return factors_of(model, collect(model, sequences, progress, passes))


def updated(block: Block, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers of a block with their left factors fitted to the inputs that they have now."""
    linears = block.linears()
    grams = block_grams(block, [local for local in linears if f"{block.full(local)}/a" in found])
    changed: dict[str, Tensor] = {}
    for local, gram in grams.items():
        weight, name = linears[local].weight, block.full(local)
        b = found[f"{name}/b"].to(weight.device)
        changed |= entries(name, refit(weight, b, gram.gram), b)
    return changed


def input_transforms(config: Config, block: Block) -> dict[str, Transform]:
    """T for every linear layer of a block."""
    if config.whitening == "none":
        return dict.fromkeys(block.linears(), Transform())
    if config.whitening == "cholesky":
        return whitenings(block_grams(block))
    return {name: scaling(sizes, config.alpha) for name, sizes in absolute_means(block).items()}


def whitenings(grams: Mapping[str, Gram]) -> dict[str, Transform]:
    """The Cholesky factor for every layer; layers that share their inputs share it."""
    made = {id(gram): whitening(gram.gram) for gram in {id(gram): gram for gram in grams.values()}.values()}
    return {name: made[id(gram)] for name, gram in grams.items()}


def absolute_means(block: Block) -> dict[str, Tensor]:
    """The mean |x_j| of a sequence summed over the sequences, [in] in float64, for every linear layer."""
    sums: dict[str, Tensor] = {}

    def see(name: str, inputs: Tensor) -> None:
        mean = inputs.double().abs().mean(dim=0)
        sums[name] = sums[name] + mean if name in sums else mean

    block.run_watched(see)
    return sums


def scaling(sizes: Tensor, alpha: float) -> Transform:
    """ASVD's diagonal for sizes [in]."""
    return Transform(sizes.double() ** alpha + FLOOR)
