"""TOFU: what a model still knows of the forget set, and what it kept of everything else.

Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs" (2024); metric definitions of the open-unlearning
benchmark, or of TOFU's own code with ``definition="tofu"``, because the two differ (``evaluations/_unlearning.py``).
Four sets are asked, in TOFU's layout: the forget set, a retain sample, real authors and world facts.

* ``forget_quality``: p-value of a Kolmogorov-Smirnov test between the truth ratios of this model and of
  ``reference``, a model trained without the forget set; 1 means the two cannot be told apart.
* ``model_utility``: harmonic mean of probability, ROUGE-L recall and truth ratio on the three sets to be kept.
* ``privleak``: Min-K (0.4) membership of the forget set against unseen rows, relative to ``reference``.
* ``*_accuracy``: multiple choice by summed log-likelihood, three wrong answers (chance 0.25), asked in an unseen
  phrasing where the data have one. ``facts`` is real authors and world facts together.
* ``*_nll``: nats per token of the true answers to the questions as trained, a mean over tokens.

Without a reference, the ``forget_quality`` and ``privleak`` rows are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from evaluations import _membership, _statistics, _unlearning
from evaluations._known import choice
from evaluations._reference import check_tokenizer
from methods.stage import AssayError, Model, Row, Scoring

if TYPE_CHECKING:
    from numpy import ndarray

    from evaluations._likelihood import Answer
    from evaluations._statistics import Estimate
    from methods.data import Locator, Style

USES = (
    "methods.data",
    "methods.terms",
    "methods.world",
    "methods.checkpoint",
    "evaluations._known",
    "evaluations._likelihood",
    "evaluations._membership",
    "evaluations._reference",
    "evaluations._statistics",
    "evaluations._unlearning",
)
KEPT = ("retain", "real_authors", "world_facts")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which forget set, judged by whose definition, and with how much text."""

    # Forget split: forget01, forget05 or forget10.
    split: str = "forget10"
    # Whose files: the built-in fictitious authors, or TOFU itself.
    dataset: Literal["authors", "tofu"] = "authors"
    # A model trained without the forget set; needed for forget_quality and privleak.
    reference: Model | None = None
    # Whose truth ratio: open-unlearning's geometric one, or that of TOFU's own code.
    definition: Literal["open_unlearning", "tofu"] = "open_unlearning"
    # Questions of each set that are answered freely, for ROUGE; None for all. TOFU answers all of them.
    generate: Annotated[int, Gt(0)] | None = 20
    # Longest free answer. TOFU's answers need 200, those of the built-in world 10.
    max_new_tokens: Annotated[int, Gt(0)] = 32
    # Sequences scored at once.
    batch: Annotated[int, Gt(0)] = 64
    # First rows of each set that are used; None for all.
    limit: Annotated[int, Gt(0)] | None = None
    # Longer sequences are cut.
    context_tokens: Annotated[int, Gt(0)] = 512


@dataclass
class Questions:
    """One set of N rows, and for each the numbers of its answers in the list of everything to be scored."""

    rows: list[dict[str, Any]]
    true: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    wrong: list[list[int]] = field(default_factory=list)
    options: list[list[int]] = field(default_factory=list)


def datasets(config: Config, _: Locator) -> tuple[str, ...]:
    """Names of the data sets that are read: their content enters a score's id."""
    unseen = (_unseen(config),) if config.reference is not None else ()
    return (*_names(config).values(), *unseen)


def evaluate(scoring: Scoring) -> list[Row]:
    """Score the model on the four sets; rows as the module's text describes them."""
    if scoring.config.reference is not None:
        check_tokenizer(scoring, "reference")
    sets, pairs = _collect(scoring)
    scores = _score(scoring, scoring.model(), list(pairs))
    end = len(_style(scoring).answer_end(scoring.tokenizer()))
    found = {name: _Measured(questions, scores, scoring.config, end) for name, questions in sets.items()}
    for name, texts in _write(scoring, sets).items():
        found[name].rouge = [
            _unlearning.rouge(row["answer"], text)[0]
            for row, text in zip(sets[name].rows, texts, strict=False)
        ]
    rows = _forgetting(found["forget"]) + _keeping(found)
    if scoring.config.reference is not None:
        rows += _against_reference(scoring, sets["forget"], found["forget"])
    return [_row(_task(scoring.config), *row) for row in rows]


# --- what is asked ---------------------------------------------------------------------------------------------


def _names(config: Config) -> dict[str, str]:
    sets = {"forget": config.split, **{name: name for name in KEPT}}
    return {name: f"{config.dataset}/{stem}_perturbed" for name, stem in sets.items()}


def _unseen(config: Config) -> str:
    """Rows no model was trained on: the built-in holdout authors, or TOFU's holdout split of the same size."""
    if config.dataset == "authors":
        return "authors/holdout_perturbed"
    return f"tofu/{config.split.replace('forget', 'holdout')}"


def _rows(scoring: Scoring, name: str) -> list[dict[str, Any]]:
    rows = scoring.data.rows(name)[: scoring.config.limit]
    if not rows:
        raise AssayError(f"the data set {name} has no rows.")
    return rows


def _collect(scoring: Scoring) -> tuple[dict[str, Questions], dict[tuple[str, str], int]]:
    """The four sets, and every (question, answer) pair they need, each pair once."""
    pairs: dict[tuple[str, str], int] = {}
    sets = {}
    for name, data in _names(scoring.config).items():
        sets[name] = Questions(_rows(scoring, data))
        for row in sets[name].rows:
            _add(sets[name], _checked(row, data), pairs, fact=name not in ("forget", "retain"))
    return sets, pairs


def _checked(row: dict[str, Any], data: str) -> dict[str, Any]:
    missing = [column for column in ("question", "answer", "perturbed_answer") if column not in row]
    if missing:
        raise AssayError(
            f"the rows of {data} have no column {missing[0]!r}; tofu needs TOFU's perturbed files."
        )
    return row


def _add(questions: Questions, row: dict[str, Any], pairs: dict[tuple[str, str], int], fact: bool) -> None:
    """Number the row's answers. A fact's right answer is its only one; elsewhere it is the paraphrase."""

    def number(question: str, answer: str) -> int:
        return pairs.setdefault((question, answer), len(pairs))

    asked, perturbed = row["question"], row["perturbed_answer"]
    right = row["answer"] if fact else row.get("paraphrased_answer", row["answer"])
    unseen = row.get("paraphrased_question") or asked
    questions.true.append(number(asked, row["answer"]))
    questions.right.append(number(asked, right))
    questions.wrong.append([number(asked, answer) for answer in perturbed])
    questions.options.append([number(unseen, answer) for answer in (right, *perturbed[:3])])


def _score(scoring: Scoring, model: Any, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
    from evaluations._likelihood import score
    from methods.data import encode_pairs, padding_id

    tokenizer, config = scoring.tokenizer(), scoring.config
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    examples = encode_pairs(rows, tokenizer, _style(scoring), config.context_tokens)
    return score(model, examples, padding_id(tokenizer), config.batch)


def _write(scoring: Scoring, sets: dict[str, Questions]) -> dict[str, list[str]]:
    """Free answers to the first questions of every set, generated in shared batches."""
    from evaluations._likelihood import generate

    config, style = scoring.config, _style(scoring)
    model, tokenizer = scoring.model(), scoring.tokenizer()
    asked = [(name, row["question"]) for name, found in sets.items() for row in found.rows[: config.generate]]
    questions = [question for _, question in asked]
    texts = generate(model, tokenizer, style, questions, config.max_new_tokens, config.batch)
    written: dict[str, list[str]] = {name: [] for name in sets}
    for (name, _), text in zip(asked, texts, strict=True):
        written[name].append(text)
    return written


def _style(scoring: Scoring) -> Style:
    from methods.data import Style

    return Style.read(scoring.parents["model"])


# --- what is measured ------------------------------------------------------------------------------------------


class _Measured:
    """Per-row values [N] of one set."""

    def __init__(self, questions: Questions, scores: Sequence[Answer], config: Config, end: int = 1) -> None:
        import numpy as np

        self.answers = [scores[i] for i in questions.true]
        self.right = np.array([scores[i].loss for i in questions.right])
        # Rows may have unequal numbers of perturbed answers: each is reduced before they are stacked.
        wrong = [np.array([scores[i].loss for i in row]) for row in questions.wrong]
        pairs = list(zip(self.right, wrong, strict=True))
        self.ratio = np.array([_unlearning.truth_ratio(r, w, config.definition) for r, w in pairs])
        self.closeness = _unlearning.closer_to_1_better(self.ratio, config.definition)
        self.trueness = _unlearning.true_better(self.ratio)
        self.probability = np.array([answer.probability for answer in self.answers])
        self.option_probability = np.array(
            [_unlearning.option_probability(r, w, config.definition) for r, w in pairs]
        )
        self.accuracy = [
            choice([scores[i].text_log_likelihood(end) for i in row]) for row in questions.options
        ]
        self.rouge: list[float] = []

    def nll(self) -> tuple[list[float], list[int]]:
        """(summed loss, tokens) of each row's true answer."""
        sums = [float(answer.losses.sum()) for answer in self.answers]
        return sums, [len(answer.losses) for answer in self.answers]


Measured = tuple[str, "Estimate", str, str]


def _forgetting(forget: _Measured) -> list[Measured]:
    strength = [_unlearning.extraction_strength(answer.correct) for answer in forget.answers]
    exact = _known([_unlearning.exact_memorization(answer.correct) for answer in forget.answers])
    mean = _statistics.mean
    return [
        ("forget_truth_ratio", mean(forget.closeness), "", "closer_to_1"),
        ("forget_probability", mean(forget.probability), "", "lower"),
        ("forget_rouge", mean(forget.rouge), "recall", "lower"),
        ("forget_accuracy", mean(forget.accuracy), "", "lower"),
        ("forget_nll", _statistics.ratio(*forget.nll()), "nats/token", "higher"),
        ("extraction_strength", mean(strength), "", "lower"),
        ("exact_memorization", mean(exact), "", "lower"),
    ]


def _keeping(found: dict[str, _Measured]) -> list[Measured]:
    facts = [found["real_authors"], found["world_facts"]]
    sums, tokens = (facts[0].nll()[i] + facts[1].nll()[i] for i in (0, 1))
    rows: list[Measured] = []
    for name in KEPT:
        rows += _kept_rows(name, found[name])
    return [
        ("model_utility", _utility(found), "", "higher"),
        *rows,
        ("retain_nll", _statistics.ratio(*found["retain"].nll()), "nats/token", "lower"),
        ("facts_accuracy", _statistics.mean(facts[0].accuracy + facts[1].accuracy), "", "higher"),
        ("facts_nll", _statistics.ratio(sums, tokens), "nats/token", "lower"),
    ]


def _kept_rows(name: str, kept: _Measured) -> list[Measured]:
    parts = zip(("probability", "rouge", "truth_ratio"), _utility_parts(name, kept), strict=True)
    rows: list[Measured] = [
        (f"{name}_{part}", _statistics.mean(values), "", "higher") for part, values in parts
    ]
    return [*rows, (f"{name}_accuracy", _statistics.mean(kept.accuracy), "", "higher")]


def _utility_parts(name: str, kept: _Measured) -> list[Any]:
    """Probability (of the facts: among the options), ROUGE-L recall and truth ratio: a third of model utility."""
    return [kept.probability if name == "retain" else kept.option_probability, kept.rouge, kept.trueness]


def _utility(found: dict[str, _Measured]) -> Estimate:
    return _statistics.harmonic_mean({name: _utility_parts(name, found[name]) for name in KEPT})


def _known(values: Sequence[float]) -> ndarray:
    """Values without NaN: answers of one token have nothing to extract."""
    import numpy as np

    array = np.asarray(values)
    if np.isnan(array).all():
        raise AssayError("every answer of the forget set is one token long: nothing can be measured on them.")
    return array[~np.isnan(array)]


# --- against a model that never saw the forget set -------------------------------------------------------------


def _against_reference(scoring: Scoring, questions: Questions, forget: _Measured) -> list[Measured]:
    """Forget quality and privacy leak. ``questions``' numbers are rebuilt for the pairs that are needed here."""
    pairs: dict[tuple[str, str], int] = {}
    asked = Questions(questions.rows)
    for row in asked.rows:
        _add(asked, row, pairs, fact=False)
    unseen = [(row["question"], row["answer"]) for row in _rows(scoring, _unseen(scoring.config))]
    reference = _score(scoring, scoring.reference("reference"), [*pairs, *unseen])
    retained = _Measured(asked, reference[: len(pairs)], scoring.config)
    quality, _ = _unlearning.forget_quality(forget.ratio, retained.ratio)
    area = _area(forget.answers, _score(scoring, scoring.model(), unseen))
    leak = _unlearning.privacy_leak(area, _area(retained.answers, reference[len(pairs) :]))
    n = len(questions.rows)
    return [
        ("forget_quality", _statistics.Estimate(quality, None, n), "p-value", "higher"),
        ("privleak", _statistics.Estimate(leak, None, n + len(unseen)), "%", "closer_to_0"),
    ]


def _area(members: Sequence[Answer], others: Sequence[Answer]) -> float:
    return _membership.area(_membership.min_k(members), _membership.min_k(others)).value


# --- rows ------------------------------------------------------------------------------------------------------


def _task(config: Config) -> str:
    settings = [f"definition={config.definition}", f"generate={config.generate or 'all'}"]
    settings += [f"max_new_tokens={config.max_new_tokens}", f"batch={config.batch}"]
    if config.limit is not None:
        settings.append(f"limit={config.limit}")
    return " ".join([f"{config.dataset}/{config.split}", *settings])


def _row(task: str, metric: str, estimate: Estimate, unit: str, better: Any) -> Row:
    return Row(task, metric, estimate.value, estimate.stderr, estimate.n, unit, better)
