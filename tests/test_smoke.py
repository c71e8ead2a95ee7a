"""Every shipped experiment runs to its tables at ``scale=smoke``: a dry run proves nothing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workflows.experiment import EXPERIMENTS

SNAKEMAKE = Path(sys.executable).with_name("snakemake")
ROOT = EXPERIMENTS.parent.parent
SHIPPED = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
NEEDS_DATA = ("stories", "pruning_stories", "heal_stories")


@pytest.mark.parametrize("experiment", SHIPPED)
def test_a_shipped_experiment_runs_at_smoke_scale(
    experiment: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = [f"experiment={experiment}", "scale=smoke", f"results={tmp_path}"]
    if experiment in NEEDS_DATA:
        config.append(f"data={request.getfixturevalue('shared_data')}")
    command = [str(SNAKEMAKE), "--cores", "2", "--quiet", "all", "--config", *config]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / f"{experiment}_smoke"
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows if row["metric"] not in _MAY_BE_INFINITE} == {"ok"}
    described = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    assert {row["chain"].partition("[")[0] for row in rows} >= set(described["chains"])
    assert (folder / "report.html").stat().st_size > 10_000
    assert "Not drawn" not in (folder / "README.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "scratch").iterdir())


# after two steps of training these have no finite value on some models
_MAY_BE_INFINITE = {"word_perplexity", "byte_perplexity", "perplexity"}
