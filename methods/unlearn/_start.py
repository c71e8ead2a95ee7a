"""Likelihoods under the starting model, computed once before training instead of at every step.

They are fixed numbers of fixed data. Every example that the run will ever see is scored in one order, so a resumed run
has the same bits; then the starting model is no longer needed.
``methods.unlearn``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from methods import loop
from methods.stage import Stage

if TYPE_CHECKING:
    from methods.data import Example

Place = tuple[int, int | None]


def remember(
    stage: Stage, model: Any, settings: loop.Training, batches: loop.Batches, names: Sequence[str]
) -> loop.Batches:
    """The same batches, the examples of the named parts carrying ``start_nll``."""
    if not names:
        return batches
    parts = dict(batches.parts)
    for name in names:
        places = _places(batches, name, loop.steps_of(settings, batches.count))
        examples = [batches.example(name, *place) for place in places]
        known = dict(zip(places, _scored(stage, model, settings, examples), strict=True))
        parts[name] = _with(parts[name], known)
    return replace(batches, parts=parts)


def _places(batches: loop.Batches, name: str, steps: int) -> list[Place]:
    """Every place of a part that a step will ask for, each once."""
    seen = {place for step in range(steps) for place in batches.places(name, step)}
    return sorted(seen, key=lambda place: (place[0], place[1] or 0))


def _scored(
    stage: Stage, model: Any, settings: loop.Training, examples: Sequence[Example]
) -> Iterable[Example]:
    """The examples with the NLL of each target, in nats."""
    from methods.checkpoint import load_tokenizer
    from methods.data import padding_id
    from methods.likelihood import target_nll, with_extra

    padding = padding_id(load_tokenizer(stage.parents["model"]))
    size = min(settings.batch, settings.micro_batch or settings.batch)
    return with_extra(examples, "start_nll", target_nll(model, examples, padding, size))


def _with(part: Any, known: Mapping[Place, Example]) -> Any:
    """The part with the examples that are known."""
    from methods.data import Variants

    if not isinstance(part, Variants):
        return [known.get((row, None), example) for row, example in enumerate(part)]
    return Variants([_Known(row, number, known) for number, row in enumerate(part)])


class _Known(Sequence[Any]):
    """The variants of one row, those that are known in the place of the plain ones."""

    def __init__(self, row: Sequence[Example], number: int, known: Mapping[Place, Example]) -> None:
        self.row, self.number, self.known = row, number, known

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, place: Any) -> Any:
        return self.known.get((self.number, place)) or self.row[place]
