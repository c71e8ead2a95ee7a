"""Logit-standardised distillation: the student need not copy how large the teacher's logits are.

Sun, Ren, Li, Wang, Cao 2024, "Logit Standardization in Knowledge Distillation". Each token's logits z of teacher and
student are brought to mean 0 and standard deviation 1 over the vocabulary before the softmax,

    Z(z) = (z - mean(z)) / (std(z) + 1e-7),     p = softmax(Z(z_teacher) / T),   q = softmax(Z(z_student) / T)
    l = D(p ‖ q),                               weighted with T**2

with the unbiased standard deviation (V - 1), as in yoshitomo-matsubara/torchdistill's ``LogitStdKDLoss``, which leaves
T**2 out where it mixes in no cross-entropy. Shifting or stretching either model's logits changes nothing, so q itself
need not come near p: its own sharpness is left to the cross-entropy beside it. Padded entries (-inf) enter neither mean
nor deviation. Both need the whole vocabulary, so a top-k of the teacher cannot serve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.term import Softened
from methods.terms import kl_divergence

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import Tokens

USES = ("methods.term", "methods.terms")
# added to the standard deviation (torchdistill)
EPSILON = 1e-7


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """Weight and temperature."""

    # multiply the weight by temperature**2, as torchdistill does beside a cross-entropy
    scale_by_temperature: bool = True


def token_losses(config: Config, tokens: Tokens) -> Tensor:
    """D(p ‖ q) of the standardised logits of each token [n], in nats."""
    assert tokens.teacher is not None
    teacher, student = standardised(tokens.teacher), standardised(tokens.student)
    return kl_divergence(teacher, student, config.temperature)


def standardised(logits: Tensor) -> Tensor:
    """Logits [n,V] with mean 0 and standard deviation 1 in each row; -inf stays, and counts for neither."""
    absent = logits.isneginf()
    count = (~absent).sum(-1, keepdim=True).to(logits.dtype)
    mean = logits.masked_fill(absent, 0.0).sum(-1, keepdim=True) / count
    centred = (logits - mean).masked_fill(absent, 0.0)
    # The slope of the root is infinite where all logits are equal; they are 0 in any case, so 1 stands there.
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    deviation = variance.masked_fill(variance == 0, 1.0).sqrt()
    return (centred / (deviation + EPSILON)).masked_fill(absent, -math.inf)
