"""Policy gradient of the reverse KL over whole sequences that the student (or a mixture with the teacher) has written.

Gu, Dong, Wei, Huang 2024, "MiniLLM: Knowledge Distillation of Large Language Models", with the clipped objective of
Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; token by token, with q the student, q_old what it was
when it wrote and w its probability there divided by that of the mixture that drew the token,

    l = max( -A * r, -A * clip(r, 1 - clip_ratio, 1 + clip_ratio) ),      r = q(y) / q_old(y) * w

The weight is inside the clipping, as in microsoft/LMOps (``Loss._pg_loss``): a token that the teacher chose against the
student is held back by it. A (``advantage``), log q_old (``old_log_prob``) and w (``importance``) come with the part.
Where they come from is in the functions of this file:

    reward      r_t = (log p(y_t) - log q_old(y_t)) / scale, held between -limit and limit; 0 outside the answer
    remaining   A_t = sum_{i>=t} gamma**(i-t) r_i / (answer tokens left from t on)               LMOps; whitened there
    absolute    A_t = sum_{i>=t} gamma**i r_i                   huggingface/trl: keeps gamma to the absolute position
    discounted  A_t = sum_{i>=t} gamma**i r_i / sum_{i>=t} gamma**i        trl with length normalisation

In trl a masked position counts 1e-4 in the last divisor, and gamma 0 leaves the rewards as they are. LMOps whitens over
*every* position of the batch, those outside the answer included, with the unbiased variance; so does ``whitened``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Lt

from methods.term import Tokens, Weighted
from methods.term._divergences import of_targets

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.term",)
TEACHER = False
SAMPLED = True

Returns = Literal["remaining", "absolute", "discounted"]
# What a masked position counts in trl's divisor.
MASKED_LENGTH = 1e-4


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """Weight, temperature and clipping."""

    # the student's logits are divided by it, as they were when it wrote
    temperature: Annotated[float, Gt(0)] = 1.0
    # how far the ratio may move from 1 before it has no gradient (LMOps' cliprange)
    clip_ratio: Annotated[float, Gt(0), Lt(1)] = 0.2


def token_losses(config: Config, tokens: Tokens) -> Tensor:
    """The clipped objective of each token [n]."""
    import torch

    chosen = of_targets(tokens.student / config.temperature, tokens.targets)
    ratio = (chosen - tokens.extra["old_log_prob"]).exp() * tokens.extra["importance"]
    clipped = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    return torch.maximum(-tokens.extra["advantage"] * ratio, -tokens.extra["advantage"] * clipped)


def rewards(log_p: Tensor, log_q: Tensor, mask: Tensor, scale: float, limit: float) -> Tensor:
    """How much likelier the teacher finds each token [B,T] than the student did, clipped; 0 outside the mask."""
    return ((log_p - log_q) / scale).clamp(-limit, limit).masked_fill(~mask, 0.0)


def advantages(values: Tensor, mask: Tensor, gamma: float, returns: Returns = "remaining") -> Tensor:
    """What follows from each token on [B,T], from rewards [B,T] that are 0 outside the mask; not whitened."""
    if returns == "remaining":
        return _discounted(values, gamma) / _left(mask).clamp(min=1)
    if gamma == 0:
        return values
    powers = gamma ** values.new_ones(values.shape[-1]).cumsum(-1).sub(1)
    total = _from_each_on(values * powers)
    if returns == "absolute":
        return total
    lengths = mask.to(values.dtype).clamp(min=MASKED_LENGTH)
    return total / _from_each_on(lengths * powers)


def whitened(values: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all positions [B,T], masked ones too; the variance unbiased."""
    if values.numel() < 2:
        return values - values.mean()
    return (values - values.mean()) * (values.var() + 1e-8).rsqrt()


def importance(log_q: Tensor, log_p: Tensor, teacher_share: float) -> Tensor:
    """The student's probability of each token divided by that of the mixture which drew it."""
    import torch

    if teacher_share == 0:
        return torch.ones_like(log_q)
    mixture = torch.logaddexp(log_q + math.log1p(-teacher_share), log_p + math.log(teacher_share))
    return (log_q - mixture).exp()


def reverse_kl_estimate(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    """p/q - 1 - log(p/q) at each token [B,T]: never negative, and D(q‖p) on average over what q draws; 0 outside."""
    ratio = (log_p - log_q).masked_fill(~mask, 0.0)
    return ratio.exp() - 1 - ratio


def _discounted(values: Tensor, gamma: float) -> Tensor:
    """sum_{i>=t} gamma**(i-t) values_i [B,T]."""
    import torch

    found, after = [], values.new_zeros(values.shape[0])
    for column in reversed(values.unbind(-1)):
        after = column + gamma * after
        found.append(after)
    return torch.stack(found[::-1], -1)


def _left(mask: Tensor) -> Tensor:
    """Answer tokens left at each position [B,T], the one there included; 0 after the last.

    Before the answer it is the whole length, as LMOps has it.
    """
    counted = mask.long()
    return counted - counted.cumsum(-1) + counted.sum(-1, keepdim=True)


def _from_each_on(values: Tensor) -> Tensor:
    return values.flip(-1).cumsum(-1).flip(-1)
