"""Shorthands: one call in a chain that stands for several stages, such as ``prune.evopress(sparsity=0.5)``.

A method file with ``expand(config)`` says which steps it stands for (``methods.stage.Step``). The steps are ordinary
stages: written out in chains of their own they have the same ids, and are run once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from methods.find import Found
from methods.stage import AssayError, Component, From, Parent, Step
from workflows.notation import Call, Name, Value
from workflows.record import Job


@dataclass(frozen=True)
class Shorthand:
    """How the last stage of a chain was written: the shorthand's name, its complete options, the jobs it stands for."""

    method: str
    config: Mapping[str, Any]
    jobs: tuple[Job, ...]

    @property
    def family(self) -> str:
        """``prune`` of ``prune.evopress``."""
        return self.method.partition(".")[0]


def is_shorthand(found: Found) -> bool:
    """Whether a method is run as several stages."""
    return hasattr(found.load(), "expand")


def steps_of(found: Found, config: Any) -> Iterator[tuple[Step, Call]]:
    """The steps of a shorthand, each with the call that it is.

    Raises an AssayError where a step reads one that is not before it.
    """
    names: set[str] = set()
    for step in found.load().expand(config):
        options = tuple((option, _as_written(value, found, names)) for option, value in step.options.items())
        yield step, Call(step.method, options)
        names.add(step.name)


def _as_written(value: Any, found: Found, names: set[str]) -> Value:
    """A config's value as it would stand in a chain."""
    if isinstance(value, From):
        if value.step not in names:
            raise AssayError(f"{found.name}: a step reads {value.step!r}, which is no step before it.")
        return Name(value.step)
    if isinstance(value, Component):
        inner = tuple((option, _as_written(item, found, names)) for option, item in value.options.items())
        return Call(value.name, inner)
    if isinstance(value, Parent):
        raise AssayError(f"{found.name}: a shorthand takes no references to chains; write its stages out.")
    if isinstance(value, tuple):
        return tuple(_as_written(item, found, names) for item in value)
    written: Value = value
    return written
