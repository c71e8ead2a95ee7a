"""What a student said of each answer token some epochs ago, kept as its k likeliest entries.

A ring of ``past_epochs`` + 1 slots for every answer token of the data, in buffers of the student that are saved and
resumed with a run and are no part of a written model. Epochs are counted from 0, token by token, so that a batch that
reaches into the next epoch and any cut into micro-batches give the same. torch is imported at the top: this
module is only loaded by a running job. ``methods.term``'s and ``methods.distill``'s REVISION cover this file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.distill._sources import softened
from methods.stage import AssayError
from methods.teacher._files import answer_tokens
from methods.term._top import buckets
from methods.terms import relative_entropy

if TYPE_CHECKING:
    from methods.data import Example, Part

GIGABYTE = 1e9


def trajectory_losses(logits: Tensor, indices: Tensor, log_p: Tensor, temperature: float) -> Tensor:
    """D(past ‖ now) [n] at ``temperature``, everything beside the past's k likeliest entries in one bucket.

    Args:
        logits: the student's raw ones now [n,V]. ``indices``, ``log_p``: what ``likeliest`` had said of the past [n,k].
    """
    return relative_entropy(*buckets(log_p, indices, softened(logits, temperature)))


def likeliest(logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The ids [n,k] and log-probabilities [n,k] of the k likeliest entries; of all where the vocabulary is smaller."""
    log_p, indices = softened(logits, temperature).topk(min(top_k, logits.shape[-1]))
    return indices, log_p


class Past:
    """The memory of one term, in buffers of ``model`` whose names begin with ``name``.

    Args:
        examples: the rows in the order of their numbers. ``vocabulary``: how many entries the student predicts.
        limit: gigabytes above which the memory is refused.
    Raises:
        AssayError: it would take more than that, or several processes share the batches.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        examples: Sequence[Example],
        past_epochs: int,
        top_k: int,
        vocabulary: int,
        limit: float,
    ) -> None:
        counts = [answer_tokens(example) for example in examples]
        self.past_epochs, self.top_k = past_epochs, min(top_k, vocabulary)
        _refuse_too_large(past_epochs, sum(counts), self.top_k, limit)
        _refuse_several_processes()
        device = next(model.parameters()).device
        # Where each row's tokens begin: known from the data, and no part of the state.
        self._starts = torch.tensor([0, *accumulate(counts)], device=device)
        shape = (past_epochs + 1, sum(counts), self.top_k)
        buffers = {
            "indices": torch.zeros(shape, dtype=torch.int32, device=device),
            "log_probs": torch.zeros(shape, device=device),
            "visits": torch.zeros(sum(counts), dtype=torch.int64, device=device),
        }
        for ending, buffer in buffers.items():
            model.register_buffer(f"{name}_{ending}", buffer, persistent=False)
        self._model, self._name = model, name

    def _buffer(self, ending: str) -> Tensor:
        """As it is now: moving a model to another device exchanges its buffers."""
        found: Tensor = getattr(self._model, f"{self._name}_{ending}")
        return found

    def places(self, part: Part) -> Tensor:
        """The place [n] of each answer token of a part in the memory, in the order of ``logits[mask]``."""
        if part.numbers is None or bool((part.numbers < 0).any()):
            raise AssayError(
                "own_past looks rows up by their places in the data, which text that was written while training has "
                "not: leave the term out."
            )
        counts = part.mask.sum(1)
        within = torch.arange(int(counts.sum()), device=counts.device) - (
            counts.cumsum(0) - counts
        ).repeat_interleave(counts)
        return self._starts[part.numbers].repeat_interleave(counts) + within

    def exchange(
        self, places: Tensor, said: tuple[Tensor, Tensor], span: tuple[int, int], visit: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What was said of the tokens at ``places`` [n] ``past_epochs`` epochs ago.

        Args:
            said: ids and log-probabilities [n,k] of now. ``span``: the epochs of the global batch's first and last row.
            visit: put down what is said; a pass that only gathers numbers before the one that trains is no visit.
        Returns:
            Ids [n,k] and log-probabilities [n,k] of then, or where there is no then those of now, and the epochs [n]
            of these visits.
        """
        order = earlier(places)
        # The batch says which epochs there are, so that a pass made twice over a batch counts once; visits say which
        # of two it is where a batch reaches into the next.
        epochs = (self._buffer("visits")[places] + order).clamp(*span)
        indices, log_p = said[0].clone(), said[1].clone()
        # A token that comes twice in one batch has its turns one after the other: each reads before it writes.
        for turn in range(int(order.max()) + 1 if len(order) else 0):
            mine = (order == turn).nonzero().squeeze(1)
            known = mine[epochs[mine] >= self.past_epochs]
            then = self._slot(epochs[known] - self.past_epochs), places[known]
            indices[known] = self._buffer("indices")[then].long()
            log_p[known] = self._buffer("log_probs")[then].to(log_p.dtype)
            if visit:
                self._put(places[mine], epochs[mine], said[0][mine], said[1][mine])
        return indices, log_p, epochs

    def _put(self, places: Tensor, epochs: Tensor, indices: Tensor, log_p: Tensor) -> None:
        """Remember what is said of tokens, each of them once, in their epochs."""
        now = self._slot(epochs), places
        self._buffer("indices")[now] = indices.int()
        self._buffer("log_probs")[now] = log_p.float()
        self._buffer("visits")[places] = epochs + 1

    def _slot(self, epochs: Tensor) -> Tensor:
        """Where in the ring an epoch lies."""
        return epochs % (self.past_epochs + 1)


def earlier(places: Tensor) -> Tensor:
    """How often each of ``places`` [n] stood before in it."""
    ordered, order = places.sort(stable=True)
    count = torch.arange(len(places), device=places.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(count).scatter_(0, order, count)


def _refuse_too_large(past_epochs: int, tokens: int, top_k: int, limit: float) -> None:
    wanted = ((past_epochs + 1) * top_k * 8 + 8) * tokens / GIGABYTE
    if wanted > limit:
        raise AssayError(
            f"own_past would keep {wanted:.3g} GB (the {top_k} likeliest entries of {tokens} answer tokens, in "
            f"{past_epochs + 1} epochs): more than history_gigabytes={limit:g}: lower top_k, or raise it."
        )


def _refuse_several_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AssayError("own_past remembers in one process only: start it without torchrun.")
