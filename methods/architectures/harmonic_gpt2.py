"""A GPT-2 whose output head is one of ``methods/head``: what ``harmonic_llama`` is to a Llama.

Baek et al. 2025, "Harmonic Loss Trains Interpretable AI Models", trains GPT-2 small in this way, with tied
embeddings and ``euclidean(epsilon=0, smoothing=0.01)``, whose exponent is the width 768.
"""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

from methods.architectures.distance_head import DistanceHead
from methods.stage import AssayError


class HarmonicGPT2Config(GPT2Config):
    """A GPT-2 configuration with the name and the options of its head."""

    model_type = "harmonic_gpt2"

    assay_head: dict[str, Any] | None = None


class HarmonicGPT2LMHeadModel(GPT2LMHeadModel):
    """A causal GPT-2 with a head of ours in place of the linear one."""

    config_class = HarmonicGPT2Config

    def __init__(self, config: HarmonicGPT2Config) -> None:
        super().__init__(config)
        if config.assay_head is None:
            raise AssayError(
                'a harmonic_gpt2 configuration needs assay_head, such as {"name": "cosine", "options": {}}.'
            )
        self.lm_head = DistanceHead(config.n_embd, config.vocab_size, config.assay_head)
        self.post_init()
