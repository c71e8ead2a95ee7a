"""Some rows of a data set, drawn evenly: what every selection of recovery data has to be better than.

He et al. 2025, "PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery" (arXiv
2502.12594) compares ``data.paser`` with it, at the same number of rows. Each of the n rows gets a number from
``random.Random`` of the seed, and those with the k smallest are kept, in the order of the data: every set of k rows is
as likely as any other. Its chain needs no model: ``some: data.sample(data="authors/full", share=0.1)``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from methods.data._chosen import Choosing, rows_of, wanted
from methods.stage import Claim, Stage

# The seed draws the rows.
SEEDED = True
USES = ("methods.data._chosen",)
RESULT = "data"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Choosing):
    """Which rows, and how many of them."""


def run(stage: Stage) -> None:
    """Write the rows that were drawn.

    Raises:
        AssayError: there are no rows, or fewer than asked for.
    """
    from methods.data import write_rows

    rows = rows_of(stage)
    numbers = drawn(len(rows), wanted(stage, rows), stage.seed)
    stage.notes |= {"rows": len(rows), "rows_chosen": len(numbers)}
    write_rows(stage.folder / "data", [rows[number] for number in numbers])


def drawn(count: int, chosen: int, seed: int) -> list[int]:
    """``chosen`` of the numbers below ``count``, in ascending order."""
    # Only random() is promised to give the same values in every Python version.
    draw = random.Random(f"data.sample/{seed}").random
    order = sorted(range(count), key=lambda _: draw())
    return sorted(order[:chosen])
