"""Sample reweighting, the trajectory loss and preference-oriented finetuning against the authors' expressions.

Driven by ``losses/sample_reweight.npz`` and ``losses/saf_poft.npz``: every strategy, temperature and number in them.
Everything is float64; the functions called are those that the loop calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import Tensor

from methods.data import Part
from methods.find import catalogue
from methods.gradient import Batch
from methods.stage import AssayError, Component, Parent, Terms
from methods.terms import total
from methods.train import poft, saf
from methods.weighting import scaled, weigh, weighted_terms
from tests.parity import cases

FOLDER = cases.folder("losses")
NEAR = {"relative": 1e-10, "absolute": 1e-12}
# What the official code calls a strategy, where it is not what it is called here.
STRATEGIES = {"mid": "quadratic", "linupper": "linear_upper"}


def arrays(name: str) -> Mapping[str, numpy.ndarray]:
    """The arrays of a file; none where this folder has no such file."""
    path = FOLDER / f"{name}.npz"
    return cases.arrays(path) if path.is_file() else {}


# --- sample reweighting -------------------------------------------------------------------------------------------


def reweightings() -> list[str]:
    """``mid.r0.4`` for every strategy and temperature."""
    return [name.removesuffix(".weights") for name in arrays("sample_reweight") if name.endswith(".weights")]


@pytest.mark.parametrize("case", reweightings())
def test_sample_reweighting(case: str) -> None:
    data = arrays("sample_reweight")
    chosen, step = strategy(case), 1000
    losses = cases.leaf(data["losses"], torch.float64)
    terms = terms_of(chosen, losses, step)
    cases.agree(scaled(losses), data["h"], **NEAR, what="h")
    cases.agree(weights_of(chosen, losses, step), data[f"{case}.weights"], **NEAR, what="weights")
    cases.agree(total(terms), data[f"{case}.loss"], **NEAR, what="loss")
    total(terms).backward()
    assert losses.grad is not None
    cases.agree(losses.grad, data[f"{case}.weights"], **NEAR, what="the weights get no gradient")


def strategy(case: str) -> Component:
    """The component of a case such as ``mid.r0.4``."""
    found = re.fullmatch(r"(.+)\.r([0-9.]+)", case)
    assert found is not None, case
    name = STRATEGIES.get(found[1], found[1])
    try:
        catalogue().component("weighting", name)
    except AssayError:
        pytest.skip(f"not built yet: weighting {name}")
    return Component(name, {"temperature": float(found[2])})


def weights_of(chosen: Component, losses: Tensor, step: int) -> Tensor:
    function = weigh(chosen)
    assert function is not None
    return function(losses.detach(), step)


def terms_of(chosen: Component, losses: Tensor, step: int) -> Terms:
    """The terms of rows with these losses, as ``train.sft`` and ``train.classify`` ask for them."""
    batch = Batch({}, step, step + 1, weigh=lambda values: weights_of(chosen, values, step))
    return weighted_terms(chosen, SimpleNamespace(), losses, batch)  # type: ignore[arg-type]


# --- the trajectory loss ----------------------------------------------------------------------------------------------


def given(*names: str) -> bool:
    return all(name in arrays("saf_poft") for name in names)


@pytest.mark.skipif(not given("logits", "past_logits", "kl"), reason="this folder has no trajectory case")
def test_trajectory_loss() -> None:
    data = arrays("saf_poft")
    config = saf.Config(data="any", temperature=float(data["tau"]), strength=float(data["lam"]))
    scores = cases.leaf(data["logits"], torch.float64)
    mean = saf.trajectory_losses(config, scores, torch.tensor(data["past_logits"])).mean()
    mean.backward()
    assert scores.grad is not None
    cases.agree(mean, data["kl"], **NEAR, what="KL term")
    cases.agree(config.strength * mean, data["weighted"], **NEAR, what="weighted term")
    cases.agree(scores.grad, data["dlogits"], **NEAR, what="dlogits")


# --- preference-oriented finetuning -----------------------------------------------------------------------------------


@pytest.mark.skipif(not given("poft.mean_logp_theta", "poft.loss"), reason="this folder has no PoFT case")
def test_preference_oriented_finetuning() -> None:
    data = arrays("saf_poft")
    config = poft.Config(
        references=(Parent("train.sft-000000000000"),),
        beta=float(data["poft.beta"]),
        gamma=float(data["poft.gamma"]),
    )
    ours = cases.leaf(data["poft.mean_logp_theta"], torch.float64)
    mean = poft.preference_losses(config, ours, torch.tensor(data["poft.mean_logp_llms"])).mean()
    mean.backward()
    assert ours.grad is not None
    cases.agree(mean, data["poft.loss"], **NEAR, what="loss")
    cases.agree(ours.grad, data["poft.dlogp"], **NEAR, what="gradient")


@pytest.mark.skipif(not given("poft.mean_logp_theta", "poft.loss"), reason="this folder has no PoFT case")
def test_preference_oriented_finetuning_from_the_likelihoods_of_tokens() -> None:
    """The same loss where the means are made from tokens: answers of 1 to B tokens, each as likely as its mean."""
    data = arrays("saf_poft")
    theta, llms = (torch.tensor(data[f"poft.mean_logp_{who}"]) for who in ("theta", "llms"))
    width = len(theta)
    labels = torch.full((width, width + 1), -100)
    for row in range(width):
        labels[row, 1 : row + 2] = 0
    part = Part(torch.zeros_like(labels), torch.ones_like(labels), labels, "train")
    ours, theirs = (
        poft.mean_log_likelihood(part, -each[:, None].expand(width, width)) for each in (theta, llms)
    )
    config = poft.Config(
        references=(Parent("train.sft-000000000000"),),
        beta=float(data["poft.beta"]),
        gamma=float(data["poft.gamma"]),
    )
    cases.agree(poft.preference_losses(config, ours, theirs).mean(), data["poft.loss"], **NEAR, what="loss")
