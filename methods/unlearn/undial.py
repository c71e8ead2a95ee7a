"""UNDIAL: distil the model into itself, with the logit of the memorised token pushed down.

Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models".

    L = gamma * mean_{b,t} CE( softmax( z_start - beta * onehot(y) ), z )  +  alpha * L_retain

The target is fixed, so the loss is bounded below and forgetting stops where the token is e^beta times less likely than
it was. It needs the whole distribution of the starting model.

Where paper and code disagree. The mean here is over answer tokens (``mask="valid"``). The authors' own code
(dong-river/LLM_unlearning) masks no prompt: every position counts, and what is pushed down is the token that stands
there (``mask="all"``). locuslab/open-unlearning, ``undial.py``, masks the prompt in the labels but not in the mean, and
then uses the label -100 as an index: at every prompt and padding position it pushes down entry V - 100 of the
vocabulary, whatever that is. ``minus_100_as_index`` does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from methods.stage import AssayError, Claim, Component, Optimizer, Term, Terms
from methods.terms import Outputs, forward, frozen
from methods.unlearn import Retaining, UnlearnBatch, retain_term
from methods.unlearn._positions import over_positions

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Part

SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.unlearn._positions")
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Retaining):
    """The shared recipe with a ten times larger learning rate, and how the logits are adjusted."""

    # open-unlearning's UNDIAL.yaml
    optimizer: Optimizer = Component("adamw", {"learning_rate": 1e-4, "weight_decay": 0.01})
    # weight of the retain term (0 in that yaml: the distillation itself keeps what is not pushed down)
    alpha: Annotated[float, Ge(0)] = 0.0
    # how far the logit of the memorised token is pushed down (that yaml; the authors' own default is 5)
    beta: Annotated[float, Ge(0)] = 10.0
    # positions that count: the answer's, or all of the padded batch
    mask: Literal["valid", "all"] = "valid"
    # push down entry V - 100 of the vocabulary wherever the label is -100 (open-unlearning)
    minus_100_as_index: bool = False

    def __post_init__(self) -> None:
        """Positions that are masked have no say."""
        if self.minus_100_as_index and self.mask != "all":
            raise AssayError(
                "unlearn.undial: minus_100_as_index is about positions that mask='valid' leaves out; "
                "add mask='all' or leave it out."
            )


def needs_reference(config: Config) -> bool:
    """Always: the target is a whole distribution."""
    return True


def loss(config: Config, model: Any, batch: UnlearnBatch, reference: Any) -> Terms:
    """``forget``: the cross-entropy with the adjusted distribution; ``retain`` as ``retain_loss`` says."""
    part = batch.forget
    now, start = forward(model, part), frozen(reference, part)
    if config.mask == "valid":
        chosen = now.mask
        losses = distance(now.logits[chosen], start.logits[chosen], now.targets[chosen], config.beta)
        forget = Term(losses.sum(), part.tokens, config.gamma)
    else:
        losses = distance(now.logits, start.logits, everywhere(config, part, now), config.beta)
        forget = over_positions(losses.sum(), part, config.gamma)
    return {"forget": forget} | retain_term(config, model, batch, reference)


def distance(now: Tensor, start: Tensor, targets: Tensor, beta: float) -> Tensor:
    """CE(softmax(start - beta * onehot(targets)), now) at each position [...], of logits [...,V]."""
    places = targets.unsqueeze(-1)
    wanted = start.scatter(-1, places, start.gather(-1, places) - beta).softmax(-1)
    return now.logsumexp(-1) - (wanted * now).sum(-1)


def everywhere(config: Config, part: Part, outputs: Outputs) -> Tensor:
    """The token that is pushed down at each position [B,T-1]: the one that stands there."""
    if not config.minus_100_as_index:
        return part.input_ids[:, 1:]
    vocabulary = outputs.logits.shape[-1]
    if vocabulary < 100:
        raise AssayError(
            f"unlearn.undial: minus_100_as_index needs a vocabulary of 100 entries; this has {vocabulary}."
        )
    return outputs.targets.where(outputs.mask, vocabulary - 100)
