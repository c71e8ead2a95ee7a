"""The points whose geometry is measured: what enters and leaves the output layer on a data set.

Test cases of a classifier, or of a language model the positions whose next token is part of an answer. ``N`` is points,
``d`` the width of what enters the output layer, ``V`` classes, ``L`` tokens of a text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, Scoring

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from methods.data import CaseTable, Example

REVISION = 1
# The official code takes the rank of the scores of so many points.
MOST_SCORES = 2048


@dataclass(frozen=True)
class Points:
    """N points: features [N,d] and scores [M,V] (of the first M = min(N, 2048)), float32; labels and predictions [N].

    ``texts`` holds the states [L,d] of the sequences that a language model's points lie in.
    """

    name: str
    features: ndarray
    labels: ndarray
    predicted: ndarray
    scores: ndarray
    texts: Sequence[ndarray] = ()

    @property
    def task(self) -> str:
        """What was looked at, and how much of it."""
        return f"{self.name} points={len(self.features)}"


def collect(scoring: Scoring, data: str, most: int | None) -> Points:
    """What enters and leaves the output layer at the points of a data set; ``most`` of them, None for all."""
    from methods.checkpoint import is_classifier

    rows = scoring.data.rows(data)
    if is_classifier(scoring.parents["model"]):
        return _of_cases(scoring, rows, data, most)
    return _of_sequences(scoring, rows, data, most)


def drawn(count: int, most: int | None, seed: int, data: str) -> list[int]:
    """The places of the points among ``count``, in order; AssayError for fewer than two."""
    if count < 2:
        raise AssayError(
            f"geometry needs two points or more, but {data} has {count}; take a larger data set."
        )
    if most is None or count <= most:
        return list(range(count))
    return sorted(random.Random(f"{seed}/geometry").sample(range(count), most))


@contextmanager
def entering(layer: Any) -> Iterator[Callable[[], Tensor]]:
    """Within it the function gives what last entered the layer."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield lambda: seen[-1]
    finally:
        handle.remove()


def _of_cases(scoring: Scoring, rows: Sequence[Any], data: str, most: int | None) -> Points:
    import numpy
    import torch

    from methods.architectures import output_layer
    from methods.data import read_cases
    from methods.terms import case_scores

    model = scoring.model()
    table: CaseTable = read_cases(rows, data)
    table.check_model(model, data)
    places = drawn(len(table), most, scoring.seed, data)
    size = scoring.config.batch
    features, scores = [], []
    with torch.no_grad(), entering(output_layer(model)) as entered:
        for start in range(0, len(places), size):
            cases = table.batch(places[start : start + size], "points").to(model.device)
            scores.append(array(case_scores(model, cases)))
            features.append(array(entered()))
    every = numpy.concatenate(scores)
    labels = array(table.labels)[places]
    # numpy takes the first of equal scores everywhere.
    return Points(data, numpy.concatenate(features), labels, every.argmax(axis=1), every[:MOST_SCORES])


def _of_sequences(scoring: Scoring, rows: Sequence[Any], data: str, most: int | None) -> Points:
    import numpy

    from methods.data import Style, encode
    from methods.generate import batches

    tokenizer, config = scoring.tokenizer(), scoring.config
    examples = encode(rows, tokenizer, Style.read(scoring.parents["model"]), config.context_tokens)
    answers = [(i, t) for i, example in enumerate(examples) for t in _answered(example)]
    chosen = [answers[place] for place in drawn(len(answers), most, scoring.seed, data)]
    places: dict[int, list[int]] = {}
    for i, t in chosen:
        places.setdefault(i, []).append(t)
    used = sorted(places)
    found: dict[int, tuple[ndarray, ndarray]] = {}
    for group in batches([len(examples[i].input_ids) for i in used], config.batch):
        members = [used[place] for place in group]
        outcome = _run(scoring, [examples[i] for i in members], [places[i] for i in members])
        found.update(zip(members, outcome, strict=True))
    scores = numpy.concatenate([found[i][1] for i in used])
    return Points(
        name=data,
        features=numpy.concatenate([found[i][0][places[i]] for i in used]),
        labels=numpy.array([examples[i].labels[t + 1] for i, t in chosen]),
        predicted=scores.argmax(axis=1),
        scores=scores[:MOST_SCORES],
        texts=[found[i][0] for i in used],
    )


def _answered(example: Example) -> list[int]:
    """The positions [L-1] whose next token is part of the answer."""
    return [t for t, label in enumerate(example.labels[1:]) if label != -100]


def _run(
    scoring: Scoring, examples: list[Example], places: Sequence[list[int]]
) -> list[tuple[ndarray, ndarray]]:
    """Of each sequence the states [L,d] that enter the output layer, and the scores [n,V] at its n places."""
    import torch

    from methods.architectures import output_layer
    from methods.data import collate, padding_id
    from methods.terms import forward

    model = scoring.model()
    part = collate(examples, padding_id(scoring.tokenizer()), "points").to(model.device)
    with torch.no_grad(), entering(output_layer(model)) as entered:
        scores, states = forward(model, part).logits, entered()
    lengths = [len(example.input_ids) for example in examples]
    return [
        (array(states[row, : lengths[row]]), array(scores[row, wanted])) for row, wanted in enumerate(places)
    ]


def array(tensor: Tensor) -> ndarray:
    """A tensor as numpy has it: float32, wider only where it was wider."""
    from methods.terms import widen

    tensor = tensor.detach()
    return (widen(tensor) if tensor.is_floating_point() else tensor).cpu().numpy()
