"""What a recipe of distillation is made of, and that its numbers, where nothing is said, are those of its source."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from methods.distill import distillm, gkd
from methods.distill._rollouts import Writer
from methods.find import catalogue
from methods.stage import Parent
from methods.term import of

TEACHER = Parent("model.new-000000000000")
TERMS: dict[str, dict[str, Any]] = {
    "forward_kl": {"temperature": 1.0, "scale_by_temperature": True, "rest": "tail", "positions": "answers"},
    "reverse_kl": {"temperature": 1.0, "scale_by_temperature": False},
    "jsd": {"beta": 0.5, "temperature": 1.0, "scale_by_temperature": False},
    "symmetric_kl": {"share": 0.9},
    "skew_forward_kl": {"skew": 0.1},
    "skew_reverse_kl": {"skew": 0.1},
    "akl": {"mu": 0.5, "variant": "published"},
    "taid": {"t_start": 0.4, "t_end": 1.0, "alpha": 5e-4, "beta": 0.99},
    "dkd": {"alpha": 1.0, "beta": 0.5, "temperature": 1.0, "scale_by_temperature": True},
    "dist": {"beta": 1.0, "gamma": 1.0, "temperature": 1.0, "epsilon": "added"},
    "squarehead": {"layers": "same", "padding": False},
    "nd": {"least_seen": 8},
    "uld": {"weight": 1.5, "student_temperature": 1.0, "teacher_temperature": 1.0,
            "skip_student_end": True, "skip_teacher_end": False, "alignment": "causal"},
    "own_past": {"weight": 0.3, "temperature": 5.0, "scale_by_temperature": True, "past_epochs": 3, "start_epoch": 5},
    "dac_kl": {"inputs": 64, "least_mass": 0.9, "keep_target": True, "renormalise": True, "window": "soft"},
    "policy_gradient": {"clip_ratio": 0.2, "temperature": 1.0},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "forward_kl": {"alpha": 1.0, "temperature": 1.0, "scale_by_temperature": True},
    "squarehead": {"cross_entropy": 1.0, "kl": 1.0, "squarehead": 1.0, "temperature": 1.0, "kl_labels": "shifted"},
    "gkd": {"fraction": 0.5, "beta": 0.5, "temperature": 1.0, "sampling_temperature": 0.9, "max_new_tokens": 128},
    "distillm": {"direction": "reverse", "skew": 0.1, "capacity": 1000, "threshold": 0.0, "rise": 0.1,
                 "tolerance": 0.1, "validate_every": None},
    "minillm": {"teacher_share": 0.2, "reward_scale": 0.5, "reward_limit": 100.0, "gamma": 0.95, "passes": 4,
                "rollouts": 256, "max_new_tokens": 256, "clip_ratio": 0.2, "single_step": 1.0, "language_model": 1.0,
                "kd_share": 0.5, "whiten": True, "returns": "remaining"},
    "ast": {"cross_entropy": 0.33, "kl": 0.67, "squarehead": 0.0, "temperature": 2.0, "decay": 6e-5,
            "decay_rise": 0.25, "every": 10, "pattern": "2:4"},
    "cast": {"cross_entropy": 0.33, "kl": 0.67, "squarehead": 0.0, "temperature": 2.0, "every": 10, "pattern": "2:4"},
    "matryoshka_kv": {"cross_entropy": 0.75, "kl": 0.25, "temperature": 1.0, "positions": "all", "keep": 0.5,
                      "ranks": tuple(number / 8 for number in range(1, 9)), "epochs": 1.0},
    "mgsr": {"cross_entropy": 1.0, "corrections": 1, "fraction": 1.0},
    "own_past": {"strength": 0.3, "temperature": 5.0, "past_epochs": 3, "start_epoch": 5},
}  # fmt: skip
RATES = {"ast": 2e-4, "cast": 2e-4, "matryoshka_kv": 1e-3, "minillm": 5e-6}


def defaults(config: Any) -> dict[str, Any]:
    """What each option is where it is left out."""
    return {item.name: item.default for item in dataclasses.fields(config)}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_that_of_its_source(name: str) -> None:
    found = defaults(catalogue().component("term", name).load().Config)
    assert {option: found[option] for option in TERMS[name]} == TERMS[name]
    assert found["weight"] == TERMS[name].get("weight", 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_that_of_its_source(name: str) -> None:
    found = defaults(catalogue().method(f"distill.{name}").load().Config)
    assert {option: found[option] for option in METHODS[name]} == METHODS[name]


@pytest.mark.parametrize("name", RATES)
def test_a_learning_rate_is_that_of_its_source(name: str) -> None:
    found = defaults(catalogue().method(f"distill.{name}").load().Config)["optimizer"]
    assert (found.name, found.options["learning_rate"]) == ("adamw", RATES[name])


# Options of a recipe, each another number, and the terms that they become.
RECIPES: list[Any] = [
    (
        "gkd",
        {"beta": 0.2, "temperature": 2.0, "sampling_temperature": 0.7},
        [of("jsd", beta=0.2, temperature=2.0)],
    ),
    ("distillm", {"direction": "forward", "skew": 0.3}, [of("skew_forward_kl", skew=0.3)]),
    ("distillm", {"direction": "reverse", "skew": 0.3}, [of("skew_reverse_kl", skew=0.3)]),
    (
        "minillm",
        {"clip_ratio": 0.1, "temperature": 2.0, "single_step": 3.0, "language_model": 5.0, "kd_share": 0.2},
        [
            of("policy_gradient", clip_ratio=0.1, temperature=2.0),
            of("reverse_kl", weight=3.0, temperature=2.0),
            of("cross_entropy", weight=4.0),
            of("forward_kl", weight=1.0),
        ],
    ),
    *(
        (
            name,
            {"cross_entropy": 2.0, "kl": 3.0, "squarehead": 4.0, "temperature": 5.0, "positions": "all"},
            [
                of("cross_entropy", weight=2.0),
                of("forward_kl", weight=3.0, temperature=5.0, positions="all"),
                of("squarehead", weight=4.0),
            ],
        )
        for name in ("ast", "cast")
    ),
    (
        "matryoshka_kv",
        {"cross_entropy": 2.0, "kl": 3.0, "temperature": 5.0, "positions": "answers"},
        [of("cross_entropy", weight=2.0), of("forward_kl", weight=3.0, temperature=5.0)],
    ),
    (
        "lingu_distill",
        {"cross_entropy": 2.0, "kl": 3.0, "temperature": 5.0},
        [of("selective", cross_entropy=2.0, kl=3.0, temperature=5.0)],
    ),
    (
        "mgsr",
        {"cross_entropy": 2.0},
        [of("cross_entropy", weight=2.0), of("dac_kl"), of("span_consistency")],
    ),
]


@pytest.mark.parametrize(("name", "options", "terms"), RECIPES)
def test_options_of_a_recipe_go_into_its_terms(name: str, options: dict[str, Any], terms: list[Any]) -> None:
    module = catalogue().method(f"distill.{name}").load()
    found = module.terms(module.Config(teacher=TEACHER, **options))
    chosen = list(found.values()) if isinstance(found, dict) else list(found)
    filled = [of(each.name, **each.options) for each in chosen]
    assert sorted(filled, key=str) == sorted(terms, key=str)


def test_the_policy_gradient_and_the_single_step_are_about_what_was_written() -> None:
    minillm, mgsr = (catalogue().method(f"distill.{name}").load() for name in ("minillm", "mgsr"))
    written = minillm.term_parts(minillm.Config(teacher=TEACHER))
    assert written == {"policy_gradient": "rollouts", "reverse_kl": "rollouts"}
    revised = mgsr.term_parts(mgsr.Config(teacher=TEACHER))
    assert revised == {"dac_kl": "revised", "span_consistency": "revised"}


@pytest.mark.parametrize("module", [gkd, distillm])
def test_the_student_writes_at_the_sampling_temperature(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        """Carries the temperature out."""

    def note(setting: Any, temperature: float, *beside: Any) -> None:
        raise Seen(temperature)

    monkeypatch.setattr(Writer, "of", note)
    setting: Any = SimpleNamespace(
        examples=[], student_folder="", stage=SimpleNamespace(rows=lambda name: []), tokenizer=None, steps=1
    )
    monkeypatch.setattr("methods.data.Style.read", lambda folder: None)
    monkeypatch.setattr("methods.data.encode", lambda *_: [])
    monkeypatch.setattr(distillm, "Validation", lambda *_: None)
    options = {"teacher": TEACHER, "sampling_temperature": 0.7}
    with pytest.raises(Seen) as found:
        module.writing(module.Config(**options), setting)
    assert found.value.args == (0.7,)
