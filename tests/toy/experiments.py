"""Toy experiments: written where a test wants them, planned, and run without Snakemake."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from methods import find
from workflows import plan, runner
from workflows.plan import Plan
from workflows.record import Record, Store, read_record

HERE = Path(__file__).parent
METHODS = HERE / "methods"
BASE = "{new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16, vocabulary: 300}"


def write(
    path: Path, chains: Mapping[str, str], evaluate: Mapping[str, str] | None = None, more: str = ""
) -> Path:
    """Write an experiment file; ``more`` is put at its end."""
    lines = ["title: Toy", "country: FRA", "seeds: [0]", f"models: {{base: {BASE}}}", "chains:"]
    lines += [f"  {name}: '{text}'" for name, text in chains.items()]
    lines += ["evaluate:"] * bool(evaluate) + [f"  {name}: {text}" for name, text in (evaluate or {}).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, more, ""]))
    return path


def planned(experiment: Path, results: Path, methods: Path = METHODS, **config: object) -> Plan:
    """The plan, its missing jobs frozen. Methods from outside are read anew: a test may have edited them."""
    for name in [name for name in sys.modules if name.startswith("assay_outside.")]:
        del sys.modules[name]
    find._catalogue.cache_clear()
    values = {"experiment": str(experiment), "results": str(results), "methods": str(methods), **config}
    built = plan.load(values)
    built.freeze()
    return built


def run(built: Plan, job_ids: Iterable[str] | None = None) -> None:
    """Run missing jobs in this process, parents first."""
    for job_id in built.missing if job_ids is None else job_ids:
        runner.run(job_id, built.store.root, None)


def record(results: Path, job_id: str) -> Record:
    """A finished job's record."""
    return read_record(Store(results).record(job_id))


def job_of(built: Plan, chain: str) -> str:
    """The id of a chain's result."""
    return next(point.parent.id for point in built.points if point.chain == chain)
