"""RMU: steer the hidden states of forget rows in a random direction, and hold those of retain rows where they are.

Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use with Unlearning" (there: representation
misdirection for unlearning).

    L = gamma * mean_b 1/n_b sum_t D(h[b,t], c u / ||u||)  +  alpha * mean_b 1/n_b sum_t D(h[b,t], h_start[b,t])

D is the mean squared difference over the d entries, h the output of one decoder block at the positions *of* the
answer's n_b tokens (labels are not shifted). u is drawn once a run from Uniform[0,1)^d: all its entries are positive.
``retain_loss`` may be the answer NLL or the KL instead of the second term. Trained are the MLP's output matrices of
that block and the two below, or what ``trained`` names.

Where intention and code disagree: locuslab/open-unlearning (``rmu.py``) divides sums of shape [B] by counts of shape
[B,1], so that the mean runs over all pairs: mean(sum) * mean(1/n). ``average="broadcast"`` repeats that, for
comparison only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.stage import AssayError, Claim, Component, Optimizer, Schedule, Stage, Term, Terms
from methods.terms import widen
from methods.unlearn import Retaining, UnlearnBatch, retain_term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.data import Part

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared options and where the model is steered; defaults of open-unlearning's WMDP experiment."""

    # optimizer steps (WMDP; on TOFU the shared ten epochs)
    steps: Annotated[int, Gt(0)] | None = 80
    # sequences of each part in a step (1 x 16)
    batch: Annotated[int, Gt(0)] = 16
    # AdamW at a rate of 5e-5 (on TOFU 1e-5)
    optimizer: Optimizer = Component("adamw", {"learning_rate": 5e-5, "weight_decay": 0.01})
    # constant
    schedule: Schedule = Component("constant")
    # decoder block whose output is steered, counted from 0 (7 of Zephyr's 32)
    layer: Annotated[int, Ge(0)] = 7
    # length c of the control vector (2 in RMU.yaml; the class default is 20)
    coefficient: Annotated[float, Gt(0)] = 2.0
    # "recipe": mlp.down_proj of the block and the two below it; "all", as on TOFU; or patterns such as "*.mlp.*"
    trained: Literal["recipe", "all"] | tuple[str, ...] = "recipe"
    # the distance of hidden states, the answer NLL, or the divergence from the starting model
    retain_loss: Literal["hidden", "nll", "kl"] = "hidden"  # type: ignore[assignment]
    # "broadcast" repeats open-unlearning's slip: mean(sum) * mean(1/n) for mean(sum/n)
    average: Literal["answer", "broadcast"] = "answer"


CLAIMS: tuple[Claim, ...] = ()


def needs_reference(config: Config) -> bool:
    """For its hidden states or its distributions on retain rows."""
    return config.alpha > 0 and config.retain_loss != "nll"


def prepare(config: Config, model: Any, stage: Stage, parts: Any) -> None:
    """Draw the control vector and freeze what is not trained.

    Raises:
        AssayError: the model has no such block, or nothing of the kind to train.
    """
    import torch

    from methods.progress import derive_seed

    count = len(blocks(model))
    if config.layer >= count:
        raise AssayError(
            f"unlearn.rmu: layer={config.layer}, but the model's decoder blocks are 0 to {count - 1}: name one of them."
        )
    freeze(config, model)
    width = model.config.get_text_config().hidden_size
    draw = torch.Generator().manual_seed(derive_seed(stage.seed, "control"))
    control = control_vector(torch.rand(width, generator=draw), config.coefficient)
    model.register_buffer("control_vector", control.to(next(model.parameters()).device), persistent=False)


def control_vector(drawn: Tensor, coefficient: float) -> Tensor:
    """c u / ||u||."""
    return coefficient * drawn / drawn.norm()


def freeze(config: Config, model: Any) -> None:
    """Leave a gradient to the chosen parameters alone, of those that have one (an adapter's, where there is one)."""
    chosen = [
        weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and any(fnmatchcase(plain(name), pattern) for pattern in patterns(config))
    ]
    if not chosen:
        raise AssayError(
            f"unlearn.rmu: no trainable weight matches {', '.join(patterns(config))}: "
            'write trained="all", or patterns of the names of this model\'s weights.'
        )
    model.requires_grad_(False)
    for weight in chosen:
        weight.requires_grad_(True)


def patterns(config: Config) -> tuple[str, ...]:
    """Shell-style patterns on the names of weights."""
    if config.trained == "all":
        return ("*",)
    if config.trained == "recipe":
        lowest = max(0, config.layer - 2)
        return tuple(f"*.{layer}.mlp.down_proj.*" for layer in range(lowest, config.layer + 1))
    return config.trained


def plain(name: str) -> str:
    """A parameter's name in the model itself: an adapter's wrapping taken off."""
    return re.sub(r"^base_model\.model\.|\.lora_[AB]\.\w+", "", name)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget`` and ``retain``: squared distances; with ``average="broadcast"`` each with its ``inverse_length``."""
    import torch

    forget = hidden_states(model, batch.forget, config.layer)
    terms = distance(config, "forget", batch.forget, forget, model.control_vector, config.gamma)
    if config.alpha == 0 or config.retain_loss != "hidden":
        return terms | retain_term(config, model, batch, reference)
    with torch.no_grad():
        start = hidden_states(reference, batch.retain, config.layer)
    retain = hidden_states(model, batch.retain, config.layer)
    return terms | distance(config, "retain", batch.retain, retain, start, config.alpha)


def outer(config: Config) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
    """Upstream's average is a product of two means."""
    if config.average == "answer":
        return None

    def objective(means: Mapping[str, Tensor]) -> Tensor:
        value = config.gamma * means["forget"] * means["forget_inverse_length"]
        if "retain" not in means:
            return value
        return value + config.alpha * means["retain"] * means.get("retain_inverse_length", 1.0)

    return objective


def distance(
    config: Config, name: str, part: Part, states: Tensor, target: Tensor, weight: float
) -> dict[str, Term]:
    """Squared distance of ``states`` [B,T,d] from ``target``, a mean over d, answer tokens and sequences."""
    counted = part.labels != -100
    sums = ((states - target).square().mean(-1) * counted).sum(1)
    lengths = part.answer_lengths
    if config.average == "answer":
        return {name: Term((sums / lengths).sum(), part.sequences, weight)}
    inverse = (1 / lengths.to(sums)).sum()
    return {
        name: Term(sums.sum(), part.sequences, weight),
        f"{name}_inverse_length": Term(inverse, part.sequences, 0.0),
    }


# --- hidden states ----------------------------------------------------------------------------------------------


def hidden_states(model: Any, part: Part, layer: int) -> Tensor:
    """What the block puts out [B,T,d], before any norm that follows: transformers norms the last of its own list."""
    found: list[Any] = []
    handle = blocks(model)[layer].register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        model(input_ids=part.input_ids, attention_mask=part.attention_mask)
    finally:
        handle.remove()
    # a block gives a tensor or a tuple that begins with it, by version and architecture
    return widen(found[0][0] if isinstance(found[0], tuple) else found[0])


def blocks(model: Any) -> nn.ModuleList:
    """The decoder blocks of a model, also with an adapter around it, switched on or off."""
    from torch import nn

    root = model if isinstance(model, nn.Module) else model.model
    count = model.config.get_text_config().num_hidden_layers
    lists = (part for part in root.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    found = next(lists, None)
    if found is None:
        raise AssayError(
            f"unlearn.rmu: {type(root).__name__} has no list of {count} decoder blocks to look into."
        )
    return found
