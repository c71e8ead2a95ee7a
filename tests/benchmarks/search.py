"""Candidates scored per second against the released loop, and the memory of a search.

    python tests/benchmarks/search.py [SHAPE ...] [--generations N] [--no-memory]

``parity`` is the shape of the tiny Llama of the parity data (sequences of 32 tokens), ``embedded`` that of the built-in
world's base model (rows of 15 to 40 tokens); weights are random, levels by magnitude. The same evolution is run twice,
with the same children and the same batches. PLAIN is written from the description of the released loop: a level file
of dense values is read from the disk for every layer that changes, children are scored in the order in which they were
drawn, the whole model is run for each sequence, and nothing is kept. Ours has to score at least twice as many
candidates a second and to end with an assignment that is as good on held-out sequences.

Memory: a model of 27 million weights whose levels do not fit into memory is searched in a process of its own. The most
that it holds, beyond what it had before the model, may be 1.5 times the model, the targets and one layer's levels.
One thread; processor time, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from methods.data import Example
from methods.levels._database import Database, Writer
from methods.levels._encodings import encode_sparse
from methods.progress import Progress
from methods.search._candidates import Batch, Counts, Scorer, Swaps
from methods.search._evolution import Evolution, Settings
from methods.search._fitness import Piece, Sequences, Targets, draw
from methods.search._runner import Runner
from methods.search._spaces import Shift

SPEED_LIMIT, MEMORY_LIMIT, QUALITY = 2.0, 1.5, 1.01
LEVELS = range(-3, 4)


@dataclass(frozen=True)
class Shape:
    """A model, its sequences, and the stages of its search."""

    model: Mapping[str, Any]
    lengths: tuple[int, int]
    calibration: int
    step: int
    children: int
    survivors: tuple[int, ...]
    tokens: tuple[int, ...]
    generations: int = 10


def llama(
    vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, groups: int, tied: bool
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "tie_word_embeddings": tied,
        "initializer_range": 0.2 if hidden < 100 else 0.02,
    }  # fmt: skip


SHAPES = {
    "parity": Shape(llama(64, 32, 64, 4, 4, 2, False), (32, 32), 512, 64, 32, (8, 2, 1), (64, 128, 512)),
    "embedded": Shape(
        llama(768, 64, 192, 2, 4, 4, True), (15, 40), 16384, 512, 32, (8, 2, 1), (1024, 2048, 4096), 3
    ),
    "large": Shape(llama(2000, 512, 1376, 8, 8, 8, False), (256, 256), 4096, 16384, 6, (2, 1), (512, 1024)),
}


def main() -> int:
    """Print the tables; exit code 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shapes", nargs="*", default=["parity", "embedded"], help="parity, embedded")
    parser.add_argument("--generations", type=int, help="of each search; default: 10 and 3")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory of a larger model out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        print(json.dumps(memory_of(Path(arguments.child))))
        return 0
    over = [name for name in arguments.shapes if not fast_enough(name, arguments.generations)]
    if not arguments.no_memory:
        over += [] if small_enough() else ["memory"]
    print(f"over a limit: {', '.join(over) or 'none'}")
    return 1 if over else 0


# --- speed --------------------------------------------------------------------------------------------------------


def fast_enough(name: str, generations: int | None) -> bool:
    """Run both loops, print a line, and say whether ours is as much faster as it has to be, and as good."""
    shape = SHAPES[name]
    generations = generations or shape.generations
    with tempfile.TemporaryDirectory() as folder:
        model = made(shape)
        files, plain_files = Path(folder) / "files", Path(folder) / "plain"
        write_levels(model, files, shape.step)
        write_plain(Database.open(files), plain_files)
        ours = timed(shape, files, generations, lambda model, data: scorer(model, files, data))
        plain = timed(shape, files, generations, lambda model, data: Plain(model, plain_files, data))
        held_out = Held(shape, files)
        uniform, quality = (
            held_out(Database.open(files).uniform()),
            [held_out(run.best) for run in (ours, plain)],
        )
    ratio = ours.rate / plain.rate
    print(
        f"{name}: candidates/s {ours.rate:.1f}, PLAIN {plain.rate:.1f}: ratio {ratio:.2f} (>= {SPEED_LIMIT:g}), first "
        f"stage alone {ours.first / plain.first:.2f}\n"
        f"    held-out KL: uniform {uniform:.5f}, ours {quality[0]:.5f}, PLAIN {quality[1]:.5f} (the same assignment: "
        f"{ours.best == plain.best}); sub-blocks that were not run again: {ours.reused:.0%}",
        flush=True,
    )
    return ratio >= SPEED_LIMIT and quality[0] <= QUALITY * quality[1]


@dataclass(frozen=True)
class Run:
    """Candidates scored per second, over all stages and in the first; what came out; the share of states reused."""

    rate: float
    first: float
    best: dict[str, str]
    reused: float


def timed(shape: Shape, files: Path, generations: int, make: Any) -> Run:
    """One evolution, and how fast its candidates were scored."""
    scoring = Clock(make(made(shape), sequences(shape)))
    space = Shift.of(Database.open(files))
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings("benchmark", generations, shape.children, shape.survivors, shape.tokens)
        progress = Progress(Path(folder), 0, save_seconds=3600)
        search = Evolution(settings, space, scoring, progress)  # type: ignore[arg-type]
        best = space.assignment(search.run())
    first = scoring.seconds[shape.tokens[0]]
    counts = scoring.counts
    return Run(
        sum(scoring.candidates.values()) / sum(scoring.seconds.values()),
        scoring.candidates[shape.tokens[0]] / first,
        best,
        counts.reused / max(1, counts.run + counts.reused),
    )


class Clock:
    """A scorer whose batches and scores are timed, by the tokens of the stage."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.counts, self.carrier = inner, inner.counts, inner.carrier
        self.seconds: dict[int, float] = {}
        self.candidates: dict[int, int] = {}

    def batch(self, random: Random, tokens: int) -> Any:
        return self._timed(tokens, lambda: self.inner.batch(random, tokens))

    def score(self, assignments: Sequence[Mapping[str, str]], batch: Any) -> list[float]:
        self.candidates[batch.tokens] = self.candidates.get(batch.tokens, 0) + len(assignments)
        found: list[float] = self._timed(batch.tokens, lambda: self.inner.score(assignments, batch))
        return found

    def _timed(self, tokens: int, work: Any) -> Any:
        begun = time.process_time()
        found = work()
        self.seconds[tokens] = self.seconds.get(tokens, 0.0) + time.process_time() - begun
        return found


def made(shape: Shape) -> Any:
    """The model with random weights, the same each time."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**shape.model)).eval().requires_grad_(False)
    return model


def sequences(shape: Shape, seed: int = 0, tokens: int | None = None) -> Sequences:
    """Random sequences of the shape's lengths."""
    draw_, found, left = Random(seed), [], shape.calibration if tokens is None else tokens
    shortest, longest = shape.lengths
    while left > 0:
        length = shortest + int(draw_.random() * (longest - shortest + 1))
        ids = tuple(int(draw_.random() * shape.model["vocab_size"]) for _ in range(length))
        found.append(Example(ids, ids))
        left -= length
    return Sequences(found, answers=False)


def write_levels(model: Any, folder: Path, step: int) -> None:
    """Seven levels of every layer around one half, by magnitude."""
    writer = Writer(folder, "sparsity")
    for name, part in model.model.layers.named_modules():
        if isinstance(part, torch.nn.Linear):
            weight = part.weight.detach()
            ranks = weight.abs().flatten().argsort()
            zeros = {str(level): weight.numel() // 2 + level * step for level in LEVELS}
            levels = {}
            for level, count in zeros.items():
                pruned = weight.clone()
                pruned.view(-1)[ranks[:count]] = 0.0
                levels[level] = encode_sparse(pruned)
            shares = {level: count / weight.numel() for level, count in zeros.items()}
            writer.write(f"model.layers.{name}", int(name.split(".")[0]), "weights", levels, zeros, shares)
    writer.close(model, {"method": "benchmark"})


def scorer(model: Any, files: Path, data: Sequences) -> Scorer:
    """Ours."""
    database, runner = Database.open(files, model), Runner(model)
    return Scorer(runner, Swaps(model, database, runner), Targets(runner, data, "kl", 512), data)


class Held:
    """KL on sequences that no search has seen."""

    def __init__(self, shape: Shape, files: Path) -> None:
        data = sequences(shape, seed=1, tokens=2048)
        self.scorer = scorer(made(shape), files, data)
        self.batch = Batch.of(self.scorer.runner, self.scorer.targets, data)

    def __call__(self, assignment: Mapping[str, str]) -> float:
        return self.scorer.score([assignment], self.batch)[0]


# --- PLAIN: the released loop, as the specification describes it ----------------------------------------------------


def write_plain(database: Database, folder: Path) -> None:
    """A file of dense values for every layer and level."""
    for unit in database.units:
        (folder / unit.name).mkdir(parents=True)
        for level in unit.names:
            save_file(
                {"weight": database.weight(unit.name, level)}, folder / unit.name / f"{level}.safetensors"
            )


class Plain:
    """Scores one candidate after the other: reads the layers that changed, runs the whole model on each sequence."""

    def __init__(self, model: Any, folder: Path, data: Sequences) -> None:
        self.model, self.folder, self.data = model, folder, data
        self.counts = Counts()
        self.carrier = SimpleNamespace(loaded=())
        self.state: dict[str, str] = {}
        with torch.no_grad():
            self.dense = [model(input_ids=torch.tensor([ids])).logits[0] for ids in data.tokens]

    def batch(self, random: Random, tokens: int) -> Any:
        return PlainBatch(draw(random, self.data.lengths, tokens), tokens)

    def score(self, assignments: Sequence[Mapping[str, str]], batch: Any) -> list[float]:
        self.counts.run += len(assignments)
        return [self.fitness(assignment, batch.pieces) for assignment in assignments]

    def fitness(self, assignment: Mapping[str, str], pieces: Sequence[Piece]) -> float:
        self.load(assignment)
        total, positions = 0.0, 0
        for piece in pieces:
            ids = torch.tensor([self.data.tokens[piece.sequence][: piece.length]])
            with torch.no_grad():
                logits = self.model(input_ids=ids).logits[0, :-1]
                total += float(self.divergence(logits, self.dense[piece.sequence][: piece.length - 1]))
            positions += piece.length - 1
        return total / positions

    def load(self, assignment: Mapping[str, str]) -> None:
        for name, level in assignment.items():
            if self.state.get(name) != level:
                weight = load_file(self.folder / name / f"{level}.safetensors")["weight"]
                self.model.get_submodule(name).weight.data = weight
        self.state = dict(assignment)

    def divergence(self, logits: Tensor, dense: Tensor) -> Tensor:
        ours, theirs = logits.log_softmax(-1), dense.log_softmax(-1)
        return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")


@dataclass(frozen=True)
class PlainBatch:
    """Which sequences, and how many tokens they have."""

    pieces: list[Piece]
    tokens: int


# --- memory -------------------------------------------------------------------------------------------------------


def small_enough() -> bool:
    """Search the large shape in a process of its own, print a line, and say whether it held as little as it has to."""
    with tempfile.TemporaryDirectory() as folder:
        write_levels(made(SHAPES["large"]), Path(folder) / "files", SHAPES["large"].step)
        # Large pieces that are freed go back at once: what the allocator keeps for later is not held by the search.
        allocator = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | allocator
        command = [sys.executable, __file__, "--child", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"the search of the large shape failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    ratio = found["peak"] / found["allowed"]
    print(
        f"memory: peak {found['peak'] / 2**20:.0f} MiB; model {found['model'] / 2**20:.0f}, targets "
        f"{found['targets'] / 2**20:.0f}, one layer's levels {found['levels'] / 2**20:.0f}: ratio {ratio:.2f} "
        f"(<= {MEMORY_LIMIT:g})"
    )
    return bool(ratio <= MEMORY_LIMIT)


def memory_of(folder: Path) -> dict[str, float]:
    """The most memory that a search holds beyond what the process had before the model."""
    shape = SHAPES["large"]
    timed(
        SHAPES["parity"], _small(folder / "warm"), 1, lambda model, data: scorer(model, folder / "warm", data)
    )
    before = held()
    with Peak() as peak:
        model = made(shape)
        database = Database.open(folder / "files", memory_bytes=0)
        runner, data = Runner(model), sequences(shape)
        targets = Targets(runner, data, "kl", 512)
        scoring: Any = Scorer(runner, Swaps(model, database, runner), targets, data)
        settings = Settings("benchmark", 2, shape.children, shape.survivors, shape.tokens)
        Evolution(settings, Shift.of(database), scoring, Progress(folder / "scratch", 0)).run()
    size = float(sum(weight.nbytes for weight in model.parameters()))
    levels = float(max(4 * unit.rows * unit.columns * len(unit.levels) for unit in database.units))
    return {
        "peak": peak.most - before,
        "model": size,
        "targets": float(targets.bytes),
        "levels": levels,
        "allowed": size + targets.bytes + levels,
    }


def _small(folder: Path) -> Path:
    write_levels(made(SHAPES["parity"]), folder, SHAPES["parity"].step)
    return folder


def held() -> float:
    """Bytes that belong to this process alone: pages of files that are mapped do not count."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024.0 * int(line.split()[1])
    raise SystemExit("this system does not say how much memory a process holds")


class Peak:
    """Looks every few milliseconds how much memory is held."""

    def __enter__(self) -> Peak:
        self.most, self._done = held(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.003):
            self.most = max(self.most, held())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


if __name__ == "__main__":
    sys.exit(main())
