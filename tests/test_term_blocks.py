"""Terms computed block by block against plain autograd on all logits: values and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.architectures import with_head, without_head
from methods.data import Part
from methods.distill._mixture import Mixture
from methods.distill._sources import Ensemble, Live, places
from methods.gradient import Gradient
from methods.stage import AssayError, Component, Term
from methods.term import Entry, Flags, Look, Softened, Tokens, View, Weighted, flags, of, weight_of
from methods.term._blocks import Moment, Pull, look, separable
from methods.terms import total

VOCABULARY, WIDTH = 7, 4
BLOCKS = [1, 3, None]
TERMS = (
    of("forward_kl", weight=0.5, temperature=2.0),
    of("cross_entropy", weight=0.3),
    of("forward_kl", positions="all"),
)


class Small(nn.Module):
    """An embedding and an output layer, which may be the same matrix, and a square in between."""

    def __init__(
        self, tied: bool = False, bias: bool = False, cap: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=torch.float64)
        if tied:
            self.head.weight = self.embedding.weight
        self.config = SimpleNamespace(final_logit_softcapping=cap)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        states = self.embedding(input_ids)
        logits = self.head(states + states.square())
        cap = self.config.final_logit_softcapping
        return SimpleNamespace(logits=logits if cap is None else cap * (logits / cap).tanh())


def part_of(rows: int = 4, width: int = 6, name: str = "train") -> Part:
    """Rows of different lengths, the first without a single answer token."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (rows, width), generator=random)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(rows):
        labels[row, : max(1, 4 - row) if row else width] = -100
    labels[-1, -1], mask[-1, -1] = -100, 0
    return Part(input_ids=ids, attention_mask=mask, labels=labels, name=name)


def batch_of(part: Part) -> Any:
    return SimpleNamespace(train=part, step=0, steps=1, values={})


def naive(student: Any, teacher: Any, part: Part) -> Tensor:
    """The objective of ``TERMS`` from all logits at once."""
    q_all = student(part.input_ids, attention_mask=part.attention_mask).logits.double()
    with torch.no_grad():
        p_all = teacher(part.input_ids, attention_mask=part.attention_mask).logits.double()
    q, p, targets = q_all[:, :-1][part.mask], p_all[:, :-1][part.mask], part.targets[part.mask]
    soft = divergence(p / 2, q / 2).sum() / len(targets)
    labels = -q.log_softmax(-1).gather(1, targets[:, None]).sum() / len(targets)
    return 0.5 * 4 * soft + 0.3 * labels + divergence(p_all, q_all).sum() / part.labels.numel()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)


def blockwise(student: Any, teacher: Any, part: Part, block_tokens: int | None) -> Tensor:
    mixture = Mixture(TERMS, block_tokens=block_tokens)
    return total(mixture.terms(student, Live(teacher), batch_of(part)))


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * scale)


# --- exactness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_tokens", BLOCKS)
@pytest.mark.parametrize(
    ("tied", "bias", "cap"), [(False, False, None), (True, True, None), (True, False, 0.5)]
)
def test_any_block_size_gives_the_naive_value_and_gradient(
    tied: bool, bias: bool, cap: float | None, block_tokens: int | None
) -> None:
    student, teacher, part = Small(tied, bias, cap), Small(cap=cap, seed=1), part_of()
    expected = naive(student, teacher, part)
    expected_gradients = gradients(student, expected)
    found = blockwise(student, teacher, part, block_tokens)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    agree(gradients(student, found), expected_gradients, 1e-12)


def test_a_loss_of_several_factors_is_scaled_once() -> None:
    student, teacher, part = Small(), Small(seed=1), part_of()
    expected = gradients(student, 3.0 * naive(student, teacher, part))
    agree(gradients(student, 3.0 * blockwise(student, teacher, part, 2)), expected, 1e-12)


def test_slopes_that_are_no_multiple_of_the_weights_are_refused() -> None:
    mixture = Mixture([of("forward_kl"), of("cross_entropy")])
    terms = mixture.terms(Small(), Live(Small(seed=1)), batch_of(part_of()))
    with pytest.raises(AssertionError, match="multiple of weights"):
        terms["forward_kl"].sum.backward()


def test_without_a_gradient_the_values_are_the_same() -> None:
    student, teacher, part = Small(), Small(seed=1), part_of()
    with torch.no_grad():
        found = blockwise(student, teacher, part, 2)
    assert not found.requires_grad
    torch.testing.assert_close(found, naive(student, teacher, part).detach(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("micro_batch", [2, 1])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch: int) -> None:
    """One of the four has nothing to predict."""
    student, source, part = Small(tied=True), Live(Small(seed=1)), part_of()

    def found(size: int | None) -> dict[str, Tensor]:
        mixture = Mixture(TERMS, block_tokens=3)

        def loss(model: Any, batch: Any) -> Any:
            return mixture.terms(model, source, batch)

        Gradient(student, loss, micro_batch=size)({"train": part}, 0, 1)
        return {name: weight.grad.clone() for name, weight in student.named_parameters()}

    agree(found(micro_batch), found(None), 1e-12)


def test_a_fully_masked_part_gives_zero_and_zero_gradients() -> None:
    student, part = Small(), part_of()
    part = replace(part, labels=torch.full_like(part.labels, -100))
    mixture = Mixture([of("forward_kl"), of("cross_entropy")])
    value = total(mixture.terms(student, Live(Small(seed=1)), batch_of(part)))
    assert value == 0
    assert all(not gradient.any() for gradient in gradients(student, value).values())


def test_a_padded_vocabulary_is_cut_and_renormalised() -> None:
    student, teacher, part = Small(), Small(seed=1), part_of()
    part = replace(
        part, input_ids=part.input_ids % 5, labels=part.labels.where(part.labels < 0, part.labels % 5)
    )
    mixture = Mixture([of("forward_kl")], vocabulary=5, block_tokens=2)
    found = total(mixture.terms(student, Live(teacher, entries=5), batch_of(part)))
    q = student(part.input_ids, part.attention_mask).logits[:, :-1][part.mask][:, :5]
    p = teacher(part.input_ids, part.attention_mask).logits[:, :-1][part.mask][:, :5].detach()
    expected = divergence(p, q).mean()
    expected_gradients = gradients(student, expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    found_gradients = gradients(student, found)
    agree(found_gradients, expected_gradients, 1e-12)
    assert not found_gradients["head.weight"][5:].any()


def test_absent_entries_add_nothing_and_leave_the_gradient_finite() -> None:
    student, teacher, part = Small(bias=True), Small(bias=True, seed=1), part_of()
    with torch.no_grad():
        for model in (student, teacher):
            model.head.bias[5:] = -torch.inf
    part = replace(
        part, input_ids=part.input_ids % 5, labels=part.labels.where(part.labels < 0, part.labels % 5)
    )
    found = blockwise(student, teacher, part, 3)
    mixture = Mixture(TERMS, vocabulary=5)
    expected = total(mixture.terms(student, Live(teacher, entries=5), batch_of(part)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    found_gradients = gradients(student, found)
    assert all(bool(gradient.isfinite().all()) for gradient in found_gradients.values())
    agree(
        {"embedding.weight": found_gradients["embedding.weight"]},
        {"embedding.weight": gradients(student, expected)["embedding.weight"]},
        1e-12,
    )


# --- models -----------------------------------------------------------------------------------------------------


SHAPE = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def transformer(kind: str) -> Any:
    """A random one of the kind, in float64."""
    import transformers as t

    torch.manual_seed(7)
    made = {
        "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE, tie_word_embeddings=True)),
        "Gemma 2, soft-capped": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**SHAPE, head_dim=4, final_logit_softcapping=0.05)
        ),
        "Cohere, scaled": lambda: t.CohereForCausalLM(t.CohereConfig(**SHAPE, logit_scale=0.25)),
        "Granite, divided": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SHAPE, logits_scaling=4.0)),
        "Phi, with a bias": lambda: t.PhiForCausalLM(t.PhiConfig(**SHAPE)),
        "GPT-2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=11, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            )
        ),
        "a distance head": lambda: with_head(
            t.LlamaForCausalLM(t.LlamaConfig(**SHAPE)), Component("euclidean", {"exponent": 4.0})
        ),
    }[kind]()
    return made.double().eval()


KINDS = [
    "Llama", "Gemma 2, soft-capped", "Cohere, scaled", "Granite, divided", "Phi, with a bias", "GPT-2",
    "a distance head",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_behind_a_look_gives_the_models_own_logits(kind: str) -> None:
    model, part = transformer(kind), part_of()
    with torch.no_grad():
        seen = look(model, part, hidden=True)
        expected = model(part.input_ids, attention_mask=part.attention_mask, output_hidden_states=True)
    torch.testing.assert_close(seen.logits(), expected.logits, rtol=1e-12, atol=1e-12)
    assert seen.hidden_states is not None
    assert len(seen.hidden_states) == 2
    torch.testing.assert_close(seen.hidden_states[1], expected.hidden_states[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight_of_the_model(kind: str) -> None:
    """Norms inside the models work in float32: nearer than that two orders of adding cannot be."""
    student, teacher, part = transformer(kind), transformer("Llama"), part_of()
    expected = naive(student, teacher, part)
    expected_gradients = gradients(student, expected)
    found = blockwise(student, teacher, part, 3)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0.0)
    agree(gradients(student, found), expected_gradients, 1e-5)


def test_a_head_outside_the_model_runs_under_the_models_own_autocast() -> None:
    model, part = transformer("Llama").float(), part_of()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = look(model, part)
        expected = model(part.input_ids, attention_mask=part.attention_mask).logits
    with torch.no_grad():
        found = seen.logits()
    assert expected.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=0.0, atol=0.0)


def test_a_model_that_does_something_unknown_to_its_logits_is_refused() -> None:
    model = Small()
    model.forward = lambda **inputs: SimpleNamespace(logits=Small.forward(model, **inputs).logits + 1.0)
    with pytest.raises(AssayError, match="in a way that is not known here"):
        look(model, part_of())


def test_an_output_layer_is_put_back_after_an_error() -> None:
    model = Small()
    with pytest.raises(ValueError, match="out of the blue"), without_head(model, behind=True):
        raise ValueError("out of the blue")
    assert "forward" not in model.head.__dict__


# --- terms ------------------------------------------------------------------------------------------------------


PLAIN = Flags(
    form="token_losses",
    teacher=True,
    hidden=False,
    attention=False,
    top_k=False,
    recorded=True,
    ensemble=True,
    cross_tokenizer=False,
    sampled=False,
    sample_id=False,
    whole_batch=False,
)


def pulled(token_losses: Any, weight: float = 1.0, **more: Any) -> Pull:
    """A term made of a function, called ``own``."""
    module: Any = SimpleNamespace(token_losses=token_losses)
    return Pull(Entry("own", module, Weighted(weight=weight), PLAIN), **more)


def run(pulls: Sequence[Pull], student: Any, part: Part, block_tokens: int | None = 2) -> dict[str, Term]:
    where = places(part)
    said = Live(Small(seed=1)).said(part, where)
    return separable(pulls, look(student, part), said, where, Moment(3, 9), block_tokens)


def test_what_is_only_logged_stands_beside_its_term_with_weight_0() -> None:
    def losses(config: Weighted, tokens: Tokens) -> dict[str, Tensor]:
        return {"loss": tokens.student.square().sum(-1), "kept": tokens.student[:, 0].detach()}

    student, part = Small(), part_of()
    terms = run([pulled(losses, weight=2.0)], student, part)
    assert {name: term.weight for name, term in terms.items()} == {"own": 2.0, "own.kept": 0.0}
    logits = student(part.input_ids, part.attention_mask).logits[:, :-1][part.mask]
    expected = gradients(student, 2.0 * logits.square().sum() / len(logits))
    agree(gradients(student, total(terms)), expected, 1e-12)
    assert float(terms["own.kept"].sum.detach()) == pytest.approx(float(logits.detach()[:, 0].sum()))


def test_a_term_that_returns_anything_but_a_number_for_each_token_is_refused() -> None:
    for wrong in (lambda config, tokens: tokens.student, lambda config, tokens: tokens.student.sum()):
        with pytest.raises(
            AssayError, match=r"own: token_losses must return one number for each of 2 tokens"
        ):
            run([pulled(wrong)], Small(), part_of())


def test_a_term_of_weight_0_is_computed_without_a_gradient_and_logged() -> None:
    seen = []

    def losses(config: Weighted, tokens: Tokens) -> Tensor:
        values = tokens.student.square().sum(-1)
        seen.append(values.requires_grad)
        return values

    alone = run([pulled(losses, weight=0.0)], Small(), part_of())
    assert not alone["own"].sum.requires_grad
    forward_kl = Mixture([of("forward_kl")]).entries[0]
    beside = run([Pull(forward_kl), pulled(losses, weight=0.0)], Small(), part_of())
    assert beside["forward_kl"].sum.requires_grad
    assert not any(seen)
    torch.testing.assert_close(beside["own"].sum.detach(), alone["own"].sum, rtol=1e-12, atol=0.0)


def test_a_companion_is_trained_with_the_student() -> None:
    companion = nn.Linear(VOCABULARY, 1, dtype=torch.float64)

    def losses(config: Weighted, tokens: Tokens) -> Tensor:
        assert tokens.companion is not None
        values: Tensor = tokens.companion(tokens.student).squeeze(-1).square()
        return values

    student, part = Small(), part_of()
    both = nn.ModuleList([student, companion])
    logits = student(part.input_ids, part.attention_mask).logits[:, :-1][part.mask]
    expected = gradients(both, companion(logits).square().mean())
    found = total(run([pulled(losses, companion=companion)], student, part))
    agree(gradients(both, found), expected, 1e-12)


def test_a_block_has_its_own_targets_numbers_and_moment() -> None:
    part = part_of()
    numbers = torch.arange(part.targets.numel(), dtype=torch.float32).view_as(part.targets)
    part = replace(part, extra={"reward": numbers})
    seen: list[Tokens] = []

    def losses(config: Weighted, tokens: Tokens) -> Tensor:
        seen.append(tokens)
        return tokens.student.sum(-1)

    run([pulled(losses, values={"t": 0.5}, memory="kept")], Small(), part)
    assert torch.cat([tokens.targets for tokens in seen]).equal(part.targets[part.mask])
    assert torch.cat([tokens.extra["reward"] for tokens in seen]).equal(numbers[part.mask])
    assert {(tokens.step, tokens.steps, tokens.memory) for tokens in seen} == {(3, 9, "kept")}
    assert all(tokens.values == {"t": 0.5} for tokens in seen)


def test_a_second_term_of_a_kind_has_a_number() -> None:
    chosen = [of("forward_kl"), of("cross_entropy"), of("forward_kl", temperature=2.0), of("forward_kl")]
    names = [entry.name for entry in Mixture(chosen).entries]
    assert names == ["forward_kl", "cross_entropy", "forward_kl.2", "forward_kl.3"]


def test_the_temperature_goes_into_the_weight_and_not_into_the_value() -> None:
    student, source, batch = Small(), Live(Small(seed=1)), batch_of(part_of())
    scaled = Mixture([of("forward_kl", temperature=3.0)]).terms(student, source, batch)["forward_kl"]
    plain = Mixture([of("forward_kl", temperature=3.0, scale_by_temperature=False)])
    other = plain.terms(student, source, batch)["forward_kl"]
    assert (scaled.weight, other.weight) == (9.0, 1.0)
    assert float(scaled.sum.detach()) == float(other.sum.detach())
    assert weight_of(Softened(weight=0.5, temperature=2.0, scale_by_temperature=True)) == 2.0


def test_positions_say_where_a_term_is_taken_and_what_its_mean_is_over() -> None:
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 4]])
    part = Part(
        input_ids=labels.clamp(min=0), attention_mask=torch.ones_like(labels), labels=labels, name="x"
    )
    answers, every, late = (places(part, name) for name in ("answers", "all", "unshifted"))
    assert answers.index.tolist() == [0, 1, 4]
    assert answers.targets.tolist() == [5, 6, 4]
    assert (answers.count, answers.count.source) == (3.0, "x.tokens")
    assert every.index.tolist() == list(range(6))
    assert every.targets.tolist() == [5, 6, -100, -100, 4, -100]
    assert (every.count, every.count.source) == (6.0, "x.positions")
    assert late.index.tolist() == [1, 2, 5]
    assert (late.count, late.count.source) == (3.0, "x.labelled")
    assert answers.sequence.tolist() == [0, 0, 1]
    assert answers.position.tolist() == [0, 1, 1]


def test_flags_have_defaults_that_follow_from_what_a_term_looks_at() -> None:
    def module(**constants: Any) -> Any:
        return SimpleNamespace(__name__="term.own", divergence=lambda *_: None, **constants)

    assert flags(module()) == replace(PLAIN, form="divergence")
    inside = flags(module(HIDDEN=True))
    assert (inside.hidden, inside.recorded, inside.ensemble) == (True, False, False)
    with pytest.raises(AssayError, match=r"exactly one of divergence, token_losses, terms; it has none"):
        flags(SimpleNamespace(__name__="term.own"))
    with pytest.raises(AssayError, match="TOP_K is for a divergence alone; token_losses is given the logits"):
        flags(SimpleNamespace(__name__="term.own", token_losses=lambda *_: None, TOP_K=True))


def test_a_view_has_the_logits_of_both_at_the_answer_places() -> None:
    student, teacher, part = Small(), Small(seed=1), part_of()
    view = View(part=part, student=look(student, part), teacher=look(teacher, part))
    expected = student(part.input_ids, part.attention_mask).logits[:, :-1][part.mask]
    torch.testing.assert_close(view.student_logits(), expected, rtol=1e-12, atol=1e-12)
    assert view.student_logits().requires_grad
    assert not view.teacher_logits().requires_grad
    assert view.targets.equal(part.targets[part.mask])


# --- teachers ---------------------------------------------------------------------------------------------------


def test_an_ensemble_averages_probabilities_or_logits() -> None:
    """Two members, two words: (1/2 + 1/4) / 2, and the softmax of the mean of log-odds 0 and -log 3."""
    part = Part(
        input_ids=torch.tensor([[0, 1]]),
        attention_mask=torch.ones(1, 2, dtype=torch.int64),
        labels=torch.tensor([[-100, 0]]),
        name="train",
    )

    def member(first: float) -> Live:
        rows = torch.tensor([[first, 1 - first]], dtype=torch.float64).log().repeat(2, 1)
        return Live(lambda input_ids, attention_mask: SimpleNamespace(logits=rows[input_ids]))

    members, where, rows = [member(0.5), member(0.25)], places(part), slice(0, 1)
    mean = Ensemble(members, "probabilities").said(part, where)
    assert mean.log_probs(rows, 1.0).exp()[0].tolist() == pytest.approx([0.375, 0.625])
    assert mean.logits(rows).exp()[0].tolist() == pytest.approx([0.375, 0.625])
    soft = [0.5, 1 / (1 + 3**0.5)]
    assert mean.log_probs(rows, 2.0).exp()[0, 0].item() == pytest.approx(sum(soft) / 2)
    product = Ensemble(members, "logits").said(part, where)
    assert product.log_probs(rows, 1.0).exp()[0, 0].item() == pytest.approx(1 / (1 + 3**0.5))


def test_a_live_teacher_is_run_once_for_all_places_of_a_part() -> None:
    runs = []
    teacher = Small(seed=1)

    def counted(**inputs: Any) -> Any:
        runs.append(None)
        return teacher(**inputs)

    Mixture(TERMS).terms(Small(), Live(counted), batch_of(part_of()))
    assert len(runs) == 1
    # Another part is asked for anew.
    source, one, other = Live(teacher), part_of(), part_of()
    other = replace(other, input_ids=other.input_ids.flip(0))
    source.said(one, places(one))
    rows = slice(0, len(places(other)))
    torch.testing.assert_close(
        source.said(other, places(other)).logits(rows), Live(teacher).said(other, places(other)).logits(rows)
    )
    assert not torch.allclose(source.look(other).states, Live(teacher).look(one).states)


def test_a_live_teacher_gets_no_gradient() -> None:
    teacher = Small(seed=1)
    blockwise(Small(), teacher, part_of(), 2).backward()
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_look_at_a_lookup_table_has_its_logits_as_states() -> None:
    seen = look(lambda **inputs: SimpleNamespace(logits=torch.ones(4, 6, 3)), part_of())
    assert isinstance(seen, Look)
    assert seen.logits().shape == (4, 6, 3)
    assert seen.at(torch.tensor([0, 5])).shape == (2, 3)
