"""Decoupled knowledge distillation: how sure of the target, and how the rest is shared out, weighed apart.

Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled Knowledge Distillation". With p the teacher and q the student at one
temperature T, y the target, and p~ and q~ the distributions over all entries but y, each brought to a sum of 1,

    target = D((p_y, 1 - p_y) ‖ (q_y, 1 - q_y)),     others = D(p~ ‖ q~)
    l = alpha * target + beta * others,               weighted with T**2

D(p ‖ q) = target + (1 - p_y) * others for every token: what KD weighs with the teacher's doubt, beta frees. So with
alpha = beta = 1 it is not the KL. ``curve.csv`` shows both parts.

megvii-research/mdistiller takes the target out by subtracting 1000 from its logit, which fails in 16 bits and for
logits further apart; here it is left out. Its defaults for images are alpha 1, beta 8, T 4, with a weight that rises
over 20 epochs; the defaults here are those of SakanaAI/TAID for language models, whose code divides by all positions
and not by those that count. The others are renormalised, so a top-k of the teacher cannot serve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt

from methods.term import Weighted
from methods.term._divergences import conditional
from methods.terms import relative_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import Tokens

USES = ("methods.term", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """Weight, temperature and the weights of both parts."""

    # both distributions are softened by it: softmax(logits / temperature) (TAID for language models: 1; images: 4)
    temperature: Annotated[float, Gt(0)] = 1.0
    # multiply the weight by temperature**2, as both codes do; the logged value stays without it
    scale_by_temperature: bool = True

    # weight of the target's part (1 everywhere)
    alpha: Annotated[float, Ge(0)] = 1.0
    # weight of the others' part (TAID for language models: 0.5; images: 8)
    beta: Annotated[float, Ge(0)] = 0.5


def token_losses(config: Config, tokens: Tokens) -> dict[str, Tensor]:
    """``loss``, and its parts ``target`` and ``others`` without their weights, of each token [n], in nats."""
    assert tokens.teacher is not None
    p, q = (
        _parts(logits / config.temperature, tokens.targets) for logits in (tokens.teacher, tokens.student)
    )
    target, others = relative_entropy(p[0], q[0]), relative_entropy(p[1], q[1])
    return {"loss": config.alpha * target + config.beta * others, "target": target, "others": others}


def _parts(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log of (p_y, 1 - p_y) [n,2], and log p~ [n,V] with the target absent."""
    import torch

    from methods.term._top import log_rest

    log_p, places = logits.log_softmax(-1), targets[:, None]
    rest = log_rest(log_p, places)
    binary = torch.stack([log_p.gather(-1, places).squeeze(-1), rest], dim=-1)
    return binary, conditional(log_p.scatter(-1, places, -math.inf), rest)
