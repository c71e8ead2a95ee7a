"""The guard of ``REVISION``: a result that moves although no part of a job's id did would silently be stale."""

from __future__ import annotations

from typing import Any

import pytest

from methods.find import catalogue
from tests import generic
from workflows.shorthands import is_shorthand

METHODS = sorted(name for name, found in catalogue().methods.items() if not is_shorthand(found))
# Rounding differs between processors, by a hundredth of this; 1 % more learning rate moves losses by 4e-4 and more.
NOISE = {"losses": 1e-4, "checksum": 1e-5}
RENEW = "then renew the file with: python -m tests.generic --write"


def verdict(name: str, then: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """What has to be done, as a sentence; empty where nothing has."""
    if then is None:
        return f"tests/numbers.json has no {name}: renew it with: python -m tests.generic --write"
    if now["revisions"] != then["revisions"]:
        return f"{name}: a REVISION was raised, {RENEW}"
    moved = [what for what, noise in NOISE.items() if now[what] != pytest.approx(then[what], rel=noise)]
    if not moved:
        return ""
    if now["code"] != then["code"]:
        return (
            f"{name}: its file and its {' and '.join(moved)} changed together, which gives new ids; {RENEW}"
        )
    modules = ", ".join(now["revisions"])
    before, after = ([numbers[what] for what in moved] for numbers in (then, now))
    return (
        f"{name}: its {' and '.join(moved)} moved from {before} to {after}, but no id did. "
        f"Raise REVISION in what you changed of {modules}; {RENEW}"
    )


@pytest.mark.parametrize("name", METHODS)
def test_no_number_moves_without_a_revision(name: str) -> None:
    said = verdict(name, generic.read_numbers().get(name), generic.numbers_of(name))
    assert not said, said


def test_the_file_names_no_method_that_is_gone() -> None:
    assert set(generic.read_numbers()) <= set(METHODS)


NOW: dict[str, Any] = {
    "losses": [1.0, 2.0],
    "checksum": 5.0,
    "code": {"a.b": "1"},
    "revisions": {"methods.loop": 1, "methods.data": 1},
}


def test_rounding_is_no_movement() -> None:
    assert verdict("a.b", NOW, {**NOW, "losses": [1.0, 2.0001], "checksum": 5.00002}) == ""


def test_a_moved_number_names_the_revisions_to_raise() -> None:
    said = verdict("a.b", NOW, {**NOW, "losses": [1.0, 2.1]})
    assert "losses moved" in said and "Raise REVISION" in said and "methods.loop, methods.data" in said


def test_a_changed_file_asks_for_new_numbers_only() -> None:
    assert "Raise" not in verdict("a.b", NOW, {**NOW, "checksum": 6.0, "code": {"a.b": "2"}})
    assert verdict("a.b", NOW, {**NOW, "code": {"a.b": "2"}}) == ""


def test_a_raised_revision_has_to_be_written_down() -> None:
    raised = {**NOW, "revisions": {"methods.loop": 2, "methods.data": 1}}
    assert "renew the file" in verdict("a.b", NOW, raised)
    assert "renew it" in verdict("a.b", None, NOW)
