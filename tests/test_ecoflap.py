"""ECoFLaP: probes that leave no trace, scores worked out by hand, and a target that is met exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.find import catalogue
from methods.search import Problem, ecoflap
from methods.stage import AssayError, Interrupted, NotFinite, Stage
from tests.generic import bundle, resolved, run, small_options, through_json, world
from workflows.notation import Name


def staged(folder: Path, attempt: int = 0, **options: Any) -> Stage:
    """The stage as the runner makes it, on the trained two-layer model and its levels."""
    from methods.data import Locator
    from methods.progress import Progress

    found = catalogue().method("search.ecoflap")
    config = through_json(resolved(found, small_options(found) | options))
    result = folder / f"attempt-{attempt}"
    result.mkdir()
    parents = {"model": world().parents["whole"], "levels": bundle(config.levels.id)}
    progress = Progress(folder / "scratch", 0)
    return Stage(found.name, found.name, config, 0, parents, result, progress, Locator(smoke=True))


# --- probing ---------------------------------------------------------------------------------------------------


def test_a_probe_is_a_central_difference_along_the_noise() -> None:
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    # The loss is the sum of squares: its slope along (1, -3) is 2 * (1 - 6).
    noise = torch.tensor([1.0, -3.0], dtype=torch.float64)
    found = ecoflap.probe(weight, lambda: float(weight.square().sum()), noise, 1e-3)
    assert found == pytest.approx(10.0)


def test_a_probe_leaves_the_weights_bit_for_bit_as_they_were() -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = weight.clone()
    for seed in range(20):
        noise = ecoflap.gaussian(weight, torch.Generator().manual_seed(seed))
        ecoflap.probe(weight, lambda: float(weight.float().sum()), noise, 1e-3)
    assert torch.equal(weight, before)


def test_scores_are_by_gradient_alone_or_with_magnitudes() -> None:
    weight = torch.tensor([[1.0, -2.0]])
    for score, each in {"GradOnly": [3.0], "GradMagAbs": [3.0, 6.0], "GradMagSquare": [9.0, 36.0]}.items():
        found = ecoflap.importance(weight, 3.0, score)  # type: ignore[arg-type]
        assert found.flatten().tolist() == each
        assert ecoflap.total(found, 2, "sum") == sum(each)
        assert ecoflap.total(found, 2, "avg") == sum(each) / 2


def test_the_loss_from_any_depth_is_the_models_own(tmp_path: Path) -> None:
    problem = Problem(staged(tmp_path))
    sequences = [torch.arange(3, 23)[None], torch.arange(9, 20)[None]]
    with torch.inference_mode():
        depth = ecoflap.Depth(problem.runner, sequences)
        expected = [float(problem.model(input_ids=ids, labels=ids).loss) for ids in sequences]
        for site in range(len(problem.runner.sites)):
            depth.advance(site)
            assert [depth.loss(batch) for batch in range(2)] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_names_the_layer(tmp_path: Path) -> None:
    stage = staged(tmp_path, noise=1e38)
    with pytest.raises(NotFinite, match=r"model\.layers\.0\.self_attn\.q_proj is probed: lower noise"):
        ecoflap.search(stage.config, Problem(stage))


# --- sharing out -----------------------------------------------------------------------------------------------


def test_every_layer_keeps_its_least_and_the_rest_goes_by_score() -> None:
    # Both keep 4 of 10 at least; the other 4 go as 3 to 1.
    assert ecoflap.coarse([3.0, 1.0], [10, 10], 12, 0.6) == [7, 5]
    # The first is full with 10 of the 16.
    assert ecoflap.coarse([100.0, 1.0], [10, 10], 16, 0.6) == [10, 6]
    assert ecoflap.coarse([0.0, 0.0], [10, 30], 20, 0.6) == [5, 15]


@pytest.mark.parametrize("seed", range(10))
def test_the_target_is_met_to_the_weight_and_no_layer_is_sparser_than_allowed(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(5, 4000, (9,), generator=draw).tolist()
    scores = torch.randn(9, generator=draw).exp().pow(3).tolist()
    for target in (0.1, 0.5, 0.77, 0.93):
        keep = round(sum(sizes) * (1 - target))
        kept = ecoflap.coarse(scores, sizes, keep, target + 0.05)
        assert sum(kept) == keep
        assert all(0.95 - target <= count / size + 1e-12 for count, size in zip(kept, sizes, strict=True))
        assert all(count <= size for count, size in zip(kept, sizes, strict=True))


def test_too_little_headroom_is_a_sentence() -> None:
    with pytest.raises(AssayError, match=r"keep 4 weights, and 2 are to stay: raise headroom"):
        ecoflap.coarse([1.0] * 4, [1] * 4, 2, 0.6)


# --- the stage -------------------------------------------------------------------------------------------------


def test_the_assignment_costs_what_the_uniform_one_costs_and_is_no_uniform_one() -> None:
    outcome = run("search.ecoflap", headroom=0.3)
    assert outcome.notes["spent"] == {"weights": sum(_zeros().values())}
    assert set(outcome.notes["assignment"].values()) != {"0"}


def _zeros() -> dict[str, int]:
    """Zeros of every layer at level 0."""
    from methods.levels._database import Database

    database = Database.open(bundle("sparse_levels"))
    return {unit.name: unit.level("0").cost for unit in database.units}


def test_the_model_is_what_it_was_after_a_search(tmp_path: Path) -> None:
    stage = staged(tmp_path)
    problem = Problem(stage)
    before = {name: weight.clone() for name, weight in problem.model.state_dict().items()}
    ecoflap.search(stage.config, problem)
    assert all(torch.equal(weight, before[name]) for name, weight in problem.model.state_dict().items())


def test_levels_of_bits_are_refused_with_a_sentence() -> None:
    with pytest.raises(AssayError, match="chooses among levels of kind sparsity"):
        run("search.ecoflap", levels=Name("bit_levels"))


def test_sequences_of_one_token_alone_are_a_sentence(tmp_path: Path) -> None:
    stage = staged(tmp_path)
    problem = Problem(stage)
    with pytest.raises(AssayError, match="no calibration sequence has two tokens"):
        ecoflap.probe_all(stage.config, problem, [], [torch.tensor([[4]])])


def test_a_search_that_was_stopped_ends_with_the_same_assignment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import methods.search as family

    undisturbed = run("search.ecoflap")
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "1")
    stopped = staged(tmp_path)
    save = stopped.progress.save

    def stopping(at: int, state: dict[str, Tensor], values: dict[str, Any]) -> None:
        save(at, state, values)
        if at == 5:
            raise Interrupted("stopped")

    stopped.progress.save = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        family.run(stopped, ecoflap)
    probed: list[int] = []
    original = ecoflap.probe_layer

    def watched(config: Any, problem: Any, depth: Any, name: str, number: int) -> float:
        probed.append(number)
        return original(config, problem, depth, name, number)

    monkeypatch.setattr(ecoflap, "probe_layer", watched)
    resumed = staged(tmp_path, 1)
    family.run(resumed, ecoflap)
    assert probed == list(range(5, 14))
    left = (resumed.folder / "files" / "assignment.json").read_bytes()
    assert left == (undisturbed.folder / "files" / "assignment.json").read_bytes()
