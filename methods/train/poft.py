"""Preference-oriented supervised finetuning: be likelier to give the rows' answers than aligned models are.

Fan, Hong, Wang, Bao, Jiang, Song 2025 (AAAI), "Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over
Aligned Large Language Models" (Savannah120/alignment-handbook-PoFT, ``scripts/run_poft.py``). With l(y|x) the *mean*
log-likelihood of the answer's tokens, and K aligned models, a Bradley-Terry preference of the trained model over them:

    L = - log sigmoid( beta (l_theta(y|x) - l_ref(y|x)) + gamma ),      l_ref = 1/K sum_k l_k

as the mean over sequences. An answer that the aligned models find unlikely, a bad one perhaps, pulls less: the gradient
is that of -l_theta times beta sigmoid(beta (l_ref - l_theta) - gamma).

l_ref is fixed, so it is computed once, before training, and each aligned model is loaded for it after the other. The
official code takes the logarithm of the sigmoid, which is -inf where the sigmoid underflows; here it is ``logsigmoid``.
Likelihoods per token of different tokenizers cannot be compared: the aligned models need the trained one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from methods.loop import Training, frozen_model
from methods.stage import AssayError, Claim, Component, Dataset, Head, Model, Optimizer, Stage, Term, Terms
from methods.terms import forward, token_nll

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example, Part
    from methods.gradient import Batch

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")
CLAIMS: tuple[Claim, ...] = ()

# What the sum over a target's NLL under the aligned models, divided by their number, is called in an example.
REFERENCE = "reference_nll"


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """The shared recipe, the rows, the aligned models and the two numbers of the preference."""

    # rows to train on; several sets joined by +
    data: Dataset = "authors/retain90+authors/facts"
    # the aligned models, with the trained one's tokenizer: references=[a, b]
    references: tuple[Model, ...]
    # how steeply the preference grows with the difference of mean log-likelihoods (official code: 1)
    beta: Annotated[float, Gt(0)] = 1.0
    # what the trained model is credited with beforehand (official code: 0)
    gamma: float = 0.0
    # output head to give the model before training; None keeps its own
    head: Head | None = None
    # as train.sft
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-5})


def prepare(
    config: Config, model: Any, stage: Stage, parts: Mapping[str, Sequence[Example]]
) -> dict[str, list[Example]]:
    """The examples with each target's mean NLL under the aligned models.

    Raises:
        AssayError: one of them has another tokenizer.
    """
    from methods.likelihood import with_extra

    folders = [stage.parents[f"references.{number + 1}"] for number in range(len(config.references))]
    padding = compare_tokenizers(stage.parents["model"], folders)
    examples, added = parts["train"], None
    for folder in folders:
        found = _scored(folder, config, examples, padding)
        added = found if added is None else [_sum(*pair) for pair in zip(added, found, strict=True)]
    assert added is not None  # a list of references has one at least
    means = [tuple(value / len(folders) for value in row) for row in added]
    return {"train": with_extra(examples, REFERENCE, means)}


def _scored(
    folder: Path, config: Config, examples: Sequence[Example], padding: int
) -> list[tuple[float, ...]]:
    """The NLL of every target under one aligned model, which is gone afterwards."""
    from methods.likelihood import target_nll

    size = min(config.batch, config.micro_batch or config.batch)
    return target_nll(frozen_model(folder, config), examples, padding, size)


def _sum(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def compare_tokenizers(folder: Path, others: Sequence[Path]) -> int:
    """The id to pad with; AssayError unless all models cut texts into the same tokens with the same numbers."""
    from methods.checkpoint import load_tokenizer, tokenizer_difference
    from methods.data import padding_id

    ours = load_tokenizer(folder)
    for number, other in enumerate(others, start=1):
        difference = tokenizer_difference(ours, load_tokenizer(other), "trained model")
        if difference:
            raise AssayError(
                f"the tokenizer of model {number} of references {difference}. Likelihoods per token can be compared "
                f"only under one tokenizer: take an aligned model of the same family."
            )
    return padding_id(ours)


def loss(config: Config, model: Any, batch: Batch) -> Terms:
    """``train``: the mean over sequences of minus the logarithm of the preference's probability."""
    part = batch.train
    ours = mean_log_likelihood(part, token_nll(forward(model, part)))
    theirs = mean_log_likelihood(part, part.extra[REFERENCE])
    return {"train": Term(preference_losses(config, ours, theirs).sum(), part.sequences)}


def preference_losses(config: Config, ours: Tensor, theirs: Tensor) -> Tensor:
    """The loss of each sequence [B] from its mean log-likelihoods [B] under the trained and the aligned models."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(config.beta * (ours - theirs) + config.gamma)


def mean_log_likelihood(part: Part, nll: Tensor) -> Tensor:
    """l [B]: nats per answer token, from the NLL [B,T-1] of the targets; 0 for a sequence without any."""
    return -(nll * part.mask).sum(-1) / part.mask.sum(-1).clamp_min(1)
