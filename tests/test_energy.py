"""The energy account: CodeCarbon beneath, fake counters where a card or RAPL is needed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from methods.stage import AssayError
from workflows import energy, lease
from workflows.energy import Meter, add, country_iso

CARD, OTHER = "GPU-aaaa", "GPU-bbbb"
ATTEMPT = {
    "total_kwh": 3.0, "cpu_kwh": 1.0, "gpu_kwh": 0.0, "ram_kwh": 2.0, "emissions_kg": 0.5, "seconds": 60.0,
    "readings": 60, "source": {"cpu": "estimated: cpu load", "gpu": "none", "ram": "estimated: constant"},
    "alone": True, "cards": {}, "label": "estimated",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host on which no other test is being metered."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


# --- fakes -----------------------------------------------------------------------------------------------


class FakeCard:
    """NVML with two cards; each look at a counter adds ``step`` millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, step: int) -> None:
        self.step = step
        self.counters = {CARD: 1000, OTHER: 5000}

    def nvmlDeviceGetHandleByUUID(self, card: str) -> str:
        if card not in self.counters:
            raise self.NVMLError("Not Found")
        return card

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return list(self.counters).index(handle)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.counters[handle] += self.step
        return self.counters[handle]


def hardware(name: str, mode: str) -> Any:
    return type(name, (), {"_mode": mode})()


class FakeTracker:
    """Stands for CodeCarbon: every reading adds one kilowatt-hour of processor, card and memory each."""

    def __init__(self, latest: Any, mode: str = "intel_rapl", answer: float | None = 0.1) -> None:
        self._hardware = [hardware("CPU", mode), hardware("RAM", "")]
        self.latest, self.answer, self.kwh = latest, answer, 0.0

    def start(self) -> None:
        self.kwh = -1.0

    def _measure_power_and_energy(self) -> None:
        self.kwh += 1

    def flush(self) -> float | None:
        self._measure_power_and_energy()
        return self._tell()

    def stop(self) -> float | None:
        return self._tell()

    def _tell(self) -> float | None:
        self.latest.out(SimpleNamespace(energy_consumed=3 * self.kwh, cpu_energy=self.kwh, gpu_energy=self.kwh,
                                        ram_energy=self.kwh, emissions=0.1 * self.kwh), None)  # fmt: skip
        return self.answer


def fake(monkeypatch: pytest.MonkeyPatch, step: int = 7, **options: Any) -> FakeCard:
    card = FakeCard(step)
    monkeypatch.setattr(lease, "nvml", lambda: card)
    monkeypatch.setattr(energy, "_tracker", lambda country, indices, latest: FakeTracker(latest, **options))
    return card


# --- countries -----------------------------------------------------------------------------------------------


def test_a_country_code_of_three_letters_is_taken_as_it_is() -> None:
    assert country_iso("FRA") == country_iso(" fra ") == "FRA"


@pytest.mark.parametrize(
    ("text", "meant"), [("FR", "'FRA'"), ("France", "'FRA'"), ("GERMNAY", "'DEU'"), ("FRX", "'FR")]
)
def test_an_unknown_country_is_a_sentence_with_the_nearest_code(text: str, meant: str) -> None:
    with pytest.raises(AssayError, match=meant):
        country_iso(text)


# --- CodeCarbon itself -----------------------------------------------------------------------------------------


def test_a_busy_job_has_a_plausible_energy_and_a_sleeping_one_next_to_none() -> None:
    energy.prepare("FRA")
    working, sleeping = Meter("FRA"), Meter("FRA")
    working.start()
    busy(3.0)
    worked = working.stop()
    sleeping.start()
    time.sleep(1.2)
    slept = sleeping.stop()
    watts = worked["cpu_kwh"] * 3.6e6 / worked["seconds"]
    assert 0.5 < watts < 500
    assert slept["cpu_kwh"] / slept["seconds"] < 0.3 * worked["cpu_kwh"] / worked["seconds"]
    assert worked["total_kwh"] == pytest.approx(worked["cpu_kwh"] + worked["ram_kwh"])
    assert worked["emissions_kg"] > 0
    assert 3.0 < worked["seconds"] < 6.0
    assert worked["readings"] >= 3
    assert worked["label"] == "estimated"
    assert worked["source"]["ram"] == "estimated: constant"
    assert worked["source"]["gpu"] == "none"
    json.dumps(worked)


def test_a_job_of_a_tenth_of_a_second_is_metered_to_its_end() -> None:
    energy.prepare("FRA")
    meter = Meter("FRA")
    meter.start()
    busy(0.15)
    assert meter.running()["cpu_kwh"] > 0
    busy(0.03)  # less than CodeCarbon thinks worth a reading
    assert meter.stop()["seconds"] > 0.17


def test_the_meter_of_a_forked_job_starts_at_once() -> None:
    energy.prepare("FRA")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        begun = time.monotonic()
        meter = Meter("FRA")
        meter.start()
        took = time.monotonic() - begun
        busy(0.2)
        os.write(write, json.dumps([took, meter.stop()["cpu_kwh"]]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    took, kwh = json.loads(os.read(read, 1000))
    assert took < 0.2  # 0.02 s on an idle machine, 2 s without what was prepared
    assert kwh > 0


def test_metering_looks_up_no_address_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: asked.append(arguments) or [])
    meter = Meter("DEU")
    meter.start()
    busy(0.1)
    meter.stop()
    assert asked == []
    assert capfd.readouterr() == ("", "")


def test_without_leased_cards_no_card_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """CodeCarbon's cache takes "no cards" for "all cards" the second time."""
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.external.hardware import GPU

    detected = OfflineEmissionsTracker.get_detected_hardware

    def with_card(tracker: Any) -> Any:
        found = detected(tracker)
        tracker._hardware.append(GPU.__new__(GPU))
        return found

    monkeypatch.setattr(OfflineEmissionsTracker, "get_detected_hardware", with_card)
    tracker = energy._tracker("FRA", [], energy._Latest())
    assert [type(item).__name__ for item in tracker._hardware] == ["RAM", "CPU"]


# --- the account -------------------------------------------------------------------------------------------


def test_what_earlier_attempts_spent_is_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, mode="cpu_load")
    meter = Meter("FRA", carried=ATTEMPT)
    meter.start()
    total = meter.stop()
    assert total["cpu_kwh"] == ATTEMPT["cpu_kwh"] + 1
    assert total["total_kwh"] == ATTEMPT["total_kwh"] + 3
    assert total["readings"] == ATTEMPT["readings"] + 1
    assert 60 < total["seconds"] < 61


def test_attempts_with_different_sources_name_both() -> None:
    second = {**ATTEMPT, "alone": False, "cards": {CARD: 1.5},
              "source": {"cpu": "measured: rapl", "gpu": "measured: nvml", "ram": "estimated: constant"}}  # fmt: skip
    both = add({**ATTEMPT, "cards": {CARD: 0.5}}, second)
    assert both["source"]["cpu"] == "estimated: cpu load + measured: rapl"
    assert both["source"]["gpu"] == "measured: nvml"
    assert both["cards"] == {CARD: 2.0}
    assert not both["alone"]
    assert energy._label(both) == "estimated"


def test_ten_readings_of_rapl_and_nvml_are_measured_and_nine_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    source = {"cpu": "measured: rapl", "gpu": "measured: nvml", "ram": "estimated: constant"}
    labels = []
    for readings in (8, 9):  # and one when the meter stops
        meter = Meter("FRA", (CARD,), carried={**ATTEMPT, "readings": readings, "source": source})
        meter.start()
        labels.append(meter.stop()["label"])
    assert labels == ["estimated", "measured"]


def test_readings_come_by_themselves_and_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    monkeypatch.setattr(energy, "SECONDS_BETWEEN_READINGS", 0.01)
    seen: list[dict[str, Any]] = []
    meter = Meter("FRA", each=seen.append)
    meter.start()
    time.sleep(0.3)
    total = meter.stop()
    assert total["readings"] == len(seen) + 1 > 5
    assert [each["cpu_kwh"] for each in seen] == sorted(each["cpu_kwh"] for each in seen)
    assert total["label"] == "measured"


def test_only_leased_cards_are_read_and_their_own_counters_stand_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = fake(monkeypatch)
    meter = Meter("FRA", (OTHER,))
    meter.start()
    total = meter.stop()
    assert list(total["cards"]) == [OTHER]
    assert total["cards"][OTHER] == pytest.approx((card.counters[OTHER] - 5007) / 3.6e9)
    assert card.counters[CARD] == 1000
    assert total["source"]["gpu"] == "measured: nvml"


def test_a_leased_card_that_uses_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, step=0)
    meter = Meter("FRA", (CARD,))
    meter.start()
    with pytest.raises(AssayError, match=f"{CARD}, but the energy counter did not move"):
        meter.stop()


def test_a_card_that_nvml_does_not_know_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    with pytest.raises(AssayError, match="GPU-cccc cannot be metered: NVML says Not Found"):
        Meter("FRA", ("GPU-cccc",)).start()


def test_a_tracker_that_metered_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, answer=None)
    with pytest.raises(AssayError, match="CodeCarbon failed"):
        Meter("FRA").start()


def test_a_failure_between_two_readings_is_raised_in_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    monkeypatch.setattr(energy, "SECONDS_BETWEEN_READINGS", 0.01)

    def full(totals: dict[str, Any]) -> None:
        raise OSError("no space left on device")

    meter = Meter("FRA", each=full)
    meter.start()
    time.sleep(0.1)
    with pytest.raises(OSError, match="no space left"):
        meter.running()
    with pytest.raises(OSError, match="no space left"):
        meter.stop()


# --- alone or shared -----------------------------------------------------------------------------------------


def test_meters_that_overlap_are_both_shared_and_later_ones_are_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake(monkeypatch)
    long, short, later = Meter("FRA"), Meter("FRA"), Meter("FRA")
    long.start()
    short.start()
    assert not short.stop()["alone"]
    assert not long.stop()["alone"]
    later.start()
    assert later.stop()["alone"]


def test_a_meter_inside_a_job_is_no_second_job(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    outer, inner = Meter("FRA"), Meter("FRA", announce=False)
    outer.start()
    inner.start()
    assert inner.stop()["alone"]
    assert outer.stop()["alone"]


def test_the_mark_of_a_killed_job_disturbs_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch)
    code = "import time; from workflows.energy import _Presence; p = _Presence(); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        disturbed = Meter("FRA")
        disturbed.start()
        assert not disturbed.stop()["alone"]
        other.send_signal(signal.SIGKILL)
        other.wait()
    meter = Meter("FRA")
    meter.start()
    assert meter.stop()["alone"]
    assert [path.name for path in tmp_path.glob("assay-*/metered/*")] == [".lock"]


@pytest.mark.gpu
def test_a_real_card_is_metered() -> None:
    cards = lease.visible_cards()
    if not cards:
        pytest.skip("no card is visible")
    meter = Meter("FRA", cards[:1])
    meter.start()
    time.sleep(2.0)
    total = meter.stop()
    assert total["gpu_kwh"] == pytest.approx(total["cards"][cards[0]], rel=0.2)
