"""A teacher's next-token distributions on fixed data, written down: whole, or the k likeliest entries of each.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" for what they are the targets of; large
vocabularies make the k likeliest the usual choice (huggingface/trl keeps a student's, which a file cannot).

    log p_T(v) = z_v / T - log sum_{all u} exp(z_u / T)         for v among the k likeliest, and each T named here

z are the raw logits at every position that predicts an answer token. The sum runs over the whole vocabulary, so that
what is recorded is exact at every temperature named in ``temperatures``, and the mass that is left out is known: with
T > 1 it grows fast, which the manifest's ``captured_mass`` shows. A full record has the logits of all entries and with
them every temperature.

The files are of these weights, token ids and labels alone: the data, the order of the rows, ``context_tokens``, prompt
style and tokenizer. A student on anything else is refused. They stand for the live teacher wherever it would see the
same rows; not for text that a student writes, and not for hidden states.

With V entries a token takes 4 V bytes (2 V in float16), with k of them 8 k (6 k) and 4 for each temperature: 64 kB
against 0.4 kB for V = 32,000 and k = 64 in float16. float16 keeps each token's logits less the largest of them: entries
within 2 nats of the likeliest to 0.0005, those 16 to 32 below it to 0.008.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from methods.stage import AssayError, Claim, How, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from methods.teacher._files import Manifest

SEEDED = False
USES = (
    "methods.loop",
    "methods.data",
    "methods.checkpoint",
    "methods.terms",
    "methods.term",
    "methods.distill",
)
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()
BYTES = {"float32": 4, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is recorded, of which rows, and how exactly."""

    # rows whose answer tokens are recorded: the data of the students to come
    data: Rows = "authors/full+authors/facts"
    # longer sequences are cut, as the students' will have to be
    context_tokens: Annotated[int, Gt(1)] = 512
    # how many of the likeliest entries are kept; None: the whole vocabulary
    top_k: Annotated[int, Gt(0)] | None = None
    # the temperatures at which the k likeliest entries can be used; a full record serves every temperature
    temperatures: tuple[float, ...] = (1.0,)
    # the numbers' precision in the files; what they are computed in is another matter
    stored: Literal["float32", "float16"] = "float32"
    # of the forward pass; auto: bfloat16 on an accelerator, float32 on the processor
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # sequences that go through the model at once
    batch: Annotated[Annotated[int, Gt(0)], How] = 8
    # files that would take more than this, in gigabytes, are refused before anything is loaded
    most_gigabytes: Annotated[float, Gt(0), How] = 20.0
    # seconds between two saved states
    save_seconds: Annotated[float, Gt(0), How] = 30.0

    def __post_init__(self) -> None:
        """A temperature divides the logits."""
        for value in self.temperatures:
            if not value > 0:
                raise AssayError(
                    f"teacher.logits: temperatures={list(self.temperatures)} has {value:g}, which nothing can be "
                    f"divided by: name temperatures above 0."
                )
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise AssayError(
                f"teacher.logits: temperatures={list(self.temperatures)} must name one at least, and none twice."
            )


def bytes_per_token(config: Config, manifest: Manifest) -> int:
    """What an answer token takes in the files."""
    number = BYTES[config.stored]
    largest = 4 if config.stored == "float16" else 0
    if config.top_k is None:
        return manifest.vocabulary * number + largest
    normalisers = len(config.temperatures) * (1 if manifest.entries is None else 2)
    return config.top_k * (number + 4) + 4 * normalisers + largest


def kept(config: Config, logits: Tensor, entries: int | None) -> dict[str, Tensor]:
    """What is written of the logits [n,V] of n answer tokens: see ``methods.teacher._files``.

    Args:
        entries: how many entries the tokenizer has, where V is padded beyond them: a padded one is never kept.
    """
    import torch

    if config.top_k is None:
        return _stored(config, logits)
    values, indices = logits[:, :entries].topk(config.top_k)
    found = _stored(config, values) | {"indices": indices.int()}
    for name, width in (("logsumexp", None), ("logsumexp_cut", entries)):
        if name == "logsumexp" or width is not None:
            columns = [(logits[:, :width] / value).logsumexp(-1) for value in config.temperatures]
            found[name] = torch.stack(columns, -1).float()
    return found


def _stored(config: Config, logits: Tensor) -> dict[str, Tensor]:
    """Logits [n,k] in the files' precision; float16 is finest near 0, where the likeliest entry is put."""
    if config.stored == "float32":
        return {"logits": logits.float()}
    largest = logits.amax(-1)
    return {"logits": (logits - largest[:, None]).half(), "largest": largest.float()}
