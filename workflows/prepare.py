"""``python -m workflows.prepare RECEIPT``: fetch hub models at their full revisions, data sets and task data.

The only job with network access, and the only one that sees the hub's token, which is never recorded. What to
fetch stands in ``prepare.json`` beside the receipt.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from methods.data import Locator
from methods.find import catalogue
from methods.stage import AssayError
from workflows.options import decode_config
from workflows.plan import Plan
from workflows.record import Store, digest, read_job

# What is fetched of a model: nothing that could be executed or unpickled.
ALLOWED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")


def wanted(plan: Plan) -> dict[str, list[str]]:
    """What the missing jobs of a plan read from the hub: models, data sets, and scores whose tasks do."""
    if plan.settings.smoke or not plan.missing:
        return {"models": [], "data": [], "scores": []}
    locator = Locator(plan.settings.data)
    models = [f"{spec.hf}@{spec.revision}" for spec in plan.experiment.models.values() if spec.hf is not None]
    names = sorted({name for job in plan.missing.values() for name in job.content})
    by_config: dict[str, str] = {}
    for job in plan.missing.values():
        if job.kind == "score":
            module = catalogue(plan.settings.methods).evaluation(job.method).load()
            needs_hub = getattr(module, "needs_hub", None)
            if needs_hub is not None and needs_hub(decode_config(module.Config, job.config), locator):
                by_config.setdefault(digest([job.method, job.config]), job.id)
    data = [name for name in names if locator.needs_hub(name)]
    return {"models": models, "data": data, "scores": list(by_config.values())}


def fetch_model(store: Store, model: str) -> Path:
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


def _fetch_all(store: Store, items: dict[str, list[str]], data: str | None) -> None:
    for model in items["models"]:
        print(f"{model}: {fetch_model(store, model)}")
    locator = Locator(Path(data) if data else None)
    for name in items["data"]:
        print(f"{name}: {len(locator.rows(name))} rows")
    for job_id in items["scores"]:
        job = read_job(store.job(job_id))
        module: Any = catalogue(tuple(Path(folder) for folder in job.methods)).evaluation(job.method).load()
        module.fetch(decode_config(module.Config, job.config), locator)
        print(f"{job.method}: the data of its tasks")


def main(arguments: list[str]) -> int:
    """The command of the rule ``prepare``."""
    receipt = Path(arguments[0])
    store = Store(receipt.parents[2])
    try:
        described = json.loads((receipt.parent / "prepare.json").read_text(encoding="utf-8"))
        _fetch_all(store, described["items"], described["data"])
    except AssayError as error:
        print(f"assay: {error}", file=sys.stderr)
        return 2
    receipt.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
