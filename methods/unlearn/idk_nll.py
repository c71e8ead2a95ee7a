"""Refusal by training: teach the model to answer forget questions with "I do not know".

Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs" (its "IDK" baseline).

    L = gamma * 1/M_w sum l_w  +  alpha * L_retain            form="weighted"
    L = ( gamma * sum l_w  +  alpha * sum l_retain ) / (M_w + M_r)     form="tofu_concatenated", gamma = alpha = 1 there

l_w is the token loss of a refusal that is drawn anew each time a forget question is seen, M_w and M_r the answer tokens
of refusals and retain rows in the batch. The true answers are never read. The code (locuslab/tofu, ``dataloader.py``)
takes one cross-entropy over the two batches laid one after the other: refusals are shorter than answers, so their
weight is below that of the retain rows and depends on the lengths in the batch. It is the second form here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from methods.stage import AssayError, Claim, Dataset, Term, Terms
from methods.terms import answer_nll, forward, token_nll
from methods.unlearn import (
    Retaining,
    Source,
    Templates,
    UnlearnBatch,
    keeps_to_start,
    retain_term,
    retained,
)

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe, gamma and alpha (1 and 1), and what to say instead."""

    # refusals, a line each, of which every question gets a random one (TOFU's own list: "tofu/idontknow")
    refusals: Dataset = "authors/refusals"
    # a mean for each side, or TOFU's one mean over the tokens of both
    form: Literal["weighted", "tofu_concatenated"] = "weighted"

    def __post_init__(self) -> None:
        """A divergence is no token loss that could share a mean with one."""
        if self.form == "tofu_concatenated" and self.retain_loss != "nll":
            raise AssayError(
                "unlearn.idk_nll: form='tofu_concatenated' is one cross-entropy over both batches; "
                f"leave out retain_loss={self.retain_loss!r} or the form."
            )


def parts(config: Config) -> dict[str, Source]:
    """The forget questions with refusals, and the retain rows where they count."""
    return {"template": Templates(config.forget, config.refusals), **retained(config)}


def needs_reference(config: Config) -> bool:
    """Only for the KL retain term."""
    return keeps_to_start(config)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``template``: the NLL of the refusals; ``retain`` as ``retain_loss`` says.

    In TOFU's form both are divided by the tokens of the two together.
    """
    outputs = forward(model, batch.template)
    if config.form == "weighted" or config.alpha == 0:
        template = answer_nll(batch.template, outputs, config.gamma)
        return {"template": template} | retain_term(config, model, batch, reference)
    # A sum of two counts is a plain number, which the loop adds up over micro-batches.
    tokens = batch.template.tokens + batch.retain.tokens
    kept = token_nll(forward(model, batch.retain)).sum()
    return {
        "template": Term(token_nll(outputs).sum(), tokens, config.gamma),
        "retain": Term(kept, tokens, config.alpha),
    }
