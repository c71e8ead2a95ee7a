"""DIST: the student's probabilities need to correlate with the teacher's, and not to equal them.

Huang, You, Wang, Qian, Xu 2022, "Knowledge Distillation from A Stronger Teacher". With P and Q [n,V] the probabilities
of teacher and student for the n answer tokens of a batch at one temperature T, and r Pearson's correlation,

    inter = 1/n sum_i (1 - r(P[i,:], Q[i,:])),     intra = 1/V sum_v (1 - r(P[:,v], Q[:,v]))
    L = beta * inter + gamma * intra,              weighted with T**2

``curve.csv`` shows both. ``intra`` correlates over the tokens: it depends on what else is in the batch, so it needs all
of a batch at once, holds [n,V] three times over, and is mostly made up of entries whose probability hardly varies. How
the division by 0 is avoided then matters, and the codes differ: hunto/DIST_KD (``segmentation/losses/dist_kd.py``, at
T = 1) adds 1e-8 to the product of both norms, yoshitomo-matsubara/torchdistill raises each norm to 1e-8 at least.
Entries that are -inf in a model (a padded vocabulary) are left out of means and sums. It needs every probability, so a
top-k of the teacher cannot serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from methods.stage import Term, Terms
from methods.term import Weighted

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import View

USES = ("methods.term",)
WHOLE_BATCH = True
# hunto/DIST_KD and torchdistill
EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """Weight, temperature, the weights of both relations, and how a division by 0 is avoided."""

    # both distributions are softened by it: softmax(logits / temperature) (both codes: 1)
    temperature: Annotated[float, Gt(0)] = 1.0
    # multiply the weight by temperature**2, as torchdistill does; the logged values stay without it
    scale_by_temperature: bool = True
    # weight of the relation between the entries of a token (both codes: 1)
    beta: Annotated[float, Ge(0)] = 1.0
    # weight of the relation between the tokens for an entry (both codes: 1)
    gamma: Annotated[float, Ge(0)] = 1.0
    # 1e-8 is added to the product of both norms, or each norm is raised to it at least (torchdistill)
    epsilon: Literal["added", "clamped"] = "added"


def terms(config: Config, view: View) -> Terms:
    """``inter``, whose mean is over tokens, and ``intra``, whose mean is over the vocabulary."""
    student, teacher = view.student_logits(), view.teacher_logits()
    present = ~(student.isneginf() | teacher.isneginf()).any(0)
    q, p = (probabilities(config, logits[:, present]) for logits in (student, teacher))
    inter = (1 - correlation(config, p, q)).sum()
    # Without a token there is nothing to correlate, and a sum over nothing is 0 with a gradient of 0.
    intra = (1 - correlation(config, p.T, q.T)).sum() if len(q) else q.sum()
    return {
        "inter": Term(inter, view.part.tokens, config.beta),
        "intra": Term(intra, float(q.shape[1]), config.gamma),
    }


def probabilities(config: Config, logits: Tensor) -> Tensor:
    """softmax(logits / temperature) [n,V]."""
    return (logits / config.temperature).softmax(-1)


def correlation(config: Config, first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row [m] of two matrices [m,n]; 0 for a row that does not vary."""
    first, second = (rows - rows.mean(-1, keepdim=True) for rows in (first, second))
    product = (first * second).sum(-1)
    norms = first.norm(dim=-1), second.norm(dim=-1)
    if config.epsilon == "clamped":
        return product / (norms[0].clamp(min=EPSILON) * norms[1].clamp(min=EPSILON))
    return product / (norms[0] * norms[1] + EPSILON)
