# ruff: noqa: E501 — a table reads better with one case a line
"""Bad input: every malformed experiment is answered with one sentence, before anything runs, and changes no file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from methods.stage import AssayError
from workflows import plan

GOOD = """\
title: A toy
country: FRA
seeds: [0, 1]
models:
  base: {new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16}
chains:
  target: base > train.sft(data="authors/forget01", steps=2, batch=4)
  pruned: target > prune.magnitude(sparsity={0.25, 0.5})
evaluate:
  size: size
"""
STEPS = 'base > train.sft(data="authors/forget01", steps=2, batch=4)'

# (what is wrong, text to replace, replacement, part of the sentence)
MALFORMED = [
    ("no YAML", "title: A toy", "title: [", "no YAML"),
    ("no mapping", GOOD, "- a\n- b\n", "is a mapping with title"),
    ("a missing key", "title: A toy\n", "", "'title' is missing"),
    ("no chains", GOOD[GOOD.index("chains:") : GOOD.index("evaluate:")], "", "'chains' is missing"),
    ("an unknown key", "seeds:", "seed:", "did you mean 'seeds'"),
    ("a key twice", "country: FRA", "country: FRA\ncountry: DEU", "given twice"),
    ("an anchor", "title: A toy", "title: &t A toy", "anchors"),
    ("a tag", "title: A toy", "title: !!python/name:os.system x", "tags such as"),
    ("Norway", "country: FRA", "country: NO", "write NOR"),
    ("a country in words", "country: FRA", "country: France", "three-letter code"),
    ("a seed that is text", "seeds: [0, 1]", "seeds: [zero]", "seeds"),
    ("a negative seed", "seeds: [0, 1]", "seeds: [-1]", "seeds"),
    ("a seed twice", "seeds: [0, 1]", "seeds: [0, 0]", "given twice"),
    ("no seeds", "seeds: [0, 1]", "seeds: []", "seeds"),
    ("a chain broken by a comment", STEPS, "base > train.sft(data= # x", "single quotes"),
    ("a chain that is a mapping", STEPS, "{a, b}", "single quotes"),
    ("a name with capitals", "  pruned:", "  Pruned:", "is no name"),
    ("a model and a chain of one name", "  pruned:", "  base:", "a model and a chain"),
    ("a model of two kinds", "{new: llama,", "{path: x, new: llama,", "unknown option 'path'"),
    ("a hub model without revision", "{new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16}", "{hf: a/b}", "revision"),
    ("a short revision", "{new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16}", "{hf: a/b, revision: main}", "revision"),
    ("a model folder that is not there", "{new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16}", "{path: nowhere}", "config.json"),
    ("a model outside the data folder", "{new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16}", "{data: ../x}", ".."),
    ("an absolute model path below data", "{new: llama, hidden: 16, layers: 1, heads: 2, mlp: 16}", "{data: /etc}", "/etc"),
    ("a new model of no kind", "new: llama", "new: lama", "kind"),
    ("a new model with an unknown option", "hidden: 16", "hiden: 16", "did you mean 'hidden'"),
    ("heads that do not divide", "heads: 2", "heads: 3", "heads=3"),
    ("an unknown method", "train.sft", "train.sfft", "did you mean 'train.sft'"),
    ("an unknown family", "train.sft", "trian.sft", "did you mean 'train.sft'"),
    ("an unknown option", "steps=2", "stepps=2", "did you mean 'steps'"),
    ("a wrong type", "steps=2", 'steps="two"', "steps"),
    ("a fraction of a step", "steps=2", "steps=2.5", "steps"),
    ("a truth for a number", "steps=2", "steps=True", "steps"),
    ("a value out of range", "steps=2", "steps=0", "greater than 0"),
    ("a sparsity above one", "{0.25, 0.5}", "1.5", "less than 1"),
    ("a sweep with equal elements", "{0.25, 0.5}", "{0.5, 0.5}", "twice"),
    ("an empty sweep", "{0.25, 0.5}", "{}", "sparsity"),
    ("an unknown data set", "authors/forget01", "authors/forget02", "did you mean 'authors/forget"),
    ("a data set outside", "authors/forget01", "../../etc/passwd", ".."),
    ("an absolute data set", "authors/forget01", "/etc/passwd", "/etc/passwd"),
    ("shell characters in a data set", "authors/forget01", "authors/$(touch x);", "authors"),
    ("an unknown chain", "target > prune", "targte > prune", "did you mean 'target'"),
    ("a circle", STEPS, "pruned > prune.magnitude(sparsity=0.5)", "circle"),
    ("a chain that needs itself", "base > train.sft(", "base > train.sft(head=target, ", "target is no value for head"),
    ("text for a reference", "target > prune.magnitude(sparsity={0.25, 0.5})", 'target > distill.forward_kl(teacher="target")', "without quotes"),
    ("a name for a text", 'data="authors/forget01"', "data=authors", "text needs quotes"),
    ("a truth as YAML has it", "steps=2", "steps=2, keep_zeros=true", "write True"),
    ("a component without brackets", "steps=2", "steps=2, schedule=linear", "write schedule=linear()"),
    ("an unknown component", "steps=2", "steps=2, schedule=liner()", "did you mean"),
    ("a component of the wrong kind", "steps=2", "steps=2, schedule=adamw(learning_rate=0.1)", "adamw is a component of kind optimizer; there is no component of kind schedule"),
    ("a component in quotes", "steps=2", 'steps=2, schedule="linear"', "write linear(), without quotes"),
    ("one of several components without brackets", "target > prune.magnitude(sparsity={0.25, 0.5})", "target > distill.mix(teacher=target, terms=[tvd])", "write terms=[tvd()]"),
    ("pairs that are no pairs", "target > prune.magnitude(sparsity={0.25, 0.5})", "target > distill.mix(teacher=target, terms=[hidden_mse(layers=[[1, 2, 3]])])", "list should have at most 2 items"),
    ("one number for a list", "steps=2", "steps=2, checkpoints=1", "should be a valid list"),
    ("a chain in quotes", 'data="authors/forget01"', 'data="pruned"', "'pruned' is no data set but a chain"),
    ("a component for a number", "steps=2", "steps=linear()", "takes no component"),
    ("a family not pinned", "base > train", "pruned > train", "circle"),
    ("a reference to a family", "  size: size", "  d: 'retain_kl(data=\"authors/retain90\", reference=pruned)'", "pruned[sparsity=0.25]"),
    ("a member that is not there", "  size: size", "  size: {run: size, of: ['pruned[sparsity=0.9]']}", "is no member"),
    ("a seed that is not there", "  size: size", "  size: {run: size, of: ['target@7']}", "no seed 7"),
    ("a step that was not kept", "  size: size", "  size: {run: size, of: ['target@step1']}", "checkpoints=[1]"),
    ("an unknown evaluation", "  size: size", "  size: sise", "did you mean 'size'"),
    ("a swept evaluation", "  size: size", '  size: "{size, speed}"', "cannot be swept"),
    ("an evaluation of nothing", "  size: size", "  size: {run: size, of: [trget]}", "did you mean 'target'"),
    ("a table of an unknown entry", "  size: size", "  size: size\ntables: {t: {rows: chain, columns: [sise.bytes]}}", "did you mean 'size'"),
    ("a stage without a model", 'target > prune.magnitude(sparsity={0.25, 0.5})', "prune.magnitude(sparsity=0.5)", "needs a model to start from"),
    ("a stage that is a word", "target > prune.magnitude(sparsity={0.25, 0.5})", "target > magnitude", "magnitude"),
    ("too long a chain", STEPS, "base > " + " > ".join(["prune.magnitude(sparsity=0.5)"] * 200), "4000 characters"),
    ("too deep a chain", STEPS, '"base > train.sft(data=' + "(" * 250 + ")" * 250 + ')"', "cannot be read"),
]  # fmt: skip


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("text", "replacement", "part"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
def test_a_malformed_experiment_is_answered_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, replacement: str, part: str
) -> None:
    assert text in GOOD
    (tmp_path / "bad.yaml").write_text(GOOD.replace(text, replacement, 1))
    monkeypatch.chdir(tmp_path)
    before = _files(tmp_path)
    with pytest.raises(AssayError) as caught:
        plan.load({"experiment": "bad.yaml"})
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _files(tmp_path) == before


def test_the_good_experiment_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    built = plan.load({"experiment": "good.yaml"})
    assert len(built.points) == 2 + 4
    assert len(built.shown) == 6


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"experiment": "tinny"}, "did you mean 'tiny'"),
        ({"experiment": "nowhere.yaml"}, "no such file"),
        ({"experimant": "tiny"}, "did you mean 'experiment'"),
        ({"scale": "smok"}, "did you mean 'smoke'"),
        ({"data": "nowhere"}, "no such folder"),
        ({"methods": "nowhere"}, "no such folder"),
        ({"keep_stale": "maybe"}, "true or false"),
        ({"results": ""}, "needs the path"),
    ],
)
def test_a_wrong_setting_is_answered_with_a_sentence(config: dict[str, str], part: str) -> None:
    with pytest.raises(AssayError) as caught:
        plan.load(config)
    assert part in str(caught.value)


def test_a_file_over_a_megabyte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text(GOOD + "# " + "x" * 1_000_000)
    with pytest.raises(AssayError, match="at most"):
        plan.load({"experiment": str(path)})


def test_the_command_line_prints_the_sentence_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(GOOD.replace("steps=2", "stepps=2"))
    command = [sys.executable, "-m", "workflows.plan", str(tmp_path / "bad.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("assay: ") and "did you mean 'steps'" in done.stderr
    assert "Traceback" not in done.stderr
