"""Second moments of the inputs of linear layers: what local pruners and quantisers know about a layer's use.

The squared error of a layer's outputs when its weights W [out,in] become V is, summed over the calibration tokens,
tr((W - V) X^T X (W - V)^T) for inputs X [tokens,in]: everything that solvers need of the inputs is X^T X. All layers of
a block are watched in one pass, sequence after sequence, so that sequences of any lengths count token by token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor

    from methods.prune._walk import Block

REVISION = 1


class Gram:
    """X^T X [in,in] of the inputs of one linear layer, or of several that share their inputs.

    ``tokens`` and ``sequences`` say how many were added. Sums are kept in float32, of float64 inputs in float64.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.sequences = 0
        self._sum: Tensor | None = None

    def add(self, inputs: Tensor, sequences: int = 1) -> None:
        """Add inputs [tokens,in] that come from this many sequences."""
        import torch

        inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
        if self._sum is None:
            self._sum = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
        self._sum.addmm_(inputs.T, inputs)
        self.tokens += len(inputs)
        self.sequences += sequences

    @property
    def gram(self) -> Tensor:
        """The plain sum of x x^T over all tokens, [in,in]."""
        if self._sum is None:
            raise AssayError("there are no calibration inputs to measure: nothing was added to this sum.")
        return self._sum

    def hessian(self) -> Tensor:
        """2/n X^T X [in,in] for n *sequences*, not tokens, as SparseGPT and GPTQ scale it; a new tensor."""
        return self.gram * (2.0 / self.sequences)


def block_grams(block: Block, names: Collection[str] | None = None) -> dict[str, Gram]:
    """The sums of all linear layers of a block, or of those named, from one pass over its sequences.

    Layers that are called with the same tensor (queries, keys and values; gate and up) get the same ``Gram`` object.

    Raises:
        AssayError: a layer saw no input at all, as an expert may that no token was sent to.
    """
    watch = _Watch(block.linears() if names is None else names)
    block.run_watched(watch.see)
    for name in watch.names:
        if name not in watch.leaders:
            raise AssayError(
                f"block {block.index}: {name} saw none of the calibration tokens, so that nothing is known about its "
                "inputs: calibrate on more sequences."
            )
    return {name: watch.grams[watch.leaders[name]] for name in watch.names}


def sharing(grams: Mapping[str, Gram]) -> list[tuple[Gram, list[str]]]:
    """Each different sum with the names of the layers that share it, so that its factor is made once."""
    groups: dict[int, tuple[Gram, list[str]]] = {}
    for name, gram in grams.items():
        groups.setdefault(id(gram), (gram, []))[1].append(name)
    return list(groups.values())


def checked_hessian(gram: Gram, relative_damping: float, where: str) -> Tensor:
    """The Hessian [in,in] of a layer; a sentence where without damping too few tokens would make it singular."""
    hessian = gram.hessian()
    if relative_damping == 0 and gram.tokens < len(hessian):
        raise AssayError(
            f"{where}: {gram.tokens} calibration tokens are too few for {len(hessian)} inputs without damping: "
            "calibrate on more, or set relative_damping (0.01 is usual)."
        )
    return hessian


def input_energies(block: Block) -> dict[str, Tensor]:
    """``c_j`` [in] of every linear layer: squared inputs summed over tokens, per calibration sequence (Wanda)."""
    sums: dict[str, Tensor] = {}

    def see(name: str, inputs: Tensor) -> None:
        energy = input_energy(inputs)
        sums[name] = sums[name] + energy if name in sums else energy

    block.run_watched(see)
    return {name: total / len(block.inputs) for name, total in sums.items()}


def input_energy(inputs: Tensor) -> Tensor:
    """Squared inputs [tokens, in] summed over the tokens, in float32."""
    return inputs.float().square().sum(dim=0)


class _Watch:
    """Adds up what layers see; what a layer shares with the one called just before it is added once."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = tuple(names)
        self.grams: dict[str, Gram] = {}
        self.leaders: dict[str, str] = {}  # the layer whose sum a layer shares: for most their own
        # The tensor is kept until the next layer is called, so that its memory cannot be another's by then.
        self._last: tuple[str, Tensor] | None = None

    def see(self, name: str, inputs: Tensor) -> None:
        """Take the inputs [tokens,in] of a layer."""
        if name not in self.names:
            return
        shared = self._last is not None and _same(self._last[1], inputs)
        leader = self.leaders[self._last[0]] if shared and self._last is not None else name
        leader = self.leaders.setdefault(name, leader)
        if leader == name:
            self.grams.setdefault(name, Gram()).add(inputs)
        self._last = (name, inputs)


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether both are views of the same numbers in memory, and nobody has written there in between."""
    return (
        one.data_ptr() == two.data_ptr()
        and one.shape == two.shape
        and one.stride() == two.stride()
        and one._version == two._version
    )
