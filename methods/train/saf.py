"""Sharpness-aware training for free: stay near what the model said of the same case some epochs ago.

Du, Zhou, Feng, Tan, Zhou 2022 (NeurIPS), "Sharpness-Aware Training for Free" (AngusDujw/SAF, ``SAF_train.py`` and
``MESA_train.py``). A sudden drop of the loss is a sign of a sharp minimum. With o the scores of a case now, o_past
those of the same case ``minus_epochs`` epochs earlier, and the mean over the cases of a batch,

    L = CE + lambda tau^2 KL( softmax(o_past / tau) || softmax(o / tau) ),    start_epoch < epoch < end_epoch

counting epochs from 0. ``variant="mesa"`` takes the scores under a running mean of the weights for o_past,
v <- decay v + (1 - decay) w after every step, and keeps no scores; it works for language models, too, as the mean over
answer tokens. Here lambda is ``strength`` and tau is ``temperature``; the base loss may be any that works on scores.

The past scores take 4 (minus_epochs + 1) x cases x classes bytes on the device and in every saved state; the official
code keeps as many. The running mean takes as much as the weights that are trained. Neither is part of the written
model. Where an epoch ends within a batch, each case has the epoch of its own visit. The official code begins with zeros
for past scores where ``start_epoch`` is smaller than ``minus_epochs``; here the term waits for past scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from methods import loss as losses
from methods.loop import make_accelerator
from methods.stage import AssayError, Claim, How, Stage, Term, Terms
from methods.terms import is_cases, kl_divergence, scored
from methods.train._recording import Recording, refuse_hidden
from methods.train.classify import Classifying

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Cases, CaseTable, Part
    from methods.gradient import Batch, Outer

SEEDED = True
TASKS = ("classification", "language")
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.loss")
CLAIMS: tuple[Claim, ...] = ()
GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class Config(Classifying):
    """Cases or rows and what is learnt of them, and the trajectory term."""

    # what the scores are kept near to: those of earlier epochs, or those of a running mean of the weights (MESA)
    variant: Literal["trajectory", "mesa"] = "trajectory"
    # the paper's lambda, the weight of the term (the official README: 0.3 for SAF and 0.8 for MESA; its parser: 0.16)
    strength: Annotated[float, Ge(0)] = 0.3
    # the paper's tau: both distributions are softened by it (official code: 5)
    temperature: Annotated[float, Gt(0)] = 5.0
    # the last epoch without the term, counted from 0 (official code: 5)
    start_epoch: Annotated[int, Ge(-1)] = 5
    # the first epoch without it again; None: it stays to the end
    end_epoch: Annotated[int, Ge(1)] | None = None
    # how many epochs earlier the past scores are from (official code: 3); mesa has no use for it
    minus_epochs: Annotated[int, Gt(0)] = 3
    # of the running mean of the weights (the official parser: 0.9998); only mesa has one
    decay: Annotated[float, Ge(0), Lt(1)] = 0.9998
    # past scores that would take more than this, in gigabytes, are refused before training
    history_gigabytes: Annotated[float, Gt(0), How] = 2.0

    def __post_init__(self) -> None:
        if self.end_epoch is not None and self.end_epoch <= self.start_epoch + 1:
            raise ValueError(
                f"no epoch lies between start_epoch={self.start_epoch} and end_epoch={self.end_epoch}: raise end_epoch."
            )


# --- before training ----------------------------------------------------------------------------------------------


def prepare(config: Config, model: Any, stage: Stage, parts: Mapping[str, Any]) -> None:
    """Give the model the memory that the term needs: buffers that are resumed with the run, but not written.

    Raises:
        AssayError: past scores of a language model, of several processes, or too many of them.
    """
    import torch

    refuse_hidden("train.saf", config.loss)
    rows = parts["train"]
    # The length of an epoch, which is no longer known when the loss is asked.
    model.register_buffer("saf_rows", torch.tensor(len(rows)), persistent=False)
    if config.variant == "mesa":
        _prepare_mean(model)
    else:
        _check_history(config, model, rows)
        _prepare_history(config, model, len(rows))


def _prepare_mean(model: Any) -> None:
    """The running mean of every trained weight, which starts where the weights start."""
    import torch

    model.register_buffer("saf_step", torch.tensor(0), persistent=False)
    for number, (_, weight) in enumerate(_trained(model)):
        model.register_buffer(f"saf_mean_{number}", weight.detach().clone(), persistent=False)


def _prepare_history(config: Config, model: Any, rows: int) -> None:
    """``saf_history`` [minus_epochs + 1, M, V] and how often each case was seen, ``saf_visits`` [M]."""
    import torch

    shape, device = (config.minus_epochs + 1, rows, model.config.num_labels), next(model.parameters()).device
    model.register_buffer("saf_history", torch.zeros(shape, device=device), persistent=False)
    model.register_buffer("saf_visits", torch.zeros(rows, dtype=torch.int64, device=device), persistent=False)


def _check_history(config: Config, model: Any, rows: CaseTable) -> None:
    from methods.data import CaseTable

    if not isinstance(rows, CaseTable):
        raise AssayError(
            "train.saf keeps the scores of every case, and a language model has a vocabulary of them for each token: "
            'use train.saf(variant="mesa"), which keeps a running mean of the weights instead.'
        )
    wanted = 4 * (config.minus_epochs + 1) * len(rows) * model.config.num_labels / GIGABYTE
    if wanted > config.history_gigabytes:
        raise AssayError(
            f"train.saf would keep {wanted:.3g} GB of past scores ({config.minus_epochs + 1} epochs of {len(rows)} "
            f"cases with {model.config.num_labels} classes), more than history_gigabytes={config.history_gigabytes:g}: "
            'raise it, or use variant="mesa".'
        )
    if make_accelerator(config).num_processes > 1:
        raise AssayError(
            'train.saf keeps past scores in one process only: run it in one, or use variant="mesa".'
        )


# --- the loss -----------------------------------------------------------------------------------------------------


def loss(config: Config, model: Any, batch: Batch) -> Terms:
    """``train``, or what the base loss is made of, and in the epochs that have it ``trajectory``."""
    part: Any = batch.train
    recording = Recording(model)
    terms = dict(losses.terms(config.loss, recording, part, config.weighting, batch))
    scores = recording.scores(part)
    active = any(_active(config, epoch) for epoch in _epochs_of(config, model, part, batch.step))
    wanted: Any = 1.0
    # Both kinds of memory go on in epochs without the term.
    if config.variant == "mesa":
        _follow(config, model, batch.step)
        past = _of_mean(model, part) if active else scores
    else:
        past, wanted = _of_history(config, model, part, scores)
    if active:
        values = trajectory_losses(config, scores, past) * wanted
        count = part.examples if is_cases(part) else part.tokens
        terms["trajectory"] = Term(values.sum(), count, config.strength)
    return terms


def trajectory_losses(config: Config, scores: Tensor, past: Tensor) -> Tensor:
    """tau^2 KL(softmax(past / tau) || softmax(scores / tau)) [N] of scores and past scores [N,V]."""
    return config.temperature**2 * kl_divergence(past, scores, config.temperature)


def outer(config: Config) -> Outer | None:
    """How the means make up the objective where the base loss is no sum over cases."""
    base = losses.outer(config.loss)
    if base is None:
        return None
    return lambda means: base(means) + config.strength * means.get("trajectory", 0.0)


def _active(config: Config, epoch: Any) -> Any:
    """Whether an epoch (a number or a tensor of them) has the term."""
    first = config.start_epoch + 1
    if config.variant == "trajectory":
        first = max(first, config.minus_epochs)
    return (epoch >= first) & (epoch < config.end_epoch) if config.end_epoch is not None else epoch >= first


def _epochs_of(config: Config, model: Any, part: Part | Cases, step: int) -> tuple[int, int]:
    """The epochs of the first and the last row of the global batch: all of its pieces need the same terms."""
    rows = int(model.saf_rows)
    size = min(config.batch, rows) if is_cases(part) else config.batch
    return step * size // rows, ((step + 1) * size - 1) // rows


# - scores of earlier epochs


def _of_history(config: Config, model: Any, cases: Cases, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The past scores [N,V], and [N] whether each case's epoch has the term; the scores of now are put down."""
    import torch

    history, visits, numbers = model.saf_history, model.saf_visits, cases.numbers
    repeats = _repeats(numbers)
    epochs = visits[numbers] + repeats
    place = (epochs - config.minus_epochs) % len(history), numbers
    past = history[place]
    # A pass that only gathers statistics or losses comes before the one with gradients, and is no visit.
    if torch.is_grad_enabled():
        history[epochs % len(history), numbers] = scores.detach().to(history.dtype)
        visits.index_add_(0, numbers, torch.ones_like(numbers))
    # Of a case that comes twice in one batch the second may look back at the first.
    past = torch.where(repeats[:, None] > 0, history[place], past)
    return past.to(scores.dtype), _active(config, epochs)


def _repeats(numbers: Tensor) -> Tensor:
    """How often each of ``numbers`` [N] stood before: a batch that reaches into the next epoch may repeat one."""
    import torch

    ordered, order = numbers.sort(stable=True)
    place = torch.arange(len(numbers), device=numbers.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(place).scatter_(0, order, place)


# - the running mean of the weights


def _follow(config: Config, model: Any, step: int) -> None:
    """The mean takes up the weights as they are after ``step`` updates, once, whatever the pieces of the batch."""
    if step > int(model.saf_step):
        model.saf_step.fill_(step)
        for mean, (_, weight) in _means(model):
            mean.lerp_(weight.detach(), 1 - config.decay)


def _of_mean(model: Any, part: Part | Cases) -> Tensor:
    """The scores [N,V] under the mean."""
    import torch

    with torch.no_grad():
        return scored(_Mean(model), part).scores


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _means(model: Any) -> list[tuple[Any, tuple[str, Any]]]:
    """Every trained weight with its running mean."""
    return [(getattr(model, f"saf_mean_{number}"), pair) for number, pair in enumerate(_trained(model))]


class _Mean:
    """The model with the running mean of its weights, in evaluation mode."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.main_input_name = model.main_input_name

    def __call__(self, **inputs: Any) -> Any:
        from torch.func import functional_call

        training = self.model.training
        self.model.eval()
        try:
            return functional_call(
                self.model, {name: mean for mean, (name, _) in _means(self.model)}, kwargs=inputs
            )
        finally:
            self.model.train(training)
