"""What a model writes by itself: prompts as in training, batches, a key-value cache, and any way to choose a token.

``REVISION`` counts for stages; that of ``evaluations._likelihood`` covers this file for evaluations, so a change of
what comes out raises both. ``B`` is sequences, ``T`` positions, ``V`` the vocabulary.

What is drawn depends on the row's own random numbers and on nothing else: ``drawn`` gives each row a stream made from
a text such as ``"seed/step/row"``, and ``Drawing`` inverts the distribution function at them. So it does not matter
which rows are written together, or whether a run was resumed.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example, Style
    from methods.stage import Stage

REVISION = 1


@dataclass
class Cost:
    """What was written within a stage and what that took, over all attempts; kWh only where energy is metered."""

    tokens: int = 0
    seconds: float = 0.0
    kwh: float | None = None

    @contextmanager
    def metered(self, stage: Stage) -> Iterator[None]:
        """Add what is used within."""
        before, start = stage.spent().get("kwh"), perf_counter()
        yield
        self.seconds += perf_counter() - start
        if before is not None:
            self.kwh = (self.kwh or 0.0) + stage.spent()["kwh"] - before

    def notes(self) -> dict[str, float]:
        """As the record of the stage has them."""
        found = {"generated_tokens": self.tokens, "generation_seconds": self.seconds}
        return found if self.kwh is None else found | {"generation_kwh": self.kwh}


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


def drawn(streams: Sequence[str], temperature: float = 1.0, top_p: float = 1.0) -> Choose:
    """How the tokens of rows are drawn, each row from the stream of random numbers that its text stands for.

    Args:
        temperature: divides the logits; 0: the likeliest token, and nothing is drawn.
        top_p: draw among the likeliest tokens alone that together reach this mass; 1: among all.
    """
    if temperature == 0:
        return greedily
    return Drawing([random.Random(text).random for text in streams], temperature, top_p)


class Drawing:
    """Draws tokens by inverting each row's distribution function at a random number of its own, one a step."""

    def __init__(
        self, numbers: Sequence[Callable[[], float]], temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        self.numbers, self.temperature, self.top_p = numbers, temperature, top_p

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """From the logits [B,V] of a step to tokens [B]."""
        import torch

        # In float32 a sum over a large vocabulary is coarser than the mass of its rarer tokens.
        chances = (logits.double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            chances = nucleus(chances, self.top_p)
        sums = chances.cumsum(-1)
        heights = sums[:, -1:] * sums.new_tensor([[number()] for number in self.numbers])
        tokens = torch.searchsorted(sums, heights, right=True)
        return tokens.clamp(max=sums.shape[-1] - 1).squeeze(-1)


def nucleus(chances: Tensor, top_p: float) -> Tensor:
    """Probabilities [B,V] with 0 outside the likeliest tokens that together reach ``top_p``; the first always stays.

    Holtzman et al., "The Curious Case of Neural Text Degeneration". Not divided by what is left.
    """
    sorted_chances, order = chances.sort(dim=-1, descending=True, stable=True)
    before = sorted_chances.cumsum(-1) - sorted_chances
    kept = sorted_chances.masked_fill(before >= top_p, 0.0)
    return chances.new_zeros(chances.shape).scatter(-1, order, kept)


class Mixed:
    """Models that write one text together: log sum_k share_k softmax(z_k / temperature), each with its own cache.

    It is called as a model is, for ``continued``, and answers with the log-probabilities [B,1,V] of the last position.
    One model alone is a mixture, too. A model without a share is never run.

    Args:
        shares: of each model; they add up to 1.
        entries: of the vocabulary, where the models' are padded differently; None: all.
    """

    def __init__(
        self,
        models: Sequence[Any],
        shares: Sequence[float],
        temperature: float = 1.0,
        entries: int | None = None,
    ) -> None:
        assert math.isclose(sum(shares), 1.0), shares
        self.parts = [(model, share) for model, share in zip(models, shares, strict=True) if share > 0]
        self.temperature, self.entries = temperature, entries

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Sequence[Any] | None,
        use_cache: bool,
    ) -> Any:
        import torch

        caches = past_key_values or [None] * len(self.parts)
        answers = [
            model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=use_cache,
                **_last_alone(model),
            )
            for (model, _), cache in zip(self.parts, caches, strict=True)
        ]
        each = [
            self._log_chances(answer.logits[:, -1:]) + math.log(share)
            for answer, (_, share) in zip(answers, self.parts, strict=True)
        ]
        logits = each[0] if len(each) == 1 else torch.stack(each).logsumexp(0)
        return SimpleNamespace(logits=logits, past_key_values=[answer.past_key_values for answer in answers])

    def _log_chances(self, logits: Tensor) -> Tensor:
        from methods.terms import widen

        chances: Tensor = (widen(logits[..., : self.entries]) / self.temperature).log_softmax(-1)
        return chances


def _last_alone(model: Any) -> dict[str, int]:
    """The prompt's logits [B,T,V] would be the largest tensor of all, and only its last position is read."""
    known = inspect.signature(model.forward).parameters if hasattr(model, "forward") else {}
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def continued(
    model: Any,
    inputs: Tensor,
    mask: Tensor,
    new_tokens: int,
    ends: set[int],
    choose: Choose = greedily,
    with_end: bool = False,
) -> list[list[int]]:
    """What follows left-padded ``inputs`` [B,T], up to the first end mark: without it, or ``with_end``."""
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
    return [_until(row, ends, with_end) for row in torch.stack(steps, 1).tolist()]


def left_padded(rows: Sequence[Sequence[int]], padding_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B,T] of prompts of any lengths."""
    import torch

    width = max(len(row) for row in rows)
    inputs = torch.tensor([[padding_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return inputs, mask


def _until(row: list[int], ends: set[int], with_end: bool) -> list[int]:
    return row[: next((i + with_end for i, token in enumerate(row) if token in ends), len(row))]
