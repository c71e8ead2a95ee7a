"""Rows for lm-eval's packaged tasks from local files, and synthetic ones for ``scale=smoke``.

A packaged task names a hub data set. Where ``--config data=DIR`` has a folder for it, its rows come from there;
where a local file's columns differ from the hub's, they are mapped, and what was done is said in words. Nothing
here imports lm-eval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from methods.data import Locator
from methods.stage import AssayError

REVISION = 1
Rows = list[dict[str, Any]]
TASKS = Path(__file__).parent / "tasks"
ENDING = re.compile(r"\.(jsonl|json|parquet|txt)(\.gz)?$")
READ_BY_TASK_FILES = re.compile(rf"{ENDING.pattern}|\.yaml$")
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Copy:
    """Where a hub data set lies locally and what its rows need before the packaged task can read them."""

    folder: str
    convert: Callable[[Rows, str], Rows] | None = None
    said: str = ""
    # Only files whose name contains this are looked at.
    containing: str = ""


# --- columns that differ ---------------------------------------------------------------------------------------


def _hellaswag(rows: Rows, _: str) -> Rows:
    """The packaged task joins ctx_a and the capitalised ctx_b; our copy has them joined already."""
    return [row if "ctx_a" in row else {**row, "ctx_a": row["ctx"], "ctx_b": ""} for row in rows]


def _subject(rows: Rows, subject: str) -> Rows:
    chosen = [row for row in rows if row["subject"] == subject] if rows and "subject" in rows[0] else rows
    return _four_choices(chosen, subject)


def _four_choices(rows: Rows, name: str) -> Rows:
    """As they are; lm-eval would score an answer that is none of the four as one that no model finds."""
    for number, row in enumerate(rows):
        choices, answer = row.get("choices"), row.get("answer")
        four = isinstance(choices, list) and len(choices) == 4 and isinstance(row.get("question"), str)
        if not (four and type(answer) is int and 0 <= answer < 4):
            raise AssayError(
                f"row {number} of {name} must have a text 'question', four 'choices' and an 'answer' from 0 to 3, but "
                f"is: {str(row)[:200]}"
            )
    return rows


def _pages(rows: Rows, _: str) -> Rows:
    """One row per line becomes one row per article: an article opens with a ' = Title = ' line."""
    if rows and "page" in rows[0]:
        return rows
    pages: list[list[str]] = [[]]
    for row in rows:
        line = row["text"].removesuffix("\n") or " "
        if re.fullmatch(r" = [^=].* = ?", line):
            pages.append([])
        pages[-1].append(line)
    return [{"page": "\n".join(page)} for page in pages if "".join(page).strip()]


COPIES: dict[str, Copy] = {
    "Rowan/hellaswag": Copy("hellaswag", _hellaswag, "ctx_a is the file's ctx, ctx_b is empty"),
    "allenai/ai2_arc/ARC-Easy": Copy("arc_easy"),
    "allenai/ai2_arc/ARC-Challenge": Copy("arc_challenge"),
    "baber/piqa": Copy("piqa"),
    "allenai/winogrande": Copy("winogrande"),
    "allenai/openbookqa": Copy("openbookqa"),
    "aps/super_glue/boolq": Copy("boolq"),
    "tau/commonsense_qa": Copy("commonsense_qa"),
    "EleutherAI/lambada_openai/default": Copy("lambada_openai"),
    "openai/gsm8k/main": Copy("gsm8k"),
    "cais/mmlu": Copy("mmlu", _subject, "rows chosen by their subject column"),
    "cais/wmdp/wmdp-bio": Copy("wmdp/wmdp-bio", _four_choices),
    "cais/wmdp/wmdp-chem": Copy("wmdp/wmdp-chem", _four_choices),
    "cais/wmdp/wmdp-cyber": Copy("wmdp/wmdp-cyber", _four_choices),
    "EleutherAI/wikitext_document_level": Copy("wikitext2", _pages, "lines joined to articles", ".raw"),
}


def names_read(tasks: Iterable[str], data: Locator) -> tuple[str, ...]:
    """Data sets that tasks read from the built-in world or below the data folder; hub data are not among them.

    Told from names alone, without reading lm-eval's task files: a folder that a task may read counts as read.
    """
    found: list[str] = []
    for task in tasks:
        own = TASKS / f"{task}.yaml"
        if own.is_file():
            found += [
                f"authors/{split}" for split in re.findall(r"^  split: (\w+)$", own.read_text(), re.MULTILINE)
            ]
        elif task.endswith(".yaml"):
            found += _below(data, str(Path(task).parent), READ_BY_TASK_FILES)
        else:
            found += [name for folder in _folders(task) for name in _below(data, folder)]
    return tuple(dict.fromkeys(found))


def lacks_rows(task: str, data: Locator) -> bool:
    """Whether a task may read the hub: nothing of it lies below the data folder, or not every folder of its group."""
    parts = [copy.folder for copy in COPIES.values() if copy.folder.startswith(f"{task}/")]
    return not names_read([task], data) or not all(_below(data, folder) for folder in parts)


def _folders(task: str) -> list[str]:
    """Folders that a task may read, by its name or that of its group.

    The name is the folder's or begins with it: mmlu for mmlu_anatomy, wikitext2 for wikitext, wmdp/wmdp-bio for
    wmdp_bio and, with its neighbours, for wmdp.
    """
    copies = {copy.folder for copy in COPIES.values()} | {"blimp", task}
    inner = {name: name.rpartition("/")[2].replace("-", "_") for name in copies}
    return sorted(
        name
        for name in copies
        if f"{task}_".startswith(f"{inner[name]}_") or name == f"{task}2" or name.startswith(f"{task}/")
    )


def _below(data: Locator, folder: str, ending: re.Pattern[str] = ENDING) -> list[str]:
    """Every data file of a folder below the data folder, by name."""
    if data.folder is None or not (data.folder / folder).is_dir():
        return []
    files = sorted(path.relative_to(data.folder).as_posix() for path in data.folder_of(folder).rglob("*"))
    return [name for name in files if ending.search(name)]


# --- finding rows ----------------------------------------------------------------------------------------------


@dataclass
class Supply:
    """Finds rows for one evaluation; reads each file once.

    ``said`` collects what was mapped, by task; ``partial`` groups of which only some subtasks are here (``60/67``).
    """

    data: Locator
    said: dict[str, str] = field(default_factory=dict)
    partial: dict[str, str] = field(default_factory=dict)
    read: dict[str, Rows] = field(default_factory=dict)

    def rows(self, task: dict[str, Any]) -> dict[str, Rows] | None:
        """Rows by split for a packaged task's config; None where neither a local copy nor a stand-in is used."""
        if task.get("dataset_path") == "nyu-mll/blimp":
            found = self._blimp(task)
        else:
            found = self._copy(task)
        if found is None and self.data.smoke:
            self.said[task["task"]] = "eight synthetic rows (scale=smoke)"
            return {split: synthetic(task) for split in _splits(task)}
        return found

    def has_blimp(self, paradigm: str) -> bool:
        """Whether the local folder ``blimp`` has the paradigm's file; True where there is no such folder."""
        folder = self.folder("blimp")
        return folder is None or any(self._files(folder, lambda stem: stem == paradigm))

    def folder(self, name: str) -> Path | None:
        """The folder of that name below ``--config data=DIR``, if there is one."""
        if self.data.folder is None or not (self.data.folder / name).is_dir():
            return None
        return self.data.folder_of(name)

    def _blimp(self, task: dict[str, Any]) -> dict[str, Rows] | None:
        folder = self.folder("blimp")
        if folder is None:
            return None
        paradigm = task["dataset_name"]
        for name in self._files(folder, lambda stem: stem == paradigm):
            self.said[task["task"]] = f"blimp/{name}"
            return {"train": self._rows(f"blimp/{name}")}
        raise AssayError(
            f"the data folder has no blimp/{paradigm}.jsonl, which the task {task['task']} needs."
        )

    def _copy(self, task: dict[str, Any]) -> dict[str, Rows] | None:
        copy = self._place(task)
        folder = self.folder(copy.folder)
        if folder is None:
            return None
        found, names = {}, []
        for split in _splits(task):
            files = list(self._files(folder, partial(_is_split, split), copy.containing))
            if len(files) > 1:
                raise AssayError(
                    f"{copy.folder} has several files for {split}: {', '.join(files)}; keep one."
                )
            for name in files:
                rows = self._rows(f"{copy.folder}/{name}")
                found[split] = copy.convert(rows, task.get("dataset_name") or "") if copy.convert else rows
                if not found[split]:
                    raise AssayError(
                        f"{copy.folder}/{name} in the data folder has no rows for the task {task['task']}: leave the "
                        "task out, or take the file away."
                    )
                names.append(f"{copy.folder}/{name}")
        self._say(task, copy, names, [split for split in _splits(task) if split not in found])
        return found

    def _place(self, task: dict[str, Any]) -> Copy:
        path, name = task.get("dataset_path") or task["task"], task.get("dataset_name")
        own = path.rpartition("/")[2]
        return COPIES.get(f"{path}/{name}") or COPIES.get(path) or Copy(f"{own}/{name}" if name else own)

    def _say(self, task: dict[str, Any], copy: Copy, names: list[str], absent: list[str]) -> None:
        evaluated = task.get("test_split") or task.get("validation_split")
        if {task.get("test_split"), task.get("validation_split")} - {None} <= set(absent):
            raise AssayError(
                f"{copy.folder} in the data folder has no file for the split {evaluated!r} of the task {task['task']}: "
                f"call it {copy.folder}/{evaluated}.jsonl, or take the folder away."
            )
        parts = [", ".join(names), copy.said, f"no {' and no '.join(absent)} split" if absent else ""]
        self.said[task["task"]] = "; ".join(filter(None, parts))

    def _files(self, folder: Path, wanted: Callable[[str], bool], containing: str = "") -> Iterable[str]:
        """Names (with their ending) of the wanted data files of a folder, in alphabetical order."""
        for path in sorted(folder.iterdir()):
            stem = ENDING.sub("", path.name)
            if stem != path.name and wanted(stem) and containing in path.name:
                yield path.name

    def _rows(self, name: str) -> Rows:
        if name not in self.read:
            self.read[name] = self.data.rows(name)
        return self.read[name]


def _splits(task: dict[str, Any]) -> list[str]:
    """Every split the task reads, each once."""
    shots = task.get("fewshot_config")
    names = [task.get(key) for key in SPLIT_KEYS] + [shots.get("split") if isinstance(shots, dict) else None]
    return list(dict.fromkeys(name for name in names if name))


def _is_split(split: str, stem: str) -> bool:
    """``validation_0_5999`` holds (a part of) ``validation``, and so does the hub's ``validation-00000-of-00001``."""
    return stem == split or stem.startswith((f"{split}_", f"{split}-"))


# --- synthetic rows --------------------------------------------------------------------------------------------

WORDS = "red blue cold warm old new big small".split()


def synthetic(task: dict[str, Any]) -> Rows:
    """Eight rows in the real schema of a task's data set; AssayError where its schema is not known here."""
    path = task.get("dataset_path") or task["task"]
    for known, row in SCHEMAS.items():
        if re.search(known, f"{path}/{task.get('dataset_name') or ''}"):
            return [row(i) for i in range(8)]
    raise AssayError(
        f"scale=smoke has no synthetic rows for {task['task']} ({path}): give a local copy with --config data=DIR."
    )


def _labelled(i: int) -> dict[str, Any]:
    return {"text": [f"the {word} one" for word in WORDS[:4]], "label": list("ABCD")}


SCHEMAS: dict[str, Callable[[int], dict[str, Any]]] = {
    "hellaswag": lambda i: {
        "ind": i,
        "activity_label": "Walking",
        "ctx_a": f"A {WORDS[i]} dog runs.",
        "ctx_b": "the dog",
        "ctx": f"A {WORDS[i]} dog runs. the dog",
        "endings": [f"sees a {word} cat." for word in WORDS[:4]],
        "label": str(i % 4),
    },
    "ai2_arc": lambda i: {
        "id": str(i),
        "question": f"Which one is {WORDS[i % 4]}?",
        "choices": _labelled(i),
        "answerKey": "ABCD"[i % 4],
    },
    "piqa": lambda i: {"goal": f"get {WORDS[i]}", "sol1": "use water", "sol2": "use fire", "label": i % 2},
    "winogrande": lambda i: {
        "sentence": f"Ann met Eve because _ was {WORDS[i]}.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": str(1 + i % 2),
    },
    "openbookqa": lambda i: {
        "id": str(i),
        "question_stem": f"The {WORDS[i % 4]} thing is",
        "choices": _labelled(i),
        "answerKey": "ABCD"[i % 4],
    },
    "super_glue/boolq": lambda i: {
        "question": f"is it {WORDS[i]}",
        "passage": "It is red.",
        "idx": i,
        "label": i % 2,
    },
    "commonsense_qa": lambda i: {
        "id": str(i),
        "question": f"What is {WORDS[i]}?",
        "question_concept": WORDS[i],
        "choices": {"text": WORDS[:5], "label": list("ABCDE")},
        "answerKey": "ABCDE"[i % 5],
    },
    "wikitext_document_level": lambda i: {
        "page": f" = {WORDS[i].title()} = \n \n It is {WORDS[i]} @-@ like . \n"
    },
    "lambada": lambda i: {"text": f"She took the {WORDS[i]} coat because it was {WORDS[i]}"},
    "cais/mmlu": lambda i: {
        "question": f"What is {WORDS[i]}?",
        "subject": "any",
        "choices": WORDS[:4],
        "answer": i % 4,
    },
    "wmdp": lambda i: {"question": f"What is {WORDS[i]}?", "choices": WORDS[:4], "answer": i % 4},
    "gsm8k": lambda i: {
        "question": f"What is {i} plus 1?",
        "answer": f"{i} plus 1 is {i + 1}.\n#### {i + 1}",
    },
    "blimp": lambda i: {
        "sentence_good": f"The {WORDS[i]} dog runs.",
        "sentence_bad": f"The {WORDS[i]} dog run.",
    },
}
