"""What a record says about where it was made: versions, commit, machine, device, peak memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "lm_eval", "peft", "safetensors", "tokenizers",
             "numpy", "codecarbon", "snakemake")  # fmt: skip
ROOT = Path(__file__).parent.parent
CODE = ("assay.py", "methods", "evaluations", "workflows", "Snakefile")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of every library that can move a number."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def commit() -> str:
    """The commit of the code, or an empty text outside a git checkout."""
    return os.environ.get("ASSAY_COMMIT") or _git("rev-parse", "HEAD")


@cache
def dirty() -> bool:
    """Whether a code folder differs from the commit."""
    known = os.environ.get("ASSAY_DIRTY")
    return known == "true" if known else bool(_git("status", "--porcelain", "--", *CODE))


@cache
def name() -> str:
    """Host and processor."""
    return f"{platform.node()}, {_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.machine()


def device() -> str:
    """The device type a job uses, without importing torch where nobody has."""
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


def peak_memory_mb() -> float:
    """The largest resident memory of this process, or on a card its largest allocation, in megabytes."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 1e6)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6
