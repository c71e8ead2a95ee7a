"""How long planning takes: 1,000 jobs in under a second, a dry run of 2,500 in under ten.

    python tests/benchmarks/planning.py [DIR]

The experiments are invented: trained models, each pruned to ten sparsities, every model scored once, five seeds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import runs

PLANNED_JOBS, PLANNING_SECONDS = 1000, 1.0
DRY_RUN_JOBS, DRY_RUN_SECONDS = 2500, 10.0
SEEDS = 5
SPARSITIES = [round(0.05 * number, 2) for number in range(1, 11)]
# a training job and its score, and the same for each sparsity
JOBS_A_CHAIN = 2 * (1 + len(SPARSITIES))
PROGRAM = """
import sys, time
begun = time.monotonic()
from workflows import plan
imported = time.monotonic()
built = plan.load({"experiment": sys.argv[1], "results": sys.argv[2]})
targets = built.targets()
planned = time.monotonic()
if sys.argv[3] == "freeze":
    built.freeze()
print(len(built.jobs), len(targets), imported - begun, planned - imported, time.monotonic() - planned)
"""


def write(path: Path, jobs: int) -> Path:
    """An experiment of at least so many jobs."""
    chains = -(-(jobs - SEEDS) // (SEEDS * JOBS_A_CHAIN))
    swept = ", ".join(map(str, SPARSITIES))
    lines = ["title: Planning", "country: FRA", f"seeds: {list(range(SEEDS))}",
             "models: {base: {new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16}}", "chains:"]  # fmt: skip
    for number in range(1, chains + 1):
        lines.append(f"  target{number}: 'base > train.sft(data=\"authors/forget01\", steps={number})'")
        lines.append(f"  pruned{number}: 'target{number} > prune.magnitude(sparsity={{{swept}}})'")
    path.write_text("\n".join([*lines, "evaluate:", "  size: size", ""]), encoding="utf-8")
    return path


def planning(folder: Path) -> float:
    """Plan in a process of its own; prints the figures, returns the seconds."""
    experiment = write(folder / "planned.yaml", PLANNED_JOBS)
    words = [sys.executable, "-c", PROGRAM, str(experiment), str(folder / "results"), "freeze"]
    done = subprocess.run(words, cwd=runs.ROOT, capture_output=True, text=True, check=True)
    jobs, targets, imports, seconds, freezing = map(float, done.stdout.split())
    print(f"plan of {jobs:.0f} jobs ({targets:.0f} for Snakemake): {seconds:.2f} s "
          f"(less than {PLANNING_SECONDS:.0f} s is wanted); before it {imports:.2f} s of imports, "
          f"after it {freezing:.2f} s to write the job files")  # fmt: skip
    return seconds


def dry_run(folder: Path) -> float:
    """A dry run by Snakemake; prints the figures, returns the seconds."""
    experiment = write(folder / "dry.yaml", DRY_RUN_JOBS)
    words = runs.command(folder / "nothing", str(experiment), 2, "-n", "--quiet", "all")
    begun = time.monotonic()
    started = runs.start(words, folder / "dry.log")
    code = started.wait(600)
    seconds = time.monotonic() - begun
    if code != 0 or (folder / "nothing").exists():
        raise SystemExit(f"the dry run failed, or wrote something: see {started.log}")
    counted = subprocess.run([sys.executable, "-c", PROGRAM, str(experiment), str(folder / "nothing"), "plan"],
                             cwd=runs.ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    jobs, targets = counted.stdout.split()[:2]
    print(f"dry run of {jobs} jobs ({targets} for Snakemake): {seconds:.1f} s "
          f"(less than {DRY_RUN_SECONDS:.0f} s is wanted)")  # fmt: skip
    return seconds


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="default: a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        quick = planning(folder) < PLANNING_SECONDS, dry_run(folder) < DRY_RUN_SECONDS
    return 0 if all(quick) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
