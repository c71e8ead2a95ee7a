"""What the harness itself costs: wall time of an experiment at one core over the seconds inside its jobs.

    python tests/benchmarks/overhead.py [DIR] [--experiment tiny] [--against OTHER]

Inside counts from the call of a method or evaluation to its return, as the records have it. With ``--against`` the
rows, curves and models are compared with those of another run of the same experiment, such as one under two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import runs

MOST = 1.35


def table(results: Path) -> tuple[float, float]:
    """Print seconds inside and outside by method; returns both sums."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for record in runs.records(results).values():
        for place, value in enumerate((1, record["seconds_inside"], record["seconds_outside"])):
            sums[record["method"]][place] += value
    print(f"{'method':24s} {'jobs':>5s} {'inside':>9s} {'outside':>9s}")
    for method, (count, inside, outside) in sorted(sums.items()):
        print(f"{method:24s} {count:5.0f} {inside:8.1f}s {outside:8.1f}s")
    return sum(row[1] for row in sums.values()), sum(row[2] for row in sums.values())


def main(arguments: list[str]) -> int:
    """The command."""
    options = _options(arguments)
    words = {"experiment": options.experiment, **dict(pair.split("=", 1) for pair in options.config)}
    begun = time.monotonic()
    started = runs.start(
        runs.command(options.folder, cores=options.cores, **words),
        options.folder.with_name(options.folder.name + ".log"),
    )
    code = started.wait(options.limit)
    wall = time.monotonic() - begun
    if code != 0:
        print(f"the run ended with exit code {code}; see {started.log}", file=sys.stderr)
        return 2
    inside, outside = table(options.folder)
    print(f"\nwall {wall:.1f} s = inside {inside:.1f} s + around the jobs {outside:.1f} s + starting, planning, "
          f"handing over and the report {wall - inside - outside:.1f} s")  # fmt: skip
    print(f"overhead: {wall / inside:.3f} (at most {MOST})")
    wrong = (
        runs.differences(options.against, options.folder, Path(options.experiment).stem)
        if options.against
        else []
    )
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    if options.against and not wrong:
        print(f"rows, curves and models are those of {options.against}")
    return 1 if wrong or wall / inside > MOST else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=runs.fresh("overhead"),
        help="results folder of the run; must be empty",
    )
    parser.add_argument("--experiment", default="tiny")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--against", type=Path, help="results folder of another run to compare with")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds the run may take")
    parser.add_argument("--config", nargs="*", default=[], help="further settings, such as data=DIR")
    options = parser.parse_args(arguments)
    options.folder = options.folder.absolute()
    if any(options.folder.glob("*")):
        parser.error(f"{options.folder} is not empty")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
