"""Several terms as one loss: they share one forward pass of student and teacher, and one pass over the logits.

torch is imported at the top: this module is only loaded by a running job. ``methods.distill``'s REVISION covers this
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from methods.distill._sources import places
from methods.loop import Adaptive
from methods.stage import Component, Term
from methods.term import Entry, Look, Setting, View, entries
from methods.term._blocks import Moment, Pull, look, separable

if TYPE_CHECKING:
    from torch import nn

    from methods.data import Part
    from methods.distill._sources import Layers, Said, Source

# The part of a batch with the same rows in the teacher's own tokens, for terms across tokenizers.
TEACHER_PART = "teacher"


class Mixture:
    """The terms of a loss.

    Args:
        terms: their components, by name or in a row (then a second one of the same kind is ``name.2``).
        parts: the part of the batch that a term is about, by the term's name; default: ``train``.
        vocabulary: how many logits student and teacher have in common; None: all.
        block_tokens: tokens whose logits are held at once; None: 64 MiB of float32 logits.
    """

    def __init__(
        self,
        terms: Sequence[Component] | Mapping[str, Component],
        *,
        parts: Mapping[str, str] | None = None,
        vocabulary: int | None = None,
        block_tokens: int | None = None,
    ) -> None:
        self.entries = entries(terms)
        self.parts = dict(parts or {})
        self.vocabulary, self.block_tokens = vocabulary, block_tokens
        self._memory: dict[str, Any] = {}
        self._companions: dict[str, nn.Module] = {}

    @property
    def cross_tokenizer(self) -> bool:
        """Whether a term compares two tokenisations of the rows."""
        return any(entry.flags.cross_tokenizer for entry in self.entries)

    # --- before training ----------------------------------------------------------------------------------------

    def prepare(self, setting: Setting) -> None:
        """Let each term look at models and rows before training."""
        for entry in self.entries:
            if hasattr(entry.module, "prepare"):
                self._memory[entry.name] = entry.module.prepare(entry.config, setting)

    def companions(self, setting: Setting) -> dict[str, nn.Module]:
        """What is trained with the student and is no part of it, by the term it belongs to."""
        for entry in self.entries:
            if hasattr(entry.module, "companion"):
                module = entry.module.companion(entry.config, setting)
                if module is not None:
                    self._companions[entry.name] = module.to(setting.device)
        return dict(self._companions)

    def adaptive(self, steps: int) -> Adaptive | None:
        """The terms' numbers that change after each step, as ``<term>.<number>``; None where there are none."""
        changing = [entry for entry in self.entries if hasattr(entry.module, "start")]
        if not changing:
            return None
        start = {
            f"{entry.name}.{key}": value
            for entry in changing
            for key, value in entry.module.start(entry.config).items()
        }

        def after(values: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
            found: dict[str, float] = {}
            for entry in changing:
                own = _own(values, entry.name)
                new = entry.module.after(entry.config, own, means[entry.name], int(values["step"]), steps)
                found |= {f"{entry.name}.{key}": value for key, value in new.items()}
            return found

        return Adaptive(start, after)

    # --- a step -------------------------------------------------------------------------------------------------

    def terms(self, student: Any, source: Source | None, batch: Any) -> dict[str, Term]:
        """All terms of a batch, by name, each with its weight."""
        found: dict[str, Term] = {}
        for name in dict.fromkeys(self._part_of(entry) for entry in self.entries):
            mine = [entry for entry in self.entries if self._part_of(entry) == name]
            found |= self._of_part(mine, student, source, getattr(batch, name), batch)
        if source is not None:
            source.forget()
        order = [entry.name for entry in self.entries]
        return dict(sorted(found.items(), key=lambda item: order.index(_owner(item[0], order))))

    def _part_of(self, entry: Entry) -> str:
        return self.parts.get(entry.name, "train")

    def _of_part(
        self, mine: Sequence[Entry], student: Any, source: Source | None, part: Part, batch: Any
    ) -> dict[str, Term]:
        hidden, (ours, theirs) = any(entry.flags.hidden for entry in mine), _attended(mine)
        seen = look(student, part, hidden, ours, self.vocabulary)
        at = _At(self, source, part, batch, seen, hidden, theirs)
        found: dict[str, Term] = {}
        tokens = [entry for entry in mine if entry.flags.form != "terms"]
        for positions in dict.fromkeys(entry.positions for entry in tokens):
            group = [entry for entry in tokens if entry.positions == positions]
            found |= at.separable(group)
        for entry in mine:
            if entry.flags.form == "terms":
                found |= at.whole(entry)
        return found

    def pull(self, entry: Entry, batch: Any) -> Pull:
        """A term with what belongs to it in this step."""
        values: Mapping[str, float] = getattr(batch, "values", {})
        return Pull(
            entry, _own(values, entry.name), self._memory.get(entry.name), self._companions.get(entry.name)
        )


@dataclass(frozen=True)
class _At:
    """One part of one batch."""

    mixture: Mixture
    source: Source | None
    part: Part
    batch: Any
    student: Look
    # what the teacher shows beside its logits
    hidden: bool
    attention: Layers

    def separable(self, group: Sequence[Entry]) -> dict[str, Term]:
        """The terms over the same places, in one pass over the logits."""
        where = places(self.part, group[0].positions)
        said = None
        if self.source is not None and any(entry.flags.teacher for entry in group):
            said = self.source.said(self.part, where, self.hidden, self.attention)
        pulls = [self.mixture.pull(entry, self.batch) for entry in group]
        return separable(pulls, self.student, said, where, self._moment(), self.mixture.block_tokens)

    def whole(self, entry: Entry) -> dict[str, Term]:
        """The terms of one entry that sees the whole part."""
        pull, moment = self.mixture.pull(entry, self.batch), self._moment()
        said = self._said(entry)
        view = View(
            part=self.part,
            student=self.student,
            teacher=said.look if said is not None else None,
            batch=self.batch,
            said=said,
            step=moment.step,
            steps=moment.steps,
            values=pull.values,
            memory=pull.memory,
            companion=pull.companion,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and entry.weight > 0):
            found: Mapping[str, Term] = entry.module.terms(entry.config, view)
        return {
            f"{entry.name}.{key}" if key else entry.name: replace(term, weight=term.weight * entry.weight)
            for key, term in found.items()
        }

    def _said(self, entry: Entry) -> Said | None:
        if self.source is None or not entry.flags.teacher:
            return None
        if entry.flags.cross_tokenizer:
            theirs = getattr(self.batch, TEACHER_PART)
            return self.source.said(theirs, places(theirs), entry.flags.hidden, _attended([entry])[1])
        return self.source.said(self.part, places(self.part), self.hidden, self.attention)

    def _moment(self) -> Moment:
        return Moment(getattr(self.batch, "step", 0), getattr(self.batch, "steps", 1))


def _attended(mine: Sequence[Entry]) -> tuple[Layers, Layers]:
    """The layers of student and teacher whose attention these terms read."""
    asked = [
        entry.module.attended(entry.config) if hasattr(entry.module, "attended") else (True, True)
        for entry in mine
        if entry.flags.attention
    ]
    ours, theirs = [first for first, _ in asked], [second for _, second in asked]
    return _joined(ours), _joined(theirs)


def _joined(asked: Sequence[Layers]) -> Layers:
    named = [each for each in asked if not isinstance(each, bool)]
    return True if len(named) < len(asked) else frozenset[int]().union(*named)


def _own(values: Mapping[str, float], name: str) -> dict[str, float]:
    """The numbers of one term, without its name; those of its namesake ``name.2`` are not its own."""
    beside = {
        key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")
    }
    return {key: value for key, value in beside.items() if "." not in key}


def _owner(name: str, order: Sequence[str]) -> str:
    """The term that a name such as ``squarehead.3`` or ``jsd.2`` belongs to."""
    return max((owner for owner in order if name == owner or name.startswith(f"{owner}.")), key=len)
