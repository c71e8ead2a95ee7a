"""Unlearning metrics against the authors' code: one test per number that the files hold.

Run with ``pytest tests/parity/test_metrics_unlearning.py``; the data is described in ``tests/parity/cases.py``.
The functions called are those that ``evaluations/tofu.py``, ``membership.py`` and ``muse.py`` call. Files are chosen by
what they hold, whatever their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from evaluations import _membership, _statistics, _unlearning
from evaluations._likelihood import Answer, answers
from evaluations.muse import overlap
from methods.data import Part
from tests.parity.cases import Table, agree, arrays, folder

FOLDER = folder("unlearning")
EXACT = {"relative": 1e-8, "absolute": 1e-11}
# The official membership attacks compute in float32.
ATTACKS = {"relative": 1e-5, "absolute": 1e-5}
SETS = {
    "retain": "retain",
    "ra": "ra",
    "wf": "wf",
    "Real Authors": "ra",
    "Real World": "wf",
    "Retain": "retain",
}

Stored = Mapping[str, numpy.ndarray]


def holds_metrics(path: Path) -> bool:
    """Whether a file has likelihoods of right and wrong answers, or of tokens, to compute metrics from."""
    return any(name.startswith("in|tok|") or name.endswith("|correct_avg_loss") for name in arrays(path))


def numbers() -> list[Any]:
    """(file, name of the number) for every number in the folder's metric files."""
    return [
        pytest.param(path, name, id=f"{path.stem}/{name.removeprefix('out|')}")
        for path in sorted(FOLDER.glob("*.npz"))
        if holds_metrics(path)
        for name in arrays(path)
        if name.startswith("out|")
    ]


@pytest.mark.parametrize(("path", "name"), numbers())
def test_metric_equals_the_official_one(path: Path, name: str) -> None:
    stored = arrays(path)
    for pattern, compute in COMPUTED.items():
        match = re.fullmatch(pattern, name)
        if match:
            tolerance = ATTACKS if name.startswith("out|mia|") else EXACT
            found = torch.as_tensor(numpy.asarray(compute(stored, *match.groups()), dtype=numpy.float64))
            agree(found, stored[name], **tolerance, what=name)
            return
    pytest.skip(f"not built yet: {name.removeprefix('out|')}")


# --- truth ratio, probability, utility, forget quality ---------------------------------------------------------


def losses(stored: Stored, name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Mean token losses of the right and the wrong answers."""
    return stored[f"in|{name}|correct_avg_loss"], stored[f"in|{name}|wrong_avg_loss"]


def truth_ratio(stored: Stored, name: str, values: str | None, aggregator: str) -> Any:
    right, wrong = losses(stored, name)
    ratios = _unlearning.truth_ratio(right, wrong)
    if aggregator == "prob_mean":
        found = _unlearning.right_share(right, wrong)
        return found if values else found.mean()
    if values:
        return ratios
    aggregate = {"closer_to_1_better": _unlearning.closer_to_1_better, "true_better": _unlearning.true_better}
    return aggregate[aggregator](ratios).mean()


def component(stored: Stored, name: str, part: str, definition: Any) -> numpy.ndarray:
    """One of the nine parts of model utility, per row; ``forget`` has the same parts."""
    right, wrong = losses(stored, name)
    if part == "ROUGE":
        return stored[f"in|{name}|rouge"]
    if part == "Prob":
        if name in ("ra", "wf"):
            return _unlearning.option_probability(right, wrong, definition)
        return numpy.exp(-stored[f"in|{name}|gt_loss"])
    ratios = _unlearning.truth_ratio(right, wrong, definition)
    return (
        _unlearning.closer_to_1_better(ratios, definition)
        if name == "forget"
        else _unlearning.true_better(ratios)
    )


def utility(stored: Stored, definition: Any) -> float:
    parts = {
        name: [component(stored, name, part, definition) for part in ("Prob", "ROUGE", "Truth")]
        for name in ("retain", "ra", "wf")
    }
    return _statistics.harmonic_mean(parts).value


def quality(stored: Stored, definition: Any, number: int) -> float:
    ratios = [
        _unlearning.truth_ratio(*losses(stored, name), definition)
        for name in ("forget", "forget_retainmodel")
    ]
    return _unlearning.forget_quality(*ratios)[number]


# --- single answers --------------------------------------------------------------------------------------------


def token_answers(stored: Stored, name: str, logits: str = "logits") -> list[Answer]:
    """The answers that the evaluation would see of a model with these logits [B,T,V]."""
    table, labels = (torch.as_tensor(stored[f"in|tok|{name}|{key}"]) for key in (logits, "labels"))
    ids = torch.arange(labels.numel()).view_as(labels)
    part = Part(ids, torch.ones_like(ids), labels, name)
    return answers(Table(table.flatten(0, 1)), part, standardized=True)


PER_ANSWER: dict[str, Callable[[Answer], float]] = {
    "exact_memorization": lambda answer: _unlearning.exact_memorization(answer.correct),
    "extraction_strength": lambda answer: _unlearning.extraction_strength(answer.correct),
    "probability": lambda answer: answer.probability,
    "avg_loss": lambda answer: answer.loss,
}


def per_answer(stored: Stored, name: str, metric: str, values: str | None) -> Any:
    found = numpy.array([PER_ANSWER[metric](answer) for answer in token_answers(stored, name)])
    return found if values else numpy.nanmean(found)


def attack(stored: Stored, kind: str, share: str | None, what: str) -> Any:
    """An attack's scores of one set, or its area: forgotten rows are members, the holdout's are others."""

    def scores(name: str) -> numpy.ndarray:
        found = token_answers(stored, name)
        if kind == "reference":
            return _membership.less_than_reference(found, token_answers(stored, name, "ref_logits"))
        if kind == "min_k":
            return _membership.min_k(found, float(share or "nan"))
        if kind == "min_k_pp":
            return _membership.min_k_plus_plus(found, float(share or "nan"))
        return numpy.array([answer.loss for answer in found])

    if what == "auc":
        return _membership.area(scores("forget"), scores("holdout")).value
    return scores(what.removesuffix("_scores"))


COMPUTED: dict[str, Callable[..., Any]] = {
    r"out\|(\w+)\|truth_ratio_(values_)?(closer_to_1_better|true_better|prob_mean)": truth_ratio,
    r"out\|(\w+)\|prob_w_options": lambda stored, name: _unlearning.option_probability(
        *losses(stored, name)
    ).mean(),
    r"out\|component\|(retain|ra|wf)_(?:Q_A_)?(Prob|ROUGE|Truth)\w*": lambda stored, name, part: component(
        stored, name, part, "open_unlearning"
    ).mean(),
    r"out\|tofu\|(Real Authors|Real World|Retain|Forget) (Prob|ROUGE|Truth)[\w ]*": lambda stored, name, part: (
        component(stored, SETS.get(name, "forget"), part, "tofu").mean()
    ),
    r"out\|tofu\|(?:Forget Quality|KS Test PVal Forget)": lambda stored: quality(stored, "tofu", 0),
    r"out\|tofu\|KS Test Forget": lambda stored: quality(stored, "tofu", 1),
    r"out\|forget_quality_openunlearning": lambda stored: quality(stored, "open_unlearning", 0),
    r"out\|model_utility_openunlearning": lambda stored: utility(stored, "open_unlearning"),
    r"out\|tofu\|Model Utility": lambda stored: utility(stored, "tofu"),
    r"out\|privleak_auc([\d.]+)_ref([\d.]+)": lambda _, area, retained: _unlearning.privacy_leak(
        float(area), float(retained)
    ),
    r"out\|tok\|(\w+)\|(exact_memorization|extraction_strength|probability|avg_loss)(_values)?": per_answer,
    r"out\|mia\|(loss|reference|min_k_pp|min_k)(?:_([\d.]+))?\|(auc|\w+_scores)": attack,
}


# --- texts -----------------------------------------------------------------------------------------------------


def texts() -> list[Any]:
    """(truth, generated text, name of the score, score) for every score in the folder's files of text pairs."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for number, pair in enumerate(content.get("pairs", []) if isinstance(content, dict) else []):
            scores = {key: value for key, value in pair.items() if "rouge" in key}
            found += [
                pytest.param(
                    pair["ground_truth"], pair["generation"], key, value, id=f"{path.stem}/{number}/{key}"
                )
                for key, value in scores.items()
            ]
    return found


@pytest.mark.parametrize(("truth", "text", "name", "expected"), texts())
def test_rouge_equals_the_official_one(truth: str, text: str, name: str, expected: float) -> None:
    match = re.fullmatch(r"(openunlearning|muse)_(rouge1|rougeL)_(recall|f1)", name)
    if match is None:
        pytest.skip(f"not built yet: {name}")
    found = _unlearning.rouge(truth, text, match[2], stem=match[1] == "openunlearning")
    assert found[match[3] == "f1"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if match[2] == "rougeL" and match[3] == "f1":
        definition = {"openunlearning": "open_unlearning", "muse": "muse_bench"}[match[1]]
        assert overlap(truth, text, definition) == found[1]
