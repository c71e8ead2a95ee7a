"""What happens around a method: claim, meter, promises, record, atomic publication.

A job writes to ``<id>.tmp-<uuid>/``; the runner checks the result, writes its record, syncs it and renames the
folder. The first rename wins. A job that fails leaves ``failed/<id>.json`` and keeps its resumable state.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from methods.find import Found, catalogue, using
from methods.stage import AssayError, Interrupted, NotFinite, Row, Scoring, Stage
from workflows import code, machine, promises
from workflows.account import Account
from workflows.claim import Claim
from workflows.lease import cards_for, lease
from workflows.options import decode_config
from workflows.record import (
    SPENT_LATER,
    Failure,
    Job,
    Record,
    RowEntry,
    Store,
    not_written,
    open_result,
    read_job,
    read_record,
    write_atomic,
)
from workflows.resident import thread_settings

SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY")


def run(job_id: str, results: Path, receipt: Path | None) -> None:
    """Run a job (a leader score: its whole batch) unless its record is there, and leave the receipt."""
    store = Store(results)
    job = read_job(store.job(job_id))
    prepare_environment(job.threads)
    with lease(cards_for(job.resources, job.smoke)):
        _run_all(store, _batch(job_id, receipt))
    if receipt is not None:
        receipt.parent.mkdir(parents=True, exist_ok=True)
        receipt.touch()


def _run_all(store: Store, ids: list[str]) -> None:
    failures = []
    models = None
    for member in ids:
        job = read_job(store.job(member))
        if job.kind == "score" and models is None:
            models = _models()
        try:
            _run_claimed(store, job, models)
        except Interrupted:
            raise
        except AssayError as error:
            failures.append(error)
            if len(ids) > 1:
                print(f"assay: {member}: {error}", file=sys.stderr)
    if failures:
        raise failures[0] if len(ids) == 1 else AssayError(f"{len(failures)} of {len(ids)} scores failed.")


def _batch(job_id: str, receipt: Path | None) -> list[str]:
    """The scores this leader runs; by hand a job runs alone."""
    path = receipt.parent / "batches.json" if receipt else None
    if path is None or not path.is_file():
        return [job_id]
    batch: list[str] = json.loads(path.read_text(encoding="utf-8")).get(job_id, [job_id])
    return batch


def prepare_environment(threads: int) -> None:
    """Threads as the experiment says, hub access off, secrets dropped; set before anything heavy is imported."""
    os.environ.update(thread_settings(threads))
    for name in list(os.environ):
        if any(word in name.upper() for word in SECRET_WORDS):
            del os.environ[name]
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _models() -> Any:
    from methods.checkpoint import Models

    return Models()


def _run_claimed(store: Store, job: Job, models: Any) -> None:
    if _done(store, job):
        return
    try:
        with Claim(store.root, job.id):
            if not _done(store, job):
                _Attempt(store, job, models).run()
    except OSError as error:
        raise AssayError(not_written(Path(error.filename or store.root), error)) from error


def _done(store: Store, job: Job) -> bool:
    """A score is done with its record; a stage also needs what its readers read: all it wrote, and kept steps."""
    if not store.record(job.id).is_file():
        return False
    kept = [store.result(job.id) / f"model@{step}" for step in job.config.get("checkpoints") or ()]
    return job.kind == "score" or (store.is_whole(job.id) and all(folder.is_dir() for folder in kept))


@dataclass
class _Attempt:
    """One attempt at one job."""

    store: Store
    job: Job
    models: Any

    def run(self) -> None:
        self.begun = time.time()
        self.started = time.monotonic()
        self.found = self._found()
        self._check_code()
        self._check_parents()
        self.temporary = self.store.result(self.job.id).with_name(f"{self.job.id}.tmp-{uuid.uuid4().hex[:8]}")
        self._remove_abandoned()
        self.temporary.mkdir(parents=True)
        self.account = Account(self.store.scratch(self.job.id), self.job.country)
        try:
            self._run_and_publish()
        except BaseException as error:  # noqa: BLE001 — every end of an attempt is recorded, then raised again
            self._fail(error)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _run_and_publish(self) -> None:
        with _logged(self.temporary / "log.txt"), using(self._outside):
            self._seed()
            self.account.start()
            notes, rows = self._stage() if self.job.kind == "stage" else self._score()
            self.seconds_inside = self.account.seconds()
            auto_class = ""
            if self.job.kind == "stage":
                auto_class = promises.check(self.store, self.job, self.temporary)
            self._publish(notes, rows, auto_class)

    # - what is run

    @property
    def _outside(self) -> tuple[Path, ...]:
        return tuple(Path(folder) for folder in self.job.methods)

    def _found(self) -> Found:
        table = catalogue(self._outside)
        return (
            table.method(self.job.method) if self.job.kind == "stage" else table.evaluation(self.job.method)
        )

    def _check_code(self) -> None:
        """A job stops when the code it would run is not the code it was planned with."""
        pieces = catalogue(self._outside).components
        components = [pieces[name] for name in self.job.code if name in pieces]
        shared = [name for name in self.job.code if name != self.found.name and name not in pieces]
        now = code.code_of(self.found, components, shared)
        changed = sorted(name for name in self.job.code if now.get(name) != self.job.code[name])
        if changed:
            raise AssayError(
                f"{', '.join(changed)} changed since this job was planned; run snakemake again to plan anew."
            )

    def _check_parents(self) -> None:
        for parent in self.job.parents.values():
            folder = self.store.parent_folder(parent)
            if parent.path is None and not parent.id.startswith("model.hub-"):
                open_result(self.store, parent.id, parent.part)
            if not folder.is_dir():
                raise AssayError(f"{folder} is not there; run snakemake again to make it.")

    def _remove_abandoned(self) -> None:
        """Remove what killed attempts at this job left.

        Renamed first: an attempt that lives after all cannot publish a folder that is half removed.
        """
        for left in self.temporary.parent.glob(f"{self.job.id}.tmp-*"):
            aside = left.with_name(f"{self.job.id}.tmp-gone-{uuid.uuid4().hex[:8]}")
            try:
                os.rename(left, aside)
            except FileNotFoundError:
                continue  # an attempt elsewhere has just ended
            shutil.rmtree(aside, ignore_errors=True)

    def _seed(self) -> None:
        import numpy
        import torch

        seed = self.job.seed or 0
        random.seed(seed)
        numpy.random.seed(seed)  # noqa: NPY002 — libraries draw from the legacy generator
        torch.manual_seed(seed)
        torch.set_num_threads(self.job.threads)
        torch.use_deterministic_algorithms(True, warn_only=True)

    def _common(self) -> dict[str, Any]:
        from methods.data import Locator
        from methods.progress import Progress

        scratch = self.store.scratch(self.job.id)
        return {
            "id": self.job.id,
            "config": decode_config(self.found.load().Config, self.job.config),
            "seed": self.job.seed or 0,
            "parents": {key: self.store.parent_folder(parent) for key, parent in self.job.parents.items()},
            "folder": self.temporary,
            "progress": Progress(scratch, self.job.seed or 0, self.job.id, extra_state=self.account.save),
            "data": Locator(Path(self.job.data) if self.job.data else None, smoke=self.job.smoke),
            "threads": self.job.threads,
        }

    def _stage(self) -> tuple[dict[str, Any], list[Row]]:
        import importlib

        module = self.found.load()
        stage = Stage(method=self.job.method, spent=self.account.spent, **self._common())
        if hasattr(module, "run"):
            module.run(stage)
        else:
            importlib.import_module(f"methods.{self.found.family}").run(stage, module)
        return stage.notes, []

    def _score(self) -> tuple[dict[str, Any], list[Row]]:
        module = self.found.load()
        if getattr(module, "CHANGES_WEIGHTS", False):
            self.models = _models()
        scoring = Scoring(
            evaluation=self.job.method, models=self.models, trust_tasks=self.job.trust_tasks, **self._common()
        )
        return scoring.notes, list(module.evaluate(scoring))

    # - publication

    def _publish(self, notes: dict[str, Any], rows: list[Row], auto_class: str) -> None:
        energy = self.account.stop()
        inside = self.seconds_inside
        inside_now = inside - self.account.earlier_seconds
        record = Record(
            **self.job.description, attempts=self.account.attempts, start=self.begun, end=time.time(),
            seconds_inside=inside, seconds_outside=time.monotonic() - self.started - inside_now,
            resumed_from_step=int(notes.pop("resumed_from_step", 0) or 0), energy=energy,
            energy_attempts=self.account.history, device=str(notes.get("device", machine.device())),
            processes=int(notes.get("processes", 1)), peak_memory_mb=machine.peak_memory_mb(),
            versions=machine.versions(), commit=machine.commit(), dirty=machine.dirty(), machine=machine.name(),
            auto_class=auto_class, notes=notes, rows=[_row(row) for row in rows],
            files=promises.files_of(self.temporary),
        )  # fmt: skip
        text = record.model_dump_json(indent=1)
        write_atomic(self.temporary / "record.json", text)
        _publish_folder(self.store, self.job, self.temporary, record)
        shutil.rmtree(self.store.scratch(self.job.id), ignore_errors=True)
        self.store.failure(self.job.id).unlink(missing_ok=True)

    # - failure

    def _fail(self, error: BaseException) -> None:
        spent = self._abandon()
        if isinstance(error, (KeyboardInterrupt, Interrupted)):
            raise Interrupted(
                "asked to stop; its state is saved and the next run goes on from there."
            ) from None
        reason = _reason(error)
        failure = Failure(
            id=self.job.id, label=self.job.label, method=self.job.method, reason=reason,  # type: ignore[arg-type]
            message=str(error) or type(error).__name__, traceback="".join(traceback.format_exception(error))[-4000:],
            attempts=self.account.attempts, energy=spent, end=time.time(),
        )  # fmt: skip
        self._note(failure)
        if isinstance(error, AssayError):
            raise error
        if not isinstance(error, Exception):
            raise error
        traceback.print_exception(error)
        raise AssayError(f"{reason}: {failure.message} (see {self.store.failure(self.job.id)}).") from None

    def _abandon(self) -> dict[str, Any]:
        """End the account; what came before must not be hidden by a disk that takes no account."""
        try:
            return self.account.abandon()
        except (AssayError, OSError) as error:
            print(f"assay: {self.job.id}: what it spent is not noted: {error}", file=sys.stderr)
            return {}

    def _note(self, failure: Failure) -> None:
        try:
            write_atomic(self.store.failure(self.job.id), failure.model_dump_json(indent=1))
        except AssayError as error:
            print(f"assay: {self.job.id}: its failure is not noted: {error}", file=sys.stderr)


def _reason(error: BaseException) -> str:
    if isinstance(error, NotFinite):
        return "not finite"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    return "timeout" if isinstance(error, TimeoutError) else "error"


def _row(row: Row) -> RowEntry:
    import math

    def finite(number: float | None) -> float | None:
        return None if number is None or not math.isfinite(number) else float(number)

    return RowEntry(
        task=row.task, metric=row.metric, value=finite(row.value), stderr=finite(row.stderr),
        n=None if row.n is None else int(row.n), unit=row.unit, better=row.better,
    )  # fmt: skip


def _publish_folder(store: Store, job: Job, temporary: Path, record: Record) -> None:
    """Sync and rename; whoever comes second throws his copy away."""
    _sync(temporary)
    final = store.result(job.id)
    try:
        os.rename(temporary, final)
    except OSError:
        if not store.record(job.id).is_file():
            raise
        if not _done(store, job):
            _put_back(store, job, temporary, record)
    _sync_folder(final.parent)


def _put_back(store: Store, job: Job, temporary: Path, record: Record) -> None:
    """What was cleaned away returns to its record, if it is the same bits; steps that are kept only now join it."""
    before = read_record(store.record(job.id))
    digests = {entry.path: entry.sha256 for entry in before.files}
    changed = [
        entry.path
        for entry in record.files
        if "/" in entry.path and digests.get(entry.path, entry.sha256) != entry.sha256
    ]
    if changed:
        raise AssayError(
            f"{changed[0]} came out different from what {store.record(job.id)} has; results of different machines do "
            f"not mix: remove the folder {store.result(job.id)} to replace it."
        )
    for part in sorted(temporary.iterdir()):
        if part.is_dir() and not (store.result(job.id) / part.name).exists():
            os.rename(part, store.result(job.id) / part.name)
    spent = store.spent_at_step(record) | store.spent_at_step(before)
    if spent != store.spent_at_step(before):
        write_atomic(store.result(job.id) / SPENT_LATER, json.dumps(spent))


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- log ----------------------------------------------------------------------------------------------------


class _Tee:
    """Writes to the terminal (or Snakemake's pipe) and, while it is open, to the job's log."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        if not self.log.closed:
            self.log.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        if not self.log.closed:
            self.log.flush()
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    with open(path, "w", encoding="utf-8") as log:
        sys.stdout, sys.stderr = _Tee(before[0], log), _Tee(before[1], log)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
