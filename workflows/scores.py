"""From the entries of ``evaluate:`` to scores: which results are scored, and as whose.

``of: [direct@steps]`` scores a trajectory: the chain's end, every model that its last stage keeps on the way, and the
model it starts from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from methods.find import Found
from methods.stage import AssayError
from workflows import notation
from workflows.chains import Builder, Member, Place, Point, Scope
from workflows.experiment import Evaluation
from workflows.notation import Call, Choice, Name
from workflows.parts import listed
from workflows.record import Job

# who makes the references of an evaluation (a member of a family stands for its own), and what is scored
Scored = tuple[Member | None, Point]


@dataclass(frozen=True)
class Shown:
    """One score of the experiment: which entry, of which point, by which job."""

    entry: str
    evaluation: str
    point: Point
    job: Job


def scores(builder: Builder, entry: str, evaluation: Evaluation) -> Iterator[Shown]:
    """The scores of one entry of ``evaluate:``, each once."""
    with Place(builder.experiment.place("evaluate", entry)):
        call = notation.parse_call(evaluation.run)
        if any(isinstance(value, Choice) for _, value in call.options):
            raise AssayError(f"{evaluation.run!r}: an evaluation cannot be swept; write one entry for each.")
        found = builder.catalogue.evaluation(call.name)
        seen = set()
        for member, point in _chosen(builder, evaluation):
            if point.key not in seen:
                seen.add(point.key)
                yield _score(builder, entry, call, found, member, point)


def _score(
    builder: Builder, entry: str, call: Call, found: Found, member: Member | None, point: Point
) -> Shown:
    builder.check_task(found, point, point.chain or point.label)
    resolved, references = builder.resolved(call, found, Scope(member, point.seed))
    seed = point.seed if getattr(found.load(), "SEEDED", False) else None
    label = f"{resolved.label} of {point.label}"
    parents = {"model": point, **references}
    job = builder.job("score", call.name, f"evaluate.{call.name}-", label, resolved, parents, seed)
    builder.check(resolved, job)
    return Shown(entry, call.name, point, job)


def _chosen(builder: Builder, evaluation: Evaluation) -> Iterator[Scored]:
    """What ``of`` names; without it every chain that ends in a model."""
    if evaluation.of is None:
        for chain in builder.experiment.chains:
            yield from (pair for pair in _ends(builder, Name(chain)) if "model" in pair[1].writes)
        return
    for text in evaluation.of:
        name = notation.parse_name(text)
        for member, point in _ends(builder, name):
            if "model" not in point.writes:
                method = point.method or name.text
                raise AssayError(f"{text}: {method} at its end writes {listed(point.writes)} and no model: there is "
                                 "nothing to score.")  # fmt: skip
            yield from _trajectory(builder, name, member, point) if name.steps else [(member, point)]


def _ends(builder: Builder, name: Name) -> Iterator[Scored]:
    """The results a name means, for every seed; a name with all its steps means the ends here."""
    end = replace(name, steps=False)
    if name.text in builder.experiment.models:
        for seed in builder.seeds(end):
            yield None, builder.reference(end, None, seed)
        return
    for member in builder.pinned(end):
        for seed in builder.seeds(end):
            yield member, builder.at_step(builder.point(member, seed), end)


# --- trajectories -------------------------------------------------------------------------------------------------


def _trajectory(builder: Builder, name: Name, member: Member | None, point: Point) -> Iterator[Scored]:
    """The end, the models on the way, and the model that the last stage started from."""
    if member is None or point.job is None or point.parent.step is not None:
        raise AssayError(
            f"{notation.format_name(name)}: {name.text} is one model, with none on the way to it."
        )
    if not point.kept:
        raise AssayError(_keeps_none(name, point.job))
    yield member, point
    for step in point.kept:
        yield member, point.at(step)
    if point.before is not None:
        yield _beginning(member, point, point.before)


def _keeps_none(name: Name, job: Job) -> str:
    text = notation.format_name(name)
    if "checkpoints" not in job.config:
        return f"{text}: {job.method}, the last stage of {name.text}, has no steps at which it could keep a model."
    return (
        f"{text}: {name.text} keeps no models on its way; give its last stage, {job.method}, checkpoints=[...] with "
        "the steps."
    )


def _beginning(member: Member, point: Point, before: Point) -> Scored:
    """A chain or model of a name of its own is scored as that; any other model as step 0 of the trajectory."""
    while not member.text.stages and member.origin is not None:
        member = member.origin
    if before.chain:
        return member.origin, before
    start = replace(
        before, chain=point.chain, swept=point.swept, seed=point.seed, seeded=point.seeded, step=0
    )
    return member, start
