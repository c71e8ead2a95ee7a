"""How steadily a model was trained and when it reached its accuracy, from the learning curve of the stage that made it.

The curve is ``curve.csv`` beside the model in its stage's folder, and part of that stage's result: its id covers it. A
kept model ``model@N`` is judged by what was logged up to step N. What is in a curve depends on the stage's
``log_every``, ``probe`` and ``probe_every``, which say how a stage runs and are no part of its id: numbers compare only
between stages that logged alike, so the notes name the steps between logged points. Never read a number of this file
without the loss beside it: a head at its confidence ceiling has small, steady gradients for trivial reasons.

Of the norm of the gradient before clipping: ``gradient_stability``, standard deviation over mean in the last half of
the steps (of two points at least), and ``clip_rate``, the share of all steps whose norm was above ``clip``
(Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers", whose code has 1). Of a
loss on held-out data ``learning_stability``: the standard deviation of its consecutive differences over its total
decrease. Of the training loss ``spikes``: points above the median of the ``window`` points before them by more than 4
median absolute deviations of the same. That paper speaks of gradient and learning stability, but no formula of it was
found: except ``clip_rate`` these definitions are **ours**. All standard deviations are those of the points themselves
(divided by n).

Of an accuracy: ``aucc``, the trapezoid over its E logged points divided by E, which is at most (E - 1) / E (the same
code). For each threshold ``reached`` is 1 or 0; ``steps_to`` is the first step from which the accuracy stays above the
threshold for ``hold`` logged points, and only written when there is one; ``steps_to_at_least`` always is: the same
step, or as a lower bound the last step (where the last points are above it, but not yet ``hold`` of them, the first of
those). ``gap`` and ``gap_at_least`` are what the test accuracy takes longer than the training accuracy: how long a
model memorises before it groks. Runs that never reach a threshold stay in the table: the code of Baek et al. 2025,
"Harmonic Loss Trains Interpretable AI Models", drops them before it takes the median.

A number without a meaning has no row: ``learning_stability`` of a loss that has not fallen, ``gap`` of a model that has
not learnt what it was shown, and whatever needs a term that the curve does not have.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le, Lt

from methods.find import nearest
from methods.stage import AssayError, Row, Scoring

TASKS = ("language", "classification")
USES: tuple[str, ...] = ()

NORM = "gradient_norm"
# Median absolute deviations above the running median that make a spike.
FAR = 4.0
# Points before a point without which there is no running median.
FEWEST = 5

Line = Sequence[tuple[int, float]]
"""(step, value) of one term, in order of steps."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which terms of the curve are looked at. A default that a curve does not have is left out."""

    # Accuracy on what the model was trained on.
    train: str = "probe.train.accuracy"
    # Accuracy on what it was not trained on.
    test: str = "probe.test.accuracy"
    # Loss on what it was not trained on.
    validation: str = "probe.test"
    # Loss whose spikes are counted.
    loss: str = "train"
    # Accuracies that are to be passed (the published figures: 0.9).
    thresholds: tuple[Annotated[float, Ge(0), Lt(1)], ...] = (0.9, 0.99)
    # Logged points an accuracy has to stay above a threshold (the published figures: 20 epochs, each of them logged).
    hold: Annotated[int, Gt(0)] = 3
    # Share of the steps, at the end, whose gradients are looked at.
    last: Annotated[float, Gt(0), Le(1)] = 0.5
    # Norm of the gradient above which a step counts as clipped.
    clip: Annotated[float, Gt(0)] = 1.0
    # Points before a point that it has to stick out of.
    window: Annotated[int, Ge(FEWEST)] = 50


class Arrival(NamedTuple):
    """Whether a threshold was passed for good, and the step, or one before which it certainly was not."""

    reached: bool
    step: int


def evaluate(scoring: Scoring) -> list[Row]:
    """Rows as the file's text says; n is the number of logged points.

    Raises:
        AssayError: the model has no curve, a term is named that the curve does not have, or nothing can be said of it.
    """
    config, curve = scoring.config, read_curve(scoring.parents["model"])
    _check_terms(config, curve)
    rows = [
        *_gradients(curve.get(NORM, ()), config),
        *_learning(config.validation, curve.get(config.validation, ())),
        *_spikes(config.loss, curve.get(config.loss, ()), config.window),
        *_accuracies(curve, config),
    ]
    if not rows:
        raise AssayError(
            f"stability: the curve of {scoring.parents['model'].parent} has too few points: log more often with "
            "log_every and probe_every."
        )
    scoring.notes["steps_between_points"] = {
        term: steps_between(curve[term]) for term in _wanted(config) if term in curve
    }
    return rows


# --- the curve -------------------------------------------------------------------------------------------------


def read_curve(model: Path) -> dict[str, Line]:
    """The lines of the curve beside a model, up to the step at which it was kept; a step logged twice counts once.

    Raises:
        AssayError: there is no curve, or a line of it is no number.
    """
    path, kept = model.parent / "curve.csv", re.fullmatch(r"model@(\d+)", model.name)
    if not path.is_file():
        raise AssayError(
            f"stability reads the learning curve of the stage that made the model, and {model} has none: it was not "
            "trained here. Score only models that a training stage has made."
        )
    terms: dict[str, dict[int, float]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for place, row in enumerate(csv.DictReader(file), start=2):
            try:
                step, term, value = int(row["step"]), row["term"], float(row["value"])
            except (KeyError, TypeError, ValueError):
                raise AssayError(f"{path}, line {place}: not step, term and value of a curve.") from None
            if math.isfinite(value) and (kept is None or step <= int(kept[1])):
                terms.setdefault(term, {})[step] = value
    return {term: sorted(points.items()) for term, points in terms.items()}


def steps_between(line: Line) -> int:
    """The usual number of steps from one logged point to the next; 0 for a single point."""
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(line)]
    return int(median(gaps)) if gaps else 0


def _wanted(config: Config) -> dict[str, str]:
    """The terms that are looked at, each with the option that names it."""
    return {
        NORM: "",
        **{getattr(config, option): option for option in ("loss", "validation", "test", "train")},
    }


def _check_terms(config: Config, curve: Mapping[str, Line]) -> None:
    """A term that was named has to be there; the defaults suit classifiers, and a language model lacks some."""
    for term, option in _wanted(config).items():
        if option and term not in curve and term != getattr(Config, option):
            raise AssayError(
                f"stability: {option}={term!r}: the curve has no such term{nearest(term, curve)} Terms that start with "
                "probe. come from the stage's option of that name."
            )


# --- steadiness ------------------------------------------------------------------------------------------------


def _gradients(line: Line, config: Config) -> list[Row]:
    """``gradient_stability`` of the last part, or of the last two points where there are fewer in it; ``clip_rate``."""
    if not line:
        return []
    first = line[-1][0] * (1.0 - config.last)
    part = [value for step, value in line if step >= first]
    late = part if len(part) > 1 else [value for _, value in line[-2:]]
    clipped = [float(value > config.clip) for _, value in line]
    rows = []
    if len(late) > 1 and fmean(late) > 0:
        steadiness = pstdev(late) / fmean(late)
        task = f"{NORM} last={config.last:g}"
        rows.append(Row(task, "gradient_stability", steadiness, None, len(late), better="lower"))
    return [*rows, Row(f"{NORM} clip={config.clip:g}", "clip_rate", fmean(clipped), None, len(line))]


def _learning(term: str, line: Line) -> list[Row]:
    found = learning_stability([value for _, value in line])
    return [] if found is None else [Row(term, "learning_stability", found, None, len(line), better="lower")]


def learning_stability(losses: Sequence[float]) -> float | None:
    """sd of the consecutive differences over the total decrease; None below three points or without a decrease."""
    if len(losses) < 3 or losses[0] <= losses[-1]:
        return None
    return pstdev([later - earlier for earlier, later in pairwise(losses)]) / (losses[0] - losses[-1])


def _spikes(term: str, line: Line, window: int) -> list[Row]:
    if len(line) <= FEWEST:
        return []
    count = spikes([value for _, value in line], window)
    return [Row(f"{term} window={window}", "spikes", float(count), None, len(line), better="lower")]


def spikes(losses: Sequence[float], window: int) -> int:
    """Points that stick out of the up to ``window`` points before them."""
    found = 0
    for place in range(FEWEST, len(losses)):
        before = losses[max(0, place - window) : place]
        middle = median(before)
        spread = median(abs(value - middle) for value in before)
        found += losses[place] > middle + FAR * spread
    return found


# --- accuracies ------------------------------------------------------------------------------------------------


def _accuracies(curve: Mapping[str, Line], config: Config) -> list[Row]:
    """``aucc`` of both accuracies, and the way to each threshold."""
    rows: list[Row] = []
    there = [term for term in dict.fromkeys((config.train, config.test)) if curve.get(term)]
    for term in there:
        values = [value for _, value in curve[term]]
        rows.append(Row(term, "aucc", aucc(values), None, len(values), better="higher"))
    for threshold in config.thresholds:
        found = {term: arrival(curve[term], threshold, config.hold) for term in there}
        for term, when in found.items():
            rows += _arrivals(f"{term} above {threshold:g} hold={config.hold}", when, len(curve[term]))
        if len(found) == 2 and found[config.train].reached:
            task = f"{config.test} after {config.train} above {threshold:g} hold={config.hold}"
            rows += _gap(task, found[config.train], found[config.test], len(curve[config.test]))
    return rows


def aucc(accuracies: Sequence[float]) -> float:
    """Area under E accuracies from 0 to 1 at unit distance, divided by E."""
    return sum((before + after) / 2 for before, after in pairwise(accuracies)) / len(accuracies)


def arrival(line: Line, threshold: float, hold: int) -> Arrival:
    """The first step from which ``hold`` logged points in a row are above the threshold."""
    begun, count = line[-1][0], 0
    for step, value in line:
        if value <= threshold:
            begun, count = line[-1][0], 0
            continue
        begun, count = (begun if count else step), count + 1
        if count == hold:
            return Arrival(True, begun)
    return Arrival(False, begun)


def _arrivals(task: str, when: Arrival, points: int) -> list[Row]:
    rows = [Row(task, "reached", float(when.reached), None, points, better="higher")]
    if when.reached:
        rows.append(Row(task, "steps_to", float(when.step), None, points, "steps", "lower"))
    return [*rows, Row(task, "steps_to_at_least", float(when.step), None, points, "steps", "lower")]


def _gap(task: str, train: Arrival, test: Arrival, points: int) -> list[Row]:
    """Nothing bounds the gap of a model that has not even learnt what it was shown."""
    steps = float(test.step - train.step)
    rows = [Row(task, "gap_at_least", steps, None, points, "steps", "lower")]
    return [Row(task, "gap", steps, None, points, "steps", "lower"), *rows] if test.reached else rows
