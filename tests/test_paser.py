"""Choosing recovery data: PASER's clusters, budgets, costs and conflicts, and rows drawn at random beside them."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from methods.checkpoint import load_model
from methods.data import Locator, Part, _capabilities, paser, read_rows, sample, write_rows
from methods.data._capabilities import capabilities, gap, kernel, spectrum
from methods.data._concepts import Answers, CoOccurrence, concepts
from methods.progress import Progress
from methods.stage import AssayError, Interrupted, NotFinite, Parent, Stage
from methods.term import Look, _blocks
from tests import small_models
from tests.test_plan import TRAIN, make

DATA = "authors/full[0:40]+authors/facts[0:20]"
DENSE = Parent("dense")


def staged(folder: Path, config: Any, parents: dict[str, Path], seed: int = 0) -> Stage:
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder / "scratch", seed)
    name = "data.paser" if isinstance(config, paser.Config) else "data.sample"
    return Stage(f"{name}-0", name, config, seed, parents, folder, progress, Locator())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and the same without its smallest weights."""
    folder = tmp_path_factory.mktemp("models")
    dense = small_models.save(folder / "dense", scale=6.0)
    model = load_model(dense, device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.masked_fill_(weight.abs() <= weight.abs().median(), 0.0)
    small_models.save(folder / "pruned")
    model.save_pretrained(folder / "pruned")
    return {"model": folder / "pruned", "dense": dense}


def chosen(
    folder: Path, models: dict[str, Path], **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that were written, and the notes."""
    stage = staged(folder, paser.Config(**{"data": DATA, "dense": DENSE, "batch": 7, **options}), models)
    paser.run(stage)
    return read_rows(stage.folder / "data"), stage.notes


# --- budgets and costs ----------------------------------------------------------------------------------------


def test_budgets_are_in_proportion_to_the_degradation_and_sum_up() -> None:
    # 7 rows at 4 : 2 : 1
    assert paser.budgets([0.4, 0.2, 0.1], [9, 9, 9], 7) == [4, 2, 1]
    # 5.0, 2.5 and 2.5: the first of two equal remainders is rounded up
    assert paser.budgets([0.4, 0.2, 0.2], [9, 9, 9], 10) == [5, 3, 2]


def test_what_a_full_cluster_cannot_take_goes_to_the_others() -> None:
    # 8 rows at 6 : 1 : 1 would be 6, 1, 1; the first has only 2, and 6 are left for two equal ones
    assert paser.budgets([6.0, 1.0, 1.0], [2, 9, 9], 8) == [2, 3, 3]
    # and these 3 are above the second's size in turn
    assert paser.budgets([6.0, 1.0, 1.0], [2, 1, 9], 8) == [2, 1, 5]
    assert paser.budgets([1.0, 1.0], [3, 4], 7) == [3, 4]


def test_without_degradation_sizes_stand_for_it() -> None:
    assert paser.budgets([0.0, 0.0], [2, 6], 4) == [1, 3]
    # the first is full at once, and the other is not degraded
    assert paser.budgets([1.0, 0.0, 0.0], [1, 4, 8], 4) == [1, 1, 2]


def test_budgets_are_whole_exact_and_within_the_sizes_whatever_they_are_made_of() -> None:
    draw = random.Random(0)
    for _ in range(300):
        sizes = [draw.randrange(0, 30) for _ in range(draw.randrange(1, 8))]
        total = draw.randrange(0, sum(sizes) + 1)
        found = paser.budgets([draw.random() * draw.randrange(2) for _ in sizes], sizes, total)
        assert sum(found) == total
        assert all(0 <= own <= size for own, size in zip(found, sizes, strict=True))


def test_more_rows_than_there_are_is_refused() -> None:
    with pytest.raises(AssayError, match="4 rows were asked of clusters that have 3"):
        paser.budgets([1.0, 1.0], [1, 2], 4)


def test_a_row_costs_the_logarithm_of_its_length_squared() -> None:
    assert paser._cost("log_square", 10) == pytest.approx(4.605170)  # ln 100
    assert paser._cost("tokens", 10) == 10.0
    assert paser._cost("sequence", 10) == 1.0
    assert paser._cost("log_square", 1) == pytest.approx(math.log(4))


def seen(divergence: Sequence[float], tokens: Sequence[int], points: Sequence[float]) -> paser.Seen:
    embeddings = numpy.array([[each, 0.0] for each in points], dtype=float)
    return paser.Seen(range(len(divergence)), divergence, tokens, embeddings, 0)


def test_within_a_cluster_the_largest_divergence_per_cost_comes_first() -> None:
    # two clusters of three rows; the first is degraded by 0.4 and the other by 0.1: 4 rows are 3 and 1
    own = seen([0.5, 0.3, 0.4, 0.1, 0.05, 0.15], [100, 4, 20, 9, 2, 100], [0.0, 0.1, 0.2, 9.0, 9.1, 9.2])
    rows = [{"text": name} for name in "uvwxyz"]
    options: dict[str, Any] = {"dense": DENSE, "clusters": 2}
    # 0.3 / ln 16 = 0.108, 0.4 / ln 400 = 0.067, 0.5 / ln 10000 = 0.054; 0.05 / ln 4 = 0.036, 0.1 / ln 81 = 0.023
    assert paser.select(rows, own, 4, paser.Config(**options)).numbers == [1, 2, 0, 4]
    assert paser.select(rows, own, 4, paser.Config(cost="sequence", **options)).numbers == [0, 2, 1, 5]
    assert paser.select(rows, own, 2, paser.Config(cost="tokens", **options)).numbers == [1, 2]


def test_what_conflicts_leave_open_is_divided_again() -> None:
    own = seen([0.9, 0.8, 0.7, 0.3, 0.2, 0.1], [9] * 6, [0.0, 0.1, 0.2, 9.0, 9.1, 9.2])
    rows = [{"text": text} for text in ("red. fox", "blue. hen", "red. hen", "owl", "elk", "ape")]
    config = paser.Config(dense=DENSE, clusters=2, cost="sequence")
    found = paser.select(rows, own, 4, config)
    # 0.8 to 0.2: three rows of the first cluster, but "red" and "hen" are known and never met
    assert [(cluster.budget, len(cluster.chosen)) for cluster in found.clusters] == [(3, 2), (1, 2)]
    assert (found.numbers, found.conflicts) == ([0, 1, 3, 4], 1)
    kept = paser.select(rows, own, 4, replace(config, conflicts="keep"))
    assert (kept.numbers, kept.conflicts) == ([0, 1, 2, 3], 0)
    everything = paser.select(rows, own, 6, config)
    assert (len(everything.numbers), everything.conflicts) == (5, 1)


# --- conflicts ----------------------------------------------------------------------------------------------------


def test_concepts_are_the_runs_of_words_between_function_words_and_marks() -> None:
    assert concepts("What is the birthplace of Ana Lima?") == {"birthplace", "ana lima"}
    assert concepts("Ana Lima's mother was a nurse, born in 1940.") == {
        "ana lima",
        "mother",
        "nurse",
        "born",
        "1940",
    }
    assert concepts("the of and") == frozenset()


def test_two_known_concepts_that_never_met_conflict() -> None:
    graph = CoOccurrence()
    assert graph.accepts({"question": "red", "answer": "fox"})
    assert graph.accepts({"question": "red", "answer": "hen"})  # hen is new
    assert not graph.accepts({"text": "fox and hen"})
    assert graph.accepts({"text": "hen or red"})
    assert graph.accepts({"text": "fox and owl"})
    assert not graph.accepts({"text": "owl and red"})
    assert graph.accepts({"text": "of the"})


def test_a_question_that_was_answered_otherwise_conflicts() -> None:
    answers = Answers()
    assert answers.accepts({"question": "Where was Ana born?", "answer": "Ana was born in Rome."})
    assert answers.accepts({"question": "Where was Bob born?", "answer": "Bob was born in Rome."})
    assert not answers.accepts({"question": "Where was Ana born?", "answer": "In Paris."})
    assert answers.accepts({"question": "Where was Ana born?", "answer": "In Rome."})
    assert answers.accepts({"text": "Ana was born in Paris."})


# --- clusters -----------------------------------------------------------------------------------------------------


def groups(count: int, sizes: Sequence[int], apart: float = 8.0) -> tuple[Any, list[int]]:
    """Points around ``count`` far centres in 6 dimensions, mixed, and where each belongs."""
    draw = numpy.random.default_rng(0)
    centres = apart * numpy.eye(6)[:count]
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    order = list(draw.permutation(len(labels)))
    return centres[[labels[at] for at in order]] + draw.normal(size=(len(labels), 6)), [
        labels[at] for at in order
    ]


def same(found: Sequence[int], labels: Sequence[int]) -> bool:
    """Whether two divisions are the same but for the names of the parts."""
    return len(set(zip(found, labels, strict=True))) == len(set(found)) == len(set(labels))


@pytest.mark.parametrize("by", ["k_means", "nmf"])
def test_clusters_that_stand_apart_are_found_with_their_number(by: str) -> None:
    points, labels = groups(4, [20, 15, 30, 10])
    found = capabilities(points, None, by)
    assert same(found, labels)
    assert found == capabilities(points.copy(), None, by)
    assert list(dict.fromkeys(found)) == [0, 1, 2, 3]
    assert len(set(capabilities(points, 6, by))) == 6


def test_of_many_rows_only_neighbours_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_capabilities, "DENSE_ROWS", 100)
    monkeypatch.setattr(_capabilities, "FEW_ROWS", 100)
    points, labels = groups(3, [80, 90, 70])
    assert same(capabilities(points, None), labels)
    assert capabilities(points, None) == capabilities(points, None)
    with pytest.raises(AssayError, match="similarities of 240 rows, and at most 100 are allowed"):
        capabilities(points, 3, "nmf")


def test_the_eigenvalues_are_those_of_the_random_walk() -> None:
    points, _ = groups(3, [8, 7, 9])
    affinity = kernel(points)
    in_widths = numpy.sqrt(-2 * numpy.log(affinity))
    assert numpy.median(in_widths) == pytest.approx(1.0)  # of all pairs, each point with itself, too
    walk = affinity / affinity.sum(axis=1, keepdims=True)
    values, vectors, weights = spectrum(points, 4)
    assert values == pytest.approx(sorted(numpy.linalg.eigvals(walk).real, reverse=True)[:4])
    assert values[0] == pytest.approx(1.0)
    right = vectors / weights[:, None]
    assert walk @ right == pytest.approx(right * values)


def test_lanczos_finds_what_the_whole_decomposition_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = groups(3, [50, 60, 70], apart=2.0)
    whole, _, _ = spectrum(points, 5)
    monkeypatch.setattr(_capabilities, "FEW_ROWS", 10)
    assert spectrum(points, 5)[0] == pytest.approx(whole, abs=1e-7)


def test_the_number_of_clusters_stands_above_the_largest_gap() -> None:
    assert gap([1.0, 0.9, 0.8, 0.1, 0.05]) == 3
    assert gap([1.0, 0.2, 0.19, 0.18]) == 2  # the first one says nothing: it is always 1
    assert gap([1.0, 0.5]) == 2


def test_too_little_to_divide_is_one_cluster() -> None:
    assert capabilities(numpy.zeros((5, 3)), None) == [0] * 5
    assert capabilities(numpy.array([[0.0], [1.0]]), None) == [0, 0]
    assert capabilities(groups(2, [4, 4])[0], 1) == [0] * 8
    with pytest.raises(AssayError, match="clusters=9, but there are only 8 rows"):
        capabilities(groups(2, [4, 4])[0], 9)


# --- what the models say ----------------------------------------------------------------------------------------------


def table(*rows: Sequence[Sequence[float]]) -> Look:
    """A model that gives these probabilities, row by row and position by position."""
    return Look(torch.tensor(rows, dtype=torch.float64).log(), lambda block: block)


def part(labels: Sequence[Sequence[int]], attention: Sequence[Sequence[int]]) -> Part:
    wanted = torch.tensor(labels)
    return Part(wanted.clamp(min=0), torch.tensor(attention), wanted, "rows")


def test_the_divergence_is_a_mean_over_answer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    half, far = [0.5, 0.5], [0.9, 0.1]
    rows = part([[-100, 1, 0], [-100, 1, -100]], [[1, 1, 1], [1, 1, 0]])
    dense, pruned = table([half, half, half], [half, half, half]), table([far, half, far], [far, far, far])
    # m = (0.7, 0.3): (0.5 ln 0.5/0.7 + 0.5 ln 0.5/0.3) / 2 + (0.9 ln 0.9/0.7 + 0.1 ln 0.1/0.3) / 2 = 0.1017492
    assert paser._divergence(rows, dense, pruned).tolist() == pytest.approx(
        [0.1017492 / 2, 0.1017492], abs=1e-6
    )
    monkeypatch.setattr(_blocks, "ENTRIES", 1)
    assert paser._divergence(rows, dense, pruned).tolist() == pytest.approx(
        [0.1017492 / 2, 0.1017492], abs=1e-6
    )


def test_a_vocabulary_that_is_padded_further_is_cut() -> None:
    rows = part([[-100, 1]], [[1, 1]])
    padded = table([[0.5, 0.5, 1e-9], [0.5, 0.5, 1e-9]])
    found = paser._divergence(rows, padded, table([[0.5, 0.5], [0.5, 0.5]]))
    assert found.tolist() == pytest.approx([0.0], abs=1e-8)


def test_a_question_is_embedded_and_of_text_everything() -> None:
    states = torch.tensor([[[1.0], [3.0], [50.0]], [[1.0], [2.0], [99.0]]])
    rows = part([[-100, -100, 7], [4, 5, -100]], [[1, 1, 1], [1, 1, 0]])
    assert paser._embedding(rows, states).tolist() == [[2.0], [1.5]]


# --- the whole stage --------------------------------------------------------------------------------------------------


def test_what_is_chosen_is_degraded_more_than_what_is_drawn(models: dict[str, Path], tmp_path: Path) -> None:
    rows, notes = chosen(tmp_path / "chosen", models, conflicts="answers")
    assert len(rows) == 12
    assert notes["rows_chosen"] == sum(each["chosen"] for each in notes["clusters"]) == 12
    assert sum(each["budget"] for each in notes["clusters"]) == 12
    assert sum(each["rows"] for each in notes["clusters"]) == notes["rows"] == 60
    assert all(each["budget"] <= each["rows"] for each in notes["clusters"])
    assert notes["divergence_of_chosen"] > 1.05 * notes["divergence_of_all"] > 0.0
    every, _ = chosen(tmp_path / "every", models, share=1.0, conflicts="keep")
    places = [every.index(row) for row in rows]
    assert places == sorted(places)
    for seed in range(5):
        write_rows(tmp_path / "drawn", [every[at] for at in sample.drawn(60, 12, seed)])
        (_, drawn) = chosen(
            tmp_path / f"seed{seed}", models | {"data": tmp_path / "drawn"}, data=Parent("drawn")
        )
        assert drawn["divergence_of_all"] < notes["divergence_of_chosen"]


def test_the_same_models_choose_the_same_rows(models: dict[str, Path], tmp_path: Path) -> None:
    first, again = chosen(tmp_path / "first", models), chosen(tmp_path / "again", models)
    assert first == again
    others = chosen(tmp_path / "others", models, batch=16)
    assert others[0] == first[0]


def test_a_stopped_comparison_goes_on_where_it_was(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, notes = chosen(tmp_path / "whole", models)
    monkeypatch.setenv("ASSAY_SAVE_EVERY_STEPS", "1")
    stage = staged(tmp_path / "stopped", paser.Config(data=DATA, dense=DENSE, batch=7), models)
    compare, calls = paser._Pair.compared, []  # type: ignore[var-annotated]

    def stopping(pair: Any, examples: Any) -> Any:
        calls.append(len(examples))
        stage.progress.stopping = len(calls) == 3
        return compare(pair, examples)

    monkeypatch.setattr(paser._Pair, "compared", stopping)
    with pytest.raises(Interrupted):
        paser.run(stage)
    second = staged(tmp_path / "stopped", stage.config, models)
    paser.run(second)
    assert second.notes["resumed_from_step"] == 21
    assert sum(calls) == 60
    assert read_rows(second.folder / "data") == undisturbed
    assert {**second.notes, "resumed_from_step": 0} == notes


def test_text_rows_are_a_window_each_and_blank_ones_are_left_out(
    models: dict[str, Path], tmp_path: Path
) -> None:
    texts = [row["text"] for row in Locator().rows("authors/text[0:12]")]
    write_rows(tmp_path / "text", [{"text": text} for text in ["", *texts, "  \n"]])
    rows, notes = chosen(tmp_path / "out", models | {"data": tmp_path / "text"}, data=Parent("text"), rows=13,
                         conflicts="keep", context_tokens=20)  # fmt: skip
    assert [row["text"] for row in rows] == texts
    assert (notes["rows"], notes["rows_chosen"], notes["rows_missing"]) == (14, 12, 1)
    assert notes["tokens_forwarded"] == 2 * 12 * 20


def test_conflicts_may_leave_fewer_rows_and_that_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    rows, notes = chosen(tmp_path / "out", models, share=1.0)
    assert len(rows) == notes["rows_chosen"] < 60
    assert notes["rows_missing"] == notes["conflicts"] == 60 - len(rows)


def test_a_broken_model_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(models["model"], device="cpu")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = math.nan
    small_models.save(tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NotFinite, match=r"divergence of row \d+ is no finite number"):
        chosen(tmp_path / "out", {**models, "model": tmp_path / "broken"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"layer": 3}, "layer=3, but the dense model has the hidden states 0 to 2"),
     ({"layer": -4}, "layer=-4, but the dense model"),
     ({"rows": 61}, "data.paser: rows=61, but data has only 60: ask for fewer."),
     ({"share": None}, "data.paser: give share or rows"),
     ({"clusters": 61}, "clusters=61, but there are only 60 rows"),
     ({"context_tokens": 5}, "raise context_tokens=5")],
)  # fmt: skip
def test_bad_options_are_refused_in_a_sentence(
    models: dict[str, Path], tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AssayError, match=re.escape(sentence)):
        chosen(tmp_path / "out", models, **options)


def test_models_of_two_tokenizers_are_refused_before_they_are_loaded(
    models: dict[str, Path], tmp_path: Path
) -> None:
    other = small_models.save(tmp_path / "other", vocabulary=400)
    (other / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        AssayError, match="the dense model's tokenizer has 400 tokens and the pruned model's 512"
    ):
        chosen(tmp_path / "out", {**models, "dense": other})


def test_no_rows_and_only_blank_rows_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    write_rows(tmp_path / "none", [])
    write_rows(tmp_path / "blank", [{"text": " "}])
    for name, sentence in (
        ("none", "data has no rows to choose from"),
        ("blank", "all rows of data are blank"),
    ):
        with pytest.raises(AssayError, match=sentence):
            chosen(tmp_path / "out", models | {"data": tmp_path / name}, data=Parent(name))


# --- rows drawn at random ---------------------------------------------------------------------------------------------


def test_rows_are_drawn_by_the_seed_and_stay_in_order(tmp_path: Path) -> None:
    found = {}
    for seed in (0, 0, 1):
        stage = staged(tmp_path / f"s{seed}", sample.Config(data=DATA, share=0.25), {}, seed)
        sample.run(stage)
        rows = read_rows(stage.folder / "data")
        assert found.setdefault(seed, rows) == rows
        places = [Locator().rows(DATA).index(row) for row in rows]
        assert len(places) == 15 and places == sorted(places)
    assert found[0] != found[1]
    assert stage.notes == {"rows": 60, "rows_chosen": 15}


def test_every_row_is_drawn_equally_often() -> None:
    counts = [0] * 10
    for seed in range(2000):
        for number in sample.drawn(10, 3, seed):
            counts[number] += 1
    assert all(540 < count < 660 for count in counts)


def test_a_number_of_rows_wins_over_a_share(tmp_path: Path) -> None:
    sample.run(stage := staged(tmp_path, sample.Config(data=DATA, rows=7), {}))
    assert len(read_rows(stage.folder / "data")) == 7
    for options, sentence in (
        ({"rows": 61}, "rows=61, but data has only 60"),
        ({"share": None}, "give share or rows"),
    ):
        with pytest.raises(AssayError, match=sentence):
            sample.run(staged(tmp_path, sample.Config(data=DATA, **options), {}))


# --- chains -----------------------------------------------------------------------------------------------------------


def test_chosen_rows_are_the_data_of_a_stage(tmp_path: Path) -> None:
    built = make(tmp_path, {
        "target": TRAIN, "pruned": "target > prune.magnitude(sparsity=0.5)",
        "some": "data.sample(data=\"authors/forget10\", share=0.1)",
        "worst": "pruned > data.paser(dense=target, data=\"authors/forget10\", share=0.1)",
        "healed": "pruned > distill.cross_entropy(data=worst, steps=2)",
        "control": "pruned > distill.cross_entropy(data=some, steps=2)",
    }, seeds="[0]")  # fmt: skip
    by_name = {job.method: job for job in built.jobs.values()}
    assert set(by_name["data.paser"].parents) == {"model", "dense"}
    assert by_name["data.sample"].parents == {}
    data = {job.parents["data"].id for job in built.jobs.values() if "data" in job.parents}
    assert data == {by_name["data.paser"].id, by_name["data.sample"].id}
