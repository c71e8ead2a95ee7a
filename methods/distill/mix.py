"""Any mixture of distillation terms, each with its weight.

    L = sum_k weight_k * term_k           distill.mix(teacher=target, terms=[forward_kl(temperature=2.0), squarehead()])

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" mixes a divergence from the teacher with the
cross-entropy on the labels, (1 - alpha) * CE + alpha * T**2 * KL; here each term has its own weight, and ``curve.csv``
shows each without it. A term stands for itself: ``methods/term`` has the equation of each, and which teacher it can do
with. A second term of the same kind is called ``name.2``; one with weight 0 is only logged.

There is one teacher, in one of three forms: a model that runs beside the student, several models that teach as one, or
what ``teacher.logits`` wrote of these very rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.distill import Distilling, given_sources, refuse_terms
from methods.stage import Claim, LossTerm
from methods.term import entries

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.term")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Distilling):
    """The shared recipe, and the terms."""

    # what the student is pulled by
    terms: tuple[LossTerm, ...]

    def __post_init__(self) -> None:
        """One teacher, or none where no term asks one, and terms that can be had from it."""
        if given_sources(self):
            super().__post_init__()
        refuse_terms("distill.mix", self, entries(self.terms))
