"""``python -m workflows.clean EXPERIMENT [key=value …] [--yes]``: remove weights, never records.

Only weights that this experiment no longer needs go: those of finished stages without a missing reader. Without
``--yes`` it only says what would go.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from methods.stage import AssayError
from workflows import plan
from workflows.plan import Plan
from workflows.settings import from_arguments


def removable(built: Plan) -> list[Path]:
    """Folders of weights that nothing missing reads; what else a stage wrote (``data/``, ``files/``) stays."""
    needed = {
        built.store.parent_folder(parent) for job in built.missing.values() for parent in job.parents.values()
    }
    if built.experiment.keep == "all":
        return []
    ends = {point.parent.id for point in built.points} if built.experiment.keep == "ends" else set()
    stages = [job for job in built.jobs.values() if job.kind == "stage" and job.id in built.finished]
    folders = []
    for job in stages:
        if job.id not in ends:
            folders.extend(
                sorted(path for path in built.store.result(job.id).glob("model*") if path.is_dir())
            )
    return [folder for folder in folders if folder not in needed]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: list[str]) -> int:
    """The command."""
    really = "--yes" in arguments
    try:
        built = plan.load(from_arguments([argument for argument in arguments if argument != "--yes"]))
    except AssayError as error:
        print(f"assay: {error}", file=sys.stderr)
        return 2
    folders = removable(built)
    total = sum(map(_bytes, folders))
    for folder in folders:
        print(f"{'removed' if really else 'would remove'} {folder}")
        if really:
            shutil.rmtree(folder)
    print(f"{len(folders)} folders, {total / 1e6:.1f} MB{'' if really else '; add --yes to remove them'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
