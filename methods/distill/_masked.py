"""What AST and CAST share: the terms, the n:m pattern, and AST's recipe, which stands in for CAST's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from methods import term
from methods.distill import Taught
from methods.prune._masks import read_pattern
from methods.stage import AssayError, Component, Optimizer, Schedule

REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Masked(Taught):
    """The shared recipe, the terms, and the mask."""

    # weight of the cross-entropy on the labels (GPT-2: 0.33, LLaMA-2-7B: 1)
    cross_entropy: Annotated[float, Ge(0)] = 0.33
    # weight of the forward KL to the dense model (GPT-2: 0.67, LLaMA-2-7B: 0.5)
    kl: Annotated[float, Ge(0)] = 0.67
    # weight of the distance of the hidden states (0 in both recipes)
    squarehead: Annotated[float, Ge(0)] = 0.0
    # both distributions are softened by it (GPT-2: 2, fixed in the code; LLaMA-2-7B: 2, which its yaml must say, or the
    # code takes 0.5)
    temperature: Annotated[float, Gt(0)] = 2.0
    # where the divergence is taken; upstream has packed text, and takes it at every position
    positions: term.Positions = "answers"
    # "n:m" zeroes n of every m consecutive inputs; m must divide the inputs
    pattern: str = "2:4"
    # steps between two masks (10)
    every: Annotated[int, Gt(0)] = 10
    # the rate at 2e-4; 0.95 and the weight decay of 0.1 are those of the code
    optimizer: Optimizer = Component("adamw", {"learning_rate": 2e-4, "beta2": 0.95, "weight_decay": 0.1})
    # 2,000 of 40,000 steps up, then down to a tenth
    schedule: Schedule = Component("cosine", {"warmup_share": 0.05, "final": 0.1})

    def __post_init__(self) -> None:
        """A pattern, something to minimise, and the model's own weights."""
        read_pattern(self.pattern)
        if self.cross_entropy == self.kl == self.squarehead == 0:
            raise AssayError("cross_entropy, kl and squarehead are all 0; set one of them above 0.")
        if self.adapter is not None:
            raise AssayError("an n:m mask is learnt on the model's own weights: leave out the adapter.")


def terms(config: Masked) -> tuple[Component, ...]:
    """``cross_entropy``, ``forward_kl`` and ``squarehead``, each where its weight is not 0."""
    softened = {"temperature": config.temperature, "positions": config.positions}
    found = (
        term.of("cross_entropy", weight=config.cross_entropy),
        term.of("forward_kl", weight=config.kl, **softened),
        term.of("squarehead", weight=config.squarehead),
    )
    return tuple(each for each in found if each.options["weight"] > 0)
