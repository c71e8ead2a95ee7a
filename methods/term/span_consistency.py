"""Span consistency: neighbouring tokens of a word go together for the student as they do for the teacher.

Liu et al., "Multi-Granularity Semantic Revision for Large Language Model Distillation" (MGSR): inside a span the
products of neighbouring probability vectors are compared. No official code was found and the paper's equations could
not be verified: the definition is ours, and no parity with the paper is claimed.

    L = 1/N sum_{(i,i+1)} sum_v (p_i[v] p_{i+1}[v] - q_i[v] q_{i+1}[v])**2

over the N pairs of neighbouring answer positions whose targets lie in one span. The paper takes spans from a chunker;
here they are the words between white space, told from the tokens alone, or the whole answer (``spans="answer"``). The
product of two probabilities is small and so is the gradient: give the term a large weight where it should count.

Both models' logits are computed block by block, and again in the backward pass: no more than a block is ever held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from methods.stage import Claim, Term
from methods.term import View, Weighted

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import Setting

USES = ("methods.term", "methods.terms")
CLAIMS: tuple[Claim, ...] = ()

# How byte-level vocabularies write tab, line feed, vertical tab, form feed, carriage return and blank.
BYTE_BLANKS = "\u0109\u010a\u010b\u010c\u010d\u0120"
# How sentencepiece writes a blank, and a byte that is white space.
PIECE_BLANK = "\u2581"
BYTE_PIECES = frozenset(f"<0x{code:02X}>" for code in (9, 10, 11, 12, 13, 32))


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """What a span is."""

    # both distributions are softened by it
    temperature: Annotated[float, Gt(0)] = 1.0
    # words between white space, or the answer as one span (for text without any)
    spans: Literal["words", "answer"] = "words"


@dataclass(frozen=True)
class Edges:
    """Of every token id, whether a word can go on into it, and whether one can go on behind it (both [ids], bool)."""

    goes_on: Tensor
    lasts: Tensor


def prepare(config: Config, setting: Setting) -> Edges | None:
    """Where words end in the student's vocabulary; None where that does not matter."""
    if config.spans == "answer":
        return None
    edges = edges_of(setting.tokenizer)
    return Edges(edges.goes_on.to(setting.device), edges.lasts.to(setting.device))


def edges_of(tokenizer: Any) -> Edges:
    """Read off the vocabulary: white space at a token's start or end, and a special token, end a word."""
    import torch

    entries = tokenizer.get_vocab()
    goes_on = torch.zeros(max(entries.values()) + 1, dtype=torch.bool)
    lasts = goes_on.clone()
    special = set(tokenizer.all_special_ids)
    for token, number in entries.items():
        if number not in special and token not in BYTE_PIECES:
            goes_on[number], lasts[number] = not _is_blank(token[:1]), not _is_blank(token[-1:])
    return Edges(goes_on, lasts)


def _is_blank(letter: str) -> bool:
    return letter.isspace() or letter in BYTE_BLANKS or letter == PIECE_BLANK


def terms(config: Config, view: View) -> Mapping[str, Term]:
    """The mean over the pairs of the global batch."""
    from methods.term._again import nothing, summed

    index = view.index
    pairs = joined(view)
    count = float(pairs.sum())

    def distance(rows: slice) -> Tensor:
        """The pairs whose first place is among ``rows``; the second of the last lies one behind them."""
        inside = pairs[rows]
        if not bool(inside.any()):
            return nothing(view.student)
        wider = slice(rows.start, rows.stop + 1)
        student = (view.student.at(index[wider]) / config.temperature).softmax(-1)
        teacher = (view.teacher_logits(wider) / config.temperature).softmax(-1)
        return pair_distances(teacher, student)[inside].sum()

    # The last place begins no pair.
    return {"": Term(summed(distance, view.student, index[:-1]), count)}


def joined(view: View) -> Tensor:
    """Whether each answer place and the next one are neighbours in one span [n - 1]."""
    index, targets, edges = view.index, view.targets, view.memory
    width = view.part.labels.shape[1]
    neighbours = (index[1:] == index[:-1] + 1) & (index[1:] // width == index[:-1] // width)
    if edges is None:
        return neighbours
    return neighbours & edges.lasts[targets[:-1]] & edges.goes_on[targets[1:]]


def pair_distances(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared distance [c - 1] of the products of neighbouring rows of two tables of probabilities [c,V]."""
    return (teacher[:-1] * teacher[1:] - student[:-1] * student[1:]).square().sum(-1)
