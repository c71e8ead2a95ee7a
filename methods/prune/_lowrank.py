"""Low rank, the part that its methods share: one truncation, one refit and one walk.

    W' = trunc_r(W T) T^-1 = a b,        a [out,r],  b [r,in]

for a weight W [out,in] and a transform T of its inputs; the methods differ in T alone (none, a diagonal, the Cholesky
factor of the inputs' second moments). The singular values are split between both factors, each getting their roots.
A pair of factors has r (out + in) numbers and is smaller than the matrix only below r = out in / (out + in): half the
rank of a square matrix, 73 % of that of a 4,096 x 11,008 one. From there on a matrix stays dense. Everything is
computed in float64; what is kept of it is float32.

A product of two factors has no zeros, so that a pruned parent is refused unless ``keep_zeros=False``. The factors are
written as the physical form, their product as the chain form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Lt

from methods.prune._walk import Block, decoder_layers, linear_weights, walk
from methods.stage import AssayError, NotFinite

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration

REVISION = 1

# Added to the spectrum of second moments that are not positive definite, beyond what lifts the least eigenvalue to 0;
# as in AIoT-MLSys-Lab/SVD-LLM. Where that is below the rounding of the largest eigenvalue, this share of it.
LIFT = 1e-6
RELATIVE_LIFT = 1e-12


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Options of every method that makes two factors of each layer; a ``Config`` inherits them."""

    # Share of every matrix's numbers that its two factors have together.
    keep: Annotated[float, Gt(0), Lt(1)]
    # Calibration sequences; 256 in SVD-LLM.
    sequences: Annotated[int, Gt(0)] = 256
    # Longest calibration sequence; 2,048 in SVD-LLM and ASVD.
    context_tokens: Annotated[int, Gt(0)] = 2048
    # Whether zeros of the parent must stay: two factors fill them, so that such a parent is then refused.
    keep_zeros: bool = True


# --- one matrix ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transform:
    """T, acting on the inputs: nothing, a positive diagonal [in], or a lower triangular matrix [in,in]; float64."""

    values: Tensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """W T for W [out,in]."""
        if self.values is None:
            return weight
        return weight * self.values if self.values.ndim == 1 else weight @ self.values

    def undo(self, rows: Tensor) -> Tensor:
        """V T^-1 for V [r,in]."""
        import torch

        if self.values is None:
            return rows
        if self.values.ndim == 1:
            return rows / self.values
        undone: Tensor = torch.linalg.solve_triangular(self.values, rows, upper=False, left=False)
        return undone


@dataclass(frozen=True)
class Truncated:
    """Two factors, a [out,r] and b [r,in], and the whole spectrum of W T, largest first."""

    a: Tensor
    b: Tensor
    spectrum: Tensor


def truncate(weight: Tensor, transform: Transform, rank: int) -> Truncated:
    """The best approximation of ``weight`` [out,in] of this rank: ||(W - a b) T|| is the least there is."""
    import torch

    left, spectrum, right = torch.linalg.svd(transform.apply(weight.double()), full_matrices=False)
    root = spectrum[:rank].sqrt()
    return Truncated(left[:, :rank] * root, transform.undo(root[:, None] * right[:rank]), spectrum)


def refit(weight: Tensor, b: Tensor, gram: Tensor) -> Tensor:
    """The factor a [out,r] with which a b comes closest to W on inputs whose second moments are ``gram`` [in,in].

    a = W G b^T (b G b^T)^-1, the least-squares solution; the least one of several where inputs are missing.
    """
    gram, b = gram.double(), b.double()
    return solve_symmetric(b @ gram @ b.T, weight.double() @ gram @ b.T)


def solve_symmetric(matrix: Tensor, rows: Tensor) -> Tensor:
    """rows M^-1 for a symmetric M [k,k] without negative eigenvalues; the pseudo-inverse where it is singular."""
    import torch

    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) == 0:
        solved: Tensor = torch.cholesky_solve(rows.T, lower).T
        if bool(torch.isfinite(solved).all()):
            return solved
    return rows @ torch.linalg.pinv(matrix, hermitian=True)


def whitening(gram: Tensor) -> Transform:
    """The Cholesky factor L of second moments G = L L^T [in,in]: then the truncation is the best for the *outputs*.

    Where G is not positive definite, as with fewer tokens than inputs, its spectrum is lifted by -(least eigenvalue) +
    1e-6, as in the official code.

    Raises:
        NotFinite: the calibration data overflow the model's activations.
    """
    import torch

    gram = gram.double()
    lower, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) != 0 or not bool(torch.isfinite(lower).all()):
        lower, failed = torch.linalg.cholesky_ex(_lifted(gram))
    if int(failed) != 0:
        raise AssayError(
            f"the second moments of a layer with {len(gram)} inputs cannot be factorised: calibrate on more tokens."
        )
    return Transform(lower)


def _lifted(gram: Tensor) -> Tensor:
    """Second moments with a least eigenvalue that is surely positive."""
    import torch

    if not bool(torch.isfinite(gram).all()):
        raise NotFinite(
            "the inputs of a layer are not finite: the calibration data overflow the model's activations."
        )
    values = torch.linalg.eigvalsh(gram)
    lift = max(-float(values[0]), 0.0) + max(LIFT, RELATIVE_LIFT * len(gram) * float(values[-1]))
    return gram + lift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def pays(rank: int, rows: int, columns: int) -> bool:
    """Whether two factors of this rank have fewer numbers than the matrix."""
    return rank * (rows + columns) < rows * columns


def rank_for(keep: float, rows: int, columns: int) -> int | None:
    """The rank at which two factors have the share ``keep`` of the matrix's numbers; None: it stays dense.

    Raises:
        AssayError: not even one rank is within that share.
    """
    rank = int(keep * rows * columns / (rows + columns))
    if rank < 1:
        raise AssayError(
            f"keep={keep:g} leaves less than one rank of a {rows} x {columns} layer, which takes "
            f"{(rows + columns) / (rows * columns):.3g}: raise keep."
        )
    return rank if pays(rank, rows, columns) else None


def full_rank(rows: int, columns: int) -> int:
    """The largest rank at which two factors still have fewer numbers than the matrix."""
    return -(-rows * columns // (rows + columns)) - 1


# --- all blocks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One walk over the blocks. ``find(block, found)`` gives tensors by name, which are kept.

    ``compressed``: a block's factors are put in place before the next block is entered, so that this one sees what
    compressed blocks give; otherwise all blocks see the inputs of the dense model.
    """

    find: Callable[[Block, Mapping[str, Tensor]], Mapping[str, Tensor]]
    compressed: bool = False


def collect(
    model: PreTrainedModel,
    sequences: list[Tensor],
    progress: Progress,
    passes: Sequence[Pass],
    before: int = 0,
    known: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Everything that the passes find, going on after a kill.

    Args:
        before: steps of the state that are the caller's own, and ``known`` what it found in them: both are saved, too.
    """
    import torch

    state = progress.load()
    found = dict(known) | (state.tensors if state else {})
    done = max(state.step - before, 0) if state else 0
    blocks = len(decoder_layers(model))
    bar = iter(progress.bar(len(passes) * blocks, "blocks", initial=done))
    with torch.no_grad():
        for number, one in enumerate(passes):
            if done >= (number + 1) * blocks:
                continue
            for block in walk(model, sequences):
                step = number * blocks + block.index + 1
                if step > done:
                    next(bar, None)
                    # On the processor, as a saved state has them: on a card they would be a second model beside it.
                    found |= {name: tensor.cpu() for name, tensor in one.find(block, found).items()}
                if one.compressed:
                    install(block, found)
                if step > done and progress.due(before + step):
                    progress.save(before + step, found, {})
    next(bar, None)
    return found


def install(block: Block, found: Mapping[str, Tensor]) -> None:
    """Give the layers of a block whose factors are known the factors' product as their weight."""
    for local, linear in block.linears().items():
        name = block.full(local)
        if f"{name}/a" in found:
            a, b = (found[f"{name}/{part}"].to(linear.weight.device) for part in "ab")
            linear.weight.copy_(a @ b)


def factors(block: Block, keep: float, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
    """The truncated layers of a block, each at the rank that the share ``keep`` gives it, for ``collect``.

    Args:
        transforms: T of every layer, by its name in the block.
    """
    found: dict[str, Tensor] = {}
    for local, linear in block.linears().items():
        rank = rank_for(keep, *linear.weight.shape)
        if rank is not None:
            truncated = truncate(linear.weight, transforms[local], rank)
            found |= entries(block.full(local), truncated.a, truncated.b)
    return found


def entries(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A layer's factors as ``collect`` keeps them: float32, as they are written."""
    return {f"{name}/a": a.float().contiguous(), f"{name}/b": b.float().contiguous()}


def factors_of(model: PreTrainedModel, found: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{module name: (a, b)} of all that was found, in the order of the model: a saved state has another."""
    names = [name.removesuffix(".weight") for name in linear_weights(model)]
    return {name: (found[f"{name}/a"], found[f"{name}/b"]) for name in names if f"{name}/a" in found}


def refuse_zeros(
    method: str,
    model: PreTrainedModel,
    calibration: Calibration,
    keep_zeros: bool,
    ending: tuple[str, ...] = (),
) -> None:
    """Raise an AssayError where the weights about to be filled have zeros; else note how many are filled.

    Args:
        ending: only of layers whose names end so; all of the decoder's where none is given.
    """
    names = [name for name in linear_weights(model) if name.endswith(ending or ("",))]
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in names)
    if zeros and keep_zeros:
        raise AssayError(
            f"{method} would fill the {zeros:,} zeros that pruning has left in the parent's linear layers: prune after "
            "it instead of before, or set keep_zeros=False."
        )
    calibration.stage.notes["zeros_filled"] = zeros
