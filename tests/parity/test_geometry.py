"""The metrics of geometry and convergence against the authors' own functions, on the inputs stored with the numbers.

``losses/metrics`` has the metrics of the two harmonic papers, ``metrics/representation`` those of whole spectra. The
functions called are the ones the evaluations call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest

from evaluations import _crystal, _spectrum, stability
from tests.parity import cases

PARITY = Path(os.environ.get("ASSAY_PARITY") or cases.ROOT.parent / "shared" / "parity")
METRICS = PARITY / "losses" / "metrics.json"
SPECTRA = PARITY / "metrics" / "representation.json"
# Every function here is float64; the authors' own went through an SVD of another library.
TOLERANCE = 1e-9


@cache
def facts(path: Path) -> Any:
    """A JSON file, or nothing where the folder has none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def arrays(path: Path) -> Mapping[str, numpy.ndarray]:
    return cases.arrays(path.with_suffix(".npz"))


def wanted(name: str) -> Any:
    """An expected number of the losses' file; a skip where this folder has none."""
    if name not in facts(METRICS):
        pytest.skip(f"no parity data: {METRICS} has no {name}")
    return facts(METRICS)[name]


# --- principal components --------------------------------------------------------------------------------------


@cache
def shares() -> numpy.ndarray:
    return _spectrum.ratios(arrays(METRICS)["features"], components=50, standardised=True)


def cumulative(name: str) -> float:
    """``pc_1_variance`` counts from 0: it is that of the first two."""
    return float(shares()[: int(name.split("_")[1]) + 1].sum())


PCA = {
    "intrinsic_dim_90": lambda: _spectrum.components_for(shares(), 0.90),
    "intrinsic_dim_95": lambda: _spectrum.components_for(shares(), 0.95),
    "effective_rank": lambda: _spectrum.effective_rank_ratios(shares()),
    "participation_ratio": lambda: _spectrum.participation_ratio(shares()),
    "first_component_variance": lambda: shares()[0],
    "second_component_variance": lambda: shares()[1],
    "total_components": lambda: len(shares()),
}


@pytest.mark.parametrize("name", sorted(facts(METRICS).get("pca", {})))
def test_principal_components(name: str) -> None:
    expected = wanted("pca")[name]
    if expected is None:
        assert int(name.split("_")[1]) + 1 > len(shares())
        return
    found = PCA[name]() if name in PCA else cumulative(name)
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_effective_rank_of_singular_values() -> None:
    expected = wanted("erank_singular_values_of_features")
    values = _spectrum.singular_values(arrays(METRICS)["features"])
    assert _spectrum.effective_rank_singular(values) == pytest.approx(expected, rel=TOLERANCE)


# --- crystals --------------------------------------------------------------------------------------------------


def test_circle() -> None:
    expected = wanted("circle")
    assert _crystal.circle(arrays(METRICS)["circle_emb"]) == pytest.approx(expected, rel=TOLERANCE)


def test_variances_of_the_circle() -> None:
    expected = wanted("circle_variances")
    assert _spectrum.ratios(arrays(METRICS)["circle_emb"]).tolist() == pytest.approx(expected, rel=TOLERANCE)


def test_lattice() -> None:
    expected, vectors = wanted("lattice"), arrays(METRICS)["lattice_emb"]
    size = round(len(vectors) ** 0.5)
    assert _crystal.lattice(vectors, size) == pytest.approx(expected, rel=TOLERANCE)


def test_equivalence() -> None:
    expected = wanted("equivalence")
    found = _crystal.equivalence(arrays(METRICS)["equiv_emb"], _crystal.MODULUS)
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in facts(METRICS) if name.startswith("permutation_")])
def test_permutation(name: str) -> None:
    rotations = int(name.rpartition("_p")[2])
    found = _crystal.permutation(arrays(METRICS)["circle_emb"], rotations)
    assert found == pytest.approx(wanted(name), rel=TOLERANCE)


def test_area_under_the_curve_of_convergence() -> None:
    expected = wanted("aucc")
    found = stability.aucc((arrays(METRICS)["acc_curve"] / 100).tolist())
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_every_number_of_the_file_is_compared() -> None:
    compared = {
        "pca",
        "erank_singular_values_of_features",
        "circle",
        "circle_variances",
        "lattice",
        "equivalence",
    }
    rest = {name for name in facts(METRICS) if not name.startswith("permutation_")}
    assert rest <= compared | {"aucc", "source"}


# --- whole spectra ---------------------------------------------------------------------------------------------


def spectra(beginning: str) -> list[Any]:
    """The records of the representation file whose name begins so."""
    found = [record for record in facts(SPECTRA) or [] if record["name"].startswith(beginning)]
    return [pytest.param(record, id=record["name"]) for record in found]


def stored(record: Mapping[str, Any], name: str) -> Any:
    return arrays(SPECTRA)[f"{record['name']}.{name}"]


def agrees(found: Any, record: Mapping[str, Any], name: str) -> None:
    """Within the tolerance the file states, relative to the largest entry."""
    expected = stored(record, name)
    scale = float(numpy.abs(expected).max())
    assert numpy.abs(found - expected).max() <= record["tolerance"] * scale + 1e-12, name


@pytest.mark.parametrize("record", spectra("geometry_"))
def test_spectrum_of_hidden_states(record: Mapping[str, Any]) -> None:
    hidden, options = stored(record, "hidden"), record["hyperparameters"]
    found = _spectrum.ratios(hidden)
    agrees(found, record, "eigenspectrum")
    agrees(_spectrum.rankme_eigen(found), record, "rankme")
    singular = _spectrum.rankme_singular(_spectrum.singular_values(hidden))
    agrees(singular, record, "rankme_singular_values")
    law = _spectrum.alpha_req(found, options["fit_index_start"], options["fit_index_end_exclusive"])
    assert law is not None
    agrees(law.alpha, record, "alpha")


@pytest.mark.parametrize("record", spectra("synthetic_spectrum_"))
def test_planted_spectrum(record: Mapping[str, Any]) -> None:
    planted, options = stored(record, "eigenspectrum"), record["hyperparameters"]
    agrees(_spectrum.rankme_eigen(planted / planted.sum()), record, "rankme")
    law = _spectrum.alpha_req(planted, options["fit_index_start"], options["fit_index_end_exclusive"])
    assert law is not None
    assert law.alpha == pytest.approx(float(stored(record, "alpha")), rel=record["tolerance"], abs=1e-9)


@pytest.mark.parametrize("record", spectra("mnn_"))
def test_matrix_nuclear_norm(record: Mapping[str, Any]) -> None:
    hidden = stored(record, "hidden")
    found = _spectrum.matrix_nuclear_norm(hidden)
    if not numpy.isfinite(stored(record, "mnn")):
        assert found is None
        return
    agrees(found, record, "mnn_per_token")
    agrees(_spectrum.normalised_states(hidden), record, "normalized")


@pytest.mark.parametrize("record", spectra("matrix_entropy_"))
def test_matrix_entropy(record: Mapping[str, Any]) -> None:
    agrees(_spectrum.matrix_entropy(stored(record, "hidden")), record, "entropy")


@pytest.mark.parametrize("record", spectra("gradient_spectrum_"))
def test_effective_rank_of_gradients(record: Mapping[str, Any]) -> None:
    values = _spectrum.singular_values(stored(record, "gradient"))
    agrees(values, record, "singular_values")
    agrees(_spectrum.effective_rank_singular(values), record, "effective_rank")
