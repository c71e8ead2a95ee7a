"""How far a model has moved from a reference on what it should have kept.

``KL(reference || model)`` over the vocabulary, at every token of the true answers of a retain set (the prompt is
not counted): nats, a mean over tokens. 0 means that nothing changed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from evaluations import _statistics
from methods.stage import AssayError, Dataset, Model, Row, Scoring

if TYPE_CHECKING:
    from methods.data import Example

USES = (
    "methods.data",
    "methods.terms",
    "methods.world",
    "methods.checkpoint",
    "evaluations._likelihood",
    "evaluations._statistics",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model is compared with, and on what."""

    # The model before, usually the one that was unlearned or compressed.
    reference: Model
    # Question-answer rows whose answers should not have changed.
    data: Dataset = "authors/retain_perturbed"
    # Sequences scored at once.
    batch: Annotated[int, Gt(0)] = 64
    # First rows that are used; None for all.
    limit: Annotated[int, Gt(0)] | None = None
    # Longer sequences are cut.
    context_tokens: Annotated[int, Gt(0)] = 512


def evaluate(scoring: Scoring) -> list[Row]:
    """One row, ``kl``; n is the number of questions."""
    from evaluations._likelihood import batches
    from methods.data import Style, encode, padding_id

    config, tokenizer = scoring.config, scoring.tokenizer()
    rows = scoring.data.rows(config.data)[: config.limit]
    examples = encode(rows, tokenizer, Style.read(scoring.parents["model"]), config.context_tokens)
    model, reference = scoring.model(), scoring.reference("reference")
    _check_vocabularies(model.config.vocab_size, reference.config.vocab_size)
    pairs: list[tuple[float, int]] = []
    for chosen in batches([len(example.input_ids) for example in examples], config.batch):
        pairs += _divergences(model, reference, [examples[i] for i in chosen], padding_id(tokenizer))
    estimate = _statistics.ratio(*zip(*pairs, strict=True))
    task = config.data if config.limit is None else f"{config.data} limit={config.limit}"
    return [Row(task, "kl", estimate.value, estimate.stderr, estimate.n, "nats/token", "lower")]


def _check_vocabularies(model: int, reference: int) -> None:
    if model != reference:
        raise AssayError(
            f"retain_kl compares distributions over one vocabulary, but the reference has {reference} entries and the "
            f"model {model}; take a reference with the same tokenizer."
        )


def _divergences(
    model: Any, reference: Any, examples: list[Example], padding: int
) -> list[tuple[float, int]]:
    """(summed KL, tokens) of each example's answer."""
    from methods import terms
    from methods.data import collate

    part = collate(examples, padding, "retain").to(model.device)
    before, after = terms.frozen(reference, part).logits, terms.frozen(model, part).logits
    each = terms.kl_divergence(before.double(), after.double()).masked_fill(~part.mask, 0.0).sum(-1)
    return list(zip(each.tolist(), part.mask.sum(-1).tolist(), strict=True))
