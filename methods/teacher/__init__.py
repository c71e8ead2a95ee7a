"""What a teacher says of every answer token of some data, computed once and written down for many students.

A method file says what it keeps in ``kept(config, logits, entries)`` and how much that is in ``bytes_per_token(config,
manifest)``. The result is a ``files/`` folder (see ``_files``) that a distillation names in ``recorded=``. It is one
of exactly these weights, these token ids and these labels: whoever reads it compares their digests first.

The rows are gone through in their order, in shards of whole rows. A shard that is written stays: a job that is killed
goes on behind the last one, and what it writes has the same bits. REVISION covers the private files of this folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example, Part
    from methods.teacher._files import Folder, Manifest

REVISION = 1
GIGABYTE = 1e9
UNFINISHED = "answers"


def run(stage: Stage, method: ModuleType) -> None:
    """Write what ``stage.parents["model"]`` says of the rows into ``stage.folder / "files"``."""
    from methods import loop
    from methods.progress import link
    from methods.teacher import _files

    config = stage.config
    manifest, examples = described(stage, method)
    refuse_too_large(config, manifest)
    loop.make_deterministic(stage.threads)
    model = loop.frozen_model(stage.parents["model"], loop.Training(precision=config.precision))
    # Beside the state, because the stage's folder does not outlive a stop.
    folder = _files.Folder(stage.progress.scratch / UNFINISHED)
    shards = _files.shards_of(examples, manifest.bytes_per_token)
    _write(stage, method, manifest, examples, shards, model, folder)
    folder.close(manifest, len(shards))
    shutil.copytree(folder.path, stage.folder / "files", copy_function=link)
    stage.notes |= {
        "rows": manifest.rows,
        "answer_tokens": manifest.tokens,
        "bytes": sum(path.stat().st_size for path in (stage.folder / "files").iterdir()),
        "bytes_per_token": manifest.bytes_per_token,
    }


def described(stage: Stage, method: ModuleType) -> tuple[Manifest, list[Example]]:
    """What is to be written, and the rows it is about; nothing but tokenizer and configuration have been read.

    Raises:
        AssayError: there are no rows or no answer tokens, or more entries are to be kept than there are.
    """
    from methods.checkpoint import load_tokenizer
    from methods.data import Style, encode
    from methods.teacher._files import describe

    config, folder = stage.config, stage.parents["model"]
    tokenizer, style = load_tokenizer(folder), Style.read(folder)
    rows = stage.rows("data")
    if not rows:
        raise AssayError(
            f"{stage.method}: data={named(config.data)!r} has no rows, so there is nothing to record."
        )
    examples = encode(rows, tokenizer, style, config.context_tokens)
    manifest = describe(config, named(config.data), folder, tokenizer, style, examples)
    entries = manifest.entries or manifest.vocabulary
    if manifest.top_k is not None and manifest.top_k > entries:
        raise AssayError(
            f"{stage.method}: top_k={manifest.top_k} is more than the {entries} entries of the teacher's vocabulary: "
            f"lower it, or leave it out to keep them all."
        )
    manifest.bytes_per_token = method.bytes_per_token(config, manifest)
    return manifest, examples


def named(data: Any) -> str:
    """What an option of type ``Rows`` names: data sets, or the id of a data stage."""
    return data if isinstance(data, str) else str(data.id)


def refuse_too_large(config: Any, manifest: Manifest) -> None:
    """AssayError, before anything is loaded, for files beyond ``most_gigabytes``."""
    wanted = manifest.tokens * manifest.bytes_per_token / GIGABYTE
    if wanted > config.most_gigabytes:
        what = "all" if manifest.top_k is None else str(manifest.top_k)
        less = "keep fewer entries with top_k" if manifest.top_k is None else "lower top_k"
        raise AssayError(
            f"keeping {what} of {manifest.vocabulary} entries of {manifest.tokens} answer tokens takes {wanted:.3g} "
            f"GB, more than most_gigabytes={config.most_gigabytes:g}: {less}, name fewer rows, or raise it."
        )


# --- the work -----------------------------------------------------------------------------------------------------


def _write(
    stage: Stage,
    method: ModuleType,
    manifest: Manifest,
    examples: Sequence[Example],
    shards: Sequence[range],
    model: Any,
    folder: Folder,
) -> None:
    """Shard after shard; those of an earlier attempt are kept."""
    progress = stage.progress
    progress.save_seconds = stage.config.save_seconds
    try:
        progress.load()
        stage.notes["resumed_from_step"] = done = folder.finished(shards)
        for number in progress.bar(len(shards), "shards", initial=done):
            rows = [examples[row] for row in shards[number]]
            said = _said(stage.config, method, manifest, model, rows)
            folder.write(number, shards[number], rows, said, manifest)
            # What was written needs no other state; this one keeps what the attempt has spent, and stops where asked.
            if progress.due(number + 1):
                progress.save(number + 1, {}, {})
    finally:
        progress.release()


def _said(
    config: Any, method: ModuleType, manifest: Manifest, model: Any, rows: Sequence[Example]
) -> dict[str, Tensor]:
    """What is kept of these rows' answer tokens, one after the other [n,...]."""
    import torch

    from methods.data import collate

    pieces: list[Mapping[str, Tensor]] = []
    with torch.no_grad():
        for start in range(0, len(rows), config.batch):
            part = collate(rows[start : start + config.batch], manifest.padding_id, "train").to(model.device)
            for logits in _logits(model, part):
                found = method.kept(config, logits, manifest.entries)
                pieces.append({name: tensor.cpu() for name, tensor in found.items()})
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _logits(model: Any, part: Part) -> Iterator[Tensor]:
    """The logits of a part's answer tokens in their order, in blocks [c,V] of a bounded size."""
    from methods.distill._sources import places
    from methods.term._blocks import blocks, look

    found, index = look(model, part), places(part).index
    for rows in blocks(found, len(index)):
        yield found.at(index[rows])
