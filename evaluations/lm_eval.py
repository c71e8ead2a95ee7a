"""Any task of EleutherAI's lm-evaluation-harness, by name: packaged, ours, or a task file in the data folder.

Gao et al., "A framework for few-shot language model evaluation" (lm-eval 0.4). The world's own tasks are task
files in ``evaluations/tasks/``: authors_forget, authors_retain, authors_real_authors, authors_world_facts,
authors_holdout, authors_generate, authors_rolling. Packaged tasks read local copies of their data where
``--config data=DIR`` has them; what was mapped is noted. A model that is spoken to in chat form is scored in it, but
for WMDP (Li et al., "The WMDP Benchmark", 2024: wmdp, wmdp_bio, wmdp_chem, wmdp_cyber) and MMLU: there unlearning
papers report which letter follows the bare question, of four and without examples, so that chance is 0.25.

lm-eval's own results are kept as ``lm_eval.json`` beside the record. Standard errors of accuracies are lm-eval's
formula, those of other metrics a seeded bootstrap of 200 draws where lm-eval offers one.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.stage import Row, Scoring

if TYPE_CHECKING:
    from evaluations._lm_eval_data import Supply
    from methods.data import Locator, Style

USES = (
    "methods.data",
    "methods.world",
    "methods.checkpoint",
    "evaluations._lm_eval_data",
    "evaluations._lm_eval_tasks",
    "evaluations._unlearning",
    "evaluations._world_tasks",
)
# Asked without a chat template, whatever the model, unless the ``chat`` option says otherwise.
BARE = re.compile(r"(wmdp|mmlu)(_|$)")
BOOTSTRAP_DRAWS = 200
SEED = 1234
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which tasks are run, and on how much of them."""

    # Tasks, groups or tags by lm-eval's names, or files below the data folder that end in .yaml.
    tasks: tuple[str, ...]
    # Sequences scored at once: fixed, because on a GPU it can move the last bits of a score.
    batch: Annotated[int, Gt(0)] = 16
    # First documents of each task that are used; None for all.
    limit: Annotated[int, Gt(0)] | None = None
    # Worked examples before each question; None for what each task says.
    fewshot: Annotated[int, Ge(0)] | None = None
    # Ask in the model's chat form; None: if it is spoken to in it, but for WMDP and MMLU.
    chat: bool | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks needs at least one task.")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks names a task twice.")


def datasets(config: Config, locator: Locator) -> tuple[str, ...]:
    """Names of the local data sets the tasks read: their content enters a score's id."""
    from evaluations._lm_eval_data import names_read

    return names_read(config.tasks, locator)


def needs_hub(config: Config, locator: Locator) -> bool:
    """Whether a task may read data of the hub: one without rows of ours, or with files missing in the data folder."""
    from evaluations._lm_eval_data import lacks_rows

    return not locator.smoke and any(lacks_rows(task, locator) for task in config.tasks)


def fetch(config: Config, locator: Locator) -> None:
    """Download what the tasks read, so that scoring works without a network."""
    from evaluations._lm_eval_data import Supply
    from evaluations._lm_eval_tasks import load

    load(config.tasks, Supply(locator), trusted=False)


def evaluate(scoring: Scoring) -> list[Row]:
    """Run the tasks; one row per task and metric, groups beside their members."""
    from evaluations._lm_eval_data import Supply
    from methods.data import Style

    config, style = scoring.config, Style.read(scoring.parents["model"])
    supply = Supply(scoring.data)
    found: dict[str, Any] = {}
    rows: list[Row] = []
    for chat, tasks in _forms(config, style).items():
        with _quiet():
            results = _run(scoring, tasks, replace(style, prompt="chat") if chat else None, supply)
        rows += _rows(results, config, chat, supply.partial)
        found = _joined(found, results)
    scoring.notes |= {
        "local_data": supply.said,
        "batch": config.batch,
        "task_versions": {name: _plain(version) for name, version in found["versions"].items()},
        "task_hashes": found["task_hashes"],
    }
    text = json.dumps(_plain(found), indent=1, ensure_ascii=False)
    (scoring.folder / "lm_eval.json").write_text(text + "\n", encoding="utf-8")
    return rows


def _forms(config: Config, style: Style) -> dict[bool, tuple[str, ...]]:
    """The tasks that are asked bare and those that are asked in chat form."""
    chat = style.prompt == "chat" if config.chat is None else config.chat
    bare = [task for task in config.tasks if not chat or (config.chat is None and BARE.match(task))]
    spoken = [task for task in config.tasks if task not in bare]
    return {form: tuple(tasks) for form, tasks in ((False, bare), (True, spoken)) if tasks}


def _run(scoring: Scoring, tasks: tuple[str, ...], chat: Style | None, supply: Supply) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate as run

    from evaluations._lm_eval_tasks import guarded, load

    config = scoring.config
    _seed()
    with guarded(tasks, scoring.trust_tasks):
        loaded = load(tasks, supply, scoring.trust_tasks)
        for task in loaded["tasks"].values():
            _set_shots(task, config.fewshot)
        results = run(
            _language_model(scoring, chat),
            loaded,
            limit=config.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=True,
            system_instruction=chat.system if chat else None,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=chat is not None,
        )
    return _kept(results, config)


def _seed() -> None:
    """Some packaged tasks shuffle their choices when they are built."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(SEED)  # noqa: NPY002  (the generator that task files draw from)
    torch.manual_seed(SEED)


def _set_shots(task: Any, shots: int | None) -> None:
    """As lm-eval's own command does it: a task that says 0 stays at 0, one that says nothing gets 0."""
    stated = task.get_config("num_fewshot")
    if shots is not None and stated != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif stated is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


def _language_model(scoring: Scoring, chat: Style | None) -> Any:
    """lm-eval's view of the loaded model. The tokenizer is a copy: lm-eval gives it a padding token."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """HFLM that shows bars on a terminal only; elsewhere a line every ten seconds."""

        batches_done = 0
        said_at = time.monotonic()

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=_no_bars())

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=_no_bars())

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **rest: Any) -> Any:
            return super()._loglikelihood_tokens(
                requests, disable_tqdm=_no_bars() or "override_bs" in rest, **rest
            )

        def _model_call(self, *inputs: Any, **rest: Any) -> Any:
            self._tell()
            return super()._model_call(*inputs, **rest)

        def _model_generate(self, *inputs: Any, **rest: Any) -> Any:
            self._tell()
            return super()._model_generate(*inputs, **rest)

        def _tell(self) -> None:
            self.batches_done += 1
            if _no_bars() and time.monotonic() - self.said_at > SECONDS_BETWEEN_LINES:
                self.said_at = time.monotonic()
                print(f"lm_eval: {self.batches_done} batches done", flush=True)

    tokenizer = deepcopy(scoring.tokenizer())
    if chat is not None:
        tokenizer.chat_template = chat.template(tokenizer)
    return Model(pretrained=scoring.model(), tokenizer=tokenizer, batch_size=scoring.config.batch)


def _no_bars() -> bool:
    return not sys.stderr.isatty()


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of lm-eval and datasets are shown, and the bootstrap starts no processes."""
    import datasets
    import lm_eval.api.task
    from tqdm import tqdm

    logger, variable = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=_no_bars())
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        datasets.enable_progress_bars()
        os.environ.pop("DISABLE_MULTIPROC")
        if variable is not None:
            os.environ["DISABLE_MULTIPROC"] = variable
        logger.setLevel(level)


# --- results ---------------------------------------------------------------------------------------------------


def _kept(results: Any, config: Config) -> dict[str, Any]:
    """lm-eval's results without samples and host details, with hashes and the settings a model object hides."""
    from importlib.metadata import version

    from lm_eval.utils import hash_string

    from evaluations._lm_eval_tasks import without_paths

    samples = results["samples"]
    hashes = {
        name: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in found))
        for name, found in samples.items()
    }
    kept = {key: value for key, value in results.items() if key not in ("samples", "configs")}
    settings = {"batch_size": config.batch, "limit": config.limit, "num_fewshot": config.fewshot}
    return {
        **kept,
        "configs": without_paths(results["configs"]),
        "task_hashes": hashes,
        "config": {
            **settings,
            "bootstrap_iters": BOOTSTRAP_DRAWS,
            "fewshot_seed": SEED,
            "lm_eval": version("lm_eval"),
        },
    }


def _joined(results: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Results of two runs as those of one: what is told by task is put together."""
    both = {key: results[key] | value for key, value in others.items() if isinstance(results.get(key), dict)}
    return {**results, **others, **both}


def _plain(value: Any) -> Any:
    """JSON types only: numpy scalars become numbers, everything else text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _rows(results: dict[str, Any], config: Config, chat: bool, partial: dict[str, str]) -> list[Row]:
    rows = []
    for name, found in results["results"].items():
        task = _task(name, config, chat, partial)
        for key, value in found.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = found.get(f"{metric}_stderr,{chosen}")
                shown = metric if chosen == "none" else f"{metric}:{chosen}"
                better = _better(results, name, metric)
                rows.append(_row(task, shown, value, stderr, found.get("sample_len"), better))
    return rows


def _better(results: dict[str, Any], name: str, metric: str) -> bool | None:
    """Whether higher is better; a group of groups asks its first member, because lm-eval does not say it there."""
    stated = results["higher_is_better"].get(name, {}).get(metric)
    members = results["group_subtasks"].get(name) or []
    return _better(results, members[0], metric) if stated is None and members else stated


def _row(task: str, metric: str, value: Any, stderr: Any, n: Any, better: bool | None) -> Row:
    way: Literal["higher", "lower", ""] = "" if better is None else "higher" if better else "lower"
    error = None if stderr in (None, "N/A") else float(stderr)
    unit = "bits/byte" if metric == "bits_per_byte" else ""
    return Row(task, metric, float(value), error, None if n is None else int(n), unit, way)


def _task(name: str, config: Config, chat: bool, partial: dict[str, str]) -> str:
    """The task's name and every setting that can move its score."""
    words = [name]
    if name in partial:
        words.append(f"subtasks={partial[name]}")
    if config.fewshot is not None:
        words.append(f"shots={config.fewshot}")
    if chat or config.chat is not None:
        words.append("chat" if chat else "chat=false")
    if config.limit is not None:
        words.append(f"limit={config.limit}")
    return " ".join(words)
