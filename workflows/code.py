"""A digest of the code a job runs, the same in every Python version and blind to comments and docstrings.

A method's own file (and its components') enters as a canonical syntax tree; each shared piece it uses enters
by its integer ``REVISION``, which ``tests/numbers.json`` guards.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from methods.find import Found
from methods.stage import AssayError

ROOT = Path(__file__).parent.parent
# What a file says of itself to the report and the planner; it computes nothing.
IGNORED_NAMES = {"CLAIMS", "TASKS", "SMOKE"}


def code_of(found: Found, components: Iterable[Found], uses: Iterable[str]) -> dict[str, str]:
    """What of the code enters a job's id: file digests by name and ``REVISION`` by shared piece."""
    files = {
        piece.name: file_digest(piece.path, piece.path.stat().st_mtime_ns) for piece in (found, *components)
    }
    return files | {module: str(revision(module)) for module in sorted(set(uses))}


@cache
def file_digest(path: Path, modified: int) -> str:
    """Digest of a file's canonical tree; ``modified`` only keeps the cache honest."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for token in _walk(tree):
        digest.update(token.encode() + b"\0")
    return digest.hexdigest()[:16]


def _walk(node: object) -> Iterator[str]:
    """Node names and non-empty fields in order; docstrings, annotations and ``IGNORED_NAMES`` are left out."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_comment", "type_params", "kind", "ctx") or _is_empty(
                value
            ):
                continue
            yield f".{name}"
            yield from _walk(_without_noise(value) if name == "body" and isinstance(value, list) else value)
        yield ")"
    elif isinstance(node, list):
        for item in node:
            yield from _walk(item)
    else:
        yield f"{type(node).__name__}:{node!r}"


def _is_empty(value: object) -> bool:
    return value is None or value == []


def _without_noise(body: list[ast.stmt]) -> list[ast.stmt]:
    return [statement for statement in body if not _is_docstring(statement) and not _is_ignored(statement)]


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_ignored(statement: ast.stmt) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return any(isinstance(target, ast.Name) and target.id in IGNORED_NAMES for target in targets)


@cache
def revision(module: str) -> int:
    """The ``REVISION`` a shared module states, read from its text so that nothing heavy is imported."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        raise AssayError(f"{module} is named in USES but there is no {path.name}.")
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and [getattr(t, "id", "") for t in statement.targets] == [
            "REVISION"
        ]:
            value = statement.value
            if isinstance(value, ast.Constant) and type(value.value) is int:
                return value.value
    raise AssayError(f"{path} is named in USES and must state REVISION = <integer>.")
