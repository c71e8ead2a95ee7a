"""EISL, the edit-invariant sequence loss: the n-grams of the target may stand anywhere in the output.

Liu, Yang, Tao, Hu, ... 2022, "Don't Take It Literally: An Edit-Invariant Sequence Loss for Text Generation", section 3.
With p_i the distribution at output position i and y_j the target at j,

    c[i,j] = max(log p_i(y_j), -20)         term[i,j] = 1/n sum_{k<n} c[i+k, j+k]
    w[i,j] = softmax over i of (term[i,j] + Gumbel noise)
    l = -sum over n of 1/|ngrams| mean_j sum_i w[i,j] term[i,j]       total = ngram_factor l + ce_factor CE

n from 0 down means the number of target tokens plus n, so 0 is the whole sequence; an n longer than the sequence is
left out, and where none is left n is the whole sequence. Output and target have the same length.

Defects of the official code (guangyliu/EISL, ``EISL.py``), not repeated here: padding counts like text (here only
answer tokens do, as if nothing else were there); ``.cuda()`` is written out; the noise is drawn afresh in every call
and cannot be seeded (here it comes from torch's generator, which the loop seeds; it differs between micro-batch
sizes). Its CE is a mean over all tokens of the batch, here over the tokens of a sequence first. The model is fed the
target, so position i has *seen* y_j for j < i: made for models that predict all positions at once, the loss can be
lowered by copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)
TASKS = ("language",)
# Log-probabilities below this count as this much and get no gradient, as in the official code.
LEAST_LOG_PROBABILITY = -20.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of EISL."""

    # lengths of the n-grams, from 0 down counted from the length of the sequence; the official code names no default
    ngrams: tuple[int, ...] = (2,)
    # weight of the n-gram loss; the official code names no default
    ngram_factor: Annotated[float, Ge(0)] = 1.0
    # weight of the cross entropy beside it; the official code names no default
    ce_factor: Annotated[float, Ge(0)] = 0.0
    # gumbel: positions are chosen at random, as in the official code; none: by their own weight
    noise: Literal["gumbel", "none"] = "gumbel"

    def __post_init__(self) -> None:
        """There has to be something to compare and to minimise."""
        if not self.ngrams:
            raise AssayError("eisl: ngrams is empty; name at least one length, as in ngrams=(2,).")
        if self.ngram_factor == self.ce_factor == 0:
            raise AssayError("eisl: ngram_factor and ce_factor are both 0; set one of them above 0.")


def sequence_losses(config: Config, scores: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Loss of each sequence [B], in nats, from scores [B,T,V], targets [B,T] and which of them count [B,T]."""
    logs, lengths = aligned(scores, targets, mask)
    inside = positions(lengths, logs.shape[1])
    loss = config.ngram_factor * ngram_losses(config, logs, lengths)
    if config.ce_factor:
        own = logs.diagonal(dim1=1, dim2=2)
        loss = loss - config.ce_factor * (own * inside).sum(1) / lengths.clamp(min=1)
    return loss


def aligned(scores: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``log p_i(y_j)`` [B,L,L] over the L places that count, moved to the front, and how many each sequence has [B]."""
    lengths = mask.sum(1)
    places = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    # Targets that do not count are no token ids.
    wanted = targets.gather(1, places).clamp(min=0)
    scores = scores.gather(1, places[:, :, None].expand(-1, -1, scores.shape[-1]))
    right = scores.gather(2, wanted[:, None, :].expand(-1, wanted.shape[1], -1))
    return right - scores.logsumexp(-1, keepdim=True), lengths


def positions(lengths: Tensor, width: int) -> Tensor:
    """Which of ``width`` places each sequence has [B,width]."""
    import torch

    return torch.arange(width, device=lengths.device) < lengths[:, None]


def ngram_losses(config: Config, logs: Tensor, lengths: Tensor) -> Tensor:
    """The loss of each sequence [B] over its n-grams, from ``log p_i(y_j)`` [B,L,L] and lengths [B]."""
    sizes = [sizes_of(config.ngrams, int(length)) for length in lengths]
    limited = logs.clamp(min=LEAST_LOG_PROBABILITY)
    total = logs.new_zeros(len(lengths))
    for size in sorted({size for several in sizes for size in several}):
        share = logs.new_tensor([1 / len(several) if size in several else 0.0 for several in sizes])
        total = total - share * matched(config, limited, lengths, size)
    return total


def sizes_of(ngrams: Sequence[int], length: int) -> set[int]:
    """The lengths of the n-grams of a sequence."""
    wanted = {size if size > 0 else length + size for size in ngrams}
    return {size for size in wanted if 0 < size <= length} or ({length} if length else set())


def matched(config: Config, logs: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Mean over target n-grams of their log-probability [B] where the output has them."""
    width = logs.shape[1] - size + 1
    windows = [logs[:, start : start + width, start : start + width] for start in range(size)]
    term = sum(windows[1:], start=windows[0]) / size
    inside = positions(lengths - size + 1, width)
    choice = term + gumbel(term) if config.noise == "gumbel" else term
    weights = choice.masked_fill(~inside[:, :, None], -1e30).softmax(dim=1)
    found = (weights * term).sum(1)
    return (found * inside).sum(1) / inside.sum(1).clamp(min=1)


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the same shape, from torch's global generator."""
    import torch

    return -torch.empty_like(like).exponential_().log()
