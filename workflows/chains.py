"""From chains to jobs: sweeps become members, references become results, every stage becomes a job with an id.

Nothing here loads torch; nothing is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from methods.checkpoint import is_classifier
from methods.data import Locator
from methods.find import Catalogue, Found, catalogue, nearest
from methods.stage import AssayError, Parent
from workflows import code, notation
from workflows.checks import Checks
from workflows.experiment import Experiment, ModelSpec, Resources
from workflows.notation import Assignment, Call, Chain, Choice, Name
from workflows.options import OptionField, Resolved, encode_config, encode_what, resolve
from workflows.parts import TASKS, example, is_read, listed, needs_model, parts_of, tasks_of
from workflows.record import Job, ParentRef, Part, digest, file_sha256
from workflows.settings import Settings
from workflows.shorthands import Shorthand, is_shorthand, steps_of


@dataclass(frozen=True)
class Point:
    """One result that a chain's member has for one seed.

    ``chain`` is empty for a result inside a chain. ``step`` is None at the end of a chain, else on its trajectory: the
    step of a kept model, or 0 for the model that the last stage started from. ``before`` is that starting point.
    ``task`` is what its model is for, one of ``workflows.parts.TASKS``. ``shorthand`` is how the last stage was written
    where that was one call for several stages.
    """

    chain: str
    parent: ParentRef
    label: str
    base: str
    recipe: str
    seeded: bool
    seed: int
    job: Job | None = None
    swept: Assignment = ()
    writes: tuple[Part, ...] = ("model",)
    step: int | None = None
    before: Point | None = None
    task: str = "language"
    shorthand: Shorthand | None = None

    @property
    def family(self) -> str:
        """The family of the last stage as it was written."""
        written = self.shorthand or self.job
        return written.family if written else "model"

    @property
    def method(self) -> str:
        """The method of the last stage as it was written; empty for a model that was found."""
        written = self.shorthand or self.job
        return written.method if written else ""

    @property
    def config(self) -> Mapping[str, Any]:
        """The options of the last stage as it was written."""
        written = self.shorthand or self.job
        return written.config if written else {}

    @property
    def last_jobs(self) -> tuple[Job, ...]:
        """The jobs of the last stage: several where it was written as a shorthand."""
        if self.shorthand is not None:
            return self.shorthand.jobs
        return () if self.job is None else (self.job,)

    @property
    def shown_seed(self) -> int | None:
        """The seed, or None where nothing in the chain used one."""
        return self.seed if self.seeded else None

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it one thing in the tables; a trajectory has its step 0 for every seed."""
        seed = self.shown_seed if self.step == 0 else None
        return self.chain, self.parent.id, self.parent.step, self.step, seed

    @property
    def chain_label(self) -> str:
        """The label; of a kept model its chain's, as the step is told beside it."""
        return self.label.removesuffix(f"@step{self.step}") if self.step else self.label

    @property
    def kept(self) -> list[int]:
        """The steps at which the last stage keeps its model."""
        if self.job is None or self.parent.step is not None:
            return []
        return sorted(self.job.config.get("checkpoints") or [])

    def at(self, step: int) -> Point:
        """The model kept at a step, which nothing but a model is kept at."""
        parent = ParentRef(id=self.parent.id, step=step)
        return replace(self, parent=parent, label=f"{self.label}@step{step}", recipe=digest([self.recipe, step]),
                       writes=("model",), step=step)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One member of a chain's family: its own stages, and the member of the chain it starts from."""

    chain: str
    assignment: Assignment
    text: Chain
    origin: Member | None

    @cached_property
    def trail(self) -> dict[str, Member]:
        """The member of every named chain this one descends from."""
        return ({} if self.origin is None else self.origin.trail) | {self.chain: self}

    @property
    def name(self) -> str:
        """``pruned[sparsity=0.5]``, or the chain's name where nothing is swept."""
        return notation.format_name(Name(self.chain, _as_text(self.assignment)))


def _as_text(assignment: Assignment) -> Assignment:
    """Swept stages and components become texts, so that a member can be named in one line."""
    return tuple(
        (key, notation.format_value(v) if isinstance(v, (Call, Name)) else v) for key, v in assignment
    )


@dataclass(frozen=True)
class Scope:
    """What a call's references are looked up in: the member that makes them, and the steps of a shorthand before it."""

    member: Member | None
    seed: int
    steps: Mapping[str, Point] = field(default_factory=dict)
    shorthand: str | None = None


class Builder:
    """Resolves chains to jobs; results are kept by (member, seed) so that shared prefixes are resolved once."""

    def __init__(self, experiment: Experiment, settings: Settings) -> None:
        self.experiment, self.settings = experiment, settings
        self.catalogue: Catalogue = catalogue(settings.methods)
        self.locator = Locator(settings.data, smoke=settings.smoke)
        self.checks = Checks(settings.data)
        self.jobs: dict[str, Job] = {}
        self._members: dict[str, list[Member]] = {}
        self._points: dict[tuple[str, int], Point] = {}
        self._digests: dict[str, str] = {}
        self._open: list[str] = []

    # - names

    def members(self, chain: str) -> list[Member]:
        """All members of a chain's family."""
        if chain not in self._members:
            if chain in self._open:
                circle = " > ".join([*self._open[self._open.index(chain) :], chain])
                raise AssayError(f"the chains go round in a circle: {circle}.")
            self._open.append(chain)
            self._members[chain] = list(self._expand(chain))
            self._open.pop()
        return self._members[chain]

    def _expand(self, chain: str) -> Iterator[Member]:
        with Place(self.experiment.place("chains", chain)):
            parsed = notation.parse(self.experiment.chains[chain])
            for assignment, text in notation.expand(parsed):
                for origin in self._origins(text.first):
                    inherited = () if origin is None else origin.assignment
                    yield Member(chain, _joined(inherited, assignment), text, origin)

    def _origins(self, first: Name | Call | Choice) -> list[Member | None]:
        if not isinstance(first, Name) or first.text in self.experiment.models:
            return [None]
        return list(self.pinned(first))

    def pinned(self, name: Name) -> list[Member]:
        """The members a name may mean, by its pins."""
        self._known(name)
        members = self.members(name.text)
        for key, value in name.pins:
            members = [m for m in members if dict(_as_text(m.assignment)).get(key, _NOTHING) == value]
        if not members:
            there = ", ".join(member.name for member in self.members(name.text))
            raise AssayError(f"{notation.format_name(name)} is no member of {name.text}; there are: {there}.")
        return members

    def _known(self, name: Name) -> None:
        known = [*self.experiment.chains, *self.experiment.models]
        if name.text not in known:
            raise AssayError(f"{name.text} is no chain or model{nearest(name.text, known)}")

    def member_for(self, name: Name, reader: Member | None) -> Member:
        """The one member a reference means, seen from the member that makes it."""
        members = self.pinned(name)
        if len(members) > 1 and reader is not None and not name.pins and name.text in reader.trail:
            return reader.trail[name.text]
        if len(members) > 1:
            there = ", ".join(member.name for member in members)
            raise AssayError(f"{name.text} is a family; name the member that is meant: {there}.")
        return members[0]

    # - points

    def points_of_chain(self, chain: str) -> Iterator[Point]:
        """One point for each member and seed; members without any randomness have one point only."""
        for member in self.members(chain):
            yield from self._by_seed(lambda seed, member=member: self.point(member, seed))

    def _by_seed(self, point_at: Any) -> Iterator[Point]:
        seen = set()
        for seed in self.experiment.seeds:
            point = point_at(seed)
            if (point.parent.id, point.parent.step) not in seen:
                seen.add((point.parent.id, point.parent.step))
                yield point

    def point(self, member: Member, seed: int) -> Point:
        """The result of a member for a seed."""
        key = (member.name, seed)
        if key not in self._points:
            if member.name in self._open:
                raise AssayError(f"chain {member.chain} needs its own result: {' > '.join(self._open)}.")
            self._open.append(member.name)
            with Place(self.experiment.place("chains", member.chain)):
                self._points[key] = self._resolve(member, seed)
            self._open.pop()
        return self._points[key]

    def _resolve(self, member: Member, seed: int) -> Point:
        first = member.text.first
        if isinstance(first, Name):
            point: Point | None = self._start(first, member, seed)
        else:
            point = self._stage(first, None, member, seed)
        for call in member.text.stages:
            point = self._stage(call, point, member, seed)
        assert point is not None
        return replace(point, chain=member.name, seed=seed, swept=_as_text(member.assignment), step=None)

    def _start(self, first: Name, member: Member, seed: int) -> Point:
        if first.text in self.experiment.models:
            return self.at_step(self.model_point(first.text, self._seed(first, seed)), first)
        assert member.origin is not None
        return self.at_step(self.point(member.origin, self._seed(first, seed)), first)

    def seeds(self, name: Name) -> list[int]:
        """All seeds of the experiment, or the one that the name pins."""
        seeds = self.experiment.seeds
        return seeds if name.seed is None else [self._seed(name, seeds[0])]

    def _seed(self, name: Name, seed: int) -> int:
        if self.settings.smoke:
            return seed
        if name.seed is not None and name.seed not in self.experiment.seeds:
            there = ", ".join(map(str, self.experiment.seeds))
            raise AssayError(
                f"{notation.format_name(name)}: the experiment has no seed {name.seed}; it has {there}."
            )
        return seed if name.seed is None else name.seed

    def at_step(self, point: Point, name: Name) -> Point:
        """The model that a name means of a chain: the end, or the one kept at a step."""
        text = notation.format_name(name)
        if name.steps:
            raise AssayError(f"{text} means several models, which only of: of an evaluation takes; write "
                             f"{name.text}@step40 for one of them.")  # fmt: skip
        if name.step is None:
            return point
        # a run of two steps keeps one model, which stands for all of them
        step = point.kept[0] if self.settings.smoke and point.kept else name.step
        if step not in point.kept:
            raise AssayError(f"{text}: {name.text} keeps no model at step {step}; "
                             f"give its last stage checkpoints=[{step}].")  # fmt: skip
        return point.at(step)

    def reference(self, name: Name, reader: Member | None, seed: int) -> Point:
        """The result a reference means: the same seed of the other chain, unless it is pinned."""
        self._known(name)
        if name.text in self.experiment.models:
            return self.at_step(self.model_point(name.text, self._seed(name, seed)), name)
        return self.at_step(self.point(self.member_for(name, reader), self._seed(name, seed)), name)

    # - models

    def model_point(self, name: str, seed: int) -> Point:
        """The starting model ``name``: a job for a new one, a folder for one that exists."""
        if (name, seed) not in self._points:
            with Place(self.experiment.place("models", name)):
                self._points[name, seed] = self._model_point(name, self.experiment.models[name], seed)
        return self._points[name, seed]

    def _model_point(self, name: str, spec: ModelSpec, seed: int) -> Point:
        if spec.new is not None:
            return self._new_model(name, self._builder_of(spec), seed)
        if spec.hf is not None and self.settings.smoke:
            layout = {**spec.layout.model_dump(), "stands_for": spec.hf}
            return self._new_model(name, Call("model.smoke", tuple(layout.items())), seed)
        if spec.hf is not None:
            recipe = digest(["hub", spec.hf, spec.revision])
            return Point(name, ParentRef(id=f"model.hub-{recipe[:12]}"), name, name, recipe, False, seed)
        folder = Path(spec.path).absolute() if spec.path else self.locator.folder_of(str(spec.data))
        recipe = digest(["folder", folder_digest(folder)])
        parent = ParentRef(id=f"model.folder-{recipe[:12]}", path=str(folder))
        task = "classification" if is_classifier(folder) else "language"
        return Point(name, parent, name, name, recipe, False, seed, task=task)

    def _builder_of(self, spec: ModelSpec) -> Call:
        """``{new: KIND, ...}`` as a call of ``model.KIND``; llama is the kind of ``model.new``."""
        found = (name.partition(".") for name in self.catalogue.methods)
        kinds = {name for family, _, name in found if family == "model"} - {"new", "smoke"} | {"llama"}
        if spec.new not in kinds:
            raise AssayError(
                f"new: {spec.new}: there is no such kind of new model{nearest(str(spec.new), kinds)}"
            )
        if spec.new == "llama":
            return Call("model.new", (("kind", spec.new), *_options(spec)))
        return Call(f"model.{spec.new}", tuple(_options(spec)))

    def _new_model(self, name: str, call: Call, seed: int) -> Point:
        return replace(self._stage(call, None, None, seed), chain=name, label=name, base=name)

    # - jobs

    def _stage(self, call: Call | Choice, parent: Point | None, member: Member | None, seed: int) -> Point:
        assert isinstance(call, Call)
        found = self.catalogue.method(call.name)
        self._check_start(found, parent)
        if is_shorthand(found) and parent is not None:
            return self._steps(call, found, parent, member, seed)
        return self._one_stage(call, found, parent, Scope(member, seed))

    def _steps(self, call: Call, found: Found, parent: Point, member: Member | None, seed: int) -> Point:
        """The last of the stages that a shorthand stands for, told by the shorthand."""
        resolved, _ = self.resolved(call, found, Scope(member, seed))
        made: dict[str, Point] = {}
        for step, written in steps_of(found, resolved.config):
            method = self.catalogue.method(written.name)
            scope = Scope(member, seed, made, found.name)
            made[step.name] = self._one_stage(written, method, parent, scope)
        jobs = tuple(point.job for point in made.values() if point.job is not None)
        whole = Shorthand(found.name, encode_config(resolved.config), jobs)
        return replace(made[step.name], label=f"{parent.label} > {resolved.label}", shorthand=whole)

    def _one_stage(self, call: Call, found: Found, parent: Point | None, scope: Scope) -> Point:
        seed = scope.seed
        resolved, references = self.resolved(call, found, scope)
        if parent is not None:
            self._check_components(resolved, parent)
        parents = ({} if parent is None else {"model": parent}) | references
        writes = parts_of(found.load())
        seeded_here = bool(found.load().SEEDED)
        label = resolved.label if parent is None else f"{parent.label} > {resolved.label}"
        job = self.job(
            "stage",
            call.name,
            f"{call.name}-",
            label,
            resolved,
            parents,
            seed if seeded_here else None,
            scope.shorthand,
        )
        self.check(resolved, job)
        seeded = seeded_here or any(point.seeded for point in parents.values())
        base = parent.base if parent else call.name
        result = ParentRef(id=job.id, kind=writes[0])
        made = Point("", result, label, base, job.recipe, seeded, seed, job, writes=writes, before=parent)
        return replace(made, task=parent.task if parent else tasks_of(found.load())[0])

    def _check_start(self, found: Found, parent: Point | None) -> None:
        if parent is None and needs_model(found):
            raise AssayError(f"{found.name} needs a model to start from: write base > {found.name}.")
        if parent is not None and "model" not in parent.writes:
            before = parent.job.method if parent.job else parent.label
            raise AssayError(
                f"{found.name} starts from a model, but {before} before it writes {listed(parent.writes)} only: end "
                f"the chain there, and give its name to an option that reads {listed(parent.writes)}."
            )
        if parent is not None:
            self.check_task(found, parent, parent.base)

    def _check_components(self, resolved: Resolved, parent: Point) -> None:
        """Most components work on any model, and say nothing."""
        for part in resolved.components:
            if hasattr(part.load(), "TASKS"):
                self.check_task(part, parent, parent.base)

    def check_task(self, found: Found, point: Point, name: str) -> None:
        """Refuse a model of another task than the method or evaluation works on; ``name`` is what it is called."""
        known = tasks_of(found.load())
        if "model" in point.writes and point.task not in known:
            works_on = " and ".join(TASKS[task][1] for task in known)
            is_one = f"{TASKS[point.task][0]}{self._whence(point)}"
            raise AssayError(f"{found.name} works on {works_on}; {name} is {is_one}.")

    def _whence(self, point: Point) -> str:
        """`` (new: mlp)``: where the model at the beginning of the chain comes from."""
        spec = self.experiment.models.get(point.base)
        if spec is None:
            return ""
        key = next(key for key in ("new", "hf", "path", "data") if getattr(spec, key) is not None)
        return f" ({key}: {getattr(spec, key)})"

    def resolved(self, call: Call, found: Found, scope: Scope) -> tuple[Resolved, dict[str, Point]]:
        """A call with its complete config, and the results that its options name."""
        references: dict[str, Point] = {}

        def refer(option: OptionField, name: Name) -> Parent:
            named = scope.steps.get(name.text) or self.reference(name, scope.member, scope.seed)
            point = self._part(call, option, name, named)
            if option.part == "model":
                self.check_task(found, point, f"{option.name}={notation.format_name(name)}")
            references[_place(option, references)] = point
            return Parent(point.parent.shown)

        resolved = resolve(call, found, self.catalogue, refer, self.settings.smoke)
        return resolved, references

    def _part(self, call: Call, option: OptionField, name: Name, point: Point) -> Point:
        """The result with the part of it that an option reads."""
        if option.part in point.writes:
            self._check_files(call, option, name, point)
            parent = point.parent.model_copy(update={"kind": option.part})
            return replace(point, parent=parent)
        text = notation.format_name(name)
        ends = (
            "is"
            if point.job is None or point.step is not None
            else f"ends in {point.job.method}, which writes"
        )
        raise AssayError(
            f"{call.name}: {option.name}={text} reads {option.part}/, but {text} {ends} {listed(point.writes)} only; "
            f"the option takes {example(self.catalogue, option.part, option.reads)}."
        )

    def _check_files(self, call: Call, option: OptionField, name: Name, point: Point) -> None:
        """Refuse the files of another family, and levels of another kind, before they are made."""
        if option.reads is None or point.job is None:
            return
        method = self.catalogue.method(point.job.method)
        if is_read(method, option.reads):
            return
        text, kind = notation.format_name(name), getattr(method.load(), "KIND", None)
        of_kind = f" of kind {kind}" if kind and method.family == option.reads.family else ""
        wanted = f" of kind {option.reads.kind}" if option.reads.kind else ""
        raise AssayError(
            f"{call.name}: {option.name}={text} reads the files of a {option.reads.family} stage{wanted}, but {text} "
            f"ends in {method.name}{of_kind}; the option takes {example(self.catalogue, option.part, option.reads)}."
        )

    def job(self, kind: Any, method: str, prefix: str, label: str, resolved: Resolved,
            parents: dict[str, Point], seed: int | None, shorthand: str | None = None) -> Job:  # fmt: skip
        """The job of a call; the same job where it is asked for again."""
        what = encode_what(resolved.config, self.catalogue)
        content = {name: self.content(name) for name in self._data_sets(resolved)}
        code_digests = code.code_of(resolved.found, resolved.components, self._uses(resolved))
        recipe = {"parents": {key: point.recipe for key, point in parents.items()}, "method": method, "seed": seed,
                  "config": _with_recipes(what, parents), "content": content}  # fmt: skip
        full = digest({"parents": {key: [p.parent.id, p.parent.step] for key, p in parents.items()}, "method": method,
                       "config": what, "seed": seed, "code": code_digests, "content": content})  # fmt: skip
        job_id = f"{prefix}{full[:12]}"
        if job_id not in self.jobs:
            self.jobs[job_id] = Job(
                id=job_id, digest=full, recipe=digest(recipe), kind=kind, method=method, label=label,
                config=encode_config(resolved.config), seed=seed, code=code_digests, content=content,
                parents={key: point.parent for key, point in parents.items()},
                resources=self._resources(method, shorthand), **self._surroundings,
            )  # fmt: skip
        _keep_too(self.jobs[job_id], getattr(resolved.config, "checkpoints", ()))
        return self.jobs[job_id]

    def check(self, resolved: Resolved, job: Job) -> None:
        """Let the method or evaluation look at its config and data; stand-ins at smoke scale prove nothing."""
        if not self.settings.smoke:
            self.checks.check(resolved.found, resolved.config, job.content)

    @cached_property
    def _surroundings(self) -> dict[str, Any]:
        return {
            "threads": self.experiment.threads,
            "country": self.experiment.country,
            "data": None if self.settings.data is None else str(Path(self.settings.data).absolute()),
            "methods": [str(Path(folder).absolute()) for folder in self.settings.methods],
            "smoke": self.settings.smoke,
            "trust_tasks": self.settings.trust_tasks,
        }

    def _uses(self, resolved: Resolved) -> Iterable[str]:
        for found in (resolved.found, *resolved.components):
            yield from getattr(found.load(), "USES", ())
        module = resolved.found.load()
        run_by_family = not (hasattr(module, "run") or hasattr(module, "evaluate"))
        if run_by_family or resolved.found.import_name.startswith("methods."):
            yield f"methods.{resolved.found.family}"

    def _data_sets(self, resolved: Resolved) -> list[str]:
        names = list(resolved.data)
        for found in (resolved.found, *resolved.components):
            further = getattr(found.load(), "datasets", None)
            if further is not None and found is resolved.found:
                names.extend(further(resolved.config, self.locator))
        return sorted(set(names))

    def content(self, name: str) -> str:
        """The digest of a data set (read once a plan)."""
        if name not in self._digests:
            try:
                self._digests[name] = self.locator.digest(name)
            except AssayError:
                if name.partition("[")[0] not in self.experiment.chains:
                    raise
                raise AssayError(
                    f"{name!r} is no data set but a chain: an option that takes a chain names it without quotes."
                ) from None
        return self._digests[name]

    def _resources(self, method: str, shorthand: str | None) -> dict[str, float]:
        """What is asked for a method, else for the shorthand that it is a step of, its family, or every job."""
        asked = self.experiment.resources
        names = (method, shorthand, method.partition(".")[0], "default")
        chosen = next((asked[name] for name in names if name is not None and name in asked), Resources())
        return {key: value for key, value in chosen.model_dump().items() if value is not None}


_NOTHING = object()


class _Placed(AssayError):
    """A sentence that names its place already."""


class Place:
    """Adds the place to a sentence raised inside."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, AssayError) and not isinstance(error, _Placed):
            raise _Placed(f"{self.place}: {error}") from None


def _joined(inherited: Assignment, own: Assignment) -> Assignment:
    """What was swept before and here; a name swept twice along a chain gets a number."""
    taken = dict(inherited)
    result = list(inherited)
    for key, value in own:
        fresh, number = key, 2
        while fresh in taken:
            fresh, number = f"{key}_{number}", number + 1
        taken[fresh] = value
        result.append((fresh, value))
    return tuple(result)


def _options(spec: ModelSpec) -> Iterator[tuple[str, Any]]:
    for key, value in spec.options.items():
        yield key, tuple(value) if isinstance(value, list) else value


def _keep_too(job: Job, steps: Iterable[int]) -> None:
    """Two chains may ask one job for different steps: it keeps them all."""
    kept = job.config.get("checkpoints") or []
    if not set(steps) <= set(kept):
        job.config["checkpoints"] = sorted({*kept, *steps})


def _with_recipes(what: dict[str, Any], parents: dict[str, Point]) -> dict[str, Any]:
    several: dict[str, list[str]] = {}
    for key, point in parents.items():
        several.setdefault(key.partition(".")[0], []).append(point.recipe)
    return {
        key: parents[key].recipe if key in parents else several.get(key, value) for key, value in what.items()
    }


def _place(option: OptionField, taken: Collection[str]) -> str:
    """What a referenced result is called among the parents: ``teacher``, or of a list ``references.1``, and so on."""
    if not option.several:
        return option.name
    return f"{option.name}.{1 + sum(key.startswith(f'{option.name}.') for key in taken)}"


def folder_digest(folder: Path) -> str:
    """sha256 over names and contents of a model folder's files."""
    if not (folder / "config.json").is_file():
        raise AssayError(f"{folder} is no model folder: it has no config.json.")
    parts = []
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise AssayError(f"{path} is a link that leaves the model folder.")
        parts.append([str(path.relative_to(folder)), file_sha256(path)])
    return digest(parts)
