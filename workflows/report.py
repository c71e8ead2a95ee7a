"""Draws the tables, figures, verdicts and the page of one or several experiments.

    python -m workflows.report results/tiny
    python -m workflows.report results/tiny results/stories --out both
    python -m workflows.report results/tiny --against results/published/tiny

A pure function of results.csv, jobs.csv, curves.csv and experiment.json in each folder: no clock, no network,
no model. Needs pandas and matplotlib only, so that published results can be redrawn anywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from methods.stage import AssayError
from workflows import against, figures, page, tables, typeset, verdicts
from workflows.figures import Drawn
from workflows.grid import Table
from workflows.measured import Measured
from workflows.verdicts import Verdict

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """Everything a report shows, drawn but not yet written."""

    measured: Measured
    origin: str
    verdicts: list[Verdict]
    tables: list[Table]
    figures: list[Drawn]
    not_drawn: list[str]


def report(folder: Path) -> Report:
    """Draw the report of one result folder into that folder."""
    drawn = build([Path(folder)])
    write(drawn, Path(folder))
    return drawn


def build(folders: Sequence[Path]) -> Report:
    """Read the folders and draw. What cannot be drawn is named in the report instead of stopping it."""
    measured = Measured.read(folders)
    origin, not_drawn = origin_of(measured), []  # type: tuple[str, list[str]]
    table_specs = _specs(measured, "tables") or tables.default_specs(measured)
    figure_specs = _specs(measured, "figures") or figures.default_specs(measured)
    drawn_tables = _each(table_specs, lambda name, spec: tables.table(measured, name, spec), not_drawn)
    drawn_figures = _each(
        figure_specs, lambda name, spec: figures.figure(measured, name, spec, origin), not_drawn
    )
    return Report(measured, origin, verdicts.verdicts(measured), drawn_tables, drawn_figures, not_drawn)


def write(drawn: Report, out: Path) -> None:
    """Write every file of a report below ``out``."""
    several = len(drawn.measured.experiments) > 1
    for table in drawn.tables:
        _text(out / f"tables/{table.name}.md", typeset.markdown(table, drawn.origin))
        _text(out / f"tables/{table.name}.tex", typeset.latex(table, drawn.origin))
        _text(out / f"tables/{table.name}.csv", table.numbers.to_csv(index=False, lineterminator="\n"))
    for figure in drawn.figures:
        _bytes(out / f"figures/{figure.name}.png", figure.png)
        _bytes(out / f"figures/{figure.name}.svg", figure.svg)
    frame = verdicts.as_frame(drawn.verdicts, several=several)
    _text(out / "reproduction.csv", frame.to_csv(index=False, lineterminator="\n"))
    _text(out / "report.html", page.page(drawn))
    _text(out / "README.md", index(drawn))


def count_verdicts(drawn: Report) -> str:
    """``26 holds here, 8 needs more seeds``."""
    counts = Counter(row.verdict for row in drawn.verdicts)
    return ", ".join(f"{n} {word}" for word, n in counts.items()) or "no claims"


def index(drawn: Report) -> str:
    """README.md of a result folder: what is in it, and the tables as they came out."""
    lines = [
        f"# {title_of(drawn.measured)}",
        "",
        "[report.html](report.html) shows all of this on one page.",
        "",
    ]
    lines += [
        f"Verdicts ([reproduction.csv](reproduction.csv)): {count_verdicts(drawn)}.",
        "",
    ]
    for table in drawn.tables:
        files = ", ".join(f"[{kind}](tables/{table.name}.{kind})" for kind in ("md", "csv", "tex"))
        lines += [f"## Table `{table.name}` ({files})", "", typeset.markdown(table, drawn.origin)]
    for figure in drawn.figures:
        lines += [
            f"## Figure `{figure.name}` ([png](figures/{figure.name}.png), [svg](figures/{figure.name}.svg))",
            "",
        ]
        lines += [f"![{figure.name}](figures/{figure.name}.png)", "", figure.caption, "", drawn.origin, ""]
    lines += (
        ["## Not drawn", "", *(f"- {sentence}" for sentence in drawn.not_drawn), ""]
        if drawn.not_drawn
        else []
    )
    return "\n".join(lines)


def title_of(measured: Measured) -> str:
    """The experiment's title, or all titles."""
    return " · ".join(
        str(each.get("title") or each.get("name") or name) for name, each in measured.experiments.items()
    )


def origin_of(measured: Measured) -> str:
    """The command and commit that made the numbers, for beneath every table and figure."""
    parts = []
    for name, experiment in measured.experiments.items():
        commit = str(experiment.get("commit") or "unknown")[:12] + (
            " with local changes" if experiment.get("dirty") else ""
        )
        smoke = "; smoke scale, the numbers mean nothing" if experiment.get("scale") == "smoke" else ""
        prefix = f"{name}: " if len(measured.experiments) > 1 else ""
        parts.append(f"{prefix}{experiment.get('command') or 'command unknown'} at commit {commit}{smoke}")
    return "Made by " + "; ".join(parts) + "."


def _specs(measured: Measured, section: str) -> dict[str, dict[str, Any]]:
    """The experiments' specifications; the same name with another content gets its folder's name in front."""
    found: dict[str, dict[str, Any]] = {}
    for source, experiment in measured.experiments.items():
        for name, spec in experiment.get(section, {}).items():
            clash = name in found and found[name] != spec
            found[f"{source.replace('/', '_')}_{name}" if clash else name] = spec
    return found


def _each(
    specs: Mapping[str, dict[str, Any]], make: Callable[[str, dict[str, Any]], T], not_drawn: list[str]
) -> list[T]:
    drawn = []
    for name, spec in specs.items():
        try:
            drawn.append(make(name, spec))
        except AssayError as error:
            not_drawn.append(f"{name}: {error}")
    return drawn


def _text(path: Path, text: str) -> None:
    _bytes(path, text.encode("utf-8"))


def _bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# --- command line -----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when drawn (and equal to what was published), 1 when values differ, 2 with a sentence on bad input."""
    asked = _parser().parse_args(arguments)
    try:
        return _run(asked)
    except AssayError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2


def _run(asked: argparse.Namespace) -> int:
    if len(asked.folders) > 1 and (asked.out is None or asked.against is not None):
        raise AssayError(
            "Several folders need --out, the folder their common report goes to, and take no --against."
        )
    out = asked.out or asked.folders[0]
    drawn = build(asked.folders)
    write(drawn, out)
    for sentence in drawn.not_drawn:
        print(f"report: not drawn: {sentence}", file=sys.stderr)
    print(f"report: {out / 'report.html'}")
    return 0 if asked.against is None else _compare(asked.folders[0], asked.against, asked.tolerance)


def _compare(fresh: Path, published: Path, tolerance: float) -> int:
    found = against.differences(fresh, published, tolerance)
    if not found.empty:
        print(found.to_string(index=False))
    print(against.sentence(found, against.compared_rows(published), tolerance))
    return 0 if found.empty else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.report", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders with results.csv and experiment.json"
    )
    parser.add_argument("--out", type=Path, help="where the report goes (default: the folder itself)")
    parser.add_argument(
        "--against", type=Path, metavar="PUBLISHED", help="a folder or results.csv to compare the rows with"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=against.TOLERANCE,
        help="largest relative difference (default 1e-6)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
