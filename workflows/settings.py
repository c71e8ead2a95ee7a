"""What may stand after Snakemake's ``--config``, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from methods.find import nearest
from methods.stage import AssayError


@dataclass(frozen=True)
class Settings:
    """The values of ``--config``; paths are relative to where Snakemake was called."""

    # a shipped experiment's name, or the path of a YAML file
    experiment: str = "tiny"
    # everything generated goes below this folder
    results: Path = Path("results")
    # where {data: …} and data-set names are looked for first
    data: Path | None = None
    # further folders laid out like methods/, separated by commas
    methods: tuple[Path, ...] = ()
    # take, for a missing result, the newest one of the same recipe, and mark it in the tables
    keep_stale: bool = False
    # `all` exposes the whole graph (for drawing); `missing` only what has to run
    show: Literal["missing", "all"] = "missing"
    # `smoke` runs any experiment to its tables in a minute or two
    scale: Literal["full", "smoke"] = "full"
    # fork jobs from one process that has imported everything
    resident: bool = True
    # allow lm-eval task files of the user's own that run code
    trust_tasks: bool = False

    @property
    def smoke(self) -> bool:
        return self.scale == "smoke"

    @classmethod
    def read(cls, config: dict[str, Any]) -> Settings:
        """Check Snakemake's config mapping; raises ``AssayError`` with the nearest valid key or value."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in config.items():
            if key not in known:
                raise AssayError(f"--config {key}={value}: there is no such setting{nearest(key, known)}")
            values[key] = _READERS[key](key, value)
        return cls(**values)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise AssayError(f"--config {key}= needs a name.")
    return value


def _path(key: str, value: Any) -> Path:
    text = str(value)
    if not text or "\0" in text or "\n" in text:
        raise AssayError(f"--config {key}= needs the path of a folder.")
    return Path(text)


def _folder(key: str, value: Any) -> Path:
    path = _path(key, value)
    if not path.is_dir():
        raise AssayError(f"--config {key}={value}: there is no such folder.")
    return path


def _folders(key: str, value: Any) -> tuple[Path, ...]:
    return tuple(_folder(key, part) for part in str(value).split(",") if part)


def _flag(key: str, value: Any) -> bool:
    if value in (True, "true", "True", "yes"):
        return True
    if value in (False, "false", "False", "no"):
        return False
    raise AssayError(f"--config {key}={value}: write true or false.")


def _one_of(*choices: str) -> Any:
    def read(key: str, value: Any) -> str:
        if value not in choices:
            raise AssayError(
                f"--config {key}={value}: {key} is one of {', '.join(choices)}{nearest(str(value), choices)}"
            )
        return str(value)

    return read


_READERS: dict[str, Any] = {
    "experiment": _text, "results": _path, "data": _folder, "methods": _folders, "keep_stale": _flag,
    "show": _one_of("missing", "all"), "scale": _one_of("full", "smoke"), "resident": _flag, "trust_tasks": _flag,
}  # fmt: skip


def from_arguments(arguments: list[str]) -> dict[str, Any]:
    """``EXPERIMENT key=value …`` of a command line as a config mapping."""
    config: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            key, value = "experiment", argument
        config[key] = value
    return config
