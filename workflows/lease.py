"""A lease on graphics cards: which of the visible cards a job may use, so that two jobs never share one.

Snakemake counts cards and does not choose one. A lease locks a file per card on this host and narrows
``CUDA_VISIBLE_DEVICES`` to the cards it got. The kernel frees the lock when the job *and every process it
started* have ended: a left-over child that still occupies the card keeps it leased. Under Slurm, which hands
out cards itself, nothing is locked.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from methods.stage import AssayError
from workflows.claim import host_folder, scheduler_job

VISIBLE = "CUDA_VISIBLE_DEVICES"
# the leased cards by UUID, for the energy account
LEASED = "ASSAY_CARDS"


@cache
def nvml() -> ModuleType | None:
    """NVML, started; None on a machine without an NVIDIA driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    module: ModuleType = pynvml
    return module


def _all_cards() -> list[str]:
    """UUIDs of every card of this machine in NVML's (PCI bus) order."""
    library = nvml()
    if library is None:
        return []
    handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
    uuids = [library.nvmlDeviceGetUUID(handle) for handle in handles]
    return [uuid.decode() if isinstance(uuid, bytes) else str(uuid) for uuid in uuids]


def visible_cards() -> tuple[str, ...]:
    """UUIDs of the cards that this process may see: all, or those that CUDA_VISIBLE_DEVICES names.

    As in CUDA, an entry is an index, a UUID or the beginning of one, and the first that names no card ends
    the list. A MIG instance (``MIG-...``) stands for itself.
    """
    cards = _all_cards()
    wanted = os.environ.get(VISIBLE)
    if wanted is None or not cards:
        return tuple(cards)
    chosen: list[str] = []
    for entry in map(str.strip, wanted.split(",")):
        card = _card(entry, cards)
        if card is None:
            break
        chosen.append(card)
    return tuple(dict.fromkeys(chosen))


def _card(entry: str, cards: Sequence[str]) -> str | None:
    if entry.isdigit():
        return cards[int(entry)] if int(entry) < len(cards) else None
    if entry.startswith("MIG-"):
        return entry
    matching = [card for card in cards if entry and card.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


@contextmanager
def lease(count: int) -> Iterator[tuple[str, ...]]:
    """Hold ``count`` free visible cards, waiting where needed, and make only these visible to CUDA.

    With ``count`` 0 no card is visible: a job that asked for none cannot disturb one. Asking for more cards
    than there are is an AssayError.
    """
    cards = visible_cards()
    if scheduler_job():
        with _environment({LEASED: ",".join(cards)}):
            yield cards
        return
    if count > len(cards):
        raise AssayError(
            f"the job asks for {count} card(s) and this process can see {len(cards)}; to run on the processor, write "
            "resources: {default: {gpu: 0}} in the experiment."
        )
    held = _acquire(cards, count) if count else {}
    try:
        with _environment({VISIBLE: ",".join(held), LEASED: ",".join(held)}):
            yield tuple(held)
    finally:
        # closed, not unlocked: a child that inherited the file keeps the card as long as it lives
        for descriptor in held.values():
            os.close(descriptor)


def cards_for(resources: Mapping[str, float], smoke: bool) -> int:
    """How many cards a job gets: what its experiment asks for, else one where there is one.

    A smoke run takes what is there: it must work on a machine without a card.
    """
    there = len(visible_cards())
    asked = int(resources.get("gpu", min(1, there)))
    return min(asked, there) if smoke else asked


def _acquire(cards: Sequence[str], count: int) -> dict[str, int]:
    """Lock ``count`` of the cards, all or none: two jobs that need several never wait for each other."""
    folder = host_folder("cards")
    said = False
    while len(held := _take_free(folder, cards, count)) < count:
        for descriptor in held.values():
            os.close(descriptor)
        if not said:
            print(f"assay: waiting for {count} free card(s) of {len(cards)}", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.5)
    return held


def _take_free(folder: Path, cards: Sequence[str], count: int) -> dict[str, int]:
    held: dict[str, int] = {}
    for card in cards:
        if len(held) == count:
            break
        descriptor = os.open(folder / f"{card.replace('/', '_')}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        os.set_inheritable(descriptor, True)
        held[card] = descriptor
    return held


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
