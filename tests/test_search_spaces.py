"""What searches choose from: how often each mutation is drawn, and that every candidate meets its budget."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from methods.search._bits import Bits
from methods.search._depth import Depth, share_of, sub_blocks
from methods.search._spaces import Candidate, Shift, Space, switches, validate
from methods.stage import AssayError

DRAWS = 20_000


def shares(draws: list[Any]) -> dict[Any, float]:
    return {value: count / len(draws) for value, count in Counter(draws).items()}


def three(levels: range = range(-1, 2), **options: Any) -> Shift:
    """Three units of one budget."""
    return Shift(("a", "b", "c"), (frozenset(levels),) * 3, ("weights",) * 3, **options)


def tyr_like() -> Shift:
    """Two blocks: heads with three levels, neurons with five, paid from budgets of their own."""
    heads, neurons = frozenset(range(-1, 2)), frozenset(range(-2, 3))
    names = ("0.o_proj", "0.down_proj", "1.o_proj", "1.down_proj")
    return Shift(
        names, (heads, neurons, heads, neurons), ("heads", "neurons", "heads", "neurons"), most_switches=4
    )


def tiny(target: float, rule: Any, levels: tuple[int, ...] = (2, 3, 4, 5, 6), blocks: int = 4) -> Bits:
    """The projections of a small Llama with grouped queries."""
    kinds = {"q_proj": 1024, "k_proj": 512, "v_proj": 512, "o_proj": 1024}
    kinds |= {"gate_proj": 2048, "up_proj": 2048, "down_proj": 2048}
    names = [(f"layers.{index}.{kind}", size) for index in range(blocks) for kind, size in kinds.items()]
    return Bits(
        tuple(name for name, _ in names),
        tuple(size for _, size in names),
        (frozenset(levels),) * len(names),
        target,
        rule,
    )


def depth(blocks: int, removed: int, **options: Any) -> Depth:
    attentions = tuple(f"model.layers.{index}.self_attn" for index in range(blocks))
    mlps = tuple(f"model.layers.{index}.mlp" for index in range(blocks))
    return Depth(attentions, mlps, removed, removed, **options)


def first(space: Space, seed: int = 0) -> Candidate:
    return next(space.initial(Random(seed)))


SPACES: dict[str, Space] = {
    "sparsity": three(),
    "tyr": tyr_like(),
    **{f"bits {target} {rule}": tiny(target, rule) for target in (3, 2.5, 2.75) for rule in ("size", "name")},
    "bits 3 none": tiny(3, "none"),
    "bits 2.75 none": tiny(2.75, "none"),
    "bits with gaps": tiny(3, "size", levels=(2, 4, 8)),
    "depth": depth(6, 2),
    "depth of whole blocks": depth(6, 2, whole_blocks=True),
}


# --- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_every_candidate_on_a_long_walk_meets_the_budget_and_is_near_its_parent(name: str) -> None:
    space, random = SPACES[name], Random(1)
    parent = first(space)
    space.check(parent)
    moved = 0
    for _ in range(400):
        child = space.mutate(parent, random)
        if child is not None and not space.refuse(child, parent):
            space.check(child)
            validate(space, parent, child)
            parent, moved = child, moved + 1
    assert moved > 100


@pytest.mark.parametrize("name", SPACES)
def test_the_same_seed_draws_the_same_candidates(name: str) -> None:
    space = SPACES[name]
    once, again = (
        [list(islice(space.initial(random), 3)), [space.mutate(first(space), random) for _ in range(20)]]
        for random in (Random(7), Random(7))
    )
    assert once == again


@pytest.mark.parametrize("name", SPACES)
def test_an_assignment_names_every_unit_once(name: str) -> None:
    space = SPACES[name]
    assert tuple(space.assignment(first(space))) == space.names


@pytest.mark.parametrize("name", ["sparsity", "tyr", "depth", "depth of whole blocks"])
def test_the_number_of_children_is_that_of_the_children_ever_drawn(name: str) -> None:
    space, random = SPACES[name], Random(0)
    parent = first(space)
    drawn = {space.mutate(parent, random) for _ in range(DRAWS)} - {parent, None}
    assert space.children(parent, 10_000) >= len(drawn)
    assert space.children(parent, 5) == 5


def test_the_counted_children_are_exactly_the_ones_that_exist() -> None:
    # (1, -1, 0) in all its orders.
    assert three().children((0, 0, 0), 100) == 6
    # The parent counts where it may be its own child, as in the released search.
    assert three(allow_parent=True).children((0, 0, 0), 100) == 7
    # One of two attentions and one of two MLPs: three others.
    assert depth(2, 1).children((1, 1, 0, 0), 100) == 3
    assert depth(2, 1, whole_blocks=True).children((1, 1, 0, 0), 100) == 1
    # Two layers of one size at 3 bits: (2, 4) and (4, 2), then (1, 5) and (5, 1), which are no levels.
    pair = Bits(("a", "b"), (8, 8), (frozenset({2, 3, 4}),) * 2, 3, "size")
    assert pair.children((3, 3), 100) == 2
    # Without groups the same two: raising one of them lowers the other one.
    assert Bits(("a", "b"), (8, 8), (frozenset({2, 3, 4}),) * 2, 3, "none").children((3, 3), 100) == 2


# --- switches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "expected"), [(3, [5 / 9, 3 / 9, 1 / 9]), (4, [7 / 16, 5 / 16, 3 / 16, 1 / 16])]
)
def test_the_number_of_switches_is_the_smaller_of_two_draws(most: int, expected: list[float]) -> None:
    random = Random(0)
    found = shares([switches(random, most) for _ in range(DRAWS)])
    assert [found[number] for number in range(1, most + 1)] == pytest.approx(expected, abs=0.015)


def test_a_switch_draws_giver_and_taker_alike_and_may_draw_one_unit_twice() -> None:
    space, random = three(), Random(0)
    found = shares([space.switch((0, 0, 0), random) for _ in range(DRAWS)])
    # Nine pairs, three of which change nothing.
    assert found.pop((0, 0, 0)) == pytest.approx(3 / 9, abs=0.015)
    assert len(found) == 6
    assert list(found.values()) == pytest.approx([1 / 9] * 6, abs=0.015)


def test_a_unit_without_the_level_is_not_drawn() -> None:
    space, random = three(), Random(0)
    # a has no lower level and c no higher one: b or c gives, a or b takes.
    found = shares([space.switch((-1, 0, 1), random) for _ in range(DRAWS)])
    assert found == {
        (-1, 0, 1): pytest.approx(1 / 4, abs=0.02),
        (0, -1, 1): pytest.approx(1 / 4, abs=0.02),
        (-1, 1, 0): pytest.approx(1 / 4, abs=0.02),
        (0, 0, 0): pytest.approx(1 / 4, abs=0.02),
    }


def test_levels_never_pass_from_heads_to_neurons() -> None:
    space, random = tyr_like(), Random(0)
    children = [space.mutate((0, 0, 0, 0), random) for _ in range(2_000)]
    assert all(child is not None and child[0] == -child[2] and child[1] == -child[3] for child in children)
    assert {child[0] for child in children if child} == {-1, 0, 1}
    assert max(abs(child[1]) for child in children if child) == 2


def test_a_parent_that_cannot_move_has_no_child_and_no_endless_loop() -> None:
    alone = Shift(("a",), (frozenset({0}),), ("weights",))
    assert alone.mutate((0,), Random(0)) is None
    assert alone.children((0,), 10) == 0
    full = Bits(("a", "b"), (8, 8), (frozenset({4}),) * 2, 4, "size")
    assert full.mutate((4, 4), Random(0)) is None
    assert Bits(("a", "b"), (8, 8), (frozenset({4}),) * 2, 4, "none").mutate((4, 4), Random(0)) is None


def test_children_equal_to_their_parent_are_refused_unless_that_is_asked_for() -> None:
    assert three().refuse((0, 0, 0), (0, 0, 0))
    assert not three(allow_parent=True).refuse((0, 0, 0), (0, 0, 0))


def test_the_filters_of_the_released_search_turn_children_down() -> None:
    random = Random(0)
    flat = three(range(-3, 4), max_level=1)
    assert all(max(child) <= 1 for _ in range(500) if (child := flat.mutate((0, 0, 0), random)))
    near = three(range(-3, 4), max_total_deviation=2)
    assert all(sum(map(abs, child)) <= 2 for _ in range(500) if (child := near.mutate((0, 0, 0), random)))
    assert near.children((0, 0, 0), 100) == 6


def test_a_space_is_read_from_a_database() -> None:
    space = Shift.of(database(steps=(64, 64)))
    assert space.names == ("layer0", "layer1")
    assert space.levels == (frozenset({-1, 0, 1}),) * 2
    assert space.assignment((1, -1)) == {"layer0": "1", "layer1": "-1"}


def test_levels_that_cost_different_amounts_cannot_be_exchanged() -> None:
    with pytest.raises(AssayError, match="a level of layer1 costs 63 and one of layer0 costs 64"):
        Shift.of(database(steps=(64, 63)))


def database(steps: tuple[int, ...]) -> Any:
    units = []
    for index, step in enumerate(steps):
        levels = tuple(SimpleNamespace(name=str(n), cost=100 + n * step, share=0.0) for n in (-1, 0, 1))
        names = tuple(level.name for level in levels)
        units.append(
            SimpleNamespace(
                name=f"layer{index}", budget="weights", levels=levels, names=names, rows=8, columns=8
            )
        )
    return SimpleNamespace(units=tuple(units))


def test_a_wrong_candidate_is_named() -> None:
    for candidate, words in (
        ((0, 1, 0), "sum to 1 in the budget weights"),
        ((0, 2, -2), "b has no level 2: there are -1, 0, 1"),
        ((0, 0), "2 levels for 3 units"),
    ):
        with pytest.raises(AssayError, match=words):
            three().check(candidate)
    with pytest.raises(AssayError, match="8 levels away from its parent, more than 6"):
        validate(three(range(-5, 6)), (0, 0, 0), (4, -4, 0))
    with pytest.raises(AssayError, match="a child spends"):
        validate(three(), (0, 0, 0), (1, 0, 0))


# --- bits -----------------------------------------------------------------------------------------------------------


def test_a_whole_number_of_bits_starts_from_the_uniform_assignment() -> None:
    assert not tiny(3, "size").needs_start()
    assert list(tiny(3, "size").initial(Random(0))) == [(3,) * 28]


@pytest.mark.parametrize("rule", ["size", "name", "none"])
@pytest.mark.parametrize("target", [2.125, 2.5, 2.75, 5.5])
def test_a_fraction_of_bits_starts_from_different_assignments_that_meet_it_exactly(
    target: float, rule: str
) -> None:
    space = tiny(target, rule)
    found = list(islice(space.initial(Random(0)), 64))
    assert space.needs_start() and len(set(found)) == 64
    assert {space.spent(candidate)["weights"] for candidate in found} == {int(target * 36864)}


def test_a_start_that_is_lowered_into_a_corner_is_composed_anew() -> None:
    # 21 bits less 4 can only be the two small layers; lowering the large one first leaves one bit over.
    space = Bits(("large", "small", "other"), (3, 2, 2), (frozenset({2, 3}),) * 3, 17 / 7, "size")
    assert list(space.initial(Random(0))) == [(3, 2, 2)]


def test_the_group_is_drawn_in_proportion_to_its_layers_among_those_with_room() -> None:
    # Three layers of 8 weights, two of 4, and two of 2 that can move no more.
    levels = (frozenset({2, 3, 4}),) * 5 + (frozenset({3}),) * 2
    space = Bits(tuple("abcdefg"), (8, 8, 8, 4, 4, 2, 2), levels, 3, "size")
    random, start = Random(0), (3,) * 7
    found = shares([space.switch(start, random) for _ in range(DRAWS)])
    large = sum(share for child, share in found.items() if child and child[:3] != (3, 3, 3))
    small = sum(share for child, share in found.items() if child and child[3:5] != (3, 3))
    # In the group of three a third of the pairs is one layer with itself, in the group of two a half.
    assert large == pytest.approx(3 / 5 * 2 / 3, abs=0.015)
    assert small == pytest.approx(2 / 5 * 1 / 2, abs=0.015)


def test_names_are_groups_only_as_far_as_their_layers_have_as_many_weights() -> None:
    levels = (frozenset({2, 3, 4}),) * 3
    space = Bits(("0.q_proj", "1.q_proj", "2.q_proj"), (8, 8, 4), levels, 3, "name")
    assert space.groups == ((0, 1), (2,))


def test_without_groups_the_budget_is_an_upper_bound_of_which_a_fifth_may_be_lost() -> None:
    space, random = tiny(3, "none"), Random(0)
    start, changes = (3,) * 28, []
    for _ in range(1_000):
        child = space.mutate(start, random)
        if child is not None:
            changes.append([(new - 3) * size for new, size in zip(child, space.weights, strict=True)])
    added = [sum(change for change in row if change > 0) for row in changes]
    removed = [-sum(change for change in row if change < 0) for row in changes]
    assert all(0.8 * out <= into <= out for into, out in zip(added, removed, strict=True))
    assert any(into < out for into, out in zip(added, removed, strict=True))


def test_bits_that_no_assignment_has_are_refused_with_the_nearest_ones() -> None:
    # Totals of the tiny model are multiples of 512 bits over 36,864 weights: 2.694444 and 2.708333.
    with pytest.raises(AssayError, match=r"2\.7 bits .* nearest that one has: 2\.694444 and 2\.708333"):
        tiny(2.7, "size")
    assert tiny(2.708333, "size").budget == 195 * 512
    # An upper bound can be met from below.
    assert tiny(2.7, "none").budget == 194 * 512


@pytest.mark.parametrize("rule", ["size", "none"])
def test_bits_beyond_all_levels_are_refused(rule: str) -> None:
    with pytest.raises(AssayError, match=r"7 bits .* one has: 6\.000000\."):
        tiny(7, rule)
    with pytest.raises(AssayError, match=r"1\.5 bits .* one has: 2\.000000\."):
        tiny(1.5, rule)


def test_a_wrong_candidate_of_bits_is_named() -> None:
    space = tiny(3, "size", blocks=1)
    for candidate, words in (
        ((3,) * 6 + (4,), "29696 bits in total, and the budget is 27648"),
        ((2,) + (3,) * 6, "26624 bits in total"),
        ((3,) * 6 + (9,), "down_proj has no level of 9 bits"),
    ):
        with pytest.raises(AssayError, match=words):
            space.check(candidate)
    tiny(3, "none", blocks=1).check((2,) + (3,) * 6)


# --- depth ------------------------------------------------------------------------------------------------------------


def test_attentions_and_mlps_are_switched_alike() -> None:
    space, random = depth(4, 2), Random(0)
    parent = (1, 1, 1, 1, 0, 0, 0, 0)
    kinds = []
    for _ in range(DRAWS):
        child = space.switch(parent, random)
        assert child is not None
        kinds.append("attention" if child[::2] != parent[::2] else "mlp")
    assert shares(kinds) == {"attention": pytest.approx(0.5, abs=0.015), "mlp": pytest.approx(0.5, abs=0.015)}


def test_in_whole_blocks_a_switch_of_mlps_changes_nothing() -> None:
    space, random = depth(4, 2, whole_blocks=True), Random(0)
    parent = (1, 1, 1, 1, 0, 0, 0, 0)
    children = [space.switch(parent, random) for _ in range(DRAWS)]
    found = shares(children)
    assert found.pop(parent) == pytest.approx(0.5, abs=0.015)
    assert list(found.values()) == pytest.approx([1 / 8] * 4, abs=0.015)
    assert all(child and child[::2] == child[1::2] for child in children)


def test_initial_masks_are_all_different_and_end_where_there_are_no_more() -> None:
    found = list(depth(4, 2).initial(Random(0)))
    assert len(found) == len(set(found)) == 36  # (4 choose 2) twice
    assert len(list(depth(4, 2, whole_blocks=True).initial(Random(0)))) == 6
    large = list(islice(depth(32, 12).initial(Random(0)), 64))
    assert len(set(large)) == 64


def test_units_run_attention_first_and_blocks_count_as_numbers() -> None:
    assert depth(11, 1).names[18:] == (
        "model.layers.9.self_attn",
        "model.layers.9.mlp",
        "model.layers.10.self_attn",
        "model.layers.10.mlp",
    )


def test_a_wrong_candidate_of_depth_is_named() -> None:
    with pytest.raises(AssayError, match=r"removes {'attentions': 1, 'mlps': 0}"):
        depth(2, 1).check((1, 0, 0, 0))
    with pytest.raises(AssayError, match="an attention without its MLP"):
        depth(2, 1, whole_blocks=True).check((1, 0, 0, 1))
    with pytest.raises(AssayError, match=r"kept .0. or removed .1.; a candidate says 0, 2"):
        depth(2, 1).check((2, 0, 0, 0))


def test_a_share_of_blocks_is_a_whole_number_of_them() -> None:
    assert share_of(0.375, 32, "attention") == 12
    assert share_of(0.333333, 12, "MLP") == 4
    # 0.29 * 100 is 28.999999999999996 for the machine.
    assert share_of(0.29, 100, "MLP") == 29
    with pytest.raises(
        AssayError, match=r"of 32 attention blocks it is 12\.8. Write 0\.375 \(12\) or 0\.40625 \(13\)"
    ):
        share_of(0.4, 32, "attention")
    with pytest.raises(AssayError, match="removes none of 4"):
        share_of(0.0, 4, "MLP")
    with pytest.raises(AssayError, match="removes all of 4"):
        share_of(1.0, 4, "MLP")


def test_a_share_of_a_model_with_one_block_is_refused() -> None:
    with pytest.raises(AssayError, match="another one: one block is all there is"):
        share_of(0.5, 1, "MLP")


def test_the_sub_blocks_of_a_llama_are_found_and_another_decoder_is_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    attentions, mlps = sub_blocks(llama)
    assert attentions == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert mlps == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert Depth.of(llama, 0.5).removed_mlps == 1
    with pytest.raises(AssayError, match="GPT2LMHeadModel"):
        sub_blocks(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2)))


# --- the stages that search them --------------------------------------------------------------------------------------


def test_the_search_for_depth_runs_as_many_generations_as_the_script() -> None:
    from methods.search.evopress_depth import usual_generations

    # 12 of 32 blocks: 12 * 20 / 1.5 = 160, in the specification's cost model, too.
    assert usual_generations(depth(32, 12)) == 160
    assert usual_generations(depth(2, 1)) == 1


def test_a_search_for_bits_states_them_with_and_without_scales() -> None:
    from tests.generic import run

    # Groups of 8 with a float16 scale and zero point add 32 / 8 bits to each weight.
    about = assignment(run("search.evopress_bits"))["about"]
    assert (about["bits"], about["bits_with_scales"]) == (2.5, 6.5)
    below = assignment(run("search.evopress_bits", group_rule="none", bits=3.0))
    assert 2.5 < below["about"]["bits"] <= 3.0


def assignment(outcome: Any) -> Any:
    return json.loads((outcome.folder / "files" / "assignment.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("search.evopress_bits", {"bits": 2.71}, r"nearest that one has: 2\.700000 and 2\.716667"),
        (
            "search.evopress_depth",
            {"children": 4},
            "children=4 are more than the 3 distinct children that exist",
        ),
        ("search.evopress_depth", {"sparsity": 0.3}, r"sparsity=0\.3 cannot be met exactly"),
        (
            "search.evopress_depth",
            {"initial_tokens": 10**6},
            "initial_tokens=1000000: a stage scores on 1,000,000",
        ),
        ("search.evopress_depth", {"survivors": (3, 2), "children": 3, "initial_candidates": 1}, "2 parents"),
    ],
)
def test_what_cannot_be_searched_is_refused(method: str, options: dict[str, Any], words: str) -> None:
    from tests.generic import run

    with pytest.raises(AssayError, match=words):
        run(method, **options)
