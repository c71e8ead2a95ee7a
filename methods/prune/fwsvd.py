"""FWSVD: singular value decomposition weighted by how much the loss depends on each input.

Hsu et al. 2022, "Language model compression with weighted low-rank factorization" (ICLR 2022, arXiv 2207.00112):

    F_ij = E[(dL / dw_ij)^2],      W' = trunc_r(W T) T^-1,      T = diag(sqrt(F_j)),   F_j = sum_i F_ij

An importance for every single weight has no closed form; one for every input of the layer has. The paper writes its
matrices [in,out] and sums over rows; here W is [out,in], so that the sum goes over the outputs. The expectation is over
the sequences of ``data``, each with its mean loss per predicted token; the scale of F does not matter. An importance
below 1e-12 of the largest counts as that, so that an input that no loss depends on is not divided by 0.

No official code is public. The weighted error is never above plain truncation's; the plain error is never below it, as
the paper says. The paper takes fine-tuned models of BERT's size and trains them again afterwards (``train.sft``): that
alone this does not do.

Needs the gradients of all linear layers at once: as much memory again as the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.prune._lowrank import (
    LowRank,
    Pass,
    Transform,
    collect,
    factors,
    factors_of,
    refuse_zeros,
)
from methods.prune._walk import linear_weights
from methods.stage import AssayError, Claim, Dataset, NotFinite

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._walk import Block

# The seed draws the sequences that gradients are taken on.
SEEDED = True
USES = (
    "methods.prune._lowrank",
    "methods.prune._walk",
    "methods.architectures",
    "methods.data",
    "methods.terms",
    "methods.checkpoint",
)
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()

# The least importance, as a share of the layer's largest.
FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True)
class Config(LowRank):
    """Options of ``prune.fwsvd``."""

    # Data set whose loss says what matters; the paper takes the task that the model was fine-tuned on.
    data: Dataset


def prune(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress
) -> dict[str, tuple[Tensor, Tensor]]:
    """Two factors for every linear layer of the decoder."""
    refuse_zeros("prune.fwsvd", model, calibration, config.keep_zeros)
    sequences = calibration.sequences(config.data, config.sequences, config.context_tokens)
    fisher = input_fisher(model, sequences, progress)

    def factorise(block: Block, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return factors(block, config.keep, scalings(block, fisher))

    # The blocks are visited in order, but nothing has to go through them any more.
    known = {f"{name}/fisher": sums for name, sums in fisher.items()}
    return factors_of(model, collect(model, [], progress, [Pass(factorise)], len(sequences), known))


def input_fisher(model: PreTrainedModel, sequences: list[Tensor], progress: Progress) -> dict[str, Tensor]:
    """F_j [in] of every linear layer, float64, added up over the sequences; goes on after a kill."""
    state = progress.load()
    names = [name.removesuffix(".weight") for name in linear_weights(model)]
    done = min(state.step, len(sequences)) if state else 0
    saved = state.tensors if state else {}
    sums = {name: saved[f"{name}/fisher"] for name in names if f"{name}/fisher" in saved}
    for number in progress.bar(len(sequences), "sequences", initial=done):
        for name, squares in squared_gradients(model, names, sequences[number]).items():
            sums[name] = sums[name].to(squares.device) + squares if name in sums else squares
        if progress.due(number + 1):
            progress.save(number + 1, {f"{name}/fisher": total for name, total in sums.items()}, {})
    if not sums:
        raise AssayError("prune.fwsvd: no calibration sequence has two tokens: there is no loss to look at.")
    return sums


def squared_gradients(model: PreTrainedModel, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """The squared gradients of one sequence's loss, summed over the outputs, [in] each; none of a single token."""
    import torch

    from methods.prune import sequence_nll

    if ids.shape[1] < 2:
        return {}
    weights = [model.get_parameter(f"{name}.weight").requires_grad_() for name in names]
    with torch.enable_grad():
        gradients = torch.autograd.grad(sequence_nll(model, ids) / (ids.shape[1] - 1), weights)
    return {
        name: row_fisher(gradient.double().square()) for name, gradient in zip(names, gradients, strict=True)
    }


def row_fisher(fisher: Tensor) -> Tensor:
    """F_j [in] of F_ij [out,in]: the rows of the paper's [in,out] matrix."""
    return fisher.sum(dim=0)


def scaling(fisher: Tensor) -> Transform:
    """T for F_j [in]: its root, with a floor; nothing where no weight of the layer has a gradient."""
    import torch

    if not bool(torch.isfinite(fisher).all()):
        raise NotFinite("prune.fwsvd: a gradient of the calibration loss is not finite.")
    largest = float(fisher.max())
    return Transform(fisher.double().clamp(min=FLOOR * largest).sqrt()) if largest > 0 else Transform()


def scalings(block: Block, fisher: Mapping[str, Tensor]) -> dict[str, Transform]:
    """T for every linear layer of a block, from F_j [in] by the layer's name in the model."""
    return {
        local: scaling(fisher[block.full(local)].to(linear.weight.device))
        for local, linear in block.linears().items()
    }
