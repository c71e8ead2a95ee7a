"""Runs a decoder sub-block by sub-block on batches whose padding costs no mask, and its head where it is needed.

A search runs the same few thousand tokens through thousands of slightly different models. Three things are left out
here that a model's own forward pass does each time: the mask and the positions are made once for a batch; attention and
MLP can be run apart, so that a candidate starts where it first differs from the one before; and the final norm and the
head see only positions that predict something.

Sequences of a batch are padded on the right. A causal model never looks to the right, so padding needs no mask: what is
computed there is thrown away. The kernels are those of the model's own modules, called with the arguments that the
model calls them with, and in float32 and bfloat16 alike the hidden states are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.prune._walk import decoder_layers, first
from methods.stage import AssayError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ATTENTION, MLP = "self_attn", "mlp"
# What a block whose halves can be run apart consists of, no more and no less.
HALVES = {ATTENTION, MLP, "input_layernorm", "post_attention_layernorm"}
# The length and the largest share of the largest logit by which running in parts may differ from the model itself.
SAMPLE_TOKENS, TOLERANCE = 16, 1e-3


@dataclass(frozen=True)
class Site:
    """A part of a decoder that is run at a time: a block, or its attention or MLP with norm and residual."""

    name: str
    block: int
    kind: str  # "self_attn", "mlp", or "" for a whole block
    module: nn.Module

    @property
    def ends_block(self) -> bool:
        """Whether its output is that of its block."""
        return self.kind != ATTENTION


@dataclass(frozen=True)
class Prepared:
    """A padded batch as the first block sees it: hidden states [B,T,d], and every block's other arguments."""

    hidden: Tensor
    settings: Sequence[Mapping[str, Any]]


class _Caught(Exception):
    """Ends a forward pass once the arguments of the blocks are known."""


class Runner:
    """The parts of a causal decoder in the order in which they run.

    Raises:
        AssayError: the model has no list of layers, no final norm or no output layer where they are looked for, or its
            own logits are not what they give.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self.norm, self.head = _tail(model)
        kinds = getattr(model.config, "layer_types", None) or ()
        # Blocks of one kind are all called with the same arguments.
        self._watched = len(self.layers) if len(set(kinds)) > 1 else 1
        self.sites = self._halves() or self._wholes()
        self._verify()

    def _prefix(self) -> str:
        return next(name for name, part in self.model.named_modules() if part is self.layers)

    def _wholes(self) -> tuple[Site, ...]:
        prefix = self._prefix()
        return tuple(Site(f"{prefix}.{index}", index, "", block) for index, block in enumerate(self.layers))

    def _halves(self) -> tuple[Site, ...]:
        """Attention and MLP of every block; nothing where a block consists of anything else."""
        if any({name for name, _ in block.named_children()} != HALVES for block in self.layers):
            return ()
        return tuple(
            Site(f"{whole.name}.{kind}", whole.block, kind, whole.module)
            for whole in self._wholes()
            for kind in (ATTENTION, MLP)
        )

    def site_of(self, module_name: str) -> int:
        """Which site a module of the model runs in."""
        for index, site in enumerate(self.sites):
            if module_name == site.name or module_name.startswith(f"{site.name}."):
                return index
        raise AssayError(
            f"{module_name} lies in no block of this {type(self.model).__name__}: its levels cannot be searched."
        )

    # --- running ----------------------------------------------------------------------------------------------------

    def prepare(self, input_ids: Tensor) -> Prepared:
        """What the blocks are called with for token ids [B,T], padded on the right with anything."""
        hidden: list[Tensor] = []
        settings: list[Mapping[str, Any]] = []

        def catch(_module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
            hidden.append(arguments[0])
            settings.append(keywords)
            if len(settings) == self._watched:
                raise _Caught

        handles = [
            block.register_forward_pre_hook(catch, with_kwargs=True) for block in self.layers[: self._watched]
        ]
        try:
            self.model(input_ids=input_ids.to(self.model.device), use_cache=False)
        except _Caught:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return Prepared(hidden[0], settings if len(settings) > 1 else settings * len(self.layers))

    def step(self, index: int, hidden: Tensor, settings: Sequence[Mapping[str, Any]]) -> Tensor:
        """The hidden states [B,T,d] behind one site."""
        site = self.sites[index]
        block: Any = site.module
        if site.kind == ATTENTION:
            inner = block.self_attn(hidden_states=block.input_layernorm(hidden), **settings[site.block])
            return hidden + first(inner)
        if site.kind == MLP:
            return hidden + first(block.mlp(block.post_attention_layernorm(hidden)))
        return first(block(hidden, **settings[site.block]))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [N,V] of the last block's hidden states [N,d] at the positions that are wanted."""
        scores: Tensor = self.head(self.norm(hidden))
        return scores.float()

    # --- is it this model? ------------------------------------------------------------------------------------------

    def _verify(self) -> None:
        """Compare with the model's own forward pass on a few tokens; run blocks as a whole where halves are others."""
        import torch

        size = min(SAMPLE_TOKENS, int(self.model.config.vocab_size))
        ids = torch.arange(size)[None].to(self.model.device)
        with torch.inference_mode():
            expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
            if len(self.sites) > len(self.layers) and not self._same(ids, expected):
                self.sites = self._wholes()
            if not self._same(ids, expected):
                raise AssayError(
                    f"a {type(self.model).__name__} does more than its blocks, final norm and output layer do one "
                    "after the other: a search runs them one by one and needs a Llama-like decoder."
                )

    def _same(self, ids: Tensor, expected: Tensor) -> bool:
        prepared = self.prepare(ids)
        hidden = prepared.hidden
        for index in range(len(self.sites)):
            hidden = self.step(index, hidden, prepared.settings)
        difference = float((self.logits(hidden[0]) - expected).abs().max())
        return difference <= TOLERANCE * max(1.0, float(expected.abs().max()))


def _tail(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The final norm and the output layer of a decoder."""
    from methods.architectures import output_layer

    norm = getattr(model.base_model, "norm", None)
    if norm is None:
        raise AssayError(
            f"{type(model).__name__} has no final norm where a Llama has it: a search looks for the modules layers and "
            "norm of the decoder and for its output layer."
        )
    return norm, output_layer(model)
