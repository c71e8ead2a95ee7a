"""Total variation distance: the mass that would have to move for the student to agree with the teacher.

Wen, Li, Du, Mou 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation"; with p the teacher
and q the student at one temperature,

    l = 0.5 * sum_v |p - q|,     0 <= l <= 1

jongwooko/distillm calls it ``tv_distance``. Its gradient is bounded and has a jump where p = q (0 is taken there). With
the teacher's top-k and one bucket for the rest the value is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.term import Softened

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.term", "methods.terms")
TOP_K = True


@dataclass(frozen=True, kw_only=True)
class Config(Softened):
    """Weight and temperature."""


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The distance of each token [n], from log-probabilities [n,V]."""
    gap = log_p.exp() - log_q.exp()
    absent = log_p.isneginf() | log_q.isneginf()
    return 0.5 * gap.masked_fill(absent, 0.0).abs().sum(-1)
