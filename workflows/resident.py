"""The resident process: it has imported everything and computed nothing, and every job is forked from it.

Importing torch and transformers takes four to six seconds, as long as many a small job. One process per local
Snakemake invocation pays that once. ``python -m workflows.job`` connects to its socket, hands over its arguments,
folder, environment and standard streams, forwards signals and passes the exit code on; to Snakemake and to the
user it *is* the job.

Nobody outlives anybody: jobs die with their client, with the resident process and with its process group; the
resident process kills its jobs and goes when the invocation that started it is gone. The client side imports the
standard library only. The server side is one thread, so that a fork copies no lock that somebody holds.
"""

from __future__ import annotations

import array
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ENVIRONMENT = "ASSAY_RESIDENT"
JOB = "workflows.job:main"
# What jobs are slow to import. Our own modules may be among them: a job compares the code it was planned with to
# the files themselves, so an edited file stops it with a sentence instead of running what was imported.
PRELOADED = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "accelerate",
    "datasets",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "peft",
    "rouge_score.rouge_scorer",
    "codecarbon",
    "workflows.runner",
    "methods.checkpoint",
    "methods.data",
    "methods.loop",
)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
           "NUMEXPR_NUM_THREADS")  # fmt: skip
# read while libraries are imported, so the resident process needs them before its jobs do
IMPORTED_UNDER = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for cards must not start CUDA, which survives no fork
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow would start a thread, which survives none either
}
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE_SECONDS = 10.0


# --- starting it: called by the invocation ------------------------------------------------------------------


@dataclass
class Handle:
    """A started resident process. It ends with ``stop``, and with the process that holds this handle."""

    path: Path
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """What jobs need to find it."""
        return {ENVIRONMENT: str(self.path)}

    def stop(self) -> None:
        """End it and its jobs."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # still importing; jobs die with it, whatever it does
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.path.parent, ignore_errors=True)


def start(run_id: str, threads: int = 1, country: str = "", call: str = JOB,
          modules: Sequence[str] = PRELOADED) -> Handle:  # fmt: skip
    """Start a resident process; jobs may connect at once and begin when its imports are done.

    ``call`` is the ``module:function`` every job runs with its arguments. ``country`` prepares the energy meter.
    """
    # below the system's temporary folder: the path of a socket may have about a hundred characters
    folder = Path(tempfile.mkdtemp(prefix="assay-"))
    path = folder / f"{run_id[:12]}.sock"
    settings = {
        "path": str(path),
        "threads": threads,
        "country": country,
        "call": call,
        "modules": list(modules),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen(128)
        command = [sys.executable, "-m", "workflows.resident", str(listening.fileno()), json.dumps(settings)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                   pass_fds=(listening.fileno(),), env=_server_environment(threads))  # fmt: skip
    return Handle(path, process)


def thread_settings(threads: int) -> dict[str, str]:
    """The variables that numerical libraries read on import."""
    return dict.fromkeys(THREADS, str(threads))


def _server_environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    fixed = {**thread_settings(threads), **IMPORTED_UNDER, "PYTHONPATH": search}
    return {"PYTHONHASHSEED": "0", **os.environ, **fixed}


# --- the client: this is what ``python -m workflows.job`` does ------------------------------------------------


def run_in_resident(argv: Sequence[str], cwd: str, env: Mapping[str, str]) -> int:
    """Run a job in the resident process named by ``ASSAY_RESIDENT``; return its exit code, 128 + n for signal n.

    Where no resident process takes the job it runs in this process, after a line that says so.
    """
    answer = _ask(argv, cwd, env)
    if answer is None:
        print(
            "assay: the resident process does not answer; the job starts on its own.",
            file=sys.stderr,
            flush=True,
        )
        return _function(JOB)(list(argv))
    if len(answer) < 4:
        print("assay: the resident process has gone, and the job with it.", file=sys.stderr, flush=True)
        return 128 + signal.SIGKILL
    return int(struct.unpack("!i", answer)[0])


def _ask(argv: Sequence[str], cwd: str, env: Mapping[str, str]) -> bytes | None:
    """The four bytes of the exit code, fewer when the server died during the job; None if it took no job."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(env.get(ENVIRONMENT, ""))
        except OSError:
            return None
        with _forwarding(connection):
            try:
                _send_request(connection, argv, cwd, env)
            except (BrokenPipeError, ConnectionResetError):
                return None
            return _receive(connection, 4) if _receive(connection, 1) else None


def _function(call: str) -> Callable[[list[str]], int]:
    """What ``module:function`` names."""
    import importlib

    module, _, name = call.partition(":")
    function: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
    return function


def _send_request(connection: socket.socket, argv: Sequence[str], cwd: str, env: Mapping[str, str]) -> None:
    body = json.dumps({"argv": list(argv), "cwd": cwd, "env": dict(env)}).encode("utf-8", "surrogateescape")
    socket.send_fds(connection, [struct.pack("!I", len(body))], [0, 1, 2])
    connection.sendall(body)


@contextmanager
def _forwarding(connection: socket.socket) -> Iterator[None]:
    """Send signals on as one byte each: the job saves its state, and this process waits for it."""

    def forward(number: int, frame: object) -> None:
        with suppress(OSError):  # the job has ended, and its exit code is on its way
            connection.send(bytes([number]))

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _receive(connection: socket.socket, size: int) -> bytes:
    """``size`` bytes, or fewer where the other side has gone."""
    received = b""
    while len(received) < size:
        try:
            part = connection.recv(size - len(received))
        except ConnectionResetError:
            part = b""
        if not part:
            break
        received += part
    return received


# --- the server -----------------------------------------------------------------------------------------------


@dataclass
class Request:
    """One job as its client described it, with the client's three standard streams."""

    argv: list[str]
    cwd: str
    env: dict[str, str]
    streams: list[int]


@dataclass
class Server:
    """Forks a child for every connection, in one thread: sockets, the invocation's pipe and ended children."""

    listening: socket.socket
    main: Callable[[list[str]], int]
    threads: int
    children: dict[int, socket.socket] = field(default_factory=dict)

    def serve(self) -> None:
        """Run until the pipe on standard input closes; then kill every job that is left."""
        self.selector = selectors.DefaultSelector()
        self.wake_read, self.wake_write = socket.socketpair()
        for end in (self.wake_read, self.wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(self.wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.selector.register(0, selectors.EVENT_READ, self._hang_up)
        self.selector.register(self.listening, selectors.EVENT_READ, self._accept)
        self.selector.register(self.wake_read, selectors.EVENT_READ, self._reap)
        self.running = True
        while self.running:
            for key, _ in self.selector.select():
                if key.data is not None:
                    key.data()
                elif key.fileobj in self.children.values():
                    self._obey(key.fileobj)
        for child in self.children:
            kill_tree(child)

    def _hang_up(self) -> None:
        if not os.read(0, 1024):
            self.running = False

    def _accept(self) -> None:
        connection, _ = self.listening.accept()
        connection.settimeout(PATIENCE_SECONDS)
        request = read_request(connection)
        if request is None:
            connection.close()
            return
        # held back over the fork: a signal for the group must find the job, not the server's deafness to it
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        child = os.fork()
        if child == 0:
            self._become(request, connection)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        for stream in request.streams:
            os.close(stream)
        with suppress(OSError):  # the client was killed; the next look at its connection finds that out
            connection.sendall(b"\x01")
        self.children[child] = connection
        self.selector.register(connection, selectors.EVENT_READ, None)

    def _obey(self, connection: Any) -> None:
        """A signal to pass on, or the end of the client, which is the end of its job."""
        child = next(pid for pid, theirs in self.children.items() if theirs is connection)
        try:
            asked = connection.recv(64)
        except OSError:
            asked = b""
        for number in asked:
            os.kill(child, number)
        if not asked:
            self.selector.unregister(connection)
            kill_tree(child)

    def _reap(self) -> None:
        """Tell the clients of ended children their exit codes."""
        with suppress(BlockingIOError):
            self.wake_read.recv(4096)
        for child in list(self.children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            connection = self.children.pop(child)
            with suppress(KeyError):
                self.selector.unregister(connection)
            code = os.waitstatus_to_exitcode(status)
            with suppress(OSError):  # the client was killed
                connection.sendall(struct.pack("!i", code if code >= 0 else 128 - code))
            connection.close()

    def _become(self, request: Request, connection: socket.socket) -> NoReturn:
        """Turn this fork into the job: its streams, folder, environment and signals, nothing of the server's."""
        code = 1
        try:
            _die_with_parent()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.selector.close()
            for held in (
                self.listening,
                self.wake_read,
                self.wake_write,
                connection,
                *self.children.values(),
            ):
                held.close()
            code = _exit_code(lambda: self._run(request))
        finally:
            _leave(code)

    def _run(self, request: Request) -> int:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        _take_over(request, self.threads)
        return self.main(request.argv)


def read_request(connection: socket.socket) -> Request | None:
    """What the client sends first; None for a client that hung up or that stopped halfway."""
    try:
        head, streams, _, _ = socket.recv_fds(connection, 4, 3)
        body = _receive(connection, struct.unpack("!I", head)[0]) if len(head) == 4 else b""
        request = json.loads(body.decode("utf-8", "surrogateescape"))
    except (OSError, ValueError):
        return None
    return Request(request["argv"], request["cwd"], request["env"], list(array.array("i", streams)))


def kill_tree(pid: int) -> None:
    """Kill a child and all its descendants."""
    import psutil

    try:
        family = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()


def _die_with_parent() -> None:
    """Ask Linux to kill this fork when the server dies, however that happens."""
    server = os.getppid()
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != server:
        os._exit(128 + signal.SIGKILL)


def _take_over(request: Request, threads: int) -> None:
    for target, stream in enumerate(request.streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update({**request.env, **thread_settings(threads), **IMPORTED_UNDER})
    os.environ.pop(ENVIRONMENT, None)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  the process's own streams
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["workflows.job", *request.argv]
    _forget_the_server()


def _forget_the_server() -> None:
    """What a fresh process would have: new random numbers, no remembered list of files in code folders."""
    import importlib
    import random

    importlib.invalidate_caches()
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _exit_code(run: Callable[[], int]) -> int:
    """The exit code that Python itself would give: for a number, for ``SystemExit`` and for an exception."""
    try:
        code: Any = run()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001  the last frame of the process: Python prints and ends with 1
        import traceback

        traceback.print_exc()
        code = 1
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _leave(code: int) -> NoReturn:
    """End this fork without unwinding into the server's loop."""
    import atexit

    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)


def _load(call: str, modules: Sequence[str], country: str) -> Callable[[list[str]], int]:
    """Import everything, then put it out of the garbage collector's reach so that forks share the memory."""
    import gc
    import importlib

    for name in modules:
        importlib.import_module(name)
    if country:
        from workflows.energy import prepare

        prepare(country)
    main = _function(call)
    gc.collect()
    gc.freeze()
    return main


def _serve(descriptor: int, settings: dict[str, Any]) -> None:
    # signals meant for jobs reach the whole process group; the server ends with its invocation instead
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    listening = socket.socket(fileno=descriptor)
    listening.set_inheritable(False)
    try:
        main = _load(settings["call"], settings["modules"], settings["country"])
        Server(listening, main, settings["threads"]).serve()
    finally:
        shutil.rmtree(Path(settings["path"]).parent, ignore_errors=True)
    os._exit(0)  # taking a gigabyte of modules apart would keep the invocation waiting for half a second


if __name__ == "__main__":
    _serve(int(sys.argv[1]), json.loads(sys.argv[2]))
