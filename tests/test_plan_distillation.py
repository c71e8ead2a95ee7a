"""Planning of distillation: rows from a chain, files that a recipe's terms lie in, the rows' data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from methods.stage import AssayError, Parent
from tests.test_plan import TRAIN, make
from workflows.plan import Plan
from workflows.record import Job

MIX = "target > distill.mix(teacher=target, steps=2, batch=4, terms=[{}])"


def job_of(built: Plan, method: str) -> Job:
    """The only job of a method."""
    return next(job for job in built.jobs.values() if job.method == method)


def test_the_terms_of_a_recipe_are_part_of_its_code(tmp_path: Path) -> None:
    built = make(
        tmp_path,
        {
            "target": TRAIN,
            "kl": "target > distill.forward_kl(teacher=target, alpha=0.5, steps=2, batch=4)",
            "own": "target > distill.gkd(teacher=target, steps=2, batch=4)",
            "mixed": MIX.format("tvd(), cross_entropy()"),
        },
        seeds="[0]",
    )
    terms = {
        method: {name for name in job_of(built, method).code if name.startswith("term.")}
        for method in ("distill.forward_kl", "distill.gkd", "distill.mix")
    }
    assert terms == {
        "distill.forward_kl": {"term.forward_kl", "term.cross_entropy"},
        "distill.gkd": {"term.jsd"},
        "distill.mix": {"term.tvd", "term.cross_entropy"},
    }


def test_a_term_from_outside_is_part_of_the_code_too(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "term"
    folder.mkdir(parents=True)
    mine = folder / "squared.py"
    mine.write_text(
        '"""Squared difference of probabilities, as in Brier 1950."""\n'
        "from dataclasses import dataclass\nfrom methods.term import Softened\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Config(Softened):\n    pass\n\n\n"
        "def divergence(config, log_p, log_q):\n    return (log_p.exp() - log_q.exp()).square().sum(-1)\n"
    )
    chains = {"target": TRAIN, "mixed": MIX.format("squared(temperature=2.0)")}
    built = make(tmp_path, chains, seeds="[0]", methods=str(tmp_path / "mine"))
    assert "term.squared" in job_of(built, "distill.mix").code


def test_rows_may_come_from_a_chain_or_by_name(tmp_path: Path) -> None:
    built = make(
        tmp_path,
        {
            "target": TRAIN,
            "few": 'data.sample(data="authors/forget10", rows=8)',
            "taught": "target > distill.cross_entropy(data=few, steps=2, batch=4)",
        },
        seeds="[0]",
    )
    job = job_of(built, "distill.cross_entropy")
    assert job.parents["data"].id == job_of(built, "data.sample").id
    assert job.parents["data"].kind == "data"
    # The rows' content is that of the stage that writes them.
    assert (
        "authors/forget10" not in job.content and "authors/forget10" in job_of(built, "data.sample").content
    )
    assert job.config["data"] == {"$result": Parent(job.parents["data"].id).id}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ('"few"', "few"),
        ("target", "data=target reads data/, but target ends in train.sft, which writes model/ only"),
        ("fwe", "fwe"),
    ],
)
def test_what_is_no_data_set_and_writes_no_rows_is_refused(tmp_path: Path, data: str, sentence: str) -> None:
    chains = {
        "target": TRAIN,
        "few": 'data.sample(data="authors/forget10", rows=8)',
        "taught": f"target > distill.cross_entropy(data={data}, steps=2, batch=4)",
    }
    with pytest.raises(AssayError, match=sentence):
        make(tmp_path, chains, seeds="[0]")


def test_a_record_of_another_kind_is_refused(tmp_path: Path) -> None:
    chains = {
        "target": TRAIN,
        "levels": "target > levels.magnitude(sparsity=0.5)",
        "taught": "target > distill.mix(recorded=levels, terms=[forward_kl()], steps=2, batch=4)",
    }
    with pytest.raises(
        AssayError, match="recorded=levels reads the files of a teacher stage, but levels ends in"
    ):
        make(tmp_path, chains, seeds="[0]")
