"""Resumable state, stop signals, seeded generators and progress lines."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import progress as module
from methods.progress import Bar, Progress, derive_seed, pack, unpack
from methods.stage import AssayError, Interrupted


@pytest.fixture
def progress(tmp_path: Path) -> Iterator[Progress]:
    made = Progress(tmp_path / "scratch", seed=7, label="prune.test")
    yield made
    made.release()


def test_nothing_is_loaded_where_nothing_was_saved(progress: Progress) -> None:
    assert progress.load() is None


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    progress = Progress(tmp_path, 0, extra_state=lambda: {"joules": 1 / 3})
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(5), "c": torch.randn(4).bfloat16()}
    progress.save(12, tensors, {"loss": 0.1 + 0.2, "rows": [[1, "x"]]})
    state = Progress(tmp_path, 0).load()
    assert state is not None
    assert state.step == 12
    assert all(torch.equal(state.tensors[name], value) for name, value in tensors.items())
    assert state.values == {"loss": 0.1 + 0.2, "rows": [[1, "x"]]}
    assert state.extra == {"joules": 1 / 3}


def test_one_copy_is_kept_and_it_is_the_newest(progress: Progress) -> None:
    for step in range(1, 13):
        progress.save(step, {"a": torch.tensor(step)}, {})
    assert len(list(progress.scratch.iterdir())) == 1
    state = progress.load()
    assert state is not None
    assert (state.step, int(state.tensors["a"])) == (12, 12)


def test_a_state_that_was_not_finished_is_not_seen(progress: Progress) -> None:
    progress.save(1, {"a": torch.tensor(1)}, {})
    half = progress.scratch / "tmp-left"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    state = progress.load()
    assert state is not None
    assert state.step == 1
    progress.save(2, {}, {})
    assert not half.exists()


def test_a_process_killed_between_writing_and_tidying_finds_the_newer_state(progress: Progress) -> None:
    progress.save(1, {}, {})
    first = next(progress.scratch.iterdir())
    progress.save(2, {}, {})
    second = next(progress.scratch.iterdir())
    second.rename(second.with_name("state-00000009"))
    first.mkdir()
    state = progress.load()
    assert state is not None
    assert state.step == 2


def test_a_full_disk_leaves_the_old_state_and_is_a_sentence(
    progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.save(1, {"a": torch.tensor(1)}, {})

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "flush", full)
        with pytest.raises(
            AssayError, match=r"the state of step 2 could not be saved .* No space left on device"
        ):
            progress.save(2, {"a": torch.tensor(2)}, {})
    state = progress.load()
    assert state is not None
    assert state.step == 1
    assert len(list(progress.scratch.iterdir())) == 1


def test_a_broken_state_is_a_sentence(progress: Progress) -> None:
    progress.save(1, {}, {})
    (next(progress.scratch.iterdir()) / "state.json").write_text("{")
    with pytest.raises(AssayError, match="delete the folder to start afresh"):
        progress.load()


def test_a_value_that_json_cannot_hold_leaves_nothing_behind(progress: Progress) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        progress.save(1, {}, {"loss": float("nan")})
    assert not list(progress.scratch.iterdir())


def test_saving_is_due_after_a_while_or_every_so_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Progress(tmp_path, 0, save_seconds=1000).due(1)
    late = Progress(tmp_path, 0, save_seconds=0)
    assert late.due(1)
    late.release()
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "3")
    every = Progress(tmp_path, 0, save_seconds=1000)
    assert [step for step in range(1, 10) if every.due(step)] == [3, 6, 9]
    every.release()
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "often")
    with pytest.raises(AssayError, match="must be a whole number of steps"):
        Progress(tmp_path, 0)


def test_states_that_take_long_to_write_are_written_less_often(
    progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 6.0, 100.0, 127.0])  # six seconds of writing
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    progress.save(1, {}, {})
    assert not progress.due(2)
    assert progress.due(3)


def test_a_signal_waits_for_the_next_save(progress: Progress) -> None:
    before = signal.getsignal(signal.SIGTERM)
    progress.load()
    os.kill(os.getpid(), signal.SIGTERM)
    assert progress.stopping
    assert progress.due(1)
    with pytest.raises(Interrupted, match=r"prune\.test was asked to stop and has saved its state at step 1"):
        progress.save(1, {}, {})
    # A second signal does what it always did.
    assert signal.getsignal(signal.SIGTERM) == before
    again = Progress(progress.scratch, 7)
    state = again.load()
    again.release()
    assert state is not None
    assert state.step == 1


def test_signals_are_left_alone_until_a_job_says_that_it_can_be_resumed(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in module.SIGNALS]
    progress = Progress(tmp_path, 0)
    assert [signal.getsignal(number) for number in module.SIGNALS] == before
    progress.load()
    assert signal.getsignal(signal.SIGUSR1) != before[2]
    progress.release()
    assert [signal.getsignal(number) for number in module.SIGNALS] == before


def test_a_thread_cannot_take_signals_and_does_not_try(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def load() -> None:
        try:
            Progress(tmp_path, 0).load()
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert not failed


def test_a_generator_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    def draw(seed: int, step: int) -> list[float]:
        return torch.rand(3, generator=Progress(tmp_path, seed).random(step)).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_derived_seeds_are_the_same_everywhere() -> None:
    assert derive_seed(3, "retain", 7) == 2288156685920566737
    assert derive_seed(1, 23) != derive_seed(12, 3)
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    code = "from methods.progress import derive_seed as d; print(d(3, 'retain', 7))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert int(done.stdout) == derive_seed(3, "retain", 7)


def test_the_state_of_an_optimizer_can_be_packed_and_unpacked() -> None:
    original = {
        "state": {0: {"step": torch.tensor(3.0), "moments": (torch.ones(2), None)}},
        "groups": [{"lr": 0.1}],
    }
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(original, "optimizer", tensors)))
    found = unpack(packed, tensors)
    assert sorted(tensors) == ["optimizer.state.0.moments.0", "optimizer.state.0.step"]
    assert found["groups"] == [{"lr": 0.1}]
    assert torch.equal(found["state"][0]["moments"][0], torch.ones(2))
    assert found["state"][0]["moments"][1] is None
    assert isinstance(found["state"][0]["moments"], tuple)


def test_a_log_gets_a_line_now_and_then_and_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    bar = Bar(6, "train.sft", 1, stream)
    bar.note("loss 1.5")
    assert list(bar) == [1, 2, 3, 4, 5]
    assert stream.getvalue() == "train.sft: 4 of 6, about 8 s left loss 1.5\n"


def test_a_terminal_gets_a_bar(progress: Progress) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert list(Bar(4, "train.sft", 2, Terminal())) == [2, 3]
    assert list(progress.bar(2, "layers")) == [0, 1]
