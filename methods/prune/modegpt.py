"""MoDeGPT: fewer inner dimensions of the matrix pairs of a block, without an adapter and without training.

Lin et al. 2025, "MoDeGPT: Modular Decomposition for Large Language Model Compression" (ICLR 2025, arXiv 2408.09632).
Three kinds of pairs, each with a decomposition of its own; C is the second moment of what enters the pair, in the dense
model, as a mean over tokens:

``mlp`` (Nystroem), h = act(gate x) * up x, C = E[h h^T]. The k neurons S with the largest ridge leverage stay, and the
down projection is fitted again to do the others' work:

    leverage = diag(C (C + lambda I)^-1),      W_down <- W_down C[:,S] (C[S,S])^-1

``vo`` (SVD), per head: the product W_o W_v is truncated, weighted by C; with grouped queries one W_v is kept for all
query heads of a group. ``qk`` (CR): head dimensions with the largest |C^1/2 w_q,i| |C^1/2 w_k,i| stay, both dimensions
of a rotary pair together, scores added up over the query heads of a group; nothing is fitted again.

How many go differs from block to block: with the block influence BI_l = 1 - E[cos(h_l, h_l+1)],

    phi_l = L phi softmax(-BI / epsilon)_l

which can exceed 1; at ``max_sparsity`` it is capped, and what is cut off goes to the other blocks in proportion. The
numbers of neurons are rounded so that their sum over all blocks is the target exactly. BI is measured at the blocks'
own outputs: the last one's is *not* taken behind the final norm.

No official code is public. cbacary/MoDeGPT, a third party's, adds an *absolute* lambda of 1e-2, so that its choice
depends on the scale of the activations; here lambda is a share of C's mean diagonal, and ``ridge="absolute"`` does as
they do. ``selection`` and ``refit`` are there for the ablation: by plain contribution C_jj |w_down,j|^2 with the same
refit one does as well, on small models; the refit carries the method.

The chain form has the parent's shapes. Neurons that went are zero rows of gate and up and zero columns of down, and the
physical form is without them. ``vo`` and ``qk`` leave zero rows and columns *within* heads: exact in the chain form,
but no stock class has heads of unequal widths (Llama ties the values' width to the queries', and rotary frequencies
would have to be kept by head), so that the physical form is smaller in the MLP alone. Fitting again fills zeros: a
pruned parent is refused unless ``keep_zeros=False``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Lt

from methods.prune import Calibrated
from methods.prune._hessian import block_grams
from methods.prune._lowrank import (
    Pass,
    collect,
    refuse_zeros,
    solve_symmetric,
    truncate,
    whitening,
)
from methods.prune._shares import apportion, fill
from methods.stage import AssayError, Claim

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._walk import Block

# The seed draws the calibration sequences, and the neurons with selection="random".
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

# Matrices in which fitting again would fill zeros.
FILLED = {"mlp": ("mlp.down_proj.weight",), "vo": ("v_proj.weight", "o_proj.weight"), "qk": ()}


@dataclass(frozen=True, kw_only=True)
class Config(Calibrated):
    """Options of ``prune.modegpt``."""

    # Share of the neurons that goes, over all blocks together; with "vo" and "qk" also of the heads' dimensions.
    sparsity: Annotated[float, Gt(0), Lt(1)]
    # Which pairs are made narrower; only the MLP's leave a smaller physical form.
    parts: tuple[Literal["mlp", "vo", "qk"], ...] = ("mlp",)
    # What neurons stay: the paper's ridge leverage, the largest contribution, or random ones.
    selection: Literal["leverage", "norm", "random"] = "leverage"
    # Whether the down projection is fitted again to the neurons that stay.
    refit: bool = True
    # lambda of the leverage; the third party's value.
    damping: Annotated[float, Gt(0)] = 1e-2
    # lambda as a share of the mean of C's diagonal (ours), or as it is (the third party's).
    ridge: Literal["relative", "absolute"] = "relative"
    # How evenly the blocks share the sparsity: the larger, the more; ours (the third party takes 0.015).
    epsilon: Annotated[float, Gt(0)] = 0.1
    # Largest share that goes from one block; the third party's.
    max_sparsity: Annotated[float, Gt(0), Lt(1)] = 0.8
    # Whether zeros of the parent must stay: fitting again fills them, so that such a parent is then refused.
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise AssayError('prune.modegpt: parts names "mlp", "vo" or "qk", at least one and each once.')
        if self.sparsity > self.max_sparsity:
            raise AssayError(
                f"prune.modegpt: sparsity={self.sparsity:g} is above max_sparsity={self.max_sparsity:g}, which no "
                "block may exceed: raise max_sparsity."
            )


def structural(config: Config) -> bool:
    """Whether whole neurons go, so that a physically smaller model exists."""
    return "mlp" in config.parts


def prune(config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress) -> None:
    """Make the pairs of every block narrower, in place."""
    from methods.architectures import require_llama

    require_llama(model, "prune.modegpt")
    refuse_zeros("prune.modegpt", model, calibration, config.keep_zeros, filled(config))
    sequences = calibration.sequences(config.data, config.sequences, config.context_tokens)
    layers: Any = model.base_model.layers

    def measure(block: Block, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"influence/{block.index}": block_influence(block)}

    def narrow(block: Block, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        counts = plan(config, layers, influences(found))
        here = {part: several[block.index] for part, several in counts.items()}
        changed = narrower(config, block, here, progress.random(block.index))
        return {f"{block.index}/{name}": tensor for name, tensor in changed.items()}

    found = collect(model, sequences, progress, [Pass(measure), Pass(narrow)])
    influence = influences(found)
    calibration.stage.notes |= {
        "block_influence": influence,
        "removed_units": plan(config, layers, influence),
    }
    put_in(layers, found)


def put_in(layers: Any, found: Mapping[str, Tensor]) -> None:
    """Give the blocks their changed parameters, named ``block/parameter``, in place."""
    import torch

    with torch.no_grad():
        for key, tensor in found.items():
            index, _, name = key.partition("/")
            if index != "influence":
                layers[int(index)].get_parameter(name).copy_(tensor)


def filled(config: Config) -> tuple[str, ...]:
    """Endings of the weights whose zeros would not stay."""
    parts = [part for part in config.parts if part != "mlp" or config.refit]
    return tuple(ending for part in parts for ending in FILLED[part]) or ("no weight at all",)


def narrower(
    config: Config, block: Block, counts: Mapping[str, int], random: torch.Generator
) -> dict[str, Tensor]:
    """The changed parameters of a block, by their names in it; ``counts`` is how many units go from each pair."""
    grams = block_grams(block, ("mlp.down_proj", "self_attn.q_proj"))
    moments = {name: gram.gram.double() / gram.tokens for name, gram in grams.items()}
    module: Any = block.module
    changed: dict[str, Tensor] = {}
    if "mlp" in counts:
        changed |= mlp(config, module.mlp, moments["mlp.down_proj"], counts["mlp"], random)
    if "vo" in counts:
        changed |= values_and_outputs(module.self_attn, moments["self_attn.q_proj"], counts["vo"])
    if "qk" in counts:
        changed |= queries_and_keys(module.self_attn, moments["self_attn.q_proj"], counts["qk"])
    return changed


# --- how many go from each block -------------------------------------------------------------------------------


def block_influence(block: Block) -> Tensor:
    """1 - the mean cosine of what enters and what leaves the block at a token; a scalar in float64."""
    import torch
    from torch.nn.functional import cosine_similarity

    pairs = zip(block.inputs, block.run(), strict=True)
    cosines = [
        cosine_similarity(before.double(), after.double(), dim=-1).flatten() for before, after in pairs
    ]
    return 1 - torch.cat(cosines).mean()


def influences(found: Mapping[str, Tensor]) -> list[float]:
    """The influence of every block, of all that was found."""
    count = sum(key.startswith("influence/") for key in found)
    return [float(found[f"influence/{index}"]) for index in range(count)]


def plan(config: Config, layers: Any, influence: Sequence[float]) -> dict[str, list[int]]:
    """How many units go from each pair of every block."""
    return {part: removed(config, influence, units(part, layers)) for part in config.parts}


def units(part: str, layers: Any) -> list[int]:
    """How many units a pair of every block has: neurons, dimensions of a head, or its rotary pairs."""
    if part == "mlp":
        return [layer.mlp.down_proj.in_features for layer in layers]
    return [layer.self_attn.head_dim // (2 if part == "qk" else 1) for layer in layers]


def sparsities(
    influence: Sequence[float], sparsity: float, epsilon: float, most: float, sizes: Sequence[int]
) -> list[float]:
    """phi_l: the share that goes from every block of that many units, on average ``sparsity``, none above ``most``."""
    import torch

    weights = torch.softmax(-torch.tensor(influence, dtype=torch.float64) / epsilon, dim=0).tolist()
    asked = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    gone = fill(asked, [most * size for size in sizes], sparsity * sum(sizes))
    return [count / size for count, size in zip(gone, sizes, strict=True)]


def removed(config: Config, influence: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """How many units go from every block: round(sparsity * all of them) together, and at least one stays in each.

    Raises:
        AssayError: that many cannot go without a block exceeding ``max_sparsity``.
    """
    total = round(config.sparsity * sum(sizes))
    room = [min(int(config.max_sparsity * size), size - 1) for size in sizes]
    if total > sum(room):
        raise AssayError(
            f"prune.modegpt: {total} of {sum(sizes)} units cannot go with max_sparsity={config.max_sparsity:g} and one "
            f"unit left in each block ({sum(room)} can): lower sparsity, or raise max_sparsity."
        )
    shares = sparsities(influence, config.sparsity, config.epsilon, config.max_sparsity, sizes)
    return apportion([share * size for share, size in zip(shares, sizes, strict=True)], room, total)


# --- MLP -------------------------------------------------------------------------------------------------------


def mlp(
    config: Config, module: Any, moment: Tensor, count: int, random: torch.Generator
) -> dict[str, Tensor]:
    """The MLP's parameters without ``count`` of its neurons, whose second moment is C [neurons,neurons]."""
    import torch

    down = module.down_proj.weight
    scores = neuron_scores(config, moment, down, random)
    kept = scores.argsort(descending=True, stable=True)[: len(scores) - count].sort().values
    new = torch.zeros_like(down)
    new[:, kept] = (refitted(down, moment, kept) if config.refit else down[:, kept]).to(down.dtype)
    changed = {"mlp.down_proj.weight": new}
    for name in ("gate_proj", "up_proj"):
        for part, values in getattr(module, name).named_parameters():
            changed[f"mlp.{name}.{part}"] = torch.zeros_like(values).index_copy(0, kept, values[kept])
    return changed


def neuron_scores(config: Config, moment: Tensor, down: Tensor, random: torch.Generator) -> Tensor:
    """What neurons are kept by, largest first: [neurons]."""
    import torch

    if config.selection == "random":
        return torch.rand(len(moment), generator=random).to(moment.device)
    if config.selection == "norm":
        return moment.diagonal() * down.double().square().sum(dim=0)
    scale = float(moment.diagonal().mean()) if config.ridge == "relative" else 1.0
    return leverage(moment, config.damping * scale)


def leverage(moment: Tensor, ridge: float) -> Tensor:
    """diag(C (C + ridge I)^-1) [neurons], between 0 and 1, for C [neurons,neurons]."""
    import torch

    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0)
    # All inputs dead: none has any leverage, and nothing is divided by 0.
    weights = torch.where(values > 0, values / (values + ridge), 0.0)
    return vectors.square() @ weights


def refitted(down: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """W_down C[:,S] (C[S,S])^-1, [hidden, kept], in float64."""
    columns = moment.double()[:, kept]
    return solve_symmetric(columns[kept], down.double() @ columns)


# --- attention -------------------------------------------------------------------------------------------------


def values_and_outputs(attention: Any, moment: Tensor, count: int) -> dict[str, Tensor]:
    """Values and outputs whose heads have ``count`` dimensions fewer: zero rows of W_v, zero columns of W_o.

    Attention sums its values with weights that add up to 1, so that what a bias of the values gives is a constant; it
    moves into the bias of the outputs.
    """
    import torch

    value, output, width = attention.v_proj, attention.o_proj, attention.head_dim
    new_value, new_output = torch.zeros_like(value.weight), torch.zeros_like(output.weight)
    groups = value.out_features // width
    queries = output.in_features // width // groups
    transform = whitening(moment)
    for group in range(groups):
        rows = slice(group * width, (group + 1) * width)
        columns = slice(group * queries * width, (group + 1) * queries * width)
        # [hidden, queries * width] becomes [queries * hidden, width]: the heads of a group one below the other.
        stacked = torch.cat(output.weight[:, columns].double().split(width, dim=1))
        basis, square = torch.linalg.qr(stacked)
        found = truncate(square @ value.weight[rows].double(), transform, width - count)
        new_value[rows][: width - count] = found.b.to(new_value.dtype)
        heads = (basis @ found.a).to(new_output.dtype).chunk(queries)
        for number, head in enumerate(heads):
            start = columns.start + number * width
            new_output[:, start : start + width - count] = head
    changed = {"self_attn.v_proj.weight": new_value, "self_attn.o_proj.weight": new_output}
    return changed | _moved_bias(value, output, queries, width)


def _moved_bias(value: Any, output: Any, queries: int, width: int) -> dict[str, Tensor]:
    """The biases after the move, where there are any."""
    import torch

    if value.bias is None:
        return {}
    if output.bias is None:
        raise AssayError(
            "prune.modegpt: the values have a bias and the outputs have none to take it up: leave vo out of parts."
        )
    constant = value.bias.unflatten(0, (-1, 1, width)).expand(-1, queries, -1).flatten()
    return {
        "self_attn.v_proj.bias": torch.zeros_like(value.bias),
        "self_attn.o_proj.bias": output.bias + output.weight @ constant,
    }


def queries_and_keys(attention: Any, moment: Tensor, count: int) -> dict[str, Tensor]:
    """Queries and keys whose heads have ``count`` rotary pairs fewer: zero rows in both."""
    import torch

    width = attention.head_dim
    groups = attention.k_proj.out_features // width
    keys = norms(attention.k_proj, moment).view(groups, 1, width)
    queries = norms(attention.q_proj, moment).view(groups, -1, width)
    # A rotation mixes dimension i with i + width / 2, and nothing else.
    scores = (queries * keys).sum(dim=1).view(groups, 2, width // 2).sum(dim=1)
    gone = torch.zeros_like(scores, dtype=torch.bool)
    gone.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], True)
    rows = torch.cat([gone, gone], dim=1)
    changed = {}
    for name, heads in (("q_proj", queries.shape[1]), ("k_proj", 1)):
        mask = rows[:, None].expand(-1, heads, -1).flatten()
        for part, values in getattr(attention, name).named_parameters():
            shape = (-1, *[1] * (values.ndim - 1))
            changed[f"self_attn.{name}.{part}"] = values.masked_fill(mask.view(shape), 0.0)
    return changed


def norms(projection: Any, moment: Tensor) -> Tensor:
    """|C^1/2 w_i| of every row of a projection, [out]: the root mean square of that output, without its bias."""
    rows = projection.weight.double()
    return ((rows @ moment) * rows).sum(dim=1).clamp(min=0).sqrt()
