"""Do the papers' claims hold here? Paired differences by seed over distinct results, with a t interval.

A claim's patterns may match several chains; every pair gets its own row, so that a fairness control stands
beside the comparison it qualifies. A pattern means the chains whose *last* stage completes it, and where the
subject has siblings (chains with the same parent) among the others, it is compared with those only. A
claim that does not hold, or that nothing was measured for, stays in the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from methods.stage import AssayError
from workflows import chance
from workflows.columns import Cell, Column, Sample
from workflows.measured import ChainRun, Measured
from workflows.recovered import NOT_WORSE, parent_label, shares

NOT_RUN = "not run"
MORE_SEEDS = "needs more seeds"
WORDS = {
    "scaled": ("holds here", "does not hold here"),
    "paper": ("reproduced", "not reproduced"),
}
PARENT = "parent"


@dataclass(frozen=True)
class Verdict:
    """One row of reproduction.csv. ``item_stderr`` is the evaluation's own error of one difference."""

    method: str
    claim: str
    source: str
    scope: str
    subject: str
    other: str
    metric: str
    n: int
    mean_difference: float
    low: float
    high: float
    item_stderr: float
    verdict: str
    condition: str
    folder: str = field(default="", metadata={"only_with": "several folders"})


def verdicts(measured: Measured) -> list[Verdict]:
    """One verdict for every claim and pair of chains, in the order of the experiment's claims."""
    return [
        verdict
        for folder, experiment in measured.experiments.items()
        for claim in experiment.get("claims", [])
        for verdict in _of_claim(measured, folder, experiment, _complete(claim))
    ]


def as_frame(rows: Sequence[Verdict], *, several: bool = False) -> pd.DataFrame:
    """The table ``reproduction.csv``; the folder's column is there only with several folders."""
    frame = pd.DataFrame([astuple(row) for row in rows], columns=[item.name for item in fields(Verdict)])
    return frame if several else frame.drop(columns="folder")


def _complete(claim: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "method": "",
        "other": None,
        "intact": None,
        "value": None,
        "margin": 0.0,
        "scope": "scaled",
        "model": None,
        "data": None,
    }
    return {**defaults, **claim}


# --- which chains ------------------------------------------------------------------------------------------


def matching(pattern: str, runs: Sequence[ChainRun]) -> list[ChainRun]:
    """The chains a pattern means: one of that name, else a family, else those its last stage makes match.

    Kept models are meant only by a pattern with a step, ``direct@step40``.
    """
    runs = [run for run in runs if run.step is None or "@step" in pattern]
    for name in ("name", "group"):
        named = [run for run in runs if getattr(run, name) == pattern]
        if named:
            return named
    found = [run for run in runs if fnmatchcase(run.label, pattern)]
    completed = [run for run in found if not fnmatchcase(parent_label(run.label), pattern)]
    return completed or found


def _matching(claim: Mapping[str, Any], side: str, runs: Sequence[ChainRun]) -> list[ChainRun]:
    """The chains of the claim's subject or other that have the options it is stated for."""
    wanted = claim.get(f"{side}_options") or {}
    return [
        run
        for run in matching(claim[side], runs)
        if all(run.options.get(name) == value for name, value in wanted.items())
    ]


def _others(claim: Mapping[str, Any], subject: ChainRun, runs: Sequence[ChainRun]) -> list[ChainRun]:
    parent = parent_label(subject.label)
    if claim["other"] == PARENT:
        return [run for run in runs if run.label == parent][:1]
    found = [run for run in _matching(claim, "other", runs) if run.label != subject.label]
    siblings = [run for run in found if parent_label(run.label) == parent]
    return siblings or found


# --- one claim ---------------------------------------------------------------------------------------------


def _of_claim(
    measured: Measured, folder: str, experiment: Mapping[str, Any], claim: dict[str, Any]
) -> list[Verdict]:
    runs = [run for run in measured.with_steps if run.source == folder]
    stated = (claim["method"], claim["sentence"], claim["source"], claim["scope"])
    about = (claim["subject"], _other_text(claim), claim["metric"])
    blank = Verdict(*stated, *about, 0, math.nan, math.nan, math.nan, math.nan, NOT_RUN, "", folder)
    reason = _not_comparable(experiment)
    if reason:
        return [replace(blank, condition=reason)]
    subjects = _matching(claim, "subject", runs)
    if claim["scope"] == "paper":
        subjects = [run for run in subjects if _is_published_setting(experiment, claim, run)]
    if not subjects:
        return [replace(blank, condition=_no_subject(claim))]
    try:
        columns = measured.columns(claim["metric"])
    except AssayError as error:
        return [replace(blank, condition=str(error))]
    return list(_pairs(measured, claim, blank, subjects, runs, columns)) or [
        replace(blank, condition=_no_partner(claim))
    ]


def _pairs(measured: Measured, claim: Mapping[str, Any], blank: Verdict, subjects: Sequence[ChainRun],
           runs: Sequence[ChainRun], columns: Sequence[Column]) -> Iterator[Verdict]:  # fmt: skip
    intact = matching(claim["intact"], runs)[:1] if claim["intact"] else []
    for subject in subjects:
        others = [None] if claim["other"] is None else _others(claim, subject, runs)
        for other in others:
            for column in columns:
                own, theirs = measured.cell(subject, column), _cell(measured, other, column)
                if own.known and (theirs is None or theirs.known):
                    start = replace(
                        blank,
                        subject=subject.name,
                        other=other.name if other else blank.other,
                        metric=column.name,
                    )
                    whole = measured.cell(intact[0], column) if intact else None
                    judged = _judged(claim, start, subject, other, own, theirs, whole, column.better)
                    straight = measured.straight([run for run in (subject, other) if run], column)
                    yield replace(judged, condition="; ".join(filter(None, [judged.condition, *straight])))


def _cell(measured: Measured, run: ChainRun | None, column: Column) -> Cell | None:
    return None if run is None else measured.cell(run, column)


def _judged(claim: Mapping[str, Any], start: Verdict, subject: ChainRun, other: ChainRun | None,
            own: Cell, theirs: Cell | None, whole: Cell | None, better: str) -> Verdict:  # fmt: skip
    pairs = _paired(own, theirs)
    differences = _differences(claim, pairs, whole, better)
    low, high = chance.interval(differences)
    word = _word(claim, differences, low, high)
    condition = "; ".join(
        filter(None, [_setting(subject, other), _seeds(pairs, own, theirs), *_losses(start, own, theirs),
                      _nothing_lost(claim, pairs, whole, better)])
    )  # fmt: skip
    return replace(start, n=len(differences), mean_difference=chance.mean(differences), low=low, high=high,
                   item_stderr=_item_stderr(pairs), verdict=word, condition=condition)  # fmt: skip


def _differences(claim: Mapping[str, Any], pairs: Sequence[tuple[Sample, Sample | None]], whole: Cell | None,
                 better: str = "") -> list[float]:  # fmt: skip
    """Subject minus other (or value); for ``recovers`` the share won back of what was lost, minus the value."""
    level = claim["value"] or 0.0
    if claim["relation"] != "recovers":
        return [first.value - (second.value if second else level) for first, second in pairs]
    return [each.value - level for each in _won_back(pairs, whole, better)[0]]


def _won_back(
    pairs: Sequence[tuple[Sample, Sample | None]], whole: Cell | None, better: str
) -> tuple[list[Sample], dict[str, int]]:
    """Shares of the pairs of subject and broken model, and why some have none."""
    return shares([(own, broken) for own, broken in pairs if broken is not None], whole or Cell(), better)


def _nothing_lost(claim: Mapping[str, Any], pairs: Sequence[tuple[Sample, Sample | None]], whole: Cell | None,
                  better: str) -> str:  # fmt: skip
    """How many broken models are not worse than the intact one, so that nothing could be won back."""
    count = _won_back(pairs, whole, better)[1].get(NOT_WORSE, 0) if claim["relation"] == "recovers" else 0
    return f"{claim['other']} is not worse than {claim['intact']} ({count})" if count else ""


def _paired(own: Cell, theirs: Cell | None) -> list[tuple[Sample, Sample | None]]:
    """Distinct pairs of results with the same seed; a result without a seed goes with every seed."""
    if theirs is None:
        return [(sample, None) for sample in own.samples]
    pairs = [
        (a, b) for a in own.samples for b in theirs.samples if a.seed == b.seed or "" in (a.seed, b.seed)
    ]
    return list({(first.id, second.id): (first, second) for first, second in pairs}.values())


def _word(claim: Mapping[str, Any], differences: Sequence[float], low: float, high: float) -> str:
    """The verdict: decided only where the whole interval lies on one side of what is claimed."""
    if not differences:
        return NOT_RUN
    if len(differences) < 2:
        return MORE_SEEDS
    holds, fails = _sides(claim["relation"], claim["margin"], low, high)
    yes, no = WORDS[claim["scope"]]
    return yes if holds else no if fails else MORE_SEEDS


def _sides(relation: str, margin: float, low: float, high: float) -> tuple[bool, bool]:
    """Whether every difference in [low, high] fulfils the relation, and whether none does."""
    if relation == "higher":
        return low > margin, high <= margin
    if relation == "lower":
        return high < -margin, low >= -margin
    if relation in ("at_least", "recovers"):
        return low >= margin, high < margin
    if relation == "at_most":
        return high <= -margin, low > -margin
    return low >= -margin and high <= margin, low > margin or high < -margin


# --- published settings -----------------------------------------------------------------------------------


def _not_comparable(experiment: Mapping[str, Any]) -> str:
    smoke = experiment.get("scale", "full") == "smoke"
    return "a smoke run shows that the jobs work; its numbers mean nothing" if smoke else ""


def _is_published_setting(experiment: Mapping[str, Any], claim: Mapping[str, Any], run: ChainRun) -> bool:
    """Whether the chain starts from the published model and mentions the published data."""
    start = [run.base, experiment.get("models", {}).get(run.base, {})]
    about = [run.label, run.options, experiment.get("evaluate", {}), start[1]]
    return _mentions(start, claim["model"]) and _mentions(about, claim["data"])


def _mentions(where: Any, name: str | None) -> bool:
    return name is None or name.lower() in json.dumps(where, ensure_ascii=False, default=str).lower()


# --- words -------------------------------------------------------------------------------------------------


def _other_text(claim: Mapping[str, Any]) -> str:
    if claim["other"] is not None:
        return str(claim["other"])
    return "" if claim["value"] is None else f"{claim['value']:g}"


def _no_subject(claim: Mapping[str, Any]) -> str:
    named = ", ".join(f"{name}={value}" for name, value in (claim.get("subject_options") or {}).items())
    options = f" with {named}" if named else ""
    if claim["scope"] == "paper":
        wanted = " on ".join(filter(None, [claim["model"], claim["data"]]))
        return f"no chain here runs {wanted or claim['subject']}{options}"
    return f"no chain here matches {claim['subject']}{options}"


def _no_partner(claim: Mapping[str, Any]) -> str:
    if claim["other"] == PARENT:
        return "the parent is no chain of this experiment, or was not scored so"
    against = f" and {claim['other']}" if claim["other"] is not None else ""
    return f"no scored chains here match {claim['subject']}{against}"


def _setting(subject: ChainRun, other: ChainRun | None) -> str:
    """The options in which the last stages differ, where they are of one family: ``gamma 10.0 / 1.0``."""
    if other is None or subject.family != other.family:
        return ""
    own, theirs = dict(_flat(subject.options)), dict(_flat(other.options))
    differing = [key for key in own if key in theirs and own[key] != theirs[key]]
    return ", ".join(f"{key} {own[key]} / {theirs[key]}" for key in differing)


def _flat(options: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Options of options as ``optimizer.learning_rate``."""
    for key, value in options.items():
        inner = value.get("options") if isinstance(value, dict) and "$component" in value else None
        if inner is None:
            yield (
                prefix + key,
                value["$result"] if isinstance(value, dict) and "$result" in value else f"{value}",
            )
        else:
            yield prefix + key, str(value["$component"])
            yield from _flat(inner, f"{prefix}{key}.")


def _seeds(pairs: Sequence[tuple[Sample, Sample | None]], own: Cell, theirs: Cell | None) -> str:
    used = {(second or first).seed or first.seed for first, second in pairs}
    seeds = sorted(used - {""}, key=int)
    text = f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" if seeds else "no seed is used"
    everything = {sample.seed for cell in (own, theirs) if cell for sample in cell.samples} - {""}
    alone = sorted(everything - used, key=int)
    return "" if not pairs else text + (f" (seed {', '.join(alone)} has no partner)" if alone else "")


def _losses(start: Verdict, own: Cell, theirs: Cell | None) -> list[str]:
    """What is missing of either side: failed runs, levels that were not reached."""
    sides = [(start.subject, own), (start.other, theirs)]
    return [
        f"{name}: " + ", ".join(f"{status} ({count})" for status, count in cell.statuses.items())
        for name, cell in sides
        if cell and cell.statuses
    ]


def _item_stderr(pairs: Sequence[tuple[Sample, Sample | None]]) -> float:
    """Mean over pairs of the standard error that the items alone give a difference; nan without any."""
    errors = [math.hypot(a.stderr, (b.stderr or 0.0) if b else 0.0) for a, b in pairs if a.stderr is not None]
    return chance.mean(errors)
