"""ReGLU: a low-rank update that starts where the forget rows speak and stays out of where the retain rows do.

"Representation-Guided Parameter-Efficient LLM Unlearning" (code: sustech-nlp/ReGLU).

    L = gamma * L_forget + alpha * L_retain + lambda * sum_layers || B^T P ||_F^2

    IHL  = 1/M sum_{b,t} max(0, 1 + p_y - max_{v != y} p_v)      forget_loss="ihl", p = softmax of the logits
    GD   = - 1/M sum_{b,t} l[b,t]                                forget_loss="gd"

B, A and P of each adapted layer come from its outputs on forget and retain rows (RILA, ``_rila.py``), and its own
weight is replaced by W0 - (lora_alpha / r) B A, so that nothing has changed when training begins. The overlaps (ROL)
are added up over layers and not averaged. L_retain is the answer NLL. The model is saved merged, and only so.

Where paper and code disagree. The paper weighs the retain term, the code does not: alpha = 1. The code's inverted
hinge loss leaves out the softmax when all logits happen to lie between 0 and 1, and without stored directions it
falls back to a random P; neither is repeated here. In a layer with no more outputs than ``retain_rank`` P spans
everything and the overlap is plain decay of B: on a small model choose fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from methods.stage import Adapter, Claim, Component, Optimizer, Schedule, Stage, Term, Terms
from methods.terms import Outputs, answer_nll, forward
from methods.unlearn import Retaining, Rows, Source, UnlearnBatch, retain_term

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from methods.data import Example, Part

SEEDED = True
USES = (
    "methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.unlearn._rila",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared options, and what the adapter starts from; defaults of the code's TOFU recipe for Phi-1.5."""

    # passes over the forget rows (5 on TOFU)
    epochs: Annotated[float, Gt(0)] | None = 5.0
    # AdamW as on TOFU; 1e-5 for WMDP
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-4, "weight_decay": 0.01})
    # linear to 0 after a warm-up of one epoch, a fifth of five
    schedule: Schedule = Component("linear", {"warmup_share": 0.2})
    # what is trained: LoRA of rank 32, alpha 64 on all linear layers
    adapter: Adapter = Component("lora", {"rank": 32, "alpha": 64})
    # the answer NLL, as published; with changed base weights the model without its adapter is not the starting one
    retain_loss: Literal["nll"] = "nll"
    # inverted hinge loss (TOFU) or gradient ascent (WMDP)
    forget_loss: Literal["ihl", "gd"] = "ihl"
    # how much the retain rows' directions are avoided at the start (TOFU 0.7, WMDP 0.5)
    beta: Annotated[float, Ge(0), Le(1)] = 0.7
    # weight lambda of the overlap with the retain rows' directions (0.5 in both recipes)
    overlap: Annotated[float, Ge(0)] = 0.5
    # directions per layer that the overlap is taken with (128 in both)
    retain_rank: Annotated[int, Gt(0)] = 128
    # rows of each set that the directions come from (256 in both)
    sequences: Annotated[int, Gt(0)] = 256
    # False starts the adapter at random as LoRA does: how much of the result is the start?
    guided: bool = True


CLAIMS: tuple[Claim, ...] = ()


def parts(config: Config) -> dict[str, Source]:
    """The retain rows are read even where alpha is 0: the start needs them."""
    return {"forget": Rows(config.forget), "retain": Rows(config.retain)}


def needs_reference(config: Config) -> bool:
    """Never."""
    return False


def prepare(config: Config, model: Any, stage: Stage, parts: Mapping[str, Sequence[Example]]) -> None:
    """Start the adapter from the representations of forget and retain rows that the seed draws."""
    from methods.unlearn import _rila

    forget, retain = (_drawn(config, model, stage, name, parts[name]) for name in ("forget", "retain"))
    _rila.initialise(model, forget, retain, config.beta, start=config.guided, basis=config.retain_rank)


def _drawn(config: Config, model: Any, stage: Stage, name: str, examples: Sequence[Example]) -> list[Part]:
    from methods.checkpoint import load_tokenizer
    from methods.data import Sampler, padding_id
    from methods.unlearn import _rila

    count = min(config.sequences, len(examples))
    rows = Sampler(len(examples), f"{stage.seed}/rila/{name}").batch(0, count)
    padding = padding_id(load_tokenizer(stage.parents["model"]))
    return _rila.in_chunks([examples[row] for row in rows], padding, name, next(model.parameters()).device)


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the inverted hinge loss or the answer NLL; ``retain``; ``overlap``: the sum over layers."""
    part = batch.forget
    return (
        {"forget": forget_term(config, part, forward(model, part))}
        | retain_term(config, model, batch, reference)
        | {"overlap": overlap_term(config, model, part)}
    )


def forget_term(config: Config, part: Part, outputs: Outputs) -> Term:
    """A mean over answer tokens that is minimised."""
    if config.forget_loss == "gd":
        return answer_nll(part, outputs, -config.gamma)
    return Term(inverted_hinge(outputs).sum(), part.tokens, config.gamma)


def inverted_hinge(outputs: Outputs) -> Tensor:
    """1 + p_y - max over the other tokens, for each answer token [M]; between 0 and 2."""
    probabilities = outputs.logits[outputs.mask].softmax(-1)
    targets = outputs.targets[outputs.mask].unsqueeze(-1)
    own = probabilities.gather(-1, targets).squeeze(-1)
    others = probabilities.scatter(-1, targets, 0.0).amax(-1)
    return (1 + own - others).clamp(min=0)


def overlap_term(config: Config, model: Any, part: Part) -> Term:
    """sum_layers ||B^T P||_F^2 once a batch: each micro-batch adds its share, by its number of sequences."""
    share, value = part.sequences, overlap(model)
    # with weight 0 it is only watched
    return Term((value if config.overlap > 0 else value.detach()) * float(share), share, config.overlap)


def overlap(model: Any) -> Tensor:
    """The sum over adapted layers of ||B^T P||_F^2."""
    from methods.unlearn._rila import BASIS

    layers = [layer for layer in model.modules() if hasattr(layer, BASIS)]
    return sum(
        (layer.lora_B[name].weight.T @ getattr(layer, BASIS)).square().sum()
        for layer in layers
        for name in layer.lora_B
    )
