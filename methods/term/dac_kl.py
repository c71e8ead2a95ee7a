"""DAC-KL: the forward KL on the part of the vocabulary where the teacher's distribution says most.

Liu et al., "Multi-Granularity Semantic Revision for Large Language Model Distillation" (MGSR): a small network predicts
an upper and a lower quantile of the teacher's distribution for each token, both distributions are restricted to the
entries between them, and the network is trained through the same loss. No official code was found and the paper's
details could not be verified: the definitions are ours, and no parity with the paper is claimed.

    KL = sum_v P_v (log P_v - log Q_v)     P_v = w_v p_v / sum_u w_u p_u     Q_v = w_v q_v / sum_u w_u q_u

Fixed bounds (``lower_quantile``, ``upper_quantile``): w_v is 1 where p_v lies within the two quantiles of the V
probabilities of that token (linear interpolation, inclusive), else 0. Learned bounds (the default):

    w_v = sigmoid((F_v - lower) / sharpness) * sigmoid((upper - F_v) / sharpness)       w_target = 1
    loss = KL + mass_penalty * max(0, least_mass - sum_v w_v p_v)

F_v is the rank of p_v within its token, from 0 (least likely) to 1. The bounds come from a perceptron that sees the
``inputs`` largest log p, log q at the same entries, and both entropies; it gets no gradient through what it sees, and
gives none to the student there. Its bounds may lie a little outside [0, 1], or the likeliest entry would never weigh
more than one half.

Minimising the loss over the bounds rewards a window in which student and teacher already agree, in the extreme a
single entry with the loss 0. Hence the penalty, the target that stays, and the ``least_entries`` a window always spans;
what is kept is in the curve as ``dac_kl.kept_mass`` (teacher's probability) and ``dac_kl.kept`` (sum of the weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from methods.stage import AssayError, Claim
from methods.term import Softened, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import Setting

USES = ("methods.term", "methods.model")
CLAIMS: tuple[Claim, ...] = ()

# What stands for the log-probability of an entry that cannot come, as an input of the network.
LEAST_LOG = -30.0
# How far beyond [0, 1] a bound may go, in units of the sharpness: there the edge's weight is 0.98.
REACH = 4.0

Quantile = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """Fixed bounds, or what the learned ones are made with. What no source states is our choice."""

    # a fixed lower bound (0 where only the upper one is given); None with upper_quantile=None: bounds are learned
    lower_quantile: Quantile | None = None
    # a fixed upper bound (1 where only the lower one is given)
    upper_quantile: Quantile | None = None
    # the target takes part whatever the bounds say
    keep_target: bool = True
    # both distributions add up to 1 on what is kept; without it the value may be negative
    renormalise: bool = True
    # fewer entries than these are never kept: the likeliest ones come back
    least_entries: Annotated[int, Gt(0)] = 2
    # learned bounds: weights of the soft window, or 0 and 1 with the soft window's gradient
    window: Literal["soft", "straight_through"] = "soft"
    # learned bounds: width of the window's edges, in ranks from 0 to 1
    sharpness: Annotated[float, Gt(0)] = 0.05
    # learned bounds: teacher's probability that has to be kept, below which the loss grows
    least_mass: Annotated[float, Ge(0), Le(1)] = 0.9
    # learned bounds: factor of what is missing from it
    mass_penalty: Annotated[float, Ge(0)] = 1.0
    # learned bounds: largest probabilities that the network sees
    inputs: Annotated[int, Gt(0)] = 64
    # learned bounds: width of the network's hidden layer
    width: Annotated[int, Gt(0)] = 64

    def __post_init__(self) -> None:
        """A lower bound above the upper one keeps nothing."""
        if self.fixed and self.bounds[0] > self.bounds[1]:
            raise AssayError(
                f"dac_kl: lower_quantile={self.bounds[0]} is above upper_quantile={self.bounds[1]}: nothing lies "
                "between them; exchange the two."
            )

    @property
    def fixed(self) -> bool:
        """Whether the bounds are given."""
        return not (self.lower_quantile is None and self.upper_quantile is None)

    @property
    def bounds(self) -> tuple[float, float]:
        """The fixed bounds."""
        lower = 0.0 if self.lower_quantile is None else self.lower_quantile
        return lower, 1.0 if self.upper_quantile is None else self.upper_quantile


@dataclass(frozen=True)
class Sorted:
    """Log-probabilities [n,V] of teacher and student, the teacher's likeliest entry first.

    ``is_target`` [n,V] marks the target, ``present`` [n,V] what is possible in both.
    """

    log_p: Tensor
    log_q: Tensor
    is_target: Tensor
    present: Tensor


def companion(config: Config, setting: Setting) -> Any:
    """The network of the bounds, from the stage's seed; None where they are fixed."""
    if config.fixed:
        return None
    from methods.model import drawn

    return drawn(setting.seed, lambda: network(config)).to(setting.device)


def network(config: Config) -> Any:
    """A perceptron from features [n, 2 * inputs + 2] to two numbers [n,2], which starts with a wide open window."""
    import torch
    from torch import nn

    last = nn.Linear(config.width, 2)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.copy_(torch.tensor([-2.0, 2.0]))
    return nn.Sequential(nn.Linear(2 * config.inputs + 2, config.width), nn.Tanh(), last)


def token_losses(config: Config, tokens: Tokens) -> Mapping[str, Tensor]:
    """``loss`` [n] of each token; ``kept_mass`` and ``kept`` [n] are only logged."""
    sides = in_order(config, tokens)
    log_weights = fixed_window(config, sides) if config.fixed else learned_window(config, sides, tokens)
    log_weights = log_weights.masked_fill(~sides.present, -math.inf)
    kept_mass = (log_weights + sides.log_p).exp().sum(-1)
    loss = restricted_kl(config, sides, log_weights)
    if not config.fixed:
        loss = loss + config.mass_penalty * (config.least_mass - kept_mass).clamp(min=0.0)
    return {"loss": loss, "kept_mass": kept_mass, "kept": log_weights.exp().sum(-1)}


def in_order(config: Config, tokens: Tokens) -> Sorted:
    """Both distributions of each token, softened, in the order of the teacher's."""
    assert tokens.teacher is not None  # the term has no TEACHER = False
    log_p = (tokens.teacher / config.temperature).log_softmax(-1)
    log_q = (tokens.student / config.temperature).log_softmax(-1)
    log_p, order = log_p.sort(dim=-1, descending=True, stable=True)
    log_q = log_q.gather(-1, order)
    present = ~(log_p.isneginf() | log_q.isneginf())
    return Sorted(log_p, log_q, order == tokens.targets[:, None], present)


def restricted_kl(config: Config, sides: Sorted, log_weights: Tensor) -> Tensor:
    """D(P‖Q) [n] of both distributions times the weights, whose logarithms [n,V] are given."""
    kept = ~log_weights.isneginf()
    # An entry that is left out has no gradient either: infinities are replaced before anything is computed with them.
    weighted_p = (log_weights + sides.log_p).masked_fill(~kept, -math.inf)
    difference = (sides.log_p - sides.log_q).masked_fill(~kept, 0.0)
    if not config.renormalise:
        return (weighted_p.exp() * difference).sum(-1)
    weighted_q = (log_weights + sides.log_q).masked_fill(~kept, -math.inf)
    empty = ~kept.any(-1, keepdim=True)
    mass_p = weighted_p.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
    mass_q = weighted_q.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
    share = (weighted_p - mass_p).exp()
    return (share * (difference - mass_p + mass_q)).sum(-1)


# --- windows: log-weights [n,V], -inf for what is left out ------------------------------------------------------


def fixed_window(config: Config, sides: Sorted) -> Tensor:
    """0 where the teacher's probability lies within its quantiles, both included."""
    p = sides.log_p.exp()
    lower, upper = (quantile(p, level) for level in config.bounds)
    keep = (p >= lower) & (p <= upper)
    few = keep.sum(-1, keepdim=True) < config.least_entries
    keep[:, : config.least_entries] |= few
    if config.keep_target:
        keep |= sides.is_target
    return p.new_zeros(p.shape).masked_fill(~keep, -math.inf)


def quantile(falling: Tensor, level: float) -> Tensor:
    """Each row's quantile [n,1] of values [n,V] in falling order, linearly interpolated."""
    last = falling.shape[-1] - 1
    place = level * last
    below = min(math.floor(place), last)
    above = min(below + 1, last)
    low, high = falling[:, last - below, None], falling[:, last - above, None]
    share = place - below
    # From the nearer of the two, as NumPy and torch: a level that means one of the values, but for rounding, gives it.
    return low + share * (high - low) if share < 0.5 else high - (1 - share) * (high - low)


def learned_window(config: Config, sides: Sorted, tokens: Tokens) -> Tensor:
    """The network's window over ranks: soft, or hard with the soft one's gradient."""
    import torch
    from torch.nn.functional import logsigmoid

    assert tokens.companion is not None  # bounds that are not given are learned
    entries = sides.log_p.shape[-1]
    lower, upper = bounds_of(config, tokens.companion(features(config, sides)), entries)
    rank = torch.linspace(1.0, 0.0, entries, dtype=lower.dtype, device=lower.device)
    above, below = (rank - lower) / config.sharpness, (upper - rank) / config.sharpness
    log_weights = logsigmoid(above) + logsigmoid(below)
    if config.window == "straight_through":
        log_weights = _hardened(log_weights, (above >= 0) & (below >= 0))
    log_weights = log_weights.to(sides.log_p.dtype)
    return log_weights.masked_fill(sides.is_target, 0.0) if config.keep_target else log_weights


def _hardened(log_weights: Tensor, keep: Tensor) -> Tensor:
    """Weights 0 and 1; those that are 1 change with the bounds as the soft ones do."""
    soft = log_weights.exp()
    return (soft - soft.detach()).masked_fill(~keep, -math.inf)


def features(config: Config, sides: Sorted) -> Tensor:
    """What the network sees [n, 2 * inputs + 2], without gradient; a smaller vocabulary is filled up with zeros."""
    import torch
    from torch.nn.functional import pad

    log_p, log_q = (values.detach().clamp(min=LEAST_LOG) for values in (sides.log_p, sides.log_q))
    missing = max(0, config.inputs - log_p.shape[-1])
    largest = [pad(values[:, : config.inputs], (0, missing)) for values in (log_p, log_q)]
    entropies = [-(values.exp() * values).sum(-1, keepdim=True) for values in (log_p, log_q)]
    return torch.cat([*largest, *entropies], -1).float()


def bounds_of(config: Config, raw: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Lower and upper bound [n,1] from the network's two numbers: ``least_entries`` ranks always lie between them."""
    reach = REACH * config.sharpness
    gap = min(1.0, config.least_entries / max(1, entries - 1))
    share = raw.sigmoid()
    lower = -reach + (1.0 - gap + reach) * share[:, :1]
    least = lower.clamp(min=0.0) + gap
    return lower, least + (1.0 + reach - least) * share[:, 1:]
