"""How likely a model finds given answers, and what it writes by itself: batched, padded, deterministic.

``REVISION`` covers ``methods.generate``, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.generate import batches, continued, ends_of, left_padded, prompt_of

if TYPE_CHECKING:
    from numpy import ndarray

    from methods.data import Example, Part, Style
    from methods.terms import Outputs

REVISION = 1


@dataclass(frozen=True)
class Answer:
    """One answer under teacher forcing: each of its n tokens' loss in nats, and whether the argmax was right.

    ``length`` counts the labels before the shift; it differs from n only if the very first label counts.
    ``standardized`` [n], where it was asked for, is each token's log-probability less the mean log-probability of
    the vocabulary under the model's own distribution, in standard deviations of the same.
    """

    losses: ndarray
    correct: ndarray
    length: int
    standardized: ndarray | None = None

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


def answers(model: Callable[..., Any], part: Part, standardized: bool = False) -> list[Answer]:
    """The answers of one padded batch [B,T], in its order."""
    from methods import terms

    outputs = terms.frozen(model, part)
    losses = terms.token_nll(outputs).double().cpu().numpy()
    correct = (outputs.logits.argmax(-1) == outputs.targets).cpu().numpy()
    mask, lengths = outputs.mask.cpu().numpy(), part.answer_lengths.tolist()
    each = _standardized(outputs) if standardized else [None] * len(losses)
    return [
        Answer(losses[b][mask[b]], correct[b][mask[b]], int(lengths[b]), each[b]) for b in range(len(losses))
    ]


def _standardized(outputs: Outputs) -> list[ndarray]:
    """(log p(y) - mean) / sqrt(max(variance, 1e-6)) of every target, row by row; moments over the vocabulary."""
    found = []
    for logits, targets, mask in zip(outputs.logits, outputs.targets, outputs.mask, strict=True):
        log_p = logits[mask].log_softmax(-1)
        p, chosen = log_p.exp(), log_p.gather(-1, targets[mask][:, None])
        # An entry of a padded vocabulary may be -inf: its probability is 0, and so is what it adds.
        log_p = log_p.masked_fill(p == 0, 0.0)
        mean = (p * log_p).sum(-1, keepdim=True)
        deviation = (p * (log_p - mean) ** 2).sum(-1, keepdim=True).clamp(min=1e-6).sqrt()
        found.append(((chosen - mean) / deviation).squeeze(-1).double().cpu().numpy())
    return found


def score(
    model: Any, examples: Sequence[Example], padding_id: int, batch: int, standardized: bool = False
) -> list[Answer]:
    """The answers of all ``examples``, in their order; batches are made of sequences of similar length."""
    from methods.data import collate

    found: dict[int, Answer] = {}
    for chosen in batches([len(example.input_ids) for example in examples], batch):
        part = collate([examples[i] for i in chosen], padding_id, "answers").to(model.device)
        found.update(zip(chosen, answers(model, part, standardized), strict=True))
    return [found[i] for i in range(len(examples))]


def generate(
    model: Any, tokenizer: Any, style: Style, questions: Sequence[str], new_tokens: int, batch: int
) -> list[str]:
    """Greedy answers to ``questions``, cut at the end mark, without special tokens and outer blanks."""
    ends = ends_of(model, tokenizer, style)
    asked = prompts(tokenizer, style, questions)
    return [text.strip() for text in complete(model, tokenizer, asked, ends, new_tokens, batch)]


def prompts(tokenizer: Any, style: Style, questions: Sequence[str]) -> list[tuple[int, ...]]:
    """The ids that stand before the answer to each question."""
    from methods.data import encode_pairs

    rows = [{"question": question, "answer": "a"} for question in questions]
    return [prompt_of(pair) for pair in encode_pairs(rows, tokenizer, style, 1 << 30)]


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    ends: set[int],
    new_tokens: int,
    batch: int,
) -> list[str]:
    """What the model writes greedily after each prompt, as it is but for special tokens, cut at the end mark."""
    import torch

    from methods.data import padding_id

    texts = {}
    for chosen in batches([len(prompt) for prompt in prompts], batch):
        inputs, mask = left_padded([prompts[i] for i in chosen], padding_id(tokenizer))
        with torch.inference_mode():
            tokens = continued(model, inputs.to(model.device), mask.to(model.device), new_tokens, ends)
        for i, row in zip(chosen, tokens, strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return [texts[i] for i in range(len(prompts))]
