from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from methods.stage import AssayError
from tests import invented, invented_classifiers
from workflows import draw, experiment, figures, page, report, specs, tables, verdicts
from workflows.bars import bars
from workflows.chance import t_quantile
from workflows.columns import Cell, Sample
from workflows.curve_figure import curve
from workflows.measured import Measured
from workflows.plane import plane
from workflows.relative import changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invented_classifiers.write(tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="module")
def measured(folder: Path) -> Measured:
    return Measured.read([folder])


@pytest.fixture(autouse=True)
def the_style_of_figures() -> Iterator[None]:
    with draw.style():
        yield


def drawn(make: Any, measured: Measured, spec: dict[str, Any]) -> tuple[Any, list[Any], str]:
    """A figure that was laid out, its panels and its caption."""
    image, caption = make(measured, measured.chosen(spec.get("of")), spec, "f")
    image.draw_without_rendering()
    return image, [axes for axes in image.axes if axes.get_visible()], caption


def cell(values: dict[str, float], *units: str) -> Cell:
    return Cell(tuple(Sample(seed, f"id{seed}", value) for seed, value in values.items()), {}, units)


def written(
    folder: Path, values: dict[str, Sequence[float]], swept: dict[str, str] | None = None
) -> Measured:
    """Results with one metric, ``e.m``, for chains whose seeds are 0, 1, ..."""
    rows = [
        dict.fromkeys(invented.COLUMNS, "")
        | {"chain": chain, "label": chain, "score_id": f"{chain}{seed}", "seed": seed, "evaluation": "e", "entry": "e",
           "task": "t", "metric": "m", "value": value, "better": "lower", "unit": "nats", "status": "ok",
           "swept": (swept or {}).get(chain, "{}")}
        for chain, own in values.items() for seed, value in enumerate(own)
    ]  # fmt: skip
    invented.write(folder)
    invented.write_csv(folder / "results.csv", rows)
    return Measured.read([folder])


def overlapping(texts: Sequence[Any]) -> list[tuple[str, str]]:
    """Pairs of drawn texts whose boxes share room, but for the borders that every box has."""
    boxes = [(text.get_text(), text.get_window_extent().padded(-2)) for text in texts if text.get_text()]
    return [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]


# --- columns relative to a chain ----------------------------------------------------------------------------


def test_a_change_is_in_percent_and_paired_by_seed() -> None:
    # (110 - 100) / 100 and (90 - 120) / 120; the order of the seeds does not matter
    found = changed(cell({"1": 90.0, "0": 110.0}), cell({"0": 100.0, "1": 120.0}))
    assert found.by_seed == pytest.approx({"0": 10.0, "1": -25.0})
    assert found.mean == pytest.approx(-7.5)
    assert (found.statuses, found.units) == ({}, ("%",))


def test_results_without_a_partner_are_counted() -> None:
    found = changed(cell({"0": 1.0, "1": 2.0, "2": 3.0}), cell({"1": 4.0, "5": 1.0}))
    assert (found.by_seed, found.statuses) == ({"1": pytest.approx(-50.0)}, {"no pair": 2})
    assert changed(Cell(statuses={"oom": 1}), cell({"0": 1.0})).statuses == {"oom": 1}


def test_a_result_without_a_seed_goes_with_every_seed() -> None:
    assert changed(cell({"0": 3.0, "1": 1.0}), cell({"": 2.0})).values == pytest.approx([50.0, -50.0])
    assert changed(cell({"": 3.0}), cell({"0": 2.0, "1": 4.0})).by_seed == pytest.approx({"0": 50, "1": -25})


def test_nothing_is_relative_to_zero_and_below_zero_the_sign_is_that_of_the_difference() -> None:
    assert changed(cell({"0": 3.0}), cell({"0": 0.0})).statuses == {"relative to 0": 1}
    assert changed(cell({"0": -3.0}), cell({"0": -2.0})).values == pytest.approx([-50.0])


def test_a_relative_energy_says_how_both_sides_were_obtained() -> None:
    measured_, estimated = cell({"0": 2.0}, "kWh measured"), cell({"0": 1.0}, "kWh estimated, shared")
    assert changed(measured_, measured_).units == ("% measured",)
    assert changed(measured_, estimated).units == ("% measured and estimated, shared",)


def test_a_relative_column_of_a_table_says_so_and_counts_its_pairs(tmp_path: Path) -> None:
    values = {"control": [2.0, 4.0, 8.0], "other": [3.0, 5.0], "less": [1.0, 2.0, 4.0, 7.0]}
    made = tables.table(written(tmp_path, values), "t", {"columns": ["e.m", "e.m relative to control"]})
    assert made.headers[2] == "e.m relative to control (%) ↓"
    assert [row[2].text for row in made.rows] == [
        "0.00 ± 0 (3)",
        "+37.50 ± 17.68 (2)",
        "-50.00 ± 0 (3), 1 no pair",
    ]
    assert made.numbers["e.m relative to control n"].tolist() == [3, 2, 3]
    about = "Relative to control: (X − X of control) / |X of control| in percent, paired by seed; (n) counts the pairs."
    assert about in made.notes
    assert made.rows[2][2].bold


def test_costs_relative_to_a_chain_keep_their_origin_and_their_losses(measured: Measured) -> None:
    columns = ["energy.stage_kwh relative to control", "time.stage_seconds relative to control"]
    made = tables.table(measured, "t", {"columns": columns})
    assert made.headers[1] == "energy.stage relative to control (%, estimated) ↓"
    rows = {row[0].text: [text.text for text in row[1:]] for row in made.rows}
    assert rows["broken"] == ["failed, oom, timeout"] * 2
    assert re.fullmatch(r"\+\d+\.\d ± \d+\.\d \(3\)", rows["harmonic"][0])
    assert rows["manhattan"][0].endswith("(2), 1 missing")


def test_a_level_may_be_relative_to_a_chain(measured: Measured) -> None:
    reference = "step@curve.probe.test.accuracy=0.9"
    (run,), (base,) = measured.chosen(["harmonic"]), measured.chosen(["tied"])
    (plain,), (column,) = measured.columns(reference), measured.columns(f"{reference} relative to tied")
    own, theirs = measured.cell(run, plain).by_seed, measured.cell(base, plain).by_seed
    wanted = {seed: 100 * (own[seed] - theirs[seed]) / theirs[seed] for seed in own}
    assert measured.cell(run, column).by_seed == pytest.approx(wanted)
    assert len(wanted) == 3


def test_a_chain_that_is_not_there_or_failed_is_named_under_the_table(measured: Measured) -> None:
    columns = ["test.accuracy", "test.accuracy relative to contrl", "test.accuracy relative to broken"]
    made = tables.table(measured, "t", {"columns": columns})
    assert any("has no chain contrl. Did you mean control?" in note for note in made.notes)
    assert "broken has no test.accuracy: nothing is relative to it." in made.notes
    assert [row[2].text for row in made.rows][:2] == ["no pair"] * 2


def test_a_swept_chain_is_compared_with_by_the_member_of_the_same_options(tmp_path: Path) -> None:
    values = {"control[task=a]": [1.0], "control[task=b]": [2.0], "mine[task=a]": [3.0], "mine[task=b]": [3.0],
              "alone": [3.0]}  # fmt: skip
    swept = {name: f'{{"task": "{name[-2]}"}}' for name in values if "[" in name}
    made = tables.table(
        written(tmp_path, values, swept), "t", {"columns": ["e.m", "e.m relative to control"]}
    )
    assert {row[0].text: row[2].text for row in made.rows} == {
        "control[task=a]": "0.0 (1)", "control[task=b]": "0.0 (1)", "mine[task=a]": "+200.0 (1)",
        "mine[task=b]": "+50.0 (1)", "alone": "–",
    }  # fmt: skip
    assert "alone: no one chain here is called control; name one, as in control[option=value]." in made.notes


def test_a_claim_may_be_about_a_change_against_a_chain(tmp_path: Path) -> None:
    measured_ = written(tmp_path, {"control": [2.0, 4.0, 8.0], "mine": [2.2, 4.5, 8.9]})
    claim = {"sentence": "Mine costs at most a fifth more.", "source": "nobody", "subject": "mine",
             "metric": "e.m relative to control", "relation": "at_most", "value": 20.0}  # fmt: skip
    measured_.experiments[tmp_path.name]["claims"] = [claim]
    (verdict,) = verdicts.verdicts(measured_)
    assert (verdict.verdict, verdict.n) == ("holds here", 3)
    assert verdict.mean_difference == pytest.approx((10 + 12.5 + 11.25) / 3 - 20)


PLANNED = """\
title: A toy
country: FRA
seeds: [0, 1]
models: {base: {new: llama}}
chains: {control: base > train.sft, direct: base > unlearn.npo}
evaluate: {geometry: size, tasks: size}
SECTION
"""


def plan(folder: Path, text: str) -> None:
    path = folder / "toy.yaml"
    path.write_text(PLANNED.replace("SECTION", text))
    specs.check_experiment(experiment.load(path))


@pytest.mark.parametrize(
    "text",
    ["tables: {t: {columns: [energy.stage_kwh relative to control, tasks.x@tasks.y=2 relative to base]}}",
     "tables: {t: {columns: ['step@curve.probe.test.accuracy=0.9 relative to control[alpha=1]']}}",
     "claims: [{sentence: s, source: s, subject: direct, relation: lower, metric: tasks.x relative to control}]",
     "figures: {f: {kind: bars, metrics: tasks.x, group: base, spread: interval, horizontal: false, start: 0.9}}",
     "figures: {f: {kind: bars, metrics: [tasks.x, tasks.x relative to control], baseline: control, log: x}}",
     "figures: {f: {kind: plane, entry: geometry, what: embedding, seed: 1, of: [direct]}}",
     "figures: {f: {kind: curve, terms: [probe.test.accuracy], panels: chain, runs: lines, log: x}}"],
)  # fmt: skip
def test_the_planner_accepts_what_can_be_drawn(tmp_path: Path, text: str) -> None:
    plan(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("tables: {t: {columns: [tasks.x relative to contrl]}}", "'contrl' names no chain or model; did you mean 'con"),
     ("tables: {t: {columns: [taks.x relative to control]}}", "'taks.x' names no evaluation; did you mean 'tasks'?"),
     ("tables: {t: {columns: [tasks.x relative control]}}", "write a change against a chain as X relative to CHAIN"),
     ("tables: {t: {columns: [curve.probe.test relative to control]}}", "write a matched level as X@Y=LEVEL"),
     ("tables: {t: {kind: matched, at: tasks.x, levels: [1], columns: [tasks.y relative to control]}}",
      "a matched table has no relative columns"),
     ("figures: {f: {kind: matched, x: tasks.x, y: tasks.y relative to control}}", "followed in absolute numbers"),
     ("claims: [{sentence: s, source: s, subject: a, relation: lower, metric: tasks.x relative to contrl}]",
      "claim 1: 'contrl' names no chain or model; did you mean 'control'?"),
     ("figures: {f: {kind: bars}}", "a bars needs metrics"),
     ("figures: {f: {kind: bars, metrics: [tasks.x relative to contrl]}}", "did you mean 'control'?"),
     ("figures: {f: {kind: bars, metrics: taks.x}}", "did you mean 'tasks'?"),
     ("figures: {f: {kind: bars, metric: tasks.x}}", "did you mean 'metrics'? A figure of kind bars has metrics,"),
     ("figures: {f: {kind: bars, metrics: tasks.x, group: colour}}", "group is one of chain, group, family"),
     ("figures: {f: {kind: bars, metrics: tasks.x, spread: range}}", "spread is one of sd, interval, not 'range'"),
     ("figures: {f: {kind: bars, metrics: tasks.x, start: low}}", "start is a number"),
     ("figures: {f: {kind: bars, metrics: tasks.x, horizontal: 1}}", "horizontal is true or false"),
     ("figures: {f: {kind: bars, metrics: tasks.x, baseline: contrl}}", "did you mean 'control'?"),
     ("figures: {f: {kind: plane}}", "a plane needs entry"),
     ("figures: {f: {kind: plane, entry: geometri}}", "did you mean 'geometry'?"),
     ("figures: {f: {kind: plane, entry: geometry, seed: 7}}", "seed 7 is none of 0, 1"),
     ("figures: {f: {kind: plane, entry: geometry, seed: one}}", "seed is one whole number"),
     ("figures: {f: {kind: plane, entry: geometry, what: [a]}}", "what is one text"),
     ("figures: {f: {kind: plane, entry: geometry, log: x}}", "there is no key 'log'"),
     ("figures: {f: {kind: curve, terms: train, panels: one}}", "panels is one of term, chain, group"),
     ("figures: {f: {kind: curve, terms: train, runs: all}}", "runs is one of band, lines")],
)  # fmt: skip
def test_the_planner_refuses_what_the_report_could_not_draw(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(AssayError, match=re.escape(sentence)):
        plan(tmp_path, text)


# --- bars ---------------------------------------------------------------------------------------------------


def lengths(axes: Any, *, lying: bool = True) -> list[float]:
    return [patch.get_width() if lying else patch.get_height() for patch in axes.patches]


def test_bars_are_means_with_an_error_bar_and_a_dot_for_every_run(tmp_path: Path) -> None:
    measured_ = written(tmp_path, {"one": [1.0, 2.0, 6.0], "two": [4.0, 4.0, 4.0]})
    _, (axes,), caption = drawn(bars, measured_, {"metrics": "e.m", "horizontal": True})
    assert lengths(axes) == pytest.approx([3.0, 4.0])
    dots = sorted(value for line in axes.lines if line.get_marker() == "o" for value in line.get_xdata())
    assert dots == [1.0, 2.0, 4.0, 4.0, 4.0, 6.0]
    (bar, none) = [[end[0] for end in way] for way in axes.collections[0].get_segments()]
    sd = math.sqrt((4 + 1 + 9) / 2)
    assert bar == pytest.approx([3 - sd, 3 + sd])
    assert none == pytest.approx([4.0, 4.0])
    assert caption == "Bars: means; error bars: ± sample sd; dots: single results. n = 3 distinct results."


def test_error_bars_may_be_intervals_of_the_mean(tmp_path: Path) -> None:
    measured_ = written(tmp_path, {"one": [1.0, 2.0, 6.0], "single": [1.0]})
    _, (axes,), caption = drawn(bars, measured_, {"metrics": "e.m", "horizontal": True, "spread": "interval"})
    half = t_quantile(0.95, 2) * math.sqrt(7 / 3)
    bar, single = axes.collections[0].get_segments()
    assert [end[0] for end in bar] == pytest.approx([3 - half, 3 + half])
    assert [end[0] for end in single] == [1.0, 1.0]
    assert "95% t intervals of the means" in caption
    assert "n = 3 distinct results; 1 for single." in caption


def test_a_chain_without_numbers_keeps_its_place_and_says_why(measured: Measured) -> None:
    spec = {"metrics": ["test.accuracy"], "of": ["control", "manhattan", "broken"]}
    for lying in (True, False):
        _, (axes,), caption = drawn(bars, measured, spec | {"horizontal": lying})
        names = axes.get_yticklabels() if lying else axes.get_xticklabels()
        assert [name.get_text() for name in names] == ["control", "manhattan", "broken"]
        assert [text.get_text().replace("\n", " ") for text in axes.texts] == ["failed, oom, timeout"]
        assert len(lengths(axes)) == 2
        assert "n = 3 distinct results; 2 for manhattan." in caption


def test_bars_of_a_group_stand_together_in_one_colour(measured: Measured) -> None:
    spec = {"metrics": ["test.accuracy", "energy.stage_kwh"], "group": "base",
            "of": ["control", "control_attention", "harmonic", "harmonic_attention"]}  # fmt: skip
    image, (first, second), _ = drawn(bars, measured, spec)
    names = [name.get_text() for name in first.get_yticklabels()]
    assert names == ["control", "harmonic", "control_attention", "harmonic_attention"]
    colors = [patch.get_facecolor()[:3] for patch in first.patches]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    middles = [patch.get_y() for patch in first.patches]
    assert middles[2] - middles[1] > middles[1] - middles[0]
    assert [text.get_text() for text in image.legends[0].get_texts()] == ["mlp", "transformer"]
    assert not second.yaxis.get_tick_params()["labelleft"]


def test_more_groups_than_colours_are_named_by_their_bars_only(tmp_path: Path) -> None:
    values = {f"chain_{n}[a={m}]": [1.0 + n] for n in range(9) for m in (1, 2)}
    image, _, caption = drawn(bars, written(tmp_path, values), {"metrics": "e.m", "group": "group"})
    assert image.legends == []
    assert "Grouped by group." in caption


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_names_and_labels_of_bars_do_not_cover_each_other(measured: Measured, count: int) -> None:
    metrics = ["energy.stage_kwh relative to control_attention", "test.accuracy", "time.stage_seconds",
               "geometry.explained_variance_2"][:count]  # fmt: skip
    image, panels, _ = drawn(bars, measured, {"metrics": metrics, "group": "base", "baseline": "control"})
    shown = [axes.xaxis.label for axes in panels] + list(panels[0].get_yticklabels())
    shown += [text for legend in image.legends for text in legend.get_texts()]
    assert overlapping(shown) == []
    frame = image.bbox
    assert all(
        frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in (each.get_window_extent() for each in shown)
    )


def test_few_bars_stand_and_many_lie(measured: Measured) -> None:
    _, (axes,), _ = drawn(bars, measured, {"metrics": "test.accuracy", "of": ["control", "tied"]})
    assert lengths(axes, lying=False) == pytest.approx([0.393, 0.996], abs=0.01)
    assert overlapping(axes.get_xticklabels()) == []
    _, (axes,), _ = drawn(bars, measured, {"metrics": "test.accuracy"})
    assert [name.get_text() for name in axes.get_yticklabels()][:2] == ["control", "tied"]
    assert axes.yaxis_inverted()


def test_standing_names_that_do_not_fit_are_turned(measured: Measured) -> None:
    _, (axes,), _ = drawn(bars, measured, {"metrics": "test.accuracy", "horizontal": False})
    assert {name.get_rotation() for name in axes.get_xticklabels()} == {40.0}


def test_bars_that_do_not_begin_at_zero_say_so(measured: Measured) -> None:
    spec = {"metrics": "test.accuracy", "of": ["tied", "harmonic"], "start": 0.9, "horizontal": True}
    _, (axes,), caption = drawn(bars, measured, spec)
    assert axes.get_xlim()[0] == 0.9
    assert "The bars begin at 0.9, not at 0." in caption


def test_bars_of_changes_go_both_ways_from_zero(measured: Measured) -> None:
    spec = {"metrics": "energy.stage_kwh relative to harmonic", "horizontal": True}
    _, (axes,), caption = drawn(bars, measured, spec)
    assert min(lengths(axes)) < 0 < max(lengths(axes))
    assert (
        axes.get_xlabel().replace("\n", " ").startswith("energy · stage relative to harmonic (%, estimated)")
    )
    assert "paired by seed" in caption


def test_logarithmic_bars_need_numbers_above_zero(measured: Measured) -> None:
    spec = {"metrics": "energy.stage_kwh", "log": "x", "horizontal": True}
    _, (axes,), caption = drawn(bars, measured, spec)
    assert (axes.get_xscale(), axes.get_xlim()[0]) == ("log", 0.1)
    assert "the length of a bar means nothing" in caption
    with pytest.raises(AssayError, match="is not above 0 everywhere and has no logarithm"):
        drawn(bars, measured, spec | {"metrics": "energy.stage_kwh relative to control"})


def test_a_baseline_is_drawn_across_and_named(measured: Measured) -> None:
    spec = {"metrics": "test.accuracy", "baseline": "control", "of": ["tied", "harmonic"], "horizontal": True}
    image, (axes,), _ = drawn(bars, measured, spec)
    (line,) = [line for line in axes.lines if line.get_label() == "control"]
    assert line.get_xdata()[0] == pytest.approx(0.393, abs=0.001)
    assert [text.get_text() for text in image.legends[0].get_texts()] == ["control"]


def test_bars_of_nothing_are_answered_with_a_sentence(measured: Measured) -> None:
    for spec, sentence in (
        ({"metrics": "test.accurcy"}, "Did you mean test.accuracy?"),
        ({"metrics": "test.accuracy", "of": ["broken"]}, "no chain here has test.accuracy"),
    ):
        with pytest.raises(AssayError, match=re.escape(sentence)):
            figures.figure(measured, "f", {"kind": "bars", **spec}, "origin")


# --- planes -------------------------------------------------------------------------------------------------


def test_a_plane_shows_every_class_of_every_chain_under_one_seed(measured: Measured) -> None:
    spec = {"entry": "geometry", "of": ["control", "harmonic"], "seed": 1}
    _, panels, caption = drawn(plane, measured, spec)
    rows = measured.results[(measured.results["chain"] == "harmonic") & (measured.results["seed"] == "1")]
    wanted = {metric: rows[(rows["metric"] == metric) & rows["task"].str.startswith("class ")]["value"].tolist()
              for metric in ("pc1", "pc2")}  # fmt: skip
    assert panels[1].collections[0].get_offsets().T.tolist() == [wanted["pc1"], wanted["pc2"]]
    assert len(wanted["pc1"]) == invented_classifiers.CLASSES
    assert re.fullmatch(r"harmonic\n9\d% of the variance", panels[1].get_title())
    assert caption.startswith("Class vectors: every class in the first two principal components of seed 1.")


def test_a_circle_stays_one_and_its_numbers_cover_nothing(measured: Measured) -> None:
    _, (axes,), _ = drawn(plane, measured, {"entry": "geometry", "of": ["harmonic"]})
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert right - left == pytest.approx(high - low)
    box = axes.get_window_extent()
    assert box.width == pytest.approx(box.height)
    assert overlapping(axes.texts) == []
    assert len(axes.texts) > 0.8 * invented_classifiers.CLASSES
    assert all(box.contains(*text.get_window_extent().get_points().mean(axis=0)) for text in axes.texts)


def test_numbers_stand_beside_their_own_points(measured: Measured) -> None:
    _, (axes,), _ = drawn(plane, measured, {"entry": "geometry", "of": ["harmonic"]})
    points = axes.transData.transform(axes.collections[0].get_offsets())
    for text in axes.texts:
        middle = text.get_window_extent().get_points().mean(axis=0)
        assert math.dist(middle, points[int(text.get_text())]) < 10 * draw.DOTS_PER_INCH / 72


def test_a_chain_without_points_keeps_its_panel_and_says_why(measured: Measured) -> None:
    _, (_, axes), _ = drawn(plane, measured, {"entry": "geometry", "of": ["harmonic", "broken"]})
    assert (axes.get_title(), axes.texts[0].get_text()) == ("broken", "failed, oom, timeout")
    spec = {"entry": "geometry", "of": ["harmonic", "manhattan"], "seed": 2}
    _, (_, axes), _ = drawn(plane, measured, spec)
    assert axes.texts[0].get_text() == "missing"


def test_planes_of_something_else_are_asked_for_by_name(measured: Measured) -> None:
    _, (axes,), caption = drawn(
        plane, measured, {"entry": "geometry", "of": ["harmonic"], "what": "embedding"}
    )
    assert axes.get_title() == "harmonic"
    assert caption.startswith("Embedding: every class")
    with pytest.raises(AssayError, match="has no points of centres; there are: class_vectors, embedding"):
        drawn(plane, measured, {"entry": "geometry", "what": "centres"})
    with pytest.raises(AssayError, match="no chain here has pc1 and pc2 of classes in test"):
        drawn(plane, measured, {"entry": "test"})


def test_a_long_name_is_broken_before_its_options(tmp_path: Path) -> None:
    long = "harmonic_mahalanobis_cholesky[exponent=16,variant=cholesky]"
    invented_classifiers.write(tmp_path)
    rows = [row | {"chain": {"harmonic": long}.get(row["chain"], row["chain"])}
            for row in invented.read_csv(tmp_path / "results.csv") if row["chain"] in ("harmonic", "tied")]  # fmt: skip
    invented.write_csv(tmp_path / "results.csv", rows)
    _, panels, _ = drawn(plane, Measured.read([tmp_path]), {"entry": "geometry", "seed": 0})
    lines = [axes.get_title().split("\n")[:-1] for axes in panels]
    assert sorted(lines) == [["harmonic_mahalanobis_cholesky", "[exponent=16,variant=cholesky]"], ["tied"]]
    assert overlapping([axes.title for axes in panels]) == []


# --- learning curves ----------------------------------------------------------------------------------------

ACCURACIES = ["probe.train.accuracy", "probe.test.accuracy"]


def test_a_panel_for_each_chain_compares_its_terms(measured: Measured) -> None:
    image, panels, _ = drawn(curve, measured, {"terms": ACCURACIES, "panels": "chain"})
    names = [name for name in invented_classifiers.CHAINS if name != "broken"]
    assert [axes.get_title() for axes in panels] == names
    assert [line.get_label() for line in panels[0].lines] == ["train accuracy", "test accuracy"]
    assert [text.get_text() for text in image.legends[0].get_texts()] == ["train accuracy", "test accuracy"]
    assert image.get_supylabel() == "accuracy (share of cases)"
    assert (panels[0].get_xlabel(), panels[-1].get_xlabel()) == ("", "optimizer step")


def test_a_panel_for_each_model_tells_chains_by_colour_and_terms_by_the_kind_of_line(
    measured: Measured,
) -> None:
    image, (first, second), _ = drawn(curve, measured, {"terms": ACCURACIES, "panels": "base"})
    assert [axes.get_title() for axes in (first, second)] == ["mlp", "transformer"]
    looks = {(line.get_label(), line.get_linestyle()): line.get_color() for line in first.lines}
    assert looks["control", "-"] == looks["control", "--"] != looks["tied", "-"]
    texts = [text.get_text() for text in image.legends[0].get_texts()]
    assert texts[-2:] == ["train accuracy", "test accuracy"]
    assert len(texts) == 7 + 2


def test_every_seed_may_be_a_thin_line(measured: Measured) -> None:
    _, (axes,), caption = drawn(
        curve, measured, {"terms": "probe.test.accuracy", "runs": "lines", "of": ["tied"]}
    )
    thin = [line for line in axes.lines if line.get_linewidth() < 1]
    assert (len(thin), len(axes.lines)) == (3, 4)
    heights = [line.get_ydata()[30] for line in thin]
    assert axes.lines[-1].get_ydata()[30] == pytest.approx(sum(heights) / 3)
    assert "Thin lines: every distinct result; strong lines: their means. n = 3 for each line." in caption


def test_a_logarithmic_axis_of_steps_leaves_step_0_out(measured: Measured) -> None:
    _, (axes,), caption = drawn(curve, measured, {"terms": "probe.test.accuracy", "log": "x"})
    assert axes.get_xscale() == "log"
    assert min(line.get_xdata()[0] for line in axes.lines) == invented_classifiers.EVERY
    assert "Step 0 is not shown" in caption


def test_probes_of_cases_are_called_accuracy_and_nll_for_each_case(measured: Measured) -> None:
    _, panels, _ = drawn(curve, measured, {"terms": ["probe.test.accuracy", "probe.test", "train"]})
    assert [axes.get_ylabel() for axes in panels] == [
        "test accuracy (share of cases)", "test NLL of the probe (nats/case)", "loss term train",
    ]  # fmt: skip
    assert all(overlapping(axes.get_xticklabels()) == [] for axes in panels)


def test_a_term_that_nobody_logged_is_named(measured: Measured) -> None:
    _, panels, caption = drawn(curve, measured, {"terms": ["probe.test", "probe.tset"]})
    assert len(panels) == 1
    assert "No chain here logged probe.tset." in caption
    with pytest.raises(AssayError, match=r"no chain here logged probe\.tset"):
        drawn(curve, measured, {"terms": "probe.tset"})


def test_the_legend_of_many_chains_stands_outside_and_is_cut_with_a_sentence(tmp_path: Path) -> None:
    invented_classifiers.write(tmp_path)
    steps = [row for row in invented.read_csv(tmp_path / "curves.csv")
             if row["chain"] == "tied" and row["term"] == "probe.test" and row["seed"] == "0"][::20]  # fmt: skip
    scores = [row for row in invented.read_csv(tmp_path / "results.csv")
              if row["chain"] == "tied" and row["metric"] == "accuracy" and row["seed"] == "0"]  # fmt: skip
    for name, rows in (("curves.csv", steps), ("results.csv", scores)):
        many = [row | {"chain": f"chain_{n}", "model_id": f"m{n}"} for n in range(30) for row in rows]
        invented.write_csv(tmp_path / name, many)
    image, (axes,), caption = drawn(curve, Measured.read([tmp_path]), {"terms": "probe.test"})
    assert (axes.get_legend(), len(axes.lines), len(image.legends[0].get_texts())) == (None, 30, 24)
    assert caption.startswith("The legend names the first 24 of 30. Lines: means")
    assert not image.legends[0].get_window_extent().overlaps(axes.get_window_extent())
    assert axes.get_window_extent().height > 2 * draw.DOTS_PER_INCH


# --- reports on classifiers ---------------------------------------------------------------------------------


def test_an_experiment_on_classifiers_gets_its_report(folder: Path, tmp_path: Path) -> None:
    assert report.main([str(folder), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/") == 3
    assert "Not drawn" not in text
    assert len(text.encode()) < 1_500_000
    assert "class 3" not in text
    tables_ = "".join(path.read_text() for path in (tmp_path / "tables").iterdir())
    assert "pc1" not in tables_ + (tmp_path / "README.md").read_text()


def test_numbers_of_single_classes_stay_out_of_tables_that_nobody_asked_for(tmp_path: Path) -> None:
    measured_ = Measured.read([invented_classifiers.write(tmp_path, tables={}, figures={})])
    wanted = tables.default_specs(measured_)
    assert wanted["geometry"] == {"columns": ["geometry.explained_variance_2"]}
    assert sorted(wanted) == ["cost", "geometry", "test"]
    assert figures.default_specs(measured_)["learning"]["terms"] == ACCURACIES


def test_a_table_that_nobody_asked_for_has_as_many_columns_as_can_be_read(tmp_path: Path) -> None:
    written(tmp_path, {"one": [1.0]})
    (row,) = invented.read_csv(tmp_path / "results.csv")
    many = [row | {"metric": f"m{n}", "task": task} for n in range(40) for task in ("a", "b")]
    invented.write_csv(tmp_path / "results.csv", many)
    wanted = tables.default_specs(Measured.read([tmp_path]))["e"]
    assert wanted["columns"] == [f"e.m{n}" for n in range(8)]
    assert wanted["title"] == "e: 8 of its 40 metrics; name others under tables in the experiment file"


def test_a_metric_of_a_whole_and_of_its_classes_means_the_whole(tmp_path: Path) -> None:
    written(tmp_path, {"one": [1.0]})
    (row,) = invented.read_csv(tmp_path / "results.csv")
    classes = [row | {"task": f"t class {n}", "value": f"{n}"} for n in range(30)]
    alone = [row | {"task": f"class {n}", "metric": "pc1", "value": f"{n}"} for n in range(30)]
    invented.write_csv(tmp_path / "results.csv", [row, *classes, *alone])
    measured_ = Measured.read([tmp_path])
    assert [column.task for column in measured_.columns("e.m")] == ["t"]
    assert [column.task for column in measured_.columns("e.t class 7.m")] == ["t class 7"]
    with pytest.raises(AssayError, match=r"e\.pc1 is measured for 30 classes; draw a figure of kind plane"):
        measured_.columns("e.pc1")


def test_a_very_large_table_is_cut_on_the_page_and_whole_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "LARGEST_CELLS", 10)
    wanted = {"tables": {"t": {"columns": ["test.accuracy"]}}, "figures": {}}
    monkeypatch.setattr(figures, "default_specs", lambda measured: {})
    report.report(invented_classifiers.write(tmp_path, **wanted))
    text = (tmp_path / "report.html").read_text()
    assert "The first 5 of 8 rows; all of them are in the files." in text
    assert len(invented.read_csv(tmp_path / "tables/t.csv")) == 8
