"""The project as a whole: what is installed, what is imported when, what the documents name."""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest

from methods.find import Catalogue, Found, catalogue
from methods.stage import Parent
from workflows.options import fields_of

ROOT = Path(__file__).resolve().parent.parent
OWN_PACKAGES = {"assay", "methods", "workflows", "evaluations", "tests"}
# Folders of somebody's machine, and addresses of package indexes. Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.$~<>{}-])/(?:root|home|work|Users|mnt|srv)/[\w.-]")
REGISTRY = re.compile(
    r"https?://[^\s\"')]*(?:pypi|pythonhosted|download\.pytorch|artifactory|nexus|/simple\b)"
)
CITATION = re.compile(r"et al\.|arXiv|\b(?:19|20)\d\d\b|\"[A-Z][^\"\n]{3,}\"")
# Quantities the harness defines itself, and stages that make a model from nothing: no paper to cite.
WITHOUT_A_PAPER = {"perplexity", "retain_kl", "size", "speed", "model.new", "model.smoke"}
EVERYTHING = [
    *catalogue().methods.values(), *catalogue().components.values(), *catalogue().evaluations.values()
]  # fmt: skip


@cache
def tracked() -> list[Path]:
    """The files git tracks or would track; all of them where there is no git, build products left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    hidden = re.compile(r"/\.(?!ci/)[^/]+/|/__pycache__/|\.egg-info/|/results/(?!published)")
    return [
        path for path in ROOT.rglob("*") if path.is_file() and not hidden.search(f"/{path.relative_to(ROOT)}")
    ]


def texts() -> Iterator[tuple[str, str]]:
    """Name and text of every tracked text file."""
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content[:8000] and path.suffix not in (".png", ".parquet", ".safetensors"):
            yield str(path.relative_to(ROOT)), content.decode("utf-8")


# --- what is installed -------------------------------------------------------------------------------------------


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    lines = (ROOT / "envs" / "requirements.lock").read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(equals for _, equals, _ in pins), "every line of the lock is name==version"
    return {normal(name): version for name, _, version in pins}


def imported(path: Path) -> set[str]:
    """The top-level packages a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - OWN_PACKAGES - set(sys.stdlib_module_names)


def test_the_lock_installs_every_package_that_is_imported() -> None:
    distributions = packages_distributions()
    wanted = {
        name: path
        for path in tracked()
        if path.suffix == ".py"
        for name in imported(path)
        if not path.with_name(f"{name}.py").is_file()  # a module beside the script
    }
    pins = locked()
    missing = {
        f"{name} ({path.relative_to(ROOT)})"
        for name, path in wanted.items()
        if not any(normal(found) in pins for found in distributions.get(name, [name]))
    }
    assert not missing, f"imported, but not in envs/requirements.lock: {', '.join(sorted(missing))}"


def test_the_lock_names_versions_only() -> None:
    pins = locked()
    assert all(re.fullmatch(r"[0-9][0-9A-Za-z.]*", version) for version in pins.values())
    assert pins["torch"] == "2.13.0"


def test_what_the_project_declares_is_in_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {normal(re.split(r"[<>=!~\[ ;]", requirement)[0]) for requirement in declared}
    assert names <= set(locked())


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


# --- what is written ------------------------------------------------------------------------------------------------


def test_no_tracked_file_names_a_machine_or_a_package_index() -> None:
    found = [
        f"{name}: {match.group()}"
        for name, text in texts()
        for match in (*MACHINE_PATH.finditer(text), *REGISTRY.finditer(text))
    ]
    assert not found, "\n".join(found)


def test_text_files_end_with_one_newline() -> None:
    wrong = [name for name, text in texts() if text and (not text.endswith("\n") or text.endswith("\n\n"))]
    assert not wrong, f"no newline, or an empty line, at the end of: {', '.join(wrong)}"


@pytest.mark.parametrize("found", EVERYTHING, ids=lambda found: found.name)
def test_a_docstring_names_its_source(found: Found) -> None:
    documentation = ast.get_docstring(ast.parse(found.path.read_text(encoding="utf-8")))
    assert documentation, f"{found.name} has no docstring"
    if found.name not in WITHOUT_A_PAPER:
        assert CITATION.search(documentation), (
            f"{found.name}: the docstring cites nothing (authors, title or year)"
        )


def tree_of(document: str) -> list[str]:
    """The paths in the first code block under the heading "The tree"; indentation by two spaces is nesting."""
    block = document.split("## The tree", 1)[1].split("```")[1].split("\n", 1)[1]
    folders: list[str] = []
    paths = []
    for line in filter(None, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_tree_in_the_readme_names_only_files_that_exist() -> None:
    paths = tree_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(paths) > 50
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"README names what does not exist: {', '.join(missing)}"


def test_links_between_documents_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/published/README.md"):
        document = ROOT / name
        text = re.sub(r"<!--.*?-->", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (document.parent / target).exists(), f"{name} links to {target}, which does not exist"


# --- what is imported when ---------------------------------------------------------------------------------------


def test_the_planner_reads_every_method_without_heavy_imports() -> None:
    program = """
import sys
from methods.find import catalogue
import workflows.plan, workflows.experiment, workflows.job, methods.data, methods.world
found = catalogue()
for table in (found.methods, found.components, found.evaluations):
    for entry in table.values():
        entry.load()
        heavy = {"torch", "transformers", "datasets", "pandas", "lm_eval", "peft"} & set(sys.modules)
        if heavy:
            sys.exit(f"{entry.name} imports {', '.join(sorted(heavy))} at module level")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


# --- the worked example ------------------------------------------------------------------------------------------


def example(heading: str) -> str:
    """The first Python block under a heading of CONTRIBUTING."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.split(heading, 1)[1].split("```python\n", 1)[1].split("```", 1)[0]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """The five examples of CONTRIBUTING, as a folder for ``--config methods=``."""
    folder = tmp_path_factory.mktemp("examples")
    for heading, name in (
        ("### A method", "unlearn/capped_ascent.py"),
        ("### A distillation term", "term/mine.py"),
        ("### A producer of an assignment", "search/mine.py"),
        ("### A component", "schedule/halving.py"),
        ("### An evaluation", "evaluations/largest_weight.py"),
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(example(heading), encoding="utf-8")
    return Catalogue([folder])


def test_the_examples_in_contributing_are_found_where_they_lie(outside: Catalogue) -> None:
    for found in (
        outside.method("unlearn.capped_ascent"),
        outside.method("search.mine"),
        outside.component("term", "mine"),
        outside.component("schedule", "halving"),
        outside.evaluation("largest_weight"),
    ):
        config = found.load().Config
        assert config.__dataclass_params__.frozen
        assert {option.name for option in fields_of(config)} == {
            field.name for field in dataclasses.fields(config)
        }


def test_the_example_method_gives_the_number_worked_out_by_hand(outside: Catalogue) -> None:
    """Two tokens with p = 1/2 and p = 1/8 under a cap of log 4: the terms are log 2 and log 4, their mean 1.5 log 2."""
    import torch

    from methods.data import Part

    probabilities = torch.tensor([[[0.5, 0.5, 0.0], [0.125, 0.375, 0.5], [1 / 3, 1 / 3, 1 / 3]]])
    ids = torch.zeros(1, 3, dtype=torch.int64)
    labels = torch.tensor([[-100, 0, 0]])
    part = Part(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, name="forget")
    method = outside.method("unlearn.capped_ascent").load()
    config = method.Config(cap=math.log(4), alpha=0.0)
    terms = method.loss(
        config,
        lambda **_: SimpleNamespace(logits=probabilities.log()),
        SimpleNamespace(forget=part, retain=part),
        None,
    )
    value = sum(float(term.sum) * term.weight / term.count for term in terms.values())
    assert value == pytest.approx(-1.5 * math.log(2), abs=1e-6)


def test_the_example_term_is_the_distance_worked_out_by_hand(outside: Catalogue) -> None:
    """Of (1/2, 1/2) from (1, 0) it is 1 - sqrt(1/2), of equal distributions 0; an entry of -inf adds nothing."""
    import torch

    term = outside.component("term", "mine").load()
    teacher = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    logits = torch.tensor([[0.0, -math.inf], [0.0, math.log(3)]], requires_grad=True)
    values = term.divergence(term.Config(), teacher.log(), logits.log_softmax(-1))
    assert values.tolist() == pytest.approx([1 - math.sqrt(0.5), 0.0], abs=1e-6)
    values.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_the_example_allocator_meets_the_budget_exactly(outside: Catalogue) -> None:
    """mean|W| / std(W) of (1, -1, 1, -1) is sqrt(3)/2, of (3, 1, 0, 0) it is 1/sqrt(2): the second one loses more.

    Of four weights each loses 2 at level 0. With a reach of 1/4 the second layer is to have 3 zeros and the first 1.
    """
    import torch

    from methods.levels._database import Database, Level, Unit

    levels = tuple(Level(str(offset), 2 + offset, (2 + offset) / 4) for offset in (-1, 0, 1))
    units = [Unit(name, 0, "weights", 2, 2, levels) for name in ("even", "uneven")]
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in ("even", "uneven")})
    model.requires_grad_(False)
    model["even"].weight.data = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    model["uneven"].weight.data = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    database = Database(Path("levels"), "sparsity", units, {})
    method = outside.method("search.mine").load()
    assignment = method.search(
        method.Config(levels=Parent("levels"), reach=0.25),
        SimpleNamespace(levels=lambda _: database, model=model),
    )
    assert assignment.levels == {"even": "-1", "uneven": "1"}
    assert assignment.about["scores"] == pytest.approx({"even": math.sqrt(3) / 2, "uneven": 1 / math.sqrt(2)})
    assert assignment.spent == {"weights": 4}
    assignment.check(database)


def test_the_example_schedule_halves(outside: Catalogue) -> None:
    schedule = outside.component("schedule", "halving").load()
    factors = [schedule.factor(schedule.Config(every_steps=10), step, 100) for step in (0, 9, 10, 25)]
    assert factors == [1.0, 1.0, 0.5, 0.25]


def test_the_example_evaluation_reads_the_weights(outside: Catalogue) -> None:
    import torch

    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    (row,) = outside.evaluation("largest_weight").load().evaluate(SimpleNamespace(model=lambda: layer))
    assert (row.metric, row.value) == ("largest_weight", 3.0)
