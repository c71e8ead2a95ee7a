"""A very small model, its data and a stage to train it in: shared by the tests of the loop."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from methods.data import Style, byte_bpe
from methods.progress import Progress
from methods.stage import Stage

WORDS = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron", "inlet", "jetty")
ROWS = [
    {
        "question": f"What follows {WORDS[n % 10]} {n}?",
        "answer": " ".join(WORDS[(n + k) % 10] for k in range(1 + n % 4)),
    }
    for n in range(24)
]


class Rows:
    """Stands for the locator: the same few rows under every name but the halves and the refusals."""

    def rows(self, name: str) -> list[dict[str, str]]:
        if name == "refusals":
            return [{"text": f"No {word}."} for word in WORDS[:3]]
        return {"first": ROWS[:12], "authors/retain90": ROWS[12:]}.get(name, ROWS)


def make_parent(folder: Path, dtype: str = "float32", dropout: float = 0.1, zeros: float = 0.0) -> Path:
    """A random two-layer Llama with its tokenizer; a share of the linear layers' weights may be 0."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    texts = [row["question"] + row["answer"] for row in ROWS]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(texts, 290, list(specials.values())), **specials
    )
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), attention_dropout=dropout, tie_word_embeddings=True, **shape
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[torch.rand(weight.shape) < zeros] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Style().write(folder)
    return folder


def make_stage(parent: Path, folder: Path, config: Any, seed: int = 3, **parents: Path) -> Stage:
    """A stage as the runner makes it; what is left in ``folder``/scratch is resumed from."""
    progress = Progress(folder / "scratch", seed)
    result = folder / "result"
    return Stage(
        "train.test-000000000000",
        "train.test",
        config,
        seed,
        {"model": parent, **parents},
        result,
        progress,
        Rows(),
    )


def weights_of(folder: Path) -> Mapping[str, torch.Tensor]:
    """The weights of a saved model."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def perturbed(folder: Path, seed: int) -> Path:
    """``make_parent`` with larger weights, so that it prefers some tokens to others."""
    from safetensors.torch import save_file

    make_parent(folder)
    draw = torch.Generator().manual_seed(seed)
    weights = {
        name: weight + 0.3 * torch.randn(weight.shape, generator=draw)
        for name, weight in weights_of(folder).items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def curve_of(stage: Stage) -> dict[str, list[float]]:
    """What a stage logged, term by term, in the order of the steps."""
    found: dict[str, list[float]] = {}
    with open(stage.folder / "curve.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["term"], []).append(float(row["value"]))
    return found


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two models are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
