"""Works out which jobs an experiment needs and freezes each into a file.

``python -m workflows.plan EXPERIMENT [key=value …]`` prints jobs, labels, what is finished, bytes to be written and
an estimate of time and energy from earlier records. Nothing here loads torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from methods.find import catalogue
from methods.stage import AssayError
from workflows import experiment as experiments
from workflows.chains import Builder, Point
from workflows.experiment import Experiment
from workflows.record import Job, ParentRef, Store, write_atomic
from workflows.scores import Shown, scores
from workflows.settings import Settings, from_arguments
from workflows.specs import check_experiment


@dataclass
class Plan:
    """Everything an experiment needs: jobs by id, what is shown, and what is still missing."""

    experiment: Experiment
    settings: Settings
    jobs: dict[str, Job] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    @cached_property
    def store(self) -> Store:
        return Store(self.settings.results)

    @cached_property
    def finished(self) -> set[str]:
        return self.store.finished()

    def substitute(self, job_id: str) -> str:
        """The id whose record stands for a job: its own, or with ``keep_stale`` one of the same recipe."""
        return self.stale.get(job_id, job_id)

    @cached_property
    def stale(self) -> dict[str, str]:
        """For missing ids the newest finished id of the same recipe (only with ``keep_stale=true``)."""
        if not self.settings.keep_stale:
            return {}
        from workflows.collect import newest_by_recipe

        known = newest_by_recipe(self.store)
        wanted = {i: job.recipe for i, job in self.jobs.items() if i not in self.finished}
        return {job_id: known[recipe] for job_id, recipe in wanted.items() if recipe in known}

    @cached_property
    def missing(self) -> dict[str, Job]:
        """Jobs to run, in an order in which parents come first."""
        wanted: dict[str, Job] = {}
        for job in self._shown_jobs():
            if job.id not in self.finished and job.id not in self.stale:
                self._want(job, wanted)
        # A stage may be wanted late, for a kept step that a later score reads, after scores of its end.
        ordered: dict[str, Job] = {}
        for job in wanted.values():
            self._in_order(job, wanted, ordered)
        return ordered

    def _in_order(self, job: Job, wanted: dict[str, Job], ordered: dict[str, Job]) -> None:
        if job.id in ordered:
            return
        for parent in job.parents.values():
            if parent.id in wanted and parent.id != job.id:
                self._in_order(wanted[parent.id], wanted, ordered)
        ordered[job.id] = job

    def _shown_jobs(self) -> Iterator[Job]:
        yield from (point.job for point in self.points if point.job is not None)
        yield from (shown.job for shown in self.shown)

    def _want(self, job: Job, wanted: dict[str, Job]) -> None:
        if job.id in wanted:
            return
        for parent in job.parents.values():
            ancestor = self.jobs.get(parent.id)
            if ancestor is not None and not self._readable(parent):
                self._want(ancestor, wanted)
        wanted[job.id] = job

    def _readable(self, parent: ParentRef) -> bool:
        return parent.id in self.finished and self.store.parent_folder(parent).exists()

    def parents_of(self, job: Job) -> list[str]:
        """Ids of the jobs that must run in this invocation before ``job`` can."""
        return [p.id for p in job.parents.values() if p.id in self.missing and p.id != job.id]

    @cached_property
    def batches(self) -> dict[str, list[str]]:
        """Missing scores by leader: one process scores one model; ``ALONE`` evaluations lead themselves."""
        by_model: dict[str, list[str]] = {}
        for job in self.missing.values():
            if job.kind == "score":
                module = catalogue(self.settings.methods).evaluation(job.method).load()
                model = job.id if getattr(module, "ALONE", False) else str(job.parents["model"])
                by_model.setdefault(model, []).append(job.id)
        return {ids[0]: ids for ids in by_model.values()}

    def targets(self) -> list[str]:
        """What Snakemake is asked for: missing stages and one leader score for each model."""
        return [job.id for job in self.missing.values() if job.kind == "stage" or job.id in self.batches]

    def needs(self, job_id: str) -> list[str]:
        """Ids whose receipts a target waits for: the missing parents of all it will run."""
        ids = self.batches.get(job_id, [job_id])
        return sorted({parent for i in ids for parent in self.parents_of(self.jobs[i])})

    def freeze(self) -> None:
        """Write the job files of everything missing; an existing file is only renewed if its paths moved."""
        for job in self.missing.values():
            path, text = self.store.job(job.id), job.model_dump_json(indent=1)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_atomic(path, text)


# --- building ---------------------------------------------------------------------------------------------------


def build(experiment: Experiment, settings: Settings) -> Plan:
    """The plan of an experiment. Raises ``AssayError`` with a sentence for anything that cannot be run."""
    if settings.smoke:
        experiment = experiment.model_copy(update={"seeds": experiment.seeds[:1]})
    builder = Builder(experiment, settings)
    plan = Plan(experiment, settings, builder.jobs)
    for chain in experiment.chains:
        plan.points.extend(builder.points_of_chain(chain))
    for entry, evaluation in experiment.evaluate.items():
        plan.shown.extend(scores(builder, entry, evaluation))
    check_experiment(experiment)
    return plan


def load(config: dict[str, Any]) -> Plan:
    """The plan for Snakemake's ``--config`` values."""
    settings = Settings.read(config)
    return build(experiments.load(experiments.find(settings.experiment)), settings)


# --- the command ----------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """``python -m workflows.plan EXPERIMENT [key=value …]``."""
    from workflows.outlook import print_plan

    try:
        print_plan(load(from_arguments(arguments)))
    except AssayError as error:
        print(f"assay: {error}", file=sys.stderr)
        return 2
    return 0


__all__ = ["Plan", "Point", "Shown", "build", "load"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
