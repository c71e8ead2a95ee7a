"""report.html: one page without network. Verdicts first, then figures, tables, chains and what failed."""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import pandas as pd

from workflows import chance
from workflows.figures import Drawn
from workflows.grid import Table, Text
from workflows.measured import Measured
from workflows.verdicts import MORE_SEEDS, NOT_RUN, Verdict

if TYPE_CHECKING:
    from workflows.report import Report

LARGEST_SVG_BYTES = 150_000
"""Above this a figure is shown as its PNG where that is smaller, so that the page stays small."""

LARGEST_CELLS = 5_000
"""A table of more cells is shown by its first rows; all of them stand in its files."""

_HOW_JUDGED = (
    f"Paired differences (subject − other) by seed over distinct results, with their t interval at {chance.LEVEL:.0%}: "
    "decided only where the whole interval lies on one side of what is claimed. Item error: the standard error "
    "that the evaluation's items alone give one difference. A pattern means the chains whose last stage completes "
    "it; where the subject has siblings (same parent) among the others, it is compared with those."
)
_SYMBOLS = {"holds here": ("✓", "yes"), "reproduced": ("✓", "yes"), "does not hold here": ("✗", "no"),
            "not reproduced": ("✗", "no"), MORE_SEEDS: ("≈", "open"), NOT_RUN: ("–", "none")}  # fmt: skip


def page(report: Report) -> str:
    """The whole page as one text."""
    from workflows.report import title_of

    title = title_of(report.measured)
    body = [f"<h1>{escape(title)}</h1>", _summary(report), _navigation(report), _verdicts(report)]
    body += [_figures(report), _tables(report)]
    body += [_chains(report.measured), _lost(report.measured), _not_drawn(report.not_drawn)]
    body += [f"<footer>{escape(report.origin)}</footer>"]
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(filter(None, body)))


# --- summary ----------------------------------------------------------------------------------------------


def _summary(report: Report) -> str:
    measured = report.measured
    seeds = sorted({seed for seed in measured.results["seed"] if seed}, key=int)
    ok = int((measured.results["status"] == "ok").sum())
    facts = [
        f"{len(measured.chains)} chains",
        f"seeds {', '.join(seeds)}" if seeds else "no seeds",
        f"{ok} numbers",
    ]
    facts += [_energy(measured.jobs)] if len(measured.jobs) else []
    smoke = any(each.get("scale") == "smoke" for each in measured.experiments.values())
    warning = (
        "<p class='warning'>Smoke scale: this shows that every job works; the numbers mean nothing.</p>"
        if smoke
        else ""
    )
    return f"<p class='summary'>{escape(' · '.join(facts))}</p><p class='origin'>{escape(report.origin)}</p>{warning}"


def _energy(jobs: pd.DataFrame) -> str:
    """All energy of the experiment's jobs, each once, failed attempts included."""
    own = jobs.drop_duplicates("id")
    total = pd.to_numeric(own["energy_kwh"], errors="coerce").sum()
    how = sorted({word for word in own["energy_source"] if word})
    said = f" {' and '.join(how)}" if how else ""
    return (
        f"{len(own)} jobs, {total:.3g} kWh{said}"
        if total >= 0.1
        else f"{len(own)} jobs, {1000 * total:.3g} Wh{said}"
    )


def _navigation(report: Report) -> str:
    places = [
        ("verdicts", "Verdicts", True),
        ("figures", "Figures", bool(report.figures)),
        ("tables", "Tables", bool(report.tables)),
        ("chains", "Chains", True),
        ("lost", "What failed", _lost(report.measured) != ""),
    ]
    return (
        "<nav>"
        + " ".join(f"<a href='#{place}'>{word}</a>" for place, word, there in places if there)
        + "</nav>"
    )


# --- verdicts ---------------------------------------------------------------------------------------------


def _verdicts(report: Report) -> str:
    counts = Counter(row.verdict for row in report.verdicts)
    pills = " ".join(f"{_pill(word)} × {count}" for word, count in counts.items())
    intro = f"<p>{pills}</p><p class='note'>{escape(_HOW_JUDGED)}</p>"
    if not report.verdicts:
        return "<h2 id='verdicts'>Verdicts</h2><p>No method used here states a claim.</p>"
    several = len(report.measured.experiments) > 1
    headers = [
        "verdict",
        "claim",
        "subject",
        "other",
        "metric",
        "n",
        "difference",
        f"{chance.LEVEL:.0%} interval",
        "item error",
        "condition",
    ]
    headers += ["folder"] if several else []
    return (
        "<h2 id='verdicts'>Verdicts</h2>"
        + intro
        + _grid(headers, [_verdict(row, several) for row in report.verdicts], "verdicts")
    )


def _verdict(row: Verdict, several: bool) -> list[str]:
    difference = "" if math.isnan(row.mean_difference) else _signed(row.mean_difference)
    between = "" if math.isnan(row.low) else f"[{_signed(row.low, 2)}, {_signed(row.high, 2)}]"
    error = "" if math.isnan(row.item_stderr) else f"{row.item_stderr:.2g}"
    claim = (
        f"{escape(row.claim)}<small>{escape(row.method)} · {escape(row.scope)} · {escape(row.source)}</small>"
    )
    cells = [
        _cell(_pill(row.verdict)),
        _cell(claim, kind="claim"),
        *(_cell(_name(text), kind="name") for text in (row.subject, row.other, row.metric)),
    ]
    cells += [
        _cell(str(row.n), row.n),
        _cell(difference, row.mean_difference),
        _cell(between, row.low),
        _cell(error, row.item_stderr),
    ]
    return [
        *cells,
        _cell(escape(row.condition), kind="condition"),
        *([_cell(escape(row.folder))] if several else []),
    ]


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}g}".replace("-", "−")


def _pill(word: str) -> str:
    symbol, kind = _SYMBOLS[word]
    return f"<span class='pill {kind}'>{symbol} {escape(word)}</span>"


def _name(text: str) -> str:
    """A name that may break after brackets, @, underscores and dots, but not within a number."""
    broken = re.sub(r"(_|\[|@|\.(?!\d))", r"\1<wbr>", escape(text))
    return f"<code>{broken}</code>" if text else ""


# --- figures, tables, chains ------------------------------------------------------------------------------


def _figures(report: Report) -> str:
    inner = "".join(_figure(figure, report.origin) for figure in report.figures)
    return f"<h2 id='figures'>Figures</h2><div class='figures'>{inner}</div>" if inner else ""


def _figure(figure: Drawn, origin: str) -> str:
    small = len(figure.svg) <= max(LARGEST_SVG_BYTES, len(figure.png))
    kind, content = ("svg+xml", figure.svg) if small else ("png", figure.png)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    words = f"<b>{escape(figure.title or figure.name)}.</b> {escape(figure.caption)} <small>{escape(origin)}</small>"
    return (
        f"<figure><img alt='{escape(figure.name)}' src='{source}'><figcaption>{words}</figcaption></figure>"
    )


def _tables(report: Report) -> str:
    inner = "".join(_table(table, report.origin) for table in report.tables)
    return f"<h2 id='tables'>Tables</h2>{inner}" if inner else ""


def _table(table: Table, origin: str) -> str:
    shown = table.rows[: max(1, LARGEST_CELLS // len(table.headers))]
    rows = [[_cell(_name(row[0].text), kind="name"), *map(_number, row[1:])] for row in shown]
    cut = (
        f"<p class='note'>The first {len(shown)} of {len(table.rows)} rows; all of them are in the files.</p>"
    )
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in (*table.notes, origin))
    files = " ".join(f"<a href='tables/{table.name}.{kind}'>{kind}</a>" for kind in ("md", "csv", "tex"))
    heading = f"<h3>{escape(table.title or table.name)} <small>{files}</small></h3>"
    return (
        heading
        + (cut if len(shown) < len(table.rows) else "")
        + _grid(table.headers, rows, "numbers")
        + notes
    )


def _number(cell: Text) -> str:
    text = escape(cell.text)
    return _cell(f"<b>{text}</b>" if cell.bold else text, cell.value)


def _chains(measured: Measured) -> str:
    rows = [
        [_cell(_name(measured.shown_name(run))), _cell(f"<code>{escape(run.label)}</code>", kind="claim")]
        for run in measured.chains
    ]
    return "<h2 id='chains'>Chains</h2>" + _grid(["chain", "label (defaults left out)"], rows, "chains")


def _lost(measured: Measured) -> str:
    """Jobs without a result, and why; empty where all is well."""
    jobs = measured.jobs[~measured.jobs["status"].isin(["ok", ""])].drop_duplicates("id")
    if jobs.empty:
        return ""
    rows = [
        [_cell(escape(job["status"])), _cell(_name(job["id"])), _cell(_name(job["label"]), kind="claim")]
        for job in jobs.to_dict("records")
    ]
    return "<h2 id='lost'>What failed or is missing</h2>" + _grid(["status", "job", "label"], rows, "lost")


def _not_drawn(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h2>Not drawn</h2><ul>{items}</ul>" if sentences else ""


# --- pieces -----------------------------------------------------------------------------------------------


def _cell(content: str, value: float | None = None, kind: str = "") -> str:
    sort = "" if value is None or math.isnan(value) else f" data-value='{value!r}'"
    return f"<td{f' class={kind!r}' if kind else ''}{sort}>{content}</td>"


def _grid(headers: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    """A table whose columns sort on a click, in a box that scrolls by itself."""
    top = "".join(f"<th><button type='button'>{_breakable(text)}</button></th>" for text in headers)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<div class='scroll'><table class='{kind}'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _breakable(text: str) -> str:
    return escape(text).replace("_", "_<wbr>").replace(".", ".<wbr>")
