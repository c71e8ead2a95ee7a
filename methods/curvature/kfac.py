"""Kronecker factors of every linear layer of a decoder, for K-FAC and EK-FAC.

Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature"; George et al. 2018,
"Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis"; Eschenhagen et al. 2023,
"Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures" (the *expand* setting).

    G = E[ J^T (diag(p) - p p^T) J ]  ~  S (x) A  per layer,   A = E[a a^T],  S = E[d d^T]

The expectation is over the model's own predictions p at the answer tokens, never over the labels of the data; for
softmax and cross-entropy that makes G the Fisher matrix and the Gauss-Newton matrix at once. Every nn.Linear of the
decoder's blocks takes part; embeddings and the output head do not. A bias is a last column of the weight.

A layer is used once for every position of a sequence: A and S are means of a a^T and d d^T over positions, as if these
were independent (*expand*), with S scaled to answer tokens so that S (x) A is in nats per answer token. Prompt
positions count, because answers read them through attention; padding does not. EK-FAC's eigenvalues are second moments
of whole sequences' gradients, cross terms between positions included.

A and S of all layers are added up in one pass over the data, never in a pass for each layer. EK-FAC needs the
eigenbases before its eigenvalues, so that ``ekfac`` costs a second pass.

Memory, beside the model and one micro-batch with its activations: d_in^2 + d_out^2 floats for each layer, twice for the
one being decomposed, and with ``ekfac`` d_in d_out more for each (and, while a micro-batch is added up, d_in d_out for
each of its sequences, for one layer at a time). No gradient of all weights is ever held.

The result is ``files/factors.safetensors`` (eigenvectors and eigenvalues, float32) and ``files/factors.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from methods.stage import Claim, Dataset, How

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.curvature._factors import Measurement, Sample
    from methods.curvature._kronecker import Labels
    from methods.data import Part

# The seed draws the sequences and their labels.
SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms")
RESULT = "files"
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured on, and how the expectation over labels is taken."""

    # rows whose outputs the curvature is that of
    data: Dataset = "authors/retain90"
    # rows drawn without replacement; None: all. 512 hold 5,600 answer tokens in the built-in world
    sequences: Annotated[int, Gt(0)] | None = 512
    # sampled: drawn from the model. signs: the same expectation with less noise. exact: every vocabulary entry, at V
    # times the longest answer in backward passes, which only small vocabularies can afford
    labels: Literal["sampled", "signs", "exact"] = "sampled"
    # draws for each token; "exact" needs none
    samples: Annotated[int, Gt(0)] = 1
    # also measure the eigenvalues of EK-FAC, in a second pass
    ekfac: bool = True
    # longer sequences are cut
    context_tokens: Annotated[int, Gt(1)] = 512
    # of the forward pass; auto: bfloat16 on an accelerator, float32 on the processor
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # sequences that go through the model at once
    micro_batch: Annotated[Annotated[int, Gt(0)], How] = 32
    # seconds between two saved states
    save_seconds: Annotated[float, Gt(0), How] = 30.0


def measure(
    config: Config,
    logits: Callable[[Part], Tensor],
    layers: Mapping[str, nn.Linear],
    sample: Sample,
    labels: Labels,
) -> Measurement:
    """The passes over the sample, to be made."""
    from methods.curvature._factors import Measurement

    return Measurement(logits, layers, sample, labels, corrected=config.ekfac)
