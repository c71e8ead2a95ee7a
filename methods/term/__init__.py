"""Distillation terms: what a student is pulled by. Named, weighted parts of a loss, each logged on its own.

A term file holds ``Config`` (a ``Weighted`` or ``Softened``) and exactly one of

    divergence(config, log_p [n,V], log_q [n,V]) -> [n]
        of the teacher's p and the student's q, log-probabilities at ``config.temperature``; an entry that is -inf in
        either adds nothing
    token_losses(config, tokens: Tokens) -> [n], or {"loss": [n], name: [n], ...}
        from raw logits; further entries are only logged, as ``<term>.<name>``
    terms(config, view: View) -> {name: Term}
        what is no sum over tokens: "" is the term itself, "x" becomes ``<term>.x``; their weights are multiplied by
        that of the options, so 1 is usual and 0 means that a part is only logged

and says in constants what it needs: ``TEACHER`` (default True), ``HIDDEN`` and ``ATTENTION`` (False), ``TOP_K``
(False: valid from a teacher's largest entries and one bucket for the rest), ``RECORDED`` and ``ENSEMBLE`` (True, where
neither hidden states nor attention are looked at), ``CROSS_TOKENIZER`` (False), ``SAMPLED`` (False: works only on text
that the student drew), ``SAMPLE_ID`` (False: knows each row by its place in the data, which text that was written while
training has not) and ``WHOLE_BATCH`` (False: needs all rows of a batch at once). Optional functions:

    check(config, student, teacher)         both ``config.json`` as mappings, before weights are loaded; AssayError
    prepare(config, setting) -> memory      once, before training
    companion(config, setting) -> Module    trained with the student, never in its checkpoint
    attended(config) -> (layers, layers)    of student and teacher whose attention is read, from 0, as sets; -1: the
                                            last that attends; left out: all of them
    start(config) -> {name: float}          numbers that change from step to step, and after each step
    after(config, values, mean, step, steps) -> {name: float}      what they become, given the term's global mean

Nothing here loads torch: the planner reads every term's options and constants before a single job runs. The files of
terms are in the id of a stage, whether they are given as options or named by its method; ``REVISION`` stands for the
private files of this folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.find import catalogue
from methods.stage import AssayError, Component, Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.data import Example, Part
    from methods.distill._mixture import Mixture
    from methods.distill._sources import Said, Source
    from methods.gradient import Batch

REVISION = 1

Positions = Literal["answers", "all", "unshifted"]
# The functions one of which makes a file a term.
FORMS = ("divergence", "token_losses", "terms")


# --- options --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """What every term has."""

    # the term's weight in the loss; with 0 it is only logged
    weight: Annotated[float, Ge(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Softened(Weighted):
    """What every term on softened distributions has."""

    # both distributions are softened by it: softmax(logits / temperature)
    temperature: Annotated[float, Gt(0)] = 1.0
    # multiply the weight by temperature**2, so that the gradient keeps its size; the logged value stays without it
    scale_by_temperature: bool = False
    # answers: positions that predict an answer token; all: every position, padding and the last one included;
    # unshifted: one position late, as IST-DASLab/SparseFinetuning does, for comparison only
    positions: Positions = "answers"


def weight_of(config: Any) -> float:
    """A term's weight in the loss, with the temperature squared where the options say so."""
    squared = config.temperature**2 if getattr(config, "scale_by_temperature", False) else 1.0
    return float(config.weight * squared)


# --- what a term is given -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A block of n tokens: raw logits of student (with gradient) and teacher, and what they should predict.

    ``targets`` [n] is -100 where a position predicts nothing (``positions="all"``). ``teacher`` is None without one;
    of an ensemble that averages probabilities it is the logarithm of their mean. ``values`` are this term's changing
    numbers, ``memory`` is what ``prepare`` returned, ``extra`` holds the part's further numbers of each target [n].
    """

    student: Tensor
    targets: Tensor
    teacher: Tensor | None = None
    step: int = 0
    steps: int = 1
    values: Mapping[str, float] = field(default_factory=dict)
    memory: Any = None
    companion: nn.Module | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """One model's answer to one part of a batch, stopped before its output layer.

    ``states`` [B,T,d] are what enters the ``head``, which gives a block [c,d] its logits [c,V]: cut to the common
    vocabulary, in float32 or wider, with bias, scaling and soft-capping. ``parameters`` are the head's.
    ``hidden_states`` are L+1 tensors [B,T,H], and ``attention`` what ``methods.term._attention`` records, where asked.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] = ()
    hidden_states: Sequence[Tensor] | None = None
    attention: Any = None

    def at(self, index: Tensor) -> Tensor:
        """Logits [n,V] at places [n] of the flattened B*T positions."""
        return self.head(self.states.flatten(0, 1)[index])

    def logits(self) -> Tensor:
        """Logits [B,T,V] of every position."""
        return self.head(self.states.flatten(0, 1)).unflatten(0, self.states.shape[:2])


@dataclass(frozen=True)
class View:
    """A whole part, for terms that are no sum over tokens."""

    part: Part
    student: Look
    teacher: Look | None = None
    batch: Batch | None = None
    said: Said | None = None
    step: int = 0
    steps: int = 1
    values: Mapping[str, float] = field(default_factory=dict)
    memory: Any = None
    companion: nn.Module | None = None

    @property
    def index(self) -> Tensor:
        """The places [n] among the flattened B*T positions that predict an answer token."""
        from methods.distill._sources import places

        return places(self.part).index

    @property
    def targets(self) -> Tensor:
        """What those places predict [n]."""
        return self.part.targets[self.part.mask]

    def student_logits(self) -> Tensor:
        """Logits [n,V] at the answer places, with gradient."""
        return self.student.at(self.index)

    def teacher_logits(self, rows: slice | None = None) -> Tensor:
        """The teacher's logits [n,V] at the same places, or [c,V] at some ``rows`` of them."""
        import torch

        rows = slice(0, len(self.index)) if rows is None else rows
        if self.said is not None:
            return self.said.logits(rows)
        if self.teacher is None:
            raise AssayError("this term needs a teacher, and there is none.")
        with torch.no_grad():
            return self.teacher.at(self.index[rows])


@dataclass
class Setting:
    """What a term or recipe may prepare itself with, once the models are loaded and before training."""

    stage: Stage
    config: Any
    seed: int
    student: Any
    student_folder: Path
    teacher_folder: Path | None
    source: Source | None
    tokenizer: Any
    examples: Sequence[Example]
    steps: int
    mixture: Mixture
    device: Any
    # what is trained with the student and is no part of it, by name, from the method's ``companions`` on
    companions: Mapping[str, nn.Module] = field(default_factory=dict)


# --- what a term needs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    """What a term file's constants say, with their defaults."""

    form: str
    teacher: bool
    hidden: bool
    attention: bool
    top_k: bool
    recorded: bool
    ensemble: bool
    cross_tokenizer: bool
    sampled: bool
    sample_id: bool
    whole_batch: bool


def flags(module: ModuleType) -> Flags:
    """The constants of a term file.

    Raises:
        AssayError: it has none or several of the functions that make a term, or ``TOP_K`` without ``divergence``.
    """
    forms = [name for name in FORMS if hasattr(module, name)]
    if len(forms) != 1:
        raise AssayError(
            f"{module.__name__} must define exactly one of {', '.join(FORMS)}; it has {', '.join(forms) or 'none'}."
        )
    said = {name: bool(getattr(module, name.upper())) for name in _NAMES if hasattr(module, name.upper())}
    if said.get("top_k") and forms != ["divergence"]:
        raise AssayError(
            f"{module.__name__}: TOP_K is for a divergence alone; {forms[0]} is given the logits of all entries."
        )
    inside = said.get("hidden", False) or said.get("attention", False)
    usual = dict.fromkeys(_NAMES, False) | {"teacher": True, "recorded": not inside, "ensemble": not inside}
    return Flags(form=forms[0], **(usual | said))


_NAMES = tuple(item.name for item in dataclasses.fields(Flags) if item.name != "form")


@dataclass(frozen=True)
class Entry:
    """One term of a mixture: its name in the curve, its file, its typed options, and what it needs."""

    name: str
    module: ModuleType
    config: Any
    flags: Flags

    @property
    def weight(self) -> float:
        return weight_of(self.config)

    @property
    def positions(self) -> Positions:
        found: Positions = getattr(self.config, "positions", "answers")
        return found


def entries(chosen: Sequence[Component] | Mapping[str, Component]) -> tuple[Entry, ...]:
    """The terms of a mixture under their names; a second one of the same kind is ``name.2``."""
    named = chosen if isinstance(chosen, Mapping) else _named(chosen)
    found = []
    for name, component in named.items():
        module = catalogue().component("term", component.name).load()
        found.append(Entry(name, module, module.Config(**component.options), flags(module)))
    return tuple(found)


def _named(chosen: Sequence[Component]) -> dict[str, Component]:
    named: dict[str, Component] = {}
    for component in chosen:
        names = [component.name, *(f"{component.name}.{number}" for number in range(2, len(chosen) + 1))]
        named[next(name for name in names if name not in named)] = component
    return named


def of(name: str, **options: Any) -> Component:
    """The term ``name`` as a component, every option it has filled in."""
    config = catalogue().component("term", name).load().Config(**options)
    return Component(name, {item.name: getattr(config, item.name) for item in dataclasses.fields(config)})
