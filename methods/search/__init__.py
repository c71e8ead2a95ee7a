"""Searches: every producer of an assignment of levels to layers, whether it searches or computes.

A method's ``search(config, problem)`` returns an ``Assignment``: ``files/assignment.json``. Where its config has an
option ``levels`` the database it names is opened, checked against the dense model, and the assignment is checked
against it: every layer at a level that exists, at the cost that is stated. A method that evolves candidates calls
``problem.evolve``; then ``files/fitness.csv`` has a line for every stage of every generation, and ``curve.csv`` the
parent's ``fitness``, its fitness on one held-out batch that never changes (``holdout``), and the ``tokens`` forwarded
through candidates until then.

What is left of the model in memory after a search is whatever candidate was scored last. It is thrown away: the result
is the assignment, and ``prune.assigned`` makes the model from it, from the dense weights and from the levels.

REVISION covers ``_evolution``, ``_fitness``, ``_candidates`` and ``_runner``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.stage import AssayError, Dataset, How, Stage

if TYPE_CHECKING:
    from methods.data import Example
    from methods.levels._database import Database
    from methods.progress import Progress
    from methods.prune import Calibration
    from methods.search._assignment import Assignment
    from methods.search._candidates import Carrier, Scorer
    from methods.search._evolution import Evolution as Run
    from methods.search._fitness import Sequences
    from methods.search._runner import Runner
    from methods.search._spaces import Space

REVISION = 1
# What every evolutionary search uses beside the family's own files.
USES = (
    "methods.architectures",
    "methods.checkpoint",
    "methods.data",
    "methods.levels._database",
    "methods.prune._walk",
    "methods.search._assignment",
    "methods.search._spaces",
)
# Of every evolutionary search at smoke scale, whose models have two blocks.
SMOKE = {
    "generations": 1, "children": 2, "survivors": (1,), "tokens": (64,), "calibration_tokens": 256,
    "holdout_tokens": 64, "top_k": 16, "initial_candidates": 2, "initial_tokens": 64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """Options of every evolutionary search; a method's ``Config`` inherits them and may state another default.

    The defaults suit models of the built-in world and take half a minute there; what the shipped scripts of EvoPress
    (IST-DASLab/EvoPress) take for models of billions of parameters is in the comments.
    """

    # data set that candidates are compared on (FineWeb-Edu)
    data: Dataset = "authors/full+authors/facts"
    # rounds of mutation and selection (400 for sparsity, 150 for bits); 0: what a search starts from
    generations: Annotated[int, Ge(0)] = 50
    # distinct children of a generation (64 for sparsity, 128 for bits)
    children: Annotated[int, Gt(0)] = 32
    # candidates that each stage of selection keeps (8, 2, 1)
    survivors: tuple[Annotated[int, Gt(0)], ...] = (8, 2, 1)
    # tokens on which each stage scores (2,048, 16,384, 65,536)
    tokens: tuple[Annotated[int, Gt(1)], ...] = (1024, 4096, 8192)
    # what is made small: see methods/search/_fitness.py (kl)
    fitness: Literal["kl", "sparse_kl", "ppl", "hidden"] = "kl"
    # words kept for sparse_kl and hidden (10 by default, at least 512 recommended); a vocabulary that has fewer is kept
    top_k: Annotated[int, Gt(0)] = 512
    # tokens that stages draw from (524,288), and of which the dense model's answers are kept
    calibration_tokens: Annotated[int, Gt(1)] = 16384
    # longer sequences are cut (8,192, at most what the model is made for)
    context_tokens: Annotated[int, Gt(1)] = 512
    # at which positions candidates are compared: all of them as published, or those of the rows' answers
    positions: Literal["all", "answers"] = "all"
    # data set on which the parent is scored again now and then, always on the same batch; None: on none
    holdout: Dataset | None = None
    # tokens of that batch
    holdout_tokens: Annotated[int, Gt(1)] = 4096
    # generations between two lines of the curve; there is one at the start and one at the end, too
    score_every: Annotated[int, Ge(1)] = 10
    # of the forward passes; auto: bfloat16 on an accelerator, float32 on the processor. Logarithms are float32 always
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # seconds between two saved states
    save_seconds: Annotated[float, Gt(0), How] = 30.0

    def __post_init__(self) -> None:
        if not self.survivors or len(self.survivors) != len(self.tokens):
            raise AssayError(
                f"survivors={self.survivors} and tokens={self.tokens}: every stage of selection has one number of "
                f"each, and these are {len(self.survivors)} and {len(self.tokens)}."
            )
        shrinking = zip((self.children, *self.survivors), self.survivors, strict=False)
        if any(before < after for before, after in shrinking):
            raise AssayError(
                f"survivors={self.survivors}: no stage can keep more than the one before it, and the first no more "
                f"than children={self.children}."
            )
        refuse_few_tokens(max(self.tokens), self.calibration_tokens, f"tokens={self.tokens}")


def refuse_few_tokens(wanted: int, available: int, what: str) -> None:
    """Raise an AssayError where a stage asks for more tokens than it could draw."""
    if wanted > available:
        raise AssayError(
            f"{what}: a stage scores on {wanted:,} tokens, drawn without replacement from calibration_tokens="
            f"{available:,}: raise calibration_tokens or lower the stage's."
        )


def run(stage: Stage, method: ModuleType) -> None:
    """Let ``method`` choose levels for ``stage.parents["model"]`` and write them to ``stage.folder / "files"``."""
    problem = Problem(stage)
    try:
        assignment = method.search(stage.config, problem)
    finally:
        stage.progress.release()
    if problem.database is not None:
        assignment.check(problem.database)
    assignment.write(stage.folder / "files")
    stage.notes |= {"kind": assignment.kind, "producer": assignment.producer, "spent": dict(assignment.spent)}
    stage.notes["assignment"] = dict(assignment.levels)


class Problem:
    """What a search is given: the dense model, the levels to choose from, data, and the state of the job."""

    def __init__(self, stage: Stage) -> None:
        from methods.prune import Calibration

        self.stage = stage
        self.calibration: Calibration = Calibration(stage)
        self.progress: Progress = stage.progress

    @cached_property
    def model(self) -> Any:
        """The dense model in evaluation mode, without gradients, in the precision that the config asks for."""
        return self._dense[0]

    @cached_property
    def database(self) -> Database | None:
        """The levels that the option ``levels`` names, of this model; None where there is no such option."""
        return self._dense[1]

    @cached_property
    def _dense(self) -> tuple[Any, Database | None]:
        """The levels are compared with the weights before these are rounded."""
        from methods import loop
        from methods.checkpoint import load_model
        from methods.levels._database import Database

        loop.make_deterministic(self.stage.threads)
        model = load_model(self.stage.parents["model"], dtype="float32").requires_grad_(False)
        folder = self.stage.parents.get("levels")
        database = None if folder is None else Database.open(folder, model)
        asked: Any = getattr(self.stage.config, "precision", "float32")
        precision = loop.compute_precision(loop.Training(precision=asked))
        self.stage.notes |= {"load_dtype": "float32", "compute_dtype": precision, "device": str(model.device)}
        if precision == "bfloat16":
            _round(model)
        return model, database

    @cached_property
    def runner(self) -> Runner:
        """Runs the model part by part; an AssayError where it is not built like a Llama."""
        from methods.search._runner import Runner

        return Runner(self.model)

    def levels(self, kind: str) -> Database:
        """The database, which has to be of this kind."""
        database = self.database
        if database is None or database.kind != kind:
            found = "none" if database is None else f"of kind {database.kind}"
            raise AssayError(
                f"{self.stage.method} chooses among levels of kind {kind}, and those named in levels are {found}: name "
                f"a stage that builds such levels{_WHO.get(kind, '')}."
            )
        return database

    # --- sequences --------------------------------------------------------------------------------------------------

    def sequences(self, config: Evolution) -> Sequences:
        """The calibration sequences, drawn by the seed: exactly ``calibration_tokens`` tokens."""
        from methods.search._fitness import Sequences

        examples = self._drawn(config.data, config.calibration_tokens, config.context_tokens, self.stage.seed)
        self.stage.notes["calibration_sequences"] = len(examples)
        self.stage.notes["calibration_tokens"] = sum(len(example.input_ids) for example in examples)
        return Sequences(examples, config.positions == "answers")

    def held_out(self, config: Evolution) -> Sequences | None:
        """The held-out sequences, the same for every seed."""
        from methods.search._fitness import Sequences

        if config.holdout is None:
            return None
        examples = self._drawn(config.holdout, config.holdout_tokens, config.context_tokens, "holdout")
        return Sequences(examples, config.positions == "answers")

    def _drawn(self, data: str, tokens: int, context_tokens: int, seed: int | str) -> list[Example]:
        """Sequences that have exactly so many tokens, the last one cut; labels with them."""
        examples = self.calibration.shuffled(data, context_tokens, seed)
        available = sum(len(example.input_ids) for example in examples)
        if available < tokens:
            raise AssayError(
                f"{self.stage.method}: {tokens:,} tokens are asked for, but {data!r} has {available:,} in sequences of "
                f"at most {context_tokens} tokens: ask for fewer, or name more data."
            )
        return _cut(examples, tokens)

    # --- searching --------------------------------------------------------------------------------------------------

    def evolve(
        self,
        config: Evolution,
        space: Space,
        producer: str | None = None,
        parents: int = 1,
        start: tuple[int, int] | None = None,
    ) -> Assignment:
        """Evolve candidates of ``space`` and write what happened; levels of the database, or sub-blocks without one.

        Args:
            parents: how many of the last stage's survivors have children.
            start: initial candidates, and the tokens they are scored on, where a start has to be found.
        """
        if start is not None:
            refuse_few_tokens(start[1], config.calibration_tokens, "the initial candidates")
        self.progress.save_seconds = config.save_seconds
        scorer = self._scorer(config)
        search = self._run(config, space, scorer, producer or self.stage.method, parents, start)
        best = search.run()
        space.check(best)
        self._write(search, scorer)
        return self._assignment(space.assignment(best), producer or self.stage.method, config, best, space)

    def _scorer(self, config: Evolution) -> Scorer:
        from methods.search._candidates import Scorer
        from methods.search._fitness import Targets

        sequences = self.sequences(config)
        targets = Targets(self.runner, sequences, config.fitness, config.top_k)
        self.stage.notes["target_bytes"] = targets.bytes
        return Scorer(self.runner, self._carrier(), targets, sequences)

    def _carrier(self) -> Carrier:
        from methods.search._candidates import Removals, Swaps

        if self.database is None:
            return Removals(self.runner)
        return Swaps(self.model, self.database, self.runner)

    def _run(
        self,
        config: Evolution,
        space: Space,
        scorer: Scorer,
        name: str,
        parents: int,
        start: tuple[int, int] | None,
    ) -> Run:
        from methods.search._evolution import Evolution as Run
        from methods.search._evolution import Settings

        settings = Settings(
            name=name,
            generations=config.generations,
            children=config.children,
            survivors=config.survivors,
            tokens=config.tokens,
            parents=parents,
            start=start,
            score_every=config.score_every,
        )
        return Run(settings, space, scorer, self.progress, self._holdout(config, scorer))

    def _holdout(self, config: Evolution, scorer: Scorer) -> Any:
        """A function that scores an assignment on the held-out batch, and counts for nothing."""
        from methods.search._candidates import Batch
        from methods.search._candidates import Scorer as Scores
        from methods.search._fitness import Targets

        sequences = self.held_out(config)
        if sequences is None:
            return None
        targets = Targets(self.runner, sequences, config.fitness, config.top_k)
        scores = Scores(self.runner, scorer.carrier, targets, sequences)
        batch = Batch.of(self.runner, targets, sequences)
        self.stage.notes["holdout_tokens"] = batch.tokens

        def score(assignment: Mapping[str, str]) -> float:
            return scores.score([assignment], batch)[0]

        return score

    def _write(self, search: Run, scorer: Scorer) -> None:
        """``files/fitness.csv``, ``curve.csv`` and the notes of a search."""
        from methods.loop import write_curve

        files = self.stage.folder / "files"
        files.mkdir(parents=True, exist_ok=True)
        (files / "fitness.csv").write_text(search.log.text(), encoding="utf-8")
        write_curve(self.stage.folder / "curve.csv", search.log.curve)
        counts = scorer.counts
        self.stage.notes |= {
            "generations": search.generation,
            "candidates": counts.candidates,
            "tokens_forwarded": search.log.tokens,
            "changed_layers": counts.changed,
            "sub_blocks_run": counts.run,
            "sub_blocks_reused": counts.reused,
            "resumed_from_step": search.resumed_from,
        }

    def _assignment(
        self,
        levels: Mapping[str, str],
        producer: str,
        config: Evolution,
        best: tuple[int, ...],
        space: Space,
    ) -> Assignment:
        from methods.search._assignment import Assignment

        about = {"fitness": config.fitness, "data": config.data, "generations": config.generations}
        if self.database is None:
            return Assignment("depth", levels, producer, space.spent(best), about)
        return Assignment.of(self.database, levels, producer, about)


_WHO = {
    "sparsity": ", such as levels.sparsegpt",
    "bits": ", such as levels.gptq",
    "structure": ", such as levels.tyr",
}


def _round(model: Any) -> None:
    """Weights in bfloat16, one after the other; buffers stay as they are, above all the frequencies of positions."""
    import torch

    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)


def _cut(examples: list[Example], tokens: int) -> list[Example]:
    """The first examples, the last of them cut, so that there are exactly so many tokens."""
    from methods.data import Example

    found, left = [], tokens
    for example in examples:
        if left == 0:
            break
        size = min(left, len(example.input_ids))
        found.append(Example(example.input_ids[:size], example.labels[:size]))
        left -= size
    return found
