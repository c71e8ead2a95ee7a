"""MatryoshkaKV: orthogonal bases of keys and values are learnt of which the first coordinates are worth most.

Lin et al., "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection". For every layer and key-value
head, keys k after the rotary embedding and values v are kept as their first r coordinates:

    k becomes k U_r U_r',    v becomes m + (v - m) V_r V_r'
    L = cross_entropy * CE + kl * T**2 / (B T) sum_{b,t} D( p_T || q_T )[b,t],      p the model without projections

U and V start from the principal components of keys and values on some rows and stay orthogonal (Cayley); each step
draws another r from ``ranks`` for every layer and head, of keys and of values apart, so that the coordinates get an
order. Only the bases and the means of the values are trained; the model's weights stay as they are, zeros included.

The written ``model/`` is a ``projected_llama`` (``methods.architectures.projected_llama``): the parent's weights with
the bases cut to the share ``keep``. Its cache holds that share of a key and value, it is scored like any other model,
and the note ``kv_cache_share`` says what is kept. The whole bases are in ``companions/projections.safetensors`` beside
it, from which models of other ranks can be cut. A projection before the rotary embedding could be multiplied into the
weights of a plain Llama; it would be another method, and fill the zeros of a pruned one.

Where this differs from the code (The-kamisato/MatryoshkaKV-cache): there is one basis for each key-value head and not
for each query head, because the cache has one key for all query heads of a group; the mean of the keys is left out,
which adds the same number to every score of a query and so does nothing; the turn is learnt from the principal
components on, and not from the identity, which gives the same bases and is defined for all of them. The choice of
another rank for each layer and head by greedy search is not built.

``curve.csv``: the terms, and ``key_share`` and ``value_share``, what the step kept on the average.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le

from methods import distill, term
from methods.stage import AssayError, Claim, Component, Optimizer, Stage

if TYPE_CHECKING:
    from torch import nn

    from methods.distill._projections import Truncation
    from methods.term import Setting

SEEDED = True
USES = (
    "methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.term", "methods.architectures",
    "methods.distill._projections",
)  # fmt: skip
CLAIMS: tuple[Claim, ...] = ()
# The only models of which there is a class with a narrower cache.
TYPE = "llama"
Share = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class Config(distill.Taught):
    """The shared recipe, the terms, and the ranks."""

    # weight of the cross-entropy on the labels (0.75)
    cross_entropy: Annotated[float, Ge(0)] = 0.75
    # weight of the forward KL to the model without projections (0.25)
    kl: Annotated[float, Ge(0)] = 0.25
    # both distributions are softened by it (1)
    temperature: Annotated[float, Gt(0)] = 1.0
    # where the divergence is taken (upstream: every position, padding included)
    positions: term.Positions = "all"
    # shares of a head's size, one of which is drawn for every layer and head (16, 32, ..., 128 of 128)
    ranks: tuple[Share, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    # the share of a key and value that the written model keeps (64 of 128, at which upstream evaluates)
    keep: Share = 0.5
    # rows on which the principal components are computed that training starts from
    calibration: Annotated[int, Gt(0)] = 64
    # the rate of the code, for bases and means alike
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-3, "weight_decay": 0.0})
    # passes over the rows (1)
    epochs: Annotated[float, Gt(0)] | None = 1.0

    def __post_init__(self) -> None:
        """Something to minimise and to draw from; the model's own weights are not trained."""
        if self.cross_entropy == self.kl == 0:
            raise AssayError(
                "distill.matryoshka_kv: cross_entropy and kl are both 0; set one of them above 0."
            )
        if not self.ranks:
            raise AssayError(
                "distill.matryoshka_kv: ranks is empty; give at least one share, such as ranks=[0.5, 1.0]."
            )
        if self.adapter is not None:
            raise AssayError(
                "distill.matryoshka_kv trains projections and no weights: leave out the adapter."
            )
        if not self.keep_zeros:
            raise AssayError(
                "distill.matryoshka_kv leaves all weights as they are, zeros included: leave out keep_zeros=False."
            )


def terms(config: Config) -> tuple[Component, ...]:
    """``cross_entropy`` and ``forward_kl``, each where its weight is not 0."""
    softened = {"temperature": config.temperature, "positions": config.positions}
    found = (
        term.of("cross_entropy", weight=config.cross_entropy),
        term.of("forward_kl", weight=config.kl, **softened),
    )
    return tuple(each for each in found if each.options["weight"] > 0)


def companions(config: Config, setting: Setting) -> dict[str, nn.Module]:
    """The projections, which are trained in the place of the student's weights."""
    from methods.data import collate, padding_id
    from methods.distill._projections import principal

    rows = setting.examples[: config.calibration]
    batches = [rows[start : start + config.batch] for start in range(0, len(rows), config.batch)]
    parts = [collate(batch, padding_id(setting.tokenizer), "train").to(setting.device) for batch in batches]
    setting.student.requires_grad_(False)
    return {"projections": principal(setting.student, parts).to(setting.device)}


def masking(config: Config, setting: Setting) -> Truncation:
    """What shortens keys and values in every step."""
    from methods.distill._projections import Truncation

    projections: Any = setting.companions["projections"]
    size = projections.shape[2]
    ranks = [rank_of(share, size) for share in config.ranks]
    rank = rank_of(config.keep, size)
    setting.stage.notes["kv_cache_share"] = rank / size
    return Truncation(setting.student, projections, ranks, rank, setting.seed)


def rank_of(share: float, size: int) -> int:
    """How many of ``size`` coordinates a share is: one at least."""
    return max(1, round(share * size))


def run(stage: Stage) -> None:
    """Train the projections, and write every model as one that keeps its coordinates.

    Raises:
        AssayError: the student is of a type that has no class with a narrower cache.
    """
    found = distill.text_config(stage.parents["model"]).get("model_type")
    if found != TYPE:
        raise AssayError(
            f"distill.matryoshka_kv writes models of type {TYPE} with a narrower cache; this one is of type {found}."
        )
    distill.run(stage, sys.modules[__name__])
    for folder in sorted(stage.folder.glob("model*")):
        _narrow(folder, stage.config.keep)


def _narrow(folder: Path, keep: float) -> None:
    """Replace the model in a folder by one with a narrower cache; what lies beside it stays."""
    from methods.checkpoint import load_model, save_model
    from methods.distill._projections import narrowed, read
    from methods.loop import COMPANIONS

    projections = read(folder)
    model = load_model(folder, "parent", "cpu")
    written = folder.with_name(f"narrow-{folder.name}")
    save_model(narrowed(model, projections, rank_of(keep, projections.shape[2])), written, folder)
    shutil.copytree(folder / COMPANIONS, written / COMPANIONS)
    shutil.rmtree(folder)
    written.rename(folder)
