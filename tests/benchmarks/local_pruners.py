"""What SparseGPT and GPTQ take for a layer, beside the plain loop over columns that their papers describe.

    python tests/benchmarks/local_pruners.py [--quick]

Both get the same weights and the same factor U, in turn, in one run; one thread, processor time, the best of several.
Alone: one sparsity or bit-width, at most 1.0 times the plain loop's time. Together: several levels of a database, at
most 0.8 times that of as many plain loops. Results have to be those of the plain loop in float32: GPTQ's with no code
another one and weights within 1e-6, SparseGPT's with the same zeros and weights within 1e-5, because it adds a column's
updates up in another order.

The plain loops are not anybody's code: they are written from the algorithms, one operation after the other.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from methods.prune._gptq import Inverse, Settings
from methods.prune._gptq import solve as solve_gptq
from methods.prune._grids import Grid
from methods.prune._obs import Budget, inverse_factor
from methods.prune._obs import solve as solve_sparsegpt

ALONE_LIMIT, TOGETHER_LIMIT = 1.0, 0.8
# Two runs of the same code on a busy machine differ by this share.
NOISE = 0.1
BLOCK = 128
# Outputs and inputs of a layer.
SHAPES = ((64, 192), (192, 64), (512, 512), (1024, 1024))
QUICK = ((64, 192), (192, 64), (256, 256))
BITS = (2, 3, 4, 5, 6)
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
REPEATS = 5


# --- the plain loops: the algorithms as they are described ----------------------------------------------------------


def plain_gptq(
    weight: Tensor, factor: Tensor, bits: int, group: int | None = None, block: int = BLOCK
) -> Tensor:
    """GPTQ column by column: quantise, divide the error by U_ii, update the rest of the block, then the matrix."""
    weight, most = weight.clone(), 2**bits - 1
    result = torch.zeros_like(weight)
    scale, zero = plain_grid(weight, most)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        part, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        for column in range(start, end):
            if group is not None and column % group == 0:
                scale, zero = plain_grid(weight[:, column : column + group], most)
            here = column - start
            value = part[:, here]
            rounded = scale * (torch.clamp(torch.round(value / scale) + zero, 0, most) - zero)
            result[:, column] = rounded
            error = (value - rounded) / factor[column, column]
            part[:, here:] -= error[:, None] @ factor[column, column:end][None]
            errors[:, here] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return result


def plain_grid(weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out] of the rows of a matrix, with 0 in the range."""
    low, high = weight.amin(dim=1).clamp(max=0), weight.amax(dim=1).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    scale = (high - low) / most
    return scale, torch.round(-low / scale)


def plain_sparsegpt(weight: Tensor, factor: Tensor, sparsity: float, block: int = BLOCK) -> Tensor:
    """SparseGPT column by column: round(count * sparsity) weights of every block of columns go."""
    weight = weight.clone()
    result = torch.zeros_like(weight)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        part, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        scores = part**2 / factor.diagonal()[start:end] ** 2
        count = round(scores.numel() * sparsity)
        removed = scores <= scores.flatten().sort().values[count - 1]
        for here in range(end - start):
            value = part[:, here]
            kept = value.clone()
            kept[removed[:, here]] = 0
            result[:, start + here] = kept
            error = (value - kept) / factor[start + here, start + here]
            part[:, here:] -= error[:, None] @ factor[start + here, start + here : end][None]
            errors[:, here] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return result


# --- ours -----------------------------------------------------------------------------------------------------------


def our_gptq(weight: Tensor, factor: Tensor, bits: Sequence[int], group: int | None = None) -> list[Tensor]:
    """The solver of prune.gptq and levels.gptq, on the grid of the plain loop."""
    inverse = Inverse(factor, torch.zeros(weight.shape[1], dtype=torch.bool))
    found = solve_gptq(weight, inverse, Settings(Grid(), group, BLOCK), bits)
    return [level.weight() for level in found.values()]


def our_sparsegpt(weight: Tensor, factor: Tensor, sparsities: Sequence[float]) -> list[Tensor]:
    """The solver of prune.sparsegpt and levels.sparsegpt, with as many zeros in each block."""
    rows, columns = weight.shape
    sizes = [rows * min(BLOCK, columns - start) for start in range(0, columns, BLOCK)]
    budgets = [Budget(tuple(round(size * share) for size in sizes), ties=True) for share in sparsities]
    return list(solve_sparsegpt(weight, factor, budgets, BLOCK)[0])


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """Two ways to the same weights, and how far the results may lie apart."""

    name: str
    ours: Callable[[], list[Tensor]]
    plain: Callable[[], list[Tensor]]
    limit: float
    apart: float

    def ratio(self) -> float:
        """Our processor time over the plain loop's, both in turn; the best of several."""
        pairs = [(timed(self.ours), timed(self.plain)) for _ in range(REPEATS)]
        return min(ours for ours, _ in pairs) / min(plain for _, plain in pairs)

    def same(self) -> bool:
        """Whether both have the same zeros, and weights within the distance."""
        pairs = list(zip(self.ours(), self.plain(), strict=True))
        zeros = all(torch.equal(one == 0, two == 0) for one, two in pairs)
        return zeros and all(float((one - two).abs().max()) <= self.apart for one, two in pairs)


def timed(run: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights [out,in] and the factor U [in,in] of correlated inputs."""
    generator = torch.Generator().manual_seed(rows + columns)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator) @ mixing
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    return weight, inverse_factor(inputs.T @ inputs / 8, 0.01)


def contests(rows: int, columns: int) -> list[Contest]:
    """Both methods on a layer, alone and with several levels at once."""
    weight, factor = layer(rows, columns)
    group = 128 if columns % 128 == 0 else 32

    def gptq(bits: Sequence[int], limit: float) -> Contest:
        return Contest(
            f"GPTQ, {len(bits)} bit-width{'s' if len(bits) > 1 else ''}",
            lambda: our_gptq(weight, factor, bits, group),
            lambda: [plain_gptq(weight, factor, one, group) for one in bits],
            limit,
            1e-6,
        )

    def sparsegpt(sparsities: Sequence[float], limit: float) -> Contest:
        return Contest(
            f"SparseGPT, {len(sparsities)} sparsit{'ies' if len(sparsities) > 1 else 'y'}",
            lambda: our_sparsegpt(weight, factor, sparsities),
            lambda: [plain_sparsegpt(weight, factor, one) for one in sparsities],
            limit,
            1e-5,
        )

    return [
        gptq(BITS[1:2], ALONE_LIMIT),
        gptq(BITS, TOGETHER_LIMIT),
        sparsegpt(SPARSITIES[2:3], ALONE_LIMIT),
        sparsegpt(SPARSITIES, TOGETHER_LIMIT),
    ]


def main() -> int:
    """Print the table; exit code 1 where a limit is exceeded or results differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small layers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    print(f"{'layer':>12}  {'solver':26}{'ours / plain loop':>18}{'limit':>7}  results")
    for rows, columns in QUICK if arguments.quick else SHAPES:
        for contest in contests(rows, columns):
            same, ratio = contest.same(), contest.ratio()
            failed |= not same or ratio > contest.limit * (1 + NOISE)
            words = "the same" if same else "DIFFERENT"
            print(f"{rows:>6} x{columns:>5}  {contest.name:26}{ratio:18.2f}{contest.limit:7.1f}  {words}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
