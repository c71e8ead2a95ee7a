"""Runs of the workflow and what is compared between two of them; shared by the benchmarks and the tests."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
COSTS = ("energy", "time", "memory", "speed")
# of jobs.csv: what two runs of the same jobs may differ in
TIED_TO_A_RUN = (
    "attempts", "start", "end", "seconds_inside", "seconds_outside", "energy_kwh", "cpu_kwh", "gpu_kwh", "ram_kwh",
    "energy_source", "alone", "peak_memory_mb", "commit", "dirty", "machine", "resumed_from_step",
)  # fmt: skip


# --- starting and ending --------------------------------------------------------------------------------------


@dataclass
class Started:
    """A Snakemake that is the leader of its own process group, with its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL for the whole group: Snakemake, the resident process and every job."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float) -> int:
        """The exit code; a run that takes longer is killed and raises ``subprocess.TimeoutExpired``."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def fresh(name: str) -> Path:
    """A folder below ``build/`` that is not there yet."""
    return ROOT / "build" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def command(results: Path, experiment: str, cores: int = 2, *flags: str, **config: object) -> list[str]:
    """A call of Snakemake on this repository."""
    values = {"experiment": experiment, "results": results, **config}
    words = [f"{key}={value}" for key, value in values.items()]
    return [sys.executable, "-m", "snakemake", "--cores", str(cores), *flags, "--config", *words]


def start(words: list[str], log: Path, environment: Mapping[str, str] | None = None) -> Started:
    """Start a call in a process group of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )  # fmt: skip
    return Started(process, log)


def members(group: int) -> Iterator[tuple[int, str]]:
    """Process numbers and command lines of a process group's living members, as far as this user can see them."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                line = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode()
                # an ended process that nobody has asked about yet has no command line
                if os.getpgid(int(entry.name)) == group and line:
                    yield int(entry.name), line
            except OSError:
                continue  # it has ended meanwhile


# --- records ----------------------------------------------------------------------------------------------------


def records(results: Path) -> dict[str, dict[str, Any]]:
    """Every record of a results folder by id."""
    paths = sorted(look(results, "s*s/*/record.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths if _whole(path)}


def look(results: Path, pattern: str) -> list[Path]:
    """What matches a pattern now; folders that go while one looks were not there."""
    try:
        return list(results.glob(pattern))
    except FileNotFoundError:
        return look(results, pattern)


def _whole(path: Path) -> bool:
    return ".tmp-" not in path.parent.name


@dataclass
class Witness:
    """Remembers each record when it was first seen; a record that changed afterwards was made twice."""

    results: Path
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    def look(self) -> int:
        """Look at all records; returns how many there are."""
        there = dict(self._stamps())
        for job_id, stamp in self.seen.items():
            if there.get(job_id) != stamp:
                self.repeated.add(job_id)
        self.seen |= {job_id: stamp for job_id, stamp in there.items() if job_id not in self.seen}
        return len(there)

    def _stamps(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for path in look(self.results, "s*s/*/record.json"):
            if _whole(path):
                status = path.stat()
                yield path.parent.name, (status.st_ino, status.st_mtime_ns)


# --- comparing ----------------------------------------------------------------------------------------------------


def rows(path: Path, without: Iterable[str] = (), keep_costs: bool = False) -> str:
    """A table as text, without some columns and, unless asked for, without the rows of cost and speed."""
    dropped = set(without)
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or [] if name not in dropped]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for line in reader:
            if keep_costs or line.get("evaluation") not in COSTS:
                writer.writerow(line)
    return buffer.getvalue()


def differences(first: Path, second: Path, experiment: str) -> list[str]:
    """What two results folders disagree on, in sentences: rows, curves, jobs and the bytes of every stage."""
    found = []
    for name, without in (("results.csv", ()), ("curves.csv", ()), ("jobs.csv", TIED_TO_A_RUN)):
        one, other = (rows(folder / experiment / name, without) for folder in (first, second))
        if one != other:
            found.append(f"{name}: {_first_difference(one, other)}")
    one, other = records(first), records(second)
    if set(one) != set(other):
        found.append(f"jobs: only in one of the two: {', '.join(sorted(set(one) ^ set(other))[:5])}")
    for job_id in sorted(set(one) & set(other)):
        if one[job_id]["kind"] == "stage" and one[job_id]["files"] != other[job_id]["files"]:
            found.append(f"{job_id}: its files differ")
    return found


def _first_difference(one: str, other: str) -> str:
    left, right = one.splitlines(), other.splitlines()
    for number, (mine, theirs) in enumerate(zip(left, right, strict=False), start=1):
        if mine != theirs:
            return f"line {number}:\n  {mine}\n  {theirs}"
    return f"{len(left)} and {len(right)} lines"
