"""VQ-Logits head: tokens share a few output vectors.

"VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits": with K code vectors
c_k and a fixed map M from tokens to codes,

    o_iv = x_i . c_M(v)        p = softmax over all V tokens

No official code is public. Tokens of one code are indistinguishable, so the loss cannot fall below E[log g], g being
the size of the right token's group; a hundred tokens to a code cost 4.6 nats. The paper reports 4 % more perplexity at
99 % fewer output parameters, which is possible only where the frequent tokens own their codes.

The map is made once, from the class vectors of the model the head is put on, by k-means (Lloyd), and travels with the
model; each code starts at the mean of its group. A head built from nothing deals the tokens out in turn. The scores of
a group are one number: the sum of the softmax needs K exponentials weighted with the group sizes
(``token_losses``), which is how the loss ``cut_cross_entropy`` takes this head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from methods.head import widen
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the VQ-Logits head."""

    # K, the number of output vectors.
    codes: Annotated[int, Ge(1)] = 256
    # Passes of k-means over the class vectors; 0 keeps the groups of the vectors that it starts from.
    iterations: Annotated[int, Ge(0)] = 10


def rows(config: Config, classes: int) -> int:
    """K."""
    if config.codes > classes:
        raise AssayError(
            f"head vq_logits: {config.codes} codes for {classes} classes; codes must be at most the classes."
        )
    return config.codes


def parameters(config: Config, weight: Tensor) -> dict[str, Tensor]:
    """The code of every class [V], dealt out in turn."""
    import torch

    return {"code_of": torch.arange(len(weight), device=weight.device) % config.codes}


def adopted(config: Config, vectors: Tensor) -> dict[str, Tensor]:
    """Code vectors [K,d] and the code of every class [V], from class vectors [V,d]."""
    rows(config, len(vectors))
    centres, groups = k_means(widen(vectors), config.codes, config.iterations)
    return {"weight": centres.to(vectors.dtype), "code_of": groups}


def k_means(vectors: Tensor, count: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Centres [K,d] and the group of every vector [V]; the same for the same vectors.

    It starts from vectors evenly spread over their order along the first axis of the data. A group that loses all its
    members takes the vector that lies farthest from its own centre.
    """
    import torch

    order = first_axis(vectors).argsort(stable=True)
    places = torch.arange(count, device=vectors.device) * len(vectors) // count
    centres = vectors[order[places]]
    groups = assigned(vectors, centres)
    for _ in range(iterations):
        centres = means(vectors, groups, count)
        groups = assigned(vectors, centres)
    return means(vectors, groups, count), groups


def first_axis(vectors: Tensor) -> Tensor:
    """Each vector's coordinate along the direction in which they differ most [V]."""
    import torch

    centred = vectors - vectors.mean(dim=0)
    axis: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    return centred @ (axis * axis[axis.abs().argmax()].sign())


def assigned(vectors: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of every vector [V], none of them left without one."""
    import torch

    squares = centres.square().sum(dim=1) - 2 * vectors @ centres.T
    nearest, groups = squares.min(dim=1)
    far = (nearest + vectors.square().sum(dim=1)).argsort(descending=True, stable=True).tolist()
    sizes = torch.bincount(groups, minlength=len(centres))
    for empty in (sizes == 0).nonzero().flatten().tolist():
        given = next(place for place in far if sizes[groups[place]] > 1)
        sizes[groups[given]] -= 1
        sizes[empty] += 1
        groups[given] = empty
    return groups


def means(vectors: Tensor, groups: Tensor, count: int) -> Tensor:
    """The mean of every group [K,d]."""
    import torch

    sums = vectors.new_zeros(count, vectors.shape[1]).index_add_(0, groups, vectors)
    return sums / torch.bincount(groups, minlength=count)[:, None]


def code_scores(hidden: Tensor, weight: Tensor) -> Tensor:
    """Scores [N,K] of the codes."""
    import torch
    from torch.nn.functional import linear

    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return widen(linear(hidden.to(dtype), weight.to(dtype)))


def scores(config: Config, hidden: Tensor, weight: Tensor, code_of: Tensor) -> Tensor:
    """Scores [N,V] of hidden states [N,d] for the codes [K,d] of the classes."""
    return code_scores(hidden, weight).index_select(1, code_of)


def block(config: Config, hidden: Tensor, weight: Tensor, classes: slice, code_of: Tensor) -> Tensor:
    """The scores [N,v] of a slice of the classes."""
    return scores(config, hidden, weight, code_of[classes])


def token_losses(
    config: Config,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    code_of: Tensor,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of targets [N] and log Z [N] from K scores a token, each of them as often as its group is large."""
    import torch

    found = code_scores(hidden, weight)
    found = found if softcap is None else softcap * (found / softcap).tanh()
    sizes = torch.bincount(code_of, minlength=len(weight)).to(found.dtype)
    normalisers = (found + sizes.log()).logsumexp(dim=1)
    return normalisers - found.gather(1, code_of[targets][:, None])[:, 0], normalisers


def class_vectors(config: Config, weight: Tensor, code_of: Tensor) -> Tensor:
    """The code vector of every class [V,d]."""
    return weight.index_select(0, code_of)


def separable(config: Config) -> bool:
    """No score depends on another class."""
    return True


def ceiling(config: Config, width: int, classes: int) -> float:
    """The best probability, exp(-E[log g]), of even groups; ``loss_floor`` says what it is for the groups there are."""
    return min(config.codes / classes, 1.0)


def loss_floor(config: Config, weight: Tensor, code_of: Tensor) -> float:
    """E[log g] in nats, every class being equally frequent."""
    import torch

    return float(torch.bincount(code_of).to(torch.float64)[code_of].log().mean())
