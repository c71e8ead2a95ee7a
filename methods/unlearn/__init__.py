"""Unlearning: make a model forget some rows and keep the rest.

A method file holds ``loss(config, model, batch, reference)`` and returns named terms. ``batch.forget`` and
``batch.retain`` are ``methods.data.Part``s of equal size. ``reference`` is the model as it was before the stage, frozen
and in evaluation mode; it is made only for a method whose ``needs_reference(config)`` says so (or that
does not say), because it costs a second model's memory.

A loss that is no sum over items also has ``outer(config)``: the objective as a function of the terms' means, or
None where these options need none.

Pairing follows locuslab/open-unlearning: an epoch is a pass over the *forget* rows, and each is accompanied by one
retain row drawn uniformly at random, with replacement. The draw depends on (seed, step) only, so a resumed run
sees the same rows. How much of the retain set is ever seen therefore grows with the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from annotated_types import Ge, Gt

from methods.loop import Training
from methods.stage import Component, Dataset, Optimizer, Schedule, Stage, Term, Terms
from methods.terms import answer_nll, forward, frozen, kl_divergence

if TYPE_CHECKING:
    from methods.data import Part

REVISION = 1


class UnlearnBatch(Protocol):
    """What a loss is given: as many retain rows as forget rows."""

    @property
    def forget(self) -> Part: ...
    @property
    def retain(self) -> Part: ...


@dataclass(frozen=True, kw_only=True)
class Unlearning(Training):
    """The recipe shared by unlearning methods; open-unlearning's for TOFU where nothing else is said."""

    # rows to be forgotten
    forget: Dataset = "authors/forget10"
    # passes over the forget rows (open-unlearning's TOFU experiment)
    epochs: Annotated[float, Gt(0)] | None = 10.0
    # decoupled weight decay 0.01 as in that experiment; its base trainer has 0
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-5, "weight_decay": 0.01})
    # linear to 0; that experiment warms up over its first epoch, which is a number of steps to be written out here
    schedule: Schedule = Component("linear")


@dataclass(frozen=True, kw_only=True)
class Retaining(Unlearning):
    """The options of methods with a retain term: L = gamma * L_forget + alpha * L_retain."""

    # rows to be kept, from which each forget row gets a random companion
    retain: Dataset = "authors/retain90"
    # weight of the forget term
    gamma: Annotated[float, Ge(0)] = 1.0
    # weight of the retain term; 0 leaves the retain rows unread
    alpha: Annotated[float, Ge(0)] = 1.0
    # answer NLL of the retain rows, or their divergence from the starting model
    retain_loss: Literal["nll", "kl"] = "nll"


def retain_term(config: Retaining, model: Any, batch: UnlearnBatch, reference: Any) -> dict[str, Term]:
    """``retain``: the answer NLL, or KL(start ‖ current) averaged over *every* position, padding included.

    open-unlearning averages the KL over all B*T positions of the padded batch; padding is that of the
    global batch, so micro-batches do not change it. Nothing at all where alpha is 0.
    """
    if config.alpha == 0:
        return {}
    part = batch.retain
    outputs = forward(model, part)
    if config.retain_loss == "nll":
        return {"retain": answer_nll(part, outputs, config.alpha)}
    start = frozen(reference, part)
    return {
        "retain": Term(
            kl_divergence(start.all_logits, outputs.all_logits).sum(), part.positions, config.alpha
        )
    }


def keeps_to_start(config: Retaining) -> bool:
    """Whether the retain term is a divergence from the starting model, which then has to be kept."""
    return config.retain_loss == "kl" and config.alpha > 0


def run(stage: Stage, method: ModuleType) -> None:
    """Encode the sets the loss reads, pair them and train with it."""
    from methods import loop
    from methods.checkpoint import load_tokenizer
    from methods.data import Style, encode

    config: Unlearning = stage.config
    source = stage.parents["model"]
    tokenizer, style = load_tokenizer(source), Style.read(source)
    parts = {
        name: encode(stage.data.rows(dataset), tokenizer, style, config.context_tokens)
        for name, dataset in datasets(config).items()
    }
    settings = replace(config, probe=tuple(probe_of(config, text) for text in config.probe))
    model = loop.prepare(stage, settings)
    reference = loop.reference_of(stage, model, settings) if asks(method, config) else None

    def loss(model: Any, batch: UnlearnBatch) -> Terms:
        terms: Terms = method.loss(config, model, batch, reference)
        return terms

    outer = method.outer(config) if hasattr(method, "outer") else None
    batches = loop.Batches(parts, size=config.batch, seed=stage.seed, drawn=("retain",))
    loop.train(stage, model, settings, batches, loss, outer=outer)


def datasets(config: Unlearning) -> dict[str, str]:
    """The sets that make up a batch; the retain rows only where they count."""
    wanted = {"forget": config.forget}
    if isinstance(config, Retaining) and config.alpha > 0:
        wanted["retain"] = config.retain
    return wanted


def asks(method: ModuleType, config: Unlearning) -> bool:
    """Whether the method needs the starting model; one that does not say gets it."""
    return bool(method.needs_reference(config)) if hasattr(method, "needs_reference") else True


def probe_of(config: Unlearning, text: str) -> str:
    """``forget`` and ``retain`` alone mean the method's own sets; ``name=data set`` means itself."""
    return (
        f"{text}={getattr(config, text)}" if text in ("forget", "retain") and hasattr(config, text) else text
    )
