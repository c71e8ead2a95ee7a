"""Perplexity of running text, in strided windows.

``exp`` of the mean loss per token over windows of ``context_tokens`` that begin ``stride_tokens`` apart. A token is
scored once, in the first window that holds it, so from the second window on each has at least
``context_tokens - stride_tokens`` tokens before it; losses are never smoothed or clipped. A window's very first
token has nothing before it and is not scored: with no overlap that is one token a window (as in the GPTQ and
SparseGPT evaluations), with overlap it is the first of the text only. The begin token is put once before the text,
if the tokenizer does so by itself.

Perplexities of different tokenizers cannot be compared; ``bits_per_byte`` can.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from evaluations import _statistics
from methods.stage import AssayError, Dataset, Row, Scoring

if TYPE_CHECKING:
    from methods.data import Example

USES = (
    "methods.data",
    "methods.terms",
    "methods.world",
    "methods.checkpoint",
    "evaluations._likelihood",
    "evaluations._statistics",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which text is read, and in what windows."""

    # Data set whose rows have a text column: the name ends in its split, as in "wikitext2/test".
    data: Dataset
    # Tokens of a window.
    context_tokens: Annotated[int, Gt(1)] = 512
    # Tokens from one window's begin to the next; None for no overlap.
    stride_tokens: Annotated[int, Gt(0)] | None = None
    # How rows become one text: as lines of a file, or with an empty line after each ("\n\n".join of the rows), as
    # in the published WikiText-2 numbers of the pruning and quantisation papers.
    join: Literal["lines", "blank_lines"] = "lines"
    # Windows scored at once.
    batch: Annotated[int, Gt(0)] = 8
    # First windows that are scored; None for all.
    limit: Annotated[int, Gt(0)] | None = None


def evaluate(scoring: Scoring) -> list[Row]:
    """Rows ``nll``, ``perplexity`` and ``bits_per_byte``; n is the number of scored tokens."""
    from evaluations._likelihood import score
    from methods.data import padding_id

    config, tokenizer = scoring.config, scoring.tokenizer()
    text = _text(scoring)
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    examples = windows(ids, config.context_tokens, _stride(config))[: config.limit]
    answers = score(scoring.model(), examples, padding_id(tokenizer), config.batch)
    sums = [float(answer.losses.sum()) for answer in answers]
    counts = [len(answer.losses) for answer in answers]
    tokens_per_byte = (len(ids) - (ids[0] in tokenizer.all_special_ids)) / len(text.encode("utf-8"))
    return _rows(config, _statistics.ratio(sums, counts), sum(counts), tokens_per_byte)


def windows(ids: list[int], context: int, stride: int) -> list[Example]:
    """Windows over the tokens of a text; labels only where no earlier window has scored the token.

    Raises:
        AssayError: the text has fewer than two tokens, or the stride leaves tokens out.
    """
    from methods.data import Example

    if len(ids) < 2:
        raise AssayError("perplexity needs a text of at least two tokens.")
    if stride > context:
        raise AssayError(
            f"stride_tokens={stride} is longer than context_tokens={context}: tokens would be left out."
        )
    found, scored = [], 0
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + context]
        labels = [-100] * (scored - begin) + window[scored - begin :]
        if any(label != -100 for label in labels[1:]):
            found.append(Example(tuple(window), tuple(labels)))
        scored = begin + len(window)
        if scored == len(ids):
            break
    return found


def _stride(config: Config) -> int:
    return config.context_tokens if config.stride_tokens is None else config.stride_tokens


def _text(scoring: Scoring) -> str:
    rows = scoring.data.rows(scoring.config.data)
    if not all(isinstance(row.get("text"), str) for row in rows):
        raise AssayError(
            f"perplexity needs rows with a text column, which {scoring.config.data} does not have."
        )
    if scoring.config.join == "blank_lines":
        return "\n\n".join(row["text"] for row in rows)
    return "".join(row["text"] if row["text"].endswith("\n") else row["text"] + "\n" for row in rows)


def _rows(config: Config, nll: _statistics.Estimate, tokens: int, tokens_per_byte: float) -> list[Row]:
    task = f"{config.data} context={config.context_tokens} stride={_stride(config)} joined={config.join}"
    if config.limit is not None:
        task += f" limit={config.limit}"
    # beyond float64 it is infinite, and the loss still says how bad the model is
    perplexity = math.exp(nll.value) if nll.value < math.log(sys.float_info.max) else math.inf
    bits = tokens_per_byte / math.log(2)

    def row(metric: str, value: float, slope: float, unit: str) -> Row:
        """The standard error follows that of the loss by the slope."""
        return Row(
            task, metric, value, None if nll.stderr is None else slope * nll.stderr, tokens, unit, "lower"
        )

    return [
        row("nll", nll.value, 1.0, "nats/token"),
        row("perplexity", perplexity, perplexity, ""),
        row("bits_per_byte", nll.value * bits, bits, "bits/byte"),
    ]
