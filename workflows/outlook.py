"""What a plan will do, before it does it: jobs, labels, what is finished, bytes, time and energy."""

from __future__ import annotations

import shutil
from collections import defaultdict
from statistics import median

from workflows.plan import Plan
from workflows.record import Job, Record, read_record


def print_plan(plan: Plan) -> None:
    """Print one line for each job and the totals."""
    missing = plan.missing
    for job in plan.jobs.values():
        state = "to run" if job.id in missing else "stale" if job.id in plan.stale else "finished"
        seed = "" if job.seed is None else f" seed {job.seed}"
        print(f"{state:9} {job.id:40} {job.label}{seed}")
    for line in summary(plan):
        print(line)


def summary(plan: Plan) -> list[str]:
    """The totals: how much is to run, how long it took before, how much will be written."""
    missing, records = plan.missing, _records(plan)
    seconds = {
        i: _typical([r.seconds_inside + r.seconds_outside for r in records[job.method]])
        for i, job in missing.items()
    }
    known = [value for value in seconds.values() if value is not None]
    energy = [_typical([r.energy["total_kwh"] for r in records[job.method]]) for job in missing.values()]
    sizes = [
        _typical([float(sum(f.bytes for f in r.files)) for r in records[job.method]])
        for job in missing.values()
    ]
    free = shutil.disk_usage(_existing(plan)).free
    return [
        f"{len(plan.jobs)} jobs, {len(plan.jobs) - len(missing)} finished, {len(missing)} to run "
        f"in {len(plan.targets())} processes.",
        f"Expected from earlier records for {len(known)} of {len(missing)} jobs: {sum(known):.0f} s in all, "
        f"{sum(filter(None, energy)):.2g} kWh, {sum(filter(None, sizes)) / 1e6:.1f} MB written; "
        f"{free / 1e9:.1f} GB are free.",
        f"The longest chain of jobs has {_longest(plan, missing)} and takes {_critical(plan, missing, seconds):.0f} s.",
    ]


def _records(plan: Plan) -> dict[str, list[Record]]:
    """Earlier records of the methods to be run, at most fifty of each."""
    wanted = {job.method for job in plan.missing.values()}
    found: dict[str, list[Record]] = defaultdict(list)
    for job_id in sorted(plan.finished):
        method = job_id.rpartition("-")[0].removeprefix("evaluate.")
        if method in wanted and len(found[method]) < 50:
            found[method].append(read_record(plan.store.record(job_id)))
    return found


def _typical(values: list[float]) -> float | None:
    return median(values) if values else None


def _existing(plan: Plan) -> str:
    folder = plan.settings.results.absolute()
    while not folder.exists():
        folder = folder.parent
    return str(folder)


def _longest(plan: Plan, missing: dict[str, Job]) -> str:
    depth: dict[str, int] = {}
    for job_id, job in missing.items():
        depth[job_id] = 1 + max((depth[parent] for parent in plan.parents_of(job)), default=0)
    return f"{max(depth.values(), default=0)} jobs"


def _critical(plan: Plan, missing: dict[str, Job], seconds: dict[str, float | None]) -> float:
    finish: dict[str, float] = {}
    for job_id, job in missing.items():
        start = max((finish[parent] for parent in plan.parents_of(job)), default=0.0)
        finish[job_id] = start + (seconds[job_id] or 0.0)
    return max(finish.values(), default=0.0)
