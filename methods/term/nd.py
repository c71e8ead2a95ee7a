"""ND: the student's last hidden state points where the teacher's mean state of the next token points, and is as long.

Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", for images; with s the
student's feature, t the teacher's, and e_c the unit vector of the teacher's mean feature of class c,

    1/N sum_i ( 1 - s_i . e_c / max(|s_i|, |t_i|) )

Where |s| > |t| the gradient also goes through |s|, so that only the direction is trained; where |s| < |t| the length is
pushed up: a kink at equality, as in the code (WangYZ1608/Knowledge-Distillation-via-ND). The published runs weigh it 2
to 4 and add cross-entropy and forward KL at temperature 4.

For language models, which the paper does not try: s and t are what enters the head at answer tokens, the class is the
next token, and the means are taken over the rows trained on, by the frozen teacher, before the first step. Tokens seen
fewer than ``least_seen`` times are left out. Where the widths differ the paper's code puts batch normalisation,
dropout and a linear layer on the student; ``project=True`` is the linear layer alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from methods.stage import AssayError, Claim, Term, Terms
from methods.term import Weighted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.data import Example
    from methods.term import Setting, View

USES = ("methods.term", "methods.data")
# The teacher's states at the head are in neither a record nor several teachers together.
RECORDED = False
ENSEMBLE = False
# The least length that is divided by.
EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """Which tokens are compared, and how where the widths differ."""

    # tokens that are an answer's less often have no reliable mean and are left out
    least_seen: Annotated[int, Ge(1)] = 8
    # compare W s with the teacher's state, W trained with the student and thrown away (needed for different widths)
    project: bool = False


CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True)
class Directions:
    """The unit vectors [C,H] of C tokens, and which of them belongs to each token.

    ``places`` is -1 for a token without one, as is its last entry, which stands for all tokens beyond.
    """

    units: Tensor
    places: Tensor

    def of(self, tokens: Tensor) -> Tensor:
        """The places [n] of tokens [n] among the unit vectors; -1 for one that has none."""
        return self.places.to(tokens.device)[tokens.clamp(max=len(self.places) - 1)]


def check(config: Config, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """AssayError for states of different widths without a projection."""
    from methods.term._layers import check_widths

    check_widths(config.project, student, teacher, "nd")


def companion(config: Config, setting: Setting) -> nn.Linear | None:
    """The projection W."""
    from methods.term._layers import configurations, entry, projection

    if not config.project:
        return None
    student, teacher = (entry(each, "hidden_size") for each in configurations(setting))
    return projection(student, teacher, setting.seed, "nd")


# --- class means ----------------------------------------------------------------------------------------------


def prepare(config: Config, setting: Setting) -> Directions:
    """The teacher's mean state of every token that is an answer's often enough in the rows trained on.

    Raises:
        AssayError: none is.
    """
    kept = tokens_kept(setting.examples, config.least_seen)
    if not kept:
        raise AssayError(
            f"nd: no token is an answer's {config.least_seen} times or more in the {len(setting.examples)} rows of "
            f"data, so the teacher's means cannot be taken: lower least_seen, or take more rows."
        )
    return directions(kept, teacher_states(setting))


def tokens_kept(examples: Sequence[Example], least_seen: int) -> list[int]:
    """The tokens that are predicted so often or oftener, in their order."""
    from methods.data import IGNORED

    seen = Counter(label for example in examples for label in example.labels[1:] if label != IGNORED)
    return sorted(token for token, count in seen.items() if count >= least_seen)


def teacher_states(setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    """The teacher's states [n,H] at answer tokens, and the tokens [n], batch after batch of all rows."""
    from methods.data import collate, padding_id
    from methods.distill._sources import places

    assert setting.source is not None
    size, padding = setting.config.micro_batch or setting.config.batch, padding_id(setting.tokenizer)
    for start in range(0, len(setting.examples), size):
        rows = setting.examples[start : start + size]
        part = collate(rows, padding, "train").to(setting.device)
        found = places(part)
        look = setting.source.said(part, found).look
        assert look is not None
        yield look.states.flatten(0, 1)[found.index], found.targets


def directions(kept: Sequence[int], batches: Iterable[tuple[Tensor, Tensor]]) -> Directions:
    """The unit vectors of the mean states of the tokens ``kept``, added up in float64.

    Args:
        batches: states [n,H] and the tokens [n] that they should predict.
    """
    import torch
    from torch.nn.functional import normalize

    places = torch.full((max(kept) + 2,), -1)
    places[list(kept)] = torch.arange(len(kept))
    known, kind = Directions(torch.zeros(len(kept), 0, dtype=torch.float64), places), torch.float32
    for states, targets in batches:
        of_token, kind = known.of(targets.cpu()), torch.promote_types(torch.float32, states.dtype)
        counted = of_token >= 0
        rows = states.detach().cpu().double()[counted]
        sums = known.units if known.units.numel() else rows.new_zeros(len(kept), rows.shape[-1])
        known = replace(known, units=sums.index_add(0, of_token[counted], rows))
    # A mean and a sum have one direction.
    return replace(known, units=normalize(known.units, dim=-1, eps=EPSILON).to(kind))


# --- the loss -------------------------------------------------------------------------------------------------


def terms(config: Config, view: View) -> Terms:
    """The mean over the answer tokens that have a direction."""
    from methods.terms import widen

    assert view.teacher is not None
    known: Directions = view.memory
    of_token = known.of(view.targets)
    index = view.index[of_token >= 0]
    student = widen(view.student.states.flatten(0, 1)[index])
    if view.companion is not None:
        student = widen(view.companion(student))
    lengths = widen(view.teacher.states.flatten(0, 1)[index]).norm(dim=-1)
    units = known.units.to(student)[of_token[of_token >= 0]]
    return {"": Term(losses(student, lengths, units).sum(), float(len(index)))}


def losses(student: Tensor, lengths: Tensor, units: Tensor) -> Tensor:
    """1 - s . e / max(|s|, |t|) [n] of states s [n,H], the teacher's lengths |t| [n] and unit vectors e [n,H]."""
    import torch

    longer = torch.maximum(student.norm(dim=-1), lengths).clamp(min=EPSILON)
    return 1 - (student * units).sum(-1) / longer
