"""Claims on jobs: one worker at a time, and a dead worker's job is free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from methods.stage import AssayError
from workflows import claim
from workflows.claim import Claim

JOB = "unlearn.satimp-0123456789ab"
HOLD = """
import sys, time
from pathlib import Path
from workflows.claim import Claim
with Claim(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def outside_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def holder(results: Path, seconds: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the claim."""
    command = [sys.executable, "-c", HOLD, str(results), JOB, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write(results: Path, seconds_ago: float = 0.0, **changes: Any) -> Path:
    """A claim as another host would have left it."""
    path = results / "claims" / f"{JOB}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = {
        **claim._identity(),
        "host": "elsewhere",
        "boot": "b",
        "pid": 1,
        "process_start": "1",
        **changes,
    }
    path.write_text(json.dumps(identity))
    os.utime(path, (time.time() - seconds_ago, time.time() - seconds_ago))
    return path


def free(results: Path) -> bool:
    mine = Claim(results, JOB)
    got = mine.acquire(wait=False)
    mine.release()
    return got


def test_a_claim_says_who_holds_it_and_is_gone_afterwards(tmp_path: Path) -> None:
    with Claim(tmp_path, JOB) as mine:
        said = json.loads(mine.path.read_text())
        assert said["pid"] == os.getpid()
        assert said["host"] == claim.host()["host"]
        assert said["boot"]
        assert said["process_start"] == claim.process_start(os.getpid())
    assert [path.name for path in (tmp_path / "claims").iterdir()] == [".lock"]


def test_a_live_claim_is_not_given_to_a_second_process(tmp_path: Path) -> None:
    with holder(tmp_path):
        assert not free(tmp_path)


def test_a_job_waits_for_a_live_claim_and_says_for_whom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holder(tmp_path, seconds=1.5) as other:
        begun = time.monotonic()
        with Claim(tmp_path, JOB):
            assert 0.5 < time.monotonic() - begun < 10
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"waiting for process {other.pid} of " in said


def test_the_claim_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        begun = time.monotonic()
        with Claim(tmp_path, JOB) as mine:
            assert json.loads(mine.path.read_text())["pid"] == os.getpid()
        assert time.monotonic() - begun < 1


def test_a_process_that_took_over_the_number_of_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    write(tmp_path, **claim.host(), pid=os.getpid(), process_start="1")
    assert free(tmp_path)


def test_a_claim_from_before_the_machine_started_anew_is_dead(tmp_path: Path) -> None:
    if not claim.host()["machine"]:
        pytest.skip("this machine has no installation number")
    write(tmp_path, **{**claim.host(), "boot": "an earlier one"})
    assert free(tmp_path)


def test_a_remote_claim_lives_while_it_is_touched_and_dies_after_ten_minutes(tmp_path: Path) -> None:
    write(tmp_path, seconds_ago=500)
    assert not free(tmp_path)
    write(tmp_path, seconds_ago=700)
    assert free(tmp_path)


def test_the_age_of_a_claim_is_told_by_the_clock_of_the_file_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, seconds_ago=100)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a host whose own clock is decades behind
    mine = Claim(tmp_path, JOB)
    assert 99 < mine._behind() < 160
    assert path.exists()


def test_a_claim_that_was_never_filled_is_dead_after_seconds(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text("")
    assert not free(tmp_path)
    os.utime(path, (time.time() - 30, time.time() - 30))
    assert free(tmp_path)


def test_a_held_claim_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "TOUCH_SECONDS", 0.05)
    with Claim(tmp_path, JOB) as mine:
        os.utime(mine.path, (0, 0))
        time.sleep(0.5)
        assert mine._behind() < 60


def test_a_living_process_keeps_its_claim_through_a_long_sleep_of_the_machine(tmp_path: Path) -> None:
    with holder(tmp_path):
        path = tmp_path / "claims" / f"{JOB}.json"
        os.utime(path, (time.time() - 9000, time.time() - 9000))
        assert not free(tmp_path)


def test_of_many_takers_of_a_dead_claim_one_gets_it(tmp_path: Path) -> None:
    for _ in range(20):
        write(tmp_path, seconds_ago=700)
        claims = [Claim(tmp_path, JOB) for _ in range(8)]
        gate = threading.Barrier(8)
        got: list[Claim] = []

        def take(each: Claim, gate: threading.Barrier = gate, got: list[Claim] = got) -> None:
            gate.wait()
            if each.acquire(wait=False):
                got.append(each)

        threads = [threading.Thread(target=take, args=(each,)) for each in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].release()


def test_two_processes_never_work_on_one_job_together(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from workflows.claim import Claim
for _ in range(4):
    with Claim(Path(sys.argv[1]), "size-0"):
        inside = Path(sys.argv[1]) / "inside"
        inside.touch(exist_ok=False)
        time.sleep(0.02)
        inside.unlink()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_release_leaves_alone_a_claim_that_others_took_over(tmp_path: Path) -> None:
    mine = Claim(tmp_path, JOB)
    mine.acquire()
    mine.path.unlink()
    theirs = write(tmp_path)
    mine.release()
    assert json.loads(theirs.read_text())["host"] == "elsewhere"


def test_under_a_scheduler_a_held_claim_is_a_sentence_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    write(tmp_path, scheduler_job="811", user="ada")
    begun = time.monotonic()
    with pytest.raises(
        AssayError, match=r"worked on by process 1 of ada on elsewhere \(since .*Slurm job 811\)"
    ):
        Claim(tmp_path, JOB).acquire()
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("answer", "dead"),
    [
        ("echo RUNNING", False),
        ("true", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_the_claim_of_an_ended_scheduler_job_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, dead: bool
) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    write(tmp_path, scheduler_job="811")
    assert free(tmp_path) is dead


def test_an_id_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssayError, match="no job id"):
        Claim(tmp_path, "../outside")
