from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from methods.stage import AssayError
from tests import invented
from workflows import experiment, figures, grid, report, specs, tables, typeset
from workflows.columns import Cell, Column
from workflows.matched_figure import _collected, matched
from workflows.measured import Measured

ROOT = Path(__file__).resolve().parent.parent
FEW = {"learning": invented.EXPERIMENT["figures"]["learning"]}
"""The figures of reports whose figures are not what is tested."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = invented.write(tmp_path_factory.mktemp("invented"))
    report.report(folder)
    return folder


@pytest.fixture(scope="module")
def measured(drawn: Path) -> Measured:
    return Measured.read([drawn])


def row_of(measured: Measured, columns: list[str], name: str) -> list[str]:
    made = tables.table(measured, "t", {"columns": columns})
    return next([cell.text for cell in row] for row in made.rows if row[0].text.split()[0] == name)


# --- files ------------------------------------------------------------------------------------------------


def test_every_promised_file_is_written(drawn: Path) -> None:
    wanted = ["report.html", "README.md", "reproduction.csv"]
    wanted += [f"tables/{name}.{kind}" for name in ("trade_off", "cost") for kind in ("md", "csv", "tex")]
    wanted += [f"figures/{name}.{kind}" for name in invented.EXPERIMENT["figures"] for kind in ("png", "svg")]
    assert [name for name in wanted if not (drawn / name).is_file()] == []


def test_drawing_twice_gives_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    again = invented.write(tmp_path)
    report.report(again)
    files = [path.relative_to(drawn) for path in sorted(drawn.rglob("*")) if path.is_file()]
    assert [str(name) for name in files if (drawn / name).read_bytes() != (again / name).read_bytes()] == []


def test_compressed_tables_are_read_like_plain_ones(tmp_path: Path) -> None:
    plain, again = (invented.write(tmp_path / name / "invented", figures=FEW) for name in ("plain", "again"))
    report.report(plain)
    for name in ("results.csv", "jobs.csv", "curves.csv"):
        (again / f"{name}.gz").write_bytes(gzip.compress((again / name).read_bytes()))
        (again / name).unlink()
    report.report(again)
    assert (again / "report.html").read_bytes() == (plain / "report.html").read_bytes()


def test_the_page_is_one_small_file_that_asks_the_network_for_nothing(drawn: Path) -> None:
    page = (drawn / "report.html").read_text()
    assert len(page.encode()) < 2_000_000
    assert not re.search(r"(src|href)=['\"]?(https?:)?//|@import|url\(", page)
    assert page.index("Verdicts</h2>") < page.index("Figures</h2>") < page.index("Tables</h2>")
    assert page.count("data:image/") == len(invented.EXPERIMENT["figures"])


def test_text_from_an_experiment_cannot_become_markup(tmp_path: Path) -> None:
    invented.write(tmp_path, title="<script>alert(1)</script> $body", figures=FEW)
    report.report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $body" in page


def test_figures_are_pngs_of_the_stated_size_and_wellformed_svgs(drawn: Path) -> None:
    for path in (drawn / "figures").glob("*.png"):
        header = path.read_bytes()[:24]
        assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1400, 900)
    for path in (drawn / "figures").glob("*.svg"):
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")


def test_command_and_commit_stand_beneath_every_table_and_figure(drawn: Path) -> None:
    origin = "experiment=invented at commit 0123456789ab"
    assert all(origin in path.read_text().replace("\\_", "_") for path in (drawn / "tables").glob("*.md"))
    assert (drawn / "README.md").read_text().count(origin) == 6
    assert all(origin in path.read_text() for path in (drawn / "tables").glob("*.tex"))


def test_a_report_needs_neither_torch_nor_the_planner(drawn: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from workflows.report import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'snakemake', 'pydantic', 'scipy', 'yaml'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(code or bool(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(drawn), "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_an_interrupted_experiment_still_gets_its_report(tmp_path: Path) -> None:
    invented.write(tmp_path)
    (tmp_path / "jobs.csv").unlink()
    (tmp_path / "curves.csv").unlink()
    (tmp_path / "results.csv").write_text(",".join(invented.COLUMNS) + "\n")
    report.report(tmp_path)
    assert (
        "frontier: No row of results.csv is called forget10.forget_nll"
        in (tmp_path / "README.md").read_text()
    )
    assert "not run" in (tmp_path / "reproduction.csv").read_text()


def test_an_experiment_without_tables_and_figures_gets_default_ones(tmp_path: Path) -> None:
    invented.write(tmp_path, tables={}, figures={}, claims=[])
    report.report(tmp_path)
    assert sorted(path.stem for path in (tmp_path / "tables").glob("*.md")) == ["cost", "forget10", "tasks"]
    assert (tmp_path / "figures/learning.png").is_file()


def test_a_figure_that_cannot_be_drawn_is_named_and_the_others_are_drawn(tmp_path: Path) -> None:
    figures = {
        "wrong": {"kind": "scatter", "x": "forget10.forget_nl", "y": "tasks.acc"},
        "many": {"x": "tasks.acc", "y": "forget10.retain_nll"},
        "odd": {"kind": "pie"},
        "right": {"kind": "matched", "x": "probe.forget", "y": "probe.retain"},
    }
    invented.write(tmp_path, figures=figures)
    report.report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert (
        "wrong: No row of results.csv is called forget10.forget_nl. Did you mean forget10.forget_nll?" in text
    )
    assert "many: figures.many: tasks.acc is measured on several tasks" in text
    assert "odd: figures.odd: kind 'pie' is none of scatter, curve, sweep, matched" in text
    assert [path.stem for path in (tmp_path / "figures").glob("*.png")] == ["right"]


def test_colour_may_be_a_quantity(tmp_path: Path) -> None:
    spec = {"x": "forget10.forget_nll", "y": "tasks.authors_retain.acc", "color": "energy.chain_kwh"}
    invented.write(tmp_path, figures={"tinted": spec}, tables={})
    report.report(tmp_path)
    assert (tmp_path / "figures/tinted.png").is_file()


# --- cells ------------------------------------------------------------------------------------------------


def test_a_cell_is_mean_sd_and_number_of_distinct_results(measured: Measured) -> None:
    assert re.fullmatch(
        r"0\.\d{3,4} ± 0\.\d{3,4} \(3\)", row_of(measured, ["forget10.retain_nll"], "ascent")[1]
    )


def test_the_same_result_under_every_seed_has_no_spread(tmp_path: Path) -> None:
    invented.write(tmp_path)
    rows = invented.read_csv(tmp_path / "results.csv")
    same = [row | {"score_id": f"one-{row['chain']}-{row['entry']}"} for row in rows]
    invented.write_csv(tmp_path / "results.csv", same)
    assert row_of(Measured.read([tmp_path]), ["forget10.retain_nll"], "ascent")[1].endswith(" (1)")


def test_what_failed_says_so(measured: Measured) -> None:
    columns = ["forget10.retain_nll", "energy.chain_kwh", "time.chain_seconds"]
    assert row_of(measured, columns, "broken")[1:] == ["failed, oom, timeout"] * 3
    assert row_of(measured, columns, "half_heads")[1].endswith("(2), 1 missing")


def test_a_level_that_was_not_reached_is_said_in_words(measured: Measured) -> None:
    columns = ["curve.probe.retain@probe.forget=2"]
    assert row_of(measured, columns, "saturation")[1].endswith("(2), 1 level not reached")
    assert row_of(measured, ["curve.probe.retain@probe.forget=9"], "ascent")[1] == "level not reached"
    assert row_of(measured, [*columns, "forget10.retain_nll"], "target")[1] == "–"


def test_bold_is_only_a_lead_beyond_chance(tmp_path: Path) -> None:
    clear, close = [[1.0, 1.1, 1.2], [0.1, 0.2, 0.25]], [[1.0, 1.1, 1.2], [0.9, 1.2, 1.0]]
    for values, bold in ((clear, [False, True]), (close, [False, False])):
        rows = [
            dict.fromkeys(invented.COLUMNS, "")
            | {"chain": chain, "label": chain, "score_id": f"{chain}{seed}", "seed": seed, "evaluation": "e",
               "entry": "e", "task": "t", "metric": "m", "value": value, "better": "lower", "status": "ok"}
            for chain, own in zip("ab", values, strict=True) for seed, value in enumerate(own)
        ]  # fmt: skip
        invented.write(tmp_path)
        invented.write_csv(tmp_path / "results.csv", rows)
        made = tables.table(Measured.read([tmp_path]), "t", {"columns": ["e.m"]})
        assert [row[1].bold for row in made.rows] == bold
        assert "t test at 95 %" in made.notes[0]


def test_energy_names_its_unit_and_how_it_was_obtained(measured: Measured) -> None:
    made = tables.table(measured, "t", {"columns": ["energy.chain_kwh"]})
    assert made.headers[1] == "energy.chain (Wh, estimated, shared) ↓"
    assert float(made.numbers["energy.chain_kwh"][1]) < 0.001


def test_mixed_origins_of_energy_are_said_in_each_cell(tmp_path: Path) -> None:
    invented.write(tmp_path)
    rows = invented.read_csv(tmp_path / "results.csv")
    for row in rows:
        if row["chain"] == "ascent" and row["entry"] == "energy":
            row["unit"] = "kWh measured"
    invented.write_csv(tmp_path / "results.csv", rows)
    measured = Measured.read([tmp_path])
    assert row_of(measured, ["energy.chain_kwh"], "ascent")[1].endswith("(3) measured")
    assert row_of(measured, ["energy.chain_kwh"], "target")[1].endswith("(3) estimated, shared")


def test_lost_updates_and_stale_results_are_marked(drawn: Path) -> None:
    text = (drawn / "tables/trade_off.md").read_text()
    assert "| preference † |" in text
    assert "saving lost 21%" in text
    assert "| healed ‡ |" in text


def test_a_task_may_be_named_without_its_settings_and_left_out_means_all(measured: Measured) -> None:
    assert [column.name for column in measured.columns("tasks.authors_retain.acc")] == [
        "tasks.authors_retain.acc"
    ]
    names = [column.name for column in measured.columns("tasks.acc")]
    assert names == ["tasks.authors_forget limit=60.acc", "tasks.authors_retain limit=60.acc"]


def test_a_column_nobody_measured_is_named_under_the_table(measured: Measured) -> None:
    made = tables.table(measured, "t", {"columns": ["forget10.retain_nll", "forget10.retan_nll"]})
    assert (
        "Missing: No row of results.csv is called forget10.retan_nll. Did you mean forget10.retain_nll?"
        in made.notes
    )


def test_rows_may_be_called_by_their_method(drawn: Path) -> None:
    text = (drawn / "tables/cost.md").read_text().replace("\\_", "_")
    assert "| unlearn.grad_diff [difference[alpha=20.0]] |" in text


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [(0.2234, 0.0193, "0.223 ± 0.019"), (2.1e-20, 1e-21, "2.1e-20 ± 1e-21"), (0.0121, 0.00042, "0.0121 ± 0.0004"),
     (1.0, 0.0, "1.000 ± 0"), (0.5, float("nan"), "0.500")],
)  # fmt: skip
def test_numbers_keep_the_digits_that_matter(mean: float, sd: float, text: str) -> None:
    assert grid.number(mean, sd, 3) == text


def test_latex_has_no_character_left_that_latex_would_act_on(measured: Measured) -> None:
    made = tables.table(measured, "t", {"columns": ["forget10.retain_nll"], "title": "a & b"})
    body = typeset.latex(made, "made by 100 % #1").partition("\n")[2]
    assert typeset.escape_latex("a_b & {c}") == r"a\_b \& \{c\}"
    assert not re.search(r"(?<!\\)[_#%]|[±–↑↓†‡]", body)


# --- trajectories: equal levels -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_the_way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = invented.write_ways(tmp_path_factory.mktemp("ways"), invented.WAYS)
    report.report(folder)
    return folder


@pytest.fixture(scope="module")
def ways(on_the_way: Path) -> Measured:
    return Measured.read([on_the_way])


def value_at(measured: Measured, chain: str, reference: str) -> Cell:
    (run,) = measured.chosen([chain])
    (column,) = measured.columns(reference)
    return measured.cell(run, column)


def changed(folder: Path, change: Callable[[dict[str, str]], dict[str, str] | None]) -> Measured:
    """The invented trajectories with every row of results.csv changed, or left out where None comes back."""
    invented.write_ways(folder, invented.WAYS)
    rows = [new for row in invented.read_csv(folder / "results.csv") if (new := change(row)) is not None]
    invented.write_csv(folder / "results.csv", rows)
    return Measured.read([folder])


def matched_rows(measured: Measured, **changes: Any) -> dict[tuple[str, str], list[str]]:
    made = tables.table(measured, "t", invented.WAY_TABLE | changes)
    return {(row[0].text, row[1].text): [cell.text for cell in row[2:]] for row in made.rows}


def test_a_value_at_a_level_is_interpolated_between_the_models_that_were_scored(ways: Measured) -> None:
    # from (1.1, 0.8) to (2.1, 0.7): nine tenths of the way at forget NLL 2; from step 20 to 40: step 38
    cell = value_at(ways, "steady", "forget10.model_utility@forget10.forget_nll=2")
    assert cell.by_seed["0"] == pytest.approx(0.71)
    assert value_at(ways, "steady", "step@forget10.forget_nll=2").values == pytest.approx([38, 38, 38])


def test_the_start_of_a_trajectory_is_the_parent_that_jobs_names(ways: Measured) -> None:
    # from (0.1, 0.9) at step 0 to (1.1, 0.8) at step 20: half way at forget NLL 0.6
    assert value_at(ways, "steady", "forget10.model_utility@forget10.forget_nll=0.6").by_seed[
        "0"
    ] == pytest.approx(0.85)


def test_a_parent_without_a_name_of_its_own_stands_under_the_chain_at_step_0(tmp_path: Path) -> None:
    def unnamed(row: dict[str, str]) -> dict[str, str] | None:
        if row["chain"] == "target" and row["seed"] == "0":
            return row | {"chain": "steady", "step": "0", "label": "of the parent", "method": "train.sft"}
        return None if row["chain"] == "target" else row

    measured = changed(tmp_path, unnamed)
    cell = value_at(measured, "steady", "forget10.model_utility@forget10.forget_nll=0.6")
    assert cell.by_seed == {"0": pytest.approx(0.85)}
    assert cell.statuses == {"start not scored": 2}
    assert [run.method for run in measured.chosen(["steady"])] == ["unlearn.npo"]


def test_costs_count_from_the_start_of_the_stage_and_of_the_chain(ways: Measured) -> None:
    stage = value_at(ways, "steady", "energy.stage_kwh@forget10.forget_nll=0.6")
    chain = value_at(ways, "steady", "energy.chain_kwh@forget10.forget_nll=0.6")
    assert stage.values == pytest.approx([1e-5] * 3)
    assert chain.values == pytest.approx([1.1e-4] * 3)
    assert stage.units == ("kWh estimated, shared",)


def test_of_a_way_that_comes_back_only_the_first_passing_counts(ways: Measured) -> None:
    # 0.1 -> 2.6 within 20 steps, then back to 0.6 and up again
    assert value_at(ways, "turning", "step@forget10.forget_nll=1.6").values == pytest.approx([12] * 3)


def test_a_level_below_the_start_is_passed_downwards(ways: Measured) -> None:
    cell = value_at(ways, "steady", "forget10.forget_nll@forget10.model_utility=0.75")
    assert cell.by_seed["0"] == pytest.approx(1.6)
    assert value_at(ways, "steady", "step@forget10.model_utility=0.95").statuses == {"level not reached": 3}


def test_runs_that_do_not_reach_a_level_are_counted(ways: Measured) -> None:
    cell = value_at(ways, "late", "forget10.model_utility@forget10.forget_nll=2")
    assert (sorted(cell.by_seed), cell.statuses) == (["0", "2"], {"level not reached": 1})
    rows = matched_rows(ways)
    assert rows["late", "2"][0] == "2 of 3"
    assert rows["late", "2"][1].endswith("(2)")
    assert rows["late", "3"] == ["0 of 3", *["level not reached"] * 3]


def test_without_its_start_a_level_before_the_first_scored_model_is_unknown(tmp_path: Path) -> None:
    measured = Measured.read([invented.write_ways(tmp_path, invented.WAYS, start=False)])
    assert value_at(measured, "steady", "step@forget10.forget_nll=1").statuses == {"start not scored": 3}
    assert value_at(measured, "steady", "step@forget10.forget_nll=2").values == pytest.approx([38] * 3)
    assert value_at(measured, "steady", "step@forget10.forget_nll=9").statuses == {"level not reached": 3}
    assert value_at(measured, "single", "step@forget10.forget_nll=1").statuses == {"start not scored": 3}


def test_what_is_not_scored_around_a_level_says_so(tmp_path: Path) -> None:
    def without_early_utility(row: dict[str, str]) -> dict[str, str] | None:
        early = row["metric"] == "model_utility" and (row["chain"] == "target" or row["step"] == "20")
        return None if early else row

    measured = changed(tmp_path, without_early_utility)
    assert value_at(measured, "steady", "forget10.model_utility@forget10.forget_nll=1").statuses == {
        "not scored there": 3
    }


def test_a_score_that_failed_on_the_way_is_bridged_and_named(tmp_path: Path) -> None:
    def failed(row: dict[str, str]) -> dict[str, str] | None:
        lost = (row["chain"], row["step"], row["seed"], row["evaluation"]) == ("turning", "30", "1", "tofu")
        return row | {"status": "oom", "value": "", "metric": "", "task": ""} if lost else row

    made = tables.table(changed(tmp_path, failed), "t", invented.WAY_TABLE)
    assert "turning: one of the models on the way has no score; values are interpolated across." in made.notes


def test_a_chain_that_failed_is_counted_among_those_that_did_not_reach_the_level(tmp_path: Path) -> None:
    def failed(row: dict[str, str]) -> dict[str, str] | None:
        if (row["chain"], row["seed"]) != ("steady", "1"):
            return row
        return None if row["step"] else row | {"status": "failed", "value": ""}

    rows = matched_rows(changed(tmp_path, failed))
    assert rows["steady", "1"][0] == "2 of 3, 1 failed"
    assert rows["steady", "1"][1].endswith("(2)")


def test_the_same_result_under_every_seed_is_one_trajectory(tmp_path: Path) -> None:
    def same(row: dict[str, str]) -> dict[str, str] | None:
        return row | {"model_id": re.sub(r"-\d", "-0", row["model_id"])}

    assert value_at(changed(tmp_path, same), "steady", "step@forget10.forget_nll=2").n == 1


def test_an_end_that_was_kept_as_well_is_one_model(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = []

    def twice(row: dict[str, str]) -> dict[str, str] | None:
        if row["chain"] == "steady" and not row["step"]:
            rows.append(row | {"step": "40", "model_id": f"{row['model_id']}@step40"})
        return row

    changed(tmp_path, twice)
    invented.write_csv(tmp_path / "results.csv", invented.read_csv(tmp_path / "results.csv") + rows)
    measured = Measured.read([tmp_path])
    assert value_at(measured, "steady", "step@forget10.forget_nll=2").values == pytest.approx([38] * 3)


def test_ends_whose_step_nobody_knows_are_still_behind_everything_that_was_kept(tmp_path: Path) -> None:
    measured = changed(tmp_path, lambda row: row | {"options": "{}"})
    assert value_at(measured, "steady", "forget10.model_utility@forget10.forget_nll=2").by_seed[
        "0"
    ] == pytest.approx(0.71)
    assert value_at(measured, "steady", "step@forget10.forget_nll=2").statuses == {"not scored there": 3}


def test_what_was_scored_may_be_read_where_a_curve_passes_a_level(on_the_way: Path, tmp_path: Path) -> None:
    shutil.copytree(on_the_way, tmp_path, dirs_exist_ok=True)
    rows = [
        {"chain": "steady", "label": "", "model_id": "steady-0", "seed": 0, "method": "", "step": step,
         "term": "probe.forget", "value": step / 10} for step in range(0, 41, 5)
    ]  # fmt: skip
    invented.write_csv(tmp_path / "curves.csv", rows)
    measured = Measured.read([tmp_path])
    cell = value_at(
        measured, "steady", "forget10.model_utility@curve.probe.forget=3"
    )  # half way from 20 to 40
    assert cell.by_seed == {"0": pytest.approx(0.75)}
    assert value_at(measured, "steady", "curve.probe.forget@forget10.forget_nll=1.6").values == pytest.approx(
        [3.0]
    )


def test_the_ordinary_tables_show_ends_only(ways: Measured) -> None:
    made = tables.table(ways, "t", {"columns": ["forget10.forget_nll"]})
    assert [row[0].text for row in made.rows] == ["target", "retained", *invented.WAYS]
    assert row_of(ways, ["forget10.forget_nll"], "steady")[1] == "2.100 ± 0 (3)"


def test_a_kept_model_may_be_shown_as_a_chain_of_its_own(ways: Measured) -> None:
    def shown(*of: str) -> list[str]:
        made = tables.table(ways, "t", {"columns": ["forget10.forget_nll"], "of": list(of)})
        return [row[0].text for row in made.rows]

    assert shown("steady@step20", "late") == ["steady@step20", "late"]
    assert shown("turning@steps") == ["turning@step20", "turning@step30", "turning"]
    assert shown("*unlearn.rmu@step3*") == ["turning@step30"]
    made = tables.table(ways, "t", {"columns": ["forget10.forget_nll"], "of": ["steady@step20"]})
    assert made.rows[0][1].text == "1.100 ± 0 (3)"


def test_the_best_of_each_level_is_bold_only_where_its_lead_is_beyond_chance(ways: Measured) -> None:
    made = tables.table(ways, "t", invented.WAY_TABLE)
    bold = [(row[0].text, row[1].text) for row in made.rows if row[3].bold]
    assert bold == [("late", "1"), ("late", "2"), ("costly", "3")]
    assert not any(row[4].bold or row[5].bold for row in made.rows)


def test_a_lead_within_chance_is_not_bold_at_any_level(tmp_path: Path) -> None:
    close = {"a": ("unlearn.npo", [[(10, 1.1, u), (20, 2.1, u)] for u in (0.8, 0.7, 0.9)]),
             "b": ("unlearn.rmu", [[(10, 1.1, u), (20, 2.1, u)] for u in (0.7, 0.9, 0.85)])}  # fmt: skip
    made = tables.table(Measured.read([invented.write_ways(tmp_path, close)]), "t", invented.WAY_TABLE)
    assert not any(cell.bold for row in made.rows for cell in row)


def test_a_matched_table_says_how_it_is_read(on_the_way: Path) -> None:
    text = (on_the_way / "tables/matched.md").read_text().replace("\\_", "_")
    assert "| chain | at forget10.forget_nll (nats/token) | reached | forget10.model_utility ↑ |" in text
    assert "first passes the level, away from where it started" in text
    latex = (on_the_way / "tables/matched.tex").read_text()
    assert latex.count(r"\midrule") == 3
    rows = invented.read_csv(on_the_way / "tables/matched.csv")
    late = next(row for row in rows if (row["row"], row["at forget10.forget_nll"]) == ("late", "2.0"))
    assert (late["reached"], late["runs"], late["forget10.model_utility n"]) == ("2", "3", "2")
    page = (on_the_way / "report.html").read_text()
    assert "at forget10.<wbr>forget_<wbr>nll" in page
    assert page.count("data:image/") == 1


def test_chains_scored_at_start_and_end_only_are_compared_where_they_are_asked_for(ways: Measured) -> None:
    assert ("single", "1") not in matched_rows(ways)
    made = tables.table(ways, "t", invented.WAY_TABLE | {"of": ["steady", "single"]})
    assert len(made.rows) == 6
    plain = tables.table(ways, "t", {"columns": ["step@forget10.forget_nll=1"]})
    for notes in (made.notes, plain.notes):
        assert any(
            note.startswith("single: forget10.forget_nll is read off the straight line") for note in notes
        )


def test_terms_of_curves_may_be_compared_at_equal_levels(measured: Measured) -> None:
    spec = {"kind": "matched", "at": "curve.probe.forget", "levels": [1, 2], "columns": ["curve.probe.retain"],
            "better": {"curve.probe.retain": "lower"}, "of": ["ascent", "preference", "saturation"]}  # fmt: skip
    made = tables.table(measured, "t", spec)
    (column,) = measured.columns("curve.probe.retain@probe.forget=2")
    assert [row[3].value for row in made.rows[3:]] == [
        measured.cell(run, column).mean for run in measured.chosen(spec["of"])
    ]
    assert [row[2].text for row in made.rows[3:]] == ["3 of 3", "3 of 3", "2 of 3"]
    assert [row[3].bold for row in made.rows] == [False, False, True] * 2


def test_a_matched_table_that_nothing_was_kept_for_says_what_to_write(measured: Measured) -> None:
    spec = {"kind": "matched", "at": "forget10.forget_nll", "levels": [1], "columns": ["forget10.retain_nll"]}
    with pytest.raises(AssayError, match=r"write of: \[direct@steps\]"):
        tables.table(measured, "t", spec)
    with pytest.raises(AssayError, match=r"no chain here logged probe\.forgot"):
        tables.table(measured, "t", spec | {"at": "curve.probe.forgot"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"levels": []}, "levels is a list of numbers"), ({"levels": ["two"]}, "levels is a list of numbers"),
     ({"levels": [1, 1.0]}, "a level is given twice"), ({"at": None}, "at names what is matched"),
     ({"at": "forget10.forget_nll=2"}, "at names what is matched"), ({"level": [1]}, "did you mean 'levels'"),
     ({"kind": "even"}, "kind 'even' is none of plain, matched"), ({"columns": []}, "columns names what is shown"),
     ({"columns": ["step@forget10.forget_nll=2"]}, "leave the @ out"), ({"of": "steady"}, "of is a list of chains"),
     ({"better": {"step": "less"}}, "better of step is one of"), ({"rows": "seed"}, "rows is one of"),
     ({"better": {"x.y": "lower"}}, "better says of columns")],
)  # fmt: skip
def test_a_matched_table_that_cannot_be_drawn_is_answered_with_a_sentence(
    ways: Measured, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AssayError, match=re.escape(sentence)):
        tables.table(ways, "t", invented.WAY_TABLE | change)


def test_a_matched_column_nobody_measured_is_named_under_the_table(ways: Measured) -> None:
    made = tables.table(ways, "t", invented.WAY_TABLE | {"columns": ["step", "forget10.model_utilty"]})
    assert any("Did you mean forget10.model_utility?" in note for note in made.notes)
    assert len(made.headers) == 4


def test_an_end_that_was_not_scored_is_not_taken_for_a_level_not_reached(tmp_path: Path) -> None:
    def failed(row: dict[str, str]) -> dict[str, str] | None:
        lost = (row["chain"], row["step"], row["seed"], row["evaluation"]) == ("steady", "", "1", "tofu")
        return row | {"status": "oom", "value": "", "metric": "", "task": ""} if lost else row

    measured = changed(tmp_path, failed)
    assert value_at(measured, "steady", "step@forget10.forget_nll=2").statuses == {"oom": 1}
    assert value_at(measured, "steady", "step@forget10.forget_nll=1").n == 3


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [("forget10.model_utility@forget10.forget_nll=two", "X@Y=LEVEL"), ("step", "write step@Y=LEVEL"),
     ("curve.probe.retain", "X@Y=LEVEL"), ("energy.score_kwh@forget10.forget_nll=2", "No row of results.csv"),
     ("forget10.model_utility@forget10.forget_nl=2", "Did you mean forget10.forget_nll")],
)  # fmt: skip
def test_a_level_that_cannot_be_read_is_answered_with_a_sentence(
    ways: Measured, reference: str, sentence: str
) -> None:
    with pytest.raises(AssayError, match=re.escape(sentence)):
        ways.columns(reference)


def test_costs_without_a_course_have_no_value_at_a_level(measured: Measured) -> None:
    with pytest.raises(AssayError, match=r"energy\.chain_kwh, energy\.stage_kwh, time\.chain_seconds"):
        measured.at(
            Column("memory.x", "memory", "", "stage_peak_mb"), measured.one("forget10.forget_nll"), 2.0
        )


PLANNED = """\
title: A toy
country: FRA
models: {base: {new: llama}}
chains: {direct: base > unlearn.npo}
evaluate: {forget: {run: size, of: [ENDS]}, tasks: size}
SECTION: {wanted: SPEC}
"""


@pytest.mark.parametrize(
    ("section", "spec", "sentence"),
    [("tables", "{kind: matched, at: forgt.nll, levels: [1], columns: [forget.x]}", "did you mean 'forget'"),
     ("tables", "{kind: matched, at: tasks.nll, levels: [1], columns: [step]}", "tasks scores no model on the way"),
     ("tables", "{kind: matched, at: forget.nll, columns: [step]}", "levels says where the chains are compared"),
     ("tables", "{columns: [taks.x@forget.nll=1]}", "did you mean 'tasks'"),
     ("tables", "{columns: [tasks.x@forgt.nll=1]}", "did you mean 'forget'"),
     ("tables", "{columns: [curve.probe.retain]}", "write a matched level as X@Y=LEVEL"),
     ("tables", "{columns: [tasks.x], of: [dirct]}", "did you mean 'direct'"),
     ("tables", "{columns: [tasks.x], sort: up}", "there is no key 'sort'"),
     ("figures", "{kind: matched, x: forgt.nll, y: tasks.x}", "did you mean 'forget'"),
     ("figures", "{kind: matched, x: forget.nll, y: tasks.x, refernce: direct}", "did you mean 'reference'"),
     ("figures", "{kind: matched, x: forget.nll, y: tasks.x, reference: gold}", "'gold' names no chain or model"),
     ("figures", "{kind: sweep, x: alpha, y: [taks.x]}", "did you mean 'tasks'"),
     ("figures", "{kind: scatter, x: forget.nll}", "a scatter needs y")],
)  # fmt: skip
def test_the_planner_refuses_what_the_report_could_not_draw(
    tmp_path: Path, section: str, spec: str, sentence: str
) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(PLANNED.replace("ENDS", "direct@steps").replace("SECTION", section).replace("SPEC", spec))
    with pytest.raises(AssayError, match=re.escape(sentence)) as caught:
        specs.check_experiment(experiment.load(path))
    assert str(caught.value).startswith(f"toy.yaml, line 6: {section} wanted: ")


@pytest.mark.parametrize(
    ("section", "spec"),
    [("tables", "{kind: matched, at: forget.nll, levels: [1], columns: [tasks.x, energy.chain_kwh, step]}"),
     ("tables", "{kind: matched, at: curve.probe.forget, levels: [1], columns: [curve.probe.retain, tasks.x]}"),
     ("tables", "{columns: [curve.probe.retain@probe.forget=2, tasks.pass@1], of: ['dir*', 'direct@step40']}"),
     ("figures", "{kind: matched, x: probe.forget, y: probe.retain, log: y, levels: [0.5, 1]}"),
     ("figures", "{kind: matched, x: forget.nll, y: tasks.x, reference: base, panels: method}"),
     ("figures", "{x: forget.nll, y: tasks.x, size: energy.chain_kwh, color: method}")],
)  # fmt: skip
def test_the_planner_accepts_what_can_be_drawn(tmp_path: Path, section: str, spec: str) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(PLANNED.replace("ENDS", "direct@steps").replace("SECTION", section).replace("SPEC", spec))
    specs.check_experiment(experiment.load(path))


# --- trajectories: figures ----------------------------------------------------------------------------------


def test_a_matched_figure_of_scores_goes_from_the_start_through_what_was_kept(ways: Measured) -> None:
    plot = _collected(ways, [], invented.WAY_FIGURE, "m")
    late = next(each for each in plot.traced if each.run.name == "late")
    assert [x for x, _ in late.mean] == pytest.approx([0.1, 0.5, 2.3])
    assert [len(spots) for spots in late.single] == [3, 3, 3]
    assert late.begun
    assert [each.run.name for each in plot.traced] == ["steady", "costly", "late", "turning"]


def test_a_matched_figure_is_cut_behind_its_highest_level_and_its_reference(ways: Measured) -> None:
    from matplotlib import rc_context

    with rc_context():
        image, _ = matched(ways, [], invented.WAY_FIGURE, "m")
        (axes,) = image.axes
    assert axes.get_xlim()[1] == pytest.approx(3.0 + 0.08 * 2.9)
    labels = [text.get_text() for text in image.legends[0].get_texts()]
    assert labels == ["steady", "costly", "late", "turning", "start", "retained (reference)"]


def test_many_chains_get_a_panel_for_each_method(tmp_path: Path) -> None:
    many = {f"{chain}_{number}": (f"{method}_{number % 3}", own)
            for number in range(3) for chain, (method, own) in invented.WAYS.items() if chain != "single"}  # fmt: skip
    measured = Measured.read([invented.write_ways(tmp_path, many)])
    image, caption = matched(measured, [], invented.WAY_FIGURE, "m")
    assert len([axes for axes in image.axes if axes.get_visible()]) == 12
    assert "A panel for each" in caption
    image, _ = matched(measured, [], invented.WAY_FIGURE | {"panels": "one"}, "m")
    assert len(image.axes) == 1
    assert len(image.legends[0].get_texts()) == 12 + 2


def test_a_reference_that_was_not_scored_is_named(ways: Measured) -> None:
    spec = {"kind": "matched", "x": "forget10.forget_nll", "y": "energy.chain_kwh", "reference": "retained"}
    with pytest.raises(AssayError, match=r"retained was not scored for energy\.chain_kwh"):
        figures.figure(ways, "m", spec, "origin")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [({"panels": "two"}, "panels is one of"), ({"levels": "all"}, "levels is a list of numbers"),
     ({"log": "z"}, "log is x, y"), ({"x": ["a"]}, "x is one text"), ({"y": "forget10.utility"}, "Did you mean"),
     ({"x": "probe.forget"}, "no chain here was followed along both"), ({"reference": 3}, "reference is one text")],
)  # fmt: skip
def test_a_matched_figure_that_cannot_be_drawn_is_answered_with_a_sentence(
    ways: Measured, spec: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AssayError, match=sentence):
        figures.figure(ways, "m", invented.WAY_FIGURE | spec, "origin")


# --- several folders and published results ------------------------------------------------------------------


def test_several_folders_are_shown_side_by_side(tmp_path: Path) -> None:
    first, second = (invented.write(tmp_path / name, figures=FEW) for name in ("first", "second"))
    out = tmp_path / "out"
    assert report.main([str(first), str(second), "--out", str(out)]) == 0
    text = (out / "tables/trade_off.md").read_text()
    assert "| first: target |" in text
    assert "| second: target |" in text
    verdict = invented.read_csv(out / "reproduction.csv")
    assert {row["folder"] for row in verdict} == {"first", "second"}
    assert len(verdict) == 2 * 9


def test_the_same_numbers_agree_with_what_was_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, published = (invented.write(tmp_path / name, figures=FEW) for name in ("fresh", "published"))
    rows = invented.read_csv(published / "results.csv")
    for row in rows:  # another machine: other ids, other costs
        row["model_id"], row["score_id"] = "other", f"other-{row['score_id']}"
        row["value"] = "123" if row["evaluation"] in ("energy", "time") and row["value"] else row["value"]
    invented.write_csv(published / "results.csv", rows)
    assert report.main([str(fresh), "--out", str(tmp_path / "out"), "--against", str(published)]) == 0
    assert "agree within 1e-06" in capsys.readouterr().out


def test_other_numbers_missing_rows_and_other_statuses_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, published = (invented.write(tmp_path / name, figures=FEW) for name in ("fresh", "published"))
    rows = invented.read_csv(published / "results.csv")
    rows[0]["value"] = str(float(rows[0]["value"]) * 1.001)
    rows[1]["status"], rows[1]["value"] = "failed", ""
    invented.write_csv(published / "results.csv", rows[:2] + rows[3:])
    code = report.main(
        [str(fresh), "--out", str(tmp_path / "out"), "--against", str(published / "results.csv")]
    )
    said = capsys.readouterr().out
    assert code == 1
    for words in ("value differs", "was failed, is ok", "only fresh"):
        assert words in said
    loose = ["--against", str(published), "--tolerance", "0.01"]
    report.main([str(fresh), "--out", str(tmp_path / "out"), *loose])
    assert "value differs" not in capsys.readouterr().out


def test_the_same_quantity_of_kept_models_is_compared_step_by_step(
    on_the_way: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = invented.write_ways(tmp_path / "published", invented.WAYS)
    same = [str(on_the_way), "--out", str(tmp_path / "out"), "--against", str(published)]
    assert report.main(same) == 0
    rows = [row for row in invented.read_csv(published / "results.csv") if row["step"] != "30"]
    invented.write_csv(published / "results.csv", rows)
    assert report.main(same) == 1
    assert capsys.readouterr().out.count("only fresh") == 6


def test_what_was_published_without_steps_is_read_as_ends(drawn: Path) -> None:
    measured = Measured.read([drawn])
    assert set(measured.results["step"]) == {""}
    assert measured.with_steps == measured.chains


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (
            lambda folder: (folder / "results.csv").write_text(
                (folder / "results.csv").read_text().replace("options", "step", 1)
            ),
            "is no whole number; it is empty for the end of a chain",
        ),
        (lambda folder: (folder / "results.csv").unlink(), "there is no such results table"),
        (lambda folder: (folder / "results.csv").write_text("a,b\n1,2\n"), "this is no results table"),
        (lambda folder: (folder / "experiment.json").unlink(), "a report needs the resolved experiment"),
        (lambda folder: (folder / "experiment.json").write_text("{"), "this is no JSON"),
    ],
)
def test_a_broken_folder_is_answered_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], break_it: object, sentence: str
) -> None:
    folder = invented.write(tmp_path)
    break_it(folder)  # type: ignore[operator]
    assert report.main([str(folder)]) == 2
    assert sentence in capsys.readouterr().err


def test_the_csv_of_a_table_holds_numbers_in_the_units_of_the_rows(drawn: Path) -> None:
    rows = invented.read_csv(drawn / "tables/trade_off.csv")
    ascent = next(row for row in rows if row["row"] == "ascent")
    assert ascent["energy.chain_kwh unit"] == "kWh estimated, shared"
    assert float(ascent["energy.chain_kwh"]) == pytest.approx(0.00021, rel=0.1)
    assert json.loads((drawn / "experiment.json").read_text())["name"] == "invented"


def test_the_terminal_table_is_aligned_and_has_every_row(measured: Measured) -> None:
    made = tables.table(measured, "t", {"columns": ["forget10.forget_nll", "energy.chain_kwh"]})
    lines = typeset.plain(made).splitlines()
    body = lines[-len(made.rows) :]
    assert [line.split()[0] for line in body] == [row[0].text.split()[0] for row in made.rows]
    assert len({line.rindex(")") for line in body if line.endswith(")")}) <= 1
    assert len(lines) > len(made.rows)
