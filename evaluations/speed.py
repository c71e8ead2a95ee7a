"""Tokens per second and joules per token, reading a prompt (prefill) and writing after it (decode) apart, and memory.

The physically smaller form is measured where a model has one (``physical=true`` in the task), else the model as it
is: zeros alone make nothing faster. ``memory_bytes`` is what its weights and, after the last new token, its keys and
values take; an attention that was removed has none. Prompts are random tokens and the end mark is ignored, so every
model does the same work. Each phase is warmed up and then repeated; the spread is over repeats. Energy is CodeCarbon's,
over all repeats of a phase: ``estimated`` where there is no power counter or the phase was too short to be read ten
times. Runs alone on the machine, and is no part of any comparison of bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt

from evaluations import _statistics
from methods.stage import AssayError, Row, Scoring

USES = ("methods.checkpoint", "evaluations._statistics")
ALONE = True
DETERMINISTIC = False
JOULES_PER_KWH = 3.6e6
# CodeCarbon wants a country for its emissions, which are not looked at here.
ANY_COUNTRY = "FRA"


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much is read and written, and how often."""

    # Tokens of the prompt.
    prompt_tokens: Annotated[int, Gt(0)] = 64
    # Tokens written after it.
    new_tokens: Annotated[int, Gt(0)] = 32
    # Sequences at once.
    batch: Annotated[int, Gt(0)] = 1
    # Measurements of each phase, after one that is thrown away.
    repeats: Annotated[int, Gt(0)] = 5
    # Least length of one measurement: short work is done several times over.
    seconds: Annotated[float, Gt(0)] = 0.4


@dataclass(frozen=True)
class Phase:
    """Seconds per round of each repeat, and the joules of all rounds together with how they were obtained."""

    seconds: list[float]
    joules: float
    rounds: int
    source: str


def evaluate(scoring: Scoring) -> list[Row]:
    """Rows for both phases, ``*_tokens_per_second`` and ``*_joules_per_token``, and ``memory_bytes``."""
    import torch

    config, folder, physical = scoring.config, Path(scoring.parents["model"]), False
    if (folder / "physical").is_dir():
        folder, physical = folder / "physical", True
    model = scoring.models.load(folder)
    prompt = _prompt(model, config)
    with torch.inference_mode():
        prefill = _measure(lambda: _prefill(model, prompt), model.device, config)
        token, cache = _prefill(model, prompt)
        decode = _measure(lambda: _decode(model, token, cache, config), model.device, config)
        tokens = config.prompt_tokens + config.new_tokens
        memory = _weights(model) + _cached(cache) * tokens / config.prompt_tokens
    task = f"physical={str(physical).lower()} prompt_tokens={config.prompt_tokens} new_tokens={config.new_tokens} "
    task += f"batch={config.batch} device={model.device.type} threads={scoring.threads}"
    return [
        *_rows(task, "prefill", config.batch * config.prompt_tokens, prefill),
        *_rows(task, "decode", config.batch * config.new_tokens, decode),
        Row(task, "memory_bytes", memory, unit="bytes", better="lower"),
    ]


def _prompt(model: Any, config: Config) -> Any:
    """The same random tokens for every model of one vocabulary [B,T]."""
    import torch

    places = getattr(model.config, "max_position_embeddings", None)
    if places is not None and config.prompt_tokens + config.new_tokens > places:
        raise AssayError(
            f"speed: {config.prompt_tokens} prompt and {config.new_tokens} new tokens do not fit this model's "
            f"{places}; lower prompt_tokens or new_tokens."
        )
    generator = torch.Generator().manual_seed(0)
    size = (config.batch, config.prompt_tokens)
    return torch.randint(model.config.vocab_size, size, generator=generator).to(model.device)


def _prefill(model: Any, prompt: Any) -> tuple[Any, Any]:
    output = model(input_ids=prompt, use_cache=True)
    return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values


def _decode(model: Any, token: Any, cache: Any, config: Config) -> None:
    """Write ``new_tokens`` after the prompt, and cut the cache back to it."""
    for _ in range(config.new_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
    cache.crop(-config.new_tokens)


def _weights(model: Any) -> float:
    """Bytes of the parameters, in the precision the model is computed in; tied ones count once."""
    return float(sum(weight.numel() * weight.element_size() for weight in model.parameters()))


def _cached(cache: Any) -> float:
    """Bytes of the keys and values of the prompt."""
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in kept))


def _measure(work: Callable[[], object], device: Any, config: Config) -> Phase:
    """Time and meter ``repeats`` repeats; the rounds in each are set by the warm-up."""
    from workflows.energy import Meter

    once = _timed(work, 1, device)
    rounds = max(1, round(config.seconds / min(once, _timed(work, 1, device))))
    cards = tuple(filter(None, os.environ.get("ASSAY_CARDS", "").split(",")))
    meter = Meter(ANY_COUNTRY, cards, announce=False)
    meter.start()
    seconds = [_timed(work, rounds, device) / rounds for _ in range(config.repeats)]
    account = meter.stop()
    return Phase(seconds, account["total_kwh"] * JOULES_PER_KWH, rounds * config.repeats, account["label"])


def _timed(work: Callable[[], object], rounds: int, device: Any) -> float:
    """Wall-clock seconds, waiting for an accelerator before and after."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rows(task: str, phase: str, tokens: int, found: Phase) -> list[Row]:
    rate = _statistics.mean([tokens / seconds for seconds in found.seconds])
    joules = found.joules / found.rounds / tokens
    unit = f"J/token {found.source}"
    return [
        Row(task, f"{phase}_tokens_per_second", rate.value, rate.stderr, rate.n, "tokens/s", "higher"),
        Row(task, f"{phase}_joules_per_token", joules, None, found.rounds, unit, "lower"),
    ]
