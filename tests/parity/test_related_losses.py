"""Losses that consume scores against independent or official numbers, from the files under ``losses/``.

What is called is what the training loop calls; options and shapes are read from the names of the cases and the JSON
beside the arrays. The tolerances are those of the folder's README. Heads are in ``test_losses.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from methods.find import catalogue
from methods.stage import AssayError
from methods.train.classify import embedding_penalty
from tests.parity import cases

FOLDER = cases.folder("losses")
NUMBER = r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"


@cache
def facts(name: str) -> dict[str, Any]:
    """The JSON file of that name, or nothing where this folder has none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def arrays(name: str) -> Mapping[str, numpy.ndarray]:
    """The arrays of that name, or nothing."""
    path = FOLDER / f"{name}.npz"
    return cases.arrays(path) if path.is_file() else {}


def prefixes(file: str, ending: str) -> list[Any]:
    """A case for each array of a file whose name ends so, named by what stands before."""
    found = sorted(name.removesuffix(ending) for name in arrays(file) if name.endswith(ending))
    return [pytest.param(case, id=f"{file}:{case}") for case in found]


def loss(name: str, **options: Any) -> tuple[Any, Any]:
    """A loss's module and its options, or a skip."""
    try:
        module = catalogue().component("loss", name).load()
    except AssayError:
        pytest.skip(f"not built yet: loss {name}")
    return module, module.Config(**options)


def token_losses(name: str, scores: Tensor, targets: Tensor, **options: Any) -> Tensor:
    module, config = loss(name, **options)
    found: Tensor = module.token_losses(config, scores, targets)
    return found


def close(actual: Tensor, expected: Any, tolerance: float, what: str) -> None:
    """Assert agreement relative to the largest expected entry: gradients cross zero."""
    size = float(numpy.abs(expected).max())
    cases.agree(actual, expected, relative=tolerance, absolute=tolerance * size, what=what)


def gradient(leaf: Tensor) -> Tensor:
    """The gradient that was collected."""
    assert leaf.grad is not None
    return leaf.grad


# --- losses of single tokens ----------------------------------------------------------------------------------


def margin(name: str, text: str) -> dict[str, float]:
    """a and b of a Z-loss: from its description, else from its name."""
    found = re.search(rf"a={NUMBER}, b={NUMBER}", text) or re.search(rf"_a{NUMBER}_b{NUMBER}$", name)
    assert found, f"{name} does not say what a and b are"
    return {"a": float(found[1]), "b": float(found[2])}


def small_number(name: str, text: str) -> dict[str, float]:
    """e of the log-spherical softmax, from its description."""
    found = re.search(rf"e={NUMBER}", text)
    return {"epsilon": float(found[1])} if found else {}


Options = Callable[[str, str], dict[str, float]]


def stated(option: str) -> Options:
    """The number that a case's name ends in, as this option."""

    def read(name: str, text: str) -> dict[str, float]:
        found = re.search(rf"{NUMBER}$", name)
        assert found, f"{name} does not say what {option} is"
        return {option: float(found[1])}

    return read


def fixed(**options: float) -> Options:
    return lambda name, text: options


# How a case begins, the loss that it is, and where its options stand; the first that fits.
RELATED: tuple[tuple[str, str, Options], ...] = (
    ("zloss_spherical", "spherical_z", margin),
    ("palm_zloss", "logit_z", stated("coefficient")),
    ("label_smooth", "cross_entropy", stated("label_smoothing")),
    ("comp_sum", "comp_sum", stated("tau")),
    ("gce", "gce", stated("q")),
    ("tsallis", "tsallis", stated("q")),
    ("log_spherical", "log_spherical", small_number),
    ("log_taylor", "log_taylor", fixed()),
    ("logistic", "comp_sum", fixed(tau=1.0)),
    ("sum_exp", "comp_sum", fixed(tau=0.0)),
    ("mae", "mae", fixed()),
)


def related_cases() -> list[Any]:
    """Every loss of the file."""
    return [
        pytest.param(case, id=f"related_losses:{case}") for case in facts("related_losses").get("cases", {})
    ]


@pytest.mark.parametrize("case", related_cases())
def test_related_loss(case: str) -> None:
    data, text = arrays("related_losses"), facts("related_losses")["cases"][case]
    known = next(((name, options) for start, name, options in RELATED if case.startswith(start)), None)
    if known is None:
        pytest.skip(f"not built yet: {case}")
    scores = cases.leaf(data["logits"], torch.float64)
    losses = token_losses(known[0], scores, torch.tensor(data["y"]), **known[1](case, text))
    losses.mean().backward()
    close(losses, data[f"{case}.per_example"], 1e-10, "each loss")
    close(losses.mean(), data[f"{case}.loss"], 1e-10, "loss")
    close(gradient(scores), data[f"{case}.dlogits"], 1e-10, "dlogits")


@pytest.mark.parametrize("case", prefixes("t5x_zloss", ".loss_sum"))
def test_t5x_loss(case: str) -> None:
    """The official function, which sums over weighted tokens; its two parts are the letters of the case's name."""
    data, settings, parts = arrays("t5x_zloss"), facts("t5x_zloss"), case.split("_")
    scores = cases.leaf(data["logits"], torch.float64)
    smoothing = settings["label_smoothing"] if "ls" in parts else 0.0
    module, config = loss(
        "logit_z",
        coefficient=settings["z_loss"] if "z" in parts else 0.0,
        label_smoothing=smoothing,
        convention="t5x",
    )
    rows, targets = scores.flatten(0, -2), torch.tensor(data["targets"]).flatten()
    weights = torch.tensor(data["weights"]).flatten()
    total = (weights * module.token_losses(config, rows, targets)).sum()
    total.backward()
    close(total, data[f"{case}.loss_sum"], 1e-9, "loss")
    close(gradient(scores), data[f"{case}.dlogits"], 1e-9, "dlogits")
    close((weights * module.penalty(config, rows)).sum(), data[f"{case}.z_sum"], 1e-9, "z term")
    if "z" not in parts:
        alone = token_losses("cross_entropy", rows, targets, label_smoothing=smoothing, convention="t5x")
        close((weights * alone).sum(), data[f"{case}.loss_sum"], 1e-9, "cross entropy")


@pytest.mark.parametrize(
    "case", [case for case in prefixes("harmonic_original", ".loss") if "spherical" in str(case.values[0])]
)
def test_spherical_loss_of_grow_crystals(case: str) -> None:
    data = arrays("harmonic_original")
    found = re.search(rf"eps{NUMBER}$", case)
    assert found, f"{case} does not say what epsilon is"
    scores = cases.leaf(data["logits_in"], torch.float64)
    losses = token_losses(
        "log_spherical", scores, torch.tensor(data["y"]), epsilon=float(found[1]), normalise=True
    )
    losses.mean().backward()
    close(losses.mean(), data[f"{case}.loss"], 1e-9, "loss")
    close(gradient(scores), data[f"{case}.dlogits"], 1e-8, "dlogits")


@pytest.mark.skipif("embed_reg" not in arrays("harmonic_original"), reason="this folder has no embed_reg")
def test_embedding_penalty_of_grow_crystals() -> None:
    data = arrays("harmonic_original")
    close(embedding_penalty(torch.tensor(data["w"])), data["embed_reg"], 1e-9, "penalty")


# --- a loss of the whole batch --------------------------------------------------------------------------------

METRICS = {"acc": "accuracy", "fbeta": "f_beta", "gmean": "g_mean", "balacc": "balanced_accuracy"}


@pytest.mark.parametrize("case", prefixes("anyloss", ".loss"))
def test_anyloss(case: str) -> None:
    """The official losses with the exact gradients of them: the official one of the G-mean is 4 times that."""
    data = arrays("anyloss")
    if case not in METRICS:
        pytest.skip(f"not built yet: {case}")
    # The official code has nothing under the root.
    module, config = loss(
        "anyloss", metric=METRICS[case], beta=float(data["beta"]), slope=float(data["L"]), epsilon=0.0
    )
    theta = cases.leaf(data["theta"], torch.float64)
    score = torch.tensor(data["X"]) @ theta
    statistics = module.statistics(
        config, torch.stack([torch.zeros_like(score), score], dim=1), torch.tensor(data["y"]).long()
    )
    value = module.outer(config, {name: each.mean() for name, each in statistics.items()})
    value.backward()
    close(statistics["predicted"], data["yh"], 1e-10, "amplified probabilities")
    close(value, data[f"{case}.loss"], 1e-10, "loss")
    close(gradient(theta), data[f"{case}.grad_autodiff"], 1e-10, "gradient")


# --- a loss of whole sequences --------------------------------------------------------------------------------


def ngrams_of(case: str) -> tuple[int, ...]:
    """The n-grams of a case, ``n2_3_6.g0``: the list of the file that is written so."""
    name = case.partition(".")[0].removeprefix("n")
    listed = ["_".join(map(str, several)) for several in facts("eisl")["ngrams"]]
    assert name in listed, f"{case} is none of the file's n-grams"
    return tuple(facts("eisl")["ngrams"][listed.index(name)])


@pytest.mark.parametrize("case", prefixes("eisl", ".loss"))
def test_eisl(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stored noise in the place of what would be drawn; each array is told by its shape."""
    data = arrays("eisl")
    module, config = loss("eisl", ngrams=ngrams_of(case), noise="gumbel")
    stored = [torch.tensor(data[name]) for name in data if name.startswith(f"{case}.noise")]
    monkeypatch.setattr(module, "gumbel", lambda like: next(one for one in stored if one.shape == like.shape))
    scores, targets = cases.leaf(data["logits"], torch.float64), torch.tensor(data["targets"])
    value = module.sequence_losses(config, scores, targets, torch.ones_like(targets, dtype=torch.bool)).mean()
    value.backward()
    close(value, data[f"{case}.loss"].squeeze(), 1e-9, "loss")
    close(gradient(scores), data[f"{case}.dlogits"], 1e-9, "dlogits")
    if all(not bool(one.any()) for one in stored):
        silent = loss("eisl", ngrams=ngrams_of(case), noise="none")[1]
        quiet = module.sequence_losses(silent, scores, targets, torch.ones_like(targets, dtype=torch.bool))
        close(quiet.mean(), data[f"{case}.loss"].squeeze(), 1e-9, "loss without noise")


# --- a loss that applies the head itself ----------------------------------------------------------------------


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An output layer with this weight [V,d]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    layer.load_state_dict({"weight": weight} | ({"bias": bias} if bias is not None else {}))
    return layer


def reduced(case: str, losses: Tensor, kept: Tensor) -> Tensor:
    """The reduction that a case's name says: none, sum, else the mean over what is not ignored."""
    if "none" in case:
        return losses
    return losses.sum() if "sum" in case else losses.sum() / kept.sum()


@pytest.mark.parametrize("case", prefixes("cut_cross_entropy", ".loss"))
def test_cut_cross_entropy(case: str) -> None:
    """The reference computes in float32: 1e-5."""
    data, settings = arrays("cut_cross_entropy"), facts("cut_cross_entropy")
    module, _ = loss("cut_cross_entropy")
    shift = re.search(r"shift(\d+)", case)
    hidden, targets = cases.leaf(data["e"], torch.float64), torch.tensor(data["targets"])
    bias = torch.tensor(data["bias"]) if "bias" in data and "bias" in case else None
    layer = linear(torch.tensor(data["c"]), bias)
    steps = int(shift[1]) if shift else 0
    losses, normaliser = module.cut_cross_entropy(
        layer,
        hidden,
        targets,
        softcap=settings["softcap"] if "softcap" in case else None,
        ignored=settings["ignore_index"],
        shift=steps,
        normaliser=True,
    )
    kept = targets[..., steps:] != settings["ignore_index"]
    value = reduced(case, losses, kept)
    value.sum().backward()
    close(value, data[f"{case}.loss"], 1e-5, "loss")
    close(normaliser[kept], data[f"{case}.lse"][kept.numpy()], 1e-5, "log Z")
    close(gradient(hidden), data[f"{case}.de"], 1e-5, "gradient of the hidden states")
    close(gradient(layer.weight), data[f"{case}.dc"], 1e-5, "gradient of the class vectors")


# --- the rest -------------------------------------------------------------------------------------------------

# Where the cases of a file are looked for: a file of another layout would otherwise be passed over in silence.
ENDINGS = {
    "related_losses": ".per_example",
    "t5x_zloss": ".loss_sum",
    "anyloss": ".loss",
    "eisl": ".loss",
    "cut_cross_entropy": ".loss",
}


@pytest.mark.parametrize("file", [file for file in ENDINGS if (FOLDER / f"{file}.npz").is_file()])
def test_every_file_of_losses_has_cases(file: str) -> None:
    assert prefixes(file, ENDINGS[file])
