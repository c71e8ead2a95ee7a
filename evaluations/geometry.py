"""The shape of what a model has learnt: the features that enter its output layer, its class vectors, its embedding.

Points are the test cases of a classifier, or answer positions of a language model; more than ``points`` are drawn, the
same ones for every model. The model runs in evaluation mode in float32, the statistics are in float64. The task of a
row begins with what was measured:

* ``features ... standardised``: every coordinate less its mean, over its standard deviation (constant ones over 1).
  ``explained_variance_K`` is the share of the first K principal components together, ``component_variance_K`` that
  of the K-th alone, ``components_90`` and ``components_95`` the fewest that explain so much (of at most
  ``components``), ``effective_rank_ratios`` and ``participation_ratio`` are of the same ratios (Miller-Golub et al.
  2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers", ``vision/utils/pca_analysis.py``).
* ``features``: as they are. ``accuracy`` of the model on these points and ``nearest_vector_accuracy``, of calling
  each point by its nearest class vector in the head's own distance, or in the Euclidean one where the head measures
  none (``nearest_by`` in the notes): the two are the same for a harmonic head. ``rankme_eigen`` is of the squared,
  centred spectrum (Li et al. 2025, "Tracing the Representation Geometry of Language Models"), ``rankme_singular`` of
  the uncentred singular values (Garrido et al. 2023, "RankMe"); they differ by a lot. ``alpha_req`` (Agrawal et al.
  2022) names the ranks it was fitted over. The sources take them at the last token of a text.
* ``class_vectors`` and ``embedding``: the same PCA numbers of the vectors as they are, without standardising, and
  ``norm``. On the arithmetic data sets also how close the tokens come to their task's figure: ``circle``, ``lattice``,
  ``equivalence`` (0 is perfect), ``permutation`` (1 is), and of the lattice's rows or of ``quadruples``
  ``parallelogram``, |e0 + e3 - e1 - e2|^2 over ``scale`` in the first two components (Baek et al. 2025, "Harmonic Loss
  Trains Interpretable AI Models", ``src/utils/crystal_metric.py`` and the GPT-2 part).
* ``centres``: class vectors w_c against the means m_c of the features of class c. ``centre_correlation`` is the mean
  over the classes of Pearson's r between w_c and m_c, ``centre_distance`` |W - M| / |M| (both ours), and
  ``constant_weight_rms`` the root mean square of the weights on coordinates that hardly vary.
* ``logits`` and ``weights``: ``effective_rank_singular``, of the singular values and not of their squares: of the
  scores at 2,048 points at most, and the mean over the model's matrices without embeddings and output layer. The
  official code calls the former that of the activations (``llms/analysis/extract_checkpoint_metrics.py``).
* ``texts``: of the states of whole sequences, cut to the same number of tokens, ``matrix_nuclear_norm`` (divided by
  the number of tokens) and ``matrix_entropy`` (Li et al. 2024, "Large Language Model Evaluation via Matrix
  Nuclear-Norm"). They measure the number of tokens first: only the same number under the same tokenizer compares. Of a
  classifier they are those of its features as one matrix.
* ``class N``: ``pc1`` and ``pc2`` of the class vectors, for heads of at most 128 classes.

What is not defined (equal vectors, too few points for a fit, one dimension) has no row; the notes name it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from evaluations import _crystal, _spectrum, _statistics
from evaluations._points import MOST_SCORES, Points, array, collect
from methods.stage import AssayError, Dataset, Row, Scoring

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

TASKS = ("language", "classification")
USES = (
    "methods.architectures",
    "methods.checkpoint",
    "methods.data",
    "methods.head",
    "methods.terms",
    "methods.world",
    "evaluations._crystal",
    "evaluations._likelihood",
    "evaluations._points",
    "evaluations._spectrum",
    "evaluations._statistics",
)

# Of how many first components the shares of the variance are written.
TOGETHER = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 50)
ALONE = (1, 2, 3, 4, 5, 6)
# Heads of more classes have no picture of them.
MOST_PICTURED = 128
# What a table may miss.
OFTEN = ("explained_variance_1", "alpha_req", "centre_correlation", "matrix_nuclear_norm", "matrix_entropy")
# Points whose distances to all class vectors are held at once.
AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where features are taken, and how much of them is looked at."""

    # Cases of a classifier, or question-answer or text rows of a language model.
    data: Dataset
    # Rows whose class means the class vectors are compared with, such as the training set; None: those of data.
    centres: Dataset | None = None
    # Points at most; more are drawn. (The official image models stop at the first full batch after 2,000.)
    points: Annotated[int, Gt(1)] = 2000
    # Principal components at most (the official image models: 50).
    components: Annotated[int, Gt(0)] = 50
    # Rows {"words": [w0, w1, w2, w3]} for a language model: w0 is to w1 as w2 is to w3, in words of one token each.
    quadruples: Dataset | None = None
    # What a parallelogram's error is divided by: the size of all vectors, of those in quadruples, or of its own four.
    scale: Literal["all", "task", "datapoint"] = "all"
    # Standard deviation up to which a coordinate counts as constant; pixels go from 0 to 1. (Ours.)
    constant: Annotated[float, Ge(0)] = 0.02
    # Tokens that every text is cut to, shorter ones are left out; None: the length of the shortest.
    text_tokens: Annotated[int, Gt(1)] | None = None
    # Whether the rank of every weight matrix is taken: minutes for a model of a billion parameters.
    weights: bool = True
    # Sequences or cases that go through the model at once.
    batch: Annotated[int, Gt(0)] = 64
    # Longer sequences are cut.
    context_tokens: Annotated[int, Gt(1)] = 512


def evaluate(scoring: Scoring) -> list[Row]:
    """Rows as the file's text says; n is points, classes, vectors, texts or matrices, whatever was counted.

    Raises:
        AssayError: the rows of the data set are no cases or no sequences for this model, or hold fewer than two points.
    """
    from methods.architectures import class_vectors, output_layer

    config, model = scoring.config, scoring.model()
    layer = output_layer(model)
    points = collect(scoring, config.data, config.points)
    centres = points if config.centres is None else _for_centres(scoring, config.centres)
    vectors = array(class_vectors(layer))
    nearest, scoring.notes["nearest_by"] = nearest_vectors(layer, points.features)
    rows = [
        *_standardised(points, config.components),
        *_features(points, nearest),
        *_vectors("class_vectors", vectors, config),
        *_centres(centres, vectors, config.constant),
        *_logits(points),
        *_texts(points, config.text_tokens),
        *(_weights(model, layer) if config.weights else ()),
        *_plane(vectors),
    ]
    embedding, quadruples = _embedding(model), _quadruples(scoring)
    if embedding is not None:
        rows += _vectors("embedding", array(embedding), config)
        for what, table in (("embedding", array(embedding)), ("class_vectors", vectors)):
            rows += [*_figure(config.data, what, table), *_parallelogram(config, what, table, quadruples)]
    written = {row.metric for row in rows}
    scoring.notes["not_defined"] = [metric for metric in OFTEN if metric not in written]
    return rows


def _for_centres(scoring: Scoring, data: str) -> Points:
    """All cases of a classifier: a class mean is of all that was trained on. A language model has too many tokens."""
    from methods.checkpoint import is_classifier

    everything = is_classifier(scoring.parents["model"])
    return collect(scoring, data, None if everything else scoring.config.points)


# --- spectra ---------------------------------------------------------------------------------------------------


def _variances(task: str, matrix: ndarray, components: int, standardised: bool) -> list[Row]:
    """The PCA numbers of vectors [N,d]; none where all are the same."""
    import numpy

    shares = _spectrum.ratios(matrix, components, standardised)
    if len(shares) == 0:
        return []
    count, total = len(matrix), numpy.cumsum(shares)
    rows = [
        Row(task, f"explained_variance_{k}", float(total[k - 1]), None, count, better="higher")
        for k in TOGETHER
        if k <= len(shares)
    ]
    rows += [
        Row(task, f"component_variance_{k}", float(shares[k - 1]), None, count)
        for k in ALONE
        if k <= len(shares)
    ]
    counted: dict[str, float] = {
        "components_90": _spectrum.components_for(shares, 0.90),
        "components_95": _spectrum.components_for(shares, 0.95),
        "effective_rank_ratios": _spectrum.effective_rank_ratios(shares),
        "participation_ratio": _spectrum.participation_ratio(shares),
    }
    return rows + [
        Row(task, name, float(value), None, count, better="lower") for name, value in counted.items()
    ]


def _standardised(points: Points, components: int) -> list[Row]:
    return _variances(f"features {points.task} standardised", points.features, components, standardised=True)


def _features(points: Points, nearest: ndarray) -> list[Row]:
    """Accuracies, and the ranks of the features as they are."""
    task, count = f"features {points.task}", len(points.features)
    right = _statistics.mean(points.predicted == points.labels)
    near = _statistics.mean(nearest == points.labels)
    rows = [
        Row(task, "accuracy", right.value, right.stderr, right.n, better="higher"),
        Row(task, "nearest_vector_accuracy", near.value, near.stderr, near.n, better="higher"),
    ]
    shares = _spectrum.ratios(points.features, MOST_SCORES)
    values = _spectrum.singular_values(points.features)
    rank = _spectrum.rankme_singular(values)
    rows.append(Row(task, "effective_rank_singular", _spectrum.effective_rank_singular(values), None, count))
    if len(shares):
        rows.append(Row(task, "rankme_eigen", _spectrum.rankme_eigen(shares), None, count))
    if rank is not None:
        rows.append(Row(task, "rankme_singular", rank, None, count))
    return rows + _power_law(task, shares, _spectrum.fitted_ranks(*points.features.shape))


def _power_law(task: str, shares: ndarray, ranks: tuple[int, int]) -> list[Row]:
    """``alpha_req`` and how much of the spectrum's logarithm the line explains."""
    found = _spectrum.alpha_req(shares, *ranks)
    if found is None:
        return []
    where = f"{task} ranks={ranks[0] + 1}-{ranks[1]}"
    return [
        Row(where, "alpha_req", found.alpha, None, ranks[1] - ranks[0]),
        Row(where, "alpha_req_fit", found.fit, None, ranks[1] - ranks[0], better="higher"),
    ]


def _logits(points: Points) -> list[Row]:
    rank = _spectrum.effective_rank_singular(_spectrum.singular_values(points.scores))
    task = f"logits {points.name} points={len(points.scores)}"
    return [Row(task, "effective_rank_singular", rank, None, len(points.scores))]


def _weights(model: Any, layer: Any) -> list[Row]:
    """The mean over all matrices between embedding and output layer; none where there is no such matrix."""
    ranks = [
        _spectrum.effective_rank_singular(_spectrum.singular_values(array(weight.flatten(1))))
        for weight in matrices(model, layer)
    ]
    if not ranks:
        return []
    found = _statistics.mean(ranks)
    task = f"weights matrices={found.n}"
    return [Row(task, "effective_rank_singular", found.value, found.stderr, found.n)]


def matrices(model: Any, layer: Any) -> list[Tensor]:
    """Weights of two or more dimensions that belong neither to an embedding nor to the output layer."""
    from torch import nn

    outside = {id(weight) for weight in layer.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            outside |= {id(weight) for weight in module.parameters()}
    return [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and id(weight) not in outside and "embed" not in name and "cls_token" not in name
    ]


def _texts(points: Points, tokens: int | None) -> list[Row]:
    """Of a language model means over its texts, of a classifier the numbers of its features as one text."""
    if not points.texts:
        return _as_texts(f"features {points.task}", [points.features], counted=len(points.features))
    lengths = [len(states) for states in points.texts]
    tokens = tokens or min((length for length in lengths if length > 1), default=2)
    chosen = [states[:tokens] for states in points.texts if len(states) >= tokens]
    if not chosen:
        raise AssayError(
            f"geometry: no text of {points.name} has text_tokens={tokens} tokens; the longest has {max(lengths)}."
        )
    return _as_texts(f"texts {points.name} tokens={tokens}", chosen)


def _as_texts(task: str, texts: Sequence[ndarray], counted: int | None = None) -> list[Row]:
    """Means over the texts [L,d] of which the measure is defined."""
    rows = []
    for name, measure in (
        ("matrix_nuclear_norm", _spectrum.matrix_nuclear_norm),
        ("matrix_entropy", _spectrum.matrix_entropy),
    ):
        values = [value for value in map(measure, texts) if value is not None]
        if values:
            found = _statistics.mean(values)
            rows.append(Row(task, name, found.value, found.stderr, counted or found.n))
    return rows


# --- vectors ---------------------------------------------------------------------------------------------------


def _embedding(model: Any) -> Tensor | None:
    """The token embedding [V,d]; None for a model that reads no tokens."""
    from torch import nn

    from methods.architectures import unwrapped

    inner = unwrapped(model)
    if getattr(inner, "main_input_name", "input_ids") != "input_ids":
        return None
    module = inner.get_input_embeddings()
    return module.weight if isinstance(module, nn.Embedding) else None


def _vectors(what: str, vectors: ndarray, config: Config) -> list[Row]:
    """PCA numbers of vectors [V,d] as they are, and their Frobenius norm."""
    import numpy

    task, count = f"{what} vectors={len(vectors)}", len(vectors)
    values = _spectrum.singular_values(vectors)
    return [
        *_variances(task, vectors, config.components, standardised=False),
        Row(task, "effective_rank_singular", _spectrum.effective_rank_singular(values), None, count),
        Row(task, "norm", float(numpy.sqrt((values**2).sum())), None, count),
    ]


def _figure(data: str, what: str, vectors: ndarray) -> list[Row]:
    """How close the vectors of an arithmetic task's tokens come to its figure."""
    figure = _crystal.figure_of(data)
    if figure is None or len(vectors) < _crystal.tokens(figure):
        return []
    value = _crystal.score(vectors, figure)
    better: Any = "higher" if figure.name == "permutation" else "lower"
    return [] if value is None else [Row(f"{what} vectors={len(vectors)}", figure.name, value, better=better)]


def _quadruples(scoring: Scoring) -> list[tuple[int, ...]]:
    """Tokens e0, e1, e2, e3 with e0 - e1 = e2 - e3 where vectors are parallelograms: a lattice's rows, or given words.

    Raises:
        AssayError: rows without four words, a model that reads no words, or no row whose words are one token each.
    """
    from methods.checkpoint import is_classifier

    config = scoring.config
    if config.quadruples is None:
        figure = _crystal.figure_of(config.data)
        if figure is None or figure.name != "lattice":
            return []
        # The answer to a, b, c is d = b + c - a.
        return [(*row["tokens"], row["label"]) for row in scoring.data.rows(config.data)]
    if is_classifier(scoring.parents["model"]):
        raise AssayError(
            "geometry: quadruples are of words, which a classifier does not read; leave them out."
        )
    return _words(scoring.data.rows(config.quadruples), scoring.tokenizer(), config.quadruples)


def _words(rows: Sequence[Any], tokenizer: Any, data: str) -> list[tuple[int, ...]]:
    found = []
    for number, row in enumerate(rows):
        words = row.get("words")
        if not isinstance(words, (list, tuple)) or len(words) != 4:
            raise AssayError(f"geometry: row {number} of {data} needs a column words with four words.")
        tokens = [_token(tokenizer, str(word)) for word in words]
        if None not in tokens:
            found.append(tuple(token for token in tokens if token is not None))
    if not found:
        raise AssayError(
            f"geometry: in no row of {data} each of the four words is one token of this model; take other words."
        )
    return found


def _token(tokenizer: Any, word: str) -> int | None:
    """The only token of a word, inside a text if it can be; None where it takes several."""
    for text in (f" {word}", word):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return int(ids[0])
    return None


def _parallelogram(
    config: Config, what: str, vectors: ndarray, quadruples: Sequence[tuple[int, ...]]
) -> list[Row]:
    """The mean error in the first two components; none without quadruples."""
    value = _crystal.parallelogram(vectors, quadruples, scale=config.scale)
    if value is None:
        return []
    task = f"{what} vectors={len(vectors)} quadruples={config.quadruples or config.data} scale={config.scale}"
    return [Row(task, "parallelogram", value, None, len(_crystal.telling(quadruples)), better="lower")]


def _plane(vectors: ndarray) -> list[Row]:
    """Where each class vector lies in the plane of the first two components, for a picture."""
    if len(vectors) > MOST_PICTURED:
        return []
    return [
        Row(f"class {number}", f"pc{axis + 1}", float(point[axis]))
        for number, point in enumerate(_spectrum.plane(vectors))
        for axis in range(2)
    ]


# --- class vectors against the data ----------------------------------------------------------------------------


def nearest_vectors(layer: Any, features: ndarray) -> tuple[ndarray, str]:
    """The nearest class vector of each point [N], and the name of the distance: the head's own or Euclid's."""
    import numpy
    import torch

    from methods.architectures import class_vectors

    weight = class_vectors(layer)
    closeness, name = _closeness(layer)
    points = torch.from_numpy(features).to(weight.device)
    with torch.no_grad():
        found = [array(closeness(block)).argmax(axis=1) for block in points.split(AT_ONCE)]
    return numpy.concatenate(found), name


def _closeness(layer: Any) -> tuple[Callable[[Tensor], Tensor], str]:
    """From points [N,d] to something [N,V] that is the greater the nearer a class vector lies, and its name."""
    from methods.architectures import class_vectors
    from methods.head import Harmonic

    options = getattr(layer, "options", None)
    if not isinstance(options, Harmonic):
        vectors = class_vectors(layer).double()
        # Of -|x - w|^2 what depends on w.
        return lambda x: x.double() @ vectors.T - vectors.square().sum(-1) / 2, "euclidean"
    # What a head makes of its distances afterwards is none of them: above all the inverted sign.
    plain = replace(options, legacy_sign=False, floor=0.0, smoothing=0.0)
    noise = {"training": False} if layer.noise else {}
    return lambda x: layer.scores(plain, x, layer.weight, **noise, **layer.further()), layer.head["name"]


def _centres(points: Points, vectors: ndarray, constant: float) -> list[Row]:
    """How the class vectors lie to the means of their classes."""
    import numpy

    classes = numpy.unique(points.labels)
    wide = points.features.astype(numpy.float64)
    means = numpy.stack([wide[points.labels == label].mean(axis=0) for label in classes])
    own = vectors[classes].astype(numpy.float64)
    task = f"centres {points.task} classes={len(classes)}"
    rows = [
        Row(task, name, found.value, found.stderr, found.n, better=better)
        for name, found, better in _compared(own, means)
    ]
    return rows + _on_constants(task, wide, vectors, constant)


def _compared(own: ndarray, means: ndarray) -> Iterator[tuple[str, _statistics.Estimate, Any]]:
    """Correlation and relative distance of class vectors and class means [K,d]."""
    import numpy

    correlations = [r for r in map(correlation, own, means) if r is not None]
    if correlations:
        yield "centre_correlation", _statistics.mean(correlations), "higher"
    size = float(numpy.linalg.norm(means))
    if size > 0:
        distance = float(numpy.linalg.norm(own - means)) / size
        yield "centre_distance", _statistics.Estimate(distance, None, len(own)), "lower"


def correlation(one: ndarray, other: ndarray) -> float | None:
    """Pearson's r of two vectors [d]; None where all coordinates of one of them are the same."""
    import numpy

    first, second = one - one.mean(), other - other.mean()
    sizes = float(numpy.linalg.norm(first)), float(numpy.linalg.norm(second))
    smallest = [_spectrum.ROUNDING * float(numpy.abs(vector).max()) for vector in (one, other)]
    if sizes[0] <= smallest[0] or sizes[1] <= smallest[1]:
        return None
    return float(first @ second) / (sizes[0] * sizes[1])


def _on_constants(task: str, features: ndarray, vectors: ndarray, constant: float) -> list[Row]:
    """The weights where the features tell nothing: only a head that looks at distances has a reason to clear them."""
    import numpy

    flat = features.std(axis=0) <= constant
    where = f"{task} constant={constant:g}"
    rows = [Row(where, "constant_coordinates", float(flat.sum()), None, features.shape[1])]
    if flat.any():
        size = math.sqrt(float((vectors[:, flat].astype(numpy.float64) ** 2).mean()))
        rows.append(Row(where, "constant_weight_rms", size, None, int(flat.sum()), better="closer_to_0"))
    return rows
