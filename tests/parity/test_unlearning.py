"""Unlearning losses against the authors' code: value and gradients, in float64 and float32.

Run with ``pytest tests/parity/test_unlearning.py``; the data is described in ``tests/parity/cases.py``. The metrics
that lie in the same folder belong to the evaluations.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from methods.data import Part
from methods.terms import total
from tests.parity.cases import Table, agree, arrays, flat, folder, leaf, meta, method

FOLDER = folder("unlearning")
# float64 as the data's README states it; 0.0 gradients of saturated tokens need an absolute tolerance, too
FLOAT64 = {"relative": 1e-8, "absolute": 1e-11}
FLOAT32 = {"relative": 1e-4, "absolute": 1e-6}
# logits beyond this are the "saturated" ones, whose float32 values the README compares within 1e-4
SATURATED = 16.0


def cases() -> list[Any]:
    """(file, case, what the file says about it) for every loss case in the folder."""
    found = []
    for path in sorted(FOLDER.glob("*.npz")):
        named = meta(path).get("cases") or {path.stem: {"method": path.stem}}
        if path.stem != "metrics":
            found += [
                pytest.param(path, name, about, id=f"{path.stem}/{name}") for name, about in named.items()
            ]
    return found


@pytest.mark.parametrize(("path", "name", "about"), cases())
def test_loss_equals_the_official_one(path: Path, name: str, about: dict[str, Any]) -> None:
    full_name, options = recipe(about)
    module = method(full_name)
    if options is None:
        pytest.fail(
            f"{full_name} exists, but tests/parity/test_unlearning.py does not know the options of its cases"
        )
    stored = arrays(path)
    saturated = max(abs(stored[key]).max() for key in stored if key.endswith("_logits")) > SATURATED
    single = FLOAT32 | {"absolute": 1e-4} if saturated else FLOAT32
    for dtype, tolerance in ((torch.float64, FLOAT64), (torch.float32, single)):
        compare(module, options, stored, name, dtype, tolerance)


def compare(
    module: ModuleType,
    options: dict[str, Any],
    stored: Any,
    name: str,
    dtype: torch.dtype,
    tolerance: dict[str, float],
) -> None:
    """Value and every stored gradient of one case in one precision; a gradient that is not stored is zero."""
    leaves = {
        part: leaf(stored[f"in|{part}_logits"], dtype) for part in ("forget", "retain") if has(stored, part)
    }
    config, model = module.Config(**options), Table(flat(leaves.values()))
    terms = module.loss(config, model, batch(stored, leaves), reference(stored, dtype))
    value = total(terms, module.outer(config) if hasattr(module, "outer") else None)
    value.backward()
    agree(value, stored[f"out|{name}|loss"], **tolerance, what=f"loss in {dtype}")
    for part, logits in leaves.items():
        gradient = logits.grad if logits.grad is not None else torch.zeros_like(logits)
        expected = stored.get(f"out|{name}|grad_{part}", numpy.zeros(gradient.shape))
        agree(gradient, expected, **tolerance, what=f"gradient of the {part} logits in {dtype}")


def has(stored: Any, part: str) -> bool:
    return f"in|{part}_logits" in stored


def batch(stored: Any, leaves: dict[str, torch.Tensor]) -> Any:
    """The parts of a batch; token ids are row numbers of the table that stands in for the model."""
    parts, start = {}, 0
    for name in leaves:
        labels = torch.as_tensor(stored[f"in|{name}_labels"])
        ids = torch.arange(start, start + labels.numel()).view_as(labels)
        parts[name] = Part(input_ids=ids, attention_mask=torch.ones_like(labels), labels=labels, name=name)
        start += labels.numel()
    return SimpleNamespace(**parts)


def reference(stored: Any, dtype: torch.dtype) -> Table | None:
    """The frozen starting model: the same rows of a second table."""
    names = [part for part in ("forget", "retain") if f"in|ref_{part}_logits" in stored]
    return (
        Table(flat(torch.as_tensor(stored[f"in|ref_{part}_logits"]).to(dtype) for part in names))
        if names
        else None
    )


def recipe(about: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The method and options that a case's description asks for; None for a method this file has no options of."""
    title = about["method"]
    weights = {key: float(about[key]) for key in ("gamma", "alpha") if key in about}
    weights |= {"retain_loss": about["retain_loss_type"].lower()} if "retain_loss_type" in about else {}
    if title == "GradAscent":
        return "unlearn.grad_ascent", {}
    if title == "GradDiff":
        return "unlearn.grad_diff", weights
    if title == "NPO":
        return "unlearn.npo", weights | {"beta": float(about["beta"])}
    if title == "WGA":  # SatImp without its importance factor
        options = {"gamma": 1.0, "alpha": 0.0, "beta1": float(about["beta"]), "beta2": 0.0}
        return "unlearn.satimp", options | weights
    satimp = satimp_options(title, about, weights)
    if satimp is not None:
        return "unlearn.satimp", satimp
    word = re.split(r"[^A-Za-z_-]", title)[0]
    return f"unlearn.{word.lower().replace('-', '')}", None


def satimp_options(title: str, about: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any] | None:
    """SatImp, its two halves, and both at three granularities, as the official code names them.

    ``coeff`` is on the retain term in ``SatImp_GD`` and on the forget term in ``SimSat_GD``; ``SimSat_GA``
    ignores its exponent.
    """
    if title == "SatImp":
        first = about.get("beta1", about.get("hyper_param_beta1"))
        second = about.get("beta2", about.get("beta_param_beta2"))
        return {"gamma": 1.0, "alpha": 0.0} | weights | {"beta1": float(first), "beta2": float(second)}
    if title.startswith("SatImp_GD"):
        exponents = {"beta1": float(about["beta1"]), "beta2": float(about["beta2"])}
        return exponents | {"gamma": 1.0, "alpha": float(about["coeff_on_retain"])}
    found = re.match(r"(?:(instance|batch|group)_)?sim(sat|imp)_(ga|gd)", title.lower())
    if found is None:
        return None
    level, half, retain = found.groups()
    exponent = float(about.get("beta", 1.0))
    options: dict[str, Any] = {
        "gamma": float(about.get("coeff_on_forget", 1.0)),
        "alpha": float(retain == "gd"),
    }
    options |= {"beta1": exponent, "beta2": 0.0} if half == "sat" else {"beta1": 0.0, "beta2": exponent}
    if level in ("instance", "batch"):
        options["granularity"] = level
    if level == "group":
        options["group_tokens"] = about["group_size"]
    return options
