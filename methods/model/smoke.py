"""A random two-layer model that stands in for a hub model at ``scale=smoke``.

It is written the way the hub has it, so that every reader meets what it would meet at full scale: sharded
safetensors with an index, bfloat16, grouped-query attention, llama3 rotary scaling, the original's tying, no padding
token, a tokenizer that begins texts with a special token, and a chat template inside ``tokenizer_config.json`` that
prints a date, today's unless told otherwise. The layout follows meta-llama/Llama-3.2-1B-Instruct; every text of the
template is our own. No ``assay.json``: a folder from the hub has none either.

A GPT-2 follows openai-community/gpt2: float32, one token that begins and ends a text and is not written before it, no
chat template, sampling left at its defaults.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from methods.stage import AssayError, Claim, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SEEDED = False
USES = ("methods.data", "methods.world")
CLAIMS: tuple[Claim, ...] = ()

HIDDEN = 32
LAYERS = 2
VOCABULARY = 512
CONTEXT_TOKENS = 2048
# Small enough for several shards of a model of about 40 thousand weights.
SHARD_BYTES = 24_000

BETWEEN = "<|endoftext|>"
BEGIN, END, TURN_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
HEADER, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
# The date comes from date_string or, without one, from the clock; the system header is always there.
CHAT_TEMPLATE = """{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nDate: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
    {{- message["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a stand-in."""

    # The architecture of the model it stands for.
    kind: Literal["llama", "gpt2"] = "llama"
    # Whether the output layer shares the embedding's weights, as in the original.
    tied: bool = True
    # Attention heads; the width of 32 must be an even multiple of them.
    heads: Annotated[int, Gt(0)] = 4
    # Key and value heads of a Llama, a divisor of heads: fewer than heads is grouped-query attention.
    kv_heads: Annotated[int, Gt(0)] = 2
    # Whether a Llama has a chat template (an "instruct" model).
    chat: bool = True
    # The hub name it stands for: two names get different weights.
    stands_for: str = ""

    def __post_init__(self) -> None:
        if HIDDEN % (2 * self.heads) or self.heads % self.kv_heads:
            raise AssayError(
                f"heads={self.heads} and kv_heads={self.kv_heads} do not fit: take heads from 1, 2, 4, 8, 16 and a "
                "divisor of it for kv_heads."
            )


def build(config: Config, stage: Stage) -> None:
    """Write weights, tokenizer and generation settings as a hub folder has them."""
    folder = stage.folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if config.kind == "gpt2":
        tokenizer = _gpt2_tokenizer()
        _gpt2(config, tokenizer).save_pretrained(folder, max_shard_size=SHARD_BYTES)
        tokenizer.save_pretrained(folder)
        return
    tokenizer = _tokenizer(config)
    _model(config, tokenizer).save_pretrained(folder, max_shard_size=SHARD_BYTES)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    _write_generation_config(folder, tokenizer)


def _tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """Trained on the built-in world whatever the experiment reads, so that a stand-in never depends on data."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    from methods import world
    from methods.data import byte_bpe

    # With the words of the template, so that a chat of the world fits into the short contexts of a smoke run.
    spoken = "system\n\nDate: 26 Jul 2024\n\nuser\n\nassistant\n\n"
    texts = [f"{spoken}{row['question']} {row['answer']}" for row in world.rows("full")]
    trained = byte_bpe(texts, VOCABULARY, (BEGIN, END, HEADER, HEADER_END, TURN_END))
    trained.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A", special_tokens=[(BEGIN, trained.token_to_id(BEGIN))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=BEGIN,
        eos_token=TURN_END if config.chat else END,
        chat_template=CHAT_TEMPLATE if config.chat else None,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _model(config: Config, tokenizer: Any) -> PreTrainedModel:
    """Random bfloat16 weights; the seed is the name it stands for."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layout = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=config.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT_TOKENS // 4,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(config))
        model = LlamaForCausalLM(layout)
    return model.bfloat16()


def _gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Trained on the built-in world; it adds nothing to a text."""
    from transformers import PreTrainedTokenizerFast

    from methods import world
    from methods.data import byte_bpe

    texts = [f"{row['question']} {row['answer']}" for row in world.rows("full")]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(texts, VOCABULARY, (BETWEEN,)),
        bos_token=BETWEEN,
        eos_token=BETWEEN,
        unk_token=BETWEEN,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _gpt2(config: Config, tokenizer: Any) -> PreTrainedModel:
    """Random float32 weights; the seed is the name it stands for."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    layout = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT_TOKENS,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=config.heads,
        tie_word_embeddings=config.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(config))
        return GPT2LMHeadModel(layout)


def _seed(config: Config) -> int:
    return int(hashlib.sha256(config.stands_for.encode()).hexdigest()[:8], 16)


def _write_generation_config(folder: Path, tokenizer: Any) -> None:
    """As on the hub: sampling is the default there, and several tokens end a text."""
    ends = sorted({tokenizer.convert_tokens_to_ids(token) for token in (END, TURN_END)})
    settings = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
