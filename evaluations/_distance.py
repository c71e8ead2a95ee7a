"""How far apart two models' next-token distributions are, at every token of the true answers.

p is the reference's distribution and q the model's, both over the whole vocabulary [V], in float64. A prompt is not
counted; ``N`` is the answer tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from evaluations import _statistics
from evaluations._reference import check_vocabulary
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

    from evaluations._statistics import Estimate
    from methods.data import Example, Part
    from methods.stage import Scoring

    # From the logits of the reference and of the model [N,V] to a value for each token [N].
    Measure = Callable[[Tensor, Tensor], Tensor]

REVISION = 1
# Tokens whose distributions are held in float64 at once: a large vocabulary's are a megabyte each.
TOKENS_AT_ONCE = 256


# --- measures --------------------------------------------------------------------------------------------------


def kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(p || q) in nats [N]."""
    from methods.terms import kl_divergence

    return kl_divergence(before, after)


def jensen_shannon(before: Tensor, after: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats [N]: 0 to ln 2, and finite whatever is impossible."""
    import torch

    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    first, second = (
        torch.where(log.isneginf(), 0.0, log.exp() * (log - log_m)).sum(-1) for log in (log_p, log_q)
    )
    # Of two equal distributions rounding would leave something like -1e-17.
    return ((first + second) / 2).clamp(min=0.0)


def total_variation(before: Tensor, after: Tensor) -> Tensor:
    """sum |p - q| / 2 [N], 0 to 1: the largest difference in the probability of any event."""
    return (before.softmax(-1) - after.softmax(-1)).abs().sum(-1) / 2


def top1_agreement(before: Tensor, after: Tensor) -> Tensor:
    """1 where both find the same token the most likely, else 0 [N]."""
    return (before.argmax(-1) == after.argmax(-1)).double()


# --- over a data set -------------------------------------------------------------------------------------------


def compare(scoring: Scoring, option: str, data: str, measures: Mapping[str, Measure]) -> dict[str, Estimate]:
    """Each measure between the reference ``option`` and the scored model, a mean over the answer tokens of ``data``.

    ``batch``, ``limit`` and ``context_tokens`` are those of the evaluation's config.

    Raises:
        AssayError: another tokenizer or vocabulary, or no rows.
    """
    from methods.generate import batches

    check_vocabulary(scoring, option)
    examples = _examples(scoring, data)
    sums: dict[str, list[float]] = {name: [] for name in measures}
    counts: list[int] = []
    for chosen in batches([len(example.input_ids) for example in examples], scoring.config.batch):
        part, found = _measured(scoring, option, [examples[i] for i in chosen], measures)
        counts += part.mask.sum(-1).tolist()
        for name, values in found.items():
            sums[name] += values
    return {name: _statistics.ratio(values, counts) for name, values in sums.items()}


def _examples(scoring: Scoring, data: str) -> list[Example]:
    from methods.data import Style, encode

    config = scoring.config
    rows = scoring.data.rows(data)[: config.limit]
    if not rows:
        raise AssayError(f"the data set {data} has no rows.")
    return encode(rows, scoring.tokenizer(), Style.read(scoring.parents["model"]), config.context_tokens)


def _measured(
    scoring: Scoring, option: str, examples: list[Example], measures: Mapping[str, Measure]
) -> tuple[Part, dict[str, list[float]]]:
    """The padded batch, and each measure summed over the answer tokens of each of its B sequences."""
    from methods import terms
    from methods.data import collate, padding_id

    model, reference = scoring.model(), scoring.reference(option)
    part = collate(examples, padding_id(scoring.tokenizer()), "answers").to(model.device)
    before, after = (terms.frozen(one, part).logits[part.mask] for one in (reference, model))
    return part, {
        name: _summed(measure, before, after, part.mask).tolist() for name, measure in measures.items()
    }


def _summed(measure: Measure, before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """From the logits of the N answer tokens [N,V] to the sums of B sequences [B]; ``mask`` [B,T-1] has N ones."""
    import torch

    pieces: list[Any] = [
        measure(some.double(), others.double())
        for some, others in zip(before.split(TOKENS_AT_ONCE), after.split(TOKENS_AT_ONCE), strict=True)
    ]
    each = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    each[mask] = torch.cat(pieces)
    return each.sum(-1)
