"""The rows that bring a pruned model back: those on which it differs most from the whole one, capability by capability.

He et al. 2025, "PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery" (arXiv
2502.12594). With p and q the next-token distributions of the dense and the pruned model:

    clusters c_k   spectral clustering of a diffusion map of the rows' embeddings ("capabilities")
    CDS(c_k)       = mean over the rows of c_k of JSD(x, y),   JSD = 1/2 D(p‖m) + 1/2 D(q‖m),   m = (p + q) / 2
    n_k            = B CDS(c_k) / sum_j CDS(c_j)                   of the budget of B rows
    IES(x, y)      = JSD(x, y) / log cost(x, y),   cost = (tokens)**2,   the largest are taken within a cluster
    conflicts      a row with two concepts that are both known but never met in a chosen row is left out

The divergence of a row is the mean over its answer tokens (all tokens of a text). The model is usually trained on what
was chosen with ``distill``; ``data.sample`` draws as many rows at random.

Read beside the code (BokwaiHo/PASER, ``paser.py``), ours differs:

- rows are embedded by the *dense model itself*, as no sentence encoder can be assumed: the mean of a hidden layer over
  the question (over everything, of text). The code has all-MiniLM-L6-v2.
- k-means divides the diffusion map; ``clustering=nmf`` has the paper's factorisation of abs(V Vᵀ), V the eigenvectors,
  which needs all n**2 similarities. The paper says that the number of clusters minimises the error of that
  factorisation, which falls with every cluster more; the code takes it from the command line. Here ``clusters=None``
  looks for the largest gap in the spectrum. The code hands I - D^-1 A, which is not symmetric, to a solver for
  symmetric matrices; here it is S, with the same eigenvalues (``methods.data._capabilities``).
- the code never shows the models the answer and sums over the tokens of the instruction, so that long ones count more;
  its cost adds tokens of the instruction to *characters* of the answer.
- the code rounds n_k down and loses what is above a cluster's size. Here the budgets sum to B exactly, none is above
  its cluster's size, and what conflicts leave open goes to the other clusters, by the same rule.
- the graph is built from the most degraded cluster on (the code: in the order of the clusters' numbers), and concepts
  are split by our own list of function words. The rule is the code's, and it is blunt: of the built-in world's 2,100
  rows a third at most agree with each other, because two authors who share an attribute already conflict. With
  ``conflicts=answers`` (ours) a row is only refused if its question has been answered otherwise. Where too few rows
  agree, fewer than B are written and ``rows_missing`` says how many.

Text rows are a window each, cut at ``context_tokens``; blank ones are never chosen. Nothing is drawn: the same two
models choose the same rows. ``tokens_forwarded`` counts both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from methods.data._chosen import Choosing, rows_of, wanted
from methods.stage import AssayError, Claim, How, Model, NotFinite, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from methods.data import Example, Part
    from methods.term import Look

SEEDED = False
USES = (
    "methods.data._chosen", "methods.data._capabilities", "methods.data._concepts", "methods.checkpoint",
    "methods.architectures", "methods.term", "methods.terms", "methods.distill",
)  # fmt: skip
RESULT = "data"
NEEDS_MODEL = True
CLAIMS: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Choosing):
    """Whose capabilities are missing, and how the rows for them are found."""

    # the chain of the model before it was pruned
    dense: Model
    # how many capabilities the rows are divided into; None: as many as the largest gap in the spectrum says
    clusters: Annotated[int, Gt(0)] | None = None
    # k_means on the diffusion map; nmf: the paper's, for up to 4,096 rows
    clustering: Literal["k_means", "nmf"] = "k_means"
    # which hidden states of the dense model embed a row: 0 the embeddings, -1 those that enter the output layer
    layer: int = -1
    # what a row's divergence is divided by; log_square: log of its tokens squared (the paper's); tokens: their number;
    # sequence: nothing, every row costs the same
    cost: Literal["log_square", "tokens", "sequence"] = "log_square"
    # concepts: rows that join known concepts anew are dropped (the paper's); answers: rows whose question has another
    # answer among those chosen; keep: none
    conflicts: Literal["concepts", "answers", "keep"] = "concepts"
    # longer rows are cut (the code trains at 256; 512 is what all recovery here has)
    context_tokens: Annotated[int, Gt(1)] = 512
    # rows that go through the two models at once
    batch: Annotated[int, Gt(0), How] = 8
    # seconds between two saved states
    save_seconds: Annotated[float, Gt(0), How] = 30.0


def run(stage: Stage) -> None:
    """Write the chosen rows in the order of the data.

    Raises:
        AssayError: the rows are neither questions nor text or too few, the two models do not share a tokenizer, or
            there is no such layer.
    """
    from methods.data import write_rows

    rows = rows_of(stage)
    count = wanted(stage, rows)
    _check_tokenizers(stage)
    seen = _compared(stage, rows)
    chosen = select(rows, seen, min(count, len(seen.numbers)), stage.config)
    stage.notes |= _notes(seen, chosen) | {"rows": len(rows), "rows_missing": count - len(chosen.numbers)}
    write_rows(stage.folder / "data", [rows[number] for number in sorted(chosen.numbers)])


def _check_tokenizers(stage: Stage) -> None:
    """A divergence of distributions over two vocabularies means nothing."""
    from methods.checkpoint import load_tokenizer, tokenizer_difference

    pruned, dense = load_tokenizer(stage.parents["model"]), load_tokenizer(stage.parents["dense"])
    difference = tokenizer_difference(pruned, dense, "pruned model")
    if difference:
        raise AssayError(
            f"data.paser: the dense model's tokenizer {difference}. Name the model that was pruned as dense."
        )


# --- what the two models say ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """Of each row that has anything to predict: its number, mean divergence in nats, tokens, and embedding [n,H]."""

    numbers: Sequence[int]
    divergence: Sequence[float]
    tokens: Sequence[int]
    embeddings: Any
    forwarded: int


def _compared(stage: Stage, rows: list[dict[str, Any]]) -> Seen:
    """Both models on every row; goes on where an earlier attempt had stopped."""
    import torch

    examples = _encoded(stage, rows)
    # Rows of one length stand together, so that next to nothing is padding.
    order = sorted(examples, key=lambda number: (len(examples[number].input_ids), number))
    divergence, embeddings = _measured(stage, [examples[number] for number in order])
    places = torch.tensor(order).argsort()
    tokens = {number: len(examples[number].input_ids) for number in order}
    _check_finite(order, divergence)
    return Seen(sorted(order), divergence[places].tolist(), [tokens[number] for number in sorted(order)],
                embeddings[places].double().numpy(), 2 * sum(tokens.values()))  # fmt: skip


def _check_finite(order: Sequence[int], divergence: Tensor) -> None:
    for number in divergence.isfinite().logical_not().nonzero().flatten().tolist():
        raise NotFinite(
            f"data.paser: the divergence of row {order[number]} is no finite number: one of the two models is broken."
        )


def _encoded(stage: Stage, rows: list[dict[str, Any]]) -> dict[int, Example]:
    """The sequence of each row by its number; rows of blanks have none."""
    from methods.checkpoint import load_tokenizer
    from methods.data import Style, encode, encode_text

    folder, width = stage.parents["model"], stage.config.context_tokens
    tokenizer = load_tokenizer(folder)
    if not all("text" in row for row in rows) or all("question" in row and "answer" in row for row in rows):
        return dict(enumerate(encode(rows, tokenizer, Style.read(folder), width)))
    found = {
        number: encode_text([row], tokenizer, width)[0]
        for number, row in enumerate(rows)
        if str(row["text"]).strip()
    }
    if not found:
        raise AssayError("data.paser: all rows of data are blank.")
    return found


def _measured(stage: Stage, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Divergences [n] in float64 and embeddings [n,H] in float32, batch by batch."""
    stage.progress.save_seconds = stage.config.save_seconds
    try:
        state = stage.progress.load()
        found = [state.tensors] if state else []
        done = state.step if state else 0
        stage.notes["resumed_from_step"] = done
        pair = _Pair(stage)
        groups = range(done, len(examples), stage.config.batch)
        for group in stage.progress.bar(len(groups), "groups of rows"):
            part = examples[groups[group] : groups[group] + stage.config.batch]
            found.append(pair.compared(part))
            done += len(part)
            if stage.progress.due(done):
                found = [_joined(found)]
                stage.progress.save(done, found[0], {})
    finally:
        stage.progress.release()
    whole = _joined(found)
    return whole["divergence"], whole["embeddings"]


def _joined(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    import torch

    return {name: torch.cat([each[name] for each in found]) for name in ("divergence", "embeddings")}


class _Pair:
    """The dense and the pruned model, side by side."""

    def __init__(self, stage: Stage) -> None:
        from methods.checkpoint import Models
        from methods.data import padding_id

        models = Models()
        self.pruned, self.dense = models.load(stage.parents["model"]), models.load(stage.parents["dense"])
        self.padding = padding_id(models.tokenizer(stage.parents["model"]))
        self.layer = _layer(self.dense, stage.config.layer)

    def compared(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Mean divergence [B] and embedding [B,H] of each row, on the processor."""
        import torch

        from methods.data import collate
        from methods.term._blocks import look

        part = collate(examples, self.padding, "rows").to(self.dense.device)
        with torch.inference_mode():
            whole, cut = look(self.dense, part, hidden=True), look(self.pruned, part)
            assert whole.hidden_states is not None
            found = {
                "divergence": _divergence(part, whole, cut),
                "embeddings": _embedding(part, whole.hidden_states[self.layer]),
            }
            return {name: values.cpu() for name, values in found.items()}


def _layer(model: Any, layer: int) -> int:
    """The place among the hidden states. AssayError where there is no such layer."""
    count = int(model.config.get_text_config().num_hidden_layers)
    if not -count - 1 <= layer <= count:
        raise AssayError(
            f"data.paser: layer={layer}, but the dense model has the hidden states 0 to {count} (-1 is the last)."
        )
    return layer


def _divergence(part: Part, dense: Look, pruned: Look) -> Tensor:
    """Jensen-Shannon divergence of each row [B]: the mean over what it predicts, in nats and float64."""
    import torch

    from methods.distill._sources import places
    from methods.term._blocks import blocks
    from methods.term._divergences import jensen_shannon

    where = places(part)
    sums = torch.zeros(len(part.labels), dtype=torch.float64, device=where.index.device)
    for block in blocks(dense, len(where)):
        wanted, given = dense.at(where.index[block]), pruned.at(where.index[block])
        width = min(wanted.shape[-1], given.shape[-1])  # one may be padded further than the other
        values = jensen_shannon(wanted[:, :width].log_softmax(-1), given[:, :width].log_softmax(-1), 0.5)
        sums.index_add_(0, where.sequence[block], values.double())
    return sums / part.mask.sum(1)


def _embedding(part: Part, states: Tensor) -> Tensor:
    """The mean hidden state [B,H] over the question, of text over everything, in float32."""
    from methods.data import IGNORED

    inside = part.attention_mask.bool()
    asked = inside & (part.labels == IGNORED)
    chosen = asked.where(asked.any(1, keepdim=True), inside)[..., None]
    return (states.float() * chosen).sum(1) / chosen.sum(1)


# --- which rows -------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """One capability: the places of its rows among those seen, the worthiest first, and what came of them."""

    places: list[int]
    degradation: float
    budget: int = 0
    chosen: list[int] = field(default_factory=list)
    next: int = 0

    @property
    def left(self) -> int:
        """Rows that nobody has looked at yet."""
        return len(self.places) - self.next

    def take(self, count: int, accepts: Callable[[int], bool]) -> int:
        """Choose up to ``count`` of the next rows that are accepted; returns how many were not."""
        refused, end = 0, len(self.chosen) + count
        while len(self.chosen) < end and self.left:
            place = self.places[self.next]
            self.next += 1
            if accepts(place):
                self.chosen.append(place)
            else:
                refused += 1
        return refused


@dataclass(frozen=True)
class Chosen:
    """Numbers of the rows that were chosen, the clusters they are from, and how many rows conflicted."""

    numbers: Sequence[int]
    clusters: Sequence[Cluster]
    conflicts: int


def select(rows: Sequence[Mapping[str, Any]], seen: Seen, count: int, config: Config) -> Chosen:
    """``count`` rows, or fewer where no more agree with each other."""
    from methods.data._capabilities import capabilities
    from methods.data._concepts import memory

    labels = capabilities(seen.embeddings, config.clusters, config.clustering)
    clusters = _clusters(labels, seen, config.cost)
    for cluster, budget in zip(clusters, _allowed(clusters, count), strict=True):
        cluster.budget = budget
    remembered, conflicts = memory(config.conflicts), 0

    def accepts(place: int) -> bool:
        return remembered.accepts(rows[seen.numbers[place]])

    # What conflicts leave open is divided again. Each round chooses or refuses a row, so there are at most as many.
    for _ in range(len(seen.numbers)):
        allowed = _allowed(clusters, count - sum(len(cluster.chosen) for cluster in clusters))
        if not any(allowed):
            break
        conflicts += sum(cluster.take(each, accepts) for cluster, each in zip(clusters, allowed, strict=True))
    numbers = [seen.numbers[place] for cluster in clusters for place in cluster.chosen]
    return Chosen(numbers, clusters, conflicts)


def _allowed(clusters: Sequence[Cluster], missing: int) -> list[int]:
    """The budgets of the rows that are missing, as far as there are rows that nobody has looked at."""
    left = [cluster.left for cluster in clusters]
    return budgets([cluster.degradation for cluster in clusters], left, min(missing, sum(left)))


def _clusters(labels: Sequence[int], seen: Seen, cost: str) -> list[Cluster]:
    """The most degraded cluster first; in each the rows with the largest divergence per cost."""
    scores = [value / _cost(cost, tokens) for value, tokens in zip(seen.divergence, seen.tokens, strict=True)]
    found = []
    for label in sorted(set(labels)):
        places = [place for place, own in enumerate(labels) if own == label]
        mean = math.fsum(seen.divergence[place] for place in places) / len(places)
        found.append(Cluster(sorted(places, key=lambda place: (-scores[place], place)), mean))
    return sorted(found, key=lambda cluster: -cluster.degradation)


def _cost(kind: str, tokens: int) -> float:
    """What a row of so many tokens costs to train on; two tokens at least."""
    return {"log_square": math.log(max(tokens, 2) ** 2), "tokens": float(tokens), "sequence": 1.0}[kind]


def budgets(degradation: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """``total`` rows in proportion to the degradation, none above its cluster's size.

    What a full cluster cannot take goes to the others in the same proportion; broken numbers are rounded to the sum by
    largest remainders. Where nothing is degraded, sizes stand for it.
    """
    if total > sum(sizes):
        raise AssayError(f"data.paser: {total} rows were asked of clusters that have {sum(sizes)}.")
    found, left = [0] * len(sizes), total
    free = [place for place, size in enumerate(sizes) if size]
    while free:
        weights = [degradation[place] for place in free]
        weights = weights if sum(weights) > 0 else [float(sizes[place]) for place in free]
        shares = {place: left * weight / sum(weights) for place, weight in zip(free, weights, strict=True)}
        full = [place for place in free if shares[place] >= sizes[place]]
        for place in full:
            found[place] = sizes[place]
        left -= sum(sizes[place] for place in full)
        free = [place for place in free if place not in full]
        if not full:
            return _rounded(found, shares, left)
    return found


def _rounded(found: list[int], shares: Mapping[int, float], total: int) -> list[int]:
    """Broken shares as whole numbers of the same sum: the largest remainders are rounded up."""
    for place, share in shares.items():
        found[place] = math.floor(share)
    missing = total - sum(found[place] for place in shares)
    for place in sorted(shares, key=lambda place: (found[place] - shares[place], place))[:missing]:
        found[place] += 1
    return found


def _notes(seen: Seen, chosen: Chosen) -> dict[str, Any]:
    """What the record says of the selection; divergences in nats per token."""
    taken = [place for cluster in chosen.clusters for place in cluster.chosen]
    return {
        "rows_chosen": len(taken),
        "conflicts": chosen.conflicts,
        "divergence_of_all": math.fsum(seen.divergence) / len(seen.divergence),
        "divergence_of_chosen": math.fsum(seen.divergence[place] for place in taken) / len(taken),
        "tokens_forwarded": seen.forwarded,
        "clusters": [
            {"rows": len(cluster.places), "degradation": cluster.degradation, "budget": cluster.budget,
             "chosen": len(cluster.chosen)}
            for cluster in chosen.clusters
        ],
    }  # fmt: skip
