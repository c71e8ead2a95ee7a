"""One call of Snakemake: its plan, its receipts, its resident process. The Snakefile asks; nothing is decided there.

The main process plans once. A process that Snakemake spawns for a single job (every Slurm job) plans nothing: it
reads what it needs from the frozen job file.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from methods.stage import AssayError
from workflows import plan, prepare
from workflows.plan import Plan
from workflows.record import Job, Store, read_job, write_atomic
from workflows.settings import Settings

__all__ = ["AssayError", "Invocation"]

RETRY_MEMORY = 1.5
ABANDONED_SECONDS = 7 * 24 * 3600.0


class Invocation:
    """What the Snakefile needs to know; every method is cheap enough to be a callable of a rule."""

    def __init__(self, settings: Settings, run: str, built: Plan | None, cores: int | None) -> None:
        self.settings, self.run, self.plan, self.cores = settings, run, built, cores
        self.store = Store(settings.results)
        self.resident: Any = None

    @classmethod
    def open(cls, config: dict[str, Any], *, main: bool, cores: int | None) -> Invocation:
        """Plan in the main process; take the run's name from the environment in a spawned one."""
        settings = Settings.read(config)
        if not main:
            return cls(settings, os.environ.get("ASSAY_RUN", "spawned"), None, cores)
        run = time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6]
        os.environ["ASSAY_RUN"] = run
        return cls(settings, run, plan.load(config), cores)

    # - paths

    @property
    def receipts(self) -> Path:
        return self.settings.results / "receipts"

    def receipt(self, name: str) -> str:
        """The receipt of one thing this invocation does."""
        return str(self.receipts / self.run / name)

    def pattern(self, family: str) -> str:
        """The output pattern of a family's rule."""
        return str(self.receipts / "{run}" / f"{{id,{family}[.][a-z0-9_.]+-[0-9a-f]{{12}}}}")

    def all_receipts(self) -> list[str]:
        """What must be there before the report is drawn."""
        if self.plan is None:
            return []
        return [self.receipt(job_id) for job_id in self._targets]

    @cached_property
    def _targets(self) -> list[str]:
        assert self.plan is not None
        return list(self.plan.jobs) if self.settings.show == "all" else self.plan.targets()

    def needs(self, job_id: str) -> list[str]:
        """Receipts a job waits for: those of its parents that have no record yet."""
        if self.plan is None or job_id not in self.plan.jobs:
            return []
        first = [self.receipt("prepare")] if any(self._from_hub.values()) else []
        if self.settings.show == "all":
            parents = [parent.id for parent in self.plan.jobs[job_id].parents.values()]
            return first + [self.receipt(parent) for parent in parents if parent in self.plan.jobs]
        return first + [self.receipt(parent) for parent in self.plan.needs(job_id)]

    @cached_property
    def _from_hub(self) -> dict[str, list[str]]:
        """What this invocation reads from the hub."""
        assert self.plan is not None
        return prepare.wanted(self.plan)

    # - commands

    def command(self, module: str) -> str:
        """``python -m module``, quoted for the shell."""
        return f"{shlex.quote(sys.executable)} -m {module}"

    @property
    def arguments(self) -> str:
        """The settings as words of a command line, quoted."""
        values = {
            "experiment": self.settings.experiment, "results": self.settings.results, "data": self.settings.data,
            "methods": ",".join(map(str, self.settings.methods)), "keep_stale": str(self.settings.keep_stale).lower(),
            "scale": self.settings.scale,
        }  # fmt: skip
        return " ".join(
            shlex.quote(f"{key}={value}") for key, value in values.items() if value not in (None, "")
        )

    # - resources

    @cached_property
    def cards(self) -> int:
        """How many GPUs this process can see."""
        from workflows.lease import visible_cards

        return len(visible_cards())

    @cache  # noqa: B019 — one invocation lives as long as its process
    def _job(self, job_id: str) -> Job:
        return self.plan.jobs[job_id] if self.plan is not None else read_job(self.store.job(job_id))

    def label(self, job_id: str) -> str:
        """What a job computes, in a line: its stage, and how many scores its process does."""
        evaluation, of, model = self._job(job_id).label.rpartition(" of ")
        others = len(self.plan.batches.get(job_id, [])) - 1 if self.plan is not None else 0
        more = f" and {others} more" if others > 0 else ""
        return f"{evaluation}{more}{of}{model.rpartition(' > ')[2]}"

    def threads(self, job_id: str) -> int:
        """The experiment's threads; a job that must run alone takes every core."""
        from methods.find import catalogue

        job = self._job(job_id)
        alone = False
        if job.kind == "score":
            alone = getattr(catalogue(self.settings.methods).evaluation(job.method).load(), "ALONE", False)
        exclusive = self.plan is not None and self.plan.experiment.exclusive
        return max(job.threads, self.cores or 1) if alone or exclusive else job.threads

    def gpus(self, job_id: str) -> int:
        """Cards a job asks for."""
        from workflows.lease import cards_for

        job = self._job(job_id)
        return cards_for(job.resources, job.smoke)

    def memory_mb(self, job_id: str, attempt: int) -> int:
        """Memory, half as much again with every attempt."""
        return int(self._job(job_id).resources["memory_gb"] * 1000 * RETRY_MEMORY ** (attempt - 1))

    def runtime_minutes(self, job_id: str, attempt: int) -> int:
        """Time, with as much again at every attempt."""
        return int(self._job(job_id).resources["hours"] * 60 * attempt)

    # - what happens around the run

    def begin(self) -> None:
        """Freeze the jobs, write the batches, start the resident process. Not called in a dry run."""
        if self.plan is None:
            return
        self.plan.freeze()
        folder = self.receipts / self.run
        folder.mkdir(parents=True, exist_ok=True)
        batches = {} if self.settings.show == "all" else self.plan.batches
        write_atomic(folder / "batches.json", json.dumps(batches))
        data = None if self.settings.data is None else str(self.settings.data)
        write_atomic(folder / "prepare.json", json.dumps({"items": self._from_hub, "data": data}))
        self._describe_code()
        os.environ["PYTHONHASHSEED"] = "0"
        if self.settings.resident and self._targets and not os.environ.get("SLURM_JOB_ID"):
            from workflows.resident import start

            self.resident = start(self.run, self.plan.experiment.threads, self.plan.experiment.country)
            os.environ.update(self.resident.environment)

    def _describe_code(self) -> None:
        from workflows import machine

        os.environ["ASSAY_COMMIT"] = machine.commit()
        os.environ["ASSAY_DIRTY"] = str(machine.dirty()).lower()

    def end(self, report: bool = False) -> None:
        """Stop the resident process, drop the receipts; after an error draw the report from what is there."""
        if self.resident is not None:
            self.resident.stop()
        if report and self.plan is not None:
            command = f"{self.command('workflows.collect')} {self.arguments}"
            subprocess.run(shlex.split(command), check=False)
        shutil.rmtree(self.receipts / self.run, ignore_errors=True)
        self._drop_abandoned()

    def _drop_abandoned(self) -> None:
        """Receipts of invocations that were killed are worth nothing after a week."""
        for folder in self.receipts.glob("*") if self.receipts.is_dir() else []:
            old = re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", folder.name) is not None
            if old and time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
