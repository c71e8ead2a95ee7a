"""Reverse KL from the one token the student drew, in the place of the sum over the vocabulary.

An estimate of the single-step term of Gu, Dong, Wei, Huang 2024, "MiniLLM: Knowledge Distillation of Large Language
Models", as in huggingface/trl, ``trl/experimental/sdft/loss_utils.py``
(``compute_sampled_token_self_distillation_loss``). With y the token that was drawn from q, p the teacher, q the student
and sg for "no gradient",

    l = sg(log q_y - log p_y) * log q_y

Averaged over y ~ q its gradient is that of D(q ‖ p) at this position, since grad log q_y averages to 0; its value is
not. ``estimate`` in ``curve.csv`` is log q_y - log p_y, whose average is D(q ‖ p). All that only holds for text that
this student drew at temperature 1, so the term is refused elsewhere. It needs two log-probabilities a token, and pays
for that with noise: with both models' logits at hand ``reverse_kl`` is the same without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.term import Weighted
from methods.term._divergences import of_targets

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import Tokens

USES = ("methods.term",)
SAMPLED = True


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """The weight alone."""


def token_losses(config: Config, tokens: Tokens) -> dict[str, Tensor]:
    """``loss``, the surrogate, and ``estimate``, the log-ratio, of each token [n], in nats."""
    assert tokens.teacher is not None
    log_q, log_p = (of_targets(logits, tokens.targets) for logits in (tokens.student, tokens.teacher))
    estimate = (log_q - log_p).detach()
    return {"loss": estimate * log_q, "estimate": estimate}
