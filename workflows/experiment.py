"""Reads experiment files: a safe YAML loader that knows line numbers, and the file's schema.

Nothing in an experiment file is executed. Anchors, duplicate keys, files over 1 MB, unknown keys and wrong
types are refused with a sentence that names the line and the nearest valid word.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from methods.find import nearest
from methods.stage import AssayError

EXPERIMENTS = Path(__file__).parent / "experiments"
NAME = re.compile(r"[a-z][a-z0-9_]*")
LARGEST_BYTES = 1_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Layout(_Strict):
    """What ``scale=smoke`` must know of a hub model to write a small one of the same layout."""

    kind: Literal["llama", "gpt2"] = "llama"
    tied: bool = True
    heads: int = 4
    kv_heads: int = 2
    chat: bool = True


class ModelSpec(_Strict):
    """Where a model comes from: exactly one of ``hf`` (with ``revision``), ``path``, ``data`` and ``new``."""

    hf: str | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    layout: Layout = Layout()
    path: str | None = None
    data: str | None = None
    new: str | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, values: Any) -> Any:
        """``{new: gpt2, hidden: 64}``: everything beside ``new`` is an option of ``model.gpt2``."""
        if isinstance(values, dict) and "new" in values:
            options = {key: value for key, value in values.items() if key != "new"}
            return {"new": values["new"], "options": options}
        return values

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSpec:
        given = [key for key in ("hf", "path", "data", "new") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("a model has exactly one of hf, path, data and new")
        if self.hf is not None and self.revision is None:
            raise ValueError("a hub model needs its revision: 40 hexadecimal digits")
        return self


class Evaluation(_Strict):
    """One entry of ``evaluate:``: what is run, and on which chains (all of them without ``of``)."""

    run: str
    of: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"run": value} if isinstance(value, str) else value


class Resources(_Strict):
    """What a job asks the scheduler for."""

    gpu: Annotated[int, Field(ge=0)] | None = None
    hours: Annotated[float, Field(gt=0)] = 4.0
    memory_gb: Annotated[float, Field(gt=0)] = 4.0


class Experiment(_Strict):
    """A whole experiment file."""

    title: str
    country: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0]
    threads: Annotated[int, Field(ge=1)] = 1
    models: dict[str, ModelSpec]
    chains: Annotated[dict[str, str], Field(min_length=1)]
    evaluate: dict[str, Evaluation] = {}
    keep: Literal["all", "needed", "ends"] = "needed"
    exclusive: bool = False
    resources: dict[str, Resources] = {}
    tables: dict[str, dict[str, Any]] = {}
    figures: dict[str, dict[str, Any]] = {}
    claims: list[dict[str, Any]] = []
    # set by ``load``: the experiment's name, and where in which file each entry stands
    name: str = ""
    places: dict[str, str] = {}

    def place(self, section: str, entry: str) -> str:
        """``tiny.yaml, line 14: chain target``."""
        kind = {"chains": "chain", "models": "model"}.get(section, section)
        where = self.places.get(f"{section}.{entry}")
        return f"{where}: {kind} {entry}" if where else f"{kind} {entry}"


def find(experiment: str) -> Path:
    """The file of an experiment named in ``--config experiment=``: a shipped name or a path to a YAML file."""
    if experiment.endswith((".yaml", ".yml")):
        path = Path(experiment)
        if path.is_file():
            return path
        raise AssayError(f"experiment={experiment}: there is no such file.")
    shipped = {path.stem: path for path in EXPERIMENTS.glob("*.yaml")}
    if experiment not in shipped:
        raise AssayError(
            f"experiment={experiment}: there is no such experiment{nearest(experiment, shipped)}"
        )
    return shipped[experiment]


def load(path: Path) -> Experiment:
    """Read and check an experiment file. Raises ``AssayError`` naming the file, line and nearest word."""
    if path.stat().st_size > LARGEST_BYTES:
        raise AssayError(f"{path}: an experiment file has at most {LARGEST_BYTES} bytes.")
    values, lines = _read(path)
    for key in ("name", "places"):
        if key in values:
            raise AssayError(
                f"{path}, line {lines[(key,)]}: there is no key {key!r}; the file's name is the experiment's."
            )
    try:
        places = {
            ".".join(map(str, key)): f"{path.name}, line {line}"
            for key, line in lines.items()
            if len(key) == 2
        }
        experiment = Experiment.model_validate({**values, "name": path.stem, "places": places})
    except ValidationError as error:
        raise AssayError(_sentence(path, error, lines)) from None
    _check_names(path, experiment, lines)
    return experiment


# --- YAML with line numbers -------------------------------------------------------------------------------

Lines = dict[tuple[Any, ...], int]


def _read(path: Path) -> tuple[dict[str, Any], Lines]:
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_anchors(path, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise AssayError(_broken(path, error)) from None
    if not isinstance(node, yaml.MappingNode):
        raise AssayError(f"{path}: an experiment file is a mapping with title, models and chains.")
    lines: Lines = {}
    values = _build(path, node, (), lines)
    return values, lines


def _refuse_anchors(path: Path, text: str) -> None:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise AssayError(f"{path}, line {line}: anchors and aliases are not used here; write it out.")
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            raise AssayError(f"{path}, line {line}: tags such as {tag} are not used here.")


def _broken(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{path}, line {mark.line + 1}" if mark else str(path)
    problem = getattr(error, "problem", None) or error.__class__.__name__
    return f"{place}: this is no YAML ({problem}); put chains in single quotes."


def _build(path: Path, node: yaml.Node, place: tuple[Any, ...], lines: Lines) -> Any:
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return _mapping(path, node, place, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_build(path, item, (*place, index), lines) for index, item in enumerate(node.value)]
    return yaml.SafeLoader("").construct_object(node)


def _mapping(path: Path, node: yaml.MappingNode, place: tuple[Any, ...], lines: Lines) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise AssayError(
                f"{path}, line {line}: this mapping is broken by its braces; put the chain in single quotes."
            )
        if key in result:
            raise AssayError(f"{path}, line {line}: {key} is given twice.")
        result[key] = _build(path, value_node, (*place, key), lines)
        lines[(*place, key)] = line
    return result


# --- sentences ----------------------------------------------------------------------------------------------


def line_of(lines: Lines, place: tuple[Any, ...]) -> int:
    """The line of the nearest enclosing place that has one."""
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 1)


def _sentence(path: Path, error: ValidationError, lines: Lines) -> str:
    first = error.errors()[0]
    place = tuple(part for part in first["loc"])
    where = f"{path}, line {line_of(lines, place)}"
    dotted = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        return f"{where}: there is no key {dotted!r}{nearest(str(place[-1]), _keys_at(place))}"
    if first["type"] == "missing":
        return f"{where}: the key {dotted!r} is missing."
    if place[:1] == ("country",):
        return (
            f"{where}: country is a three-letter code in capitals such as FRA or DEU, not {first['input']!r}"
            + (" (YAML reads NO as False; write NOR)." if first["input"] is False else ".")
        )
    if place[:1] == ("chains",) and not isinstance(first["input"], str):
        return f"{where}: chain {dotted.removeprefix('chains.')} is broken up by YAML; put the chain in single quotes."
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {dotted}: {message[0].lower()}{message[1:]} (found {first['input']!r})."[:1000]


def _keys_at(place: tuple[Any, ...]) -> list[str]:
    if len(place) == 1:
        return [key for key in Experiment.model_fields if key not in ("name", "places")]
    models: dict[Any, type[BaseModel]] = {"models": ModelSpec, "evaluate": Evaluation, "resources": Resources}
    return list(models[place[0]].model_fields) if place[0] in models else []


def _check_names(path: Path, experiment: Experiment, lines: Lines) -> None:
    for section in ("models", "chains", "evaluate", "tables", "figures"):
        for name in getattr(experiment, section):
            if not NAME.fullmatch(name):
                line = line_of(lines, (section, name))
                raise AssayError(
                    f"{path}, line {line}: {name!r} is no name; names are small letters, digits and _."
                )
    for name in set(experiment.models) & set(experiment.chains):
        line = line_of(lines, ("chains", name))
        raise AssayError(f"{path}, line {line}: {name} is a model and a chain; rename one of them.")
    if len(set(experiment.seeds)) != len(experiment.seeds):
        raise AssayError(f"{path}, line {line_of(lines, ('seeds',))}: a seed is given twice.")
    if not NAME.fullmatch(path.stem):
        raise AssayError(f"{path}: the file's name becomes a folder; use small letters, digits and _.")
