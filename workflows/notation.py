"""The notation of chains: ``target > prune.magnitude(sparsity={0.5, 0.7}) > unlearn.satimp``.

The text is Python expression syntax, parsed with ``ast`` and never evaluated. ``parse`` gives a ``Chain`` of
plain values; ``expand`` multiplies out its sweeps; ``format_value`` writes a value back the one normal way.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from methods.stage import AssayError

LONGEST = 4000
Value = Any
"""None, bool, int, float, str, tuple, dict, or one of Name, Call, Choice."""


@dataclass(frozen=True)
class Name:
    """A reference to a chain or model: ``retained@0``, ``direct@step40``, ``pruned[sparsity=0.5]``.

    ``direct@steps`` means every model that the chain keeps on its way (``of:`` of an evaluation takes it).
    """

    text: str
    pins: tuple[tuple[str, Value], ...] = ()
    seed: int | None = None
    step: int | None = None
    steps: bool = False


@dataclass(frozen=True)
class Call:
    """A stage or component with its options in written order."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()


@dataclass(frozen=True)
class Choice:
    """A sweep: one member of the family for each element."""

    elements: tuple[Value, ...]


@dataclass(frozen=True)
class Chain:
    """The first word and the stages after it."""

    first: Name | Call | Choice
    stages: tuple[Call | Choice, ...]


def parse(text: str) -> Chain:
    """Read a chain. Raises ``AssayError`` with a sentence that shows where the text is wrong."""
    tree, pins = _tree(text)
    reader = _Reader(text, pins)
    parts = reader.parts(tree)
    first = reader.first(parts[0])
    return Chain(first, tuple(reader.stage(part) for part in parts[1:]))


def parse_call(text: str) -> Call:
    """Read one call, as an entry of ``evaluate:`` is written: ``tofu(split="forget10")`` or ``speed``."""
    tree, pins = _tree(text)
    stage = _Reader(text, pins).stage(tree)
    if isinstance(stage, Choice):
        raise AssayError(f"{text!r}: an evaluation cannot be swept; write one entry for each.")
    return stage


def parse_name(text: str) -> Name:
    """Read one reference, as in ``of: [target, pruned[sparsity=0.5]]``."""
    tree, pins = _tree(text)
    first = _Reader(text, pins).first(tree)
    if not isinstance(first, Name):
        raise AssayError(f"{text!r} is no name of a chain or model.")
    return first


def _tree(text: str) -> tuple[ast.expr, set[int]]:
    if not text.strip():
        raise AssayError(
            "a chain is a text such as 'base > train.sft(data=\"authors/full\")'; this one is empty."
        )
    if len(text) > LONGEST:
        raise AssayError(f"a chain may have {LONGEST} characters; this one has {len(text)}.")
    line = " ".join(text.split("\n")).strip()
    try:
        line, pins = _pins_to_calls(line)
        return ast.parse(line, mode="eval").body, pins
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        reason = getattr(error, "msg", None) or error.args[0]
        place = f" at column {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        hint = _broken_hint(line)
        raise AssayError(f"{line!r} cannot be read as a chain{place}: {reason}.{hint}") from None
    except (RecursionError, MemoryError):
        raise AssayError(f"{line[:60]!r}… is nested too deeply to be a chain.") from None


def _broken_hint(line: str) -> str:
    if line.count("(") != line.count(")") or line.count('"') % 2 or line.count("{") != line.count("}"):
        return " A bracket or quote is left open; in YAML, put the chain in single quotes."
    return ""


def _pins_to_calls(line: str) -> tuple[str, set[int]]:
    """``pruned[sparsity=0.5]`` is no Python: turn such brackets into round ones and remember where."""
    if "[" not in line:
        return line, set()
    letters, pins, open_pins = list(line), set(), []
    previous: tokenize.TokenInfo | None = None
    for token in tokenize.generate_tokens(io.StringIO(line).readline):
        if token.string == "[":
            touching = previous is not None and previous.type == tokenize.NAME and previous.end == token.start
            open_pins.append(touching)
            if touching:
                pins.add(token.start[1])
                letters[token.start[1]] = "("
        elif token.string == "]" and open_pins and open_pins.pop():
            letters[token.start[1]] = ")"
        previous = token
    return "".join(letters), {len(line[:column].encode()) for column in pins}


class _Reader:
    """Turns syntax-tree nodes into values; every refusal is a sentence that quotes the place."""

    def __init__(self, text: str, pins: set[int]) -> None:
        self.text, self.pins = " ".join(text.split("\n")).strip(), pins

    def parts(self, node: ast.expr) -> list[ast.expr]:
        if not isinstance(node, ast.Compare):
            return [node]
        if any(not isinstance(operator, ast.Gt) for operator in node.ops):
            raise self.wrong(node, "stages are joined by '>' only")
        return [node.left, *node.comparators]

    def first(self, node: ast.expr) -> Name | Call | Choice:
        name = self.name(node)
        if name is not None:
            return name
        if isinstance(node, (ast.Call, ast.Attribute, ast.Set)):
            return self.stage(node)
        raise self.wrong(node, "a chain begins with the name of a chain or model, or with a data stage")

    def stage(self, node: ast.expr) -> Call | Choice:
        if isinstance(node, ast.Set):
            return self.choice(node, [self.single_stage(element) for element in node.elts])
        return self.single_stage(node)

    def single_stage(self, node: ast.expr) -> Call:
        if isinstance(node, ast.Call) and not self.is_pin(node):
            return self.call(node)
        if isinstance(node, (ast.Attribute, ast.Name)):
            return Call(self.dotted(node))
        raise self.wrong(node, "a stage is written family.method or family.method(option=value)")

    def call(self, node: ast.Call) -> Call:
        name = self.dotted(node.func)
        if node.args:
            raise self.wrong(node.args[0], f"options of {name} are written option=value")
        return Call(name, tuple(self.keywords(node, name)))

    def keywords(self, node: ast.Call, name: str) -> Iterator[tuple[str, Value]]:
        seen = set()
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.wrong(keyword.value, f"options of {name} are written option=value, without **")
            if keyword.arg in seen:
                raise self.wrong(keyword.value, f"option {keyword.arg} of {name} is given twice")
            seen.add(keyword.arg)
            yield keyword.arg, self.value(keyword.value)

    def dotted(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            return f"{self.dotted(node.value)}.{node.attr}"
        raise self.wrong(node, "a stage is written family.method")

    def is_pin(self, node: ast.Call) -> bool:
        return node.func.end_col_offset in self.pins

    def name(self, node: ast.expr) -> Name | None:
        if isinstance(node, ast.Name):
            return Name(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and self.is_pin(node):
            if node.args or not node.keywords:
                raise self.wrong(node, f"a member of a family is written {node.func.id}[option=value]")
            return Name(node.func.id, tuple(self.keywords(node, node.func.id)))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            return self.pinned(node)
        return None

    def pinned(self, node: ast.BinOp) -> Name:
        inner, right = self.name(node.left), node.right
        if inner is None:
            raise self.wrong(node, "'@' follows the name of a chain")
        if isinstance(right, ast.Constant) and type(right.value) is int:
            if inner.seed is not None:
                raise self.wrong(node, "the seed is given twice")
            return replace(inner, seed=right.value)
        return self.at_step(node, inner)

    def at_step(self, node: ast.BinOp, inner: Name) -> Name:
        word = node.right.id if isinstance(node.right, ast.Name) else ""
        if word != "steps" and not (word.startswith("step") and word[4:].isdigit()):
            raise self.wrong(
                node, "'@' is followed by a seed (retained@0), a step (direct@step40) or steps (direct@steps)"
            )
        if inner.step is not None or inner.steps:
            raise self.wrong(node, "the step is given twice")
        return replace(inner, steps=True) if word == "steps" else replace(inner, step=int(word[4:]))

    def choice(self, node: ast.Set, elements: list[Value]) -> Choice:
        seen: dict[str, Value] = {}
        for element in elements:
            if isinstance(element, Choice):
                raise self.wrong(node, "a sweep cannot stand inside a sweep")
            key = format_value(float(element) if _is_number(element) else element)
            if key in seen:
                raise self.wrong(node, f"the sweep names {format_value(element)} twice")
            seen[key] = element
        return Choice(tuple(elements))

    def value(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Constant):
            return self.constant(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return self.signed(node)
        if isinstance(node, ast.Set):
            return self.choice(node, [self.value(element) for element in node.elts])
        if isinstance(node, (ast.List, ast.Tuple)):
            return tuple(self.inner(element) for element in node.elts)
        if isinstance(node, ast.Dict):
            return self.mapping(node)
        name = self.name(node)
        if name is not None:
            return name
        if isinstance(node, ast.Call):
            return self.call(node)
        raise self.wrong(
            node, "a value is text, a number, True, False, None, a list, a mapping, a name or a component"
        )

    def inner(self, node: ast.expr) -> Value:
        value = self.value(node)
        if isinstance(value, Choice):
            raise self.wrong(node, "a sweep cannot stand inside a list or mapping")
        return value

    def mapping(self, node: ast.Dict) -> dict[str, Value]:
        result: dict[str, Value] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and isinstance(key.value, str)) or key.value.startswith(
                "$"
            ):
                raise self.wrong(value, "the keys of a mapping are plain texts")
            if key.value in result:
                raise self.wrong(value, f"the mapping names {key.value!r} twice")
            result[key.value] = self.inner(value)
        return result

    def constant(self, node: ast.Constant) -> Value:
        value = node.value
        if value is None or isinstance(value, (bool, str, int)):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        raise self.wrong(node, "numbers are finite decimal numbers")

    def signed(self, node: ast.UnaryOp) -> Value:
        number = self.value(node.operand)
        if not _is_number(number):
            raise self.wrong(node, "a sign stands before a number")
        return -number if isinstance(node.op, ast.USub) else number

    def wrong(self, node: ast.AST, reason: str) -> AssayError:
        start, end = getattr(node, "col_offset", 0), getattr(node, "end_col_offset", None)
        return AssayError(
            f"{self.text!r}, at {self.text.encode()[start:end].decode(errors='replace')!r}: {reason}."
        )


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- writing back ---------------------------------------------------------------------------------------


def format_value(value: Value) -> str:
    """The one normal way to write a value."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(format_value, value)) + "]"
    if isinstance(value, Mapping):
        return (
            "{" + ", ".join(f"{format_value(key)}: {format_value(item)}" for key, item in value.items()) + "}"
        )
    if isinstance(value, Choice):
        return "{" + ", ".join(map(format_value, value.elements)) + "}"
    if isinstance(value, Call):
        return format_call(value.name, value.options)
    if isinstance(value, Name):
        return format_name(value)
    return repr(value)


def format_call(name: str, options: tuple[tuple[str, Value], ...]) -> str:
    """``unlearn.satimp(beta1=6.0)``; without options just the name."""
    inner = ", ".join(f"{option}={format_value(value)}" for option, value in options)
    return f"{name}({inner})" if inner else name


def format_name(name: Name) -> str:
    """``pruned[sparsity=0.5]@0@step40``: the member, then the seed, then the step."""
    pins = (
        "[" + ", ".join(f"{key}={format_value(value)}" for key, value in name.pins) + "]" if name.pins else ""
    )
    seed = f"@{name.seed}" if name.seed is not None else ""
    step = "@steps" if name.steps else f"@step{name.step}" if name.step is not None else ""
    return f"{name.text}{pins}{seed}{step}"


# --- sweeps -----------------------------------------------------------------------------------------------

Assignment = tuple[tuple[str, Value], ...]


def expand(chain: Chain) -> list[tuple[Assignment, Chain]]:
    """Every member of the family with what its sweeps chose; several sweeps multiply, the last runs fastest."""
    places = [chain.first, *chain.stages]
    swept = list(itertools.chain.from_iterable(map(_sweeps, places)))
    keys = _keys([path for path, _ in swept])
    members = []
    for chosen in itertools.product(*(choice.elements for _, choice in swept)):
        remaining = iter(chosen)
        parts = [_choose(place, remaining) for place in places]
        members.append((tuple(zip(keys, chosen, strict=True)), Chain(parts[0], tuple(parts[1:]))))
    return members


def _sweeps(value: Value, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Choice]]:
    if isinstance(value, Choice):
        yield path or ("stage",), Choice(tuple(_chosen_within(value)))
    elif isinstance(value, Call):
        for option, inner in value.options:
            yield from _sweeps(inner, (*path, value.name, option))


def _chosen_within(value: Value) -> list[Value]:
    """All values without a sweep that a value stands for: a stage of a sweep may have sweeps of its own."""
    if isinstance(value, Choice):
        return [found for element in value.elements for found in _chosen_within(element)]
    if not isinstance(value, Call):
        return [value]
    names = [option for option, _ in value.options]
    products = itertools.product(*(_chosen_within(inner) for _, inner in value.options))
    return [Call(value.name, tuple(zip(names, found, strict=True))) for found in products]


def _choose(value: Value, chosen: Iterator[Value]) -> Value:
    if isinstance(value, Choice):
        return next(chosen)
    if isinstance(value, Call):
        return Call(value.name, tuple((option, _choose(inner, chosen)) for option, inner in value.options))
    return value


def _keys(paths: list[tuple[str, ...]]) -> list[str]:
    """The shortest name that tells the sweeps apart: the option, else stage and option, else with a number."""
    short = [path[-1] for path in paths]
    named = [
        key if short.count(key) == 1 else "_".join(path).replace(".", "_")
        for key, path in zip(short, paths, strict=True)
    ]
    return [
        key if named.count(key) == 1 else f"{key}_{named[:place].count(key) + 1}"
        for place, key in enumerate(named)
    ]
