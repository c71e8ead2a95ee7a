"""What searches are shown by: profiles over blocks, curves over generations and tokens, fronts, counted tokens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from methods.stage import AssayError
from tests import invented
from tests.test_collect import energy, finish, one, results
from tests.toy import experiments as toy
from workflows import against, draw, experiment, figures, specs, tables
from workflows.collect import Collector
from workflows.curve_figure import curve
from workflows.measured import Measured
from workflows.plan import Plan
from workflows.profile import profile
from workflows.scatter import scatter

COLUMNS = (*invented.COLUMNS, "step")
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj")  # fmt: skip
WHOLE = ("self_attn", "mlp")
Rows = list[dict[str, Any]]
Units = dict[str, float]


@pytest.fixture(autouse=True)
def the_style_of_figures() -> Iterator[None]:
    with draw.style():
        yield


def written(folder: Path, rows: Iterable[dict[str, Any]], curves: Rows | None = None) -> Measured:
    (folder / "experiment.json").write_text(json.dumps({"name": "toy", "title": "Toy", "seeds": [0]}))
    invented.write_csv(folder / "results.csv", [dict.fromkeys(COLUMNS, "") | row for row in rows])
    if curves:
        invented.write_csv(folder / "curves.csv", curves)
    return Measured.read([folder])


def row(chain: str, seed: int, **values: Any) -> dict[str, Any]:
    method = "prune.assigned"
    return {"chain": chain, "label": f"base > {chain}", "model_id": f"{chain}-{seed}", "seed": seed, "method": method,
            "family": "prune", "options": "{}", "swept": "{}", "status": "ok"} | values  # fmt: skip


def profiled(
    chain: str, seeds: int, of: Callable[[int], Units], metric: str = "sparsity", **values: Any
) -> Rows:
    """Rows of one chain's profile; ``of`` gives the units of a seed."""
    entry = {"evaluation": "profile", "entry": "profile", "metric": metric}
    return [row(chain, seed, **entry, task=unit, value=value, **values)
            for seed in range(seeds) for unit, value in of(seed).items()]  # fmt: skip


def everywhere(blocks: int, layers: Sequence[str], of: Callable[[int, str], float]) -> Units:
    return {f"model.layers.{block}.{layer}": of(block, layer) for block in range(blocks) for layer in layers}


def wave(blocks: int, level: float) -> Callable[[int], Units]:
    """Another profile for every seed."""
    return lambda seed: everywhere(
        blocks, LINEAR, lambda block, layer: level + 0.2 * math.sin(block + seed + len(layer))
    )


def flat(blocks: int, level: float, layers: Sequence[str] = LINEAR) -> Callable[[int], Units]:
    return lambda seed: everywhere(blocks, layers, lambda block, layer: level)


def removed(blocks: int, gone: Callable[[int], int]) -> Callable[[int], Units]:
    """The attention of one block, and the MLP of the next."""
    places = {"self_attn": 0, "mlp": 1}
    return lambda seed: everywhere(
        blocks, WHOLE, lambda block, layer: float(block == (gone(seed) + places[layer]) % blocks)
    )


def drawn(make: Any, measured: Measured, spec: dict[str, Any]) -> tuple[Any, list[Any], str]:
    """A figure that was laid out, its panels and its caption."""
    image, caption = make(measured, measured.chosen(spec.get("of")), spec, "f")
    image.draw_without_rendering()
    return image, [axes for axes in image.axes if axes.get_visible()], caption


def texts_of(image: Any) -> list[Any]:
    """All titles, names of axes, ticks and legends of a figure that can be seen."""
    found = [text for legend in image.legends for text in legend.get_texts()]
    for axes in (axes for axes in image.axes if axes.get_visible()):
        found += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [
                tick.label1
                for tick in axis.get_major_ticks()
                if tick.label1.get_visible() and low <= tick.get_loc() <= high
            ]
    return [text for text in [*found, image._supylabel] if text is not None and text.get_text()]


def overlapping(texts: Sequence[Any]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent().padded(-2)) for text in texts]
    return [(one_, other) for (one_, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]


# --- rows -----------------------------------------------------------------------------------------------------

PROFILE = [{"unit": "model.layers.0.mlp.down_proj", "metric": "sparsity", "value": 0.25},
           {"unit": "model.layers.1.mlp.down_proj", "metric": "sparsity", "value": 0.75}]  # fmt: skip
CHAINS = {
    "searched": "base > prune.magnitude(sparsity=0.5)",
    "healed": 'searched > train.sft(data="authors/forget01")',
}


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    """A pruned model whose record has a profile, and a trained one behind it."""
    built = toy.planned(toy.write(tmp_path / "toy.yaml", CHAINS, {"size": "size"}), tmp_path / "results")
    for job in built.jobs.values():
        notes = {"profile": PROFILE, "tokens_forwarded": 3_000_000} if job.method == "prune.magnitude" else {}
        finish(built, job, notes=notes)
    return built


def test_a_profile_becomes_rows_of_the_chain_whose_last_stage_has_it(planned: Plan) -> None:
    rows = [each for each in results(planned) if each["entry"] == "profile"]
    assert [(each["chain"], each["evaluation"], each["task"], each["metric"], each["value"]) for each in rows] == [
        ("searched", "profile", "model.layers.0.mlp.down_proj", "sparsity", 0.25),
        ("searched", "profile", "model.layers.1.mlp.down_proj", "sparsity", 0.75),
    ]  # fmt: skip
    assert {(each["seed"], each["step"], each["status"], each["score_id"]) for each in rows} == {
        (0, None, "ok", "")
    }


def test_tables_that_nobody_asked_for_and_costs_are_without_profiles(planned: Plan, tmp_path: Path) -> None:
    Collector(planned).write(tmp_path / "toy")
    measured = Measured.read([tmp_path / "toy"])
    wanted = tables.default_specs(measured)
    assert sorted(wanted) == ["cost", "size"]
    assert "profile" not in str(wanted)
    assert wanted["cost"]["columns"][-2:] == ["tokens.stage_forwarded", "tokens.chain_forwarded"]


def test_a_number_for_every_layer_is_shown_by_a_figure(tmp_path: Path) -> None:
    measured = written(tmp_path, profiled("searched", 1, wave(4, 0.5)))
    with pytest.raises(
        AssayError, match=r"measured for 28 layers; draw a figure of kind profile, or name one"
    ):
        measured.columns("profile.sparsity")
    (column,) = measured.columns("profile.model.layers.3.mlp.up_proj.sparsity")
    (run,) = measured.chains
    assert measured.cell(run, column).values == [0.5 + 0.2 * math.sin(3 + 0 + len("mlp.up_proj"))]


PLANNED = """\
title: A toy
country: FRA
seeds: [0, 1]
models: {base: {new: llama}}
chains: {searched: base > prune.magnitude}
evaluate: {EVALUATE: size}
figures: {f: FIGURE}
"""


def plan(folder: Path, figure: str, evaluate: str = "size") -> None:
    path = folder / "toy.yaml"
    path.write_text(PLANNED.replace("EVALUATE", evaluate).replace("FIGURE", figure))
    specs.check_experiment(experiment.load(path))


@pytest.mark.parametrize(
    "figure",
    ["{kind: profile, metric: sparsity, of: [searched], panels: chain, title: T, x_label: x}",
     "{kind: curve, terms: holdout, along: tokens, log: x}"],
)  # fmt: skip
def test_the_planner_accepts_figures_of_searches(tmp_path: Path, figure: str) -> None:
    plan(tmp_path, figure)


@pytest.mark.parametrize(
    ("figure", "sentence"),
    [("{kind: profile}", "figures f: a profile needs metric"),
     ("{kind: profile, metric: zeros}", "metric is one of sparsity, bits, removed, not 'zeros'"),
     ("{kind: profile, metric: bits, panels: layers}", "panels is one of layer, chain, not 'layers'"),
     ("{kind: profile, metric: bits, of: [serched]}", "'serched' names no chain or model; did you mean 'searched'?"),
     ("{kind: profile, metric: bits, log: y}", "there is no key 'log'"),
     ("{kind: curve, terms: holdout, along: [tokens]}", "along is one text, a logged term, e.g. tokens")],
)  # fmt: skip
def test_the_planner_refuses_figures_that_could_not_be_drawn(
    tmp_path: Path, figure: str, sentence: str
) -> None:
    with pytest.raises(AssayError, match=re.escape(sentence)):
        plan(tmp_path, figure)


def test_no_evaluation_may_be_called_as_profiles_are(tmp_path: Path) -> None:
    with pytest.raises(
        AssayError, match=r"toy\.yaml, line 6: evaluate profile: this name belongs to the profiles"
    ):
        plan(tmp_path, "{kind: profile, metric: bits}", evaluate="profile")


# --- profiles ---------------------------------------------------------------------------------------------------


def test_a_line_is_the_mean_over_results_with_their_range_and_dots(tmp_path: Path) -> None:
    values = {0: (0.25, 0.75), 1: (0.5, 1.0), 2: (0.75, 0.5)}
    own = profiled("searched", 3, lambda seed: everywhere(2, ["mlp.up_proj"], lambda b, _: values[seed][b]))
    _, (axes,), caption = drawn(profile, written(tmp_path, own), {"metric": "sparsity"})
    line, dots = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 1], [0.5, 0.75])
    assert sorted(dots.get_ydata()) == [0.25, 0.5, 0.5, 0.75, 0.75, 1.0]
    band = axes.collections[0].get_datalim(axes.transData)
    assert (band.y0, band.y1) == (0.25, 1.0)
    assert (axes.get_title(), axes.get_xlabel()) == ("MLP up", "decoder block")
    assert caption == (
        "Lines: means over distinct results; bands: smallest to largest. Dots: single results. n = 3 distinct results."
    )


def test_the_same_model_under_every_seed_is_one_result(tmp_path: Path) -> None:
    rows = [each | {"model_id": "same"} for each in profiled("searched", 3, lambda _: wave(3, 0.5)(0))]
    _, _, caption = drawn(profile, written(tmp_path, rows), {"metric": "sparsity"})
    assert caption == "Lines: single results. n = 1 distinct results."


def test_every_layer_has_a_panel_and_a_uniform_chain_is_dashed(tmp_path: Path) -> None:
    rows = profiled("uniform", 1, flat(3, 0.5)) + profiled("searched", 3, wave(3, 0.5))
    image, panels, caption = drawn(profile, written(tmp_path, rows), {"metric": "sparsity"})
    titles = [axes.get_title() for axes in panels]
    assert titles == [
        "attention q",
        "attention k",
        "attention v",
        "attention o",
        "MLP gate",
        "MLP up",
        "MLP down",
    ]
    assert [text.get_text() for text in image.legends[0].get_texts()] == ["searched", "uniform"]
    level = next(line for line in panels[0].lines if line.get_label() == "uniform")
    assert list(level.get_ydata()) == [0.5, 0.5] and level.get_linestyle() == "--"
    assert image.get_supylabel() == "sparsity (share of weights)"
    assert "Distinct results: 1 for uniform, 3 for searched." in caption


def test_a_budget_is_dashed_where_no_uniform_chain_stands_for_it(tmp_path: Path) -> None:
    asked = profiled("searched", 2, wave(3, 0.4), options='{"sparsity": 0.4}')
    image, _, _ = drawn(profile, written(tmp_path, asked), {"metric": "sparsity"})
    assert [text.get_text() for text in image.legends[0].get_texts()] == ["searched", "budget 0.4"]
    both = written(tmp_path, asked + profiled("uniform", 1, flat(3, 0.4)))
    image, _, _ = drawn(profile, both, {"metric": "sparsity"})
    assert [text.get_text() for text in image.legends[0].get_texts()] == ["searched", "uniform"]


def test_uniform_chains_alone_are_lines(tmp_path: Path) -> None:
    rows = profiled("a", 1, flat(3, 0.4)) + profiled("b", 1, flat(3, 0.6))
    image, panels, _ = drawn(profile, written(tmp_path, rows), {"metric": "sparsity"})
    assert [text.get_text() for text in image.legends[0].get_texts()] == ["a", "b"]
    assert [next(iter(line.get_ydata())) for line in panels[0].lines if len(line.get_xdata())] == [0.4, 0.6]


def test_removed_inputs_are_heads_and_neurons(tmp_path: Path) -> None:
    layers = ["mlp.down_proj", "self_attn.o_proj"]
    rows = profiled("tyr", 2, lambda seed: everywhere(4, layers, lambda b, _: (b + seed) / 8), "removed")
    _, panels, _ = drawn(profile, written(tmp_path, rows), {"metric": "removed"})
    assert [axes.get_title() for axes in panels] == ["heads", "neurons"]


def test_what_is_removed_whole_is_a_grid_of_counts(tmp_path: Path) -> None:
    rows = profiled("depth", 3, removed(4, lambda seed: 1 if seed < 2 else 2), "removed")
    rows += profiled("scores", 1, removed(4, lambda seed: 3), "removed")
    image, (first, second), caption = drawn(profile, written(tmp_path, rows), {"metric": "removed"})
    counts = {(text.get_position(), text.get_text()) for text in first.texts}
    assert counts == {((1, 0), "2"), ((2, 0), "1"), ((2, 1), "2"), ((3, 1), "1")}
    assert (second.get_title(), list(second.texts), len(second.patches)) == ("scores", [], 8)
    light, dark = second.patches[0].get_facecolor(), second.patches[3].get_facecolor()
    assert sum(light[:3]) > 2.5 > 1.0 > sum(dark[:3])
    assert [text.get_text() for text in image.legends[0].get_texts()] == [
        "kept", "removed in some results", "removed in all",
    ]  # fmt: skip
    assert caption == (
        "Numbers: how many of a chain's results remove it. Distinct results: 3 for depth, 1 for scores."
    )


def test_many_chains_get_a_grid_each_with_a_scale(tmp_path: Path) -> None:
    rows = [each for number in range(9) for each in profiled(f"c{number}", 1, wave(3, 0.3 + number / 50))]
    measured = written(tmp_path, rows)
    _, panels, caption = drawn(profile, measured, {"metric": "sparsity"})
    assert [axes.get_title() for axes in panels][:9] == [f"c{number}" for number in range(9)]
    assert panels[9].get_ylabel() == "sparsity (share of weights)"
    assert [tick.get_text() for tick in panels[0].get_yticklabels()][::6] == ["attention q", "MLP down"]
    assert caption == "Colours: means over distinct results. n = 1 distinct results."
    few, _, _ = drawn(profile, measured, {"metric": "sparsity", "of": ["c1"], "panels": "chain"})
    assert len(few.axes) == 2


@pytest.mark.parametrize("blocks", [2, 6, 32])
@pytest.mark.parametrize("seeds", [1, 5])
def test_nothing_of_a_profile_covers_anything_else(tmp_path: Path, blocks: int, seeds: int) -> None:
    rows = profiled("uniform", 1, flat(blocks, 0.5)) + profiled("owl", 1, wave(blocks, 0.5))
    rows += profiled("evopress[sparsity=0.5,fitness=sparse_kl]", seeds, wave(blocks, 0.45))
    for name in ("searched_depth[sparsity=0.25]", "sliding_window", "scores"):
        rows += profiled(name, seeds, removed(blocks, lambda seed: seed % 2), "removed")
    measured = written(tmp_path, rows)
    for spec in ({"metric": "sparsity"}, {"metric": "sparsity", "panels": "chain"}, {"metric": "removed"}):
        image, _, _ = drawn(profile, measured, spec)
        shown = texts_of(image)
        assert overlapping(shown) == []
        frame = image.bbox.padded(1)
        boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
        outside = [text for text, box in boxes if not (frame.contains(*box.min) and frame.contains(*box.max))]
        assert outside == []


def test_a_chain_without_a_profile_is_named_and_nothing_at_all_is_a_sentence(tmp_path: Path) -> None:
    dense = [row("dense", 0, evaluation="e", entry="e", task="t", metric="m", value=1.0)]
    measured = written(tmp_path, profiled("searched", 1, wave(3, 0.5)) + dense)
    _, _, caption = drawn(profile, measured, {"metric": "sparsity", "of": ["searched", "dense"]})
    assert caption.endswith("Without a profile of sparsity: dense.")
    assert "dense" not in drawn(profile, measured, {"metric": "sparsity"})[2]
    for spec, sentence in (
        (
            {"metric": "bits"},
            "figures.f: no chain here has a profile of bits; there are profiles of sparsity.",
        ),
        ({"metric": "bits", "of": ["dense"]}, "those that end in prune.assigned or a shorthand for it do."),
    ):
        with pytest.raises(AssayError, match=re.escape(sentence)):
            figures.figure(measured, "f", {"kind": "profile", **spec}, "origin")


def test_a_module_without_a_block_is_named(tmp_path: Path) -> None:
    measured = written(tmp_path, profiled("searched", 1, lambda seed: {"lm_head": 0.5}))
    with pytest.raises(AssayError, match="'lm_head' is in no numbered block"):
        drawn(profile, measured, {"metric": "sparsity"})


# --- curves of searches -------------------------------------------------------------------------------------------


def searched(chain: str, seeds: int, method: str = "search.evopress") -> Rows:
    """Twenty generations; a seed forwards 1,000 tokens a generation, the next one 100 more."""
    base = {"chain": chain, "label": chain, "method": method}
    return [
        base | {"model_id": f"{chain}-{seed}", "seed": seed, "step": step, "term": term, "value": value}
        for seed in range(seeds) for step in (0, 10, 20)
        for term, value in (("holdout", 1.0 - step / 40 + seed), ("tokens", step * (1000.0 + 100 * seed)))
    ]  # fmt: skip


def scored(chain: str, seeds: int, **values: Any) -> Rows:
    entry = {"evaluation": "e", "entry": "e", "task": "t", "metric": "m", "value": 1.0}
    return [row(chain, seed, **entry, **values) for seed in range(seeds)]


def test_a_search_counts_generations_and_says_what_it_made_small(tmp_path: Path) -> None:
    rows = scored("found", 2, options='{"fitness": "kl"}')
    measured = written(tmp_path, rows, searched("found", 2))
    _, (axes,), _ = drawn(curve, measured, {"terms": "holdout"})
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "generation", "held-out KL from the dense model (nats/token)",
    )  # fmt: skip
    assert [list(axes.lines[0].get_xdata()), list(axes.lines[0].get_ydata())] == [
        [0, 10, 20],
        [1.5, 1.25, 1.0],
    ]


def test_searches_beside_training_count_steps_and_different_fitnesses_have_no_unit(tmp_path: Path) -> None:
    rows = scored("a", 1, options='{"fitness": "kl"}') + scored("b", 1, options='{"fitness": "ppl"}')
    curves = searched("a", 1) + searched("b", 1, "train.sft")
    _, (axes,), _ = drawn(curve, written(tmp_path, rows, curves), {"terms": "holdout"})
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "fitness on one held-out batch")


def test_a_curve_may_be_drawn_along_what_was_logged_at_the_same_steps(tmp_path: Path) -> None:
    measured = written(tmp_path, scored("found", 2), searched("found", 2))
    _, (axes,), caption = drawn(curve, measured, {"terms": "holdout", "along": "tokens"})
    line = axes.lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.0, 10_500.0, 21_000.0], [1.5, 1.25, 1.0])
    assert axes.get_xlabel() == "tokens forwarded"
    assert "10 k" in [tick.get_text() for tick in axes.get_xticklabels()]
    assert "x: tokens at the same step, the mean over distinct results." in caption
    _, (axes,), caption = drawn(curve, measured, {"terms": "holdout", "along": "tokens", "log": ["x"]})
    assert list(axes.lines[0].get_xdata()) == [10_500.0, 21_000.0]
    assert "What has tokens 0 is not shown on a logarithmic axis." in caption
    with pytest.raises(AssayError, match=r"no chain here logged holdout along seconds\."):
        drawn(curve, measured, {"terms": "holdout", "along": "seconds"})


def test_the_stages_of_a_shorthand_are_one_curve_whose_steps_and_tokens_count_on(tmp_path: Path) -> None:
    chains = {"short": "base > unlearn.measured_and_moved"}
    built = toy.planned(toy.write(tmp_path / "toy.yaml", chains, {"size": "size"}), tmp_path / "results")
    for job in built.jobs.values():
        finish(built, job, energy=energy(1.0))
        text = "step,term,value\n0,holdout,1.0\n0,tokens,5.0\n10,holdout,0.5\n10,tokens,100.0\n"
        if job.kind == "stage":
            (built.store.result(job.id) / "curve.csv").write_text(text)
    rows = list(Collector(built).curves())
    assert [each["method"] for each in rows] == ["curvature.measured"] * 4 + ["unlearn.moved"] * 4
    assert [each["step"] for each in rows] == [0, 0, 10, 10, 10, 10, 20, 20]
    assert [float(each["value"]) for each in rows if each["term"] == "tokens"] == [5.0, 100.0, 105.0, 200.0]
    assert {each["model_id"] for each in rows} == {toy.job_of(built, "short")}
    Collector(built).write(tmp_path / "toy")
    (run,) = (each for each in Measured.read([tmp_path / "toy"]).chains if each.name == "short")
    (whole,) = run.distinct_curves
    assert whole.lines["tokens"] == [(0.0, 5.0), (10.0, 105.0), (20.0, 200.0)]


# --- fronts -------------------------------------------------------------------------------------------------------


def front(families: int, members: int) -> Rows:
    """Sweeps of sparsity: fewer parameters, more distance."""
    rows: Rows = []
    for family in range(families):
        for sparsity in [round(0.1 * (1 + place), 1) for place in range(members)]:
            own = {"swept": json.dumps({"sparsity": sparsity}), "method": f"prune.m{family}"}
            for metric, value in (
                ("parameters", 1e6 * (1 - sparsity)),
                ("kl", (2 + family) * math.exp(3 * sparsity)),
            ):
                rows.append(row(f"searched_{family}[sparsity={sparsity}]", 0, evaluation="e", entry="e", task="t",
                                metric=metric, value=value, better="lower", **own))  # fmt: skip
    return rows


SPEC = {"x": "e.parameters", "y": "e.kl", "color": "method", "front": True}


def test_many_members_of_sweeps_are_called_by_what_is_swept(tmp_path: Path) -> None:
    _, (axes,), caption = drawn(scatter, written(tmp_path, front(4, 5)), SPEC)
    assert sorted(text.get_text() for text in axes.texts) == sorted(["0.1", "0.2", "0.3", "0.4", "0.5"] * 4)
    assert overlapping(axes.texts) == []
    assert "Labels: sparsity; lines join what was swept." in caption
    lines = [line for line in axes.lines if len(line.get_xdata()) == 5 and line.get_alpha()]
    assert [list(line.get_xdata()) for line in lines] == [pytest.approx([5e5, 6e5, 7e5, 8e5, 9e5])] * 4


def test_few_points_and_sweeps_without_a_colour_of_their_own_keep_their_names(tmp_path: Path) -> None:
    _, (axes,), caption = drawn(scatter, written(tmp_path, front(2, 3)), SPEC)
    assert "searched_0[sparsity=0.1]" in [text.get_text() for text in axes.texts]
    assert "Labels" not in caption
    _, (axes,), _ = drawn(scatter, written(tmp_path, front(3, 5)), SPEC | {"color": "family"})
    assert "searched_0[sparsity=0.1]" in [text.get_text() for text in axes.texts]


def test_large_numbers_and_narrow_logarithms_have_readable_ticks(tmp_path: Path) -> None:
    _, (axes,), _ = drawn(scatter, written(tmp_path, front(2, 3)), SPEC | {"log": ["y"]})
    assert "800 k" in [tick.get_text() for tick in axes.get_xticklabels()]
    assert {tick.get_text() for tick in axes.get_yticklabels()} & {"3", "5"}


# --- counted tokens -------------------------------------------------------------------------------------------------


def forwarded(chain: str, tokens: float) -> dict[str, Any]:
    return row(chain, 0, evaluation="tokens", entry="tokens", metric="chain_forwarded", value=tokens, unit="tokens",
               better="lower")  # fmt: skip


def test_forwarded_tokens_of_a_stage_and_of_its_chain_are_rows(planned: Plan) -> None:
    rows = results(planned)
    own = one(rows, chain="searched", metric="stage_forwarded")
    assert (own["entry"], own["value"], own["unit"], own["better"]) == ("tokens", 3e6, "tokens", "lower")
    for chain in ("searched", "healed"):
        assert one(rows, chain=chain, metric="chain_forwarded")["value"] == 3e6
    assert not [each for each in rows if each["chain"] == "healed" and each["metric"] == "stage_forwarded"]
    assert not [each for each in rows if each["chain"] == "base" and each["entry"] == "tokens"]


def test_many_tokens_are_counted_in_millions(tmp_path: Path) -> None:
    column = {"columns": ["tokens.chain_forwarded"]}
    made = tables.table(
        written(tmp_path, [forwarded("a", 1_234_567.0), forwarded("b", 45_678.0)]), "t", column
    )
    assert made.headers[1] == "tokens.chain_forwarded (M tokens) ↓"
    assert [each[1].text for each in made.rows] == ["1.235 (1)", "0.046 (1)"]
    assert made.numbers["tokens.chain_forwarded"].tolist() == [1_234_567.0, 45_678.0]
    made = tables.table(written(tmp_path, [forwarded("b", 45_678.0)]), "t", column)
    assert (made.headers[1], made.rows[0][1].text) == ("tokens.chain_forwarded (tokens) ↓", "45678 (1)")


def test_tokens_and_profiles_are_compared_with_a_published_run_and_seconds_are_not(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("fresh", "published")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        time = row("a", 0, evaluation="time", entry="time", metric="chain_seconds", value=1.0 + number)
        own = profiled("a", 1, lambda _, number=number: {"model.layers.0.mlp": float(number)}, "removed")
        written(folder, [time, forwarded("a", 1000.0 + number), *own])
    found = against.differences(*folders)
    assert sorted(found["entry"]) == ["profile", "tokens"]
    assert against.compared_rows(folders[0]) == 2
