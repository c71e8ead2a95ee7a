"""Multi-granularity semantic revision: learn from the data, and from the student's own answers put right.

Liu et al., "Multi-Granularity Semantic Revision for Large Language Model Distillation" (MGSR).

    L = cross_entropy * CE(data) + divergence(revised) + span(revised)

CE is taken on the rows of the data. ``revised`` are the student's greedy answers to the prompts of the same rows, in
which the teacher has put the worst token right and behind which the student went on (sequence correction and
regeneration, ``methods.distill._revision``). The divergence is the term ``dac_kl``, the span loss ``span_consistency``;
unit weights are the paper's. The prompt of a row with a question is everything before the answer; of rows that are text
it is the first ``prompt_tokens``.

No official code was found and the paper's equations could not be verified: the definitions are ours, and no parity with
the paper is claimed. The paper also replays earlier answers; here each revised batch is written anew. Where a batch is
not revised (``fraction`` below 1) the two terms see the rows of the data.

``curve.csv``: the terms (``dac_kl.kept_mass`` and ``dac_kl.kept`` say what DAC-KL leaves) and ``corrected``, the share
of the answers in which a token was put right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from methods.distill._rollouts import Writer, Written
from methods.stage import AssayError, Claim, Component, LossTerm
from methods.term import entries, of

if TYPE_CHECKING:
    from methods.distill._revision import Revision
    from methods.term import Setting

SEEDED = True
USES = (
    "methods.loop",
    "methods.data",
    "methods.checkpoint",
    "methods.terms",
    "methods.term",
    "methods.generate",
    "methods.distill._rollouts",
)
CLAIMS: tuple[Claim, ...] = ()
# The part of a batch with the revised answers.
REVISED = "revised"


@dataclass(frozen=True, kw_only=True)
class Config(Written):
    """The shared recipe, the three losses, and how answers are revised."""

    # weight of the cross-entropy on the rows of the data
    cross_entropy: Annotated[float, Ge(0)] = 1.0
    # what pulls each token of a revised answer; forward_kl() is the ablation without clipping
    divergence: LossTerm = Component("dac_kl")
    # what compares neighbouring tokens of a revised answer
    span: LossTerm = Component("span_consistency")
    # share of the batches that are revised; the others are the data's
    fraction: Annotated[float, Ge(0), Le(1)] = 1.0
    # most tokens of an answer that the teacher puts right, each behind the one before (MGSR: 1)
    corrections: Annotated[int, Ge(0)] = 1

    def __post_init__(self) -> None:
        """Each loss has a name of its own in the curve, and holds on an answer that the teacher has put right."""
        names = ["cross_entropy", self.divergence.name, self.span.name]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise AssayError(
                f"distill.mgsr: {twice} stands in two places of the loss; name another term as divergence or span."
            )
        for entry in entries((self.divergence, self.span)):
            if entry.flags.sampled:
                raise AssayError(
                    f"distill.mgsr: the term {entry.name} works only on text as the student drew it, and here the "
                    f"teacher puts tokens of it right: name another term."
                )


def terms(config: Config) -> tuple[Component, ...]:
    """The cross-entropy of the data, the divergence and the span loss."""
    return of("cross_entropy", weight=config.cross_entropy), config.divergence, config.span


def term_parts(config: Config) -> dict[str, str]:
    """The latter two are about the revised answers."""
    return {config.divergence.name: REVISED, config.span.name: REVISED}


def writing(config: Config, setting: Setting) -> Revision:
    """The revised answers of each batch."""
    from methods.distill._revision import Revision

    writer = Writer.of(setting, temperature=0.0)
    return Revision(setting, writer, REVISED, config.fraction, config.corrections)
