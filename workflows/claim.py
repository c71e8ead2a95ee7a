"""Claims: whoever works on a job says so in ``results/claims/<id>.json``, and nobody else starts it.

The file is made with O_CREAT|O_EXCL, locked with ``flock`` and touched every thirty seconds. A claim is dead
when its process is gone, its scheduler job has ended, or its time stamp is ten minutes behind the clock of the
file server. Claims only save work: publication by renaming keeps results right even where two jobs run at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from methods.stage import AssayError

TOUCH_SECONDS = 30.0
STALE_SECONDS = 600.0
# a claim that its maker had no time to fill: the process died between making and writing the file
EMPTY_SECONDS = 10.0
SQUEUE_SECONDS = 20.0


# --- this host ------------------------------------------------------------------------------------------


def user() -> str:
    """The user's name, or the number where the machine knows no name for it."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def host_folder(name: str) -> Path:
    """A private folder of this user on this host, for locks that mean nothing elsewhere."""
    top = Path(tempfile.gettempdir()) / f"assay-{user()}"
    for folder in (top, top / name):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise AssayError(f"{folder} belongs to another user; set TMPDIR to a folder of your own.")
    return top / name


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


@cache
def host() -> dict[str, str]:
    """Name, installation and current boot of this machine."""
    boot = _text("/proc/sys/kernel/random/boot_id")
    return {"host": socket.gethostname(), "machine": _text("/etc/machine-id"), "boot": boot}


def process_start(pid: int) -> str:
    """When a process began, as an opaque text; empty when it is gone (a zombie is gone, too)."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if fields:
        return "" if fields[0] in "ZX" else fields[19]
    if os.path.isdir("/proc/self"):
        return ""
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return shown.stdout.strip()


def scheduler_job() -> str:
    """The Slurm job this process belongs to; empty outside a scheduler."""
    return os.environ.get("SLURM_JOB_ID", "")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock. Where the file system has none, go on: publication stays atomic without it."""
    with open(path, "a", encoding="utf-8") as file:
        _flock(file.fileno(), fcntl.LOCK_EX)
        yield


def _flock(descriptor: int, how: int) -> bool | None:
    """Whether the lock was got; None where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


# --- one claim --------------------------------------------------------------------------------------------


class Claim:
    """The right to work on one job, as a context manager that waits or with ``acquire`` and ``release``."""

    def __init__(self, results: Path, job_id: str) -> None:
        if Path(job_id).name != job_id:
            raise AssayError(f"{job_id!r} is no job id.")
        self.job_id = job_id
        self.folder = results / "claims"
        self.path = self.folder / f"{job_id}.json"
        self._descriptor: int | None = None
        self._released = threading.Event()
        self._asked: tuple[str, float, bool] = ("", 0.0, False)

    def __enter__(self) -> Self:
        self.acquire(wait=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.release()

    def acquire(self, wait: bool = True) -> bool:
        """Take the claim; False when another holds it and ``wait`` is off.

        A job on this machine waits for a live claim and says once for whom. Under a scheduler, where waiting
        would occupy a node, it is an AssayError at once.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        pause, said = 0.2, False
        while not self._try():
            if not wait:
                return False
            holder = self._read()
            if scheduler_job():
                raise AssayError(
                    f"{self.job_id} is being worked on by {_named(holder)}; "
                    "this job leaves the node free: start the workflow again once the other is done."
                )
            if not said:
                print(f"assay: {self.job_id}: waiting for {_named(holder)}", file=sys.stderr, flush=True)
                said = True
            time.sleep(pause)
            pause = min(pause * 1.5, 2.0)
        self._toucher = threading.Thread(target=self._touch, name="claim", daemon=True)
        self._toucher.start()
        return True

    def release(self) -> None:
        """Give the claim back. Does nothing when it is not held, and leaves alone what others took over."""
        if self._descriptor is None:
            return
        self._released.set()
        self._toucher.join()
        with _locked(self.folder / ".lock"):
            if self._ours():
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _try(self) -> bool:
        return self._make() or (self._dead() and self._remove_dead() and self._make())

    def _make(self) -> bool:
        try:
            self._descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return False
        _flock(self._descriptor, fcntl.LOCK_EX)
        try:
            os.write(self._descriptor, json.dumps(_identity()).encode())
            os.fsync(self._descriptor)
        except OSError:  # the disk is full: an empty claim would only hold up the next who tries
            self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None
            raise
        self._released = threading.Event()
        if self._ours():
            return True
        # taken for an abandoned empty file in the meantime: its maker was stopped for seconds
        os.close(self._descriptor)
        self._descriptor = None
        return False

    def _ours(self) -> bool:
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _touch(self) -> None:
        released, descriptor = self._released, self._descriptor
        while not released.wait(TOUCH_SECONDS):
            if descriptor is not None:
                # a file server out of reach is asked again; ten minutes of that and the claim is lost anyway
                with suppress(OSError):
                    os.utime(descriptor)

    # --- the claim of somebody else ---

    def _read(self) -> dict[str, Any]:
        """The claim as it stands; empty when it is gone or not written yet."""
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _remove_dead(self) -> bool:
        """Remove a claim that is dead, looked at again under the folder's lock: of two takers one does it."""
        with _locked(self.folder / ".lock"):
            before = self._token()
            if not self._dead():
                return False
            aside = self.folder / f".dead-{uuid.uuid4().hex}"
            # renamed first: where locks do nothing, the slower of two takers finds the file gone
            try:
                if self._token() != before:
                    return False
                os.rename(self.path, aside)
            except FileNotFoundError:
                return True
            aside.unlink()
            return True

    def _token(self) -> str:
        return str(self._read().get("token", ""))

    def _dead(self) -> bool:
        holder = self._read()
        if not holder:
            return self._behind() > EMPTY_SECONDS and not self._held_here()
        alive = self._process_says(holder)
        if alive is not None:
            return not alive
        return self._scheduler_ended(holder) or self._behind() > STALE_SECONDS

    def _process_says(self, holder: dict[str, Any]) -> bool | None:
        """Whether the holder lives, by its process and its lock; None where this host cannot tell.

        A lock held by a process that is nowhere to be seen is another container's, or a left-over child's; a
        living process without its lock may be another one with the same number. Time decides both.
        """
        if any(holder.get(key) != host()[key] for key in ("host", "machine")):
            return None
        if holder.get("boot") != host()["boot"]:
            # the same installation started anew; without an installation number it may be a namesake
            return False if host()["machine"] else None
        started = process_start(int(holder.get("pid", 0)))
        running = started != "" and started == holder.get("process_start")
        held = self._held_here()
        if running and held:
            return True
        return None if running or held else False

    def _held_here(self) -> bool | None:
        """Whether a process of this host holds the claim's lock; None where there are no locks."""
        try:
            with open(self.path, encoding="utf-8") as file:
                got = _flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        return None if got is None else not got

    def _scheduler_ended(self, holder: dict[str, Any]) -> bool:
        job = str(holder.get("scheduler_job") or "")
        if not job or shutil.which("squeue") is None:
            return False
        if job == scheduler_job() and int(holder.get("restarts", 0)) < int(_identity()["restarts"]):
            return True  # this very job, put back into the queue
        asked, when, ended = self._asked
        if asked != job or time.monotonic() - when > SQUEUE_SECONDS:
            ended = _ended_in_queue(job)
            self._asked = (job, time.monotonic(), ended)
        return ended

    def _behind(self) -> float:
        """Seconds since the last touch by the file server's clock; infinite when the claim is gone.

        The server's clock is the time stamp of a file just written beside the claim: the clocks of two hosts
        may differ by minutes.
        """
        try:
            touched = self.path.stat().st_mtime
        except FileNotFoundError:
            return float("inf")
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".clock-") as file:
            file.write(b"0")
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_mtime - touched


def _identity() -> dict[str, Any]:
    return {
        **host(), "pid": os.getpid(), "process_start": process_start(os.getpid()), "user": user(),
        "scheduler_job": scheduler_job(), "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": uuid.uuid4().hex,
    }  # fmt: skip


def _named(holder: dict[str, Any]) -> str:
    """``process 812 of ada on node3 (since 2025-03-01 09:30:00)``."""
    if not holder:
        return "a job that has just begun"
    queued = f", Slurm job {holder['scheduler_job']}" if holder.get("scheduler_job") else ""
    who = f"process {holder.get('pid')} of {holder.get('user')} on {holder.get('host')}"
    return f"{who} (since {holder.get('since')}{queued})"


def _ended_in_queue(job: str) -> bool:
    """Whether Slurm no longer knows the job. A queue that does not answer proves nothing."""
    try:
        shown = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format", "%T"],
                               capture_output=True, text=True, check=False, timeout=30)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    if shown.returncode == 0:
        return shown.stdout.strip() == ""
    return "invalid job id" in shown.stderr.lower()
