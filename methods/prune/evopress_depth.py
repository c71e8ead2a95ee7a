"""EvoPress for depth: attentions and MLPs removed, which ones found by evolution.

Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search"
(ICML 2025, arXiv 2410.14649; IST-DASLab/EvoPress, ``evo_drop_search.py``). Of L attentions and L MLPs the same share is
removed, so that

    the mean over tokens of KL(dense || pruned) is least    subject to    sparsity * L of each removed

A shorthand for two stages: ``search.evopress_depth`` chooses and ``prune.assigned`` builds the model, which is really
smaller (the official code saves a pickle of patched modules, of whatever candidate was scored last). Written out, the
stages have the same ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.prune._steps import handed_on
from methods.search import evopress_depth
from methods.stage import Claim, From, Step

# The seed draws calibration sequences, children and batches.
SEEDED = True
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(evopress_depth.Config):
    """Options of ``search.evopress_depth``."""


def expand(config: Config) -> tuple[Step, ...]:
    """Search, model."""
    return (
        Step("search", "search.evopress_depth", handed_on(config, evopress_depth.Config, {})),
        Step("model", "prune.assigned", {"assignment": From("search")}),
    )
