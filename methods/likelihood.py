"""Likelihoods of fixed data under a frozen model, computed once before training instead of at every step.

Examples are scored in one order, whatever the batches will be, so a resumed run has the same bits; then the model is
no longer needed. ``methods.terms``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methods.data import Example


def target_nll(
    model: Any, examples: Sequence[Example], padding_id: int, size: int
) -> list[tuple[float, ...]]:
    """Nats of each target of each example (one fewer than it has tokens); 0 where the target does not count.

    Args:
        size: sequences that go through the model at once; neighbours in length share a batch, to save padding.
    """
    import torch

    from methods.data import collate
    from methods.terms import forward, token_nll

    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    found: dict[int, tuple[float, ...]] = {}
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            part = collate([examples[place] for place in chosen], padding_id, "scored").to(device)
            rows = token_nll(forward(model, part)).tolist()
            for place, row in zip(chosen, rows, strict=True):
                found[place] = tuple(row[: len(examples[place].input_ids) - 1])
    model.train(training)
    return [found[place] for place in range(len(examples))]


def with_extra(examples: Sequence[Example], name: str, values: Sequence[Sequence[float]]) -> list[Example]:
    """The examples with further numbers, one for each target."""
    return [
        replace(example, extra={**example.extra, name: tuple(row)})
        for example, row in zip(examples, values, strict=True)
    ]
