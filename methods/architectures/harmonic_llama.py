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

from typing import Any

from methods.architectures.distance_head import DistanceHead
from methods.architectures.pruned_llama import PrunedLlamaConfig, PrunedLlamaForCausalLM
from methods.stage import AssayError


class HarmonicLlamaConfig(PrunedLlamaConfig):
    """A Llama configuration with the name and the options of its head."""

    model_type = "harmonic_llama"

    assay_head: dict[str, Any] | None = None


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
