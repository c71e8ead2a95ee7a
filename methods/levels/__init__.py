"""Level databases: every linear layer at every level of compression, computed once for whoever searches.

A method file says what its levels are in ``KIND`` (``sparsity``, ``bits`` or ``structure``) and holds
``build(config, model, calibration, progress, writer)``, which writes the layers one by one and leaves out those that
are ``finished``: what is there when a job is killed is not computed again. A job that is asked to stop does so behind
the layer it is at. The result is a ``files/`` folder that ``_database.Database`` reads.

``build`` must leave the model as it was, bit for bit, also where errors are passed on from block to block.

REVISION covers the private modules of this folder; ``_database`` has one of its own for those who read levels.
"""

from __future__ import annotations

import shutil
from types import ModuleType

from methods.stage import Stage

REVISION = 1
UNFINISHED = "levels"


def run(stage: Stage, method: ModuleType) -> None:
    """Build the levels of ``stage.parents["model"]`` into ``stage.folder / "files"``."""
    from methods.checkpoint import load_model
    from methods.levels._database import Writer
    from methods.progress import link
    from methods.prune import Calibration

    model = load_model(stage.parents["model"], dtype="float32").requires_grad_(False)
    # Beside the state, because the stage's folder does not outlive a stop.
    writer = Writer(stage.progress.scratch / UNFINISHED, method.KIND, stage.progress.stop_if_asked)
    stage.notes["resumed_from_step"] = writer.count
    try:
        stage.progress.watch()
        method.build(stage.config, model, Calibration(stage), stage.progress, writer)
    finally:
        stage.progress.release()
    units = writer.close(model, {"method": stage.method})
    files = stage.folder / "files"
    shutil.copytree(writer.folder, files, copy_function=link)
    stage.notes["units"] = len(units)
    stage.notes["levels"] = sum(len(unit.levels) for unit in units)
    stage.notes["bytes"] = sum(path.stat().st_size for path in files.iterdir())
