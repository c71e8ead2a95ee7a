"""Registers this project's model classes: ``import assay`` and the Auto classes load them.

    import assay
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("results/stages/<id>/model/physical")

No ``trust_remote_code`` is needed, there or in lm-eval's ``hf`` model.
"""

from __future__ import annotations

from methods.architectures import register

__all__ = ["register"]

register()
