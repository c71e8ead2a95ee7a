"""What unlearning benchmarks compute from likelihoods and texts: TOFU's and open-unlearning's metrics.

Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs" (2024), and the open-unlearning benchmark. The two
differ in the truth ratio: the paper and TOFU's model utility average the *probabilities* of the perturbed answers
(``definition="tofu"``), open-unlearning averages their losses, a geometric mean (``"open_unlearning"``), and adds
1e-10 to denominators. Everything is a pure function on float64 arrays: ``N`` rows, ``K`` perturbed answers.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy import ndarray

REVISION = 1
EPSILON = 1e-10
Definition = Literal["open_unlearning", "tofu"]


# --- likelihoods of right and wrong answers --------------------------------------------------------------------


def truth_ratio(right: ndarray, wrong: ndarray, definition: Definition = "open_unlearning") -> ndarray:
    """R = W / C for each row [N]: C the probability of the right answer, W that of the wrong ones.

    Args:
        right: mean token loss of the paraphrased (or only) right answer [N], in nats.
        wrong: mean token loss of each perturbed answer [N,K].
    """
    import numpy as np

    if definition == "tofu":
        return np.exp(-wrong).mean(-1) / np.exp(-right)
    return np.exp(-wrong.mean(-1)) / (np.exp(-right) + EPSILON)


def closer_to_1_better(ratios: ndarray, definition: Definition = "open_unlearning") -> ndarray:
    """min(R, 1/R) [N]: 1 where right and wrong answers are equally likely. For the forget set."""
    import numpy as np

    return np.minimum(ratios, 1.0 / (ratios + (EPSILON if definition == "open_unlearning" else 0.0)))


def true_better(ratios: ndarray) -> ndarray:
    """max(0, 1 - R) [N]: 1 where the wrong answers are impossible. For everything that should be kept."""
    import numpy as np

    return np.maximum(0.0, 1.0 - ratios)


def right_share(right: ndarray, wrong: ndarray) -> ndarray:
    """C / (C + W) [N] with the geometric W: open-unlearning's ``prob_mean`` form of the truth ratio."""
    import numpy as np

    c, w = np.exp(-right), np.exp(-wrong.mean(-1))
    return c / (c + w + EPSILON)


def option_probability(right: ndarray, wrong: ndarray, definition: Definition = "open_unlearning") -> ndarray:
    """P(right) / (P(right) + sum of P(wrong)) [N]: the probability among the given options."""
    import numpy as np

    p = np.exp(-right)
    return p / (p + np.exp(-wrong).sum(-1) + (EPSILON if definition == "open_unlearning" else 0.0))


def forget_quality(ratios: ndarray, retained_ratios: ndarray) -> tuple[float, float]:
    """(p-value, statistic) of the two-sided two-sample Kolmogorov-Smirnov test between two models' truth ratios.

    The second model never saw the forget set; a p-value of 1 is best. The definition of R matters only through
    ties, because the test is blind to monotone maps.
    """
    from scipy.stats import ks_2samp

    result = ks_2samp(ratios, retained_ratios)
    return float(result.pvalue), float(result.statistic)


# --- single answers --------------------------------------------------------------------------------------------


def extraction_strength(correct: ndarray) -> float:
    """1 - k/n, k the first token from which on every teacher-forced argmax is right; the last token is left out.

    Where nothing at the end is right, k stops at n - 1 (as in open-unlearning), so the floor is 1/n. An answer
    of one token has nothing left and counts as 0.
    """
    import numpy as np

    kept = correct[:-1]
    if not len(kept):
        return 0.0
    wrong = np.flatnonzero(~kept)
    first = min(int(wrong[-1]) + 1, len(kept) - 1) if len(wrong) else 0
    return 1.0 - first / len(kept)


def exact_memorization(correct: ndarray) -> float:
    """Share of tokens whose teacher-forced argmax is right, the last token (the end mark) left out.

    Summed in float32, as the official code does. An answer of one token has nothing left: NaN.
    """
    import numpy as np

    kept = correct[:-1].astype(np.float32)
    return float(kept.mean(dtype=np.float32)) if len(kept) else float("nan")


def min_k(losses: ndarray, share: float = 0.4, least: int = 1) -> float:
    """Mean loss of the ``share`` least likely tokens (at least ``least``), the last token left out: the Min-K score.

    High means "not a member of the training data". NaN where nothing is left: an answer of one token, or fewer
    tokens than make one of the share where none at all will do (``least=0``, as in MUSE's own code).
    """
    import numpy as np

    kept = losses[:-1]
    count = max(least, int(len(kept) * share))
    if not len(kept) or not count:
        return float("nan")
    return float(np.sort(kept)[::-1][:count].mean())


def area_under_curve(members: ndarray, others: ndarray) -> float:
    """Probability that an unseen row scores above a member, ties counting half: the ROC area."""
    import numpy as np
    from scipy.stats import rankdata

    members, others = members[~np.isnan(members)], others[~np.isnan(others)]
    ranks = rankdata(np.concatenate([members, others]))[len(members) :]
    n, m = len(others), len(members)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def privacy_leak(area: float, retained_area: float = 0.5) -> float:
    """((1 - AUC) - (1 - AUC_retained)) / (1 - AUC_retained) in percent: below 0 still a member, above 0 overdone."""
    return ((1.0 - area) - (1.0 - retained_area)) / (1.0 - retained_area + EPSILON) * 100.0


# --- texts -----------------------------------------------------------------------------------------------------


def rouge(truth: str, text: str, kind: str = "rougeL", stem: bool = True) -> tuple[float, float]:
    """(recall, F1) of ``text`` against ``truth``, each 0 to 1; ``kind`` is ``rougeL`` or ``rouge1``."""
    score = _scorer(kind, stem).score(truth, text)[kind]
    return float(score.recall), float(score.fmeasure)


@cache
def _scorer(kind: str, stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=stem)
