"""What a stage reads and writes, as its method's file says: ``RESULT``, ``NEEDS_MODEL``, ``TASKS``, its options' types.

``TASKS`` names the tasks of the models it works on, for evaluations, too: ``("language",)`` (the default),
``("classification",)`` or both. ``RESULT`` is ``"model"`` (the default), ``"data"``, ``"files"`` or several of them;
``NEEDS_MODEL`` says whether the stage goes after a model: by default every family but ``model`` and ``data`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from methods.find import Catalogue, Found
from methods.stage import AssayError, _Reads
from workflows.record import PARTS, Part

# how many methods are named as an example
FEW = 3

# What ``TASKS`` may name, as one model of that task and as several are called.
TASKS = {
    "language": ("a language model", "language models"),
    "classification": ("a classifier", "classifiers"),
}


def parts_of(module: ModuleType) -> tuple[Part, ...]:
    """What the method writes, in the order of ``PARTS``. ``AssayError`` where ``RESULT`` names something else."""
    named = getattr(module, "RESULT", "model")
    chosen = {named} if isinstance(named, str) else set(named)
    if not chosen or not chosen <= set(PARTS):
        raise AssayError(f"{module.__name__}: RESULT={named!r}; it is made of {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in chosen)


def needs_model(found: Found) -> bool:
    """Whether the method can only stand after a model."""
    return bool(getattr(found.load(), "NEEDS_MODEL", found.family not in ("model", "data")))


def tasks_of(module: ModuleType) -> tuple[str, ...]:
    """The tasks of the models that a method or evaluation works on, and that a new model is made for."""
    named = tuple(getattr(module, "TASKS", ("language",)))
    if not named or not set(named) <= set(TASKS):
        raise AssayError(f"{module.__name__}: TASKS={named!r}; it is made of {', '.join(TASKS)}.")
    return named


def listed(parts: Sequence[str]) -> str:
    """``model/ and files/``."""
    return " and ".join(f"{part}/" for part in parts)


def is_read(found: Found, reads: _Reads | None) -> bool:
    """Whether an option that reads the files of one family, or of one kind in it, reads those of this method."""
    if reads is None:
        return True
    return found.family == reads.family and reads.kind in (None, getattr(found.load(), "KIND", None))


def example(catalogue: Catalogue, part: str, reads: _Reads | None = None) -> str:
    """Which chains have such a part, in words."""
    if part == "model":
        return "a model, or a chain that ends in one"
    writing = {name: found for name, found in catalogue.methods.items() if part in parts_of(found.load())}
    names = [name for name, found in writing.items() if is_read(found, reads)]
    if not names:
        return f"no method that is known here writes {part}/"
    return f"a chain such as target > {' or target > '.join(names[:FEW])}"
