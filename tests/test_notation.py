"""The notation of chains: what it reads, what it refuses, and that it writes back what it read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.stage import AssayError
from workflows.notation import Call, Chain, Choice, Name, expand, format_value, parse, parse_call, parse_name


def test_a_chain_is_read_in_written_order() -> None:
    chain = parse("target > prune.evopress(sparsity=0.5, seed=-1) > unlearn.satimp")
    assert chain == Chain(
        Name("target"), (Call("prune.evopress", (("sparsity", 0.5), ("seed", -1))), Call("unlearn.satimp"))
    )


def test_components_references_and_texts_are_told_apart() -> None:
    (stage,) = parse(
        'base > train.sft(data="authors/full", head=euclidean(exponent=64), teacher=target)'
    ).stages
    assert isinstance(stage, Call)
    assert dict(stage.options) == {
        "data": "authors/full",
        "head": Call("euclidean", (("exponent", 64),)),
        "teacher": Name("target"),
    }


def test_pins_name_a_member_a_seed_and_a_step() -> None:
    assert parse_name("pruned[sparsity=0.5]@0") == Name("pruned", (("sparsity", 0.5),), 0)
    assert parse_name("direct@step40") == Name("direct", (), None, 40)
    assert parse_name("direct@steps") == Name("direct", steps=True)
    assert parse('x > a.b(tasks=["p[q]", "r"], c=pruned[stage="a.b"])').stages[0] == Call(
        "a.b", (("tasks", ("p[q]", "r")), ("c", Name("pruned", (("stage", "a.b"),))))
    )


@pytest.mark.parametrize("step", ["@step40", "@steps"])
def test_seed_and_step_are_read_in_either_order_and_written_seed_first(step: str) -> None:
    one, other = parse_name(f"pruned[sparsity=0.5]@0{step}"), parse_name(f"pruned[sparsity=0.5]{step}@0")
    assert one == other and format_value(one) == f"pruned[sparsity=0.5]@0{step}"


def test_several_sweeps_multiply_with_the_last_running_fastest() -> None:
    members = expand(parse("t > a.b(x={1, 2}) > c.d(y={True, None})"))
    assert [assignment for assignment, _ in members] == [
        (("x", 1), ("y", True)),
        (("x", 1), ("y", None)),
        (("x", 2), ("y", True)),
        (("x", 2), ("y", None)),
    ]


def test_stages_and_components_can_be_swept() -> None:
    stages = expand(parse("t > {unlearn.npo, unlearn.satimp(beta1=6.0)}"))
    assert [chain.stages[0] for _, chain in stages] == [
        Call("unlearn.npo"),
        Call("unlearn.satimp", (("beta1", 6.0),)),
    ]
    inner = expand(parse("t > a.b(optimizer=adamw(learning_rate={0.1, 0.2}))"))
    assert [assignment for assignment, _ in inner] == [(("learning_rate", 0.1),), (("learning_rate", 0.2),)]


def test_a_stage_of_a_sweep_may_have_sweeps_of_its_own() -> None:
    members = expand(parse("t > {unlearn.npo(alpha={1, 5}), unlearn.satimp} > c.d(x={2, 3})"))
    found = [format_value(chain.stages[0]) for _, chain in members]
    assert found == [*["unlearn.npo(alpha=1)"] * 2, *["unlearn.npo(alpha=5)"] * 2, *["unlearn.satimp"] * 2]
    assert dict(members[0][0])["stage"] == Call("unlearn.npo", (("alpha", 1),))


def test_two_sweeps_of_one_option_name_keep_apart() -> None:
    members = expand(parse("t > a.b(x={1, 2}) > c.d(x={3, 4})"))
    assert [key for key, _ in members[0][0]] == ["a_b_x", "c_d_x"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "this one is empty"),
        ("a >> b.c", "a chain begins with"),
        ("a < b.c", "joined by '>'"),
        ("a > b.c(1)", "option=value"),
        ("a > b.c(x=1, x=2)", "given twice"),
        ("a > b.c(x=1e999)", "finite"),
        ("a > b.c(x=1j)", "finite"),
        ("a > b.c(x=b'1')", "finite"),
        ("a > b.c(x={1, 1.0})", "twice"),
        ("a > b.c(x={y(z=1), y(z=1)})", "twice"),
        ("a > b.c(x=[{1, 2}])", "inside a list"),
        ("a > b.c(x={1: 2})", "plain texts"),
        ("a > b.c(x={'$component': 'y'})", "plain texts"),
        ("a > b.c(x={'k': 1, 'k': 2})", "twice"),
        ("a > b.c(**d)", "**"),
        ("a > b.c(", "single quotes"),
        ("a > (lambda: 1)", "a stage is written"),
        ("a > b.c(x=[y for y in z])", "a value is text"),
        ("a > b.c(x=f'{y}')", "a value is text"),
        ("a > b.c(x=__import__('os').system('true'))", "a stage is written"),
        ("a > b.c(x=y[0])", "member of a family"),
        ("a > b.c(x=not True)", "a value is text"),
        ("a > b.c(x=-'y')", "before a number"),
        ("a@b > c.d", "'@' is followed by"),
        ("a@1.5 > c.d", "'@' is followed by"),
        ("a@stepone > c.d", "'@' is followed by"),
        ("a@1@2 > c.d", "the seed is given twice"),
        ("a@step1@steps > c.d", "the step is given twice"),
        ("a > b.c; import os", "cannot be read"),
        ("a" * 4001, "4000 characters"),
        ("(" * 250 + "a" + ")" * 250, "nested"),
        ("a > b.c(x=" + "[" * 1500 + "]" * 1500 + ")", "nested"),
        ("a > b.c(x=" + "-" * 3000 + "1)", "nested"),
    ],
)
def test_everything_else_is_refused_with_a_sentence(text: str, part: str) -> None:
    with pytest.raises(AssayError) as caught:
        parse(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_evaluation_cannot_be_swept() -> None:
    with pytest.raises(AssayError, match="cannot be swept"):
        parse_call("{speed, size}")


numbers = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
plain = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts.filter(lambda text: not text.startswith("$")), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), values), max_size=4, unique_by=lambda pair: pair[0]))
def test_what_is_written_back_reads_as_the_same_chain(options: list[tuple[str, object]]) -> None:
    call = Call("a.b", tuple(options))
    text = f"base > {format_value(call)}"
    if len(text) <= 4000:
        assert parse(text) == Chain(Name("base"), (call,))


def test_a_sweep_is_written_back_as_a_set() -> None:
    assert format_value(Choice((0.5, "x", Call("y", (("z", None),))))) == '{0.5, "x", y(z=None)}'
    assert format_value(parse_call('tofu(split="forget10")')) == 'tofu(split="forget10")'
