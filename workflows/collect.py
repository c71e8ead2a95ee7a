"""From records to the tidy tables: results.csv, jobs.csv, curves.csv and experiment.json.

Every number of every shown chain has a row; what failed or is missing has a row that says so. Cost is not a second
table: ``energy``, ``time`` and ``memory`` are evaluations like the others.

The models that a chain keeps on its way have rows under the chain's name and label, with their ``step``; at the end
of a chain it is empty. Step 0 is what the last stage started from, where that has no name of its own.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from methods.find import catalogue
from methods.stage import AssayError
from workflows import machine
from workflows.plan import Plan, Point, Shown
from workflows.record import (
    Failure,
    Job,
    Record,
    Store,
    not_written,
    read_failure,
    read_record,
    write_atomic,
)
from workflows.specs import PROFILE, own_claim

RESULT_COLUMNS = (
    "experiment", "chain", "label", "model_id", "score_id", "base", "family", "method", "options", "swept", "seed",
    "step", "evaluation", "entry", "task", "metric", "value", "stderr", "n", "unit", "better", "status",
)  # fmt: skip
JOB_COLUMNS = (
    "id", "kind", "label", "family", "method", "seed", "parents", "config", "status", "attempts", "start", "end",
    "seconds_inside", "seconds_outside", "energy_kwh", "cpu_kwh", "gpu_kwh", "ram_kwh", "energy_source", "alone",
    "peak_memory_mb", "device", "processes", "threads", "versions", "commit", "dirty", "machine", "parameters_total",
    "parameters_nonzero", "tokens_seen", "resumed_from_step", "update_lost_in_saving", "stale", "chains",
)  # fmt: skip
CURVE_COLUMNS = ("chain", "label", "model_id", "seed", "method", "step", "term", "value")
STATUS = {"out of memory": "oom", "timeout": "timeout", "not finite": "failed", "error": "failed"}

RowDict = dict[str, Any]


def newest_by_recipe(store: Store) -> dict[str, str]:
    """The newest finished id of each recipe, for ``keep_stale``."""
    newest: dict[str, tuple[float, str]] = {}
    for job_id in store.finished():
        record = read_record(store.record(job_id))
        newest[record.recipe] = max(newest.get(record.recipe, (0.0, "")), (record.end, job_id))
    return {recipe: job_id for recipe, (_, job_id) in newest.items()}


class Collector:
    """Reads the records a plan shows and writes the experiment's folder."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.store = plan, plan.store
        self._records: dict[str, Record | None] = {}
        self._failures: dict[str, Failure | None] = {}

    def record(self, job_id: str) -> Record | None:
        """The record of a job (or of its stale substitute), if there is one."""
        if job_id not in self._records:
            path = self.store.record(self.plan.substitute(job_id))
            self._records[job_id] = read_record(path) if path.is_file() else None
        return self._records[job_id]

    def failure(self, job_id: str) -> Failure | None:
        """Why the job failed, if it did and has no record."""
        if job_id not in self._failures:
            path = self.store.failure(job_id)
            self._failures[job_id] = read_failure(path) if path.is_file() else None
        return self._failures[job_id]

    def status(self, job_id: str) -> str:
        """ok, failed, oom, timeout or missing."""
        if self.record(job_id) is not None:
            return "ok"
        failure = self.failure(job_id)
        return STATUS[failure.reason] if failure else "missing"

    # - results

    def results(self) -> Iterator[RowDict]:
        """All rows of results.csv, in the order of the experiment file."""
        for shown in self.plan.shown:
            yield from self._score_rows(shown)
        for point in self._points:
            yield from self._cost_rows(point)
            yield from self._profile_rows(point)

    @cached_property
    def _points(self) -> list[Point]:
        """Chains first; models that are scored but named by no chain's row follow."""
        points = {point.key: point for point in self.plan.points}
        for shown in self.plan.shown:
            points.setdefault(shown.point.key, shown.point)
        return list(points.values())

    def _base_row(self, point: Point) -> RowDict:
        return {
            "experiment": self.plan.experiment.name, "chain": point.chain, "label": point.chain_label,
            "model_id": point.parent.shown, "base": point.base, "family": point.family,
            "method": point.method, "options": _json(point.config),
            "swept": _json(dict(point.swept)), "seed": point.shown_seed, "step": point.step,
        }  # fmt: skip

    def _score_rows(self, shown: Shown) -> Iterator[RowDict]:
        row = self._base_row(shown.point) | {
            "score_id": shown.job.id, "evaluation": shown.evaluation, "entry": shown.entry,
        }  # fmt: skip
        record = self.record(shown.job.id)
        if record is None:
            yield row | {"task": "", "metric": "", "status": self._status_behind(shown.job)}
            return
        for entry in record.rows:
            status = "ok" if entry.value is not None else "failed"
            yield row | entry.model_dump() | {"status": status}
        yield row | _cost("energy", "score_kwh", *_energy_value(record), "lower")
        yield row | _cost("time", "score_seconds", record.seconds_inside, "s", "lower")
        yield row | _cost("memory", "score_peak_mb", record.peak_memory_mb, "MB", "lower")

    def _status_behind(self, job: Job) -> str:
        """What has no record because something it is made from failed carries the status of that."""
        own = self.status(job.id)
        if own == "missing":
            statuses = [self.status(each.id) for each in self._ancestors(job)]
            return next((status for status in statuses if status not in ("ok", "missing")), own)
        return own

    def _cost_rows(self, point: Point) -> Iterator[RowDict]:
        if point.job is None:
            return
        row = self._base_row(point) | {"score_id": ""}
        record = self.record(point.job.id)
        if record is None:
            status = self._status_behind(point.job)
            yield row | _cost("energy", "stage_kwh", None, "kWh", "lower") | {"status": status}
            return
        last = self._last_records(point)
        behind = {job.id for job in point.last_jobs}
        others = [self.record(job.id) for job in self._ancestors(point.job) if job.id not in behind]
        before = [each for each in others if each is not None]
        kwh, seconds = self._spent(point, last)
        chain_kwh = None if kwh is None else kwh + sum(each.energy["total_kwh"] for each in before)
        chain_seconds = None if seconds is None else seconds + sum(each.seconds_inside for each in before)
        yield row | _cost("energy", "stage_kwh", kwh, _unit(last), "lower")
        yield row | _cost("energy", "chain_kwh", chain_kwh, _unit([*last, *before]), "lower")
        yield row | _cost("time", "stage_seconds", seconds, "s", "lower")
        yield row | _cost("time", "chain_seconds", chain_seconds, "s", "lower")
        yield row | _cost("memory", "stage_peak_mb", max(each.peak_memory_mb for each in last), "MB", "lower")
        yield from (row | cost for cost in (*_token_costs(last, before), *_generation_costs(last)))
        # of the layers that the last stage quantised, and of the whole model: counted from codes and scales, not stored
        for name in ("bits_per_weight", "bits_per_weight_model"):
            if name in record.notes:
                yield row | _cost("memory", name, float(record.notes[name]), "bits/weight", "lower")

    def _profile_rows(self, point: Point) -> Iterator[RowDict]:
        """What every layer got, where the last stage notes a profile (``prune.assigned``)."""
        record = self.record(point.job.id) if point.job and point.step is None else None
        for noted in record.notes.get("profile", ()) if record else ():
            yield self._base_row(point) | {
                "score_id": "", "evaluation": PROFILE, "entry": PROFILE, "task": noted["unit"],
                "metric": noted["metric"], "value": noted["value"], "stderr": None, "n": None,
                "unit": "bits/weight" if noted["metric"] == "bits" else "", "better": "", "status": "ok",
            }  # fmt: skip

    def _last_records(self, point: Point) -> list[Record]:
        """The records of the last stage: several where it was written as a shorthand."""
        found = [self.record(job.id) for job in point.last_jobs]
        return [record for record in found if record is not None]

    def _spent(self, point: Point, last: list[Record]) -> tuple[float | None, float | None]:
        """Energy in kWh and seconds of the last stage, up to the step that the point is; None where it is not known."""
        if point.parent.step is None:
            kwh = sum(float(each.energy["total_kwh"]) for each in last)
            return kwh, sum(each.seconds_inside for each in last)
        spent = self.store.spent_at_step(last[-1]).get(str(point.parent.step), {})
        return spent.get("kwh"), spent.get("seconds")

    def _ancestors(self, job: Job) -> list[Job]:
        """The job and all distinct stages it was built from, each once."""
        found: dict[str, Job] = {}
        queue = [job]
        while queue:
            current = queue.pop()
            if current.id not in found:
                found[current.id] = current
                queue.extend(self.plan.jobs[p.id] for p in current.parents.values() if p.id in self.plan.jobs)
        return list(found.values())

    # - jobs and curves

    def jobs(self) -> Iterator[RowDict]:
        """All rows of jobs.csv."""
        chains: dict[str, list[str]] = {}
        for point in self._points:
            for job in self._ancestors(point.job) if point.job else []:
                chains.setdefault(job.id, []).append(point.chain)
        for job in self.plan.jobs.values():
            yield self._job_row(job, ";".join(dict.fromkeys(chains.get(job.id, []))))

    def _job_row(self, job: Job, chains: str) -> RowDict:
        row: RowDict = {
            "id": job.id, "kind": job.kind, "label": job.label, "family": job.family, "method": job.method,
            "seed": job.seed, "parents": ";".join(parent.shown for parent in job.parents.values()),
            "config": _json(job.config), "status": self.status(job.id), "chains": chains,
            "stale": self.plan.substitute(job.id) != job.id,
        }  # fmt: skip
        record, failure = self.record(job.id), self.failure(job.id)
        if record is not None:
            return row | _record_columns(record)
        if failure is not None:
            energy = failure.energy
            return row | {
                "attempts": failure.attempts,
                "end": failure.end,
                "energy_kwh": energy.get("total_kwh"),
            }
        return row

    def curves(self) -> Iterator[RowDict]:
        """All rows of curves.csv: every logged term of every shown stage."""
        for point in self._points:
            if point.step is None:
                yield from self._curve(point)

    def _curve(self, point: Point) -> Iterator[RowDict]:
        """The stages of a shorthand stand one after the other, as one curve: steps and tokens of the next count on."""
        records, steps, tokens = self._last_records(point), 0, 0.0
        for record in records:
            lines = _logged(self.store.result(record.id) / "curve.csv")
            for line in lines:
                counted = (
                    {"value": float(line["value"]) + tokens} if tokens and line["term"] == "tokens" else {}
                )
                yield {
                    "chain": point.chain, "label": point.label, "model_id": records[-1].id, "seed": point.shown_seed,
                    "method": record.method, **line, "step": int(line["step"]) + steps, **counted,
                }  # fmt: skip
            steps += max((int(line["step"]) for line in lines), default=0)
            tokens += max((float(line["value"]) for line in lines if line["term"] == "tokens"), default=0.0)

    # - the experiment itself

    def experiment(self) -> dict[str, Any]:
        """The resolved experiment file: all that the report needs beside the tables."""
        experiment = self.plan.experiment
        return {
            "name": experiment.name, "title": experiment.title, "country": experiment.country,
            "seeds": experiment.seeds, "scale": self.plan.settings.scale, "chains": experiment.chains,
            "models": {name: spec.model_dump(exclude_none=True) for name, spec in experiment.models.items()},
            "evaluate": {name: entry.model_dump() for name, entry in experiment.evaluate.items()},
            "tables": experiment.tables, "figures": self._figures(), "claims": self._claims(),
            "command": self._command(), "commit": machine.commit(), "dirty": machine.dirty(),
            "versions": machine.versions(), "machine": machine.name(),
        }  # fmt: skip

    def _figures(self) -> dict[str, dict[str, Any]]:
        """Figures as specified; two steps reach no level that was chosen for a real run."""
        figures = self.plan.experiment.figures
        if not self.plan.settings.smoke:
            return figures
        return {name: {k: v for k, v in spec.items() if k != "levels"} for name, spec in figures.items()}

    def _command(self) -> str:
        settings = self.plan.settings
        scale = " scale=smoke" if settings.smoke else ""
        data = " data=DIR" if settings.data else ""  # where it lies on this machine is nobody's business
        return f"snakemake --cores 2 --config experiment={settings.experiment}{data}{scale}"

    def _claims(self) -> list[dict[str, Any]]:
        """Claims of the methods used, each method's once, then the experiment's own."""
        claims = []
        table = catalogue(self.plan.settings.methods)
        methods = dict.fromkeys(job.method for job in self.plan.jobs.values() if job.kind == "stage")
        methods |= dict.fromkeys(point.method for point in self._points if point.shorthand is not None)
        for name in methods:
            for claim in getattr(table.method(name).load(), "CLAIMS", ()):
                claims.append({"method": name, **dataclasses.asdict(claim)})
        for number, values in enumerate(self.plan.experiment.claims, start=1):
            claims.append({"method": "experiment", **dataclasses.asdict(own_claim(values, number))})
        return claims

    # - writing

    def write(self, folder: Path) -> None:
        """Write the four files, each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        results = list(self.results())
        write_atomic(
            folder / "experiment.json", json.dumps(self.experiment(), indent=1, ensure_ascii=False) + "\n"
        )
        write_atomic(folder / "results.csv", _csv(RESULT_COLUMNS, results))
        write_atomic(folder / "jobs.csv", _csv(JOB_COLUMNS, self.jobs()))
        write_atomic(folder / "curves.csv", _csv(CURVE_COLUMNS, self.curves()))
        _write_parquet(folder)


def _cost(evaluation: str, metric: str, value: float | None, unit: str, better: str) -> RowDict:
    """A number that is not known is missing."""
    return {
        "evaluation": evaluation, "entry": evaluation, "task": "", "metric": metric, "value": value, "stderr": None,
        "n": None, "unit": unit, "better": better, "status": "missing" if value is None else "ok",
    }  # fmt: skip


def _logged(path: Path) -> list[dict[str, str]]:
    """What a stage logged: step, term and value of every line; nothing where there is no such file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _token_costs(last: list[Record], before: list[Record]) -> Iterator[RowDict]:
    """Tokens that searches put through the model and that models wrote; no rows where there are none."""
    for metric, note in (("forwarded", "tokens_forwarded"), ("generated", "generated_tokens")):
        for part, records in (("stage", last), ("chain", [*last, *before])):
            if tokens := _noted(records, note):
                yield _cost("tokens", f"{part}_{metric}", tokens, "tokens", "lower")


def _generation_costs(last: list[Record]) -> Iterator[RowDict]:
    """What writing text cost within a stage that does other work as well: a part of the stage's cost."""
    if any("generation_seconds" in record.notes for record in last):
        yield _cost("time", "stage_generation_seconds", _noted(last, "generation_seconds"), "s", "lower")
    if any("generation_kwh" in record.notes for record in last):
        yield _cost("energy", "stage_generation_kwh", _noted(last, "generation_kwh"), _unit(last), "lower")


def _noted(records: list[Record], note: str) -> float:
    return float(sum(record.notes.get(note, 0) for record in records))


def _energy_value(record: Record) -> tuple[float, str]:
    return float(record.energy["total_kwh"]), _unit([record])


def _unit(records: Iterable[Record]) -> str:
    """``kWh measured`` only if every part was; ``shared`` if any job had company on its machine."""
    records = list(records)
    label = "measured" if all(r.energy["label"] == "measured" for r in records) else "estimated"
    shared = "" if all(r.energy.get("alone", True) for r in records) else ", shared"
    return f"kWh {label}{shared}"


def _record_columns(record: Record) -> RowDict:
    energy, notes = record.energy, record.notes
    same = ("attempts", "start", "end", "seconds_inside", "seconds_outside", "peak_memory_mb", "device", "processes",
            "threads", "commit", "dirty", "machine", "resumed_from_step")  # fmt: skip
    parameters = notes.get("parameters")
    return {name: getattr(record, name) for name in same} | {
        "energy_kwh": energy["total_kwh"], "cpu_kwh": energy["cpu_kwh"], "gpu_kwh": energy["gpu_kwh"],
        "ram_kwh": energy["ram_kwh"], "energy_source": energy["label"], "alone": energy.get("alone"),
        "versions": _json(record.versions), "parameters_total": parameters,
        "parameters_nonzero": notes.get("nonzero_after"), "tokens_seen": notes.get("tokens_seen"),
        "update_lost_in_saving": notes.get("update_lost_in_saving"),
    }  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _csv(columns: tuple[str, ...], rows: Iterable[RowDict]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", extrasaction="raise", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None else value for key, value in row.items()})
    return buffer.getvalue()


def _write_parquet(folder: Path) -> None:
    import pandas

    table = pandas.read_csv(
        folder / "results.csv",
        dtype={"seed": "Int64", "step": "Int64"},
        keep_default_na=False,
        na_values=[""],
    )
    table.to_parquet(folder / "results.parquet", index=False)


def main(arguments: list[str]) -> int:
    """``python -m workflows.collect EXPERIMENT [key=value …]``: write the tables and draw the report."""
    from workflows import plan, typeset
    from workflows.report import count_verdicts, report
    from workflows.settings import Settings, from_arguments

    try:
        built = plan.load(from_arguments(arguments))
        folder = report_folder(built)
        Collector(built).write(folder)
        drawn = report(folder)
    except AssayError as error:
        print(f"assay: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = Path(error.filename or Settings.read(from_arguments(arguments)).results)
        print(f"assay: {not_written(where, error)}", file=sys.stderr)
        return 2
    if drawn.tables:
        print(f"\n{typeset.plain(drawn.tables[0])}\n")
    print(f"verdicts: {count_verdicts(drawn)}\nreport: {folder / 'report.html'}")
    return 0


def report_folder(plan: Plan) -> Path:
    """``results/<experiment>``; a smoke run has a folder of its own."""
    name = plan.experiment.name + ("_smoke" if plan.settings.smoke else "")
    return plan.settings.results / name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
