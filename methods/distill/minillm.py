"""MiniLLM: the reverse KL over whole sequences, by policy gradient on what student and teacher write together.

Gu, Dong, Wei, Huang 2024, "MiniLLM: Knowledge Distillation of Large Language Models". With p the teacher, q the student
and rollouts y drawn token by token from the mixture (1 - a) * q + a * p, a = ``teacher_share``:

    L = single_step * 1/M sum_t D( q ‖ p )[t]                                        exact, with its gradient through q
      + 1/M sum_t max( -A_t * r_t, -A_t * clip(r_t, 1 - clip_ratio, 1 + clip_ratio) )     methods.term.policy_gradient
      + language_model * ( (1 - kd_share) * CE + kd_share * D( p ‖ q ) )                    on the rows of ``data``
    r_t = q(y_t)/q_old(y_t) * w_t,    w_t = q_old(y_t) / mixture(y_t)
    A_t = sum_{i>=t} gamma**(i-t) R_i / (tokens left),     R_i = clip( (log p(y_i) - log q_old(y_i)) / reward_scale )

A set of ``rollouts`` is written at a time and gone through ``passes`` times in batches, each pass in another order;
q_old is the student that wrote it. A is whitened over the batch, over every position up to ``max_new_tokens``, also
those after the end of an answer, with the unbiased variance: so it is in microsoft/LMOps, whose GPT-2 scripts the
numbers are from. Its division by the tokens left is always on (its flag ``length-norm`` changes logged numbers alone),
and so is the importance weight inside the clipping. ``passes`` are its ppo-epochs, ``kd_share`` its kd-ratio. There the
third line is on a corpus of plain text, and its D a cross-entropy, of the same gradient.

huggingface/trl's trainer: ``returns="absolute"`` or, with length normalisation, ``"discounted"``, gamma 0 by default,
``whiten=False, teacher_share=0.0, language_model=0.0``. Its mask lets the padding behind an answer into D( q ‖ p );
here nothing outside the answer ever counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from methods.distill._rollouts import (
    Drawn,
    Prompt,
    Rollout,
    Writer,
    log_chances,
    part_of,
    prompt_of,
    shared,
)
from methods.stage import AssayError, Claim, Component, Optimizer, Schedule
from methods.term import Setting, of
from methods.term.policy_gradient import (
    Returns,
    advantages,
    importance,
    reverse_kl_estimate,
    rewards,
    whitened,
)

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example, Part

SEEDED = True
USES = (
    "methods.loop",
    "methods.data",
    "methods.checkpoint",
    "methods.terms",
    "methods.distill",
    "methods.distill._rollouts",
    "methods.generate",
    "methods.term",
)
CLAIMS: tuple[Claim, ...] = ()
# The part of a batch that was written.
ROLLOUTS = "rollouts"
# What is kept of each written token.
KEPT = ("old_log_prob", "importance", "reward")


@dataclass(frozen=True, kw_only=True)
class Config(Drawn):
    """The rollouts, what they are rewarded with, and the parts of the loss."""

    # weights as in LMOps (AdamW's second moment at 0.95)
    optimizer: Optimizer = Component("adamw", {"learning_rate": 5e-6, "beta2": 0.95, "weight_decay": 1e-6})
    # the learning rate stays where it is
    schedule: Schedule = Component("constant")
    # rollouts and rows in an optimizer step (16 cards of 4)
    batch: Annotated[int, Gt(0)] = 64
    # longest answer, in tokens (256 after a prompt of at most 256)
    max_new_tokens: Annotated[int, Gt(0)] = 256
    # answers that are written at a time
    rollouts: Annotated[int, Gt(0)] = 256
    # how often a set of them is gone through
    passes: Annotated[int, Gt(0)] = 4
    # share of the teacher in the mixture that writes
    teacher_share: Annotated[float, Ge(0), Lt(1)] = 0.2
    # of both models, in writing and in the loss on what was written
    temperature: Annotated[float, Gt(0)] = 1.0
    # rewards are divided by it (the code's default: 1)
    reward_scale: Annotated[float, Gt(0)] = 0.5
    # and then held between it and its negative (the code's default: 1)
    reward_limit: Annotated[float, Gt(0)] = 100.0
    # how much a later token's reward counts
    gamma: Annotated[float, Ge(0), Le(1)] = 0.95
    # how rewards become advantages: LMOps, or trl without and with length normalisation
    returns: Returns = "remaining"
    # advantages get mean 0 and variance 1 over the batch
    whiten: bool = True
    # how far the ratio may move from 1 before it has no gradient
    clip_ratio: Annotated[float, Gt(0), Lt(1)] = 0.2
    # weight of the exact reverse KL of each written token
    single_step: Annotated[float, Ge(0)] = 1.0
    # weight of the loss on the rows themselves
    language_model: Annotated[float, Ge(0)] = 1.0
    # share of the teacher in that loss; the rest is the cross-entropy on the answers
    kd_share: Annotated[float, Ge(0), Le(1)] = 0.5

    def __post_init__(self) -> None:
        if self.rollouts < self.batch:
            raise AssayError(
                f"distill.minillm: rollouts={self.rollouts} cannot fill a batch={self.batch}: raise rollouts."
            )


def terms(config: Config) -> dict[str, Component]:
    """The policy gradient and the reverse KL on what was written, cross-entropy and KL on the rows."""
    found = {
        "policy_gradient": of(
            "policy_gradient", clip_ratio=config.clip_ratio, temperature=config.temperature
        ),
        "reverse_kl": of("reverse_kl", weight=config.single_step, temperature=config.temperature),
    }
    if config.language_model == 0:
        return found
    share = config.kd_share
    return found | {
        "cross_entropy": of("cross_entropy", weight=config.language_model * (1 - share)),
        "forward_kl": of("forward_kl", weight=config.language_model * share),
    }


def term_parts(config: Config) -> dict[str, str]:
    """The part of the batch that a term is about, where it is not the rows."""
    return {"policy_gradient": ROLLOUTS, "reverse_kl": ROLLOUTS}


def writing(config: Config, setting: Setting) -> Rollouts:
    """What student and teacher write together."""
    return Rollouts(
        config, Writer.of(setting, config.temperature, config.top_p), setting.examples, setting.source
    )


class Rollouts:
    """Sets of rollouts, each gone through several times (``methods.loop.Writing``)."""

    def __init__(self, config: Config, writer: Writer, examples: Sequence[Example], source: Any) -> None:
        self.config, self.writer, self.examples = config, writer, examples
        self.teacher = source.model
        self.kept: list[Rollout] = []
        self.steps = max(1, config.rollouts * config.passes // config.batch)
        self.tokens = self.sets = 0
        self.seen: dict[str, float] = {}

    def parts(self, step: int, parts: Mapping[str, Part], model: Any) -> Mapping[str, Part]:
        """The rows of a step, and as many rollouts; a new set is written when the last one is used up."""
        self.tokens = 0
        number, place = divmod(step, self.steps)
        if place == 0:
            self._write(number, model)
        mine = self._batch(number, place)
        advantage = self.advantages(mine)
        chosen = [
            replace(rollout, extra=_carried(rollout, values))
            for rollout, values in zip(mine, advantage.tolist(), strict=True)
        ]
        written = part_of(chosen, self.writer.padding, ROLLOUTS)
        return {**parts, ROLLOUTS: written} if self.config.language_model else {ROLLOUTS: written}

    def advantages(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Of each written token [B,max_new_tokens], 0 or what whitening makes of it after the end of an answer."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        config = self.config
        found = pad_sequence(
            [torch.tensor(rollout.extra["reward"]) for rollout in rollouts], batch_first=True
        )
        reward = torch.nn.functional.pad(found, (0, config.max_new_tokens - found.shape[1]))
        lengths = torch.tensor([len(rollout.answer) for rollout in rollouts])
        mask = torch.arange(config.max_new_tokens) < lengths[:, None]
        values = advantages(reward, mask, config.gamma, config.returns)
        return whitened(values) if config.whiten else values

    def _write(self, number: int, model: Any) -> None:
        """Write a set, and note of each token its reward, weight and probability."""
        from methods.data import Sampler

        rows = Sampler(len(self.examples), f"{self.writer.seed}/prompts").batch(number, self.config.rollouts)
        prompts = [self._prompt(self.examples[row]) for row in rows]
        share = self.config.teacher_share
        written = self.writer.rollouts(prompts, [model, self.teacher], [1 - share, share], number)
        self.kept = self._scored(written, model)
        self.tokens = sum(len(rollout.answer) for rollout in written)
        self.sets += 1

    def _prompt(self, example: Example) -> Prompt:
        return prompt_of(example.input_ids, example.labels, example.number, self.writer.prompt_tokens)

    def _scored(self, rollouts: Sequence[Rollout], model: Any) -> list[Rollout]:
        """Each process scores a share, and all get the same numbers."""

        def score(mine: Sequence[int]) -> list[dict[str, tuple[float, ...]]]:
            chosen = [rollouts[place] for place in mine]
            log_q, log_p = (self._log_chances(each, chosen) for each in (model, self.teacher))
            return [self._extra(p, q) for p, q in zip(log_p, log_q, strict=True)]

        extras = shared(len(rollouts), score)
        self.seen = _means(extras)
        return [
            replace(rollout, extra={name: extra[name] for name in KEPT})
            for rollout, extra in zip(rollouts, extras, strict=True)
        ]

    def _log_chances(self, model: Any, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Of each answer's tokens [n], on the processor."""
        found: list[Tensor] = []
        for start in range(0, len(rollouts), self.writer.at_once):
            chosen = rollouts[start : start + self.writer.at_once]
            part = part_of(chosen, self.writer.padding, ROLLOUTS)
            values = log_chances(model, part, self.writer.temperature, self.writer.entries)
            found += values.cpu().split([len(rollout.answer) for rollout in chosen])
        return found

    def _extra(self, log_p: Tensor, log_q: Tensor) -> dict[str, tuple[float, ...]]:
        """From the log-probabilities [n] of one answer's tokens."""
        import torch

        mask = torch.ones_like(log_q, dtype=torch.bool)
        found = {
            "old_log_prob": log_q,
            "importance": importance(log_q, log_p, self.config.teacher_share),
            "reward": rewards(log_p, log_q, mask, self.config.reward_scale, self.config.reward_limit),
            "reverse_kl": reverse_kl_estimate(log_p, log_q, mask),
        }
        return {name: tuple(values.tolist()) for name, values in found.items()}

    def _batch(self, number: int, place: int) -> list[Rollout]:
        """The rollouts of a step: each pass through the set has its own order."""
        from methods.data import Sampler

        order = Sampler(len(self.kept), f"{self.writer.seed}/rollouts/{number}")
        return [self.kept[row] for row in order.batch(place, self.config.batch)]

    def numbers(self) -> dict[str, float]:
        """Of the set in use: mean reward and reverse KL of a token, and length of an answer."""
        return {f"rollouts.{name}": value for name, value in self.seen.items()}

    def state(self) -> dict[str, Any]:
        return {"rollouts": [rollout.saved() for rollout in self.kept], "sets": self.sets, "seen": self.seen}

    def resume(self, state: dict[str, Any]) -> None:
        self.kept = [Rollout.of(saved) for saved in state["rollouts"]]
        self.sets, self.seen = state["sets"], dict(state["seen"])

    def notes(self) -> dict[str, Any]:
        """How many sets were written."""
        return {"rollout_sets": self.sets}


def _carried(rollout: Rollout, advantage: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """What the policy gradient reads of each written token."""
    known = {name: rollout.extra[name] for name in ("old_log_prob", "importance")}
    return known | {"advantage": tuple(advantage[: len(rollout.answer)])}


def _means(extras: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Over all tokens of a set; the reverse KL is weighed by the importance, as the mixture drew the tokens."""
    tokens = sum(len(extra["reward"]) for extra in extras)
    estimates = [
        weight * value
        for extra in extras
        for weight, value in zip(extra["importance"], extra["reverse_kl"], strict=True)
    ]
    return {
        "reward": math.fsum(value for extra in extras for value in extra["reward"]) / tokens,
        "reverse_kl": math.fsum(estimates) / tokens,
        "length": tokens / len(extras),
    }
