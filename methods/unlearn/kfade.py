"""K-FADE: a few steps uphill on what is to be forgotten, in directions in which the retained outputs stay put.

"Gauss-Newton Unlearning for the LLM Era" (K-FADE). No code of it is public and only its abstract was at hand: a few
uphill Gauss-Newton steps computed from the forget set, curvature by K-FAC or EK-FAC, the wish that outputs on the
retain set stay where they are turned into a quadratic constraint on the weights, and updates that can be re-applied
after further training. Damping, step length, number of steps, layers and sample size were not found: all are this
project's own, and no figure of this file reproduces one of the paper's.

    maximise  g_F . d   subject to   E_retain KL(p_theta || p_theta+d)  ~  1/2 d^T G d  <=  budget
    theta <- theta + eta (G + lambda I)^-1 g_F

g_F is the gradient of the mean NLL of all forget answer tokens, G the Gauss-Newton matrix of the retain rows, layer by
layer a Kronecker product (``curvature.kfac`` says which layers, tokens and labels) in whose eigenbasis lambda is added;
EK-FAC has exact second moments in that basis. Ours are:

* **Damping floor.** lambda = max(floor, relative * mean eigenvalue). On memorised retain rows p is near 1 and G near 0,
  and a damping relative to it alone leaves the inverse almost unregularised.
* **Trust region.** eta is the length at which the predicted KL(start || model) on the retain sample reaches
  ``kl_budget`` times the number of this step. The prediction is the second-order expansion at the current weights with
  the Gauss-Newton matrix *itself* (derivatives of the logits along d, all layers together, no Kronecker product); at
  the start it is 1/2 d^T G d.
* **Step control.** The divergence is then measured. A step that exceeds the budget, lowers the forget NLL or is not
  finite is shortened and measured again, up to ``tries`` candidates; after that the weights stay. So the retain KL of
  the sample never exceeds ``kl_budget`` * steps, whatever the curvature says. No step is longer than the weights.

``curvature="identity"`` keeps trust region and step control and goes along the gradient itself: what is left without
curvature. Checked on a linear softmax layer: with one retain row, or where all retain outputs have one distribution,
the K-FAC step is the exact Gauss-Newton step, and trace EK-FAC = trace G.

``curve.csv``: ``forget`` (NLL) and ``retain_kl`` (to the start, measured on the sample) of the weights after so many
steps; of the step that follows ``predicted_kl``, ``damping`` (mean over layers), ``tries``, ``accepted`` (1 or 0) and,
as ``learning_rate``, eta.

Memory, beside the model, its frozen starting copy and a micro-batch: for the layers that move, a copy of the weights,
the gradient and the direction; and the curvature, d_in^2 + d_out^2 floats a layer for K-FAC, d_in d_out more for
EK-FAC: O(sum of d_in^2 + d_out^2), never the square of d_in d_out. The passes over the sample (A and S of all layers in
one, EK-FAC's eigenvalues in another) are made anew before every step, once with ``refresh=False``, and not at all where
``factors`` are given and kept. Processes of one job share the gradient; each measures the curvature for itself.

In the built-in world (five training seeds, the defaults) every run was stable, two candidates a step, and at forget NLL
2 the retain NLL was 0.052 +- 0.015 against 0.753 +- 0.246 under gradient ascent. What it does not beat: GradDiff with a
tuned retain weight, which trains on the retain answers, was lower still (0.012, three seeds). With
``curvature="identity"`` eight steps of the same budget ended at forget NLL 0.4 (one seed).

The result is ``model/`` and ``files/delta.safetensors``, end - start of every weight that moved, which
``unlearn.apply_delta(delta=...)`` puts on other descendants of the starting model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from methods.loop import Training
from methods.stage import AssayError, Claim, Component, Dataset, Files, How, Stage, Terms
from methods.unlearn import check

if TYPE_CHECKING:
    from torch import Tensor

    from methods.curvature._kronecker import Basis
    from methods.unlearn._uphill import Uphill

# The seed draws the retain sample and the labels.
SEEDED = True
USES = ("methods.loop", "methods.data", "methods.checkpoint", "methods.terms", "methods.curvature")
# ``check`` of the family is what the planner asks before anything runs.
__all__ = ["Config", "check", "run"]
RESULT = ("model", "files")
CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="K-FADE keeps a lower retain NLL than gradient ascent at forget NLL 2.",
        source="pilot in the embedded world: 0.052 +- 0.015 against 0.753 +- 0.246, every one of five seeds",
        metric="curve.probe.retain@probe.forget=2",
        subject="*unlearn.kfade*",
        relation="lower",
        other="*unlearn.grad_ascent*",
        subject_options={"curvature": "ekfac", "refresh": True},
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is forgotten and kept, and the options of a step; all defaults were piloted in the built-in world."""

    # rows to be forgotten; all of them make up the gradient of every step
    forget: Dataset = "authors/forget10"
    # rows whose outputs should stay; only their questions and answer positions count, their curvature and divergence
    retain: Dataset = "authors/retain90"
    # steps uphill ("a few")
    steps: Annotated[int, Gt(0)] = 6
    # nats a retain answer token by which each step may raise the divergence from the start, as measured on the sample
    kl_budget: Annotated[float, Gt(0)] = 0.02
    # candidates for a step, each shorter than the one before; then the weights stay
    tries: Annotated[int, Gt(0)] = 8
    # a chain that ends in curvature.kfac on the same model, for the first step (all steps with refresh=False)
    factors: Files | None = None
    # measure the curvature at the weights of each step; otherwise that of the start is kept
    refresh: bool = True
    # EK-FAC, K-FAC, or none: the gradient itself
    curvature: Literal["ekfac", "kfac", "identity"] = "ekfac"
    # where the damping goes: on the eigenvalues, or by halves on both factors (factored Tikhonov, K-FAC only)
    inverse: Literal["eigenbasis", "factored"] = "eigenbasis"
    # damping as a share of a layer's mean eigenvalue
    damping: Annotated[float, Ge(0)] = 0.1
    # smallest damping of a layer; mean eigenvalues of a memorised built-in world are 1e-4 to 1e-3
    damping_floor: Annotated[float, Gt(0)] = 1e-5
    # retain rows drawn once, for curvature and divergence; None: all
    sequences: Annotated[int, Gt(0)] | None = 512
    # labels of the curvature, as in curvature.kfac
    labels: Literal["sampled", "signs", "exact"] = "sampled"
    # draws for each token
    samples: Annotated[int, Gt(0)] = 1
    # entries of matrices that are 0 at the start stay 0
    keep_zeros: bool = True
    # of the forward pass; auto: bfloat16 on an accelerator, float32 on the processor
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # of the written model; parent: as the model it was made from
    saved: Literal["parent", "float32", "bfloat16"] = "parent"
    # longer sequences are cut
    context_tokens: Annotated[int, Gt(1)] = 512
    # sequences that go through the model at once
    micro_batch: Annotated[Annotated[int, Gt(0)], How] = 32
    # seconds between two saved states
    save_seconds: Annotated[float, Gt(0), How] = 30.0
    # data sets whose answer NLL is followed in the learning curve, each as "name=data set"
    probe: Annotated[tuple[str, ...], How] = ()
    # steps after which the model is kept, as model@<step>
    checkpoints: Annotated[tuple[int, ...], How] = ()

    def __post_init__(self) -> None:
        if self.inverse == "factored" and self.curvature != "kfac":
            raise AssayError(
                f"unlearn.kfade: inverse='factored' damps the two factors of K-FAC; write curvature='kfac' with it "
                f"instead of {self.curvature!r}."
            )
        if self.factors is not None and self.curvature == "identity":
            raise AssayError("unlearn.kfade: curvature='identity' uses no curvature; leave factors out.")


def run(stage: Stage) -> None:
    """Climb, write the model, and write how far it has moved."""
    from methods import loop
    from methods.curvature import _factors
    from methods.terms import answer_nll, forward

    config: Config = stage.config
    check(config, stage.data)
    examples = _examples(stage, config.forget)
    settings = _settings(config, len(examples))
    model = loop.prepare(stage, settings).requires_grad_(False)
    layers = _factors.linear_layers(model)
    start = loop.remember(stage, model, settings)
    reference = loop.reference_of(stage, model, settings)
    climber = _climber(stage, model, reference, layers, examples, start.zeros)
    for layer in layers.values():
        layer.requires_grad_()

    def loss(model: Any, batch: Any) -> Terms:
        model.eval()  # the gradient of the model as it answers, without dropout
        return {"forget": answer_nll(batch.forget, forward(model, batch.forget), weight=-1.0)}

    batches = loop.Batches({"forget": examples}, size=len(examples), seed=stage.seed)
    loop.train(stage, model, settings, batches, loss, start=start, optimizer=climber)
    _write_delta(stage, climber, model.config.vocab_size)


def _settings(config: Config, rows: int) -> Training:
    """The loop's options: all forget rows in each step, nothing clipped, every step logged."""
    from methods.unlearn import probe_of

    return Training(
        steps=config.steps,
        batch=rows,
        micro_batch=min(config.micro_batch, rows),
        schedule=Component("constant"),
        clip=0.0,
        keep_zeros=config.keep_zeros,
        precision=config.precision,
        saved=config.saved,
        context_tokens=config.context_tokens,
        save_seconds=config.save_seconds,
        log_every=1,
        probe=tuple(probe_of(config, text) for text in config.probe),
        probe_every=1,
        checkpoints=config.checkpoints,
    )


def _examples(stage: Stage, data: str) -> Any:
    from methods.checkpoint import load_tokenizer
    from methods.data import Style, encode

    folder = stage.parents["model"]
    return encode(
        stage.data.rows(data), load_tokenizer(folder), Style.read(folder), stage.config.context_tokens
    )


def _climber(
    stage: Stage,
    model: Any,
    reference: Any,
    layers: Mapping[str, Any],
    examples: Any,
    zeros: Mapping[str, Tensor],
) -> Uphill:
    """What takes the steps, with the retain sample and the frozen starting model."""
    from methods.checkpoint import load_tokenizer
    from methods.curvature import sample_of
    from methods.curvature._factors import draw_sample
    from methods.curvature._kronecker import Labels
    from methods.data import padding_id
    from methods.progress import derive_seed
    from methods.unlearn._uphill import Uphill

    config: Config = stage.config
    padding = padding_id(load_tokenizer(stage.parents["model"]))
    drawn = Labels(config.labels, config.samples)
    return Uphill(
        control=config,
        model=model,
        layers=layers,
        zeros={name: mask for name, mask in zeros.items() if name.removesuffix(".weight") in layers},
        forget=draw_sample(examples, None, config.micro_batch, padding, stage.seed).parts,
        sample=sample_of(stage, config.retain, config),
        start=reference,
        labels=lambda step: replace(drawn, seed=derive_seed(stage.seed, "labels", step)),
        bases=_given(stage, layers),
    )


def _given(stage: Stage, layers: Mapping[str, Any]) -> Mapping[str, Basis]:
    """The curvature of another stage, where one is named."""
    from methods import curvature

    if stage.config.factors is None:
        return {}
    return curvature.read(stage.parents["factors"], layers, corrected=stage.config.curvature == "ekfac")


def _write_delta(stage: Stage, climber: Uphill, vocabulary: int) -> None:
    """The update since the parent, exact in float32 even where the model is saved with fewer digits."""
    import torch
    from accelerate import PartialState

    from methods.checkpoint import load_model
    from methods.unlearn import _delta

    if not PartialState().is_main_process:
        return
    parent = stage.parents["model"]
    before = dict(load_model(parent, "float32", torch.device("cpu")).named_parameters())
    about = {
        "made_by": stage.id,
        # a result's model/ lies in a folder that is called as the result
        "parent": parent.parent.name if parent.name.startswith("model") else parent.name,
        "steps": stage.config.steps,
        "retain_kl": climber.observed(last=True)["retain_kl"],
        "vocabulary": vocabulary,
    }
    _delta.write(stage.folder / "files", _delta.between(before, climber.parameters()), about)
