"""A teacher that was asked beforehand: what ``teacher.logits`` has written, looked up row by row.

Files are mapped into memory; of a batch only its own rows are read, and of those one block of tokens at a time. What
does not fit is refused before a model is loaded: another tokenizer, other rows or another packing (the digest of every
row's token ids and labels), and terms that the record cannot serve. torch is imported at the top: this module is only
loaded by a running job. ``methods.distill``'s REVISION covers this file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.distill._sources import softened
from methods.stage import AssayError
from methods.teacher._files import (
    MANIFEST,
    REMEDY,
    Manifest,
    digest_of,
    mark_of,
    raw_logits,
    read_manifest,
    row_digests,
    tokenizer_digest,
    top_log_probs,
)

if TYPE_CHECKING:
    from methods.data import Example, Part, Style
    from methods.distill._sources import Layers, Places, Said
    from methods.term import Entry, Look

# Shards that are kept open at once; each takes a file handle.
OPEN = 64
# Of a shard, what belongs to tokens.
OF_TOKENS = ("logits", "indices", "logsumexp", "logsumexp_cut", "largest")


class Recorded:
    """A ``Source`` over a ``files/`` folder of ``teacher.logits``.

    Raises:
        AssayError: the folder holds no teacher's outputs, or not all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        # how many entries both vocabularies are cut to; None: they agree as they are
        self.cut_to: int | None = None
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._starts = [shard["rows"][0] for shard in self.manifest.shards]

    # --- what it fits -----------------------------------------------------------------------------------------

    def refuse_terms(self, entries: Sequence[Entry]) -> None:
        """AssayError for a term that wants what this record has not; what no record has is refused by the planner."""
        for entry in entries:
            if not entry.flags.teacher:
                continue
            problem = self._problem(entry)
            if problem:
                raise AssayError(f"recorded={self.folder.parent.name}: the term {entry.name} {problem}.")

    def _problem(self, entry: Entry) -> str:
        """What a term wants in vain, as a clause; empty where there is nothing."""
        top_k, temperatures = self.manifest.top_k, self.manifest.temperatures
        if top_k is None:
            return ""
        if not entry.flags.top_k:
            return (
                f"needs the probabilities of all entries, and this record has the {top_k} largest of each token: record"
                " without top_k, or give teacher= instead"
            )
        temperature = float(getattr(entry.config, "temperature", 1.0))
        if temperature not in temperatures:
            known = ", ".join(f"{value:g}" for value in temperatures)
            return (
                f"has temperature={temperature:g}, and this record of the {top_k} largest entries serves {known}: "
                f"record with temperatures=[{known}, {temperature:g}]"
            )
        return ""

    def refuse_tokenizer(self, tokenizer: Any) -> None:
        """AssayError unless the student's tokenizer is the one that the rows were recorded with."""
        if tokenizer_digest(tokenizer) != self.manifest.tokenizer:
            raise AssayError(
                f"{self.folder} was recorded with another tokenizer, of {self.manifest.tokenizer_tokens} tokens; the "
                f"student's has {len(tokenizer.get_vocab())}. A loss on logits needs one vocabulary: record a teacher "
                f"of the student's family."
            )

    def fit_vocabulary(self, predicted: int) -> int | None:
        """To how many entries both vocabularies are cut where they are padded differently, else None.

        Args:
            predicted: how many entries the student predicts.
        """
        whole, own = self.manifest.vocabulary, self.manifest.entries or self.manifest.vocabulary
        if predicted == whole:
            return None
        if predicted < own:
            raise AssayError(
                f"the student predicts {predicted} entries and {self.folder} has {own} of the tokenizer's: only a "
                f"vocabulary padded beyond the tokenizer's can be cut."
            )
        self.cut_to = own
        return own

    def refuse_rows(
        self,
        examples: Sequence[Example],
        data: str,
        context_tokens: int,
        style: Style,
    ) -> None:
        """AssayError unless these are the recorded rows, token by token; it says what differs, as far as that is known.

        Args:
            data: the name of the student's data, for the sentence.
        """
        ours = row_digests(examples)
        if digest_of(ours) == self.manifest.digest:
            return
        differences = [*self._differences(data, context_tokens, style), *self._first_difference(ours)]
        raise AssayError(
            f"{self.folder} was recorded on other rows than those of this stage: {'; '.join(differences)}. Record the "
            f"teacher on the same data, with the same context_tokens and prompt style."
        )

    def _differences(self, data: str, context_tokens: int, style: Style) -> Iterator[str]:
        """What the two stages were told differently."""
        if data != self.manifest.data:
            yield f"data is {self.manifest.data!r} there and {data!r} here"
        if context_tokens != self.manifest.context_tokens:
            yield f"context_tokens is {self.manifest.context_tokens} there and {context_tokens} here"
        theirs = self.manifest.style
        for name, value in asdict(style).items():
            if theirs.get(name) != value:
                yield f"the style's {name} is {theirs.get(name)!r} there and {value!r} here"

    def _first_difference(self, ours: Sequence[bytes]) -> Iterator[str]:
        """How many rows there are, or the first that differs."""
        if len(ours) != self.manifest.rows:
            yield f"there are {self.manifest.rows} rows there and {len(ours)} here"
            return
        for number in range(len(self.manifest.shards)):
            shard = self._shard(number)
            for row, mark in enumerate(shard.marks.tolist(), start=shard.first):
                if mark != mark_of(ours[row]):
                    yield f"row {row} is the first that differs"
                    return

    # --- what it says -----------------------------------------------------------------------------------------

    def said(self, part: Part, places: Places, hidden: bool = False, attention: Layers = False) -> Said:
        """What was recorded of the rows of a part, in the order of their answer tokens."""
        assert not hidden and not attention and places.positions == "answers"  # refuse_terms has said so
        if part.numbers is None or bool((part.numbers < 0).any()):
            raise AssayError(
                f"{self.folder} is looked up by the places of rows in their data, which text that was written while "
                f"training does not have: give teacher= instead of recorded=."
            )
        spans = [self._span(row) for row in part.numbers.tolist()]
        if sum(stop - start for _, start, stop in spans) != len(places):
            raise AssayError(
                f"{self.folder} has another number of answer tokens for these rows than the batch: {REMEDY}."
            )
        return RecordedSaid(self, spans, places.index.device)

    def forget(self) -> None:
        """What is kept is the open files."""

    def _span(self, row: int) -> tuple[int, int, int]:
        """The shard of a row, and where its tokens begin and end in it."""
        number = bisect_right(self._starts, row) - 1
        shard = self._shard(number)
        start, stop = shard.starts[row - shard.first : row - shard.first + 2].tolist()
        return number, start, stop

    def read(self, spans: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        """The tensors of some tokens, one after the other: of each span its shard, first token and end."""
        found = [self._shard(number).tokens(start, stop) for number, start, stop in spans]
        return {name: torch.cat([piece[name] for piece in found]) for name in found[0]}

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            about = self.manifest.shards[number]
            self._open[number] = _Shard(self.folder / about["file"], about["rows"][0], about["tokens"])
        self._open.move_to_end(number)
        while len(self._open) > OPEN:
            self._open.popitem(last=False)
        return self._open[number]


class _Shard:
    """One file, mapped into memory. ``first`` is the number of its first row."""

    def __init__(self, path: Path, first: int, tokens: int) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.first = path, first
        try:
            self._file: Any = safe_open(path, framework="pt").__enter__()
            names = set(self._file.keys())
            self._slices = {name: self._file.get_slice(name) for name in OF_TOKENS if name in names}
            self.starts: Tensor = self._file.get_tensor("starts")
            found = {piece.get_shape()[0] for piece in self._slices.values()}
        except (OSError, SafetensorError) as error:
            raise AssayError(
                f"{path} is no whole shard of a teacher's outputs ({error}): {REMEDY}."
            ) from error
        if found != {tokens} or int(self.starts[-1]) != tokens:
            raise AssayError(f"{path} has other tokens than {MANIFEST} says: {REMEDY}.")

    @cached_property
    def marks(self) -> Tensor:
        """The first bytes of each row's digest [r]."""
        found: Tensor = self._file.get_tensor("marks")
        return found

    def tokens(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of the tokens from ``start`` to before ``stop``."""
        return {name: piece[start:stop] for name, piece in self._slices.items()}


class RecordedSaid:
    """What was recorded at some places: nothing is read before it is asked for."""

    look: Look | None = None

    def __init__(self, source: Recorded, spans: Sequence[tuple[int, int, int]], device: Any) -> None:
        self._source, self._device = source, device
        self._spans = spans
        self._ends = list(accumulate(stop - start for _, start, stop in spans))
        self._last: tuple[tuple[int, int], Mapping[str, Tensor]] | None = None

    def logits(self, rows: slice) -> Tensor:
        """Raw logits [c,V] of a full record."""
        assert self._source.manifest.top_k is None  # refuse_terms has said so
        return raw_logits(self._read(rows))[:, : self._source.cut_to]

    def log_probs(self, rows: slice, temperature: float) -> Tensor:
        return softened(self.logits(rows), temperature)

    def top(self, rows: slice, temperature: float) -> tuple[Tensor, Tensor] | None:
        """The largest entries [c,k] and their log-probabilities; None from a full record."""
        manifest = self._source.manifest
        if manifest.top_k is None:
            return None
        said = self._read(rows)
        column = manifest.temperatures.index(float(temperature))
        values = top_log_probs(said, column, temperature, cut=self._source.cut_to is not None)
        return said["indices"].long(), values

    def _read(self, rows: slice) -> Mapping[str, Tensor]:
        """The tensors of these tokens on the device. Several terms ask for one block, one after the other."""
        start, stop, _ = rows.indices(self._ends[-1] if self._ends else 0)
        if self._last is None or self._last[0] != (start, stop):
            found = self._source.read(list(self._within(start, stop)) or [(self._spans[0][0], 0, 0)])
            self._last = (start, stop), {name: value.to(self._device) for name, value in found.items()}
        return self._last[1]

    def _within(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The spans of the tokens from ``start`` to before ``stop``, cut to them."""
        for (number, first, last), end in zip(self._spans, self._ends, strict=True):
            begin = end - (last - first)
            low, high = max(start, begin), min(stop, end)
            if low < high:
                yield number, first + low - begin, first + high - begin
