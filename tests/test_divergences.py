"""Divergences between teacher and student: numbers worked out by hand, what holds for all of them, and what for each.

``p`` is the teacher's distribution and ``q`` the student's. A term is called as the loop calls it: a divergence with
log-probabilities at its temperature, what is made from raw logits with ``Tokens``, DIST with a ``View``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import exp, log
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.data import Part
from methods.distill._mixture import Mixture
from methods.distill._sources import Live
from methods.find import catalogue
from methods.gradient import Batch, Gradient
from methods.stage import AssayError, Component, Parent, Term
from methods.term import Tokens, akl, dist, flags, logit_standardised_kl, of, student_top_k, taid
from methods.term._divergences import mixture
from methods.terms import relative_entropy, total
from tests.generic import resolved
from tests.parity.cases import Table

# The terms of this file that are a function of two distributions, with options that make each one itself.
DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"share": 0.3},
    "jsd": {"beta": 0.3},
    "skew_forward_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
    "tvd": {},
    "akl": {"mu": 0.4},
    "student_top_k": {"entries": 3, "beta": 0.5},
}
# Terms made from raw logits.
OF_LOGITS: dict[str, dict[str, Any]] = {
    "taid": {},
    "dkd": {"beta": 2.0},
    "logit_standardised_kl": {},
    "sampled_reverse_kl": {},
}
# Those whose value is a cross-entropy, or none at all.
NOT_A_DIVERGENCE = ("taid", "sampled_reverse_kl")
# Those in which a weight or a target is a constant for the gradient, on purpose.
PARTLY_CONSTANT = ("akl", "taid", "sampled_reverse_kl")
EVERY = {**DIVERGENCES, **OF_LOGITS}


def module_of(name: str) -> ModuleType:
    return catalogue().component("term", name).load()


def losses(
    name: str, student: Tensor, teacher: Tensor, targets: Tensor | None = None, **options: Any
) -> Tensor:
    """A term's loss of each token [n] from raw logits [n,V]; targets are 0 where none are given."""
    module = module_of(name)
    config = module.Config(**(EVERY[name] | options))
    if name in DIVERGENCES:
        log_p, log_q = ((logits / config.temperature).log_softmax(-1) for logits in (teacher, student))
        return module.divergence(config, log_p, log_q)
    values = module.start(config) if hasattr(module, "start") else {}
    aims = targets if targets is not None else torch.zeros(len(student), dtype=torch.int64)
    found = module.token_losses(config, Tokens(student=student, teacher=teacher, targets=aims, values=values))
    return found["loss"] if isinstance(found, dict) else found


def logits(*probabilities: float) -> Tensor:
    """One token's log-probabilities [1,V] in float64."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


def random_logits(number: int = 40, entries: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Teacher's and student's, some near and some far from each other."""
    generator = torch.Generator().manual_seed(seed)
    teacher, other = torch.randn(2, number, entries, generator=generator, dtype=torch.float64) * 2
    return teacher, teacher + torch.linspace(0.01, 3, number, dtype=torch.float64)[:, None] * other


# --- by hand --------------------------------------------------------------------------------------------------

P, Q = (1 / 2, 3 / 8, 1 / 8), (3 / 16, 1 / 16, 3 / 4)


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


def mixed(share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(P, Q, strict=True)]


FORWARD, REVERSE = kl(P, Q), kl(Q, P)
CROSS_ENTROPY = -sum(a * log(b) for a, b in zip(P, Q, strict=True))
# sqrt(p q), before it is brought to a sum of 1
MIDDLE = [math.sqrt(a * b) for a, b in zip(P, Q, strict=True)]

BY_HAND: list[tuple[str, dict[str, Any], float]] = [
    ("forward_kl", {}, 0.5 * log(8 / 3) + 0.375 * log(6) - 0.125 * log(6)),
    ("reverse_kl", {}, 3 / 16 * log(3 / 8) - 1 / 16 * log(6) + 0.75 * log(6)),
    ("symmetric_kl", {"share": 0.9}, 0.1 * FORWARD + 0.9 * REVERSE),
    ("jsd", {"beta": 0.3}, 0.3 * kl(P, mixed(0.3)) + 0.7 * kl(Q, mixed(0.3))),
    ("jsd", {"beta": 0.0}, FORWARD),
    ("jsd", {"beta": 1.0}, REVERSE),
    ("skew_forward_kl", {"skew": 0.1}, kl(P, mixed(0.1))),
    ("skew_forward_kl", {"skew": 0.0}, FORWARD),
    ("skew_reverse_kl", {"skew": 0.1}, kl(Q, mixed(0.9))),
    ("skew_reverse_kl", {"skew": 0.0}, REVERSE),
    ("tvd", {}, 5 / 8),
    # The gaps are 5/16, 5/16 and 5/8; the head is the first entry, or the first two.
    ("akl", {"mu": 0.4}, 0.25 * FORWARD + 0.75 * REVERSE),
    ("akl", {"mu": 0.6}, 0.25 * FORWARD + 0.75 * REVERSE),
    ("akl", {"mu": 0.9}, 0.5 * FORWARD + 0.5 * REVERSE),
    # Upwards 1/8, 1/2, 1: the mask is on the third, and so is taken the third gap.
    ("akl", {"mu": 0.6, "variant": "taid"}, 0.5 * CROSS_ENTROPY + 0.5 * REVERSE),
    # The student's likeliest entries are the third, and then the first.
    ("student_top_k", {"entries": 1, "beta": 0.0}, kl((1 / 8, 7 / 8), (3 / 4, 1 / 4))),
    ("student_top_k", {"entries": 1, "beta": 1.0}, kl((3 / 4, 1 / 4), (1 / 8, 7 / 8))),
    ("student_top_k", {"entries": 2, "beta": 0.0, "rest": "renormalised"}, kl((0.2, 0.8), (0.8, 0.2))),
    ("student_top_k", {"entries": 3, "beta": 0.0}, FORWARD),
    ("taid", {"t_start": 0.5}, -sum(m * log(q) for m, q in zip(MIDDLE, Q, strict=True)) / sum(MIDDLE)),
    # Target 0: (1/2, 1/2) against (3/16, 13/16); of the others (3/4, 1/4) against (1/13, 12/13).
    ("dkd", {"alpha": 1.0, "beta": 0.0}, kl((1 / 2, 1 / 2), (3 / 16, 13 / 16))),
    ("dkd", {"alpha": 0.0, "beta": 1.0}, kl((3 / 4, 1 / 4), (1 / 13, 12 / 13))),
    ("sampled_reverse_kl", {}, log(3 / 8) * log(3 / 16)),
]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_a_term_by_hand(name: str, options: dict[str, Any], expected: float) -> None:
    found = losses(name, logits(*Q), logits(*P), **options)
    assert found.shape == (1,) and found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_standardised_logits_by_hand() -> None:
    # (0, 1, 2) and (25, 15, 5) become (-1, 0, 1) and (1, 0, -1): log p - log q is 2 z.
    teacher, student = (torch.tensor([row]) for row in ([0.0, 1.0, 2.0], [25.0, 15.0, 5.0]))
    expected = 2 * (exp(1) - exp(-1)) / (1 + exp(1) + exp(-1))
    found = losses("logit_standardised_kl", student, teacher)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_each_of_these_terms_has_a_number_by_hand() -> None:
    assert {name for name, *_ in BY_HAND} | {"logit_standardised_kl"} == EVERY.keys()


@pytest.mark.parametrize(
    "name", ["forward_kl", "tvd", "dkd", "logit_standardised_kl", "akl", "student_top_k"]
)
def test_a_temperature_softens_both_models(name: str) -> None:
    teacher, student = random_logits()
    if name == "logit_standardised_kl":
        # Standardised first, so dividing the logits changes nothing; 0 for equal rows at any temperature.
        warm, cold = (losses(name, student, teacher, temperature=t) for t in (2.0, 1.0))
        assert bool((warm < cold).all())
        return
    warm = losses(name, student, teacher, temperature=2.0)
    torch.testing.assert_close(warm, losses(name, student / 2, teacher / 2))


def test_the_temperature_squared_goes_into_the_weight() -> None:
    """The logged value stays what the divergence is."""
    teacher, student = random_logits(6, 5)
    for name in ("dkd", "logit_standardised_kl"):
        found = engine([of(name, temperature=3.0, weight=0.5)], student, teacher)[name]
        assert found.weight == 4.5


# --- what holds for all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in EVERY if name not in NOT_A_DIVERGENCE])
def test_a_divergence_is_never_below_0_and_0_for_equal_models(name: str) -> None:
    teacher, student = random_logits()
    assert bool((losses(name, student, teacher) > 1e-9).all())
    assert float(losses(name, teacher + 3.0, teacher).abs().max()) < 1e-14


@pytest.mark.parametrize("name", [*EVERY, "akl of taid", "student_top_k renormalised"])
def test_the_gradient_adds_up_to_0_over_the_vocabulary(name: str) -> None:
    name, _, variant = name.partition(" ")
    options = {"of taid": {"variant": "taid"}, "renormalised": {"rest": "renormalised"}}.get(variant, {})
    teacher, student = random_logits()
    student.requires_grad_()
    losses(name, student, teacher, **options).sum().backward()
    assert student.grad is not None
    assert float(student.grad.abs().max()) > 1e-3
    assert float(student.grad.sum(-1).abs().max()) < 1e-12


@pytest.mark.parametrize("name", [name for name in EVERY if name not in PARTLY_CONSTANT])
def test_the_gradient_is_that_of_the_value(name: str) -> None:
    """Against finite differences."""
    teacher, student = random_logits(3, 5)
    assert torch.autograd.gradcheck(lambda z: losses(name, z, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", EVERY)
def test_a_padded_vocabulary_changes_neither_value_nor_gradient(name: str) -> None:
    teacher, student = random_logits(12, 6)
    padding = torch.full((12, 3), -math.inf, dtype=torch.float64)
    plain, padded = student.clone().requires_grad_(), torch.cat([student, padding], -1).requires_grad_()
    value = losses(name, plain, teacher)
    same = losses(name, padded, torch.cat([teacher, padding], -1))
    torch.testing.assert_close(same, value)
    value.sum().backward()
    same.sum().backward()
    assert plain.grad is not None and padded.grad is not None
    torch.testing.assert_close(padded.grad[:, :6], plain.grad)
    assert bool((padded.grad[:, 6:] == 0).all())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_entry_that_one_model_lacks_leaves_finite_numbers(name: str, side: str) -> None:
    teacher, student = random_logits(12, 6)
    (student if side == "student" else teacher)[:, 4:] = -math.inf
    student.requires_grad_()
    found = losses(name, student, teacher)
    found.sum().backward()
    assert bool(found.isfinite().all()) and student.grad is not None and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [40.0, 3000.0])
def test_certain_and_wrong_models_keep_finite_losses_and_gradients(name: str, size: float) -> None:
    """Probabilities that are 0 in float32 have logarithms still."""
    rows = torch.tensor([[1.0, 0.0, -1.0, 0.5], [-1.0, 1.0, 0.0, 0.2], [1.0, 1.0, 1.0, 1.0]]) * size
    student = rows.roll(1, 0).requires_grad_()
    found = losses(name, student, rows)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all()) and student.grad is not None and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", EVERY)
def test_no_token_has_no_loss(name: str) -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    found = losses(name, empty, torch.zeros(0, 5))
    found.sum().backward()
    assert found.shape == (0,) and empty.grad is not None


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if flags(module_of(name)).top_k])
def test_merging_entries_never_raises_a_divergence_that_takes_a_top_k(name: str) -> None:
    """The tail in one bucket gives a lower bound (data processing inequality)."""
    teacher, student = random_logits()
    module = module_of(name)
    config = module.Config(**DIVERGENCES[name])
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    for k in (1, 3, 9):
        chosen = log_p.topk(k).indices
        merged = (with_tail(values, chosen) for values in (log_p, log_q))
        assert bool(
            (module.divergence(config, *merged) <= module.divergence(config, log_p, log_q) + 1e-12).all()
        )


def with_tail(log_values: Tensor, chosen: Tensor) -> Tensor:
    """Some entries, and the logarithm of all the others' mass."""
    rest = 1 - log_values.gather(-1, chosen).exp().sum(-1, keepdim=True)
    return torch.cat([log_values.gather(-1, chosen), rest.log()], -1)


def test_the_terms_that_need_the_whole_vocabulary_take_no_top_k() -> None:
    needing = ("akl", "dkd", "dist", "taid", "logit_standardised_kl", "student_top_k", "sampled_reverse_kl")
    assert not any(flags(module_of(name)).top_k for name in needing)
    assert flags(module_of("dist")).whole_batch and flags(module_of("sampled_reverse_kl")).sampled


# --- what holds for each --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.02, 0.3, 0.5, 0.9])
def test_jsd_is_at_most_the_entropy_of_its_mixture(beta: float) -> None:
    bound = -beta * log(beta) - (1 - beta) * log(1 - beta)
    teacher, student = (size * random_logits()[place] for place, size in ((0, 1.0), (1, 9.0)))
    assert float(losses("jsd", student, teacher, beta=beta).max()) <= bound
    apart = (torch.tensor([row]) for row in ([80.0, -80.0], [-80.0, 80.0]))
    assert float(losses("jsd", *apart, beta=beta)) == pytest.approx(bound, rel=1e-6)


def test_jsd_turned_round_is_jsd_with_the_other_share() -> None:
    teacher, student = random_logits()
    turned = losses("jsd", teacher, student, beta=0.7)
    torch.testing.assert_close(losses("jsd", student, teacher, beta=0.3), turned)


def test_jsd_over_its_share_goes_to_the_forward_kl() -> None:
    teacher, student = random_logits()
    wanted = losses("forward_kl", student, teacher)
    found = [losses("jsd", student, teacher, beta=beta) / beta for beta in (1e-3, 1e-5, 1e-7)]
    errors = [float(((values - wanted) / wanted).abs().median()) for values in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5


def test_tvd_lies_between_0_and_1() -> None:
    teacher, student = random_logits()
    found = losses("tvd", 20 * student, teacher)
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    apart = (torch.tensor([row]) for row in ([80.0, -80.0], [-80.0, 80.0]))
    assert float(losses("tvd", *apart)) == 1


@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("skew", [0.1, 0.5])
def test_a_skewed_divergence_is_at_most_the_logarithm_of_its_skew(name: str, skew: float) -> None:
    apart = (torch.tensor([row]) for row in ([80.0, -80.0], [-80.0, 80.0]))
    assert float(losses(name, *apart, skew=skew)) == pytest.approx(-log(skew), rel=1e-6)
    teacher, student = random_logits()
    assert float(losses(name, 9 * student, teacher, skew=skew).max()) <= -log(skew)


def test_the_gradients_of_both_kl_are_the_closed_forms() -> None:
    teacher, student = random_logits()
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    reverse = relative_entropy(log_q, log_p)
    for name, expected in (("forward_kl", q - p), ("reverse_kl", q * (log_q - log_p - reverse[:, None]))):
        leaf = student.clone().requires_grad_()
        losses(name, leaf, teacher).sum().backward()
        torch.testing.assert_close(leaf.grad, expected)


def test_a_mixture_lies_between_and_has_a_slope_where_nothing_is() -> None:
    log_p = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    log_q = torch.tensor([[0.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    mixture(log_p, log_q, 0.25)[0, 0].backward()
    assert log_q.grad is not None and log_q.grad.tolist()[0] == pytest.approx([0.75, 0.0])


# --- adaptive KL ----------------------------------------------------------------------------------------------


def test_the_shares_of_adaptive_kl_lie_between_0_and_1_and_are_constants() -> None:
    teacher, student = random_logits()
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    share = akl.head_share(log_p, log_q, 0.4)
    assert float(share.min()) >= 0 and float(share.max()) <= 1
    leaf = student.clone().requires_grad_()
    losses("akl", leaf, teacher).sum().backward()
    fixed = student.clone().requires_grad_()
    forward, reverse = (losses(name, fixed, teacher) for name in ("forward_kl", "reverse_kl"))
    (share * forward + (1 - share) * reverse).sum().backward()
    torch.testing.assert_close(leaf.grad, fixed.grad)


@pytest.mark.parametrize("variant", ["published", "taid"])
def test_adaptive_kl_shares_in_halves_where_there_is_no_gap(variant: str) -> None:
    log_p = logits(*P)
    assert float(akl.head_share(log_p, log_p, 0.5)) == 0.5
    leaf = log_p.clone().requires_grad_()
    losses("akl", leaf, log_p, variant=variant).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


# --- TAID -----------------------------------------------------------------------------------------------------


def schedule(means: Sequence[float], **options: Any) -> list[float]:
    """t after each step."""
    config = taid.Config(**options)
    values: Mapping[str, float] = taid.start(config)
    found = []
    for step, mean in enumerate(means):
        values = taid.after(config, values, mean, step, len(means))
        found.append(values["t"])
    return found


def test_the_first_step_only_leaves_its_loss_behind() -> None:
    config = taid.Config()
    assert taid.after(config, taid.start(config), 3.0, 0, 10) == {"t": 0.4, "momentum": 0.0, "previous": 3.0}


def test_the_second_step_by_hand() -> None:
    config = taid.Config(alpha=0.5, beta=0.75)
    values = taid.after(config, {"t": 0.4, "momentum": 0.1, "previous": 2.0}, 1.5, 1, 10)
    momentum = 0.75 * 0.1 + 0.25 * 0.25
    assert values["momentum"] == pytest.approx(momentum)
    assert values["t"] == pytest.approx(0.4 + 0.5 / (1 + exp(-momentum)) * 0.6)
    assert values["previous"] == 1.5


@pytest.mark.parametrize("means", [[3 / (1 + step) for step in range(30)], [1.1**step for step in range(30)]])
@pytest.mark.parametrize("alpha", [5e-4, 0.3])
def test_t_never_falls_and_never_lies_below_the_straight_line(means: list[float], alpha: float) -> None:
    found = schedule(means, alpha=alpha, t_end=0.9)
    assert found == sorted(found) and found[-1] <= 0.9
    line = [0.4 + 0.5 * step / 30 for step in range(30)]
    assert all(t >= least - 1e-15 for t, least in zip(found[1:], line[1:], strict=True))


def test_a_falling_loss_moves_t_faster_than_a_rising_one() -> None:
    falling, rising = (schedule(means, alpha=1.0, beta=0.5) for means in ([4, 2, 1, 0.5], [1, 2, 4, 8]))
    assert falling[1:] > rising[1:] and falling[1] > rising[1]


def test_losses_of_0_and_leaps_leave_t_a_number() -> None:
    for means in ([0.0, 0.0, 0.0], [1e-300, 1e300, 1e-300]):
        assert all(0.4 <= t <= 1 for t in schedule(means, alpha=1.0, beta=0.0))


def test_at_the_end_the_target_is_the_teacher_and_at_the_start_the_student() -> None:
    teacher, student = random_logits()
    torch.testing.assert_close(taid.target(student, teacher, 1.0), teacher.log_softmax(-1))
    torch.testing.assert_close(taid.target(student, teacher, 0.0), student.log_softmax(-1))


def test_the_gradient_of_taid_is_the_student_less_its_target() -> None:
    teacher, student = random_logits()
    leaf = student.clone().requires_grad_()
    losses("taid", leaf, teacher).sum().backward()
    target = (0.6 * student + 0.4 * teacher).softmax(-1)
    torch.testing.assert_close(leaf.grad, student.softmax(-1) - target)


def test_a_start_above_the_end_is_refused_with_a_sentence() -> None:
    with pytest.raises(AssayError, match=r"t_start \(0.9\) is above t_end \(0.5\).*lower t_start"):
        taid.Config(t_start=0.9, t_end=0.5)


def test_taid_moves_once_a_step_by_the_mean_over_the_global_batch() -> None:
    """Micro-batches change neither the gradient nor where t goes."""
    teacher, student = random_logits(16, 5)
    found = []
    for micro_batch in (None, 1):
        numbers = Mixture([of("taid", alpha=0.5)]).adaptive(10)
        assert numbers is not None
        values: Mapping[str, float] = numbers.start
        for step in range(3):
            means, _ = accumulated("taid", {"alpha": 0.5}, student / (1 + step), teacher, micro_batch, values)
            values = numbers.after({**values, "step": float(step)}, means)
        found.append(values)
    assert found[0].keys() == {"taid.t", "taid.momentum", "taid.previous"}
    assert found[0] == pytest.approx(found[1], rel=1e-12)


# --- decoupled KD ---------------------------------------------------------------------------------------------


def test_the_kl_is_the_targets_part_and_the_others_part_times_the_teachers_doubt() -> None:
    teacher, student = random_logits()
    targets = torch.arange(len(teacher)) % teacher.shape[1]
    parts = [losses("dkd", student, teacher, targets, alpha=a, beta=1.0 - a) for a in (1.0, 0.0)]
    doubt = 1 - teacher.softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(parts[0] + doubt * parts[1], losses("forward_kl", student, teacher))


def test_dkd_shows_its_parts_without_their_weights() -> None:
    teacher, student = random_logits(6, 5)
    found = engine([of("dkd", alpha=2.0, beta=3.0)], student, teacher)
    assert found.keys() == {"dkd", "dkd.target", "dkd.others"}
    assert [found[name].weight for name in found] == [1.0, 0.0, 0.0]
    sums = {name: float(term.sum.detach()) for name, term in found.items()}
    assert sums["dkd"] == pytest.approx(2 * sums["dkd.target"] + 3 * sums["dkd.others"])


def test_logits_further_apart_than_1000_are_no_trouble_for_dkd() -> None:
    """Subtracting 1000 from the target's logit would leave it the likeliest here."""
    teacher = torch.tensor([[5000.0, 1.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[4000.0, 0.0, 1.0]], dtype=torch.float64)
    sure = exp(1) / (1 + exp(1))
    expected = kl((sure, 1 - sure), (1 - sure, sure))
    assert float(losses("dkd", student, teacher, alpha=0.0, beta=1.0)) == pytest.approx(expected)


# --- DIST -----------------------------------------------------------------------------------------------------


def test_dist_by_hand() -> None:
    """Two tokens, two entries: what one entry gains the other loses, so every correlation is 1 or -1."""
    teacher = torch.tensor([[0.8, 0.2], [0.6, 0.4]], dtype=torch.float64).log()
    student = torch.tensor([[0.7, 0.3], [0.9, 0.1]], dtype=torch.float64).log()
    found = engine([of("dist", beta=2.0, gamma=3.0)], student, teacher)
    # Both tokens prefer the first entry in both models; between the tokens the models disagree.
    inter, intra = found["dist.inter"], found["dist.intra"]
    assert float(inter.sum.detach() / inter.count) == pytest.approx(0, abs=1e-6)
    assert float(intra.sum.detach() / intra.count) == pytest.approx(2, abs=1e-5)
    assert (inter.weight, intra.weight) == (2.0, 3.0)


@pytest.mark.parametrize("epsilon", ["added", "clamped"])
def test_dist_is_0_for_equal_logits(epsilon: str) -> None:
    teacher, _ = random_logits()
    found = engine([of("dist", epsilon=epsilon)], teacher + 2.0, teacher)
    assert all(float((term.sum / term.count).detach()) < 1e-5 for term in found.values())


def test_dist_does_not_see_a_padded_vocabulary() -> None:
    teacher, student = random_logits(6, 5)
    padding = torch.full((6, 3), -math.inf, dtype=torch.float64)
    plain = engine([of("dist")], student, teacher)
    padded = engine([of("dist")], torch.cat([student, padding], -1), torch.cat([teacher, padding], -1))
    for name, term in plain.items():
        torch.testing.assert_close(padded[name].sum / padded[name].count, term.sum / term.count)


def test_entries_that_do_not_vary_have_a_finite_gradient_in_dist() -> None:
    for rows in (1, 3):
        student = torch.zeros(rows, 4, dtype=torch.float64, requires_grad=True)
        found = engine([of("dist")], student, torch.zeros(rows, 4, dtype=torch.float64))
        sum(term.sum for term in found.values()).backward()
        assert student.grad is not None and bool(student.grad.isfinite().all())


def test_dist_of_no_token_is_0() -> None:
    student = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    found = engine([of("dist")], student, torch.zeros(3, 4, dtype=torch.float64), labels=[-100, -100, -100])
    assert {name: float(term.sum.detach()) for name, term in found.items()} == {
        "dist.inter": 0,
        "dist.intra": 0,
    }


def test_the_correlation_is_pearsons() -> None:
    first, second = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(first, second, strict=True)]
    )
    for epsilon in ("added", "clamped"):
        torch.testing.assert_close(dist.correlation(dist.Config(epsilon=epsilon), first, second), expected)


# --- standardised logits --------------------------------------------------------------------------------------


def test_standardised_logits_do_not_change_where_logits_are_moved_and_stretched() -> None:
    teacher, student = random_logits()
    moved = losses("logit_standardised_kl", 4 * student - 3, 0.5 * teacher + 7)
    torch.testing.assert_close(moved, losses("logit_standardised_kl", student, teacher), rtol=1e-5, atol=1e-6)


def test_standardised_logits_have_mean_0_and_the_unbiased_deviation_1() -> None:
    found = logit_standardised_kl.standardised(random_logits()[0])
    assert float(found.mean(-1).abs().max()) < 1e-12
    assert float((found.std(-1) - 1).abs().max()) < 1e-6


def test_equal_logits_standardise_to_0_with_a_finite_gradient() -> None:
    rows = torch.full((2, 4), 3.0, requires_grad=True)
    found = logit_standardised_kl.standardised(rows)
    found.sum().backward()
    assert bool((found == 0).all()) and rows.grad is not None and bool(rows.grad.isfinite().all())


# --- one token in the place of the vocabulary -----------------------------------------------------------------


def test_sampled_reverse_kl_has_the_gradient_of_reverse_kl_on_average() -> None:
    """The mean over every token that the student might have drawn."""
    teacher, student = random_logits(8, 5)
    leaf, whole = student.clone().requires_grad_(), student.clone().requires_grad_()
    chances = student.softmax(-1)
    for token in range(5):
        targets = torch.full((8,), token)
        (chances[:, token] * losses("sampled_reverse_kl", leaf, teacher, targets)).sum().backward()
    losses("reverse_kl", whole, teacher).sum().backward()
    torch.testing.assert_close(leaf.grad, whole.grad)


def test_its_estimate_is_the_reverse_kl_on_average() -> None:
    teacher, student = random_logits(8, 5)
    module = module_of("sampled_reverse_kl")
    average = sum(
        student.softmax(-1)[:, token]
        * module.token_losses(
            module.Config(), Tokens(student=student, teacher=teacher, targets=torch.full((8,), token))
        )["estimate"]
        for token in range(5)
    )
    torch.testing.assert_close(average, losses("reverse_kl", student, teacher))


# --- the student's largest entries ----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_with_its_tail_the_students_top_k_is_a_lower_bound_that_grows_with_k(beta: float) -> None:
    teacher, student = random_logits()
    found = [losses("student_top_k", student, teacher, entries=k, beta=beta) for k in (11, 10, 1)]
    torch.testing.assert_close(found[0], losses("jsd", student, teacher, beta=beta))
    torch.testing.assert_close(found[1], found[0])  # the tail is one entry
    assert bool((found[2] <= found[0] + 1e-12).all())


def test_a_tail_too_small_for_1_minus_the_sum_keeps_its_digits() -> None:
    rows = torch.tensor([[50.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    config = student_top_k.Config(entries=1, beta=0.0)
    teacher = torch.zeros(1, 3, dtype=torch.float64).log_softmax(-1)
    value = student_top_k.divergence(config, teacher, rows.log_softmax(-1))
    assert float(value.detach()) == pytest.approx(kl((1 / 3, 2 / 3), (1.0, 2 * exp(-50))), rel=1e-12)


# --- mode seeking ---------------------------------------------------------------------------------------------

GRID = torch.linspace(-6, 6, 121, dtype=torch.float64)
MEANS, DEVIATIONS = torch.arange(-4, 4.01, 0.05).double(), torch.arange(0.3, 6, 0.05).double()
SEEKING: list[tuple[str, dict[str, Any], float, float]] = [
    ("forward_kl", {}, -1.15, 4.18),
    ("reverse_kl", {}, -3.0, 0.6),
    ("skew_reverse_kl", {"skew": 0.1}, -3.0, 0.6),
    ("jsd", {"beta": 0.5}, -3.0, 0.6),
    ("tvd", {}, -2.8, 0.95),
]


def gaussians(means: Tensor, deviations: Tensor) -> Tensor:
    """Log-probabilities [n,121] of Gaussians on the grid."""
    return (-0.5 * ((GRID - means[:, None]) / deviations[:, None]).square()).log_softmax(-1)


@pytest.mark.parametrize(("name", "options", "mean", "deviation"), SEEKING)
def test_one_gaussian_covers_both_modes_or_seeks_one(
    name: str, options: dict[str, Any], mean: float, deviation: float
) -> None:
    """Teacher 0.6 N(-3, 0.6) + 0.4 N(3, 0.6): forward KL covers both modes, the others choose the larger one.

    The best of all students on a grid of means and deviations. Of TVD the bottom is flat: 0.39987 where it is, 0.4 at
    (-3, 0.6).
    """
    density = (
        torch.tensor([0.6, 0.4], dtype=torch.float64).log()[:, None]
        - 0.5 * ((GRID - torch.tensor([[-3.0], [3.0]])) / 0.6).square()
    )
    teacher = density.logsumexp(0).log_softmax(-1)
    pairs = torch.cartesian_prod(MEANS, DEVIATIONS)
    students = gaussians(pairs[:, 0], pairs[:, 1])
    module = module_of(name)
    values = module.divergence(module.Config(**options), teacher.expand_as(students), students)
    best = pairs[int(values.argmin())]
    assert best.tolist() == pytest.approx([mean, deviation], abs=0.03)


# --- in the engine --------------------------------------------------------------------------------------------


def engine(
    terms: Sequence[Component],
    student: Tensor,
    teacher: Tensor,
    labels: Sequence[int] | None = None,
    block_tokens: int | None = None,
) -> dict[str, Term]:
    """What a mixture makes of models that are tables: each row is what one answer token is predicted from."""
    mixture = Mixture(terms, block_tokens=block_tokens)
    numbers = mixture.adaptive(10)
    batch = SimpleNamespace(train=one_row(student, labels), values=numbers.start if numbers else {})
    return mixture.terms(Table(student), Live(Table(teacher)), batch)


def one_row(student: Tensor, labels: Sequence[int] | None = None) -> Part:
    """One sequence that has a position more than the table has rows, of which the last predicts nothing."""
    rows = len(student)
    aims = torch.tensor([[-100, *(labels or [row % student.shape[1] for row in range(rows)])]])
    ids = torch.arange(rows + 1).clamp(max=rows - 1)[None]
    return Part(input_ids=ids, attention_mask=torch.ones_like(ids), labels=aims, name="train")


def accumulated(
    name: str,
    options: dict[str, Any],
    student: Tensor,
    teacher: Tensor,
    micro_batch: int | None,
    values: Mapping[str, float] | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Means, and the gradient for the table, of a batch of four rows of which one has a single answer token."""
    table = nn.Embedding.from_pretrained(student, freeze=False)
    ids = torch.arange(len(student)).view(4, -1)
    labels = (ids % student.shape[1]).clone()
    labels[0, :-1] = -100
    part = Part(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, name="train")
    mixture = Mixture([of(name, **options)])
    source = Live(Table(teacher))

    def loss(model: Any, batch: Batch) -> dict[str, Term]:
        return mixture.terms(lambda input_ids, **_: SimpleNamespace(logits=model(input_ids)), source, batch)

    gradient = Gradient(table, loss, micro_batch=micro_batch)
    means = gradient({"train": part}, 0, 10, values)
    assert table.weight.grad is not None
    return means, table.weight.grad


@pytest.mark.parametrize("name", EVERY)
def test_one_piece_or_four_micro_batches_give_one_gradient(name: str) -> None:
    teacher, student = random_logits(16, 5)
    adaptive = Mixture([of(name, **EVERY[name])]).adaptive(10)
    values = adaptive.start if adaptive is not None else None
    (means, whole), (pieces, parts) = (
        accumulated(name, EVERY[name], student, teacher, micro_batch, values) for micro_batch in (None, 1)
    )
    assert means == pytest.approx(pieces, rel=1e-12)
    torch.testing.assert_close(whole, parts)
    assert float(whole.abs().max()) > 0


@pytest.mark.parametrize("name", [*EVERY, "dist"])
def test_a_part_without_an_answer_has_a_loss_of_0_and_no_gradient(name: str) -> None:
    teacher, student = random_logits(3, 5)
    student.requires_grad_()
    value = total(engine([of(name)], student, teacher, labels=[-100, -100, -100]))
    value.backward()
    assert float(value.detach()) == 0
    assert student.grad is None or float(student.grad.abs().max()) == 0


def test_a_block_of_any_size_gives_the_same() -> None:
    teacher, student = random_logits(7, 5)
    found = []
    for size in (1, 3, 7):
        leaf = student.clone().requires_grad_()
        value = total(engine([of(name, **EVERY[name]) for name in EVERY], leaf, teacher, block_tokens=size))
        value.backward()
        found.append((float(value.detach()), leaf.grad))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, found[0][1])


# --- refused before anything is loaded --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "place"),
    [(name, {"temperature": 0.0}, "temperature") for name in EVERY if name not in NOT_A_DIVERGENCE]
    + [
        ("dist", {"temperature": -1.0}, "temperature"),
        ("jsd", {"beta": 1.1}, "beta"),
        ("skew_reverse_kl", {"skew": 1.0}, "skew"),
        ("akl", {"mu": 0.0}, "mu"),
        ("student_top_k", {"entries": 0}, "entries"),
        ("taid", {"t_start": 1.0}, "t_start"),
    ],
)
def test_a_value_outside_its_range_is_refused_with_its_name(
    name: str, options: dict[str, Any], place: str
) -> None:
    with pytest.raises(AssayError, match=place):
        resolved(catalogue().components[f"term.{name}"], options)


def test_dist_is_refused_where_a_batch_is_taken_in_pieces() -> None:
    options: dict[str, Any] = {
        "teacher": Parent("model.new-000000000000"),
        "terms": (of("dist"),),
        "batch": 4,
    }
    mix = catalogue().method("distill.mix").load()
    mix.Config(**options)
    with pytest.raises(AssayError, match=r"dist compares all rows of a batch.*micro_batch"):
        mix.Config(**options, micro_batch=2)


def test_a_term_for_the_students_own_text_is_refused_where_it_writes_none() -> None:
    with pytest.raises(AssayError, match="works only on text that the student wrote"):
        catalogue().method("distill.mix").load().Config(
            teacher=Parent("model.new-000000000000"), terms=(of("sampled_reverse_kl"),)
        )
