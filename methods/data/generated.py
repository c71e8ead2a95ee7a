"""Text written by the chain's model, to train another one on: sequence-level distillation (SeqKD).

Kim, Rush 2016, "Sequence-Level Knowledge Distillation": a student is trained on what its teacher writes,

    L = - E_x [ log q( y | x ) ],      y written by the teacher, here drawn from p(. | x) or, at temperature 0, greedily

so ``teacher > data.generated(...)`` is the data of a ``distill.cross_entropy``. The paper searches
with a beam; drawing is what later work does (microsoft/LMOps, ``generate_data_seqkd.sh``: temperature 1). How the text
is decoded is part of this stage's options and so of its id. trl's ``seq_kd`` has the teacher write during training and
keeps its own loss; that is another method.

Questions are answered; of a row that is text, the first ``prompt_tokens`` tokens are gone on with. With ``members`` the
chain's model and these write in turn, a row each, which is a sample of the ensemble (Kim et al. 2025, "Pre-training
under infinite compute", mixes such text with the real one: ``mix=True``). A member may have another tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from methods.generate import Cost
from methods.stage import AssayError, Claim, How, Model, Rows, Stage

# The seed draws the text.
SEEDED = True
USES = ("methods.checkpoint", "methods.data", "methods.generate", "methods.terms")
RESULT = "data"
NEEDS_MODEL = True
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is written to, by whom, and how it is drawn."""

    # question-answer rows, whose answers are not looked at, or text
    data: Rows = "authors/full"
    # texts to each row
    count: Annotated[int, Gt(0)] = 1
    # divides the logits; 1 draws as the model has learnt, 0 takes the likeliest token
    temperature: Annotated[float, Ge(0)] = 1.0
    # draw among the likeliest tokens alone that together reach this mass; 1: among all
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    # longest answer, in tokens; a longer one is cut
    max_new_tokens: Annotated[int, Gt(0)] = 200
    # of rows that are text: so many tokens are the prompt, those that begin every text included
    prompt_tokens: Annotated[int, Gt(0)] = 32
    # chains whose models write, too, in turn with the chain's own
    members: tuple[Model, ...] | None = None
    # put the rows themselves in front of what was written
    mix: bool = False
    # sequences that are written at once, between two saved states
    batch: Annotated[int, Gt(0), How] = 16
    # seconds between two saved states
    save_seconds: Annotated[float, Gt(0), How] = 30.0

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.count > 1:
            raise AssayError(
                f"data.generated: at temperature=0 all {self.count} texts to a row would be the same: "
                "give count=1 or a temperature."
            )


def run(stage: Stage) -> None:
    """Write ``rows.jsonl`` with ``question`` and ``answer``, or ``text``.

    Raises:
        AssayError: the rows are neither questions nor text, or there are none.
    """
    from methods.data import write_rows

    rows = _checked(stage)
    tasks = _tasks(len(rows), stage.config, len(_folders(stage)))
    written, cost = _written(stage, rows, tasks)
    # Back from the order of the members to that of the rows.
    order = sorted(range(len(tasks)), key=lambda place: (tasks[place].row, tasks[place].number))
    stage.notes |= {
        "texts": len(written),
        "texts_cut": sum(not text.ended for text in written),
        **cost.notes(),
    }
    found = [written[place].row for place in order]
    write_rows(stage.folder / "data", [*(rows if stage.config.mix else []), *found])


def _checked(stage: Stage) -> list[dict[str, Any]]:
    """The rows with nothing but a question (and with ``mix`` its answer) or a text."""
    rows = stage.rows("data")
    wanted = ("question", "answer") if stage.config.mix else ("question",)
    for columns in (wanted, ("text",)):
        if rows and all(isinstance(row.get(column), str) for row in rows for column in columns):
            return [{column: row[column] for column in columns} for row in rows]
    found = sorted({column for row in rows for column in row})
    raise AssayError(
        f"data.generated: the rows must all have {' and '.join(wanted)}, or all have text; "
        f"data={stage.config.data!r} has {len(rows)} rows with: {', '.join(found) or 'none'}."
    )


def _folders(stage: Stage) -> list[Path]:
    """Where the models lie that write: the chain's own first."""
    others = range(1, 1 + len(stage.config.members or ()))
    return [stage.parents["model"], *(stage.parents[f"members.{number}"] for number in others)]


@dataclass(frozen=True)
class _Task:
    """One text to be written: by which model, to which row, and which of the row's it is."""

    member: int
    row: int
    number: int


def _tasks(rows: int, config: Config, members: int) -> list[_Task]:
    """All texts, those of one model together, so that no two models need to be in memory."""
    every = [(row, number) for row in range(rows) for number in range(config.count)]
    tasks = [_Task(place % members, row, number) for place, (row, number) in enumerate(every)]
    return sorted(tasks, key=lambda task: task.member)


@dataclass(frozen=True)
class _Text:
    """One text as a row, how many tokens of it were written, and whether it came to its end."""

    row: dict[str, str]
    tokens: int
    ended: bool


def _written(
    stage: Stage, rows: Sequence[Mapping[str, Any]], tasks: Sequence[_Task]
) -> tuple[list[_Text], Cost]:
    """All texts and what they took; goes on where an earlier attempt had stopped."""
    stage.progress.save_seconds = stage.config.save_seconds
    try:
        state = stage.progress.load()
        found = [_Text(*saved) for saved in state.values["texts"]] if state else []
        cost = Cost(**state.values["cost"]) if state else Cost()
        stage.notes["resumed_from_step"] = len(found)
        groups = _groups(tasks[len(found) :], stage.config.batch)
        writer: _Writer | None = None
        for place in stage.progress.bar(len(groups), "groups of texts"):
            member = groups[place][0].member
            if writer is None or writer.member != member:
                writer = None  # the last model goes before the next one comes
                writer = _Writer(stage, member)
            with cost.metered(stage):
                texts = writer.texts(groups[place], rows)
            found += texts
            cost.tokens += sum(text.tokens for text in texts)
            if stage.progress.due(len(found)):
                saved = [[text.row, text.tokens, text.ended] for text in found]
                stage.progress.save(len(found), {}, {"texts": saved, "cost": asdict(cost)})
    finally:
        stage.progress.release()
    return found, cost


def _groups(tasks: Sequence[_Task], batch: int) -> list[list[_Task]]:
    """Tasks that are done at once: of one model, at most ``batch``."""
    groups: list[list[_Task]] = []
    for task in tasks:
        if not groups or len(groups[-1]) == batch or groups[-1][0].member != task.member:
            groups.append([])
        groups[-1].append(task)
    return groups


class _Writer:
    """One of the models, and how it is spoken to."""

    def __init__(self, stage: Stage, member: int) -> None:
        from methods.checkpoint import Models
        from methods.data import Style, padding_id
        from methods.generate import ends_of

        folder, models = _folders(stage)[member], Models()
        self.config, self.seed, self.member = stage.config, stage.seed, member
        self.model, self.tokenizer = models.load(folder), models.tokenizer(folder)
        self.style, self.padding = Style.read(folder), padding_id(self.tokenizer)
        self.ends = ends_of(self.model, self.tokenizer, self.style)

    def texts(self, tasks: Sequence[_Task], rows: Sequence[Mapping[str, Any]]) -> list[_Text]:
        """The texts of one group, in its order."""
        prompts = [self._prompt(rows[task.row]) for task in tasks]
        written = self._drawn(tasks, prompts)
        return [
            self._text(rows[task.row], prompt, tokens)
            for task, prompt, tokens in zip(tasks, prompts, written, strict=True)
        ]

    def _prompt(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """A question as it is asked in training, or the first tokens of a text, always one less than it has."""
        from methods.data import encode_pairs, encode_text
        from methods.generate import prompt_of

        if "question" in row:
            asked = {"question": row["question"], "answer": ""}
            return prompt_of(encode_pairs([asked], self.tokenizer, self.style, 1 << 30)[0])
        whole = encode_text([{"text": row["text"]}], self.tokenizer, 1 << 30)[0].input_ids
        return whole[: min(self.config.prompt_tokens, len(whole) - 1)]

    def _drawn(self, tasks: Sequence[_Task], prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """What follows each prompt, the end mark included."""
        import torch

        from methods.generate import continued, drawn, left_padded

        inputs, mask = (tensor.to(self.model.device) for tensor in left_padded(prompts, self.padding))
        streams = [f"{self.seed}/{task.row}/{task.number}" for task in tasks]
        choose = drawn(streams, self.config.temperature, self.config.top_p)
        with torch.inference_mode():
            return continued(
                self.model, inputs, mask, self.config.max_new_tokens, self.ends, choose, with_end=True
            )

    def _text(self, row: Mapping[str, Any], prompt: tuple[int, ...], tokens: Sequence[int]) -> _Text:
        ended = tokens[-1] in self.ends
        said = list(tokens[:-1] if ended else tokens)
        if "question" in row:
            answer = self.tokenizer.decode(said, skip_special_tokens=True).strip()
            return _Text({"question": row["question"], "answer": answer}, len(tokens), ended)
        text = self.tokenizer.decode([*prompt, *said], skip_special_tokens=True)
        return _Text({"text": text}, len(tokens), ended)
