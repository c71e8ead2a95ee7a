"""A model whose scores are kept while a loss runs it, for terms that are added to any loss on scores.

``methods.train``'s REVISION covers this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from methods.stage import AssayError, Component

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Cases, Part


class Recording:
    """Stands for ``model`` in one call of a loss; the loss sees its scores divided by ``divisor``."""

    def __init__(self, model: Any, divisor: float = 1.0) -> None:
        self.model, self.divisor = model, divisor
        self.logits: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        answer = self.model(**inputs)
        self.logits = answer.logits
        if self.divisor != 1.0:
            answer.logits = answer.logits / self.divisor
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def scores(self, part: Part | Cases) -> Tensor:
        """The scores [N,V] of what has a target in ``part``, as ``methods.terms.scored`` would give them."""
        from methods.terms import is_cases, widen

        assert self.logits is not None  # every loss that ``refuse_hidden`` lets through has run the model
        return widen(self.logits if is_cases(part) else self.logits[:, :-1][part.mask])


def refuse_hidden(method: str, chosen: Component | None) -> None:
    """AssayError for a loss that applies the output layer itself: there are no scores to add a term on."""
    from methods.loop import component

    if chosen is not None and hasattr(component("loss", chosen)[0], "hidden_losses"):
        raise AssayError(
            f"{method} needs the scores of all classes at once, which loss={chosen.name}() never has: "
            f"take another loss, such as cross_entropy()."
        )
