"""``python -m workflows.show ID [--results=DIR]``: everything a record, failure or frozen job says."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from methods.find import nearest
from methods.stage import AssayError
from workflows.record import Failure, Job, ParentRef, Record, Store, read_failure, read_job, read_record


def describe(store: Store, job_id: str) -> str:
    """A page on one job. An id may be shortened to any beginning that is unique."""
    full = _complete(store, job_id)
    if store.record(full).is_file():
        return _record_page(store, read_record(store.record(full)))
    if store.failure(full).is_file():
        return _failure_page(read_failure(store.failure(full)))
    return _job_page(read_job(store.job(full)))


def _complete(store: Store, start: str) -> str:
    known = store.finished() | {path.stem for path in (store.root / "jobs").glob("*.json")}
    matching = sorted(job_id for job_id in known if job_id.startswith(start))
    if len(matching) == 1 or start in known:
        return start if start in known else matching[0]
    if matching:
        raise AssayError(f"{start} is the beginning of several ids: {', '.join(matching[:5])}.")
    raise AssayError(f"{store.root} has no job {start!r}{nearest(start, known)}")


def _record_page(store: Store, record: Record) -> str:
    energy = record.energy
    lines = [
        f"{record.id}: finished {_time(record.end)}",
        f"label      {record.label}",
        f"config     {record.config}",
        f"parents    {', '.join(_parent(key, parent) for key, parent in record.parents.items()) or 'none'}",
        f"seed       {record.seed}    attempts {record.attempts}    resumed from step {record.resumed_from_step}",
        f"time       {record.seconds_inside:.2f} s inside the method, {record.seconds_outside:.2f} s outside",
        f"energy     {energy['total_kwh']:.3g} kWh {energy['label']} ({energy.get('source')})",
        f"machine    {record.machine}, {record.device}, {record.processes} processes, {record.threads} threads, "
        f"{record.peak_memory_mb:.0f} MB at most",
        f"code       commit {record.commit or 'unknown'}{' with changes' if record.dirty else ''}",
        f"versions   {', '.join(f'{name} {version}' for name, version in record.versions.items())}",
        f"notes      {record.notes}",
        f"log        {store.result(record.id) / 'log.txt'}",
    ]
    lines += [f"file       {entry.path}  {entry.bytes} bytes  {entry.sha256[:16]}" for entry in record.files]
    lines += [
        f"score      {row.task} {row.metric} = {row.value} ± {row.stderr} (n={row.n})" for row in record.rows
    ]
    return "\n".join(lines)


def _parent(option: str, parent: ParentRef) -> str:
    """``model=train.sft-0123456789ab``, with the part that is read where it is no model's end."""
    return f"{option}={parent.id}" + ("" if parent.part == "model" else f"/{parent.part}")


def _failure_page(failure: Failure) -> str:
    return (
        f"{failure.id}: {failure.reason} at {_time(failure.end)}, attempt {failure.attempts}\n{failure.label}\n"
        + (f"{failure.message}\n{failure.traceback}")
    )


def _job_page(job: Job) -> str:
    return f"{job.id}: planned, not run\n{job.label}\n{job.model_dump_json(indent=1)}"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def main(arguments: list[str]) -> int:
    """The command."""
    plain = [argument for argument in arguments if not argument.startswith("--results=")]
    results = [
        argument.removeprefix("--results=") for argument in arguments if argument.startswith("--results=")
    ]
    if len(plain) != 1:
        print("usage: python -m workflows.show ID [--results=DIR]", file=sys.stderr)
        return 2
    try:
        print(describe(Store(Path(results[0] if results else "results")), plain[0]))
    except AssayError as error:
        print(f"assay: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
