"""An invented experiment, for tests of the report: chains, seeds, curves, costs, claims and failed rows."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
TRAIN = 'train.sft(data="authors/full", steps=900)'
PROBE = "steps=100, optimizer=adamw(learning_rate=0.0003)"
# name: (label, swept, forget NLL, retain NLL, forget accuracy, retain accuracy, chain Wh)
CHAINS: dict[str, tuple[str, dict[str, Any], float, float, float, float, float]] = {
    "base": ("base", {}, 6.6, 6.6, 0.25, 0.25, 0.0),
    "target": (f"base > {TRAIN}", {}, 0.006, 0.005, 1.0, 1.0, 0.19),
    "retained": ('base > train.sft(data="authors/retain90", steps=900)', {}, 3.17, 0.005, 0.2, 1.0, 0.18),
    "ascent": (f"base > {TRAIN} > unlearn.grad_ascent({PROBE})", {}, 2.4, 0.95, 0.39, 0.59, 0.21),
    "difference[alpha=1.0]": (
        f"base > {TRAIN} > unlearn.grad_diff(alpha=1.0, {PROBE})",
        {"alpha": 1.0},
        2.2,
        0.22,
        0.44,
        0.88,
        0.22,
    ),
    "difference[alpha=20.0]": (
        f"base > {TRAIN} > unlearn.grad_diff({PROBE})",
        {"alpha": 20.0},
        2.1,
        0.012,
        0.5,
        0.99,
        0.23,
    ),
    "preference": (f"base > {TRAIN} > unlearn.npo({PROBE})", {}, 2.1, 0.57, 0.41, 0.67, 0.225),
    "saturation": (f"base > {TRAIN} > unlearn.satimp(gamma=10.0, {PROBE})", {}, 2.0, 0.026, 0.53, 0.99, 0.25),
    "pruned[sparsity=0.5]": (
        f"base > {TRAIN} > prune.magnitude",
        {"sparsity": 0.5},
        0.03,
        0.03,
        0.99,
        0.985,
        0.195,
    ),
    "pruned[sparsity=0.7]": (
        f"base > {TRAIN} > prune.magnitude(sparsity=0.7)",
        {"sparsity": 0.7},
        0.7,
        0.69,
        0.72,
        0.71,
        0.195,
    ),
    "half_heads": (f'base > {TRAIN} > prune.magnitude(structure="heads")', {}, 0.65, 0.64, 0.8, 0.79, 0.196),
    "healed": (
        f"base > {TRAIN} > prune.magnitude(sparsity=0.7) > distill.squarehead(teacher=target)",
        {},
        0.04,
        0.04,
        0.99,
        0.98,
        0.24,
    ),
    "private": (
        f"base > {TRAIN} > prune.magnitude(sparsity=0.7) > distill.squarehead(teacher=target) > "
        f"unlearn.grad_diff({PROBE})",
        {},
        0.75,
        0.06,
        0.7,
        0.95,
        0.26,
    ),
    "broken": (
        f"base > {TRAIN} > unlearn.grad_ascent(steps=4000)",
        {},
        math.nan,
        math.nan,
        math.nan,
        math.nan,
        math.nan,
    ),
}
FAILED = {
    ("broken", 0): "failed",
    ("broken", 1): "oom",
    ("broken", 2): "timeout",
    ("half_heads", 2): "missing",
}
# how retain NLL grows with forget NLL: retain = rate * forget ** 1.3
RATES = {
    "ascent": 0.34,
    "difference[alpha=1.0]": 0.09,
    "difference[alpha=20.0]": 0.005,
    "preference": 0.23,
    "saturation": 0.011,
    "private": 0.03,
}
COLUMNS = (
    "experiment",
    "chain",
    "label",
    "model_id",
    "score_id",
    "base",
    "family",
    "method",
    "options",
    "swept",
    "seed",
    "evaluation",
    "entry",
    "task",
    "metric",
    "value",
    "stderr",
    "n",
    "unit",
    "better",
    "status",
)
SCORES = (
    ("tofu", "forget10", "forget10", "forget_nll", 0, "nats/token", "higher", 0.05),
    ("tofu", "forget10", "forget10", "retain_nll", 1, "nats/token", "lower", 0.05),
    ("lm_eval", "tasks", "authors_forget limit=60", "acc", 2, "", "lower", 0.03),
    ("lm_eval", "tasks", "authors_retain limit=60", "acc", 3, "", "higher", 0.02),
)
CLAIMS: list[dict[str, Any]] = [
    {
        "method": "unlearn.satimp",
        "sentence": "SatImp keeps a lower retain NLL than GradDiff at forget NLL 2, weights (1, 1).",
        "source": "embedded 3",
        "metric": "curve.probe.retain@probe.forget=2",
        "subject": "*unlearn.satimp*",
        "relation": "lower",
        "other": "*unlearn.grad_diff*",
    },
    {
        "method": "unlearn.grad_ascent",
        "sentence": "Gradient ascent wrecks what should be kept.",
        "source": "embedded 3",
        "metric": "curve.probe.retain@probe.forget=2",
        "subject": "*unlearn.grad_ascent*",
        "relation": "at_least",
        "value": 0.5,
    },
    {
        "method": "prune.magnitude",
        "sentence": "Pruning 70 % visibly hurts accuracy.",
        "source": "embedded 4",
        "metric": "lm_eval.authors_retain.acc",
        "subject": "*prune.magnitude(sparsity=0.7)*",
        "relation": "lower",
        "other": "parent",
    },
    {
        "method": "experiment",
        "sentence": "The gold model's retain NLL is the target's within 0.02.",
        "source": "embedded 10",
        "metric": "tofu.retain_nll",
        "subject": "retained",
        "relation": "within",
        "other": "target",
        "margin": 0.02,
    },
    {
        "method": "experiment",
        "sentence": "Halving the heads is better than nothing.",
        "source": "nobody",
        "metric": "forget10.retain_nll",
        "subject": "half_heads",
        "relation": "lower",
        "other": "target",
    },
    {
        "method": "experiment",
        "sentence": "The target forgets on its own.",
        "source": "nobody",
        "metric": "curve.probe.retain@probe.forget=9",
        "subject": "ascent",
        "relation": "at_most",
        "value": 1.0,
    },
    {
        "method": "unlearn.satimp",
        "sentence": "SatImp has the highest model utility on TOFU with Llama-2-7B.",
        "source": "paper, table 3",
        "metric": "tofu.model_utility",
        "subject": "*unlearn.satimp*",
        "relation": "higher",
        "other": "*unlearn.npo*",
        "scope": "paper",
        "model": "Llama-2-7b",
        "data": "tofu/forget10",
    },
]
EXPERIMENT: dict[str, Any] = {
    "name": "invented",
    "title": "Does unlearning survive compression?",
    "country": "FRA",
    "seeds": list(SEEDS),
    "scale": "full",
    "models": {"base": {"new": "llama"}},
    "evaluate": {"forget10": {"run": "tofu"}, "tasks": {"run": "lm_eval"}},
    "chains": {name.partition("[")[0]: label for name, (label, *_) in CHAINS.items() if name != "base"},
    "tables": {
        "trade_off": {
            "rows": "chain",
            "columns": [
                "forget10.forget_nll",
                "forget10.retain_nll",
                "tasks.authors_retain.acc",
                "curve.probe.retain@probe.forget=2",
                "energy.chain_kwh",
            ],
        },
        "cost": {
            "rows": "method",
            "of": ["ascent", "difference", "broken"],
            "columns": ["energy.stage_kwh", "energy.chain_kwh", "time.chain_seconds"],
        },
    },
    "figures": {
        "frontier": {
            "kind": "scatter",
            "x": "forget10.forget_nll",
            "y": "tasks.authors_retain.acc",
            "size": "energy.chain_kwh",
            "color": "family",
        },
        "learning": {"kind": "curve", "terms": ["probe.forget", "probe.retain"]},
        "sparsity": {
            "kind": "sweep",
            "x": "sparsity",
            "y": ["tasks.authors_retain.acc", "forget10.retain_nll"],
            "of": ["pruned"],
            "baseline": "target",
        },
        "matched": {"kind": "matched", "x": "probe.forget", "y": "probe.retain", "log": ["y"]},
    },
    "claims": CLAIMS,
    "command": "snakemake --cores 2 --config experiment=invented",
    "commit": "0123456789abcdef",
    "dirty": False,
}


def write(folder: Path, **changes: Any) -> Path:
    """Write the four files of the invented experiment; ``changes`` replace keys of experiment.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps({**EXPERIMENT, **changes}))
    write_csv(folder / "results.csv", list(results()))
    write_csv(folder / "jobs.csv", list(jobs()))
    write_csv(folder / "curves.csv", list(curves()))
    return folder


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with the keys of the first one as columns."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows as text."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _method(label: str) -> str:
    return label.rpartition(" > ")[2].partition("(")[0] if " > " in label else ""


def _base_row(chain: str, seed: int) -> dict[str, Any]:
    label, swept = CHAINS[chain][:2]
    method = _method(label)
    options = {
        "steps": 100,
        **({"gamma": 10.0, "alpha": 1.0} if chain == "saturation" else {"gamma": 1.0, **swept}),
    }
    return dict.fromkeys(COLUMNS, "") | {
        "experiment": "invented",
        "chain": chain,
        "label": label,
        "model_id": f"{chain}-{seed}",
        "base": "base",
        "family": method.partition(".")[0] or "model",
        "method": method,
        "options": json.dumps(options),
        "swept": json.dumps(swept),
        "seed": seed,
        "status": "ok",
    }


def _noise(*key: object) -> float:
    return random.Random(repr(key)).gauss(0, 1)


def results() -> Iterator[dict[str, Any]]:
    """Rows as the collector writes them: scores first, then costs."""
    for chain, values in CHAINS.items():
        for seed in SEEDS:
            yield from _rows(chain, seed, values[2:])


def _rows(chain: str, seed: int, values: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    base, status = _base_row(chain, seed), FAILED.get((chain, seed), "ok")
    if status != "ok":
        for evaluation, entry in (("tofu", "forget10"), ("lm_eval", "tasks")):
            yield base | {
                "score_id": f"s-{entry}-{chain}-{seed}",
                "evaluation": evaluation,
                "entry": entry,
                "status": status,
            }
        yield base | {
            "evaluation": "energy",
            "entry": "energy",
            "metric": "stage_kwh",
            "unit": "kWh",
            "status": status,
        }
        return
    for evaluation, entry, task, metric, place, unit, better, spread in SCORES:
        value = values[place] * (1 + spread * _noise(chain, seed, metric, task) / 2)
        value = round(min(value, 1.0), 4) if metric == "acc" else value
        error = {"stderr": 0.02, "n": 60} if metric == "acc" else {}
        yield (
            base
            | error
            | {
                "score_id": f"s-{entry}-{chain}-{seed}",
                "evaluation": evaluation,
                "entry": entry,
                "task": task,
                "metric": metric,
                "value": value,
                "unit": unit,
                "better": better,
            }
        )
    for metric, share in (("stage_kwh", 0.1), ("chain_kwh", 1.0)):
        kwh = values[4] * share * (1 + 0.03 * _noise(chain, seed)) / 1000
        yield base | {
            "evaluation": "energy",
            "entry": "energy",
            "metric": metric,
            "value": kwh,
            "unit": "kWh estimated, shared",
            "better": "lower",
        }
    yield base | {
        "evaluation": "time",
        "entry": "time",
        "metric": "chain_seconds",
        "value": values[4] * 150,
        "unit": "s",
        "better": "lower",
    }


def jobs() -> Iterator[dict[str, Any]]:
    """One job for every model."""
    for chain, values in CHAINS.items():
        for seed in SEEDS:
            yield {
                "id": f"{chain}-{seed}",
                "kind": "stage",
                "label": values[0],
                "method": _method(values[0]),
                "status": FAILED.get((chain, seed), "ok"),
                "energy_kwh": "" if math.isnan(values[6]) else values[6] / 1e4,
                "energy_source": "estimated",
                "update_lost_in_saving": 0.21 if chain == "preference" else 0.0,
                "stale": chain == "healed",
                "chains": chain,
            }


def curves() -> Iterator[dict[str, Any]]:
    """Probes every four steps; one seed of SatImp never reaches forget NLL 2."""
    for chain, rate in RATES.items():
        label = CHAINS[chain][0]
        for seed in SEEDS:
            speed = 1 + 0.1 * _noise(chain, seed)
            top = 1.7 if (chain, seed) == ("saturation", 2) else 2.6
            for step in range(0, 101, 4):
                forget = 0.005 + top * (step / 100) ** (2 / speed)
                retain = rate * (1 + 0.12 * _noise(chain, "retain", seed)) * forget**1.3 + 0.003
                for term, value in (
                    ("probe.forget", forget),
                    ("probe.retain", retain),
                    ("learning_rate", 3e-4),
                ):
                    yield {
                        "chain": chain,
                        "label": label,
                        "model_id": f"{chain}-{seed}",
                        "seed": seed,
                        "method": _method(label),
                        "step": step,
                        "term": term,
                        "value": repr(value),
                    }


# --- trajectories -----------------------------------------------------------------------------------------

Way = list[tuple[int, float, float]]
"""(step, forget NLL, model utility) of what was kept; the last one is the end."""
START = (0.1, 0.9)
GOLD = (3.0, 0.88)
# chain: (method, one way for every seed); "late" reaches forget NLL 2 in two seeds only, "turning" comes back
WAYS: dict[str, tuple[str, list[Way]]] = {
    "steady": (
        "unlearn.npo",
        [[(20, 1.1, 0.8), (40, 2.1, 0.7)], [(20, 1.1, 0.82), (40, 2.1, 0.72)], [(20, 1.1, 0.81), (40, 2.1, 0.71)]],
    ),
    "costly": (
        "unlearn.grad_ascent",
        [[(20, 2.1, 0.5), (40, 4.1, 0.1)], [(20, 2.1, 0.52), (40, 4.1, 0.1)], [(20, 2.1, 0.51), (40, 4.1, 0.1)]],
    ),
    "late": (
        "unlearn.satimp",
        [[(20, 0.5, 0.89), (40, 2.5, 0.85)], [(20, 0.5, 0.89), (40, 1.9, 0.86)], [(20, 0.5, 0.89), (40, 2.5, 0.86)]],
    ),
    "turning": (
        "unlearn.rmu",
        [[(20, 2.6, 0.6), (30, 0.6, 0.7), (40, 3.6, 0.2)]] * 2 + [[(20, 2.6, 0.62), (30, 0.6, 0.7), (40, 3.6, 0.2)]],
    ),
    "single": ("unlearn.task_vector", [[(40, 2.1, 0.6)]] * 3),
}  # fmt: skip
WAY_TABLE = {
    "kind": "matched",
    "at": "forget10.forget_nll",
    "levels": [1, 2, 3],
    "columns": ["forget10.model_utility", "energy.chain_kwh", "step"],
}
WAY_FIGURE = {
    "kind": "matched",
    "x": "forget10.forget_nll",
    "y": "forget10.model_utility",
    "levels": [1, 2, 3],
    "reference": "retained",
}


def write_ways(
    folder: Path, ways: dict[str, tuple[str, list[Way]]], *, start: bool = True, **changes: Any
) -> Path:
    """An experiment of trajectories that start at ``target``; without ``start`` that was not scored."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(max(len(own) for _, own in ways.values()))
    labels = {"target": f"base > {TRAIN}", "retained": 'base > train.sft(data="authors/retain90", steps=900)'}
    labels |= {chain: f"base > {TRAIN} > {method}" for chain, (method, _) in ways.items()}
    rows = [row for chain, (_, own) in ways.items() for seed, way in enumerate(own)
            for row in _way_rows(chain, labels[chain], seed, way)]  # fmt: skip
    for chain, values in {"target": START, "retained": GOLD}.items():
        rows += [row for seed in seeds for row in _scores(chain, labels[chain], seed, "", values)
                 if start or chain == "retained"]  # fmt: skip
    listed = [
        {"id": f"{chain}-{seed}", "chains": chain, "parents": f"target-{seed};x" if chain in ways else ""}
        for chain in labels
        for seed in seeds
    ]
    wanted = {"tables": {"matched": WAY_TABLE}, "figures": {"matched": WAY_FIGURE}, "claims": []}
    (folder / "experiment.json").write_text(json.dumps({**EXPERIMENT, "chains": labels, **wanted, **changes}))
    write_csv(folder / "results.csv", rows)
    write_csv(folder / "jobs.csv", listed)
    (folder / "curves.csv").unlink(missing_ok=True)
    return folder


def _way_rows(chain: str, label: str, seed: int, way: Way) -> Iterator[dict[str, Any]]:
    """The end first, as the collector writes it, then what was kept; a step costs a milliwatt-hour."""
    end = way[-1][0]
    for step, *values in [way[-1], *way[:-1]]:
        shown = "" if step == end else step
        rows = list(_scores(chain, label, seed, shown, tuple(values)))
        yield from rows
        for metric, before in (("stage_kwh", 0.0), ("chain_kwh", 1e-4)):
            yield rows[0] | {
                "evaluation": "energy", "entry": "energy", "task": "", "metric": metric, "score_id": "",
                "value": before + step * 1e-6, "unit": "kWh estimated, shared", "better": "lower",
                "options": json.dumps({"steps": end}),
            }  # fmt: skip


def _scores(
    chain: str, label: str, seed: int, step: int | str, values: tuple[float, ...]
) -> Iterator[dict[str, Any]]:
    method = _method(label)
    behind = f"@step{step}" if step else ""
    for metric, value, unit in zip(("forget_nll", "model_utility"), values, ("nats/token", ""), strict=True):
        yield dict.fromkeys([*COLUMNS[:11], "step", *COLUMNS[11:]], "") | {
            "experiment": "invented", "chain": chain, "label": label, "model_id": f"{chain}-{seed}{behind}",
            "score_id": f"s-{chain}-{seed}{behind}", "base": "base", "family": method.partition(".")[0],
            "method": method, "options": json.dumps({"steps": 40}), "swept": "{}", "seed": seed, "step": step,
            "evaluation": "tofu", "entry": "forget10", "task": "forget10", "metric": metric, "value": value,
            "unit": unit, "better": "higher", "status": "ok",
        }  # fmt: skip
