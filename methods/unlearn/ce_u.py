"""CE-U: distil the model into itself as it would be without the memorised token.

Yang, "CE-U: Cross Entropy Unlearning" (arXiv 2503.01224).

    L = 1/M sum_{b,t} CE( target[b,t], z[b,t] ),      target = stopgrad( softmax( z with z[y] = -inf ) )

The gradient at the logits is softmax(z) - target: what the true token has is given to the others in proportion, and
nothing is left to push where p(y) is 0. The first tokens of an answer, which say little about its content, are left
out. Paper and code (locuslab/open-unlearning, ``ceu.py``) agree. It reads forget rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from methods.stage import AssayError, Claim, Component, Optimizer, Term, Terms
from methods.terms import forward
from methods.unlearn import UnlearnBatch, Unlearning

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Unlearning):
    """The shared recipe with the published learning rate and length, and what is left out."""

    # the authors' TOFU recipe
    optimizer: Optimizer = Component("adamw", {"learning_rate": 2e-6, "weight_decay": 0.01})
    # the same
    epochs: Annotated[float, Gt(0)] | None = 9.0
    # tokens at the start of each answer (of each window of a text) that do not count (the authors' footnote)
    ignore_first_tokens: Annotated[int, Ge(0)] = 1


def needs_reference(config: Config) -> bool:
    """Never: the target is made of the current logits."""
    return False


def annotate(
    config: Config, part: str, rows: Sequence[Any], examples: Sequence[Example], tokenizer: Any
) -> list[Example]:
    """The examples with their first labels masked, so that the loop knows how many tokens count.

    Raises:
        AssayError: no label of any example is left.
    """
    from methods.data import IGNORED

    kept = [without_first(example, config.ignore_first_tokens) for example in examples]
    if not any(label != IGNORED for example in kept for label in example.labels[1:]):
        raise AssayError(
            f"unlearn.ce_u: ignore_first_tokens={config.ignore_first_tokens} leaves no token of any row; lower it."
        )
    return kept


def without_first(example: Example, count: int) -> Example:
    """The example without its first ``count`` labels."""
    from methods.data import IGNORED

    first = [place for place, label in enumerate(example.labels) if label != IGNORED][:count]
    labels = (IGNORED if place in first else label for place, label in enumerate(example.labels))
    return replace(example, labels=tuple(labels))


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the cross-entropy with the distribution over the other tokens."""
    outputs = forward(model, batch.forget)
    losses = distance(outputs.logits[outputs.mask], outputs.targets[outputs.mask])
    return {"forget": Term(losses.sum(), batch.forget.tokens)}


def distance(logits: Tensor, targets: Tensor) -> Tensor:
    """CE(target, logits) at each position [N], of logits [N,V] and the ids [N] that the target is without."""
    others = logits.detach().scatter(-1, targets.unsqueeze(-1), -float("inf")).softmax(-1)
    return logits.logsumexp(-1) - (others * logits).sum(-1)
