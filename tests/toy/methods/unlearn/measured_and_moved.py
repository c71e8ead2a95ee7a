"""A shorthand: the weights are summed up, then moved by it. Source: none, invented for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from methods.stage import Claim, From, Step

SEEDED = False
RESULT = "model"
CLAIMS = (
    Claim(
        sentence="Moving is easy.",
        source="none",
        metric="size.nonzero",
        subject="*> unlearn.measured_and_moved*",
        relation="at_least",
        value=1.0,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """By how much."""

    # what the rest is multiplied by
    times: Annotated[float, Gt(0)] = 0.002
    # the step that is read
    reads: str = "sums"


def expand(config: Config) -> tuple[Step, ...]:
    """``curvature.measured``, and ``unlearn.moved`` by what it wrote."""
    return (
        Step("sums", "curvature.measured"),
        Step("model", "unlearn.moved", {"times": config.times, "sums": From(config.reads)}),
    )
