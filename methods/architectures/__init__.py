"""Our own model classes: language models with a head of ours, a Llama cut by pruning, small classifiers.

``register`` makes them known to transformers' Auto classes and to lm-eval; ``with_head`` gives a model
another output head; ``output_layer``, ``block_scores`` and ``without_head`` are how a loss gets at the head of
any model; ``shrink`` cuts what a structural pruning zeroed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from methods.stage import AssayError, Component

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

REVISION = 1

# The model types whose layers we know how to cut.
LLAMAS = ("llama", "pruned_llama", "harmonic_llama")
# A head that cannot get below this loss, in nats, is announced before a language model is trained with it.
NOTABLE_FLOOR = 0.01
# How far, as a ratio of distances, a trained model may hold the other classes off: the announcement's example.
FAR = 10.0


@cache
def register() -> None:
    """Make our classes known to this process; a second call does nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from methods.architectures import harmonic_gpt2, harmonic_llama, projected_llama, pruned_llama

    for configuration, model in (
        (pruned_llama.PrunedLlamaConfig, pruned_llama.PrunedLlamaForCausalLM),
        (harmonic_llama.HarmonicLlamaConfig, harmonic_llama.HarmonicLlamaForCausalLM),
        (projected_llama.ProjectedLlamaConfig, projected_llama.ProjectedLlamaForCausalLM),
        (harmonic_gpt2.HarmonicGPT2Config, harmonic_gpt2.HarmonicGPT2LMHeadModel),
    ):
        AutoConfig.register(configuration.model_type, configuration, exist_ok=True)
        AutoModelForCausalLM.register(configuration, model, exist_ok=True)
        # lm-eval asks this table, and not the Auto class, whether a model is a causal one.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[configuration.model_type] = model.__name__
    _register_classifiers()


def _register_classifiers() -> None:
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    from methods.architectures import classifiers

    for loader, models in (
        (AutoModelForImageClassification, classifiers.IMAGES),
        (AutoModelForSequenceClassification, classifiers.TOKENS),
    ):
        for model in models:
            configuration = model.config_class
            AutoConfig.register(configuration.model_type, configuration, exist_ok=True)
            loader.register(configuration, model, exist_ok=True)


# --- the output head -----------------------------------------------------------------------------------------


def with_head(model: PreTrainedModel, component: Component) -> PreTrainedModel:
    """The same model under another output head; the class vectors are the old output weights.

    Tied embeddings stay tied. What old and new head have in common, such as a bias, is kept.

    Raises:
        AssayError: a model whose head cannot be exchanged, a wrong option, or a head that cannot be tied.
    """
    from methods.architectures import distance_head

    build, entry = _class_with_head(model, component), distance_head.configure(component)
    layer = output_layer(model)
    classes, width = class_vectors(layer).shape
    _refuse_tied(model, layer, component, classes)
    new = rebuilt(
        model, build, copied_settings(model) | {"assay_head": entry}, _state_under(model, layer, entry)
    )
    if hasattr(model, "lm_head"):
        announce_floor(component, output_layer(new).loss_floor(), width, classes)
    return new


def _class_with_head(model: PreTrainedModel, component: Component) -> Any:
    """The class that the model has with a head of ours."""
    from methods.architectures import harmonic_gpt2, harmonic_llama

    if hasattr(model.config, "assay_head"):
        return type(model)
    if model.config.model_type in LLAMAS:
        return harmonic_llama.HarmonicLlamaForCausalLM
    if model.config.model_type == "gpt2" and hasattr(model, "lm_head"):
        return harmonic_gpt2.HarmonicGPT2LMHeadModel
    raise AssayError(
        f"a {component.name} head is available for models of type {', '.join(LLAMAS)}, gpt2, harmonic_gpt2 and for "
        f"this project's classifiers; this model is of type {model.config.model_type}."
    )


def _refuse_tied(model: PreTrainedModel, layer: Any, component: Component, classes: int) -> None:
    """A head whose weight has other rows than the embedding cannot share it."""
    from methods.architectures import distance_head

    wanted = distance_head.rows(*distance_head.build(component.name, component.options), classes)
    shared = sum(weight is layer.weight for _, weight in model.named_parameters(remove_duplicate=False)) > 1
    if shared and wanted != classes:
        raise AssayError(
            f"a {component.name} head has {wanted} vectors and cannot share the {classes} of the embedding, to which "
            f"this model's output is tied: start from a model that is not tied (tied=false of a new model; of a "
            f"downloaded one a copy whose config.json says tie_word_embeddings: false and whose file has the "
            f"output weight)."
        )


def _state_under(model: PreTrainedModel, layer: Any, entry: dict[str, Any]) -> dict[str, Tensor]:
    """The model's state dict with what the new head makes of the old one's class vectors and parameters."""
    from methods.architectures import distance_head

    state = dict(model.state_dict())
    if getattr(layer, "head", None) == entry:
        return state
    prefix = next(name for name, module in model.named_modules() if module is layer) + "."
    old = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    new = distance_head.adopted(entry, class_vectors(layer).detach())
    if old.get("bias") is not None and "bias" in new:
        new["bias"] = old["bias"]
    return state | {prefix + name: value for name, value in new.items()}


def loss_floor(component: Component, width: int, classes: int) -> float:
    """The least mean loss in nats that a head can reach at this size; 0 for one that can be certain."""
    from methods.architectures import distance_head

    return distance_head.loss_floor(component, width, classes)


def announce_floor(component: Component, floor: float, width: int, classes: int) -> None:
    """Say before training what the head cannot do: a loss floor, or one that holds as long as classes lie as usual."""
    from methods.architectures.distance_head import loss_at, usual_loss

    far, orthogonal = loss_at(component, width, classes, FAR), usual_loss(component, classes)
    words = []
    if floor > NOTABLE_FLOOR:
        words.append(f"no loss below {floor:.2f} nats can be reached, whatever is learnt")
    if orthogonal > max(floor, NOTABLE_FLOOR):
        words.append(
            f"with every wrong class orthogonal to the hidden state the loss is still {orthogonal:.2f} nats"
        )
    elif far > max(floor, NOTABLE_FLOOR):
        words.append(
            f"with every wrong class {FAR:g} times as far away as the right one the loss is still {far:.2f} nats; "
            "a larger exponent lowers it"
        )
    if words:
        text = "; ".join(words)
        print(f"assay: head {component.name} over {classes} classes: {text}.", file=sys.stderr, flush=True)


def output_layer(model: Any) -> Any:
    """The layer that gives the model's scores: its output embedding, or ``classifier``; below any adapter."""
    inner = unwrapped(model)
    found = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    layer = found if found is not None else getattr(inner, "classifier", None)
    if layer is None:
        raise AssayError(
            f"{type(inner).__name__} has no output layer known here: neither output embeddings nor a classifier."
        )
    return layer


def unwrapped(model: Any) -> Any:
    """The model itself, without what holds its adapter or spreads it over processes."""
    if hasattr(model, "get_base_model"):
        return unwrapped(model.get_base_model())
    inner = model.__dict__.get("_modules", {}).get("module")
    return model if inner is None else unwrapped(inner)


def class_vectors(layer: Any) -> Tensor:
    """One vector for each class [V,d] of an output layer."""
    vectors: Tensor = layer.class_vectors() if hasattr(layer, "class_vectors") else layer.weight
    return vectors


def block_scores(layer: Any, hidden: Tensor, classes: slice) -> Tensor:
    """Scores [N,v] of a slice of the classes for hidden states [N,d], in float32 or wider.

    Raises an AssayError where the score of a class depends on the others, and for a layer with an adapter.
    """
    from torch import nn
    from torch.nn.functional import linear

    from methods.head import widen

    if hasattr(layer, "block"):
        found: Tensor = layer.block(hidden, classes)
        return found
    if type(layer) is not nn.Linear:
        raise AssayError(
            f"the output layer is a {type(layer).__name__}, whose classes cannot be scored in slices: leave it out of "
            "the adapter's targets, or use loss=cross_entropy."
        )
    bias: Any = layer.bias
    bias = None if bias is None else bias[classes]
    return widen(linear(hidden.to(layer.weight.dtype), layer.weight[classes], bias))


@contextmanager
def without_head(model: Any, behind: bool = False) -> Iterator[HeadBehind]:
    """Within it the model's output layer is not there, and what would enter it is its ``logits``.

    Yields the output layer as a function, with all that the model does to its logits behind it. Only where the caller
    applies that (``behind``) may the model change its logits there: soft-capping, scaling; its ``logits`` are then
    what it makes of the hidden states, and the hidden states are found with ``HeadBehind.entering``.

    Raises:
        AssayError: the model changes its logits behind the output layer, and the caller does not.
    """
    layer, config = output_layer(model), _text_config(unwrapped(model).config)
    head = HeadBehind(layer, _changes(config), type(unwrapped(model)).__name__)
    if head.changes and not behind:
        name, value = next(iter(head.changes.items()))
        raise AssayError(
            f"{head.model} changes its logits behind the output layer ({name}={value}): a loss cannot apply that layer "
            "itself; use loss=cross_entropy."
        )
    before = layer.__dict__.get("forward")
    layer.forward = head.keep
    try:
        yield head
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _changes(config: Any) -> dict[str, float]:
    """What a model's configuration says is done to logits behind the output layer."""
    named = {name: getattr(config, name, None) for name in BEHIND_THE_HEAD}
    return {name: float(value) for name, value in named.items() if value not in (None, 1, 1.0)}


def _text_config(config: Any) -> Any:
    """The configuration of the text model, where a model has several."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class HeadBehind:
    """An output layer as a function of a block of hidden states, with what the model does to its logits.

    It runs under the autocast that the layer would have run under within the model.
    """

    def __init__(self, layer: Any, changes: Mapping[str, float], model: str) -> None:
        self.layer, self.changes, self.model = layer, changes, model
        self._hidden: Tensor | None = None
        self._autocast: dict[str, Any] = {}

    def keep(self, hidden: Tensor) -> Tensor:
        """In the place of the layer: remember what enters it and hand it on unchanged."""
        import torch

        device = hidden.device.type
        self._hidden = hidden
        self._autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            # A cache would keep a copy of the weights beyond this block.
            "cache_enabled": False,
        }
        return hidden

    def entering(self, logits: Tensor) -> Tensor:
        """The hidden states [B,T,d] that entered the layer in the forward pass that gave these ``logits``.

        Raises:
            AssayError: the model does something to its logits that is not known here.
        """
        hidden = self._hidden
        assert hidden is not None  # the forward pass ran within ``without_head``
        self._hidden = None
        if hidden.numel() and self.layer not in _UNDERSTOOD:
            self._refuse_unknown(hidden.detach(), logits.detach())
            _UNDERSTOOD.add(self.layer)
        return hidden

    def _refuse_unknown(self, hidden: Tensor, logits: Tensor) -> None:
        """Whether what the model did to one position is what is repeated here, up to the rounding of its own type."""
        import torch

        row = (0,) * (hidden.ndim - 1)
        ours, theirs = self._behind(hidden[row]).float(), logits[row].float()
        if not torch.allclose(ours, theirs, rtol=2e-2, atol=1e-3, equal_nan=True):
            raise AssayError(
                f"{self.model} changes its logits behind the output layer in a way that is not known here: a loss that "
                "works block by block cannot repeat it."
            )

    def __call__(self, block: Tensor) -> Tensor:
        """Logits [c,V] of hidden states [c,d], in float32 or wider."""
        import torch

        with torch.autocast(**self._autocast):
            raw: Tensor = self.layer(block)
        return self._behind(raw)

    def _behind(self, logits: Tensor) -> Tensor:
        from methods.head import widen

        logits = widen(logits)
        for name, value in self.changes.items():
            logits = BEHIND_THE_HEAD[name](logits, value)
        return logits


def _soft_capped(logits: Tensor, cap: float) -> Tensor:
    return cap * (logits / cap).tanh()


def _multiplied(logits: Tensor, factor: float) -> Tensor:
    return logits * factor


def _divided(logits: Tensor, divisor: float) -> Tensor:
    return logits / divisor


# Settings of models that change the logits behind the output layer, and how; None and 1 mean "unchanged".
BEHIND_THE_HEAD = {
    "final_logit_softcapping": _soft_capped,
    "logit_scale": _multiplied,
    "logits_scaling": _divided,
    "lm_head_multiplier": _multiplied,
}
# Output layers behind which nothing but that happens: looked at once each, because it makes a card wait.
_UNDERSTOOD: WeakSet[Any] = WeakSet()


# --- cutting -------------------------------------------------------------------------------------------------


def shrink(
    model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})
) -> PreTrainedModel:
    """The physically smaller model: what contributes exactly nothing is cut, and layers with factors become two.

    Heads and neurons are cut as ``cutting.kept_units`` says: with shared key-value heads each query head on its own,
    and a key-value head when all of its query heads go. An attention or MLP without any is skipped; a block without
    either is taken out. Where all layers come out alike the result is a plain ``LlamaForCausalLM``; a model with a
    distance head keeps it.

    Args:
        factors: by module name, (a [out,r], b [r,in]) whose product is the layer's weight.
    Raises:
        AssayError: a model of another family, or factors that fit no linear layer of a block.
    """
    from methods.architectures.cutting import Cut

    require_llama(model, "cutting heads, neurons and blocks", whole=False)
    return Cut.of(model, factors).build()


# What the blocks of a Llama are made of, as a sentence says it.
BLOCK = "blocks with self_attn.{q,k,v,o}_proj and mlp.{gate,up,down}_proj"


def require_llama(model: PreTrainedModel, purpose: str, whole: bool = True) -> None:
    """Raise an AssayError unless the model is one of the Llamas whose layers are known here.

    Args:
        whole: every block must have both sub-blocks, with equally shared key-value heads and no layer in two factors.
    """
    config = model.config
    if config.model_type not in LLAMAS:
        raise AssayError(
            f"{purpose} is available for models of type {', '.join(LLAMAS)}, which have {BLOCK}; this model is of type "
            f"{config.model_type}."
        )
    if whole and not _is_whole(config):
        raise AssayError(
            f"{purpose} needs {BLOCK}, and not all blocks of this model have them: it is the physically smaller form "
            "of another one; take the zero-masked form, in the folder above it."
        )


def _is_whole(config: Any) -> bool:
    """Whether all blocks have both sub-blocks, with equally shared key-value heads and no layer in two factors."""
    heads, neurons = (
        getattr(config, name, None) or [] for name in ("layer_num_heads", "layer_intermediate_size")
    )
    others = [getattr(config, name, None) for name in ("layer_queries_per_group", "layer_ranks")]
    return others == [None, None] and all(map(any, heads)) and all(neurons)


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
    if hasattr(model, "generation_config"):
        new.generation_config = model.generation_config
    return new.train(model.training)
