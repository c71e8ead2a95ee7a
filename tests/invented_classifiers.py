"""An invented experiment on classifiers, for tests of the report: grokking curves, class vectors, accuracies, costs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import invented

SEEDS = (0, 1, 2)
CLASSES = 59
STEPS, EVERY = 4000, 50
# chain: (model, call, test accuracy, step at which half of it is there, share of PC1-2, stage Wh)
CHAINS: dict[str, tuple[str, str, float, int, float, float]] = {
    "control": ("mlp", 'train.classify(data="arithmetic/addition59/train")', 0.42, 3200, 0.21, 0.9),
    "tied": ("mlp", 'train.classify(data="arithmetic/addition59/train", tied=true)', 0.99, 900, 0.55, 0.95),
    "harmonic": ("mlp", "train.classify(head=euclidean)", 0.998, 500, 0.97, 1.2),
    "cosine": ("mlp", "train.classify(head=cosine(exponent=16))", 0.985, 650, 0.71, 1.15),
    "manhattan": ("mlp", "train.classify(head=manhattan)", 0.6, 2100, 0.33, 2.6),
    "control_attention": ("transformer", "train.classify", 0.93, 1500, 0.12, 1.9),
    "harmonic_attention": ("transformer", "train.classify(head=euclidean)", 0.999, 700, 0.93, 2.3),
    "broken": ("mlp", "train.classify(loss=gce(q=0.7))", math.nan, 0, math.nan, math.nan),
}
FAILED = {("broken", seed): status for seed, status in enumerate(("failed", "oom", "timeout"))}
FAILED |= {("manhattan", 2): "missing"}
EXPERIMENT: dict[str, Any] = {
    "name": "classifiers", "title": "Does a distance head grok?", "country": "FRA", "seeds": list(SEEDS),
    "scale": "full", "commit": "0123456789abcdef", "dirty": False,
    "command": "snakemake --cores 2 --config experiment=classifiers",
    "models": {"mlp": {"new": "token_mlp"}, "transformer": {"new": "token_transformer"}},
    "evaluate": {"test": {"run": "classify"}, "geometry": {"run": "geometry"}},
    "chains": {name: f"{model} > {call}" for name, (model, call, *_) in CHAINS.items()},
    "tables": {"quality": {"columns": [
        "test.accuracy", "step@curve.probe.test.accuracy=0.9", "energy.stage_kwh",
        "energy.stage_kwh relative to control", "time.stage_seconds relative to control",
    ]}},
    "figures": {
        "grokking": {"kind": "curve", "terms": ["probe.train.accuracy", "probe.test.accuracy"], "panels": "chain",
                     "log": ["x"], "runs": "lines", "of": ["control", "tied", "harmonic"]},
        "quality": {"kind": "bars", "metrics": ["test.accuracy", "energy.stage_kwh relative to control"],
                    "group": "base"},
        "circles": {"kind": "plane", "entry": "geometry", "of": ["control", "harmonic", "broken"]},
    },
    "claims": [],
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    """Write the four files; ``changes`` replace keys of experiment.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps({**EXPERIMENT, **changes}))
    invented.write_csv(folder / "results.csv", list(results()))
    invented.write_csv(folder / "jobs.csv", [
        {"id": f"{chain}-{seed}", "chains": chain, "status": FAILED.get((chain, seed), "ok"), "label": label(chain)}
        for chain in CHAINS for seed in SEEDS
    ])  # fmt: skip
    invented.write_csv(folder / "curves.csv", list(curves()))
    return folder


def label(chain: str) -> str:
    """``mlp > train.classify(head=euclidean)``."""
    return " > ".join(CHAINS[chain][:2])


def noise(*key: object) -> float:
    """A normal number that is always the same for a key."""
    return random.Random(repr(key)).gauss(0, 1)


def results() -> Iterator[dict[str, Any]]:
    """Rows as the collector writes them."""
    for chain, (model, _, *values) in CHAINS.items():
        for seed in SEEDS:
            base = dict.fromkeys(invented.COLUMNS, "") | {
                "experiment": "classifiers", "chain": chain, "label": label(chain), "model_id": f"{chain}-{seed}",
                "base": model, "family": "train", "method": "train.classify", "options": "{}", "swept": "{}",
                "seed": seed, "status": FAILED.get((chain, seed), "ok"),
            }  # fmt: skip
            yield from _lost(base) if base["status"] != "ok" else _rows(base, chain, seed, values)


def _lost(base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for evaluation, entry in (("classify", "test"), ("geometry", "geometry")):
        yield base | {"score_id": f"{entry}-{base['model_id']}", "evaluation": evaluation, "entry": entry}
    yield base | {"evaluation": "energy", "entry": "energy", "metric": "stage_kwh", "unit": "kWh"}


def _rows(base: dict[str, Any], chain: str, seed: int, values: list[float]) -> Iterator[dict[str, Any]]:
    accuracy, _, share, watt_hours = values
    test = base | {"score_id": f"test-{chain}-{seed}", "evaluation": "classify", "entry": "test"}
    value = min(1.0, accuracy + 0.02 * noise(chain, seed))
    yield test | {
        "task": "arithmetic/addition59/test",
        "metric": "accuracy",
        "value": value,
        "better": "higher",
    }
    geometry = base | {"score_id": f"geometry-{chain}-{seed}", "evaluation": "geometry", "entry": "geometry"}
    whole = {"task": f"class_vectors vectors={CLASSES}", "metric": "explained_variance_2", "better": "higher"}
    yield geometry | whole | {"value": share + 0.01 * noise(seed, chain)}
    for what, within in (("", share), ("embedding ", share / 2)):
        for number in range(CLASSES):
            for metric, place in zip(("pc1", "pc2"), _spot(chain, seed, number, within), strict=True):
                yield geometry | {"task": f"{what}class {number}", "metric": metric, "value": place}
    kwh = watt_hours * (1 + 0.03 * noise(chain, seed) + 0.1 * noise(seed)) / 1000
    yield base | {
        "evaluation": "energy", "entry": "energy", "metric": "stage_kwh", "value": kwh, "unit": "kWh estimated",
        "better": "lower",
    }  # fmt: skip
    yield base | {
        "evaluation": "time", "entry": "time", "metric": "stage_seconds", "value": kwh * 9e4, "unit": "s",
        "better": "lower",
    }  # fmt: skip


def _spot(chain: str, seed: int, number: int, share: float) -> tuple[float, float]:
    """A class on a circle of frequency 7, disturbed the more the less its plane explains."""
    angle, spread = 2 * math.pi * 7 * number / CLASSES, (1 - share) * 0.6
    return (
        3 * (math.cos(angle) + spread * noise(chain, seed, number)),
        3 * (math.sin(angle) + spread * noise(number, seed, chain)),
    )


def curves() -> Iterator[dict[str, Any]]:
    """Train and test accuracy and NLL along 4,000 steps."""
    for chain, (_, _, accuracy, half, _, _) in CHAINS.items():
        for seed in SEEDS:
            if (chain, seed) not in FAILED:
                for step in range(0, STEPS + 1, EVERY):
                    yield from _logged(chain, seed, step, accuracy, half * (1 + 0.2 * noise(seed, chain)))


def _logged(chain: str, seed: int, step: int, accuracy: float, half: float) -> Iterator[dict[str, Any]]:
    train = 1 / (1 + math.exp(-(step - 250) / 60))
    test = accuracy / (1 + math.exp(-(step - half) / 120))
    found = {
        "train": 4.0 * (1 - train) + 0.01, "learning_rate": 0.002,
        "probe.train": 4.0 * (1 - train) + 0.01, "probe.train.accuracy": train,
        "probe.test": 4.0 * (1 - test) + 0.01, "probe.test.accuracy": test,
    }  # fmt: skip
    for term, value in found.items():
        yield {
            "chain": chain, "label": label(chain), "model_id": f"{chain}-{seed}", "seed": seed,
            "method": "train.classify", "step": step, "term": term, "value": repr(value),
        }  # fmt: skip
