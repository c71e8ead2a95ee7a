"""Searches and block scores against the authors' own code, from the files under ``pruning/``.

The official searches draw from another random stream, so their traces are not repeated: every candidate in them, and
every one of ours, has to keep the rules that the folder's README lists under "Traces". Fitness values, block scores and
divergences of pruned models are compared with a relative tolerance of 1e-4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations, islice, pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.progress import Progress
from methods.prune._walk import linear_weights
from methods.search._bits import Bits
from methods.search._candidates import Counts
from methods.search._depth import Depth
from methods.search._evolution import Evolution, Settings
from methods.search._spaces import Candidate, Shift, Space, validate
from methods.stage import AssayError
from tests.parity import cases
from tests.parity.pruning import META, arrays, calibration, read, tiny_llama

TRACES = read("search_traces.json")
NONMONOTONE = read("nonmonotone_drop.json")
RELATIVE = 1e-4


# --- traces -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One selection: what was scored, what was left and how good that was."""

    tokens: int
    candidates: list[Candidate]
    survivors: list[Candidate]
    fitness: list[float]


@dataclass(frozen=True)
class Trace:
    """A search: its space, the parents it started from or the stage that found them, and its stages."""

    space: Space
    parents: list[Candidate]
    first: Stage | None
    generations: list[list[Stage]]
    final: Candidate | None = None


def records(part: str) -> list[str]:
    """The names of the stored traces that have an entry of this name."""
    return sorted(name for name, record in TRACES.items() if isinstance(record, dict) and part in record)


def space_of(record: Mapping[str, Any]) -> Space:
    """What a stored search chose from."""
    if "removed" in record:
        blocks, removed = range(record["num_blocks"]), record["removed"]
        attentions, mlps = (
            tuple(f"model.layers.{index}.{kind}" for index in blocks) for kind in ("self_attn", "mlp")
        )
        return Depth(attentions, mlps, removed, removed, record["drop_entire_block"])
    if "target_bits" in record:
        return bits(record["numel"], record["levels_available"], record["target_bitwidth"], rule_of(record))
    names = tuple(record["layer_names"])
    kinds = [name.rpartition(".")[2] for name in names]
    # Only Tyr's databases hold nothing but what heads and neurons are taken from.
    tyr = set(kinds) == {"o_proj", "down_proj"}
    levels = tuple(frozenset(record["levels_available"][name]) for name in names)
    return Shift(names, levels, tuple(kinds) if tyr else ("weights",) * len(names), 4 if tyr else 3)


def bits(numel: Mapping[str, int], available: Sequence[int], target: float, rule: Any) -> Bits:
    return Bits(tuple(numel), tuple(numel.values()), (frozenset(available),) * len(numel), target, rule)


def rule_of(record: Mapping[str, Any]) -> str:
    """How a stored search formed its groups: the file shows the groups, not the rule."""
    if len(record["groups"]) == 1 and len(set(record["numel"].values())) > 1:
        return "none"
    names = [{name.rpartition(".")[2] for name in group} for group in record["groups"]]
    return "name" if len(set().union(*names)) == len(names) else "size"


def candidate_of(record: Mapping[str, Any], space: Space, stored: Any) -> Candidate:
    """A stored candidate in the order of the space's units."""
    if isinstance(space, Depth):
        attentions, mlps = (
            [index for index, gone in enumerate(stored[kind]) if gone] for kind in ("attn", "mlp")
        )
        return space.removing(attentions, mlps)
    if isinstance(space, Bits):
        pairs = zip(record["groups"], stored, strict=True)
        level = {name: bits for group, row in pairs for name, bits in zip(group, row, strict=True)}
        return tuple(level[name] for name in space.names)
    return tuple(stored)


def official(name: str) -> Trace:
    """A stored trace; generations have three stages, and two for depth."""
    record = TRACES[name]
    space = space_of(record)

    def several(stored: list[Any]) -> list[Candidate]:
        return [candidate_of(record, space, one) for one in stored]

    stages = [
        Stage(one["num_tokens"], several(one["candidates"]), several(one["survivors"]), one["fitness"])
        for one in record["stages"]
    ]
    assert [len(stage.survivors) for stage in stages] == [one["num_survive"] for one in record["stages"]]
    each = 2 if isinstance(space, Depth) else 3
    found = len(stages) % each
    assert found == (1 if space.needs_start() else 0)
    start = next(space.initial(Random(0))) if not found else None
    if "initial_parent" in record:
        assert candidate_of(record, space, record["initial_parent"]) == start
    return Trace(
        space,
        [start] if start else stages[0].survivors,
        stages[0] if found else None,
        [stages[at : at + each] for at in range(found, len(stages), each)],
        candidate_of(record, space, record["final"]),
    )


def check(trace: Trace, ours: bool) -> None:
    """The README's rules. The official initial bit-widths may lie below the budget, and its Tyr keeps two survivors."""
    if trace.first is not None:
        check_start(trace, ours)
    parents = trace.parents
    for generation in trace.generations:
        check_generation(trace.space, parents, generation, ours)
        # A search with one parent takes the best of the last stage's survivors.
        parents = generation[-1].survivors[: len(trace.parents)]
    if trace.final is not None:
        assert trace.final == parents[0]


def check_start(trace: Trace, ours: bool) -> None:
    assert trace.first is not None
    space = trace.space
    below = isinstance(space, Bits) and not ours
    bound = Bits(space.names, space.weights, space.levels, space.target, "none") if below else space  # type: ignore[attr-defined]
    for candidate in trace.first.candidates:
        bound.check(candidate)
    check_stage(trace.first)


def check_stage(stage: Stage) -> None:
    assert len(set(stage.candidates)) == len(stage.candidates)
    assert set(stage.survivors) <= set(stage.candidates)
    assert stage.fitness == sorted(stage.fitness)


def check_generation(space: Space, parents: list[Candidate], stages: list[Stage], ours: bool) -> None:
    for child in stages[0].candidates:
        assert any(made(space, parent, child) for parent in parents), child
        # The released search for sparsity takes children that are their parent again.
        if ours or not isinstance(space, Shift):
            assert child not in parents
    for stage in stages:
        check_stage(stage)
    for before, after in pairwise(stages):
        assert set(before.survivors) <= set(after.candidates)
        assert set(after.candidates) - set(before.survivors) <= set(parents)
        early = after is not stages[-1] and len(after.survivors) != len(stages[-1].survivors)
        assert not early or len(after.candidates) == len(before.survivors)
    assert set(parents) <= set(stages[-1].candidates)


def made(space: Space, parent: Candidate, child: Candidate) -> bool:
    """Whether the child can have been made from this parent; its budget has to be met in any case."""
    space.check(child)
    try:
        validate(space, parent, child)
    except AssayError:
        return False
    return True


@pytest.mark.parametrize("name", records("stages"))
def test_every_candidate_of_an_official_search_passes_our_validator(name: str) -> None:
    check(official(name), ours=False)


class Recorder:
    """Stands in for a scorer: fitness by lot, the same for the same candidate and batch, and all of it remembered."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.counts = Counts()
        self.carrier = SimpleNamespace(loaded=())
        self.stages: list[tuple[int, list[Candidate], list[float]]] = []

    def batch(self, random: Random, tokens: int) -> Any:
        return SimpleNamespace(tokens=tokens, salt=random.random())

    def score(self, assignments: Sequence[Mapping[str, str]], batch: Any) -> list[float]:
        numbers = {"kept": 0, "removed": 1}
        candidates = [
            tuple(numbers.get(level) if level in numbers else int(level) for level in assignment.values())
            for assignment in assignments
        ]
        scores = [luck(batch.salt, candidate) for candidate in candidates]
        self.counts.run += 1
        self.stages.append((batch.tokens, candidates, scores))
        return scores


def luck(salt: float, candidate: Candidate) -> float:
    return int(sha256(f"{salt} {candidate}".encode()).hexdigest()[:12], 16) / 16**12


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", records("stages"))
def test_every_candidate_of_our_search_passes_the_same_validator(
    name: str, seed: int, tmp_path: Path
) -> None:
    theirs = official(name)
    generation = theirs.generations[0]
    tokens = tuple(stage.tokens for stage in generation)
    survivors = tuple(len(stage.survivors) for stage in generation)
    start = (len(theirs.first.candidates), theirs.first.tokens) if theirs.first else None
    settings = Settings(
        name,
        len(theirs.generations),
        len(generation[0].candidates),
        survivors,
        tokens,
        len(theirs.parents),
        start,
    )
    recorder = Recorder(theirs.space)
    search = Evolution(settings, theirs.space, recorder, Progress(tmp_path, seed))  # type: ignore[arg-type]
    final = search.run()
    check(ours(recorder, settings, final), ours=True)


def ours(recorder: Recorder, settings: Settings, final: Candidate) -> Trace:
    """The trace of one of our searches."""
    kept = [settings.parents] * (settings.start is not None) + list(settings.survivors) * settings.generations
    stages = []
    for (tokens, candidates, scores), survivors in zip(recorder.stages, kept, strict=True):
        ranked = sorted(range(len(scores)), key=scores.__getitem__)[:survivors]
        stages.append(
            Stage(tokens, candidates, [candidates[at] for at in ranked], [scores[at] for at in ranked])
        )
    first = stages.pop(0) if settings.start else None
    parents = first.survivors if first else [next(recorder.space.initial(Random(0)))]
    each = len(settings.tokens)
    generations = [stages[at : at + each] for at in range(0, len(stages), each)]
    return Trace(recorder.space, parents, first, generations, final)


@pytest.mark.parametrize("name", records("groups"))
def test_our_groups_are_the_official_ones(name: str) -> None:
    space = space_of(TRACES[name])
    assert isinstance(space, Bits)
    found = {frozenset(space.names[index] for index in group) for group in space.groups}
    assert found == {frozenset(group) for group in TRACES[name]["groups"]}
    assert space.budget == TRACES[name]["target_bits"]


CRASH = re.compile(r"quant_(size|name|none)_([\d.]+)_OFFICIAL_CRASH")


@pytest.mark.parametrize("name", sorted(name for name in TRACES if CRASH.fullmatch(name)))
def test_the_target_that_the_official_code_fails_on_has_initial_candidates_here(name: str) -> None:
    found = CRASH.fullmatch(name)
    assert found is not None
    others = records("numel")
    if not others:
        pytest.skip("no other search of bit-widths says which model this is")
    record = TRACES[others[0]]
    space = bits(record["numel"], record["levels_available"], float(found[2]), found[1])
    for seed in range(20):
        candidates = list(islice(space.initial(Random(seed)), 16))
        assert len(set(candidates)) == len(candidates) > 0
        for candidate in candidates:
            space.check(candidate)
            draws = (space.mutate(candidate, Random(number)) for number in range(100))
            validate(space, candidate, next(child for child in draws if child is not None))


# --- block scores -----------------------------------------------------------------------------------------------------


SCORES = {
    "cosine_similarity": "influence",
    "l2": "l2",
    "l2_normalized": "l2_normalized",
    "norm_ratio": "norm_ratio",
}


def scores_of(score: str, gap: int = 1) -> list[float]:
    from methods.search._runner import Runner

    method = cases.method("search.block_scores")
    runner = Runner(tiny_llama())
    passes = (method.depths(runner, sequence, "official") for sequence in calibration())
    return list(method.mean_scores(method.PAIRS[score], passes, gap))


@pytest.mark.parametrize("name", sorted(META.get("block_scores", {}).keys() - {"window_cosine"}))
def test_block_scores_equal_the_official_ones(name: str) -> None:
    if name not in SCORES:
        pytest.skip(f"not built yet: {name}")
    found = scores_of(SCORES[name])
    # The official code keeps the cosine, and ShortGPT's influence is what is missing from it to 1.
    found = [1 - score for score in found] if name == "cosine_similarity" else found
    assert found == pytest.approx(META["block_scores"][name], rel=RELATIVE)


@pytest.mark.parametrize("blocks", sorted(META.get("block_scores", {}).get("window_cosine", {})))
def test_window_cosines_equal_the_official_ones(blocks: str) -> None:
    found = [1 - score for score in scores_of("window_cosine", int(blocks))]
    assert found == pytest.approx(META["block_scores"]["window_cosine"][blocks], rel=RELATIVE)


def test_hidden_states_equal_the_official_ones() -> None:
    from methods.search._runner import Runner

    runner, method = Runner(tiny_llama()), cases.method("search.block_scores")
    # One sequence after the other, along the tokens.
    found = [torch.stack(method.depths(runner, sequence, "official")) for sequence in calibration()]
    expected = arrays("tiny_llama_extra")["hidden_states"]
    cases.agree(torch.cat(found, dim=1), expected, relative=RELATIVE, absolute=1e-5, what="hidden states")


# --- fitness ----------------------------------------------------------------------------------------------------------


def logits_of(model: Any) -> list[Tensor]:
    """Logits [T,V] of every calibration sequence."""
    with torch.inference_mode():
        return [model(input_ids=sequence).logits[0] for sequence in calibration()]


def with_levels(file: str, level: str) -> Any:
    """The tiny Llama with every layer of a stored database at one level."""
    model, stored = tiny_llama(), arrays(file)
    names = [key for key in stored if key.endswith(f"/{level}")]
    if not names:
        pytest.skip(f"{file} holds no level {level}")
    with torch.no_grad():
        for key in names:
            model.get_parameter(f"{key.rpartition('/')[0]}.weight").copy_(torch.tensor(stored[key]))
    return model


def fitness_of(model: Any, kind: str, top_k: int = 1) -> float:
    from methods.search._fitness import fitness

    tokens = [sequence[0] for sequence in calibration()]
    return fitness(kind, logits_of(model), logits_of(tiny_llama()), tokens, top_k)


def by_scorer(model: Any, kind: str, top_k: int) -> float:
    """The same in the way a search computes it: the targets of the dense model, then another model's batch."""
    from methods.data import Example
    from methods.search._candidates import Batch, Scorer
    from methods.search._fitness import Sequences, Targets
    from methods.search._runner import Runner

    tokens = [tuple(sequence[0].tolist()) for sequence in calibration()]
    texts = Sequences([Example(ids, ids) for ids in tokens], answers=False)
    targets = Targets(Runner(tiny_llama()), texts, kind, top_k)
    runner = Runner(model)
    carrier: Any = SimpleNamespace(
        loaded=("",),
        sites=(0,),
        levels=lambda assignment: ("these",),
        load=lambda levels: 0,
        runs=lambda site: True,
    )
    scorer = Scorer(runner, carrier, targets, texts)
    return scorer.score([{}], Batch(runner, targets, texts, texts.whole()))[0]


FITNESS = {
    "ppl_dense": ("tiny_llama_dense", "", "ppl"),
    "ppl_uniform_level0": ("tiny_llama_sparsegpt_levels", "0", "ppl"),
    "kl_uniform_level0": ("tiny_llama_sparsegpt_levels", "0", "kl"),
    "kl_tyr_level0": ("tiny_llama_tyr_levels", "0", "kl"),
}


def fitness_cases() -> Iterator[Any]:
    """The stored fitness values whose weights are stored, too."""
    for name in sorted(META.get("fitness", {})):
        top = re.fullmatch(r"sparse_kl_top(\d+)", name)
        if name in FITNESS:
            yield pytest.param(name, *FITNESS[name], 1, id=name)
        elif top:
            yield pytest.param(name, "tiny_llama_sparsegpt_levels", "0", "sparse_kl", int(top[1]), id=name)


@pytest.mark.parametrize(("name", "file", "level", "kind", "top_k"), fitness_cases())
def test_fitness_equals_the_official_one(name: str, file: str, level: str, kind: str, top_k: int) -> None:
    model = with_levels(file, level) if level else tiny_llama()
    expected = pytest.approx(META["fitness"][name], rel=RELATIVE)
    assert fitness_of(model, kind, top_k) == expected
    assert by_scorer(model, kind, top_k) == expected


def test_the_divergence_of_our_own_bit_widths_is_the_official_one(tmp_path: Path) -> None:
    """The weights of this level are not stored: they are made anew, where a code may move by the noise of a pass."""
    from methods.levels._database import Writer

    about, expected = META.get("gptq_levels"), META.get("fitness", {}).get("kl_gptq3")
    if about is None or expected is None:
        pytest.skip("this folder has no bit-widths of a tiny Llama")
    method = cases.method("levels.gptq")
    config = method.Config(
        data="case",
        bits=tuple(about["bits"]),
        loaded=about["calibration_bitwidth"],
        group=about["group_size"],
        symmetric=about["sym"],
        scales="float32",
    )
    model, writer = tiny_llama(), Writer(tmp_path, "bits")
    method.build_on(config, model, calibration(), Progress(tmp_path / "scratch", 0), writer)
    for name in linear_weights(model):
        level = writer.weight(name.removesuffix(".weight"), str(config.loaded))
        model.get_parameter(name).data.copy_(level)
    assert fitness_of(model, "kl") == pytest.approx(expected, rel=1e-3)


# --- removed sub-blocks -----------------------------------------------------------------------------------------------


def full_length() -> list[Tensor]:
    """The calibration sequences that are as long as the longest: what the stored divergences are over."""
    sequences = calibration()
    longest = max(sequence.shape[1] for sequence in sequences)
    return [sequence for sequence in sequences if sequence.shape[1] == longest]


def sub_block(short: str) -> str:
    """``attn0`` or ``mlp3`` as the model calls it."""
    kind, block = re.fullmatch(r"(attn|mlp)(\d+)", short).groups()  # type: ignore[union-attr]
    return f"model.layers.{block}.{'self_attn' if kind == 'attn' else 'mlp'}"


def scorer_of(sequences: Sequence[Tensor]) -> Any:
    """Scores removals of sub-blocks of the tiny Llama by KL on these sequences."""
    from methods.data import Example
    from methods.search._candidates import Removals, Scorer
    from methods.search._fitness import Sequences, Targets
    from methods.search._runner import Runner

    tokens = [tuple(sequence[0].tolist()) for sequence in sequences]
    texts = Sequences([Example(ids, ids) for ids in tokens], answers=False)
    runner = Runner(tiny_llama())
    return Scorer(runner, Removals(runner), Targets(runner, texts, "kl", 1), texts)


@pytest.fixture(scope="module")
def divergences() -> Mapping[frozenset[str], float]:
    """KL of every set of removed sub-blocks: all of them are scored in one batch, as a search would."""
    if not NONMONOTONE:
        pytest.skip("this folder has no nonmonotone_drop.json")
    scorer = scorer_of(full_length())
    names = [site.name for site in scorer.runner.sites]
    every = [frozenset(some) for size in range(len(names) + 1) for some in combinations(names, size)]
    assignments = [{name: "removed" if name in gone else "kept" for name in names} for gone in every]
    batch = scorer.batch(Random(0), sum(scorer.sequences.lengths))
    return dict(zip(every, scorer.score(assignments, batch), strict=True))


@pytest.mark.parametrize("edge", range(len(NONMONOTONE.get("top", ()))))
def test_removing_more_lowers_the_divergence_where_it_did(
    edge: int, divergences: Mapping[frozenset[str], float]
) -> None:
    stored = NONMONOTONE["top"][edge]
    smaller, larger = (frozenset(map(sub_block, stored[kind])) for kind in ("smaller", "larger"))
    assert smaller < larger
    assert divergences[smaller] == pytest.approx(stored["kl_smaller"], rel=RELATIVE)
    assert divergences[larger] == pytest.approx(stored["kl_larger"], rel=RELATIVE)
    assert divergences[larger] < divergences[smaller]


def test_as_many_edges_violate_monotonicity(divergences: Mapping[frozenset[str], float]) -> None:
    edges = [
        (gone, gone | {name})
        for gone in divergences
        for name in max(divergences, key=len)
        if name not in gone
    ]
    assert len(divergences) == NONMONOTONE["evaluated"]
    assert len(edges) == NONMONOTONE["edges_tested"]
    assert sum(divergences[more] < divergences[less] for less, more in edges) == NONMONOTONE["violations"]


@pytest.mark.parametrize("size", sorted(NONMONOTONE.get("per_size", {})))
def test_the_best_sets_and_the_greedy_ones_are_the_stored_ones(
    size: str, divergences: Mapping[frozenset[str], float]
) -> None:
    stored = NONMONOTONE["per_size"][size]
    best = min((gone for gone in divergences if len(gone) == int(size)), key=divergences.__getitem__)
    assert best == frozenset(map(sub_block, stored["optimal"]))
    assert divergences[best] == pytest.approx(stored["optimal_kl"], rel=RELATIVE)
    chosen = frozenset(sorted(alone(), key=alone().__getitem__)[: int(size)])
    assert chosen == frozenset(map(sub_block, stored["additive_ranking_choice"]))
    assert divergences[chosen] == pytest.approx(stored["additive_ranking_kl"], rel=RELATIVE)


def alone() -> dict[str, float]:
    """The divergence without each sub-block alone, as ``search.block_scores`` measures it."""
    from methods.search._runner import Runner

    model = tiny_llama()
    space = Depth.of(model, 1 / len(model.model.layers))
    method = cases.method("search.block_scores")
    return dict(method.without_each(Runner(model), space, full_length(), "kl"))


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_the_search_for_depth_finds_one_of_the_best_of_all_choices(
    whole_blocks: bool, divergences: Mapping[frozenset[str], float], tmp_path: Path
) -> None:
    scorer = scorer_of(full_length())
    blocks = len(scorer.runner.layers)
    space = Depth.of(scorer.runner.model, blocks // 2 / blocks, whole_blocks)
    every, children = sum(scorer.sequences.lengths), min(16, space.size() - 2)
    settings = Settings("depth", 8, children, (2, 1), (every // 4, every), 1, (4, every // 4))
    found = Evolution(settings, space, scorer, Progress(tmp_path, 0)).run()

    def divergence(candidate: Candidate) -> float:
        return divergences[frozenset(name for name, gone in zip(space.names, candidate, strict=True) if gone)]

    everywhere = sorted(map(divergence, space.initial(Random(0))))
    assert divergence(found) <= everywhere[len(everywhere) // 20]
