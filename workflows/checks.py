"""Lets methods and evaluations refuse a config while it is planned: data sets that overlap, rows without an answer.

Such a file, or else the package of a method's family, may have ``check(config, data)``, which raises ``AssayError``;
``data`` is a ``methods.data.Locator``. It is asked once for each config, whatever
the seeds and however many chains have it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from methods.data import Locator
from methods.find import Found
from methods.stage import AssayError
from workflows.options import encode_config, fields_of
from workflows.record import canonical

Check = Callable[[Any, Locator], None]


class Checks:
    """The checks of one plan."""

    def __init__(self, folder: Path | None) -> None:
        self._data = _ReadOnce(folder)
        self._asked: set[tuple[str, str]] = set()
        self._checks: dict[str, Check | None] = {}

    def check(self, found: Found, config: Any, data_sets: Iterable[str]) -> None:
        """Ask the method. What only a network can read is left to the job, which asks again."""
        if found.name not in self._checks:
            self._checks[found.name] = _check_of(found)
        ask = self._checks[found.name]
        if ask is None or any(self._data.needs_hub(name) for name in data_sets):
            return
        key = (found.name, canonical(_own(config)))
        if key in self._asked:
            return
        self._asked.add(key)
        try:
            ask(config, self._data)
        except AssayError as error:
            named = str(error).startswith(f"{found.name}:")
            raise AssayError(str(error) if named else f"{found.name}: {error}") from None


class _ReadOnce(Locator):
    """Keeps the rows it has read: the configs of one experiment name the same few data sets."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder)
        self._read: dict[str, list[dict[str, Any]]] = {}

    def rows(self, name: str) -> list[dict[str, Any]]:
        if name not in self._read:
            self._read[name] = super().rows(name)
        return self._read[name]


def _check_of(found: Found) -> Check | None:
    """The file's own, or that of the method's family; an evaluation has no family."""
    module = found.load()
    package = f"methods.{found.family}"
    if not hasattr(module, "check") and "." in found.name and find_spec(package) is not None:
        module = importlib.import_module(package)
    return getattr(module, "check", None)


def _own(config: Any) -> dict[str, Any]:
    """The options as a check can look at them: of a reference that it is given, as its result differs by seed."""
    config_class: type = type(config)
    references = {option.name for option in fields_of(config_class) if option.reference}
    encoded = encode_config(config)
    return {name: value is not None if name in references and not isinstance(value, str) else value
            for name, value in encoded.items()}  # fmt: skip
