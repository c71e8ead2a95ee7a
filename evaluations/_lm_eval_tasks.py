"""Builds lm-eval's task objects: ours, packaged ones (on local rows where there are any), and a user's files.

Refused with a sentence: tasks that execute generated code, and a user's task files that run code of their own
(``!function``) without ``--config trust_tasks=true``. Imports lm-eval: load it only inside a running job.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import lm_eval.utils
import yaml
from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from evaluations._lm_eval_data import SPLIT_KEYS, Rows, Supply
from methods.find import nearest
from methods.stage import AssayError

REVISION = 1
PACKAGED = Path(lm_eval.tasks.__file__).parent
OURS = Path(__file__).parent / "tasks"
# Reading all of lm-eval's 14,000 tasks takes five seconds; a task mostly lies in the folder its name begins with.
FOLDERS = dict.fromkeys(("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"), "super_glue")
# Packaged tasks that run what the model wrote without saying so in their file.
RUNS_GENERATED_CODE = re.compile(r"cruxeval|humaneval|mbpp|pseudo_to_code")


def load(names: Sequence[str], supply: Supply, trusted: bool) -> dict[str, Any]:
    """lm-eval's ``{"tasks": …, "groups": …}`` for names of tasks, groups and tags, or files in the data folder.

    Raises:
        AssayError: an unknown name, data that are not on this machine, or a task that is refused.
    """
    for name in names:
        if RUNS_GENERATED_CODE.search(name):
            raise AssayError(
                f"the task {name} runs code that the model wrote, which Assay does not do; leave it out."
            )
    manager = _manager(names)
    manager._factory = Factory(supply)
    files = {name: _user_file(name, supply, trusted) for name in names if name.endswith(".yaml")}
    try:
        return dict(manager.load([str(files.get(name, name)) for name in names]))
    except ImportError as error:
        raise AssayError(
            f"lm-eval needs a package for these tasks that is not installed: {error}."
        ) from error
    except ValueError as error:
        raise AssayError(f"lm-eval cannot set up {', '.join(names)}: {error}") from error


def is_ours(names: Sequence[str]) -> bool:
    """Whether all of the names are tasks of the built-in world."""
    return all((OURS / f"{name}.yaml").is_file() for name in names)


def relative(path: str) -> str:
    """Where a task file lies, without this machine's folders."""
    for folder, name in ((PACKAGED, "lm_eval/tasks"), (OURS, "evaluations/tasks")):
        if Path(path).is_relative_to(folder):
            return f"{name}/{Path(path).relative_to(folder).as_posix()}"
    return Path(path).name


# --- finding task files ----------------------------------------------------------------------------------------


def _manager(names: Sequence[str]) -> TaskManager:
    """A manager that knows the names, reading as few folders as possible."""
    plain = [name for name in names if not name.endswith(".yaml")]
    folders = [PACKAGED / _folder(name) for name in plain if not is_ours([name])]
    wanted = list(dict.fromkeys(str(folder) for folder in folders if folder.is_dir()))
    manager = TaskManager(include_path=[*wanted, str(OURS)], include_defaults=False)
    if not set(plain) <= set(manager.all_tasks):
        manager = TaskManager(include_path=[str(OURS)])
    for name in plain:
        if name not in manager.all_tasks:
            raise AssayError(f"lm-eval has no task called {name!r}{nearest(name, manager.all_tasks)}")
    return manager


def _folder(name: str) -> str:
    return FOLDERS.get(name) or (name if (PACKAGED / name).is_dir() else name.partition("_")[0])


def _user_file(name: str, supply: Supply, trusted: bool) -> Path:
    """A task file below the data folder, checked for code."""
    path = supply.data.folder_of(name).resolve()
    root = path.parents[len(Path(name).parts) - 1]
    if not trusted and any("!function" in file.read_text("utf-8") for file in _with_includes(path, root, ())):
        raise AssayError(
            f"{name} runs Python of its own (!function). If you trust it, say --config trust_tasks=true; otherwise "
            "write the task with templates only."
        )
    return path


def _with_includes(path: Path, root: Path, seen: tuple[Path, ...]) -> Iterator[Path]:
    """The file and the files it includes; packaged ones and ours are trusted and left out."""
    path = path.resolve()
    if path in seen or path.is_relative_to(PACKAGED) or path.is_relative_to(OURS):
        return
    if not path.is_file() or not path.is_relative_to(root):
        raise AssayError(f"{seen[-1].name} includes {path.name}, which is no file in the data folder.")
    yield path
    included = _plain_yaml(path).get("include") or []
    for other in included if isinstance(included, list) else [included]:
        yield from _with_includes(path.parent / str(other), root, (*seen, path))


def _plain_yaml(path: Path) -> dict[str, Any]:
    """A task file with its ``!function`` marks read as text."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise AssayError(f"{path.name} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise AssayError(f"{path.name} is no lm-eval task: it must be a mapping with a 'task' key.")
    return content


@contextmanager
def guarded(names: Sequence[str], trusted: bool) -> Iterator[None]:
    """While a user's untrusted file is in use, templates cannot reach Python's internals; lm-eval's own can.

    Failing templates and lm-eval's own checks become sentences.
    """
    usual = lm_eval.utils.env
    if not trusted and any(name.endswith(".yaml") for name in names):
        lm_eval.utils.env = SandboxedEnvironment(undefined=usual.undefined, keep_trailing_newline=True)
        lm_eval.utils.env.filters.update(usual.filters)
    try:
        yield
    except TemplateError as error:
        raise AssayError(f"a template of the tasks {', '.join(names)} failed: {error}") from error
    except AssertionError as error:
        raise AssayError(f"lm-eval refuses the tasks {', '.join(names)}: {error}") from error
    finally:
        lm_eval.utils.env = usual


# --- building tasks --------------------------------------------------------------------------------------------


class Factory(TaskFactory):
    """lm-eval's factory, with each task's data set replaced by rows of a ``Supply`` where it has some."""

    def __init__(self, supply: Supply) -> None:
        super().__init__()
        self.supply = supply

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        """The config of a task or group. Functions are only imported once the task is known to be allowed."""
        if entry.yaml_path and entry.kind in (Kind.TASK, Kind.PY_TASK):
            _refuse_unsafe(load_yaml(entry.yaml_path, resolve_func=False))
        config = super()._load_full_config(entry, overrides)
        return self._present(config) if entry.kind is Kind.GROUP else self._supplied(config)

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        try:
            return super()._build_task(entry, overrides)
        except OSError as error:
            raise AssayError(
                f"the data of the task {entry.name} are not on this machine, and jobs run without the hub: put a "
                f"copy below the data folder (--config data=DIR, files named after the splits), or fetch it first. "
                f"[{type(error).__name__}]"
            ) from error

    def _present(self, config: dict[str, Any]) -> dict[str, Any]:
        """BLiMP's local copy is incomplete: the group keeps the subtasks whose file is there."""
        if config.get("group") != "blimp":
            return config
        members = config["task"]
        kept = [name for name in members if self.supply.has_blimp(name.removeprefix("blimp_"))]
        if len(kept) < len(members):
            self.supply.partial["blimp"] = f"{len(kept)}/{len(members)}"
            self.supply.said["blimp"] = f"{len(kept)} of {len(members)} subtasks, those with a local file"
        if not kept:
            raise AssayError(
                "the folder blimp in the data folder holds none of BLiMP's files (<paradigm>.jsonl)."
            )
        return {**config, "task": kept}

    def _supplied(self, config: dict[str, Any]) -> dict[str, Any]:
        if config.get("custom_dataset") is not None or "class" in config:
            return config
        source = config.get("metadata", {}).get("config_source", "inline")
        found = self._user_rows(config, Path(source)) or self.supply.rows(config)
        return config if found is None else _on_rows(config, found)

    def _user_rows(self, config: dict[str, Any], file: Path) -> dict[str, Rows] | None:
        """Rows of a user's task: its ``data_files`` lie beside its file, in the data folder."""
        data = self.supply.data
        if data.folder is None or not file.is_relative_to(data.folder):
            return None
        named = (config.get("dataset_kwargs") or {}).get("data_files")
        if config.get("dataset_path") not in ("json", "parquet", "text") or named is None:
            return None
        base = file.parent.relative_to(data.folder)
        return {
            split: data.rows((base / name).as_posix()) for split, name in _by_split(config, named).items()
        }


def _refuse_unsafe(config: dict[str, Any]) -> None:
    if config.get("unsafe_code"):
        raise AssayError(
            f"the task {config['task']} runs code that the model wrote, which Assay does not do."
        )


def _by_split(config: dict[str, Any], named: Any) -> dict[str, str]:
    if isinstance(named, dict) and all(isinstance(name, str) for name in named.values()):
        return dict(named)
    raise AssayError(
        f"{config['task']}: write data_files as a mapping from split to one file: {{test: rows.jsonl}}."
    )


def _on_rows(config: dict[str, Any], rows: dict[str, Rows]) -> dict[str, Any]:
    """The config reading ``rows`` instead of its data set; splits that have none are dropped."""
    from datasets import Dataset

    sets = {split: Dataset.from_list(found) for split, found in rows.items()}
    dropped = {key: None for key in SPLIT_KEYS if config.get(key) not in sets}
    return {**deepcopy(config), **dropped, "custom_dataset": lambda **_: sets, "dataset_kwargs": None}


def without_paths(configs: dict[str, Any]) -> dict[str, Any]:
    """Task configs as lm-eval dumps them, without this machine's paths and without the closures put in above."""
    cleaned = deepcopy(configs)
    for config in cleaned.values():
        metadata = config.get("metadata") or {}
        if "config_source" in metadata:
            metadata["config_source"] = relative(metadata["config_source"])
        if "lambda **_: sets" in str(config.get("custom_dataset", "")):
            config["custom_dataset"] = "rows read by Assay, see local_data"
    return cleaned
