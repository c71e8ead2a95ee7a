"""D-Rank: ranks by how spread out the whitened spectrum of each layer is.

Mi et al. 2025, "Layer-wise Dynamic Rank for Compressing Large Language Models" (arXiv 2509.25622):

    p_i = s_i^2 / sum s^2,      R = exp(-sum_i p_i ln p_i)

for the singular values s of W L, with L L^T = X^T X as in SVD-LLM (``prune.svd``): R, the effective rank, lies between
1 and the number of singular values. Layers with a larger one get more of the budget B = keep * (numbers of all layers):

    minimise sum_g R_g / k_g  under  sum_g w_g k_g = B,   w_g = out_g + in_g      =>      k_g ~ sqrt(R_g / w_g)

**This closed form is inferred**: the paper's own was not public to us, only its ingredients. Then the share ``beta`` of
the ranks of queries and keys is moved to the values of the same block, counted in numbers, not in ranks: with grouped
queries a rank of the keys costs less than one of the queries.

Rounding down and capping at min(out, in) would leave up to 8 % of the budget unspent. Here a layer is capped where two
factors cost as much as the matrix, and stays dense there; what the caps cut off goes to the others, and what rounding
leaves is handed out by largest remainders, until no layer could take another rank. The budget is never exceeded. Groups
of neighbouring layers that share a basis (the paper's n) are not built: n = 1.
Statistics are the dense model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Lt

from methods.prune._hessian import block_grams
from methods.prune._lowrank import (
    LowRank,
    Pass,
    collect,
    entries,
    factors_of,
    full_rank,
    pays,
    refuse_zeros,
    truncate,
    whitening,
)
from methods.prune._shares import fill
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
    "methods.prune._shares",
    "methods.prune._walk",
    "methods.architectures",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(LowRank):
    """Options of ``prune.drank``."""

    # Share of the numbers of all linear layers that is left, over all layers together.
    keep: Annotated[float, Gt(0), Lt(1)]
    # Data set that the inputs are measured on; the paper takes WikiText-2.
    data: Dataset
    # Share of the budget of queries and keys that goes to the values of their block; ours, the paper's is not public.
    beta: Annotated[float, Ge(0), Lt(1)] = 0.1


@dataclass(frozen=True)
class Layer:
    """What the budget is shared out by: a layer's shape, and the effective rank of its whitened weight."""

    name: str
    rows: int
    columns: int
    effective_rank: float

    @property
    def size(self) -> int:
        """Numbers of the dense matrix."""
        return self.rows * self.columns

    @property
    def omega(self) -> int:
        """Numbers of one rank."""
        return self.rows + self.columns

    def cost(self, rank: int | None) -> int:
        """Numbers at a rank; None is the dense matrix."""
        return self.size if rank is None else rank * self.omega

    def above(self, rank: int) -> int | None:
        """The next rank, or None where two factors would be no smaller than the matrix."""
        return rank + 1 if pays(rank + 1, self.rows, self.columns) else None


def prune(
    config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress
) -> dict[str, tuple[Tensor, Tensor]]:
    """Two factors for every linear layer of the decoder that does not stay dense."""
    refuse_zeros("prune.drank", model, calibration, config.keep_zeros)
    sequences = calibration.sequences(config.data, config.sequences, config.context_tokens)

    found = collect(model, sequences, progress, [Pass(lambda block, _: decomposed(block))])
    factors = factors_of(model, found)
    layers = [
        Layer(name, len(a), b.shape[1], effective_rank(found[f"{name}/spectrum"]))
        for name, (a, b) in factors.items()
    ]
    ranks = allocate(layers, config.keep, config.beta)
    calibration.stage.notes["effective_ranks"] = {layer.name: layer.effective_rank for layer in layers}
    return {
        name: (a[:, : ranks[name]].contiguous(), b[: ranks[name]].contiguous())
        for name, (a, b) in factors.items()
        if ranks[name] is not None
    }


def decomposed(block: Block) -> dict[str, Tensor]:
    """Every layer of a block at the largest rank that pays, and its whole spectrum: any lower rank is a part of it."""
    grams = block_grams(block)
    found: dict[str, Tensor] = {}
    for local, linear in block.linears().items():
        weight, name = linear.weight, block.full(local)
        truncated = truncate(weight, whitening(grams[local].gram), full_rank(*weight.shape))
        found |= entries(name, truncated.a, truncated.b) | {f"{name}/spectrum": truncated.spectrum}
    return found


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the squared singular values: between 1 and their number."""
    import torch

    energy = spectrum.double().square()
    shares = energy / energy.sum() if float(energy.sum()) > 0 else torch.ones_like(energy) / len(energy)
    return float(torch.special.entr(shares).sum().exp())


# --- the budget ------------------------------------------------------------------------------------------------


def allocate(layers: Sequence[Layer], keep: float, beta: float) -> dict[str, int | None]:
    """The rank of every layer, None where it stays dense; all together cost at most ``keep`` of the matrices.

    Raises:
        AssayError: a layer is left without a single rank.
    """
    budget = int(keep * sum(layer.size for layer in layers))
    numbers = dict(zip((layer.name for layer in layers), shares(layers, budget), strict=True))
    shift(layers, numbers, beta)
    ranks = {layer.name: floor(layer, numbers[layer.name]) for layer in layers}
    spend(layers, numbers, ranks, budget)
    for layer in layers:
        if ranks[layer.name] == 0:
            raise AssayError(
                f"prune.drank: keep={keep:g} leaves no rank for {layer.name} ({layer.rows} x {layer.columns}): raise "
                "keep."
            )
    return ranks


def shares(layers: Sequence[Layer], budget: float, capped: bool = True) -> list[float]:
    """Numbers for every layer: w_g k_g with k_g ~ sqrt(R_g / w_g), none above its matrix unless ``capped`` is False."""
    weights = [(layer.effective_rank * layer.omega) ** 0.5 for layer in layers]
    return fill(weights, [layer.size if capped else budget for layer in layers], budget)


def shift(layers: Sequence[Layer], numbers: dict[str, float], beta: float) -> None:
    """Move ``beta`` of what queries and keys have to the values beside them, as far as these have room; in place."""
    sizes = {layer.name: layer.size for layer in layers}
    for name in sizes:
        stem, _, last = name.rpartition(".")
        givers = [giver for giver in (f"{stem}.q_proj", f"{stem}.k_proj") if giver in sizes]
        given = beta * sum(numbers[giver] for giver in givers)
        if last != "v_proj" or given <= 0:
            continue
        share = min(1.0, (sizes[name] - numbers[name]) / given)
        numbers[name] += share * given
        for giver in givers:
            numbers[giver] *= 1 - share * beta


def floor(layer: Layer, numbers: float) -> int | None:
    """The largest rank within these numbers; None where they are enough for the matrix."""
    if numbers >= layer.size * (1 - 1e-12):
        return None
    return min(int(numbers / layer.omega), full_rank(layer.rows, layer.columns))


def spend(
    layers: Sequence[Layer], numbers: Mapping[str, float], ranks: dict[str, int | None], budget: int
) -> None:
    """Hand out what rounding left, a step at a time to those that lost most, until nobody can afford one; in place."""
    left = budget - sum(layer.cost(ranks[layer.name]) for layer in layers)
    order = sorted(layers, key=lambda layer: layer.cost(ranks[layer.name]) - numbers[layer.name])
    spent = True
    while spent:
        spent = False
        for layer in order:
            rank = ranks[layer.name]
            if rank is None:
                continue
            step = layer.cost(layer.above(rank)) - layer.cost(rank)
            if step <= left:
                ranks[layer.name], left, spent = layer.above(rank), left - step, True
