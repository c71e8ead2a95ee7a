"""A search that is killed, whenever, ends with the assignment, the log and the curve of one that was not."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import methods.search as family
from methods.progress import Progress
from methods.search import evopress
from methods.search._candidates import Scorer
from methods.search._depth import Depth
from methods.stage import Interrupted, Stage
from tests.test_search_engine import HELD_OUT, SMALL, saved, sparsity_levels, staged, tiny

GENERATIONS = 6
DEPTH = {name: value for name, value in SMALL.items() if name != "levels"}


class Killed(BaseException):
    """What ends a process at once: nothing catches it and nothing is saved."""


class DepthSearch:
    """A search for sub-blocks with a start that has to be found, and two parents."""

    @staticmethod
    def search(config: Any, problem: Any) -> Any:
        space = Depth.of(problem.model, 1 / 3)
        return problem.evolve(config, space, parents=2, start=(6, 100))


def sparsity(folder: Path, parent: Path, levels: Path | None) -> Stage:
    config = evopress.Config(**SMALL | {"generations": GENERATIONS, "holdout": HELD_OUT})
    return staged(folder, parent, levels, config)


def depth(folder: Path, parent: Path, _: Path | None) -> Stage:
    options = {"generations": GENERATIONS, "children": 5, "survivors": (3, 2), "holdout": HELD_OUT}
    return staged(folder, parent, None, family.Evolution(**DEPTH | options))


SEARCHES: dict[str, tuple[Any, Any]] = {"sparsity": (sparsity, evopress), "depth": (depth, DepthSearch)}


def written(stage: Stage) -> dict[str, str]:
    """Everything that is left of a search."""
    names = ("files/assignment.json", "files/fitness.csv", "curve.csv")
    return {name: (stage.folder / name).read_text(encoding="utf-8") for name in names}


def without_resumption(stage: Stage) -> dict[str, Any]:
    return {name: value for name, value in stage.notes.items() if name != "resumed_from_step"}


def again(stage: Stage, method: Any) -> Stage:
    """The same job started once more, with the state that the killed one has left."""
    folder = stage.folder.with_name(f"{stage.folder.name}-again")
    folder.mkdir()
    progress = Progress(stage.progress.scratch, stage.seed)
    next_ = Stage(
        stage.id, stage.method, stage.config, stage.seed, stage.parents, folder, progress, stage.data
    )
    family.run(next_, method)
    return next_


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny(), tmp_path_factory.mktemp("resumed") / "model")


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparsity_levels(tiny(), tmp_path_factory.mktemp("levels") / "files")


@pytest.fixture(params=list(SEARCHES))
def search(request: pytest.FixtureRequest) -> Any:
    return SEARCHES[request.param]


@pytest.fixture(scope="module")
def undisturbed(parent: Path, levels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Stage]:
    """Each search without a kill, and without a saved state."""
    found = {}
    for name, (make, method) in SEARCHES.items():
        stage = make(tmp_path_factory.mktemp(name), parent, levels)
        family.run(stage, method)
        assert stage.notes["resumed_from_step"] == 0
        found[method] = stage
    return found


@pytest.mark.parametrize("generation", [1, 3, 5])
def test_stopped_at_a_generation_it_goes_on_there(
    search: Any,
    generation: int,
    tmp_path: Path,
    parent: Path,
    levels: Path,
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, method = search
    stage = make(tmp_path, parent, levels)

    def due(progress: Progress, step: int) -> bool:
        progress.stopping = step == generation
        return progress.stopping

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "due", due)
        with pytest.raises(Interrupted, match=f"has saved its state at step {generation}"):
            family.run(stage, method)
    resumed = again(stage, method)
    assert resumed.notes["resumed_from_step"] == generation
    assert written(resumed) == written(undisturbed[method])
    assert without_resumption(resumed) == without_resumption(undisturbed[method])


@pytest.mark.parametrize("calls", [0, 5, 8, 13])
def test_killed_while_scoring_it_loses_that_generation_alone(
    search: Any,
    calls: int,
    tmp_path: Path,
    parent: Path,
    levels: Path,
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After so many batches; the first is that of the initial candidates, where a start has to be found."""
    make, method = search
    stage = make(tmp_path, parent, levels)
    score, done = Scorer.score, []

    def killed(scorer: Scorer, *arguments: Any, **options: Any) -> list[float]:
        if len(done) == calls:
            raise Killed
        done.append(1)
        return score(scorer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setenv("ASSAY_SAVE_EVERY_STEPS", "1")
        patch.setattr(Scorer, "score", killed)
        stage.progress = Progress(stage.progress.scratch, stage.seed)
        with pytest.raises(Killed):
            family.run(stage, method)
    resumed = again(stage, method)
    assert (resumed.notes["resumed_from_step"] > 0) == (calls > 3)
    assert written(resumed) == written(undisturbed[method])
    assert without_resumption(resumed) == without_resumption(undisturbed[method])


def test_a_stop_signal_waits_for_the_end_of_its_generation(
    tmp_path: Path, parent: Path, levels: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, score, done = sparsity(tmp_path, parent, levels), Scorer.score, []

    def signalled(scorer: Scorer, *arguments: Any, **options: Any) -> list[float]:
        done.append(1)
        if len(done) == 5:
            signal.raise_signal(signal.SIGTERM)
        return score(scorer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", signalled)
        with pytest.raises(Interrupted):
            family.run(stage, evopress)
    resumed = again(stage, evopress)
    assert resumed.notes["resumed_from_step"] > 0
    assert written(resumed) == written(undisturbed[evopress])
