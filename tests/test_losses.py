"""The losses: numbers worked out by hand, gradients, memory, refusals, and any loss with any head in training."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from methods import loss as losses
from methods.architectures.distance_head import DistanceHead, configure
from methods.data import Cases, CaseTable, Example, Part, collate
from methods.find import catalogue
from methods.gradient import Gradient
from methods.loop import Batches
from methods.loss import _blockwise, anyloss, cut_cross_entropy, eisl
from methods.stage import AssayError, Component, Count, Term
from methods.terms import total
from methods.train import run, sft
from tests import generic
from tests.training import make_parent, make_stage
from workflows.notation import parse_call

LN2, LN4 = math.log(2), math.log(4)
# p = 1/2, 1/4, 1/4 up to a factor e in Z, which only the logit z-loss sees.
HALF = [1 - LN2, 1 - LN4, 1 - LN4]
ENTROPY = -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))


def loss_of(name: str, scores: list[float], target: int, **options: Any) -> float:
    """The loss of one token."""
    module = catalogue().component("loss", name).load()
    values = module.token_losses(
        module.Config(**options), torch.tensor([scores], dtype=torch.float64), torch.tensor([target])
    )
    assert values.shape == (1,)
    return float(values)


# --- by hand --------------------------------------------------------------------------------------------------

BY_HAND: list[tuple[str, dict[str, Any], list[float], float]] = [
    ("cross_entropy", {}, HALF, LN2),
    ("cross_entropy", {"label_smoothing": 0.3}, HALF, 0.8 * LN2 + 0.2 * LN4),
    ("cross_entropy", {"label_smoothing": 0.2, "convention": "t5x"}, HALF, 0.8 * LN2 + 0.2 * LN4 - ENTROPY),
    ("logit_z", {"coefficient": 0.1}, HALF, LN2 + 0.1),
    ("logit_z", {"coefficient": 0.1, "label_smoothing": 0.3}, HALF, 0.8 * LN2 + 0.2 * LN4 + 0.1),
    ("spherical_z", {}, [1, 0, -1], math.log1p(math.exp(-math.sqrt(1.5)))),
    ("spherical_z", {"a": 2.0, "b": 1.0}, [1, 0, -1], math.log1p(math.exp(2 * (1 - math.sqrt(1.5)))) / 2),
    ("log_spherical", {"epsilon": 1.0}, [2, 1, 0], math.log(8 / 5)),
    ("log_spherical", {"epsilon": 0.5, "normalise": True}, [3, 4], math.log(2 / 0.86)),
    ("log_taylor", {}, [1, 0], math.log(3.5 / 2.5)),
    ("comp_sum", {"tau": 0.0}, HALF, 1.0),
    ("comp_sum", {"tau": 0.5}, HALF, 2 * (math.sqrt(2) - 1)),
    ("comp_sum", {}, HALF, LN2),
    ("comp_sum", {"tau": 2.0}, HALF, 0.5),
    ("gce", {"q": 0.5}, HALF, 2 * (1 - math.sqrt(0.5))),
    ("mae", {}, HALF, 0.5),
    ("tsallis", {"q": 0.5}, HALF, 2 * (1 - math.sqrt(0.5))),
    ("tsallis", {"q": 1.0}, HALF, LN2),
    ("tsallis", {"q": 0.0}, HALF, 0.5),
]


@pytest.mark.parametrize(("name", "options", "scores", "expected"), BY_HAND)
def test_a_loss_by_hand(name: str, options: dict[str, Any], scores: list[float], expected: float) -> None:
    assert loss_of(name, scores, 0, **options) == pytest.approx(expected, rel=1e-12)


def test_every_loss_of_tokens_has_a_number_by_hand() -> None:
    found = catalogue().components.values()
    names = {
        one.name.partition(".")[2]
        for one in found
        if one.family == "loss" and hasattr(one.load(), "token_losses")
    }
    assert names == {name for name, *_ in BY_HAND}


def test_t5x_smoothing_is_0_for_the_smoothed_target_itself() -> None:
    scores = [math.log(0.8), math.log(0.1), math.log(0.1)]
    assert loss_of("cross_entropy", scores, 0, label_smoothing=0.2, convention="t5x") == pytest.approx(
        0, abs=1e-15
    )


def test_what_stays_the_same_stays_the_same() -> None:
    scores = [0.3, -1.2, 2.0, 0.4]
    moved = [5 + 3 * score for score in scores]
    assert loss_of("spherical_z", moved, 2) == pytest.approx(loss_of("spherical_z", scores, 2), rel=1e-10)
    turned = [-score for score in scores]
    assert loss_of("log_spherical", turned, 0) == loss_of("log_spherical", scores, 0)
    assert loss_of("gce", scores, 1, q=0.3) == pytest.approx(
        loss_of("comp_sum", scores, 1, tau=1.3), rel=1e-12
    )
    assert loss_of("gce", scores, 1, q=0.3) == pytest.approx(loss_of("tsallis", scores, 1, q=0.7), rel=1e-12)


@pytest.mark.parametrize("name", sorted({name for name, *_ in BY_HAND}))
@pytest.mark.parametrize("row", [[40.0, 0.0, -40.0], [-40.0, 0.0, 40.0], [1.0, 1.0, 1.0]])
def test_certain_wrong_and_undecided_scores_keep_finite_losses_and_gradients(
    name: str, row: list[float]
) -> None:
    module = catalogue().component("loss", name).load()
    scores = torch.tensor([row], requires_grad=True)
    value = module.token_losses(module.Config(), scores, torch.tensor([0])).sum()
    value.backward()
    assert value.isfinite() and scores.grad is not None and bool(scores.grad.isfinite().all())


def test_a_hopeful_sum_exponential_keeps_its_digits() -> None:
    assert loss_of("comp_sum", [30.0, 0.0], 0, tau=0.0) == pytest.approx(math.exp(-30), rel=1e-12)
    assert loss_of("comp_sum", [30.0, 0.0], 0, tau=0.5) == pytest.approx(math.exp(-30), rel=1e-10)


# --- AnyLoss ----------------------------------------------------------------------------------------------------


def anyloss_of(metric: str, **options: Any) -> Tensor:
    """The loss of four cases with p = 3/4, 1/4 (class 1) and 1/2, 1/4 (class 0)."""
    config = anyloss.Config(metric=metric, slope=4.0, epsilon=0.0, **options)
    odds = torch.tensor([math.log(3), -math.log(3), 0.0, -math.log(3)], dtype=torch.float64)
    scores = torch.stack([torch.zeros_like(odds), odds], dim=1)
    statistics = anyloss.statistics(config, scores, torch.tensor([1, 1, 0, 0]))
    return anyloss.outer(config, {name: values.mean() for name, values in statistics.items()})


def test_anyloss_by_hand_from_the_confusion_matrix() -> None:
    high, low = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    right, rejected = high + low, (1 - 0.5) + (1 - low)
    wrong, missed = 2 - rejected, 2 - right
    expected = {
        "accuracy": 1 - (right + rejected) / 4,
        "f_beta": 1 - 5 * right / (5 * right + 4 * missed + wrong),
        "g_mean": 1 - math.sqrt(right / 2 * rejected / 2),
        "balanced_accuracy": 1 - (right / 2 + rejected / 2) / 2,
    }
    for metric, value in expected.items():
        options = {"beta": 2.0} if metric == "f_beta" else {}
        assert float(anyloss_of(metric, **options)) == pytest.approx(value, rel=1e-12), metric


class Classifier(nn.Module):
    """A linear classifier in the form that the losses take."""

    main_input_name = "inputs"

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.classifier = nn.Linear(3, classes, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Any:
        return SimpleNamespace(logits=self.classifier(inputs))


def cases_of(labels: list[int]) -> Cases:
    """Random inputs with these labels."""
    torch.manual_seed(3)
    inputs = torch.randn(len(labels), 3, dtype=torch.float64)
    return Cases(inputs, torch.tensor(labels), torch.arange(len(labels)), "train")


@pytest.mark.parametrize("metric", ["accuracy", "f_beta", "g_mean", "balanced_accuracy"])
def test_anyloss_is_that_of_the_whole_batch_whatever_the_micro_batches(metric: str) -> None:
    chosen = Component("anyloss", {"metric": metric, "slope": 3.0})
    found = []
    for micro_batch in (None, 2):
        torch.manual_seed(0)
        model = Classifier()
        gradient = Gradient(
            model,
            lambda model, batch: losses.terms(chosen, model, batch.train),
            outer=losses.outer(chosen),
            micro_batch=micro_batch,
        )
        means = gradient({"train": cases_of([0, 1, 1, 0, 1, 1])}, 0, 1)
        found.append((means["loss"], model.classifier.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_g_mean_has_a_finite_slope_where_nothing_is_found() -> None:
    scores = torch.tensor([[800.0, 0.0], [0.0, 800.0]], requires_grad=True)
    config = anyloss.Config(metric="g_mean")
    statistics = anyloss.statistics(config, scores, torch.tensor([1, 0]))
    anyloss.outer(config, {name: values.mean() for name, values in statistics.items()}).backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())


def table_of(labels: list[int], classes: int) -> CaseTable:
    return CaseTable(torch.zeros(len(labels), 2, dtype=torch.int64), torch.tensor(labels), classes)


@pytest.mark.parametrize(
    ("labels", "classes", "size", "words"),
    [
        (
            [0, 1, 1, 1, 1, 1, 1, 1],
            2,
            2,
            "of class 1, and AnyLoss needs both classes in every batch: raise batch",
        ),
        ([1, 1, 1, 1], 2, 4, "all 4 cases are of class 1"),
        ([0, 1, 2, 1], 3, 4, "made for two classes and these data have 3"),
    ],
)
def test_anyloss_refuses_a_batch_before_training(
    labels: list[int], classes: int, size: int, words: str
) -> None:
    batches = Batches({"train": table_of(labels, classes)}, size=size, seed=0)
    with pytest.raises(AssayError, match=r"loss=anyloss\(\), batch of step \d") as error:
        losses.check_batches(Component("anyloss"), batches, 4)
    assert words in str(error.value)


def test_anyloss_takes_batches_of_both_classes() -> None:
    batches = Batches({"train": table_of([0, 1] * 4, 2)}, size=8, seed=0)
    losses.check_batches(Component("anyloss"), batches, 100)


# --- EISL -------------------------------------------------------------------------------------------------------

# p_i(y_j) for output positions i and targets 0, 1.
RIGHT = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]], dtype=torch.float64)


def eisl_of(scores: Tensor, targets: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    return eisl.sequence_losses(eisl.Config(noise="none", **options), scores, targets, mask)


def test_eisl_of_single_tokens_by_hand() -> None:
    first = 2 / 3 * math.log(1 / 2) + 1 / 3 * math.log(1 / 4)
    second = 2 / 5 * math.log(1 / 2) + 3 / 5 * math.log(3 / 4)
    found = eisl_of(RIGHT.log(), torch.tensor([[0, 1]]), ngrams=(1,))
    assert float(found) == pytest.approx(-(first + second) / 2, rel=1e-12)


def test_eisl_of_the_whole_sequence_and_its_cross_entropy_by_hand() -> None:
    nll = -(math.log(1 / 2) + math.log(3 / 4)) / 2
    targets = torch.tensor([[0, 1]])
    assert float(eisl_of(RIGHT.log(), targets, ngrams=(2,))) == pytest.approx(nll, rel=1e-12)
    assert float(eisl_of(RIGHT.log(), targets, ngrams=(0,))) == pytest.approx(nll, rel=1e-12)
    both = eisl_of(RIGHT.log(), targets, ngrams=(7,), ngram_factor=2.0, ce_factor=0.5)
    assert float(both) == pytest.approx(2.5 * nll, rel=1e-12)


def test_eisl_forgives_a_shift_that_cross_entropy_does_not() -> None:
    targets = torch.tensor([[4, 1, 2, 3]])
    shifted = 8.0 * nn.functional.one_hot(torch.tensor([[0, 4, 1, 2]]), 6).double()
    wrong = 8.0 * nn.functional.one_hot(torch.tensor([[0, 0, 5, 5]]), 6).double()
    assert float(eisl_of(shifted, targets)) < 0.5 * float(eisl_of(wrong, targets))
    assert float(cross_entropy(shifted[0], targets[0])) == pytest.approx(
        float(cross_entropy(wrong[0], targets[0]))
    )


def test_eisl_sees_neither_padding_nor_prompts() -> None:
    torch.manual_seed(0)
    scores, targets = torch.randn(2, 8, 5).double(), torch.randint(0, 5, (2, 8))
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 2:8], mask[1, 3:5] = True, True
    both = eisl_of(scores, targets.masked_fill(~mask, -100), mask, ngrams=(1, 2, 3, -1), ce_factor=0.5)
    alone = [
        eisl_of(
            scores[row : row + 1, mask[row]],
            targets[row : row + 1, mask[row]],
            ngrams=(1, 2, 3, -1),
            ce_factor=0.5,
        )
        for row in (0, 1)
    ]
    torch.testing.assert_close(both, torch.cat(alone))
    torch.testing.assert_close(
        both[1], eisl_of(scores[1:, 3:5], targets[1:, 3:5], ngrams=(1, 2), ce_factor=0.5)[0]
    )


def test_eisl_of_a_sequence_without_targets_is_0() -> None:
    scores = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [False, False, False]])
    found = eisl_of(scores, torch.zeros(2, 3, dtype=torch.int64), mask, ce_factor=1.0)
    found.sum().backward()
    assert found[1].item() == 0 and scores.grad is not None
    assert bool(scores.grad.isfinite().all()) and not bool(scores.grad[1].any())


def test_eisl_draws_its_noise_from_the_seeded_generator() -> None:
    def noisy(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return eisl.sequence_losses(
            eisl.Config(ngrams=(1,)), RIGHT.log(), torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
        )

    assert noisy(1).equal(noisy(1)) and not noisy(1).equal(noisy(2))


def test_eisl_without_n_grams_or_weights_is_refused() -> None:
    with pytest.raises(AssayError, match="ngrams is empty"):
        eisl.Config(ngrams=())
    with pytest.raises(AssayError, match="both 0"):
        eisl.Config(ngram_factor=0.0)


# --- cut cross entropy --------------------------------------------------------------------------------------------

N, V, D = 7, 11, 5


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 tokens and 4 classes, so that neither divides its whole."""
    monkeypatch.setattr(_blockwise, "TOKENS", 3)
    monkeypatch.setattr(_blockwise, "ENTRIES", {"cpu": 12})


def layer_of(
    head: str, classes: int = V, width: int = D, dtype: torch.dtype = torch.float64, **options: Any
) -> nn.Module:
    """An output layer: torch's own, with a bias or without, or one of the heads with exponent 2."""
    torch.manual_seed(1)
    if head.startswith("plain"):
        return nn.Linear(width, classes, bias=head.endswith("bias"), dtype=dtype)
    config = catalogue().component("head", head).load().Config
    if "exponent" in {field.name for field in fields(config)}:
        options = {"exponent": 2.0, **options}
    if head == "vq_logits":
        options = {"codes": 4, **options}
    return DistanceHead(width, classes, configure(Component(head, options))).to(dtype)


def points(rows: int = N, classes: int = V, width: int = D) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).requires_grad_()
    return hidden, torch.randint(0, classes, (rows,), generator=generator)


HEADS = [name.partition(".")[2] for name in catalogue().components if name.startswith("head.")]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("head", ["plain", "plain with bias", *HEADS])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_cut_cross_entropy_is_cross_entropy(head: str, softcap: float | None) -> None:
    """With every head that there is, in values and gradients; one that cannot be cut into classes is refused."""
    layer, (hidden, targets) = layer_of(head), points()
    if isinstance(layer, DistanceHead) and (layer.noise or not layer.separable):
        with pytest.raises(AssayError, match="score of a class depends on the other classes"):
            cut_cross_entropy.hidden_losses(cut_cross_entropy.Config(), layer, hidden, targets)
        return
    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)

    def gradients(value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, [hidden, *layer.parameters()]))

    scores = layer(hidden)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    plain = cross_entropy(scores, targets, reduction="none") + 0.01 * scores.logsumexp(-1).square()
    config = cut_cross_entropy.Config(softcap=softcap, z_loss=0.01)
    cut = cut_cross_entropy.hidden_losses(config, layer, hidden, targets)
    torch.testing.assert_close(cut, plain)
    for ours, theirs in zip(
        gradients((weights * cut).sum()), gradients((weights * plain).sum()), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("head", ["plain with bias", "euclidean", "manhattan"])
def test_the_backward_pass_of_the_blocks_is_the_derivative(head: str) -> None:
    layer, (hidden, targets) = layer_of(head, 6, 3), points(4, 6, 3)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def value(hidden: Tensor, *values: Tensor) -> Any:
        return _blockwise._Cut.apply(_blockwise._Head(layer, names, 2.0), targets, hidden, *values)

    assert torch.autograd.gradcheck(value, (hidden, *parameters))


@pytest.mark.usefixtures("small_blocks")
def test_frozen_class_vectors_get_no_gradient_and_cost_none() -> None:
    layer, (hidden, targets) = layer_of("plain"), points()
    layer.requires_grad_(False)
    cut_cross_entropy.hidden_losses(cut_cross_entropy.Config(), layer, hidden, targets).sum().backward()
    assert layer.weight.grad is None and hidden.grad is not None


def test_ignored_targets_cost_nothing_and_a_shift_lines_them_up() -> None:
    layer, (hidden, targets) = layer_of("plain"), points()
    targets[2] = -100
    found, normaliser = cut_cross_entropy.cut_cross_entropy(
        layer, hidden[None], targets[None], shift=1, normaliser=True
    )
    plain = cross_entropy(layer(hidden[:-1]), targets[1:], reduction="none")
    torch.testing.assert_close(found[0], plain)
    assert normaliser is not None and found.shape == normaliser.shape == (1, N - 1)
    assert found[0, 1].item() == normaliser[0, 1].item() == 0


def test_no_tokens_have_no_losses() -> None:
    layer, (hidden, targets) = layer_of("plain"), points()
    found = cut_cross_entropy.hidden_losses(cut_cross_entropy.Config(), layer, hidden[:0], targets[:0])
    assert found.shape == (0,)


def test_blocks_compute_in_bfloat16_under_autocast_in_both_passes() -> None:
    layer, (hidden, targets) = layer_of("plain", dtype=torch.float32), points()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = cross_entropy(layer(hidden.float()).float(), targets)
        cut = cut_cross_entropy.hidden_losses(
            cut_cross_entropy.Config(), layer, hidden.float(), targets
        ).mean()
    torch.testing.assert_close(cut, plain)
    one, two = (torch.autograd.grad(value, layer.weight)[0] for value in (cut, plain))
    # The plain pass rounds the gradient of the scores to bfloat16, too.
    torch.testing.assert_close(one, two, rtol=0.02, atol=1e-3)


class Largest(TorchDispatchMode):
    """Notes the most entries that any tensor has that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, Tensor):
                self.entries = max(self.entries, one.untyped_storage().nbytes() // one.element_size())
        return found


@pytest.mark.parametrize("head", ["plain", "euclidean", "manhattan"])
def test_no_step_of_it_holds_the_scores_of_all_tokens_and_classes(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, classes = 512, 4000
    monkeypatch.setattr(_blockwise, "TOKENS", 64)
    monkeypatch.setattr(_blockwise, "ENTRIES", {"cpu": 2**15})
    layer, (hidden, targets) = layer_of(head, classes=classes), points(rows, classes)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with Largest() as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = cut_cross_entropy.hidden_losses(cut_cross_entropy.Config(), layer, hidden, targets)
        found.sum().backward()
    assert seen.entries <= 2**15 * (1 if head != "manhattan" else D) < rows * classes / 10
    # Targets, hidden states, log Z, the class vectors, and two vectors of a size with the tokens.
    assert sum(kept) <= 4 * rows + hidden.numel() + classes * D


def test_a_head_whose_classes_depend_on_each_other_is_refused() -> None:
    layer = layer_of("euclidean", dtype=torch.float32, smoothing=0.01)
    hidden, targets = points()
    with pytest.raises(AssayError, match="score of a class depends on the other classes"):
        cut_cross_entropy.hidden_losses(cut_cross_entropy.Config(), layer, hidden.float(), targets)


# --- the fused kernel ---------------------------------------------------------------------------------------------


def old_kernel(
    e: Tensor, c: Tensor, targets: Tensor, softcap: float | None, reduction: str, filter_eps: None
) -> Tensor:
    """Stands for the first published version."""
    assert e.dtype == c.dtype == torch.bfloat16 and reduction == "none" and filter_eps is None
    return cross_entropy(e.float() @ c.float().T, targets, reduction="none")


def new_kernel(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
    filter_eps: float | None = 0.1,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Stands for a version that takes a bias and returns log Z."""
    assert return_lse and bias is not None
    scores = e.float() @ c.float().T + bias.float()
    return cross_entropy(scores, targets, reduction="none"), scores.logsumexp(-1)


def install(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any]) -> None:
    """Pretend that there is a card and that the package is installed."""
    module = ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    monkeypatch.setattr(cut_cross_entropy, "on_card", lambda hidden: True)


@pytest.mark.parametrize(("kernel", "head"), [(old_kernel, "plain"), (new_kernel, "plain with bias")])
def test_the_fused_kernel_is_used_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any], head: str
) -> None:
    install(monkeypatch, kernel)
    layer, (hidden, targets) = layer_of(head, dtype=torch.float32), points()
    z_loss = 0.0 if kernel is old_kernel else 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, blocks = (
            cut_cross_entropy.hidden_losses(
                cut_cross_entropy.Config(z_loss=z_loss, implementation=how), layer, hidden.float(), targets
            )
            for how in ("fused", "blockwise")
        )
    torch.testing.assert_close(fused, blocks, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("head", "z_loss", "autocast", "reason"),
    [
        ("plain with bias", 0.0, True, "takes no bias"),
        ("plain", 0.1, True, "does not return log Z"),
        ("euclidean", 0.0, True, "needs a linear head"),
        ("plain", 0.0, False, 'precision is "float32"'),
    ],
)
def test_a_fused_kernel_that_cannot_be_used_says_why_and_auto_does_without(
    monkeypatch: pytest.MonkeyPatch, head: str, z_loss: float, autocast: bool, reason: str
) -> None:
    install(monkeypatch, old_kernel)
    layer, (hidden, targets) = layer_of(head, dtype=torch.float32), points()
    asked = cut_cross_entropy.Config(z_loss=z_loss, implementation="fused")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with pytest.raises(AssayError, match=reason):
            cut_cross_entropy.hidden_losses(asked, layer, hidden.float(), targets)
        cut_cross_entropy.hidden_losses(
            cut_cross_entropy.Config(z_loss=z_loss), layer, hidden.float(), targets
        )


def test_the_fused_kernel_is_refused_on_the_processor() -> None:
    hidden, targets = points()
    with pytest.raises(AssayError, match="it needs a CUDA device"):
        cut_cross_entropy.hidden_losses(
            cut_cross_entropy.Config(implementation="fused"), layer_of("plain"), hidden, targets
        )


# --- in training --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("parent"), dropout=0.0)


def curve_of(parent: Path, folder: Path, options: str) -> list[float]:
    """The term ``train`` over three steps of ``train.sft`` with these options, as they are written in a chain."""
    recipe = "steps=3, batch=6, log_every=1, optimizer=adamw(learning_rate=0.003), clip=0.0"
    call = parse_call(f"train.sft({options}, {recipe})" if options else f"train.sft({recipe})")
    found = catalogue().method("train.sft")
    config = generic.resolved(found, {"data": "first", **dict(call.options)}).config
    stage = make_stage(parent, folder, config)
    run(stage, sft)
    with open(stage.folder / "curve.csv", encoding="utf-8", newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["term"] == "train"]


PAIRS = [
    "head=cosine(exponent=16), loss=gce(q=0.7)",
    "head=euclidean(exponent=16), loss=cut_cross_entropy(z_loss=0.0001)",
    "head=manhattan(exponent=16), loss=tsallis()",
    "head=minkowski(exponent=8), loss=log_taylor()",
    "head=euclidean(exponent=16), loss=eisl(ngrams=(1, 2), noise='none')",
    "loss=spherical_z(a=0.5, b=2.0)",
    "loss=cut_cross_entropy(softcap=20.0)",
    "loss=logit_z(), weighting=linear_upper(warmup_steps=0)",
]


@pytest.mark.parametrize("options", PAIRS)
def test_any_loss_trains_with_any_head(parent: Path, tmp_path: Path, options: str) -> None:
    values = curve_of(parent, tmp_path, options)
    assert len(values) == 3
    assert values[-1] < values[0]


@pytest.mark.parametrize("head", ["", "head=euclidean(exponent=16)", "head=manhattan(exponent=16)"])
def test_cut_cross_entropy_trains_as_cross_entropy_does(parent: Path, tmp_path: Path, head: str) -> None:
    plain = curve_of(parent, tmp_path / "1", head)
    cut = curve_of(parent, tmp_path / "2", ", ".join(filter(None, [head, "loss=cut_cross_entropy()"])))
    assert cut == pytest.approx(plain, rel=1e-5)


def test_a_model_with_tied_embeddings_gets_both_gradients_from_cut_cross_entropy(parent: Path) -> None:
    from methods.checkpoint import load_model

    model = load_model(parent, device="cpu", train=True).double()
    part = collate([Example((3, 4, 5, 6), (-100, -100, 5, 6)), Example((7, 8), (-100, 8))], 0, "train")
    found = []
    for chosen in (None, Component("cut_cross_entropy")):
        model.zero_grad()
        total(losses.terms(chosen, model, part)).backward()
        found.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])


# --- refusals -----------------------------------------------------------------------------------------------------


def examples() -> list[Example]:
    return [Example((3, 4, 5), (-100, 4, 5)), Example((6, 7), (-100, 7))]


def test_anyloss_on_sequences_and_eisl_on_cases_are_refused_before_training() -> None:
    with pytest.raises(
        AssayError, match=r"loss=anyloss\(\) is a loss for classification .* task is language"
    ):
        losses.check_batches(Component("anyloss"), Batches({"train": examples()}, 2, 0), 1)
    with pytest.raises(AssayError, match=r"loss=eisl\(\) is a loss for language .* task is classification"):
        losses.check_batches(Component("eisl"), Batches({"train": table_of([0, 1], 2)}, 2, 0), 1)
    with pytest.raises(AssayError, match="sequences and not of cases"):
        losses.terms(Component("eisl"), Classifier(), cases_of([0, 1]))


def test_other_losses_take_both_kinds_of_batches() -> None:
    for rows in (examples(), table_of([0, 1], 2)):
        for name in ("gce", "cut_cross_entropy"):
            losses.check_batches(Component(name), Batches({"train": rows}, 2, 0), 3)
        losses.check_batches(None, Batches({"train": rows}, 2, 0), 3)


def test_a_loss_of_the_whole_batch_cannot_be_weighed(parent: Path) -> None:
    with pytest.raises(AssayError, match="anyloss is no sum over tokens or cases"):
        losses.row_losses(Component("anyloss"), Classifier(), cases_of([0, 1]))


WRONG: Mapping[str, str] = {
    "gce(p=0.7)": "unknown option 'p' for gce",
    "gce(q=0.0)": "gce: q=0.0: input should be greater than 0",
    "tsallis(q=2.0)": "tsallis: q=2.0: input should be less than or equal to 1",
    "comp_sum(tau=3.0)": "comp_sum: tau=3.0: input should be less than or equal to 2",
    "spherical_z(a=0.0)": "spherical_z: a=0.0: input should be greater than 0",
    "anyloss(metric='auc')": "anyloss: metric='auc': input should be 'accuracy', 'f_beta', 'g_mean'",
    "cross_entropy(convention='keras')": "cross_entropy: convention='keras': input should be 'torch' or 't5x'",
    "cut_cross_entropy(implementation='triton')": "input should be 'auto', 'blockwise' or 'fused'",
    "eisl(noise='normal')": "eisl: noise='normal': input should be 'gumbel' or 'none'",
    "hinge()": "hinge",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_option_is_a_sentence(text: str) -> None:
    call = parse_call(f"train.sft(loss={text})")
    with pytest.raises(AssayError) as error:
        generic.resolved(catalogue().method("train.sft"), dict(call.options))
    assert WRONG[text].replace("'", '"') in str(error.value).replace("'", '"')


# --- losses of rows -----------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Answers with the same scores whatever it is asked."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.scores[: len(input_ids), : input_ids.shape[1]])


def sequences() -> tuple[Table, Part]:
    torch.manual_seed(0)
    return Table(torch.randn(2, 3, 9, dtype=torch.float64)), collate(examples(), 0, "train")


def test_the_loss_of_a_row_is_the_mean_over_its_answer_tokens() -> None:
    model, part = sequences()
    found = losses.row_losses(None, model, part)
    scores = model.scores
    first = cross_entropy(scores[0, :2], torch.tensor([4, 5]))
    second = cross_entropy(scores[1, :1], torch.tensor([7]))
    torch.testing.assert_close(found, torch.stack([first, second]))


def test_each_kind_of_loss_counts_what_it_divides_by() -> None:
    model, part = sequences()
    assert counts(losses.terms(Component("mae"), model, part)) == {"train": "train.tokens"}
    assert counts(losses.terms(Component("eisl"), model, part)) == {"train": "train.sequences"}
    cases = cases_of([0, 1])
    assert counts(losses.terms(None, Classifier(), cases)) == {"train": "train.examples"}
    found = counts(losses.terms(Component("anyloss"), Classifier(), cases))
    assert found == dict.fromkeys(("true_positive", "predicted", "positive"), "train.examples")


def counts(terms: Mapping[str, Term]) -> dict[str, str]:
    """What each term is divided by."""
    pairs: Iterator[tuple[str, float]] = ((name, term.count) for name, term in terms.items())
    return {name: count.source for name, count in pairs if isinstance(count, Count)}
