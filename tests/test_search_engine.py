"""The search engine: fitness by hand, runs in parts, swaps, order and reuse, stages of selection, whole searches."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import methods.search as family
from methods.architectures import with_head
from methods.checkpoint import load_model
from methods.data import Example, Locator, Style, train_tokenizer
from methods.levels._database import Database, Writer
from methods.levels._encodings import encode_columns, encode_sparse
from methods.progress import Progress
from methods.search import _candidates, _fitness, evopress, tyr
from methods.search._candidates import Batch, Removals, Scorer, Swaps, order
from methods.search._evolution import Evolution, Settings
from methods.search._fitness import Sequences, Targets, draw, finished, fitness, groups
from methods.search._runner import Runner
from methods.search._spaces import Shift
from methods.stage import AssayError, Component, NotFinite, Parent, Stage

DATA, HELD_OUT = "authors/forget10", "authors/retain90[0:40]"
SMALL: dict[str, Any] = {
    "data": DATA,
    "levels": Parent("levels"),
    "generations": 4,
    "children": 8,
    "survivors": (4, 1),
    "tokens": (100, 300),
    "calibration_tokens": 800,
    "context_tokens": 64,
    "holdout_tokens": 200,
    "score_every": 2,
}


def tiny(layers: int = 3, **settings: Any) -> Any:
    """A Llama with random weights large enough that its levels differ, two query heads to a key-value head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        **settings,
    )
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model


@cache
def tokenizer() -> Any:
    return train_tokenizer(Locator(), [DATA], 300)


def saved(model: Any, folder: Path) -> Path:
    """The model as a parent's folder."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    Style().write(folder)
    return folder


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in a folder."""
    return saved(tiny(), tmp_path_factory.mktemp("searched") / "model")


def sparsity_levels(model: Any, folder: Path, steps: int = 3, step: int = 64) -> Path:
    """Seven levels of every linear layer around one half, by magnitude."""
    writer = Writer(folder, "sparsity")
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and "layers" in name:
            weight = part.weight.detach()
            zeros = {str(level): weight.numel() // 2 + level * step for level in range(-steps, steps + 1)}
            levels = {level: encode_sparse(smallest_zeroed(weight, count)) for level, count in zeros.items()}
            shares = {level: count / weight.numel() for level, count in zeros.items()}
            writer.write(name, int(name.split(".")[2]), "weights", levels, zeros, shares)
    writer.close(model, {"method": "levels.test"})
    return folder


def smallest_zeroed(weight: torch.Tensor, count: int) -> torch.Tensor:
    found = weight.clone()
    found.view(-1)[weight.abs().flatten().argsort()[:count]] = 0.0
    return found


def structure_levels(model: Any, folder: Path) -> Path:
    """Heads and neurons by magnitude around one half: two budgets."""
    writer = Writer(folder, "structure")
    for index, layer in enumerate(model.model.layers):
        for name, part, groups_, step in (
            ("self_attn.o_proj", layer.self_attn.o_proj, 4, 1),
            ("mlp.down_proj", layer.mlp.down_proj, 48, 8),
        ):
            weight = part.weight.detach()
            energy = weight.unflatten(1, (groups_, -1)).square().sum((0, 2)).argsort()
            removed = {str(level): groups_ // 2 + level * step for level in (-2, -1, 0, 1, 2)}
            levels = {}
            for level, count in removed.items():
                cut = weight.clone().unflatten(1, (groups_, -1))
                cut[:, energy[:count]] = 0.0
                levels[level] = encode_columns(cut.flatten(1))
            budget = "heads" if groups_ == 4 else "neurons"
            shares = {level: count / groups_ for level, count in removed.items()}
            writer.write(f"model.layers.{index}.{name}", index, budget, levels, removed, shares)
    writer.close(model, {"method": "levels.test"})
    return folder


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparsity_levels(tiny(), tmp_path_factory.mktemp("levels") / "files")


@pytest.fixture(scope="module")
def structure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return structure_levels(tiny(), tmp_path_factory.mktemp("structure") / "files")


def staged(folder: Path, parent: Path, levels: Path | None, config: Any, seed: int = 0) -> Stage:
    """A stage of a search in a new folder."""
    place = folder / f"stage-{len(list(folder.glob('stage-*')))}"
    place.mkdir(parents=True)
    parents = {"model": parent} | ({"levels": levels} if levels is not None else {})
    progress = Progress(folder / "scratch", seed)
    return Stage("search.test-0", "search.test", config, seed, parents, place, progress, Locator())


def searched(
    folder: Path, parent: Path, levels: Path, method: Any = evopress, seed: int = 0, **options: Any
) -> Stage:
    """Run a search with the small options and these."""
    stage = staged(folder, parent, levels, method.Config(**SMALL | options), seed)
    family.run(stage, method)
    return stage


def assignment(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage.folder / "files" / "assignment.json").read_text())
    return found


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def curve(stage: Stage, term: str) -> dict[int, float]:
    rows = table(stage.folder / "curve.csv")
    return {int(row["step"]): float(row["value"]) for row in rows if row["term"] == term}


# --- fitness by hand ----------------------------------------------------------------------------------------------


def logits(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_kl_is_the_divergence_from_the_dense_model_without_the_last_position() -> None:
    dense, ours = logits([0.75, 0.25], [0.9, 0.1]), logits([0.5, 0.5], [0.1, 0.9])
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert fitness("kl", [ours], [dense], [torch.tensor([0, 1])]) == pytest.approx(by_hand, rel=1e-6)


def test_sequences_are_averaged_by_their_positions() -> None:
    equal, far = logits(*[[0.5, 0.5]] * 4), logits(*[[0.75, 0.25]] * 2)
    found = fitness("kl", [equal, equal[:2]], [equal, far], [torch.arange(4), torch.arange(2)])
    # Three positions without a difference and one with 0.75 ln(1.5) + 0.25 ln(0.5).
    assert found == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 4, rel=1e-6)


def test_sparse_kl_renormalises_both_sides_over_the_words_that_are_kept() -> None:
    dense, ours = logits([0.6, 0.3, 0.1], [1.0, 1.0, 1.0]), logits([0.2, 0.2, 0.6], [1.0, 1.0, 1.0])
    by_hand = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    tokens = [torch.tensor([0, 1])]
    assert fitness("sparse_kl", [ours], [dense], tokens, top_k=2) == pytest.approx(by_hand, rel=1e-6)


def test_sparse_kl_of_all_words_is_kl() -> None:
    torch.manual_seed(0)
    dense, ours, tokens = torch.randn(5, 7), torch.randn(5, 7), torch.arange(5)
    whole = fitness("kl", [ours], [dense], [tokens])
    assert fitness("sparse_kl", [ours], [dense], [tokens], top_k=7) == pytest.approx(whole, rel=1e-6)
    assert fitness("sparse_kl", [ours], [dense], [tokens], top_k=100) == pytest.approx(whole, rel=1e-6)


def test_ppl_is_the_exponential_of_the_mean_cross_entropy() -> None:
    ours = logits([0.5, 0.5], [0.25, 0.75], [0.5, 0.5])
    by_hand = math.exp(-(math.log(0.5) + math.log(0.25)) / 2)
    assert fitness("ppl", [ours], [ours], [torch.tensor([0, 1, 0])]) == pytest.approx(by_hand, rel=1e-6)


def test_the_error_of_hidden_states_is_relative_to_the_dense_ones() -> None:
    dense, ours = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert float(_fitness.hidden_error(ours, dense)) == 4.0


@pytest.mark.parametrize("kind", ["kl", "sparse_kl", "ppl"])
def test_a_sequence_of_one_token_counts_nothing(kind: str) -> None:
    torch.manual_seed(0)
    ours, dense, one = torch.randn(4, 6), torch.randn(4, 6), torch.randn(1, 6)
    tokens = torch.arange(4)
    alone = fitness(kind, [ours], [dense], [tokens], 3)
    assert fitness(kind, [one, ours], [one, dense], [tokens[:1], tokens], 3) == alone
    with pytest.raises(AssayError, match="none of the sequences of a batch predicts anything"):
        fitness(kind, [one], [one], [tokens[:1]], 3)


def test_what_is_no_number_is_infinitely_bad() -> None:
    assert finished("kl", math.nan, 3) == finished("ppl", math.nan, 3) == math.inf
    assert finished("ppl", 1e9, 2) < math.inf
    assert sorted([finished("kl", math.nan, 1), 0.3, 0.1]) == [0.1, 0.3, math.inf]


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_a_batch_has_exactly_its_tokens_and_no_sequence_twice() -> None:
    lengths = [7, 3, 9, 5, 4]
    for seed in range(20):
        pieces = draw(Random(seed), lengths, 17)
        assert sum(piece.length for piece in pieces) == 17
        assert len({piece.sequence for piece in pieces}) == len(pieces)
        assert all(piece.length == lengths[piece.sequence] for piece in pieces[:-1])
    assert len({draw(Random(seed), lengths, 17)[0].sequence for seed in range(20)}) == 5


def test_more_tokens_than_there_are_is_a_sentence() -> None:
    with pytest.raises(AssayError, match="a stage wants 29 tokens, and the calibration data has 28"):
        draw(Random(0), [7, 3, 9, 5, 4], 29)


def test_pieces_of_like_lengths_are_padded_together() -> None:
    pieces = [_fitness.Piece(index, length) for index, length in enumerate([9, 2, 5, 4, 40])]
    assert [[piece.length for piece in group] for group in groups(pieces, 12)] == [[2, 4], [5], [9], [40]]


def test_only_answers_count_where_that_is_asked_for() -> None:
    example = Example((5, 6, 7, 8), (-100, -100, 7, 8))
    assert Sequences([example], answers=False).places == [[0, 1, 2]]
    chosen = Sequences([example], answers=True)
    assert chosen.places == [[1, 2]]
    assert chosen.counted(_fitness.Piece(0, 3)) == 1


# --- running in parts ---------------------------------------------------------------------------------------------


def sequences(*lengths: int, seed: int = 0) -> Sequences:
    """Random token sequences of these lengths."""
    draw_ = Random(seed)
    tokens = [tuple(int(draw_.random() * 300) for _ in range(length)) for length in lengths]
    return Sequences([Example(ids, ids) for ids in tokens], answers=False)


def run_whole(runner: Runner, ids: torch.Tensor) -> torch.Tensor:
    prepared = runner.prepare(ids)
    hidden = prepared.hidden
    for index in range(len(runner.sites)):
        hidden = runner.step(index, hidden, prepared.settings)
    return hidden


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_halves_give_the_models_own_hidden_states_bit_for_bit(attention: str) -> None:
    model = tiny(attn_implementation=attention)
    runner, ids = Runner(model), torch.arange(40).view(2, 20)
    assert [site.name for site in runner.sites[:3]] == [
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
        "model.layers.1.self_attn",
    ]
    with torch.inference_mode():
        own = model.model(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(runner.norm(run_whole(runner, ids)), own)


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    runner = Runner(tiny())
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        alone = run_whole(runner, ids)
        filled = run_whole(runner, torch.cat([ids, torch.full((1, 9), 7)], dim=1))
    assert torch.allclose(filled[:, :12], alone, atol=1e-5)


def test_another_output_head_is_run_too() -> None:
    model = with_head(tiny(tie_word_embeddings=True), Component("euclidean", {"exponent": 4.0}))
    runner, ids = Runner(model), torch.arange(10)[None]
    with torch.inference_mode():
        own = model(input_ids=ids).logits[0]
        assert torch.allclose(runner.logits(run_whole(runner, ids)[0]), own, atol=1e-4)


def test_a_model_that_is_not_like_llama_is_a_sentence() -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(AssayError, match="Llama-like decoder"):
        Runner(model)
    other = tiny()
    other.model.norm = None
    with pytest.raises(AssayError, match="looks for the modules layers and norm"):
        Runner(other)


def test_a_model_that_scales_its_logits_is_a_sentence() -> None:
    model = tiny()
    head = model.lm_head.forward
    model.forward = lambda **inputs: SimpleNamespace(
        logits=3
        * head(LlamaForCausalLM.forward(model, **inputs, output_hidden_states=True).hidden_states[-1])
    )
    with pytest.raises(AssayError, match="does more than its blocks, final norm and output layer"):
        Runner(model)


# --- swaps and removals -------------------------------------------------------------------------------------------


@pytest.fixture
def parts(levels: Path) -> SimpleNamespace:
    """A dense model, its levels, a space and a scorer over ragged sequences."""
    model = tiny()
    database, runner = Database.open(levels, model), Runner(model)
    data = sequences(30, 25, 1, 18, 33, 27, 12)
    targets = Targets(runner, data, "kl", 64)
    scorer = Scorer(runner, Swaps(model, database, runner), targets, data)
    return SimpleNamespace(
        model=model,
        database=database,
        runner=runner,
        data=data,
        scorer=scorer,
        space=Shift.of(database),
    )


def children(space: Any, count: int, seed: int = 0) -> list[dict[str, str]]:
    draw_, start = Random(seed), next(space.initial(Random(0)))
    found: dict[Any, None] = {}
    while len(found) < count:
        found[space.mutate(start, draw_)] = None
    return [space.assignment(child) for child in found]


def test_only_layers_whose_level_changes_are_overwritten(parts: SimpleNamespace) -> None:
    carrier, uniform = parts.scorer.carrier, parts.database.uniform()
    weights = {name: parts.model.get_parameter(f"{name}.weight") for name in uniform}
    places = {name: weight.data_ptr() for name, weight in weights.items()}
    assert carrier.load(carrier.levels(uniform)) == 21
    changed = uniform | {"model.layers.1.mlp.up_proj": "2", "model.layers.2.self_attn.q_proj": "-1"}
    assert carrier.load(carrier.levels(changed)) == 2
    assert carrier.load(carrier.levels(changed)) == 0
    for name, weight in weights.items():
        assert torch.equal(weight, parts.database.weight(name, changed[name]))
        assert weight.data_ptr() == places[name]
    assert int((weights["model.layers.1.mlp.up_proj"] == 0).sum()) == 32 * 48 // 2 + 2 * 64


def test_the_units_of_a_database_are_ordered_as_they_run(parts: SimpleNamespace) -> None:
    carrier = parts.scorer.carrier
    assert list(carrier.sites) == sorted(carrier.sites)
    assert carrier.names[:4] == tuple(f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo")


def test_a_removed_sub_block_is_not_run_and_gives_what_zeros_would() -> None:
    model = tiny()
    runner, data = Runner(model), sequences(20, 15)
    removals = Removals(runner)
    scorer = Scorer(runner, removals, Targets(runner, data, "kl", 64), data)
    kept = dict.fromkeys((site.name for site in runner.sites), "kept")
    removed = kept | {"model.layers.1.self_attn": "removed", "model.layers.2.mlp": "removed"}
    calls: list[str] = []
    for name, module in (("a", model.model.layers[1].self_attn), ("b", model.model.layers[2].mlp)):
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    batch = Batch.of(runner, scorer.targets, data)
    calls.clear()
    score = scorer.score([removed], batch)[0]
    assert calls == []
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[2].mlp.down_proj.weight.zero_()
    assert scorer.score([kept], batch)[0] == score
    assert calls == ["a", "b"]


def test_a_unit_outside_the_blocks_is_a_sentence(parts: SimpleNamespace) -> None:
    with pytest.raises(AssayError, match="lm_head lies in no block"):
        parts.runner.site_of("lm_head")


# --- order and reuse ----------------------------------------------------------------------------------------------


def test_the_next_candidate_shares_the_longest_beginning_then_has_the_fewest_changes() -> None:
    loaded = ("0", "0", "0", "0")
    candidates = [
        ("0", "1", "0", "0"),  # differs in site 0, in one layer of it
        ("0", "0", "1", "1"),  # shares the first site with what is loaded
        ("1", "1", "1", "1"),
        ("0", "0", "1", "0"),  # and so does this, with fewer changes
    ]
    sites = (0, 0, 1, 2)
    assert order(candidates, loaded, sites, reuse=True) == [3, 1, 2, 0]
    assert order(candidates, loaded, sites, reuse=False) == [0, 3, 1, 2]


def test_every_shared_beginning_is_run_once(parts: SimpleNamespace) -> None:
    candidates = children(parts.space, 24)
    scorer, count = parts.scorer, len(parts.runner.sites)
    levels = [scorer.carrier.levels(each) for each in candidates]
    scorer.score(candidates, Batch.of(parts.runner, scorer.targets, parts.data))
    ends = [sum(site <= at for site in scorer.carrier.sites) for at in range(count)]
    beginnings = {each[:end] for each in levels for end in ends}
    assert scorer.counts.run == len(beginnings)
    assert scorer.counts.run + scorer.counts.reused == 24 * count
    assert scorer.counts.reused > 0


@pytest.mark.parametrize("kind", ["kl", "sparse_kl", "ppl", "hidden"])
def test_reuse_gives_the_same_fitness_bit_for_bit(parts: SimpleNamespace, kind: str) -> None:
    targets = Targets(parts.runner, parts.data, kind, 64)
    scorer = Scorer(parts.runner, parts.scorer.carrier, targets, parts.data)
    candidates = children(parts.space, 16)
    batch = scorer.batch(Random(3), 90)
    with_states = scorer.score(candidates, batch)
    assert scorer.counts.reused > 0
    again = scorer.score(candidates, batch, reuse=False)
    one_by_one = [scorer.score([candidate], batch)[0] for candidate in candidates]
    assert with_states == again == one_by_one
    assert len(set(with_states)) == 16


def test_reuse_in_bfloat16_is_exact_too(levels: Path) -> None:
    model = tiny()
    database = Database.open(levels, model)
    runner, data = Runner(model.bfloat16()), sequences(30, 25, 18)
    targets = Targets(runner, data, "kl", 64)
    assert targets.log is not None and targets.log.dtype == torch.float32
    scorer = Scorer(runner, Swaps(model, database, runner), targets, data)
    batch, candidates = scorer.batch(Random(0), 60), children(Shift.of(database), 8)
    assert scorer.score(candidates, batch) == scorer.score(candidates, batch, reuse=False)


def test_hidden_states_that_would_take_too_much_memory_are_not_kept(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates, batch = children(parts.space, 6), parts.scorer.batch(Random(0), 80)
    kept = parts.scorer.score(candidates, batch)
    parts.scorer.kept_bytes = 1000
    before = parts.scorer.counts.reused
    monkeypatch.setattr(_candidates, "MOST_READY_BYTES", 0)
    assert parts.scorer.score(candidates, parts.scorer.batch(Random(0), 80)) == kept
    assert parts.scorer.counts.reused == before


@pytest.mark.parametrize("kind", ["kl", "sparse_kl", "ppl"])
def test_the_fitness_is_that_of_whole_forward_passes(parts: SimpleNamespace, kind: str) -> None:
    targets = Targets(parts.runner, parts.data, kind, 20)
    scorer = Scorer(parts.runner, parts.scorer.carrier, targets, parts.data)
    uniform = parts.database.uniform()
    score = scorer.score([uniform], Batch.of(parts.runner, targets, parts.data))[0]
    tokens = [torch.tensor(ids) for ids in parts.data.tokens]
    dense = [tiny()(input_ids=ids[None]).logits[0] for ids in tokens]
    ours = [parts.model(input_ids=ids[None]).logits[0] for ids in tokens]
    assert score == pytest.approx(fitness(kind, ours, dense, tokens, 20), rel=1e-5)


def test_the_dense_model_is_at_no_distance_from_itself(parts: SimpleNamespace) -> None:
    kept = dict.fromkeys((site.name for site in parts.runner.sites), "kept")
    for kind in ("kl", "hidden"):
        targets = Targets(parts.runner, parts.data, kind, 20)
        scorer = Scorer(parts.runner, Removals(parts.runner), targets, parts.data)
        score = scorer.score([kept], Batch.of(parts.runner, targets, parts.data))[0]
        assert score == pytest.approx(0.0, abs=1e-9)


def test_slices_of_the_vocabulary_change_no_more_than_rounding(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    uniform = parts.database.uniform()
    whole = parts.scorer.score([uniform], Batch.of(parts.runner, parts.scorer.targets, parts.data))
    monkeypatch.setattr(_fitness, "MOST_LOGITS", 300 * 7)
    monkeypatch.setattr(_fitness, "PROCESSOR_TOKENS", 40)
    sliced = parts.scorer.score([uniform], Batch.of(parts.runner, parts.scorer.targets, parts.data))
    assert sliced == pytest.approx(whole, rel=1e-5)


def test_answers_that_would_not_fit_into_memory_are_a_sentence_before_anything_is_run(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fitness, "memory_bytes", lambda: 2 * 1000)
    monkeypatch.setattr(parts.runner, "prepare", lambda *_: pytest.fail("something was run"))
    for kind, remedy in (
        ("kl", "use fitness='sparse_kl'"),
        ("sparse_kl", "lower top_k=64"),
        ("hidden", "top_k"),
    ):
        with pytest.raises(AssayError, match=f"fitness='{kind}' would keep .* GiB .*{remedy}"):
            Targets(parts.runner, parts.data, kind, 64)
    assert Targets(parts.runner, parts.data, "ppl", 64).bytes == 0


# --- the loop -----------------------------------------------------------------------------------------------------


class Line:
    """Candidates (a, b) with a + b = 10 whose fitness is how far a is from 7; nothing is run."""

    names = ("a", "b")

    def __init__(self, width: int = 3) -> None:
        self.width = width
        self.checked: list[Any] = []

    def initial(self, random: Random) -> Iterator[tuple[int, ...]]:
        yield from ((a, 10 - a) for a in (2, 0, 1, 1))

    def needs_start(self) -> bool:
        return False

    def mutate(self, parent: tuple[int, ...], random: Random) -> tuple[int, ...] | None:
        a = parent[0] + random.randint(-self.width, self.width)
        return (a, 10 - a) if 0 <= a <= 10 else None

    def refuse(self, child: Any, parent: Any) -> bool:
        return bool(child == parent)

    def check(self, candidate: tuple[int, ...]) -> None:
        assert sum(candidate) == 10
        self.checked.append(candidate)

    def children(self, parent: tuple[int, ...], limit: int) -> int:
        reach = range(max(0, parent[0] - self.width), min(10, parent[0] + self.width) + 1)
        return min(limit, len(reach) - 1)

    def assignment(self, candidate: tuple[int, ...]) -> dict[str, str]:
        return {"a": str(candidate[0]), "b": str(candidate[1])}


class Distance:
    """Stands for a scorer; remembers what was scored."""

    def __init__(self, fitness: Any = lambda a: abs(a - 7.0)) -> None:
        self.fitness = fitness
        self.counts = _candidates.Counts()
        self.carrier = SimpleNamespace(loaded=("", ""), load=lambda levels: 0)
        self.scored: list[tuple[int, list[int]]] = []

    def batch(self, random: Random, tokens: int) -> Any:
        return SimpleNamespace(tokens=tokens)

    def score(self, assignments: Sequence[Mapping[str, str]], batch: Any) -> list[float]:
        values = [int(each["a"]) for each in assignments]
        self.scored.append((batch.tokens, values))
        self.counts.run += len(values)
        return [self.fitness(value) for value in values]


def evolution(folder: Path, space: Any, scorer: Any, **settings: Any) -> Evolution:
    small: dict[str, Any] = {"generations": 3, "children": 4, "survivors": (3, 3, 2), "tokens": (10, 20, 30)}
    made = Settings(name="search.test", **small | settings)
    return Evolution(made, space, scorer, Progress(folder / "scratch", 0))


def test_parents_join_in_the_last_stage_alone_and_the_best_is_kept(tmp_path: Path) -> None:
    scorer, space = Distance(), Line()
    best = evolution(tmp_path, space, scorer).run()
    stages = [scorer.scored[at : at + 3] for at in range(0, 9, 3)]
    parent = 2
    for first, second, third in stages:
        assert [tokens for tokens, _ in (first, second, third)] == [10, 20, 30]
        assert len(set(first[1])) == 4 and parent not in first[1]
        # The second keeps as many as the first: by its place it is not the last one.
        assert sorted(second[1]) == sorted(sorted(first[1], key=scorer.fitness)[:3])
        assert third[1] == [*sorted(second[1], key=scorer.fitness)[:3], parent]
        parent = min(third[1], key=scorer.fitness)
    assert best == (parent, 10 - parent)
    assert abs(parent - 7) < abs(2 - 7)
    assert set(space.checked) >= {(value, 10 - value) for _, values in scorer.scored for value in values}


def test_a_worse_generation_leaves_the_parent(tmp_path: Path) -> None:
    assert evolution(tmp_path, Line(), Distance(lambda a: float(a != 2))).run() == (2, 8)


def test_a_held_out_fitness_that_is_no_number_is_a_sentence(tmp_path: Path) -> None:
    search = evolution(tmp_path, Line(), Distance())
    search.holdout = lambda assignment: math.inf
    with pytest.raises(NotFinite, match="held-out batch is no finite number after generation 0"):
        search.run()


def test_what_is_no_number_never_survives_by_its_place(tmp_path: Path) -> None:
    def broken(a: int) -> float:
        return math.inf if a < 4 else abs(a - 7.0)

    search = evolution(tmp_path, Line(), Distance(broken), children=5)
    assert search.run()[0] >= 4
    assert all(row[5] is not None for row in search.log.rows)
    assert search.log.rows[2][6] is None  # the first parent's fitness is none
    with pytest.raises(NotFinite, match="the fitness of none of 4 candidates is a finite number"):
        evolution(tmp_path, Line(), Distance(lambda a: math.inf)).run()


def test_more_children_than_exist_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        AssayError,
        match="children=4 are more than the 2 distinct children that exist in generation 1: ask for fewer",
    ):
        evolution(tmp_path, Line(width=1), Distance()).run()


def test_a_space_that_gives_no_child_ends(tmp_path: Path) -> None:
    space = Line()
    space.mutate = lambda parent, random: None  # type: ignore[method-assign]
    with pytest.raises(AssayError, match="more than the 0 distinct children that 4,000 draws gave"):
        evolution(tmp_path, space, Distance()).run()


def test_a_start_is_the_best_of_distinct_initial_candidates(tmp_path: Path) -> None:
    space, scorer = Line(), Distance()
    space.needs_start = lambda: True  # type: ignore[method-assign]
    search = evolution(tmp_path, space, scorer, generations=1, parents=2, start=(9, 55), survivors=(3, 3, 3))
    search.run()
    assert scorer.scored[0] == (55, [2, 0, 1])
    assert scorer.scored[3][1][-2:] == [2, 1] or {2, 1} <= set(scorer.scored[3][1])
    assert len(search.parents) == 2
    assert search.log.rows[0][:5] == [0, 1, 55, 3, 2]
    with pytest.raises(AssayError, match=r"4 parents are wanted .* only 3 initial candidates exist"):
        evolution(tmp_path, space, scorer, parents=4, start=(9, 55), survivors=(4,), tokens=(10,)).run()


def test_the_tokens_of_every_stage_are_counted(tmp_path: Path) -> None:
    search = evolution(tmp_path, Line(), Distance(), generations=2)
    search.run()
    assert search.log.tokens == 2 * (4 * 10 + 3 * 20 + (3 + 1) * 30)


# --- whole searches -----------------------------------------------------------------------------------------------


def test_evopress_finds_better_levels_than_the_uniform_ones_at_as_many_zeros(
    tmp_path: Path, parent: Path, levels: Path
) -> None:
    stage = searched(tmp_path, parent, levels, generations=12, holdout=HELD_OUT)
    found, database = assignment(stage), Database.open(levels)
    assert found["kind"] == "sparsity" and found["producer"] == "search.test"
    assert found["spent"] == database.spent(database.uniform()) == database.spent(found["levels"])
    assert sum(map(int, found["levels"].values())) == 0
    held_out = curve(stage, "holdout")
    assert list(held_out) == [0, 2, 4, 6, 8, 10, 12]
    assert held_out[12] < held_out[0]
    assert stage.notes["generations"] == 12
    assert stage.notes["tokens_forwarded"] == 12 * (8 * 100 + 5 * 300) == curve(stage, "tokens")[12]
    assert stage.notes["sub_blocks_reused"] > 0


def test_no_generations_leave_the_uniform_levels(tmp_path: Path, parent: Path, levels: Path) -> None:
    stage = searched(tmp_path, parent, levels, generations=0, holdout=HELD_OUT)
    assert set(assignment(stage)["levels"].values()) == {"0"}
    assert list(curve(stage, "holdout")) == [0]
    assert table(stage.folder / "files" / "fitness.csv") == []


def test_the_log_has_a_line_for_every_stage(tmp_path: Path, parent: Path, levels: Path) -> None:
    stage = searched(tmp_path, parent, levels)
    rows = table(stage.folder / "files" / "fitness.csv")
    assert [(row["generation"], row["stage"]) for row in rows] == [
        (str(generation), str(stage_)) for generation in range(1, 5) for stage_ in (1, 2)
    ]
    assert [row["candidates"] for row in rows[:2]] == ["8", "5"]
    assert all(row["parent"] == "" for row in rows[::2]) and all(
        float(row["parent"]) > 0 for row in rows[1::2]
    )
    assert all(float(row["best"]) <= float(row["parent"]) for row in rows[1::2])
    assert curve(stage, "fitness") == {2: float(rows[3]["best"]), 4: float(rows[7]["best"])}


def test_the_same_seed_gives_the_same_files_and_another_seed_others(
    tmp_path: Path, parent: Path, levels: Path
) -> None:
    stages = [
        searched(tmp_path / name, parent, levels, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    files = [(stage.folder / "files" / "fitness.csv").read_text() for stage in stages]
    assert files[0] == files[1] != files[2]
    assert assignment(stages[0]) == assignment(stages[1])
    assert stages[0].notes == stages[1].notes


def test_tyr_keeps_heads_and_neurons_apart(tmp_path: Path, parent: Path, structure: Path) -> None:
    stage = searched(tmp_path, parent, structure, tyr, survivors=(4, 2), tokens=(100, 300), top_k=50)
    found, database = assignment(stage), Database.open(structure)
    assert found["spent"] == {"heads": 3 * 2, "neurons": 3 * 24} == database.spent(found["levels"])
    assert any(level != "0" for level in found["levels"].values())


@pytest.mark.parametrize("options", [{"fitness": "hidden"}, {"fitness": "ppl"}, {"precision": "bfloat16"}])
def test_every_fitness_and_precision_ends_in_an_assignment(
    tmp_path: Path, parent: Path, levels: Path, options: dict[str, Any]
) -> None:
    stage = searched(tmp_path, parent, levels, generations=2, **options)
    assert stage.notes["compute_dtype"] == options.get("precision", "float32")
    assert len(assignment(stage)["levels"]) == 21


def test_bfloat16_is_that_of_a_model_loaded_in_it(tmp_path: Path, parent: Path, levels: Path) -> None:
    config = evopress.Config(**SMALL | {"precision": "bfloat16"})
    model = family.Problem(staged(tmp_path, parent, levels, config)).model
    loaded = load_model(parent, "bfloat16")
    ids = torch.arange(60)[None]
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_answers_alone_can_be_compared(tmp_path: Path, parent: Path, levels: Path) -> None:
    everywhere = searched(tmp_path / "all", parent, levels, generations=1)
    answers = searched(tmp_path / "answers", parent, levels, generations=1, positions="answers")
    logs = [table(stage.folder / "files" / "fitness.csv") for stage in (everywhere, answers)]
    assert logs[0][0]["tokens"] == logs[1][0]["tokens"]
    assert logs[0][0]["best"] != logs[1][0]["best"]
    assert answers.notes["target_bytes"] < everywhere.notes["target_bytes"]


def test_the_held_out_batch_is_the_same_for_every_seed(tmp_path: Path, parent: Path, levels: Path) -> None:
    starts = {
        curve(
            searched(tmp_path / str(seed), parent, levels, seed=seed, generations=1, holdout=HELD_OUT),
            "holdout",
        )[0]
        for seed in range(2)
    }
    assert len(starts) == 1


def test_the_filters_of_the_released_search_hold(tmp_path: Path, parent: Path, levels: Path) -> None:
    stage = searched(tmp_path, parent, levels, generations=6, max_level=1, max_total_deviation=4)
    found = [int(level) for level in assignment(stage)["levels"].values()]
    assert max(found) <= 1 and sum(map(abs, found)) <= 4


# --- bad input ----------------------------------------------------------------------------------------------------


def test_stages_that_do_not_fit_together_are_sentences() -> None:
    for options, sentence in (
        (
            {"survivors": (4, 1), "tokens": (100,)},
            "every stage of selection has one number of each, .* 2 and 1",
        ),
        ({"survivors": (), "tokens": ()}, "every stage of selection has one number of each"),
        ({"survivors": (2, 4)}, "no stage can keep more than the one before it"),
        ({"survivors": (9, 1)}, "the first no more than children=8"),
        (
            {"tokens": (100, 900)},
            "scores on 900 tokens, drawn without replacement from calibration_tokens=800",
        ),
    ):
        with pytest.raises(AssayError, match=sentence):
            evopress.Config(**SMALL | options)


def test_too_few_calibration_tokens_are_a_sentence(tmp_path: Path, parent: Path, levels: Path) -> None:
    with pytest.raises(
        AssayError, match=r"90,000 tokens are asked for, but 'authors/forget10' has [\d,]+ in"
    ):
        searched(tmp_path, parent, levels, calibration_tokens=90_000)


def test_a_missing_held_out_set_is_a_sentence(tmp_path: Path, parent: Path, levels: Path) -> None:
    with pytest.raises(AssayError, match="nowhere"):
        searched(tmp_path, parent, levels, holdout="authors/nowhere")
    with pytest.raises(AssayError, match=r"90,000 tokens are asked for, but 'authors/retain90\[0:40\]' has"):
        searched(tmp_path, parent, levels, holdout=HELD_OUT, holdout_tokens=90_000)


def test_levels_of_another_kind_are_a_sentence(
    tmp_path: Path, parent: Path, levels: Path, structure: Path
) -> None:
    with pytest.raises(
        AssayError, match="levels of kind sparsity, and those named in levels are of kind structure"
    ):
        searched(tmp_path, parent, structure)
    with pytest.raises(AssayError, match=r"levels of kind structure, .* such as levels.tyr"):
        searched(tmp_path, parent, levels, tyr)


def test_too_many_children_of_a_small_database_are_a_sentence(tmp_path: Path) -> None:
    model = tiny(layers=1)
    folder = saved(model, tmp_path / "model")
    structure = structure_levels(model, tmp_path / "levels")
    # One attention and one MLP: nothing can be exchanged.
    with pytest.raises(
        AssayError, match="children=8 are more than the 0 distinct children that exist in generation 1"
    ):
        searched(tmp_path, folder, structure, tyr, survivors=(4, 2))


def test_defaults_are_consistent() -> None:
    for method in (evopress, tyr):
        config = method.Config(data=DATA, levels=Parent("levels"))
        assert replace(config, generations=1).generations == 1
