"""PASER's divergence, cost, conflicts and similarities against the authors' code, in float64.

Run with ``pytest tests/parity/test_paser.py``. Its budgets, which lose what rounding down takes, are ours at least.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from methods.data._capabilities import kernel, spectrum
from methods.data._concepts import CoOccurrence
from methods.data.paser import budgets
from methods.term._divergences import jensen_shannon
from tests.parity.cases import agree, arrays, folder

FOLDER = folder("metrics")
Stored = dict[str, numpy.ndarray]


def divergence(stored: Stored, near: dict[str, float]) -> None:
    """The code adds up over positions; ours is their mean, which the data has, too."""
    dense, pruned = (
        torch.tensor(stored[f"logits_{name}"]).flatten(0, -2).log_softmax(-1)
        for name in ("original", "pruned")
    )
    found = jensen_shannon(dense, pruned, 0.5)
    agree(found.sum(), stored["jsd_sum"], **near, what="jsd_sum")
    agree(found.mean(), stored["jsd_per_token"], **near, what="jsd_per_token")


def budget(stored: Stored, near: dict[str, float]) -> None:
    """In proportion, each rounded down by the code."""
    shares, official = stored["cluster_degradation"].tolist(), stored["budget"].tolist()
    total = round(sum(official) + len(official) / 2)
    found = budgets(shares, [total] * len(shares), total)
    assert sum(found) == total
    assert all(abs(ours - total * share / sum(shares)) < 1 for ours, share in zip(found, shares, strict=True))


def consistency(stored: Stored, near: dict[str, float]) -> None:
    """A sample is a word, and each of its letters a concept."""
    memory = CoOccurrence()
    found = [memory.accepts({"text": ", ".join(sample)}) for sample in stored["samples"].tolist()]
    assert found == stored["accepted"].tolist()


def similarities(stored: Stored, near: dict[str, float]) -> None:
    """The width, and the spectrum that the walk and its symmetric form share."""
    points = stored["embeddings"]
    distances = numpy.linalg.norm(points[:, None] - points[None], axis=-1)
    width = torch.tensor(numpy.median(distances))
    agree(width, stored["sigma"], **near, what="sigma")
    expected = numpy.exp(-(distances**2) / (2 * stored["sigma"] ** 2))
    agree(torch.tensor(kernel(points)), expected, **near, what="affinity")
    values, _, _ = spectrum(points, len(points))
    agree(torch.tensor(1 - values), stored["symmetric_eigenvalues"], **near, what="eigenvalues")


READERS: dict[str, Callable[[Stored, dict[str, float]], None]] = {
    "paser_jsd": divergence,
    "paser_budget": budget,
    "paser_consistency": consistency,
    "paser_laplacian": similarities,
}


def reader(name: str) -> Callable[[Stored, dict[str, float]], None] | None:
    """Who compares a case of that name."""
    return next((found for start, found in READERS.items() if name.startswith(start)), None)


def cases() -> list[dict[str, Any]]:
    """PASER's among the cases on data."""
    path = FOLDER / "data.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [case for case in found if reader(case["name"]) is not None]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_paser_agrees_with_its_code(case: dict[str, Any]) -> None:
    known = arrays(FOLDER / "data.npz")
    stored = {key.rpartition(".")[2]: known[key] for key in case["arrays"]}
    tolerance = float(case["tolerance"])
    compare = reader(case["name"])
    assert compare is not None
    compare(stored, {"relative": tolerance, "absolute": max(tolerance, 1e-12)})
