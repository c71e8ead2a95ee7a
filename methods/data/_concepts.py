"""Which rows contradict those chosen before them: concepts in a text, and the graph of their co-occurrences.

Concepts are found as RAKE does (Rose et al. 2010, "Automatic keyword extraction from individual documents"): runs of
words between punctuation and function words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol

REVISION = 1

# Words that hold other words together; a short list of our own.
FUNCTION_WORDS = frozenset(
    (
        "a about after all also am an and any are as at be because been before being between both but by can could "
        "did do does doing down during each few for from further had has have having he her here hers him his how i if "
        "in into is it its just me more most my no nor not now of off on once one only or other our out over own same "
        "shall she should so some such than that the their them then there these they this those through to too under "
        "until up very was we were what when where which while who whom whose why will with would you your"
    ).split()
)
_WORD = re.compile(r"\w+(?:[-.]\w+)*|[^\w\s]")


def concepts(text: str) -> frozenset[str]:
    """The concepts of a text, in small letters: ``"The mother of Ana Lima"`` has ``mother`` and ``ana lima``."""
    found, run = set(), []  # type: set[str], list[str]
    for word in [*_WORD.findall(text.casefold().replace("'s", " of ").replace("’s", " of ")), "."]:
        if word not in FUNCTION_WORDS and re.match(r"\w", word):
            run.append(word)
        elif run:
            found.add(" ".join(run))
            run = []
    return frozenset(found)


def _words(text: str) -> frozenset[str]:
    return frozenset(word for concept in concepts(text) for word in concept.split())


class Memory(Protocol):
    """What is remembered of the rows chosen so far."""

    def accepts(self, row: Mapping[str, Any]) -> bool:
        """Whether a row agrees with them; one that does is remembered."""
        ...


class CoOccurrence:
    """PASER's graph: concepts are joined where a chosen row has both.

    A row is refused if two of its concepts are both known but not joined. That is forever: what could join them would
    be refused for the same reason. Rows are remembered by concept instead of an edge for each pair.
    """

    def __init__(self) -> None:
        self._rows: dict[str, set[int]] = {}
        self._count = 0

    def accepts(self, row: Mapping[str, Any]) -> bool:
        own = concepts(_text(row))
        known = [self._rows[concept] for concept in sorted(own) if concept in self._rows]
        if any(one.isdisjoint(other) for one, other in combinations(known, 2)):
            return False
        for concept in own:
            self._rows.setdefault(concept, set()).add(self._count)
        self._count += 1
        return True


class Answers:
    """A contradiction in the narrow sense: a question that was already answered, in other words.

    Questions and answers are sets of words without the function words, and an answer only says what its question does
    not: "Ana was born in Rome" and "In Rome" are the same answer to "Where was Ana born?".
    """

    def __init__(self) -> None:
        self._answers: dict[frozenset[str], frozenset[str]] = {}

    def accepts(self, row: Mapping[str, Any]) -> bool:
        question = _words(str(row.get("question", "")))
        answer = _words(str(row.get("answer", ""))) - question
        return not question or self._answers.setdefault(question, answer) == answer


class Nothing:
    """Every row is accepted."""

    def accepts(self, row: Mapping[str, Any]) -> bool:
        return True


def memory(kind: str) -> Memory:
    """``concepts``, ``answers`` or ``keep``."""
    kinds: Mapping[str, type[Memory]] = {"concepts": CoOccurrence, "answers": Answers, "keep": Nothing}
    return kinds[kind]()


def _text(row: Mapping[str, Any]) -> str:
    columns: Sequence[str] = ("question", "answer", "text")
    return ". ".join(str(row[column]) for column in columns if column in row)
