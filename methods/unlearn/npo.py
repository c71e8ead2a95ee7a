"""Negative preference optimisation: gradient ascent that lets go of answers already less likely than before.

Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning".

    L = gamma * (2 / beta) * mean_b log( 1 + (p(y_b|x_b) / p_start(y_b|x_b)) ** beta )  +  alpha * L_retain
      = - gamma * (2 / beta) * mean_b log sigmoid( beta * (s_b - s_b^start) )  + ...

``s_b`` is the negative log-likelihood of the whole answer, *not* divided by its length. Paper and code
(locuslab/open-unlearning, ``npo.py``) agree; the code's class default beta = 1 is overridden by its yaml with 0.1.
(muse_bench's "NPO" compares raw logits over the whole vocabulary and is another method.) Of the starting model only the
token likelihoods are needed, which are computed once.

With ``annotations`` each token's loss is weighted by its importance before it is added up, as in ``npo_imp`` of
tmlr-group/SatImp (``dataloader_imp.py``). That code adds up the whole batch before the sigmoid, so that one margin
decides for all of its answers; ``margin="batch"`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from methods.stage import Claim, Count, Term, Terms
from methods.terms import forward, token_nll
from methods.unlearn import Retaining, UnlearnBatch, keeps_to_start, retain_term, start_nll
from methods.unlearn._annotations import IMPORTANCE, annotated

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.unlearn._annotations")


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe, gamma and alpha (1 and 1 in open-unlearning's ``NPO.yaml``), and beta."""

    # inverse temperature: small is close to gradient ascent, large stops earlier (open-unlearning's NPO.yaml)
    beta: Annotated[float, Gt(0)] = 0.1
    # column of the forget rows with the phrases of the answer that matter; None: all of it does
    annotations: str | None = None
    # what is compared with the starting model: each answer, or the sum over the batch (npo_imp's code)
    margin: Literal["sequence", "batch"] = "sequence"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="NPO (beta 0.1, weights (1, 1)) keeps a lower retain NLL than gradient ascent at forget NLL 2.",
        source="pilot in the embedded world: 0.57 +- 0.08 against 0.85 +- 0.12, every one of three seeds",
        metric="curve.probe.retain@probe.forget=2",
        subject="*unlearn.npo*",
        relation="lower",
        other="*unlearn.grad_ascent*",
        subject_options={"beta": 0.1, "gamma": 1.0, "alpha": 1.0},
    ),
    Claim(
        sentence="NPO (beta 0.1) has a higher retain NLL than GradDiff at forget NLL 2, both at weights (1, 1): "
        "on a small memorised world NPO lies between gradient ascent and GradDiff.",
        source="pilot in the embedded world: 0.57 +- 0.08 against 0.22 +- 0.02, every one of three seeds",
        metric="curve.probe.retain@probe.forget=2",
        subject="*unlearn.npo*",
        relation="higher",
        other="*unlearn.grad_diff*",
        subject_options={"beta": 0.1, "gamma": 1.0, "alpha": 1.0},
        other_options={"gamma": 1.0, "alpha": 1.0},
    ),
)


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term: the likelihoods at the start are remembered."""
    return keeps_to_start(config)


def remembers(config: Config) -> tuple[str, ...]:
    """The preference is relative to the starting model."""
    return ("forget",)


def annotate(
    config: Config, part: str, rows: Sequence[Any], examples: Sequence[Example], tokenizer: Any
) -> Sequence[Example]:
    """The forget examples with the weights of their tokens, where a column names what matters."""
    if config.annotations is None or part != "forget":
        return examples
    return annotated(rows, examples, tokenizer, config.annotations)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the preference loss, a mean over sequences; ``retain`` as ``retain_loss`` says.

    With one margin for the batch, ``forget`` is that margin: by how many nats the batch has become less likely.
    """
    part = batch.forget
    lost = token_nll(forward(model, part)) - start_nll(part, reference)
    if config.annotations is not None:
        lost = lost * part.extra[IMPORTANCE]
    if config.margin == "batch":
        forget = Term(lost.sum(), Count(1.0, "batch"))
    else:
        forget = Term(preference(config, lost.sum(-1)).sum(), part.sequences, config.gamma)
    return {"forget": forget} | retain_term(config, model, batch, reference)


def preference(config: Config, margin: Tensor) -> Tensor:
    """-(2 / beta) log sigmoid(beta * margin), of nats lost since the start."""
    from torch.nn.functional import logsigmoid

    return -(2 / config.beta) * logsigmoid(config.beta * margin)


def outer(config: Config) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
    """One margin for the batch makes the loss a function of a sum."""
    if config.margin != "batch":
        return None

    def objective(means: Mapping[str, Tensor]) -> Tensor:
        forget = config.gamma * preference(config, means["forget"])
        return forget + config.alpha * means["retain"] if "retain" in means else forget

    return objective
