"""The Kronecker factors of a transformer's linear layers, measured on data: A and S of all layers in one pass.

Sequences are summed over, tokens of one sequence are not independent, and a weight is used once for every position.
The convention is that of K-FAC *expand* (Eschenhagen et al. 2023): with M answer tokens, P positions that are not
padding, and d the gradient by a layer's output of a sequence's summed loss under one draw of labels,

    A = 1/P sum over positions  a a^T          S = 1/M sum over positions  d d^T

so that S (x) A is in nats per answer token, as the mean loss is. Prompt positions count as well: the answer reads
them through attention. EK-FAC's second moments are those of whole sequences' gradients, cross terms between positions
included: 1/M sum over sequences (Q_S^T [sum over positions d a^T] Q_A)^2.

``methods.curvature``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from methods.curvature._kronecker import Basis, Labels, basis_of, second_moments
from methods.stage import AssayError
from methods.terms import widen

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.data import Example, Part


# --- layers -------------------------------------------------------------------------------------------------------


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Every linear layer of the decoder's blocks by name; embeddings and output head are none of them.

    Raises:
        AssayError: another kind of model, or a weight that two layers share, whose curvature is not one layer's.
    """
    from torch import nn

    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise AssayError(
            f"K-FAC needs a decoder with a list of layers, which {type(model).__name__} does not have."
        )
    inside = {id(part) for part in blocks.modules() if isinstance(part, nn.Linear)}
    found = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and id(part) in inside
    }
    _refuse_shared(model, found)
    return found


def _refuse_shared(model: Any, layers: Mapping[str, nn.Linear]) -> None:
    every = list(model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        others = [other for other, weight in every if weight is layer.weight and other != f"{name}.weight"]
        if others:
            raise AssayError(
                f"{name}.weight and {others[0]} are one weight: tied layers have no curvature of their own; "
                "take a model without them."
            )


def matrix_of(layer: nn.Linear, values: Callable[[Any], Tensor]) -> Tensor:
    """What ``values`` gives for a layer's weight [out,in], that for its bias appended as a last column."""
    import torch

    if layer.bias is None:
        return values(layer.weight)
    return torch.cat([values(layer.weight), values(layer.bias)[:, None]], dim=1)


def weights_of(name: str, layer: nn.Linear, matrix: Tensor) -> dict[str, Tensor]:
    """The inverse of ``matrix_of``: the columns of a matrix by the names of the parameters they belong to."""
    if layer.bias is None:
        return {f"{name}.weight": matrix}
    return {f"{name}.weight": matrix[:, :-1], f"{name}.bias": matrix[:, -1]}


# --- what is measured on ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The sequences that curvature is measured on: padded batches, with the number of each sequence."""

    parts: Sequence[Part]
    numbers: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Answer tokens."""
        return sum(int(part.tokens) for part in self.parts)

    @property
    def positions(self) -> int:
        """Tokens that are not padding."""
        return sum(int(part.attention_mask.sum()) for part in self.parts)


def draw_sample(examples: Sequence[Example], count: int | None, size: int, padding: int, seed: int) -> Sample:
    """``count`` sequences drawn without replacement (None, or more than there are: all), at most ``size`` in a batch.

    Neighbours in length share a batch. Which sequences are drawn depends on the seed alone.
    """
    from methods.data import Sampler, collate

    if not examples:
        raise AssayError("there are no sequences to measure curvature on: the data set is empty.")
    chosen = Sampler(len(examples), seed).batch(0, min(count or len(examples), len(examples)))
    order = sorted(chosen, key=lambda row: (len(examples[row].input_ids), row))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return Sample([collate([examples[row] for row in group], padding, "retain") for group in groups], groups)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """The curvature of some layers on a sample, batch after batch: ``for _ in it: ...``, then ``bases``.

    One pass over the sample adds up A and S of all layers together. For EK-FAC (``corrected``) a second one follows:
    its second moments are taken in the eigenbases that the first one ends with. The second pass draws other labels.

    Args:
        run: the logits [B,T,V] of a part, on whatever device the layers are.
        corrected: whether to make the second pass.
    """

    run: Callable[[Part], Tensor]
    layers: Mapping[str, nn.Linear]
    sample: Sample
    labels: Labels
    corrected: bool
    done: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[str, Basis] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        """Batches in all passes."""
        return len(self.sample.parts) * (2 if self.corrected else 1)

    def __iter__(self) -> Iterator[int]:
        while self.done < self.batches:
            self._batch(self.done % len(self.sample.parts))
            self.done += 1
            if self.done == len(self.sample.parts):
                self._decompose()
            if self.done == self.batches and self.corrected:
                self._correct()
            yield self.done

    def finished(self) -> dict[str, Basis]:
        """All batches that are left, and what comes out."""
        for _ in self:
            pass
        return self.bases

    def state(self) -> dict[str, Tensor]:
        """What has been measured so far, by name."""
        return self.sums | tensors_of(self.bases)

    def resume(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a ``state`` after ``done`` batches."""
        device = next(iter(self.layers.values())).weight.device
        self.done = done
        self.bases = bases_of({name: value.to(device) for name, value in tensors.items()}, list(self.layers))
        self.sums = {name: value.to(device) for name, value in tensors.items() if name.startswith("sum.")}

    def _batch(self, number: int) -> None:
        """Add one batch to the sums."""
        import torch

        part, labels = self.sample.parts[number], self.labels
        part = part.to(next(iter(self.layers.values())).weight.device)
        if self.bases:
            labels = replace(labels, seed=labels.seed + 1)
        with _watched(self.layers) as seen, torch.enable_grad():
            logits = widen(self.run(part))[:, :-1]
        inputs = {name: _homogeneous(layer, seen[name][0], part) for name, layer in self.layers.items()}
        self._add_inputs(inputs)
        counts = part.mask.sum(-1).tolist()
        outputs = [seen[name][1] for name in self.layers]
        for draw in labels.draws(logits.detach()[part.mask].softmax(-1), counts, self.sample.numbers[number]):
            upstream = torch.zeros_like(logits).masked_scatter(part.mask[..., None], draw.to(logits.dtype))
            found = torch.autograd.grad(logits, outputs, upstream, retain_graph=True)
            self._add_gradients(inputs, dict(zip(self.layers, found, strict=True)))

    def _add_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        if not self.bases:
            for name, values in inputs.items():
                self._add(f"sum.{name}.inputs", _squares(values))

    def _add_gradients(self, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if self.bases:
                moments = second_moments(widen(gradient), inputs[name], self.bases[name])
                self._add(f"sum.{name}.corrected", moments)
            else:
                self._add(f"sum.{name}.outputs", _squares(widen(gradient)))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name].add_(value) if name in self.sums else value

    def _decompose(self) -> None:
        """Bases in the place of the sums, one layer after the other: both are never held at once."""
        for name in self.layers:
            inputs = self.sums.pop(f"sum.{name}.inputs") / self.sample.positions
            outputs = self.sums.pop(f"sum.{name}.outputs") / self.sample.tokens
            self.bases[name] = basis_of(inputs, outputs)

    def _correct(self) -> None:
        for name in self.layers:
            moments = self.sums.pop(f"sum.{name}.corrected") / self.sample.tokens
            self.bases[name] = replace(self.bases[name], corrected=moments)


def _squares(values: Tensor) -> Tensor:
    """The sum of x x^T over sequences and positions [B,T,d]."""
    rows = values.flatten(0, 1)
    return rows.T @ rows


@contextmanager
def _watched(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Keep the input [B,T,in] of every layer and its output [B,T,out], which takes part in the graph even if frozen."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, layer in layers.items():

        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            seen[name] = arguments[0].detach(), output if output.requires_grad else output.requires_grad_()

        handles.append(layer.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _homogeneous(layer: nn.Linear, inputs: Tensor, part: Part) -> Tensor:
    """Inputs [B,T,in] with a 1 appended where the layer has a bias, and 0 in the padding."""
    import torch

    values = widen(inputs)
    if layer.bias is not None:
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    return values * part.attention_mask[..., None].to(values.dtype)


# --- as files -----------------------------------------------------------------------------------------------------

_FIELDS = [field.name for field in fields(Basis)]


def tensors_of(bases: Mapping[str, Basis]) -> dict[str, Tensor]:
    """Every tensor as ``<layer>.<field>``."""
    return {
        f"{name}.{field}": getattr(basis, field)
        for name, basis in bases.items()
        for field in _FIELDS
        if getattr(basis, field) is not None
    }


def bases_of(tensors: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Basis]:
    """The inverse of ``tensors_of``, for the layers that are there."""
    found = {name: {field: tensors.get(f"{name}.{field}") for field in _FIELDS} for name in layers}
    return {name: _basis(parts) for name, parts in found.items() if parts["inputs"] is not None}


def _basis(parts: Mapping[str, Any]) -> Basis:
    return Basis(**parts)
