"""Blocks chosen one by one: how little each of them changes what passes through it, or how little it is missed.

Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (arXiv 2403.03853),
block influence, its equation 1, with h_l the hidden state of a token in front of block l:

    BI_l = 1 - E[ h_l . h_{l+1} / (||h_l|| ||h_{l+1}||) ]

The blocks with the lowest score are removed. Beside it the other scores of Sieberling et al. 2025, "EvoPress: Accurate
Dynamic Model Compression via Evolutionary Search" (ICML 2025; IST-DASLab/EvoPress, ``drop_scoring.py``), all of them
means over tokens,

    l2:             E ||h_{l+1} - h_l||                 l2_normalized:  the same of h / ||h||
    norm_ratio:     E ||h_{l+1} - h_l|| / ||h_{l+1}||
    perplexity, kl: of the model without this block alone

and two that score n consecutive blocks at once, where n is the number to be removed: ``window_cosine``, that is
1 - E cos(h_l, h_{l+n}), and ``window_angular``, E arccos(cos(h_l, h_{l+n})) / pi (Gromov et al. 2024, "The Unreasonable
Ineffectiveness of the Deeper Layers", arXiv 2403.17887; they take the last token of each sequence, and here
it is the mean over tokens, like the others).

Where paper and code disagree: the paper's h_{L+1} is the output of the last block. The code reads ``hidden_states`` of
transformers, whose last entry is *behind* the final norm, so that the last block's score mixes the norm's weights in
(``l2`` of the small model of the parity set: 7.06, and below 0.21 for the other blocks). ``final_norm`` has both.

A block is scored with all others in place. What several of them do together is not seen: that is what the search
``search.evopress_depth`` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Lt

from methods.stage import AssayError, Claim, Dataset

if TYPE_CHECKING:
    from torch import Tensor

    from methods.search import Problem
    from methods.search._assignment import Assignment
    from methods.search._depth import Depth
    from methods.search._runner import Runner

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.architectures",
    "methods.search._assignment",
    "methods.search._spaces",
    "methods.prune",
    "methods.prune._walk",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
SMOKE = {"calibration_tokens": 256}

# Scores that need the model's own answers, and no hidden states.
MISSED = ("perplexity", "kl")
WINDOWS = ("window_cosine", "window_angular")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is removed, and by which score."""

    # rows the scores are measured on; PG19 in ShortGPT, FineWeb-Edu in EvoPress
    data: Dataset
    # share of the blocks, or of the attentions and of the MLPs, that is removed: a whole number of them
    sparsity: Annotated[float, Gt(0), Lt(1)]
    # see above; "influence" is ShortGPT's
    score: Literal[
        "influence",
        "l2",
        "l2_normalized",
        "norm_ratio",
        "perplexity",
        "kl",
        "window_cosine",
        "window_angular",
    ] = "influence"
    # "sub_block": attentions and MLPs are scored apart, and as many of each are removed; for "perplexity" and "kl"
    unit: Literal["block", "sub_block"] = "block"
    # the output of the last block is taken "official": behind the final norm, or "before" it, as the papers say
    final_norm: Literal["official", "before"] = "official"
    # whole sequences are drawn until they have as many tokens; 131,072 in EvoPress
    calibration_tokens: Annotated[int, Gt(0)] = 8192
    # longer sequences are cut; the whole context in EvoPress
    context_tokens: Annotated[int, Gt(1)] = 512

    def __post_init__(self) -> None:
        if self.unit == "sub_block" and self.score not in MISSED:
            raise AssayError(
                f"search.block_scores: attentions and MLPs are scored apart by leaving them out: write "
                f"score='perplexity' or 'kl' with unit='sub_block', not {self.score!r}."
            )
        if self.final_norm != "official" and self.score in MISSED:
            raise AssayError(
                f"search.block_scores: score={self.score!r} looks at no hidden states: leave final_norm out."
            )


def search(config: Config, problem: Problem) -> Assignment:
    """Score the blocks, and remove those with the lowest scores."""
    from methods.search._assignment import Assignment
    from methods.search._depth import Depth

    space = Depth.of(problem.model, config.sparsity, whole_blocks=config.unit == "block")
    sequences = problem.calibration.windows(config.data, config.calibration_tokens, config.context_tokens)
    runner = problem.runner
    if config.score in MISSED:
        scores = without_each(runner, space, sequences, config.score)
    else:
        passes = (depths(runner, each, config.final_norm) for each in sequences)
        gap = space.removed_attentions if config.score in WINDOWS else 1
        scores = named(
            mean_scores(PAIRS[config.score], _counted(passes, problem, len(sequences)), gap), space
        )
    candidate = lowest(space, scores, config.score in WINDOWS)
    space.check(candidate)
    about = {"score": config.score, "scores": scores}
    problem.stage.notes["scores"] = scores
    return Assignment(
        "depth", space.assignment(candidate), "search.block_scores", space.spent(candidate), about
    )


def _counted(passes: Iterator[list[Tensor]], problem: Problem, total: int) -> Iterator[list[Tensor]]:
    for _, states in zip(problem.progress.bar(total, "sequences"), passes, strict=False):
        yield states


# --- from hidden states ------------------------------------------------------------------------------------------


def depths(runner: Runner, sequence: Tensor, final_norm: str) -> list[Tensor]:
    """Hidden states [T,d] of a sequence [1,T] in front of every block, and behind the last one."""
    import torch

    with torch.inference_mode():
        prepared = runner.prepare(sequence)
        hidden, found = prepared.hidden, [prepared.hidden[0]]
        for index, site in enumerate(runner.sites):
            hidden = runner.step(index, hidden, prepared.settings)
            if site.ends_block:
                found.append(hidden[0])
        if final_norm == "official":
            found[-1] = runner.norm(hidden)[0]
    return found


def mean_scores(
    pair: Callable[[Tensor, Tensor], Tensor], passes: Iterator[list[Tensor]], gap: int = 1
) -> list[float]:
    """The mean over all tokens of what ``gap`` consecutive blocks do, from every block they can start at."""
    totals: list[float] = []
    tokens = 0
    for states in passes:
        scores = [
            float(pair(one.double(), other.double()).sum())
            for one, other in zip(states, states[gap:], strict=False)
        ]
        totals = [total + score for total, score in zip(totals, scores, strict=True)] if totals else scores
        tokens += len(states[0])
    return [total / tokens for total in totals]


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """The cosine of every token's two hidden states: [T] of [T,d]."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(before, after, dim=-1).clamp(-1.0, 1.0)


def influence(before: Tensor, after: Tensor) -> Tensor:
    """What of a token's direction is lost: [T] of [T,d]."""
    return 1.0 - cosine(before, after)


def angle(before: Tensor, after: Tensor) -> Tensor:
    """How far a token's direction turns: [T] of [T,d], 1 for half a circle."""
    from math import pi

    return cosine(before, after).arccos() / pi


def distance(before: Tensor, after: Tensor) -> Tensor:
    """How far a token moves: [T] of [T,d]."""
    return (after - before).norm(dim=-1)


def turned(before: Tensor, after: Tensor) -> Tensor:
    """How far a token moves on the unit sphere: [T] of [T,d]."""
    from torch.nn.functional import normalize

    return distance(normalize(before, dim=-1), normalize(after, dim=-1))


def ratio(before: Tensor, after: Tensor) -> Tensor:
    """How far a token moves in units of where it ends: [T] of [T,d]."""
    return distance(before, after) / after.norm(dim=-1).clamp(min=1e-30)


PAIRS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "influence": influence,
    "l2": distance,
    "l2_normalized": turned,
    "norm_ratio": ratio,
    "window_cosine": influence,
    "window_angular": angle,
}


def named(scores: Sequence[float], space: Depth) -> dict[str, float]:
    """The scores by the name of the block, or of the first one of several."""
    blocks = [name.rpartition(".")[0] for name in space.attentions]
    return dict(zip(blocks, scores, strict=False))


# --- from the model's answers ------------------------------------------------------------------------------------


def without_each(runner: Runner, space: Depth, sequences: Sequence[Tensor], score: str) -> dict[str, float]:
    """The perplexity, or the divergence from the whole model, without each unit alone, by the unit's name."""
    from methods.data import Example
    from methods.search._candidates import Batch, Removals, Scorer
    from methods.search._fitness import Sequences, Targets

    tokens = [tuple(sequence[0].tolist()) for sequence in sequences]
    texts = Sequences([Example(ids, ids) for ids in tokens], answers=False)
    targets = Targets(runner, texts, {"perplexity": "ppl"}.get(score, score), top_k=1)
    scorer = Scorer(runner, Removals(runner), targets, texts)
    batch = Batch(runner, targets, texts, texts.whole())
    units = {name: space.assignment(alone) for name, alone in each_alone(space).items()}
    return dict(zip(units, scorer.score(list(units.values()), batch), strict=True))


def each_alone(space: Depth) -> dict[str, tuple[int, ...]]:
    """The candidates that remove one unit, by its name: a block, or a sub-block."""
    if space.whole_blocks:
        blocks = [name.rpartition(".")[0] for name in space.attentions]
        return {name: space.removing((index,), (index,)) for index, name in enumerate(blocks)}
    return {name: tuple(int(other == name) for other in space.names) for name in space.names}


# --- the choice --------------------------------------------------------------------------------------------------


def lowest(space: Depth, scores: Mapping[str, float], windows: bool) -> tuple[int, ...]:
    """The candidate that removes what has the lowest scores; among equal ones the first."""
    if windows:
        starts = list(scores.values())
        first = starts.index(min(starts))
        chosen = range(first, first + space.removed_attentions)
        return space.removing(chosen, chosen)
    if space.whole_blocks:
        blocks = _least(list(scores.values()), space.removed_attentions)
        return space.removing(blocks, blocks)
    return space.removing(
        _least([scores[name] for name in space.attentions], space.removed_attentions),
        _least([scores[name] for name in space.mlps], space.removed_mlps),
    )


def _least(values: Sequence[float], count: int) -> list[int]:
    """Where the ``count`` smallest values are."""
    return sorted(range(len(values)), key=lambda index: values[index])[:count]
