"""Representation-guided initialisation of a LoRA adapter (RILA), and the directions of what is to be kept.

Per adapted linear layer with weight W0 [d_out,d_in], LoRA scale s, and its outputs h summed over a sequence's tokens:

    C_X = H_X^T H_X / N_X,   H_X [N_X,d_out]             forget and retain rows; uncentred, float64
    Q   = the r leading eigenvectors of (1 - beta) C_F - beta C_R
    B = Q,   A = Q^T W0,   W0 <- W0 - s B A              the function stays as it is
    P   = the k leading eigenvectors of C_R

The published code (sustech-nlp/ReGLU) adds 1e-4 I to both C, which moves all eigenvalues alike and no eigenvector.
Its sums run over padding, too, so that they depend on which rows share a batch; here they end where the sequence
ends. It takes the first rows, here the seed draws them.

Where there are fewer rows than outputs, the eigenvectors are sought in the space that the rows span, which is much
smaller. What is kept in memory for it are 8 bytes per row and output of all adapted layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.data import Example, Part

REVISION = 1
# Sequences in one forward pass: fixed, so that no option that says how a job runs can turn an eigenvector.
CHUNK = 8
# Name of the buffer that holds P [d_out,k] in an adapted layer.
BASIS = "retain_basis"


@dataclass(frozen=True)
class Guided:
    """What a layer is started from: ``up`` B [d_out,r], ``down`` A [r,d_in], ``residual`` W0 - s B A."""

    up: Tensor
    down: Tensor
    residual: Tensor


def guided(weight: Tensor, forget: Tensor, retain: Tensor, rank: int, scale: float, beta: float) -> Guided:
    """RILA of one layer, in float64.

    A layer with fewer outputs than ``rank`` has fewer directions: the rest of B and A is 0, and stays 0.

    Args:
        weight: W0 [d_out,d_in]. ``forget``, ``retain``: summed outputs [N,d_out].
    """
    weight, forget, retain = weight.double(), forget.double(), retain.double()
    found = leading([(1 - beta, forget), (-beta, retain)], rank)
    up = found.new_zeros(len(weight), rank)
    up[:, : found.shape[1]] = found
    down = up.T @ weight
    return Guided(up, down, weight - scale * up @ down)


def retain_basis(retain: Tensor, count: int) -> Tensor:
    """P [d_out, min(count, d_out)] from summed outputs [N,d_out]."""
    return leading([(1.0, retain.double())], count)


def leading(weighted: Sequence[tuple[float, Tensor]], count: int) -> Tensor:
    """Eigenvectors [d, min(count, d)] of the largest eigenvalues of sum_i weight_i H_i^T H_i / N_i, H_i [N_i,d].

    Their signs are fixed: the largest entry of each is positive, so that machines agree.
    """
    import torch

    rows = torch.cat([values for _, values in weighted])
    count = min(count, rows.shape[1])
    span = torch.linalg.qr(rows.T).Q if count <= len(rows) < rows.shape[1] else None
    inner = [(weight, values if span is None else values @ span) for weight, values in weighted]
    matrix = torch.stack([weight / len(values) * values.T @ values for weight, values in inner]).sum(0)
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, -count:].flip(1)
    vectors = vectors if span is None else span @ vectors
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def summed(outputs: Tensor, attended: Tensor) -> Tensor:
    """Outputs [B,T,d] summed over the attended positions [B,T], in float64 [B,d]."""
    return (outputs.double() * attended.unsqueeze(-1)).sum(1)


# --- a model with its adapter -----------------------------------------------------------------------------------


def adapted(model: Any) -> dict[str, Any]:
    """The layers of ``model`` that have a LoRA adapter, by name.

    Raises:
        AssayError: one is no plain linear layer, or is the embedding by another name.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn

    layers = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    embedding = model.get_base_model().get_input_embeddings().weight
    for name, layer in layers.items():
        if not isinstance(layer.base_layer, nn.Linear) or layer.base_layer.weight is embedding:
            raise AssayError(
                f"{name} cannot be started from representations: only linear layers with weights of their own can. "
                "Name other layers in the adapter's targets."
            )
    return layers


def initialise(
    model: Any, forget: Sequence[Part], retain: Sequence[Part], beta: float, start: bool, basis: int
) -> None:
    """Start every adapted layer from the outputs on the given rows (if ``start``) and give it its ``retain_basis``.

    Base weights are changed in place.
    """
    import torch

    layers = adapted(model)
    with torch.no_grad():
        forget_sums, retain_sums = (outputs(model, layers, parts) for parts in (forget, retain))
        for name, layer in layers.items():
            kept = retain_sums.pop(name)
            if start:
                _start(layer, forget_sums.pop(name), kept, beta)
            weight = layer.base_layer.weight
            layer.register_buffer(BASIS, retain_basis(kept, basis).to(weight), persistent=False)
    # On the weights that it came from the adapter would be a wrong model: it is not written beside the merged one.
    model.base_changed = start


def _start(layer: Any, forget: Tensor, retain: Tensor, beta: float) -> None:
    name, weight = next(iter(layer.lora_A)), layer.base_layer.weight
    up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
    found = guided(weight.cpu(), forget, retain, up.shape[1], layer.scaling[name], beta)
    up.copy_(found.up)
    down.copy_(found.down)
    weight.copy_(found.residual)


def outputs(model: Any, layers: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Tensor]:
    """Outputs of every layer's base, summed over the tokens of each sequence: [N,d_out], on the processor."""
    import torch

    sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    training = model.training
    model.eval()
    with ExitStack() as hooks:
        attended: list[Tensor] = []
        for name, layer in layers.items():
            hook = _collector(sums[name], attended)
            hooks.callback(layer.base_layer.register_forward_hook(hook).remove)
        for part in parts:
            attended[:] = [part.attention_mask]
            model(input_ids=part.input_ids, attention_mask=part.attention_mask)
    model.train(training)
    return {name: torch.cat(found) for name, found in sums.items()}


def _collector(found: list[Tensor], attended: list[Tensor]) -> Any:
    def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
        found.append(summed(output, attended[0]).cpu())

    return hook


def in_chunks(examples: Sequence[Example], padding: int, name: str, device: Any) -> list[Part]:
    """Examples as padded batches on the device."""
    from methods.data import collate

    starts = range(0, len(examples), CHUNK)
    return [collate(examples[start : start + CHUNK], padding, name).to(device) for start in starts]
