"""What an output head costs beside a linear one, in memory and time of one forward and backward pass.

    python tests/benchmarks/heads.py [HEAD ...] [--quick]

Peak memory and time of cross-entropy on every head at 2,048 tokens, 32,000 classes and width 256, each in a process of
its own, over those of a linear head: at most 3 times the memory, and 1.3 times the time where the distance is a matrix
product. The heads that work in blocks take at most a third of the time of their formula by plain broadcasting, at a
size where that fits. Cut cross-entropy at 128,000 classes needs at most a quarter of the linear head's memory. One
thread; processor time, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from methods.find import catalogue
from methods.stage import AssayError

MEMORY_LIMIT, TIME_LIMIT, SPEEDUP_LIMIT, CUT_LIMIT = 3.0, 1.3, 3.0, 0.25
# Tokens, classes, width: of the comparison with a linear head, of that with plain broadcasting, of cut cross-entropy.
SIZES = {"head": (2048, 32000, 256), "naive": (256, 2000, 128), "cut": (1024, 128000, 256)}
QUICK = {"head": (512, 4000, 64), "naive": (64, 500, 64), "cut": (256, 32000, 64)}
REPEATS = 5


@dataclass(frozen=True)
class Subject:
    """A head with options; a matrix product or in blocks."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    product: bool = False

    def __str__(self) -> str:
        return " ".join([self.name, *(str(value) for value in self.options.values())])


SUBJECTS = [
    Subject("euclidean", product=True),
    Subject("cosine", product=True),
    Subject("mahalanobis", {"variant": "standard"}, product=True),
    Subject("mahalanobis", {"variant": "diagonal"}, product=True),
    Subject("mahalanobis", {"variant": "cholesky"}, product=True),
    Subject("hamming", {"variant": "hard"}, product=True),
    Subject("cosine_similarity", product=True),
    Subject("vq_logits", {"codes": 1024}, product=True),
    Subject("manhattan"),
    Subject("minkowski", {"p": 1.5}),
    Subject("minkowski", {"p": 3.0}),
    Subject("chebyshev"),
    Subject("chebyshev", {"smooth": True}),
    Subject("chebyshev", {"impl": "toy"}),
    Subject("canberra"),
    Subject("canberra", {"variant": "robust", "minimum_denominator": 0.7}),
    Subject("canberra", {"variant": "weighted"}),
    Subject("bray_curtis", {"variant": "standard"}),
    Subject("bray_curtis"),
    Subject("bray_curtis", {"variant": "normalized"}),
    Subject("hamming"),
]


def main() -> int:
    """Print the tables; exit code 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "heads", nargs="*", help="names such as canberra; default: all, and cut cross-entropy"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, at which the ratios mean little")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        print(json.dumps(child(**json.loads(arguments.child))))
        return 0
    sizes = QUICK if arguments.quick else SIZES
    over = heads(arguments.heads, sizes)
    if not arguments.heads or "cut_cross_entropy" in arguments.heads:
        over += cut(sizes["cut"])
    if arguments.quick:
        print("small sizes: the limits are not for them")
        return 0
    print(f"over a limit: {', '.join(over) or 'none'}")
    return 1 if over else 0


def heads(names: list[str], sizes: dict[str, tuple[int, int, int]]) -> list[str]:
    """The table of the heads; which of them exceed a limit."""
    tokens, classes, width = sizes["head"]
    empty = ask("nothing", {}, sizes["head"])["peak"]
    plain = ask("linear", {}, sizes["head"])
    plain["peak"] -= empty
    print(f"{tokens:,} tokens, {classes:,} classes, width {width}; naive: {sizes['naive']}; one thread")
    print(f"linear head: {plain['peak'] / 2**20:,.0f} MiB, {plain['seconds']:.2f} s")
    print(f"{'head':32}{'memory (<= 3)':>15}{'time':>9}{'limit':>7}{'naive / blocks (>= 3)':>24}")
    over = []
    for subject in SUBJECTS:
        if (names and subject.name not in names) or not exists(subject.name):
            continue
        over += row(subject, sizes, empty, plain)
    return over


def exists(name: str) -> bool:
    """Whether there is such a head."""
    return f"head.{name}" in catalogue().components


def row(
    subject: Subject, sizes: dict[str, tuple[int, int, int]], empty: float, plain: dict[str, float]
) -> list[str]:
    """Print a head's line; its name where it exceeds a limit."""
    alone = ask(subject.name, subject.options, sizes["head"])
    memory, slower = (alone["peak"] - empty) / plain["peak"], alone["seconds"] / plain["seconds"]
    faster = math.nan
    if subject.product:
        pair = ask(subject.name, subject.options, sizes["head"], against="linear")
        slower = pair["seconds"] / pair["other"]
    else:
        pair = ask(subject.name, subject.options, sizes["naive"], against="naive")
        faster = pair["other"] / pair["seconds"]
    limit, speedup = (f"{TIME_LIMIT}", "-") if subject.product else ("-", f"{faster:.1f}")
    print(f"{subject!s:32}{memory:15.2f}{slower:9.2f}{limit:>7}{speedup:>24}", flush=True)
    late = slower > TIME_LIMIT if subject.product else faster < SPEEDUP_LIMIT
    return [str(subject)] if memory > MEMORY_LIMIT or late else []


def cut(size: tuple[int, int, int]) -> list[str]:
    """The line of cut cross-entropy; its name where it exceeds the limit."""
    if "loss.cut_cross_entropy" not in catalogue().components:
        return []
    empty = ask("nothing", {}, size)["peak"]
    plain, found = ask("linear", {}, size), ask("cut_cross_entropy", {}, size)
    memory = (found["peak"] - empty) / (plain["peak"] - empty)
    print(
        f"cut cross-entropy, {size[0]:,} tokens, {size[1]:,} classes: {memory:.2f} of the linear head's memory "
        f"(<= {CUT_LIMIT}), {found['seconds'] / plain['seconds']:.2f} times its time"
    )
    return ["cut_cross_entropy"] if memory > CUT_LIMIT else []


def ask(
    name: str, options: dict[str, Any], size: tuple[int, int, int], against: str | None = None
) -> dict[str, float]:
    """What a process of its own measures: ``peak`` in bytes, ``seconds``, and those of the ``other``."""
    request = json.dumps({"name": name, "options": options, "size": size, "against": against})
    command = [sys.executable, __file__, "--child", request]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} {options} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- in a process of its own ------------------------------------------------------------------------------


def child(
    name: str, options: dict[str, Any], size: tuple[int, int, int], against: str | None
) -> dict[str, float]:
    """Run a head, alone or in turn with another, and measure."""
    tokens, classes, width = size
    own = pass_of(name, options)
    other = (
        pass_of(name if against == "naive" else against, options, naive=against == "naive")
        if against
        else None
    )
    small = inputs(4, 1024, 16)
    for run in (own, other):
        if run is not None:
            run(*small)
    given = inputs(tokens, classes, width)
    if other is None:
        seconds = timed(own, given)
        return {"seconds": seconds, "peak": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    pairs = [(timed(own, given), timed(other, given)) for _ in range(REPEATS)]
    return {"seconds": min(first for first, _ in pairs), "other": min(second for _, second in pairs)}


def inputs(tokens: int, classes: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, class vectors and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(classes, width, generator=generator).mul_(0.5).requires_grad_()
    return hidden, weight, torch.randint(0, classes, (tokens,), generator=generator)


def timed(run: Callable[..., None], given: tuple[Tensor, Tensor, Tensor]) -> float:
    """Processor seconds of one forward and backward pass."""
    given[0].grad = given[1].grad = None
    begun = time.process_time()
    run(*given)
    return time.process_time() - begun


def pass_of(name: str, options: dict[str, Any], naive: bool = False) -> Callable[..., None]:
    """Forward and backward pass of a head."""
    if name == "nothing":
        return lambda hidden, weight, targets: None
    if name == "cut_cross_entropy":
        return cut_pass
    scores = plain_scores(name, options) if naive else scores_of(name, options)

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        cross_entropy(scores(hidden, weight), targets).backward()

    return run


def scores_of(name: str, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The scores of a head as it is trained; its further parameters as they start."""
    if name == "linear":
        return lambda hidden, weight: hidden @ weight.T
    module = catalogue().component("head", name).load()
    config = module.Config(**options)
    further: dict[int, dict[str, Tensor]] = {}

    def scores(hidden: Tensor, weight: Tensor) -> Tensor:
        width = weight.shape[1]
        if width not in further and hasattr(module, "parameters"):
            made = module.parameters(config, weight.detach())
            further[width] = {
                key: value.requires_grad_(value.is_floating_point()) for key, value in made.items()
            }
        rows = module.rows(config, len(weight)) if hasattr(module, "rows") else len(weight)
        result: Tensor = module.scores(config, hidden, weight[:rows], **further.get(width, {}))
        return result

    return scores


def plain_scores(name: str, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same scores with the distance by broadcasting, as the tests have it."""
    from tests.test_distance_heads import CASES

    case = next(case for case in CASES if (case.name, case.options) == (name, options))
    config = case.config()

    def scores(hidden: Tensor, weight: Tensor) -> Tensor:
        distances = case.plain(hidden[:, None], weight)
        return -2 * hidden.shape[1] * (distances + config.epsilon).log()

    return scores


def cut_pass(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Forward and backward pass of cut cross-entropy on a linear layer."""
    module = catalogue().component("loss", "cut_cross_entropy").load()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    module.hidden_losses(module.Config(), layer, hidden, targets).mean().backward()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AssayError as error:
        sys.exit(str(error))
