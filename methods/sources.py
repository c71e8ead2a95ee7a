"""Where named data sets come from: built in, local files, pinned revisions on the hub.

A name is ``<folder>/<file stem>``; several are joined by ``+``; each may end in a range of rows::

    authors/retain90+authors/facts      tofu/retain99[0:360]      wikitext2/valid.unk
    arithmetic/addition59/train         digits/test               mnist/train (idx files)
    markov/train[0:128]                 markov/valid
    Salesforce/wikitext@<40 hex digits>/wikitext-2-raw-v1/test    (any hub data set: repo@revision/config/split)

``authors/*`` is generated (``methods.world``; ``authors`` alone is everything a tokenizer is trained on), and so is
``arithmetic/*`` (``methods.algorithmic``) and ``markov/*`` (``methods.markov``); ``digits/*`` is scikit-learn's
(``methods.digits``). Anything else is a file below ``--config data=DIR`` or, where DIR has none, one of the hub sets
in ``HUB``.
``methods.data`` re-exports ``Locator``; its REVISION covers this file, too.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from methods import algorithmic, digits, markov, world
from methods.find import nearest
from methods.stage import AssayError

Row = dict[str, Any]

# What the name ``authors`` stands for: the texts a tokenizer of the built-in world is trained on.
WHOLE_WORLD = ("authors/full", "authors/holdout", "authors/facts")
# A refusal a line, whatever the ending of the file: the TOFU authors call a plain text file ``.jsonl``.
REFUSALS = "idontknow"


# --- names ------------------------------------------------------------------------------------------------

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_NAME = re.compile(rf"(?P<path>{_WORD}(?:/{_WORD})*)(?:\[(?P<start>\d+):(?P<stop>\d+)\])?")
_HUB_NAME = re.compile(
    rf"(?P<repo>{_WORD}/{_WORD})@(?P<revision>[^/\[]*)(?:/(?P<config>{_WORD}))?/(?P<split>{_WORD})"
    r"(?:\[(?P<start>\d+):(?P<stop>\d+)\])?"
)


@dataclass(frozen=True)
class _Range:
    """Rows ``start`` to ``stop - 1``."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop}]"

    def take(self, rows: list[Row], name: str) -> list[Row]:
        if self.stop > len(rows):
            raise AssayError(f"data set {name!r} has only {len(rows)} rows: end the range {self} earlier.")
        return rows[self.start : self.stop]

    def clamped(self, count: int) -> _Range:
        """The same range where ``count`` rows hold it, else as many rows from the front."""
        return self if self.stop <= count else _Range(0, min(self.stop - self.start, count))


@dataclass(frozen=True)
class _Hub:
    """A data set on the hub at one revision."""

    repo: str
    revision: str
    config: str | None
    split: str
    files: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (f"{self.repo}@{self.revision}", self.config, self.files, self.split)))

    def rows(self, taken: _Range | None) -> list[Row]:
        """Read it with ``datasets``; the range is applied by the library, so that no more is decoded."""
        import datasets

        split = f"{self.split}{taken}" if taken else self.split
        files = {self.split: self.files} if self.files else None
        try:
            found = datasets.load_dataset(
                self.repo, self.config, split=split, data_files=files, revision=self.revision
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise AssayError(
                f"{self} could not be read from the hub ({error}); fetch it once with a network, or put a copy "
                "below --config data=DIR."
            ) from error
        return [dict(row) for row in found]


@dataclass(frozen=True)
class _Part:
    """One data set of a joined name."""

    path: str
    taken: _Range | None
    hub: _Hub | None = None

    def __str__(self) -> str:
        return f"{self.path}{self.taken or ''}"


def _parse(name: str) -> list[_Part]:
    parts = [_parse_part(part) for part in name.split("+")]
    return [piece for part in parts for piece in _expand(part)]


def _parse_part(text: str) -> _Part:
    if "@" in text:
        return _parse_hub(text)
    match = _NAME.fullmatch(text)
    if match is None or ".." in text:
        raise AssayError(
            f"{text!r} is no name of a data set: write folder/name, with letters, digits, '_', '-' and '.', several "
            "joined by '+', and rows as name[0:100]."
        )
    return _Part(match["path"], _range(match, text))


def _parse_hub(text: str) -> _Part:
    match = _HUB_NAME.fullmatch(text)
    if match is None or ".." in text or not re.fullmatch("[0-9a-f]{40}", match["revision"]):
        raise AssayError(
            f"{text!r} is no data set on the hub: write repo/name@REVISION/config/split or repo/name@REVISION/split, "
            "with the revision's 40 hex digits."
        )
    hub = _Hub(match["repo"], match["revision"], match["config"], match["split"])
    return _Part(str(hub), _range(match, text), hub)


def _range(match: re.Match[str], text: str) -> _Range | None:
    if match["start"] is None:
        return None
    taken = _Range(int(match["start"]), int(match["stop"]))
    if taken.start >= taken.stop:
        raise AssayError(f"the range of rows in {text!r} is empty: its end must be greater than its start.")
    return taken


def _expand(part: _Part) -> list[_Part]:
    if part.path != "authors":
        return [part]
    if part.taken:
        raise AssayError(
            f"'authors' is several data sets and takes no range: write {WHOLE_WORLD[0]}{part.taken}."
        )
    return [_Part(path, None) for path in WHOLE_WORLD]


# --- the hub ----------------------------------------------------------------------------------------------

_TOFU = "324592d84ae4f482ac7249b9285c2ecdb53e3a68"
_WIKITEXT = "b08601e04326c79dfdd32d625aee71d232d685c3"
_C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
_TINYSTORIES = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
_TOFU_SPLITS = (
    "full forget01 forget05 forget10 retain90 retain95 retain99 holdout01 holdout05 holdout10 real_authors "
    "world_facts forget01_perturbed forget05_perturbed forget10_perturbed retain_perturbed real_authors_perturbed "
    "world_facts_perturbed"
).split()

HUB: dict[str, _Hub] = {
    **{f"tofu/{split}": _Hub("locuslab/TOFU", _TOFU, split, "train") for split in _TOFU_SPLITS},
    **{
        f"wikitext2/{split}": _Hub("Salesforce/wikitext", _WIKITEXT, "wikitext-2-raw-v1", split)
        for split in ("train", "validation", "test")
    },
    **{
        f"tinystories/{split}": _Hub("roneneldan/TinyStories", _TINYSTORIES, None, split)
        for split in ("train", "validation")
    },
    # One shard each, the ones that pruning papers calibrate on and measure with; the whole of C4 is 300 GB.
    "c4/train": _Hub("allenai/c4", _C4, None, "train", "en/c4-train.00000-of-01024.json.gz"),
    "c4/validation": _Hub("allenai/c4", _C4, None, "validation", "en/c4-validation.00000-of-00008.json.gz"),
}
# Folders whose files are images of the same ten digits, or of ten other things, in idx files.
_IMAGE_FOLDER = re.compile(r"[\w\-]*mnist")
# Folders whose files are running text: with ``scale=smoke`` they are replaced by text of the built-in world.
_TEXT_FOLDER = re.compile("wikitext|tinystories|c4|tinyshakespeare")
_HELD_OUT = re.compile("test|valid|t10k")


def _is_hub(part: _Part) -> bool:
    """Whether the hub has it: then smoke replaces it even where there is a local copy, with its longer rows."""
    return part.hub is not None or part.path in HUB or part.path.startswith("tofu/")


def _stand_in(path: str) -> str | None:
    """What is built in and replaces a data set that is not at hand, at ``scale=smoke``."""
    folder, _, rest = path.partition("/")
    if folder == "tofu":
        split = re.sub(r"^holdout\d+", "holdout", rest)
        return f"authors/{split}" if split in world.SPLITS else None
    if "@" in path or _TEXT_FOLDER.match(folder):
        return "authors/text_holdout" if _HELD_OUT.search(rest) else "authors/text"
    if _IMAGE_FOLDER.fullmatch(folder):
        return "digits/test" if _HELD_OUT.search(rest) else "digits/train"
    return None


# --- built in ---------------------------------------------------------------------------------------------

# Folders whose data sets need no file, each with what makes the rows of one.
_BUILT_IN: dict[str, Callable[[str], list[Row]]] = {
    "authors": world.rows,
    "arithmetic": algorithmic.rows,
    "digits": digits.rows,
    "markov": markov.rows,
}


def _built_in_names() -> list[str]:
    """Those that are listed: of arithmetic, the usual sizes."""
    splits = {
        "authors": world.SPLITS,
        "arithmetic": algorithmic.names(),
        "digits": digits.SPLITS,
        "markov": markov.SPLITS,
    }
    return [f"{folder}/{split}" for folder, found in splits.items() for split in found]


def _built_in(name: str) -> list[Row]:
    folder, _, split = name.partition("/")
    return _BUILT_IN[folder](split)


@cache
def _built_in_digest(name: str) -> str:
    return _sha256(json.dumps(_built_in(name), sort_keys=True, ensure_ascii=True, separators=(",", ":")))


# --- the locator ------------------------------------------------------------------------------------------


class Locator:
    """Finds data sets by name: built in, below ``folder`` (``--config data=DIR``), or on the hub.

    With ``smoke`` a hub set is replaced by the built-in world (``tofu/X`` by ``authors/X``, text by its text), and
    so is a text file that is not there; MNIST and its kin that are not there are replaced by scikit-learn's digits.
    Nothing is ever read from outside ``folder``, and nothing is written.
    """

    def __init__(self, folder: Path | None = None, smoke: bool = False) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.smoke = smoke
        if self.folder is not None and not self.folder.is_dir():
            raise AssayError(f"--config data={self.folder}: there is no such folder.")

    def rows(self, name: str) -> list[Row]:
        """The rows of a data set, or of several joined by ``+``; AssayError for unknown names and bad files."""
        return [row for part in _parse(name) for row in self._source(part).rows()]

    def digest(self, name: str) -> str:
        """Hex sha256 of what ``rows(name)`` reads: generated rows, bytes of files, a hub revision; and the range."""
        return _sha256("+".join(self._source(part).digest() for part in _parse(name)))

    def needs_hub(self, name: str) -> bool:
        """Whether reading it for the first time takes a network."""
        return any(isinstance(self._source(part), _HubSource) for part in _parse(name))

    def folder_of(self, name: str) -> Path:
        """A file or folder below ``--config data=DIR``; never one outside it, nor through a link that leaves it."""
        if self.folder is None:
            raise AssayError(f"{name!r} lies below the data folder: give it with --config data=DIR.")
        if _NAME.fullmatch(name) is None or ".." in name or "[" in name:
            raise AssayError(f"{name!r} is no path below the data folder: write folder/name, without '..'.")
        path = self.folder / name
        if not path.exists():
            raise AssayError(f"there is no {name!r} in the data folder{nearest(name, self._entries(name))}")
        self._check_inside(path)
        return path

    def _source(self, part: _Part) -> _Source:
        folder, _, split = part.path.partition("/")
        if folder in _BUILT_IN and split:
            # Every task and size of arithmetic has its own sentence; the others are a list.
            if folder != "arithmetic" and part.path not in _built_in_names():
                raise self._unknown(part.path)
            return _BuiltInSource(part, part.path, part.taken)
        found = (
            (self._smoke_source, self._file_source)
            if _is_hub(part)
            else (self._file_source, self._smoke_source)
        )
        source = found[0](part) or found[1](part)
        hub = part.hub or HUB.get(part.path)
        if source is None and hub is not None:
            source = _HubSource(part, hub)
        if source is None:
            raise self._unknown(part.path)
        return source

    def _smoke_source(self, part: _Part) -> _Source | None:
        name = _stand_in(part.path) if self.smoke else None
        if name is None:
            return None
        taken = part.taken.clamped(len(_built_in(name))) if part.taken else None
        return _BuiltInSource(part, name, taken)

    def _file_source(self, part: _Part) -> _Source | None:
        files = self._files(part.path)
        return _FileSource(part, files) if files else None

    def _files(self, path: str) -> tuple[Path, ...]:
        """The file (for idx: images and labels) behind a name, or nothing."""
        if self.folder is None or "/" not in path:
            return ()
        endings = ["", *ENDINGS] if path.endswith(tuple(ENDINGS)) else list(ENDINGS)
        found = [self.folder / f"{path}{ending}" for ending in endings]
        found = [file for file in found if file.is_file()]
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise AssayError(f"data set {path!r} could be {names}: write the whole name, with its ending.")
        for file in found or (found := self._idx_pair(path)):
            self._check_inside(file)
        return tuple(found)

    def _idx_pair(self, path: str) -> list[Path]:
        if self.folder is None:
            return []
        for packed in ("", ".gz"):
            pair = [self.folder / f"{path}-{kind}-ubyte{packed}" for kind in ("images-idx3", "labels-idx1")]
            if all(file.is_file() for file in pair):
                return pair
        return []

    def _check_inside(self, path: Path) -> None:
        assert self.folder is not None
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise AssayError(f"{path} is a link that leaves the data folder: copy the data there instead.")

    def _unknown(self, path: str) -> AssayError:
        known = self.names()
        folder = path.partition("/")[0]
        neighbours = [name for name in known if name.startswith(f"{folder}/")]
        choices = neighbours or sorted({name.partition("/")[0] for name in known})
        word = path if neighbours else folder
        where = "" if self.folder else " (files of your own need --config data=DIR)"
        return AssayError(f"there is no data set called {path!r}{where}{nearest(word, choices)}")

    def names(self) -> list[str]:
        """Every data set that can be named without a revision."""
        return sorted({*_built_in_names(), *HUB, *self._local_names()})

    def _local_names(self) -> set[str]:
        if self.folder is None:
            return set()
        relative = (
            file.relative_to(self.folder).as_posix() for file in self.folder.glob("*/*") if file.is_file()
        )
        return {name for path in relative if (name := _without_ending(path)) is not None}

    def _entries(self, name: str) -> list[str]:
        assert self.folder is not None
        parent = (self.folder / name).parent
        entries = parent.iterdir() if parent.is_dir() else self.folder.iterdir()
        return [entry.relative_to(self.folder).as_posix() for entry in entries]


class _Source:
    """One data set, found: its rows and the digest of what they are made from."""

    def rows(self) -> list[Row]:
        raise NotImplementedError

    def digest(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class _BuiltInSource(_Source):
    part: _Part
    name: str
    taken: _Range | None

    def rows(self) -> list[Row]:
        rows = _built_in(self.name)
        return self.taken.take(rows, self.part.path) if self.taken else rows

    def digest(self) -> str:
        self.rows()  # a range beyond the end is reported before anything runs
        return f"rows:{_built_in_digest(self.name)}{self.taken or ''}"


@dataclass(frozen=True)
class _HubSource(_Source):
    part: _Part
    hub: _Hub

    def rows(self) -> list[Row]:
        return self.hub.rows(self.part.taken)

    def digest(self) -> str:
        return f"hub:{self.hub}{self.part.taken or ''}"


@dataclass(frozen=True)
class _FileSource(_Source):
    part: _Part
    files: tuple[Path, ...]

    def rows(self) -> list[Row]:
        rows = _read(self.files, self.part.path)
        return self.part.taken.take(rows, self.part.path) if self.part.taken else rows

    def digest(self) -> str:
        reader = _reader_name(self.files[0], self.part.path)
        return ":".join([reader, *(_file_digest(file) for file in self.files)]) + str(self.part.taken or "")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    """Hashed once a process for as long as size and time stand: a plan asks for the same file many times."""
    stat = path.stat()
    return _bytes_digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _bytes_digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading files ----------------------------------------------------------------------------------------


def _read(files: tuple[Path, ...], name: str) -> list[Row]:
    if len(files) == 2:
        return _read_idx(files)
    try:
        return _READERS[_reader_name(files[0], name)](files[0])
    except (OSError, EOFError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise AssayError(f"{files[0]} cannot be read: {error}.") from error


def _reader_name(file: Path, name: str) -> str:
    if file.name.endswith(("-ubyte", "-ubyte.gz")):
        return "idx"
    if (_without_ending(name) or name).endswith(f"/{REFUSALS}"):
        return "refusals"
    return ENDINGS[next(ending for ending in ENDINGS if file.name.endswith(ending))]


def _without_ending(path: str) -> str | None:
    """``tofu/full.json.gz`` -> ``tofu/full``; None where the ending is none of ours."""
    for ending in (*ENDINGS, "-images-idx3-ubyte", "-images-idx3-ubyte.gz"):
        if path.endswith(ending):
            return path.removesuffix(ending)
    return None


def _bytes(file: Path) -> bytes:
    content = file.read_bytes()
    return gzip.decompress(content) if file.name.endswith(".gz") else content


def _text(file: Path) -> str:
    return _bytes(file).decode("utf-8-sig")


def _lines(file: Path) -> list[str]:
    """Lines parted by newlines only: other separators that Python knows may stand inside a JSON text."""
    lines = [line.removesuffix("\r") for line in _text(file).split("\n")]
    return lines[:-1] if lines and lines[-1] == "" else lines


def _read_text(file: Path) -> list[Row]:
    return [{"text": line} for line in _lines(file)]


def _read_refusals(file: Path) -> list[Row]:
    return [{"text": line} for line in _lines(file) if line.strip()]


def _read_json(file: Path) -> list[Row]:
    """An array of objects, one object over any number of lines, or (as TOFU's ``.json`` files are) one a line."""
    text = _text(file)
    if not text.lstrip().startswith("["):
        return _one_object(text) or _read_json_lines(file)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise AssayError(f"{file} is no JSON: {error}.") from error
    return [_object(row, file, number) for number, row in enumerate(rows, 1)]


def _one_object(text: str) -> list[Row]:
    """The only object of a text, or nothing."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return []
    return [found] if isinstance(found, dict) else []


def _read_json_lines(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                rows.append(_object(json.loads(line), file, number))
            except json.JSONDecodeError as error:
                raise AssayError(f"line {number} of {file} is no JSON object: {error}.") from error
    return rows


def _object(row: Any, file: Path, number: int) -> Row:
    if not isinstance(row, dict):
        raise AssayError(f"row {number} of {file} is no JSON object with named columns.")
    return row


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(pyarrow.BufferReader(_bytes(file))).to_pylist()
    except pyarrow.ArrowException as error:
        raise AssayError(f"{file} is no parquet file: {error}.") from error
    return rows


def _read_idx(files: tuple[Path, ...]) -> list[Row]:
    """Images and labels as rows: ``image`` (uint8 array, height x width), ``label`` and ``classes`` (ints).

    Labels count from 0, and the file's greatest is the last class.
    """
    images, labels = (_idx_array(file) for file in files)
    if len(images) != len(labels):
        raise AssayError(f"{files[0]} has {len(images)} images, but {files[1]} has {len(labels)} labels.")
    classes = int(labels.max()) + 1 if len(labels) else 0
    return [
        {"image": image, "label": int(label), "classes": classes}
        for image, label in zip(images, labels, strict=True)
    ]


def _idx_array(file: Path) -> Any:
    """The idx format of MNIST: two zero bytes, type 8 (unsigned byte), dimensions, sizes, values."""
    import numpy

    content = _bytes(file)
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:3] != b"\0\0\x08" or not sizes or len(content) - start != int(numpy.prod(sizes)):
        raise AssayError(f"{file} is no idx file of bytes, or it is cut off.")
    return numpy.frombuffer(content, dtype=numpy.uint8, offset=start).reshape(sizes)


ENDINGS = {
    f"{ending}{packed}": reader
    for ending, reader in ((".jsonl", "lines"), (".json", "json"), (".txt", "text"), (".parquet", "parquet"))
    for packed in ("", ".gz")
} | {".yaml": "text"}  # lm-eval's task files lie beside their rows and count as content
_READERS: dict[str, Callable[[Path], list[Row]]] = {
    "json": _read_json,
    "lines": _read_json_lines,
    "text": _read_text,
    "refusals": _read_refusals,
    "parquet": _read_parquet,
}
