"""GPTQ's solver: columns are put on their grid one after the other, and what that costs is mended in those to come.

Frantar, Ashkboos, Hoefler, Alistarh 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (ICLR 2023, arXiv 2210.17323), algorithm 1. With U upper triangular and H^-1 = U^T U, for every column j

    q_j = quant(w_j)      e_j = (w_j - q_j) / U_jj      W[:, j+1:] -= e_j U[j, j+1:]

where columns behind the current block of ``block`` columns get theirs once for the block (*lazy* updates). A group's
scale comes from the weights as they are when the block begins in which the group begins.

Columns lie in memory as rows here, so that a column's update is one pass over contiguous numbers; only what the next
column needs is worked out in the loop, and codes at the end. Rows of W do not look at each other, so that a matrix at
several bit-widths is solved as one matrix with as many times the rows. Every number is made by the operations of the
plain loop over columns in their order, so that float32 results are unchanged; the matrix product of a lazy update has
its factors exchanged, which may move its last bit, and with it that of a scale fitted later.

A weight that was 0 may be kept so: whatever the updates of earlier columns made of it is then an error like any other,
passed on to later columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from methods.prune._grids import Grid, Quantised, fit_groups, groups_of, largest_code
from methods.prune._obs import dead_columns, inverse_factor

if TYPE_CHECKING:
    from torch import Tensor

REVISION = 1

# Numbers that are solved side by side, at most: a layer's bit-widths beyond that are solved one after the other.
MOST_NUMBERS = 2**27


@dataclass(frozen=True)
class Settings:
    """How a matrix is quantised: its grid and groups, and which columns come first."""

    grid: Grid
    # inputs that share a scale; None: all of a row
    group: int | None = None
    # columns between two lazy updates
    block: int = 128
    # whether columns are settled by decreasing H_jj
    act_order: bool = False
    # whether groups are of consecutive inputs and fitted before anything moves, whatever the order
    static_groups: bool = False
    # whether weights that are 0 stay so
    keep_zeros: bool = True


@dataclass(frozen=True)
class Inverse:
    """What the solver needs of a layer's inputs; layers that share their inputs share it.

    ``factor`` U [in,in] is of the Hessian in the order of ``order`` [in], the columns as they are settled, or None for
    the order they have. ``dead`` [in]: inputs that were always 0.
    """

    factor: Tensor
    dead: Tensor
    order: Tensor | None = None


def invert(hessian: Tensor, relative_damping: float, act_order: bool = False) -> Inverse:
    """Factorise a layer's Hessian [in,in].

    Raises:
        AssayError: it is not positive definite even with the damping.
    """
    import torch

    dead = dead_columns(hessian)
    if not act_order:
        return Inverse(inverse_factor(hessian, relative_damping), dead)
    diagonal = torch.where(dead, 1.0, hessian.diagonal())
    order = diagonal.argsort(descending=True, stable=True)
    return Inverse(inverse_factor(hessian[order][:, order], relative_damping), dead, order)


def solve(weight: Tensor, inverse: Inverse, settings: Settings, bits: Sequence[int]) -> dict[int, Quantised]:
    """The matrix [out,in] on the grids of one or several bit-widths, each as if it were solved alone.

    Raises:
        AssayError: its weights are not finite, or too large for the precision of the scales.
    """
    import torch

    together = max(1, MOST_NUMBERS // weight.numel())
    found: dict[int, Quantised] = {}
    with torch.no_grad():
        for first in range(0, len(bits), together):
            some = bits[first : first + together]
            work = _Work(weight, inverse, settings, some)
            work.run()
            found |= dict(zip(some, work.results(), strict=True))
    return found


class _Range(NamedTuple):
    """A group's grid for every row [n]: scale, zero point, and the least and largest c - z."""

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor


class _Work:
    """A solve under way: columns [in,n] in the order they are settled, n = out times the number of bit-widths."""

    def __init__(self, weight: Tensor, inverse: Inverse, settings: Settings, bits: Sequence[int]) -> None:
        import torch

        self.inverse, self.settings, self.copies = inverse, settings, len(bits)
        rows, columns = weight.shape
        self.most = torch.cat([largest_code(one, weight, rows) for one in bits])
        # The group of every column, in the order of settling.
        self.places = groups_of(columns, settings.group, weight)
        self.ranges = self._fitted(weight)
        settled = weight.masked_fill(inverse.dead, 0.0)
        if inverse.order is not None:
            settled = settled[:, inverse.order]
        self.current = settled.T.repeat(1, self.copies)
        zeros = self.current == 0 if settings.keep_zeros else None
        self.zeros = zeros if zeros is not None and bool(zeros.any()) else None
        self.steps = torch.empty_like(self.current)

    def _fitted(self, weight: Tensor) -> list[_Range]:
        """The ranges that are known before anything moves: of static groups, and of whole rows."""
        grid, group = self.settings.grid, self.settings.group
        if group is not None and not self.settings.static_groups:
            return []
        if group is not None and self.inverse.order is not None:
            self.places = self.places[self.inverse.order]
        # GPTQ fits the range of whole rows before it zeroes dead columns, those of groups after.
        if group is not None or grid.kind == "evopress":
            weight = weight.masked_fill(self.inverse.dead, 0.0)
        scale, zero = fit_groups(grid, weight.repeat(self.copies, 1), self.most, group)
        return [self._range(*each) for each in zip(scale.unbind(1), zero.unbind(1), strict=True)]

    def _range(self, scale: Tensor, zero: Tensor) -> _Range:
        return _Range(scale, zero, -zero, self.most - zero)

    def run(self) -> None:
        """Settle all columns, block after block."""
        factor, columns = self.inverse.factor, len(self.current)
        errors = self.current.new_empty(min(self.settings.block, columns), self.current.shape[1])
        for begin in range(0, columns, self.settings.block):
            end = min(begin + self.settings.block, columns)
            self._fit(begin, end)
            self._settle(begin, end, errors)
            if end < columns:
                self.current[end:].addmm_(factor[begin:end, end:].T, errors[: end - begin], alpha=-1)

    def _fit(self, begin: int, end: int) -> None:
        """The ranges of the groups that begin in a block, from the weights as they are now."""
        group = self.settings.group
        if group is None or self.settings.static_groups:
            return
        for first in range(-(-begin // group) * group, end, group):
            now = self.current[first : first + group]
            if self.zeros is not None:
                now = now.masked_fill(self.zeros[first : first + group], 0.0)
            self.ranges.append(self._range(*self.settings.grid.fit(now, self.most, dim=0)))

    def _settle(self, begin: int, end: int, errors: Tensor) -> None:
        """Put the columns of a block on their grid; ``errors`` [block,n] gets e_j."""
        import torch

        grid, places = self.settings.grid, self.places[begin:end].tolist()
        block, factor = self.current[begin:end], self.inverse.factor[begin:end, begin:end]
        diagonal, above = factor.diagonal().unbind(), factor.unsqueeze(2).contiguous()
        weights, steps, wrong = block.unbind(), self.steps[begin:end].unbind(), errors.unbind()
        value, products = torch.empty_like(weights[0]), torch.empty_like(block)
        for column, place in enumerate(places):
            scale, *limits = self.ranges[place]
            step = grid.steps_(torch.div(weights[column], scale, out=steps[column]), *limits)
            if self.zeros is not None:
                step.masked_fill_(self.zeros[begin + column], 0.0)
            torch.mul(step, scale, out=value)
            error = torch.sub(weights[column], value, out=wrong[column]).div_(diagonal[column])
            if column + 1 < len(places):
                product = torch.mul(above[column, column + 1 :], error, out=products[column + 1 :])
                block[column + 1 :].sub_(product)

    def results(self) -> Iterator[Quantised]:
        """What became of each copy of the matrix."""
        import torch

        order, places = self.inverse.order, self.places
        zero = torch.stack([each.zero for each in self.ranges])
        codes = (self.steps + zero[places]).to(torch.uint8)
        if order is not None:
            back = order.argsort()
            codes, places = codes[back], places[back]
        scale = torch.stack([each.scale for each in self.ranges])
        for part in zip(*(each.chunk(self.copies, dim=1) for each in (codes, scale, zero)), strict=True):
            rows = [each.T.contiguous() for each in part]
            yield Quantised(rows[0], rows[1], rows[2], places).checked(self.settings.grid.scales)
