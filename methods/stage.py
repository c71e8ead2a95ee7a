"""What a method file is written with: option types, terms, claims and the stage it runs in.

Importing this module costs nothing: neither torch nor transformers is loaded, because the planner
reads every method's options before a single job runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Locator
    from methods.progress import Progress


# --- option types -----------------------------------------------------------------------------------


class _How:
    """Marker for options that say *how* a job runs and not *what* it computes: they stay out of ids."""

    def __repr__(self) -> str:
        return "How"


How = _How()
"""``micro_batch: Annotated[int, How] = 8`` — a live option that must not change the result."""


@dataclass(frozen=True)
class Component:
    """A part a stage is made of: ``adamw(learning_rate=5e-3)`` is ``Component("adamw", {...})``.

    The planner completes ``options`` with the component's own defaults, so a running job always sees
    every option. ``config`` builds the component's typed ``Config`` from them.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parent:
    """A reference to another chain's result, as the planner resolved it: the id of that result."""

    id: str


@dataclass(frozen=True)
class _Kind:
    """What a component field accepts: the folder under ``methods/`` the component must come from."""

    name: str


@dataclass(frozen=True)
class _Reads:
    """Whose files a reference is for: a family, and of level databases what their methods say in ``KIND``."""

    family: str
    kind: str | None = None


# A field of one of the first types takes a component of that kind; ``Model`` takes a reference to a chain.
Optimizer = Annotated[Component, _Kind("optimizer")]
Schedule = Annotated[Component, _Kind("schedule")]
Adapter = Annotated[Component, _Kind("adapter")]
Head = Annotated[Component, _Kind("head")]
Loss = Annotated[Component, _Kind("loss")]
Weighting = Annotated[Component, _Kind("weighting")]
LossTerm = Annotated[Component, _Kind("term")]
Model = Parent
# A reference to another chain of which not the model but the ``files/`` or ``data/`` folder is read.
Files = Annotated[Parent, _Kind("files")]
Data = Annotated[Parent, _Kind("data")]
# Files of one family alone: a level database of any kind or of one kind, and an assignment of its levels. The planner
# refuses others, before anything is built or searched.
Levels = Annotated[Parent, _Kind("files"), _Reads("levels")]
SparsityLevels = Annotated[Parent, _Kind("files"), _Reads("levels", "sparsity")]
BitLevels = Annotated[Parent, _Kind("files"), _Reads("levels", "bits")]
StructureLevels = Annotated[Parent, _Kind("files"), _Reads("levels", "structure")]
Assigned = Annotated[Parent, _Kind("files"), _Reads("search")]
# What a teacher said of every token, written down by ``teacher.logits``.
TeacherOutputs = Annotated[Parent, _Kind("files"), _Reads("teacher")]
# A text field that names data sets: their content's digest enters the job's id.
Dataset = Annotated[str, _Kind("dataset")]
# The same, or a chain that writes rows (``data.sample``); ``stage.rows(option)`` reads either.
Rows = Annotated[str | Parent, _Kind("dataset")]


# --- shorthands --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class From:
    """In a ``Step``'s options: the result of an earlier step of the same shorthand, by its name."""

    step: str


@dataclass(frozen=True)
class Step:
    """One stage that a shorthand stands for.

    A method file with ``expand(config) -> tuple[Step, ...]`` is a shorthand: the planner writes its steps instead, each
    a stage with id, record and energy of its own. All start from the chain's model; the last one is the chain's result.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


# --- what a loss returns ------------------------------------------------------------------------------


class Count(float):
    """A number of tokens, sequences or positions that remembers which part of the batch it counted.

    ``batch.forget.tokens`` is ``Count(57, "forget.tokens")``. A loss divides by it through its
    ``Term``; because the loop knows where the number came from, it can add it up over all
    micro-batches and processes *before* the first backward pass, and the global mean is exact.
    """

    source: str

    def __new__(cls, value: float, source: str) -> Count:
        count = super().__new__(cls, value)
        count.source = source
        return count


@dataclass(frozen=True)
class Term:
    """One named part of a loss: ``weight * sum / count``, the division done once per global batch."""

    sum: Tensor
    count: float
    weight: float = 1.0


Terms = Mapping[str, Term]


# --- claims ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A statement that the report checks against the measured rows.

    ``subject`` and ``other`` are shell-style patterns on a chain's *label* or equal to its name. ``metric`` is
    ``evaluation.metric`` (``tofu.model_utility``), ``evaluation.task.metric``, or
    ``curve.<term>@<term>=<level>``: the first term where the second first passes the level, interpolated.
    ``<metric> relative to <chain>`` is its change against that chain in percent, seed by seed, and
    ``<metric> recovered towards <chain>`` the share that the last stage won back of what its start had lost.
    ``other`` is compared with the subject by ``relation``; with no ``other``, ``value`` is.
    ``higher``/``lower``: subject is beyond other (by ``margin``). ``at_least``/``at_most``: beyond
    ``value``. ``within``: the two differ by no more than ``margin``. ``recovers``: of what ``other`` (the broken
    model) lost against the chain ``intact``, the subject has won back at least the share ``value``. Seeds
    in which the broken model is not worse than the intact one are left out and counted.
    ``subject_options`` and ``other_options`` keep only chains whose last stage has these options, defaults included.
    Scope ``paper`` is compared only with runs of the published ``model`` and ``data``.
    """

    sentence: str
    source: str
    metric: str
    subject: str
    relation: Literal["higher", "lower", "at_least", "at_most", "within", "recovers"]
    other: str | None = None
    intact: str | None = None
    value: float | None = None
    margin: float = 0.0
    scope: Literal["paper", "scaled"] = "scaled"
    model: str | None = None
    data: str | None = None
    subject_options: Mapping[str, Any] = field(default_factory=dict)
    other_options: Mapping[str, Any] = field(default_factory=dict)


# --- what a method is given -----------------------------------------------------------------------------


class AssayError(Exception):
    """Something a user can put right. The message is a whole sentence that names the place and the fix."""


class NotFinite(AssayError):
    """A loss, gradient or weight stopped being a finite number; the job writes no model."""


class Interrupted(AssayError):
    """The job was asked to stop, has saved its state and can be resumed."""


@dataclass
class Stage:
    """One stage being run: everything a method may read, and the folder it writes to.

    ``folder`` is a temporary folder that the runner checks and publishes: ``model/`` (also
    ``model@<step>/``), ``data/`` or ``files/``, and ``curve.csv``. ``parents`` maps ``"model"`` (the chain's
    parent, absent for a first stage) and each reference option's name (``name.1``, ``name.2``, … where it takes a list)
    to a folder in Hugging Face layout, or to the ``files/`` or ``data/`` folder where the option's type says so.
    ``notes`` goes into the record; the keys the loop writes are listed in ``workflows.record.Record``. ``spent`` says
    what the job has used so far, over all its attempts: ``kwh`` and ``seconds``; nothing where no meter runs.
    """

    id: str
    method: str
    config: Any
    seed: int
    parents: Mapping[str, Path]
    folder: Path
    progress: Progress
    data: Locator
    threads: int = 1
    notes: dict[str, Any] = field(default_factory=dict)
    spent: Callable[[], Mapping[str, float]] = dict

    def rows(self, option: str) -> list[dict[str, Any]]:
        """The rows that an option names: data sets by their names, or what a data stage has written.

        Raises:
            AssayError: they cannot be read.
        """
        from methods.data import read_rows

        named = getattr(self.config, option)
        return self.data.rows(named) if isinstance(named, str) else read_rows(self.parents[option])


@dataclass(frozen=True)
class Row:
    """One number of an evaluation. ``task`` says on what it was measured, with every setting that matters."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    n: int | None = None
    unit: str = ""
    better: Literal["higher", "lower", "closer_to_0", "closer_to_1", ""] = ""


@dataclass
class Scoring:
    """One model being scored. ``model()`` and ``reference(option)`` load on first use and keep the result."""

    id: str
    evaluation: str
    config: Any
    seed: int
    parents: Mapping[str, Path]
    folder: Path
    progress: Progress
    data: Locator
    models: ModelSource
    threads: int = 1
    trust_tasks: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        """The scored model in evaluation mode on the job's device (a transformers model)."""
        return self.models.load(self.parents["model"])

    def tokenizer(self) -> Any:
        """The tokenizer that travels with the scored model."""
        return self.models.tokenizer(self.parents["model"])

    def reference(self, option: str) -> Any:
        """The model a reference option names, in evaluation mode."""
        return self.models.load(self.parents[option])


class ModelSource(Protocol):
    """Loads models for a scoring process; the same folder is loaded once."""

    def load(self, folder: Path) -> Any: ...
    def tokenizer(self, folder: Path) -> Any: ...
