"""K-FADE against closed forms on one linear softmax layer: every ``unlearning/*.npz`` that has ``in|X_retain``.

The layer stands where a transformer's would: a sequence is one token with its label, and the curvature, the directions
and the trust region come from the functions that the stages call. Only the exact Gauss-Newton matrix is put together
here, from the stage's own draws.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.curvature._factors import Measurement, Sample
from methods.curvature._kronecker import Basis, Labels, basis_of, largest_step, precondition
from methods.data import Part
from methods.terms import answer_nll, forward, kl_divergence
from methods.unlearn import _delta
from methods.unlearn._uphill import Uphill, direction_of
from tests.parity import cases

FILES = [
    path
    for path in sorted(cases.folder("unlearning").glob("*.npz"))
    if {"in|X_retain", "in|X_forget", "in|W"} <= cases.arrays(path).keys()
]
RELATIVE, ABSOLUTE = 1e-8, 1e-12
# What the files call a direction, and the options that make it.
WAYS = {
    "kfac_eig": {"curvature": "kfac", "inverse": "eigenbasis"},
    "kfac_factored": {"curvature": "kfac", "inverse": "factored"},
    "ekfac": {"curvature": "ekfac", "inverse": "eigenbasis"},
    "identity": {"curvature": "identity", "inverse": "eigenbasis"},
    "exact": {},
}


class Softmax(nn.Module):
    """One linear layer on the rows of a table, called as a language model is: an id is a row's number."""

    def __init__(self, weight: Tensor, table: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.layer.weight.data = weight.clone()
        self.table = table

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.layer(self.table[input_ids]))


class Toy:
    """The arrays of a file, and what they are put into."""

    def __init__(self, path: Path) -> None:
        self.path, self.about = path, cases.meta(path)
        self.retain, self.forget = self.input("X_retain"), self.input("X_forget")
        self.table = torch.cat([self.retain, self.forget])

    def input(self, name: str) -> Tensor:
        return torch.tensor(cases.arrays(self.path)[f"in|{name}"])

    def expected(self, name: str) -> Any:
        return cases.arrays(self.path)[f"out|{name}"]

    def agree(self, actual: Tensor | float, name: str) -> None:
        value = torch.as_tensor(actual, dtype=torch.float64)
        cases.agree(value, self.expected(name), relative=RELATIVE, absolute=ABSOLUTE, what=name)

    def start_of(self, case: str) -> Tensor:
        """``uniform`` is the case in which all outputs have one distribution."""
        weight = self.input("W")
        return torch.zeros_like(weight) if case == "uniform" else weight

    def rows(self, case: str) -> int:
        return 1 if case == "single" else len(self.retain)

    @property
    def retained(self) -> Part:
        return part_of(range(len(self.retain)), [0] * len(self.retain))

    @property
    def forgotten(self) -> Part:
        first = len(self.retain)
        return part_of(range(first, first + len(self.forget)), self.input("y_forget").tolist())


def part_of(ids: Any, labels: list[int]) -> Part:
    """Sequences of one token that has a label; the position that carries the label is no input."""
    tokens = torch.tensor([[row, 0] for row in ids])
    mask = torch.tensor([[1, 0]] * len(labels))
    return Part(tokens, mask, torch.tensor([[-100, label] for label in labels]), "toy")


def sample_of(toy: Toy, rows: int) -> Sample:
    """The first retain rows, in batches of unequal size."""
    groups = [list(range(rows))[place : place + 23] for place in range(0, rows, 23)]
    return Sample([part_of(group, [0] * len(group)) for group in groups], groups)


def measured(toy: Toy, weight: Tensor, rows: int | None = None) -> Basis:
    """The curvature of the layer, as the stage measures it, in expectation over all labels."""
    model = Softmax(weight, toy.table)
    sample = sample_of(toy, len(toy.retain) if rows is None else rows)
    run = lambda part: model(part.input_ids, part.attention_mask).logits  # noqa: E731
    measurement = Measurement(run, {"layer": model.layer}, sample, Labels("exact"), corrected=True)
    return measurement.finished()["layer"]


def ggn(toy: Toy, weight: Tensor, rows: int | None = None) -> Tensor:
    """The exact matrix [out*in,out*in], from the draws that the stage makes."""
    inputs = toy.retain[:rows]
    p = (inputs @ weight.T).softmax(-1)
    total = torch.zeros(weight.numel(), weight.numel(), dtype=weight.dtype)
    for draw in Labels("exact").draws(p, [1] * len(inputs), range(len(inputs))):
        gradients = (draw[:, :, None] * inputs[:, None, :]).flatten(1)
        total += gradients.T @ gradients
    return total / len(inputs)


def gradient_of(toy: Toy, weight: Tensor) -> Tensor:
    """Of the mean forget NLL, as the stage's loss has it."""
    model = Softmax(weight, toy.table)
    term = answer_nll(toy.forgotten, forward(model, toy.forgotten))
    (gradient,) = torch.autograd.grad(term.sum / term.count, [model.layer.weight])
    return gradient


def direction(
    toy: Toy, way: str, weight: Tensor, gradient: Tensor, basis: Basis, rows: int | None = None
) -> Tensor:
    """One direction; the exact one by solving with the exact matrix."""
    damping = toy.about["damping"]
    if way == "exact":
        matrix = ggn(toy, weight, rows) + damping * torch.eye(weight.numel(), dtype=weight.dtype)
        return torch.linalg.solve(matrix, gradient.flatten()).view_as(weight)
    control: Any = SimpleNamespace(damping=0.0, damping_floor=damping, **WAYS[way])
    return direction_of(control, {"layer": gradient}, {"layer": basis})[0]["layer"]


def climber(toy: Toy, weight: Tensor, **options: Any) -> Uphill:
    """What takes the steps in the stage, on the toy."""
    model, start = Softmax(weight, toy.table), Softmax(weight, toy.table)
    sample = Sample([toy.retained], [list(range(len(toy.retain)))])
    control: Any = SimpleNamespace(**options)
    layers = {"layer": model.layer}
    return Uphill(control, model, layers, {}, [toy.forgotten], sample, start, lambda step: Labels("exact"))


def forget_nll(toy: Toy, weight: Tensor) -> float:
    term = answer_nll(toy.forgotten, forward(Softmax(weight, toy.table), toy.forgotten))
    return float(term.sum.detach() / term.count)


def retain_kl(toy: Toy, before: Tensor, after: Tensor) -> float:
    return float(kl_divergence(toy.retain @ before.T, toy.retain @ after.T).mean())


@cache
def toy_of(path: Path) -> Toy:
    return Toy(path)


def keyed(*endings: str) -> list[Any]:
    """One pytest case for each ``out|case|<ending>...`` of each file, named after both."""
    found = []
    for path in FILES:
        for key in cases.arrays(path):
            kind, _, rest = key.partition("|")
            case, _, name = rest.partition("|")
            if kind == "out" and name.startswith(endings):
                found.append(pytest.param(toy_of(path), case, name, id=f"{path.stem}:{case}:{name}"))
    return found


def test_there_is_a_file_to_compare_with() -> None:
    assert FILES, "no .npz in unlearning/ has in|X_retain, in|X_forget and in|W"


# --- curvature ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("toy", "case", "name"), keyed("A", "S", "ggn_retain_exact", "ekfac_"))
def test_the_factors_are_the_expected_ones(toy: Toy, case: str, name: str) -> None:
    weight = toy.start_of(case)
    basis = measured(toy, weight, toy.rows(case))
    found = {
        "A": lambda: basis.inputs @ basis.input_values.diag() @ basis.inputs.T,
        "S": lambda: basis.outputs @ basis.output_values.diag() @ basis.outputs.T,
        "ggn_retain_exact": lambda: ggn(toy, weight, toy.rows(case)),
        "ekfac_diag": lambda: basis.values(corrected=True),
        "ekfac_reconstructed": lambda: reconstructed(basis),
    }
    toy.agree(found[name](), f"{case}|{name}")


def reconstructed(basis: Basis) -> Tensor:
    vectors = torch.kron(basis.outputs, basis.inputs)
    return vectors @ basis.values(corrected=True).flatten().diag() @ vectors.T


@pytest.mark.parametrize(("toy", "case", "name"), keyed("ggn_retain_exact"))
def test_the_trace_of_ekfac_is_exact(toy: Toy, case: str, name: str) -> None:
    basis = measured(toy, toy.start_of(case), toy.rows(case))
    trace = torch.tensor(toy.expected(f"{case}|{name}")).trace()
    assert float(basis.values(corrected=True).sum()) == pytest.approx(float(trace), rel=RELATIVE)
    if case == "general":
        assert float(basis.values(corrected=False).sum()) != pytest.approx(float(trace), rel=1e-3)


# --- one step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("toy", "case", "name"), keyed("grad_forget"))
def test_the_gradient_is_that_of_the_mean_forget_loss(toy: Toy, case: str, name: str) -> None:
    if case == "squared":
        residual = toy.forget @ toy.input("W").T - toy.input("Y_forget_regression")
        toy.agree(residual.T @ toy.forget / len(toy.forget), f"{case}|{name}")
    else:
        toy.agree(gradient_of(toy, toy.start_of(case)), f"{case}|{name}")


@pytest.mark.parametrize(("toy", "case", "name"), keyed("direction_"))
def test_directions_are_the_expected_ones(toy: Toy, case: str, name: str) -> None:
    weight = toy.start_of(case)
    basis = measured(toy, weight, toy.rows(case))
    found = direction(
        toy, name.removeprefix("direction_"), weight, gradient_of(toy, weight), basis, toy.rows(case)
    )
    toy.agree(found, f"{case}|{name}")


@pytest.mark.parametrize(
    ("toy", "case", "name"), [item for item in keyed("direction") if item.values[1] == "squared"]
)
def test_under_squared_loss_only_the_inputs_count(toy: Toy, case: str, name: str) -> None:
    gradient = torch.tensor(toy.expected(f"{case}|grad_forget"))
    inputs = toy.retain.T @ toy.retain / len(toy.retain)
    basis = basis_of(inputs, torch.eye(gradient.shape[0], dtype=gradient.dtype))
    toy.agree(precondition(gradient, basis, toy.about["damping"]), f"{case}|{name}")


@pytest.mark.parametrize(("toy", "case", "name"), keyed("trust_step_"))
def test_a_step_in_the_trust_region_is_the_expected_one(toy: Toy, case: str, name: str) -> None:
    way, weight = name.removeprefix("trust_step_"), toy.start_of(case)
    gradient = gradient_of(toy, weight)
    found = direction(toy, way, weight, gradient, measured(toy, weight))
    slope, curvature = climber(toy, weight)._slopes({"layer.weight": found})
    assert slope == pytest.approx(0.0, abs=ABSOLUTE)  # nothing has diverged from the start yet
    step = found * largest_step(toy.about["kl_budget"], slope, curvature)
    toy.agree(step, f"{case}|{name}")
    toy.agree(retain_kl(toy, weight, weight + step), f"{case}|retain_kl_{way}")
    toy.agree(forget_nll(toy, weight + step) - forget_nll(toy, weight), f"{case}|forget_nll_gain_{way}")
    toy.agree((gradient * step).sum(), f"{case}|linear_gain_{way}")


@pytest.mark.parametrize(("toy", "case", "name"), keyed("trust_step_kfac_eig", "trust_step_ekfac"))
def test_the_stages_own_step_goes_as_far_unless_the_measured_divergence_forbids(
    toy: Toy, case: str, name: str
) -> None:
    way, weight, budget = name.removeprefix("trust_step_"), toy.start_of(case), toy.about["kl_budget"]
    climb = climber(
        toy, weight, damping=0.0, damping_floor=toy.about["damping"], kl_budget=budget, tries=9, refresh=True,
        **WAYS[way],
    )  # fmt: skip
    climb.layers["layer"].weight.grad = -gradient_of(toy, weight)
    climb.step()
    moved = climb.layers["layer"].weight.detach() - weight
    expected = torch.tensor(toy.expected(f"{case}|{name}"))
    share = float((moved * expected).sum() / expected.square().sum())
    cases.agree(moved, share * expected, relative=RELATIVE, absolute=ABSOLUTE, what="direction")
    allowed = float(toy.expected(f"{case}|retain_kl_{way}")) <= budget
    assert share == pytest.approx(1.0, rel=RELATIVE) if allowed else share < 1
    assert retain_kl(toy, weight, weight + moved) <= budget


# --- several steps --------------------------------------------------------------------------------------------------


def trajectory(toy: Toy, refresh: bool) -> list[Tensor]:
    """The weights after each of K steps of fixed length along the K-FAC direction."""
    weight = toy.input("W")
    basis, found = measured(toy, weight), []
    for _ in range(toy.about["K"]):
        if refresh:
            basis = measured(toy, weight)
        weight = weight + toy.about["eta"] * direction(
            toy, "kfac_eig", weight, gradient_of(toy, weight), basis
        )
        found.append(weight)
    return found


@pytest.mark.parametrize(("toy", "case", "name"), keyed("W_"))
def test_trajectories_are_the_expected_ones(toy: Toy, case: str, name: str) -> None:
    number = int(name.removeprefix("W_"))
    weight = trajectory(toy, refresh=case == "steps_refresh")[number - 1]
    toy.agree(weight, f"{case}|{name}")
    toy.agree(forget_nll(toy, weight), f"{case}|forget_nll_{number}")
    toy.agree(retain_kl(toy, toy.input("W"), weight), f"{case}|retain_kl_{number}")


@pytest.mark.parametrize(
    ("toy", "case", "name"), [item for item in keyed("W") if item.values[1] == "reapply"]
)
def test_an_update_can_be_applied_after_further_training(toy: Toy, case: str, name: str) -> None:
    before, further = toy.input("W"), toy.input("W_further_trained")
    delta = _delta.between({"layer": before}, {"layer": trajectory(toy, refresh=True)[-1]})
    weights = {"layer": further.clone()}
    _delta.add(weights, delta, toy.about["reapply_alpha"])
    toy.agree(weights["layer"], f"{case}|{name}")
    toy.agree(forget_nll(toy, further), f"{case}|forget_nll_before")
    toy.agree(forget_nll(toy, weights["layer"]), f"{case}|forget_nll_after")
    toy.agree(retain_kl(toy, further, weights["layer"]), f"{case}|retain_kl")


@pytest.mark.parametrize(("toy", "case", "name"), keyed("kfade_retain_kl"))
def test_at_equal_forgetting_the_retained_outputs_move_less_than_under_ascent(
    toy: Toy, case: str, name: str
) -> None:
    start, goal = toy.input("W"), trajectory(toy, refresh=True)[-1]
    toy.agree(retain_kl(toy, start, goal), f"{case}|{name}")
    (counted,) = [key for key in cases.arrays(toy.path) if key.startswith(f"out|{case}|ga_iters_lr")]
    rate, weight, steps = float(counted.rpartition("lr")[2]), start, 0
    while forget_nll(toy, weight) < forget_nll(toy, goal):
        weight, steps = weight + rate * gradient_of(toy, weight), steps + 1
    assert steps == int(cases.arrays(toy.path)[counted])
    toy.agree(retain_kl(toy, start, weight), f"{case}|ga_retain_kl")
    assert retain_kl(toy, start, goal) < retain_kl(toy, start, weight)
