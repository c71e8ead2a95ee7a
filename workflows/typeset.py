"""Markdown, LaTeX and plain text of a drawn table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from workflows.grid import Table


def markdown(drawn: Table, origin: str) -> str:
    """The table with its notes, and what made it beneath."""
    lines = [
        "| " + " | ".join(map(_plain, drawn.headers)) + " |",
        "|---" + "|---:" * (len(drawn.headers) - 1) + "|",
    ]
    for row in drawn.rows:
        cells = [f"**{_plain(cell.text)}**" if cell.bold else _plain(cell.text) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    title = [f"**{drawn.title}**", ""] if drawn.title else []
    return "\n".join([*title, *lines, "", *(f"{_plain(note)}  " for note in drawn.notes), _plain(origin), ""])


def _plain(text: str) -> str:
    return (
        text.replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("_", "\\_")
        .replace("*", "\\*")
        .replace("<", "&lt;")
    )


def plain(drawn: Table) -> str:
    """The table in aligned columns for a terminal; headings longer than their column are broken at blanks."""
    rows = [[cell.text for cell in row] for row in drawn.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths = [max(width, *map(len, head.split())) for width, head in zip(widths, drawn.headers, strict=True)]
    heads = [textwrap.wrap(head, width) for head, width in zip(drawn.headers, widths, strict=True)]
    tallest = max(map(len, heads))
    above = [[""] * (tallest - len(head)) + head for head in heads]
    return "\n".join(_aligned(line, widths) for line in [*zip(*above, strict=True), *rows])


def _aligned(texts: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(texts, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]).rstrip()


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "→": r"$\rightarrow$", "†": r"\dag{}", "‡": r"\ddag{}", ">": r"\textgreater{}",
    "<": r"\textless{}",
}  # fmt: skip


def latex(drawn: Table, origin: str) -> str:
    """The table for ``\\usepackage{booktabs}``, its notes as a last row and its origin as a comment."""
    wide = len(drawn.headers)
    lines = [f"% {origin}", rf"\begin{{tabular}}{{l{'r' * (wide - 1)}}}", r"\toprule"]
    lines += [_latex_row(drawn.headers), r"\midrule"]
    for place, row in enumerate(drawn.rows):
        lines += [r"\midrule"] if place in drawn.breaks else []
        lines.append(
            " & ".join(rf"\textbf{{{escape_latex(c.text)}}}" if c.bold else escape_latex(c.text) for c in row)
            + r" \\"
        )
    lines += [r"\bottomrule", r"\end{tabular}", ""]
    lines += [rf"\par\smallskip{{\footnotesize {escape_latex(note)}\par}}" for note in drawn.notes]
    return "\n".join(lines) + "\n"


def _latex_row(texts: Sequence[str]) -> str:
    return " & ".join(map(escape_latex, texts)) + r" \\"


def escape_latex(text: str) -> str:
    """Every character that LaTeX would take for a command, written out."""
    return "".join(_LATEX.get(character, character) for character in text)
