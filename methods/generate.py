"""What a model writes by itself: prompts as in training, batches, a key-value cache, and any way to choose a token.

``REVISION`` counts for stages; that of ``evaluations._likelihood`` covers this file for evaluations, so a change of
what comes out raises both. ``B`` is sequences, ``T`` positions, ``V`` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example, Style

REVISION = 1

# From the logits [B,V] of a step, and its number, to the tokens [B] that are written.
Choose = Callable[["Tensor", int], "Tensor"]


def batches(lengths: Sequence[int], batch: int) -> Iterable[list[int]]:
    """Indices in batches of at most ``batch``, longest first, ties in the order given."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[start : start + batch] for start in range(0, len(order), batch))


def prompt_of(pair: Example) -> tuple[int, ...]:
    """The prompt of an encoded pair: what comes before its first label, tokenised exactly as in training."""
    return pair.input_ids[: len(pair.labels) - sum(label != -100 for label in pair.labels)]


def ends_of(model: Any, tokenizer: Any, style: Style) -> set[int]:
    """Ids that end an answer: what the style ends one with, and what the model's generation settings name."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, (list, tuple)) else [configured]
    return {int(end) for end in (*several, style.answer_end(tokenizer)[-1]) if end is not None}


def greedily(logits: Tensor, step: int) -> Tensor:
    """The likeliest token."""
    return logits.argmax(-1)


def continued(
    model: Any, inputs: Tensor, mask: Tensor, new_tokens: int, ends: set[int], choose: Choose = greedily
) -> list[list[int]]:
    """What follows left-padded ``inputs`` [B,T]; the end mark is not returned."""
    import torch

    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    end_ids = torch.tensor(sorted(ends), device=inputs.device)
    done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    steps, cache = [], None
    for step in range(new_tokens):
        output = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        token = choose(output.logits[:, -1], step)
        steps.append(token)
        done |= torch.isin(token, end_ids)
        if bool(done.all()):
            break
        inputs, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return [_until(row, ends) for row in torch.stack(steps, 1).tolist()]


def left_padded(rows: Sequence[Sequence[int]], padding_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B,T] of prompts of any lengths."""
    import torch

    width = max(len(row) for row in rows)
    inputs = torch.tensor([[padding_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return inputs, mask


def _until(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
