"""The energy account of a job: CodeCarbon's power model, read once a second, with earlier attempts added.

CodeCarbon finds out about the hardware once a process and lets later trackers reuse it. ``prepare`` does that in
the process that jobs are forked from, where it costs one to two seconds; a meter then starts in a hundredth.

Only processor counters (RAPL) and card counters (NVML) count as measured. Where there is no RAPL, CodeCarbon
scales the processor's rated power by the load of the job's processes; memory is always an assumption.
"""

from __future__ import annotations

import difflib
import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from methods.stage import AssayError
from workflows import lease
from workflows.claim import host_folder

READINGS_TO_COUNT = 10
SECONDS_BETWEEN_READINGS = 1.0
ENERGIES = ("total_kwh", "cpu_kwh", "gpu_kwh", "ram_kwh", "emissions_kg", "seconds", "readings")
MILLIJOULES_PER_KWH = 3.6e9
# longer than any job: readings are taken here, where one lock keeps two from overlapping
NEVER_SECONDS = 1e8


def country_iso(text: str) -> str:
    """The ISO 3166 code of three letters, checked; an AssayError names the nearest code otherwise."""
    import pycountry

    code = text.strip().upper()
    if pycountry.countries.get(alpha_3=code) is not None:
        return code
    try:
        meant = [pycountry.countries.lookup(text.strip()).alpha_3]
    except LookupError:
        names = {country.name: country.alpha_3 for country in pycountry.countries}
        close = difflib.get_close_matches(text.strip().title(), names, n=1)
        codes = [country.alpha_3 for country in pycountry.countries]
        meant = [names[close[0]]] if close else difflib.get_close_matches(code, codes, n=1)
    hint = f"; did you mean {meant[0]!r}?" if meant else "."
    raise AssayError(f"unknown country {text!r}: give its ISO code of three letters, such as 'FRA'{hint}")


# --- CodeCarbon ---------------------------------------------------------------------------------------------


class _Complaints(logging.Filter):
    """Lets nothing through and keeps CodeCarbon's last warning: it reports failures nowhere else."""

    last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            _Complaints.last = record.getMessage()
        return False


class _Latest:
    """An output of CodeCarbon that keeps the running total in memory."""

    total: Any = None

    def out(self, total: Any, delta: Any) -> None:
        self.total = total

    def exit(self) -> None:
        """Nothing to close."""


def _tracker(country: str, indices: list[int], latest: _Latest) -> Any:
    """A CodeCarbon tracker that has found its hardware and has not started."""
    logger = logging.getLogger("codecarbon")
    if not any(isinstance(each, _Complaints) for each in logger.filters):
        logger.addFilter(_Complaints())
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.external.hardware import GPU

    tracker = OfflineEmissionsTracker(
        country_iso_code=country, tracking_mode="process", gpu_ids=indices, output_methods=[],
        output_handlers=[latest], emissions_endpoint=None, electricitymaps_api_token=None, log_level="warning",
        allow_multiple_runs=True, measure_power_secs=NEVER_SECONDS, api_call_interval=-1,
    )  # fmt: skip
    tracker.get_detected_hardware()
    if not indices:
        # its hardware cache takes an empty list of cards for "all cards"
        tracker._hardware = [item for item in tracker._hardware if not isinstance(item, GPU)]
    return tracker


def prepare(country: str) -> None:
    """Find out about the hardware and load the tables of emissions, once, for this process and its forks."""
    from codecarbon.core import emissions  # noqa: F401  imported late by CodeCarbon, a quarter of a second
    from codecarbon.input import DataSource

    _tracker(country, [], _Latest())
    DataSource().get_global_energy_mix_data()


def _sources(tracker: Any, gpu_ids: tuple[str, ...]) -> dict[str, str]:
    """How each part of the energy was obtained. CodeCarbon's own output does not say."""
    modes = {type(item).__name__: getattr(item, "_mode", "") for item in tracker._hardware}
    others = sorted(modes.keys() - {"CPU", "RAM", "GPU"})
    mode = modes.get("CPU", " ".join(others)) or "nothing found"
    cpu = "measured: rapl" if mode == "intel_rapl" else f"estimated: {mode.replace('_', ' ')}"
    whole_cards = not any(card.startswith("MIG-") for card in gpu_ids)
    gpu = ("measured: nvml" if whole_cards else "estimated: nvml, whole card") if gpu_ids else "none"
    return {"cpu": cpu, "gpu": gpu, "ram": "estimated: constant"}


# --- the cards' own counters ----------------------------------------------------------------------------------


def _handle(card: str) -> Any:
    library = lease.nvml()
    if library is None:
        raise AssayError(
            f"card {card} is to be metered, but NVML does not answer: is the NVIDIA driver loaded?"
        )
    try:
        handle = library.nvmlDeviceGetHandleByUUID(card)
        return (
            library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            if card.startswith("MIG-")
            else handle
        )
    except library.NVMLError as error:
        raise AssayError(f"card {card} cannot be metered: NVML says {error}.") from error


def _index(card: str) -> int:
    """The card's number in NVML: CodeCarbon 3.3 does not find cards by UUID."""
    library, handle = lease.nvml(), _handle(card)
    assert library is not None
    return int(library.nvmlDeviceGetIndex(handle))


def _counter(card: str) -> float:
    """What the card has used since its driver was loaded, in kWh; a card without a counter is an AssayError."""
    library, handle = lease.nvml(), _handle(card)
    assert library is not None
    try:
        return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / MILLIJOULES_PER_KWH
    except library.NVMLError as error:
        raise AssayError(f"card {card} has no energy counter: NVML says {error}.") from error


# --- alone or not ---------------------------------------------------------------------------------------------


class _Presence:
    """A locked file that tells the user's other meters on this machine that a job is being metered.

    A meter that begins leaves a mark in the file of every running one, so neither misses the other however
    short they are. Files of processes that were killed have no lock any more and are removed.
    """

    def __init__(self) -> None:
        self.folder = host_folder("metered")
        self.path = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        with open(self.folder / ".lock", "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._met = [self._greet(other) for other in self._others()]
            self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115  open as long as the job runs
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def _others(self) -> list[str]:
        return [name for name in os.listdir(self.folder) if name != ".lock"]

    def _greet(self, name: str) -> bool:
        """Mark the file of a running meter; remove one whose process is gone. Whether it was running."""
        path = self.folder / name
        try:
            with open(path, "a", encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.write("met\n")
                    return True
                path.unlink()
        except FileNotFoundError:
            return False
        return False

    def alone(self) -> bool:
        """Whether no other job has been metered here since this one began."""
        return not any(self._met) and os.fstat(self._file.fileno()).st_size == 0

    def end(self) -> None:
        """Go; explicitly, since children that were forked meanwhile hold the file, too."""
        with open(self.folder / ".lock", "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.path.unlink(missing_ok=True)
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()


# --- the meter ------------------------------------------------------------------------------------------------


class Meter:
    """Meters one attempt at a job; its numbers include ``carried``, the last numbers of earlier attempts.

    ``gpu_ids`` are the UUIDs of the leased cards. ``each`` is called with the running total after every reading,
    from the meter's thread. A meter inside a metered job does not ``announce`` itself: it is no second job.
    """

    def __init__(self, country: str, gpu_ids: tuple[str, ...] = (), carried: dict[str, Any] | None = None,
                 each: Callable[[dict[str, Any]], None] | None = None, announce: bool = True) -> None:  # fmt: skip
        self.country = country_iso(country)
        self.gpu_ids = gpu_ids
        self.carried = carried or {}
        self._each = each
        self._announce = announce
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._latest = _Latest()
        self._readings = 0
        self._failure: BaseException | None = None
        self._seconds: float | None = None

    def start(self) -> None:
        """Begin. Takes a hundredth of a second after ``prepare``, one to two seconds without."""
        self._tracker = _tracker(self.country, [_index(card) for card in self.gpu_ids], self._latest)
        self._source = _sources(self._tracker, self.gpu_ids)
        self._counters = {card: _counter(card) for card in self.gpu_ids}
        self._presence = _Presence() if self._announce else None
        self._begun = time.monotonic()
        self._tracker.start()
        self._read()
        self._readings = 0  # this one covers nothing
        self._thread = threading.Thread(target=self._read_often, name="meter", daemon=True)
        self._thread.start()

    def running(self) -> dict[str, Any]:
        """The totals up to now. Costs a few milliseconds, at most one reading."""
        self._raise_failure()
        with self._lock:
            self._read()
            return self._totals()

    def stop(self) -> dict[str, Any]:
        """The totals, with a last reading; the meter is over. Every leased card must have used energy."""
        self._stopping.set()
        self._thread.join()
        try:
            self._raise_failure()
            self._last_reading()
            self._check_cards()
            return self._totals()
        finally:
            self._tracker.stop()  # once more where a failure came before; the second time it does nothing
            if self._presence is not None:
                self._presence.end()

    def _read_often(self) -> None:
        while not self._stopping.wait(SECONDS_BETWEEN_READINGS):
            try:
                with self._lock:
                    self._read()
                    self._readings += 1
                    totals = self._totals()
                if self._each is not None:
                    self._each(totals)
            except BaseException as error:  # noqa: BLE001  raised again by running() or stop(), in the job's thread
                self._failure = error
                return

    def _read(self) -> None:
        """One reading; CodeCarbon leaves it out when the last one is less than 50 ms old."""
        if self._tracker.flush() is None:
            raise AssayError(f"CodeCarbon failed to read the energy: {_Complaints.last or 'no reason given'}")

    def _last_reading(self) -> None:
        self._tracker._measure_power_and_energy()  # however short ago the last one was
        self._readings += 1
        self._seconds = time.monotonic() - self._begun
        if self.gpu_ids and self._zero_cards():
            time.sleep(0.2)  # a card renews its counter about ten times a second
            self._tracker._measure_power_and_energy()
        if self._tracker.stop() is None:
            raise AssayError(f"CodeCarbon has metered nothing: {_Complaints.last or 'no reason given'}")

    def _zero_cards(self) -> list[str]:
        return [card for card, before in self._counters.items() if _counter(card) <= before]

    def _check_cards(self) -> None:
        zero = self._zero_cards()
        if zero or (self.gpu_ids and self._latest.total.gpu_energy <= 0):
            named = ", ".join(zero or self.gpu_ids)
            raise AssayError(
                f"the job leased {named}, but the energy counter did not move: nothing was metered."
            )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _totals(self) -> dict[str, Any]:
        total = self._latest.total
        # the thread may still be at a reading after stop() was called
        seconds = time.monotonic() - self._begun if self._seconds is None else self._seconds
        own = {
            "total_kwh": total.energy_consumed, "cpu_kwh": total.cpu_energy, "gpu_kwh": total.gpu_energy,
            "ram_kwh": total.ram_energy, "emissions_kg": total.emissions, "seconds": seconds,
            "readings": self._readings, "source": self._source,
            "alone": self._presence is None or self._presence.alone(),
            "cards": {card: _counter(card) - before for card, before in self._counters.items()},
        }  # fmt: skip
        both = add(self.carried, own) if self.carried else own
        return {**both, "label": _label(both)}


def add(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two attempts at one job as one account; sources that differ are both named."""
    sums: dict[str, Any] = {name: first[name] + second[name] for name in ENERGIES}
    parts = ("cpu", "gpu", "ram")
    sums["source"] = {part: _merged(first["source"][part], second["source"][part]) for part in parts}
    sums["alone"] = first["alone"] and second["alone"]
    cards = {**first["cards"], **second["cards"]}
    sums["cards"] = {card: first["cards"].get(card, 0.0) + second["cards"].get(card, 0.0) for card in cards}
    return sums


def _merged(first: str, second: str) -> str:
    return first if first == second else " + ".join(sorted({first, second} - {"none"}))


def _label(account: dict[str, Any]) -> str:
    """``measured`` when both processor and cards were, over at least ten readings."""
    source = account["source"]
    guessed = "estimated" in source["cpu"] or "estimated" in source["gpu"]
    return "estimated" if guessed or account["readings"] < READINGS_TO_COUNT else "measured"
