"""Universal logit distillation: a student learns from a teacher with another tokenizer.

Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs". Each model reads
the same text in its own tokens; p and q are the probabilities of teacher and student in falling order, the shorter of
the two filled up with zeros,

    L = 1/B sum_b 1/n_b sum_{i <= n_b} sum_v | p_(v)[b,i] - q_(v)[b,i] |        n_b = min(answer tokens of the two)

from the first answer token on. It is 0 where p is any permutation of q, and at most 2. So it **cannot teach which token
is meant**, only how sure the student should be: always keep a cross-entropy beside it, as the paper does with

    distill.mix(teacher=other, terms=[cross_entropy(), uld()])              CE + 1.5 * ULD

The two tokenisations drift apart: later positions compare different text, in the official code as here. That code
(Nicolas-BZRD/llm-recipes) leaves out the student's last answer position, which predicts the end, and keeps the
teacher's; both are options. A sequence that this leaves without a position counts as 0. huggingface/trl's GOLD trainer
leaves out neither (``skip_student_end=False``), and with any token merging but ``bayesian`` reads the logits one
position late: ``alignment="unshifted"`` repeats that, for comparison only. Its merging of tokens is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from methods.stage import AssayError, Claim, Term
from methods.term import View, Weighted

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Part
    from methods.term import Setting

CROSS_TOKENIZER = True
# The teacher reads other tokens than the student: what it answers has to be asked for in the same step.
RECORDED = False
ENSEMBLE = False
USES = ("methods.term", "methods.terms", "methods.data")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """The weight beside a cross-entropy of 1, two temperatures, and which positions are compared."""

    # the paper's, beside a cross-entropy of weight 1
    weight: Annotated[float, Ge(0)] = 1.5
    # softens the student's distribution
    student_temperature: Annotated[float, Gt(0)] = 1.0
    # softens the teacher's distribution
    teacher_temperature: Annotated[float, Gt(0)] = 1.0
    # leave out the student's last answer position, which predicts the end (the official trainer does)
    skip_student_end: bool = True
    # leave out the teacher's (the official trainer does not)
    skip_teacher_end: bool = False
    # causal: the logits that predict a token; unshifted: one position late, trl's GOLD without "bayesian" merging
    alignment: Literal["causal", "unshifted"] = "causal"


def prepare(config: Config, setting: Setting) -> None:
    """Note where nothing beside this term says which token is meant."""
    others = [entry for entry in setting.mixture.entries if not entry.flags.cross_tokenizer]
    if not any(entry.weight > 0 for entry in others):
        setting.stage.notes["uld"] = (
            "uld stands alone: nothing teaches which token is meant; add cross_entropy()."
        )


def terms(config: Config, view: View) -> Mapping[str, Term]:
    """The mean over sequences of the mean over their positions."""
    from methods.term._again import summed

    if view.teacher is None or view.batch is None:
        raise AssayError(
            "uld: there is no teacher that reads the rows in its own tokens; give teacher=CHAIN."
        )
    look = view.teacher
    mine, its, shares = aligned(config, view.part, view.batch.teacher)

    def distance(rows: slice) -> Tensor:
        student = view.student.at(mine[rows]) / config.student_temperature
        teacher = look.at(its[rows]).detach() / config.teacher_temperature
        distances = sorted_distance(teacher.softmax(-1), student.softmax(-1))
        return (distances * shares[rows].to(distances.dtype)).sum()

    return {"": Term(summed(distance, view.student, mine), view.part.sequences)}


def aligned(config: Config, student: Part, teacher: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Places [n] among the flattened positions of student and teacher, pair by pair, and 1 / n_b of each."""
    mine, its = student.mask, teacher.mask
    lengths = (mine.sum(1) - int(config.skip_student_end)).minimum(its.sum(1) - int(config.skip_teacher_end))
    late = int(config.alignment == "unshifted")
    shares = lengths.clamp(min=1).double().reciprocal().repeat_interleave(lengths.clamp(min=0))
    return _first(mine, lengths) + late, _first(its, lengths) + late, shares


def _first(mask: Tensor, lengths: Tensor) -> Tensor:
    """Where the first ``lengths`` [B] of each row's answer positions [B,T-1] are among the B*T positions."""
    chosen = mask & (mask.cumsum(1) <= lengths[:, None])
    row, position = chosen.nonzero(as_tuple=True)
    return row * (mask.shape[1] + 1) + position


def sorted_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum of absolute differences [c] of probabilities [c,V] and [c,W], each row of both in falling order."""
    from torch.nn.functional import pad

    width = max(teacher.shape[-1], student.shape[-1])
    falling = [
        pad(values.sort(-1, descending=True).values, (0, width - values.shape[-1]))
        for values in (teacher, student)
    ]
    return (falling[0] - falling[1]).abs().sum(-1)
