"""ECoFLaP: sparsity by how much the loss moves when a layer is shaken, measured without gradients.

Sung, Yoon, Bansal 2024, "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models" (ICLR 2024,
arXiv 2310.02998). Coarse: for every layer l, one draw z of Gaussian noise and two forward passes for each batch,

    g_l = sum over batches of |L(W_l + e z) - L(W_l - e z)| / (2 e)

with noise on that layer alone; ``draws`` of them are averaged. Its score is g_l (``GradOnly``), the sum of |W| g_l
(``GradMagAbs``) or of W^2 g_l^2 (``GradMagSquare``); ``over="avg"`` divides by the layer's size. g is one number for a
layer: inside it |W| g ranks as magnitude does. Every layer keeps ceil(n (1 - most)) of its n weights, with ``most`` the
target sparsity and ``headroom`` more, and the rest is handed out in proportion to the scores, none above its size.
Fine: the layers' own pruner, here the levels of a ``levels.*`` stage (Wanda's, in the paper); every layer gets a level
near its share, and the number of zeros is that of the uniform assignment exactly.

Where the official code (ylsung/ECoFLaP) differs: it rounds up in every round and *adds* what is then too much once
more instead of taking it back, so that 2 to 12 weights too many stay in the parity cases; and it takes the noise away
by adding it the other way round, which moves bfloat16 weights over many probes. Here the target is met exactly and a
copy of the weights is put back.

Cost: 2 * layers * sequences * draws forward passes, each from the probed layer's block on; the hidden states in front
of it are kept for all sequences. A batch is one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Lt

from methods.stage import AssayError, Claim, Dataset, How, NotFinite, SparsityLevels

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from methods.search import Problem
    from methods.search._assignment import Assignment
    from methods.search._runner import Prepared, Runner

# The seed draws the sequences and the noise.
SEEDED = True
USES = (
    "methods.levels._database",
    "methods.search._assignment",
    "methods.prune",
    "methods.prune._walk",
    "methods.prune._shares",
    "methods.loop",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()

Score = Literal["GradOnly", "GradMagAbs", "GradMagSquare"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The levels to choose from, and how layers are probed."""

    # A level database of sparsities; its level "0" gives the number of zeros.
    levels: SparsityLevels
    # Data set that the loss is taken on.
    data: Dataset
    # What a layer is scored by, see above; the paper's scripts take GradOnly.
    score: Score = "GradOnly"
    # Whether scores are summed over a layer's weights, or averaged; the paper's scripts take the sum.
    over: Literal["sum", "avg"] = "sum"
    # Size of the noise, e; the official 1e-3.
    noise: Annotated[float, Gt(0)] = 1e-3
    # Draws of noise for each layer and sequence; the official 1.
    draws: Annotated[int, Gt(0)] = 1
    # How far a layer's sparsity may be above the target; 0.1 in the official scripts.
    headroom: Annotated[float, Gt(0), Lt(1)] = 0.1
    # Calibration sequences; ours.
    sequences: Annotated[int, Gt(0)] = 32
    # Longest calibration sequence; ours.
    context_tokens: Annotated[int, Gt(1)] = 2048
    # seconds between two saved states
    save_seconds: Annotated[float, Gt(0), How] = 30.0


def search(config: Config, problem: Problem) -> Assignment:
    """Probe every layer of the database, share out the zeros, and take the nearest levels."""
    from methods.search._assignment import Assignment, nearest_levels

    database = problem.levels("sparsity")
    sequences = problem.calibration.sequences(config.data, config.sequences, config.context_tokens)
    sizes = {unit.name: unit.rows * unit.columns for unit in database.units}
    gradients = probe_all(config, problem, list(sizes), sequences)
    scores = scores_of(config, problem, dict(zip(sizes, gradients, strict=True)))
    spent = database.spent(database.uniform())
    zeros, weights = sum(spent.values()), sum(sizes.values())
    most = zeros / weights + config.headroom
    kept = coarse(list(scores.values()), list(sizes.values()), weights - zeros, most)
    wanted = {name: size - count for (name, size), count in zip(sizes.items(), kept, strict=True)}
    levels = nearest_levels(database, wanted, spent)
    sparsities = {name: wanted[name] / size for name, size in sizes.items()}
    about = {"gradients": gradients, "scores": scores, "sparsities": sparsities}
    return Assignment.of(database, levels, "search.ecoflap", about)


def scores_of(config: Config, problem: Problem, gradients: Mapping[str, float]) -> dict[str, float]:
    """The score of every layer from its g."""
    weights = {name: problem.model.get_parameter(f"{name}.weight").detach() for name in gradients}
    return {
        name: total(importance(weights[name], gradient, config.score), weights[name].numel(), config.over)
        for name, gradient in gradients.items()
    }


# --- probing ---------------------------------------------------------------------------------------------------


def probe_all(
    config: Config, problem: Problem, names: Sequence[str], sequences: Sequence[Tensor]
) -> list[float]:
    """g of every layer, in the order of the model; goes on after a kill."""
    import torch

    usable = [ids for ids in sequences if ids.shape[1] > 1]
    if not usable:
        raise AssayError(
            "search.ecoflap: no calibration sequence has two tokens: there is no loss to look at."
        )
    progress = problem.progress
    progress.save_seconds = config.save_seconds
    state = progress.load()
    found = state.tensors["gradients"].tolist() if state else []
    bar = progress.bar(len(names), "layers probed", initial=len(found))
    with torch.inference_mode():
        depth = Depth(problem.runner, usable)
        for number in bar:
            found.append(probe_layer(config, problem, depth, names[number], number))
            if progress.due(number + 1):
                tensors = {"gradients": torch.tensor(found, dtype=torch.float64)}
                progress.save(number + 1, tensors, {})
    return found


def probe_layer(config: Config, problem: Problem, depth: Depth, name: str, number: int) -> float:
    """g of the layer of that number and name."""
    weight = problem.model.get_parameter(f"{name}.weight")
    depth.advance(problem.runner.site_of(name))
    gradient = 0.0
    for batch in range(len(depth.batches)):
        # Numbered so that the same layer sees the same noise whether or not the job was resumed.
        random = problem.progress.random(number * len(depth.batches) + batch)
        loss = partial(depth.loss, batch)
        draws = [probe(weight, loss, gaussian(weight, random), config.noise) for _ in range(config.draws)]
        gradient += sum(draws) / len(draws)
    if not math.isfinite(gradient):
        raise NotFinite(f"search.ecoflap: the loss is not finite when {name} is probed: lower noise.")
    return gradient


def gaussian(weight: Tensor, random: torch.Generator) -> Tensor:
    """Standard normal noise of a weight's shape, on its device; drawn on the processor so that cards agree."""
    import torch

    return torch.randn(weight.shape, generator=random).to(weight.device, weight.dtype)


def probe(weight: Tensor, loss: Callable[[], float], noise: Tensor, size: float) -> float:
    """|L(W + e z) - L(W - e z)| / (2 e) for e = ``size``, z = ``noise``; afterwards the weights are what they were."""
    import torch

    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(before + size * noise)
        above = loss()
        weight.copy_(before - size * noise)
        below = loss()
        weight.copy_(before)
    return abs(above - below) / (2 * size)


class Depth:
    """The hidden states of every sequence in front of one part of the dense model, and the losses from there."""

    def __init__(self, runner: Runner, sequences: Sequence[Tensor]) -> None:
        self.runner = runner
        self.site = 0
        self.labels = [ids[0, 1:].to(runner.model.device) for ids in sequences]
        self.batches: list[Prepared] = [runner.prepare(ids) for ids in sequences]
        self.hidden = [prepared.hidden for prepared in self.batches]

    def advance(self, site: int) -> None:
        """Go on to a later part; layers come in the order of the model."""
        while self.site < site:
            self.hidden = [
                self.runner.step(self.site, hidden, prepared.settings)
                for hidden, prepared in zip(self.hidden, self.batches, strict=True)
            ]
            self.site += 1

    def loss(self, batch: int) -> float:
        """Nats per predicted token of one sequence, with the weights there are now from here on."""
        from torch.nn.functional import cross_entropy

        hidden, settings = self.hidden[batch], self.batches[batch].settings
        for index in range(self.site, len(self.runner.sites)):
            hidden = self.runner.step(index, hidden, settings)
        return float(cross_entropy(self.runner.logits(hidden[0, :-1]), self.labels[batch]))


# --- from probes to sparsities ---------------------------------------------------------------------------------


def importance(weight: Tensor, gradient: float, score: Score) -> Tensor:
    """The score of every weight of a layer, or [1] where it is one number for the layer."""
    if score == "GradOnly":
        return weight.new_tensor([gradient])
    return weight.abs() * gradient if score == "GradMagAbs" else weight.square() * gradient**2


def total(scores: Tensor, size: int, over: Literal["sum", "avg"]) -> float:
    """A layer's score: the sum over its weights, or that divided by their number."""
    summed = float(scores.double().sum())
    return summed / size if over == "avg" else summed


def coarse(scores: Sequence[float], sizes: Sequence[int], keep: int, most: float) -> list[int]:
    """How many weights every layer keeps: ``keep`` together, and none sparser than ``most``.

    Raises:
        AssayError: what the layers keep at least is more than ``keep`` already.
    """
    from methods.prune._shares import apportion, fill

    least = [math.ceil(size * max(1 - most, 0.0)) for size in sizes]
    left = keep - sum(least)
    if left < 0:
        raise AssayError(
            f"search.ecoflap: layers that are at most {most:.4f} sparse keep {sum(least)} weights, and {keep} are to "
            "stay: raise headroom."
        )
    room = [size - count for size, count in zip(sizes, least, strict=True)]
    more = apportion(fill(scores, room, left), room, left)
    return [count + extra for count, extra in zip(least, more, strict=True)]
