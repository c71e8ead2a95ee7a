"""A step against the gradient and nothing else. Source: none, invented for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt


@dataclass(frozen=True, kw_only=True)
class Config:
    """How far."""

    # learning rate
    learning_rate: Annotated[float, Gt(0)] = 0.1


def build(config: Config, parameters: list[tuple[str, Any]]) -> Any:
    """Torch's own, with all the rest switched off."""
    import torch

    return torch.optim.SGD([weight for _, weight in parameters], lr=config.learning_rate)
