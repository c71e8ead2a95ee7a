"""FLAT: raise the probability of a template answer and lower that of the forgotten one, by an f-divergence.

Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data" (arXiv 2410.11143).

    L = mean_b [ - g*( P_e ) + f*( g*( P_f ) ) ],      P(x, y) = 1/|y| sum_t p(y_t | y_<t, x)

P_e is the probability of a refusal drawn anew each time a forget question is seen, P_f that of the forgotten answer,
both averages of plain token probabilities. g* is the optimal variational function of a divergence and f* its
conjugate. Minimising L raises the variational bound on the divergence between the two answers. No retain rows and no
starting model are read.

    total_variation   g* = tanh(v)/2              f*(g*) = tanh(v)/2
    kl                g* = v                      f*(g*) = exp(v - 1)
    jensen_shannon    g* = ln 2 - ln(1 + e^-v)    f*(g*) = v + ln(1 + e^-v) - ln 2
    pearson           g* = v                      f*(g*) = v^2/4 + v

Where paper and code disagree. The code (UCSC-REAL/FLAT, ``dataloader.py``) divides the token probabilities by the
padded length, and takes their mean over the batch before g* and f*:

    L = - g*( P_e ) + f*( g*( P_f ) ),      P = 1/(B (T - 1)) sum_{b,t} p(y_t | y_<t, x)      normalise="padded"

With a padded length of 500 and a refusal of 10 tokens P_e is 0.02 at most: every divergence is in its linear regime and
the effective learning rate is divided by T/|y|. The default is the paper's average over the answer. The code has four
more divergences, which are no options here and stay for comparison with it: with v = +P its reverse KL and squared
Hellinger have the wrong direction, they *learn* the forgotten answer and suppress the template; its Neyman suppresses
both (the conjugate is taken at v, not at g*(v)); its Jeffrey takes a third-order Taylor polynomial for f*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from methods.stage import Claim, Dataset, Term, Terms
from methods.terms import forward, token_nll
from methods.unlearn import Rows, Source, Templates, UnlearnBatch, Unlearning
from methods.unlearn._positions import over_positions

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Part

SEEDED = True
USES = (
    "methods.loop",
    "methods.data",
    "methods.checkpoint",
    "methods.terms",
    "methods.unlearn._positions",
)
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Unlearning):
    """The official recipe (linear with a warm-up of one epoch, at least 2 steps), and which divergence."""

    # the official yaml's for TOFU
    epochs: Annotated[float, Gt(0)] | None = 5.0
    # 16 sequences in 4 micro-batches there
    batch: Annotated[int, Gt(0)] = 64
    # template answers, a line each, of which every question gets a random one (TOFU's own list: "tofu/idontknow")
    refusals: Dataset = "authors/refusals"
    # the official yaml's; the paper has all four
    divergence: Literal["total_variation", "kl", "jensen_shannon", "pearson"] = "total_variation"
    # token probabilities averaged over each answer (paper), or over all padded positions of the batch (code)
    normalise: Literal["answer", "padded"] = "answer"


def parts(config: Config) -> dict[str, Source]:
    """The forget rows, and their questions with template answers."""
    return {"forget": Rows(config.forget), "template": Templates(config.forget, config.refusals)}


def needs_reference(config: Config) -> bool:
    """Never."""
    return False


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``template`` and ``forget``: the two sides of the loss; with ``padded``, the two probabilities of the batch."""
    template, forget = probabilities(model, batch.template), probabilities(model, batch.forget)
    if config.normalise == "padded":
        return {
            "template": over_positions(template.sum(), batch.template),
            "forget": over_positions(forget.sum(), batch.forget),
        }
    optimal, conjugate = functions(config)
    return {
        "template": Term(-optimal(over_answer(template, batch.template)).sum(), batch.template.sequences),
        "forget": Term(conjugate(over_answer(forget, batch.forget)).sum(), batch.forget.sequences),
    }


def outer(config: Config) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
    """With ``padded`` the loss is no sum over sequences: g* and f* come after the mean over the batch."""
    if config.normalise != "padded":
        return None
    optimal, conjugate = functions(config)
    return lambda means: conjugate(means["forget"]) - optimal(means["template"])


def probabilities(model: Any, part: Part) -> Tensor:
    """The probability of each target [B,T-1], 0 where it does not count."""
    outputs = forward(model, part)
    return (-token_nll(outputs)).exp() * outputs.mask


def over_answer(values: Tensor, part: Part) -> Tensor:
    """The mean [B] over the targets that count."""
    return values.sum(-1) / part.mask.sum(-1).clamp(min=1)


# --- divergences ------------------------------------------------------------------------------------------------

Function = Callable[["Tensor"], "Tensor"]


def functions(config: Config) -> tuple[Function, Function]:
    """g* and f*(g*), as functions of a probability v."""
    return (_DIVERGENCES | _CODE_ONLY)[config.divergence]


def _softplus(v: Tensor) -> Tensor:
    """ln(1 + e^-v), for v from 0 to 1."""
    return (-v).exp().log1p()


_DIVERGENCES: dict[str, tuple[Function, Function]] = {
    "total_variation": (lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
    "kl": (lambda v: v, lambda v: (v - 1).exp()),
    "jensen_shannon": (lambda v: log(2) - _softplus(v), lambda v: v + _softplus(v) - log(2)),
    "pearson": (lambda v: v, lambda v: v**2 / 4 + v),
}
# Of the official code alone and wrong as the docstring says: no option takes these names, a comparison with it may.
_CODE_ONLY: dict[str, tuple[Function, Function]] = {
    "reverse_kl": (lambda v: -v.exp(), lambda v: -1 - v),
    "jeffrey": (lambda v: v, lambda v: v + v**2 / 4 + v**3 / 16),
    "squared_hellinger": (lambda v: 1 - v.exp(), lambda v: (1 - v.exp()) / v.exp()),
    "neyman": (lambda v: 1 - v.exp(), lambda v: 2 - 2 * (1 - v).sqrt()),
}
