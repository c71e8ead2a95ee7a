"""Functions that the task files in ``evaluations/tasks/`` name: the world's rows, and scores of a free answer.

Because the files name them, the tasks also run under lm-eval's own command::

    lm_eval run --model hf --model_args pretrained=MODEL --include_path evaluations/tasks --tasks authors_forget
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REVISION = 1


def dataset(split: str, **_: Any) -> dict[str, Any]:
    """The rows of one split of the built-in world, as lm-eval's test split. Called with a task's metadata."""
    from datasets import Dataset

    from methods import world

    return {"test": Dataset.from_list(world.rows(split))}


def match(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match (outer blanks aside) and ROUGE-L recall of one generated answer."""
    from evaluations._unlearning import rouge

    text = results[0].strip()
    return {"exact_match": float(text == doc["answer"]), "rougeL_recall": rouge(doc["answer"], text)[0]}
