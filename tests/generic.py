"""Runs any method or evaluation in this process as the runner does, on a two-layer model of 14 thousand weights.

What works on classifiers alone is run on small ones: of tokens, or of the kind that ``KIND`` names.

The generic tests find methods, components and evaluations by themselves. What a new one may need here is an entry in
``NEEDS`` (an option without a default), in ``SECOND`` (a second value of an option whose type does not suggest one), in
``KIND`` (images, or two classes) or in ``HOST`` (a component that the usual method cannot take).

``python -m tests.generic --write`` renews ``tests/numbers.json``.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import importlib
import itertools
import json
import random
import shutil
import sys
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from methods.find import Found, catalogue
from methods.stage import AssayError, Component, Parent, Row, Scoring, Stage, Term
from workflows import code, promises
from workflows.notation import Call, Name, Value, format_value
from workflows.options import DATASET, OptionField, Resolved, decode_config, encode_config, fields_of, resolve
from workflows.parts import needs_model, tasks_of
from workflows.record import Job, ParentRef, Store
from workflows.shorthands import is_shorthand, steps_of

if TYPE_CHECKING:
    from torch import Tensor

    from methods.checkpoint import Models

NUMBERS = Path(__file__).with_name("numbers.json")
FORGET = "authors/forget10[0:8]"
RETAIN = "authors/retain90[0:6]+authors/facts[0:4]"
DATA = f"{RETAIN}+{FORGET}"
OTHER_DATA = "authors/retain90[20:32]"
STEPS = 5

# The models that something can be tried on, by kind: the rows they have learnt, and others of the same form.
DATA_OF: dict[str, tuple[str, str]] = {
    "language": (DATA, OTHER_DATA),
    "tokens": ("arithmetic/addition7/train[0:18]", "arithmetic/addition7/train[18:36]"),
    "images": ("digits/train[0:18]", "digits/train[18:36]"),
    "two_classes": ("marks/train[0:18]", "marks/train[18:36]"),
}
# Kinds of what is not tried on the language model, or where it works on classifiers on the one of tokens.
KIND: dict[str, str] = {
    "model.mlp": "images",
    "model.cnn": "images",
    "model.vit": "images",
    "classify": "images",
    "loss.anyloss": "two_classes",
    "head.vq_logits": "images",
    "train.saf": "tokens",
    "train.smooth_adversarial": "images",
}
# Methods that a component is run in where it is not the usual one of its kind.
HOST: dict[str, str] = {
    "loss.anyloss": "train.classify",
    "head.vq_logits": "train.classify",
    "term": "distill.mix",
}
# Components that cannot stand alone: what they are run with.
BESIDE: dict[str, tuple[str, ...]] = {"term.own_past": ("cross_entropy",)}
# The options of the new classifiers.
BUILD: dict[str, tuple[str, dict[str, Value]]] = {
    "tokens": ("model.token_mlp", {"hidden": (16,)}),
    "images": ("model.mlp", {"hidden": (12,)}),
    "two_classes": ("model.mlp", {"hidden": (12,)}),
}

# Options of every run, wherever a method, component or evaluation has them.
SMALL: dict[str, Value] = {
    "steps": STEPS, "batch": 4, "log_every": 1, "context_tokens": 64, "precision": "float32", "data": DATA,
    "forget": FORGET, "retain": RETAIN, "optimizer": Call("adamw", (("learning_rate", 0.003),)), "sequences": 4,
    "limit": 4, "generate": 2, "max_new_tokens": 4, "prompt_tokens": 8, "new_tokens": 4, "repeats": 2, "seconds": 0.005,
}  # fmt: skip

# For comparisons up to rounding: AdamW would turn the rounding of a gradient near 0 into a whole step.
DESCENT = Call("sgd", (("learning_rate", 0.1), ("momentum", 0.0)))

# What one of them cannot do without, beside a data set or a model.
NEEDS: dict[str, dict[str, Value]] = {
    "prune.magnitude": {"sparsity": 0.5},
    "prune.wanda": {"sparsity": 0.5},
    "prune.sparsegpt": {"sparsity": 0.5},
    "levels.magnitude": {"sparsity": 0.5},
    "levels.wanda": {"sparsity": 0.5},
    "levels.sparsegpt": {"sparsity": 0.5},
    "prune.flap": {"sparsity": 0.5},
    "prune.svd": {"keep": 0.5, "data": DATA},
    "prune.fwsvd": {"keep": 0.5},
    "prune.drank": {"keep": 0.5},
    "prune.modegpt": {"sparsity": 0.25},
    "prune.llm_pruner": {"sparsity": 0.5},
    "levels.tyr": {"sparsity": 0.5},
    "train.sparse": {"sparsity": 0.1, "every": 1},
    "search.layerwise": {"lowered": 1, "data": DATA},
    "search.evopress_bits": {"bits": 2.5},
    "search.evopress_depth": {"sparsity": 0.5},
    "search.block_scores": {"sparsity": 0.5},
    "prune.shortgpt": {"sparsity": 0.5},
    "search.knapsack": {"data": DATA},
    "search.published": {"assignment": "assignments/evopress", "levels": Name("sparse_levels")},
    "prune.assigned": {"levels": Name("sparse_levels")},
    "prune.evopress": {"sparsity": 0.5},
    "prune.evopress_bits": {"bits": 2.5},
    "prune.evopress_depth": {"sparsity": 0.5},
    "prune.tyr": {"sparsity": 0.5},
    "lm_eval": {"tasks": ("authors_forget",)},
    "unlearn.rmu": {"layer": 1, "trained": "all"},
    "unlearn.realign": {"alignment": RETAIN, "task": FORGET},
    "distill.forward_kl": {"teacher": Name("other")},
    "distill.squarehead": {"teacher": Name("other")},
    "distill.mix": {"teacher": Name("other"), "terms": (Call("forward_kl"),)},
}

# The results that reference options name, by what they read of it; the first is the usual one.
NAMED: dict[str, tuple[str, ...]] = {
    "model": ("other", "sparse"),
    "data": ("answers", "more_answers"),
    "files": ("bundle", "other_bundle"),
}
# The same for options of a name, where what they read does not tell.
NAMED_OPTION: dict[str, tuple[str, ...]] = {
    "levels": ("sparse_levels", "other_sparse_levels"),
    "assignment": ("uniform", "changed"),
    "center": ("uniform_structure", "changed_structure"),
    "recorded": ("outputs", "other_outputs"),
}
# Results of other methods that reference options may name; made when they are first asked for, from the whole model.
BUNDLES: dict[str, tuple[str, dict[str, Value]]] = {
    "sparse_levels": ("levels.magnitude", {}),
    "other_sparse_levels": ("levels.wanda", {}),
    "sparser_levels": ("levels.magnitude", {"sparsity": 0.75}),
    "bit_levels": ("levels.rtn", {}),
    "other_bit_levels": ("levels.gptq", {}),
    "structure_levels": ("levels.tyr", {}),
    "other_structure_levels": ("levels.tyr", {"score": "osscar"}),
    "uniform": ("search.uniform", {"levels": Name("sparse_levels")}),
    "changed": ("search.knapsack", {"levels": Name("sparse_levels")}),
    "uniform_structure": ("search.uniform", {"levels": Name("structure_levels")}),
    "changed_structure": ("search.knapsack", {"levels": Name("structure_levels"), "errors": "weights"}),
    "refilled_levels": ("levels.gptq", {"parent": "sparse", "keep_zeros": False}),
    "refilled": ("search.uniform", {"parent": "sparse", "levels": Name("refilled_levels"), "bits": 4.0}),
    "outputs": ("teacher.logits", {"parent": "other"}),
    "other_outputs": ("teacher.logits", {"parent": "sparse"}),
    "largest_outputs": ("teacher.logits", {"parent": "other", "top_k": 4}),
}

# The linear layers of the language model's two blocks.
LAYERS = [
    f"model.layers.{block}.{part}_proj"
    for block in range(2)
    for part in (*(f"self_attn.{letter}" for letter in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
]

# Methods that are tried on another one's result instead of the whole model.
AFTER: dict[str, tuple[str, dict[str, Value]]] = {
    "prune.cut": ("prune.magnitude", {"structure": "neurons"}),
}

# What keeps every evolutionary search small.
SEARCH: dict[str, Value] = {
    "generations": 2, "children": 4, "survivors": (2, 1), "tokens": (48, 96), "calibration_tokens": 200,
    "holdout_tokens": 64, "score_every": 1,
}  # fmt: skip

# What keeps one of them small or lets it be felt, where the table above does not.
SMALL_OF: dict[str, dict[str, Value]] = {
    "model.new": {"hidden": 16, "heads": 4, "kv_heads": 2, "mlp": 64, "vocabulary": 384, "tokenizer": "authors/full"},
    "prune.sparsegpt": {"block": 8},
    "levels.magnitude": {"levels": 3},
    "levels.wanda": {"levels": 3, "calibration_tokens": 64},
    "levels.sparsegpt": {"levels": 3, "calibration_tokens": 64, "block": 8},
    "prune.rtn": {"bits": 3, "group": 8},
    "prune.gptq": {"bits": 3, "group": 8},
    "levels.rtn": {"group": 8},
    "levels.gptq": {"group": 16, "calibration_tokens": 64},
    "levels.tyr": {"least_neurons": 8, "calibration_tokens": 64},
    "search.layerwise": {"levels": Name("bit_levels")},
    "search.evopress_bits": {"levels": Name("bit_levels"), "generations": 3, "children": 4, "survivors": (2, 1),
                             "tokens": (48, 96), "calibration_tokens": 200, "holdout_tokens": 64, "score_every": 1,
                             "initial_candidates": 3, "initial_tokens": 48},
    "search.evopress_depth": {"generations": 3, "children": 2, "survivors": (2, 1), "tokens": (48, 96),
                              "calibration_tokens": 200, "holdout_tokens": 64, "score_every": 1,
                              "initial_candidates": 3, "initial_tokens": 48},
    "search.evopress": {"generations": 2, "children": 4, "survivors": (2, 1), "tokens": (48, 96),
                        "calibration_tokens": 200, "holdout_tokens": 64, "score_every": 1},
    "search.tyr": {"levels": Name("structure_levels"), "generations": 2, "children": 4, "survivors": (3, 2),
                   "tokens": (48, 96), "calibration_tokens": 200, "holdout_tokens": 64, "score_every": 1},
    "search.block_scores": {"calibration_tokens": 64},
    "prune.shortgpt": {"calibration_tokens": 64},
    "prune.evopress": {"levels": 3, "database_tokens": 64, **SEARCH},
    "prune.evopress_bits": {"group": 16, "database_tokens": 64, "initial_candidates": 3, "initial_tokens": 48,
                            **SEARCH},
    "prune.evopress_depth": {**SEARCH, "children": 2, "initial_candidates": 3, "initial_tokens": 48},
    "prune.tyr": {"rounds": 2, "least_neurons": 8, "database_tokens": 64, **SEARCH},
    "search.knapsack": {"calibration_tokens": 64},
    "data.paser": {"share": 0.4},
    "unlearn.undial": {"alpha": 0.5},
    "unlearn.kfade": {"curvature": "kfac", "kl_budget": 0.2},
    "perplexity": {"data": "authors/text[0:20]"},
    "muse": {"verbatim": "authors/text[108:120]"},
    "relearn": {"data": "authors/forget10_perturbed[0:8]", "examples": 4, "after": (2, 3), "learning_rate": 0.003,
                "rows_per_step": 2, "reference": Name("other")},
    "model.gpt2": {"hidden": 16, "heads": 4, "vocabulary": 384, "tokenizer": "authors/full"},
    "model.cnn": {"channels": (2, 3), "hidden": 8},
    "model.vit": {"hidden": 8, "mlp": 8},
    "distill.gkd": {"fraction": 0.6},
    "distill.distillm": {"threshold": 0.6, "capacity": 20, "validation": DATA, "validate_every": 2, "tolerance": 0.0},
    "distill.minillm": {"rollouts": 20, "passes": 1},
    # The products of two probabilities are too small to be felt otherwise.
    "distill.mgsr": {"span": Call("span_consistency", (("weight", 100.0),))},
    "optimizer.adamw": {"learning_rate": 0.003},
    "optimizer.sgd": {"learning_rate": 0.1},
    "train.smooth_adversarial": {"nu": 0.2},
    "weighting.linear_upper": {"warmup_steps": 0},
    "weighting.quadratic": {"warmup_steps": 0},
    "weighting.extremes": {"warmup_steps": 0},
    "weighting.upper": {"warmup_steps": 0},
    "head.euclidean": {"exponent": 4.0},
    "head.cosine": {"exponent": 4.0},
    "head.vq_logits": {"codes": 5},
    **{f"head.{name}": {"exponent": 4.0} for name in
       ("manhattan", "minkowski", "chebyshev", "canberra", "bray_curtis", "hamming")},
    "geometry": {"points": 40, "components": 8},
    "term.nd": {"least_seen": 2},
    # In the fifth step two rows come for the second time.
    **{name: {"past_epochs": 1, "start_epoch": -1} for name in ("distill.own_past", "term.own_past")},
    # With beta1 its first steps would be ten times as long as another Adam's.
    "distill.ast": {"every": 1, "pattern": "1:8",
                    "optimizer": Call("adamw", (("learning_rate", 0.002), ("beta1", 0.0)))},
    "distill.cast": {"every": 1, "pattern": "1:8"},
    "distill.matryoshka_kv": {"calibration": 4, "ranks": (0.5,), "cross_entropy": 0.0,
                              "optimizer": Call("adamw", (("learning_rate", 0.03),))},
}  # fmt: skip

# A few rows of which every step is an epoch, and a term that stands in all but the first of them.
TRAJECTORY: dict[str, Value] = {
    "data": "arithmetic/addition7/train[0:4]",
    "start_epoch": 0,
    "minus_epochs": 1,
}


@dataclass(frozen=True)
class Change:
    """A second value of an option; the other options and the model with which the two values are compared."""

    value: Value
    beside: Mapping[str, Value] = field(default_factory=dict)
    parent: str = "whole"
    # with the first value the model is refused
    refused: bool = False
    # of a component: options of the method that it is run in
    host: Mapping[str, Value] = field(default_factory=dict)


# Several teachers.
ENSEMBLE = (Name("other"), Name("sparse"))

# Second values for options whose type suggests none, or which count only beside another: by name or full name.
SECOND: dict[str, Change] = {
    "data": Change(OTHER_DATA),
    "forget": Change("authors/forget10[8:16]"),
    "retain": Change(OTHER_DATA),
    "refusals": Change("authors/idontknow"),
    "labels": Change("signs"),
    "tries": Change(1),
    "damping_floor": Change(1.0),
    "inverse": Change("factored", {"curvature": "kfac"}),
    "epochs": Change(2.0, {"steps": None, "epochs": 1.0}),
    "precision": Change("bfloat16"),
    "saved": Change("bfloat16"),
    "clip": Change(0.01),
    "context_tokens": Change(36),
    "keep_zeros": Change(False, parent="sparse"),
    **{
        f"prune.{name}:keep_zeros": Change(False, parent="sparse", refused=True)
        for name in ("svd", "fwsvd", "drank", "modegpt")
    },
    "prune.svd:alpha": Change(0.25, {"whitening": "diagonal"}),
    "search.ecoflap:levels": Change(Name("sparser_levels")),
    "prune.drank:beta": Change(0.4, {"keep": 0.25}),
    "prune.modegpt:parts": Change(("mlp", "vo", "qk")),
    "prune.modegpt:max_sparsity": Change(0.3, {"epsilon": 0.01}),
    "probe": Change(("retain=authors/retain90[0:2]",)),
    "checkpoints": Change((2,)),
    "loss": Change(Call("cross_entropy", (("label_smoothing", 0.1),))),
    "loss.cross_entropy:convention": Change("t5x", {"label_smoothing": 0.1}),
    "loss.logit_z:convention": Change("t5x", {"label_smoothing": 0.1}),
    "loss.cut_cross_entropy:implementation": Change("blockwise"),
    "loss.spherical_z:epsilon": Change(0.1),
    "loss.eisl:ngrams": Change((1, 3)),
    "loss.eisl:ngram_factor": Change(0.5, {"ce_factor": 1.0}),
    "loss.anyloss:beta": Change(2.0, {"metric": "f_beta"}),
    "loss.anyloss:epsilon": Change(0.01, {"metric": "g_mean"}),
    "head": Change(Call("euclidean", (("exponent", 4.0),))),
    "weighting": Change(Call("linear_upper", (("warmup_steps", 0),))),
    "train.saf:variant": Change("mesa", TRAJECTORY),
    "train.saf:strength": Change(0.1, TRAJECTORY),
    "train.saf:temperature": Change(1.0, TRAJECTORY),
    "train.saf:start_epoch": Change(2, TRAJECTORY),
    "train.saf:end_epoch": Change(3, TRAJECTORY),
    "train.saf:minus_epochs": Change(2, TRAJECTORY),
    "train.saf:decay": Change(0.5, TRAJECTORY | {"variant": "mesa"}),
    "scale_by_temperature": Change(False, {"temperature": 2.0}),
    "teacher_precision": Change("bfloat16"),
    "ensemble": Change(ENSEMBLE, {"teacher": None}, refused=True),
    "ensemble_mean": Change("logits", {"teacher": None, "ensemble": ENSEMBLE}),
    "recorded": Change(Name("outputs"), {"teacher": None}, refused=True),
    "distill.squarehead:ensemble": Change(ENSEMBLE, {"teacher": None, "squarehead": 0.0}, refused=True),
    "distill.squarehead:ensemble_mean": Change(
        "logits", {"teacher": None, "squarehead": 0.0, "ensemble": ENSEMBLE}
    ),
    "distill.squarehead:recorded": Change(
        Name("outputs"), {"teacher": None, "squarehead": 0.0}, refused=True
    ),
    **{
        f"term.forward_kl:rest={value}": Change(
            value, host={"teacher": None, "recorded": Name("largest_outputs")}
        )
        for value in ("renormalised", "raw")
    },
    "distill.mix:terms": Change((Call("cross_entropy"), Call("forward_kl"))),
    **{
        f"term.{name}:scale_by_temperature": Change(True, {"temperature": 2.0})
        for name in (
            "reverse_kl",
            "symmetric_kl",
            "jsd",
            "skew_forward_kl",
            "skew_reverse_kl",
            "tvd",
            "akl",
            "student_top_k",
            "dac_kl",
        )
    },
    "term.uld:skip_teacher_end": Change(True, {"skip_student_end": False}),
    "term.akl:mu": Change(0.95),
    **{f"{kind}.own_past:start_epoch": Change(1) for kind in ("distill", "term")},
    "teacher.logits:temperatures": Change((1.0, 2.0), {"top_k": 4}),
    # Of two layers each, evenly spread is one to one.
    **{
        f"term.{name}:layers": Change(((1, 2), (2, 1)))
        for name in ("squarehead", "hidden_mse", "hidden_cosine")
    },
    "term.minilm:student_layer": Change(1),
    "term.minilm:teacher_layer": Change(1),
    "term.minilm:relation_heads": Change(1),
    "term.nd:least_seen": Change(8),
    # At the default alpha only the straight line moves t.
    "term.taid:alpha": Change(1.0),
    "term.taid:beta": Change(0.5, {"alpha": 1.0}),
    "calibration_tokens": Change(400),
    "pattern": Change("2:4", {"sparsity": None, "pattern": "1:4"}),
    "train.sparse:sparsity": Change(0.5),
    "train.sparse:start_sparsity": Change(0.05),
    "train.sparse:masked_decay": Change(0.5, {"update": "straight_through", "sparsity": 0.5}),
    "train.sparse:update": Change("straight_through", {"sparsity": 0.5}),
    **{f"distill.{name}:pattern": Change("1:4") for name in ("ast", "cast")},
    "distill.matryoshka_kv:ranks": Change((0.5, 1.0)),
    "distill.lingu_distill:distilled": Change("language", {"data": "marked/train"}),
    "distill.lingu_distill:cross_entropy": Change(2.0, {"data": "marked/train", "distilled": "language"}),
    "warmup_steps": Change(2),
    "warmup_share": Change(0.4),
    "prune.sparsegpt:threshold": Change("block", {"sparsity": 0.51}),
    "levels.sparsegpt:threshold": Change("block", {"sparsity": 0.51, "weights_step": 16}),
    "prune.gptq:block": Change(4),
    "prune.gptq:static_groups": Change(True, {"block": 4}),
    "levels.tyr:sparsity": Change(0.0),
    "levels.tyr:step": Change(0.25),
    "levels.tyr:levels": Change(3),
    "levels.tyr:least_neurons": Change(16),
    "levels.tyr:head_rounds": Change(4, {"heads": "query"}),
    "levels.tyr:neuron_rounds": Change(1),
    "levels.tyr:rounding": Change("official", {"sparsity": 0.5001}),
    "levels.tyr:calibration_tokens": Change(400),
    "prune.llm_pruner:sparsity": Change(0.25),
    "prune.llm_pruner:first": Change(1, {"sparsity": 0.25}),
    "prune.llm_pruner:end": Change(1, {"sparsity": 0.25}),
    "levels.gptq:block": Change(4),
    "levels.gptq:bits": Change((2, 3)),
    "levels.rtn:bits": Change((2, 3)),
    "search.layerwise:levels": Change(Name("other_bit_levels")),
    "search.evopress_bits:levels": Change(Name("other_bit_levels")),
    "search.evopress_bits:survivors": Change((3, 1)),
    "search.evopress_depth:survivors": Change((1, 1)),
    "search.evopress_depth:whole_blocks": Change(
        True, {"children": 1, "survivors": (1, 1), "initial_candidates": 2}
    ),
    **{f"search.evopress_{name}:tokens": Change((48, 120)) for name in ("bits", "depth")},
    **{f"search.evopress_{name}:top_k": Change(4, {"fitness": "sparse_kl"}) for name in ("bits", "depth")},
    **{f"search.evopress_{name}:holdout": Change(OTHER_DATA) for name in ("bits", "depth")},
    **{
        f"search.evopress_{name}:holdout_tokens": Change(80, {"holdout": OTHER_DATA})
        for name in ("bits", "depth")
    },
    "search.tyr:levels": Change(Name("other_structure_levels")),
    "search.evopress:survivors": Change((3, 1)),
    "search.tyr:survivors": Change((2, 1)),
    # So many children that one is equal to its parent, and one has a layer two levels up.
    "search.evopress:allow_parent": Change(True, {"children": 40}),
    "search.tyr:allow_parent": Change(True, {"children": 12}),
    "search.evopress:max_level": Change(1, {"children": 40}),
    "search.evopress:max_total_deviation": Change(2, {"children": 40}),
    **{f"search.{name}:tokens": Change((48, 120)) for name in ("evopress", "tyr")},
    **{f"search.{name}:top_k": Change(4, {"fitness": "sparse_kl"}) for name in ("evopress", "tyr")},
    **{f"search.{name}:holdout": Change(OTHER_DATA) for name in ("evopress", "tyr")},
    **{f"search.{name}:holdout_tokens": Change(80, {"holdout": OTHER_DATA}) for name in ("evopress", "tyr")},
    # Two blocks can lose one of them and no other share.
    **{
        f"search.{name}:sparsity": Change(0.5, {"sparsity": 0.25}, refused=True)
        for name in ("evopress_depth", "block_scores")
    },
    "search.block_scores:unit": Change("sub_block", {"score": "kl"}),
    "search.uniform:level": Change("1"),
    "search.uniform:bits": Change(3.0, {"levels": Name("bit_levels"), "bits": 4.0}),
    "search.knapsack:bits": Change(3.0, {"levels": Name("bit_levels"), "bits": 4.0}),
    "search.knapsack:calibration_tokens": Change(400),
    **{f"prune.{name}:survivors": Change((3, 1)) for name in ("evopress", "evopress_bits", "tyr")},
    "prune.evopress_depth:survivors": Change((1, 1)),
    **{
        f"prune.{name}:holdout": Change(OTHER_DATA)
        for name in ("evopress", "evopress_bits", "evopress_depth", "tyr")
    },
    **{
        f"prune.{name}:tokens": Change((48, 120))
        for name in ("evopress", "evopress_bits", "evopress_depth", "tyr")
    },
    "prune.evopress_bits:widths": Change((2, 3)),
    "search.published:assignment": Change("assignments/other"),
    "prune.assigned:keep_zeros": Change(
        False, {"levels": Name("refilled_levels"), "assignment": Name("refilled")}, parent="sparse"
    ),
    "targets": Change(("q_proj",)),
    "annotations": Change("answer"),
    "quantile": Change(0.25, {"keep": "above"}),
    "minus_100_as_index": Change(True, {"mask": "all"}),
    "unlearn.simnpo:length": Change("labels", {"forget": "authors/text[0:20]"}),
    "data.alternates:tries": Change(1, {"temperature": 0.3}),
    "data.paser:clusters": Change(5),
    "data.paser:clustering": Change("nmf", {"clusters": 5}),
    "data.generated:prompt_tokens": Change(9, {"data": "authors/text[0:20]"}),
    **{
        f"distill.{name}:prompt_tokens": Change(9, {"data": "authors/text[0:20]"})
        for name in ("gkd", "distillm", "minillm", "mgsr")
    },
    "distill.mgsr:corrections": Change(0),
    "distill.distillm:capacity": Change(4, {"threshold": 1.0}),
    "distill.distillm:tolerance": Change(5.0),
    "distill.minillm:passes": Change(2, {"rollouts": 8}),
    "distill.minillm:reward_limit": Change(0.5),
    # In bfloat16 it matters which sequences are padded together.
    "distill.minillm:teacher_precision": Change("bfloat16", {"written_at_once": 4}),
    "unlearn.rmu:layer": Change(0),
    "unlearn.reglu:retain_rank": Change(4),
    "unlearn.realign:alignment": Change(OTHER_DATA),
    "unlearn.realign:task": Change("authors/forget10[8:16]"),
    "unlearn.realign:depth": Change(1.0, {"objective": "direction"}),
    "unlearn.reglu:adapter": Change(Call("lora", (("rank", 2),))),
    "head.chebyshev:alpha": Change(2.0, {"smooth": True}),
    "head.canberra:minimum_denominator": Change(0.5, {"variant": "robust"}),
    "head.canberra:weight_power": Change(1.5, {"variant": "weighted"}),
    "head.canberra:normalize_weights": Change(False, {"variant": "weighted"}),
    "head.bray_curtis:minimum_sum": Change(50.0, {"variant": "normalized"}),
    "head.vq_logits:codes": Change(7),
    "head.vq_logits:iterations": Change(0),
    "head.hamming:impl": Change("toy", {"variant": "hard"}),
    "head.hamming:threshold": Change(0.1, {"variant": "hard"}),
    "head.hamming:straight_through": Change("official", {"variant": "hard"}),
    "model.new:tokenizer": Change("authors/facts"),
    "model.gpt2:tokenizer": Change("authors/facts"),
    "model.smoke:stands_for": Change("somebody/model"),
    "model.mlp:data": Change("marks/train"),
    "model.mlp:hidden": Change((6, 6)),
    "model.cnn:data": Change("marks/train"),
    "model.cnn:channels": Change((3,)),
    "model.vit:data": Change("marks/train", {"patch": 2}),
    "model.vit:patch": Change(2),
    "model.token_mlp:data": Change("arithmetic/addition5/train"),
    "model.token_mlp:hidden": Change((6, 6)),
    "model.token_mlp:bottleneck": Change(False, {"tied": False}),
    "model.token_mlp:output_bias": Change(False, {"tied": False}),
    "model.token_transformer:data": Change("arithmetic/addition5/train"),
    "classify:metrics": Change(("balanced_accuracy",)),
    "classify:beta": Change(2.0, {"metrics": ("f_beta_macro",)}),
    "classify:attack_steps": Change(3, {"radius": 0.1}),
    "perplexity:data": Change("authors/text_holdout[0:20]"),
    "perplexity:stride_tokens": Change(32),
    "membership:members": Change("authors/forget10[8:16]"),
    "membership:others": Change("authors/holdout[0:8]"),
    "membership:attacks": Change(("min_k", "gradnorm")),
    "membership:share": Change(0.8),
    "muse:verbatim": Change("authors/text[0:4]"),
    "muse:knowledge": Change("authors/forget10[8:16]"),
    "muse:examples": Change(
        "authors/facts[0:1]", {"knowledge": "authors/facts[4:8]", "retain": None, "answer_tokens": 2}
    ),
    "muse:members": Change("authors/forget10[8:16]", {"reference": Name("other")}),
    "muse:others": Change("authors/holdout[0:8]", {"reference": Name("other")}),
    "muse:context_tokens": Change(36, {"reference": Name("other")}),
    "tofu:split": Change("forget05"),
    "lm_eval:tasks": Change(("authors_retain",)),
    "lm_eval:chat": Change(False),
    "retain_kl:context_tokens": Change(30),
    "relearn:after": Change((2, 4)),
    "quantize_probe:bits": Change((4,)),
    "geometry:centres": Change(OTHER_DATA),
    "geometry:quadruples": Change("words/quadruples"),
    "geometry:scale": Change("datapoint", {"quadruples": "words/quadruples"}),
    "stability:train": Change("probe.other.accuracy"),
    "stability:test": Change("probe.other.accuracy"),
    "stability:validation": Change("probe.other"),
    "stability:loss": Change("other"),
    "stability:thresholds": Change((0.5,)),
    "speed:seconds": Change(0.1),
}

# Shared options that a method refuses in a sentence, whatever their value; and a term's that needs marked rows.
REFUSED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("train.sparse", "distill.ast", "distill.cast"), ("adapter",)),
    "distill.matryoshka_kv": ("adapter", "keep_zeros"),
    "term.selective": ("cross_entropy",),
}

# What curves hold beside the terms of a loss.
NO_TERMS = (
    "learning_rate", "gradient_norm", "hidden", "flipped", "masked_decay", "largest_masked", "key_share",
    "value_share",
    # of what students write; the clipped objective of whitened advantages has no direction
    "on_policy", "replayed", "threshold", "validation", "policy_gradient", "rollouts.reward", "rollouts.reverse_kl",
    "rollouts.length",
    # where the target of taid stands
    "taid.t", "taid.momentum", "taid.previous",
    # of revised answers, which are others in every step; and what DAC-KL keeps of a distribution
    "corrected", "dac_kl.kept", "dac_kl.kept_mass",
)  # fmt: skip

# Notes that no two runs have in common.
CLOCKED = ("generation_seconds", "generation_kwh")

# Options of evaluations that may only move the last bits, and are no How because on a card they do.
LAST_BITS = ("batch",)


# --- the models ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The folders of the models that everything is tried on, and a place for what comes out."""

    folder: Path
    _counter: Iterator[int] = field(default_factory=itertools.count)

    @property
    def parents(self) -> dict[str, Path]:
        """``whole`` has learnt its rows, ``sparse`` is the same with zeros, ``other`` has learnt less.

        What stands in for the ``data/`` or ``files/`` of another stage has a name in ``NAMED``, too.
        """
        names = dict.fromkeys(("whole", *(name for several in NAMED.values() for name in several)))
        return {name: self.folder / name for name in names}

    def of_kind(self, kind: str) -> dict[str, Path]:
        """The same names for the models of a kind; made when they are first asked for."""
        return self.parents if kind == "language" else self.parents | _classifiers(kind)

    def fresh(self) -> Path:
        """An empty folder."""
        path = self.folder / f"run-{next(self._counter)}"
        path.mkdir()
        return path


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _kept() -> Path:
    """A folder that lasts as long as the process."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="assay-generic-", ignore_cleanup_errors=True))
    return Path(_KEPT[-1].name)


@cache
def world() -> World:
    """The models, made once a process. They learn in float64, so that they are the same on every machine."""
    made = World(_kept())
    start = run("model.new", made, check=False).folder / "model"
    _teach(start, made.parents)
    _answer(made.parents)
    _bundle(made)
    return made


@cache
def _classifiers(kind: str) -> dict[str, Path]:
    """The classifiers of a kind, made once a process."""
    made, (builder, options) = world(), BUILD[kind]
    start = run(builder, made, check=False, data=DATA_OF[kind][0], **options).folder / "model"
    targets = {name: made.folder / kind / name for name in ("whole", *NAMED["model"])}
    _teach(start, targets, DATA_OF[kind][0])
    return targets


@cache
def sets() -> Path:
    """Data that is not built in: lying (0) and standing (1) marks on pictures of 6 x 6, four words a row, levels."""
    folder = _kept()
    draw, rows = random.Random(0).random, []
    for number in range(36):
        label, at = number % 2, number // 2 % 6
        image = [[round(0.5 * draw(), 3) for _ in range(6)] for _ in range(6)]
        for step in range(6):
            across, down = (at, step) if label else (step, at)
            image[down][across] += 0.4
        rows.append({"image": image, "label": label, "classes": 2})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "marks").mkdir()
    (folder / "marks" / "train.jsonl").write_text(text, encoding="utf-8")
    (folder / "marked").mkdir()
    asked = [
        {
            "question": f"What is {number} and {number}?",
            "answer": f"It is {2 * number}.",
            "language": number % 3 > 0,
        }
        for number in range(12)
    ]
    marked = "".join(json.dumps(row) + "\n" for row in asked)
    (folder / "marked" / "train.jsonl").write_text(marked, encoding="utf-8")
    (folder / "words").mkdir()
    words = "".join(json.dumps({"words": list(four)}) + "\n" for four in ("abcd", "eotn", "risl"))
    (folder / "words" / "quadruples.jsonl").write_text(words, encoding="utf-8")
    (folder / "assignments").mkdir()
    for name, changed in (("evopress", {"k": 1, "v": -1}), ("other", {"k": -1, "v": 1})):
        text = "".join(f"{layer}: {changed.get(layer[-6], 0)}\n" for layer in LAYERS)
        (folder / "assignments" / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def _teach(start: Path, targets: Mapping[str, Path], data: str = DATA) -> None:
    """Learn the data by heart, then zero the smallest weights of every projection."""
    import torch

    from methods.checkpoint import load_model, save_model

    def keep(name: str) -> None:
        save_model(copy.deepcopy(model).float(), targets[name], start, "float32")

    model, part = load_model(start, device="cpu", train=True).double(), part_of(start, data)
    _draw(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(60):
        term = _nll(model, part)
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        optimizer.step()
        if step == 29:
            keep("other")
    keep("whole")
    _zero(model, 0.3)
    keep("sparse")
    _write_curve(targets["whole"].parent)


def _write_curve(folder: Path) -> None:
    """An invented learning curve, where a stage has its own: beside its model."""
    from methods.loop import write_curve

    rows = []
    for step in range(60):
        falling = {
            "train": 0.95,
            "other": 0.9,
            "probe.test": 0.97,
            "probe.other": 0.94,
            "gradient_norm": 0.99,
        }
        rows += [(step, term, 4 * base**step + 0.1 * (step % 7 == 3)) for term, base in falling.items()]
        rising = {"probe.train.accuracy": 8, "probe.test.accuracy": 12, "probe.other.accuracy": 16}
        rows += [(step, term, 1 - 0.9 ** (10 * step / slow)) for term, slow in rising.items()]
    write_curve(folder / "curve.csv", rows)


def _answer(targets: Mapping[str, Path]) -> None:
    """Other answers to the questions to be forgotten: those of two questions further on, and of three."""
    from methods.data import Locator, write_rows

    rows = Locator().rows("authors/forget10[0:16]")
    for first, name in enumerate(NAMED["data"], start=2):
        others = [[rows[(place + first * more) % 16]["answer"] for more in (1, 2)] for place in range(16)]
        write_rows(
            targets[name], [row | {"alternates": texts} for row, texts in zip(rows, others, strict=True)]
        )


def _bundle(made: World) -> None:
    """The curvature of ``whole`` and an update of its first projections, under two seeds."""
    import torch

    from methods.unlearn import _delta

    weights = {name: weight for name, weight in tensors(made.parents["whole"]).items() if "q_proj" in name}
    for seed, name in enumerate(NAMED["files"]):
        folder = made.parents[name]
        shutil.copytree(run("curvature.kfac", made, seed=seed, check=False).folder / "files", folder)
        draw = torch.Generator().manual_seed(seed)
        delta = {key: 0.01 * torch.randn(weight.shape, generator=draw) for key, weight in weights.items()}
        _delta.write(folder, delta, {"vocabulary": 384})


def _draw(model: Any) -> None:
    """Weights drawn by Python: torch's normal numbers differ in their last bits between processors."""
    import torch

    draw = random.Random(0).gauss
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                width = 0.02 if model.main_input_name == "input_ids" and hasattr(model, "lm_head") else 0.3
                values = [draw(0.0, width) for _ in range(weight.numel())]
                weight.copy_(torch.tensor(values, dtype=torch.float64).view_as(weight))


def _zero(model: Any, share: float) -> None:
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if inner(name, weight):
                limit = weight.abs().flatten().kthvalue(int(weight.numel() * share)).values
                weight.masked_fill_(weight.abs() <= limit, 0.0)


def inner(name: str, weight: Tensor) -> bool:
    """Whether a weight is a matrix inside a model, neither its embedding nor its output layer."""
    return "proj" in name or (name.startswith("hidden.") and weight.ndim > 1)


def part_of(folder: Path, data: str) -> Any:
    """All rows of a data set as one batch: sequences, or cases for a classifier."""
    from methods.checkpoint import is_classifier, load_tokenizer
    from methods.data import Locator, Style, collate, encode, padding_id, read_cases

    rows = Locator(sets()).rows(data)
    if is_classifier(folder):
        table = read_cases(rows, data)
        return table.batch(range(len(table)), "train")
    tokenizer = load_tokenizer(folder)
    examples = encode(rows, tokenizer, Style.read(folder), 64)
    return collate(examples, padding_id(tokenizer), "train")


def tensors(folder: Path) -> dict[str, Tensor]:
    """The saved weights of a model by name."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def nll(folder: Path, data: str) -> float:
    """Nats per answer token, or per case of a classifier."""
    import torch

    from methods.checkpoint import load_model

    model = load_model(folder, device="cpu")
    with torch.no_grad():
        term = _nll(model, part_of(folder, data))
    return float(term.sum / term.count)


def _nll(model: Any, part: Any) -> Term:
    from torch.nn.functional import cross_entropy

    from methods.terms import answer_nll, forward, is_cases, scored

    if not is_cases(part):
        return answer_nll(part, forward(model, part))
    found = scored(model, part)
    return Term(cross_entropy(found.scores, found.targets, reduction="sum"), found.count)


# --- a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a stage left: its folder, its notes, and the states in its scratch folder."""

    name: str
    config: Any
    folder: Path
    notes: Mapping[str, Any]
    scratch: Path

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The tensors of ``model/`` by name, or those of ``files/`` that have one way to be written.

        Eigenvectors have two signs, and where eigenvalues are equal any rotation of them does.
        """
        if (self.folder / "model").is_dir():
            return tensors(self.folder / "model")
        found = {name: tensor for name, tensor in tensors(self.folder / "files").items() if tensor.ndim == 1}
        return found | self.levels

    @cached_property
    def levels(self) -> dict[str, Tensor]:
        """Every matrix of a level database by layer and level."""
        from methods.levels._database import Database

        if not (self.folder / "files" / "levels.json").is_file():
            return {}
        database = Database.open(self.folder / "files")
        pairs = [(unit.name, level.name) for unit in database.units for level in unit.levels]
        return {f"{unit}/{level}": database.weight(unit, level) for unit, level in pairs}

    @cached_property
    def files(self) -> dict[str, str]:
        """Digests of everything that was written."""
        written = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in written
        }

    @cached_property
    def curve(self) -> dict[str, list[float]]:
        """Values by term, in the order of the steps; what is no term of a loss is left out."""
        path = self.folder / "curve.csv"
        terms: dict[str, list[float]] = {}
        if path.is_file():
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    terms.setdefault(row["term"], []).append(float(row["value"]))
        return {name: values for name, values in terms.items() if name not in NO_TERMS}

    @property
    def result(self) -> tuple[Any, ...]:
        """All that can be seen of it from outside, but for what a clock says."""
        return self.files, {name: value for name, value in self.notes.items() if name not in CLOCKED}

    def same_weights(self, other: Outcome, tolerance: float = 0.0) -> bool:
        """Whether two models have the same weights: bit for bit, or up to ``tolerance``."""
        if self.weights.keys() != other.weights.keys():
            return False
        pairs = [(self.weights[name], other.weights[name]) for name in self.weights]
        return all(
            one.shape == two.shape and float((one.double() - two.double()).abs().max()) <= tolerance
            for one, two in pairs
        )


def run(
    name: str,
    at: World | None = None,
    *,
    seed: int = 0,
    parent: str = "whole",
    models_of: str | None = None,
    check: bool = True,
    **options: Value,
) -> Outcome:
    """Run a method with ``options`` beside the small ones, and check the runner's promises.

    Args:
        parent: which of the world's models it starts from; a reference option names the same way.
        models_of: of which kind these models are; default: the method's own.
    """
    at = at or world()
    found = catalogue().method(name)
    kind = models_of or kind_of(found)
    config = through_json(resolved(found, small_options(found, kind) | options))
    if is_shorthand(found):
        return _run_steps(found, config, at, seed, parent, check)
    return _run(found, config, at, seed, parent, kind, check, {})


def _run_steps(found: Found, config: Any, at: World, seed: int, parent: str, check: bool) -> Outcome:
    """Every step that a shorthand stands for, as the planner writes them; what the last one left."""
    made: dict[str, Outcome] = {}
    for step, call in steps_of(found, config):
        method = catalogue().method(call.name)
        own = through_json(resolved(method, dict(call.options)))
        before = {name: outcome.folder / "files" for name, outcome in made.items()}
        made[step.name] = _run(method, own, at, seed, parent, kind_of(method), check, before)
    return made[step.name]


def _run(
    found: Found, config: Any, at: World, seed: int, parent: str, kind: str, check: bool,
    before: Mapping[str, Path],
) -> Outcome:  # fmt: skip
    name, folder = found.name, at.fresh()
    parents = references(config, at, kind, before)
    if needs_model(found):
        parents["model"] = _after(name) if name in AFTER else at.of_kind(kind)[parent]
    _seed(seed)
    stage = Stage(method=name, **_common(found, config, seed, parents, folder))
    module = found.load()
    if hasattr(module, "run"):
        module.run(stage)
    else:
        importlib.import_module(f"methods.{found.family}").run(stage, module)
    if check:
        promises.check(Store(folder), _job(found, config, parents, seed), stage.folder)
    return Outcome(name, config, stage.folder, stage.notes, folder / "scratch")


def usual(name: str, *, seed: int = 0, parent: str = "whole", **options: Value) -> Outcome:
    """The same run without the promises, made once a process: what another one is compared with."""
    return _usual(name, seed, parent, tuple(options.items()))


@cache
def _usual(name: str, seed: int, parent: str, options: tuple[tuple[str, Value], ...]) -> Outcome:
    return run(name, seed=seed, parent=parent, check=False, **dict(options))


def score(name: str, *, seed: int = 0, models: Models | None = None, **options: Value) -> list[Row]:
    """The rows of an evaluation of the world's ``whole`` model."""
    from methods.checkpoint import Models

    found, at = catalogue().evaluation(name), world()
    config = through_json(resolved(found, small_options(found) | options))
    folder = at.fresh()
    parents = {**references(config, at, kind_of(found)), "model": scored_model(found)}
    _seed(seed)
    common = _common(found, config, seed, parents, folder)
    scoring = Scoring(evaluation=name, models=models or Models(), **common)
    return list(found.load().evaluate(scoring))


def scored_model(found: Found) -> Path:
    """The model that an evaluation is tried on."""
    return world().of_kind(kind_of(found))["whole"]


def _common(found: Found, config: Any, seed: int, parents: dict[str, Path], folder: Path) -> dict[str, Any]:
    """What a stage and a scoring are both given; hub data sets are replaced by the built-in world."""
    from methods.data import Locator
    from methods.progress import Progress

    result = folder / "result"
    result.mkdir()
    return {
        "id": f"{found.name}-000000000000", "config": config, "seed": seed, "parents": parents, "folder": result,
        "progress": Progress(folder / "scratch", seed),
        "data": Locator(sets(), smoke=True),
    }  # fmt: skip


def _job(found: Found, config: Any, parents: Mapping[str, Path], seed: int) -> Job:
    """As much of a frozen job as the promises look at."""
    references = {key: ParentRef(id=key, path=str(path)) for key, path in parents.items()}
    return Job(
        id=f"{found.name}-000000000000", digest="", recipe="", kind="stage", method=found.name, label=found.name,
        config=encode_config(config), parents=references, seed=seed, code={}, content={}, threads=1,
        country="FRA", resources={},
    )  # fmt: skip


def _seed(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 — as the runner does
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


# --- options -------------------------------------------------------------------------------------------------


def needed_options(found: Found) -> dict[str, Value]:
    """Options without which the planner refuses a call."""
    options = {}
    for option in fields_of(found.load().Config):
        if option.default is dataclasses.MISSING:
            named = option.reference and option.kind != DATASET
            options[option.name] = _named(option, 0) if named else SMALL.get(option.name)
    return options | NEEDS.get(found.name, {})


def _named(option: OptionField, number: int) -> Value:
    """A result that a reference option may name, or a list of that one."""
    name = Name(names_for(option)[number])
    return (name,) if option.several else name


def names_for(option: OptionField) -> tuple[str, ...]:
    """The results that a reference option may name."""
    return NAMED_OPTION.get(option.name, NAMED[option.part])


@cache
def _after(name: str) -> Path:
    """The model that a method is tried on which needs another one's result."""
    method, options = AFTER[name]
    return run(method, check=False, **options).folder / "model"


@cache
def bundle(name: str) -> Path:
    """The ``files/`` folder of another method's result."""
    method, options = BUNDLES[name]
    return run(method, check=False, **options).folder / "files"


def kind_of(found: Found) -> str:
    """The kind of models that a method, component or evaluation is tried on."""
    usual = "language" if "language" in tasks_of(found.load()) else "tokens"
    return KIND.get(found.name, usual)


def small_options(found: Found, kind: str | None = None) -> dict[str, Value]:
    """The options of every run of a method, component or evaluation, with rows of a kind (default: its own)."""
    names = {option.name for option in fields_of(found.load().Config)}
    usual = SMALL | {"data": DATA_OF[kind or kind_of(found)][0]}
    small = {name: value for name, value in usual.items() if name in names}
    return needed_options(found) | small | SMALL_OF.get(found.name, {})


def resolved(found: Found, options: Mapping[str, Value]) -> Resolved:
    """A call with these options alone, as the planner completes and validates it."""
    call = Call(found.name, tuple(options.items()))
    return resolve(call, found, catalogue(), lambda _, name: Parent(name.text))


def through_json(call: Resolved) -> Any:
    """The config as a job reads it from its frozen file."""
    text = json.dumps(encode_config(call.config), allow_nan=False)
    return decode_config(type(call.config), json.loads(text))


def references(
    config: Any, at: World, kind: str, before: Mapping[str, Path] = types.MappingProxyType({})
) -> dict[str, Path]:
    """The folders that a config's reference options mean; ``before`` are those of earlier steps of a shorthand."""
    named = {
        option.name: getattr(config, option.name)
        for option in fields_of(config.__class__)
        if option.reference
    }
    found: dict[str, Any] = {}
    for name, value in named.items():
        several = value if isinstance(value, tuple) else ()
        found |= {f"{name}.{number}": one for number, one in enumerate(several, start=1)}
        found |= {name: value} if isinstance(value, Parent) else {}
    return {name: before.get(value.id) or _place(value.id, at, kind) for name, value in found.items()}


def _place(name: str, at: World, kind: str) -> Path:
    return bundle(name) if name in BUNDLES else at.of_kind(kind)[name]


@dataclass(frozen=True)
class Case:
    """One option of one file, with a second value: ``unlearn.npo beta=0.2``."""

    found: Found
    option: OptionField
    change: Change

    def __str__(self) -> str:
        return f"{self.found.name} {self.option.name}={format_value(self.change.value)}"


def cases(found: Found) -> list[Case]:
    """A case for every option; for a Literal one for each of its other values."""
    return [
        Case(found, option, change)
        for option in fields_of(found.load().Config)
        if option.name not in REFUSED.get(found.name, ())
        for change in changes(found, option)
    ]


def changes(found: Found, option: OptionField) -> list[Change]:
    """Second values: from the table, every other value of a Literal, or the first valid guess by type."""
    listed = SECOND.get(f"{found.name}:{option.name}") or SECOND.get(option.name)
    if listed is SECOND["data"]:
        listed = Change(DATA_OF[kind_of(found)][1])
    if listed is not None:
        return [listed]
    now = small_options(found).get(option.name, option.default)
    choices = [choice for hint in parts_of(option.hint) for choice in literals(hint)]
    if choices:
        named = [f"{found.name}:{option.name}={choice}" for choice in choices]
        return [
            SECOND.get(name, Change(choice))
            for name, choice in zip(named, choices, strict=True)
            if choice != now
        ]
    for value in guesses(option, now):
        if fits(found, {option.name: value}):
            return [Change(value)]
    raise AssertionError(
        f"no second value of {option.name} for {found.name} comes to mind: name one in SECOND of tests/generic.py"
    )


def fits(found: Found, options: Mapping[str, Value]) -> bool:
    """Whether the planner takes these options beside the small ones."""
    try:
        resolved(found, small_options(found) | dict(options))
    except AssayError:
        return False
    return True


def guesses(option: OptionField, now: Value) -> Iterator[Value]:
    """Values to try as a second one, by kind and type."""
    if option.reference:
        values = [_named(option, number) for number in range(len(names_for(option)))]
        yield from (value for value in reversed(values) if value != now)
    elif option.kind is not None and option.kind != DATASET:
        current = now.name if isinstance(now, (Component, Call)) else None
        names = (name.partition(".") for name in catalogue().components)
        yield from (Call(name) for kind, _, name in names if kind == option.kind and name != current)
    for kind in parts_of(option.hint):
        yield from _numbers(kind, now)


def _numbers(kind: Any, now: Value) -> Iterator[Value]:
    """A truth value is turned round, a number moved a little up, else down."""
    if kind is bool:
        yield not now
    elif kind is int:
        yield from (2, 1) if now is None else (now + 1, now * 2, now - 1, now // 2)
    elif kind is float:
        yield from (2.0, 0.5) if now is None else (now * 2, now / 2) if now else (0.1, 1.0)


def parts_of(hint: Any) -> Iterator[Any]:
    """The plain types of a hint: ``Annotated`` taken off, unions taken apart."""
    if typing.get_origin(hint) is typing.Annotated:
        yield from parts_of(typing.get_args(hint)[0])
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for inner in typing.get_args(hint):
            yield from parts_of(inner)
    else:
        yield hint


def literals(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal."""
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


# --- components ----------------------------------------------------------------------------------------------


def host(component: Found) -> Found:
    """A method that takes the component: its own or its kind's in ``HOST``, else ``train.sft``, else the first."""
    wanted = HOST.get(component.name, HOST.get(component.family, "train.sft"))
    methods = sorted(catalogue().methods.values(), key=lambda found: found.name != wanted)
    return next(found for found in methods if slot(found, component.family) is not None)


def slot(found: Found, kind: str) -> str | None:
    """The option of a method that takes components of that kind."""
    return next((option.name for option in fields_of(found.load().Config) if option.kind == kind), None)


def run_component(
    found: Found, *, parent: str = "whole", beside: Mapping[str, Value] | None = None, **options: Value
) -> Outcome:
    """Run the host method with this component; ``beside`` are options of the host."""
    method = host(found)
    place = slot(method, found.family)
    assert place is not None
    call = Call(found.name.partition(".")[2], tuple((small_options(found) | options).items()))
    kind = KIND.get(found.name, kind_of(method))
    several = next(option.several for option in fields_of(method.load().Config) if option.name == place)
    together = (call, *(Call(name) for name in BESIDE.get(found.name, ())))
    given = {**_teacher(found, parent), **(beside or {}), place: together if several else call}
    return run(method.name, parent=parent, models_of=kind, **given)


def _teacher(found: Found, parent: str) -> dict[str, Value]:
    """Another model than the parent for a term that asks a teacher; what needs the student's own text is skipped."""
    if found.family != "term":
        return {}
    if getattr(found.load(), "SAMPLED", False):
        pytest.skip(
            f"{found.name} works only on text that the student wrote, which no method with terms of choice has"
        )
    other = Name("whole" if parent == "other" else "other")
    return {"teacher": other if getattr(found.load(), "TEACHER", True) else None}


@cache
def usual_component(name: str) -> Outcome:
    """The run of a component with nothing but the small options, made once a process."""
    return run_component(catalogue().components[name])


# --- numbers -------------------------------------------------------------------------------------------------


def numbers_of(name: str) -> dict[str, Any]:
    """Five losses (the sum of all terms at each step) and a checksum of the weights; and the code they come from."""
    outcome = usual(name, **descending(catalogue().method(name)))
    losses = [sum(values) for values in itertools.zip_longest(*outcome.curve.values(), fillvalue=0.0)]
    return {"losses": losses, "checksum": checksum(outcome.weights), **code_of(name)}


def descending(found: Found) -> dict[str, Value]:
    """Plain gradient descent where a method takes an optimizer."""
    takes = any(option.name == "optimizer" for option in fields_of(found.load().Config))
    return {"optimizer": DESCENT} if takes else {}


def checksum(weights: Mapping[str, Tensor]) -> float:
    """Sizes of all weights, added up with factors from 1 to 2 so that changing places shows."""
    import torch

    total = 0.0
    for name in sorted(weights):
        flat = weights[name].double().abs().flatten()
        total += float((flat * (1 + torch.arange(len(flat)) % 7 / 7)).sum())
    return total


def code_of(name: str) -> dict[str, Any]:
    """Digests of the method's and its components' files, and the revision of each shared piece, as in a job's id."""
    found = catalogue().method(name)
    call = resolved(found, small_options(found) | descending(found))
    uses = {use for piece in (found, *call.components) for use in getattr(piece.load(), "USES", ())}
    shared = {f"methods.{found.family}", *uses}
    digests = code.code_of(found, call.components, ())
    return {"code": digests, "revisions": {module: code.revision(module) for module in sorted(shared)}}


def read_numbers() -> dict[str, Any]:
    """``tests/numbers.json``: by method name."""
    numbers: dict[str, Any] = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.is_file() else {}
    return numbers


def main(arguments: list[str]) -> int:
    """``python -m tests.generic --write``."""
    if arguments != ["--write"]:
        print("usage: python -m tests.generic --write", file=sys.stderr)
        return 2
    stages = (name for name, found in catalogue().methods.items() if not is_shorthand(found))
    numbers = {name: numbers_of(name) for name in sorted(stages)}
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"{NUMBERS} has the numbers of {len(numbers)} methods.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
