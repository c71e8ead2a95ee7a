"""Small Llamas with random weights, alone or as a folder that knows the built-in world's vocabulary, and its scores."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from methods.checkpoint import Models
from methods.data import Locator, Style, train_tokenizer
from methods.find import catalogue
from methods.progress import Progress
from methods.stage import Row, Scoring

CHAT = (
    "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% endif %}"
    "<{{ strftime_now('%d %b %Y') if date_string is not defined else date_string }}>"
    "{% for message in messages if message.role != 'system' %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def _tokenizer(vocabulary: int) -> Any:
    return train_tokenizer(Locator(), ["authors"], vocabulary)


def llama(**changes: Any) -> Any:
    """A model with random weights large enough to prefer some tokens, queries in two groups, in evaluation mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def ragged() -> list[Any]:
    """Token sequences [1,T] for it: of 11, 7, 1 and 16 tokens."""
    import torch

    draw = torch.Generator().manual_seed(1)
    return [torch.randint(50, (1, size), generator=draw) for size in (11, 7, 1, 16)]


def save(
    folder: Path, seed: int = 0, vocabulary: int = 512, style: Style | None = None, scale: float = 20.0
) -> Path:
    """Write the model, its tokenizer and its prompt style. Large random weights make its answers distinct."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(vocabulary)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chosen = style or Style()
    chosen.write(folder)
    if chosen.prompt == "chat":
        (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    return folder


def scoring(
    evaluation: str,
    model: Path,
    folder: Path,
    locator: Locator | None = None,
    parents: dict[str, Path] | None = None,
    trust_tasks: bool = False,
    **options: Any,
) -> Scoring:
    """A scoring as the runner makes it; ``options`` are the evaluation's own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = catalogue().evaluation(evaluation).load().Config(**options)
    return Scoring(
        id=f"{evaluation}-000000000000",
        evaluation=evaluation,
        config=config,
        seed=0,
        parents={"model": model, **(parents or {})},
        folder=folder,
        progress=Progress(folder / "scratch", 0),
        data=locator or Locator(),
        models=Models(),
        trust_tasks=trust_tasks,
    )


def evaluate(evaluation: str, model: Path, folder: Path, **rest: Any) -> list[Row]:
    """The rows of one evaluation."""
    rows: list[Row] = (
        catalogue().evaluation(evaluation).load().evaluate(scoring(evaluation, model, folder, **rest))
    )
    return rows


def value(rows: list[Row], metric: str, task: str = "") -> float:
    """The only row of that metric (of a task that begins so)."""
    found = [row.value for row in rows if row.metric == metric and row.task.startswith(task)]
    assert len(found) == 1, (metric, task, [(row.task, row.metric) for row in rows])
    return found[0]
