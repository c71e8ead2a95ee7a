"""The folder in which a teacher's outputs are kept, and what they are the outputs of.

``manifest.json`` says what was recorded; ``answers-00000.safetensors`` and so on hold the answer tokens of whole rows,
one row after the other. In such a shard of r rows with n answer tokens:

    starts [r+1]      where each row's tokens begin, and n
    marks [r]         the first 8 bytes of each row's digest
    logits [n,k]      of the k likeliest entries, the likeliest first; of all entries [n,V] in a full record
    indices [n,k]     which entries they are (not in a full record)
    logsumexp [n,t]   of all V logits over each of the t temperatures (not in a full record)
    logsumexp_cut     the same of the tokenizer's entries alone, where the vocabulary is padded beyond them
    largest [n]       what was taken off all logits of a token before they were rounded (float16 only)

Tensors are mapped into memory and read where they are touched. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, NotFinite

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example, Style

MANIFEST = "manifest.json"
REMEDY = "record them anew with teacher.logits"
# A shard ends with the row that takes it beyond one of these: a killed job loses one shard.
SHARD_BYTES = 2**30
SHARD_TOKENS = 2**16


@dataclass
class Manifest:
    """What was recorded, of which teacher, of which tokens.

    ``entries`` is the number of the tokenizer's entries where the ``vocabulary`` that the teacher predicts is padded
    beyond them, else None. ``data`` only names the rows; ``digest`` is over every row's token ids and labels.
    ``captured_mass`` holds for each temperature the mean and the least share of probability that the kept entries have.
    """

    rows: int
    tokens: int
    vocabulary: int
    entries: int | None
    top_k: int | None
    temperatures: list[float]
    dtype: str
    data: str
    context_tokens: int
    style: dict[str, Any]
    tokenizer: str
    tokenizer_tokens: int
    teacher: str
    digest: str
    padding_id: int
    bytes_per_token: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    captured_mass: dict[str, dict[str, float]] = field(default_factory=dict)


def describe(
    config: Any, data: str, folder: Path, tokenizer: Any, style: Style, examples: Sequence[Example]
) -> Manifest:
    """Everything that is known before the first token is recorded."""
    from methods.data import padding_id
    from methods.distill import text_config

    vocabulary = int(text_config(folder)["vocab_size"])
    entries = max(tokenizer.get_vocab().values()) + 1
    return Manifest(
        rows=len(examples),
        tokens=sum(map(answer_tokens, examples)),
        vocabulary=vocabulary,
        entries=entries if entries < vocabulary else None,
        top_k=config.top_k,
        temperatures=[float(value) for value in config.temperatures] if config.top_k is not None else [],
        dtype=config.stored,
        data=data,
        context_tokens=config.context_tokens,
        style=asdict(style),
        tokenizer=tokenizer_digest(tokenizer),
        tokenizer_tokens=len(tokenizer.get_vocab()),
        teacher=weights_digest(folder),
        digest=digest_of(row_digests(examples)),
        padding_id=padding_id(tokenizer),
    )


def answer_tokens(example: Example) -> int:
    """The targets that count: labels but the first, which nothing predicts."""
    from methods.data import IGNORED

    return sum(label != IGNORED for label in example.labels[1:])


# --- what makes two of them comparable ----------------------------------------------------------------------------


def row_digests(examples: Sequence[Example]) -> list[bytes]:
    """sha256 of each row's token ids and labels."""
    return [
        hashlib.sha256(_bytes(example.input_ids) + _bytes(example.labels)).digest() for example in examples
    ]


def digest_of(rows: Sequence[bytes]) -> str:
    """One digest of all rows in their order, as hexadecimal digits."""
    return hashlib.sha256(b"".join(rows)).hexdigest()


def mark_of(row: bytes) -> int:
    """The first 8 bytes of a row's digest as a signed number, which a tensor can hold."""
    return int.from_bytes(row[:8], "big", signed=True)


def _bytes(numbers: Sequence[int]) -> bytes:
    """The same on every machine; the length first, so that no two pairs of lists look alike."""
    return b"".join(number.to_bytes(8, "little", signed=True) for number in (len(numbers), *numbers))


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what ``methods.checkpoint.tokenizer_difference`` looks at: every token's id, and how texts are cut."""
    from methods.checkpoint import SAMPLE

    cut = tokenizer(SAMPLE, add_special_tokens=False, verbose=False)["input_ids"]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), cut], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """sha256 over the bytes of a model's weight files."""
    from methods.checkpoint import weight_files

    whole = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


# --- writing ------------------------------------------------------------------------------------------------------


def shards_of(examples: Sequence[Example], bytes_per_token: int) -> list[range]:
    """The rows of each shard: as many as stay below the sizes above, one at least."""
    most = max(1, min(SHARD_TOKENS, SHARD_BYTES // max(1, bytes_per_token)))
    shards, start, held = [], 0, 0
    for row, example in enumerate(examples):
        count = answer_tokens(example)
        if held and held + count > most:
            shards.append(range(start, row))
            start, held = row, 0
        held += count
    return [*shards, range(start, len(examples))]


class Folder:
    """Writes shards one by one into ``path``; those that an earlier attempt finished are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob("tmp-*"):
            unfinished.unlink()

    def finished(self, shards: Sequence[range]) -> int:
        """How many of the shards are there, counted from the first."""
        return next((n for n in range(len(shards)) if not (self.path / shard_name(n)).is_file()), len(shards))

    def write(
        self, number: int, rows: range, examples: Sequence[Example], said: Mapping[str, Tensor], of: Manifest
    ) -> None:
        """Write a shard atomically. ``said`` holds its tokens' tensors [n,...].

        Raises:
            NotFinite: the teacher says of a token what is no distribution.
        """
        import torch
        from safetensors.torch import save_file

        from methods.progress import flush

        counts = [answer_tokens(example) for example in examples]
        assert all(len(tensor) == sum(counts) for tensor in said.values()), number
        beside = {
            "starts": torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64),
            "marks": torch.tensor([mark_of(row) for row in row_digests(examples)], dtype=torch.int64),
        }
        _refuse_not_finite(rows, said)
        about = {"rows": [rows.start, rows.stop], "tokens": sum(counts), "mass": _mass(said, of.temperatures)}
        temporary = self.path / f"tmp-{uuid.uuid4().hex}"
        tensors = {name: tensor.contiguous() for name, tensor in {**said, **beside}.items()}
        save_file(tensors, temporary, metadata={"shard": json.dumps(about)})
        temporary.chmod(0o644)
        flush(temporary)
        temporary.rename(self.path / shard_name(number))

    def close(self, manifest: Manifest, count: int) -> None:
        """Write the manifest, completed by what its ``count`` shards say of themselves."""
        from safetensors import safe_open

        for number in range(count):
            with safe_open(self.path / shard_name(number), framework="pt") as file:
                about = json.loads(file.metadata()["shard"])
            manifest.shards.append({"file": shard_name(number), **about})
        manifest.captured_mass = _captured(manifest)
        text = json.dumps(asdict(manifest), indent=1, allow_nan=False) + "\n"
        (self.path / MANIFEST).write_text(text, encoding="utf-8")


def _refuse_not_finite(rows: range, said: Mapping[str, Tensor]) -> None:
    """A vocabulary's padding may be -inf; anything else that is no number would be taught."""
    logits = said["logits"]
    wrong = logits.isnan() | logits.isposinf()
    if bool(wrong.any()) or (len(logits) and bool(logits.isneginf().all(-1).any())):
        raise NotFinite(
            f"the teacher's outputs on the rows from {rows.start} to {rows.stop - 1} are not finite: nothing is kept."
        )


def _mass(said: Mapping[str, Tensor], temperatures: Sequence[float]) -> list[list[float]]:
    """For each temperature the sum and the least of the probability that each token's kept entries have."""
    found = []
    for column, temperature in enumerate(temperatures):
        mass = top_log_probs(said, column, temperature).double().exp().sum(-1).clamp(max=1.0)
        found.append([float(mass.sum()), float(mass.min()) if len(mass) else 1.0])
    return found


def _captured(manifest: Manifest) -> dict[str, dict[str, float]]:
    """The mean and the least captured mass over all shards, by temperature."""
    found = {}
    for column, temperature in enumerate(manifest.temperatures):
        pairs = [shard["mass"][column] for shard in manifest.shards]
        mean = sum(total for total, _ in pairs) / manifest.tokens
        found[repr(temperature)] = {"mean": mean, "least": min(least for _, least in pairs)}
    return found


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"answers-{number:05d}.safetensors"


# --- reading ------------------------------------------------------------------------------------------------------


def raw_logits(said: Mapping[str, Tensor]) -> Tensor:
    """Logits [n,k] or [n,V] as they were, in float32, from a shard's tensors or slices of them."""
    logits = said["logits"].float()
    return logits + said["largest"][:, None] if "largest" in said else logits


def top_log_probs(said: Mapping[str, Tensor], column: int, temperature: float, cut: bool = False) -> Tensor:
    """Log-probabilities [n,k] of the kept entries at a recorded temperature: number ``column`` of them.

    With ``cut`` among the tokenizer's entries alone.
    """
    normaliser = said["logsumexp_cut" if cut and "logsumexp_cut" in said else "logsumexp"]
    return raw_logits(said) / temperature - normaliser[:, column, None]


def read_manifest(folder: Path) -> Manifest:
    """What a ``files/`` folder holds.

    Raises:
        AssayError: it holds no teacher's outputs, or not all of them.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise AssayError(f"{folder} holds no teacher's outputs: name a chain that ends in teacher.logits.")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        names = [str(shard["file"]) for shard in manifest.shards]
        _check_rows(manifest)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AssayError(f"{path} does not describe a teacher's outputs ({error}): {REMEDY}.") from error
    for number, name in enumerate(names):
        if name != shard_name(number) or not (folder / name).is_file() or (folder / name).is_symlink():
            raise AssayError(f"{folder / name} is missing or is not the file itself: {REMEDY}.")
    return manifest


def _check_rows(manifest: Manifest) -> None:
    """ValueError unless the shards hold all rows and all tokens, one behind the other."""
    row = tokens = 0
    for shard in manifest.shards:
        start, stop = shard["rows"]
        if start != row or stop < start:
            raise ValueError(f"a shard begins with row {start} where {row} comes")
        row, tokens = stop, tokens + shard["tokens"]
    if (row, tokens) != (manifest.rows, manifest.tokens):
        raise ValueError(f"its shards have {row} rows and {tokens} tokens")
