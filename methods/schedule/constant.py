"""The same learning rate throughout, after a linear way up. Goyal et al., "Accurate, Large Minibatch SGD", 2.2."""

from __future__ import annotations

from dataclasses import dataclass

from methods.schedule import Warmup, warmup_of

USES = ("methods.schedule",)


@dataclass(frozen=True, kw_only=True)
class Config(Warmup):
    """Options of the constant schedule."""


def factor(config: Config, step: int, steps: int) -> float:
    """Factor of the learning rate at a 0-based step of ``steps``."""
    warmup = warmup_of(config, steps)
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
