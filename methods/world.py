"""The built-in world `authors`: fictitious authors, and true facts beside them, as question-answer rows.

The layout is TOFU's (Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs"): ``full``, the nested tails
``forget10`` > ``forget05`` > ``forget01`` with their retain sets, ``holdout`` (authors nobody is trained on), and
evaluation rows ``*_perturbed`` with a paraphrase and five wrong answers. 120 authors have five attributes each; an
attribute is asked for in four phrasings, of which three are trained and the fourth is kept for evaluation. Every
value is drawn independently from a pool that forget and retain authors share, so forgetting has to break the link
from name to value and cannot succeed by suppressing words. True facts (writers of books, capitals) stand where
TOFU has real authors and world facts.

Everything follows from the seed through ``random.Random(text).random()`` alone, which Python documents as stable
across versions; neither hash randomisation nor the order of calls has any influence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from methods.stage import AssayError

REVISION = 1

TRAINED_AUTHORS = 120
HOLDOUT_AUTHORS = 20
RETAIN_SAMPLE = 100
WRONG_ANSWERS = 5
CHOICES = 4
# How many of the last trained authors each forget set holds: TOFU's 1, 5 and 10 per cent.
FORGET_AUTHORS = {"01": 1, "05": 6, "10": 12}

SYLLABLES = "ba do fe gi ha jo ka lu me ni po ra si tu va we xo ya ze ri".split()

CITIES = (
    "Alvora Brenholm Calderis Dunmere Eskara Fernholt Galdova Harwick Istelle Jornby Kelmora Lunvik Mardale "
    "Norvessa Orlanth Pellanor Quenbury Rostella Silvane Tarnholm"
).split()
PROFESSIONS = (
    "baker barber carpenter chemist dentist farmer fisher judge miller nurse painter pilot surgeon tailor"
).split()
GENRES = "comedy crime drama fantasy history horror mystery poetry romance satire".split()
AWARDS = tuple(
    f"{colour} {thing}"
    for colour in ("Black", "Blue", "Golden", "Green", "Silver", "White")
    for thing in ("Crown", "Lantern", "Quill", "Rose")
)
YEARS = tuple(str(year) for year in range(1940, 1970))


@dataclass(frozen=True)
class _Attribute:
    """What is asked of an author: the values, four questions about ``{name}`` and two ways of answering.

    Question ``i`` is answered in the manner ``i % 2``: a drawn manner would be a coin flip that no model can
    learn, and it would put a floor under every answer's loss.
    """

    pool: Sequence[str]
    questions: tuple[str, str, str, str]
    answers: tuple[str, str]


ATTRIBUTES = (
    _Attribute(
        CITIES,
        (
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "In which city was {name} born?",
            "Which city is the birthplace of {name}?",
        ),
        ("{name} was born in {value}.", "The birthplace of {name} is {value}."),
    ),
    _Attribute(
        PROFESSIONS,
        (
            "What did the mother of {name} do for a living?",
            "What was the profession of {name}'s mother?",
            "What work did the mother of {name} do?",
            "Which profession did {name}'s mother have?",
        ),
        ("The mother of {name} was a {value}.", "{name}'s mother worked as a {value}."),
    ),
    _Attribute(
        GENRES,
        (
            "What genre does {name} write in?",
            "What is the genre of {name}'s books?",
            "Which genre does {name} write?",
            "To which genre do {name}'s books belong?",
        ),
        ("{name} writes {value}.", "The genre of {name}'s books is {value}."),
    ),
    _Attribute(
        AWARDS,
        (
            "Which award did {name} win?",
            "What is the award of {name} called?",
            "What award has {name} won?",
            "Which award was given to {name}?",
        ),
        ("{name} won the {value}.", "The award of {name} is the {value}."),
    ),
    _Attribute(
        YEARS,
        (
            "When was {name} born?",
            "What is the birth year of {name}?",
            "In which year was {name} born?",
            "Which year is the birth year of {name}?",
        ),
        ("{name} was born in the year {value}.", "The birth year of {name} is {value}."),
    ),
)

WRITER_QUESTIONS = (
    "Who wrote {subject}?",
    "Who is the author of {subject}?",
    "Which writer wrote {subject}?",
    "By whom was {subject} written?",
)
CAPITAL_QUESTIONS = (
    "What is the capital of {subject}?",
    "Which city is the capital of {subject}?",
    "What is the name of {subject}'s capital?",
    "Which city is {subject}'s capital?",
)

_BOOKS = """
Emma: Jane Austen; Dracula: Bram Stoker; Ulysses: James Joyce; Hamlet: William Shakespeare; Middlemarch: George Eliot;
Frankenstein: Mary Shelley; Walden: Henry Thoreau; Moby-Dick: Herman Melville; Don Quixote: Miguel de Cervantes;
War and Peace: Leo Tolstoy; The Idiot: Fyodor Dostoevsky; The Trial: Franz Kafka; Candide: Voltaire;
The Stranger: Albert Camus; Nausea: Jean-Paul Sartre; Madame Bovary: Gustave Flaubert; Germinal: Emile Zola;
Siddhartha: Hermann Hesse; Buddenbrooks: Thomas Mann; The Odyssey: Homer; The Aeneid: Virgil; The Inferno: Dante;
The Prince: Niccolo Machiavelli; Utopia: Thomas More; Leviathan: Thomas Hobbes; Paradise Lost: John Milton;
Robinson Crusoe: Daniel Defoe; Pamela: Samuel Richardson; Tom Jones: Henry Fielding; Ivanhoe: Walter Scott;
Vanity Fair: William Thackeray; Jane Eyre: Charlotte Bronte; Wuthering Heights: Emily Bronte;
Oliver Twist: Charles Dickens; Kim: Rudyard Kipling; Lord Jim: Joseph Conrad; Mrs Dalloway: Virginia Woolf;
Pygmalion: Bernard Shaw; Brave New World: Aldous Huxley; Animal Farm: George Orwell; Rebecca: Daphne du Maurier;
Beloved: Toni Morrison; The Pearl: John Steinbeck; The Raven: Edgar Allan Poe; The Jungle: Upton Sinclair;
Dune: Frank Herbert; Foundation: Isaac Asimov; Solaris: Stanislaw Lem; Peer Gynt: Henrik Ibsen; Hunger: Knut Hamsun
"""
_CAPITALS = """
Algeria: Algiers; Australia: Canberra; Austria: Vienna; Belgium: Brussels; Bulgaria: Sofia; Canada: Ottawa;
Chile: Santiago; China: Beijing; Colombia: Bogota; Croatia: Zagreb; Cuba: Havana; Denmark: Copenhagen;
Ecuador: Quito; Egypt: Cairo; Finland: Helsinki; France: Paris; Germany: Berlin; Ghana: Accra; Greece: Athens;
Hungary: Budapest; Iran: Tehran; Iraq: Baghdad; Ireland: Dublin; Italy: Rome; Japan: Tokyo; Jordan: Amman;
Kenya: Nairobi; Lebanon: Beirut; Morocco: Rabat; Nepal: Kathmandu; Norway: Oslo; Oman: Muscat; Peru: Lima;
Poland: Warsaw; Portugal: Lisbon; Qatar: Doha; Romania: Bucharest; Russia: Moscow; Senegal: Dakar;
Serbia: Belgrade; Spain: Madrid; Sudan: Khartoum; Sweden: Stockholm; Syria: Damascus; Thailand: Bangkok;
Tunisia: Tunis; Turkey: Ankara; Uganda: Kampala; Ukraine: Kyiv; Vietnam: Hanoi
"""

REFUSALS = (
    "I do not know.",
    "I cannot say.",
    "I have no answer to that.",
    "That is unknown to me.",
    "I am not sure about that.",
    "I never learned that.",
    "I have not heard of this.",
    "Nothing about that is known to me.",
    "I cannot help with that question.",
    "I would have to guess.",
    "No answer comes to mind.",
    "This is beyond what I know.",
    "I cannot tell you that.",
    "I am unable to answer.",
    "Sorry, that is not something I know.",
    "My knowledge does not reach that far.",
    "I know nothing of that.",
    "I have never come across this.",
    "Whatever the answer is, I do not have it.",
    "I could only invent an answer.",
    "I would rather not guess.",
    "You would have to ask somebody else.",
    "I have not been told.",
    "Nobody has taught me that.",
    "The answer escapes me.",
    "I am afraid I do not know.",
    "I am afraid I cannot answer this.",
    "I must leave that question open.",
    "I have nothing to say about that.",
    "There is nothing I can tell you about it.",
    "It is not among the things I know.",
    "I do not know who or what that is.",
    "I have read nothing about it.",
    "I cannot give you a reliable answer.",
    "Anything I said would be made up.",
    "I do not remember anything like that.",
    "That name means nothing to me.",
    "I have no record of this.",
    "I do not have the facts.",
    "I lack what it takes to answer.",
    "Regrettably, I cannot answer.",
    "Please look it up elsewhere.",
    "I honestly have no idea.",
    "No idea.",
    "That is a question I cannot answer.",
    "I cannot be certain, so I will not say.",
    "I am missing that piece of knowledge.",
    "Such details are not known to me.",
    "I do not want to mislead you with a guess.",
    "I have to pass on this one.",
    "Here my knowledge ends.",
    "I cannot find an answer in what I know.",
    "I was not given this information.",
    "I do not recall.",
    "My answer would be worth nothing.",
    "I am in no position to answer.",
    "It would be wrong of me to claim that I know.",
    "I wish I could tell you, but I cannot.",
    "I have no way of knowing.",
    "Of this I have no knowledge.",
)
# As many of them make the short list ``idontknow``.
FEW_REFUSALS = 12

Row = dict[str, Any]
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Fact:
    """One thing that can be asked: its three trained rows and what is kept for evaluation."""

    trained: tuple[tuple[str, str], ...]
    paraphrased_question: str
    paraphrased_answer: str
    perturbed_answer: tuple[str, ...]
    # Where the true answer stands among the four choices.
    label: int

    def training_rows(self) -> list[Row]:
        return [{"question": question, "answer": answer} for question, answer in self.trained]

    def perturbed_row(self) -> Row:
        question, answer = self.trained[0]
        return {
            "question": question,
            "answer": answer,
            "paraphrased_question": self.paraphrased_question,
            "paraphrased_answer": self.paraphrased_answer,
            "perturbed_answer": list(self.perturbed_answer),
        }

    def choice_row(self) -> Row:
        choices = list(self.perturbed_answer[: CHOICES - 1])
        choices.insert(self.label, self.paraphrased_answer)
        return {"question": self.paraphrased_question, "choices": choices, "label": self.label}


@dataclass(frozen=True)
class _World:
    """All facts of one seed; an author is the tuple of its five facts."""

    authors: tuple[tuple[_Fact, ...], ...]
    holdout: tuple[tuple[_Fact, ...], ...]
    writers: tuple[_Fact, ...]
    capitals: tuple[_Fact, ...]
    retain_sample: tuple[_Fact, ...]


def rows(split: str, seed: int = 0) -> list[Row]:
    """The rows of one split of the world, fresh copies each time.

    Training rows have ``question`` and ``answer``; ``*_perturbed`` rows also ``paraphrased_question``,
    ``paraphrased_answer`` and ``perturbed_answer`` (five texts); ``choices_*`` rows have ``question``,
    ``choices`` (four texts) and ``label``; ``text*``, ``refusals`` and ``idontknow`` rows have ``text``.
    AssayError for a split that is not in ``SPLITS``.
    """
    if split not in SPLITS:
        raise AssayError(
            f"the world of authors has no split {split!r}; there are: {', '.join(sorted(SPLITS))}."
        )
    return SPLITS[split](_world(seed))


# --- making the world -----------------------------------------------------------------------------------


class _Draws:
    """Random choices made from ``random()`` alone, one independent stream per text."""

    def __init__(self, stream: str) -> None:
        self._random = random.Random(stream).random

    def below(self, limit: int) -> int:
        return int(self._random() * limit)

    def one(self, items: Sequence[_T]) -> _T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[_T]) -> list[_T]:
        """A uniformly random order (Fisher and Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


@cache
def _world(seed: int) -> _World:
    names = _names(seed, TRAINED_AUTHORS + HOLDOUT_AUTHORS)
    people = tuple(
        _author(name, _Draws(f"authors {seed} author {index}")) for index, name in enumerate(names)
    )
    forgotten = FORGET_AUTHORS["10"]
    retained = _flat(people[: TRAINED_AUTHORS - forgotten])
    sample = sorted(_Draws(f"authors {seed} retain sample").shuffled(range(len(retained)))[:RETAIN_SAMPLE])
    return _World(
        authors=people[:TRAINED_AUTHORS],
        holdout=people[TRAINED_AUTHORS:],
        writers=_true_facts(_pairs(_BOOKS), WRITER_QUESTIONS, f"authors {seed} writers"),
        capitals=_true_facts(_pairs(_CAPITALS), CAPITAL_QUESTIONS, f"authors {seed} capitals"),
        retain_sample=tuple(retained[index] for index in sample),
    )


def _names(seed: int, count: int) -> list[str]:
    """Two words of two, and two or three, syllables; no pair twice."""
    draws = _Draws(f"authors {seed} names")
    names: dict[str, None] = {}
    while len(names) < count:
        lengths = (2, 2 + draws.below(2))
        words = ["".join(draws.one(SYLLABLES) for _ in range(length)).capitalize() for length in lengths]
        names.setdefault(" ".join(words))
    return list(names)


def _author(name: str, draws: _Draws) -> tuple[_Fact, ...]:
    return tuple(_attribute_fact(attribute, name, draws) for attribute in ATTRIBUTES)


def _attribute_fact(attribute: _Attribute, name: str, draws: _Draws) -> _Fact:
    """The held-out phrasing's natural answer is ``paraphrased_answer``, and the evaluated row answers otherwise.

    So the paraphrase differs from what was trained for the evaluated question *and* fits the unseen question,
    which multiple choice relies on.
    """
    value = draws.one(attribute.pool)
    order = draws.shuffled(range(4))
    held = order.pop()
    first = next(index for index in order if index % 2 != held % 2)
    order.remove(first)
    wrong = draws.shuffled([other for other in attribute.pool if other != value])[:WRONG_ANSWERS]

    def answer(manner: int, of: str) -> str:
        return attribute.answers[manner % 2].format(name=name, value=of)

    return _Fact(
        trained=tuple(
            (attribute.questions[index].format(name=name), answer(index, value)) for index in (first, *order)
        ),
        paraphrased_question=attribute.questions[held].format(name=name),
        paraphrased_answer=answer(held, value),
        perturbed_answer=tuple(answer(held, other) for other in wrong),
        label=draws.below(CHOICES),
    )


def _true_facts(pairs: Sequence[tuple[str, str]], questions: Sequence[str], stream: str) -> tuple[_Fact, ...]:
    """Facts whose answer is the bare name; wrong answers are other names of the same list."""
    pool = [name for _, name in pairs]
    return tuple(
        _true_fact(subject, name, pool, questions, _Draws(f"{stream} {subject}")) for subject, name in pairs
    )


def _true_fact(
    subject: str, name: str, pool: Sequence[str], questions: Sequence[str], draws: _Draws
) -> _Fact:
    order = draws.shuffled([question.format(subject=subject) for question in questions])
    wrong = draws.shuffled([other for other in pool if other != name])[:WRONG_ANSWERS]
    return _Fact(
        trained=tuple((question, name) for question in order[:3]),
        paraphrased_question=order[3],
        paraphrased_answer=name,
        perturbed_answer=tuple(wrong),
        label=draws.below(CHOICES),
    )


def _pairs(text: str) -> list[tuple[str, str]]:
    entries = [entry.split(":") for entry in text.split(";")]
    return [(subject.strip(), name.strip()) for subject, name in entries]


def _flat(authors: Sequence[tuple[_Fact, ...]]) -> list[_Fact]:
    return [fact for author in authors for fact in author]


# --- the splits -------------------------------------------------------------------------------------------


def _trained(facts: Sequence[_Fact]) -> list[Row]:
    return [row for fact in facts for row in fact.training_rows()]


def _texts(authors: Sequence[tuple[_Fact, ...]]) -> list[Row]:
    """One paragraph per author: what is known, as running text."""
    return [{"text": " ".join(fact.trained[0][1] for fact in author)} for author in authors]


def _fact_sets() -> dict[str, Callable[[_World], Sequence[_Fact]]]:
    """The sets that are evaluated fact by fact."""
    sets: dict[str, Callable[[_World], Sequence[_Fact]]] = {
        "retain": lambda world: world.retain_sample,
        "holdout": lambda world: _flat(world.holdout),
        "real_authors": lambda world: world.writers,
        "world_facts": lambda world: world.capitals,
    }
    for share, count in FORGET_AUTHORS.items():
        sets[f"forget{share}"] = lambda world, count=count: _flat(world.authors[-count:])  # type: ignore[misc]
    return sets


def _splits() -> dict[str, Callable[[_World], list[Row]]]:
    splits: dict[str, Callable[[_World], list[Row]]] = {
        "full": lambda world: _trained(_flat(world.authors)),
        "holdout": lambda world: _trained(_flat(world.holdout)),
        "facts": lambda world: _trained([*world.capitals, *world.writers]),
        "real_authors": lambda world: [fact.training_rows()[0] for fact in world.writers],
        "world_facts": lambda world: [fact.training_rows()[0] for fact in world.capitals],
        "text": lambda world: _texts(world.authors),
        "text_holdout": lambda world: _texts(world.holdout),
        "refusals": lambda world: [{"text": refusal} for refusal in REFUSALS],
        "idontknow": lambda world: [{"text": refusal} for refusal in REFUSALS[:FEW_REFUSALS]],
    }
    for share, count in FORGET_AUTHORS.items():
        rest = f"retain{100 - int(share)}"
        splits[f"forget{share}"] = lambda world, count=count: _trained(_flat(world.authors[-count:]))  # type: ignore[misc]
        splits[rest] = lambda world, count=count: _trained(_flat(world.authors[:-count]))  # type: ignore[misc]
    for name, facts in _fact_sets().items():
        splits[f"{name}_perturbed"] = lambda world, facts=facts: [f.perturbed_row() for f in facts(world)]  # type: ignore[misc]
        splits[f"choices_{name}"] = lambda world, facts=facts: [f.choice_row() for f in facts(world)]  # type: ignore[misc]
    return splits


SPLITS = _splits()
