"""Finds methods, components and evaluations by where their files lie.

``methods/unlearn/satimp.py`` *is* ``unlearn.satimp``; ``methods/head/euclidean.py`` is the component
``euclidean`` of kind ``head``; ``evaluations/size.py`` is the evaluation ``size``. Files from outside come
from a folder laid out like ``methods/`` (``--config methods=FOLDER``) or from the entry points
``assay.methods`` and ``assay.evaluations``, each naming a package laid out the same way.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from methods.stage import AssayError

FAMILIES = (
    "model",
    "train",
    "unlearn",
    "curvature",
    "teacher",
    "distill",
    "levels",
    "search",
    "prune",
    "data",
    "runtime",
)
KINDS = ("head", "loss", "term", "optimizer", "schedule", "adapter", "weighting", "sampling")
# more names than this are not listed in a sentence
MOST_CHOICES = 40
HERE = Path(__file__).parent
EVALUATIONS = HERE.parent / "evaluations"


@dataclass(frozen=True)
class Found:
    """A method, component or evaluation: its full name, its file, and the module's import name."""

    name: str
    path: Path
    import_name: str

    @property
    def family(self) -> str:
        """``unlearn`` of ``unlearn.satimp``: also the kind of a component; ``evaluate`` for an evaluation."""
        return self.name.partition(".")[0]

    def load(self) -> ModuleType:
        """Import the file (once a process)."""
        if self.import_name in sys.modules:
            return sys.modules[self.import_name]
        if not self.import_name.startswith("assay_outside."):
            return importlib.import_module(self.import_name)
        spec = importlib.util.spec_from_file_location(self.import_name, self.path)
        if spec is None or spec.loader is None:
            raise AssayError(f"{self.path} cannot be read as a Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.import_name] = module
        spec.loader.exec_module(module)
        return module


class Catalogue:
    """Every method, component and evaluation that can be named in an experiment."""

    def __init__(self, outside: Iterable[Path] = ()) -> None:
        self.methods: dict[str, Found] = {}
        self.components: dict[str, Found] = {}
        self.evaluations: dict[str, Found] = {}
        self.outside = tuple(outside)
        self._add_tree(HERE, "methods")
        self._add_evaluations(EVALUATIONS, "evaluations")
        for group in ("assay.methods", "assay.evaluations"):
            for point in entry_points(group=group):
                self._add_package(point.value, group)
        for folder in self.outside:
            self._add_folder(Path(folder))

    def method(self, name: str) -> Found:
        """The method of that name, or a sentence with the nearest one."""
        return self._get(self.methods, name, "method")

    def component(self, kind: str, name: str) -> Found:
        """The component ``name`` of ``kind``, or a sentence with the nearest one."""
        if found := self.components.get(f"{kind}.{name}"):
            return found
        others = self.component_kinds(name)
        of_another = f"{name} is a component of kind {others[0]}; " if others else ""
        near = nearest(
            name, (found.name.partition(".")[2] for found in self.components.values() if found.family == kind)
        )
        raise AssayError(f"{of_another}there is no component of kind {kind} called {name!r}{near}")

    def evaluation(self, name: str) -> Found:
        """The evaluation of that name, or a sentence with the nearest one."""
        return self._get(self.evaluations, name, "evaluation")

    def component_kinds(self, name: str) -> list[str]:
        """The kinds that have a component called ``name``."""
        return [found.family for key, found in self.components.items() if key.partition(".")[2] == name]

    def _get(self, table: dict[str, Found], name: str, what: str) -> Found:
        if name in table:
            return table[name]
        near = nearest(name, table)
        raise AssayError(f"there is no {what} called {name!r}{near}")

    def _add_tree(self, folder: Path, package: str) -> None:
        for group, table in ((FAMILIES, self.methods), (KINDS, self.components)):
            for kind in group:
                for path in sorted((folder / kind).glob("*.py")):
                    if not path.stem.startswith("_"):
                        self._add(table, f"{kind}.{path.stem}", path, f"{package}.{kind}.{path.stem}")

    def _add_evaluations(self, folder: Path, package: str) -> None:
        for path in sorted(folder.glob("*.py")):
            if not path.stem.startswith("_"):
                self._add(self.evaluations, path.stem, path, f"{package}.{path.stem}")

    def _add_package(self, package: str, group: str) -> None:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            add = self._add_tree if group == "assay.methods" else self._add_evaluations
            add(Path(place), package)

    def _add_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            raise AssayError(f"--config methods={folder}: there is no such folder.")
        prefix = f"assay_outside.{folder.resolve().name}"
        self._add_tree(folder, prefix)
        self._add_evaluations(folder / "evaluations", f"{prefix}.evaluations")

    def _add(self, table: dict[str, Found], name: str, path: Path, import_name: str) -> None:
        if name in table:
            raise AssayError(
                f"{name} is defined twice, in {table[name].path} and in {path}: rename one of them."
            )
        table[name] = Found(name, path, import_name)


_current: tuple[Path, ...] = ()


def catalogue(outside: tuple[Path, ...] | None = None) -> Catalogue:
    """The catalogue for this process; ``outside`` are the folders of ``--config methods=``, by default those in use."""
    return _catalogue(_current if outside is None else outside)


@cache
def _catalogue(outside: tuple[Path, ...]) -> Catalogue:
    return Catalogue(outside)


@contextmanager
def using(outside: tuple[Path, ...]) -> Iterator[None]:
    """The folders in use while a job runs: its method looks up components without being told of them."""
    global _current
    before, _current = _current, outside
    try:
        yield
    finally:
        _current = before


def nearest(word: str, words: Iterable[str]) -> str:
    """``; did you mean 'adamw'?`` or, where nothing is near, what there is to choose from."""
    choices = sorted(words)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    if len(choices) > MOST_CHOICES:
        return f"; there are {len(choices)}, from {choices[0]} to {choices[-1]}."
    return f"; there are: {', '.join(choices)}." if choices else "; there are none."
