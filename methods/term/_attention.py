"""The queries, keys and values that a model attends with, after the rotary embedding, as it runs.

Every attention that goes through transformers' ``AttentionInterface`` asks it for the function that computes it.
Within ``attending`` that question is answered with the same function behind an onlooker, so that nothing about the
model changes: neither its configuration nor its mask nor which function is used. Whose attention it is is told by the
module that calls; a layer whose attention was pruned away never does.

A model that attends otherwise is refused with a sentence. Fused attention never forms the distribution itself;
``Attended`` has what it is made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface

from methods.architectures import unwrapped
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor


# The last layer that attends.
LAST = -1


@dataclass(frozen=True)
class Attended:
    """What one layer attends with: A = softmax(scaling * query key' + mask).

    ``query`` [B,query heads,T,d]; ``key`` and ``value`` [B,heads,S,d], with as many heads as the model keeps, each for
    the same number of query heads in turn; ``mask`` as the model gives it to its attention function (None: causal).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Any = None


Onlooker = Callable[[int, Attended], Attended]


@contextmanager
def attending(model: Any, onlooker: Onlooker) -> Iterator[None]:
    """Within it every layer of ``model`` attends with what ``onlooker(layer, attended)`` returns; layers from 0.

    Other models are left alone, and so is this one afterwards. Activations that are computed a second time in the
    backward pass are not looked at again.
    """
    layers = attention_layers(model)
    # The class and not an instance of it: some families have their own.
    interfaces: Any = AttentionInterface
    usual = interfaces.get_interface

    def get_interface(self: AttentionInterface, name: str, default: Any) -> Any:
        return partial(_attend, usual(self, name, default), layers, onlooker)

    interfaces.get_interface = get_interface
    try:
        yield
    finally:
        interfaces.get_interface = usual


def _attend(
    function: Any,
    layers: dict[int, int],
    onlooker: Onlooker,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any = None,
    **options: Any,
) -> Any:
    """The attention function with what the onlooker makes of its arguments, where the module is one of the model's."""
    layer = layers.get(id(module))
    if layer is None or getattr(module, "is_cross_attention", False):
        return function(module, query, key, value, mask, **options)
    scaling = options.get("scaling")
    given = Attended(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, mask)
    taken = onlooker(layer, given)
    return function(module, taken.query, taken.key, taken.value, taken.mask, **options)


@contextmanager
def recorded(model: Any, layers: Collection[int] | None = None) -> Iterator[list[Attended | None]]:
    """``with recorded(model) as found``: what the model's layers attended with in its last pass, in their order.

    Args:
        layers: which are kept, from 0, ``LAST`` for the last that attends; None: all.
    Raises:
        AssayError: none of them attends through transformers' interface; None stands for a layer without attention.
    """
    found: list[Attended | None] = [None] * layer_count(model)

    def keep(layer: int, attended: Attended) -> Attended:
        if layers is None or layer in layers or LAST in layers:
            found[layer] = attended
        for earlier in () if layers is None else set(range(layer)).difference(layers):
            found[earlier] = None
        return attended

    with attending(model, keep):
        yield found
    if not any(found):
        raise AssayError(
            f"{type(unwrapped(model)).__name__} has no layer that attends through transformers' attention interface, "
            f"so its queries, keys and values cannot be compared: leave out the term that reads them."
        )


@contextmanager
def sharing(model: Any, source: list[Attended | None]) -> Iterator[None]:
    """Within it each layer attends to the keys and values of the same layer of ``source``, which get no gradient."""

    def share(layer: int, attended: Attended) -> Attended:
        shared = source[layer]
        if shared is None:
            return attended
        key, value = (
            shared.key.detach().to(attended.key.dtype),
            shared.value.detach().to(attended.value.dtype),
        )
        return replace(attended, key=key, value=value)

    with attending(model, share):
        yield


def attention_layers(model: Any) -> dict[int, int]:
    """The number of the decoder block, from 0, that each module inside one belongs to, by the module's identity."""
    numbered = ((re.search(r"\b\d+\b", name), module) for name, module in decoder(model).named_modules())
    return {id(module): int(number[0]) for number, module in numbered if number is not None}


def layer_count(model: Any) -> int:
    """How many decoder blocks there are."""
    return max(attention_layers(model).values(), default=-1) + 1


def decoder(model: Any) -> Any:
    """The part of a model that reads the text: without the head, an adapter's wrapping or an eye."""
    inner = unwrapped(model)
    return inner.get_decoder() if hasattr(inner, "get_decoder") else inner
