from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import invented
from workflows import report, tables, typeset
from workflows.measured import Measured

ROOT = Path(__file__).resolve().parent.parent


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


def test_the_page_is_one_small_file_that_asks_the_network_for_nothing(drawn: Path) -> None:
    page = (drawn / "report.html").read_text()
    assert len(page.encode()) < 2_000_000
    assert not re.search(r"(src|href)=['\"]?(https?:)?//|@import|url\(", page)
    assert page.index("Verdicts</h2>") < page.index("Figures</h2>") < page.index("Tables</h2>")
    assert page.count("data:image/") == len(invented.EXPERIMENT["figures"])


def test_text_from_an_experiment_cannot_become_markup(tmp_path: Path) -> None:
    invented.write(tmp_path, title="<script>alert(1)</script> $body")
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
    assert tables.number(mean, sd, 3) == text


def test_latex_has_no_character_left_that_latex_would_act_on(measured: Measured) -> None:
    made = tables.table(measured, "t", {"columns": ["forget10.retain_nll"], "title": "a & b"})
    body = typeset.latex(made, "made by 100 % #1").partition("\n")[2]
    assert typeset.escape_latex("a_b & {c}") == r"a\_b \& \{c\}"
    assert not re.search(r"(?<!\\)[_#%]|[±–↑↓†‡]", body)


# --- several folders and published results ------------------------------------------------------------------


def test_several_folders_are_shown_side_by_side(tmp_path: Path) -> None:
    first, second, out = (
        invented.write(tmp_path / "first"),
        invented.write(tmp_path / "second"),
        tmp_path / "out",
    )
    assert report.main([str(first), str(second), "--out", str(out)]) == 0
    text = (out / "tables/trade_off.md").read_text()
    assert "| first: target |" in text
    assert "| second: target |" in text
    verdict = invented.read_csv(out / "reproduction.csv")
    assert {row["folder"] for row in verdict} == {"first", "second"}
    assert len(verdict) == 2 * 9


def test_the_same_numbers_agree_with_what_was_published(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = invented.write(tmp_path / "published")
    rows = invented.read_csv(published / "results.csv")
    for row in rows:  # another machine: other ids, other costs
        row["model_id"], row["score_id"] = "other", f"other-{row['score_id']}"
        row["value"] = "123" if row["evaluation"] in ("energy", "time") and row["value"] else row["value"]
    invented.write_csv(published / "results.csv", rows)
    assert report.main([str(drawn), "--out", str(tmp_path / "out"), "--against", str(published)]) == 0
    assert "agree within 1e-06" in capsys.readouterr().out


def test_other_numbers_missing_rows_and_other_statuses_are_listed(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = invented.write(tmp_path / "published")
    rows = invented.read_csv(published / "results.csv")
    rows[0]["value"] = str(float(rows[0]["value"]) * 1.001)
    rows[1]["status"], rows[1]["value"] = "failed", ""
    invented.write_csv(published / "results.csv", rows[:2] + rows[3:])
    code = report.main(
        [str(drawn), "--out", str(tmp_path / "out"), "--against", str(published / "results.csv")]
    )
    said = capsys.readouterr().out
    assert code == 1
    for words in ("value differs", "was failed, is ok", "only fresh"):
        assert words in said
    loose = ["--against", str(published), "--tolerance", "0.01"]
    report.main([str(drawn), "--out", str(tmp_path / "out"), *loose])
    assert "value differs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
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
