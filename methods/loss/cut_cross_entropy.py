"""Cut cross entropy: exact cross entropy that never holds the scores of all tokens and classes.

Wijmans, Huval, Hertzberg, Koltun, Krahenbuhl 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 4.
With hidden states e_i and class vectors c_v:

    l_i = log sum_v exp(s(e_i, c_v)) - s(e_i, c_{y_i})

The log-sum is built up block by block over tokens and classes; the backward pass computes each block of scores again.
What is kept is the hidden states, the head's parameters and one number for each token. The scores s are those of any
head in which a class has its own, linear (with or without a bias) or a distance; a head that divides by the row's
smallest distance or smooths its probabilities is refused. ``softcap`` k turns s into k tanh(s / k), and ``z_loss``
adds ``c log^2 Z`` (see ``logit_z``), because log Z is at hand.

On CUDA, under 16-bit autocast and with a linear head, the fused kernel of the package ``cut-cross-entropy`` (Apple)
takes over where it is installed, without its filter, which leaves out small gradients. A version of it that cannot
return log Z or take a bias is not used where these are needed. Everywhere else, and on the processor always, the
blocks are computed by torch. Both give the same numbers up to rounding, so ``implementation`` says how and not what.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.stage import AssayError, How

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.loss",)
IGNORED = -100

Implementation = Literal["auto", "blockwise", "fused"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of cut cross entropy."""

    # scores s become softcap * tanh(s / softcap); None leaves them (Gemma 2: 30)
    softcap: Annotated[float, Gt(0)] | None = None
    # the weight of log^2 Z (PaLM: 1e-4)
    z_loss: Annotated[float, Ge(0)] = 0.0
    # auto: the fused kernel where it can be used
    implementation: Annotated[Implementation, How] = "auto"


def hidden_losses(config: Config, layer: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token [N], in nats, from its hidden state [N,d], its target [N] and the output layer."""
    losses, normaliser = cut_cross_entropy(
        layer,
        hidden,
        targets,
        softcap=config.softcap,
        implementation=config.implementation,
        normaliser=config.z_loss > 0,
    )
    return losses if normaliser is None else losses + config.z_loss * normaliser.square()


def cut_cross_entropy(
    layer: Any,
    hidden: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    ignored: int = IGNORED,
    shift: int = 0,
    implementation: Implementation = "auto",
    normaliser: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Losses of hidden states [..., d] and targets [...], and log Z of each where asked for; 0 at ignored targets.

    Args:
        shift: position t predicts the target at t + shift; both results are shorter by that in the last dimension.
    """
    if shift:
        hidden, targets = hidden[..., :-shift, :], targets[..., shift:]
    kept = targets != ignored
    compute = chosen(implementation, layer, hidden, normaliser)
    losses, normalisers = compute(layer, hidden[kept], targets[kept], softcap)
    return scattered(losses, kept), scattered(normalisers, kept) if normaliser else None


def scattered(values: Tensor, kept: Tensor) -> Tensor:
    """Values [n] of the kept places, in their places; 0 elsewhere."""
    return values.new_zeros(kept.shape).masked_scatter(kept, values)


# --- which code computes it -----------------------------------------------------------------------------------

Compute = Callable[[Any, "Tensor", "Tensor", "float | None"], tuple["Tensor", "Tensor"]]


def chosen(implementation: Implementation, layer: Any, hidden: Tensor, normaliser: bool) -> Compute:
    """The function that computes losses and log Z.

    Raises:
        AssayError: the fused kernel is asked for and cannot be used.
    """
    from methods.loss._blockwise import cross_entropy

    if implementation == "blockwise":
        return cross_entropy
    if implementation == "auto" and getattr(layer, "direct_losses", None) is not None:
        return direct
    obstacle = why_not_fused(layer, hidden, normaliser)
    if obstacle and implementation == "fused":
        raise AssayError(
            f'cut_cross_entropy: implementation="fused" cannot be used here, because {obstacle}; leave it at "auto".'
        )
    return cross_entropy if obstacle else fused


def why_not_fused(layer: Any, hidden: Tensor, normaliser: bool) -> str:
    """What keeps the fused kernel from being used, as half a sentence; empty where nothing does."""
    import torch
    from torch import nn

    if not on_card(hidden):
        return "it needs a CUDA device"
    if type(layer) is not nn.Linear:
        return "it needs a linear head"
    if not torch.is_autocast_enabled(hidden.device.type):
        return 'it is exact enough in 16 bits only, and precision is "float32"'
    if package() is None:
        return "the package cut-cross-entropy is not installed"
    known = inspect.signature(package()).parameters
    if has_bias(layer) and "bias" not in known:
        return "the installed cut-cross-entropy takes no bias"
    if normaliser and "return_lse" not in known:
        return "the installed cut-cross-entropy does not return log Z, which z_loss needs"
    return ""


def direct(layer: Any, hidden: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Losses and log Z [N] of a head that has a shorter way to them: the codes of VQ-Logits."""
    found: tuple[Tensor, Tensor] = layer.token_losses(hidden, targets, softcap)
    return found


def on_card(hidden: Tensor) -> bool:
    """Whether the hidden states lie on a CUDA device."""
    return hidden.is_cuda


def has_bias(layer: Any) -> bool:
    """Whether an output layer adds a number to each class's score."""
    return layer.bias is not None


def package() -> Any:
    """The fused function of the package, or None where it is not installed."""
    try:
        return importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError:
        return None


def fused(layer: Any, hidden: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Losses and log Z [N] from the fused kernel, whose filter is off; log Z is 0 where it does not return it."""
    import torch

    kernel = package()
    known = inspect.signature(kernel).parameters
    dtype = torch.get_autocast_dtype(hidden.device.type)
    options: dict[str, Any] = {"softcap": softcap, "reduction": "none", "filter_eps": None}
    if has_bias(layer):
        options["bias"] = layer.bias.to(dtype)
    if "return_lse" in known:
        options["return_lse"] = True
    found = kernel(hidden.to(dtype), layer.weight.to(dtype), targets, **options)
    losses, normalisers = found if "return_lse" in known else (found, torch.zeros_like(found))
    return losses.float(), normalisers.float()
