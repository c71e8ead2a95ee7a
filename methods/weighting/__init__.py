"""Weights of a batch's rows from their losses: what the strategies share, and what a loss makes of the weights.

Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large
Language Model Pretraining" (sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025, ``src/trainer.py``). With the losses
l [B] of the rows of the *global* batch, which are scaled to [-delta, delta],

    h_i = 2 delta l_i / (max l - min l) - delta (max l + min l) / (max l - min l)
    w   = softmax(f(h) / r),        L = sum_i w_i l_i

A strategy is a file with its own f and ``weights(config, losses [B], step) -> [B]``. The weights get no gradient. l_i
is the mean over the answer tokens of sequence i, or the loss of case i. Here r is ``temperature``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.stage import Component, Count, Term, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Cases, Part
    from methods.gradient import Batch, Weigh

REVISION = 1
# The least spread of the losses that they are divided by, as in the official code: equal losses have h = 0.
LEAST_SPREAD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Reweighting:
    """Options of every strategy."""

    # the paper's r: the larger, the closer the weights are to 1/B (the official code's kl_reg: 1)
    temperature: Annotated[float, Gt(0)] = 1.0
    # steps at the start in which every row weighs 1/B (the official code's burnout_steps: 1000)
    warmup_steps: Annotated[int, Ge(0)] = 1000
    # readme: sum_i w_i l_i. trainer: the official trainer's, which multiplies each w_i l_i by the row's share of the
    # batch's answer tokens and by the number of rows, too
    form: Literal["readme", "trainer"] = "readme"


@dataclass(frozen=True, kw_only=True)
class Scaled(Reweighting):
    """Options of the strategies whose f grows with delta."""

    # the paper's delta: losses are scaled to [-delta, delta]; what counts is delta / temperature (official code: 1)
    delta: Annotated[float, Gt(0)] = 1.0


def scaled(losses: Tensor, delta: float = 1.0) -> Tensor:
    """h [B]: -delta for the smallest loss, delta for the largest, 0 where all are equal."""
    low, high = losses.amin(), losses.amax()
    return delta * (2 * losses - (high + low)) / (high - low).clamp_min(LEAST_SPREAD)


def softmax(config: Reweighting, values: Tensor, step: int) -> Tensor:
    """The weights [B] from f [B]; in the first steps they are all the same. With ``form="trainer"`` they sum to B."""
    even = values.new_full(values.shape, 1 / len(values))
    weights = even if step < config.warmup_steps else (values / config.temperature).softmax(0)
    return weights * len(values) if config.form == "trainer" else weights


def weigh(chosen: Component | None) -> Weigh | None:
    """The strategy as the loop calls it: weights [B] of (losses [B], step). None where there is none."""
    if chosen is None:
        return None
    module, options = _load(chosen)
    return lambda losses, step: module.weights(options, losses, step)


def weighted_terms(chosen: Component, part: Part | Cases, losses: Tensor, batch: Batch) -> Terms:
    """``train``: sum_i w_i l_i over the rows of this piece.

    Args:
        losses: [b] of these rows: a sequence's mean over its answer tokens, or a case's loss.
    """
    weights = batch.weigh(losses.detach()).to(losses.dtype)
    if _load(chosen)[1].form == "trainer":
        lengths, count = _lengths(part, losses)
        return {"train": Term((weights * lengths * losses).sum(), count)}
    return {"train": Term((weights * losses).sum(), Count(1.0, "batch"))}


def sequence_means(part: Part, losses: Tensor) -> Tensor:
    """From the losses [N] of all answer tokens of a part, the mean of each sequence [B]; 0 for one without any."""
    mask = part.mask
    each = losses.new_zeros(mask.shape).masked_scatter(mask, losses)
    return each.sum(-1) / mask.sum(-1).clamp_min(1)


def _lengths(part: Part | Cases, losses: Tensor) -> tuple[Tensor, Count]:
    """The answer tokens of each row [b] and their number in all; a case counts as one."""
    from methods.terms import is_cases

    if is_cases(part):
        return losses.new_ones(losses.shape), part.examples
    return part.mask.sum(-1).to(losses.dtype), part.tokens


def _load(chosen: Component) -> tuple[Any, Any]:
    from methods.loop import component

    return component("weighting", chosen)
