"""What the tables and figures of an experiment file may ask for: kinds, keys, and how a quantity is written.

A quantity is ``entry.metric`` (or ``entry.task.metric``), a cost such as ``energy.chain_kwh``, ``step``,
``curve.TERM`` (what the last stage logged), or ``X@Y=LEVEL``: X where Y first passes LEVEL. Loads nothing heavy, so
the planner refuses with the same sentences, before anything runs, that the report would have afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from methods.find import nearest
from methods.stage import AssayError

if TYPE_CHECKING:
    from workflows.experiment import Experiment

COSTS = ("energy", "time", "memory")
STEP = "step"
CURVE = "curve."
ROWS = ("chain", "method", "label")
PANELS = ("one", "chain", "group", "family", "method")
DIRECTIONS = ("higher", "lower", "closer_to_0", "closer_to_1")
TABLES = {
    "plain": ("rows", "columns", "of", "title"),
    "matched": ("at", "levels", "columns", "better", "rows", "of", "title"),
}
_EVERY_FIGURE = ("of", "title", "caption", "log", "x_label", "y_label")
FIGURES = {
    "scatter": ("x", "y", "color", "size", "front"),
    "curve": ("terms",),
    "sweep": ("x", "y", "baseline"),
    "matched": ("x", "y", "levels", "reference", "panels"),
}
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "tables": {kind: ("kind", *keys) for kind, keys in TABLES.items()},
    "figures": {kind: (*keys, "kind", *_EVERY_FIGURE) for kind, keys in FIGURES.items()},
}
DEFAULT_KIND = {"tables": "plain", "figures": "scatter"}
_LEVEL = re.compile(r"(?P<quantity>.+)@(?P<at>[^@]+)=(?P<level>[^@=]*)")

Spec = Mapping[str, Any]


# --- quantities -------------------------------------------------------------------------------------------


def at_level(reference: str) -> tuple[str, str, float] | None:
    """X, Y and the level of ``X@Y=LEVEL``; None for any other quantity.

    Raises:
        AssayError: the level is no number, or a curve is named without the place to read it at.
    """
    match = _LEVEL.fullmatch(reference)
    if match is None:
        if reference.startswith(CURVE):
            raise AssayError(_how(reference))
        return None
    try:
        level = float(match["level"])
    except ValueError:
        level = math.nan
    if math.isfinite(level):
        return match["quantity"], match["at"], level
    if "." in match["at"] or reference.startswith(CURVE):
        raise AssayError(_how(reference))
    return None  # a task's own @ and =, as in ``code.humaneval limit=20.pass@1``


def _how(reference: str) -> str:
    return (
        f"{reference}: write a matched level as X@Y=LEVEL, e.g. curve.probe.retain@probe.forget=2 or "
        "forget10.model_utility@forget10.forget_nll=2."
    )


def quantities(spec: Spec, section: str) -> Iterator[str]:
    """Everything in a specification that is a quantity, ``X@Y=LEVEL`` taken apart."""
    for reference in _written(spec, section):
        parts = at_level(reference)
        if parts is None:
            yield reference
        elif parts[0].startswith(CURVE) and not parts[1].startswith(CURVE):
            yield parts[0]  # behind a curve's @ stands a term
        else:
            yield from parts[:2]


def _written(spec: Spec, section: str) -> Iterator[str]:
    kind = kind_of(spec, section)
    if section == "tables":
        matched = kind == "matched"
        yield from (f"{each}@{spec['at']}=0" if matched else each for each in spec.get("columns", ()))
    elif kind == "scatter":
        yield from (spec[key] for key in ("x", "y", "size") if isinstance(spec.get(key), str))
        if "." in str(spec.get("color", "")):
            yield spec["color"]
    elif kind == "sweep":
        yield from [spec["y"]] if isinstance(spec["y"], str) else spec["y"]
    elif kind == "matched":
        yield from (spec[key] for key in ("x", "y") if not is_term(spec[key]))


def is_term(word: str) -> bool:
    """Whether a matched figure's axis can only be a logged term: ``probe.forget``, ``curve.train``, ``train``."""
    return word != STEP and (word.startswith((CURVE, "probe.")) or "." not in word)


# --- one specification ------------------------------------------------------------------------------------


def kind_of(spec: Spec, section: str) -> str:
    """The kind of a table or figure."""
    return str(spec.get("kind", DEFAULT_KIND[section]))


def check(where: str, spec: Spec, section: str) -> None:
    """Raise ``AssayError``, beginning with ``where``, for a table or figure that cannot be drawn as it is written."""
    kind, kinds = kind_of(spec, section), KINDS[section]
    if kind not in kinds:
        raise AssayError(f"{where}: kind {kind!r} is none of {', '.join(kinds)}.")
    for key in sorted(set(spec) - set(kinds[kind])):
        article = "a table" if kind == "plain" else f"a {kind}"
        near = nearest(key, kinds[kind])
        hint = near if "did you mean" in near else "."
        raise AssayError(
            f"{where}: there is no key {key!r}{hint} {article[0].upper()}{article[1:]} has {', '.join(kinds[kind])}."
        )
    if "of" in spec and not _is_texts(spec["of"]):
        raise AssayError(f"{where}: of is a list of chains, e.g. [target, direct].")
    if section == "tables":
        _check_table(where, kind, spec)
    else:
        _check_figure(where, kind, spec)


def _check_table(where: str, kind: str, spec: Spec) -> None:
    if not _is_texts(spec.get("columns")):
        raise AssayError(
            f"{where}: columns names what is shown, e.g. [forget10.model_utility, energy.chain_kwh]."
        )
    if spec.get("rows", "chain") not in ROWS:
        raise AssayError(f"{where}: rows is one of {', '.join(ROWS)}.")
    if kind == "matched":
        _check_matched_table(where, spec)


def _check_matched_table(where: str, spec: Spec) -> None:
    at = spec.get("at")
    if not isinstance(at, str) or "=" in at:
        raise AssayError(
            f"{where}: at names what is matched, e.g. forget10.forget_nll or curve.probe.forget."
        )
    if "levels" not in spec:
        raise AssayError(f"{where}: levels says where the chains are compared, e.g. [1, 2, 3].")
    _check_levels(where, spec["levels"])
    for column in spec["columns"]:
        if _LEVEL.fullmatch(column):
            raise AssayError(f"{where}: {column}: at and levels stand beside columns; leave the @ out.")
    better = spec.get("better", {})
    if not isinstance(better, Mapping) or not set(better) <= set(spec["columns"]):
        raise AssayError(
            f"{where}: better says of columns which way is better, e.g. {{curve.probe.retain: lower}}."
        )
    for column, direction in better.items():
        if direction not in DIRECTIONS:
            raise AssayError(
                f"{where}: better of {column} is one of {', '.join(DIRECTIONS)}, not {direction!r}."
            )


def _check_figure(where: str, kind: str, spec: Spec) -> None:
    for key in ("x", "y") if kind != "curve" else ("terms",):
        if not spec.get(key):
            raise AssayError(f"{where}: a {kind} needs {key}.")
        several = (kind, key) in (("curve", "terms"), ("sweep", "y"))
        if not (isinstance(spec[key], str) or (several and _is_texts(spec[key]))):
            raise AssayError(f"{where}: {key} is {'one text or a list of texts' if several else 'one text'}.")
    if not set(spec.get("log", ())) <= {"x", "y"}:
        raise AssayError(f"{where}: log is x, y or [x, y].")
    if "levels" in spec:
        _check_levels(where, spec["levels"])
    for key in ("reference", "baseline"):
        if key in spec and not isinstance(spec[key], str):
            raise AssayError(f"{where}: {key} is one text, the name of a chain.")
    if spec.get("panels", "one") not in PANELS:
        raise AssayError(f"{where}: panels is one of {', '.join(PANELS)}.")


def _check_levels(where: str, levels: Any) -> None:
    numbers = isinstance(levels, Sequence) and all(type(each) in (int, float) for each in levels)
    if not numbers or not levels or not all(map(math.isfinite, levels)):
        raise AssayError(f"{where}: levels is a list of numbers, e.g. [1, 2, 3], not {levels!r}.")
    if len(set(levels)) < len(levels):
        raise AssayError(f"{where}: a level is given twice.")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


# --- a whole experiment -----------------------------------------------------------------------------------


def check_experiment(experiment: Experiment) -> None:
    """Check every table, figure and claim against the experiment's own entries and chains, before anything runs."""
    for section in ("tables", "figures"):
        for name, spec in getattr(experiment, section).items():
            where = experiment.place(section, name)
            check(where, spec, section)
            _check_quantities(where, _placed(where, spec, section), experiment.evaluate)
            _check_chains(where, spec, [*experiment.chains, *experiment.models])
            if section == "tables" and kind_of(spec, section) == "matched":
                _check_kept(where, spec, experiment)
    for number, claim in enumerate(experiment.claims, start=1):
        _placed_level(f"claim {number}", str(claim.get("metric", "")))


def _placed(where: str, spec: Spec, section: str) -> list[str]:
    try:
        return list(quantities(spec, section))
    except AssayError as error:
        raise AssayError(f"{where}: {error}") from None


def _placed_level(where: str, reference: str) -> None:
    try:
        at_level(reference)
    except AssayError as error:
        raise AssayError(f"{where}: {error}") from None


def _check_quantities(where: str, references: Iterable[str], entries: Iterable[str]) -> None:
    known = {*entries, *COSTS}
    for reference in references:
        head = reference.partition(".")[0]
        if head not in known and reference != STEP and not reference.startswith(CURVE):
            raise AssayError(f"{where}: {reference!r} names no evaluation{nearest(head, known)}")


def _check_chains(where: str, spec: Spec, known: Sequence[str]) -> None:
    """Names in ``of``, ``reference`` and ``baseline``; patterns are left to what they will find."""
    words = [*spec.get("of", ()), *(spec[key] for key in ("reference", "baseline") if spec.get(key))]
    for word in words:
        name = re.split(r"[\[@]", str(word), maxsplit=1)[0]
        if re.fullmatch(r"\w+", name) and name not in known:
            raise AssayError(f"{where}: {word!r} names no chain or model{nearest(name, known)}")


def _check_kept(where: str, spec: Spec, experiment: Experiment) -> None:
    """Without ``of``, a matched table is over the chains whose kept steps its entry scores: there must be one."""
    entry = experiment.evaluate.get(str(spec["at"]).partition(".")[0])
    if entry is not None and "of" not in spec and not any("@step" in word for word in entry.of or ()):
        head = str(spec["at"]).partition(".")[0]
        raise AssayError(
            f"{where}: {head} scores no model on the way; write of: [direct@steps] in its entry under evaluate "
            "and give the last stage of direct checkpoints=[20, 40]."
        )
