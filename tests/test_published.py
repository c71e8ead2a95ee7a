"""What is committed under results/published is what the report draws from the numbers committed beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from workflows.collect import RESULT_COLUMNS
from workflows.experiment import EXPERIMENTS
from workflows.reading import stored
from workflows.report import report

PUBLISHED = EXPERIMENTS.parent.parent / "results" / "published"
FOLDERS = sorted(path.parent for path in PUBLISHED.glob("*/experiment.json"))
TABLES = ("results.csv", "jobs.csv", "curves.csv")
NAMES = [folder.name for folder in FOLDERS]


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_published_tables_and_verdicts_are_drawn_from_the_published_numbers(
    folder: Path, tmp_path: Path
) -> None:
    for path in (folder / "experiment.json", *(stored(folder / name) for name in TABLES)):
        shutil.copy(path, tmp_path)
    report(tmp_path)
    drawn = sorted(path.relative_to(tmp_path) for path in (tmp_path / "tables").iterdir())
    assert drawn == sorted(path.relative_to(folder) for path in (folder / "tables").iterdir())
    for path in [*drawn, Path("reproduction.csv")]:
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes(), path


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_published_numbers_are_whole(folder: Path) -> None:
    rows = pd.read_csv(stored(folder / "results.csv"), keep_default_na=False)
    # a run of the time before trajectories has no step: all its rows are of ends
    assert tuple(rows.columns) in (RESULT_COLUMNS, tuple(name for name in RESULT_COLUMNS if name != "step"))
    assert set(rows["status"]) == {"ok"}
    jobs = pd.read_csv(stored(folder / "jobs.csv"), keep_default_na=False)
    assert set(jobs["status"]) == {"ok"}
    models = {name.partition("@")[0] for name in rows["model_id"]}
    assert models - set(jobs["id"]) <= {name for name in models if "folder" in name}
    assert not (jobs["dirty"].astype(str) == "True").any()
