"""The kill test: an experiment killed with SIGKILL twenty times ends with the rows of an undisturbed run.

    python tests/benchmarks/kill.py [DIR] [--experiment tiny] [--kills 20] [--reuse DIR/a]

DIR/a gets the undisturbed run, DIR/b the one whose whole process group is killed, at moments spread over its jobs:
right after a state was saved, while one is being saved or a model is being written, in the middle of training
and of scoring, and while the report is being drawn. Exit code 0 if everything that must hold does.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import runs

LOOK_SECONDS = 0.003
# where energy is estimated from the load of the machine, two runs of one job differ by a few per cent
LEAST_ENERGY = 0.95
# which moments are looked for, as shares of all kills; the rest meets the report
SHARES = {"saved": 0.35, "saving": 0.15, "training": 0.15, "scoring": 0.2}
# the last planned kill but those of the report comes when this share of the jobs is done
LAST_SHARE = 0.9


# --- moments --------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What can be seen of a run from its results folder and its processes."""

    results: Path
    hit: set[str] = field(default_factory=set)
    met: str = ""
    # folders of attempts that were killed before
    old: set[Path] = field(default_factory=set)

    def begin(self) -> None:
        """A run begins: what lies there now is of runs that were killed."""
        self.old = {
            path
            for pattern in ("s*s/*.tmp-*", "scratch/*/tmp-*")
            for path in runs.look(self.results, pattern)
        }

    def saved(self) -> bool:
        """A state is complete of a job that no kill has hit after a saved state yet."""
        for state in runs.look(self.results, "scratch/*/state-*"):
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
        return self._any(f"stages/{job_id}.tmp-*") and not (self.results / "stages" / job_id).exists()

    def _any(self, pattern: str) -> bool:
        for found in runs.look(self.results, pattern):
            if not self.old & {found, *found.parents}:
                self.met = found.relative_to(self.results).parts[1]
                return True
        return False


@dataclass
class Kill:
    """One kill: what it was meant for, what it met, and how far the run had come."""

    number: int
    kind: str
    met: str
    records: int
    seconds: float


def spread(kills: int) -> list[str]:
    """The kinds of moments, in the order in which a run comes by them: scores lie behind the stages."""
    counts = {kind: round(kills * share) for kind, share in SHARES.items()}
    counts["reporting"] = max(1, kills - sum(counts.values()))
    early = [kind for kind in ("saved", "saving", "training") for _ in range(counts[kind])]
    random.Random(0).shuffle(early)
    first, second = early[: len(early) // 2], early[len(early) // 2 :] + ["scoring"] * counts["scoring"]
    random.Random(1).shuffle(second)
    return [*first, *second, *["reporting"] * counts["reporting"]][:kills]


# --- the killed run -----------------------------------------------------------------------------------------------


class KilledRun:
    """Runs an experiment into a folder and kills it again and again."""

    def __init__(self, options: argparse.Namespace, results: Path, jobs: int, words: list[str]) -> None:
        self.options, self.results, self.jobs, self.words = options, results, jobs, words
        self.watch, self.witness = Watch(results), runs.Witness(results)
        self.kills: list[Kill] = []
        self.wrong: list[str] = []
        self.planned = spread(options.kills)
        self.during = sum(kind != "reporting" for kind in self.planned)

    def run(self) -> None:
        """All kills, then one run to the end."""
        for number in range(1, self.options.kills + 1):
            started = self._start(number)
            code = self._killed(started, number)
            if code is not None:
                self.wrong.append(
                    f"run {number} ended with exit code {code} before it was killed, see {started.log}"
                )
                # nothing is left to do but the report, which every run draws anew
                self.planned = ["reporting"] * len(self.planned)
        started = self._start(self.options.kills + 1)
        if started.wait(self.options.limit) != 0:
            self.wrong.append(f"the last run failed, see {started.log}")
        self.witness.look()

    def _start(self, number: int) -> runs.Started:
        self.watch.begin()
        log = self.results.with_name(f"{self.results.name}-{number:02d}.log")
        return runs.start(self.words, log, self.options.environment)

    def _killed(self, started: runs.Started, number: int) -> int | None:
        """Kill a run at its moment; its exit code where it was over before."""
        begun = time.monotonic()
        self._wait(started, lambda: self.witness.look() >= self._due(number), self.options.limit)
        kind = self._moment(started, number)
        if kind in ("training", "scoring", "reporting"):
            time.sleep(random.Random(number).uniform(0, 0.8))
        if not started.running():
            return started.process.returncode
        started.kill()
        if kind == "saved":
            self.watch.hit.add(self.watch.met)
        self.planned.remove(kind if kind in self.planned else self.planned[0])
        self._note(Kill(number, kind, self.watch.met, self.witness.look(), time.monotonic() - begun), started)
        return None

    def _due(self, number: int) -> int:
        """How many jobs are to be finished first: they grow from kill to kill, so that no stretch is left out."""
        if self.planned[0] == "reporting":
            return 0
        return int(self.jobs * LAST_SHARE * (number - 1) / self.during)

    def _moment(self, started: runs.Started, number: int) -> str:
        """Wait for the moment that is planned next; when the next kill is due, for any that is still planned."""

        def due() -> list[str]:
            late = self.planned[0] != "reporting" and self.witness.look() >= max(self._due(number + 1), 1)
            return self._now(started, self.planned if late else self.planned[:1]) or (
                self._now(started, SHARES) if late else []
            )

        return next(iter(self._wait(started, due, self.options.limit)), "none")

    def _now(self, started: runs.Started, kinds: Iterable[str]) -> list[str]:
        """The first of these moments that it is now."""
        for kind in dict.fromkeys(kinds):
            if (
                self.watch.reporting(started.process.pid)
                if kind == "reporting"
                else getattr(self.watch, kind)()
            ):
                return [kind]
        return []

    def _note(self, kill: Kill, started: runs.Started) -> None:
        self.kills.append(kill)
        print(f"kill {kill.number:2d}  {kill.kind:9s} {kill.records:4d} records  {kill.seconds:6.1f} s  {kill.met}",
              flush=True)  # fmt: skip
        time.sleep(0.2)
        for number, line in runs.members(started.process.pid):
            self.wrong.append(f"process {number} outlived kill {kill.number}: {line[:80]}")

    def _wait(self, started: runs.Started, moment: Callable[[], Any], seconds: float) -> Any:
        """What ``moment`` gives as soon as it is something; an empty list when time or the run is over."""
        deadline = time.monotonic() + seconds
        while started.running() and time.monotonic() < deadline:
            if met := moment():
                return met
            time.sleep(LOOK_SECONDS)
        return []


# --- the verdict --------------------------------------------------------------------------------------------------


def energy(record: dict[str, Any]) -> float:
    """What a job spent over all its attempts, in kWh."""
    return float(record["energy"]["total_kwh"])


def resumed_energy(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Energy of the resumed jobs over that of the same jobs undisturbed, the untouched jobs' own ratio taken as 1.

    Where energy is estimated it grows with the time a job takes, and so with whatever else the machine did during
    either run; the jobs that no kill met measure that.
    """
    resumed = [i for i, record in after.items() if record["resumed_from_step"] > 0 and i in before]
    untouched = [i for i, record in after.items() if record["attempts"] == 1 and i in before]
    if not resumed or not untouched:
        return math.inf
    both = [
        sum(energy(after[i]) for i in ids) / sum(energy(before[i]) for i in ids)
        for ids in (resumed, untouched)
    ]
    return both[0] / both[1]


def verdict(undisturbed: Path, killed: KilledRun, experiment: str) -> list[str]:
    """Print the figures; returns what does not hold, in sentences."""
    before, after = runs.records(undisturbed), runs.records(killed.results)
    resumed = {job_id: record for job_id, record in after.items() if record["resumed_from_step"] > 0}
    wrong = runs.differences(undisturbed, killed.results, experiment) + killed.wrong
    wrong += [f"{job_id} was finished and was done again" for job_id in sorted(killed.witness.repeated)]
    print(f"\n{'job':44s} {'attempts':>8s} {'resumed from':>12s} {'of steps':>8s} {'energy':>7s}")
    for job_id, record in after.items():
        if record["attempts"] > 1:
            ratio = energy(record) / energy(before[job_id]) if job_id in before else float("nan")
            steps = record["notes"].get("steps", "")
            print(
                f"{job_id:44s} {record['attempts']:8d} {record['resumed_from_step']:12d} {steps!s:>8s} {ratio:6.2f}x"
            )
    ratio = resumed_energy(before, after)
    if ratio < LEAST_ENERGY:
        wrong.append(f"resumed jobs report {ratio:.2f} of the energy of undisturbed ones")
    trained = sum("steps" in record["notes"] for record in before.values())
    wanted = min(5, trained, spread(killed.options.kills).count("saved"))
    if len(resumed) < wanted:
        wrong.append(f"{len(resumed)} records show resumed_from_step > 0, and {wanted} should")
    if len(killed.kills) < killed.options.kills:
        wrong.append(f"{len(killed.kills)} kills of {killed.options.kills} met a running workflow")
    kinds = Counter(kill.kind for kill in killed.kills)
    left = sorted(path.name for path in runs.look(killed.results, "s*s/*.tmp-*"))
    print(f"\nkills: {len(killed.kills)} ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})")
    print(f"jobs: {len(after)}, of these {len(resumed)} resumed from a saved state; "
          f"done twice: {len(killed.witness.repeated)}; folders of killed attempts left: {len(left)}")  # fmt: skip
    if resumed:
        print(f"energy of the resumed jobs: {ratio:.3f} of what they take undisturbed (untouched jobs: 1)")
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
    killed.run()
    wrong = verdict(undisturbed, killed, name)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    print(
        "\nthe kill test fails"
        if wrong
        else f"\nthe kill test holds: {name}'s rows, curves and models are the same"
    )
    return 1 if wrong else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=runs.fresh("kill"), help="where both runs go")
    parser.add_argument("--experiment", default="tiny")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument(
        "--reuse", type=Path, help="results folder of an undisturbed run of the same experiment"
    )
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
