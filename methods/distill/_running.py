"""A distillation stage from its options to the trained student.

torch is imported by what this module imports: it is only loaded by a running job. ``methods.distill``'s REVISION covers
this file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from methods import loop
from methods.checkpoint import load_tokenizer, tokenizer_difference
from methods.data import Style, encode, padding_id
from methods.distill import DistillBatch, check_teacher, cut, refuse_terms, text_config
from methods.distill._mixture import TEACHER_PART, Mixture
from methods.distill._recorded import Recorded
from methods.distill._sources import Ensemble, Live, Source
from methods.stage import AssayError, Stage, Terms
from methods.term import Setting

if TYPE_CHECKING:
    from methods.data import Example

# --- methods with terms -----------------------------------------------------------------------------------------


def run_terms(stage: Stage, method: ModuleType) -> None:
    """Terms and teacher on paper, rows, models, training."""
    config, folder = stage.config, stage.parents["model"]
    mixture = mixture_of(method, config)
    refuse_terms(stage.method, config, mixture.entries, hasattr(method, "writing"), hasattr(method, "source"))
    _refuse_processes(stage.method, mixture)
    teacher = Teacher(stage, mixture)
    teacher.compare()
    examples = encode(stage.rows("data"), load_tokenizer(folder), Style.read(folder), config.context_tokens)
    teacher.compare_rows(examples)
    theirs = teacher.examples()
    setting = _setting(stage, mixture, examples, teacher)
    if hasattr(method, "source"):
        setting.source = method.source(config, setting)
    _train(setting, method, {"train": examples} | theirs, teacher.padding())


def mixture_of(method: ModuleType, config: Any) -> Mixture:
    """The terms of a method: its option, or what its function makes of the options."""
    chosen = method.terms(config) if hasattr(method, "terms") else config.terms
    parts = method.term_parts(config) if hasattr(method, "term_parts") else {}
    return Mixture(chosen, parts=parts, block_tokens=config.block_tokens)


def _refuse_processes(method: str, mixture: Mixture) -> None:
    """A term that compares all rows of a batch cannot see those of another process."""
    whole = [entry.name for entry in mixture.entries if entry.flags.whole_batch]
    if whole and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AssayError(
            f"{method}: the term {whole[0]} compares all rows of a batch with each other, so one process has to see "
            "them all: start it without torchrun."
        )


def _setting(stage: Stage, mixture: Mixture, examples: Sequence[Example], teacher: Teacher) -> Setting:
    """Student and teacher, loaded."""
    config, folder = stage.config, stage.parents["model"]
    student = loop.prepare(stage, config)
    mixture.vocabulary = teacher.vocabulary
    return Setting(
        stage=stage,
        config=config,
        seed=stage.seed,
        student=student,
        student_folder=folder,
        teacher_folder=stage.parents.get("teacher"),
        source=teacher.load(),
        tokenizer=load_tokenizer(folder),
        examples=examples,
        steps=loop.steps_of(config, len(examples)),
        mixture=mixture,
        device=next(iter(student.parameters())).device,
    )


def _train(
    setting: Setting, method: ModuleType, parts: dict[str, Sequence[Example]], padding: Mapping[str, int]
) -> None:
    config, mixture = setting.config, setting.mixture

    def own(name: str, *beside: Any, otherwise: Any = None) -> Any:
        """What the method's own function of that name gives."""
        return getattr(method, name)(config, setting, *beside) if hasattr(method, name) else otherwise

    own("prepare")
    mixture.prepare(setting)
    setting.companions = mixture.companions(setting) | own("companions", otherwise={})
    masking = own("masking")
    batches = Batches(
        parts | own("parts", otherwise={}),
        size=config.batch,
        seed=setting.seed,
        follows={TEACHER_PART: "train"} if TEACHER_PART in parts else {},
        padding=padding,
    )
    loop.train(
        setting.stage,
        setting.student,
        config,
        batches,
        lambda model, batch: mixture.terms(model, setting.source, batch),
        adaptive=together(mixture.adaptive(setting.steps), own("adaptive")),
        optimizer=own("optimizer", masking),
        masking=masking,
        companions=setting.companions,
        writing=own("writing"),
    )


def together(one: loop.Adaptive | None, other: loop.Adaptive | None) -> loop.Adaptive | None:
    """The changing numbers of the terms and of the method."""
    if one is None or other is None:
        return one or other
    first, second = one, other

    def after(values: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        parts = [
            each.after({name: values[name] for name in (*each.start, "step")}, means)
            for each in (first, second)
        ]
        return {**parts[0], **parts[1]}

    return loop.Adaptive({**first.start, **second.start}, after)


@dataclass(frozen=True)
class Batches(loop.Batches):
    """Batches of which some parts are in another tokenizer's ids: their padding has to be one of those."""

    padding: Mapping[str, int] = field(default_factory=dict)

    def collated(self, step: int, tokenizer: Any) -> dict[str, Any]:
        found = super().collated(step, tokenizer)
        for name, padding in self.padding.items():
            ids = found[name].input_ids.masked_fill(found[name].attention_mask == 0, padding)
            found[name] = replace(found[name], input_ids=ids)
        return found


# --- the teacher ------------------------------------------------------------------------------------------------


class Teacher:
    """The teacher that the options name: compared with student, terms and rows first, loaded at last."""

    def __init__(self, stage: Stage, mixture: Mixture) -> None:
        self.stage, self.config, self.mixture = stage, stage.config, mixture
        self.student = stage.parents["model"]
        self.live = stage.parents.get("teacher")
        self.members = [stage.parents[name] for name in sorted(_numbered(stage.parents), key=_number)]
        self.record = Recorded(stage.parents["recorded"]) if "recorded" in stage.parents else None
        # how many entries the vocabularies are cut to; None: they agree as they are
        self.vocabulary: int | None = None

    def compare(self) -> None:
        """With the student and the terms.

        Raises:
            AssayError: the teacher cannot teach it.
        """
        models = [self.live] if self.live is not None else self.members
        if self.live is None or not self._only_across():
            found = [check_teacher(self.student, folder) for folder in models]
            self.vocabulary = next((entries for entries in found if entries is not None), None)
        if self.record is not None:
            self.record.refuse_terms(self.mixture.entries)
            self.record.refuse_tokenizer(load_tokenizer(self.student))
            self.vocabulary = self.record.fit_vocabulary(text_config(self.student)["vocab_size"])
        for entry in self.mixture.entries:
            if self.live is not None and hasattr(entry.module, "check"):
                entry.module.check(entry.config, text_config(self.student), text_config(self.live))

    def _only_across(self) -> bool:
        """Whether no term needs one vocabulary, and there are two."""
        asking = [entry for entry in self.mixture.entries if entry.flags.teacher]
        if not all(entry.flags.cross_tokenizer for entry in asking):
            return False
        assert self.live is not None
        return bool(tokenizer_difference(load_tokenizer(self.student), load_tokenizer(self.live), "student"))

    def compare_rows(self, examples: Sequence[Example]) -> None:
        """A record is of certain rows, token by token."""
        if self.record is not None:
            named = self.config.data
            self.record.refuse_rows(
                examples,
                named if isinstance(named, str) else named.id,
                self.config.context_tokens,
                Style.read(self.student),
            )

    def examples(self) -> dict[str, Sequence[Example]]:
        """The same rows in the teacher's tokens and prompt style, where a term compares two tokenisations."""
        if self.live is None or not self.mixture.cross_tokenizer:
            return {}
        rows = self.stage.rows("data")
        if not all("question" in row and "answer" in row for row in rows):
            raise AssayError(
                f"{self.stage.method}: two tokenisations are compared from the start of an answer, so the rows need "
                "the columns question and answer: give such data."
            )
        return {
            TEACHER_PART: encode(
                rows, load_tokenizer(self.live), Style.read(self.live), self.config.context_tokens
            )
        }

    def padding(self) -> dict[str, int]:
        """What the teacher's own part is padded with."""
        if self.live is None or not self.mixture.cross_tokenizer:
            return {}
        return {TEACHER_PART: padding_id(load_tokenizer(self.live))}

    def load(self) -> Source | None:
        """The teacher itself; None where there is none."""
        if self.record is not None:
            return self.record
        if self.live is not None:
            return self._load(self.live)
        if self.members:
            return Ensemble([self._load(folder) for folder in self.members], self.config.ensemble_mean)
        return None

    def _load(self, folder: Path) -> Live:
        model = loop.frozen_model(folder, self.config, self.config.teacher_precision)
        self.stage.notes["teacher_dtype"] = str(model.dtype).removeprefix("torch.")
        return Live(model, self.vocabulary)


def _numbered(parents: Mapping[str, Path]) -> list[str]:
    return [name for name in parents if name.partition(".")[0] == "ensemble"]


def _number(name: str) -> int:
    return int(name.partition(".")[2])


# --- methods with a loss of their own ---------------------------------------------------------------------------


def run_loss(stage: Stage, method: ModuleType) -> None:
    """Compare the two models on paper, load them, train the student with the method's loss."""
    config = stage.config
    source, taught_by = stage.parents["model"], stage.parents.get("teacher")
    entries = check_teacher(source, taught_by, getattr(method, "HIDDEN", False)) if taught_by else None
    examples = encode(stage.rows("data"), load_tokenizer(source), Style.read(source), config.context_tokens)
    student = loop.prepare(stage, config)
    precision = getattr(config, "teacher_precision", "auto")
    teacher = cut(loop.frozen_model(taught_by, config, precision), entries) if taught_by else None

    def loss(model: Any, batch: DistillBatch) -> Terms:
        terms: Terms = method.loss(config, cut(model, entries), teacher, batch)
        return terms

    batches = loop.Batches({"train": examples}, size=config.batch, seed=stage.seed)
    loop.train(stage, student, config, batches, loss)
