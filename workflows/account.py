"""The energy account of one job over all its attempts.

``scratch/<id>/account.json`` holds what was spent so far. It is renewed at every saved state and every ten seconds,
so that an attempt that was killed has still paid for the work its successor builds on.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from methods.stage import AssayError
from workflows.record import write_atomic

NOTE_SECONDS = 10.0


class Account:
    """Meters this attempt and adds what earlier attempts had spent."""

    def __init__(self, scratch: Path, country: str) -> None:
        self.path = scratch / "account.json"
        self.country = country
        earlier = self._read()
        self.history: list[dict[str, Any]] = earlier["history"]
        self.attempts: int = earlier["attempts"] + 1
        # what earlier attempts took, as far as it was noted
        self.earlier_seconds: float = self.history[-1]["seconds"] if self.history else 0.0
        self.meter: Any = None

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {"attempts": 0, "history": []}
        saved: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return saved

    def start(self) -> None:
        """Begin to meter; called after the imports, so that the energy covers the work."""
        from workflows.energy import Meter

        carried = self.history[-1] if self.history else None
        visible = os.environ.get("ASSAY_CARDS", "")
        self.meter = Meter(self.country, tuple(filter(None, visible.split(","))), carried, each=self._note)
        self._write(self.history)
        self.meter.start()
        self._begun = time.monotonic()

    def seconds(self) -> float:
        """Since the meter started, and what earlier attempts took."""
        return self.earlier_seconds + time.monotonic() - self._begun

    def spent(self) -> dict[str, float]:
        """``kwh`` and ``seconds`` up to now over all attempts; the energy is read now, in a few milliseconds.

        Raises:
            AssayError: the energy cannot be read.
        """
        try:
            return {"kwh": float(self.meter.running()["total_kwh"]), "seconds": self.seconds()}
        except AssayError:
            raise
        except Exception as error:
            raise AssayError(f"what the job has spent so far cannot be read: {error}") from error

    def _note(self, running: dict[str, Any]) -> None:
        """Every ten seconds the running total is written, so that a kill loses little of what was spent."""
        if time.monotonic() - self._written > NOTE_SECONDS:
            self._write([*self.history, running])

    def save(self) -> dict[str, Any]:
        """Write the running total; called with every saved state."""
        if self.meter is not None:
            self._write([*self.history, self.meter.running()])
        return {}

    def stop(self) -> dict[str, Any]:
        """The whole account; the meter stops."""
        meter, self.meter = self.meter, None
        total: dict[str, Any] = meter.stop()
        self.history = [*self.history, total]
        return total

    def abandon(self) -> dict[str, Any]:
        """Stop after a failure and keep what was spent for the next attempt."""
        if self.meter is None:
            return {}
        total = self.stop()
        self._write(self.history)
        return total

    def _write(self, history: list[dict[str, Any]]) -> None:
        self._written = time.monotonic()
        write_atomic(self.path, json.dumps({"attempts": self.attempts, "history": history}))
