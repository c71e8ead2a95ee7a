"""``python -m workflows.prepare RECEIPT``: fetch hub models at their full revisions.

The only job with network access, and the only one that sees the hub's token, which is never recorded.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from pathlib import Path

from methods.stage import AssayError
from workflows.record import Store, digest

# What is fetched of a model: nothing that could be executed or unpickled.
ALLOWED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")


def fetch(store: Store, model: str) -> Path:
    """Fetch ``repository@revision`` into the results folder, unless it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = model.rpartition("@")
    target = store.root / "models" / f"model.hub-{digest(['hub', repository, revision])[:12]}"
    if target.is_dir():
        return target
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        snapshot_download(repository, revision=revision, allow_patterns=list(ALLOWED), local_dir=temporary)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise AssayError(f"{model} could not be fetched from the hub: {error}") from error
    shutil.rmtree(temporary / ".cache", ignore_errors=True)
    os.rename(temporary, target)
    return target


def main(arguments: list[str]) -> int:
    """The command of the rule ``prepare``."""
    receipt = Path(arguments[0])
    store = Store(receipt.parents[2])
    try:
        for model in json.loads((receipt.parent / "models.json").read_text(encoding="utf-8")):
            print(f"{model}: {fetch(store, model)}")
    except AssayError as error:
        print(f"assay: {error}", file=sys.stderr)
        return 2
    receipt.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
