"""What losses are made of: one forward pass, the shift, token and sequence likelihoods, divergences.

Pure functions on logits. Everything is computed in float32, or in float64 where the logits already are,
whatever the model's own type: in bfloat16 ``1 - p`` is 0 for a memorised token, and a loss built on it
silently vanishes. ``B`` is sequences, ``T`` positions, ``V`` the vocabulary, ``L`` layers, ``H`` the width.

A "model" is anything called as ``model(input_ids=..., attention_mask=...)``, and with
``output_hidden_states=True`` where hidden states are wanted, that answers with ``.logits`` [B,T,V] and
``.hidden_states`` (L+1 tensors [B,T,H]). The parity tests pass a lookup table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import Count, Term, Terms

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeIs

    from methods.data import Cases, Part

REVISION = 1


@dataclass(frozen=True)
class Outputs:
    """A model's answer to one part of a batch, with logits and targets already aligned.

    ``logits[b, t]`` [B,T-1,V] predicts ``targets[b, t]`` [B,T-1]; ``mask`` [B,T-1] is True where that
    target counts. ``all_logits`` [B,T,V] keeps the last position, for losses over every position.
    """

    logits: Tensor
    targets: Tensor
    mask: Tensor
    all_logits: Tensor
    hidden_states: Sequence[Tensor] | None = None


def widen(values: Tensor) -> Tensor:
    """float64 stays float64, everything else becomes float32."""
    return values if values.element_size() == 8 else values.float()


def forward(model: Callable[..., Any], part: Part, hidden: bool = False) -> Outputs:
    """Run ``model`` on ``part`` and shift: the only place where logits meet the labels they predict."""
    wanted = {"output_hidden_states": True} if hidden else {}
    answer = model(input_ids=part.input_ids, attention_mask=part.attention_mask, **wanted)
    every = widen(answer.logits)
    states = answer.hidden_states if hidden else None
    return Outputs(every[:, :-1], part.targets, part.mask, every, states)


def frozen(model: Callable[..., Any], part: Part, hidden: bool = False) -> Outputs:
    """``forward`` of a reference or teacher: no gradient is recorded."""
    import torch

    with torch.no_grad():
        return forward(model, part, hidden)


@dataclass(frozen=True)
class Scored:
    """Scores [N,V] and what they should point at [N]: every answer token of a part, or every case."""

    scores: Tensor
    targets: Tensor
    count: Count


@dataclass(frozen=True)
class Entering:
    """The hidden states [N,d] on their way into the output ``layer``, and their targets [N]."""

    hidden: Tensor
    targets: Tensor
    count: Count
    layer: Any


def scored(model: Callable[..., Any], part: Part | Cases) -> Scored:
    """Run ``model`` and keep what has a target: answer tokens of sequences, or cases."""
    if is_cases(part):
        return Scored(case_scores(model, part), part.labels, part.examples)
    outputs = forward(model, part)
    return Scored(outputs.logits[outputs.mask], outputs.targets[outputs.mask], part.tokens)


def entering(model: Any, part: Part | Cases) -> Entering:
    """As ``scored``, but stopped before the output layer, for losses that apply it themselves."""
    from methods.architectures import output_layer, without_head

    layer = output_layer(model)
    with without_head(model):
        found = scored(model, part)
    return Entering(found.scores, found.targets, found.count, layer)


def case_scores(model: Any, cases: Cases) -> Tensor:
    """Scores [B,V] of a classifier's classes."""
    return widen(model(**{model.main_input_name: cases.inputs}).logits)


def is_cases(part: Any) -> TypeIs[Cases]:
    """Whether a part of a batch is cases to classify and not sequences."""
    from methods.data import Cases

    return isinstance(part, Cases)


def token_nll(outputs: Outputs) -> Tensor:
    """Negative log-likelihood of each target, in nats [B,T-1]; 0 where the target does not count."""
    from torch.nn.functional import cross_entropy

    targets = outputs.targets.masked_fill(~outputs.mask, -100)
    losses = cross_entropy(
        outputs.logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view_as(targets)


def sequence_nll(outputs: Outputs) -> Tensor:
    """Negative log-likelihood of each answer [B]: the sum over its tokens, not divided by its length."""
    return token_nll(outputs).sum(-1)


def answer_nll(part: Part, outputs: Outputs, weight: float = 1.0) -> Term:
    """Mean over all answer tokens of the global batch, so a long answer weighs more than a short one."""
    return Term(token_nll(outputs).sum(), part.tokens, weight)


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """D(p‖q) at each position [...], p and q the softmax of ``teacher`` and ``student`` [...,V] over ``temperature``.

    An entry that is -inf in either (a padded vocabulary) adds nothing, where 0 * inf would be NaN.
    """
    if temperature != 1.0:
        teacher, student = teacher / temperature, student / temperature
    return relative_entropy(teacher.log_softmax(-1), student.log_softmax(-1))


def relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(p‖q) [...] of log-probabilities [...,V]; entries that are -inf in either add nothing."""
    p = log_p.exp()
    values = (p * (log_p - log_q)).sum(-1)
    # Only an absent entry makes a sum that is not finite, and looking at [...] sums costs nothing.
    if bool(values.detach().isfinite().all()):
        return values
    absent = log_p.isneginf() | log_q.isneginf()
    return (p * (log_p - log_q).masked_fill(absent, 0.0)).sum(-1)


def total(terms: Terms, outer: Callable[[Mapping[str, Tensor]], Tensor] | None = None) -> Tensor:
    """The loss of a batch that is not divided: the sum of ``weight * sum / count``, or ``outer`` of the means.

    An empty term (count 0) is 0 with a zero gradient.
    """
    means = {name: term.sum * (1 / term.count if term.count else 0.0) for name, term in terms.items()}
    if outer is not None:
        return outer(means)
    values = [terms[name].weight * mean for name, mean in means.items()]
    return sum(values[1:], start=values[0])
