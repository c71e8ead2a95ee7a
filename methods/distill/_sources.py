"""Teachers: what a student is shown. A model that runs beside it, several of them, or what one has written down.

A ``Source`` is asked once for each part of a batch: ``said`` gives an answer that is then read block by block, so that
the distributions of all tokens are never held at once. torch is imported at the top: this module is only loaded by a
running job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from methods.stage import Count

if TYPE_CHECKING:
    from methods.data import Part
    from methods.term import Look, Positions

# The layers whose attention is to be shown, from 0, -1 for the last that attends; True for all, nothing for none.
Layers = frozenset[int] | bool


# --- places ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Places:
    """Which positions of a part are looked at: ``index`` [n] into its flattened B*T positions, ``width`` T.

    ``targets`` [n] is what they predict (IGNORED where nothing), ``count`` what a mean over them is divided by.
    """

    index: Tensor
    width: int
    targets: Tensor
    count: Count
    positions: Positions = "answers"
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def sequence(self) -> Tensor:
        """The row of the part in which each place lies [n]."""
        return self.index // self.width

    @property
    def position(self) -> Tensor:
        """The position t in its row; the place predicts token t + 1 [n]."""
        return self.index % self.width


def places(part: Part, positions: Positions = "answers") -> Places:
    """The places of a part: see ``methods.term.Softened.positions``."""
    from methods.data import IGNORED

    height, width = part.labels.shape
    ahead = torch.cat([part.labels[:, 1:], part.labels.new_full((height, 1), IGNORED)], 1).flatten()
    chosen = {
        "answers": lambda: ahead != IGNORED,
        "all": lambda: torch.ones_like(ahead, dtype=torch.bool),
        "unshifted": lambda: part.labels.flatten() != IGNORED,
    }[positions]()
    index = chosen.nonzero().squeeze(1)
    count = {"answers": part.tokens, "all": part.positions, "unshifted": part.labelled}[positions]
    further = {
        name: torch.cat([values, values.new_zeros(height, 1)], 1).flatten()[index]
        for name, values in part.extra.items()
    }
    return Places(index, width, ahead[index], count, positions, further)


# --- the protocol ---------------------------------------------------------------------------------------------


class Said(Protocol):
    """A teacher's answer at the places it was asked for; ``rows`` is a slice of them."""

    look: Look | None

    def log_probs(self, rows: slice, temperature: float) -> Tensor:
        """Log-probabilities [c,V] of softmax(logits / temperature)."""
        ...

    def logits(self, rows: slice) -> Tensor:
        """Raw logits [c,V], or log-probabilities where a source has only those."""
        ...

    def top(self, rows: slice, temperature: float) -> tuple[Tensor, Tensor] | None:
        """The largest entries' ids [c,k] and log-probabilities [c,k]; None where whole distributions are at hand.

        What becomes of the other entries is the term's to say (``rest``; see ``methods.term._top``).
        """
        ...


class Source(Protocol):
    """A teacher."""

    def said(self, part: Part, places: Places, hidden: bool = False, attention: Layers = False) -> Said:
        """Its answer to a part at these places; with ``hidden`` or ``attention`` the answer has a ``look``."""
        ...

    def forget(self) -> None:
        """Let go of what was kept for further questions about the same part."""
        ...


# --- a model that runs beside the student ---------------------------------------------------------------------


class Live:
    """A teacher in evaluation mode: no gradient, outside the student's module tree."""

    def __init__(self, model: Any, entries: int | None = None) -> None:
        """``entries``: how many of its logits there are in both vocabularies, where it has more."""
        self.model, self.entries = model, entries
        # Several groups of places of one part are asked for one after the other: one forward pass serves all.
        self._last: tuple[Part, bool, Layers, Look] | None = None

    def said(self, part: Part, places: Places, hidden: bool = False, attention: Layers = False) -> Said:
        found = self.look(part, hidden, attention)
        return LiveSaid(found, found.states.flatten(0, 1)[places.index])

    def forget(self) -> None:
        self._last = None

    def look(self, part: Part, hidden: bool = False, attention: Layers = False) -> Look:
        """Its states, and hidden states or attention where asked for."""
        from methods.term._blocks import look

        if self._last is None or self._last[0] is not part or self._last[1:3] != (hidden, attention):
            self._last = None
            with torch.no_grad():
                found = look(self.model, part, hidden, attention, self.entries)
            self._last = part, hidden, attention, found
        return self._last[3]


class LiveSaid:
    """What a live teacher says at some places, from the states [n,d] there."""

    def __init__(self, look: Look, states: Tensor) -> None:
        self.look: Look | None = look
        self._head, self._states = look.head, states

    def logits(self, rows: slice) -> Tensor:
        with torch.no_grad():
            return self._head(self._states[rows])

    def log_probs(self, rows: slice, temperature: float) -> Tensor:
        return softened(self.logits(rows), temperature)

    def top(self, rows: slice, temperature: float) -> tuple[Tensor, Tensor] | None:
        return None


def softened(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) over the last dimension."""
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


# --- several models -------------------------------------------------------------------------------------------


class Ensemble:
    """Several teachers as one: the mean of their probabilities at the temperature asked for, or of their logits.

    They run one after the other, and of each only the states at the places are kept.
    """

    def __init__(
        self, members: Sequence[Live], mean: Literal["probabilities", "logits"] = "probabilities"
    ) -> None:
        self.members, self.mean = members, mean

    def said(self, part: Part, places: Places, hidden: bool = False, attention: Layers = False) -> Said:
        return EnsembleSaid([member.said(part, places) for member in self.members], self.mean)

    def forget(self) -> None:
        for member in self.members:
            member.forget()


class EnsembleSaid:
    """What several teachers say together."""

    look: Look | None = None

    def __init__(self, members: Sequence[Said], mean: Literal["probabilities", "logits"]) -> None:
        self._members, self._mean = members, mean

    def logits(self, rows: slice) -> Tensor:
        """The mean of the logits; where probabilities are averaged, the logarithm of their mean."""
        if self._mean == "probabilities":
            return self.log_probs(rows, 1.0)
        first, *others = self._members
        total = first.logits(rows).clone()
        for member in others:
            total += member.logits(rows)
        return total / len(self._members)

    def log_probs(self, rows: slice, temperature: float) -> Tensor:
        if self._mean == "logits":
            return softened(self.logits(rows), temperature)
        first, *others = self._members
        total = first.log_probs(rows, temperature)
        for member in others:
            total = torch.logaddexp(total, member.log_probs(rows, temperature))
        return total - math.log(len(self._members))

    def top(self, rows: slice, temperature: float) -> tuple[Tensor, Tensor] | None:
        return None
