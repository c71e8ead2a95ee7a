"""MiniLLM's advantages and its clipped policy gradient against the authors' code and trl's: values and gradients.

Run with ``pytest tests/parity/test_distillation_minillm.py``. The single-step term of both is the reverse KL, which
``test_distillation_logits.py`` compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.data import IGNORED, Part
from methods.find import catalogue
from methods.stage import Component
from tests.parity.cases import agree
from tests.parity.distillation import Case, World, cases, compare, name_of, stored, term


def claims(case: Case) -> bool:
    """Whether a case is compared here."""
    return any(piece in case["function"] for piece in COMPARED)


def component(**options: Any) -> tuple[Component, Any]:
    """The term and its file, or a skip that says it is not built yet."""
    found = term("policy_gradient", **options)
    return found, catalogue().component("term", found.name).load()


def advantages_of_trl(case: Case) -> None:
    """Without clipping, scaling or whitening."""
    found, (_, file) = _stored(case), component()
    mask, hyper = found["mask"].bool(), case["hyper"]
    reward = file.rewards(found["teacher_logprobs"], found["student_logprobs"], mask, 1.0, math.inf)
    returns = "discounted" if hyper["length_normalization"] else "absolute"
    _agree(case, file.advantages(reward, mask, hyper["gamma"], returns), "advantages")


def policy_gradient_of_lmops(case: Case) -> None:
    """From rewards that are given clipped: advantages, whitened ones, the loss with its gradient, and k3."""
    found, hyper, world = _stored(case), case["hyper"], World(getattr(torch, case["dtype"]))
    chosen, file = component(clip_ratio=hyper["cliprange"])
    mask = found["mask"].bool()
    unwhitened = file.advantages(found["rewards_clipped"], mask, hyper["gamma"])
    _agree(case, unwhitened, "advantages_unwhitened")
    advantage = file.whitened(unwhitened)
    _agree(case, advantage, "advantages")
    extra = {"advantage": advantage, "old_log_prob": found["old_logprobs"], "importance": found["w"]}
    terms = world.terms([chosen], batch=world.batch(scored_in_place(world, mask, extra)))
    compare(terms, world, stored(case), "", case["tolerance"])
    log_p, log_q = (
        logits.detach().log_softmax(-1).gather(-1, world.ids[..., None]).squeeze(-1)
        for logits in (world.teacher, world.student)
    )
    _agree(case, file.reverse_kl_estimate(log_p, log_q, mask), "rev_kl_k3")
    _agree(case, file.rewards(log_p, log_q, mask, 1.0, hyper["clip_reward"]), "rewards_clipped")


def scored_in_place(world: World, mask: Tensor, extra: Mapping[str, Tensor]) -> Part:
    """A part whose logits at t score the stored id at t, as these cases have it, and not the one at t + 1.

    The last position predicts nothing, and nothing is expected of it.
    """
    assert not mask[:, -1].any()
    wanted = world.ids.masked_fill(~mask, IGNORED)
    labels = torch.cat([torch.full_like(wanted[:, :1], IGNORED), wanted[:, :-1]], 1)
    return replace(world.part, labels=labels, extra={name: values[:, :-1] for name, values in extra.items()})


def _stored(case: Case) -> dict[str, Tensor]:
    return {name: torch.as_tensor(values) for name, values in stored(case).items()}


def _agree(case: Case, actual: Tensor, name: str) -> None:
    near = {"relative": case["tolerance"]["loss_rtol"], "absolute": case["tolerance"]["loss_atol"]}
    agree(actual, stored(case)[name], **near, what=name)


# By what the stored function is called.
COMPARED: dict[str, Callable[[Case], None]] = {
    "._compute_advantage": advantages_of_trl,
    "._pg_loss": policy_gradient_of_lmops,
}


@pytest.mark.parametrize("case", cases(claims), ids=name_of)
def test_minillm_equals_the_official_one(case: Case) -> None:
    next(check for piece, check in COMPARED.items() if piece in case["function"])(case)
