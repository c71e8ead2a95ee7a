"""Our own model classes: a Llama with fewer heads and neurons per layer, and a Llama with a distance head.

``register`` makes them known to transformers' Auto classes and to lm-eval; ``with_head`` gives a model
another output head; ``shrink`` cuts what a structural pruning zeroed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, Component

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

REVISION = 1

# The model types whose layers we know how to cut and whose head we know how to exchange.
LLAMAS = ("llama", "pruned_llama", "harmonic_llama")


@cache
def register() -> None:
    """Make our classes known to this process; a second call does nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from methods.architectures import harmonic_llama, pruned_llama

    for configuration, model in (
        (pruned_llama.PrunedLlamaConfig, pruned_llama.PrunedLlamaForCausalLM),
        (harmonic_llama.HarmonicLlamaConfig, harmonic_llama.HarmonicLlamaForCausalLM),
    ):
        AutoConfig.register(configuration.model_type, configuration, exist_ok=True)
        AutoModelForCausalLM.register(configuration, model, exist_ok=True)
        # lm-eval asks this table, and not the Auto class, whether a model is a causal one.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[configuration.model_type] = model.__name__


def with_head(model: PreTrainedModel, component: Component) -> PreTrainedModel:
    """The same decoder under another output head; the class vectors are the old output weights.

    Tied embeddings stay tied. Raises an AssayError for a model that is no Llama.
    """
    from methods.architectures.harmonic_llama import HarmonicLlamaForCausalLM, configure

    require_llama(model, f"a {component.name} head")
    settings = copied_settings(model) | {"assay_head": configure(component)}
    return rebuilt(model, HarmonicLlamaForCausalLM, settings)


def shrink(model: PreTrainedModel) -> PreTrainedModel:
    """The physically smaller model: heads and neurons that contribute exactly nothing are cut.

    A head counts as removed when its columns of ``o_proj`` are zero (with grouped queries: those of the
    whole group), a neuron when its column of ``down_proj`` is. The parent's class of head is kept.
    """
    from methods.architectures import harmonic_llama, pruned_llama

    require_llama(model, "cutting heads and neurons")
    decoder: Any = model.base_model
    kept = [pruned_llama.kept_units(layer) for layer in decoder.layers]
    settings = copied_settings(model) | pruned_llama.widths(model, kept)
    harmonic = model.config.model_type == "harmonic_llama"
    build = harmonic_llama.HarmonicLlamaForCausalLM if harmonic else pruned_llama.PrunedLlamaForCausalLM
    return rebuilt(model, build, settings, pruned_llama.sliced_state(model, kept))


def require_llama(model: PreTrainedModel, purpose: str) -> None:
    """Raise an AssayError unless the model is one of the Llamas whose layers are known here."""
    if model.config.model_type not in LLAMAS:
        raise AssayError(
            f"{purpose} is available for models of type {', '.join(LLAMAS)}; this model is of type "
            f"{model.config.model_type}."
        )


def copied_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The model's configuration as keyword arguments for another class's configuration."""
    settings = dict(model.config.to_dict())
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    return settings


def rebuilt(
    model: PreTrainedModel, build: Any, settings: dict[str, Any], state: dict[str, Tensor] | None = None
) -> PreTrainedModel:
    """A model of class ``build`` with these settings and weights, on the old model's device, in its dtype."""
    import torch

    # Building draws random numbers for weights that are overwritten at once: leave the stream untouched.
    with torch.random.fork_rng(devices=[]):
        new: Any = build(build.config_class(**settings))
    # Only the parameters change dtype: the rotary frequencies must stay float32 in a bf16 model.
    for parameter in new.parameters():
        parameter.data = parameter.data.to(device=model.device, dtype=model.dtype)
    new.to(model.device)
    new.load_state_dict(model.state_dict() if state is None else state)
    new.generation_config = model.generation_config
    return new.train(model.training)
