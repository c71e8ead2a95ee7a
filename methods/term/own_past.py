"""Own past: the student stays near what it said itself of the same token some epochs ago. It needs no teacher.

Du, Zhou, Feng, Tan, Zhou 2022 (NeurIPS), "Sharpness-Aware Training for Free" (AngusDujw/SAF, ``SAF_train.py``), for
language models. A sudden drop of the loss is a sign of a sharp minimum; with p_e what the student said in epoch e,

    L = T**2 * 1/M sum_{b,t} D( p_{e-E,T} || p_{e,T} )[b,t],     e > start_epoch,  E = past_epochs,  T = 5

The paper keeps all logits of all cases of the last E + 1 epochs; of a language model's answer tokens the ``top_k``
likeliest entries are kept, with one bucket for all others, so that the value is at most the paper's. What is kept is of
the forward pass that is trained on, dropout included. Where the official code begins before there is a past it takes
zeros for one, a uniform target: here the term waits. ``train.saf`` is the same for classifiers, with all logits; its
``variant="mesa"`` takes a running mean of the weights in the place of the past, for language models, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from methods.stage import AssayError, How, Term
from methods.term import Entry, Setting, Tokens, View, Weighted, flags

if TYPE_CHECKING:
    from torch import Tensor

    from methods.distill._past import Past

TEACHER = False
SAMPLE_ID = True
USES = ("methods.term", "methods.distill", "methods.teacher")


# The weight of the past.
STRENGTH = 0.3


@dataclass(frozen=True, kw_only=True)
class Remembering:
    """How far back the student looks, from when on, and how much of the past is kept."""

    # both distributions are softened by it (official code: 5)
    temperature: Annotated[float, Gt(0)] = 5.0
    # how many epochs earlier the past is (official code: 3; its README: 2 or 3)
    past_epochs: Annotated[int, Gt(0)] = 3
    # the last epoch without the term, counted from 0 (official code: 5)
    start_epoch: Annotated[int, Ge(-1)] = 5
    # how many of the likeliest entries are kept of each token; a vocabulary no larger is kept whole
    top_k: Annotated[int, Gt(0)] = 64
    # a past that would take more than this, in gigabytes, is refused before training
    history_gigabytes: Annotated[float, Gt(0), How] = 2.0


@dataclass(frozen=True, kw_only=True)
class Config(Remembering, Weighted):
    """The past, and its weight."""

    # the term's weight, the paper's lambda (the official README: 0.3; its parser: 0.16)
    weight: Annotated[float, Ge(0)] = STRENGTH
    # multiply the weight by temperature**2, as the paper does; the logged value stays without it
    scale_by_temperature: bool = True


@dataclass(frozen=True)
class Memory:
    """The past, and how the steps of the run lie in its epochs."""

    past: Past
    rows: int
    batch: int

    def span(self, step: int) -> tuple[int, int]:
        """The epochs of the first and the last row of the global batch of a step."""
        return step * self.batch // self.rows, ((step + 1) * self.batch - 1) // self.rows


def prepare(config: Config, setting: Setting) -> Memory:
    """Make room for the past, and say so where the run is too short to have one.

    Raises:
        AssayError: it would take more than ``history_gigabytes``, several processes share the batches, or there is no
            other term.
    """
    import sys

    from methods.distill._past import Past

    others = [entry for entry in setting.mixture.entries if not isinstance(entry.config, Config)]
    if not any(entry.weight > 0 for entry in others):
        raise AssayError(
            "own_past cannot be the only term: before there is a past nothing would be learnt; add cross_entropy()."
        )
    model, rows = setting.student, len(setting.examples)
    name = next(name for name in _names() if not hasattr(model, f"{name}_visits"))
    vocabulary = setting.mixture.vocabulary or model.config.get_text_config().vocab_size
    past = Past(
        model, name, setting.examples, config.past_epochs, config.top_k, vocabulary, config.history_gigabytes
    )
    memory = Memory(past, rows, setting.config.batch)
    if memory.span(setting.steps - 1)[1] < first_epoch(config):
        epochs = setting.steps * memory.batch / rows
        print(
            f"assay: own_past begins in epoch {first_epoch(config)}, counted from 0, and this run has {epochs:.1f} of "
            f"them: the term will not take part.",
            file=sys.stderr,
            flush=True,
        )
    return memory


def _names() -> Iterator[str]:
    """Names for the buffers of one term after the other."""
    return (f"own_past_{number}" for number in itertools.count(1))


def first_epoch(config: Config) -> int:
    """The first epoch that has the term."""
    return max(config.start_epoch + 1, config.past_epochs)


def terms(config: Config, view: View) -> Mapping[str, Term]:
    """The term in the epochs that have it, block by block; what is said now is put down in every epoch."""
    import torch

    from methods.distill._past import likeliest
    from methods.distill._sources import places
    from methods.term._blocks import Moment, Pull, separable

    memory: Memory = view.memory
    span = memory.span(view.step)
    # Of the whole batch, so that all its pieces have the same terms.
    active = span[1] >= first_epoch(config)
    # Also with weight 0, where the term is only logged; not in a pass without any gradient.
    visit = view.student.states.requires_grad or torch.is_grad_enabled()
    where = replace(places(view.part), extra={"place": memory.past.places(view.part)})

    def losses(_: Any, tokens: Tokens) -> Tensor:
        said = likeliest(tokens.student.detach(), memory.past.top_k, config.temperature)
        then = memory.past.exchange(tokens.extra["place"], said, span, visit)
        return since(config, tokens.student, *then) if active else tokens.student.new_zeros(len(then[0]))

    with torch.set_grad_enabled(torch.is_grad_enabled() and active):
        found = separable([Pull(_entry(losses))], view.student, None, where, Moment(view.step, view.steps))
    return {"": found["own_past"]} if active else {}


def since(config: Config, logits: Tensor, indices: Tensor, log_p: Tensor, epochs: Tensor) -> Tensor:
    """The divergence from the past of each token [n]; 0 where its own epoch has no term yet."""
    import torch

    from methods.distill._past import trajectory_losses

    values = trajectory_losses(logits, indices, log_p, config.temperature)
    return torch.where(epochs >= first_epoch(config), values, 0.0)


def _entry(losses: Callable[[Any, Tokens], Tensor]) -> Entry:
    """A function of a block of tokens, as the terms of a mixture are."""
    work: Any = SimpleNamespace(__name__="own_past", token_losses=losses, TEACHER=False)
    return Entry("own_past", work, Weighted(), flags(work))
