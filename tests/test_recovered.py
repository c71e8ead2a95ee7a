"""Columns ``X recovered towards CHAIN``: the share that a stage won back of what its start had lost, also per kJ."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from methods.stage import AssayError
from tests import invented
from workflows import draw, experiment, figures, specs, tables, verdicts
from workflows.bars import bars
from workflows.chance import interval
from workflows.columns import Cell, Sample
from workflows.measured import Measured
from workflows.recovered import each_kilojoule, parent_label, recovered, share
from workflows.scatter import scatter

TRAINED = 'base > train.sft(data="authors/full")'
PRUNED = f"{TRAINED} > prune.magnitude(sparsity=0.7)"
# chain: (label, NLL of every seed, accuracy of every seed, watt-hours of the last stage)
CHAINS: dict[str, tuple[str, Sequence[float], Sequence[float], float]] = {
    "base": ("base", [6.0] * 3, [0.1] * 3, 0.0),
    "target": (TRAINED, [0.2, 0.3, 0.1], [1.0, 0.9, 1.0], 0.5),
    "pruned": (PRUNED, [1.2, 1.3, 0.9], [0.6, 0.5, 0.4], 0.001),
    "healed": (f"{PRUNED} > distill.mix(steps=9)", [0.4, 0.4, 0.3], [0.9, 0.8, 0.7], 0.05),
    "worsened": (f"{PRUNED} > distill.mix(steps=1)", [1.7, 1.8, 1.3], [0.5, 0.4, 0.3], 0.02),
    "healed_twice": (f"{PRUNED} > distill.mix(steps=9) > train.sft(steps=2)", [0.3, 0.35, 0.2], [1.0, 0.9, 0.8], 0.1),
    "quantized": (f"{TRAINED} > prune.rtn(bits=8)", [0.2, 0.3, 0.1], [1.0, 0.9, 1.0], 0.001),
    "requantized": (f"{TRAINED} > prune.rtn(bits=8) > train.sft(steps=3)", [0.1, 0.2, 0.1], [1.0, 1.0, 1.0], 0.05),
    "elsewhere": ("other > distill.mix(steps=9)", [0.4, 0.4, 0.3], [0.9, 0.8, 0.7], 0.05),
}  # fmt: skip
NLL = "e.nll recovered towards target"
PER_KILOJOULE = f"{NLL} per kilojoule"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return written(tmp_path_factory.mktemp("healing"), CHAINS)


def written(
    folder: Path, chains: Mapping[str, tuple[str, Sequence[float], Sequence[float], float]], **changes: Any
) -> Measured:
    """Two metrics and the energy of the last stage; a value of nan is a run that failed."""
    rows = [
        row
        for chain, (label, *values, watt_hours) in chains.items()
        for seed in range(len(values[0]))
        for row in _rows(chain, label, seed, (values[0][seed], values[1][seed]), watt_hours)
    ]
    invented.write(folder, **{"tables": {}, "figures": {}, "claims": [], **changes})
    invented.write_csv(folder / "results.csv", rows)
    invented.write_csv(folder / "jobs.csv", [{"id": chain, "chains": chain} for chain in chains])
    (folder / "curves.csv").unlink()
    return Measured.read([folder])


def _rows(
    chain: str, label: str, seed: int, values: tuple[float, float], watt_hours: float
) -> Iterator[dict[str, Any]]:
    base = dict.fromkeys(invented.COLUMNS, "") | {
        "chain": chain, "label": label, "model_id": f"{chain}-{seed}", "score_id": f"s-{chain}-{seed}", "seed": seed,
        "base": "base", "method": "distill.mix", "family": "distill", "swept": "{}", "options": "{}",
    }  # fmt: skip
    for metric, value, better in zip(("nll", "acc"), values, ("lower", "higher"), strict=True):
        status = "oom" if math.isnan(value) else "ok"
        yield base | {
            "evaluation": "e", "entry": "e", "task": "t", "metric": metric, "better": better, "status": status,
            "value": "" if math.isnan(value) else value, "unit": "nats/token" if metric == "nll" else "",
        }  # fmt: skip
    yield base | {
        "evaluation": "energy", "entry": "energy", "metric": "stage_kwh", "value": watt_hours / 1000, "status": "ok",
        "unit": "kWh estimated, shared", "score_id": "", "better": "lower",
    }  # fmt: skip


def cell(values: dict[str, float], *units: str) -> Cell:
    return Cell(tuple(Sample(seed, f"id{seed}", value) for seed, value in values.items()), {}, units)


def cell_of(measured: Measured, chain: str, reference: str) -> Cell:
    (run,), (column,) = measured.chosen([chain]), measured.columns(reference)
    return measured.cell(run, column)


# --- the share -----------------------------------------------------------------------------------------------


def test_the_share_is_what_came_back_of_what_was_lost() -> None:
    # 1.2 - 0.2 = 1.0 was lost, 1.2 - 0.4 = 0.8 came back
    assert share(0.4, 1.2, 0.2, "lower") == pytest.approx(0.8)
    # of an accuracy 1.0 - 0.6 = 0.4 was lost, 0.3 came back
    assert share(0.9, 0.6, 1.0, "higher") == pytest.approx(0.75)
    assert share(1.7, 1.2, 0.2, "lower") == pytest.approx(-0.5)
    assert share(0.1, 1.2, 0.2, "lower") == pytest.approx(1.1)


def test_nothing_is_recovered_where_the_start_is_not_worse() -> None:
    assert share(0.1, 0.2, 0.2, "lower") is None
    assert share(0.1, 0.1, 0.2, "lower") is None
    assert share(0.9, 1.0, 0.9, "higher") is None
    assert share(0.9, 1.0, 1.0) is None
    assert share(0.5, 0.0, 1.0) == pytest.approx(0.5)  # which way is worse is not said


def test_a_metric_that_should_come_close_to_a_number_is_taken_by_its_distance() -> None:
    # from 3 away to 1 away, where the intact model is 1 away on the other side: 2 of 2
    assert share(-1.0, 3.0, 1.0, "closer_to_0") == pytest.approx(1.0)
    assert share(1.5, 2.0, 1.0, "closer_to_1") == pytest.approx(0.5)
    assert share(1.5, 1.0, 2.0, "closer_to_1") is None


def test_shares_are_paired_by_seed_and_what_has_none_is_counted() -> None:
    own, broken = cell({"0": 0.4, "1": 0.5, "2": 0.5, "3": 0.1}), cell({"2": 0.3, "1": 1.5, "0": 1.2})
    found = recovered(own, broken, cell({"0": 0.2, "1": 0.5, "2": 0.4}), "lower")
    assert found.by_seed == pytest.approx({"0": 0.8, "1": 1.0})
    assert found.statuses == {"no pair": 1, "start not worse": 1}
    assert recovered(own, broken, cell({"0": 0.2})).statuses == {"no pair": 3}
    assert recovered(Cell(statuses={"oom": 1}), broken, own).statuses == {"oom": 1}


def test_a_result_without_a_seed_goes_with_every_seed() -> None:
    found = recovered(cell({"0": 0.5, "1": 0.25}), cell({"": 1.0}), cell({"": 0.0}), "lower")
    assert found.by_seed == pytest.approx({"0": 0.5, "1": 0.75})
    found = recovered(cell({"": 0.5}), cell({"": 1.0}), cell({"0": 0.0, "1": -1.0}), "lower")
    assert found.by_seed == pytest.approx({"0": 0.5, "1": 0.25})


def test_a_share_is_divided_by_the_kilojoules_of_its_seed() -> None:
    energy = cell({"0": 1e-4, "1": 2e-4, "2": 0.0}, "kWh measured")
    found = each_kilojoule(cell({"0": 0.9, "1": 0.9, "2": 0.9, "3": 0.9}), energy)
    # 1e-4 kWh are 0.36 kJ
    assert found.by_seed == pytest.approx({"0": 2.5, "1": 1.25})
    assert (found.statuses, found.units) == ({"no energy": 2}, ("1/kJ measured",))


def test_the_parent_of_a_label_ignores_arrows_inside_of_quotes() -> None:
    assert parent_label('a > b(data="x > y", c=[d > e]) > f(g=1)') == 'a > b(data="x > y", c=[d > e])'
    assert parent_label("base") == ""


# --- tables --------------------------------------------------------------------------------------------------


def test_a_column_gives_each_chain_the_share_that_its_own_last_stage_won_back(measured: Measured) -> None:
    healed = cell_of(measured, "healed", NLL)
    assert healed.by_seed == pytest.approx({"0": 0.8, "1": 0.9, "2": 0.75})
    # its start is the healed model and not the pruned one: 0.1 of 0.2, 0.05 of 0.1, 0.1 of 0.2
    assert cell_of(measured, "healed_twice", NLL).by_seed == pytest.approx({"0": 0.5, "1": 0.5, "2": 0.5})
    assert cell_of(measured, "worsened", NLL).mean == pytest.approx(-0.5)
    accuracy = cell_of(measured, "healed", "e.acc recovered towards target")
    assert accuracy.by_seed == pytest.approx({"0": 0.75, "1": 0.75, "2": 0.5})


def test_a_table_shows_shares_with_their_spread_and_says_why_there_are_none(measured: Measured) -> None:
    made = tables.table(measured, "t", {"columns": ["e.nll", NLL, PER_KILOJOULE]})
    assert made.headers[2:] == (
        "e.nll recovered towards target ↑",
        "e.nll recovered towards target per kilojoule (1/kJ, estimated, shared) ↑",
    )
    rows = {row[0].text: [text.text for text in row[2:]] for row in made.rows}
    assert rows["healed"] == ["0.817 ± 0.076 (3)", "4.537 ± 0.424 (3)"]
    assert rows["worsened"][0] == "-0.500 ± 0 (3)"
    assert rows["requantized"] == ["start not worse", "start not worse"]
    assert rows["pruned"][0] == rows["quantized"][0] == "start not worse"
    assert rows["elsewhere"] == ["start not scored", "start not scored"]
    assert rows["base"] == rows["target"] == ["–", "–"]
    assert made.numbers[f"{NLL} n"].tolist() == [0, 0, 0, 3, 3, 3, 0, 0, 0]
    assert made.numbers[f"{NLL} status"][7] == "3 start not worse"


def test_the_sentence_under_the_table_stands_there_once(measured: Measured) -> None:
    made = tables.table(measured, "t", {"columns": [NLL, "e.acc recovered towards target", PER_KILOJOULE]})
    about = [note for note in made.notes if note.startswith("Recovered towards")]
    assert about == [
        "Recovered towards target: (X of the start − X) / (X of the start − X of target), paired by seed; the start is "
        "the model that the chain's last stage started from, and 1 is all that it had lost. start not worse: there was "
        "nothing to win back. Per kilojoule: divided by the energy of the last stage."
    ]


def test_failed_runs_and_seeds_without_a_partner_are_counted(tmp_path: Path) -> None:
    chains = {**CHAINS, "healed": (CHAINS["healed"][0], [0.4, math.nan, 0.3], [0.9, 0.8, 0.7], 0.05),
              "pruned": (PRUNED, [1.2, 1.3], [0.6, 0.5], 0.001)}  # fmt: skip
    found = written(tmp_path, chains)
    assert cell_of(found, "healed", NLL).by_seed == pytest.approx({"0": 0.8})
    assert cell_of(found, "healed", NLL).statuses == {"no pair": 1, "oom": 1}
    assert cell_of(found, "healed", PER_KILOJOULE).statuses == {"no pair": 1, "oom": 1}


def test_a_stage_without_energy_has_no_share_per_kilojoule(tmp_path: Path) -> None:
    chains = {**CHAINS, "healed": (*CHAINS["healed"][:3], 0.0)}
    assert cell_of(written(tmp_path, chains), "healed", PER_KILOJOULE).statuses == {"no energy": 3}


def test_a_chain_that_started_from_a_kept_model_is_compared_with_that_one(tmp_path: Path) -> None:
    kept = ("target", TRAINED, 0, (0.7, 0.5), 0.0)
    invented.write(tmp_path, tables={}, figures={}, claims=[])
    rows = [row | {"step": ""} for chain, values in CHAINS.items() if chain in ("target", "pruned")
            for row in _rows(chain, values[0], 0, (values[1][0], values[2][0]), 0.1)]  # fmt: skip
    rows += [row | {"step": 20, "model_id": "target-0@step20"} for row in _rows(*kept)]
    rows += [row | {"step": ""} for row in _rows("late", f"{TRAINED}@step20 > train.sft", 0, (0.3, 1.0), 0.1)]
    invented.write_csv(tmp_path / "results.csv", rows)
    # 0.7 - 0.3 of 0.7 - 0.2
    assert cell_of(Measured.read([tmp_path]), "late", NLL).by_seed == pytest.approx({"0": 0.8})


def test_the_intact_chain_of_a_sweep_is_the_member_with_the_same_options(tmp_path: Path) -> None:
    invented.write(tmp_path, tables={}, figures={}, claims=[])
    rows = [row | {"swept": json.dumps({"seeds": own})} for own, intact in (("a", 0.2), ("b", 0.0))
            for chain, label, value in (("target", "base > x", intact), ("pruned", "base > x > y", 1.0),
                                        ("healed", "base > x > y > z", 0.6))
            for row in _rows(f"{chain}[seeds={own}]", label.replace("x", f"x({own})"), 0, (value, 0), 0.1)]  # fmt: skip
    invented.write_csv(tmp_path / "results.csv", rows)
    found = Measured.read([tmp_path])
    assert cell_of(found, "healed[seeds=a]", NLL).mean == pytest.approx(0.5)
    assert cell_of(found, "healed[seeds=b]", NLL).mean == pytest.approx(0.4)


# --- figures and claims -----------------------------------------------------------------------------------------


def test_bars_show_shares_with_intervals_across_seeds(measured: Measured) -> None:
    spec = {
        "kind": "bars",
        "metrics": [NLL, PER_KILOJOULE],
        "spread": "interval",
        "of": ["healed", "worsened"],
        "horizontal": False,
    }
    with draw.style():
        image, caption = bars(measured, measured.chosen(spec["of"]), spec, "f")
        image.draw_without_rendering()
    first, second = image.axes[:2]
    low, high = interval([0.8, 0.9, 0.75])
    (errors,) = first.collections
    assert [height for _, height in errors.get_segments()[0]] == pytest.approx([low, high])
    labels = [axes.get_ylabel() for axes in (first, second)]
    assert "e · nll recovered towards target, higher is better" in labels[0].replace("\n", " ")
    assert "per kilojoule (1/kJ, estimated, shared), higher is better" in labels[1].replace("\n", " ")
    assert "95% t intervals of the means" in caption
    assert caption.count("Recovered towards target:") == 1


def test_a_scatter_may_have_shares_on_both_axes(measured: Measured) -> None:
    spec = {"x": "energy.stage_kwh", "y": NLL, "size": PER_KILOJOULE}
    with draw.style():
        image, caption = scatter(measured, measured.chosen(["healed", "healed_twice", "base"]), spec, "f")
        image.draw_without_rendering()
    assert {text.get_text() for text in image.axes[0].texts} == {"healed", "healed_twice"}
    assert image.axes[0].get_ylabel() == "e · nll recovered towards target, higher is better"
    assert "Recovered towards target:" in caption
    made = figures.figure(measured, "f", {"kind": "bars", "metrics": NLL}, "a test")
    assert made.png.startswith(b"\x89PNG")


def test_claims_and_columns_agree(tmp_path: Path) -> None:
    recovers = {"sentence": "Most comes back.", "source": "nobody", "metric": "e.nll", "subject": "healed",
                "relation": "recovers", "other": "parent", "intact": "target", "value": 0.5}  # fmt: skip
    at_least = {"sentence": "Most comes back.", "source": "nobody", "metric": NLL, "subject": "healed",
                "relation": "at_least", "value": 0.5}  # fmt: skip
    first, second = verdicts.verdicts(written(tmp_path, CHAINS, claims=[recovers, at_least]))
    assert first.mean_difference == pytest.approx(second.mean_difference) == pytest.approx(0.45 - 0.4 / 3)
    assert (first.low, first.high) == pytest.approx((second.low, second.high))
    assert first.verdict == second.verdict == "holds here"


def test_a_claim_says_where_the_broken_model_is_not_worse(tmp_path: Path) -> None:
    claim = {"sentence": "It comes back.", "source": "nobody", "metric": "e.nll", "subject": "requantized",
             "relation": "recovers", "other": "parent", "intact": "target", "value": 0.5}  # fmt: skip
    (verdict,) = verdicts.verdicts(written(tmp_path, CHAINS, claims=[claim]))
    assert (verdict.verdict, verdict.n) == ("not run", 0)
    assert verdict.condition.endswith("parent is not worse than target (3)")


# --- bad input ---------------------------------------------------------------------------------------------------

PLANNED = """\
title: A toy
country: FRA
seeds: [0, 1]
models: {base: {new: llama}}
chains: {target: base > train.sft, pruned: target > prune.magnitude(sparsity=0.5), healed: pruned > train.sft}
evaluate: {tasks: size}
SECTION
"""


def plan(folder: Path, text: str) -> None:
    path = folder / "toy.yaml"
    path.write_text(PLANNED.replace("SECTION", text))
    specs.check_experiment(experiment.load(path))


@pytest.mark.parametrize(
    "text",
    ["tables: {t: {columns: [tasks.x recovered towards target, tasks.t.x recovered towards target per kilojoule]}}",
     "tables: {t: {columns: ['tasks.x recovered towards target[a=1]']}}",
     "figures: {f: {kind: bars, metrics: tasks.x recovered towards target per kilojoule, spread: interval}}",
     "figures: {f: {kind: scatter, x: energy.stage_kwh, y: tasks.x recovered towards base}}",
     "claims: [{sentence: s, source: s, subject: healed, relation: at_least, value: 0.9,"
     " metric: tasks.x recovered towards target}]"],
)  # fmt: skip
def test_the_planner_accepts_what_can_be_drawn(tmp_path: Path, text: str) -> None:
    plan(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("tables: {t: {columns: [tasks.x recovered towards targt]}}",
      "tables t: 'targt' names no chain or model; did you mean 'target'?"),
     ("tables: {t: {columns: [tasks.x recovered towards targt per kilojoule]}}", "did you mean 'target'?"),
     ("tables: {t: {columns: [taks.x recovered towards target]}}", "names no evaluation; did you mean 'tasks'?"),
     ("tables: {t: {columns: [tasks.x recovered target]}}", "write what was won back as X recovered towards CHAIN"),
     ("tables: {t: {columns: [tasks.x recovered towards target relative to base]}}", "write what was won back as"),
     ("tables: {t: {columns: [tasks.x relative to base recovered towards target]}}", "write what was won back as"),
     ("tables: {t: {columns: [energy.stage_kwh recovered towards target]}}", "only a score is recovered"),
     ("tables: {t: {columns: [curve.probe.x recovered towards target]}}", "only a score is recovered"),
     ("tables: {t: {columns: [step recovered towards target]}}", "only a score is recovered"),
     ("tables: {t: {columns: [tasks.x@tasks.y=2 recovered towards target]}}", "only a score is recovered"),
     ("tables: {t: {kind: matched, at: tasks.x, levels: [1], columns: [tasks.y recovered towards target]}}",
      "what was recovered is known of a chain's end"),
     ("figures: {f: {kind: matched, x: tasks.x, y: tasks.y recovered towards target}}", "in absolute numbers"),
     ("figures: {f: {kind: scatter, x: tasks.x, y: tasks.y recovered towards targt}}", "did you mean 'target'?"),
     ("claims: [{sentence: s, source: s, subject: a, relation: lower, metric: tasks.x recovered towards targt}]",
      "claim 1: 'targt' names no chain or model; did you mean 'target'?"),
     ("claims: [{sentence: s, source: s, subject: a, relation: recovers, metric: tasks.x, other: b, intact: targt}]",
      "claim 1: 'targt' names no chain or model; did you mean 'target'?")],
)  # fmt: skip
def test_the_planner_says_what_cannot_be_drawn(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(AssayError, match=re.escape(sentence)):
        plan(tmp_path, text)


def test_the_report_names_the_nearest_chain(measured: Measured) -> None:
    made = tables.table(measured, "t", {"columns": ["e.nll", "e.nll recovered towards targt"]})
    assert any("results.csv has no chain targt. Did you mean target?" in note for note in made.notes)
    with pytest.raises(AssayError, match="not along a trajectory"):
        measured.along(NLL)
    spec = {"kind": "matched", "at": "e.nll", "levels": [1], "columns": [NLL]}
    with pytest.raises(AssayError, match="ask for it in a plain table"):
        tables.table(measured, "t", spec)
