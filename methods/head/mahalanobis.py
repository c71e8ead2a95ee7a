"""Mahalanobis distance head: harmonic loss in a learnt metric.

Miller-Golub et al. 2026, "Rethinking the Harmonic Loss via Non-Euclidean Distance Layers", Mahalanobis layers:

    D_ij = sqrt((x_i - w_j)^T P (x_i - w_j) + eps)        p_ij ~ (D_ij + eps)^-n        eps = 1e-4, n = 1 on D

with a precision matrix P that is learnt beside the class vectors:

    standard    P = (C + C^T) / 2 + shift I      C starts at (1 + lambda) I, lambda = 0.01
    diagonal    P = diag(exp(v) + eps)           v starts at 0
    cholesky    P = L L^T + shift I              L the lower triangle of C, which starts at 0.1 I

The three official implementations differ in the shift, in two clamps, and in the language models' division by the
row's smallest distance, before eps is added and D raised to -1 (``impl="language"``, smoothing=0.01, floor=1e-8,
exponent=1, exponent_on="plain"):

                vision                                    toy                  language
    standard    lambda + 10 eps                           lambda               lambda + eps
    diagonal    v clamped to [-10, 10]                    -                    -
    cholesky    eps, and the diagonal of L at least eps   10 eps               0

The standard form of the language models goes through a Cholesky factor of P, which is the same distance as long as P
is positive definite. Nothing keeps it so: where the form turns negative the distance is 0 here, as in the image
models. The toy sets start the Cholesky factor with a little noise; here it starts without.

P x is formed once for every hidden state, so that all distances are one matrix product. The scale of P cancels in the
probabilities but for eps. With n = 1 a vocabulary cannot be told apart: where all 50,303 wrong tokens are ten times as
far away as the right one, the loss is still 8.5 nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from methods.head import Layer, absolute, conventions, plain_scores, power, relative, unused, widen

if TYPE_CHECKING:
    from torch import Tensor

USES = ("methods.head", "methods.head._products")
# lambda of the standard form in all official code.
REGULARIZATION = 0.01
# Beyond it, either way, the image models hold the logarithms of a diagonal.
LARGEST_LOGARITHM = 10.0
# Where the Cholesky factor starts, times the identity.
FACTOR = 0.1


@dataclass(frozen=True, kw_only=True)
class Config(Layer):
    """Options of the Mahalanobis head."""

    # See above.
    variant: Literal["standard", "diagonal", "cholesky"] = "standard"
    # lambda; "standard" only. None: the official 0.01.
    regularization: Annotated[float, Ge(0)] | None = None

    def __post_init__(self) -> None:
        """Only the standard form is regularised."""
        super().__post_init__()
        if self.variant != "standard":
            unused(self, "mahalanobis", ["regularization"], "variant='standard'")


def parameters(config: Config, weight: Tensor) -> dict[str, Tensor]:
    """The parameter behind P at the start: [d,d], or its logarithmic diagonal [d]."""
    import torch

    width = weight.shape[1]
    if config.variant == "diagonal":
        return {"log_diagonal": weight.new_zeros(width)}
    identity = torch.eye(width, device=weight.device, dtype=weight.dtype)
    if config.variant == "cholesky":
        return {"factor": FACTOR * identity}
    return {"precision": (1 + strength(config)) * identity}


def scores(config: Config, hidden: Tensor, weight: Tensor, **further: Tensor) -> Tensor:
    """Log-space scores [N,V] of hidden states [N,d] for class vectors [V,d]: ``-n log D``."""
    from methods.head._products import Curve, full_precision, quadratic

    (parameter,) = further.values()
    with full_precision(hidden.device.type):
        hidden, weight = widen(hidden), widen(weight)
        matrix = precision(config, widen(parameter).to(hidden.dtype))
        definite = config.variant != "standard" or is_definite(matrix)
        if relative(config):
            curve = Curve(config.epsilon, root=True, logarithm=False, definite=definite)
            return plain_scores(config, hidden, weight, lambda x, w: quadratic(x, w, curve, matrix))
        exponent = 2 * power(config, hidden.shape[-1])
        curve = Curve(config.epsilon, exponent, root=True, outside=config.epsilon, definite=definite)
        found = quadratic(hidden, weight, curve, matrix)
        return conventions(config, found, absolute=absolute(config))


def is_definite(matrix: Tensor) -> bool:
    """Whether P [d,d] is positive definite, so that a negative form is nothing but rounding."""
    import torch

    return int(torch.linalg.cholesky_ex(matrix.detach()).info) == 0


def precision(config: Config, parameter: Tensor) -> Tensor:
    """P [d,d], or its diagonal [d]."""
    import torch

    if config.variant == "diagonal":
        bound = LARGEST_LOGARITHM if config.impl == "vision" else float("inf")
        return parameter.clamp(-bound, bound).exp() + config.epsilon
    identity = torch.eye(len(parameter), device=parameter.device, dtype=parameter.dtype)
    if config.variant == "cholesky":
        factor = lower_triangle(config, parameter)
        return factor @ factor.T + shift(config) * identity
    return (parameter + parameter.T) / 2 + shift(config) * identity


def lower_triangle(config: Config, parameter: Tensor) -> Tensor:
    """L [d,d]."""
    import torch

    if config.impl != "vision":
        return parameter.tril()
    return parameter.tril(-1) + torch.diag(parameter.diagonal().clamp(min=config.epsilon))


def shift(config: Config) -> float:
    """What is added to the diagonal of P."""
    if config.variant == "cholesky":
        return {"vision": 1.0, "toy": 10.0, "language": 0.0}[config.impl] * config.epsilon
    return strength(config) + {"vision": 10.0, "toy": 0.0, "language": 1.0}[config.impl] * config.epsilon


def strength(config: Config) -> float:
    """lambda, the official one where none was chosen."""
    return REGULARIZATION if config.regularization is None else config.regularization
