"""From the options of a call to a method's typed ``Config``: every default filled in, every mistake a sentence."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from methods import stage
from methods.find import Catalogue, Found, nearest, using
from methods.stage import AssayError, Component, How, Parent
from workflows.notation import Call, Name, Value, format_call, format_value
from workflows.record import PARTS, Part

# Options that `scale=smoke` sets wherever a method or evaluation has them.
SMOKE: dict[str, Any] = {
    "steps": 2, "epochs": None, "batch": 4, "limit": 8, "sequences": 8, "generate": 4, "context_tokens": 64,
    "stride_tokens": None, "probe_every": 1, "max_new_tokens": 8, "repeats": 1, "warmup_steps": 0,
    "layer": 1, "group": None, "attack_steps": 2,
}  # fmt: skip
# Options that name data sets; where they take a reference as well, it is to a chain that writes rows.
DATASET = "dataset"
# What YAML calls it, and what a chain does.
WORDS = {"true": "True", "false": "False", "null": "None", "none": "None"}
# Of the steps at which models are kept, the one that any run has.
SMOKE_KEPT = (1,)


@dataclass(frozen=True)
class OptionField:
    """What is known of one option of a ``Config``."""

    name: str
    hint: Any
    default: Any
    how: bool
    kind: str | None
    reference: bool
    optional: bool
    several: bool = False
    reads: stage._Reads | None = None

    @property
    def part(self) -> Part:
        """What a reference reads of the other result."""
        if self.kind == DATASET:
            return "data"
        return next((part for part in PARTS if part == self.kind), "model")


@dataclass(frozen=True)
class Resolved:
    """A call with its complete, validated config and everything it names."""

    found: Found
    config: Any
    components: tuple[Found, ...]
    references: tuple[tuple[str, Name], ...]
    data: tuple[str, ...]
    label: str


Refer = Callable[[OptionField, Name], Parent]


def resolve(call: Call, found: Found, catalogue: Catalogue, refer: Refer, smoke: bool = False) -> Resolved:
    """Complete and validate a call.

    Args:
        refer: turns a reference (the option, the name as written) into the id of the result it means.
    Raises:
        AssayError: an unknown or missing option, a wrong type or value, with the nearest valid word.
    """
    builder = _Builder(catalogue, refer, _smoke_values(found) if smoke else {})
    # A config may look into the components that it is given, also those from outside.
    with using(catalogue.outside):
        config = builder.config(call, found)
        used = (*builder.components, *_own_terms(found, config, catalogue))
    components = tuple({piece.name: piece for piece in used}.values())
    label = format_call(call.name, label_options(call, found.load().Config, catalogue))
    return Resolved(found, config, components, tuple(builder.references), tuple(builder.data), label)


def _own_terms(found: Found, config: Any, catalogue: Catalogue) -> Iterator[Found]:
    """The term files that a recipe of distillation names itself: what they compute is what it computes."""
    named = getattr(found.load(), "terms", None)
    if found.family != "distill" or named is None:
        return
    terms = named(config)
    for term in terms.values() if isinstance(terms, Mapping) else terms:
        yield catalogue.component("term", term.name)


def _smoke_values(found: Found) -> dict[str, Any]:
    """What ``scale=smoke`` makes of options: a file may say more, and those of a new model are its own affair."""
    own: dict[str, Any] = getattr(found.load(), "SMOKE", {})
    return own if found.family == "model" else SMOKE | own


def label_options(call: Call, config_class: type, catalogue: Catalogue) -> tuple[tuple[str, Value], ...]:
    """Options in declaration order; those that equal their default or only say *how* are dropped."""
    given = dict(call.options)
    kept = []
    for option in fields_of(config_class):
        if (
            option.name in given
            and not option.how
            and not _equals_default(given[option.name], option.default)
        ):
            kept.append((option.name, _without_how(given[option.name], option, catalogue)))
    return tuple(kept)


def _without_how(value: Value, option: OptionField, catalogue: Catalogue) -> Value:
    """A component as it is written, less what only says how."""
    if not isinstance(value, Call) or option.kind is None:
        return value
    fields = fields_of(catalogue.component(option.kind, value.name).load().Config)
    how = {each.name for each in fields if each.how}
    return Call(value.name, tuple((name, item) for name, item in value.options if name not in how))


def _equals_default(value: Value, default: Any) -> bool:
    return not isinstance(value, (Name, Call)) and type(value) is type(default) and bool(value == default)


@cache
def fields_of(config_class: type) -> tuple[OptionField, ...]:
    """The options of a ``Config`` in declaration order."""
    if not dataclasses.is_dataclass(config_class):
        raise AssayError(f"{config_class.__module__}.Config must be a dataclass.")
    hints = typing.get_type_hints(config_class, include_extras=True)
    return tuple(_field(field, hints[field.name]) for field in dataclasses.fields(config_class))


def _field(field: dataclasses.Field[Any], hint: Any) -> OptionField:
    metadata = list(_metadata(hint))
    kinds = [item.name for item in metadata if isinstance(item, stage._Kind)]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    plain = list(_plain_types(hint))
    return OptionField(
        name=field.name,
        hint=hint,
        default=default,
        how=How in metadata,
        kind=kinds[0] if kinds else None,
        reference=Parent in plain,
        optional=type(None) in plain,
        several=_is_tuple(hint),
        reads=next((item for item in metadata if isinstance(item, stage._Reads)), None),
    )


def _metadata(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) is typing.Annotated:
        yield from hint.__metadata__
    for inner in typing.get_args(hint):
        if not isinstance(inner, str):
            yield from _metadata(inner)


def _is_tuple(hint: Any) -> bool:
    """Whether an option takes a list."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _is_tuple(inner[0])
    return origin is tuple or (origin in (typing.Union, types.UnionType) and any(map(_is_tuple, inner)))


def _plain_types(hint: Any) -> Iterator[Any]:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _plain_types(typing.get_args(hint)[0])
    elif origin in (typing.Union, types.UnionType, tuple):
        for inner in typing.get_args(hint):
            yield from _plain_types(inner)
    else:
        yield hint


@cache
def _adapter(config_class: type, name: str) -> TypeAdapter[Any]:
    hint = next(option.hint for option in fields_of(config_class) if option.name == name)
    return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


class _Builder:
    """Walks one call and its components; collects what they use."""

    def __init__(self, catalogue: Catalogue, refer: Refer, smoke: Mapping[str, Any]) -> None:
        self.catalogue, self.refer, self.smoke = catalogue, refer, smoke
        self.components: list[Found] = []
        self.references: list[tuple[str, Name]] = []
        self.data: list[str] = []

    def config(self, call: Call, found: Found) -> Any:
        config_class = found.load().Config
        options = {option.name: option for option in fields_of(config_class)}
        self.refuse_unknown(call, options)
        given = dict(call.options)
        values = {name: self.value(call.name, option, given) for name, option in options.items()}
        checked = {
            name: self.check(call.name, options[name], config_class, value) for name, value in values.items()
        }
        try:
            return config_class(**checked)
        except (ValueError, TypeError) as error:
            raise AssayError(f"{call.name}: {error}") from None

    def refuse_unknown(self, call: Call, options: dict[str, OptionField]) -> None:
        for name, _ in call.options:
            if name not in options:
                raise AssayError(f"unknown option {name!r} for {call.name}{nearest(name, options)}")

    def value(self, method: str, option: OptionField, given: dict[str, Value]) -> Any:
        if option.name in self.smoke and option.kind is None:
            value = self.smoke[option.name]
            if value is None or not isinstance(given.get(option.name, option.default), (int, float)):
                return value
            return min(value, given.get(option.name, option.default))
        if self.smoke and option.name == "checkpoints" and given.get(option.name):
            return SMOKE_KEPT
        if option.name in given:
            return self.convert(method, option, given[option.name])
        if option.default is dataclasses.MISSING:
            raise AssayError(f"{method} needs the option {option.name!r}.")
        return self.convert_default(method, option)

    def convert_default(self, method: str, option: OptionField) -> Any:
        if isinstance(option.default, Component):
            options = tuple(option.default.options.items())
            return self.component(method, option, Call(option.default.name, options))
        return option.default

    def convert(self, method: str, option: OptionField, value: Value) -> Any:
        if isinstance(value, tuple):
            return tuple(self.convert(method, option, item) for item in value)
        if isinstance(value, dict):
            return {key: self.convert(method, option, item) for key, item in value.items()}
        if isinstance(value, Name):
            return self.reference(method, option, value)
        if isinstance(value, Call):
            return self.component(method, option, value)
        if isinstance(value, str) and option.reference and option.kind != DATASET:
            raise AssayError(f"{method}: write {option.name}={value}, without quotes.")
        return value

    def reference(self, method: str, option: OptionField, name: Name) -> Parent:
        if option.reference:
            self.references.append((option.name, name))
            return self.refer(option, name)
        kinds = self.catalogue.component_kinds(name.text)
        if option.kind in kinds:
            called = f"[{name.text}()]" if option.several else f"{name.text}()"
            raise AssayError(f"{method}: {name.text} is a component; write {option.name}={called}.")
        hint = f"write {WORDS[name.text]}" if name.text in WORDS else "text needs quotes"
        raise AssayError(f"{method}: {name.text} is no value for {option.name}; {hint}.")

    def component(self, method: str, option: OptionField, call: Call) -> Component:
        if option.reference or option.kind is None or option.kind == DATASET:
            raise AssayError(f"{method}: {option.name} takes no component, but {format_value(call)} is one.")
        found = self.catalogue.component(option.kind, call.name)
        self.components.append(found)
        config = self.config(call, found)
        config_class: type = found.load().Config
        return Component(
            call.name, {item.name: getattr(config, item.name) for item in fields_of(config_class)}
        )

    def check(self, method: str, option: OptionField, config_class: type, value: Any) -> Any:
        if isinstance(value, Parent) and option.kind == DATASET:
            return value
        if option.kind != DATASET and (option.reference or option.kind is not None):
            return self.check_part(method, option, value)
        try:
            checked = _adapter(config_class, option.name).validate_python(value)
        except ValidationError as error:
            # Of several forms that an option may have, the last one is the list.
            reason = error.errors()[-1 if isinstance(value, tuple) else 0]["msg"]
            reason = re.sub("tuple", "list", reason, flags=re.IGNORECASE)
            raise AssayError(
                f"{method}: {option.name}={format_value(value)}: {reason[0].lower()}{reason[1:]}."
            ) from None
        if option.kind == DATASET and checked is not None:
            self.data.extend(checked if isinstance(checked, tuple) else (checked,))
        return checked

    def check_part(self, method: str, option: OptionField, value: Any) -> Any:
        wanted = Parent if option.reference else Component
        if isinstance(value, tuple) and not option.several:
            raise AssayError(f"{method}: {option.name} takes no list: give it one alone.")
        if option.several and value is not None and not (isinstance(value, tuple) and value):
            what = f"{option.name}=[{'a, b' if option.reference else 'a(), b()'}]"
            raise AssayError(f"{method}: {option.name} takes a list of one or more: write {what}.")
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            if not (isinstance(item, wanted) or (item is None and option.optional)):
                what = _wanted(option)
                if isinstance(item, str) and option.kind in self.catalogue.component_kinds(item):
                    what = f"{what}: write {item}(), without quotes"
                raise AssayError(f"{method}: {option.name}={format_value(item)}: this option takes {what}.")
        return value


def _wanted(option: OptionField) -> str:
    if not option.reference:
        return f"a component of kind {option.kind}"
    if option.part == "model":
        return "the name of a chain or model"
    return f"the name of a chain that writes {option.part}/"


# --- JSON form ------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """A config value as JSON: components and references are marked with ``$``."""
    if isinstance(value, Component):
        return {
            "$component": value.name,
            "options": {key: encode(item) for key, item in value.options.items()},
        }
    if isinstance(value, Parent):
        return {"$result": value.id}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(value: Any) -> Any:
    """The inverse of ``encode``; lists come back as tuples."""
    if isinstance(value, dict) and "$component" in value:
        return Component(value["$component"], {key: decode(item) for key, item in value["options"].items()})
    if isinstance(value, dict) and "$result" in value:
        return Parent(value["$result"])
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    return value


def encode_config(config: Any) -> dict[str, Any]:
    """All options of a config."""
    config_class: type = type(config)
    return {option.name: encode(getattr(config, option.name)) for option in fields_of(config_class)}


def encode_what(config: Any, catalogue: Catalogue) -> dict[str, Any]:
    """The options of a config, and of its components, that say what is computed and not how."""
    config_class: type = type(config)
    values = {option.name: getattr(config, option.name) for option in fields_of(config_class)}
    return _what(values, config_class, catalogue)


def _what(values: Mapping[str, Any], config_class: type, catalogue: Catalogue) -> dict[str, Any]:
    chosen = (option for option in fields_of(config_class) if not option.how)
    return {option.name: _encode_what(values[option.name], option, catalogue) for option in chosen}


def _encode_what(value: Any, option: OptionField, catalogue: Catalogue) -> Any:
    if isinstance(value, Component) and option.kind is not None:
        config_class = catalogue.component(option.kind, value.name).load().Config
        return {"$component": value.name, "options": _what(value.options, config_class, catalogue)}
    if isinstance(value, tuple) and option.kind is not None:
        return [_encode_what(item, option, catalogue) for item in value]
    return encode(value)


def decode_config(config_class: type, values: dict[str, Any]) -> Any:
    """A method's ``Config`` from a frozen job file."""
    return config_class(**{name: decode(value) for name, value in values.items()})
