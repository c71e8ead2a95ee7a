"""FLAP: heads and neurons whose outputs fluctuate least go, and their mean stays as a bias.

An, Zhao, Yu, Tang, Wang 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (AAAI
2024, arXiv 2312.11983; CASIA-IVA-Lab/FLAP). What an input j of ``o_proj`` or ``down_proj`` gives beyond its
mean over the calibration tokens is lost when it is replaced by that mean:

    S_j = var_j * ||W_:,j||^2  (WIFV)        B = W (mean * pruned)

``IFV`` leaves the weights out; ``WIFN`` is Wanda's score, mean_i |W_ij| sqrt(sum x_j^2). To compare layers and
modules the scores of a layer's inputs, for attention squared, are standardised (mean 0, deviation 1) and a
head's are averaged over its columns. A head weighs as much as 512/3 neurons: a head of 128 columns has four
matrices of them, a neuron three rows or columns. A head is a key-value group with all its query heads.

Structures: "AL-AM" ranks heads and neurons of all layers together, "AL-MM" each kind over all layers,
"UL-UM" within each layer. As released the units up to the one with the threshold's score go, so that a budget is
met about; here as many heads go as the joint ranking says, or the nearest number with which whole neurons
meet the budget exactly, and the lowest neurons make up the rest.

The bias needs ``o_proj`` and ``down_proj`` to have one. Llamas have such parameters when the configuration says
``attention_bias`` and ``mlp_bias``; the other projections then have biases of 0. The model's class stays.

Quirks of the official code, with ``statistics="official"``: ``old_baseline`` is the mean already updated, so that
the "variance" is a running sum of (x - new mean)^2; the first sequence adds nothing to it; means and sums are
divided by sequences and not by tokens. "exact" takes mean and variance over all calibration tokens. (Its
head width of 128 is not copied.)

FLAP's paper prunes at billions of parameters; nothing was measured here, so there is no claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from methods.stage import AssayError, Claim, Dataset

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.prune._structured import Budget, Part

# The seed draws the calibration sequences.
SEEDED = True
USES = (
    "methods.prune._structured",
    "methods.prune._walk",
    "methods.architectures",
    "methods.data",
    "methods.checkpoint",
)
RESULT = "model"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``prune.flap``."""

    # Named data set the activations are measured on; the paper takes WikiText-2.
    data: Dataset
    # Share of the decoder's attention and MLP parameters that goes, in whole heads and neurons.
    sparsity: Annotated[float, Ge(0), Lt(1)]
    # Score of an input: fluctuation times weights (the paper's), fluctuation alone, or Wanda's.
    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    # What is ranked together (see above); the paper's is AL-AM.
    structure: Literal["AL-AM", "AL-MM", "UL-UM"] = "AL-AM"
    # Whether the means of what goes stay as biases.
    bias: bool = True
    # Mean and variance over all tokens, or as the official code adds them up (see above).
    statistics: Literal["exact", "official"] = "exact"
    # Calibration sequences; 1,024 in the official code's script.
    sequences: Annotated[int, Gt(1)] = 128
    # Longest calibration sequence; 128 in the official code's script.
    context_tokens: Annotated[int, Gt(0)] = 128


def structural(config: Config) -> bool:
    """Whole units always go, so that a physically smaller model exists."""
    return True


def prune(config: Config, model: PreTrainedModel, calibration: Calibration, progress: Progress) -> None:
    """Zero the heads and neurons that fluctuate least, in place, and put their means into biases."""
    import torch

    from methods.prune._structured import parts, zero_units
    from methods.prune._walk import decoder_layers

    found = parts(model, "group", "prune.flap")
    sequences = calibration.sequences(config.data, config.sequences, config.context_tokens)
    measured = measure(config, model, found, sequences, progress)
    scores = [unit_scores(config, part, seen) for part, seen in zip(found, measured, strict=True)]
    gone, layers = choose(config, model, found, scores), decoder_layers(model)
    with torch.no_grad():
        for part, seen in zip(found, measured, strict=True):
            if config.bias and bool(gone[part.name].any()):
                keep_means(model, part, seen.mean, gone[part.name])
            zero_units(layers[part.block], part, gone[part.name])


# --- what inputs do on the calibration tokens ------------------------------------------------------------------


@dataclass
class Fluctuation:
    """Mean, variance and energy [in] of one matrix's inputs, in float64; ``official`` as the official code has them."""

    official: bool
    mean: Any = 0.0
    # sum of squared deviations; official: already divided
    spread: Any = 0.0
    # sum of squares, per sequence
    energy: Any = 0.0
    tokens: int = 0
    sequences: int = 0

    def add(self, inputs: Tensor) -> None:
        """Add the inputs [tokens,in] of one sequence."""
        inputs, seen = inputs.double(), self.sequences
        self.energy = (self.energy * seen + inputs.square().sum(dim=0)) / (seen + 1)
        if self.official:
            self._add_officially(inputs)
        else:
            self._add(inputs)
        self.tokens += len(inputs)
        self.sequences += 1

    def _add(self, inputs: Tensor) -> None:
        """Means and squared deviations of both parts together (Chan, Golub, LeVeque 1979)."""
        own = inputs.mean(dim=0)
        share = len(inputs) / (self.tokens + len(inputs))
        away = own - self.mean
        self.mean = self.mean + share * away
        self.spread = self.spread + (inputs - own).square().sum(dim=0) + away.square() * self.tokens * share

    def _add_officially(self, inputs: Tensor) -> None:
        """The first sequence adds no spread; the others add it around the mean that has them in it."""
        seen = self.sequences
        self.mean = (self.mean * seen + inputs.mean(dim=0)) / (seen + 1)
        if seen:
            around = (inputs - self.mean).square().sum(dim=0)
            self.spread = self.spread * (seen - 1) / seen + around / (seen + 1)

    @property
    def variance(self) -> Tensor:
        """What the metrics call fluctuation [in]."""
        found: Tensor = self.spread if self.official else self.spread / max(self.tokens - 1, 1)
        return found


def measure(
    config: Config,
    model: PreTrainedModel,
    found: Sequence[Part],
    sequences: list[Tensor],
    progress: Progress,
) -> list[Fluctuation]:
    """The inputs of every part in the dense model."""
    from methods.prune._walk import decoder_layers, walk

    measured = [Fluctuation(config.statistics == "official") for _ in found]
    bar = progress.bar(len(decoder_layers(model)), "blocks measured")
    for _, block in zip(bar, walk(model, sequences), strict=False):
        own = {
            part.local: seen for part, seen in zip(found, measured, strict=True) if part.block == block.index
        }

        def see(name: str, inputs: Tensor, own: Mapping[str, Fluctuation] = own) -> None:
            if name in own:
                own[name].add(inputs)

        block.run_watched(see)
        # A pass over the calibration tokens is short and leaves nothing that would be worth saving.
        progress.stop_if_asked(0)
    return measured


# --- scores --------------------------------------------------------------------------------------------------


def metric(kind: str, seen: Fluctuation, weight: Tensor) -> Tensor:
    """The score of every input [in] of a matrix [out,in], float64."""
    weight = weight.double()
    if kind == "WIFN":
        return (weight.abs() * seen.energy.sqrt()).mean(dim=0)
    return seen.variance * weight.square().sum(dim=0) if kind == "WIFV" else seen.variance


def unit_scores(config: Config, part: Part, seen: Fluctuation) -> Tensor:
    """The standardised scores of a part's units [units]; units without weight come before all others."""
    weight = part.linear.weight.data
    inputs = metric(config.metric, seen, weight)
    if part.budget == "heads":
        inputs = inputs.square()
    units = standardised(inputs).unflatten(0, (part.count, -1)).mean(dim=1)
    return units.masked_fill(~part.contributing(), -math.inf)


def standardised(values: Tensor) -> Tensor:
    """Values with mean 0 and deviation 1; 0 where all are the same."""
    deviation = values.std()
    centred = values - values.mean()
    return centred / deviation if float(deviation) > 0 else values.new_zeros(values.shape)


# --- budgets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Units that are ranked together: those of one part, or those of a kind in all layers."""

    parts: tuple[Part, ...]
    scores: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def name(self) -> str:
        place = self.parts[0].name if len(self.parts) == 1 else "all layers"
        return f"{self.parts[0].budget} of {place}"


def choose(
    config: Config, model: PreTrainedModel, found: Sequence[Part], scores: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Which units of every part go: a boolean tensor [units] by the part's name."""
    from methods.prune._structured import kept_units, lowest

    together = pools(config.structure, found, scores)
    if config.structure == "AL-AM":
        numbers = joint(config.sparsity, model, *together)
    else:
        numbers = [
            pool.count - kept_units(pool.count, config.sparsity, "exact", pool.name) for pool in together
        ]
    gone: dict[str, Tensor] = {}
    for pool, number in zip(together, numbers, strict=True):
        gone |= lowest(pool.parts, pool.scores, number)
    return gone


def pools(structure: str, found: Sequence[Part], scores: Sequence[Tensor]) -> list[Pool]:
    """What is ranked together: each part's units, or all heads and all neurons."""
    pairs = list(zip(found, scores, strict=True))
    if structure == "UL-UM":
        return [Pool((part,), (score,)) for part, score in pairs]
    kinds = ([pair for pair in pairs if pair[0].budget == kind] for kind in ("heads", "neurons"))
    return [Pool(tuple(part for part, _ in kind), tuple(score for _, score in kind)) for kind in kinds]


def joint(sparsity: float, model: PreTrainedModel, heads: Pool, neurons: Pool) -> list[int]:
    """How many heads and how many neurons go so that the budget of parameters is met.

    As many heads as the joint ranking gives, or the nearest number that whole neurons can complete.
    """
    head, neuron = unit_cost(model, heads), unit_cost(model, neurons)
    total, step = heads.count * head + neurons.count * neuron, math.gcd(head, neuron)
    # Parameters of whole heads and neurons are multiples of the step.
    target = round(total * sparsity / step) * step
    wanted = heads_in_ranking(heads, neurons, head, neuron, target)
    for number in sorted(range(heads.count + 1), key=lambda number: (abs(number - wanted), number)):
        rest, over = divmod(target - number * head, neuron)
        if not over and 0 <= rest <= neurons.count:
            return [number, rest]
    raise AssayError(
        f"prune.flap: sparsity={sparsity:g} cannot be met with whole units of {heads.count} heads and "
        f'{neurons.count} neurons; structure="AL-MM" counts each kind for itself.'
    )


def heads_in_ranking(heads: Pool, neurons: Pool, head: int, neuron: int, target: int) -> int:
    """How many heads are among the lowest units that together cost no more than the target."""
    import torch

    scores = torch.cat([*heads.scores, *neurons.scores])
    costs = torch.tensor([head] * heads.count + [neuron] * neurons.count, device=scores.device)
    order = scores.argsort(stable=True)
    within = order[costs[order].cumsum(0) <= target]
    return int((within < heads.count).sum())


def unit_cost(model: PreTrainedModel, pool: Pool) -> int:
    """Rows and columns of the hidden width that one unit has: 3 of a neuron, 512 of a head of 128 with its own keys."""
    from methods.prune._structured import INTO
    from methods.prune._walk import decoder_layers

    layers, costs = decoder_layers(model), set()
    for part in pool.parts:
        owner = getattr(layers[part.block], part.local.partition(".")[0])
        rows = sum(getattr(owner, name).out_features for name in INTO[part.budget])
        costs.add((rows + part.linear.in_features) // part.count)
    if len(costs) > 1:
        raise AssayError(
            f'prune.flap: the {pool.name} differ in size and cannot be weighed against neurons; structure="AL-MM" or '
            '"UL-UM" counts them one by one.'
        )
    return int(costs.pop())


# --- biases ---------------------------------------------------------------------------------------------------


def keep_means(model: PreTrainedModel, part: Part, mean: Tensor, gone: Tensor) -> None:
    """Add what the units [units] that go give on average to the bias of their projection."""
    open_biases(model, part.budget)
    lost = mean * gone.repeat_interleave(part.linear.in_features // part.count)
    part.linear.bias.data += (part.linear.weight.data.double() @ lost).to(part.linear.bias.dtype)


def open_biases(model: PreTrainedModel, budget: Budget) -> None:
    """Give every projection of all attentions or MLPs a bias, as the configuration then says; new ones are 0."""
    from torch import nn

    from methods.prune._structured import INTO, LOCAL
    from methods.prune._walk import decoder_layers

    owner, _, out = LOCAL[budget].partition(".")
    for layer in decoder_layers(model):
        for name in (*INTO[budget], out):
            linear = getattr(getattr(layer, owner), name)
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    setattr(model.config, {"heads": "attention_bias", "neurons": "mlp_bias"}[budget], True)
