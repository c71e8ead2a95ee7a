"""Membership inference: can one tell from the model what it was trained on?

Each attack gives a row a score that is high where the model does not know it; ``members`` are rows the model was
trained on (for an unlearned model: was to forget), ``others`` rows it never saw.

* ``loss``: mean token loss (Yeom et al. 2018, "Privacy Risk in Machine Learning").
* ``min_k``: mean loss of the ``share`` least likely tokens, at least one (Shi et al. 2023, "Detecting Pretraining
  Data from Large Language Models").
* ``min_k_plus_plus``: the same mean of log-probabilities standardised by mean and variance of the log-probability
  under the model's own distribution, the variance at least 1e-6 (Zhang et al. 2024, "Min-K%++").
* ``zlib``: mean token loss over the bytes of the compressed answer (Carlini et al. 2021, "Extracting Training Data
  from Large Language Models").
* ``reference``: mean token loss less that of ``reference`` (same paper).
* ``gradnorm``: the 2-norm of the loss's gradient, a mean over parameter tensors. Two tied matrices are one.

Definitions follow locuslab/open-unlearning: the end mark counts in the mean losses of ``loss``, ``zlib`` and
``reference``, while ``min_k``, ``min_k_plus_plus`` and ``gradnorm`` leave the last token out; an answer of one token
has no such score and is left out, where the official code gives it 0. ``gradnorm`` is taken in evaluation mode: the
official code switches to training mode, where dropout, if the model has any, would make it a random number.

For each attack: ``*_auc``, the probability that an unseen row scores above a member (1: known by heart, 0.5: no trace,
below 0.5: members are *less* likely than unseen rows, a trace, too), with DeLong's standard error;
``*_auc_low`` and ``*_auc_high``, its 95 % interval by Newcombe's score method, which unlike the standard error means
something at 0 and 1; ``*_tpr_at_1_percent`` and ``*_tpr_at_5_percent``, the members found where at most that share of
the others is taken for members. ``reference`` should be a model trained without the members: then ``privleak``
compares the ``min_k`` areas of the two, in percent: below 0 the members still show, above 0 they stand out as
removed (Shi et al. 2024, "MUSE: Machine Unlearning Six-Way Evaluation for Language Models").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Le

from evaluations import _membership
from evaluations._reference import check_tokenizer
from methods.stage import AssayError, Dataset, Model, Row, Scoring

if TYPE_CHECKING:
    from numpy import ndarray

    from evaluations._likelihood import Answer
    from evaluations._statistics import Estimate
    from methods.data import Example, Locator

USES = (
    "methods.data",
    "methods.terms",
    "methods.world",
    "methods.checkpoint",
    "evaluations._likelihood",
    "evaluations._membership",
    "evaluations._reference",
    "evaluations._statistics",
    "evaluations._unlearning",
)

Attack = Literal["loss", "min_k", "min_k_plus_plus", "zlib", "reference", "gradnorm"]
FALSE_POSITIVES = {"1": 0.01, "5": 0.05}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which rows, under which attacks."""

    # Rows the model was trained on or was to forget: question and answer, or text.
    members: Dataset = "authors/forget10_perturbed"
    # Rows of the same kind that no model was trained on.
    others: Dataset = "authors/holdout_perturbed"
    # How a row is scored; "reference" needs the option of that name.
    attacks: tuple[Attack, ...] = ("loss", "min_k", "min_k_plus_plus", "zlib", "gradnorm")
    # Share of an answer's least likely tokens that min_k and min_k_plus_plus look at (open-unlearning's TOFU recipe).
    share: Annotated[float, Gt(0), Le(1)] = 0.4
    # A model trained without the members, with the same tokenizer; for the attack "reference" and for privleak.
    reference: Model | None = None
    # Sequences scored at once.
    batch: Annotated[int, Gt(0)] = 64
    # First rows of each set that are used; None for all.
    limit: Annotated[int, Gt(0)] | None = None
    # Longer sequences are cut.
    context_tokens: Annotated[int, Gt(1)] = 512


@dataclass
class Evidence:
    """What is known of N rows: their tokens, and how likely the model and the reference find them."""

    examples: list[Example]
    answers: list[Answer]
    reference: list[Answer]


def check(config: Config, data: Locator) -> None:
    """Refuse sets that share rows, and attacks that lack what they compare with."""
    if not config.attacks or len(set(config.attacks)) < len(config.attacks):
        raise AssayError("membership: attacks has to name at least one attack, and each only once.")
    if "reference" in config.attacks and config.reference is None:
        raise AssayError(
            "membership: the attack 'reference' compares with another model; name it with reference=…, or leave the "
            "attack out."
        )
    if config.reference is not None and not {"reference", "min_k"} & set(config.attacks):
        raise AssayError(
            "membership: none of the attacks looks at the reference; add 'reference' or 'min_k' to attacks."
        )
    _membership.check(data, config.members, config.others)


def evaluate(scoring: Scoring) -> list[Row]:
    """Five rows for each attack, and ``privleak`` where there is a reference."""
    config = scoring.config
    # At smoke scale one stand-in may replace both sets.
    if not scoring.data.smoke:
        check(config, scoring.data)
    members, others = (_evidence(scoring, name) for name in (config.members, config.others))
    rows = []
    for attack in config.attacks:
        found = (_scores(scoring, attack, members), _scores(scoring, attack, others))
        rows += _attacked(attack, *found)
    if config.reference is not None and "min_k" in config.attacks:
        rows.append(("privleak", _leak(config, members, others), "%", "closer_to_0"))
    return [_row(config, *row) for row in rows]


# --- what is looked at -----------------------------------------------------------------------------------------


def _evidence(scoring: Scoring, name: str) -> Evidence:
    from evaluations._likelihood import score
    from methods.data import Style, padding_id

    config, tokenizer = scoring.config, scoring.tokenizer()
    rows = _membership.rows_of(scoring.data, name, config.limit)
    style = Style.read(scoring.parents["model"])
    examples = _membership.encoded(rows, name, tokenizer, style, config.context_tokens)
    padding, plus = padding_id(tokenizer), "min_k_plus_plus" in config.attacks
    answers = score(scoring.model(), examples, padding, config.batch, standardized=plus)
    _refuse_not_finite(answers, name)
    if config.reference is None:
        return Evidence(examples, answers, [])
    check_tokenizer(scoring, "reference")
    reference = scoring.reference("reference")
    return Evidence(examples, answers, score(reference, examples, padding, config.batch))


def _refuse_not_finite(answers: Sequence[Answer], name: str) -> None:
    import numpy as np

    for number, answer in enumerate(answers):
        if not np.isfinite(answer.losses).all():
            raise AssayError(f"the model's loss on row {number} of {name} is not a finite number.")


def _scores(scoring: Scoring, attack: Attack, rows: Evidence) -> ndarray:
    """The score of each row [N]: high for one the model does not know."""
    import numpy as np

    share = scoring.config.share
    if attack == "min_k":
        return _membership.min_k(rows.answers, share)
    if attack == "min_k_plus_plus":
        return _membership.min_k_plus_plus(rows.answers, share)
    if attack == "zlib":
        return _membership.zlib_ratio(rows.answers, _texts(scoring.tokenizer(), rows.examples))
    if attack == "reference":
        return _membership.less_than_reference(rows.answers, rows.reference)
    if attack == "gradnorm":
        return _membership.gradient_norms(scoring.model(), rows.examples)
    return np.array([answer.loss for answer in rows.answers])


def _texts(tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """What is scored of each row, as text."""
    from methods.data import IGNORED

    targets = [[label for label in example.labels if label != IGNORED] for example in examples]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in targets]


# --- rows ------------------------------------------------------------------------------------------------------

Measured = tuple[str, "Estimate", str, str]


def _attacked(attack: str, members: ndarray, others: ndarray) -> list[Measured]:
    import numpy as np

    from evaluations._statistics import Estimate

    area = _membership.area(members, others)
    ends = _membership.interval(area.value, *(int((~np.isnan(side)).sum()) for side in (members, others)))
    rows: list[Measured] = [(f"{attack}_auc", area, "", "")]
    for name, end in zip(("low", "high"), ends, strict=True):
        rows.append((f"{attack}_auc_{name}", Estimate(end, None, area.n), "", ""))
    for name, share in FALSE_POSITIVES.items():
        rate = _membership.true_positive_rate(members, others, share)
        rows.append((f"{attack}_tpr_at_{name}_percent", rate, "", "lower"))
    return rows


def _leak(config: Config, members: Evidence, others: Evidence) -> Estimate:
    sides = (members, others)
    found = tuple(_membership.min_k(side.answers, config.share) for side in sides)
    retained = tuple(_membership.min_k(side.reference, config.share) for side in sides)
    return _membership.privacy_leak((found[0], found[1]), (retained[0], retained[1]))


def _row(config: Config, metric: str, estimate: Estimate, unit: str, better: Any) -> Row:
    settings = [f"others={config.others}", f"share={config.share}", f"context_tokens={config.context_tokens}"]
    if config.limit is not None:
        settings.append(f"limit={config.limit}")
    task = " ".join([config.members, *settings])
    return Row(task, metric, estimate.value, estimate.stderr, estimate.n, unit, better)
