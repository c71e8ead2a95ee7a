"""A teacher that attends to the student's keys and values, layer by layer.

The student runs first; what each of its layers attends to is kept without its gradient, after the rotary embedding,
and stands in the place of the teacher's own when that answers to the same part of the batch. Its queries come from its
own residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from methods.distill._sources import Live
from methods.stage import AssayError
from methods.term._attention import Attended, attending, layer_count, sharing

if TYPE_CHECKING:
    from pathlib import Path

    from torch.nn import Parameter

    from methods.data import Part
    from methods.distill._sources import Layers
    from methods.term import Look

REVISION = 1


class Kept:
    """What the layers of a model attended to in its last pass; the loop's masks of this method, which mask nothing."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers: list[Attended | None] = []

    @contextmanager
    def hiding(self, step: int) -> Iterator[None]:
        """Within it every pass of the model is kept until the next one."""
        self.layers = [None] * layer_count(self.model)
        with attending(self.model, self._keep):
            yield
        self.layers = []

    def _keep(self, layer: int, attended: Attended) -> Attended:
        self.layers[layer] = replace(
            attended, query=attended.query.detach(), key=attended.key.detach(), value=attended.value.detach()
        )
        return attended

    def mask_gradients(self) -> None:
        """Nothing is masked."""

    def after(self) -> None:
        """Nothing was removed."""

    def hide(self, named: Mapping[str, Parameter]) -> None:
        """The weights stay as they are."""

    def numbers(self) -> dict[str, float]:
        """Nothing to show."""
        return {}


class SharedKeys(Live):
    """A live teacher behind the student's keys and values."""

    def __init__(self, model: Any, entries: int | None, kept: Kept) -> None:
        super().__init__(model, entries)
        self.kept = kept

    def look(self, part: Part, hidden: bool = False, attention: Layers = False) -> Look:
        """Its states on a part that the student has just seen."""
        if not any(self.kept.layers):
            raise AssayError(
                "the student has no layer that attends through transformers' attention interface, so it has no keys "
                "and values to share: use distill.forward_kl."
            )
        with sharing(self.model, self.kept.layers):
            return super().look(part, hidden, attention)


# --- requirements -------------------------------------------------------------------------------------------------


def refuse_unshareable(student: Path, teacher: Path) -> None:
    """Whether a teacher can attend to a student's keys and values, from their configurations alone.

    Raises:
        AssayError: other layers, key-value heads, head sizes or rotary embeddings, or keys in bases of their own.
    """
    from methods.distill import text_config

    for whose, folder in (("student", student), ("teacher", teacher)):
        if text_config(folder).get("key_rank") is not None:
            raise AssayError(
                f"the {whose} keeps its keys and values in bases of its own (distill.matryoshka_kv), in which another "
                "model's queries mean nothing: share them first, and narrow the cache afterwards."
            )
    ours, theirs = _shape(text_config(student)), _shape(text_config(teacher))
    for what, mine in ours.items():
        if mine != theirs[what]:
            raise AssayError(
                f"the teacher's {what} is {_said(theirs[what])} and the student's {_said(mine)}: to attend to the "
                "student's keys and values it needs the same; take the model that the student was made from."
            )


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """What two models that share keys and values have in common, in the words of a sentence."""
    heads = config.get("num_attention_heads", config.get("n_head"))
    width = config.get("hidden_size", config.get("n_embd"))
    return {
        "number of layers": config.get("num_hidden_layers", config.get("n_layer")),
        "number of key-value heads": config.get("num_key_value_heads") or heads,
        "head size": config.get("head_dim") or (width // heads if width and heads else None),
        "rotary embedding": _rotary(config),
    }


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling, however the configuration writes them."""
    given = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})
    }  # fmt: skip
    found = {name: value for name, value in given.items() if value is not None and name != "type"}
    found["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    return dict(sorted(found.items()))


def _said(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name}={each}" for name, each in value.items())
