"""What the learning curve follows beside the terms of the loss: the NLL of data sets that are named, while training.

On a language model ``probe.NAME`` is the NLL of the answers in nats per token; on a classifier it is that of the cases,
and ``probe.NAME.accuracy`` is the share of them whose own class has the highest score.
``methods.loop``'s REVISION covers this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, NotFinite, Stage

if TYPE_CHECKING:
    from methods.data import Cases, Part

Batches = Sequence[Any]


class Probes:
    """The probed data sets of a run, read and cut into batches once.

    Args:
        wanted: each ``name=data set``.
        size: sequences or cases that go through the model at once.
        tokenizer: of the model; None for a classifier. ``source``: the folder that says how a model is spoken to.
    """

    def __init__(
        self,
        stage: Stage,
        model: Any,
        wanted: Sequence[str],
        size: int,
        context_tokens: int,
        tokenizer: Any,
        source: Path,
        device: Any,
    ) -> None:
        self.stage, self.model, self.size, self.context_tokens = stage, model, size, context_tokens
        self.tokenizer, self.source, self.device = tokenizer, source, device
        self.sets: Mapping[str, Batches] = dict(self._read(text) for text in wanted)

    def measure(self, step: int) -> dict[str, float]:
        """Every number of every set at the model's weights; it is left in training mode.

        Raises:
            NotFinite: one of them is not a finite number.
        """
        import torch

        found: dict[str, float] = {}
        if self.sets:
            self.model.eval()
            with torch.no_grad():
                for name, batches in self.sets.items():
                    found |= self._answers(name, batches)
            self.model.train()
        for name, value in found.items():
            if value - value != 0:
                raise NotFinite(f"step {step}: {name} is {value}; try a smaller learning rate.")
        return found

    def _answers(self, name: str, batches: Batches) -> dict[str, float]:
        if self.tokenizer is None:
            return _of_cases(self.model, name, self._on_device(batches))
        total = _nll(self.model, self._on_device(batches))
        return {f"probe.{name}": total / sum(part.tokens for part in batches)}

    def _on_device(self, batches: Batches) -> Iterator[Any]:
        return (part.to(self.device) for part in batches)

    def _read(self, text: str) -> tuple[str, Batches]:
        name, sign, dataset = text.partition("=")
        if not sign or not name or not dataset:
            raise AssayError(
                f"probe={text!r} must be written as name=data set, as in retain=authors/retain90."
            )
        rows = self.stage.data.rows(dataset)
        return name, self._cases(rows, dataset, name) if self.tokenizer is None else self._parts(rows, name)

    def _cases(self, rows: Sequence[Any], dataset: str, name: str) -> Batches:
        from methods.data import read_cases

        table = read_cases(rows, dataset)
        table.check_model(self.model, dataset)
        return table.batches(self.size, name)

    def _parts(self, rows: Sequence[Any], name: str) -> Batches:
        """Sorted by length, so that little is padding."""
        from methods.data import Style, collate, encode, padding_id

        examples = encode(rows, self.tokenizer, Style.read(self.source), self.context_tokens)
        examples = sorted(examples, key=lambda example: len(example.input_ids))
        groups = [examples[start : start + self.size] for start in range(0, len(examples), self.size)]
        return [collate(group, padding_id(self.tokenizer), name) for group in groups]


def _nll(model: Any, parts: Iterator[Part]) -> float:
    """Nats over all answer tokens."""
    from methods.terms import forward, token_nll

    return sum(float(token_nll(forward(model, part)).double().sum()) for part in parts)


def _of_cases(model: Any, name: str, batches: Iterator[Cases]) -> dict[str, float]:
    from torch.nn.functional import cross_entropy

    from methods.terms import case_scores

    nats, right, count = 0.0, 0, 0
    for cases in batches:
        scores = case_scores(model, cases)
        nats += float(cross_entropy(scores, cases.labels, reduction="sum"))
        right += int((scores.argmax(dim=-1) == cases.labels).sum())
        count += len(cases.labels)
    return {f"probe.{name}": nats / count, f"probe.{name}.accuracy": right / count}
