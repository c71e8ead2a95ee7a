"""From named data sets to padded batches: prompt styles, encoding, collation, order, and new tokenizers.

The prompt is masked here, once, and labels are never shifted here: ``methods.terms.forward`` does that, once.
A prompt and its answer are tokenised apart and joined, so no token ever straddles the boundary and the number of
masked positions is exact; the token that ends an answer stays a target.

``B`` is sequences, ``T`` positions. torch, transformers and tokenizers are imported on use: the planner reads
this module.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from methods.data._cases import Cases, CaseTable, read_cases
from methods.find import nearest
from methods.sources import Locator, Row
from methods.stage import AssayError, Count

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "REVISION",
    "CaseTable",
    "Cases",
    "Example",
    "Locator",
    "Part",
    "Sampler",
    "Style",
    "Variants",
    "byte_bpe",
    "collate",
    "crossed",
    "encode",
    "encode_pairs",
    "encode_text",
    "padding_id",
    "read_cases",
    "read_rows",
    "train_tokenizer",
    "write_rows",
]

REVISION = 1
IGNORED = -100
# The place of a sequence that comes from no data set.
UNNUMBERED = -1


# --- batches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """One padded batch of sequences, padded on the right: a named part of what a step sees.

    ``labels`` [B,T] are unshifted, ``IGNORED`` where nothing is to be predicted. ``targets`` and ``mask``
    [B,T-1] are what the first T-1 positions predict. ``extra`` holds further numbers of each target [B,T-1], float32
    and 0 in the padding. ``numbers`` [B] are the places of the sequences in their data set, UNNUMBERED where there are
    none. The counts remember ``name``, so that the loop can add them up over the global batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    name: str
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        return self.labels[:, 1:]

    @property
    def mask(self) -> Tensor:
        return self.targets != IGNORED

    @property
    def tokens(self) -> Count:
        """Targets that count."""
        return Count(float(self.mask.sum()), f"{self.name}.tokens")

    @property
    def seen(self) -> int:
        """Tokens that the model reads, padding left out."""
        return int(self.attention_mask.sum())

    @property
    def attended(self) -> Count:
        """Positions that are not padding, those of prompts included."""
        return Count(float(self.seen), f"{self.name}.attended")

    @property
    def sequences(self) -> Count:
        return Count(float(self.labels.shape[0]), f"{self.name}.sequences")

    @property
    def positions(self) -> Count:
        """Every position, padding included."""
        return Count(float(self.labels.numel()), f"{self.name}.positions")

    @property
    def labelled(self) -> Count:
        """Labels that count, with one at the first position, which is nobody's target."""
        return Count(float((self.labels != IGNORED).sum()), f"{self.name}.labelled")

    @property
    def answer_lengths(self) -> Tensor:
        """Labels that count, per sequence [B], from the unshifted labels."""
        return (self.labels != IGNORED).sum(1)

    def to(self, device: torch.device | str) -> Part:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            extra={name: values.to(device) for name, values in self.extra.items()},
            numbers=None if self.numbers is None else self.numbers.to(device),
        )

    def rows(self, chosen: slice) -> Part:
        """Some of the sequences, with the padding of all."""
        return replace(
            self,
            input_ids=self.input_ids[chosen],
            attention_mask=self.attention_mask[chosen],
            labels=self.labels[chosen],
            extra={name: values[chosen] for name, values in self.extra.items()},
            numbers=None if self.numbers is None else self.numbers[chosen],
        )


@dataclass(frozen=True)
class Example:
    """One sequence of n tokens before padding; ``labels`` has as many, ``extra`` n - 1 numbers for each name.

    ``number`` is its place among the encoded rows.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    extra: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False)
    number: int = field(default=UNNUMBERED, compare=False)


def collate(examples: Sequence[Example], padding_id: int, name: str) -> Part:
    """Pad on the right to the longest sequence; padding is masked in attention and labels alike."""
    import torch

    width = max(len(example.input_ids) for example in examples)

    def padded(rows: Sequence[tuple[int, ...]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=torch.int64)

    return Part(
        input_ids=padded([example.input_ids for example in examples], padding_id),
        attention_mask=padded([(1,) * len(example.input_ids) for example in examples], 0),
        labels=padded([example.labels for example in examples], IGNORED),
        name=name,
        extra=_extra(examples, width),
        numbers=torch.tensor([example.number for example in examples], dtype=torch.int64),
    )


def _extra(examples: Sequence[Example], width: int) -> dict[str, Tensor]:
    """The further numbers of the targets that all examples have, padded with 0 to [B,width-1]."""
    import torch

    names = [name for name in examples[0].extra if all(name in example.extra for example in examples)]
    found = {}
    for name in names:
        rows = [example.extra[name] for example in examples]
        filled = [[*row, *[0.0] * (width - 1 - len(row))] for row in rows]
        found[name] = torch.tensor(filled, dtype=torch.float32)
    return found


class Variants(Sequence[Sequence[Example]]):
    """For each row several examples to choose from, such as a question with every answer that may be drawn."""

    def __init__(self, rows: Sequence[Sequence[Example]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        return self._rows[row]


class _Lazy(Sequence[Example]):
    """Examples that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], Example]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        return self._make(range(self._count)[place])


def crossed(
    questions: Sequence[str], answers: Sequence[str], tokenizer: Any, style: Style, context_tokens: int
) -> Variants:
    """Every question with every answer; a pair is joined when it is asked for, its texts are encoded once.

    AssayError names a question or answer that is empty or leaves the answer without a token.
    """
    asked = [{"question": text, "answer": answers[0]} for text in questions] if answers else []
    told = [{"question": questions[0], "answer": text} for text in answers] if questions else []
    heads = [_cut_off(pair) for pair in encode_pairs(asked, tokenizer, style, context_tokens)]
    tails = [
        example.input_ids[len(_cut_off(example)) :]
        for example in encode_pairs(told, tokenizer, style, 1 << 30)
    ]

    def row(number: int) -> Sequence[Example]:
        head = heads[number]
        return _Lazy(
            len(tails),
            lambda place: _pair([*head], [*tails[place]], context_tokens, number, questions[number]),
        )

    return Variants([row(number) for number in range(len(heads))])


def _cut_off(example: Example) -> tuple[int, ...]:
    """The prompt of an encoded pair: everything before its first target."""
    masked = next(place for place, label in enumerate(example.labels) if label != IGNORED)
    return example.input_ids[:masked]


def padding_id(tokenizer: Any) -> int:
    """The id to pad with: any valid one will do, because padding is masked by position and not by id."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


class Sampler:
    """A fixed order of ``count`` rows: every epoch is a new permutation drawn from (seed, epoch) alone.

    So step ``n`` has the same rows whether the run got there in one go or was resumed. A batch that reaches
    the end of an epoch goes on in the next.
    """

    def __init__(self, count: int, seed: int | str) -> None:
        if count < 1:
            raise AssayError("there are no rows to draw batches from: the data set is empty.")
        self.count = count
        self.seed = seed
        self._orders: dict[int, list[int]] = {}

    def batch(self, step: int, size: int) -> list[int]:
        """Row numbers of the ``size`` rows of 0-based ``step``."""
        return [self._row(position) for position in range(step * size, (step + 1) * size)]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch not in self._orders:
            # A batch touches two epochs at most when it is smaller than one; older ones will not come back.
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = self._permutation(epoch)
        return self._orders[epoch][place]

    def _permutation(self, epoch: int) -> list[int]:
        # Only random() is promised to give the same values in every Python version.
        draw = random.Random(f"{self.seed}/{epoch}").random
        return sorted(range(self.count), key=lambda _: draw())


# --- prompt styles ----------------------------------------------------------------------------------------

Prompt = Literal["question_answer", "chat", "plain"]
STYLE_FILE = "assay.json"


@dataclass(frozen=True)
class Style:
    """How a model is spoken to; it travels with the model as ``assay.json``.

    ``question_answer``: ``Question: ...\\nAnswer:`` and a blank before the answer. ``plain``: the question as it
    is, and a blank. ``chat``: the tokenizer's own template, with ``system`` as the system message.
    """

    prompt: Prompt = "question_answer"
    # The system message of a chat; None leaves it to the template.
    system: str | None = None
    # The date a template may print: fixed, because a prompt that changes every day makes no result repeatable.
    date_string: str = "26 Jul 2024"

    def prompt_text(self, question: str, tokenizer: Any) -> str:
        """Everything that stands before the answer, special tokens of a chat included."""
        if self.prompt == "question_answer":
            return f"Question: {question}\nAnswer:"
        if self.prompt == "plain":
            return question
        return self._rendered(tokenizer, self._messages(question), add_generation_prompt=True)

    def answer_text(self, answer: str) -> str:
        """The answer as it follows the prompt: a chat's header ends in a line break, other prompts need a blank."""
        return answer if self.prompt == "chat" else f" {answer}"

    def answer_end(self, tokenizer: Any) -> tuple[int, ...]:
        """What ends an answer: the end-of-sequence token, in a chat whatever the template closes the turn with.

        Of a chat's closing text only the part up to its first special token counts; generation stops there.
        """
        if self.prompt == "chat":
            messages = [*self._messages("question"), {"role": "assistant", "content": _PROBE}]
            tail = self._rendered(tokenizer, messages, add_generation_prompt=False).rpartition(_PROBE)[2]
            closing = _ids(tokenizer, [tail])[0]
            special = [
                place for place, token in enumerate(closing) if token in tokenizer.added_tokens_decoder
            ]
            if special:
                return tuple(closing[: special[0] + 1])
        if tokenizer.eos_token_id is None:
            raise AssayError("this tokenizer has no end-of-sequence token, so no answer can be ended.")
        return (int(tokenizer.eos_token_id),)

    def template(self, tokenizer: Any) -> str:
        """The tokenizer's chat template with the date fixed, whether it asks for ``date_string`` or for the clock.

        Give it to whatever renders chats by itself (lm-eval), so that every user of the model sees one prompt.
        """
        if not tokenizer.chat_template:
            raise AssayError(
                "prompt 'chat' needs a tokenizer with a chat template: use 'question_answer' instead."
            )
        return _FIXED_DATE.replace("DATE", json.dumps(self.date_string)) + str(tokenizer.get_chat_template())

    def _messages(self, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": question}]

    def _rendered(self, tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=self.template(tokenizer),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    @classmethod
    def read(cls, folder: Path) -> Style:
        """The style of a model folder; without ``assay.json``, ``chat`` where there is a chat template."""
        path = folder / STYLE_FILE
        if not path.is_file():
            return cls(prompt="chat" if _has_chat_template(folder) else "question_answer")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AssayError(f"{path} is no JSON: {error}.") from error
        return cls._checked(found, path)

    @classmethod
    def _checked(cls, found: Any, path: Path) -> Style:
        if not isinstance(found, dict):
            raise AssayError(f"{path} must be an object with the keys {', '.join(asdict(cls()))}.")
        for key in found:
            if key not in asdict(cls()):
                raise AssayError(f"{path} has an unknown key {key!r}{nearest(key, asdict(cls()))}")
        prompt = found.get("prompt", cls.prompt)
        if prompt not in get_args(Prompt):
            raise AssayError(f"{path}: unknown prompt {prompt!r}{nearest(str(prompt), get_args(Prompt))}")
        if not isinstance(found.get("date_string", ""), str) or not isinstance(
            found.get("system"), str | None
        ):
            raise AssayError(f"{path}: system and date_string must be text.")
        return cls(**found)

    def write(self, folder: Path) -> None:
        """Write ``assay.json`` into a model folder."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        (folder / STYLE_FILE).write_text(text, encoding="utf-8")


# Defined before a template's own text; the empty output at the end keeps a line break that may follow.
_FIXED_DATE = (
    "{%- set date_string = DATE %}{%- macro strftime_now(format) %}{{- date_string }}{%- endmacro %}{{- '' }}"
)
# Stands for an answer while looking for what a template puts after it.
_PROBE = "assay-answer"


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))


# --- encoding ---------------------------------------------------------------------------------------------


def encode(rows: Sequence[Row], tokenizer: Any, style: Style, context_tokens: int) -> list[Example]:
    """Question-answer rows as pairs, text rows as windows, numbered in their order; AssayError for anything else."""
    if all("question" in row and "answer" in row for row in rows):
        return _numbered(encode_pairs(rows, tokenizer, style, context_tokens))
    if all("text" in row for row in rows):
        return _numbered(encode_text(rows, tokenizer, context_tokens))
    columns = sorted({column for row in rows for column in row})
    raise AssayError(
        "rows to train on need the columns question and answer, or text, and all the same; "
        f"these have: {', '.join(columns)}."
    )


def _numbered(examples: Sequence[Example]) -> list[Example]:
    return [replace(example, number=number) for number, example in enumerate(examples)]


def encode_pairs(
    rows: Sequence[Row],
    tokenizer: Any,
    style: Style,
    context_tokens: int,
    question: str = "question",
    answer: str = "answer",
) -> list[Example]:
    """One example per row: the prompt masked, the answer and its end as targets.

    Longer sequences are cut at ``context_tokens`` from the right. AssayError names a row without the columns, or
    one whose answer would be cut away altogether.
    """
    prompts = [
        style.prompt_text(_column(row, question, number), tokenizer) for number, row in enumerate(rows)
    ]
    answers = [style.answer_text(_column(row, answer, number)) for number, row in enumerate(rows)]
    # A chat template writes the begin token itself; any other prompt starts as the tokenizer starts a text.
    start = [] if style.prompt == "chat" else _start_ids(tokenizer)
    prompt_ids = _ids(tokenizer, prompts)
    if _writes_blank(tokenizer):
        answers = [text.removeprefix(" ") for text in answers]
    answer_ids = _ids(tokenizer, answers)
    end = style.answer_end(tokenizer)
    return [
        _pair([*start, *prompt], [*reply, *end], context_tokens, number, prompts[number])
        for number, (prompt, reply) in enumerate(zip(prompt_ids, answer_ids, strict=True))
    ]


def encode_text(rows: Sequence[Row], tokenizer: Any, context_tokens: int) -> list[Example]:
    """Windows of ``context_tokens`` over the joined text, every token a target; the last may be shorter.

    Rows are lines: each is ended by one line break unless it has one. A tokenizer that begins texts with a
    special token begins every window with it. AssayError where the text is shorter than two tokens.
    """
    text = "".join(
        line if line.endswith("\n") else f"{line}\n"
        for line in (_column(row, "text", at) for at, row in enumerate(rows))
    )
    start = _start_ids(tokenizer)
    ids = _ids(tokenizer, [text])[0]
    step = context_tokens - len(start)
    if step < 1:
        raise AssayError(
            f"context_tokens={context_tokens} leaves no room for text: give at least {len(start) + 2}."
        )
    windows = [(*start, *ids[at : at + step]) for at in range(0, len(ids), step)]
    examples = [Example(window, window) for window in windows if len(window) > 1]
    if not examples:
        raise AssayError("the text is shorter than two tokens: there is nothing to predict.")
    return examples


def _pair(prompt: list[int], answer: list[int], context_tokens: int, number: int, text: str) -> Example:
    if len(prompt) >= context_tokens:
        raise AssayError(
            f"row {number} ({text[-60:]!r}) has a prompt of {len(prompt)} tokens, so that no token of its answer fits: "
            f"raise context_tokens={context_tokens} or leave the row out."
        )
    return Example(
        tuple([*prompt, *answer][:context_tokens]),
        tuple([*[IGNORED] * len(prompt), *answer][:context_tokens]),
    )


def _column(row: Row, column: str, number: int) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = "it is missing" if column not in row else f"it is {value!r}"
        raise AssayError(
            f"row {number}: column {column!r} must be text, but {found}; columns: {', '.join(row)}."
        )
    return value


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    with _one_thread():
        found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _start_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text."""
    bare = _ids(tokenizer, ["a"])[0]
    whole: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def _writes_blank(tokenizer: Any) -> bool:
    """Whether it puts a blank before every text, as sentencepiece does: then ours would be a second one."""
    first = tokenizer.convert_ids_to_tokens(_ids(tokenizer, ["a"])[0][:1])[0]
    return str(first).startswith("▁")


# --- data stages ------------------------------------------------------------------------------------------

ROWS_FILE = "rows.jsonl"


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Write the ``data/`` folder of a stage that makes a data set: one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True, allow_nan=False) for row in rows]
    (folder / ROWS_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_rows(folder: Path) -> list[Row]:
    """The rows of a data stage, from its ``data/`` folder."""
    path = folder / ROWS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows: list[Row] = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise AssayError(f"{path} holds no rows of a data stage: {error}.") from error
    return rows


# --- new tokenizers ---------------------------------------------------------------------------------------

SPECIALS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def train_tokenizer(locator: Locator, names: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocabulary`` entries, 256 bytes and 3 special tokens included.

    It is trained on the rows of the named data sets as they are trained on (``Question: ...`` or text). The same
    rows give the same tokenizer, in any process. It adds no special token by itself. At ``scale=smoke``, where the
    data are stand-ins, it may come out smaller.
    """
    from transformers import PreTrainedTokenizerFast

    texts = [_training_text(row) for name in names for row in locator.rows(name)]
    trained = byte_bpe(texts, vocabulary, list(SPECIALS.values()), exact=not locator.smoke)
    return PreTrainedTokenizerFast(tokenizer_object=trained, clean_up_tokenization_spaces=False, **SPECIALS)


def byte_bpe(texts: Sequence[str], vocabulary: int, specials: Sequence[str], exact: bool = True) -> Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; over bytes as in GPT-2), special tokens first.

    AssayError where the vocabulary is too small for the bytes or, if it has to be ``exact``, the texts hold too few
    pairs for it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < 256 + len(specials):
        raise AssayError(
            f"vocabulary={vocabulary} is too small: bytes and special tokens are {256 + len(specials)}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with _one_thread():
        tokenizer.train_from_iterator(texts, trainer)
    if exact and tokenizer.get_vocab_size() != vocabulary:
        raise AssayError(
            f"the text has only enough for a vocabulary of {tokenizer.get_vocab_size()}: "
            f"lower vocabulary={vocabulary} or name more data."
        )
    return tokenizer


def _training_text(row: Mapping[str, Any]) -> str:
    if "text" in row:
        return str(row["text"])
    if "question" in row and "answer" in row:
        return f"{Style().prompt_text(row['question'], None)} {row['answer']}"
    raise AssayError(
        f"a tokenizer is trained on question and answer, or text; these rows have: {', '.join(row)}."
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the tokenizers library from starting threads: the order of its counts, and forks, stay safe."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
