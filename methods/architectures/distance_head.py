"""The output layer that a head of ``methods/head`` becomes: scores of hidden states, with the head's own parameters.

Its configuration is an ``assay_head`` entry, ``{"name": "euclidean", "options": {...}}``, with every option resolved,
so that a model means the same after a default has changed. The class vectors are ``weight`` [V,d]; further parameters
of a head stand beside them under the names the head gives them, constants among them as buffers.

What a head's module may define, beside ``Config`` and ``scores``:

    parameters(config, weight [V,d])           further parameters at the start; integer tensors are constants
    rows(config, classes)                      rows of the weight matrix, where it is not one for each class
    adopted(config, vectors [V,d])             weight and parameters that continue another head's class vectors
    class_vectors(config, weight, **further)   one vector for each class [V,d], where they are not the weight
    block(config, hidden, weight, classes, **further)
                                               scores of a slice of the classes, where that is no slice of the weight
    token_losses(config, hidden, weight, targets, **further, softcap)
                                               cross-entropy and log Z, where there is a way past the scores
    separable(config), ceiling(config, width, classes)
                                               as in ``methods.head``
    usual(config, classes)                     the best probability among orthogonal classes, for similarities
    loss_floor(config, weight, **further)      the least loss, where it depends on more than the options
    NOISE = True                               ``scores`` takes ``training=`` and draws from torch's generator
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from methods import head as heads
from methods.find import catalogue
from methods.stage import AssayError, Component


class DistanceHead(nn.Linear):
    """Scores [..., V] of hidden states [..., d], in float32 or wider whatever the autocast.

    A subclass of ``nn.Linear`` without its product, so that initialisation, tying and resizing of output
    embeddings treat it as the output layer that it is.
    """

    def __init__(self, hidden: int, classes: int, head: Mapping[str, Any]) -> None:
        module, options = read(head)
        super().__init__(hidden, rows(module, options, classes), bias=False)
        self.head, self.options, self.classes = dict(head), options, classes
        # Functions and not their module: models are copied, and a module cannot be.
        self.scores, self.noise = module.scores, bool(getattr(module, "NOISE", False))
        self.separable = separable(module, options)
        self.slice_scores = getattr(module, "block", None)
        self.vectors = getattr(module, "class_vectors", None)
        self.direct_losses = getattr(module, "token_losses", None)
        self.known_floor = getattr(module, "loss_floor", None)
        self.further_names = _register(self, _parameters(module, options, self._example()))

    def _example(self) -> Tensor:
        """Class vectors [V,d] of the right device and type; heads read no values from them."""
        weight = self.weight.detach()
        return weight if len(weight) == self.classes else weight.new_zeros(self.classes, self.in_features)

    def further(self) -> dict[str, Tensor]:
        """The parameters and constants beside the weight."""
        return {name: getattr(self, name) for name in self.further_names}

    def forward(self, hidden: Tensor) -> Tensor:
        noise = {"training": self.training} if self.noise else {}
        flat = hidden.flatten(0, -2)
        scores: Tensor = self.scores(self.options, flat, self.weight, **noise, **self.further())
        return scores.reshape(*hidden.shape[:-1], scores.shape[-1])

    def block(self, hidden: Tensor, classes: slice) -> Tensor:
        """Scores [N,v] of a slice of the classes alone, for hidden states [N,d].

        Raises an AssayError where the score of a class depends on the others.
        """
        if not self.separable or self.noise:
            raise AssayError(
                f"head {self.head['name']}: with these options the score of a class depends on the other classes, "
                "so a loss cannot go through the vocabulary in slices: take loss=cross_entropy, or leave out the "
                "head's smoothing, floor, legacy_sign, noise and division by the row's smallest distance."
            )
        further = self.further()
        if self.slice_scores is not None:
            result: Tensor = self.slice_scores(self.options, hidden, self.weight, classes, **further)
        else:
            result = self.scores(self.options, hidden, self.weight[classes], **further)
        return result

    def class_vectors(self) -> Tensor:
        """One vector for each class [V,d]."""
        if self.vectors is None:
            return self.weight
        vectors: Tensor = self.vectors(self.options, self.weight, **self.further())
        return vectors

    def token_losses(
        self, hidden: Tensor, targets: Tensor, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and log Z [N] of hidden states [N,d], of a head that has its own way to them."""
        if self.direct_losses is None:
            raise AssayError(f"head {self.head['name']} has no way to its losses but through the scores.")
        found: tuple[Tensor, Tensor] = self.direct_losses(
            self.options, hidden, self.weight, targets, **self.further(), softcap=softcap
        )
        return found

    def loss_floor(self) -> float:
        """The least mean loss in nats that this head can reach, as it stands."""
        if self.known_floor is not None:
            return float(self.known_floor(self.options, self.weight, **self.further()))
        return loss_floor(Component(self.head["name"], self.head["options"]), self.in_features, self.classes)

    def extra_repr(self) -> str:
        return f"{self.head['name']}, in_features={self.in_features}, classes={self.classes}"


def _register(layer: nn.Module, further: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Make tensors parameters of the layer, and those of whole numbers buffers."""
    for name, value in further.items():
        if value.is_floating_point():
            layer.register_parameter(name, nn.Parameter(value.detach().clone()))
        else:
            layer.register_buffer(name, value)
    return tuple(further)


def _parameters(module: Any, options: Any, weight: Tensor) -> dict[str, Tensor]:
    """The head's further parameters at the start; none for most heads."""
    return dict(module.parameters(options, weight)) if hasattr(module, "parameters") else {}


def rows(module: Any, options: Any, classes: int) -> int:
    """Rows of the head's weight matrix."""
    return int(module.rows(options, classes)) if hasattr(module, "rows") else classes


def separable(module: Any, options: Any) -> bool:
    """Whether the score of a class depends on the hidden state and that class alone."""
    if hasattr(module, "separable"):
        return bool(module.separable(options))
    return isinstance(options, heads.Harmonic) and heads.separable(options)


def adopted(head: Mapping[str, Any], vectors: Tensor) -> dict[str, Tensor]:
    """The new head's weight and further parameters, continuing these class vectors [V,d]."""
    module, options = read(head)
    if hasattr(module, "adopted"):
        return dict(module.adopted(options, vectors))
    return {"weight": vectors} | _parameters(module, options, vectors)


# --- the best a head can do -----------------------------------------------------------------------------------


def loss_floor(component: Component, width: int, classes: int) -> float:
    """The least mean loss in nats that the head can reach at this size: ``-log`` of its confidence ceiling."""
    module, options = build(component.name, component.options)
    if hasattr(module, "ceiling"):
        ceiling = float(module.ceiling(options, width, classes))
    else:
        ceiling = heads.ceiling(options, width, classes) if isinstance(options, heads.Harmonic) else 1.0
    return max(0.0, -math.log(ceiling))


def usual_loss(component: Component, classes: int) -> float:
    """The loss in nats of a similarity where every wrong class is orthogonal to the hidden state; 0 for other heads."""
    module, options = build(component.name, component.options)
    return -math.log(module.usual(options, classes)) if hasattr(module, "usual") else 0.0


def loss_at(component: Component, width: int, classes: int, ratio: float) -> float:
    """The loss in nats where every wrong class is ``ratio`` times as far away as the right one.

    0 for a head that is no ratio of distances: there ``loss_floor`` says all there is to say.
    """
    _, options = build(component.name, component.options)
    if not isinstance(options, heads.Harmonic):
        return 0.0
    exponent = 2 * heads.power(options, width)
    return math.log1p((classes - 1) * ratio**-exponent)


# --- configuration --------------------------------------------------------------------------------------------


def configure(component: Component) -> dict[str, Any]:
    """The ``assay_head`` entry for a component: its name and all of its options."""
    settings = build(component.name, component.options)[1]
    return {"name": component.name, "options": dataclasses.asdict(settings)}


def read(head: Mapping[str, Any]) -> tuple[Any, Any]:
    """The head's module and its typed options, from an ``assay_head`` entry."""
    if "name" not in head:
        raise AssayError(
            f"assay_head needs the name of a head; it holds only: {', '.join(head) or 'nothing'}."
        )
    return build(head["name"], head.get("options", {}))


def build(name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Module and checked options of the head called ``name``; a wrong option is a sentence."""
    from pydantic import TypeAdapter, ValidationError

    module = catalogue().component("head", name).load()
    known = [field.name for field in dataclasses.fields(module.Config)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise AssayError(f"head {name} has no option {unknown[0]!r}; it has: {', '.join(known)}.")
    try:
        return module, TypeAdapter(module.Config).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise AssayError(f"head {name}: option {place}: {first['msg']}.") from error
