"""A Llama whose output head measures distances: logits are the log-space scores of a distance head.

The configuration names the head, ``assay_head: {"name": "euclidean", "options": {...}}``, with every
option resolved, so that a model means the same after a default has changed. The class vectors are
``lm_head.weight``: the embedding itself where the embeddings are tied. Because the scores are
log-probabilities up to a constant, everything that expects logits works: ``generate``, cross-entropy,
lm-eval.

The class also takes the per-layer widths of ``pruned_llama``, so a harmonic model can be cut like any
other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from methods.architectures.pruned_llama import PrunedLlamaConfig, PrunedLlamaForCausalLM
from methods.find import catalogue
from methods.stage import AssayError, Component


class HarmonicLlamaConfig(PrunedLlamaConfig):
    """A Llama configuration with the name and the options of its head."""

    model_type = "harmonic_llama"

    assay_head: dict[str, Any] | None = None


class DistanceHead(nn.Linear):
    """Scores [..., V] of hidden states [..., d], in float32 or wider whatever the autocast.

    A subclass of ``nn.Linear`` without its product, so that initialisation, tying and resizing of output
    embeddings treat it as the output layer that it is.
    """

    def __init__(self, hidden: int, classes: int, head: Mapping[str, Any]) -> None:
        super().__init__(hidden, classes, bias=False)
        # The function and not its module: models are copied, and a module cannot be.
        module, self.options = read(head)
        self.scores = module.scores

    def forward(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.options, hidden.flatten(0, -2), self.weight)
        return scores.reshape(*hidden.shape[:-1], -1)


class HarmonicLlamaForCausalLM(PrunedLlamaForCausalLM):
    """A causal Llama with a distance head in place of the linear one."""

    config_class = HarmonicLlamaConfig

    def __init__(self, config: HarmonicLlamaConfig) -> None:
        super().__init__(config)
        if config.assay_head is None:
            raise AssayError(
                'a harmonic_llama configuration needs assay_head, such as {"name": "cosine", "options": {}}.'
            )
        self.lm_head = DistanceHead(config.hidden_size, config.vocab_size, config.assay_head)
        self.post_init()


def configure(component: Component) -> dict[str, Any]:
    """The ``assay_head`` entry for a component: its name and all of its options."""
    settings = build(component.name, component.options)[1]
    return {"name": component.name, "options": dataclasses.asdict(settings)}


def read(head: Mapping[str, Any]) -> tuple[Any, Any]:
    """The head's module and its typed options, from an ``assay_head`` entry."""
    if "name" not in head:
        raise AssayError(
            f"assay_head needs the name of a head; it holds only: {', '.join(head) or 'nothing'}."
        )
    return build(head["name"], head.get("options", {}))


def build(name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Module and checked options of the head called ``name``; a wrong option is a sentence."""
    from pydantic import TypeAdapter, ValidationError

    module = catalogue().component("head", name).load()
    known = [field.name for field in dataclasses.fields(module.Config)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise AssayError(f"head {name} has no option {unknown[0]!r}; it has: {', '.join(known)}.")
    try:
        return module, TypeAdapter(module.Config).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise AssayError(f"head {name}: option {place}: {first['msg']}.") from error
