"""Unlearning losses against the authors' code: value and gradients, in float64 and float32.

Run with ``pytest tests/parity/test_unlearning.py``; the data is described in ``tests/parity/cases.py``. Files are told
apart by what is in them, not by their names; other tests read the rest of the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from methods.data import Example, Part
from methods.stage import Parent
from methods.terms import total
from methods.unlearn._annotations import IMPORTANCE
from tests.parity.cases import (
    Table,
    agree,
    arrays,
    data_files,
    flat,
    folder,
    leaf,
    meta,
    method,
    read_by,
    reader,
)

FOLDER = folder("unlearning")
# As the data's README states it; gradients of saturated tokens are 0 and need an absolute tolerance, too.
FLOAT64 = {"relative": 1e-8, "absolute": 1e-11}
FLOAT32 = {"relative": 1e-4, "absolute": 1e-6}
# The official FLAT has its ln 2 in float32.
FLAT64 = {"relative": 1e-6, "absolute": 1e-11}
# Logits beyond this are the "saturated" ones, whose float32 values the README compares within 1e-4.
SATURATED = 16.0
# Names that the data's parts have here: one preferred answer, two ways of coming by it.
PARTS = {"forget": ("forget",), "alt": ("template", "alternate"), "retain": ("retain",)}


@dataclass(frozen=True)
class Recipe:
    """A method with options that is the same as the official code of a case.

    ``labels`` takes the place of the stored -100 labels of the forget rows, ``weights`` names the array with the
    importance of its tokens. ``single`` is whether a comparison in float32 has a meaning.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: int | None = None
    weights: str | None = None
    double: Mapping[str, float] = field(default_factory=lambda: FLOAT64)
    single: bool = True


def cases() -> Iterator[Any]:
    """(file, case, recipe) for every case of every loss file, a case being what one or more methods must give."""
    for path in read_by("test_unlearning.py"):
        for name, about in meta(path).get("cases", {}).items():
            for number, recipe in enumerate(recipes(about) or [None]):
                label = f"{path.stem}/{name}" + (f"/{recipe.method}" if recipe and number else "")
                yield pytest.param(path, name, about, recipe, id=label)


@pytest.mark.parametrize(("path", "name", "about", "recipe"), cases())
def test_loss_equals_the_official_one(
    path: Path, name: str, about: dict[str, Any], recipe: Recipe | None
) -> None:
    if recipe is None:
        pytest.fail(f"no recipe for the case {name} of {path.name}: {about['method']!r}; add it to RECIPES")
    stored = arrays(path)
    saturated = max(abs(stored[key]).max() for key in stored if key.endswith("_logits")) > SATURATED
    compare(recipe, stored, name, torch.float64, recipe.double)
    if recipe.single:
        compare(recipe, stored, name, torch.float32, FLOAT32 | ({"absolute": 1e-4} if saturated else {}))


@pytest.mark.parametrize("path", data_files(), ids=lambda path: path.name)
def test_every_file_is_read(path: Path) -> None:
    test = reader(path)
    if test is None or not Path(__file__).with_name(test).is_file():
        pytest.fail(f"no test reads {path.name}: say in tests/parity/cases.py which one has to")


def test_a_file_that_nobody_knows_is_not_passed_over(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "news.npz", **{"in|something_else": numpy.zeros(2)})
    assert reader(tmp_path / "news.npz") is None


# --- a comparison ---------------------------------------------------------------------------------------------


def compare(
    recipe: Recipe,
    stored: Mapping[str, Any],
    name: str,
    dtype: torch.dtype,
    tolerance: Mapping[str, float],
) -> None:
    """Value and every stored number of one case in one precision; a gradient that is not stored is zero."""
    module = method(recipe.method)
    config = module.Config(**recipe.options)
    adaptive = module.adaptive(config) if hasattr(module, "adaptive") else None
    leaves = {part: leaf(stored[f"in|{part}_logits"], dtype) for part in PARTS if has(stored, part)}
    batch = SimpleNamespace(
        **batch_of(module, config, recipe, stored, leaves),
        step=0,
        steps=1,
        values=adaptive.start if adaptive else {},
    )
    terms = module.loss(config, Table(flat(leaves.values())), batch, reference(stored, leaves, dtype))
    value = total(terms, module.outer(config) if hasattr(module, "outer") else None)
    value.backward()
    agree(value, stored[f"out|{name}|loss"], **tolerance, what=f"loss in {dtype}")
    for part, logits in leaves.items():
        gradient = logits.grad if logits.grad is not None else torch.zeros_like(logits)
        expected = stored.get(f"out|{name}|grad_{part}", numpy.zeros(gradient.shape))
        agree(gradient, expected, **tolerance, what=f"gradient of the {part} logits in {dtype}")
    for key in further(stored, name):
        agree(
            FURTHER[key](adaptive, terms), stored[f"out|{name}|{key}"], **tolerance, what=f"{key} in {dtype}"
        )


def further(stored: Mapping[str, Any], name: str) -> list[str]:
    """What a case holds beside its loss and gradients."""
    found = [key.removeprefix(f"out|{name}|") for key in stored if key.startswith(f"out|{name}|")]
    return [key for key in found if key != "loss" and not key.startswith("grad_")]


def multiplier(adaptive: Any, terms: Any) -> Tensor:
    """The dual variable after the step whose terms these are."""
    means = {name: float(term.sum.detach() / term.count) for name, term in terms.items()}
    return torch.tensor(adaptive.after(adaptive.start, means)["multiplier"], dtype=torch.float64)


FURTHER: dict[str, Callable[[Any, Any], Tensor]] = {"retain_preference_after": multiplier}


def has(stored: Mapping[str, Any], part: str) -> bool:
    return f"in|{part}_logits" in stored


def batch_of(
    module: Any, config: Any, recipe: Recipe, stored: Mapping[str, Any], leaves: Mapping[str, Tensor]
) -> dict[str, Part]:
    """The parts of a batch; token ids are row numbers of the table that stands in for the model."""
    parts, start = {}, 0
    for stored_name in leaves:
        labels = torch.as_tensor(stored[f"in|{stored_name}_labels"])
        ids = torch.arange(start, start + labels.numel()).view_as(labels)
        start += labels.numel()
        extra = {}
        if stored_name == "forget":
            labels = forget_labels(module, config, recipe, labels)
            extra = weights_of(recipe, stored, leaves["forget"].dtype)
        for name in PARTS[stored_name]:
            parts[name] = Part(ids, torch.ones_like(labels), labels, name, extra)
    return parts


def forget_labels(module: Any, config: Any, recipe: Recipe, labels: Tensor) -> Tensor:
    """The labels that a run would have: as stored, replaced where masked, or changed by the method itself."""
    if recipe.labels is not None:
        labels = labels.masked_fill(labels == -100, recipe.labels)
    if not hasattr(module, "annotate") or recipe.weights is not None:
        return labels
    examples = [Example(tuple(row), tuple(row)) for row in labels.tolist()]
    changed = module.annotate(config, "forget", [{}] * len(examples), examples, None)
    return torch.tensor([example.labels for example in changed])


def weights_of(recipe: Recipe, stored: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The importance of each target, where the case has one for each label."""
    if recipe.weights is None:
        return {}
    return {IMPORTANCE: torch.as_tensor(stored[recipe.weights][:, 1:]).to(dtype)}


def reference(stored: Mapping[str, Any], leaves: Mapping[str, Tensor], dtype: torch.dtype) -> Table:
    """The frozen starting model: the same rows of a second table, not a number where none is stored."""
    tables = [
        torch.as_tensor(stored.get(f"in|ref_{part}_logits", numpy.full(logits.shape, numpy.nan))).to(dtype)
        for part, logits in leaves.items()
    ]
    return Table(flat(tables))


# --- which method a case asks for -----------------------------------------------------------------------------


def recipes(about: Mapping[str, Any]) -> list[Recipe]:
    """The methods and options that a case's description asks for; none where this file does not know it."""
    title = about["method"]
    for pattern, make in RECIPES.items():
        found = re.fullmatch(pattern, title, re.IGNORECASE)
        if found is not None:
            made = make(about, found)
            return made if isinstance(made, list) else [made]
    return []


def weights(about: Mapping[str, Any], gamma: float = 1.0, alpha: float = 0.0) -> dict[str, Any]:
    """Weights of the two terms as a case states them, and the kind of the second."""
    kind = {"retain_loss": about["retain_loss_type"].lower()} if "retain_loss_type" in about else {}
    return {"gamma": float(about.get("gamma", gamma)), "alpha": float(about.get("alpha", alpha))} | kind


def grad_diff(about: Mapping[str, Any], _: Any) -> list[Recipe]:
    """With the divergence as retain term it is KL minimisation, too."""
    options = weights(about, alpha=1.0)
    names = ["grad_diff", *(["kl_min"] if options.get("retain_loss") == "kl" else [])]
    return [Recipe(f"unlearn.{name}", options) for name in names]


def npo(about: Mapping[str, Any], _: Any) -> Recipe:
    return Recipe("unlearn.npo", weights(about) | {"beta": float(about["beta"])})


def preference(about: Mapping[str, Any], _: Any) -> list[Recipe]:
    """One loss for refusals and for alternate answers."""
    options = weights(about) | {"beta": float(about["beta"])}
    other = {"alternates": Parent("data.alternates-000000000000")}
    return [Recipe("unlearn.idk_dpo", options), Recipe("unlearn.alt_po", options | other)]


def simnpo(about: Mapping[str, Any], _: Any) -> Recipe:
    shape = {"beta": float(about["beta"]), "delta": float(about["delta"]), "length": "labels"}
    return Recipe("unlearn.simnpo", weights(about) | shape)


def wga(about: Mapping[str, Any], _: Any) -> list[Recipe]:
    """SatImp without its importance factor is the same."""
    options, beta = weights(about), float(about["beta"])
    return [
        Recipe("unlearn.wga", options | {"beta": beta}),
        Recipe("unlearn.satimp", options | {"beta1": beta, "beta2": 0.0}),
    ]


def tnpo(about: Mapping[str, Any], found: re.Match[str]) -> Recipe:
    """``alpha`` is the further exponent of W-TNPO, and the retain term's weight stands in the title."""
    further, weight = found["weighted"], found["retain"]
    options = {"alpha": float(weight or 0.0), "retain_loss": "kl", "beta": float(about["beta"])}
    extra = float(about.get("alpha", 1.5)) if further else 0.0
    return Recipe("unlearn.tnpo", options | {"extra": extra, "epsilon": 1e-5})


def satimp(about: Mapping[str, Any], _: Any) -> Recipe:
    """open-unlearning's, or the official one without a retain term."""
    first = about.get("beta1", about.get("hyper_param_beta1"))
    second = about.get("beta2", about.get("beta_param_beta2"))
    return Recipe("unlearn.satimp", weights(about) | {"beta1": float(first), "beta2": float(second)})


def satimp_gd(about: Mapping[str, Any], _: Any) -> Recipe:
    """The official ``coeff`` is the weight of the retain term here."""
    exponents = {"beta1": float(about["beta1"]), "beta2": float(about["beta2"])}
    return Recipe("unlearn.satimp", exponents | {"gamma": 1.0, "alpha": float(about["coeff_on_retain"])})


def half(about: Mapping[str, Any], found: re.Match[str]) -> Recipe:
    """SatImp's two halves at any granularity; ``coeff`` is that of the forget term, ``SimSat_GA`` has no exponent."""
    exponent = float(about.get("beta", 1.0))
    exponents = (exponent, 0.0) if found["half"].lower() == "sat" else (0.0, exponent)
    level = (found["level"] or "token").lower()
    options = {
        "gamma": float(about.get("coeff_on_forget", 1.0)),
        "alpha": float(found["retain"].lower() == "gd"),
        "beta1": exponents[0],
        "beta2": exponents[1],
        "granularity": "token" if level == "group" else level,
        "group_tokens": about["group_size"] if level == "group" else None,
    }
    return Recipe("unlearn.satimp", options)


def hard(about: Mapping[str, Any], found: re.Match[str]) -> Recipe:
    """The quantile is 1 - fraction at both ends. In float32 a loss that falls on it may be on its other side."""
    options = {
        "keep": "above" if found["side"].lower() == "top" else "below",
        "quantile": 1 - float(about["fraction"]),
        "alpha": float(found["retain"].lower() == "gd"),
    }
    return Recipe("unlearn.satimp", UNWEIGHTED | options | {"reduction": "sum"}, single=False)


def importance(about: Mapping[str, Any], found: re.Match[str]) -> Recipe:
    """Soft weights of tokens: a sum, or for both terms a mean over every position."""
    retain = found["retain"].lower() == "gd"
    options = {"alpha": float(retain), "reduction": "positions" if retain else "sum", "annotations": "stored"}
    return Recipe("unlearn.satimp", UNWEIGHTED | options, weights=found["array"])


def npo_importance(about: Mapping[str, Any], found: re.Match[str]) -> Recipe:
    options = {"alpha": 0.0, "beta": float(about["beta"]), "annotations": "stored", "margin": "batch"}
    return Recipe("unlearn.npo", options, weights=found["array"])


def undial(about: Mapping[str, Any], found: re.Match[str]) -> Recipe:
    """As open-unlearning has it, or as it should be where no label is masked."""
    options = weights(about) | {"beta": float(about["beta"])}
    if found["label"] is None:
        return Recipe("unlearn.undial", options | {"mask": "all", "minus_100_as_index": True})
    return Recipe("unlearn.undial", options, labels=int(found["label"]))


def ce_u(about: Mapping[str, Any], _: Any) -> Recipe:
    return Recipe("unlearn.ce_u", {"ignore_first_tokens": about["ignore_first_n_answer_tokens"]})


def pdu(about: Mapping[str, Any], _: Any) -> Recipe:
    """A multiplier that changes only between epochs does not move in one step."""
    each_step = about.get("dual_update_upon", "step") == "step"
    dual = {
        "alpha": float(about["alpha_initial"]),
        "epsilon": float(about["retain_loss_eps"]),
        "step_size": float(about["dual_step_size"]) if each_step else 0.0,
        "dual_warmup_share": 0.0,
    }
    return Recipe("unlearn.pdu", weights(about) | dual)


def flat_loss(about: Mapping[str, Any], _: Any) -> Recipe:
    """Divergences that only the code has go by names that no option takes."""
    name = about["divergence"].lower().replace("-", "_").replace("jenson", "jensen")
    return Recipe("unlearn.flat", {"divergence": name, "normalise": "padded"}, double=FLAT64)


UNWEIGHTED: dict[str, Any] = {"gamma": 1.0, "beta1": 0.0, "beta2": 0.0}
# By the whole title of a case, letters of either size.
RECIPES: dict[str, Callable[[Mapping[str, Any], re.Match[str]], Recipe | list[Recipe]]] = {
    r"GradAscent": lambda about, _: Recipe("unlearn.grad_ascent"),
    r"GradDiff": grad_diff,
    r"NPO": npo,
    r"DPO\b.*": preference,
    r"SimNPO": simnpo,
    r"WGA": wga,
    r"(?P<weighted>W-)?TNPO(?: \+ KL retain \(weight (?P<retain>[\d.]+)\))?": tnpo,
    r"SatImp": satimp,
    r"SatImp_GD\b.*": satimp_gd,
    r"(?:(?P<level>instance|batch|group)_)?sim(?P<half>sat|imp)_(?P<retain>ga|gd)\b.*": half,
    r"(?P<retain>ga|gd)_(?P<side>top|bottom)k": hard,
    r"Importance (?P<retain>ga|gd)_imp\b.*= (?P<array>\S+)": importance,
    r"Importance npo_imp\b.*= (?P<array>\S+)": npo_importance,
    r"UNDIAL\b(?:.* -100 replaced by (?P<label>\d+))?.*": undial,
    r"CE-U": ce_u,
    r"PDU": pdu,
    r"FLAT": flat_loss,
}
