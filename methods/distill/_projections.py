"""Trainable orthogonal bases of keys and values, and a model that keeps only the first coordinates of each.

For a layer and a key-value head, with k a key after the rotary embedding, v a value and m the mean of the values:

    k becomes k U_r U_r',    v becomes m + (v - m) V_r V_r',        U_r and V_r the first r columns of U and V

U = U_0 Q(X) with U_0 the eigenvectors of the keys' covariance on some rows, by falling variance, and Cayley's
Q(X) = (I - A/2)^-1 (I + A/2), A = X - X': orthogonal for every X, and the identity for the X = 0 that training starts
from. Which columns come first is what training with changing ranks decides.

A mean of the keys would add one number to all scores of a query, which the softmax takes away again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from methods.progress import derive_seed
from methods.stage import AssayError
from methods.term._attention import Attended, attending, layer_count

if TYPE_CHECKING:
    from torch.nn import Parameter

    from methods.data import Part

REVISION = 1


def cayley(free: Tensor) -> Tensor:
    """An orthogonal matrix [...,d,d] from any one."""
    skew = (free - free.mT) / 2
    identity = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    found: Tensor = torch.linalg.solve(identity - skew, identity + skew)
    return found


class Projections(nn.Module):
    """The bases of every layer and key-value head, and the means of the values.

    Args:
        keys, values: orthogonal start [L,H,d,d], columns by falling variance. ``mean``: of the values [L,H,d].
    """

    key_start: Tensor
    value_start: Tensor

    def __init__(self, keys: Tensor, values: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("key_start", keys)
        self.register_buffer("value_start", values)
        self.key_turn = nn.Parameter(torch.zeros_like(keys))
        self.value_turn = nn.Parameter(torch.zeros_like(values))
        self.value_mean = nn.Parameter(mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, key-value heads, size of a head."""
        layers, heads, size = self.value_mean.shape
        return layers, heads, size

    def key_basis(self, layer: int) -> Tensor:
        """[H,d,d], orthonormal columns, those that are kept first first."""
        return self.key_start[layer] @ cayley(self.key_turn[layer])

    def value_basis(self, layer: int) -> Tensor:
        """The same for values."""
        return self.value_start[layer] @ cayley(self.value_turn[layer])

    def shortened(self, layer: int, attended: Attended, keys: Tensor, values: Tensor) -> Attended:
        """What a layer attends with when of each head's keys and values [H] coordinates are kept."""
        # In bfloat16 a projection would not even leave alone what it keeps.
        with torch.autocast(self.value_mean.device.type, enabled=False):
            key, value = _onto(self.key_basis(layer), keys), _onto(self.value_basis(layer), values)
        mean = self.value_mean[layer][:, None].to(attended.value.dtype)
        return replace(
            attended,
            key=attended.key @ key.to(attended.key.dtype),
            value=mean + (attended.value - mean) @ value.to(attended.value.dtype),
        )


def _onto(basis: Tensor, ranks: Tensor) -> Tensor:
    """The projections [H,d,d] on the first columns of bases [H,d,d]; ``ranks`` [H] says how many."""
    first = torch.arange(basis.shape[-1], device=basis.device) < ranks[:, None].to(basis.device)
    chosen = basis * first[:, None]
    return chosen @ chosen.mT


# --- the start: principal components -----------------------------------------------------------------------------


@dataclass
class _Moments:
    """Count, sum [H,d] and sum of squares [H,d,d] of one layer's keys or values."""

    count: int = 0
    sum: Any = 0.0
    square: Any = 0.0

    def add(self, states: Tensor, seen: Tensor) -> None:
        """States [B,H,T,d] at the positions [B,T] that are no padding."""
        rows = states.transpose(1, 2)[seen].double().transpose(0, 1)
        self.count += rows.shape[1]
        self.sum, self.square = self.sum + rows.sum(1), self.square + rows.mT @ rows

    @property
    def mean(self) -> Tensor:
        found: Tensor = self.sum / self.count
        return found

    def basis(self) -> Tensor:
        """Eigenvectors of the covariance [H,d,d], those of the largest variance first."""
        mean = self.mean
        covariance = self.square / self.count - mean[:, :, None] * mean[:, None, :]
        return torch.linalg.eigh(covariance).eigenvectors.flip(-1)


def principal(model: Any, parts: Sequence[Part]) -> Projections:
    """Projections that start from the principal components of the keys and values on some rows.

    Raises:
        AssayError: a layer of the model does not attend.
    """
    count = layer_count(model)
    moments = [(_Moments(), _Moments()) for _ in range(count)]
    training = model.training
    model.eval()
    for part in parts:
        _watch(model, part, moments)
    model.train(training)
    absent = [number for number, (keys, _) in enumerate(moments) if keys.count == 0]
    if absent:
        raise AssayError(
            f"layer {absent[0]} of the model has no attention, so nothing of it can be projected."
        )
    keys, values = (torch.stack([pair[place].basis() for pair in moments]).float() for place in (0, 1))
    mean = torch.stack([values.mean for _, values in moments]).float()
    return Projections(keys.contiguous(), values.contiguous(), mean)


def _watch(model: Any, part: Part, moments: Sequence[tuple[_Moments, _Moments]]) -> None:
    seen = part.attention_mask.bool()

    def note(layer: int, attended: Attended) -> Attended:
        moments[layer][0].add(attended.key, seen)
        moments[layer][1].add(attended.value, seen)
        return attended

    with torch.no_grad(), attending(model, note):
        model(input_ids=part.input_ids, attention_mask=part.attention_mask)


# --- training with changing ranks --------------------------------------------------------------------------------


class Truncation:
    """The loop's masks of this method: in every step each head of each layer keeps other numbers of coordinates.

    They are drawn from (seed, step) alone, for keys and values apart, from ``ranks``. In evaluation mode, as when a
    probe is measured, it is ``rank`` everywhere. No weight of the model is hidden.
    """

    def __init__(
        self, model: Any, projections: Projections, ranks: Sequence[int], rank: int, seed: int
    ) -> None:
        self.model, self.projections, self.ranks, self.rank, self.seed = model, projections, ranks, rank, seed
        self.drawn = self.draw(0)

    def draw(self, step: int) -> Tensor:
        """Ranks [L,2,H] of the keys and values of a step."""
        layers, heads, _ = self.projections.shape
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "ranks", step))
        places = torch.randint(len(self.ranks), (layers, 2, heads), generator=generator)
        return torch.tensor(self.ranks)[places]

    @contextmanager
    def hiding(self, step: int) -> Iterator[None]:
        """Within it the model attends to shortened keys and values."""
        self.drawn = self.draw(step)
        with attending(self.model, self._shortened):
            yield

    def _shortened(self, layer: int, attended: Attended) -> Attended:
        keys, values = self.drawn[layer]
        if not self.model.training:
            keys, values = torch.full_like(keys, self.rank), torch.full_like(values, self.rank)
        return self.projections.shortened(layer, attended, keys, values)

    def mask_gradients(self) -> None:
        """Nothing is masked."""

    def after(self) -> None:
        """Orthogonal stays orthogonal by itself."""

    def hide(self, named: Mapping[str, Parameter]) -> None:
        """The weights stay as they are."""

    def numbers(self) -> dict[str, float]:
        """``key_share`` and ``value_share``: of a head's coordinates, a mean over layers and heads."""
        keys, values = (self.drawn[:, place].float().mean() / self.projections.shape[2] for place in (0, 1))
        return {"key_share": float(keys), "value_share": float(values)}


# --- the result --------------------------------------------------------------------------------------------------


def narrowed(model: Any, projections: Projections, rank: int) -> Any:
    """A ``projected_llama`` with the model's weights that keeps ``rank`` coordinates of keys and values."""
    from methods.architectures import copied_settings, rebuilt
    from methods.architectures.projected_llama import ProjectedLlamaForCausalLM

    state = dict(model.state_dict())
    with torch.no_grad():
        for layer in range(projections.shape[0]):
            found = {
                "key_basis": projections.key_basis(layer)[..., :rank],
                "value_basis": projections.value_basis(layer)[..., :rank],
                "value_mean": projections.value_mean[layer],
            }
            state |= {
                f"model.layers.{layer}.self_attn.{name}": each.contiguous() for name, each in found.items()
            }
    settings = copied_settings(model) | {"key_rank": rank, "value_rank": rank}
    return rebuilt(model, ProjectedLlamaForCausalLM, settings, state)


def read(folder: Any) -> Projections:
    """What ``companions/projections.safetensors`` in a model's folder holds."""
    from safetensors.torch import load_file

    state = load_file(folder / "companions" / "projections.safetensors")
    found = Projections(state["key_start"], state["value_start"], state["value_mean"])
    found.load_state_dict(state)
    return found
