"""Every method, found by where its file lies: its form, that it does its work, and that every option is live.

A new method is tested without a line here; ``tests/generic.py`` says what it may need.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from methods.find import Found, catalogue
from methods.loop import Training
from methods.stage import AssayError
from tests.generic import (
    DATA_OF,
    DESCENT,
    FORGET,
    Case,
    cases,
    descending,
    inner,
    kind_of,
    needed_options,
    nll,
    resolved,
    run,
    small_options,
    tensors,
    usual,
    world,
)
from workflows import code
from workflows.notation import Call, Name
from workflows.options import fields_of
from workflows.parts import parts_of
from workflows.shorthands import is_shorthand

METHODS = list(catalogue().methods.values())
SHORTHANDS = [method for method in METHODS if is_shorthand(method)]
STAGES = [method for method in METHODS if method not in SHORTHANDS]
COMPONENTS = list(catalogue().components.values())
EVALUATIONS = list(catalogue().evaluations.values())
SHARED = {field.name for field in dataclasses.fields(Training)}
GRADIENT = [method for method in METHODS if issubclass(method.load().Config, Training)]
# The loop's own options go through the same code in every method that a family's ``run`` starts: one of each is asked.
ASKED = ("train.sft", "unlearn.grad_diff", "distill.forward_kl")
CASES = [
    case
    for method in STAGES
    for case in cases(method)
    if case.option.name not in SHARED or method.name in ASKED or hasattr(method.load(), "run")
]
SHORTHAND_CASES = [case for method in SHORTHANDS for case in cases(method)]
# Local pruners that leave the same share of zeros in every matrix.
EVERY_MATRIX = ("prune.magnitude", "prune.wanda", "prune.sparsegpt")
CITATION = re.compile(r'et al\.|"[A-Z][^"]+"|arXiv|[A-Za-z][\w-]+/[A-Za-z][\w.-]+')


def name_of(found: Found) -> str:
    return found.name


def private_pieces(found: Found) -> set[str]:
    """The ``_x.py`` with a REVISION of their own that a file imports, itself or through others that have none."""
    pieces: set[str] = set()
    seen, todo = set(), private_imports(found.path)
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        try:
            pieces |= {module} if code.revision(module) else set()
        except AssayError:
            todo |= private_imports(code.ROOT.joinpath(*module.split(".")).with_suffix(".py"))
    return pieces


def private_imports(path: Path) -> set[str]:
    """The modules ``methods.family._x`` that a file imports anywhere but for its annotations."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in skipped
    ]
    names = {node.module or "" for node in imports}
    names |= {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    return {name for name in names if re.fullmatch(r"methods\.\w+\._[a-z]\w*", name) and is_file(name)}


def is_file(module: str) -> bool:
    return code.ROOT.joinpath(*module.split(".")).with_suffix(".py").is_file()


def of_family(*families: str) -> list[Found]:
    return [method for method in METHODS if method.family in families]


def options_of(method: Found) -> set[str]:
    return {option.name for option in fields_of(method.load().Config)}


def forgetting() -> list[Found]:
    """The unlearning methods that are told what to forget: not those that work on weights or retain rows alone."""
    return [method for method in of_family("unlearn") if "forget" in options_of(method)]


# --- form ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [*METHODS, *COMPONENTS, *EVALUATIONS], ids=name_of)
def test_the_config_is_a_frozen_dataclass(found: Found) -> None:
    config: Any = found.load().Config
    assert dataclasses.is_dataclass(config)
    assert getattr(config, "__dataclass_params__").frozen  # noqa: B009 — mypy does not know it


@pytest.mark.parametrize("found", [*METHODS, *COMPONENTS, *EVALUATIONS], ids=name_of)
def test_a_comment_stands_above_each_option(found: Found) -> None:
    bare = [name for owner in found.load().Config.__mro__[:-1] for name in options_without_comment(owner)]
    assert bare == []


def options_without_comment(owner: type) -> list[str]:
    lines = textwrap.dedent(inspect.getsource(owner)).splitlines()
    body = ast.parse("\n".join(lines)).body[0]
    assert isinstance(body, ast.ClassDef)
    stated = (item for item in body.body if isinstance(item, ast.AnnAssign))
    return [
        ast.unparse(item.target) for item in stated if not lines[item.lineno - 2].lstrip().startswith("#")
    ]


@pytest.mark.parametrize("found", [*METHODS, *COMPONENTS], ids=name_of)
def test_the_text_says_where_it_comes_from(found: Found) -> None:
    assert CITATION.search(" ".join((found.load().__doc__ or "").split()))


@pytest.mark.parametrize("found", EVALUATIONS, ids=name_of)
def test_an_evaluation_says_what_it_measures(found: Found) -> None:
    assert len((found.load().__doc__ or "").strip()) > 80


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_method_says_whether_it_draws_random_numbers(method: Found) -> None:
    assert type(method.load().SEEDED) is bool


@pytest.mark.parametrize("found", [*METHODS, *COMPONENTS, *EVALUATIONS], ids=name_of)
def test_what_it_uses_has_a_revision(found: Found) -> None:
    family = [f"methods.{found.family}"] if found in METHODS else []
    for module in (*getattr(found.load(), "USES", ()), *family):
        assert code.revision(module) >= 1


@pytest.mark.parametrize("found", [*STAGES, *COMPONENTS], ids=name_of)
def test_a_private_piece_with_a_revision_is_named_by_what_imports_it(found: Found) -> None:
    """Or a change of what it computes would leave the ids of old jobs as they are."""
    assert private_pieces(found) <= set(getattr(found.load(), "USES", ()))


@pytest.mark.parametrize("found", [*METHODS, *COMPONENTS, *EVALUATIONS], ids=name_of)
def test_the_defaults_are_valid(found: Found) -> None:
    call = resolved(found, needed_options(found))
    assert dataclasses.is_dataclass(call.config)


# --- it does its work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", forgetting(), ids=name_of)
def test_unlearning_raises_the_loss_on_what_is_to_be_forgotten(method: Found) -> None:
    options = {"optimizer": Call("adamw", (("learning_rate", 0.01),)), "batch": 8}
    outcome = run(method.name, **{name: options[name] for name in options_of(method) & options.keys()})
    assert nll(outcome.folder / "model", FORGET) > nll(world().parents["whole"], FORGET) + 0.2


@pytest.mark.parametrize("method", of_family("train", "distill"), ids=name_of)
def test_every_term_that_is_trained_falls(method: Found) -> None:
    teacher: dict[str, Any] = {"teacher": Name("whole")} if "teacher" in options_of(method) else {}
    outcome = run(method.name, parent="other", batch=18, **teacher)
    assert outcome.curve
    for name, values in outcome.curve.items():
        assert values[-1] < 0.98 * values[0], name
    kind = kind_of(method)
    data, before = DATA_OF[kind][0], world().of_kind(kind)["other"]
    # A model whose cache became narrower is compared with what it would be without training elsewhere.
    if "kv_cache_share" not in outcome.notes:
        assert nll(outcome.folder / "model", data) < nll(before, data)


@pytest.mark.parametrize("method", [found for found in of_family("prune") if found in STAGES], ids=name_of)
def test_pruning_meets_the_budget_exactly(method: Found) -> None:
    """Fewer weights that are not zero, fewer bits for each, or fewer weights altogether."""
    outcome = usual(method.name)
    notes = outcome.notes
    matrices = {name: weight for name, weight in outcome.weights.items() if name.endswith("proj.weight")}
    assert len(matrices) == 14
    assert (
        notes["nonzero_after"] < notes["nonzero_before"]
        or notes.get("bits_per_weight", 32.0) < 16.0
        or notes.get("parameters_physical", notes["parameters"]) < notes["parameters"]
    )
    if method.name in EVERY_MATRIX:
        wanted = outcome.config.sparsity
        assert {
            name: float((weight == 0).double().mean()) for name, weight in matrices.items()
        } == dict.fromkeys(matrices, wanted)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_the_result_is_one_that_the_runner_publishes(method: Found) -> None:
    """``run`` checks the runner's promises: the model loads, is finite, and is spoken to as before."""
    outcome = run(method.name)
    for part in parts_of(method.load()):
        assert any((outcome.folder / part).iterdir()), part


# --- promises ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GRADIENT, ids=name_of)
def test_zeros_stay_zeros(method: Found) -> None:
    outcome, before = run(method.name, parent="sparse"), tensors(world().of_kind(kind_of(method))["sparse"])
    zeros = {name: weight == 0 for name, weight in before.items() if inner(name, weight)}
    assert zeros and all(float(mask.double().mean()) > 0.29 for mask in zeros.values())
    assert all(bool((outcome.weights[name][mask] == 0).all()) for name, mask in zeros.items())
    # Where projections are trained in the place of weights, those do not move at all.
    trained = "kv_cache_share" not in outcome.notes
    assert all(outcome.weights[name].equal(before[name]) is not trained for name in zeros)


@pytest.mark.parametrize("method", STAGES, ids=name_of)
def test_the_same_seed_gives_the_same_bits(method: Found) -> None:
    if not getattr(method.load(), "DETERMINISTIC", True):
        pytest.skip(f"{method.name} says that it cannot")
    assert run(method.name).result == usual(method.name).result


@pytest.mark.parametrize("method", STAGES, ids=name_of)
def test_another_seed_gives_another_result_if_and_only_if_the_method_is_seeded(method: Found) -> None:
    assert (usual(method.name, seed=1).files != usual(method.name).files) == method.load().SEEDED


def variants() -> list[Any]:
    """Every gradient method as it is, and with a second value of each option of its own."""
    plain = [pytest.param(method, {}, id=method.name) for method in GRADIENT]
    plain_weights = {"gamma", "alpha"}
    own = [
        case for case in CASES if case.found in GRADIENT and case.option.name not in SHARED | plain_weights
    ]
    return plain + [
        pytest.param(case.found, {**case.change.beside, case.option.name: case.change.value}, id=str(case))
        for case in own
        if case.option.kind != "dataset" and not case.option.reference
    ]


@pytest.mark.parametrize(("method", "options"), variants())
def test_micro_batches_of_unequal_lengths_change_nothing(method: Found, options: dict[str, Any]) -> None:
    """As it is, with a second value of each option of its own, and in 1, 2 and 4 pieces."""
    whole = usual(method.name, optimizer=DESCENT, **options)
    for micro_batch in (2, 1):
        pieces = run(method.name, optimizer=DESCENT, micro_batch=micro_batch, check=False, **options)
        assert pieces.same_weights(whole, tolerance=1e-6), micro_batch


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option_is_live(case: Case) -> None:
    """A second value changes the result; one of an option that says how a job runs leaves the weights as they are."""
    name, change = case.found.name, case.change
    beside = dict(change.beside) | (descending(case.found) if case.option.how else {})
    after = run(name, parent=change.parent, **beside | {case.option.name: change.value})
    if change.refused:
        with pytest.raises(AssayError):
            run(name, parent=change.parent, **beside)
        return
    before = usual(name, parent=change.parent, **beside)
    if case.option.how:
        assert after.same_weights(before, tolerance=1e-6)
    else:
        assert after.result != before.result


@pytest.mark.parametrize("case", SHORTHAND_CASES, ids=str)
def test_every_option_of_a_shorthand_goes_into_its_steps(case: Case) -> None:
    """The steps' own options are live; a shorthand only hands them on."""
    small, change = small_options(case.found), case.change
    options = {**small, **change.beside}
    before = resolved(case.found, options).config
    after = resolved(case.found, options | {case.option.name: change.value}).config
    expand = case.found.load().expand
    assert expand(after) != expand(before)
