"""SatImp: gradient ascent on the tokens that are neither forgotten already nor unimportant.

"Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning".

    L = gamma * ( - 1/M sum_{b,t} w[b,t] l[b,t] )  +  alpha * L_retain
    w = stopgrad( p ** beta1 * (1 - p) ** beta2 ),     p = exp(-l)

``p ** beta1`` is the *saturation* criterion (still memorised, so still worth pushing), ``(1 - p) ** beta2`` the
smooth stand-in for the *importance* criterion (hard tokens carry the content). ``beta2=0`` alone is SimSat (and
WGA), ``beta1=0`` alone SimImp. The weight carries no gradient. ``granularity`` is the paper's study of what is
weighted: a token, a whole answer (its probability, and its summed loss), or the batch (the mean of its answers'
weights). With ``group_tokens`` the token weights of an answer are sorted and neighbours share their mean.

Where paper and code disagree. The official code (tmlr-group/SatImp) has one ``coeff``: in ``satimp_gd`` it
multiplies the *retain* term (0.1), in ``simsat_gd`` the *forget* term. open-unlearning's ``SatImp.yaml`` puts 0.1 on
the forget term, a hundred times less forgetting for the same retaining, which the SatImp author reported as
ineffective. Here gamma and alpha are both explicit, with the official meaning as the default. The official ``group_*``
functions work for length 500 only, this one for any. Their hard sampling (``ga_topk``) and annotated importance are
not options of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from methods.stage import AssayError, Claim, Term, Terms
from methods.terms import Outputs, forward, token_nll
from methods.unlearn import Retaining, UnlearnBatch, keeps_to_start, retain_term

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Part

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe, gamma and alpha, and what the weight is made of."""

    # weight of the retain term (0.1: the official yaml's coeff, and open-unlearning's class default)
    alpha: Annotated[float, Ge(0)] = 0.1
    # saturation exponent on p (5: the official README of December 2025; an earlier one had 0.3)
    beta1: Annotated[float, Ge(0)] = 5.0
    # importance exponent on 1 - p (0.1: the same README; open-unlearning uses 1)
    beta2: Annotated[float, Ge(0)] = 0.1
    # what one weight belongs to (the paper settles on tokens)
    granularity: Literal["token", "instance", "batch"] = "token"
    # neighbouring token weights of an answer that share their mean (official study: 10); None leaves each its own
    group_tokens: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        """Groups are groups of token weights."""
        if self.group_tokens is not None and self.granularity != "token":
            raise AssayError(
                f"unlearn.satimp: group_tokens={self.group_tokens} groups token weights; "
                f"leave it out or write granularity='token' instead of {self.granularity!r}."
            )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="SatImp (beta 5 and 1, gamma 10, alpha 1, lr 1e-3) keeps a lower retain NLL than GradDiff with "
        "weights (1, 1) at forget NLL 2. The advantage is mostly one of the effective forget/retain ratio: GradDiff "
        "with alpha 20 is expected to overturn it, and rows outside the retain set are not protected.",
        source="pilot in the embedded world: 0.026 +- 0.008 against 0.223 +- 0.019 (n = 3), alpha 20: 0.012",
        metric="curve.probe.retain@probe.forget=2",
        subject="*unlearn.satimp*",
        relation="lower",
        other="*unlearn.grad_diff*",
    ),
    Claim(
        sentence="SatImp keeps a lower retain NLL than gradient ascent at forget NLL 2.",
        source="pilot in the embedded world: 0.026 +- 0.008 against 0.85 +- 0.12, every one of three seeds",
        metric="curve.probe.retain@probe.forget=2",
        subject="*unlearn.satimp*",
        relation="lower",
        other="*unlearn.grad_ascent*",
    ),
)


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term."""
    return keeps_to_start(config)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the weighted answer NLL, weighted -gamma; ``retain`` as ``retain_loss`` says.

    With one weight for the batch, ``forget`` is the mean NLL of whole answers and ``weight`` what multiplies it.
    """
    forget = forget_terms(config, batch.forget, forward(model, batch.forget))
    return forget | retain_term(config, model, batch, reference)


def outer(config: Config) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
    """A weight that is a mean over the batch makes the loss a product of two means."""
    if config.granularity != "batch":
        return None

    def objective(means: Mapping[str, Tensor]) -> Tensor:
        forget = -config.gamma * means["weight"] * means["forget"]
        return forget + config.alpha * means["retain"] if "retain" in means else forget

    return objective


def forget_terms(config: Config, part: Part, outputs: Outputs) -> dict[str, Term]:
    """Token weights multiply token losses (mean over tokens), the others whole answers (mean over answers)."""
    losses = token_nll(outputs)
    if config.granularity == "token":
        weights = reweight(losses, config)
        if config.group_tokens is not None:
            weights = share(weights, outputs.mask, config.group_tokens)
        return {"forget": Term((weights * losses).sum(), part.tokens, -config.gamma)}
    answers = losses.sum(-1)
    weights = reweight(answers, config)
    if config.granularity == "instance":
        return {"forget": Term((weights * answers).sum(), part.sequences, -config.gamma)}
    return {"weight": Term(weights.sum(), part.sequences, 0.0), "forget": Term(answers.sum(), part.sequences)}


def reweight(losses: Tensor, config: Config) -> Tensor:
    """p ** beta1 * (1 - p) ** beta2 for p = exp(-losses), without gradient; 0 ** 0 is 1.

    ``1 - p`` is taken as -expm1(-losses): exact for memorised tokens, where 1 - exp(-losses) rounds to 0.
    """
    losses = losses.detach()
    saturation = (-losses).exp() ** config.beta1
    importance = (-(-losses).expm1()) ** config.beta2
    return saturation * importance


def share(weights: Tensor, mask: Tensor, group_tokens: int) -> Tensor:
    """Within each answer [B,T-1], sorted by weight, every ``group_tokens`` neighbours share their mean.

    The last group of an answer takes what is left.
    """
    shared = weights.clone()
    for row, counted in enumerate(mask):
        places = counted.nonzero().squeeze(-1)
        order = places[weights[row, places].argsort(descending=True, stable=True)]
        for group in order.split(group_tokens):
            shared[row, group] = weights[row, group].mean()
    return shared
