"""The kill test: an experiment killed with SIGKILL twenty times ends with the rows of an undisturbed run.

    python tests/benchmarks/kill.py DIR [--experiment tiny] [--kills 20] [--reuse DIR/a]

DIR/a gets the undisturbed run, DIR/b the one whose whole process group is killed, at moments spread over its jobs:
right after a state was saved, while one is being saved or a model is being written, in the middle of training
and of scoring, and while the report is being drawn. Exit code 0 if everything that must hold does.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import runs

LOOK_SECONDS = 0.003
# a kill waits this long for the moment it is meant for, then it takes any
PATIENCE_SECONDS = 60.0
# the meter is read once a second and its total kept every ten: less than that share is more than rounding
LEAST_ENERGY = 0.9


# --- moments --------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What can be seen of a run from its results folder and its processes."""

    results: Path
    hit: set[str] = field(default_factory=set)
    met: str = ""

    def saved(self) -> bool:
        """A state is complete of a job that no kill has hit after a saved state yet."""
        for state in self.results.glob("scratch/*/state-*"):
            job_id = state.parent.name
            if job_id not in self.hit and self._under_way(job_id):
                self.met = job_id
                return True
        return False

    def saving(self) -> bool:
        """A state or a model is being written."""
        return self._any("scratch/*/tmp-*") or self._any("stages/*.tmp-*/model*/*.safetensors")

    def training(self) -> bool:
        """A stage is under way."""
        return self._any("stages/*.tmp-*")

    def scoring(self) -> bool:
        """A score is under way."""
        return self._any("scores/*.tmp-*")

    def reporting(self, group: int) -> bool:
        """The report is being drawn."""
        for number, line in runs.members(group):
            if "workflows.collect" in line:
                self.met = f"process {number}"
                return True
        return False

    def _under_way(self, job_id: str) -> bool:
        return any(self.results.glob(f"stages/{job_id}.tmp-*")) and not (self.results / "stages" / job_id).exists()

    def _any(self, pattern: str) -> bool:
        found = next(self.results.glob(pattern), None)
        if found is not None:
            self.met = next(part for part in found.relative_to(self.results).parts[1:2])
        return found is not None


@dataclass
class Kill:
    """One kill: what it was meant for, what it met, and how far the run had come."""

    number: int
    kind: str
    met: str
    records: int
    seconds: float


def spread(kills: int) -> list[str]:
    """The kinds of moments, in the order in which a run comes by them most easily."""
    shares = {"saved": 0.35, "saving": 0.15, "training": 0.15, "scoring": 0.2}
    counts = {kind: max(1, int(kills * share)) for kind, share in shares.items()}
    counts["saved"] = max(counts["saved"], min(6, kills))
    during = [kind for kind, count in counts.items() for _ in range(count)][: max(kills - 1, 1)]
    random.Random(0).shuffle(during)
    return during + ["reporting"] * (kills - len(during))


# --- the killed run -----------------------------------------------------------------------------------------------


class KilledRun:
    """Runs an experiment into a folder and kills it again and again."""

    def __init__(self, options: argparse.Namespace, results: Path, jobs: int, words: list[str]) -> None:
        self.options, self.results, self.jobs, self.words = options, results, jobs, words
        self.watch, self.witness = Watch(results), runs.Witness(results)
        self.kills: list[Kill] = []
        self.left_over: list[str] = []

    def run(self) -> int:
        """All kills, then one run to the end; returns its exit code."""
        kinds = spread(self.options.kills)
        during = sum(kind != "reporting" for kind in kinds)
        for number, kind in enumerate(kinds):
            threshold = 0 if kind == "reporting" else int(self.jobs * number / max(during, 1) * 0.9)
            if not self._killed(number + 1, kind, threshold):
                print(f"kill {number + 1} ({kind}): the run was over before", flush=True)
        started = self._start(len(kinds) + 1)
        code = started.wait(self.options.limit)
        self.witness.look()
        return code

    def _start(self, number: int) -> runs.Started:
        log = self.results.with_name(f"{self.results.name}-{number:02d}.log")
        return runs.start(self.words, log, self.options.environment)

    def _killed(self, number: int, kind: str, threshold: int) -> bool:
        begun = time.monotonic()
        started = self._start(number)
        moments: dict[str, Callable[[], bool]] = {
            "saved": self.watch.saved, "saving": self.watch.saving, "training": self.watch.training,
            "scoring": self.watch.scoring, "reporting": lambda: self.watch.reporting(started.process.pid),
        }  # fmt: skip
        if not self._wait(started, lambda: self.witness.look() >= threshold, self.options.limit):
            return False
        met = self._wait(started, moments[kind], PATIENCE_SECONDS if kind != "reporting" else self.options.limit)
        if not met and not self._wait(started, lambda: any(moments[other]() for other in moments), PATIENCE_SECONDS):
            return False
        kind = kind if met else "other"
        if kind in ("training", "scoring", "reporting"):
            time.sleep(random.Random(number).uniform(0, 0.8))
        if kind == "saved":
            self.watch.hit.add(self.watch.met)
        if not started.running():
            return False
        started.kill()
        self._note(Kill(number, kind, self.watch.met, self.witness.look(), time.monotonic() - begun), started)
        return True

    def _note(self, kill: Kill, started: runs.Started) -> None:
        self.kills.append(kill)
        print(f"kill {kill.number:2d}  {kill.kind:9s} {kill.records:4d} records  {kill.seconds:6.1f} s  {kill.met}",
              flush=True)  # fmt: skip
        time.sleep(0.2)
        for number, line in runs.members(started.process.pid):
            self.left_over.append(f"process {number} outlived kill {kill.number}: {line[:80]}")

    def _wait(self, started: runs.Started, moment: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while started.running() and time.monotonic() < deadline:
            if moment():
                return True
            time.sleep(LOOK_SECONDS)
        return False


# --- the verdict --------------------------------------------------------------------------------------------------


def energy(record: dict[str, Any]) -> float:
    """What a job spent over all its attempts, in kWh."""
    return float(record["energy"]["total_kwh"])


def verdict(undisturbed: Path, killed: KilledRun, experiment: str) -> list[str]:
    """Print the figures; returns what does not hold, in sentences."""
    before, after = runs.records(undisturbed), runs.records(killed.results)
    resumed = {job_id: record for job_id, record in after.items() if record["resumed_from_step"] > 0}
    wrong = runs.differences(undisturbed, killed.results, experiment) + killed.left_over
    wrong += [f"{job_id} was finished and was done again" for job_id in sorted(killed.witness.repeated)]
    print(f"\n{'job':44s} {'attempts':>8s} {'resumed from':>12s} {'of steps':>8s} {'energy':>7s}")
    for job_id, record in after.items():
        if record["attempts"] > 1:
            ratio = energy(record) / energy(before[job_id]) if job_id in before else float("nan")
            steps = record["notes"].get("steps", "")
            print(f"{job_id:44s} {record['attempts']:8d} {record['resumed_from_step']:12d} {steps!s:>8s} {ratio:6.2f}x")
            if job_id in resumed and ratio < LEAST_ENERGY:
                wrong.append(f"{job_id} reports {ratio:.2f} of the energy of an undisturbed job")
    wanted = min(5, sum(kill.kind == "saved" for kill in killed.kills)) if killed.options.kills < 20 else 5
    if len(resumed) < wanted:
        wrong.append(f"{len(resumed)} records show resumed_from_step > 0, and {wanted} should")
    if len(killed.kills) < killed.options.kills:
        wrong.append(f"{len(killed.kills)} kills of {killed.options.kills} met a running workflow")
    kinds = Counter(kill.kind for kill in killed.kills)
    left = sorted(path.name for path in killed.results.glob("s*s/*.tmp-*"))
    print(f"\nkills: {len(killed.kills)} ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})")
    print(f"jobs: {len(after)}, of these {len(resumed)} resumed from a saved state; "
          f"done twice: {len(killed.witness.repeated)}; folders of killed attempts left: {len(left)}")  # fmt: skip
    whole = sum(energy(before[job_id]) for job_id in after if job_id in before)
    print(f"energy: {sum(map(energy, after.values())) / whole:.3f} of the undisturbed run's")
    return wrong


def main(arguments: list[str]) -> int:
    """The command."""
    options = _options(arguments)
    undisturbed = options.reuse or options.folder / "a"
    words = {"experiment": options.experiment, **dict(pair.split("=", 1) for pair in options.config)}
    name = Path(options.experiment).stem
    if options.reuse is None:
        started = runs.start(runs.command(undisturbed, cores=options.cores, **words), options.folder / "a.log",
                             options.environment)  # fmt: skip
        begun = time.monotonic()
        if started.wait(options.limit) != 0:
            print(f"the undisturbed run failed, see {started.log}", file=sys.stderr)
            return 2
        print(f"undisturbed: {time.monotonic() - begun:.0f} s", flush=True)
    results = options.folder / "b"
    killed = KilledRun(options, results, len(runs.records(undisturbed)),
                       runs.command(results, cores=options.cores, **words))  # fmt: skip
    code = killed.run()
    if code != 0:
        print(f"the last run ended with exit code {code}; see the last {results}-*.log", file=sys.stderr)
        return 2
    wrong = verdict(undisturbed, killed, name)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    print("\nthe kill test fails" if wrong else f"\nthe kill test holds: {name}'s rows, curves and models are the same")
    return 1 if wrong else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where both runs go")
    parser.add_argument("--experiment", default="tiny")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--reuse", type=Path, help="results folder of an undisturbed run of the same experiment")
    parser.add_argument("--save-every", type=int, default=50, help="steps between two saved states")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds a single run may take")
    parser.add_argument("--config", nargs="*", default=[], help="further settings, such as data=DIR")
    options = parser.parse_args(arguments)
    options.folder = options.folder.absolute()
    options.environment = {"ASSAY_SAVE_EVERY_STEPS": str(options.save_every)}
    if any((options.folder / "b").glob("*")):
        parser.error(f"{options.folder / 'b'} is not empty; the killed run starts from nothing")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
