"""Leases on cards, with a fake NVML: a free visible card each, never the same one twice."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from methods.stage import AssayError
from workflows import lease

CARDS = ("GPU-aaaa-1", "GPU-abbb-2", "GPU-cccc-3")


class FakeNvml:
    def nvmlDeviceGetCount(self) -> int:
        return len(CARDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return CARDS[handle].encode()


@pytest.fixture(autouse=True)
def three_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(lease, "nvml", FakeNvml)
    for name in (lease.VISIBLE, lease.LEASED, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("setting", "cards"),
    [
        (None, CARDS),
        ("", ()),
        ("2,0", (CARDS[2], CARDS[0])),
        ("GPU-c", (CARDS[2],)),
        ("GPU-a", ()),  # two cards begin so
        ("1,7,0", (CARDS[1],)),  # CUDA stops at the first that is none
        ("-1", ()),
        ("1,1", (CARDS[1],)),
        ("MIG-42", ("MIG-42",)),
    ],
)
def test_visible_cards_are_those_cuda_would_see(
    setting: str | None, cards: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is not None:
        monkeypatch.setenv(lease.VISIBLE, setting)
    assert lease.visible_cards() == cards


def test_a_lease_makes_its_cards_the_only_visible_ones_and_puts_the_setting_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(lease.VISIBLE, "1,2")
    with lease.lease(1) as cards:
        assert cards == (CARDS[1],)
        assert os.environ[lease.VISIBLE] == os.environ[lease.LEASED] == CARDS[1]
    assert os.environ[lease.VISIBLE] == "1,2"
    assert lease.LEASED not in os.environ


def test_two_leases_never_share_a_card() -> None:
    with lease.lease(2) as first:
        os.environ.pop(lease.VISIBLE)
        with lease.lease(1) as second:
            assert set(first).isdisjoint(second)


def test_a_lease_waits_for_a_card_to_come_free(capsys: pytest.CaptureFixture[str]) -> None:
    got: list[float] = []

    def wait() -> None:
        held = lease._acquire(CARDS, 1)
        got.append(time.monotonic())
        for descriptor in held.values():
            os.close(descriptor)

    with lease.lease(3):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        assert not got
        freed = time.monotonic()
    waiting.join()
    assert got[0] > freed
    assert "waiting for 1 free card(s) of 3" in capsys.readouterr().err


def test_a_child_that_is_left_over_keeps_the_card() -> None:
    with lease.lease(1) as cards:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with lease.lease(1) as others:
        assert others != cards
    child.communicate(b"\n")
    with lease.lease(1) as again:
        assert again == cards


def test_a_job_without_cards_sees_none() -> None:
    with lease.lease(0) as cards:
        assert cards == ()
        assert os.environ[lease.VISIBLE] == ""


def test_a_machine_without_cards_gives_an_empty_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "nvml", lambda: None)
    with lease.lease(0) as cards:
        assert cards == ()
    with pytest.raises(AssayError, match=r"asks for 1 card\(s\) and this process can see 0"):
        lease.lease(1).__enter__()


def test_under_slurm_nothing_is_locked_and_the_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    monkeypatch.setenv(lease.VISIBLE, "2")
    with lease.lease(1) as first, lease.lease(1) as second:
        assert first == second == (CARDS[2],)
        assert os.environ[lease.VISIBLE] == "2"
        assert os.environ[lease.LEASED] == CARDS[2]
