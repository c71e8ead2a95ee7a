"""Learning curves: logged terms over the step, with the seeds as a band or as thin lines.

A step is an optimizer step, or a generation of a search; ``along`` names a term that was logged at the same steps, such
as the tokens of a search, to be drawn over instead. A panel for each term compares chains; a panel for each chain (or
model, or method) compares terms, such as the accuracy on the training and on the test cases, whose distance in steps is
what is called grokking.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError
from workflows import chance, draw
from workflows.axes import ACCURACY, PROBE, Spec, finish, plain_logarithms, probe_name, term_label
from workflows.curves import Line
from workflows.lines import BANDS, band, mean_line
from workflows.measured import ChainRun, Measured
from workflows.specs import STEP, several

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THIN = "Thin lines: every distinct result; strong lines: their means."
PANELS_AT_MOST = 24
IN_ONE_LINE, FEW_PANELS_INCHES = 3, 3.6
TOKENS = "tokens"
LETTERS_OF_A_TITLE, TICKS = (80, 46, 30, 22), (9, 6, 5, 4)
"""How much fits above and below a panel, by how many stand side by side."""


@dataclass(frozen=True)
class Traced:
    """One term of one chain: (x, values of every run) at the common steps, what it is called and looks like."""

    term: str
    chain: str
    label: str
    look: Mapping[str, Any]
    place: int
    series: Sequence[tuple[float, Sequence[float]]]


def curve(measured: Measured, runs: Sequence[ChainRun], spec: Spec, name: str) -> tuple[Figure, str]:
    """Draw ``terms`` of the chains that logged them; ``panels`` says what shares a panel."""
    terms, by = several(spec["terms"]), spec.get("panels", "term")
    panels = _panels(measured, runs, spec)
    if not panels:
        along = f" along {spec['along']}" if "along" in spec else ""
        raise AssayError(f"figures.{name}: no chain here logged {' or '.join(terms)}{along}.")
    shown = dict(list(panels.items())[:PANELS_AT_MOST])
    image, axes = _canvas(len(shown), by)
    for each, (title, own) in zip(axes, shown.items(), strict=True):
        _draw(each, own, spec)
        _named(each, own, spec, "" if by == "term" else title, _names(measured, runs, spec))
    if by != "term":
        _only_outer_labels(image, axes)
    styles = _term_styles(terms) if _is_both(by, terms) else []
    words = draw.shared_legend(image, axes, also=styles, grow=True)
    return image, words + _caption(spec, len(panels) - len(shown), shown)


def _canvas(panels: int, by: str) -> tuple[Figure, list[Axes]]:
    if by == "term" or panels == 1:
        return draw.new(panels)
    image, axes = draw.small(panels)
    if panels <= IN_ONE_LINE:
        image.set_figheight(FEW_PANELS_INCHES)
    return image, axes


# --- what is drawn ----------------------------------------------------------------------------------------


def _panels(measured: Measured, runs: Sequence[ChainRun], spec: Spec) -> dict[str, list[Traced]]:
    """Title and lines of every panel."""
    terms, by = several(spec["terms"]), spec.get("panels", "term")
    runs = [run for run in runs if run.terms & set(terms)]
    found: dict[str, list[Traced]] = {}
    titles = terms if by == "term" else [_title(measured, run, by) for run in runs]
    for run_place, run in enumerate(runs):
        for term_place, term in enumerate(terms):
            series = _series(run, term, spec.get("along"))
            series = [(x, values) for x, values in series if x > 0 or "x" not in spec.get("log", ())]
            if series:
                title = term if by == "term" else _title(measured, run, by)
                place = term_place if by == "chain" else run_place
                look = draw.look(place) | (
                    {"linestyle": draw.LINES[term_place % len(draw.LINES)]} if _is_both(by, terms) else {}
                )
                chain = measured.shown_name(run)
                label = _short(term) if by == "chain" else chain
                found.setdefault(title, []).append(Traced(term, chain, label, look, place, series))
    return {title: found[title] for title in dict.fromkeys(titles) if title in found}


def _title(measured: Measured, run: ChainRun, by: str) -> str:
    return measured.shown_name(run) if by == "chain" else getattr(run, by) or "model"


def _is_both(by: str, terms: Sequence[str]) -> bool:
    """Whether a panel holds several terms of several chains: colours are chains then, and kinds of line terms."""
    return by not in ("term", "chain") and len(terms) > 1


def _term_styles(terms: Sequence[str]) -> list[Any]:
    """Legend entries for terms that are told apart by their kind of line."""
    from matplotlib.lines import Line2D

    looks: list[dict[str, Any]] = [{"linestyle": kind, "color": "#222222"} for kind in draw.LINES]
    return [Line2D([], [], label=_short(term), **look) for term, look in zip(terms, looks, strict=False)]


def _short(term: str) -> str:
    kind = "accuracy" if term.endswith(ACCURACY) else "NLL"
    return f"{probe_name(term)} {kind}" if term.startswith(PROBE) else term.replace("_", " ")


def _series(run: ChainRun, term: str, along: str | None) -> list[tuple[float, list[float]]]:
    """Values by step, or by what the runs had on average logged of ``along`` at that step."""
    series = _over_steps([each.lines.get(term, ()) for each in run.distinct_curves])
    if along is None:
        return series
    places = dict(_over_steps([each.lines.get(along, ()) for each in run.distinct_curves]))
    return [(chance.mean(places[step]), values) for step, values in series if step in places]


def _over_steps(curves: Sequence[Line]) -> list[tuple[float, list[float]]]:
    """Values by step, over the steps that every run logged."""
    tables = [dict(line) for line in curves if line]
    steps = sorted(set.intersection(*(set(each) for each in tables))) if tables else []
    return [(step, [each[step] for each in tables]) for step in steps]


# --- how it is drawn --------------------------------------------------------------------------------------


def _draw(axes: Axes, own: Sequence[Traced], spec: Spec) -> None:
    for each in own:
        if spec.get("runs", "band") == "band":
            band(axes, each.series, each.place, each.label, each.look)
        else:
            _thin(axes, each)


def _thin(axes: Axes, traced: Traced) -> None:
    """Every run as a thin line, and their mean as a strong one where there are several."""
    steps, single = (
        [step for step, _ in traced.series],
        list(zip(*(ys for _, ys in traced.series), strict=True)),
    )
    for values in single if len(single) > 1 else ():
        axes.plot(steps, values, color=traced.look["color"], linewidth=0.6, alpha=0.5, zorder=2)
    mean_line(axes, traced.series, traced.place, traced.label, traced.look)


def _names(measured: Measured, runs: Sequence[ChainRun], spec: Spec) -> dict[str, str]:
    """What the axes of every term are called, and under ``step`` or the term of ``along`` that below them."""
    logged, terms, along = set(measured.curves["term"]), several(spec["terms"]), spec.get("along", STEP)
    names = {term: term_label(term, logged) for term in (*terms, along)}
    names |= {
        term: f"{where} {_fitness(runs)}"
        for term, where in _SCORES.items()
        if term in names and _fitness(runs)
    }
    return names if "along" in spec else names | {STEP: _step(runs, terms)}


_SCORES = {"fitness": "searched", "holdout": "held-out"}
_FITNESS = {
    "kl": "KL from the dense model (nats/token)",
    "sparse_kl": "KL over the kept words (nats/token)",
    "ppl": "perplexity",
}


def _fitness(runs: Sequence[ChainRun]) -> str:
    """What searches made small, where all of them say it and it is the same."""
    found = {str(run.options.get("fitness")) for run in runs if run.terms & set(_SCORES)}
    return _FITNESS.get(found.pop(), "") if len(found) == 1 else ""


def _step(runs: Sequence[ChainRun], terms: Sequence[str]) -> str:
    """A search counts generations, everything else the optimizer's steps."""
    methods = {method for run in runs for method in run.curves["method"][run.curves["term"].isin(terms)]}
    searches = {method.startswith("search.") for method in methods}
    return "step" if len(searches) > 1 else "generation" if searches == {True} else "optimizer step"


def _named(axes: Axes, own: Sequence[Traced], spec: Spec, title: str, names: Mapping[str, str]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    kinds, along = dict.fromkeys(names[each.term] for each in own), spec.get("along", STEP)
    finish(axes, spec, names[along], next(iter(kinds)) if len(kinds) == 1 else _common(kinds))
    if "x" in spec.get("log", ()):
        plain_logarithms(axes, {"log": ["x"]})
    else:
        whole = along == STEP
        axes.xaxis.set_major_locator(
            MaxNLocator(TICKS[_across(axes) - 1], integer=whole, steps=[1, 2, 5, 10])
        )
    for axis, terms in ((axes.xaxis, {along}), (axes.yaxis, {each.term for each in own})):
        if terms == {TOKENS}:
            axis.set_major_formatter(EngFormatter(sep=" "))
    if title:
        draw.title(axes, title, LETTERS_OF_A_TITLE[_across(axes) - 1], 9.0)


def _across(axes: Axes) -> int:
    """How many panels stand side by side."""
    place = axes.get_subplotspec()
    return 1 if place is None else place.get_gridspec().ncols


def _common(labels: Collection[str]) -> str:
    """What several labels have in common: ``accuracy (share of cases)`` of train and test; else all of them."""
    ends = {label.partition(" ")[2] for label in labels}
    return ends.pop() if len(ends) == 1 else "; ".join(labels)


def _only_outer_labels(image: Figure, panels: Sequence[Axes]) -> None:
    """Small panels share their axes: one name for all of them at the left, and one below every column."""
    image.supylabel(panels[0].get_ylabel(), fontsize=9)
    for axes in panels:
        axes.set_ylabel("")
    for axes in panels[: max(0, len(panels) - _across(panels[0]))]:
        axes.set_xlabel("")


def _caption(spec: Spec, left_out: int, panels: Mapping[str, Sequence[Traced]]) -> str:
    counts = {len(each.series[0][1]) for own in panels.values() for each in own}
    runs = f"n = {min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")
    missing = [term for term in several(spec["terms"]) if not any(each.term == term for own in panels.values()
               for each in own)]  # fmt: skip
    parts = [BANDS if spec.get("runs", "band") == "band" else THIN, f"{runs} for each line."]
    along = spec.get("along")
    parts += [f"x: {along} at the same step, the mean over distinct results."] if along else []
    zero = f"What has {along} 0" if along else "Step 0"
    parts += [f"{zero} is not shown on a logarithmic axis."] if "x" in spec.get("log", ()) else []
    parts += [f"No chain here logged {' or '.join(missing)}."] if missing else []
    return " ".join(parts + ([f"{left_out} further panels are not shown."] if left_out else []))
