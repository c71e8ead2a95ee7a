"""The files of a results folder: frozen jobs, records and failures, and the one way to open a result.

Everything here is JSON checked by pydantic. A reader never looks into a result folder by itself: it calls
``open_result``, which waits until every file that the record names is there with its size.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from methods.stage import AssayError

VERSION = 1
T = TypeVar("T", bound="_File")
PATIENCE_SECONDS = 60.0
# what a result may consist of; a stage's ``RESULT`` says which
Part = Literal["model", "data", "files"]
PARTS: tuple[Part, ...] = get_args(Part)
SPENT_LATER = "spent_at_step.json"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ParentRef(_File):
    """What a job reads of a result: its model (of a ``step``, where one is named), its data or its files.

    ``path`` is set for folders outside the results (a user's model).
    """

    id: str
    path: str | None = None
    step: int | None = None
    kind: Part = "model"

    @property
    def part(self) -> str:
        """The name of the folder inside the result: ``model``, ``model@40``, ``data`` or ``files``."""
        return self.kind if self.step is None else f"model@{self.step}"

    @property
    def shown(self) -> str:
        """The id of a model as tables show it: ``unlearn.npo-0123456789ab@step40``."""
        return self.id if self.step is None else f"{self.id}@step{self.step}"


class _Described(_File):
    """What a job is: the same in its frozen file and in its record."""

    version: int = VERSION
    id: str
    digest: str
    recipe: str
    kind: Literal["stage", "score"]
    method: str
    label: str
    config: dict[str, Any]
    parents: dict[str, ParentRef]
    seed: int | None
    content: dict[str, str]
    threads: int


class Job(_Described):
    """What a job computes, frozen by the planner before anything runs."""

    code: dict[str, str]
    country: str
    resources: dict[str, float]
    data: str | None = None
    methods: list[str] = []
    smoke: bool = False
    trust_tasks: bool = False

    @property
    def family(self) -> str:
        """The Snakemake rule that runs the job: ``unlearn``, ``prune``, …, ``evaluate``."""
        return self.id.partition(".")[0]

    @property
    def description(self) -> dict[str, Any]:
        """What a record repeats of the job."""
        return {name: getattr(self, name) for name in _Described.model_fields}


class FileEntry(_File):
    """One file of a result."""

    path: str
    bytes: int
    sha256: str


class RowEntry(_File):
    """One number of an evaluation, as stored in a score's record."""

    task: str
    metric: str
    value: float | None
    stderr: float | None = None
    n: int | None = None
    unit: str = ""
    better: str = ""


class Record(_Described):
    """What a finished job leaves beside its result.

    Energy and ``seconds_inside`` are sums over all attempts. ``notes`` are the method's own; those of a training run
    are ``steps``, ``tokens_seen``, ``parameters``, ``nonzero_before``, ``nonzero_after``, ``processes``, ``device``,
    the precisions ``load_dtype``, ``master_dtype``, ``compute_dtype`` and ``saved_dtype``, ``update_lost_in_saving``
    (a share) and ``spent_at_step``: for each kept step the ``kwh`` and ``seconds`` that all attempts had used by then.
    Where text was written while the model was trained they are ``generated_tokens``, ``generation_seconds`` and, where
    energy was metered, ``generation_kwh``, too.
    """

    attempts: int
    start: float
    end: float
    seconds_inside: float
    seconds_outside: float
    resumed_from_step: int
    energy: dict[str, Any]
    energy_attempts: list[dict[str, Any]]
    device: str
    processes: int
    peak_memory_mb: float
    versions: dict[str, str]
    commit: str
    dirty: bool
    machine: str
    auto_class: str = ""
    notes: dict[str, Any] = {}
    rows: list[RowEntry] = []
    files: list[FileEntry] = []


class Failure(_File):
    """Why a job failed, and what it had spent by then."""

    version: int = VERSION
    id: str
    label: str
    method: str
    reason: Literal["out of memory", "timeout", "not finite", "error"]
    message: str
    traceback: str
    attempts: int
    energy: dict[str, Any]
    end: float


class Store:
    """Paths of one results folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def job(self, job_id: str) -> Path:
        """The frozen job file."""
        return self.root / "jobs" / f"{_checked(job_id)}.json"

    def result(self, job_id: str) -> Path:
        """The folder of a finished stage or score."""
        kind = "scores" if job_id.startswith("evaluate.") else "stages"
        return self.root / kind / _checked(job_id)

    def record(self, job_id: str) -> Path:
        """The record of a finished job."""
        return self.result(job_id) / "record.json"

    def scratch(self, job_id: str) -> Path:
        """Resumable state of an unfinished job."""
        return self.root / "scratch" / _checked(job_id)

    def failure(self, job_id: str) -> Path:
        """Why the job failed last, if it did."""
        return self.root / "failed" / f"{_checked(job_id)}.json"

    def finished(self) -> set[str]:
        """Ids of all jobs that have a record."""
        return {
            entry.name
            for kind in ("stages", "scores")
            for entry in _entries(self.root / kind)
            if ".tmp-" not in entry.name and os.path.exists(os.path.join(entry.path, "record.json"))
        }

    def is_whole(self, job_id: str) -> bool:
        """Whether each of model, data and files that the record names is still there (weights may be cleaned away)."""
        recorded = {entry.path.partition("/")[0] for entry in read_record(self.record(job_id)).files}
        return all((self.result(job_id) / part).is_dir() for part in recorded.intersection(PARTS))

    def parent_folder(self, parent: ParentRef) -> Path:
        """The folder that a reference means: in Hugging Face layout, or a stage's ``data/`` or ``files/``."""
        if parent.path is not None:
            return Path(parent.path)
        if parent.id.startswith("model.hub-"):
            return self.root / "models" / _checked(parent.id)
        return self.result(parent.id) / parent.part

    def spent_at_step(self, record: Record) -> dict[str, dict[str, float]]:
        """What a stage had used by its kept steps: ``{"40": {"kwh": …, "seconds": …}}``, as far as it is known.

        Steps that were asked for after the record was written have their numbers in a file beside it.
        """
        later = self.result(record.id) / SPENT_LATER
        found = json.loads(later.read_text(encoding="utf-8")) if later.is_file() else {}
        return {**found, **record.notes.get("spent_at_step", {})}


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except FileNotFoundError:
        return []


def _checked(job_id: str) -> str:
    if not job_id or any(character not in "abcdefghijklmnopqrstuvwxyz0123456789_.-" for character in job_id):
        raise AssayError(f"{job_id!r} is no id of a job: ids are small letters, digits, '.', '_' and '-'.")
    if job_id.startswith(".") or ".." in job_id:
        raise AssayError(f"{job_id!r} is no id of a job.")
    return job_id


# --- reading and writing ------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, as hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, text: str, *, keep_existing: bool = False) -> None:
    """Write a file whole or not at all; with ``keep_existing`` the first writer wins.

    Raises:
        AssayError: the disk is full, or may not be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if keep_existing:
            _link_unless_there(temporary, path)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise AssayError(not_written(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def not_written(path: Path, error: OSError) -> str:
    """A sentence for a file system that does not take what is written."""
    return f"{path} cannot be written: {error.strerror}. Put that right and start again; what is finished is kept."


def _link_unless_there(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return


def read_job(path: Path) -> Job:
    """A frozen job file, or a sentence on what is wrong with it."""
    return _read(path, Job, "job file")


def read_record(path: Path) -> Record:
    """A record, or a sentence on what is wrong with it."""
    return _read(path, Record, "record")


def read_failure(path: Path) -> Failure:
    """A failure file, or a sentence on what is wrong with it."""
    return _read(path, Failure, "failure file")


def _read(path: Path, kind: type[T], what: str) -> T:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AssayError(f"{path}: there is no such {what}.") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise AssayError(f"{path} is no {what} of this version: {place}: {first['msg']}.") from None


def open_result(
    store: Store, job_id: str, part: str | None = None, patience_seconds: float = PATIENCE_SECONDS
) -> Record:
    """The record of a finished job, once all its files are there with the sizes it names.

    Args:
        part: look at the files of this folder (``model``, ``model@40``, ``data`` or ``files``) and at those beside the
            folders, such as the curve: another part may have been cleaned away.
    Raises:
        AssayError: the result is not complete within ``patience_seconds``.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        missing = _incomplete(store, job_id, part)
        if missing is None:
            return read_record(store.record(job_id))
        if time.monotonic() > deadline:
            raise AssayError(
                f"{store.result(job_id)} is not complete after {patience_seconds:.0f} s: {missing}."
            )
        time.sleep(0.2)


def _incomplete(store: Store, job_id: str, part: str | None) -> str | None:
    if not store.record(job_id).is_file():
        return "there is no record.json"
    record = read_record(store.record(job_id))
    for entry in record.files:
        if part is not None and "/" in entry.path and entry.path.partition("/")[0] != part:
            continue
        path = store.result(job_id) / entry.path
        if not path.is_file():
            return f"{entry.path} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{entry.path} has {path.stat().st_size} bytes and should have {entry.bytes}"
    return None
