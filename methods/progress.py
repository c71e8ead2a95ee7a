"""Long work that can be killed: resumable state, stop signals, seeded generators and progress bars.

A method that takes longer than a few seconds keeps a ``State`` — how many steps are done, tensors, and plain
values — and saves it when ``due``::

    state = progress.load()
    for step in range(state.step if state else 0, steps):
        ...
        if progress.due(step + 1):
            progress.save(step + 1, tensors, values)      # raises Interrupted after a stop signal

The state is written beside the old one, flushed to the disk and only then renamed, so that whatever is killed,
whenever, finds either the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from methods.stage import AssayError, Interrupted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REVISION = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LINE_SECONDS = 10.0
# Between two states that take long to write (tens of gigabytes) lies this many times the time it takes.
SAVING_SHARE = 20


@dataclass(frozen=True)
class State:
    """How far a job had come: ``step`` steps are done. ``extra`` is what the runner asked to be kept."""

    step: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class Progress:
    """Resumable state of one job in ``scratch``, its stop signals and its progress bars.

    Args:
        scratch: folder of this job alone; made when the first state is saved.
        seed: what ``random`` derives its generators from.
        label: written in front of progress lines.
        save_seconds: least time between two states that are saved because time has passed.
        extra_state: called at each save; its answer comes back as ``State.extra`` (the energy spent so far).
    """

    def __init__(
        self,
        scratch: Path,
        seed: int,
        label: str = "",
        save_seconds: float = 30.0,
        extra_state: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.scratch = Path(scratch)
        self.seed = seed
        self.label = label
        self.save_seconds = save_seconds
        self.extra_state = extra_state
        self.stopping = False
        self._last_save = time.monotonic()
        self._save_cost = 0.0
        self._every = _forced_interval()
        self._previous: dict[int, Any] = {}

    def load(self) -> State | None:
        """The newest complete state, or None for a job that starts afresh. From here on stop signals wait."""
        self.watch()
        states = self._states()
        if not states:
            return None
        from safetensors.torch import load_file

        try:
            content = json.loads((states[-1] / "state.json").read_text(encoding="utf-8"))
            tensors = load_file(states[-1] / "tensors.safetensors")
        except (OSError, ValueError) as error:
            raise AssayError(
                f"{states[-1]} cannot be read ({error}): delete the folder to start afresh."
            ) from None
        return State(content["step"], tensors, content["values"], content["extra"])

    def save(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Replace the state atomically.

        Args:
            tensors: written as safetensors. ``values``: anything JSON can hold; floats come back bit for bit.
        Raises:
            Interrupted: a stop signal had come; the state is safe.
        """
        start = time.monotonic()
        self.scratch.mkdir(parents=True, exist_ok=True)
        old = self._states()
        number = int(old[-1].name.partition("-")[2]) + 1 if old else 0
        temporary = self.scratch / f"tmp-{uuid.uuid4().hex}"
        try:
            self._write(temporary, step, tensors, values)
            os.rename(temporary, self.scratch / f"state-{number:08d}")
        except OSError as error:
            raise AssayError(
                f"the state of step {step} could not be saved in {self.scratch}: {error}."
            ) from error
        finally:
            for unfinished in self.scratch.glob("tmp-*"):
                shutil.rmtree(unfinished)
        flush(self.scratch)
        for folder in old:
            shutil.rmtree(folder)
        self._last_save = time.monotonic()
        self._save_cost = self._last_save - start
        self.stop_if_asked(step)

    def stop_if_asked(self, step: int) -> None:
        """Raise ``Interrupted`` after a stop signal; for jobs of several processes, where one of them saves."""
        if self.stopping:
            raise Interrupted(
                f"{self.label or 'the job'} was asked to stop and has saved its state at step {step}."
            )

    def due(self, step: int) -> bool:
        """Whether to save now: a signal came, ``save_seconds`` have passed, or the test variable says so."""
        self.watch()
        forced = self._every > 0 and step % self._every == 0
        patience = max(self.save_seconds, SAVING_SHARE * self._save_cost)
        return self.stopping or forced or time.monotonic() - self._last_save > patience

    def random(self, step: int) -> torch.Generator:
        """A CPU generator made from (seed, step): a resumed run draws what an undisturbed one draws."""
        import torch

        return torch.Generator().manual_seed(derive_seed(self.seed, step))

    def bar(self, total: int, description: str = "", initial: int = 0) -> Bar:
        """Counts from ``initial`` to ``total``: a bar on a terminal, a line every ten seconds in a log."""
        words = " ".join(word for word in (self.label, description) if word)
        return Bar(total, words, initial, sys.stderr)

    # --- signals ---------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Let stop signals wait for the next save. A second signal ends the process as it always would."""
        if self._previous or self.stopping or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._stop)

    def release(self) -> None:
        """Give the signals back: nothing would look at ``stopping`` any more."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        self.release()

    # --- files -----------------------------------------------------------------------------------------------

    def _states(self) -> list[Path]:
        return sorted(self.scratch.glob("state-*"))

    def _write(self, folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            folder / "tensors.safetensors",
        )
        extra = self.extra_state() if self.extra_state else {}
        content = {"step": step, "values": values, "extra": extra}
        (folder / "state.json").write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        for path in (folder / "tensors.safetensors", folder / "state.json", folder):
            flush(path)


class Bar:
    """Iterable over the steps still to do. ``note`` adds a few words behind the numbers."""

    def __init__(self, total: int, description: str, initial: int, stream: TextIO) -> None:
        self.total, self.description, self.initial, self.stream = total, description, initial, stream
        self.words = ""

    def note(self, words: str) -> None:
        """Words shown with the next line."""
        self.words = words

    def __iter__(self) -> Iterator[int]:
        return self._on_terminal() if self.stream.isatty() else self._in_log()

    def _on_terminal(self) -> Iterator[int]:
        from tqdm import tqdm

        # A bar for something that takes two seconds would only flicker.
        with tqdm(
            total=self.total, desc=self.description, initial=self.initial, delay=2, file=self.stream
        ) as bar:
            for step in range(self.initial, self.total):
                yield step
                if self.words:
                    bar.set_postfix_str(self.words, refresh=False)
                bar.update()

    def _in_log(self) -> Iterator[int]:
        start = shown = time.monotonic()
        for step in range(self.initial, self.total):
            yield step
            now = time.monotonic()
            if now - shown >= LINE_SECONDS:
                shown = now
                left = (now - start) / (step + 1 - self.initial) * (self.total - step - 1)
                line = f"{self.description}: {step + 1} of {self.total}, about {left:.0f} s left {self.words}"
                print(line.rstrip(), file=self.stream, flush=True)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and words: the same in every process and Python version."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def pack(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON can hold it, with its tensors put into ``tensors`` under names that start with ``prefix``.

    For the state of optimizers: nested mappings (keys of any plain type), lists, tuples, numbers and tensors.
    """
    from torch import Tensor

    if isinstance(value, Tensor):
        tensors[prefix] = value
        return {"tensor": prefix}
    if isinstance(value, dict):
        return {"items": [[key, pack(item, f"{prefix}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{prefix}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    return {"value": value}


def unpack(packed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``pack``."""
    kind, content = next(iter(packed.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: unpack(item, tensors) for key, item in content}
    if kind == "value":
        return content
    items = [unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def link(source: str, target: str) -> None:
    """A second name for a file that is never written again; a copy where the disk is another."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _forced_interval() -> int:
    """``ASSAY_SAVE_EVERY_STEPS=N`` makes every N-th step save, for tests."""
    text = os.environ.get("ASSAY_SAVE_EVERY_STEPS", "0")
    if not text.isdigit():
        raise AssayError(f"ASSAY_SAVE_EVERY_STEPS={text!r} must be a whole number of steps.")
    return int(text)


def flush(path: Path) -> None:
    """Return once a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
