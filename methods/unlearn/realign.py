"""Alignment recovery: give a few weights back the values of the aligned model, where the gradient says that it helps.

Yang, Tao, Chen, Xu, "Alleviating the Fear of Losing Alignment in LLM Fine-tuning" (IEEE S&P 2025). In each of
``rounds`` rounds, with theta_a the aligned model's weights, g the gradient of the alignment loss and h that of
the task loss:

    restore    theta_i <- theta_a_i       the top ``share`` of all weights by  g_i (theta_i - theta_a_i) > 0
    roll back  theta_i <- theta_start_i   of these the worst ``rollback`` by   h_i (theta_a_i - theta_start_i) > 0

The scores are first-order changes of the losses. With ``objective="answers"`` both losses are answer NLLs. With
"direction", the paper's, each is minus the cosine between the mean state of the prompts' last tokens, two thirds up
the model, and what that is in the aligned model (for the task: in the starting one); only the questions count.

In Assay ``target > unlearn.npo > unlearn.realign(aligned=target, alignment="authors/retain90",
task="authors/forget10", task_nll="high")`` wins back what forgetting broke while the forgotten stays forgotten.
Behind ``prune > distill`` the unpruned model is the aligned one, and zeros stay. ``alignment`` may be any rows on
which the aligned model behaves as wanted: retain rows, instructions, or harmful questions with their refusals.
``task`` are rows whose NLL has to stay low (or high): what the finetuning was for.

Where this differs from paper and code (kangyangWHU/LLMAlignment, read and not run). The code ranks by |g| among
weights with g_i (theta_i - theta_a_i) > 0, which is ``score="gradient"``; adds up the gradients of the rounds; and
decides once, after five rounds, whether a task metric has lost 5 % and it has to start over with rollback. Here
every round is judged by itself: while the task's NLL is worse than at the start by more than ``tolerance``, the next
worst are rolled back, and in the end the whole round; no weight is tried twice. So the task never ends beyond the
tolerance. As in the code only matrices are restored. Memory: both models, a gradient and the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from methods.stage import Claim, Dataset, How, Model, NotFinite, Stage, Term, Terms
from methods.terms import answer_nll, forward, token_nll

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Part

# The seed draws the rows.
SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.progress")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of alignment recovery; defaults of the code where they have the same meaning."""

    # the chain whose model behaves as wanted; of the same shape as the parent
    aligned: Model
    # rows on which it does
    alignment: Dataset
    # rows that must not get worse
    task: Dataset
    # which NLL of the task rows is the good one: low for a task that was learnt, high for rows that were unlearned
    task_nll: Literal["low", "high"] = "low"
    # largest loss of the task, in nats per answer token (5 % of a task metric in the code)
    tolerance: Annotated[float, Ge(0)] = 0.05
    # share of all weights that a round restores
    share: Annotated[float, Gt(0), Le(1)] = 0.002
    # most rounds
    rounds: Annotated[int, Gt(0)] = 20
    # share of a round's harmful restorations that is rolled back at a time; 0 undoes the whole round at once
    rollback: Annotated[float, Ge(0), Le(1)] = 0.2
    # what is improved: the likelihood of answers, or the direction of prompts as published
    objective: Literal["answers", "direction"] = "answers"
    # depth of those directions, as a share of the layers (4/6)
    depth: Annotated[float, Gt(0), Le(1)] = 0.67
    # rank by the first-order decrease of the loss, or by the size of the gradient as published
    score: Literal["decrease", "gradient"] = "decrease"
    # rows of each set that are used, drawn once
    sequences: Annotated[int, Gt(0)] = 256
    # rows that go through the model at once
    micro_batch: Annotated[Annotated[int, Gt(0)] | None, How] = 8
    # longer rows are cut
    context_tokens: Annotated[int, Gt(1)] = 512
    # of the forward pass; auto: bfloat16 on an accelerator
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # entries of matrices that are 0 at the start stay 0
    keep_zeros: bool = True
    # precision of the written model; parent: as the model it was made from
    saved: Literal["parent", "float32", "bfloat16"] = "parent"


CLAIMS: tuple[Claim, ...] = ()


# what became of a weight
UNTRIED, RESTORED, UNDONE = 0, 1, 2


def run(stage: Stage) -> None:
    """Restore round by round and write the model."""
    from methods.unlearn._weights import other_weights

    recovery = _Recovery(stage)
    recovery.aligned = other_weights(stage, "aligned", recovery.model)
    first = recovery.resume()
    try:
        for number in stage.progress.bar(stage.config.rounds, "rounds", initial=first):
            if not recovery.round(number):
                break
            recovery.save(number + 1)
    finally:
        stage.progress.release()
    recovery.finish()


class _Recovery:
    """The two models, what has been restored so far, and a round."""

    aligned: Mapping[str, Tensor]

    def __init__(self, stage: Stage) -> None:
        from methods import loop

        config: Config = stage.config
        self.stage, self.config = stage, config
        self.settings = loop.Training(steps=1, precision=config.precision)
        self.model = loop.prepare(stage, self.settings).eval()
        self.device = next(self.model.parameters()).device
        self.parts = {name: self._part(name) for name in ("alignment", "task")}
        self.weights = loop.Weights(dict(self.model.named_parameters()))
        self.weights.remember(config.keep_zeros, config.saved, stage.parents["model"])
        self.matrices = {name: weight for name, weight in self.weights.named.items() if weight.ndim >= 2}
        self.start = {name: weight.detach().cpu().clone() for name, weight in self.matrices.items()}
        self.fate = {name: weight.new_zeros(weight.shape).byte() for name, weight in self.start.items()}
        self.goals = self._goals() if config.objective == "direction" else {}
        self.task_at_start = self.task = self.nll("task")
        self.rounds = 0
        self.curve: list[tuple[int, str, float]] = []

    def _part(self, name: str) -> Part:
        """The rows of one set, drawn by the seed."""
        from methods.checkpoint import load_tokenizer
        from methods.data import Sampler, Style, collate, encode, padding_id

        folder, data = self.stage.parents["model"], getattr(self.config, name)
        tokenizer = load_tokenizer(folder)
        rows = encode(self.stage.data.rows(data), tokenizer, Style.read(folder), self.config.context_tokens)
        count = min(self.config.sequences, len(rows))
        chosen = Sampler(len(rows), f"{self.stage.seed}/{name}").batch(0, count)
        return collate([rows[row] for row in chosen], padding_id(tokenizer), name)

    def _pieces(self, name: str) -> Iterator[Part]:
        part = self.parts[name]
        count = part.labels.shape[0]
        size = self.config.micro_batch or count
        for first in range(0, count, size):
            yield part.rows(slice(first, first + size)).to(self.device)

    # --- a round ------------------------------------------------------------------------------------------------

    def round(self, number: int) -> bool:
        """Restore, and roll back where the task suffers; False where nothing is left to restore."""
        self.gradient("alignment")
        self.log(number)
        chosen = top(self.scores(), math.ceil(self.config.share * self.weights.counted[0]))
        if not any(bool(mask.any()) for mask in chosen.values()):
            return False
        self.put(chosen, RESTORED)
        self.task = self.nll("task")
        if self.suffers():
            self.roll_back(chosen)
        self.rounds = number + 1
        return True

    def roll_back(self, chosen: Mapping[str, Tensor]) -> None:
        """Undo what hurts the task most, share after share until it is well again; at the last the whole round."""
        scores = self.harms(chosen)
        count = sum(int((score > 0).sum()) for score in scores.values())
        size = math.ceil(self.config.rollback * count)
        for undone in range(size, count + size, size) if size else ():
            self.put(top(scores, undone), UNDONE)
            self.task = self.nll("task")
            if not self.suffers():
                return
        self.put(chosen, UNDONE)
        self.task = self.nll("task")

    def suffers(self) -> bool:
        """Whether the task is worse than at the start by more than the tolerance."""
        return task_sign(self.config) * (self.task - self.task_at_start) > self.config.tolerance

    def scores(self) -> dict[str, Tensor]:
        """What restoring each weight promises; 0 for one that was tried or has to stay 0."""
        found = {}
        for name, weight in self.matrices.items():
            score = promise(self.config, gradient_of(weight), self.start[name] - self.aligned[name])
            score[self.fate[name] != UNTRIED] = 0.0
            if name in self.weights.zeros:
                score[self.weights.zeros[name].cpu()] = 0.0
            found[name] = score
        return found

    def harms(self, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What undoing each of a round's restored weights promises the task; 0 for all other weights."""
        self.gradient("task")
        return {
            name: promise(
                self.config, gradient_of(self.matrices[name]), self.aligned[name] - self.start[name]
            )
            * mask
            for name, mask in chosen.items()
        }

    def put(self, chosen: Mapping[str, Tensor], fate: int) -> None:
        """Give the chosen weights the values of the aligned model, or back their own."""
        import torch

        source = self.aligned if fate == RESTORED else self.start
        with torch.no_grad():
            for name, mask in chosen.items():
                weight = self.matrices[name]
                weight.copy_(torch.where(mask.to(weight.device), source[name].to(weight.device), weight))
                self.fate[name][mask] = fate

    # --- objectives -----------------------------------------------------------------------------------------------

    def gradient(self, name: str) -> None:
        """Leave the gradient of one objective, over all rows of its set, in the weights."""
        from methods.gradient import Gradient

        pull = self._pull(name) if self.goals else None
        weight = task_sign(self.config) if name == "task" else 1.0

        def loss(model: Any, batch: Any) -> Terms:
            part = batch.parts[name]
            if pull is None:
                return {name: answer_nll(part, forward(model, part), weight)}
            return {name: Term((self.prompt_states(model, part) @ pull).sum(), part.sequences)}

        Gradient(self.model, loss, micro_batch=self.config.micro_batch, device=self.device)(
            {name: self.parts[name]}, 0, 1
        )

    def nll(self, name: str) -> float:
        """Nats per answer token of one set."""
        import torch

        with torch.no_grad():
            sums = [token_nll(forward(self.model, piece)).double().sum() for piece in self._pieces(name)]
        value = float(sum(sums)) / self.parts[name].tokens
        if not math.isfinite(value):
            raise NotFinite(f"unlearn.realign: the NLL of {getattr(self.config, name)!r} is {value}.")
        return value

    def _goals(self) -> dict[str, Tensor]:
        """Where the mean prompt state should be: in the aligned model, for the task in the starting one."""
        from methods.loop import frozen_model

        aligned = frozen_model(self.stage.parents["aligned"], self.settings)
        return {
            "alignment": self.mean_state(aligned, "alignment"),
            "task": self.mean_state(self.model, "task"),
        }

    def _pull(self, name: str) -> Tensor:
        """d(- cos(mean, goal)) / d mean, [H]."""
        from torch.nn.functional import cosine_similarity

        mean = self.mean_state(self.model, name).requires_grad_()
        (-cosine_similarity(mean, self.goals[name], dim=0)).backward()
        assert mean.grad is not None
        return mean.grad

    def mean_state(self, model: Any, name: str) -> Tensor:
        """The mean [H] over all rows."""
        import torch

        with torch.no_grad():
            sums = [self.prompt_states(model, piece).sum(0) for piece in self._pieces(name)]
        return torch.stack(sums).sum(0) / self.parts[name].labels.shape[0]

    def prompt_states(self, model: Any, part: Part) -> Tensor:
        """The state [B,H] of each prompt's last token, ``depth`` up the model."""
        states = forward(model, part, hidden=True).hidden_states or ()
        layer = max(1, int(self.config.depth * (len(states) - 1)))
        last = part.mask.int().argmax(1)
        return states[layer][range(len(last)), last].float()

    # --- state and results ------------------------------------------------------------------------------------------

    def log(self, number: int) -> None:
        """A line per quantity: both NLLs, and the shares of all weights that are restored and rolled back."""
        total = self.weights.counted[0]
        shares = {
            name: sum(int((state == fate).sum()) for state in self.fate.values()) / total
            for name, fate in (("restored", RESTORED), ("rolled_back", UNDONE))
        }
        values = {"alignment": self.nll("alignment"), "task": self.task} | shares
        self.curve += [(number, name, value) for name, value in values.items()]

    def resume(self) -> int:
        """Go on where an earlier attempt had saved its state; the number of rounds done."""
        state = self.stage.progress.load()
        self.stage.notes["resumed_from_step"] = state.step if state else 0
        if state is None:
            return 0
        for name, fate in state.tensors.items():
            self.put({name: fate == RESTORED}, RESTORED)
            self.fate[name] = fate
        self.curve = [tuple(row) for row in state.values["curve"]]
        self.task, self.rounds = state.values["task"], state.step
        return state.step

    def save(self, step: int) -> None:
        if self.stage.progress.due(step):
            self.stage.progress.save(step, self.fate, {"curve": self.curve, "task": self.task})

    def finish(self) -> None:
        """Write the model, the curve and the notes."""
        from methods.checkpoint import save_model
        from methods.loop import write_curve
        from methods.unlearn._weights import notes_of

        if not self.curve or self.curve[-1][0] != self.rounds:
            self.log(self.rounds)
        config, parent = self.config, self.stage.parents["model"]
        save_model(self.model, self.stage.folder / "model", parent, config.saved)
        write_curve(self.stage.folder / "curve.csv", self.curve)
        self.stage.notes |= notes_of(self.weights, config.saved, parent) | {
            "steps": self.rounds,
            "restored": {name: value for _, name, value in self.curve[-4:]}["restored"],
        }


# --- what to restore ----------------------------------------------------------------------------------------------


def task_sign(config: Config) -> float:
    """The factor that makes the task's NLL a loss."""
    return 1.0 if config.task_nll == "low" else -1.0


def gradient_of(weight: Tensor) -> Tensor:
    """The gradient, on the processor; 0 for a weight that the objective does not reach."""
    import torch

    return torch.zeros(weight.shape) if weight.grad is None else weight.grad.float().cpu()


def promise(config: Config, gradient: Tensor, step: Tensor) -> Tensor:
    """What taking ``step`` back is worth: gradient * step, or |gradient|, where that is a decrease; else 0."""
    decrease = (gradient * step).clamp(min=0)
    return decrease if config.score == "decrease" else gradient.abs() * (decrease > 0)


def top(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks of the ``count`` largest scores above 0 in all tensors together; equals of the last come along."""
    import torch

    positive = torch.cat([score[score > 0] for score in scores.values()])
    if count == 0 or not len(positive):
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    limit = positive.topk(min(count, len(positive))).values[-1]
    return {name: score >= limit for name, score in scores.items()}
