"""What the tables and figures of an experiment file may ask for: kinds, keys, and how a quantity is written.

A quantity is ``entry.metric`` (or ``entry.task.metric``), a cost such as ``energy.chain_kwh``, ``step``,
``curve.TERM`` (what the last stage logged), ``X@Y=LEVEL``: X where Y first passes LEVEL, ``X relative to CHAIN``: by
how many percent X differs from that chain's, ``X recovered towards CHAIN``: the share that the last stage won back of
what the model it started from had lost against that chain, and the same ``per kilojoule``. Loads nothing heavy, so the
planner refuses with the same sentences, before anything runs, that the report would have afterwards.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from methods.find import nearest
from methods.stage import AssayError, Claim

if TYPE_CHECKING:
    from workflows.experiment import Experiment

COSTS = ("energy", "time", "memory", "tokens")
PROFILE = "profile"
"""The entry of what every layer got: rows of results.csv that only the figure of that kind shows."""
STEP = "step"
CURVE = "curve."
RELATIVE = " relative to "
RECOVERED = " recovered towards "
PER_KILOJOULE = " per kilojoule"
ROWS = ("chain", "method", "label")
GROUPS = ("chain", "group", "family", "method", "base", "source")
PANELS = {
    "matched": ("one", "chain", "group", "family", "method"),
    "curve": ("term", "chain", "group", "family", "method", "base"),
    "profile": ("layer", "chain"),
}
SPREADS = ("sd", "interval")
RUNS = ("band", "lines")
PROFILES = ("sparsity", "bits", "removed")
DIRECTIONS = ("higher", "lower", "closer_to_0", "closer_to_1")
TABLES = {
    "plain": ("rows", "columns", "of", "title"),
    "matched": ("at", "levels", "columns", "better", "rows", "of", "title"),
}
_EVERY_FIGURE = ("of", "title", "caption", "x_label", "y_label")
FIGURES = {
    "scatter": ("x", "y", "color", "size", "front", "log"),
    "curve": ("terms", "along", "panels", "runs", "log"),
    "sweep": ("x", "y", "baseline", "log"),
    "matched": ("x", "y", "levels", "reference", "panels", "log"),
    "bars": ("metrics", "group", "spread", "horizontal", "start", "baseline", "log"),
    "plane": ("entry", "what", "seed"),
    "profile": ("metric", "panels"),
}
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "tables": {kind: ("kind", *keys) for kind, keys in TABLES.items()},
    "figures": {kind: (*keys, "kind", *_EVERY_FIGURE) for kind, keys in FIGURES.items()},
}
NEEDED = {"curve": ("terms",), "bars": ("metrics",), "plane": ("entry",), "profile": ("metric",)}
"""Keys without which a figure is nothing; all other kinds need x and y."""
SEVERAL = {("curve", "terms"), ("sweep", "y"), ("bars", "metrics")}
"""Keys that take one text or a list of them."""
DEFAULT_KIND = {"tables": "plain", "figures": "scatter"}
_ONE_TEXT = {
    "reference": "the name of a chain",
    "baseline": "the name of a chain",
    "what": "what was measured, e.g. class_vectors",
    "along": "a logged term, e.g. tokens",
}
_LEVEL = re.compile(r"(?P<quantity>.+)@(?P<at>[^@]+)=(?P<level>[^@=]*)")

Spec = Mapping[str, Any]


# --- quantities -------------------------------------------------------------------------------------------


def relative(reference: str) -> tuple[str, str] | None:
    """X and CHAIN of ``X relative to CHAIN``; None for any other quantity.

    Raises:
        AssayError: one of the two is left out, or the words between them are not ``relative to``.
    """
    quantity, words, chain = reference.rpartition(RELATIVE)
    if words and quantity.strip() and chain.strip() and RELATIVE not in quantity:
        return quantity.strip(), chain.strip()
    if words or re.search(r"\srelative(\s|$)", reference):
        raise AssayError(
            f"{reference}: write a change against a chain as X relative to CHAIN, e.g. energy.stage_kwh relative to "
            "control."
        )
    return None


def recovered(reference: str) -> tuple[str, str, bool] | None:
    """X, CHAIN and whether ``per kilojoule`` of ``X recovered towards CHAIN``; None for any other quantity.

    Raises:
        AssayError: one of the two is left out, the words are not these, or X is no score.
    """
    quantity, words, rest = reference.rpartition(RECOVERED)
    chain = rest.removesuffix(PER_KILOJOULE)
    if not words and not re.search(r"\srecovered(\s|$)", reference):
        return None
    clauses = (RECOVERED, RELATIVE, PER_KILOJOULE)
    if (
        not quantity.strip()
        or not chain.strip()
        or any(each in text for text in (quantity, chain) for each in clauses)
    ):
        raise AssayError(
            f"{reference}: write what was won back as X recovered towards CHAIN or X recovered towards CHAIN per "
            "kilojoule, e.g. forget10.retain_nll recovered towards target."
        )
    if not _is_score(quantity.strip()):
        raise AssayError(
            f"{reference}: only a score is recovered, e.g. forget10.retain_nll; a cost, a curve, a number of steps and "
            "a value at a level are not."
        )
    return quantity.strip(), chain.strip(), chain != rest


def _is_score(quantity: str) -> bool:
    """Whether a quantity is one that models are scored by."""
    head = quantity.partition(".")[0]
    return (
        head not in COSTS
        and quantity != STEP
        and not quantity.startswith(CURVE)
        and at_level(quantity) is None
    )


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


def against(reference: str) -> tuple[str, str]:
    """The quantity itself, and the chain that it is relative to or recovered towards (empty without one)."""
    won_back = recovered(reference)
    return won_back[:2] if won_back else relative(reference) or (reference, "")


def _how(reference: str) -> str:
    return (
        f"{reference}: write a matched level as X@Y=LEVEL, e.g. curve.probe.retain@probe.forget=2 or "
        "forget10.model_utility@forget10.forget_nll=2."
    )


def quantities(spec: Spec, section: str) -> Iterator[str]:
    """Everything in a specification that is a quantity, without a chain behind it; ``X@Y=LEVEL`` is taken apart."""
    for written in _written(spec, section):
        reference, _ = against(written)
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
    elif kind in ("sweep", "bars"):
        yield from several(spec["y" if kind == "sweep" else "metrics"])
    elif kind == "matched":
        yield from (spec[key] for key in ("x", "y") if not is_term(spec[key]))
    elif kind == "plane":
        yield spec["entry"]


def several(value: str | Sequence[str]) -> list[str]:
    """One name or a list of them as a list."""
    return [value] if isinstance(value, str) else list(value)


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
        what = "A table" if kind == "plain" else f"A {section.removesuffix('s')} of kind {kind}"
        near = nearest(key, kinds[kind])
        hint = near if "did you mean" in near else "."
        raise AssayError(f"{where}: there is no key {key!r}{hint} {what} has {', '.join(kinds[kind])}.")
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
        if RELATIVE in column:
            raise AssayError(
                f"{where}: {column}: a matched table has no relative columns; write X@Y=LEVEL relative to CHAIN in a "
                "plain one."
            )
        if RECOVERED in column:
            raise AssayError(
                f"{where}: {column}: what was recovered is known of a chain's end; ask for it in a plain table."
            )
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
    for key in NEEDED.get(kind, ("x", "y")):
        if not spec.get(key):
            raise AssayError(f"{where}: a {kind} needs {key}.")
        many = (kind, key) in SEVERAL
        if not (isinstance(spec[key], str) or (many and _is_texts(spec[key]))):
            raise AssayError(f"{where}: {key} is {'one text or a list of texts' if many else 'one text'}.")
        if kind == "matched" and any(words in str(spec[key]) for words in (RELATIVE, RECOVERED)):
            raise AssayError(f"{where}: {spec[key]}: a way to a chain's end is followed in absolute numbers.")
    if not set(spec.get("log", ())) <= {"x", "y"}:
        raise AssayError(f"{where}: log is x, y or [x, y].")
    if "levels" in spec:
        _check_levels(where, spec["levels"])
    for key, name in _ONE_TEXT.items():
        if key in spec and not isinstance(spec[key], str):
            raise AssayError(f"{where}: {key} is one text, {name}.")
    _check_words(where, kind, spec)
    _check_plain_values(where, spec)


def _check_words(where: str, kind: str, spec: Spec) -> None:
    """Keys that take one of a few words."""
    choices = {"panels": PANELS.get(kind, ()), "spread": SPREADS, "runs": RUNS, "group": GROUPS}
    choices |= {"metric": PROFILES}
    for key, words in choices.items():
        if key in spec and spec[key] not in words:
            raise AssayError(f"{where}: {key} is one of {', '.join(words)}, not {spec[key]!r}.")


def _check_plain_values(where: str, spec: Spec) -> None:
    if not isinstance(spec.get("horizontal", True), bool):
        raise AssayError(f"{where}: horizontal is true or false.")
    if type(spec.get("start", 0)) not in (int, float) or not math.isfinite(spec.get("start", 0)):
        raise AssayError(f"{where}: start is a number, where the bars begin.")
    if type(spec.get("seed", 0)) is not int:
        raise AssayError(f"{where}: seed is one whole number, not {spec['seed']!r}.")


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
    known = [*experiment.chains, *experiment.models]
    if PROFILE in experiment.evaluate:
        raise AssayError(
            f"{experiment.place('evaluate', PROFILE)}: this name belongs to the profiles of models; choose another."
        )
    for section in ("tables", "figures"):
        for name, spec in getattr(experiment, section).items():
            where = experiment.place(section, name)
            check(where, spec, section)
            _check_quantities(where, _placed(where, quantities, spec, section), experiment.evaluate)
            _check_chains(where, spec, _placed(where, compared_with, spec, section), known)
            if spec.get("seed", experiment.seeds[0]) not in experiment.seeds:
                raise AssayError(
                    f"{where}: seed {spec['seed']} is none of {', '.join(map(str, experiment.seeds))}."
                )
            if section == "tables" and kind_of(spec, section) == "matched":
                _check_kept(where, spec, experiment)
    for number, values in enumerate(experiment.claims, start=1):
        claim = own_claim(values, number)
        _check_metric(f"claim {number}", claim.metric, known)
        _check_names(f"claim {number}", [claim.intact] if claim.intact else [], known)


def own_claim(values: Mapping[str, Any], number: int) -> Claim:
    """A claim written in an experiment file. AssayError for other keys or words than ``Claim`` has."""
    known = {field.name for field in dataclasses.fields(Claim)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise AssayError(
            f"claim {number}: there is no key {unknown[0]!r}; there are: {', '.join(sorted(known))}."
        )
    try:
        claim = Claim(**values)
    except TypeError as error:
        raise AssayError(f"claim {number}: {error}.") from None
    for name in ("relation", "scope"):
        words = get_args(get_type_hints(Claim)[name])
        if getattr(claim, name) not in words:
            raise AssayError(f"claim {number}: {name} is one of {', '.join(words)}, not {values[name]!r}.")
    if claim.relation == "recovers" and not (claim.other and claim.intact):
        raise AssayError(
            f"claim {number}: recovers needs other, the broken model, and intact, the chain before it was broken."
        )
    return claim


def compared_with(spec: Spec, section: str) -> Iterator[str]:
    """The chains behind ``relative to`` and ``recovered towards`` in a specification."""
    yield from (chain for reference in _written(spec, section) if (chain := against(reference)[1]))


def _placed(where: str, read: Callable[[Spec, str], Iterator[str]], spec: Spec, section: str) -> list[str]:
    try:
        return list(read(spec, section))
    except AssayError as error:
        raise AssayError(f"{where}: {error}") from None


def _check_metric(where: str, reference: str, known: Sequence[str]) -> None:
    """A claim's metric: its level and the chain that it is relative to or recovered towards."""
    try:
        quantity, chain = against(reference)
        at_level(quantity)
    except AssayError as error:
        raise AssayError(f"{where}: {error}") from None
    if chain:
        _check_names(where, [chain], known)


def _check_quantities(where: str, references: Iterable[str], entries: Iterable[str]) -> None:
    known = {*entries, *COSTS}
    for reference in references:
        head = reference.partition(".")[0]
        if head not in known and reference != STEP and not reference.startswith(CURVE):
            raise AssayError(f"{where}: {reference!r} names no evaluation{nearest(head, known)}")


def _check_chains(where: str, spec: Spec, compared: Sequence[str], known: Sequence[str]) -> None:
    """Names in ``of``, ``reference`` and ``baseline``, and behind ``relative to`` and ``recovered towards``."""
    words = [*spec.get("of", ()), *(spec[key] for key in ("reference", "baseline") if spec.get(key))]
    _check_names(where, [*words, *compared], known)


def _check_names(where: str, words: Iterable[str], known: Sequence[str]) -> None:
    """Patterns are left to what they will find."""
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
