"""Sequence correction and regeneration (SCRG): the student's own answer, its worst token put right by the teacher.

Liu et al., "Multi-Granularity Semantic Revision for Large Language Model Distillation" (MGSR). The student answers
greedily. At each position its token is compared with the teacher's under the same prefix; of the positions where they
differ the one with the largest token KL(teacher ‖ student) is put right with the teacher's token, and the student goes
on from there. Where no token differs the answer stays as it is (our choice; the paper's details could not be verified).

torch is imported at the top: this module is only loaded by a running job. ``methods.distill._rollouts``'s REVISION
covers this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.distill._rollouts import (
    Prompt,
    Rollout,
    Writer,
    chance,
    device_of,
    evaluating,
    part_of,
    prompts_of,
    shared,
)
from methods.distill._sources import places
from methods.terms import kl_divergence, widen

if TYPE_CHECKING:
    from methods.data import Part
    from methods.term import Setting


@dataclass(frozen=True)
class Errors:
    """The worst token of each sequence: its ``position`` [B], -1 where none differs, and what the teacher says there.

    ``token`` [B] means nothing where there is no position. ``kl`` [B,T] is KL(teacher ‖ student) of every position.
    """

    position: Tensor
    token: Tensor
    kl: Tensor


def error_position(student: Tensor, teacher: Tensor, mask: Tensor) -> Errors:
    """Where the likeliest tokens of the two differ and the divergence is largest, the first of equals.

    Args:
        student, teacher: logits [B,T,V] at positions that predict an answer's tokens, under the student's answer.
        mask: which positions count [B,T].
    """
    kl = kl_divergence(widen(teacher), widen(student))
    choice = teacher.argmax(-1)
    differs = mask & (choice != student.argmax(-1))
    position = kl.masked_fill(~differs, -torch.inf).argmax(-1)
    token = choice.gather(1, position[:, None]).squeeze(1)
    return Errors(position.masked_fill(~differs.any(-1), -1), token, kl)


@dataclass(frozen=True)
class Draft:
    """An answer that is being revised: before place ``after`` of it nothing is put right any more."""

    rollout: Rollout
    after: int = 0


class Revision:
    """Adds a part ``name`` to each batch: revised answers to the prompts of ``train``, or its rows as they are.

    Args:
        writer: writes greedily. ``fraction``: of the batches that are revised. ``corrections``: most tokens of an
            answer that the teacher puts right, each behind the one before.
    """

    def __init__(
        self, setting: Setting, writer: Writer, name: str, fraction: float, corrections: int
    ) -> None:
        assert setting.source is not None  # the recipe has a teacher
        self.source, self.vocabulary = setting.source, setting.mixture.vocabulary
        self.writer, self.name, self.fraction, self.corrections = writer, name, fraction, corrections
        self.tokens = 0
        self.corrected = 0.0

    def parts(self, step: int, parts: Mapping[str, Part], model: Any) -> Mapping[str, Part]:
        """The parts of a step and the revised one."""
        self.tokens, self.corrected = 0, 0.0
        text = parts["train"]
        if chance(self.writer.seed, self.name, step) >= self.fraction:
            return {**parts, self.name: replace(text, name=self.name)}
        prompts = prompts_of(text, self.writer.prompt_tokens)
        drafts = [Draft(rollout) for rollout in self._written(prompts, model, step)]
        for _ in range(self.corrections):
            drafts = self._revised(drafts, model, step)
        self.corrected = sum(draft.after > 0 for draft in drafts) / len(drafts)
        return {
            **parts,
            self.name: part_of([draft.rollout for draft in drafts], self.writer.padding, self.name),
        }

    def _written(
        self, prompts: Sequence[Prompt], model: Any, step: int, new_tokens: int | None = None
    ) -> list[Rollout]:
        writer = replace(self.writer, new_tokens=new_tokens or self.writer.new_tokens)
        rollouts = writer.rollouts(prompts, [model], [1.0], step)
        self.tokens += sum(len(rollout.answer) for rollout in rollouts)
        return rollouts

    # --- one correction of each answer --------------------------------------------------------------------------

    def _revised(self, drafts: Sequence[Draft], model: Any, step: int) -> list[Draft]:
        """Every answer with its worst token put right and written anew behind it; as it was where none differs."""
        wrong = shared(len(drafts), lambda mine: self._errors([drafts[row] for row in mine], model))
        begun = [self._begun(draft, *error) for draft, error in zip(drafts, wrong, strict=True)]
        open_rows = [row for row, draft in enumerate(begun) if draft is not drafts[row] and self._room(draft)]
        written = self._continuations([begun[row] for row in open_rows], model, step)
        for row, tokens in zip(open_rows, written, strict=True):
            rollout = begun[row].rollout
            begun[row] = replace(begun[row], rollout=replace(rollout, answer=(*rollout.answer, *tokens)))
        return begun

    def _begun(self, draft: Draft, position: int, token: int) -> Draft:
        """The answer up to the token that is put right; the draft itself where there is none."""
        if position < 0:
            return draft
        answer = (*draft.rollout.answer[:position], token)
        return Draft(replace(draft.rollout, answer=answer), after=position + 1)

    def _room(self, draft: Draft) -> int:
        """How many tokens may follow the last one."""
        prompt, answer = draft.rollout.prompt, draft.rollout.answer
        if answer[-1] in self.writer.ends:
            return 0
        of_context = self.writer.context_tokens - len(prompt) - len(answer)
        return max(0, min(self.writer.new_tokens - len(answer), of_context))

    def _continuations(self, drafts: Sequence[Draft], model: Any, step: int) -> list[tuple[int, ...]]:
        """What the student writes behind each draft."""
        if not drafts:
            return []
        rooms = [self._room(draft) for draft in drafts]
        prompts = [
            Prompt((*draft.rollout.prompt, *draft.rollout.answer), draft.rollout.number) for draft in drafts
        ]
        written = self._written(prompts, model, step, max(rooms))
        return [rollout.answer[:room] for rollout, room in zip(written, rooms, strict=True)]

    def _errors(self, drafts: Sequence[Draft], model: Any) -> list[tuple[int, int]]:
        """The worst token of each answer: its place (-1: none) and the teacher's token."""
        size, found = self.writer.at_once, []
        for start in range(0, len(drafts), size):
            found += self._errors_of_some(drafts[start : start + size], model)
        return found

    def _errors_of_some(self, drafts: Sequence[Draft], model: Any) -> list[tuple[int, int]]:
        from methods.term._blocks import look

        part = part_of([draft.rollout for draft in drafts], self.writer.padding, self.name).to(
            device_of(model)
        )
        where = places(part)
        found, start = [], 0
        with evaluating([model]), torch.no_grad():
            student, said = look(model, part, entries=self.vocabulary), self.source.said(part, where)
            for draft, length in zip(drafts, part.answer_lengths.tolist(), strict=True):
                rows = slice(start, start := start + length)
                mask = torch.arange(length, device=where.index.device)[None] >= draft.after
                error = error_position(student.at(where.index[rows])[None], said.logits(rows)[None], mask)
                found.append((int(error.position), int(error.token)))
        return found

    # --- what a run shows and keeps ---------------------------------------------------------------------------------

    def numbers(self) -> dict[str, float]:
        """The share of the last step's answers in which a token was put right."""
        return {"corrected": self.corrected}

    def state(self) -> dict[str, Any]:
        """Nothing: what is written depends on the model and the step alone."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """There is nothing to go on from."""

    def notes(self) -> dict[str, Any]:
        """The loop notes what the tokens cost."""
        return {}
