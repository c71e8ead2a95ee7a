"""MiniLM: the student attends as the teacher does, and its values relate to each other as the teacher's do.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers"; in
the last layer only,

    1/(A |x|) sum_a sum_t  D( A_T[a,t] || A_S[a,t] )  +  D( V_T[a,t] || V_S[a,t] )
    A = softmax(Q K' / sqrt d),   V = softmax(V V' / sqrt d)

D is the divergence of two distributions over the positions that t may attend to: in a causal model t and those before
it, in both relations; padding is left out. Q and K are taken as the model attends with them, after the rotary
embedding and with the model's own scale. Models may differ in width, depth and head size, but need as many (query)
heads; keys and values that several query heads share are repeated for each of them. ``relation_heads`` lifts that:
as in MiniLMv2 (Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
Transformers") the heads are laid side by side and split anew into as many equal parts; MiniLMv2 also relates Q to Q
and K to K, which this does not. Soft-capping or windows of attention are not repeated.
``microsoft/unilm`` has no training code: there is nothing official to differ from.

Logged: ``minilm.attention`` and ``minilm.values``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from methods.stage import AssayError, Claim, Term, Terms
from methods.term import Weighted

if TYPE_CHECKING:
    from torch import Tensor

    from methods.term import View
    from methods.term._attention import Attended

USES = ("methods.term",)
ATTENTION = True


@dataclass(frozen=True, kw_only=True)
class Config(Weighted):
    """Which layers are compared, and in how many heads."""

    # layer of the student, from 1; None: the last one that attends
    student_layer: Annotated[int, Ge(1)] | None = None
    # layer of the teacher, from 1; None: the last one that attends (MiniLMv2 takes an upper middle one of large models)
    teacher_layer: Annotated[int, Ge(1)] | None = None
    # heads that both models' attention is split into; None: their own, as many in both
    relation_heads: Annotated[int, Ge(1)] | None = None


CLAIMS: tuple[Claim, ...] = ()


def check(config: Config, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """AssayError for a layer that does not attend, or heads that cannot be compared."""
    mine = attending_heads(student, config.student_layer, "student")
    its = attending_heads(teacher, config.teacher_layer, "teacher")
    if config.relation_heads is not None:
        _refuse_uneven(config.relation_heads, mine * head_size(student), "student")
        _refuse_uneven(config.relation_heads, its * head_size(teacher), "teacher")
    elif mine != its:
        raise AssayError(
            f"minilm: the student attends with {mine} heads and the teacher with {its}: write relation_heads=..., a "
            f"number that divides the width of both models' attention, {mine * head_size(student)} and "
            f"{its * head_size(teacher)}, or take a teacher with as many heads."
        )


def attended(config: Config) -> tuple[frozenset[int], frozenset[int]]:
    """The layer of the student and that of the teacher whose attention is read, from 0; -1: the last that attends."""
    student, teacher = ((number or 0) - 1 for number in (config.student_layer, config.teacher_layer))
    return frozenset({student}), frozenset({teacher})


def _refuse_uneven(heads: int, width: int, whose: str) -> None:
    if width % heads:
        raise AssayError(
            f"minilm: relation_heads={heads} does not divide the width of the {whose}'s attention, {width}: take a "
            f"number that does."
        )


# --- config.json ----------------------------------------------------------------------------------------------


def attending_heads(config: Mapping[str, Any], layer: int | None, whose: str) -> int:
    """Query heads of a layer by its number from 1, or of the last layer that attends."""
    heads = heads_of_layers(config)
    if layer is None:
        layer = next((number for number in range(len(heads), 0, -1) if heads[number - 1]), 0)
    if not 1 <= layer <= len(heads) or not heads[layer - 1]:
        raise AssayError(
            f"minilm: layer {layer or len(heads)} of the {whose}, which has {len(heads)}, does not attend: name one "
            f"that does with {whose}_layer."
        )
    return heads[layer - 1]


def heads_of_layers(config: Mapping[str, Any]) -> list[int]:
    """Query heads of each layer; 0 where pruning left no attention."""
    from methods.term._layers import entry

    single = config.get("layer_num_heads")
    if single is not None:
        return [int(queries) for queries, _ in single]
    return [int(entry(config, "num_attention_heads"))] * int(entry(config, "num_hidden_layers"))


def head_size(config: Mapping[str, Any]) -> int:
    """Entries of one head's queries."""
    from methods.term._layers import entry

    given = config.get("head_dim")
    return int(given or entry(config, "hidden_size") // entry(config, "num_attention_heads"))


# --- the loss -------------------------------------------------------------------------------------------------


def terms(config: Config, view: View) -> Terms:
    """``attention`` and ``values``: the mean over heads and over positions that are not padding."""
    assert view.teacher is not None
    student = chosen(view.student.attention, config.student_layer)
    teacher = chosen(view.teacher.attention, config.teacher_layer)
    looked = view.part.attention_mask.bool()
    found = divergences(student, teacher, allowed(looked), config.relation_heads)
    return {name: Term(values.mean(1)[looked].sum(), view.part.attended) for name, values in found.items()}


def chosen(layers: Sequence[Attended | None] | None, number: int | None) -> Attended:
    """The layer of that number, from 1, or the last that attends."""
    assert layers is not None
    found = [layer for layer in layers if layer is not None] if number is None else [layers[number - 1]]
    last = found[-1]
    assert last is not None
    return last


def allowed(looked: Tensor, causal: bool = True) -> Tensor:
    """What each position [B,1,T,T] may attend to: itself, and what is not padding and (causal) comes before it.

    Args:
        looked: [B,T], False in the padding.
    """
    import torch

    length = looked.shape[1]
    may = looked[:, None, None, :].expand(-1, 1, length, length)
    if causal:
        may = may.tril()
    return may | torch.eye(length, dtype=torch.bool, device=looked.device)


def divergences(
    student: Attended, teacher: Attended, may: Tensor, heads: int | None = None
) -> dict[str, Tensor]:
    """``attention`` and ``values``: D(teacher || student) of each head and position [B,heads,T].

    Args:
        may: [B,1,T,T], what each position attends to.
        heads: relation heads.
    """
    from methods.terms import relative_entropy

    ours, its = relations(student, may, heads), relations(teacher, may, heads)
    return {name: relative_entropy(its[name], ours[name]) for name in ours}


def relations(attended: Attended, may: Tensor, heads: int | None) -> dict[str, Tensor]:
    """The logarithms [B,heads,T,T] of both distributions."""
    queries = attended.query.shape[1]
    parts = [attended.query, repeated(attended.key, queries), repeated(attended.value, queries)]
    query, key, value = parts if heads is None else (split_anew(part, heads) for part in parts)
    scaling = attended.scaling if heads is None else query.shape[-1] ** -0.5
    return {
        "attention": log_relation(query, key, scaling, may),
        "values": log_relation(value, value, value.shape[-1] ** -0.5, may),
    }


def log_relation(left: Tensor, right: Tensor, scaling: float, may: Tensor) -> Tensor:
    """log softmax(scaling * left right') [B,heads,T,T] over what may be attended to; -inf elsewhere."""
    from methods.terms import widen

    scores = widen(left) @ widen(right).transpose(-1, -2) * scaling
    return scores.masked_fill(~may, -float("inf")).log_softmax(-1)


def repeated(states: Tensor, heads: int) -> Tensor:
    """Keys or values [B,g,T,d] repeated for each of the query heads that share them [B,heads,T,d]."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)


def split_anew(states: Tensor, heads: int) -> Tensor:
    """Heads [B,h,T,d] laid side by side and split into others [B,heads,T,h d / heads]."""
    return states.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
