"""Losses and output heads against the authors' own code, case by case from the files under ``losses/``.

Everything is compared in float64 within 1e-9 (gradients 1e-7), in float32 where a file has a float32 run.
The reductions around a head (cross-entropy, label smoothing, what counts in the mean) are those the files
state.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods.find import catalogue
from methods.head import absolute
from methods.stage import AssayError
from tests.parity import cases

FOLDER = cases.folder("losses")
# Every official head clamps its powers here before the logarithm.
FLOOR = 1e-8
# What the files call the numbers of a variant, and what our heads do.
RENAMED = {
    "min_denom": "minimum_denominator",
    "min_sum": "minimum_sum",
    "weight_power": "weight_power",
    "normalize_weights": "normalize_weights",
    "alpha": "alpha",
    "smooth": "smooth",
    "stable": "stable",
    "p": "p",
    "temperature": "temperature",
    "threshold": "threshold",
    "reg_lambda": "regularization",
}
# The options that a variant reads; the files list those of the others beside them.
READ: dict[tuple[str, str], tuple[str, ...]] = {
    ("cosine", ""): ("stable",),
    ("minkowski", ""): ("p",),
    ("chebyshev", ""): ("smooth",),
    ("chebyshev", "smooth"): ("smooth", "alpha"),
    ("canberra", "robust"): ("min_denom",),
    ("canberra", "weighted"): ("weight_power", "normalize_weights"),
    ("bray_curtis", "normalized"): ("min_sum",),
    ("hamming", "soft"): ("temperature",),
    ("hamming", "gumbel"): ("temperature",),
    ("hamming", "hard"): ("temperature", "threshold"),
    ("mahalanobis", "standard"): ("reg_lambda",),
}
# Heads with a keyword ``variant`` and the one that a class without a suffix is.
USUAL = {"canberra": "standard", "bray_curtis": "standard", "mahalanobis": "standard", "hamming": "hard"}
# The arrays that are further parameters of a layer.
PARAMETERS = ("precision_matrix", "cov_inv", "log_diag_cov_inv", "diag_cov_inv", "chol_factor")


@dataclass(frozen=True)
class Head:
    """A head with its options; callable as ``scores(hidden, weight)`` where it has no further parameters."""

    module: Any
    config: Any

    @property
    def name(self) -> str:
        return str(self.module.__name__.rpartition(".")[2])

    def __call__(self, hidden: Tensor, weight: Tensor, **parameters: Tensor) -> Tensor:
        return self.module.scores(self.config, hidden, weight, **parameters)

    def parameters(self, weight: Tensor) -> dict[str, Tensor]:
        """Its further parameters as they start."""
        if not hasattr(self.module, "parameters"):
            return {}
        return dict(self.module.parameters(self.config, weight.detach()))


@cache
def facts(name: str) -> dict[str, Any]:
    """The JSON file of that name, or nothing where this folder has none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def arrays(name: str) -> Mapping[str, numpy.ndarray]:
    return cases.arrays(FOLDER / f"{name}.npz")


def head(name: str, **options: Any) -> Head:
    """The head of that name with these options, or a skip."""
    try:
        module = catalogue().component("head", name).load()
    except AssayError:
        pytest.skip(f"not built yet: head {name}")
    return Head(module, module.Config(**options))


def layer(entry: Mapping[str, Any], impl: str, **options: Any) -> Head:
    """The head that is the layer of a vision or toy variant, or a skip."""
    if "crashes" in entry:
        pytest.skip("the official class crashes: there is nothing to compare with")
    name, variant = kind(entry)
    read = READ.get((name, variant or ("smooth" if entry.get("smooth") else "")), ())
    own = {RENAMED[key]: entry[key] for key in read if entry.get(key) is not None}
    if name == "cosine" and impl == "toy":
        own = {"stable": variant == "stable"}
    elif name == "chebyshev" and impl == "toy":
        own = {"smooth": variant == "smooth"}
    elif name in USUAL:
        own["variant"] = variant
    if (name, variant, impl) == ("hamming", "hard", "vision"):
        own["straight_through"] = "official"
    if name not in ("euclidean", "cosine", "manhattan"):
        own["impl"] = known_impl(name, impl)
    # The official n is on whatever is raised to it: the square in these two, the distance in all others.
    on = "squared" if name in ("euclidean", "cosine") else "plain"
    return head(name, epsilon=entry["eps"], exponent_on=on, **own, **options)


def kind(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Head and variant of ``CanberraDistLayerRobust``, or of its ``variant`` entry."""
    stem, _, suffix = entry["cls"].partition("DistLayer")
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", stem).lower()
    variant = str(entry.get("variant") or suffix.lower() or USUAL.get(name, ""))
    return name, "normalized" if entry.get("normalize_inputs") else variant


def known_impl(name: str, impl: str) -> str:
    """The definition of a code base, called by the image models' where it is theirs."""
    return "vision" if impl == "toy" and name in ("minkowski", "bray_curtis") else impl


def takes(name: str, option: str) -> bool:
    """Whether the head has an option of that name."""
    return option in {field.name for field in dataclasses.fields(head(name).module.Config)}


def close(actual: Tensor, expected: Any, tolerance: float, what: str) -> None:
    """Assert agreement relative to the largest expected entry: gradients cross zero."""
    size = float(numpy.abs(expected).max())
    cases.agree(actual, expected, relative=tolerance, absolute=tolerance * size, what=what)


def powers(scores: Head, values: Tensor) -> Tensor:
    """What the official layer returns: D^-n, for some layers divided by its largest value in the row."""
    if scores.name == "cosine_similarity":
        return values.softmax(-1) if scores.config.variant == "softmax" else values.exp()
    as_given = absolute(scores.config) or getattr(scores.config, "form", "power") != "power"
    return (values if as_given else values - values.amax(dim=-1, keepdim=True)).exp()


def inputs(
    scores: Head, file: str, dtype: torch.dtype, given: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Hidden states [N,d], class vectors and further parameters of a case, all collecting gradients.

    Args:
        given: prefix of the arrays that a case may have instead of parameters as they start.
    """
    data = arrays(file)
    hidden, weight = cases.leaf(data["x"], dtype), cases.leaf(data["w"], dtype)
    further = scores.parameters(weight)
    free = [name for name, value in further.items() if value.is_floating_point()]
    stored = [key for key in data if key.removeprefix(given) in PARAMETERS and key.startswith(given)]
    for name in free:
        start = torch.tensor(data[stored[0]], dtype=dtype) if stored else further[name].to(dtype)
        further[name] = start.requires_grad_()
    return hidden, weight, further


def compare(
    scores: Head,
    loss: Callable[[Tensor], Tensor],
    file: str,
    prefix: str,
    dtype: torch.dtype = torch.float64,
    tolerances: tuple[float, float] = (1e-9, 1e-7),
    *,
    gradients: bool = True,
    given: str = "",
) -> None:
    """Compare the loss ``<prefix>loss`` and its gradients ``<prefix>dx``, ``<prefix>dw`` and ``<prefix>d_...``."""
    data = arrays(file)
    hidden, weight, further = inputs(scores, file, dtype, given or prefix)
    value = loss(scores(hidden.flatten(0, -2), weight, **further))
    value.backward()
    close(value, data[f"{prefix}loss"], tolerances[0], "loss")
    if not gradients:
        return
    found = {"dx": hidden.grad, "dw": weight.grad} | extra(further, data, prefix)
    for name, gradient in found.items():
        assert gradient is not None, name
        close(gradient, data[f"{prefix}{name}"], tolerances[1], name)


def extra(
    further: Mapping[str, Tensor], data: Mapping[str, numpy.ndarray], prefix: str
) -> dict[str, Tensor | None]:
    """Gradients of the further parameters by the name the file gives them."""
    stored = [key.removeprefix(prefix) for key in data if key.startswith(f"{prefix}d_")]
    free = [value.grad for value in further.values() if value.is_floating_point()]
    return dict(zip(stored, free, strict=True)) if stored else {}


def score(scores: Head, file: str, dtype: torch.dtype = torch.float64, given: str = "") -> Tensor:
    """The head's scores [N,V] on the file's inputs."""
    hidden, weight, further = inputs(scores, file, dtype, given)
    return scores(hidden.flatten(0, -2), weight, **further).detach()


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
    close(powers(scores, result), data[f"{case}.{precision}.u"], tolerances[0], "u")
    close(result.softmax(dim=-1), data[f"{case}.{precision}.p"], tolerances[0], "p")
    close(result.log_softmax(dim=-1), data[f"{case}.{precision}.logp"], tolerances[0], "logp")
    compare(scores, mean_loss(file), file, f"{case}.{precision}.", dtype, tolerances)


@pytest.mark.skipif(not facts("gpt2_harmonic_original"), reason="this folder has no GPT-2 case")
def test_gpt2_harmonic_original() -> None:
    file = "gpt2_harmonic_original"
    settings, data = facts(file), arrays(file)
    # The script divides by the vocabulary it was written for and not by the one it is run with.
    mass = settings["alpha"] * len(data["w"]) / settings["smoothing_denominator"]
    plain, smoothed = head("euclidean", epsilon=0.0), head("euclidean", epsilon=0.0, smoothing=mass)
    cases.agree(
        powers(plain, score(plain, file)).log(), numpy.log(data["u"]), relative=1e-8, absolute=1e-8, what="u"
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
    file, settings = "vision_distlayers", facts("vision_distlayers")
    entry, data = settings["variants"][variant], arrays("vision_distlayers")
    name = kind(entry)[0]
    # Three layers always divide by the row's smallest distance, whatever the flag `scale` says.
    flag = {"scale": scale == "scale1"} if takes(name, "scale") else {}
    common = {"exponent": entry.get("n", settings["n"]), **flag}
    wirings: dict[str, dict[str, Any]] = {
        "log_s": {"floor": FLOOR},
        "log_p": {"smoothing": 1e-8 * len(data["w"])},
        "neg_s": {"legacy_sign": True},
    }
    plain = layer(entry, "vision", **common)
    scores = layer(entry, "vision", **common, **wirings[wiring])
    close(powers(plain, score(plain, file, given=f"{variant}.")), data[f"{variant}.{scale}.s"], 1e-9, "s")
    key = f"{variant}.{scale}.{wiring}."
    if f"{key}logits" in data:
        close(score(scores, file, given=f"{variant}."), data[f"{key}logits"], 1e-9, "logits")
    # Numbers of bits tie for the smallest, and which of them gets its gradient is the official code's accident.
    tied = kind(entry) == ("hamming", "hard") and scale == "scale1"
    compare(scores, mean_loss(file), file, key, gradients=not tied, given=f"{variant}.")


# --- distance layers of the toy sets ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(facts("toy_distlayers").get("variants", {})))
def test_toy_layer(variant: str) -> None:
    file, settings = "toy_distlayers", facts("toy_distlayers")
    entry = settings["variants"][variant]
    exponent = {"exponent": entry.get("n", settings["n"])}
    scores = layer(entry, "toy", **exponent)
    values = score(scores, file, given=f"{variant}.")
    if takes(kind(entry)[0], "scale"):
        scores = layer(entry, "toy", **exponent, scale=False)
    close(powers(scores, values), arrays(file)[f"{variant}.s"], 1e-9, "s")
    compare(scores, mean_loss(file), file, f"{variant}.")


# --- heads of the language models -------------------------------------------------------------------------


def language_loss(scores: Tensor) -> Tensor:
    """The official reduction: label smoothing, a cap of 20 a token, and ignored tokens in the mean."""
    settings, targets = facts("llm_distlayers"), torch.tensor(arrays("llm_distlayers")["targets"]).flatten()
    losses = cross_entropy(
        scores, targets, ignore_index=-1, label_smoothing=settings["label_smoothing"], reduction="none"
    )
    return losses.clamp(0, 20).mean()


def language_head(case: str, width: int) -> tuple[str, dict[str, Any]] | None:
    """Head and options of a case, but for smoothing and floor; None where it is not built yet."""
    plain = {"exponent": width, "exponent_on": "plain"}
    if case in ("euclidean", "cosine"):
        return case, {"exponent": width, "epsilon": 0.0}
    if case in ("manhattan_long", "minkowski_l1"):
        return "manhattan", {**plain, "epsilon": 0.0}
    if case == "manhattan_intermediate":
        return "manhattan", {**plain, "exponent": 1, "epsilon": 0.0, "form": "reciprocal"}
    if case in SIMILARITIES:
        return "cosine_similarity", {"variant": SIMILARITIES[case]}
    if case.startswith(TEMPERATURE):
        temperature = float(case.removeprefix(TEMPERATURE).replace("_", "."))
        return "cosine_similarity", {"variant": "softmax", "temperature": temperature}
    name = next((name for name in LANGUAGE_LAYERS if case.startswith(name)), None)
    if name is None:
        return None
    own = LANGUAGE_LAYERS[name](case.removeprefix(name).strip("_"))
    return name, {**plain, "impl": "language", **own}


# The options of the heads that have an implementation "language", by what is behind their name in a case.
LANGUAGE_LAYERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "minkowski": lambda rest: {"p": float(rest[1:].replace("_", ".")), "epsilon": 1e-8},
    "chebyshev": lambda rest: {"smooth": rest == "smooth"},
    "canberra": lambda rest: {"variant": rest},
    "bray_curtis": lambda rest: {"variant": rest},
    "hamming": lambda rest: {"variant": rest},
    "mahalanobis": lambda rest: {"variant": rest, "exponent": 1},
}
# The heads that are no distances; behind the second prefix stands a temperature.
SIMILARITIES = {"cosine_simple": "half", "manhattan_fast": "sigmoid"}
TEMPERATURE = "cosine_temp_scale_"


@pytest.mark.parametrize("case", facts("llm_distlayers").get("cases", []))
def test_language_model_head(case: str) -> None:
    file, settings, data = "llm_distlayers", facts("llm_distlayers"), arrays("llm_distlayers")
    if case == "baseline":
        linear_baseline()
        return
    found = language_head(case, settings["n_embd"])
    if found is None:
        pytest.skip(f"not built yet: head {case} of the language models")
    name, options = found
    plain = head(name, **options)
    scores = head(name, **options, smoothing=settings["alpha"], floor=FLOOR)
    logarithms = powers(plain, score(plain, file, given=f"{case}.")).log()
    cases.agree(logarithms, numpy.log(data[f"{case}.s"]), relative=1e-8, absolute=1e-8, what="log s")
    close(score(scores, file, given=f"{case}."), data[f"{case}.logits"], 1e-8, "logits")
    compare(scores, language_loss, file, f"{case}.", tolerances=(1e-8, 1e-7))


def linear_baseline() -> None:
    """Compare the control of the language models: an inner product, clamped at 30."""
    file, data = "llm_distlayers", arrays("llm_distlayers")
    scores = head("linear", clamp=30.0)
    close(score(head("linear"), file), data["baseline.s"], 1e-8, "s")
    close(score(scores, file), data["baseline.logits"], 1e-8, "logits")
    compare(scores, language_loss, file, "baseline.", tolerances=(1e-8, 1e-7))


# --- tokens that share output vectors -----------------------------------------------------------------------


@pytest.mark.skipif(not facts("vq_logits"), reason="this folder has no VQ-Logits case")
def test_vq_logits() -> None:
    data = arrays("vq_logits")
    hidden, codebook = (cases.leaf(data[name], torch.float64) for name in ("h", "codebook"))
    code_of, targets = torch.tensor(data["map"]), torch.tensor(data["y"])
    scores = head("vq_logits", codes=len(codebook))
    logits = scores(hidden, codebook, code_of=code_of)
    close(logits, data["logits"], 1e-10, "logits")
    loss = cross_entropy(logits, targets)
    grouped = scores.module.token_losses(scores.config, hidden, codebook, targets, code_of=code_of)[0].mean()
    for value, name in ((loss, "loss"), (grouped, "loss_grouped")):
        close(value, data[name], 1e-10, name)
        gradients = torch.autograd.grad(value, (hidden, codebook), retain_graph=True)
        for gradient, what in zip(gradients, ("dh", "dcodebook"), strict=True):
            close(gradient, data[what], 1e-10, f"{what} of {name}")
