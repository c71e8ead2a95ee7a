"""Membership inference: which of two sets of rows a model was trained on, told from a score of each row.

A score is high for a row the model does not know. The area under the ROC curve is the probability that a row of
``others`` scores above one of ``members``: 1 means that the members are known by heart, 0.5 that the two cannot be
told apart. ``N`` members, ``M`` others; rows without a score (NaN) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evaluations import _unlearning
from evaluations._statistics import Estimate
from methods.stage import AssayError

if TYPE_CHECKING:
    from numpy import ndarray

    from evaluations._likelihood import Answer
    from methods.data import Example, Locator, Style

REVISION = 1
# Standard normal quantile of a 95 % interval.
QUANTILE = 1.959963984540054


# --- rows ------------------------------------------------------------------------------------------------------


def rows_of(data: Locator, name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a data set without the blank lines of a text; a sentence if none are left or an answer is empty."""
    rows = [row for row in data.rows(name) if "text" not in row or str(row["text"]).strip()]
    if not rows:
        raise AssayError(f"the data set {name} has no rows: there is nothing to score.")
    for number, row in enumerate(rows):
        if "answer" in row and not str(row["answer"]).strip():
            raise AssayError(f"{name}: the answer of row {number} is empty; fill it in or take the row out.")
    return rows[:limit]


def check(data: Locator, members: str, others: str) -> None:
    """Refuse two sets that share rows, or of which one has questions and the other texts."""
    sets = {name: rows_of(data, name) for name in (members, others)}
    if _paired(sets[members], members) != _paired(sets[others], others):
        raise AssayError(
            f"members={members!r} and others={others!r} have to be of one kind: question and answer, or text."
        )
    places = {identity(row): number for number, row in enumerate(sets[others])}
    shared = [number for number, row in enumerate(sets[members]) if identity(row) in places]
    if shared:
        row = sets[members][shared[0]]
        raise AssayError(
            f"{len(shared)} of the {len(sets[members])} rows of members={members!r} stand in others={others!r}, too; "
            f"{identity(row)[0][:60]!r} is row {shared[0]} of the first and row {places[identity(row)]} of the "
            "second: others are rows that the model was never trained on."
        )


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes two rows the same: question and answer, or the text."""
    return tuple(str(row[column]).strip() for column in ("question", "answer", "text") if column in row)


def _paired(rows: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether rows are questions with answers; a sentence where they are no texts either."""
    if all("question" in row and "answer" in row for row in rows):
        return True
    if not all("text" in row for row in rows):
        columns = sorted({column for row in rows for column in row})
        raise AssayError(
            f"{name} needs rows with a question and an answer, or with a text, and all the same; these have: "
            f"{', '.join(columns)}."
        )
    return False


def encoded(
    rows: Sequence[dict[str, Any]], name: str, tokenizer: Any, style: Style, context_tokens: int
) -> list[Example]:
    """One example for each row: the answer to a question, or as much of a text as the context holds.

    A text is read as in training, with a line break at its end; its first token has nothing before it unless the
    tokenizer begins a text with a token of its own, and is not scored.
    """
    from methods.data import encode_pairs

    if _paired(rows, name):
        return encode_pairs(rows, tokenizer, style, context_tokens)
    return [_text(row, f"{name}: row {number}", tokenizer, context_tokens) for number, row in enumerate(rows)]


def _text(row: dict[str, Any], place: str, tokenizer: Any, context_tokens: int) -> Example:
    from methods.data import IGNORED, encode_text

    try:
        example = encode_text([row], tokenizer, context_tokens)[0]
    except AssayError as error:
        raise AssayError(f"{place}: {error}") from None
    return replace(example, labels=(IGNORED, *example.labels[1:]))


# --- scores ----------------------------------------------------------------------------------------------------


def min_k(answers: Sequence[Answer], share: float = 0.4, least: int = 1) -> ndarray:
    """Min-K scores, one for each row."""
    import numpy as np

    return np.array([_unlearning.min_k(answer.losses, share, least) for answer in answers])


def min_k_plus_plus(answers: Sequence[Answer], share: float = 0.4) -> ndarray:
    """Min-K++ scores of answers with standardised log-probabilities: the same mean over the lowest of those."""
    import numpy as np

    found = [answer.standardized for answer in answers]
    return np.array([_unlearning.min_k(-values, share) for values in found if values is not None])


def zlib_ratio(answers: Sequence[Answer], texts: Sequence[str]) -> ndarray:
    """Mean token loss over the length in bytes of the compressed answer."""
    import zlib

    import numpy as np

    sizes = [len(zlib.compress(text.encode("utf-8"))) for text in texts]
    return np.array([answer.loss / size for answer, size in zip(answers, sizes, strict=True)])


def less_than_reference(answers: Sequence[Answer], reference: Sequence[Answer]) -> ndarray:
    """Mean token loss less that of the reference."""
    import numpy as np

    return np.array([one.loss - other.loss for one, other in zip(answers, reference, strict=True)])


def gradient_norms(model: Any, examples: Sequence[Example]) -> ndarray:
    """Norm of the gradient of each row's loss, a mean over parameter tensors; the last token is left out.

    Nothing stays on the model: which of its weights ask for a gradient, and the gradients it holds, are as before.
    """
    import numpy as np

    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    asking = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        return np.array([_gradient_norm(model, weights, example) for example in examples])
    finally:
        for weight, asked in zip(weights, asking, strict=True):
            weight.requires_grad_(asked)


def _gradient_norm(model: Any, weights: Sequence[Any], example: Example) -> float:
    import torch

    from methods import terms
    from methods.data import collate

    part = collate([example], 0, "row").to(model.device)
    with torch.enable_grad():
        outputs = terms.forward(model, part)
        losses = terms.token_nll(outputs)[outputs.mask][:-1]
        if not len(losses):
            return float("nan")
        gradients: Any = torch.autograd.grad(losses.mean(), weights, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return float(torch.stack(norms).mean())


# --- areas and rates -------------------------------------------------------------------------------------------


def area(members: ndarray, others: ndarray) -> Estimate:
    """Area under the ROC curve; standard error by DeLong, DeLong and Clarke-Pearson (1988), None for a single row.

    Their variance is that of the placements: of each row, the share of the other set that lies on the right side.
    """
    members, others = _scored(members, "members"), _scored(others, "others")
    value = _unlearning.area_under_curve(members, others)
    spread = _standard_error(*placements(members, others))
    return Estimate(value, spread, len(members) + len(others))


def placements(members: ndarray, others: ndarray) -> tuple[ndarray, ndarray]:
    """(share of others above each member [N], share of members below each of the others [M]); a tie is half."""
    import numpy as np

    def below(values: ndarray, among: ndarray) -> ndarray:
        ordered = np.sort(among)
        sides = [np.searchsorted(ordered, values, side) for side in ("left", "right")]
        return (sides[0] + sides[1]) / 2 / len(among)

    return 1.0 - below(members, others), below(others, members)


def _standard_error(of_members: ndarray, of_others: ndarray) -> float | None:
    if min(len(of_members), len(of_others)) < 2:
        return None
    variance = of_members.var(ddof=1) / len(of_members) + of_others.var(ddof=1) / len(of_others)
    return float(variance) ** 0.5


def interval(area: float, members: int, others: int) -> tuple[float, float]:
    """95 % interval of an area by a score method, the fifth of Newcombe's.

    Newcombe (2006), "Confidence intervals for an effect size measure based on the Mann-Whitney statistic. Part 2".
    The ends are the areas that lie ``QUANTILE`` of *their own* standard errors from the one found. So it stays
    within 0 and 1, and is no point where every row is told apart and the standard error is 0.
    """
    from scipy.optimize import brentq

    def excess(true: float) -> float:
        return (area - true) ** 2 - QUANTILE**2 * _variance(true, members, others)

    nearly = 1e-12
    low = brentq(excess, 0.0, area - nearly) if area > nearly else 0.0
    high = brentq(excess, area + nearly, 1.0) if area < 1.0 - nearly else 1.0
    return float(low), float(high)


def _variance(area: float, members: int, others: int) -> float:
    """Hanley and McNeil's variance, their two numbers of rows replaced by the mean of both (Newcombe)."""
    further = (members + others) / 2 - 1
    spread = 1 + further * ((1 - area) / (2 - area) + area / (1 + area))
    return area * (1 - area) * spread / (members * others)


def true_positive_rate(members: ndarray, others: ndarray, false_positives: float) -> Estimate:
    """Share of members below the threshold that at most that share of the others fall below.

    With fewer than ``1 / false_positives`` others none may fall below it. The standard error is that of a share of
    the members, the threshold taken as given.
    """
    import numpy as np

    from evaluations import _statistics

    members, others = _scored(members, "members"), _scored(others, "others")
    # 0.05 * 60 is a little below 3
    allowed = int(false_positives * len(others) + 1e-9)
    threshold = np.sort(others)[allowed]
    return _statistics.mean((members < threshold).astype(np.float64))


def privacy_leak(found: tuple[ndarray, ndarray], retained: tuple[ndarray, ndarray]) -> Estimate:
    """Privacy leak of (members, others) against the same rows' scores under a model that never saw the members.

    The standard error follows both areas by their slopes, row by row, so that what the two models find equally hard
    is not counted twice (DeLong's covariance).
    """
    both = [_scored_together(found[side], retained[side], side) for side in (0, 1)]
    areas = [_unlearning.area_under_curve(both[0][which], both[1][which]) for which in (0, 1)]
    value = _unlearning.privacy_leak(*areas)
    left = 1.0 - areas[1] + _unlearning.EPSILON
    slopes = (-100.0 / left, 100.0 * (left + areas[1] - areas[0]) / left**2)
    pairs = [placements(both[0][which], both[1][which]) for which in (0, 1)]
    influence = [slopes[0] * pairs[0][side] + slopes[1] * pairs[1][side] for side in (0, 1)]
    return Estimate(value, _standard_error(*influence), sum(len(side) for side in influence))


def _scored_together(one: ndarray, other: ndarray, side: int) -> tuple[ndarray, ndarray]:
    import numpy as np

    known = ~(np.isnan(one) | np.isnan(other))
    name = ("members", "others")[side]
    return _scored(one[known], name), _scored(other[known], name)


def _scored(values: ndarray, name: str) -> ndarray:
    import numpy as np

    known = values[~np.isnan(values)]
    if not len(known):
        raise AssayError(
            f"none of the {name} can be scored: the last token is left out, so an answer has to have two or more."
        )
    return known
