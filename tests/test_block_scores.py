"""Block scores: worked out by hand, on a model whose blocks are known, and what is removed by them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.find import catalogue
from methods.search import block_scores
from methods.search._depth import Depth
from methods.stage import AssayError, From
from tests.generic import resolved, run

NAMES = [f"model.layers.{index}" for index in range(4)]


def space(removed: int, whole_blocks: bool = True) -> Depth:
    attentions, mlps = (tuple(f"{name}.{kind}" for name in NAMES) for kind in ("self_attn", "mlp"))
    return Depth(attentions, mlps, removed, removed, whole_blocks=whole_blocks)


def removed(candidate: tuple[int, ...]) -> list[int]:
    """The numbers of the blocks whose attention goes."""
    return [index for index, gone in enumerate(candidate[::2]) if gone]


# --- from hidden states ---------------------------------------------------------------------------------------------


def test_scores_of_a_token_are_those_worked_out_by_hand() -> None:
    # From (3, 4) to (0, 10): lengths 5 and 10, product 40, so the cosine is 0.8; the step is (-3, 6).
    before, after = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])
    expected = {
        "influence": 0.2,
        "l2": math.sqrt(45),
        # (0.6, 0.8) to (0, 1)
        "l2_normalized": math.sqrt(0.36 + 0.04),
        "norm_ratio": math.sqrt(45) / 10,
        "window_cosine": 0.2,
        "window_angular": math.acos(0.8) / math.pi,
    }
    for name, pair in block_scores.PAIRS.items():
        assert float(pair(before, after)) == pytest.approx(expected.pop(name)), name
    assert not expected


def test_the_mean_is_over_tokens_and_not_over_sequences() -> None:
    # One sequence of one token that moves by 3, one of two tokens that stay: 1, not 1.5.
    passes: list[list[Tensor]] = [
        [torch.zeros(1, 2), torch.tensor([[3.0, 0.0]])],
        [torch.zeros(2, 2), torch.zeros(2, 2)],
    ]
    assert block_scores.mean_scores(block_scores.distance, iter(passes)) == [1.0]


def test_a_window_is_scored_from_its_start_to_its_end() -> None:
    states = [torch.tensor([[float(place), 0.0]]) for place in (0, 1, 3, 6)]
    assert block_scores.mean_scores(block_scores.distance, iter([states]), gap=2) == [3.0, 5.0]


def test_angles_are_averaged_and_not_their_cosines() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # 0 and 90 degrees: a quarter of a half circle, where the mean cosine of 0.5 would be a third of one.
    assert block_scores.mean_scores(block_scores.angle, iter([[before, after]])) == pytest.approx([0.25])


def test_a_vanished_hidden_state_has_a_number_for_a_score() -> None:
    nothing = torch.zeros(1, 2)
    for name, pair in block_scores.PAIRS.items():
        assert math.isfinite(float(pair(nothing, nothing))), name


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_lowest_scores_go_and_among_equal_ones_the_first() -> None:
    scores = dict(zip(NAMES, (0.3, 0.1, 0.2, 0.1), strict=True))
    assert removed(block_scores.lowest(space(1), scores, windows=False)) == [1]
    assert removed(block_scores.lowest(space(2), scores, windows=False)) == [1, 3]
    assert removed(block_scores.lowest(space(3), scores, windows=False)) == [1, 2, 3]


def test_a_window_goes_as_a_whole() -> None:
    # Two blocks at once: three places to start at.
    scores = dict(zip(NAMES, (0.3, 0.2, 0.1), strict=False))
    assert removed(block_scores.lowest(space(2), scores, windows=True)) == [2, 3]


def test_attentions_and_mlps_are_chosen_apart() -> None:
    parts = space(1, whole_blocks=False)
    # All attentions score lower than all MLPs: still one of each goes.
    scores = {name: float(place) for place, name in enumerate((*parts.attentions, *parts.mlps))}
    candidate = block_scores.lowest(parts, scores, windows=False)
    parts.check(candidate)
    assert candidate == (1, 1, 0, 0, 0, 0, 0, 0)


# --- a stage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that is searched has a first block that changes nothing."""
    from methods.search import Problem

    usual = Problem.model.func  # type: ignore[attr-defined]

    def model(self: Any) -> Any:
        found = usual(self)
        with torch.no_grad():
            found.model.layers[0].self_attn.o_proj.weight.zero_()
            found.model.layers[0].mlp.down_proj.weight.zero_()
        return found

    monkeypatch.setattr(Problem, "model", property(model))


SCORES = ("influence", "l2", "l2_normalized", "norm_ratio", "kl", "window_cosine", "window_angular")


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("score", SCORES)
def test_a_block_that_changes_nothing_scores_nothing_and_goes(score: str) -> None:
    found = assignment(score=score)
    assert found["about"]["scores"]["model.layers.0"] == pytest.approx(0.0, abs=1e-5)
    assert found["about"]["scores"]["model.layers.1"] > 1e-3
    assert found["spent"] == {"attentions": 1, "mlps": 1}
    assert found["levels"] == {
        "model.layers.0.self_attn": "removed",
        "model.layers.0.mlp": "removed",
        "model.layers.1.self_attn": "kept",
        "model.layers.1.mlp": "kept",
    }


@pytest.mark.usefixtures("identity")
def test_sub_blocks_are_scored_by_leaving_each_out() -> None:
    scores = assignment(score="kl", unit="sub_block")["about"]["scores"]
    assert list(scores) == [
        f"model.layers.{block}.{kind}" for block in (0, 1) for kind in ("self_attn", "mlp")
    ]
    assert list(scores.values())[:2] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert min(list(scores.values())[2:]) > 0


def assignment(**options: Any) -> Any:
    outcome = run("search.block_scores", **options)
    return json.loads((outcome.folder / "files" / "assignment.json").read_text(encoding="utf-8"))


def test_the_final_norm_changes_the_last_blocks_score_alone() -> None:
    official, before = (
        assignment(score="l2", final_norm=norm)["about"]["scores"] for norm in ("official", "before")
    )
    assert official["model.layers.0"] == before["model.layers.0"]
    assert official["model.layers.1"] != pytest.approx(before["model.layers.1"], rel=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"sparsity": 0.3},
            r"sparsity=0\.3 cannot be met exactly: of 2 attention blocks it is 0\.6\. Write 0\.5",
        ),
        ({"sparsity": 0.0}, "sparsity=0.0: input should be greater than 0"),
        ({"sparsity": 1e-7}, "removes none of 2"),
        ({"sparsity": 1.0}, "sparsity=1.0: input should be less than 1"),
        ({"unit": "sub_block"}, "not 'influence'"),
        ({"score": "kl", "final_norm": "before"}, "looks at no hidden states"),
        ({"calibration_tokens": 10**6}, "1000000 calibration tokens are asked for"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AssayError, match=words):
        assignment(**options)


# --- ShortGPT ---------------------------------------------------------------------------------------------------------


def test_shortgpt_stands_for_a_search_by_influence_and_a_model_of_it() -> None:
    found = catalogue().method("prune.shortgpt")
    config = resolved(found, {"data": "authors/retain90", "sparsity": 0.25}).config
    search, model = found.load().expand(config)
    assert (search.method, search.options["score"]) == ("search.block_scores", "influence")
    assert (model.method, model.options) == ("prune.assigned", {"assignment": From("search")})


def test_shortgpt_removes_the_blocks_that_the_search_names() -> None:
    outcome = run("prune.shortgpt")
    gone = [name for name, level in outcome.notes["assignment"].items() if level == "removed"]
    assert len(gone) == 2 and len({name.rpartition(".")[0] for name in gone}) == 1
    matrices = {name: weight for name, weight in outcome.weights.items() if name.endswith("proj.weight")}
    for name, weight in matrices.items():
        assert bool((weight == 0).all()) == name.startswith(tuple(gone)), name
    # The smaller form is a plain Llama with one block less.
    assert outcome.notes["plain"] and outcome.notes["parameters_physical"] < outcome.notes["parameters"]
