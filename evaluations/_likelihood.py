"""How likely a model finds given answers, and what it writes by itself: batched, padded, deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

    from methods.data import Example, Part, Style

REVISION = 1


@dataclass(frozen=True)
class Answer:
    """One answer under teacher forcing: each of its n tokens' loss in nats, and whether the argmax was right.

    ``length`` counts the labels before the shift; it differs from n only if the very first label counts.
    """

    losses: ndarray
    correct: ndarray
    length: int

    @property
    def loss(self) -> float:
        """Mean loss of a token, in nats."""
        return float(self.losses.sum()) / self.length

    @property
    def probability(self) -> float:
        """exp(-loss): the geometric mean of the token probabilities."""
        return math.exp(-self.loss)

    def text_log_likelihood(self, end: int) -> float:
        """Log-likelihood of the answer without its ``end`` closing tokens, in nats: what multiple choice compares."""
        return -float(self.losses[: len(self.losses) - end].sum())


def answers(model: Callable[..., Any], part: Part) -> list[Answer]:
    """The answers of one padded batch [B,T], in its order."""
    from methods import terms

    outputs = terms.frozen(model, part)
    losses = terms.token_nll(outputs).double().cpu().numpy()
    correct = (outputs.logits.argmax(-1) == outputs.targets).cpu().numpy()
    mask, lengths = outputs.mask.cpu().numpy(), part.answer_lengths.tolist()
    return [Answer(losses[b][mask[b]], correct[b][mask[b]], int(lengths[b])) for b in range(len(losses))]


def score(model: Any, examples: Sequence[Example], padding_id: int, batch: int) -> list[Answer]:
    """The answers of all ``examples``, in their order; batches are made of sequences of similar length."""
    from methods.data import collate

    found: dict[int, Answer] = {}
    for chosen in batches([len(example.input_ids) for example in examples], batch):
        part = collate([examples[i] for i in chosen], padding_id, "answers").to(model.device)
        found.update(zip(chosen, answers(model, part), strict=True))
    return [found[i] for i in range(len(examples))]


def batches(lengths: Sequence[int], batch: int) -> Iterable[list[int]]:
    """Indices in batches of at most ``batch``, longest first, ties in the order given."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[start : start + batch] for start in range(0, len(order), batch))


def generate(
    model: Any, tokenizer: Any, style: Style, questions: Sequence[str], new_tokens: int, batch: int
) -> list[str]:
    """Greedy answers to ``questions``, cut at the end mark, without special tokens and outer blanks."""
    import torch

    from methods.data import encode_pairs, padding_id

    # The prompt is what comes before the first label of a pair, so it is tokenised exactly as in training.
    rows = [{"question": question, "answer": "a"} for question in questions]
    pairs = encode_pairs(rows, tokenizer, style, 1 << 30)
    prompts = [pair.input_ids[: len(pair.labels) - _tail(pair)] for pair in pairs]
    ends, texts = ends_of(model, tokenizer, style), {}
    for chosen in batches([len(prompt) for prompt in prompts], batch):
        inputs, mask = _left_padded([prompts[i] for i in chosen], padding_id(tokenizer))
        with torch.inference_mode():
            tokens = greedy(model, inputs.to(model.device), mask.to(model.device), new_tokens, ends)
        for i, row in zip(chosen, tokens, strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return [texts[i] for i in range(len(questions))]


def _tail(pair: Example) -> int:
    """Tokens of the answer and its end."""
    return sum(label != -100 for label in pair.labels)


def ends_of(model: Any, tokenizer: Any, style: Style) -> set[int]:
    """Ids that end an answer: what the style ends one with, and what the model's generation settings name."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, (list, tuple)) else [configured]
    return {int(end) for end in (*several, style.answer_end(tokenizer)[-1]) if end is not None}


def greedy(model: Any, inputs: Any, mask: Any, new_tokens: int, ends: set[int]) -> list[list[int]]:
    """Argmax continuation of left-padded ``inputs`` [B,T] with a key-value cache; the end mark is not returned."""
    import torch

    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    end_ids = torch.tensor(sorted(ends), device=inputs.device)
    done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    steps, cache = [], None
    for _ in range(new_tokens):
        output = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        token = output.logits[:, -1].argmax(-1)
        steps.append(token)
        done |= torch.isin(token, end_ids)
        if bool(done.all()):
            break
        inputs, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return [_until(row, ends) for row in torch.stack(steps, 1).tolist()]


def _until(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def _left_padded(rows: Sequence[Sequence[int]], padding_id: int) -> tuple[Any, Any]:
    import torch

    width = max(len(row) for row in rows)
    inputs = torch.tensor([[padding_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return inputs, mask
