"""How far a compressed model is from the dense one: what a search makes small. Lower is better.

Sizes: ``N`` positions that predict something, ``V`` words, ``K`` kept words, ``d`` width, ``L`` blocks. The last
position of a sequence predicts nothing and is left out, so a sequence of one token contributes nothing at all, to the
mean as to the sum. All means are over positions, whatever batch they were computed in. Logarithms of probabilities are
taken in float32, sums over positions in float64.

=============  ====================================================================================================
``kl``         mean of KL(dense || compressed) over the whole vocabulary (EvoPress, ``src/metrics.py``)
``sparse_kl``  the same over the dense model's K most likely words, both distributions renormalised over those K.
               With K = V it is ``kl``; it is *not* the full divergence cut to K terms
``ppl``        exp of the mean cross-entropy of the true next token; needs no dense model
``hidden``     ours: ``sparse_kl`` plus the mean over blocks of ||h - h*||^2 / ||h*||^2, h* the dense block's output
=============  ====================================================================================================
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Literal

from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor, device

    from methods.data import Example
    from methods.search._runner import Runner

Kind = Literal["kl", "sparse_kl", "ppl", "hidden"]

# Tokens, padding included, that are run at a time: on a processor they should stay in its cache.
PROCESSOR_TOKENS, CARD_TOKENS = 1024, 16384
# Logits [positions, words] that are held at a time.
MOST_LOGITS = 2**27
# Targets of a batch are made ready once and kept for all candidates up to this size.
MOST_READY_BYTES = 2**28
# The share of the machine's memory that targets may take.
MEMORY_SHARE = 0.5


# --- one block of positions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What N positions are compared with.

    ``labels`` [N] the true next tokens; ``log`` [N,V or K] the dense log-probabilities and ``probabilities`` their
    exponentials; ``words`` [N,K] which words they belong to, None for all. The last three are None for ``ppl``.
    """

    labels: Tensor
    log: Tensor | None = None
    probabilities: Tensor | None = None
    words: Tensor | None = None

    def ready(self) -> Target:
        """The same with probabilities, for many candidates."""
        return replace(self, probabilities=None if self.log is None else self.log.exp())

    def rows(self, chosen: slice) -> Target:
        """Some of the positions."""
        parts = (self.labels, self.log, self.probabilities, self.words)
        return Target(*(None if part is None else part[chosen] for part in parts))  # type: ignore[arg-type]


def kl(logits: Tensor, target: Target) -> Tensor:
    """KL(dense || compressed) of logits [N,V], summed over positions: a float64 scalar."""
    import torch

    assert target.log is not None and target.probabilities is not None
    log = logits.log_softmax(-1)
    # In place: a batch of logits is the largest thing there is.
    return torch.sub(target.log, log, out=log).mul_(target.probabilities).sum(-1).double().sum()


def sparse_kl(logits: Tensor, target: Target) -> Tensor:
    """The same over the words that are kept, both sides renormalised over them."""
    assert target.words is not None
    return kl(logits.gather(-1, target.words), target)


def cross_entropy(logits: Tensor, target: Target) -> Tensor:
    """Nats of the true next tokens under logits [N,V], summed over positions: a float64 scalar."""
    log = logits.log_softmax(-1)
    return -log.gather(-1, target.labels[:, None]).double().sum()


def hidden_error(hidden: Tensor, dense: Tensor) -> Tensor:
    """||h - h*||^2 / ||h*||^2 of hidden states [N,d], summed over positions: a float64 scalar."""
    wanted = dense.float()
    error = (hidden.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-30)
    return error.double().sum()


COMPARE: Mapping[str, Callable[[Tensor, Target], Tensor]] = {
    "kl": kl,
    "sparse_kl": sparse_kl,
    "hidden": sparse_kl,
    "ppl": cross_entropy,
}


def finished(kind: str, total: float, positions: int) -> float:
    """The fitness from a sum over positions. What is no number is infinitely bad: it must never sort first."""
    mean = total / positions
    value = math.exp(min(mean, 700.0)) if kind == "ppl" else mean
    return value if math.isfinite(value) else math.inf


def dense_target(kind: str, logits: Tensor, labels: Tensor, top_k: int) -> Target:
    """The target that dense logits [N,V] and the true next tokens [N] make."""
    if kind == "ppl":
        return Target(labels)
    words = None
    if kind != "kl":
        logits, words = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    return Target(labels, logits.float().log_softmax(-1), words=words)


def fitness(
    kind: str, logits: Sequence[Tensor], dense: Sequence[Tensor], tokens: Sequence[Tensor], top_k: int = 512
) -> float:
    """The fitness of whole sequences: logits and dense logits [T,V] and token ids [T], one of each per sequence.

    For whoever has logits already; not for ``hidden``. A search computes the same from the positions of a batch.

    Raises:
        AssayError: no sequence has two tokens.
    """
    total, positions = 0.0, 0
    for ours, theirs, ids in zip(logits, dense, tokens, strict=True):
        if len(ids) > 1:
            target = dense_target(kind, theirs[:-1].float(), ids[1:], top_k).ready()
            total += float(COMPARE[kind](ours[:-1].float(), target))
            positions += len(ids) - 1
    refuse_empty(positions)
    return finished(kind, total, positions)


def refuse_empty(positions: int) -> None:
    if positions == 0:
        raise AssayError(
            "none of the sequences of a batch predicts anything: they have one token each, or no answer. Use longer "
            "sequences, or more tokens for each stage."
        )


# --- what is drawn ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The first ``length`` tokens of a sequence."""

    sequence: int
    length: int


def draw(random: Random, lengths: Sequence[int], tokens: int) -> list[Piece]:
    """Sequences drawn uniformly without replacement, the last one cut, so that they have exactly ``tokens`` tokens."""
    if sum(lengths) < tokens:
        raise AssayError(f"a stage wants {tokens} tokens, and the calibration data has {sum(lengths)}.")
    pieces: list[Piece] = []
    order, left = list(range(len(lengths))), tokens
    for place in range(len(order)):
        if left == 0:
            break
        # Only random() is promised to give the same values in every Python version.
        other = place + int(random.random() * (len(order) - place))
        order[place], order[other] = order[other], order[place]
        pieces.append(Piece(order[place], min(lengths[order[place]], left)))
        left -= pieces[-1].length
    return pieces


class Sequences:
    """Token sequences of different lengths, and at which of their positions a prediction counts.

    Args:
        answers: only positions that predict a token of an answer count, not those of a prompt.
    """

    def __init__(self, examples: Sequence[Example], answers: bool) -> None:
        self.tokens = [example.input_ids for example in examples]
        self.lengths = [len(ids) for ids in self.tokens]
        # Position t predicts token t+1.
        self.places = [
            [at for at in range(len(example.labels) - 1) if not answers or example.labels[at + 1] >= 0]
            for example in examples
        ]
        self.starts = [0]
        for places in self.places:
            self.starts.append(self.starts[-1] + len(places))

    @property
    def positions(self) -> int:
        """All positions that count."""
        return self.starts[-1]

    def whole(self) -> list[Piece]:
        """Every sequence."""
        return [Piece(index, length) for index, length in enumerate(self.lengths)]

    def counted(self, piece: Piece) -> int:
        """How many positions of a piece count: the first so many of its sequence."""
        return sum(at < piece.length - 1 for at in self.places[piece.sequence])


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Padded:
    """Pieces padded to one length: token ids [B,T].

    Of the positions that count: ``places`` [N] in the flattened batch, ``rows`` [N] in the targets, and ``labels`` [N],
    the tokens that follow them.
    """

    ids: Tensor
    places: Tensor
    rows: Tensor
    labels: Tensor


def padded(sequences: Sequences, pieces: Sequence[Piece], most_tokens: int) -> Iterator[Padded]:
    """The pieces in batches of at most ``most_tokens`` tokens with padding; pieces of like lengths come together."""
    for group in groups(pieces, most_tokens):
        yield _padded(sequences, group)


def groups(pieces: Sequence[Piece], most_tokens: int) -> list[list[Piece]]:
    """Shortest first, each group as long as it stays below the limit; a longer piece has a group of its own."""
    found: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (piece.length, piece.sequence)):
        if not found or piece.length * (len(found[-1]) + 1) > most_tokens:
            found.append([])
        found[-1].append(piece)
    return found


def _padded(sequences: Sequences, group: Sequence[Piece]) -> Padded:
    import torch

    width = max(piece.length for piece in group)
    ids = torch.zeros(len(group), width, dtype=torch.int64)
    places: list[int] = []
    rows: list[int] = []
    labels: list[int] = []
    for line, piece in enumerate(group):
        tokens = sequences.tokens[piece.sequence]
        ids[line, : piece.length] = torch.tensor(tokens[: piece.length])
        counted = sequences.places[piece.sequence][: sequences.counted(piece)]
        places += [line * width + at for at in counted]
        rows += range(sequences.starts[piece.sequence], sequences.starts[piece.sequence] + len(counted))
        labels += [tokens[at + 1] for at in counted]
    return Padded(ids, *(torch.tensor(numbers, dtype=torch.int64) for numbers in (places, rows, labels)))


# --- the dense model's answers ------------------------------------------------------------------------------------


class Targets:
    """The dense model's answers at every position that counts, on the processor; computed once.

    ``log`` [N,V or K] float32, ``words`` [N,K] int32, ``blocks`` [L,N,d] in the model's own precision; None where the
    fitness has no use for them.

    Raises:
        AssayError: before anything is run, where they would take more than half of the machine's memory.
    """

    def __init__(self, runner: Runner, sequences: Sequences, kind: str, top_k: int) -> None:
        self.kind, self.top_k = kind, min(top_k, int(runner.model.config.vocab_size))
        self.log: Tensor | None = None
        self.words: Tensor | None = None
        self.blocks: Tensor | None = None
        refuse_empty(sequences.positions)
        self.bytes = self._size(runner, sequences.positions)
        _refuse_too_large(self.bytes, sequences, kind, self.top_k)
        if kind != "ppl":
            self._compute(runner, sequences)

    def _size(self, runner: Runner, positions: int) -> int:
        width = {"ppl": 0, "kl": 4 * int(runner.model.config.vocab_size)}.get(self.kind, 8 * self.top_k)
        blocks = len(runner.layers) * runner.model.config.hidden_size * runner.model.dtype.itemsize
        return positions * (width + (blocks if self.kind == "hidden" else 0))

    def _allocate(self, runner: Runner, positions: int) -> None:
        import torch

        width = int(runner.model.config.vocab_size) if self.kind == "kl" else self.top_k
        self.log = torch.empty(positions, width)
        if self.kind != "kl":
            self.words = torch.empty(positions, width, dtype=torch.int32)
        if self.kind == "hidden":
            shape = (len(runner.layers), positions, runner.model.config.hidden_size)
            self.blocks = torch.empty(shape, dtype=runner.model.dtype)

    def _compute(self, runner: Runner, sequences: Sequences) -> None:
        import torch

        self._allocate(runner, sequences.positions)
        with torch.inference_mode():
            for batch in padded(sequences, sequences.whole(), tokens_at_once(runner.model.device)):
                self._add(runner, batch)

    def _add(self, runner: Runner, batch: Padded) -> None:
        """Run one batch and keep what its positions say."""
        prepared, places = runner.prepare(batch.ids), batch.places.to(runner.model.device)
        hidden = prepared.hidden
        for index, site in enumerate(runner.sites):
            hidden = runner.step(index, hidden, prepared.settings)
            if self.blocks is not None and site.ends_block:
                self.blocks[site.block].index_copy_(0, batch.rows, wanted(hidden, places).cpu())
        hidden, log = wanted(hidden, places), self.log
        assert log is not None
        for part in parts(len(places), int(runner.model.config.vocab_size)):
            found = dense_target(self.kind, runner.logits(hidden[part]), batch.labels[part], self.top_k)
            assert found.log is not None
            log.index_copy_(0, batch.rows[part], found.log.cpu())
            if self.words is not None and found.words is not None:
                self.words.index_copy_(0, batch.rows[part], found.words.cpu().int())

    def at(self, batch: Padded, where: device) -> Target:
        """The target of a batch's positions on a device."""
        labels = batch.labels.to(where)
        if self.log is None:
            return Target(labels)
        log = self.log[batch.rows].to(where)
        words = None if self.words is None else self.words[batch.rows].to(where).long()
        return Target(labels, log, words=words).ready()

    def blocks_at(self, batch: Padded, where: device) -> Tensor | None:
        """The dense blocks' outputs [L,N,d] at a batch's positions."""
        return None if self.blocks is None else self.blocks[:, batch.rows].to(where)


def wanted(hidden: Tensor, places: Tensor) -> Tensor:
    """The hidden states [N,d] at the positions that count, of [B,T,d]."""
    return hidden.flatten(0, 1).index_select(0, places)


def parts(positions: int, vocabulary: int) -> Iterator[slice]:
    """Slices of so many positions whose logits fit."""
    size = max(1, MOST_LOGITS // vocabulary)
    for start in range(0, positions, size):
        yield slice(start, start + size)


def tokens_at_once(where: device) -> int:
    """Tokens that are run at a time on a device."""
    return PROCESSOR_TOKENS if where.type == "cpu" else CARD_TOKENS


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _refuse_too_large(size: int, sequences: Sequences, kind: str, top_k: int) -> None:
    limit = int(MEMORY_SHARE * memory_bytes())
    if size <= limit:
        return
    remedy = {
        "kl": "use fitness='sparse_kl', which keeps top_k words of each position",
        "sparse_kl": f"lower top_k={top_k}",
        "hidden": f"use fitness='sparse_kl', or lower top_k={top_k}",
    }[kind]
    raise AssayError(
        f"fitness={kind!r} would keep {size / 2**30:,.1f} GiB of the dense model's answers at {sequences.positions:,} "
        f"positions, and at most {limit / 2**30:,.1f} GiB of this machine's memory are for them: {remedy}, or lower "
        "calibration_tokens."
    )
