"""Level databases: every linear layer at every level of compression, written once, read often.

A folder holds ``levels.json`` and one ``<module name>.safetensors`` per layer, whose tensors are named
``<level>/<part>``; ``_encodings`` says what the parts are. How a level was encoded stands in the file's own header, so
that a half-built database can be gone on with. Weights are decoded as float32. No pickle is read or written, and
nothing outside the folder. REVISION covers ``_encodings``.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.find import nearest
from methods.levels._encodings import Encoded
from methods.stage import AssayError, NotFinite

if TYPE_CHECKING:
    from torch import Tensor, device, nn

REVISION = 1
ABOUT = "levels.json"
ENDING = ".safetensors"
# What a level's cost counts: zeros, bits of codes, or removed units.
KINDS = ("sparsity", "bits", "structure")
GIBIBYTE = 2**30
_MODULE_NAME = re.compile(r"\w+(\.\w+)*")
_REMEDY = "build the levels anew"


# --- what a database says of itself ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """One level of a layer. ``share`` is its sparsity, its bits per weight with scales, or the removed share."""

    name: str
    cost: int
    share: float


@dataclass(frozen=True)
class Unit:
    """One linear layer [rows,columns] with its levels in ascending cost; ``budget`` names what its costs count in."""

    name: str
    block: int
    budget: str
    rows: int
    columns: int
    levels: tuple[Level, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its levels, in ascending cost."""
        return tuple(level.name for level in self.levels)

    def level(self, name: str) -> Level:
        """The level of that name, or a sentence with the nearest one."""
        for level in self.levels:
            if level.name == name:
                return level
        raise AssayError(f"{self.name} has no level {name!r}{nearest(name, self.names)}")


def _unit(entry: Mapping[str, Any]) -> Unit:
    """A unit as JSON has it; KeyError, TypeError or ValueError for anything else."""
    levels = tuple(Level(str(it["name"]), int(it["cost"]), float(it["share"])) for it in entry["levels"])
    unit = Unit(
        name=str(entry["name"]),
        block=int(entry["block"]),
        budget=str(entry["budget"]),
        rows=int(entry["rows"]),
        columns=int(entry["columns"]),
        levels=levels,
    )
    if not levels or len(set(unit.names)) < len(levels) or _MODULE_NAME.fullmatch(unit.name) is None:
        raise ValueError(f"{unit.name!r} is no layer with levels of different names")
    if list(levels) != sorted(levels, key=lambda level: level.cost):
        raise ValueError(f"the levels of {unit.name} do not ascend in cost")
    return unit


# --- writing --------------------------------------------------------------------------------------------------


class Writer:
    """Writes a database layer by layer into ``folder``; layers that an earlier attempt finished are kept.

    Args:
        kind: ``sparsity`` or ``structure``, whose level "0" is the uniform one and the others whole numbers of steps
            from it, or ``bits``.
        written: called with the number of finished layers after each one: where a job may stop.
    """

    def __init__(self, folder: Path, kind: str, written: Callable[[int], None] | None = None) -> None:
        assert kind in KINDS, kind
        self.folder = Path(folder)
        self.kind = kind
        self.written = written
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob("tmp-*"):
            unfinished.unlink()

    @property
    def count(self) -> int:
        """How many layers are finished."""
        return sum(1 for _ in self.folder.glob(f"*{ENDING}"))

    def finished(self, unit_name: str) -> bool:
        """Whether the layer has been written."""
        return _path(self.folder, unit_name).is_file()

    def write(
        self,
        unit_name: str,
        block: int,
        budget: str,
        levels: Mapping[str, Encoded],
        costs: Mapping[str, int],
        shares: Mapping[str, float],
    ) -> None:
        """Write all levels of a layer at once, atomically.

        Args:
            costs: zeros, bits of codes or removed units of each level. ``shares``: see ``Level.share``.
        Raises:
            NotFinite: a level is not a finite number everywhere.
        """
        import torch
        from safetensors.torch import save_file

        from methods.progress import flush

        tensors = {
            # A copy: levels may share memory with each other, which the format has no way to say.
            f"{level}/{part}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for level, encoded in levels.items()
            for part, tensor in encoded.parts.items()
        }
        _refuse_not_finite(unit_name, tensors)
        entry = self._entry(unit_name, block, budget, levels, costs, shares)
        temporary = self.folder / f"tmp-{uuid.uuid4().hex}"
        save_file(tensors, temporary, metadata={"unit": json.dumps(entry)})
        temporary.chmod(0o644)
        flush(temporary)
        temporary.rename(_path(self.folder, unit_name))
        if self.written is not None:
            self.written(self.count)

    def _entry(
        self,
        name: str,
        block: int,
        budget: str,
        levels: Mapping[str, Encoded],
        costs: Mapping[str, int],
        shares: Mapping[str, float],
    ) -> dict[str, Any]:
        """What a layer's file says of itself."""
        assert levels.keys() == costs.keys() == shares.keys(), (name, levels.keys(), costs, shares)
        assert self.kind == "bits" or "0" in levels, f"{name} has no level 0"
        shapes = {(encoded.rows, encoded.columns) for encoded in levels.values()}
        assert len(shapes) == 1, f"{name}: levels of different shapes"
        ((rows, columns),) = shapes
        rising = sorted(levels, key=lambda level: costs[level])
        described = [
            {"name": level, "cost": costs[level], "share": shares[level], "encoding": levels[level].encoding}
            for level in rising
        ]
        entry = {"name": name, "block": block, "budget": budget, "rows": rows, "columns": columns}
        _unit(entry | {"levels": described})
        return entry | {"levels": described}

    def weight(self, unit_name: str, level: str) -> Tensor:
        """What was written [rows,columns], for layers behind a finished one."""
        return _LayerFile(_path(self.folder, unit_name)).weight(level)

    def close(self, model: nn.Module, about: Mapping[str, Any]) -> tuple[Unit, ...]:
        """Write ``levels.json``, with marks of the dense model's weights; the layers come in its modules' order.

        Args:
            about: what the levels were measured with, for whoever reads them.
        """
        from methods.checkpoint import weight_marks

        linears = linear_layers(model)
        files = [_LayerFile(_path(self.folder, name)) for name in linears if self.finished(name)]
        assert files, "a database without layers"
        content = {
            "kind": self.kind,
            "units": [asdict(file.unit) for file in files],
            "about": dict(about),
            "layers": weight_marks(linears),
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        (self.folder / ABOUT).write_text(text, encoding="utf-8")
        return tuple(file.unit for file in files)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by its name, in the order of the modules."""
    from torch import nn

    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}{ENDING}"


def _refuse_not_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            level = key.partition("/")[0]
            raise NotFinite(f"level {level} of {name} is not finite everywhere: no database is written.")


# --- reading --------------------------------------------------------------------------------------------------


class _LayerFile:
    """One layer's file, kept open; its tensors are mapped into memory and read where they are touched."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt").__enter__()
            entry = json.loads((self._file.metadata() or {})["unit"])
            self.unit = _unit(entry)
            self._encodings = {str(level["name"]): str(level["encoding"]) for level in entry["levels"]}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    @cached_property
    def _keys(self) -> list[str]:
        return list(self._file.keys())

    def weight(self, level: str, where: device | None = None) -> Tensor:
        """The weight [rows,columns] of a level, float32, on a device (default: the processor)."""
        from safetensors import SafetensorError
        from torch.cuda import OutOfMemoryError

        self.unit.level(level)
        try:
            encoded = self._encoded(level)
            return (encoded if where is None else encoded.to(where)).decode()
        except OutOfMemoryError:
            # A full card says nothing about the file.
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise self._damaged(error) from error

    def _encoded(self, level: str) -> Encoded:
        start = f"{level}/"
        keys = (key for key in self._keys if key.startswith(start))
        parts = {key.removeprefix(start): self._file.get_tensor(key) for key in keys}
        return Encoded(self._encodings[level], self.unit.rows, self.unit.columns, parts)

    def _damaged(self, error: Exception) -> AssayError:
        return AssayError(f"{self.path} holds no whole layer of a level database ({error}): {_REMEDY}.")


class Database:
    """A level database. Made by ``Database.open``.

    Args:
        memory_bytes: decoded matrices are kept up to this size in all; then the one that was not asked for longest
            is dropped.
        where: the device that matrices are decoded on; None: the processor.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        units: Sequence[Unit],
        about: Mapping[str, Any],
        memory_bytes: int = GIBIBYTE,
        where: device | None = None,
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.units = tuple(units)
        self.about = about
        self.memory_bytes = memory_bytes
        self.where = where
        self._by_name = {unit.name: unit for unit in self.units}
        self._files: dict[str, _LayerFile] = {}
        self._decoded: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._held = 0

    @classmethod
    def open(cls, folder: Path, model: nn.Module | None = None, memory_bytes: int = GIBIBYTE) -> Database:
        """The database in a ``files/`` folder.

        Args:
            model: the dense model it is to be used with, in float32; None: whichever it was. Its levels are decoded
                on this model's device.
        Raises:
            AssayError: the folder holds no database, a damaged one, or one of other weights than the model's.
        """
        from methods.checkpoint import refuse_other_weights

        folder = Path(folder)
        content = _read_about(folder)
        try:
            kind, about = str(content["kind"]), dict(content["about"])
            units = [_unit(entry) for entry in content["units"]]
            marks = dict(content["layers"])
            if kind not in KINDS or len({unit.name for unit in units}) < len(units) or not units:
                raise ValueError(f"kind {kind!r} with {len(units)} layers")
        except (KeyError, TypeError, ValueError) as error:
            raise AssayError(f"{folder / ABOUT} describes no level database ({error}): {_REMEDY}.") from error
        _refuse_missing(folder, units)
        if model is not None:
            remedy = "name a levels stage on this chain's parent"
            refuse_other_weights(folder, "levels", marks, linear_layers(model), remedy)
        where = None if model is None else next(model.parameters()).device
        return cls(folder, kind, units, about, memory_bytes, where)

    def unit(self, name: str) -> Unit:
        """The layer of that name, or a sentence with the nearest one."""
        if name not in self._by_name:
            raise AssayError(f"{self.folder} has no levels of {name!r}{nearest(name, self._by_name)}")
        return self._by_name[name]

    def weight(self, name: str, level: str) -> Tensor:
        """The weight [rows,columns] of a layer at a level, float32. It may be handed out again: leave it as it is."""
        key = (name, level)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        weight = self._file(name).weight(level, self.where)
        self._keep(key, weight)
        return weight

    def _file(self, name: str) -> _LayerFile:
        if name not in self._files:
            unit, file = self.unit(name), _LayerFile(_path(self.folder, name))
            if file.unit != unit:
                raise AssayError(f"{file.path} holds other levels than {ABOUT} says: {_REMEDY}.")
            self._files[name] = file
        return self._files[name]

    def _keep(self, key: tuple[str, str], weight: Tensor) -> None:
        if weight.nbytes > self.memory_bytes:
            return
        self._decoded[key] = weight
        self._held += weight.nbytes
        while self._held > self.memory_bytes:
            _, dropped = self._decoded.popitem(last=False)
            self._held -= dropped.nbytes

    def uniform(self) -> dict[str, str]:
        """Level "0" everywhere: the same sparsity, or the centre of a structural search."""
        if self.kind == "bits":
            raise AssayError(f"{self.folder} has bit widths and no level 0: say how many bits.")
        return {unit.name: unit.level("0").name for unit in self.units}

    def spent(self, levels: Mapping[str, str]) -> dict[str, int]:
        """What an assignment of levels to all layers costs, by budget."""
        total = dict.fromkeys((unit.budget for unit in self.units), 0)
        for unit in self.units:
            total[unit.budget] += unit.level(levels[unit.name]).cost
        return total


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.is_file():
        raise AssayError(f"{folder} holds no level database: name a chain that ends in a levels stage.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssayError(f"{path} is no JSON ({error}): {_REMEDY}.") from error
    if not isinstance(content, dict):
        raise AssayError(f"{path} must hold a JSON object: {_REMEDY}.")
    return content


def _refuse_missing(folder: Path, units: Sequence[Unit]) -> None:
    """Every layer's file lies in the folder itself: a link could lead anywhere."""
    for unit in units:
        path = _path(folder, unit.name)
        if path.is_symlink():
            raise AssayError(f"{path} is a link: put the file itself there.")
        if not path.is_file():
            raise AssayError(f"{path} is missing, but {ABOUT} names its layer: {_REMEDY}.")
