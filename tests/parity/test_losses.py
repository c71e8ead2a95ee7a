"""Losses and output heads against the authors' own code, case by case from the files under ``losses/``.

Everything is compared in float64 within 1e-9 (gradients 1e-7), in float32 where a file has a float32 run.
The reductions around a head (cross-entropy, label smoothing, what counts in the mean) are those the files
state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods.find import catalogue
from methods.stage import AssayError
from tests.parity import cases

FOLDER = cases.folder("losses")

# How a file calls a layer, and the head with options that is the same. Anything else is not built yet.
LAYERS: dict[str, Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]] = {
    "EuclideanDistLayer": lambda variant: ("euclidean", {}),
    "CosineDistLayer": lambda variant: ("cosine", {"stable": variant.get("stable", False)}),
    "CosineDistLayerStable": lambda variant: ("cosine", {"stable": True}),
}
LANGUAGE_HEADS = ("euclidean", "cosine")
OTHERS = (
    "anyloss",
    "cut_cross_entropy",
    "eisl",
    "related_losses",
    "saf_poft",
    "sample_reweight",
    "t5x_zloss",
    "vq_logits",
    "metrics",
)


@cache
def facts(name: str) -> dict[str, Any]:
    """The JSON file of that name, or nothing where this folder has none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def arrays(name: str) -> Mapping[str, numpy.ndarray]:
    return cases.arrays(FOLDER / f"{name}.npz")


def head(name: str, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The head's scores as a function of hidden states and class vectors, or a skip."""
    try:
        module = catalogue().component("head", name).load()
    except AssayError:
        pytest.skip(f"not built yet: head {name}")
    config = module.Config(**options)
    return lambda hidden, weight: module.scores(config, hidden, weight)


def layer(variant: Mapping[str, Any], **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The head that is the layer of a vision or toy variant, or a skip."""
    if "crashes" in variant:
        pytest.skip("the official class crashes: there is nothing to compare with")
    if variant["cls"] not in LAYERS:
        pytest.skip(f"not built yet: head of {variant['cls']}")
    name, own = LAYERS[variant["cls"]](variant)
    return head(name, epsilon=variant["eps"], **own, **options)


def close(actual: Tensor, expected: Any, tolerance: float, what: str) -> None:
    """Assert agreement relative to the largest expected entry: gradients cross zero."""
    size = float(numpy.abs(expected).max())
    cases.agree(actual, expected, relative=tolerance, absolute=tolerance * size, what=what)


def relative_power(scores: Tensor) -> Tensor:
    """``D^-n`` divided by its largest value in the row: what the official layers return."""
    return (scores - scores.amax(dim=-1, keepdim=True)).exp()


def compare(
    scores: Callable[[Tensor, Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    file: str,
    prefix: str,
    dtype: torch.dtype = torch.float64,
    tolerances: tuple[float, float] = (1e-9, 1e-7),
) -> None:
    """Compare loss and both gradients, stored as ``<prefix>loss``, ``<prefix>dx``, ``<prefix>dw``."""
    data = arrays(file)
    hidden, weight = cases.leaf(data["x"], dtype), cases.leaf(data["w"], dtype)
    value = loss(scores(hidden.flatten(0, -2), weight))
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    close(value, data[f"{prefix}loss"], tolerances[0], "loss")
    close(hidden.grad, data[f"{prefix}dx"], tolerances[1], "dx")
    close(weight.grad, data[f"{prefix}dw"], tolerances[1], "dw")


def score(
    scores: Callable[[Tensor, Tensor], Tensor], file: str, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The head's scores [N,V] on the file's inputs."""
    data = arrays(file)
    hidden, weight = torch.tensor(data["x"], dtype=dtype), torch.tensor(data["w"], dtype=dtype)
    return scores(hidden.flatten(0, -2), weight)


def mean_loss(file: str) -> Callable[[Tensor], Tensor]:
    """Plain cross-entropy with the file's labels."""
    labels = torch.tensor(arrays(file)["y"])
    return lambda scores: cross_entropy(scores, labels)


# --- the original harmonic loss ---------------------------------------------------------------------------


def original_cases() -> list[Any]:
    """Every n of the original harmonic loss with every precision it was run in."""
    wanted = []
    for case in facts("harmonic_original").get("cases", {}):
        for precision in ("f64", "f32"):
            if f"{case}.{precision}.loss" in arrays("harmonic_original"):
                wanted.append(pytest.param(case, precision, id=f"harmonic_original:{case}.{precision}"))
    return wanted


@pytest.mark.parametrize(("case", "precision"), original_cases())
def test_original_harmonic_loss(case: str, precision: str) -> None:
    file = "harmonic_original"
    settings = facts(file)
    scores = head("euclidean", exponent=settings["cases"][case]["n"], epsilon=settings["eps"])
    wide = precision == "f64"
    dtype, tolerances = (torch.float64, (1e-9, 1e-8)) if wide else (torch.float32, (1e-4, 1e-4))
    data, result = arrays(file), score(scores, file, dtype)
    close(relative_power(result), data[f"{case}.{precision}.u"], tolerances[0], "u")
    close(result.softmax(dim=-1), data[f"{case}.{precision}.p"], tolerances[0], "p")
    close(result.log_softmax(dim=-1), data[f"{case}.{precision}.logp"], tolerances[0], "logp")
    compare(scores, mean_loss(file), file, f"{case}.{precision}.", dtype, tolerances)


@pytest.mark.parametrize("name", ["embed_reg", "spherical"])
def test_neighbours_of_the_original_harmonic_loss(name: str) -> None:
    pytest.skip(f"not built yet: {name}")


@pytest.mark.skipif(not facts("gpt2_harmonic_original"), reason="this folder has no GPT-2 case")
def test_gpt2_harmonic_original() -> None:
    file = "gpt2_harmonic_original"
    settings, data = facts(file), arrays(file)
    # The script divides by the vocabulary it was written for and not by the one it is run with.
    mass = settings["alpha"] * len(data["w"]) / settings["smoothing_denominator"]
    plain, smoothed = head("euclidean", epsilon=0.0), head("euclidean", epsilon=0.0, smoothing=mass)
    cases.agree(
        relative_power(score(plain, file)).log(), numpy.log(data["u"]), relative=1e-8, absolute=1e-8, what="u"
    )
    close(score(smoothed, file), data["logits"], 1e-8, "logits")
    labels = torch.tensor(data["targets"]).flatten()
    compare(smoothed, lambda scores: cross_entropy(scores, labels), file, "", tolerances=(1e-8, 1e-8))


# --- distance layers of the vision models -----------------------------------------------------------------


def vision_cases() -> list[Any]:
    """Every variant, scale flag and logit convention that is stored."""
    wanted = []
    for variant in facts("vision_distlayers").get("variants", {}):
        for scale in ("scale0", "scale1"):
            for wiring in ("log_s", "log_p", "neg_s"):
                key = f"{variant}.{scale}.{wiring}"
                if f"{key}.loss" in arrays("vision_distlayers"):
                    wanted.append(pytest.param(variant, scale, wiring, id=f"vision_distlayers:{key}"))
    return wanted


@pytest.mark.parametrize(("variant", "scale", "wiring"), vision_cases())
def test_vision_layer(variant: str, scale: str, wiring: str) -> None:
    file = "vision_distlayers"
    settings = facts(file)
    # The flag `scale` divides by the row's smallest distance, which these heads leave out (no effect on p).
    options = settings["variants"][variant] | {"n": settings["variants"][variant].get("n", settings["n"])}
    classes = len(arrays(file)["w"])
    wirings: dict[str, dict[str, Any]] = {
        "log_s": {"floor": 1e-8},
        "log_p": {"smoothing": 1e-8 * classes},
        "neg_s": {"legacy_sign": True},
    }
    plain = layer(options, exponent=options["n"])
    scores = layer(options, exponent=options["n"], **wirings[wiring])
    close(relative_power(score(plain, file)), arrays(file)[f"{variant}.{scale}.s"], 1e-9, "s")
    logits = arrays(file).get(f"{variant}.{scale}.{wiring}.logits")
    if logits is not None:
        close(score(scores, file), logits, 1e-9, "logits")
    compare(scores, mean_loss(file), file, f"{variant}.{scale}.{wiring}.")


# --- distance layers of the toy sets ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(facts("toy_distlayers").get("variants", {})))
def test_toy_layer(variant: str) -> None:
    file = "toy_distlayers"
    settings = facts(file)
    options = settings["variants"][variant]
    scores = layer(options, exponent=options.get("n", settings["n"]))
    close(relative_power(score(scores, file)), arrays(file)[f"{variant}.s"], 1e-9, "s")
    compare(scores, mean_loss(file), file, f"{variant}.")


# --- heads of the language models -------------------------------------------------------------------------


def language_loss(scores: Tensor) -> Tensor:
    """The official reduction: label smoothing, a cap of 20 a token, and ignored tokens in the mean."""
    settings, targets = facts("llm_distlayers"), torch.tensor(arrays("llm_distlayers")["targets"]).flatten()
    losses = cross_entropy(
        scores, targets, ignore_index=-1, label_smoothing=settings["label_smoothing"], reduction="none"
    )
    return losses.clamp(0, 20).mean()


@pytest.mark.parametrize("case", facts("llm_distlayers").get("cases", []))
def test_language_model_head(case: str) -> None:
    file = "llm_distlayers"
    if case not in LANGUAGE_HEADS:
        pytest.skip(f"not built yet: head {case} of the language models")
    settings, data = facts(file), arrays(file)
    plain = head(case, exponent=settings["n_embd"], epsilon=0.0)
    scores = head(case, exponent=settings["n_embd"], epsilon=0.0, smoothing=settings["alpha"], floor=1e-8)
    logarithms = relative_power(score(plain, file)).log()
    cases.agree(logarithms, numpy.log(data[f"{case}.s"]), relative=1e-8, absolute=1e-8, what="log s")
    close(score(scores, file), data[f"{case}.logits"], 1e-8, "logits")
    compare(scores, language_loss, file, f"{case}.", tolerances=(1e-8, 1e-7))


# --- the rest ---------------------------------------------------------------------------------------------


def other_cases() -> list[Any]:
    """One case per loss of the files whose methods do not exist yet."""
    found = []
    for file in OTHERS:
        for case in facts(file).get("cases", [file]) if facts(file) else []:
            found.append(pytest.param(case, id=f"{file}:{case}"))
    return found


@pytest.mark.parametrize("case", other_cases())
def test_related_loss(case: str) -> None:
    pytest.skip(f"not built yet: {case}")
