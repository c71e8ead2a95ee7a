"""Layer-wise quantisation: few bits for the blocks that matter least, by one number for each block.

Dumitru, Yadav, Maheshwary, Clotan, Madhusudhan, Surdeanu 2024, "Layer-Wise Quantization: A Pragmatic and Effective
Method for Quantizing LLMs Beyond Integer Bit-Levels" (arXiv 2406.17415; RazvanDu/LayerwiseQuant holds a README only, so
that this is written from its text). Two scores of a block:

    LIM_l = -cos(input of block l, output of block l)        most negative: it changes least, and is lowered first
    ZD_l  = share of its weights with (w - mean) / std > 1   largest: it is lowered first

with the mean and the population standard deviation of all weights of the block's linear layers. The ``lowered`` blocks
that come first get ``low`` bits in all their layers, the others ``high``.

Open in the text, and therefore an option: whether the cosine is taken for each token and averaged (``token``) or of the
averaged embeddings (``mean``). Outputs are those of the block itself, never of the final norm behind the last one.

Any quantiser's levels will do: the assignment is for a ``levels.*`` stage with bit-widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from methods.stage import AssayError, BitLevels, Claim, Dataset

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.search import Problem
    from methods.search._assignment import Assignment

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.levels._database",
    "methods.search._assignment",
    "methods.prune",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
SMOKE = {"lowered": 1}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The levels, the score, and how many blocks are lowered."""

    # A level database of bit-widths.
    levels: BitLevels
    # Blocks at the low bit-width; the paper's knob.
    lowered: Annotated[int, Ge(0)]
    # "lim": how little a block changes its input. "zd": how many of its weights lie far above the mean.
    score: Literal["lim", "zd"] = "lim"
    # Whether cosines of tokens are averaged, or embeddings before one cosine is taken; for "lim".
    cosine: Literal["token", "mean"] = "token"
    # Bits of the blocks that are lowered; 2 in the paper.
    low: Annotated[int, Ge(1), Le(8)] = 2
    # Bits of the others; 4 in the paper.
    high: Annotated[int, Ge(1), Le(8)] = 4
    # Named data set that "lim" is measured on; "zd" needs none.
    data: Dataset | None = None
    # Calibration sequences.
    sequences: Annotated[int, Gt(0)] = 128
    # Longest calibration sequence.
    context_tokens: Annotated[int, Gt(0)] = 2048

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise AssayError(
                f"search.layerwise: low={self.low} bits must be fewer than high={self.high} bits."
            )
        if self.score == "lim" and self.data is None:
            raise AssayError('search.layerwise: score="lim" is measured on data: name a data set, data="…".')


def search(config: Config, problem: Problem) -> Assignment:
    """Lower the blocks with the lowest scores; every layer of a block gets the same bits."""
    from methods.search._assignment import Assignment

    database = problem.levels("bits")
    scores = scores_of(config, problem)
    chosen = set(lowest(scores, config.lowered))
    levels = {unit.name: str(config.low if unit.block in chosen else config.high) for unit in database.units}
    about = {"score": config.score, "scores": scores, "lowered": sorted(chosen)}
    return Assignment.of(database, levels, "search.layerwise", about)


def scores_of(config: Config, problem: Problem) -> list[float]:
    """A number for each block; the lowest are lowered first."""
    if config.score == "zd":
        return [-share_far_above(weights) for weights in block_weights(problem.model)]
    assert config.data is not None  # checked by Config
    sequences = problem.calibration.sequences(config.data, config.sequences, config.context_tokens)
    pairs = inputs_and_outputs(problem.model, sequences)
    return [-similarity(inputs, outputs, config.cosine) for inputs, outputs in pairs]


def lowest(scores: list[float], count: int) -> list[int]:
    """The blocks with the ``count`` lowest scores; of equal ones the earlier.

    Raises:
        AssayError: there are not so many blocks.
    """
    if count > len(scores):
        raise AssayError(f"search.layerwise: lowered={count}, but the model has {len(scores)} blocks.")
    return sorted(range(len(scores)), key=scores.__getitem__)[:count]


# --- scores -----------------------------------------------------------------------------------------------


def inputs_and_outputs(
    model: PreTrainedModel, sequences: list[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What goes into each block and what comes out of it: [1,T,d] for each sequence."""
    from methods.prune._walk import Block, walk

    last: Block | None = None
    for block in walk(model, sequences):
        if last is not None:
            yield last.inputs, block.inputs
        last = block
    assert last is not None  # a decoder has blocks
    yield last.inputs, last.run()


def similarity(
    inputs: Iterable[Tensor], outputs: Iterable[Tensor], cosine: Literal["token", "mean"]
) -> float:
    """Cosine of the hidden states [..,d] before and after a block, over all tokens of all sequences.

    Added up sequence by sequence, so that no more than one is held in float64.
    """
    from torch.nn.functional import cosine_similarity

    cosines, tokens = 0.0, 0
    before: Any = 0.0
    after: Any = 0.0
    for entering, leaving in zip(inputs, outputs, strict=True):
        one, other = entering.flatten(0, -2).double(), leaving.flatten(0, -2).double()
        cosines += float(cosine_similarity(one, other, dim=-1).sum())
        tokens += len(one)
        before, after = before + one.sum(dim=0), after + other.sum(dim=0)
    if cosine == "token":
        return cosines / tokens
    return float(cosine_similarity(before, after, dim=0))


def block_weights(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The weights of the linear layers of each block."""
    from torch import nn

    from methods.prune._walk import decoder_layers

    for block in decoder_layers(model):
        yield [part.weight.data for part in block.modules() if isinstance(part, nn.Linear)]


def share_far_above(weights: Iterable[Tensor]) -> float:
    """The share of all these weights that lie more than one standard deviation above their mean."""
    import torch

    values = torch.cat([weight.flatten() for weight in weights]).double()
    limit = values.mean() + values.std(correction=0)
    return float((values > limit).double().mean())
