"""Forward Kullback-Leibler divergence: the student covers everything that the teacher finds likely.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network".

    L = T**2 * 1/M sum_{b,t} D( p_T || q_T )[b,t],      D(p || q) = sum_v p_v (log p_v - log q_v)
    p_T = softmax(z_teacher / T),  q_T = softmax(z_student / T),  M = answer tokens of the batch

``T**2`` keeps the gradient's size when T changes; trl's GKD trainer and jongwooko/distillm leave it out
(``scale_by_temperature=False``), and the latter returns the cross-entropy -sum p log q: another value with the same
gradient. thu-ml/Adaptive-Sparse-Trainer and MatryoshkaKV take every position (``positions="all"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from methods.term import Softened
from methods.terms import relative_entropy

if TYPE_CHECKING:
    from torch import Tensor

TOP_K = True
USES = ("methods.term", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """What every softened term has, with Hinton's factor."""

    # multiply the weight by temperature**2, as Hinton et al. do; the logged value stays without it
    scale_by_temperature: bool = True
    # where the teacher's largest entries alone were recorded, what becomes of the others: tail: one bucket for them on
    # both sides, at most the whole divergence; renormalised: the teacher divided by the mass of its largest, and too
    # sure of them; raw: left out, which may be negative
    rest: Literal["tail", "renormalised", "raw"] = "tail"


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(p‖q) of each row [n]."""
    return relative_entropy(log_p, log_q)
