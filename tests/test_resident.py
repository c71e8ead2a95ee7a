"""The resident process: forked jobs behave like processes of their own, and nobody outlives anybody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from workflows import resident
from workflows.resident import Handle, start

ROOT = Path(__file__).parent.parent
CLIENT = """
import os, sys
from workflows.resident import run_in_resident
sys.exit(run_in_resident(sys.argv[1:], os.getcwd(), dict(os.environ)))
"""
JOBS = """
import os, signal, subprocess, sys, time
from pathlib import Path

def main(argv):
    return globals()[argv[0]](*argv[1:])

def code(number):
    return int(number)

def leave(what):
    raise SystemExit(what)

def fail():
    raise ValueError("a bad day")

def told():
    names = ("COLOUR", "ASSAY_RESIDENT", "OMP_NUM_THREADS")
    print(sys.argv[1:], os.getcwd(), *(os.environ.get(name) for name in names))
    print(sys.stdin.read(), file=sys.stderr)

def die(number):
    os.kill(os.getpid(), int(number))

def sleep(file, *polite):
    def save(number, frame):
        Path(file).write_text(f"saved on {number}")
        raise SystemExit(143)
    if polite:
        signal.signal(signal.SIGTERM, save)
        signal.signal(signal.SIGUSR1, save)
    grandchild = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    Path(file).write_text(f"{os.getpid()} {grandchild.pid}")
    time.sleep(60)

def late():
    import added_later
    print(added_later.WORD)

def random_number():
    import random
    print(random.random())

def train():
    import torch
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(20):
        loss = model(torch.randn(32, 64)).logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    import hashlib
    print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest(),
          torch.get_num_threads())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module that jobs run, on the path of every process."""
    (tmp_path / "resident_jobs.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv(resident.ENVIRONMENT, raising=False)
    return tmp_path


@pytest.fixture
def running(folder: Path) -> Iterator[Handle]:
    handle = start("test", call="resident_jobs:main", modules=())
    yield handle
    handle.stop()


def client(handle: Handle, *argv: str, **changes: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **handle.environment, **changes}
    return subprocess.Popen([sys.executable, "-c", CLIENT, *argv], env=environment, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run(handle: Handle, *argv: str, said: str = "", **changes: str) -> tuple[int, str, str]:
    process = client(handle, *argv, **changes)
    out, err = process.communicate(said, timeout=60)
    return process.returncode, out, err


def wait_for(file: Path, words: int) -> list[str]:
    """What a job wrote into a file, once it is all there."""
    return wait_until(lambda: file.read_text().split() if file.exists() else [], words)


def wait_until(read: object, words: int) -> list[str]:
    assert callable(read)
    end = time.monotonic() + 20
    while len(found := read()) < words:
        assert time.monotonic() < end
        time.sleep(0.02)
    return list(found)


def gone(*pids: str | int) -> bool:
    """Whether processes end within a few seconds (a zombie has ended)."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        alive = [path for path in states if path.exists() and path.read_text().split(") ")[1][0] not in "ZX"]
        if not alive:
            return True
        time.sleep(0.05)
    return False


# --- a job is a process of its own -----------------------------------------------------------------------


def test_arguments_folder_environment_and_streams_are_those_of_the_client(
    running: Handle, folder: Path
) -> None:
    assert run(running, "told", said="hello", COLOUR="grün") == (
        0, f"['told'] {os.getcwd()} grün None 1\n", "hello\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("code", "0"), 0, ""),
        (("code", "3"), 3, ""),
        (("leave", "out of luck"), 1, "out of luck"),
        (("fail",), 1, "ValueError: a bad day"),
        (("die", "9"), 137, ""),
        (("die", "15"), 143, ""),
    ],
)
def test_exit_codes_and_messages_pass_through(
    running: Handle, argv: tuple[str, ...], code: int, said: str
) -> None:
    ended, _, err = run(running, *argv)
    assert ended == code
    assert said in err


def test_jobs_run_side_by_side(running: Handle, folder: Path) -> None:
    processes = [client(running, "sleep", str(folder / name)) for name in "ab"]
    pids = [wait_for(folder / name, 2)[0] for name in "ab"]
    assert len(set(pids)) == 2
    assert run(running, "code", "5")[0] == 5
    for process in processes:
        process.kill()
        process.communicate()


def test_a_module_written_after_the_start_is_found(running: Handle, folder: Path) -> None:
    assert run(running, "code", "0")[0] == 0
    (folder / "added_later.py").write_text("WORD = 'fresh'\n")
    assert run(running, "late")[1] == "fresh\n"


def test_two_jobs_have_different_random_numbers(running: Handle) -> None:
    assert run(running, "random_number")[1] != run(running, "random_number")[1]


def test_a_forked_job_computes_the_same_bits_as_a_fresh_process(folder: Path) -> None:
    handle = start("bits", threads=1, call="resident_jobs:main", modules=("torch",))
    forked = [run(handle, "train") for _ in range(2)]
    handle.stop()
    fresh = subprocess.run([sys.executable, "-c", "import resident_jobs as r; r.train()"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert forked[0][1] == forked[1][1] == fresh.stdout
    assert fresh.stdout.endswith(" 1\n")


def test_the_resident_process_has_one_thread_and_no_card_in_use_once_everything_is_imported(
    folder: Path,
) -> None:
    (folder / "resident_jobs.py").write_text("""
import gc, os, sys
def main(argv):
    import torch
    print(len(os.listdir("/proc/self/task")), torch.cuda.is_initialized(), gc.get_freeze_count() > 100_000)
    print(sorted({"lm_eval", "accelerate", "codecarbon", "transformers", "datasets"} - set(sys.modules)))
""")
    handle = start("whole", country="FRA", call="resident_jobs:main")
    assert run(handle, "look")[:2] == (0, "1 False True\n[]\n")
    handle.stop()


# --- signals and deaths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_job_which_saves_its_state(running: Handle, folder: Path, number: int) -> None:
    process = client(running, "sleep", str(folder / "state"), "polite")
    wait_for(folder / "state", 2)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert (folder / "state").read_text() == f"saved on {int(number)}"


def test_an_interrupt_ends_a_job_as_python_does(running: Handle, folder: Path) -> None:
    process = client(running, "sleep", str(folder / "state"))
    wait_for(folder / "state", 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_signal_right_at_the_fork_is_never_lost(running: Handle, folder: Path) -> None:
    assert run(running, "code", "0")[0] == 0
    for attempt in range(10):
        process = client(running, "sleep", str(folder / f"state{attempt}"))
        time.sleep(0.04 + 0.005 * attempt)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
        assert process.returncode in {143, -signal.SIGTERM}


def test_a_killed_client_takes_its_job_and_the_jobs_children_with_it(running: Handle, folder: Path) -> None:
    process = client(running, "sleep", str(folder / "pids"))
    pids = wait_for(folder / "pids", 2)
    process.kill()
    process.communicate()
    assert gone(*pids)
    assert run(running, "code", "0")[0] == 0


def test_everything_ends_with_the_invocation(folder: Path) -> None:
    invocation = f"""
import os, subprocess, sys, time
from workflows.resident import start
handle = start("gone", call="resident_jobs:main", modules=())
environment = {{**os.environ, **handle.environment}}
job = subprocess.Popen([sys.executable, "-c", {CLIENT!r}, "sleep", {str(folder / "pids")!r}], env=environment)
print(handle.process.pid, handle.path, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", invocation], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server, path = process.stdout.readline().split()
        pids = wait_for(folder / "pids", 2)
        process.kill()
    assert gone(server, *pids)
    assert not Path(path).parent.exists()


def test_everything_dies_with_its_process_group(folder: Path) -> None:
    invocation = f"""
import os, subprocess, sys, time
from workflows.resident import start
handle = start("group", call="resident_jobs:main", modules=())
environment = {{**os.environ, **handle.environment}}
job = subprocess.Popen([sys.executable, "-c", {CLIENT!r}, "sleep", {str(folder / "pids")!r}], env=environment)
print(handle.process.pid, job.pid, handle.path, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", invocation], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    assert process.stdout is not None
    server, job, path = process.stdout.readline().split()
    pids = wait_for(folder / "pids", 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert gone(server, job, *pids)
    Path(path).unlink()
    Path(path).parent.rmdir()


def test_a_job_dies_with_a_killed_resident_process_and_its_client_says_so(
    running: Handle, folder: Path
) -> None:
    process = client(running, "sleep", str(folder / "pids"))
    pids = wait_for(folder / "pids", 2)
    running.process.kill()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert "the resident process has gone, and the job with it" in err
    assert gone(pids[0])
    os.kill(int(pids[1]), signal.SIGKILL)  # its own child is nobody's now


# --- without a resident process ----------------------------------------------------------------------------


@pytest.fixture
def own_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the client runs in its own process."""
    ran: list[list[str]] = []
    monkeypatch.setattr(resident, "_function", lambda call: lambda argv: ran.append(argv) or 4)
    return ran


def test_where_no_resident_process_answers_the_job_starts_on_its_own(
    own_job: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {resident.ENVIRONMENT: str(tmp_path / "no.sock")}
    assert resident.run_in_resident(["a", "b"], "/", environment) == 4
    assert own_job == [["a", "b"]]
    assert "does not answer; the job starts on its own" in capsys.readouterr().err


def test_a_job_given_to_a_resident_process_that_fails_to_import_starts_on_its_own(
    own_job: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    handle = start("broken", call="resident_jobs:main", modules=("no_such_module",))
    assert resident.run_in_resident(["a"], "/", handle.environment) == 4
    handle.stop()
    assert own_job == [["a"]]
    assert "no_such_module" in capfd.readouterr().err


def test_the_client_imports_the_standard_library_only() -> None:
    code = "import sys, workflows.resident; print(sorted({'torch','psutil','numpy','pydantic'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout == "[]\n"
