"""Losses on the logits of one vocabulary, against the authors' code: value and gradients.

Run with ``pytest tests/parity/test_distillation_logits.py``. What the sources divide by, and what they leave in the
value (a teacher's entropy), is put right here; the terms are those that the loop computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.data import IGNORED, Part
from methods.distill._mixture import Mixture
from methods.distill._sources import Live
from methods.find import catalogue
from methods.stage import Component
from methods.term import Tokens
from methods.terms import total
from tests.parity.cases import Table, agree, leaf
from tests.parity.distillation import Case, World, cases, compare, entropy, name_of, precisions, stored, term

# DistiLLM's own values of lam, where a case says "default"
LAM = {"js_distance": 0.9, "symmetric_kl": 0.9, "skewed_forward_kl": 0.1, "skewed_reverse_kl": 0.1}
# Codes whose value has the teacher's entropy in it, and how much of it
CROSS_ENTROPIES: dict[str, Callable[[float], float]] = {
    "skewed_forward_kl": lambda lam: 1.0,
    "symmetric_kl": lambda lam: 1 - lam,
}
GJSD = "GKDTrainer.generalized_jsd_loss"
TOP_K = "compute_topk_self_distillation_loss"
SAMPLED = "compute_sampled_token_self_distillation_loss"
AKL = "get_ratio+get_kl (the AKL body)"
SINGLE_STEP = (
    "MiniLLMTrainer._single_step_decomposition_loss",
    "get_x_entropy/get_entropy as combined in Loss._reg_loss",
)


@dataclass(frozen=True)
class Wanted:
    """What a case asks for: terms, and where its value or its division is another."""

    terms: list[Component]
    # what our total is divided by, from the inputs
    divide: Callable[[World], float] = lambda world: 1.0
    # what is in the source's value beside ours
    plus: Callable[[World], Tensor | float] = lambda world: 0.0
    # the rows the loss is taken on
    part: Callable[[World], Part] = lambda world: world.part


def tokens(world: World) -> float:
    return float(world.part.tokens)


# --- what each code asks for ------------------------------------------------------------------------------------


def distillm(hyper: Mapping[str, Any], function: str) -> Wanted:
    given = hyper.get("lam", "default")
    lam = LAM.get(function, 0.0) if given == "default" else float(given)
    chosen = {
        "reverse_kl": lambda: term("reverse_kl"),
        "tv_distance": lambda: term("tvd"),
        "js_distance": lambda: term("jsd", beta=1 - lam),
        "symmetric_kl": lambda: term("symmetric_kl", share=lam),
        "skewed_forward_kl": lambda: term("skew_forward_kl", skew=lam),
        "skewed_reverse_kl": lambda: term("skew_reverse_kl", skew=lam),
    }[function]()
    share = CROSS_ENTROPIES.get(function, lambda lam: 0.0)(lam)
    return Wanted([chosen], plus=lambda world: share * entropy(world) if share else 0.0)


def gjsd(hyper: Mapping[str, Any], function: str) -> Wanted:
    """trl divides by unmasked tokens, by the items of the accumulation window, by the rows, by all entries or by 1."""
    unlabelled = hyper.get("labels", "") is None
    options = {"beta": float(hyper.get("beta", 0.5)), "temperature": float(hyper.get("temperature", 1.0))}
    chosen = term("jsd", positions="all" if unlabelled else "answers", **options)

    def divide(world: World) -> float:
        ours = float(world.ids.numel()) if unlabelled else tokens(world)
        if hyper.get("num_items_in_batch") is not None:
            return float(hyper["num_items_in_batch"]) / ours
        theirs = {
            "batchmean": float(len(world.ids)) if unlabelled else ours,
            "mean": ours * world.student.shape[-1],
            "sum": 1.0,
        }
        return theirs[hyper.get("reduction", "batchmean")] / ours

    masked = hyper.get("labels") == "all -100"
    return Wanted([chosen], divide=divide, part=World.masked if masked else lambda world: world.part)


def top_k(hyper: Mapping[str, Any], function: str) -> Wanted:
    rest = "tail" if hyper["add_tail"] else "renormalised"
    return Wanted([term("student_top_k", entries=hyper["topk"], beta=float(hyper["alpha"]), rest=rest)])


def sampled(hyper: Mapping[str, Any], function: str) -> Wanted:
    """trl scores ``input_ids[t]`` by ``logits[t]``: here that is a row in which the target comes one later."""

    def part(world: World) -> Part:
        labels = torch.full_like(world.part.labels, IGNORED)
        labels[:, 1:] = world.ids[:, :-1].masked_fill(~world.part.mask, IGNORED)
        return replace(world.part, labels=labels)

    return Wanted([term("sampled_reverse_kl")], part=part)


def dkd(hyper: Mapping[str, Any], function: str) -> Wanted:
    names = ("alpha", "beta", "temperature")
    wanted = Wanted([term("dkd", **{name: float(hyper[name]) for name in names if name in hyper})])
    if function == "dkd_loss":
        return wanted
    # TAID's copy divides by every position of logits[:, :-1].
    return replace(wanted, divide=lambda world: world.part.targets.numel() / tokens(world))


def torchdistill(hyper: Mapping[str, Any], function: str) -> Wanted:
    """``alpha`` is the weight of the cross-entropy, and without it there is neither T**2 nor ``beta``."""
    alpha, beta, temperature = hyper.get("alpha") or 0.0, hyper.get("beta"), float(hyper["temperature"])
    weight = float(1 - alpha if beta is None else beta) if alpha else 1.0
    name = "logit_standardised_kl"
    chosen = term(name, weight=weight, temperature=temperature, scale_by_temperature=alpha != 0)
    return Wanted([chosen, term("cross_entropy", weight=float(alpha))])


def relations(hyper: Mapping[str, Any], function: str) -> Wanted:
    options = {name: float(hyper.get(name, 1.0)) for name in ("beta", "gamma")}
    if function == "DIST.forward":
        return Wanted([term("dist", **options)])
    return Wanted([term("dist", temperature=float(hyper.get("tau", 1.0)), epsilon="clamped", **options)])


READERS: dict[str, Callable[[Mapping[str, Any], str], Wanted]] = {
    **dict.fromkeys(("reverse_kl", "tv_distance", *LAM), distillm),
    **dict.fromkeys(SINGLE_STEP, lambda hyper, function: Wanted([term("reverse_kl")])),
    GJSD: gjsd,
    TOP_K: top_k,
    SAMPLED: sampled,
    "JS.forward": lambda hyper, function: Wanted([term("jsd", beta=float(hyper["teacher_weight"]))]),
    AKL: lambda hyper, function: Wanted([term("akl", mu=float(hyper["mu"]))]),
    "AdaptiveKL.forward": lambda hyper, function: Wanted(
        [term("akl", mu=float(hyper["head_threshold"]), variant="taid")]
    ),
    "DKD.forward": dkd,
    "dkd_loss": dkd,
    "LogitStdKDLoss.forward": torchdistill,
    "DIST.forward": relations,
    "DISTLoss.forward": relations,
}


# --- the cases --------------------------------------------------------------------------------------------------


def claims(case: Case) -> bool:
    """Whether this file tests the case; a plain forward KL belongs to ``test_distillation.py``."""
    if case["function"] == GJSD:
        return not plain_forward_kl(case["hyper"])
    return case["function"] in READERS or schedule_claims(case)


def plain_forward_kl(hyper: Mapping[str, Any]) -> bool:
    usual = hyper.get("reduction") == "batchmean" and not {"labels", "num_items_in_batch"} & hyper.keys()
    return hyper.get("beta") == 0 and usual


def schedule_claims(case: Case) -> bool:
    return case["function"] == "TAID.forward"


@pytest.mark.parametrize("case", cases(lambda case: claims(case) and not schedule_claims(case)), ids=name_of)
def test_a_term_equals_the_official_loss(case: Case) -> None:
    wanted, expected = READERS[case["function"]](case["hyper"], case["function"]), stored(case)
    for dtype, ending, tolerance in precisions(case):
        world = World(dtype, case["hyper"].get("neg_inf_last_columns", 0))
        terms = world.terms(wanted.terms, batch=world.batch(wanted.part(world)))
        compare(
            terms, world, expected, ending, tolerance, plus=wanted.plus(world), divide=wanted.divide(world)
        )


@pytest.mark.parametrize(
    "case", cases(lambda case: claims(case) and "per_token" in case["arrays"]), ids=name_of
)
def test_each_token_has_the_official_loss(case: Case) -> None:
    """At every position, whether it counts or not."""
    world = World(getattr(torch, case["dtype"]))
    (chosen,) = READERS[case["function"]](case["hyper"], case["function"]).terms
    module = catalogue().component("term", chosen.name).load()
    config = module.Config(**chosen.options)
    student, teacher = world.student.flatten(0, 1), world.teacher.flatten(0, 1)
    if hasattr(module, "divergence"):
        values = module.divergence(config, teacher.log_softmax(-1), student.log_softmax(-1))
    else:
        values = module.token_losses(config, Tokens(student, world.ids.flatten(), teacher))["loss"]
    tolerance = case["tolerance"]
    near = {"relative": tolerance["loss_rtol"], "absolute": tolerance["loss_atol"]}
    agree(values.view_as(world.ids), stored(case)["per_token"], **near, what="per_token")


@pytest.mark.parametrize(
    "case", cases(lambda case: claims(case) and "head_ratio" in case["arrays"]), ids=name_of
)
def test_the_shares_of_adaptive_kl_are_the_official_ones(case: Case) -> None:
    from methods.term.akl import head_share

    world = World(getattr(torch, case["dtype"]))
    student, teacher = (
        logits.detach().flatten(0, 1).log_softmax(-1) for logits in (world.student, world.teacher)
    )
    share = head_share(teacher, student, float(case["hyper"]["mu"])).view_as(world.ids)
    tolerance = case["tolerance"]
    near = {"relative": tolerance["loss_rtol"], "absolute": tolerance["loss_atol"]}
    agree(share, stored(case)["head_ratio"], **near, what="head_ratio")
    agree(1 - share, stored(case)["tail_ratio"], **near, what="tail_ratio")


@pytest.mark.parametrize("case", cases(schedule_claims), ids=name_of)
def test_taid_follows_the_official_schedule(case: Case) -> None:
    """Step by step: the loss and its gradient with the old t, and the state after it."""
    hyper, expected = case["hyper"], stored(case)
    options = {name: float(hyper[name]) for name in ("t_start", "t_end", "alpha", "beta") if name in hyper}
    mixture, steps = Mixture([term("taid", **options)]), int(hyper["num_train_steps"])
    world, tolerance = World(getattr(torch, case["dtype"])), case["tolerance"]
    near = {"relative": tolerance["loss_rtol"], "absolute": tolerance["loss_atol"]}
    slopes = {"relative": tolerance["grad_rtol"], "absolute": tolerance["grad_atol"]}
    numbers = mixture.adaptive(steps)
    assert numbers is not None
    values = numbers.start
    for step, logits in enumerate(expected["student_logits_steps"]):
        agree(torch.tensor(values["taid.t"]), expected["t_before"][step], **near, what=f"t before {step}")
        student = leaf(logits, world.dtype)
        batch = SimpleNamespace(train=world.part, values=values, step=step, steps=steps)
        teacher = Live(Table(world.teacher.flatten(0, 1)))
        loss = total(mixture.terms(Table(student.flatten(0, 1)), teacher, batch))
        loss.backward()
        agree(loss, expected["loss"][step], **near, what=f"loss {step}")
        assert student.grad is not None
        agree(student.grad, expected["grad_student_logits"][step], **slopes, what=f"gradient {step}")
        before, values = (
            values,
            numbers.after({**values, "step": float(step)}, {"taid": float(loss.detach())}),
        )
        for name, key in (("t_after", "taid.t"), ("momentum_after", "taid.momentum")):
            agree(torch.tensor(values[key]), expected[name][step], **near, what=f"{name} {step}")
        assert values["taid.t"] >= before["taid.t"]
