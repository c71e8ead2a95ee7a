"""Reading and writing models in Hugging Face layout: safetensors, JSON and tokenizer files, nothing that can run code.

A model is loaded in a stated precision, never in the library's default, and only when it is complete: a missing
weight would silently be a random one. It is saved in a stated precision, too, with everything that determines how
it is spoken to (tokenizer, chat template, ``assay.json``) copied byte for byte from the model it came from.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, NotFinite

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

REVISION = 1
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Everything that says how a model is spoken to; copied, never written anew.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "assay.json",
)  # fmt: skip
# Files above this size are split, as on the hub.
SHARD_SIZE = "5GB"
# Names in the safetensors format, in torch and here.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
# The Auto classes of models that put a case into a class: they have no tokenizer.
CLASSIFIERS = ("AutoModelForSequenceClassification", "AutoModelForImageClassification")


# --- loading ------------------------------------------------------------------------------------------------


def load_model(folder: Path, dtype: str = "float32", device: Any = None, train: bool = False) -> Any:
    """Load a transformers model.

    Args:
        dtype: ``float32``, ``bfloat16``, … or ``parent``: as it was saved.
        device: default ``choose_device()``. ``train``: training instead of evaluation mode.
    Raises:
        AssayError: the folder is refused (see ``check_folder``), incomplete, or of no class known here.
    """
    import torch
    import transformers

    import assay  # noqa: F401  (registers this project's classes with the Auto classes)

    folder = Path(folder)
    check_folder(folder)
    name = parent_dtype(folder) if dtype == "parent" else dtype
    transformers.utils.logging.disable_progress_bar()
    model, report = _from_pretrained(getattr(transformers, auto_class(folder)), folder, getattr(torch, name))
    _refuse_incomplete(folder, report)
    return model.to(device or choose_device()).train(train)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that lies beside a model."""
    from transformers import AutoTokenizer

    import assay  # noqa: F401  (the configuration beside it may be of a class of this project)

    check_folder(Path(folder))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise AssayError(f"{folder} holds no tokenizer that can be loaded: {_first_line(error)}") from error


# Words, blanks, digits, marks, accents and a line break: texts that tokenizers of one vocabulary may still cut apart
# differently.
SAMPLE = "Who wrote  it? In 1984, Zoë's 3.5-hour tale (the END) — was naïve;\n\tasked_for: €20, 東京."


def tokenizer_difference(ours: Any, theirs: Any, whose: str) -> str:
    """How the second tokenizer differs from ``whose``; empty where a number means the same to both."""
    one, other = ours.get_vocab(), theirs.get_vocab()
    if one != other:
        either = {**other, **one}
        number, token = min((at, token) for token, at in either.items() if one.get(token) != other.get(token))
        sizes = f"has {len(other)} tokens and the {whose}'s {len(one)}"
        return f"{sizes}; they first differ at id {number} ({token!r})"
    cut = [
        tokenizer(SAMPLE, add_special_tokens=False, verbose=False)["input_ids"]
        for tokenizer in (ours, theirs)
    ]
    return "" if cut[0] == cut[1] else f"has the {whose}'s tokens but cuts texts into others of them"


def auto_class(folder: Path) -> str:
    """The transformers Auto class that loads ``folder``, by the architecture its config names."""
    architectures = _read_json(Path(folder) / "config.json").get("architectures") or [""]
    for ending, name in AUTO_CLASSES.items():
        if str(architectures[0]).endswith(ending):
            return name
    return "AutoModelForCausalLM"


def is_classifier(folder: Path) -> bool:
    """Whether the model in ``folder`` puts cases into classes, by the architecture its config names."""
    return auto_class(folder) in CLASSIFIERS


def choose_device() -> torch.device:
    """The visible accelerator, else the processor."""
    import torch

    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _from_pretrained(loader: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, Mapping[str, Any]]:
    from safetensors import SafetensorError

    try:
        model, report = loader.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise AssayError(f"{folder} holds no model that can be loaded: {_first_line(error)}") from error
    return model, report


def _refuse_incomplete(folder: Path, report: Mapping[str, Any]) -> None:
    for what, problem in (("missing_keys", "lacks"), ("mismatched_keys", "has the wrong shape for")):
        names = sorted(map(str, report.get(what) or ()))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise AssayError(f"{folder} {problem} the weight {names[0]}{more}: it would be a random one.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- what is refused ----------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Refuse anything that could run code or read outside the folder.

    Raises:
        AssayError: pickles, ``auto_map``, links out of the folder, shards outside it, no config or no weights.
    """
    if not folder.is_dir():
        raise AssayError(f"{folder}: there is no such model folder.")
    _refuse_links(folder)
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise AssayError(
                f"{path} is a pickle, which can run any code when read: convert it to safetensors."
            )
    for name in CONFIGS:
        if (folder / name).is_file() and "auto_map" in _read_json(folder / name):
            raise AssayError(
                f"{folder / name} names code to run (auto_map): remove the entry, or use a class known here."
            )
    weight_files(folder)


def _refuse_links(folder: Path) -> None:
    root = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise AssayError(f"{path} is a link out of the model folder: put the file itself there.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise AssayError(
            f"{folder} holds no {WEIGHTS}: a model is a folder in Hugging Face layout with safetensors."
        )
    names = sorted({str(name) for name in _read_json(folder / INDEX).get("weight_map", {}).values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise AssayError(f"{folder / INDEX} names {name!r}, which is no safetensors file of this folder.")
        if not (folder / name).is_file():
            raise AssayError(f"{folder / name} is missing, but {INDEX} names it.")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssayError(f"{path} is missing: a model is a folder in Hugging Face layout.") from None
    except (OSError, ValueError) as error:
        raise AssayError(f"{path} is no JSON: {error}.") from None
    if not isinstance(content, dict):
        raise AssayError(f"{path} must hold a JSON object.")
    return content


# --- precision ----------------------------------------------------------------------------------------------


def tensor_dtypes(folder: Path) -> dict[str, str]:
    """The precision of every floating-point weight, by name, read from the headers alone."""
    found: dict[str, str] = {}
    for path in weight_files(Path(folder)):
        found |= {name: DTYPES[kind] for name, kind in _header(path).items() if kind in DTYPES}
    return found


def _header(path: Path) -> dict[str, str]:
    """Names and types of the tensors in a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise AssayError(f"{path} is no whole safetensors file: {error}.") from error


def parent_dtype(folder: Path) -> str:
    """The precision in which most weights of a model are saved: ``float32``, ``bfloat16``, …"""
    counted = Counter(tensor_dtypes(folder).values())
    return counted.most_common(1)[0][0] if counted else "float32"


def saved_dtype(dtype: str, source: Path | None) -> str:
    """What ``parent`` means: the precision of ``source``, float32 where there is none."""
    if dtype != "parent":
        return dtype
    return parent_dtype(source) if source is not None else "float32"


# --- saving -------------------------------------------------------------------------------------------------


def save_model(
    model: Any,
    folder: Path,
    source: Path | None,
    dtype: str = "parent",
    parent_dtype: str | None = None,
    dtypes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a model as safetensors, with the tokenizer and all else that travels with ``source``.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``parent``: each weight as in ``source``, new ones as most of them
            (or as ``parent_dtype``).
        dtypes: the precision of some weights, by name, whatever the others'.
    Raises:
        NotFinite: a weight is not a finite number; nothing is written.
    """
    import transformers

    folder = Path(folder)
    refuse_not_finite(model)
    transformers.utils.logging.disable_progress_bar()
    given = tensor_dtypes(source) if dtype == "parent" and source is not None and parent_dtype is None else {}
    usual = parent_dtype if dtype == "parent" and parent_dtype is not None else saved_dtype(dtype, source)
    state = _in_precision(model.state_dict(), {**given, **dtypes}, usual)
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD_SIZE)
    _state_precision(folder / "config.json", usual)
    if source is not None:
        copy_companions(Path(source), folder)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and ``assay.json`` byte for byte."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(
            source / "additional_chat_templates", folder / "additional_chat_templates", dirs_exist_ok=True
        )


def refuse_not_finite(model: Any) -> None:
    """Raise NotFinite, naming the weight, unless every weight is a finite number."""
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise NotFinite(f"the weight {name} is not finite everywhere: no model is written.")


def _in_precision(state: Mapping[str, Tensor], dtypes: Mapping[str, str], usual: str) -> dict[str, Tensor]:
    """Cast floating-point weights; two names of one tied tensor stay one tensor."""
    import torch

    cast: dict[tuple[int, str, torch.Size], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        wanted = dtypes.get(name, usual)
        key = (tensor.data_ptr(), wanted, tensor.shape)
        if key not in cast:
            cast[key] = tensor.to(getattr(torch, wanted)) if tensor.is_floating_point() else tensor
        result[name] = cast[key]
    return result


def _state_precision(path: Path, dtype: str) -> None:
    """Transformers writes the precision of the model in memory; the file has another one."""
    content = _read_json(path) | {"dtype": dtype}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- which weights a result is about ------------------------------------------------------------------------


def weight_marks(layers: Mapping[str, nn.Linear]) -> dict[str, list[Any]]:
    """Rows, columns and the sum of squares of every weight: what results about another model are told by."""
    return {
        name: [*layer.weight.shape, float(layer.weight.detach().double().square().sum())]
        for name, layer in layers.items()
    }


def refuse_other_weights(
    folder: Path, what: str, marks: Mapping[str, list[Any]], layers: Mapping[str, nn.Linear], remedy: str
) -> None:
    """Raise an AssayError unless ``marks`` are those of ``layers``.

    Args:
        folder: where ``what`` (``factors``) lies that the marks came with. ``remedy``: what to do, as a clause.
    """
    ours = weight_marks(layers)
    if marks.keys() != ours.keys() or any(marks[name][:2] != ours[name][:2] for name in ours):
        raise AssayError(f"{folder} has the {what} of a model of another shape: {remedy}.")
    for name, (_, _, size) in ours.items():
        if abs(marks[name][2] - size) > 1e-6 * size:
            raise AssayError(
                f"the {what} in {folder} were measured on other weights than those of {name}: {remedy}."
            )


# --- counting and caching -------------------------------------------------------------------------------------


def nonzero(model: Any) -> tuple[int, int]:
    """Parameters in all and parameters that are not 0; tied weights count once."""
    import torch

    tensors = list(model.parameters())
    return sum(tensor.numel() for tensor in tensors), sum(
        int(torch.count_nonzero(tensor)) for tensor in tensors
    )


class Models:
    """Models and tokenizers of one scoring process, each loaded once, in evaluation mode.

    On the processor everything is computed in float32; on an accelerator in the precision a model was saved in.
    """

    def __init__(self, device: Any = None) -> None:
        self.device = device or choose_device()
        self.dtype = "parent" if self.device.type == "cuda" else "float32"
        self._models: dict[Path, Any] = {}
        self._tokenizers: dict[Path, Any] = {}

    def load(self, folder: Path) -> Any:
        """The model in ``folder``."""
        key = Path(folder).resolve()
        if key not in self._models:
            self._models[key] = load_model(key, self.dtype, self.device).requires_grad_(False)
        return self._models[key]

    def tokenizer(self, folder: Path) -> Any:
        """The tokenizer in ``folder``."""
        key = Path(folder).resolve()
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(key)
        return self._tokenizers[key]

    def forget(self) -> None:
        """Drop every model: the next ``load`` reads it anew (after an evaluation that changed weights)."""
        self._models.clear()

    def __iter__(self) -> Iterator[Path]:
        return iter(self._models)
